"""The reversible gradient: a pair of coupled states whose iteration backward runs in reverse, step by step."""

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from .jacobian import evaluate
from .solvers import FixedPointSolver, FlatFn, Picard, SolveStats

_STATE = torch.float64  # reversal divides by 1 - beta at every step, which amplifies what rounding took away
_AMPLIFICATION = 1e8  # of rounding, between two stored pairs, for an f that expands by
_EXPANSION = 3.0  # which is about what the cells of this package do before they are trained
_FAR = 1e-3  # relative distance from a stored pair at which a reversal has gone astray


@dataclass
class _Stored:
    """Pairs that an iteration came by, as `(step, pair)`."""

    every: int
    steps: int  # most of them; the pair after the last one is the result
    calls: int = 0
    pairs: list[tuple[int, Tensor]] = field(default_factory=list)

    def visit(self, pair: Tensor) -> None:
        """Take note of the pair at the next step: step k is where the map is evaluated for the k-th time, from 0."""
        if self.calls % self.every == 0 and 0 < self.calls < self.steps:
            self.pairs.append((self.calls, pair))
        self.calls += 1


class _Coupled:
    """The coupled iteration as a map over pairs `(B, 2 D)`: Q(y, z) = (f(z), f(y')) with y' = y + beta (f(z) - y).

    A Picard step of damping beta on Q is a step of the coupled iteration.
    """

    def __init__(self, fn: FlatFn, dtype: torch.dtype, beta: float, stored: _Stored | None = None) -> None:
        self.fn, self.dtype, self.beta, self.stored = fn, dtype, beta, stored

    def take(self, index: Tensor) -> "_Coupled":
        part = self.fn.take(index)  # pyright: ignore[reportFunctionMemberAccess]
        return _Coupled(part, self.dtype, self.beta)

    def apply(self, x: Tensor) -> Tensor:
        return self.fn(x.to(self.dtype)).to(_STATE)

    def __call__(self, pair: Tensor) -> Tensor:
        if self.stored is not None:
            self.stored.visit(pair)
        y, z = pair.chunk(2, dim=1)
        f_z = self.apply(z)
        return torch.cat((f_z, self.apply(y + self.beta * (f_z - y))), dim=1)


@dataclass(frozen=True, kw_only=True)
class _CoupledPicard(Picard):
    """Judges a pair by f(z) - z, the residual of the half that is returned."""

    def judged(self, z: Tensor, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        f_z = f.chunk(2, dim=1)[0]
        return f_z - z.chunk(2, dim=1)[1], f_z


class _Reverse(torch.autograd.Function):
    """z of a pair; backward takes the pair back to its start and adds up the gradients of every step on the way.

    `extra` are the tensors that gradients are due to, then the pairs that were stored at `steps`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        coupled: _Coupled,
        steps: Sequence[int],
        z0: Tensor,
        pair: Tensor,
        count: Tensor,
        converged: Tensor,
        *extra: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(z0, pair, count, converged, *extra)
        ctx.coupled, ctx.steps, ctx.autocast = coupled, steps, _autocast(pair.device.type)
        return pair.chunk(2, dim=1)[1].to(coupled.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the reversible gradient does not support double backward (create_graph=True); use PhantomGradient"
            )
        z0, pair, count, converged, *extra = ctx.saved_tensors
        # Where no step was taken, zero would pass for a gradient. Such a sample counts one step: backward goes through
        # it, and so takes its nan to all that f is made of.
        lost = (count == 0) & (~converged | (grad != 0).any(dim=1))
        count = torch.where(lost, 1, count)
        coupled, beta, known = ctx.coupled, ctx.coupled.beta, len(ctx.steps)
        tensors = extra[: len(extra) - known]
        stored = dict(zip(ctx.steps, extra[len(tensors) :]))
        # The start is known; zeros recovered but for rounding would fall on either side of a kink of f.
        stored[0] = torch.cat((z0, z0), dim=1).to(_STATE)
        totals: list[Tensor | None] = [None] * len(tensors)

        def pull(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            """Return f(x) and weight^T J, and add weight^T df/dtensors to the totals."""
            with ctx.autocast():
                leaf, f_x = evaluate(coupled.fn, x.to(coupled.dtype))
            products = torch.autograd.grad(f_x, (leaf, *tensors), weight.to(f_x.dtype), allow_unused=True)
            for k, product in enumerate(products[1:]):
                if product is not None:
                    total = totals[k]
                    totals[k] = product if total is None else total + product
            back = torch.zeros_like(x) if products[0] is None else products[0].to(_STATE)
            return f_x.detach().to(_STATE), back

        y, z = pair.chunk(2, dim=1)
        size = torch.linalg.vector_norm(z, dim=1) + torch.finfo(_STATE).tiny
        worst = torch.zeros_like(size)

        def recalled(step: int, half: int, x: Tensor, took: Tensor) -> Tensor:
            """Return half of the pair at a step, of samples that went on from it, as it was where that is known."""
            nonlocal worst
            if step not in stored:
                return x
            was = torch.where(took, stored[step].chunk(2, dim=1)[half], x)
            away = torch.linalg.vector_norm(was - x, dim=1) / size
            worst = torch.maximum(worst, torch.where(lost, 0, away))
            return was

        grad_z = grad.to(_STATE).masked_fill(lost.unsqueeze(1), float("nan"))
        grad_y = torch.zeros_like(grad_z)
        for step in range(int(count.max()) if len(count) else 0, 0, -1):
            took = (count >= step).unsqueeze(1)  # samples of fewer steps join at their own last one
            f_y, back = pull(y, torch.where(took, beta * grad_z, 0))
            grad_y = grad_y + back
            z = recalled(step - 1, 1, torch.where(took, (z - beta * f_y) / (1 - beta), z), took)
            f_z, back = pull(z, torch.where(took, beta * grad_y, 0))
            y = recalled(step - 1, 0, torch.where(took, (y - beta * f_z) / (1 - beta), y), took)
            grad_z = torch.where(took, (1 - beta) * grad_z, grad_z) + back
            grad_y = torch.where(took, (1 - beta) * grad_y, grad_y)
        if len(worst) and not bool((worst <= _FAR).all()):
            warnings.warn(
                f"in backward, the reversible iteration missed its earlier state by {float(worst.max()):.1e} "
                "(relative), so the gradient is not exact; lower ReversibleGradient's beta or store_every",
                stacklevel=2,
            )
        return *(None,) * 6, *totals, *(None,) * known


def _autocast(device: str) -> Callable[[], AbstractContextManager[Any]]:
    """Return what makes the autocast context of now, for an evaluation in backward."""
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    return lambda: torch.autocast(device, dtype=dtype, enabled=enabled)


@dataclass(frozen=True)
class ReversibleGradient:
    """The exact gradient of the iteration itself, whether it converged or not, in memory that hardly grows with steps.

    It replaces the solver's iteration by a relaxed one over two coupled states that can be run backward,

        y' = (1 - beta) y + beta f(z),   z' = (1 - beta) z + beta f(y'),

    and takes tolerance and number of steps from the solver. A step evaluates f twice, and twice more in backward. The
    states are kept in float64, since reversal divides by 1 - beta and so amplifies rounding at every step, up to 13
    times at beta 0.5 and 154 times at 0.8 where f expands threefold. So every `store_every` steps a pair of states is
    kept, from which backward goes on; where it comes back far from one, a warning says that the gradient is not exact.
    On tanh(Q z + b) with Q orthogonal, which hardly shrinks, and no pair kept, the relative error of the gradient is
    2e-7 after 10 steps and 4e-3 after 14 at beta 0.8, and 3e-10 after 18 at beta 0.5 (tests/test_reversible.py).

    Rounding of f itself is amplified as well where f does not give the same bits in backward as in forward: the kernels
    of a compiled cell, with and without gradients, differ by some 1e-7 in float32, for which 3 steps are enough and 7
    at beta 0.5 are not (an error of 6e-7 and 3e-3 on `mdeq_tiny_cifar.cifar10`): set `store_every=3` there, and 1 in
    bfloat16.

    It evaluates f again in backward, so fn has to name the tensors it closes over that need gradients: `fn.tensors()`
    returns a sequence of tensors, none of which is computed from another: name an injection or what it is computed
    from, not both. The models of this package do; in a map of your own write a class with `__call__` and `tensors`. A
    sample that failed without a finite step gets a gradient of nan. It is the gradient of the steps that were taken
    from z0: do not start near the equilibrium (`z0=`), from where they are few. A sample that has converged at its
    start takes none, and gets a gradient of nan too.

    Args:
        beta: relaxation, in (0, 1). Larger is faster where f contracts, smaller is reversed more exactly.
        store_every: steps between two pairs of states that are kept; None for as many as amplify rounding by 1e8 in the
            case above (7 at beta 0.5, 3 at 0.8). As many as the solver takes, or more, keep none, for constant memory.

    Reference:
        McCallum, Arora and Foster 2025, Reversible Deep Equilibrium Models, arXiv:2509.12917.
    """

    beta: float = 0.5
    store_every: int | None = None

    def __post_init__(self) -> None:
        every = self.store_every
        if every is not None and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
            raise ValueError(f"store_every must be an integer >= 1 or None, got {every!r}")
        if not isinstance(self.beta, float) or not 0 < self.beta < 1:
            raise ValueError(f"beta must be in (0, 1), got {self.beta!r}")

    def solve(
        self, fn: FlatFn, z0: Tensor, solver: FixedPointSolver, *, training: bool
    ) -> tuple[Tensor, SolveStats, list[SolveStats]]:
        if z0.device.type == "mps":
            raise ValueError(
                "ReversibleGradient keeps its states in float64, which MPS does not have; use ImplicitGradient"
            )
        tensors: Sequence[Tensor] = ()
        if torch.is_grad_enabled():
            named = getattr(fn, "tensors", None)
            if named is None:
                raise ValueError(
                    "ReversibleGradient evaluates f again in backward: f needs a method tensors() that returns the "
                    "tensors it closes over that need gradients, none of them computed from another"
                )
            # Once each: the gradient of one that is named twice would be added twice.
            tensors = list({id(x): x for x in named() if x.requires_grad}.values())
        stored = _Stored(self.store_every or self._distance(), solver.max_steps) if tensors else None
        coupled = _Coupled(fn, z0.dtype, self.beta, stored)
        settings = {f.name: getattr(solver, f.name) for f in fields(FixedPointSolver)}
        picard = _CoupledPicard(**settings, damping=self.beta)
        start = torch.cat((z0, z0), dim=1).to(_STATE)
        # Backward evaluates f of the whole batch: what kernels for a part of it round differently would be amplified.
        pair, stats, _ = picard.solve(coupled, start, compact=stored is None and hasattr(fn, "take"))
        count = _steps_of_best(stats)
        stats = replace(stats, nfe=2 * stats.nfe, per_step=2)
        if stored is None:
            return pair.chunk(2, dim=1)[1].to(z0.dtype), stats, []
        coupled.stored = None  # autograd keeps the pairs from here on, and lets go of them
        steps, pairs = zip(*stored.pairs) if stored.pairs else ((), ())
        return _Reverse.apply(coupled, steps, z0, pair, count, stats.converged, *tensors, *pairs), stats, []

    def _distance(self) -> int:
        """Return the steps between two stored pairs where no number is given."""
        # Errors e of y and z go to e_z = a (e_z + beta L e_y), e_y = a (e_y + beta L e_z) with a = 1 / (1 - beta): a
        # matrix of determinant a^2 and this trace.
        a = 1 / (1 - self.beta)
        trace = 2 * a + (a * self.beta * _EXPANSION) ** 2
        growth = (trace + math.sqrt(trace**2 - 4 * a**2)) / 2
        return max(int(math.log(_AMPLIFICATION) / math.log(growth)), 1)


def _steps_of_best(stats: SolveStats) -> Tensor:
    """Return after how many steps each sample was at the iterate that was returned; 0 if that is its start."""
    step = torch.arange(len(stats.trace), device=stats.trace.device).unsqueeze(1)
    competed = (step > 0) & (step <= stats.num_steps) & torch.isfinite(stats.trace)
    is_best = competed & (stats.trace == stats.residual)
    return torch.where(is_best.any(dim=0), is_best.int().argmax(dim=0), 0)
