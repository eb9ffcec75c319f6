"""Multiscale deep equilibrium models (MDEQ) for images and volumes.

Papers:
    Multiscale Deep Equilibrium Models, Bai, Koltun and Kolter, NeurIPS 2020, https://arxiv.org/abs/2006.08656
    Stabilizing Equilibrium Models by Jacobian Regularization, Bai, Koltun and Kolter, ICML 2021,
    https://arxiv.org/abs/2106.14342

The architectures are those of the official code, https://github.com/locuslab/deq (MIT licence), written anew.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import SelectAdaptivePool2d
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    register_notrace_function,
)
from timm.models._features import FeatureGetterNet, feature_take_indices
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..deq import DEQ, Equilibrium
from ..gradients import GradientSpec, ImplicitGradient
from ..layers import BATCH_NORM, CONV, SpatialDims, conv
from ..solvers import Broyden, FixedPointSolver, SolverSpec, is_static
from ..state import State
from .cell import MultiscaleCell
from .head import ClassificationHead
from .implicit import MultiscaleDEQ
from .official import checkpoint_filter_fn

__all__ = ["MDEQ"]  # a list: register_model appends the entrypoints

MIN_SIZE = 16
"""Smallest side of an input, in pixels or voxels."""

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def _stem_strides(spatial_dims: int, total: int | Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Split the total stride of the stem, per axis 1, 2 or 4, over its two convolutions."""
    per_axis = (total,) * spatial_dims if isinstance(total, int) else tuple(total)
    if len(per_axis) != spatial_dims or any(s not in (1, 2, 4) for s in per_axis):
        raise ValueError(f"stem_stride must be 1, 2 or 4, or {spatial_dims} of these, got {total}")
    return tuple(min(s, 2) for s in per_axis), tuple(max(s // 2, 1) for s in per_axis)


class MDEQ(nn.Module):
    """Multiscale deep equilibrium classifier and backbone over images `(B, C, H, W)` or volumes `(B, C, D, H, W)`.

    `model(x)` gives logits `(B, num_classes)`. In eval mode the head sees the equilibrium itself; in train mode, what
    the gradient estimator returns. `model.deq.solver` and `model.deq.gradient` may be replaced at any time. Any spatial
    size from 16 up works, odd ones included: branches halve rounding up.

    Args:
        in_chans: channels of the input.
        num_classes: classes; 0 leaves out the classifier.
        global_pool: pooling before the classifier, as in timm (`"avg"`, `"max"`, `"catavgmax"`, ..., `""` for none).
        spatial_dims: 2 for images, 3 for volumes.
        channels: C_i per branch, highest resolution first; one branch makes a single-scale model.
        head_channels: width of the head's bottleneck per branch.
        num_features: channels of the feature map that is pooled.
        stem_stride: total stride of the stem, 1, 2 or 4, for all axes or per axis.
        expansion, num_groups, dropout, weight_norm, post_norm_affine: see `MultiscaleCell`.
        drop_rate: dropout before the classifier.
        solver: forward solver, or its description.
        gradient: gradient estimator, or its description.
        device, dtype: of all parameters and buffers.

    Raises:
        ValueError: for a setting out of range.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        *,
        spatial_dims: SpatialDims = 2,
        channels: Sequence[int] = (32, 64, 128, 256),
        head_channels: Sequence[int] = (24, 48, 96, 192),
        num_features: int = 2048,
        stem_stride: int | Sequence[int] = 4,
        expansion: float = 5,
        num_groups: int = 8,
        dropout: float = 0.0,
        drop_rate: float = 0.0,
        weight_norm: bool = True,
        post_norm_affine: bool = True,
        solver: SolverSpec = Broyden(max_steps=18),
        gradient: GradientSpec = ImplicitGradient(Broyden(max_steps=20)),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if len(channels) != len(head_channels):
            raise ValueError(f"head_channels must have one entry per branch, {len(channels)}, got {len(head_channels)}")
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.spatial_dims = spatial_dims
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.drop_rate = drop_rate
        self.num_features = self.head_hidden_size = num_features

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
        width, norm = channels[0], BATCH_NORM[spatial_dims]
        strides = _stem_strides(spatial_dims, stem_stride)
        self.stem = nn.Sequential(
            OrderedDict(
                conv1=conv(spatial_dims, in_chans, width, 3, stride=strides[0], **dd),
                norm1=norm(width, **dd),
                act1=nn.ReLU(),
                conv2=conv(spatial_dims, width, width, 3, stride=strides[1], **dd),
                norm2=norm(width, **dd),
                act2=nn.ReLU(),
            )
        )
        # The official rule: a small model at full resolution injects the stem's output as it is.
        self.inject = nn.Identity()
        full_resolution = all(s == 1 for s in strides[0])
        if not (full_resolution and len(channels) <= 2):
            self.inject = nn.Sequential(
                OrderedDict(conv=conv(spatial_dims, width, width, 1, **dd), norm=norm(width, **dd), act=nn.ReLU())
            )
        self.equilibrium = MultiscaleDEQ(cell, DEQ(solver, gradient))
        self.head = ClassificationHead(channels, head_channels, num_features, spatial_dims=spatial_dims, **dd)
        self._make_classifier(num_classes, global_pool, dd)
        self.head_drop = nn.Dropout(drop_rate)

        self.last_tap: int | None = None  # set by pruning: the index in feature_info where the features end
        first, total = max(strides[0]), max(strides[0]) * max(strides[1])
        self.feature_info = [dict(num_chs=width, reduction=first, module="stem.act1")]
        if full_resolution:
            self.feature_info += [dict(num_chs=width, reduction=total, module="stem.act2")]
        self._num_stem_taps = len(self.feature_info)
        self.feature_info += [
            dict(num_chs=c, reduction=total * 2**i, module=f"equilibrium.{i}") for i, c in enumerate(channels)
        ]
        self._init_weights()

    def _make_classifier(self, num_classes: int, global_pool: str, dd: dict[str, Any]) -> None:
        pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        self.head_hidden_size = self.num_features
        width = self.num_features * pool.feat_mult()
        classifier = nn.Linear(width, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.global_pool, self.classifier = pool.train(self.training), classifier.train(self.training)

    @torch.no_grad()
    def _init_weights(self) -> None:
        """Draw convolutions from N(0, 0.01^2) as the official code does; weight-normed ones keep PyTorch's default."""
        for module in self.modules():
            if isinstance(module, CONV[self.spatial_dims]) and not parametrize.is_parametrized(module):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.normal_(module.bias, std=0.01)

    @property
    def deq(self) -> DEQ:
        """The equilibrium layer; its `solver` and `gradient` may be replaced."""
        return self.equilibrium.deq

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
        x = checked_input(x, self.spatial_dims, self.in_chans)
        return self.equilibrium(self.inject(self.stem(x)), z0, solver, unroll, jacobian_probes)

    def _features(self, x: Tensor, **options: Any) -> tuple[Tensor, Equilibrium | None]:
        """Return the features that are pooled, and the equilibrium they came from; options as in `solve`."""
        if self.last_tap is not None:  # pruned
            maps, equilibrium = self.forward_intermediates(
                x, [self.last_tap], intermediates_only=True, return_equilibrium=True, **options
            )
            return maps[0], equilibrium
        equilibrium = self.solve(x, **options)
        return self.head(equilibrium.state), equilibrium

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the unpooled features `(B, num_features, *S_coarsest)`."""
        return self._features(x)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits `(B, num_classes)` of `forward_features`' result, or what the classifier would see."""
        x = self.head_drop(
            self.global_pool(x if self.spatial_dims == 2 or not self.global_pool.pool_type else x.flatten(3))
        )
        return x if pre_logits else self.classifier(x)

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
        """Return logits `(B, num_classes)`, or logits and the `Equilibrium` they came from; arguments as in `solve`."""
        options = dict(z0=z0, solver=solver, unroll=unroll, jacobian_probes=jacobian_probes)
        features, equilibrium = self._features(x, **options)
        return with_equilibrium(self.forward_head(features), equilibrium, return_equilibrium)

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
            stop_early: skip the solve if only maps of the stem are asked for.
            output_fmt: only `"NCHW"` (channels second).
            intermediates_only: return the maps alone, without the final features.
            return_equilibrium: also return the `Equilibrium` (None where the solve was skipped).
            z0, solver, unroll, jacobian_probes: as in `solve`.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        complete = not (stop_early or intermediates_only) and self.last_tap is None
        x = checked_input(x, self.spatial_dims, self.in_chans)
        x = self.stem.act1(self.stem.norm1(self.stem.conv1(x)))
        taps = [x]
        equilibrium = None
        if complete or max_index > 0:
            x = self.stem.act2(self.stem.norm2(self.stem.conv2(x)))
            taps += [x][: self._num_stem_taps - 1]
        if complete or max_index >= self._num_stem_taps:
            equilibrium = self.equilibrium(self.inject(x), z0, solver, unroll, jacobian_probes)
            taps += [equilibrium.state[i] for i in range(len(self.feature_info) - self._num_stem_taps)]
        result = [taps[i] for i in take_indices]
        if not intermediates_only:
            result = (self.head(equilibrium.state) if complete else taps[max_index], result)
        return with_equilibrium(result, equilibrium, return_equilibrium)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the maps of `feature_info` at `indices` do not need; return the indices, counted from 0.

        The branches come from one solve and stay together. Afterwards `forward_features` ends at the last map.
        """
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        if prune_norm or prune_head or max_index < len(self.feature_info) - 1:
            self.last_tap = max_index
            self.head = nn.Identity()
            self.num_features = self.feature_info[max_index]["num_chs"]
            self.reset_classifier(0 if prune_head else self.num_classes)
        if max_index < self._num_stem_taps:
            self.inject = self.equilibrium = nn.Identity()
        if max_index == 0:
            self.stem.conv2 = self.stem.norm2 = nn.Identity()
        return take_indices

    def get_classifier(self) -> nn.Module:
        """Return the final linear layer."""
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, and the pooling where one is named."""
        reference = next(self.parameters())
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        self.num_classes = num_classes
        self._make_classifier(num_classes, pool, dict(device=reference.device, dtype=reference.dtype))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the input of each differentiated step of f (phantom, unrolled) and compute it again in backward."""
        self.equilibrium.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the parameter groups for layer-wise learning rates: stem, equilibrium, head."""
        return dict(
            stem=r"^stem",
            blocks=[
                (r"^inject|^equilibrium", (0,)),
                (r"^head\.bottlenecks|^head\.downsamples", (1,)),
                (r"^head\.final", (2,)),
            ],
        )


# Functions of their own, without a leading underscore: fx takes such ones, and no others, as they are.
@register_notrace_function
def checked_input(x: Tensor, spatial_dims: int, in_chans: int) -> Tensor:
    """Return x if a model can take it, else raise ValueError."""
    if x.ndim != spatial_dims + 2 or x.shape[1] != in_chans:
        axes = "H, W" if spatial_dims == 2 else "D, H, W"
        raise ValueError(f"expected an input (batch, {in_chans}, {axes}), got {tuple(x.shape)}")
    if not is_static(x) and min(x.shape[2:]) < MIN_SIZE:
        raise ValueError(f"every side of the input must be >= {MIN_SIZE}, got {tuple(x.shape[2:])}")
    return x


@register_notrace_function
def with_equilibrium(output: Any, equilibrium: Equilibrium | None, return_equilibrium: bool) -> Any:
    return (output, equilibrium) if return_equilibrium else output


class MDEQFeatures(FeatureGetterNet):
    """The feature maps of an MDEQ as a list; what `timm.create_model(..., features_only=True)` returns."""

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


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1",
        "classifier": "classifier",
        "license": "apache-2.0",
        **kwargs,
    }


def _cifar(pool: int, **kwargs: Any) -> dict[str, Any]:
    size = dict(num_classes=10, input_size=(3, 32, 32), pool_size=(pool, pool), crop_pct=1.0)
    return _cfg(mean=CIFAR_MEAN, std=CIFAR_STD, **size, **kwargs)


default_cfgs = generate_default_cfgs(
    {
        "mdeq_tiny_cifar.untrained": _cifar(16),
        "mdeq_large_cifar.untrained": _cifar(4),
        "deq_tiny_cifar.untrained": _cifar(32),
        "mdeq_small.untrained": _cfg(),
        "mdeq_large.untrained": _cfg(),
        "mdeq_xlarge.untrained": _cfg(),
        "test_mdeq.untrained": _cfg(input_size=(3, 64, 64), pool_size=(2, 2), num_classes=10),
    }
)

# The official limits (forward, backward): CIFAR models stop on the relative residual, ImageNet ones on the absolute.
_CIFAR: dict[str, Any] = dict(
    stem_stride=1,
    post_norm_affine=False,
    solver=Broyden(max_steps=18),
    gradient=ImplicitGradient(Broyden(max_steps=20)),
)
_IMAGENET: dict[str, Any] = dict(
    stem_stride=4,
    num_features=2048,
    solver=Broyden(max_steps=26, stop_mode="abs"),
    gradient=ImplicitGradient(Broyden(max_steps=27, stop_mode="abs")),
)


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]) -> nn.Module:
    args = {**defaults, **kwargs}
    num_taps = len(args["channels"]) + (2 if args["stem_stride"] == 1 else 1)
    return build_model_with_cfg(
        MDEQ,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=tuple(range(num_taps)), feature_cls=MDEQFeatures),
        **args,
    )


@register_model
def mdeq_tiny_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The official CIFAR TINY: two branches of 24 channels, 0.16M parameters."""
    args = dict(_CIFAR, channels=(24, 24), head_channels=(8, 16), num_features=200, dropout=0.25)
    return _create("mdeq_tiny_cifar", pretrained, args, kwargs)


@register_model
def mdeq_large_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The official CIFAR LARGE: four branches, 11M parameters."""
    args = dict(_CIFAR, channels=(32, 64, 128, 256), head_channels=(14, 28, 56, 112), num_features=1680, dropout=0.3)
    return _create("mdeq_large_cifar", pretrained, args, kwargs)


@register_model
def deq_tiny_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Single-scale: the first branch of `mdeq_tiny_cifar` alone."""
    args = dict(_CIFAR, channels=(24,), head_channels=(8,), num_features=200, dropout=0.25)
    return _create("deq_tiny_cifar", pretrained, args, kwargs)


@register_model
def mdeq_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The official ImageNet SMALL, 17M parameters."""
    args = dict(_IMAGENET, channels=(32, 64, 128, 256), head_channels=(24, 48, 96, 192))
    return _create("mdeq_small", pretrained, args, kwargs)


@register_model
def mdeq_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The official ImageNet LARGE, 67M parameters."""
    args = dict(_IMAGENET, channels=(80, 160, 320, 640), head_channels=(32, 64, 128, 256))
    return _create("mdeq_large", pretrained, args, kwargs)


@register_model
def mdeq_xlarge(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The official ImageNet XL, 90M parameters."""
    args = dict(_IMAGENET, channels=(88, 176, 352, 704), head_channels=(32, 64, 128, 256), expansion=6)
    return _create("mdeq_xlarge", pretrained, args, kwargs)


@register_model
def test_mdeq(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The shape of the ImageNet models with under 20,000 parameters, for tests."""
    args = dict(
        _IMAGENET, channels=(4, 4, 8, 8), head_channels=(4, 4, 4, 4), num_features=32, expansion=2, num_groups=2
    )
    args["solver"], args["gradient"] = Broyden(max_steps=8), ImplicitGradient(Broyden(max_steps=8))
    return _create("test_mdeq", pretrained, args, kwargs)
