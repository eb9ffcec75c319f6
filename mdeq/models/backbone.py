"""What classifiers and segmenters share: stem, injection, equilibrium, feature maps; all but the head."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models._features import FeatureGetterNet, feature_take_indices
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..deq import DEQ, Equilibrium
from ..gradients import GradientSpec, spec_of
from ..layers import BATCH_NORM, CONV, Conv, SpatialDims, conv, with_metadata, without_metadata
from ..solvers import FixedPointSolver, SolverSpec, is_static
from ..state import State
from .cell import MultiscaleCell
from .implicit import MultiscaleDEQ

torch.fx.wrap("with_metadata")

MIN_SIZE = 16
"""Smallest side of an input, in pixels or voxels."""


def stem_strides(spatial_dims: int, total: int | Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the total stride of the stem, per axis 1, 2 or 4, split over its two convolutions."""
    per_axis = (total,) * spatial_dims if isinstance(total, int) else tuple(total)
    if len(per_axis) != spatial_dims or any(s not in (1, 2, 4) for s in per_axis):
        raise ValueError(f"stem_stride must be 1, 2 or 4, or a sequence of {spatial_dims} of these, got {total}")
    return tuple(min(s, 2) for s in per_axis), tuple(max(s // 2, 1) for s in per_axis)


class Stem(nn.Sequential):
    """Two convolutions `(B, in_chans, *S) -> (B, C_0, *S_finest)`, each followed by norm and ReLU."""

    conv1: Conv
    norm1: nn.Module
    act1: nn.Module
    conv2: nn.Module
    norm2: nn.Module
    act2: nn.Module


class Backbone(nn.Module):
    """Base of the models: everything up to the equilibrium, and the maps that features_only returns.

    A subclass adds `head`, from a state to a feature map of `num_features` channels, `classifier`, `num_classes`,
    `forward_head` and `reset_classifier`, and ends its constructor with `_init_weights()`.

    Args:
        in_chans: channels of the input.
        norm_momentum: momentum of the batch norms.
        device, dtype: of all parameters and buffers.
        Others: see `MDEQ`.

    Raises:
        ValueError: for a setting out of range.
    """

    num_features: int
    head_hidden_size: int
    num_classes: int
    equilibrium: MultiscaleDEQ
    head: nn.Module
    classifier: nn.Module
    pretrained_cfg: dict[str, Any]  # timm's, of models that it made

    def __init__(
        self,
        in_chans: int,
        *,
        spatial_dims: SpatialDims,
        channels: Sequence[int],
        stem_stride: int | Sequence[int],
        expansion: float,
        num_groups: int,
        dropout: float,
        weight_norm: bool,
        post_norm_affine: bool,
        solver: SolverSpec,
        gradient: GradientSpec,
        norm_momentum: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        if in_chans < 1:
            raise ValueError(f"in_chans must be >= 1, got {in_chans}")
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.spatial_dims: SpatialDims = spatial_dims
        self.in_chans = in_chans
        cell = MultiscaleCell(
            channels,
            spatial_dims=spatial_dims,
            expansion=expansion,
            num_groups=num_groups,
            dropout=dropout,
            weight_norm=weight_norm,
            post_norm_affine=post_norm_affine,
            **dd,
        )
        width, strides = channels[0], stem_strides(spatial_dims, stem_stride)
        self.stem = Stem(
            OrderedDict(
                conv1=conv(spatial_dims, in_chans, width, 3, stride=strides[0], **dd),
                norm1=BATCH_NORM[spatial_dims](width, momentum=norm_momentum, **dd),
                act1=nn.ReLU(),
                conv2=conv(spatial_dims, width, width, 3, stride=strides[1], **dd),
                norm2=BATCH_NORM[spatial_dims](width, momentum=norm_momentum, **dd),
                act2=nn.ReLU(),
            )
        )
        # The official rule: a small model at full resolution injects the stem's output as it is.
        self.inject: nn.Module = nn.Identity()
        if not (max(strides[0]) == 1 and len(channels) <= 2):
            self.inject = nn.Sequential(
                OrderedDict(
                    conv=conv(spatial_dims, width, width, 1, **dd),
                    norm=BATCH_NORM[spatial_dims](width, momentum=norm_momentum, **dd),
                    act=nn.ReLU(),
                )
            )
        self.stem_stride = tuple(a * b for a, b in zip(*strides))  # per axis
        self.size_divisor = (1,) * spatial_dims  # inputs are padded to multiples of it, per axis
        self.equilibrium = MultiscaleDEQ(cell, DEQ(solver, gradient))
        self._made_with = {"solver": self.deq.solver, "gradient": self.deq.gradient}
        self._given_args: Mapping[str, Any] = {}
        self.last_tap: int | None = None  # set by pruning: the index in feature_info where the features end
        self.feature_info = feature_table(spatial_dims, channels, stem_stride)
        self._num_stem_taps = len(self.feature_info) - len(channels)
        if spatial_dims == 3:  # what timm's loader looks at: it adapts kernels of images alone, this package these
            self._traits = {"first_conv": None}

    @torch.no_grad()
    def _init_weights(self, part: nn.Module | None = None) -> None:
        """Draw convolutions from N(0, 0.01^2) as the official code does; weight-normed ones keep PyTorch's default."""
        for module in (part or self).modules():
            if isinstance(module, CONV[self.spatial_dims]) and not parametrize.is_parametrized(module):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.normal_(module.bias, std=0.01)

    @property
    def deq(self) -> DEQ:
        """The equilibrium layer; its `solver` and `gradient` may be replaced."""
        return self._implicit().deq

    @property
    def _model_args(self) -> dict[str, Any]:
        """What timm saves in a config.json: the arguments that it was given, and the solver and the gradient as they
        are now, in words of JSON.
        """
        args = dict(self._given_args)
        for key, made in self._made_with.items():
            now = made if isinstance(self.equilibrium, nn.Identity) else getattr(self.deq, key)
            if now != made or (key in args and not isinstance(args[key], Mapping)):
                args[key] = spec_of(now)
        return args

    @_model_args.setter
    def _model_args(self, args: Mapping[str, Any]) -> None:
        self._given_args = args

    def _implicit(self) -> MultiscaleDEQ:
        if isinstance(self.equilibrium, nn.Identity):
            raise RuntimeError("this model was pruned to its stem and no longer has an equilibrium")
        return self.equilibrium

    @property
    def feature_strides(self) -> tuple[int, ...]:
        """Pixels or voxels of the input per point of the features, per axis; those of a pruned model may be coarse."""
        if self.last_tap == 0:
            return self.stem.conv1.stride
        branch = 0 if self.last_tap is None else max(self.last_tap - self._num_stem_taps, 0)
        return tuple(stride * 2**branch for stride in self.stem_stride)

    def solve(
        self,
        x: Tensor,
        *,
        z0: State | None = None,
        solver: FixedPointSolver | None = None,
        unroll: int = 0,
        jacobian_probes: int = 0,
    ) -> Equilibrium:
        """Return the equilibrium of an input `(B, in_chans, *S)`: state, statistics, and the penalty if asked for.

        Args:
            x: the input.
            z0: state to start from, such as the `state` of a similar input; zeros when absent.
            solver: replaces `model.deq.solver` for this call.
            unroll: if above 0, apply f that many times with ordinary backpropagation instead of solving.
            jacobian_probes: if above 0, estimate the Jacobian penalty with that many probes.

        Raises:
            ValueError: for an input of wrong rank, channels or size, or a z0 of wrong shapes.
        """
        return self._implicit()(self.injection(x), z0, solver, unroll, jacobian_probes)

    def injection(self, x: Tensor) -> Tensor:
        """Return what every evaluation of f gets from an input `(B, in_chans, *S)`: `(B, channels[0], *S_finest)`.

        `model.equilibrium.fn(model.injection(x))` is f itself, from a state to a state.

        Raises:
            ValueError: for an input of wrong rank, channels or size.
        """
        return self.inject(self.stem(self._prepared(x)))

    def _prepared(self, x: Tensor) -> Tensor:
        """Return an input, checked, as the stem takes it."""
        return padded(checked_input(x, self.spatial_dims, self.in_chans), self.size_divisor)

    def _features(self, x: Tensor, **options: Any) -> tuple[Tensor, Equilibrium | None]:
        """Return the features that are pooled, and the equilibrium they came from; options as in `solve`."""
        if self.last_tap is not None:  # pruned
            maps, equilibrium = self.forward_intermediates(
                x, [self.last_tap], intermediates_only=True, return_equilibrium=True, **options
            )
            return maps[0], equilibrium
        equilibrium = self.solve(x, **options)
        return self.head(equilibrium.state), equilibrium

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits of `forward_features`' result, or what the classifier would see."""
        raise NotImplementedError

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier."""
        raise NotImplementedError

    def _output(self, features: Tensor, x: Tensor) -> Tensor:
        """Return what the model gives for an input, given its features."""
        return self.forward_head(features)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the unpooled features `(B, num_features, *S)`."""
        return self._features(x)[0]

    def forward(
        self,
        x: Tensor,
        *,
        return_equilibrium: bool = False,
        z0: State | None = None,
        solver: FixedPointSolver | None = None,
        unroll: int = 0,
        jacobian_probes: int = 0,
    ) -> Tensor | tuple[Tensor, Equilibrium]:
        """Return the model's output, or it and the `Equilibrium` it came from; arguments as in `solve`."""
        options = dict(z0=z0, solver=solver, unroll=unroll, jacobian_probes=jacobian_probes)
        features, equilibrium = self._features(x, **options)
        return with_equilibrium(with_metadata(self._output(features, x), x), equilibrium, return_equilibrium)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        *,
        return_equilibrium: bool = False,
        z0: State | None = None,
        solver: FixedPointSolver | None = None,
        unroll: int = 0,
        jacobian_probes: int = 0,
    ) -> Any:
        """Return the maps of `feature_info` at `indices`: the stem, then every branch of the equilibrium.

        Args:
            x: the input.
            indices: which maps; the last n for an int, all for None.
            norm: without effect, every branch ends in a norm.
            stop_early: skip the solve if only maps of the stem are asked for; the final features are then, or where the
                last branch is not asked for, the last of these maps.
            output_fmt: only `"NCHW"` (channels second).
            intermediates_only: return the maps alone, without the final features.
            return_equilibrium: also return the `Equilibrium` (None where the solve was skipped).
            z0, solver, unroll, jacobian_probes: as in `solve`.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        whole, last = len(self.feature_info), self.last_tap
        take_indices, max_index = self._taken(indices)
        end = max_index
        if not (stop_early or intermediates_only):
            end = max(end, whole - 1 if last is None else last)
        x = self.stem.act1(self.stem.norm1(self.stem.conv1(self._prepared(x))))
        taps = [x]
        equilibrium = None
        if end > 0:
            x = self.stem.act2(self.stem.norm2(self.stem.conv2(x)))
            taps += [x][: self._num_stem_taps - 1]
        if end >= self._num_stem_taps:
            equilibrium = self._implicit()(self.inject(x), z0, solver, unroll, jacobian_probes)
            taps += [equilibrium.state[i] for i in range(len(self.feature_info) - self._num_stem_taps)]
        result = [taps[i] for i in take_indices]
        if not intermediates_only:
            final = max_index if stop_early and max_index < whole - 1 else last
            if final is None:
                assert equilibrium is not None  # all maps were asked for
                features = self.head(equilibrium.state)
            else:
                features = taps[final]
            result = (features, result)
        return with_equilibrium(result, equilibrium, return_equilibrium)

    @property
    def _num_taps(self) -> int:
        """How many of the maps of `feature_info` there still are: fewer in a model that was pruned to its stem."""
        last = self.last_tap
        return last + 1 if last is not None and last < self._num_stem_taps else len(self.feature_info)

    def _taken(self, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
        """Return which maps timm's `indices` name, counted from 0, and the last of them."""
        return feature_take_indices(self._num_taps, list(indices) if isinstance(indices, Sequence) else indices)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the maps of `feature_info` at `indices` do not need; return the indices, counted from 0.

        The branches come from one solve and stay together. Afterwards `forward_features` ends at the last map.
        """
        take_indices, max_index = self._taken(indices)
        if prune_norm or prune_head or max_index < len(self.feature_info) - 1:
            self.last_tap = max_index
            self.head = nn.Identity()
            self.num_features = self.feature_info[max_index]["num_chs"]
            self.reset_classifier(0 if prune_head else self.num_classes)
        if max_index < self._num_stem_taps:
            self.inject = nn.Identity()
            self.equilibrium = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
        if max_index == 0:
            self.stem.conv2 = self.stem.norm2 = nn.Identity()
        return take_indices

    def get_classifier(self) -> nn.Module:
        """Return the final linear layer."""
        return self.classifier

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the input of each differentiated step of f (phantom, unrolled) and compute it again in backward."""
        self.equilibrium.grad_checkpointing = enable


def feature_table(
    spatial_dims: SpatialDims, channels: Sequence[int], stem_stride: int | Sequence[int]
) -> list[dict[str, Any]]:
    """Return the feature maps of a model: the stem's, two at full resolution and else one, then every branch."""
    if len(channels) == 0:
        raise ValueError("channels must have at least one entry, got none")
    strides = stem_strides(spatial_dims, stem_stride)
    first, total = max(strides[0]), max(a * b for a, b in zip(*strides))
    table = [dict(num_chs=channels[0], reduction=first, module="stem.act1")]
    if first == 1:
        table += [dict(num_chs=channels[0], reduction=total, module="stem.act2")]
    return table + [dict(num_chs=c, reduction=total * 2**i, module=f"equilibrium.{i}") for i, c in enumerate(channels)]


# fx takes these as they are: functions of the module that calls them, without a leading underscore.
@torch.fx.wrap
def checked_input(x: Tensor, spatial_dims: int, in_chans: int) -> Tensor:
    """Return x if a model can take it, else raise ValueError."""
    x = without_metadata(x)
    if not x.is_floating_point():
        raise ValueError(f"expected a floating-point input, got {x.dtype}; scale and normalise it first")
    if x.ndim != spatial_dims + 2 or x.shape[1] != in_chans:
        axes = "H, W" if spatial_dims == 2 else "D, H, W"
        raise ValueError(f"expected an input of shape (batch, {in_chans}, {axes}), got {tuple(x.shape)}")
    if not is_static(x) and min(x.shape[2:]) < MIN_SIZE:
        raise ValueError(f"every side of the input must be >= {MIN_SIZE}, got {tuple(x.shape[2:])}")
    return x


@torch.fx.wrap
def padded(x: Tensor, divisor: Sequence[int]) -> Tensor:
    """Return x with zeros at the end of every axis of space, up to a multiple of the divisor of that axis."""
    if max(divisor) == 1:
        return x
    return F.pad(x, [n for size, d in zip(x.shape[:1:-1], reversed(divisor)) for n in (0, -size % d)])


@torch.fx.wrap
def with_equilibrium(output: Any, equilibrium: Equilibrium | None, return_equilibrium: bool) -> Any:
    return (output, equilibrium) if return_equilibrium else output


class Features(FeatureGetterNet):
    """The feature maps of a model as a list; what `timm.create_model(..., features_only=True)` returns."""

    model: Backbone

    def forward(
        self,
        x: Tensor,
        *,
        return_equilibrium: bool = False,
        z0: State | None = None,
        solver: FixedPointSolver | None = None,
    ) -> Any:
        """Return the list of maps, or the list and the `Equilibrium`; arguments as in `MDEQ.forward`."""
        return self.model.forward_intermediates(
            x,
            indices=self.out_indices,
            intermediates_only=True,
            return_equilibrium=return_equilibrium,
            z0=z0,
            solver=solver,
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.model.set_grad_checkpointing(enable)
