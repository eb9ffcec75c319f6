"""Multiscale deep equilibrium models (MDEQ) for images and volumes.

Papers:
    Multiscale Deep Equilibrium Models, Bai, Koltun and Kolter, NeurIPS 2020, https://arxiv.org/abs/2006.08656
    Stabilizing Equilibrium Models by Jacobian Regularization, Bai, Koltun and Kolter, ICML 2021,
    https://arxiv.org/abs/2106.14342

The architectures are those of the official code, https://github.com/locuslab/deq (MIT licence), written anew.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import SelectAdaptivePool2d
from timm.models import register_model
from torch import Tensor, nn

from ..gradients import GradientSpec, ImplicitGradient
from ..layers import SpatialDims
from ..solvers import Broyden, SolverSpec
from .backbone import Backbone
from .factory import cfg, create, default_cfgs_of
from .head import ClassificationHead

__all__ = ["MDEQ"]  # a list: register_model appends the entrypoints

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


class MDEQ(Backbone):
    """Multiscale deep equilibrium classifier and backbone over images `(B, C, H, W)` or volumes `(B, C, D, H, W)`.

    `model(x)` gives logits `(B, num_classes)`. In eval mode the head sees the equilibrium itself; in train mode, what
    the gradient estimator returns. `model.deq.solver` and `model.deq.gradient` may be replaced at any time. Any spatial
    size from 16 up works, odd ones included: branches halve rounding up.

    Args:
        in_chans: channels of the input.
        num_classes: classes; 0 leaves out the classifier.
        global_pool: pooling before the classifier, as in timm (`"avg"`, `"max"`, `"catavgmax"`, ...); with
            num_classes=0 also `""`, for none.
        spatial_dims: 2 for images, 3 for volumes.
        channels: C_i per branch, highest resolution first; one branch makes a single-scale model.
        head_channels: width of the head's bottleneck per branch.
        num_features: channels of the feature map that is pooled.
        stem_stride: total stride of the stem, 1, 2 or 4, for all axes or per axis.
        expansion, num_groups, dropout, weight_norm, post_norm_affine: see `MultiscaleCell`.
        drop_rate: dropout before the classifier.
        solver: forward solver, or its description; either is kept in config.json, unless it is of your own class.
        gradient: gradient estimator, or its description; the same.
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
            norm_momentum=0.1,
            device=device,
            dtype=dtype,
        )
        if len(channels) != len(head_channels):
            raise ValueError(f"head_channels must have one entry per branch: {len(channels)}, got {len(head_channels)}")
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.num_classes = num_classes
        self.drop_rate = drop_rate
        self.num_features = self.head_hidden_size = num_features
        self.head = ClassificationHead(channels, head_channels, num_features, spatial_dims=spatial_dims, **dd)
        self._make_classifier(num_classes, global_pool, dd)
        self.head_drop = nn.Dropout(drop_rate)
        self._init_weights()

    def _make_classifier(self, num_classes: int, global_pool: str, dd: dict[str, Any]) -> None:
        pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        self.head_hidden_size = self.num_features * pool.feat_mult()
        classifier = nn.Linear(self.head_hidden_size, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.global_pool, self.classifier = pool.train(self.training), classifier.train(self.training)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits `(B, num_classes)` of `forward_features`' result, or what the classifier would see."""
        x = self.head_drop(
            self.global_pool(x if self.spatial_dims == 2 or not self.global_pool.pool_type else x.flatten(3))
        )
        if pre_logits:
            return x
        if self.num_classes > 0 and not self.global_pool.pool_type:
            raise ValueError('a classifier needs pooled features; global_pool="" requires num_classes=0')
        return self.classifier(x)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, and the pooling where one is named."""
        reference = next(self.parameters())
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        self.num_classes = num_classes
        self._make_classifier(num_classes, pool, dict(device=reference.device, dtype=reference.dtype))

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


def _cifar(pool: int, **kwargs: Any) -> dict[str, Any]:
    size = dict(num_classes=10, input_size=(3, 32, 32), pool_size=(pool, pool), crop_pct=1.0)
    return cfg(mean=CIFAR_MEAN, std=CIFAR_STD, **size, **kwargs)


default_cfgs = default_cfgs_of(
    {
        "mdeq_tiny_cifar.untrained": _cifar(16),
        "mdeq_large_cifar.untrained": _cifar(4),
        "deq_tiny_cifar.untrained": _cifar(32),
        "mdeq_small.untrained": cfg(),
        "mdeq_large.untrained": cfg(),
        "mdeq_xlarge.untrained": cfg(),
        "test_mdeq.untrained": cfg(input_size=(3, 64, 64), pool_size=(2, 2), num_classes=10),
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


@register_model
def mdeq_tiny_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The official CIFAR TINY: two branches of 24 channels, 0.16M parameters."""
    args = dict(_CIFAR, channels=(24, 24), head_channels=(8, 16), num_features=200, dropout=0.25)
    return create(MDEQ, "mdeq_tiny_cifar", pretrained, args, kwargs)


@register_model
def mdeq_large_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The official CIFAR LARGE: four branches, 11M parameters."""
    args = dict(_CIFAR, channels=(32, 64, 128, 256), head_channels=(14, 28, 56, 112), num_features=1680, dropout=0.3)
    return create(MDEQ, "mdeq_large_cifar", pretrained, args, kwargs)


@register_model
def deq_tiny_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Single-scale: the first branch of `mdeq_tiny_cifar` alone."""
    args = dict(_CIFAR, channels=(24,), head_channels=(8,), num_features=200, dropout=0.25)
    return create(MDEQ, "deq_tiny_cifar", pretrained, args, kwargs)


@register_model
def mdeq_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The official ImageNet SMALL, 17M parameters."""
    args = dict(_IMAGENET, channels=(32, 64, 128, 256), head_channels=(24, 48, 96, 192))
    return create(MDEQ, "mdeq_small", pretrained, args, kwargs)


@register_model
def mdeq_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The official ImageNet LARGE, 67M parameters."""
    args = dict(_IMAGENET, channels=(80, 160, 320, 640), head_channels=(32, 64, 128, 256))
    return create(MDEQ, "mdeq_large", pretrained, args, kwargs)


@register_model
def mdeq_xlarge(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The official ImageNet XL, 90M parameters."""
    args = dict(_IMAGENET, channels=(88, 176, 352, 704), head_channels=(32, 64, 128, 256), expansion=6)
    return create(MDEQ, "mdeq_xlarge", pretrained, args, kwargs)


@register_model
def test_mdeq(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The shape of the ImageNet models with under 20,000 parameters, for tests."""
    args = dict(
        _IMAGENET, channels=(4, 4, 8, 8), head_channels=(4, 4, 4, 4), num_features=32, expansion=2, num_groups=2
    )
    args["solver"], args["gradient"] = Broyden(max_steps=8), ImplicitGradient(Broyden(max_steps=8))
    return create(MDEQ, "test_mdeq", pretrained, args, kwargs)
