"""Anderson acceleration, with a Gram matrix that gains one row a step."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .base import FixedPointSolver, _require, _require_count, _require_number, is_static


@dataclass
class _History:
    """Differences of successive residuals and iterates, in a ring of M = history - 1 slots."""

    dg: Tensor  # (B, M, D) g_{k+1} - g_k
    dz: Tensor  # (B, M, D) (z_{k+1} - z_k) + beta (g_{k+1} - g_k)
    gram: Tensor  # (B, M, M) inner products of dg
    last_g: Tensor  # (B, D)
    last_step: Tensor  # (B, D)
    count: int = 0  # calls so far

    def take(self, index: Tensor) -> "_History":
        return _History(*(getattr(self, f.name)[index] for f in fields(self)[:-1]), self.count)


@dataclass(frozen=True, kw_only=True)
class Anderson(FixedPointSolver):
    """Anderson acceleration in difference form: the mix of recent iterates whose residual is least in the linear model.

    Args:
        history: iterates that are mixed, the current one included (the peers' `m`); 1 is damped Picard iteration.
        ridge: Tikhonov term of the least-squares problem, relative to columns of unit length. It is never taken below
            ten machine epsilons of the state's dtype, where the problem is noise.
        beta: mixing, the share of the residual that is added to the mixed iterate.

    Reference:
        Walker and Ni 2011, Anderson acceleration for fixed-point iterations, Eq. 2.2 and 4.2.
    """

    history: int = 6
    ridge: float = 1e-10
    beta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_count("history", self.history, 1)
        _require_number("ridge", self.ridge)
        _require(self.ridge >= 0, "ridge must be >= 0", self.ridge)
        _require_number("beta", self.beta)
        _require(self.beta > 0, "beta must be > 0", self.beta)

    def init(self, z0: Tensor) -> _History:
        batch, dim = z0.shape
        slots = max(min(self.history - 1, self.max_steps - 1), 0)
        dg, dz = z0.new_empty(batch, slots, dim), z0.new_empty(batch, slots, dim)
        return _History(dg, dz, z0.new_zeros(batch, slots, slots), z0, z0)

    def direction(self, memory: _History, z: Tensor, g: Tensor) -> Tensor:
        slots = memory.dg.shape[1]
        step = self.beta * g
        if memory.count > 0 and slots > 0:
            slot = (memory.count - 1) % slots
            dg = g - memory.last_g
            memory.dg[:, slot] = dg
            memory.dz[:, slot] = memory.last_step + self.beta * dg
            used = min(memory.count, slots)
            # One pass over the history: the new row of the Gram matrix, and the right-hand side.
            products = memory.dg[:, :used] @ torch.stack((dg, g), dim=2)  # (B, M, 2)
            memory.gram[:, slot, :used] = memory.gram[:, :used, slot] = products[:, :, 0]
            gamma = self._least_squares(memory.gram[:, :used, :used], products[:, :, 1])
            step = step - torch.bmm(gamma.unsqueeze(1), memory.dz[:, :used]).squeeze(1)
        memory.last_g, memory.last_step, memory.count = g, step, memory.count + 1
        return step

    def _least_squares(self, gram: Tensor, rhs: Tensor) -> Tensor:
        """Solve gram gamma = rhs per sample, `(B, M, M)` and `(B, M)`, after scaling every column to unit length."""
        half = gram.dtype
        if half in (torch.bfloat16, torch.float16):  # linear algebra has no such kernels
            gram, rhs = gram.float(), rhs.float()
        length = gram.diagonal(dim1=1, dim2=2).sqrt()
        scale = torch.where(length > 0, 1 / length, torch.zeros_like(length))  # a column of zeros takes no part
        ridge = max(self.ridge, 10 * torch.finfo(half).eps)
        system = gram * scale.unsqueeze(1) * scale.unsqueeze(2)
        system = system + ridge * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
        if is_static(rhs):
            gamma = _eliminate(system, rhs * scale)
        else:  # the checked version would raise on one bad sample, and wait for the device to do so
            gamma = torch.linalg.solve_ex(system, rhs * scale)[0]
        return (gamma * scale).to(half)


def _eliminate(matrix: Tensor, rhs: Tensor) -> Tensor:
    """Solve small positive definite systems `(B, M, M)`, `(B, M)` by Gauss-Jordan elimination without pivoting.

    In graphs: ONNX has no operator that solves a linear system.
    """
    table = torch.cat((matrix, rhs.unsqueeze(2)), dim=2)  # (B, M, M + 1)
    unit = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    for k in range(matrix.shape[1]):
        row = table[:, k : k + 1] / table[:, k : k + 1, k : k + 1]
        # Column k becomes that of the unit matrix: row k is replaced, a multiple of it taken off the others.
        table = table - (table[:, :, k : k + 1] - unit[k].unsqueeze(1)) * row
    return table[:, :, -1]
