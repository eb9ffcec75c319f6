"""Limited-memory "good" Broyden: the inverse Jacobian as a product of rank-one factors, built from the steps alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import FixedPointSolver, FlatFn, SolveStats, _require, _require_count, is_static, small_dtype

_FIRST_SLOTS = 64
"""Directions that there is room for at first, if max_steps allows more than twice as many: few solves take them."""


@dataclass
class _Directions:
    """The directions d_0 .. d_{k-1} since the last restart, and the small matrices that stand for their products."""

    d: Tensor  # (B, M, D)
    solve: Tensor  # (B, M, M) lower triangular, maps d_j^T g / |d_j|^2 to the coefficients c_j
    scale: Tensor  # (B, M) 1 / |d_j|^2, zero for a zero direction
    length: Tensor  # (B, M) step length taken along d_j, 1 without a line search
    count: int = 0  # k, the same for all samples

    def grow(self, slots: int) -> None:
        """Make room for more directions."""
        batch, old, dim = self.d.shape
        d, solve, scale, length = self.d, self.solve, self.scale, self.length
        self.d = d.new_empty((batch, slots, dim))
        self.solve, self.scale = solve.new_zeros((batch, slots, slots)), scale.new_zeros((batch, slots))
        self.length = length.new_ones((batch, slots))
        self.d[:, :old], self.solve[:, :old, :old] = d, solve
        self.scale[:, :old], self.length[:, :old] = scale, length

    def take(self, index: Tensor) -> "_Directions":
        # One direction at a time, to the front of the batch: a second history beside this one would be the peak.
        for j in range(self.count):
            self.d[: len(index), j] = self.d[index, j]
        d = self.d[: len(index)]
        return _Directions(d, self.solve[index], self.scale[index], self.length[index], self.count)


@dataclass(frozen=True, kw_only=True)
class Broyden(FixedPointSolver):
    """Good Broyden on g(z) = f(z) - z from the inverse Jacobian -I; the first step is a Picard step.

    Kelley's form: with directions d_j and step lengths l_j the updated inverse is

        H_{j+1} = (I + u_j d_j^T / |d_j|^2) H_j,   u_j = d_{j+1} - (1 - l_j) d_j,

    so the directions are all that is stored: one vector a step, where the textbook form keeps two. The products are
    evaluated at once, by way of the Gram matrix of the directions: a step reads the history twice, whatever its length.

    Args:
        history: secant pairs that are kept; when full, all are forgotten and the iteration restarts from -I, since a
            pair depends on its predecessors and overwriting the oldest one is unsound. `None` keeps all of them.
        history_dtype: `"bfloat16"` keeps them in half the memory of float32, products and iterates stay in the dtype
            of the state: a step is off by a few thousandths of its length, which the next one corrects. `None` keeps
            them in the dtype of the state.
        line_search: most halvings of a step in search of sufficient decrease (Armijo) of the absolute residual; 0 takes
            unit steps. Samples whose step was good are not changed, but each halving evaluates f on the batch, and
            whether one is due is a look at values that waits for the device.

    Reference:
        Kelley 1995, Iterative Methods for Linear and Nonlinear Equations, section 7.3.
        Byrd, Nocedal and Schnabel 1994, Representations of quasi-Newton matrices and their use in limited memory
        methods.
    """

    history: int | None = None
    history_dtype: Literal["bfloat16"] | None = None
    line_search: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.history is not None:
            _require_count("history", self.history, 1)
        allowed = self.history_dtype in (None, "bfloat16")
        _require(allowed, "history_dtype must be 'bfloat16' or None", repr(self.history_dtype))
        _require_count("line_search", self.line_search, 0)

    @property
    def _most_slots(self) -> int:
        return self.max_steps if self.history is None else min(self.history + 1, self.max_steps)

    def init(self, z0: Tensor) -> _Directions:
        batch, dim = z0.shape
        dtype = z0.dtype if self.history_dtype is None else torch.bfloat16
        most = self._most_slots
        slots = most if most <= 2 * _FIRST_SLOTS else _FIRST_SLOTS  # to grow takes both histories for a moment
        return _Directions(
            d=z0.new_empty((batch, slots, dim), dtype=dtype),
            solve=z0.new_zeros((batch, slots, slots), dtype=small_dtype(z0)),
            scale=z0.new_zeros((batch, slots), dtype=small_dtype(z0)),
            length=z0.new_ones((batch, slots), dtype=small_dtype(z0)),
        )

    def direction(self, memory: _Directions, z: Tensor, g: Tensor) -> Tensor:
        if memory.count == self._most_slots:
            memory.count = 0  # full: restart
        elif memory.count == memory.d.shape[1]:
            memory.grow(min(2 * memory.count, self._most_slots))
        k = memory.count
        memory.count += 1
        memory.d[:, k] = g
        if k == 0:
            return g
        # v = -H_{k-1} g = g + sum_j c_j u_j with c_j = d_j^T v_j / |d_j|^2, v_j the partial sum before term j.
        # One pass over the history for d_j^T d_{k-1} and d_j^T g, which lie side by side in it. A CPU is faster at this
        # order of the factors, with the long axis last in both.
        small = small_dtype(g)
        products = (torch.bmm(part[:, k - 1 :], part[:, :k].mT) for part in _parts(memory.d[:, : k + 1], small))
        gram, right = reduce(torch.add, products).unbind(1)  # (B, k) each
        short = 1 - memory.length[:, :k] if self.line_search else None
        self._append_row(memory, gram, short)
        c = torch.bmm(memory.solve[:, :k, :k], (right * memory.scale[:, :k]).unsqueeze(2)).squeeze(2)
        weights = F.pad(c, (1, 0))  # 0, c_0 .. c_{k-2}, 1
        weights[:, -1].fill_(1)
        if short is not None:
            weights[:, :-1] -= short * c
        # d_k = (v - (1 - l) c_{k-1} d_{k-1}) / (1 - c_{k-1}); a vanishing denominator means no secant information.
        denominator = 1 - c[:, -1:]
        denominator = denominator.masked_fill(denominator.abs() <= 10 * torch.finfo(g.dtype).eps, 1)
        weights = (weights / denominator).unsqueeze(1)
        steps = [torch.bmm(weights, part).squeeze(1).to(g.dtype) for part in _parts(memory.d[:, : k + 1], small)]
        step = steps[0] if len(steps) == 1 else torch.cat(steps, dim=1)
        memory.d[:, k] = step
        return step

    def secants(self, memory: _Directions) -> tuple[Tensor, ...]:
        return memory.d[:, : memory.count], memory.length[:, : memory.count]

    def inverse_transposed(self, secants: tuple[Tensor, ...], stats: SolveStats, w: Tensor) -> Tensor:
        # The directions are those of the last steps; a sample that had stopped before took no part in the rest.
        directions, length = secants
        steps, count, dtype, w = len(stats.trace) - 1, directions.shape[1], w.dtype, w.to(small_dtype(w))
        valid = stats.num_steps - (steps - count)
        for j in reversed(range(count - 1)):
            d, following = directions[:, j].to(w.dtype), directions[:, j + 1].to(w.dtype)
            square = torch.linalg.vecdot(d, d)
            u = following - (1 - length[:, j : j + 1]) * d
            counts = (j + 1 < valid) & (square > 0)
            share = torch.linalg.vecdot(u, w) / square
            # What a sample that had stopped holds from then on need not be finite.
            w = torch.where(counts.unsqueeze(1), w + share.unsqueeze(1) * d, w)
        return w.to(dtype)

    @staticmethod
    def _append_row(memory: _Directions, gram: Tensor, short: Tensor | None) -> None:
        """Extend the inverse of the triangular system by the row of the last direction, given d_j^T d_{k-1} `(B, k)`.

        Row j of the system reads c_j - sum_{i<j} (d_j^T u_i / |d_j|^2) c_i = d_j^T g / |d_j|^2. Where steps may be cut,
        `short` is 1 - l_j.
        """
        last = gram.shape[1] - 1
        square = gram[:, last]
        known = square >= torch.finfo(square.dtype).tiny  # of a denormal number the reciprocal is infinite
        memory.scale[:, last] = (1 / square).masked_fill(~known, 0)
        memory.solve[:, last, last].fill_(1)  # an assignment would make a tensor on the host first
        if last > 0:
            products = gram[:, 1:] if short is None else gram[:, 1:] - short[:, :-1] * gram[:, :-1]
            row = (products * memory.scale[:, last : last + 1]).unsqueeze(1)
            memory.solve[:, last, :last] = torch.bmm(row, memory.solve[:, :last, :last]).squeeze(1)

    @property
    def looks_back(self) -> bool:
        return self.line_search > 0

    def advance(
        self, fn: FlatFn, memory: _Directions, z: Tensor, g: Tensor, trial: Tensor
    ) -> tuple[Tensor, Tensor, int]:
        step = trial - z if self.line_search else None
        trial, image, nfe = super().advance(fn, memory, z, g, trial)
        if step is None:
            return trial, image, nfe
        small = small_dtype(g)
        start = torch.linalg.vector_norm(g, dim=1, dtype=small)
        length = torch.ones_like(start)
        for _ in range(self.line_search):
            # Written so that a residual of nan is shortened too; a resting sample (zero step) needs nothing.
            good = torch.linalg.vector_norm(image - trial, dim=1, dtype=small) <= (1 - 1e-4 * length) * start
            short = ~good & (step != 0).any(dim=1)
            if not is_static(z) and not bool(short.any()):
                break
            length = torch.where(short, 0.5 * length, length)
            halved = z + length.unsqueeze(1).to(z.dtype) * step
            trial = torch.where(short.unsqueeze(1), halved, trial)
            image = torch.where(short.unsqueeze(1), fn(trial), image)
            nfe += 1
        memory.length[:, memory.count - 1] = length
        return trial, image, nfe


def _parts(history: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield a history `(B, k, D)` in a dtype: as it is, or cast in parts of D, so that no copy of all of it is made."""
    if history.dtype == dtype or history.is_meta or torch.compiler.is_compiling():  # a graph may leave D open
        yield history.to(dtype)
        return
    # On a CPU a part stays in the cache until it has been used; a GPU is better off with fewer, larger ones.
    most = 2**18 if history.device.type == "cpu" else 2**24
    for part in history.split(max(most // (history.shape[0] * history.shape[1]), 1), dim=2):
        yield part.to(dtype)
