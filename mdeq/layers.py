"""Layers that exist once for 2D and 3D: the number of spatial dimensions is an argument, or read off a tensor."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SpatialDims = Literal[2, 3]
Conv = nn.Conv2d | nn.Conv3d
CONV: dict[int, type[Conv]] = {2: nn.Conv2d, 3: nn.Conv3d}
BatchNorm = nn.BatchNorm2d | nn.BatchNorm3d
BATCH_NORM: dict[int, type[BatchNorm]] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_LINEAR_MODE = {2: "bilinear", 3: "trilinear"}


class GroupNorm(nn.GroupNorm):
    """PyTorch's, also of groups of one element, where its bias is all that is left.

    PyTorch's refuses a batch in which no group has more, so that a sample could be solved beside others and not alone.
    """

    def forward(self, x: Tensor) -> Tensor:
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def conv(
    spatial_dims: SpatialDims,
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    stride: int | Sequence[int] = 1,
    bias: bool = False,
    **dd: Any,
) -> Conv:
    """Return a convolution, padded so that stride 1 keeps the size. `dd`: device and dtype."""
    dd["stride"] = stride if isinstance(stride, int) else tuple(stride)
    return CONV[spatial_dims](in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias, **dd)


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is a convolution and no more than that: no subclass with a forward of its own, no hooks.

    Parametrizations, such as weight norm, are no more than that: their weight is an attribute.
    """
    forward = getattr(layer.forward, "__func__", None)
    return forward in (nn.Conv2d.forward, nn.Conv3d.forward) and not _has_hooks(layer)


def _has_hooks(layer: nn.Module) -> bool:
    hooks = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks)
    return any(hooks)


def writable(x: Tensor, layer: nn.Module) -> Tensor:
    """Return x, an input or output of a layer, to be written to: a copy of it where hooks of the layer may keep it."""
    return x.clone() if _has_hooks(layer) else x


def convolve(layer: Conv, x: Tensor, kernel: Tensor | None) -> Tensor:
    """Apply a convolution layer with a kernel computed before, such as one whose weight norm was folded.

    Without a kernel the layer is called, and a copy returned: others may write to it, and hooks keep the output.
    """
    return layer(x).clone() if kernel is None else layer._conv_forward(x, kernel, layer.bias)


def resize(x: Tensor, size: Sequence[int], mode: Literal["nearest", "linear"] = "nearest") -> Tensor:
    """Return x `(B, C, *S)` at spatial size `size`; by size and never by factor, so that odd sizes come back.

    `"linear"` aligns corners, as the official segmentation networks do.
    """
    if mode == "nearest":
        return F.interpolate(x, size=tuple(size), mode="nearest")
    return F.interpolate(x, size=tuple(size), mode=_LINEAR_MODE[x.ndim - 2], align_corners=True)


def channel_mask(x: Tensor, channels: int, p: float) -> Tensor:
    """Return an inverted-dropout mask `(B, channels, 1, ...)` of rate p for the batch, rank, device and dtype of x."""
    keep = x.new_full((x.shape[0], channels, *(1 for _ in x.shape[2:])), 1 - p)
    return torch.bernoulli(keep) / (1 - p)


def without_metadata(x: Tensor) -> Tensor:
    """Return one of MONAI's tensors, which do more at every operation, as a plain one."""
    tensor: Any = x
    return tensor.as_tensor() if hasattr(x, "copy_meta_from") else x


def with_metadata(output: Tensor, x: Tensor) -> Tensor:
    """Return an output as what the input x is: MONAI's tensors know where they lie and what was done to them."""
    if not hasattr(x, "copy_meta_from"):
        return output
    result: Any = type(x)(output)
    result.copy_meta_from(x)
    return result
