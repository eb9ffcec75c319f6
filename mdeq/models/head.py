"""The heads, from a state to one feature map.

Classification: bottlenecks that widen every branch, merged from the finest branch down to the coarsest. Segmentation:
all branches at the resolution of the finest, side by side.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import BATCH_NORM, SpatialDims, conv, resize
from ..state import State


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions `(B, C, *S) -> (B, 4 hidden, *S)`; norms of the main path have no weight and bias."""

    expansion = 4

    def __init__(self, in_channels: int, hidden: int, *, spatial_dims: SpatialDims, **dd: Any) -> None:
        super().__init__()
        out_channels = self.expansion * hidden
        norm = BATCH_NORM[spatial_dims]
        self.conv1 = conv(spatial_dims, in_channels, hidden, 1, **dd)
        self.norm1 = norm(hidden, affine=False, **dd)
        self.conv2 = conv(spatial_dims, hidden, hidden, 3, **dd)
        self.norm2 = norm(hidden, affine=False, **dd)
        self.conv3 = conv(spatial_dims, hidden, out_channels, 1, **dd)
        self.norm3 = norm(out_channels, affine=False, **dd)
        self.shortcut = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = nn.Sequential(
                conv(spatial_dims, in_channels, out_channels, 1, **dd), norm(out_channels, **dd)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        out = F.relu(self.norm2(self.conv2(out)))
        return F.relu(self.norm3(self.conv3(out)) + self.shortcut(x))


class ClassificationHead(nn.Module):
    """Merges a state into one feature map `(B, num_features, *S_coarsest)`, as the official classifiers do.

    Args:
        channels: C_i per branch.
        head_channels: bottleneck width per branch.
        num_features: channels of the result.
        spatial_dims: 2 or 3.
    """

    def __init__(
        self,
        channels: Sequence[int],
        head_channels: Sequence[int],
        num_features: int,
        *,
        spatial_dims: SpatialDims,
        **dd: Any,
    ) -> None:
        super().__init__()
        norm = BATCH_NORM[spatial_dims]
        self.num_features = num_features
        self.bottlenecks = nn.ModuleList(
            Bottleneck(c, h, spatial_dims=spatial_dims, **dd) for c, h in zip(channels, head_channels, strict=True)
        )
        widths = [Bottleneck.expansion * h for h in head_channels]
        self.downsamples = nn.ModuleList(
            nn.Sequential(conv(spatial_dims, fine, coarse, 3, stride=2, bias=True, **dd), norm(coarse, **dd), nn.ReLU())
            for fine, coarse in pairwise(widths)
        )
        self.final = nn.Sequential(
            conv(spatial_dims, widths[-1], num_features, 1, bias=True, **dd), norm(num_features, **dd), nn.ReLU()
        )

    def forward(self, state: State) -> Tensor:
        y = self.bottlenecks[0](state[0])
        for i, downsample in enumerate(self.downsamples):
            y = self.bottlenecks[i + 1](state[i + 1]) + downsample(y)
        return self.final(y)


class SegmentationHead(nn.Module):
    """Merges a state into one feature map `(B, sum of C_i, *S_finest)`, as the official segmentation networks do.

    Args:
        channels: C_i per branch.
        spatial_dims: 2 or 3.
        norm_momentum: momentum of the batch norm.
    """

    def __init__(self, channels: Sequence[int], *, spatial_dims: SpatialDims, norm_momentum: float, **dd: Any) -> None:
        super().__init__()
        self.num_features = sum(channels)
        self.conv = conv(spatial_dims, self.num_features, self.num_features, 1, bias=True, **dd)
        self.norm = BATCH_NORM[spatial_dims](self.num_features, momentum=norm_momentum, **dd)

    def forward(self, state: State) -> Tensor:
        return F.relu(self.norm(self.conv(side_by_side(state))))


@torch.fx.wrap  # its sizes depend on data
def side_by_side(state: State) -> Tensor:
    """Return all branches at the resolution of the finest, along channels `(B, sum of C_i, *S_finest)`."""
    return torch.cat([state[0], *(resize(z, state[0].shape[2:], "linear") for z in state[1:])], dim=1)
