"""Picard iteration: the plainest solver, and the example of how little a solver has to say."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import FixedPointSolver, _require, _require_number


class _NoMemory:
    def take(self, index: Tensor) -> "_NoMemory":
        return self


@dataclass(frozen=True, kw_only=True)
class Picard(FixedPointSolver):
    """Damped fixed-point iteration z <- z + damping (f(z) - z).

    Converges where f is a contraction; with damping below 1 also where J has eigenvalues of large negative real part.

    Args:
        damping: share of the full step that is taken, in (0, 1].
    """

    damping: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_number("damping", self.damping)
        _require(0 < self.damping <= 1, "damping must be in (0, 1]", self.damping)

    def init(self, z0: Tensor) -> _NoMemory:
        return _NoMemory()

    def propose(self, memory: _NoMemory, z: Tensor, f: Tensor, g: Tensor) -> Tensor:
        return f if self.damping == 1 else torch.add(z, g, alpha=self.damping)
