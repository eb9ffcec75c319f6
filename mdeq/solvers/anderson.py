"""Anderson acceleration, with a Gram matrix that gains one row a step."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from .base import FixedPointSolver, _require, _require_count, _require_number, is_static, small_dtype


@dataclass
class _History:
    """What is mixed, and differences of residuals in a ring of M = history - 1 slots."""

    mixed: list[Tensor]  # of (B, D), z_k + beta g_k, the newest last; tensors of their own, so they need no copy
    dg: Tensor  # (B, M, D) g_k - g_{k-1}
    gram: Tensor  # (B, M, M) inner products of dg
    rhs: Tensor  # (B, M) dg^T g_k
    last_g: Tensor  # (B, D)
    bounds: Tensor  # (B, M + 2) 0, gamma with the oldest first, and 1 from there on
    count: int = 0  # calls so far, k

    def take(self, index: Tensor) -> "_History":
        # One after the other, slots to the front of the batch: a second history beside this one would be the peak.
        for j in range(min(self.count - 1, self.dg.shape[1])):
            self.dg[: len(index), j] = self.dg[index, j]
        for j, mixed in enumerate(self.mixed):
            self.mixed[j] = mixed[index]
        gram, rhs, last_g, bounds = (x[index] for x in (self.gram, self.rhs, self.last_g, self.bounds))
        return _History(self.mixed, self.dg[: len(index)], gram, rhs, last_g, bounds, self.count)


@dataclass(frozen=True, kw_only=True)
class Anderson(FixedPointSolver):
    """Anderson acceleration in difference form: the mix of recent iterates whose residual is least in the linear model.

    Args:
        history: iterates that are mixed, the current one included (the peers' `m`); 1 is damped Picard iteration.
        ridge: Tikhonov term of the least-squares problem, relative to columns of unit length. It is never taken below
            ten machine epsilons of the inner products' dtype (the state's; float32 for float16), where the problem is
            noise.
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

    @property
    def _slots(self) -> int:
        return max(min(self.history - 1, self.max_steps - 1), 0)

    def init(self, z0: Tensor) -> _History:
        (batch, dim), slots = z0.shape, self._slots
        small, wide = small_dtype(z0), torch.promote_types(z0.dtype, torch.float32)
        bounds = z0.new_ones((batch, slots + 2), dtype=wide)
        bounds[:, 0].fill_(0)
        return _History(
            mixed=[],
            dg=z0.new_empty((batch, slots, dim)),
            gram=z0.new_zeros((batch, slots, slots), dtype=small),
            rhs=z0.new_zeros((batch, slots), dtype=small),
            last_g=z0,
            bounds=bounds,
        )

    def propose(self, memory: _History, z: Tensor, f: Tensor, g: Tensor) -> Tensor:
        k, slots = memory.count, self._slots
        memory.count += 1
        mixed = f if self.beta == 1 else torch.add(z, g, alpha=self.beta)
        memory.mixed = [*memory.mixed[-slots:], mixed] if slots else []
        last_g, memory.last_g = memory.last_g, g
        if k == 0 or slots == 0:
            return mixed
        newest, used = (k - 1) % slots, min(k, slots)
        dg = _subtract(g, last_g, memory.dg[:, newest])
        # One pass over dg, for the right-hand side. The new row of the Gram matrix is its change since the last step,
        # but for the diagonal.
        small = small_dtype(g)
        rhs = torch.bmm(g.to(small).unsqueeze(1), memory.dg[:, :used].to(small).mT).squeeze(1)
        row = rhs - memory.rhs[:, :used]
        row[:, newest] = torch.linalg.vector_norm(dg, dim=1, dtype=small).square()
        memory.gram[:, newest, :used] = memory.gram[:, :used, newest] = row
        memory.rhs[:, :used] = rhs
        gamma = self._least_squares(memory.gram[:, :used, :used], rhs)
        # m_k - sum_j gamma_j (m_{j+1} - m_j), as weights of the m_j. Coarse products of whole iterates would be off by
        # thousandths of their length: they are summed element by element (no TF32), and in no less than float32.
        memory.bounds[:, 1 : used + 1] = gamma.roll(-1 - newest, dims=1)
        weights = memory.bounds[:, 1 : used + 2] - memory.bounds[:, : used + 1]
        wide = weights.dtype
        step = mixed.to(wide) * weights[:, -1:]
        for j, earlier in enumerate(memory.mixed[:-1]):
            step.addcmul_(earlier.to(wide), weights[:, j : j + 1])
        return step.to(g.dtype)

    def _least_squares(self, gram: Tensor, rhs: Tensor) -> Tensor:
        """Solve gram gamma = rhs per sample, `(B, M, M)` and `(B, M)`, after scaling every column to unit length."""
        eps, tiny = torch.finfo(gram.dtype).eps, torch.finfo(gram.dtype).tiny
        if gram.dtype == torch.bfloat16:  # linear algebra has no such kernels
            gram, rhs = gram.float(), rhs.float()
        # A column of zeros takes no part: whatever its scale, products with it are 0.
        scale = gram.diagonal(dim1=1, dim2=2).clamp(min=tiny).rsqrt()
        system = gram * scale.unsqueeze(1) * scale.unsqueeze(2)
        system = system + max(self.ridge, 10 * eps) * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
        if is_static(rhs):
            gamma = _eliminate(system, rhs * scale)
        else:  # the checked version would raise on one bad sample, and wait for the device to do so
            gamma = torch.linalg.solve_ex(system, rhs * scale)[0]
        return gamma * scale


def _subtract(x: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """Write x - y into out and return it: in one pass, but for graphs and derivatives, which have no such form."""
    in_graph = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if in_graph or x.requires_grad or unpack_dual(x).tangent is not None:
        return out.copy_(x).sub_(y)
    return torch.sub(x, y, out=out)


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
