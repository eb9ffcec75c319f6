"""The state of an equilibrium: a tuple of tensors outside the solver, one flat tensor `(B, D)` inside it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

State = tuple[Tensor, ...]
"""One tensor `(B, ...)` per branch, highest resolution first; feature maps are `(B, C_i, *S_i)`."""


@dataclass(frozen=True)
class StateLayout:
    """Shapes of a `State` without the batch axis; converts to and from the flat `(B, D)` form.

    Attributes:
        shapes: of the branches.
        channels_last: whether the channels of each branch are its last axis in the flat form. Solvers do not depend on
            the order of elements, so a state keeps the order of f, without a copy.
    """

    shapes: tuple[torch.Size, ...]
    channels_last: tuple[bool, ...]

    @classmethod
    def of(cls, state: State) -> "StateLayout":
        """Return the layout of a state.

        Raises:
            ValueError: if it is not a tuple of floating-point tensors of one dtype and one batch size.
        """
        if not isinstance(state, (tuple, list)) or not state or any(getattr(x, "ndim", 0) == 0 for x in state):
            raise ValueError("a state must be a tuple of tensors (batch, ...), one per branch")
        if any(x.dtype != state[0].dtype or not x.is_floating_point() for x in state):
            raise ValueError(f"tensors of a state must share a floating-point dtype, got {[x.dtype for x in state]}")
        if any(x.shape[0] != state[0].shape[0] for x in state):
            raise ValueError(f"tensors of a state must share a batch size, got {[tuple(x.shape) for x in state]}")
        return cls(tuple(x.shape[1:] for x in state), tuple(map(lies_channels_last, state)))

    @property
    def dim(self) -> int:
        """D, the number of elements of one sample."""
        return sum(math.prod(shape) for shape in self.shapes)

    def flatten(self, state: State, dtype: torch.dtype | None = None) -> Tensor:
        """Return the state as one tensor `(B, D)`, optionally in another dtype.

        Raises:
            ValueError: if the shapes are not those of the layout.
        """
        shapes = tuple(x.shape[1:] for x in state)
        if shapes != self.shapes:
            raise ValueError(f"expected a state of shapes {[*map(tuple, self.shapes)]}, got {[*map(tuple, shapes)]}")
        ordered = [x.movedim(1, -1) if last else x for x, last in zip(state, self.channels_last)]
        parts = [x.reshape(x.shape[0], math.prod(shape)) for x, shape in zip(ordered, shapes)]
        return torch.cat([part.to(dtype or part.dtype) for part in parts], dim=1)

    def unflatten(self, z: Tensor) -> State:
        """Return views of z `(B, D)`; no copy is made."""
        parts = z.split([math.prod(shape) for shape in self.shapes], dim=1)
        return tuple(map(_shaped, parts, self.shapes, self.channels_last))


def lies_channels_last(x: Tensor) -> bool:
    """Whether feature maps `(B, C, H, W)` or `(B, C, D, H, W)` lie in memory with the channels as last axis."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    one = x[:1]  # samples of a state lie as far apart as the state is long
    return x.ndim in formats and not one.is_contiguous() and one.is_contiguous(memory_format=formats[x.ndim])


def _shaped(part: Tensor, shape: torch.Size, channels_last: bool) -> Tensor:
    if channels_last:
        return part.view(part.shape[0], *shape[1:], shape[0]).movedim(-1, 1)
    return part.view(part.shape[0], *shape)
