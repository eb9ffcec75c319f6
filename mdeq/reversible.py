"""The reversible gradient: a pair of coupled states whose iteration backward runs in reverse, step by step."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .jacobian import evaluate
from .solvers import FixedPointSolver, FlatFn, Picard, SolveStats, SolveStatus

_STATE = torch.float64  # reversal divides by 1 - beta at every step, which amplifies what rounding took away


class _Coupled:
    """The coupled iteration as a map over pairs `(B, 2 D)`: Q(y, z) = (f(z), f(y')) with y' = y + beta (f(z) - y).

    A Picard step of damping beta on Q is a step of the coupled iteration, and |Q(s) - s| the residual of f at both.
    """

    def __init__(self, fn: FlatFn, dtype: torch.dtype, beta: float) -> None:
        self.fn, self.dtype, self.beta = fn, dtype, beta
        if hasattr(fn, "take"):
            self.take = lambda index: _Coupled(fn.take(index), dtype, beta)

    def apply(self, x: Tensor) -> Tensor:
        return self.fn(x.to(self.dtype)).to(_STATE)

    def __call__(self, pair: Tensor) -> Tensor:
        y, z = pair.chunk(2, dim=1)
        f_z = self.apply(z)
        return torch.cat((f_z, self.apply(y + self.beta * (f_z - y))), dim=1)


class _Reverse(torch.autograd.Function):
    """z of a pair; backward takes the pair back to its start and adds up the gradients of every step on the way."""

    @staticmethod
    def forward(
        ctx: Any, coupled: _Coupled, z0: Tensor, pair: Tensor, count: Tensor, failed: Tensor, *tensors: Tensor
    ) -> Tensor:
        ctx.save_for_backward(z0, pair, count, failed, *tensors)
        ctx.coupled, ctx.autocast = coupled, _autocast(pair.device.type)
        return pair.chunk(2, dim=1)[1].to(coupled.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the reversible gradient cannot be differentiated again (create_graph=True); use PhantomGradient"
            )
        z0, pair, count, failed, *tensors = ctx.saved_tensors
        coupled, beta = ctx.coupled, ctx.coupled.beta
        totals: list[Tensor | None] = [None] * len(tensors)

        def pull(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            """Return f(x) and weight^T J, and add weight^T df/dtensors to the totals."""
            with ctx.autocast():
                leaf, f_x = evaluate(coupled.fn, x.to(coupled.dtype))
            products = torch.autograd.grad(f_x, (leaf, *tensors), weight.to(f_x.dtype), allow_unused=True)
            for k, product in enumerate(products[1:]):
                if product is not None:
                    totals[k] = product if totals[k] is None else totals[k] + product
            back = torch.zeros_like(x) if products[0] is None else products[0].to(_STATE)
            return f_x.detach().to(_STATE), back

        y, z = pair.chunk(2, dim=1)
        # Where no step was possible, zero would pass for a gradient.
        grad_z = grad.to(_STATE).masked_fill(failed.unsqueeze(1), float("nan"))
        grad_y = torch.zeros_like(grad_z)
        for step in range(int(count.max()) if len(count) else 0, 0, -1):
            took = (count >= step).unsqueeze(1)  # samples of fewer steps join at their own last one
            f_y, back = pull(y, torch.where(took, beta * grad_z, 0))
            grad_y = grad_y + back
            # The start is known; zeros recovered but for rounding would fall on either side of a kink of f.
            z = torch.where(took, (z - beta * f_y) / (1 - beta), z) if step > 1 else z0.to(_STATE)
            f_z, back = pull(z, torch.where(took, beta * grad_y, 0))
            y = torch.where(took, (y - beta * f_z) / (1 - beta), y)
            grad_z = torch.where(took, (1 - beta) * grad_z, grad_z) + back
            grad_y = torch.where(took, (1 - beta) * grad_y, grad_y)
        return None, None, None, None, None, *totals


def _autocast(device: str) -> Callable[[], AbstractContextManager[Any]]:
    """Return what makes the autocast context of now, for an evaluation in backward."""
    settings = dict(dtype=torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device))
    return lambda: torch.autocast(device, **settings)


@dataclass(frozen=True)
class ReversibleGradient:
    """The exact gradient of the iteration itself, whether it converged or not, in memory that does not grow with steps.

    It replaces the solver's iteration by a relaxed one over two coupled states that can be run backward,

        y' = (1 - beta) y + beta f(z),   z' = (1 - beta) z + beta f(y'),

    and takes tolerance and number of steps from the solver. A step evaluates f twice, and twice more in backward. The
    states are kept in float64, since reversal divides by 1 - beta and so amplifies rounding at every step. On
    tanh(Q z + b) with Q orthogonal, which hardly shrinks, the relative error of the gradient is 2e-7 after 10 steps and
    3e-3 after 14 at beta 0.8, and 3e-10 after 18 at beta 0.5 (tests/test_reversible.py); more steps need a smaller
    beta.

    It evaluates f again in backward, so fn has to say what it closes over that gradients are due to: `fn.tensors()`
    returns a sequence of tensors. The models of this package do; in a map of your own write a class with `__call__` and
    `tensors`. A sample that failed without a finite step gets a gradient of nan.

    Args:
        beta: relaxation, in (0, 1). Larger is faster where f contracts, smaller is reversed more exactly.

    Reference:
        McCallum, Arora and Foster 2025, Reversible Deep Equilibrium Models, arXiv:2509.12917.
    """

    beta: float = 0.8

    def __post_init__(self) -> None:
        if not isinstance(self.beta, float) or not 0 < self.beta < 1:
            raise ValueError(f"beta must be in (0, 1), got {self.beta!r}")

    def solve(
        self, fn: FlatFn, z0: Tensor, solver: FixedPointSolver, *, training: bool
    ) -> tuple[Tensor, SolveStats, list[SolveStats]]:
        tensors: Sequence[Tensor] = ()
        if torch.is_grad_enabled():
            if not hasattr(fn, "tensors"):
                raise ValueError(
                    "ReversibleGradient evaluates f again in backward: f needs a method tensors() that returns what it "
                    "closes over that gradients are due to"
                )
            tensors = [x for x in fn.tensors() if x.requires_grad]
        coupled = _Coupled(fn, z0.dtype, self.beta)
        picard = Picard(
            damping=self.beta,
            tol=solver.tol,
            max_steps=solver.max_steps,
            stop_mode=solver.stop_mode,
            divergence_factor=solver.divergence_factor,
            check_every=solver.check_every,
        )
        pair, stats = picard(coupled, torch.cat((z0, z0), dim=1).to(_STATE))
        count, failed = _steps_of_best(stats)
        stats = replace(stats, nfe=2 * stats.nfe)
        if not tensors:
            return pair.chunk(2, dim=1)[1].to(z0.dtype), stats, []
        return _Reverse.apply(coupled, z0, pair, count, failed, *tensors), stats, []


def _steps_of_best(stats: SolveStats) -> tuple[Tensor, Tensor]:
    """Return after how many steps each sample was at the iterate that was returned, and whether there was none."""
    step = torch.arange(len(stats.trace), device=stats.trace.device).unsqueeze(1)
    competed = (step > 0) & (step <= stats.num_steps) & torch.isfinite(stats.trace)
    is_best = competed & (stats.trace == stats.residual)
    count = torch.where(is_best.any(dim=0), is_best.int().argmax(dim=0), 0)
    return count, (count == 0) & (stats.status != SolveStatus.CONVERGED)
