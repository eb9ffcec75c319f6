"""Multiscale deep equilibrium models for segmentation: a class for every pixel or voxel.

Paper: Multiscale Deep Equilibrium Models, Bai, Koltun and Kolter, NeurIPS 2020, https://arxiv.org/abs/2006.08656.
The `small`, `large` and `xlarge` networks are the official Cityscapes ones, https://github.com/locuslab/deq (MIT
licence), written anew.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import register_model
from torch import Tensor, nn

from ..gradients import GradientSpec, ImplicitGradient
from ..layers import SpatialDims, conv, resize
from ..solvers import Broyden, SolverSpec
from .backbone import Backbone
from .factory import cfg, create, default_cfgs_of
from .head import SegmentationHead

__all__ = ["MDEQSegmenter"]  # a list: register_model appends the entrypoints


class MDEQSegmenter(Backbone):
    """Multiscale deep equilibrium segmenter of images `(B, C, H, W)` or volumes `(B, C, D, H, W)`.

    `model(x)` gives logits at the size of the input, `(B, num_classes, *S)`; `forward_head(forward_features(x))` those
    at the resolution of the finest branch, which is what the official networks return. Solver, gradient and input sizes
    are as in `MDEQ`, with which it shares stem, injection and equilibrium, names of the weights included.

    Args:
        in_chans: channels of the input.
        num_classes: classes; 0 leaves out the classifier, and the output is the features.
        spatial_dims: 2 for images, 3 for volumes.
        channels: C_i per branch, highest resolution first; one branch makes a single-scale model.
        stem_stride: total stride of the stem, 1, 2 or 4, for all axes or per axis.
        expansion, num_groups, dropout, weight_norm, post_norm_affine: see `MultiscaleCell`.
        pad_to_stride: pad inputs with zeros, at their ends, to a multiple of the coarsest branch's stride, and crop the
            logits. Otherwise the branches lie up to half a point apart at other sizes, and labels suffer. Features and
            states have the padded size. The official networks do not pad.
        drop_rate: dropout before the classifier.
        norm_momentum: momentum of the batch norms.
        solver: forward solver, or its description.
        gradient: gradient estimator, or its description.
        device, dtype: of all parameters and buffers.

    Raises:
        ValueError: for a setting out of range.

    Example:
        >>> model = MDEQSegmenter(spatial_dims=3, in_chans=1, num_classes=3)
        >>> model(torch.randn(1, 1, 32, 48, 40)).shape
        torch.Size([1, 3, 32, 48, 40])
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 19,
        *,
        spatial_dims: SpatialDims = 2,
        channels: Sequence[int] = (32, 64, 128),
        stem_stride: int | Sequence[int] = 2,
        expansion: float = 3,
        num_groups: int = 8,
        dropout: float = 0.0,
        drop_rate: float = 0.0,
        weight_norm: bool = True,
        post_norm_affine: bool = True,
        pad_to_stride: bool = False,
        norm_momentum: float = 0.01,
        solver: SolverSpec = Broyden(max_steps=18),
        gradient: GradientSpec = ImplicitGradient(Broyden(max_steps=20)),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_chans,
            spatial_dims=spatial_dims,
            channels=channels,
            stem_stride=stem_stride,
            expansion=expansion,
            num_groups=num_groups,
            dropout=dropout,
            weight_norm=weight_norm,
            post_norm_affine=post_norm_affine,
            solver=solver,
            gradient=gradient,
            norm_momentum=norm_momentum,
            device=device,
            dtype=dtype,
        )
        if pad_to_stride:
            self.size_divisor = tuple(stride * 2 ** (len(channels) - 1) for stride in self.stem_stride)
        self.drop_rate = drop_rate
        self.head = SegmentationHead(
            channels, spatial_dims=spatial_dims, norm_momentum=norm_momentum, device=device, dtype=dtype
        )
        self.num_features = self.head_hidden_size = self.head.num_features
        self.reset_classifier(num_classes)
        self.head_drop = nn.Dropout(drop_rate)
        self._init_weights()

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits `(B, num_classes, *S_finest)` of `forward_features`' result, or the classifier's input."""
        x = self.head_drop(x)
        return x if pre_logits else self.classifier(x)

    def _output(self, features: Tensor, x: Tensor) -> Tensor:
        return enlarged(self.forward_head(features), x, self.feature_strides)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier.

        Raises:
            ValueError: for a pooling, which a segmenter has none of.
        """
        if global_pool:
            raise ValueError(f"a segmenter has no pooling, got global_pool={global_pool!r}")
        reference = next(self.parameters())
        dd: dict[str, Any] = dict(device=reference.device, dtype=reference.dtype)
        self.num_classes = num_classes
        self.head_hidden_size = self.num_features
        self.classifier = nn.Identity()
        if num_classes > 0:
            self.classifier = conv(self.spatial_dims, self.num_features, num_classes, 1, bias=True, **dd)
            self._init_weights(self.classifier)
        self.classifier.train(self.training)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the parameter groups for layer-wise learning rates: stem, equilibrium, head."""
        return dict(stem=r"^stem", blocks=[(r"^inject|^equilibrium", (0,)), (r"^head", (1,))])


@torch.fx.wrap
def enlarged(logits: Tensor, x: Tensor, strides: Sequence[int]) -> Tensor:
    """Return logits at the size of the input x, as if that were padded at its end to a multiple of the strides.

    Aligned corners stretch a map of n / stride points to n and one of (n + 1) / stride to n + 1 by nearly the same
    factor, but the latter to n by another one: labels would lie up to a pixel apart at even and at odd sizes.
    """
    size = [n * stride for n, stride in zip(logits.shape[2:], strides)]
    whole = resize(logits, size, "linear")
    if not torch.compiler.is_compiling():
        return whole[(..., *(slice(n) for n in x.shape[2:]))]
    for axis in range(2, x.ndim):  # a slice would ask of a graph for any size whether it cuts something off
        whole = whole.index_select(axis, torch.arange(x.shape[axis], device=x.device))
    return whole


def _cfg(**kwargs: Any) -> dict[str, Any]:
    """Cityscapes: 19 classes, whole images of 1024x2048 in tests."""
    size = dict(input_size=(3, 512, 1024), test_input_size=(3, 1024, 2048), pool_size=None, crop_pct=1.0)
    return cfg(num_classes=19, **size, **kwargs)


default_cfgs = default_cfgs_of(
    {
        "mdeq_tiny_seg.untrained": _cfg(),
        "mdeq_small_seg.untrained": _cfg(),
        "mdeq_large_seg.untrained": _cfg(),
        "mdeq_xlarge_seg.untrained": _cfg(),
    }
)

# The official limits (forward, backward), on the absolute residual.
_CITYSCAPES: dict[str, Any] = dict(
    stem_stride=4,
    expansion=5,
    solver=Broyden(max_steps=27, stop_mode="abs"),
    gradient=ImplicitGradient(Broyden(max_steps=30, stop_mode="abs")),
)


@register_model
def mdeq_tiny_seg(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Three branches, 1.2M parameters; not an official network."""
    args = dict(
        channels=(24, 48, 96),
        stem_stride=4,
        expansion=5,
        dropout=0.05,
        pad_to_stride=True,
        solver=Broyden(max_steps=18),
        gradient=ImplicitGradient(Broyden(max_steps=20)),
    )
    return create(MDEQSegmenter, "mdeq_tiny_seg", pretrained, args, kwargs)


@register_model
def mdeq_small_seg(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The official Cityscapes SMALL, 9M parameters."""
    args = dict(_CITYSCAPES, channels=(32, 64, 128, 256), dropout=0.05)
    return create(MDEQSegmenter, "mdeq_small_seg", pretrained, args, kwargs)


@register_model
def mdeq_large_seg(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The official Cityscapes LARGE, 56M parameters."""
    args = dict(_CITYSCAPES, channels=(80, 160, 320, 640), dropout=0.03)
    return create(MDEQSegmenter, "mdeq_large_seg", pretrained, args, kwargs)


@register_model
def mdeq_xlarge_seg(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The official Cityscapes XL, 80M parameters."""
    args = dict(_CITYSCAPES, channels=(88, 176, 352, 704), expansion=6, dropout=0.04)
    return create(MDEQSegmenter, "mdeq_xlarge_seg", pretrained, args, kwargs)
