"""The multiscale cell: the map f(z, injection) whose fixed point is the model's representation."""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from ..layers import Conv, GroupNorm, SpatialDims, channel_mask, conv, convolve, is_plain, resize, writable
from ..state import State, lies_channels_last

Injection = tuple[Tensor | None, ...]
"""The input-dependent term added inside f, per branch; None where there is none."""
Kernels = dict[Conv, Tensor]
"""The kernel of every plain convolution of a cell, weight norm folded, fixed during a solve.

A layer without a kernel here is called as it is: one with hooks, such as those of pruning, or another in its place.
"""


def _normed(layer: Conv, enabled: bool) -> Conv:
    return cast(Conv, weight_norm(layer)) if enabled else layer


class ResidualBlock(nn.Module):
    """Per-branch block `(B, C, *S)`: conv, norm, ReLU, conv, + injection, norm, + skip, ReLU, norm."""

    def __init__(
        self,
        channels: int,
        *,
        spatial_dims: SpatialDims,
        expansion: float,
        num_groups: int,
        weight_norm: bool,
        **dd: Any,
    ) -> None:
        super().__init__()
        hidden = int(expansion * channels)
        self.conv1 = _normed(conv(spatial_dims, channels, hidden, 3, **dd), weight_norm)
        self.norm1 = GroupNorm(num_groups, hidden, **dd)
        self.conv2 = _normed(conv(spatial_dims, hidden, channels, 3, **dd), weight_norm)
        self.norm2 = GroupNorm(num_groups, channels, **dd)
        self.norm3 = GroupNorm(num_groups, channels, **dd)

    @property
    def layers(self) -> list[Conv]:
        """The convolutions."""
        return [self.conv1, self.conv2]

    def forward(self, z: Tensor, injection: Tensor | None, mask: Tensor | None, kernels: Kernels) -> Tensor:
        # In place wherever autograd has no need of what is overwritten: fresh memory costs more than the arithmetic.
        hidden = self.norm1(convolve(self.conv1, z, kernels.get(self.conv1)))
        hidden = F.relu_(writable(hidden, self.norm1))
        out = convolve(self.conv2, hidden, kernels.get(self.conv2))
        if mask is not None:
            out *= mask
        if injection is not None:
            out += injection
        out = writable(self.norm2(out), self.norm2)
        out += z
        return self.norm3(F.relu_(out))


class Downsample(nn.Module):
    """Finer branch to coarser: stride-2 conv and norm, as often as needed, ReLU between; the last changes channels."""

    def __init__(
        self, in_channels: int, out_channels: int, steps: int, *, spatial_dims: SpatialDims, num_groups: int, **dd: Any
    ) -> None:
        super().__init__()
        widths = [in_channels] * steps + [out_channels]
        self.convs = nn.ModuleList(
            conv(spatial_dims, widths[k], widths[k + 1], 3, stride=2, **dd) for k in range(steps)
        )
        self.norms = nn.ModuleList(GroupNorm(num_groups, width, **dd) for width in widths[1:])

    @property
    def layers(self) -> list[Conv]:
        """The convolutions."""
        return list(self.convs)  # pyright: ignore[reportReturnType]

    def forward(self, x: Tensor, size: Sequence[int], kernels: Kernels) -> Tensor:
        for step, (layer, norm) in enumerate(zip(self.layers, self.norms)):
            x = F.relu_(writable(x, self.norms[step - 1])) if step else x
            x = norm(convolve(layer, x, kernels.get(layer)))  # (B, C, *S) -> (B, C, *ceil(S / 2))
        return x


class Upsample(nn.Module):
    """Coarser branch to finer: 1x1 conv and norm at the coarse resolution, then nearest-neighbour enlargement."""

    def __init__(
        self, in_channels: int, out_channels: int, *, spatial_dims: SpatialDims, num_groups: int, **dd: Any
    ) -> None:
        super().__init__()
        self.conv = conv(spatial_dims, in_channels, out_channels, 1, **dd)
        self.norm = GroupNorm(num_groups, out_channels, **dd)

    @property
    def layers(self) -> list[Conv]:
        """The convolutions."""
        return [self.conv]

    def forward(self, x: Tensor, size: Sequence[int], kernels: Kernels) -> Tensor:
        return resize(self.norm(convolve(self.conv, x, kernels.get(self.conv))), size)


class Same(nn.Module):
    """A branch to itself: no change."""

    def forward(self, x: Tensor, size: Sequence[int], kernels: Kernels) -> Tensor:
        return x


class PostFuse(nn.Module):
    """After fusion, per branch: ReLU, 1x1 conv, norm with half the groups."""

    def __init__(
        self, channels: int, *, spatial_dims: SpatialDims, num_groups: int, weight_norm: bool, affine: bool, **dd: Any
    ) -> None:
        super().__init__()
        self.conv = _normed(conv(spatial_dims, channels, channels, 1, **dd), weight_norm)
        self.norm = GroupNorm(num_groups // 2, channels, affine=affine, **dd)

    @property
    def layers(self) -> list[Conv]:
        """The convolutions."""
        return [self.conv]

    def forward(self, x: Tensor, kernels: Kernels) -> Tensor:
        """Return the output `(B, C, *S)`; x is overwritten."""
        return self.norm(convolve(self.conv, F.relu_(writable(x, self)), kernels.get(self.conv)))


class MultiscaleCell(nn.Module):
    """f(z, injection): a residual block per branch, then fusion of every branch into every branch.

    A pure function of its arguments: dropout masks and folded kernels are made before a solve and passed in. With one
    branch there is nothing to fuse, and the block's output is f.

    Args:
        channels: C_i per branch, highest resolution first; each divisible by num_groups.
        spatial_dims: 2 or 3.
        expansion: hidden width of a block over its width.
        num_groups: groups of every group norm but the last, which has half as many.
        dropout: rate of the variational dropout inside the blocks, in [0, 1).
        weight_norm: reparametrize block and post-fusion convolutions by direction and length.
        post_norm_affine: whether the norm after fusion has weight and bias.

    Raises:
        ValueError: for a setting out of range.

    Reference:
        Bai, Koltun and Kolter 2020, Multiscale Deep Equilibrium Models, section 3 and Fig. 2.
    """

    def __init__(
        self,
        channels: Sequence[int],
        *,
        spatial_dims: SpatialDims = 2,
        expansion: float = 5,
        num_groups: int = 8,
        dropout: float = 0.0,
        weight_norm: bool = True,
        post_norm_affine: bool = True,
        **dd: Any,
    ) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}")
        if num_groups < 2 or num_groups % 2:
            raise ValueError(f"num_groups must be even and >= 2, got {num_groups}")
        for c in channels:
            if c % num_groups or int(expansion * c) % num_groups:
                raise ValueError(
                    f"channels and expansion * channels must be divisible by num_groups={num_groups}, got {c}"
                )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.channels = tuple(channels)
        self.dropout = dropout
        branches = range(len(self.channels))
        common: dict[str, Any] = dict(spatial_dims=spatial_dims, num_groups=num_groups, **dd)
        self.blocks = nn.ModuleList(
            ResidualBlock(c, expansion=expansion, weight_norm=weight_norm, **common) for c in self.channels
        )
        multi = len(self.channels) > 1

        def link(target: int, source: int) -> nn.Module:
            ends = (self.channels[source], self.channels[target])
            if source == target:
                return Same()
            return Downsample(*ends, target - source, **common) if source < target else Upsample(*ends, **common)

        # fuse[i][j] takes branch j to branch i
        self.fuse = nn.ModuleList(nn.ModuleList(link(i, j) for j in branches) for i in branches if multi)
        self.post_fuse = nn.ModuleList(
            PostFuse(c, weight_norm=weight_norm, affine=post_norm_affine, **common) for c in self.channels if multi
        )

    @property
    def _weight(self) -> Tensor:
        """One that is always there, for the dtype and the device of all."""
        return cast(ResidualBlock, self.blocks[0]).norm1.weight

    def branch_sizes(self, size: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Return the spatial size of every branch, given that of branch 0: halves, rounded up."""
        sizes = [tuple(size)]
        for _ in self.channels[1:]:
            sizes.append(tuple((s + 1) // 2 for s in sizes[-1]))
        return tuple(sizes)

    def zero_state(self, injection: Tensor) -> State:
        """Return the state of zeros for a branch-0 injection `(B, C_0, *S)`, in the parameters' dtype.

        Its memory format is that of the injection: a state that lies channels last stays so in the solver.
        """
        # Not the injection's dtype: under autocast that is the low-precision one.
        dtype = self._weight.dtype
        sizes = self.branch_sizes(injection.shape[2:])
        batch, last = injection.shape[0], lies_channels_last(injection)
        zeros = (
            injection.new_zeros((batch, *((*s, c) if last else (c, *s))), dtype=dtype)
            for c, s in zip(self.channels, sizes)
        )
        return tuple(z.movedim(-1, 1) if last else z for z in zeros)

    def sample_masks(self, x: Tensor) -> State | None:
        """Return a dropout mask `(B, C_i, 1, ...)` per branch for a batch like x; None in eval mode or at rate 0."""
        if not self.training or self.dropout == 0:
            return None
        return tuple(channel_mask(x, c, self.dropout) for c in self.channels)

    def kernels(self) -> Kernels:
        """Return every plain convolution's kernel, weight norm folded, in the dtype that autocast would give it.

        Computed once per solve; gradients reach the parameters through it.
        """
        parts = [m for m in self.modules() if isinstance(m, (ResidualBlock, Downsample, Upsample, PostFuse))]
        kernels = {layer: layer.weight for part in parts for layer in part.layers if is_plain(layer)}
        device = self._weight.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            low = torch.get_autocast_dtype(device)  # float64 stays as it is
            kernels = {m: k if k.dtype == torch.float64 else k.to(low) for m, k in kernels.items()}
        return kernels

    def forward(
        self, z: State, injection: Injection, masks: State | None = None, kernels: Kernels | None = None
    ) -> State:
        """Return f(z), of the shapes of z.

        Args:
            z: the state.
            injection: one entry per branch, of that branch's shape, or None.
            masks: what `sample_masks` gave for this solve.
            kernels: what `kernels` gave for this solve; computed here when absent.
        """
        kernels = self.kernels() if kernels is None else kernels
        parts = zip(self.blocks, z, injection, masks or (None,) * len(z), strict=True)
        blocks = tuple(block(z_i, u, mask, kernels) for block, z_i, u, mask in parts)
        if not self.post_fuse:
            return blocks
        fused = []
        for links, post, z_i in zip(self.fuse, self.post_fuse, z):
            steps = zip(links, blocks)  # pyright: ignore[reportArgumentType]
            first, second, *others = (link(x, z_i.shape[2:], kernels) for link, x in steps)
            total = first + second  # one of them may be the block's own output, which others need as it is
            for x in others:
                total += x
            fused.append(post(total, kernels))
        return tuple(fused)
