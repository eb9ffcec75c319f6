"""What a model does on its way to an equilibrium, measured: residuals, states after so many steps, spectral radii."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mdeq import Anderson, Backbone, Broyden, FixedPointSolver, Picard, State
from tools.batches import Batch
from tools.inference import Inference
from tools.metrics import SolveLog

Watch = Callable[[Iterable[Any], str], Iterable[Any]]
"""`watch(things, text)` yields the things and shows how far it is."""

SETTLED_TOL = 1e-4
"""Relative residual of what is drawn as the equilibrium, where the solver gets so far."""
RADIUS_ITERATIONS = 40
"""Vector-Jacobian products for a spectral radius; the mean growth over the second half is what counts."""


@dataclass(frozen=True)
class Snapshot:
    """What a model holds of one input at some point.

    Args:
        title: such as "after 2 steps".
        state: a feature map `(1, C_i, *S_i)` per branch.
        logits: `(1, K)`, or `(1, K, *S)` of a segmenter.
        residual: relative residual of the state; None where f was applied without a look at it.
    """

    title: str
    state: State
    logits: Tensor
    residual: float | None = None


def long_run(solver: FixedPointSolver, max_steps: int, tol: float = 0.0) -> FixedPointSolver:
    """Return a solver that goes on for so many steps, or to a relative residual, however large residuals become."""
    return dataclasses.replace(solver, max_steps=max_steps, tol=tol, stop_mode="rel", divergence_factor=float("inf"))


def compared_solvers(own: FixedPointSolver, max_steps: int) -> dict[str, FixedPointSolver]:
    """Return Broyden, Anderson and Picard by name; that of the model's own kind has its settings."""
    kinds = (Broyden, Anderson, Picard)
    return {kind.__name__: long_run(own if isinstance(own, kind) else kind(), max_steps) for kind in kinds}


@torch.no_grad()
def residual_traces(model: Backbone, inputs: Sequence[Tensor], solver: FixedPointSolver, watch: Watch) -> np.ndarray:
    """Return the relative residual at every iterate of every input, `(max_steps + 1, inputs)`.

    What is zero or not finite, and so has no place on a logarithmic scale, is nan, as is what comes after the end.
    """
    table = np.full((solver.max_steps + 1, len(inputs)), np.nan)
    for k, x in enumerate(watch(inputs, type(solver).__name__)):
        stats = model.solve(x, solver=solver).stats
        assert stats is not None  # nothing is unrolled
        trace = stats.trace[:, 0].double().cpu().numpy()
        table[: len(trace), k] = np.where(np.isfinite(trace) & (trace > 0), trace, np.nan)
    return table


def equilibrium(model: Backbone, x: Tensor, max_steps: int) -> Snapshot:
    """Return the equilibrium of an input `(1, C, *S)`, as near as the model's own solver gets in so many steps."""
    solver = long_run(model.deq.solver, max_steps, SETTLED_TOL)
    return dataclasses.replace(after(model, x, solver), title="equilibrium")


@torch.no_grad()
def after(model: Backbone, x: Tensor, solver: FixedPointSolver) -> Snapshot:
    """Return what the best of so many steps of a solver comes to."""
    logits, found = model(x, return_equilibrium=True, solver=solver)
    return Snapshot(_steps(solver.max_steps), found.state, logits, float(found.stats.residual[0]))


@torch.no_grad()
def unrolled(model: Backbone, x: Tensor, count: int) -> Snapshot:
    """Return what the explicit twin, f applied so many times, comes to."""
    logits, found = model(x, return_equilibrium=True, unroll=count)
    return Snapshot(f"f applied {count} times" if count > 1 else "f applied once", found.state, logits)


def _steps(count: int) -> str:
    return f"after {count} step{'s' if count > 1 else ''}"


@torch.no_grad()
def solve_log(model: Backbone, batches: Sequence[Batch], inference: Inference, watch: Watch) -> SolveLog:
    """Return how the model's own solver fares on the inputs of batches."""
    log = SolveLog()
    for x, _ in watch(batches, "evaluations"):
        for stats in inference(model, x)[1]:
            log.add(stats)
    return log


@torch.no_grad()
def spectral_radii(model: Backbone, batches: Sequence[Batch], max_steps: int, watch: Watch) -> np.ndarray:
    """Return the spectral radius of the Jacobian of f at the equilibrium of every input, `(inputs,)`."""
    solver, radii = long_run(model.deq.solver, max_steps, SETTLED_TOL), []
    for x, _ in watch(batches, "spectral radius"):
        state = model.solve(x, solver=solver).state
        fn = model.equilibrium.fn(model.injection(x))
        radii.append(model.deq.spectral_radius(fn, state, RADIUS_ITERATIONS))
    return torch.cat(radii).double().cpu().numpy()
