"""Multiscale deep equilibrium models for volumes `(B, C, D, H, W)`: the same classes with three spatial dimensions."""

from typing import Any

from timm.models import register_model
from torch import nn

from ..gradients import ImplicitGradient
from ..solvers import Broyden
from .factory import cfg, create, default_cfgs_of
from .mdeq import MDEQ
from .segmenter import MDEQSegmenter

__all__: list[str] = []  # register_model appends the entrypoints


def _cfg(**kwargs: Any) -> dict[str, Any]:
    """One channel that is normalised per volume beforehand. Depth is not part of a size in timm, and free."""
    size = dict(input_size=(1, 48, 48), pool_size=None, crop_pct=1.0)
    return cfg(**{**size, "mean": (0.0,), "std": (1.0,), **kwargs})


default_cfgs = default_cfgs_of(
    {
        "mdeq3d_tiny.untrained": _cfg(num_classes=10),
        "mdeq3d_small.untrained": _cfg(num_classes=10),
        "mdeq3d_tiny_seg.untrained": _cfg(num_classes=3),
        "mdeq3d_small_seg.untrained": _cfg(num_classes=3),
        "test_mdeq3d.untrained": _cfg(num_classes=4, input_size=(1, 16, 16)),
    }
)

# The implicit gradient holds one evaluation of f, whatever the number of steps: with volumes memory is what is short.
_VOLUMES: dict[str, Any] = dict(
    spatial_dims=3,
    in_chans=1,
    stem_stride=2,
    expansion=3,
    solver=Broyden(max_steps=12, tol=1e-2),
    gradient=ImplicitGradient(Broyden(max_steps=12, tol=1e-2)),
)
_TINY: dict[str, Any] = dict(_VOLUMES, channels=(16, 32))
_SMALL: dict[str, Any] = dict(_VOLUMES, channels=(32, 64, 128))


@register_model
def mdeq3d_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A classifier of two branches, under 0.3M parameters."""
    args = dict(_TINY, head_channels=(8, 8), num_features=128)
    return create(MDEQ, "mdeq3d_tiny", pretrained, args, kwargs)


@register_model
def mdeq3d_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A classifier of three branches."""
    args = dict(_SMALL, head_channels=(8, 16, 32), num_features=512)
    return create(MDEQ, "mdeq3d_small", pretrained, args, kwargs)


@register_model
def mdeq3d_tiny_seg(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A segmenter of two branches, under 0.3M parameters."""
    return create(MDEQSegmenter, "mdeq3d_tiny_seg", pretrained, dict(_TINY, pad_to_stride=True), kwargs)


@register_model
def mdeq3d_small_seg(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A segmenter of three branches."""
    return create(MDEQSegmenter, "mdeq3d_small_seg", pretrained, dict(_SMALL, pad_to_stride=True), kwargs)


@register_model
def test_mdeq3d(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A classifier of two branches with under 20,000 parameters, for tests."""
    args = dict(_VOLUMES, channels=(4, 8), head_channels=(2, 2), num_features=16, expansion=2, num_groups=2)
    args["solver"], args["gradient"] = Broyden(max_steps=8), ImplicitGradient(Broyden(max_steps=8))
    return create(MDEQ, "test_mdeq3d", pretrained, args, kwargs)
