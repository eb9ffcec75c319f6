"""How to differentiate through an equilibrium: estimators, each of which owns the forward solve."""

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from .jacobian import evaluate, vjp
from .reversible import ReversibleGradient
from .solvers import (
    SOLVERS,
    Broyden,
    FixedPointSolver,
    FlatFn,
    SolveStats,
    SolveStatus,
    build_solver,
    full_precision,
    small_dtype,
)


class GradientEstimator(Protocol):
    """Runs the forward solve and attaches a gradient to its result."""

    def solve(
        self, fn: FlatFn, z0: Tensor, solver: FixedPointSolver, *, training: bool
    ) -> tuple[Tensor, SolveStats, list[SolveStats]]:
        """Return z with a gradient to everything that fn closes over, the statistics of the solve, and a list that
        backward fills with its own.

        The estimator owns the forward pass, so it may keep the solver's memory for its backward pass, or replace the
        iteration.

        Args:
            fn: the map `(B, D) -> (B, D)`.
            z0: `(B, D)` starting point; no gradient flows to it.
            solver: the forward solver.
            training: True returns f(z*) (phantom: its last damped step; reversible: z* too), False returns z* itself,
                bit for bit the same with and without gradients.
        """
        ...


class _Implicit(torch.autograd.Function):
    """The value given; backward solves u = J^T u + dL/dz and sends u into f(z*)."""

    @staticmethod
    def forward(
        ctx: Any,
        f_z: Tensor,
        z: Tensor,
        value: Tensor,
        solver: FixedPointSolver,
        start: Callable[[tuple[Tensor, ...], Tensor], Tensor] | None,
        record: list[SolveStats],
        *secants: Tensor,
    ) -> Tensor:
        # Saved, for autograd to let go of them in backward: as attributes they would live as long as the loss.
        ctx.save_for_backward(f_z, z, *secants)
        ctx.solver, ctx.start, ctx.record = solver, start, record
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the implicit gradient does not support double backward (create_graph=True); use PhantomGradient"
            )
        f_z, z, *secants = ctx.saved_tensors
        # The system is linear: solved for a gradient of unit length, it stops alike at every scale of the loss. By the
        # largest element first, since squares of very small or large ones leave the range of the dtype.
        largest = _no_zero(_norm(grad, float("inf")) if grad.shape[1] else grad.new_ones((len(grad), 1)))
        scaled = grad / largest
        size = _no_zero(_norm(scaled))
        rhs = (scaled / size).to(grad.dtype)
        # Its residual is measured by the right-hand side, not by u, which is long where I - J is nearly singular.
        solver = copy(ctx.solver)
        object.__setattr__(solver, "stop_mode", "abs")  # frozen, and a class of your own may have another constructor

        def adjoint(u: Tensor) -> Tensor:
            return vjp(f_z, z, u, retain_graph=True) + rhs

        if ctx.start is None:  # from zero, where the first evaluation is known
            u, stats, _ = solver.solve(adjoint, torch.zeros_like(rhs), f0=rhs)
        else:
            with full_precision(rhs):  # backward may be called under autocast
                u = ctx.start(tuple(secants), rhs)
            u, stats = solver(adjoint, u)
        ctx.record.append(stats)
        # Where no step was possible, zero would pass for a gradient. From zero, the first step goes to what is known.
        lost = (stats.status == SolveStatus.NONFINITE) & (stats.num_steps <= (ctx.start is None))
        u = u.masked_fill(lost.unsqueeze(1), float("nan"))
        return (u * size * largest).to(grad.dtype), *(None,) * (5 + len(secants))


def _norm(x: Tensor, order: float = 2) -> Tensor:
    return torch.linalg.vector_norm(x, order, dim=1, keepdim=True, dtype=small_dtype(x))


def _no_zero(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, torch.ones_like(x))


@dataclass(frozen=True)
class ImplicitGradient:
    """The implicit function theorem: backward solves the linear system u = J^T u + dL/dz at the equilibrium.

    Memory does not depend on the number of steps: one evaluation of f is kept. The result is as exact as the two
    solves. The residual of the backward solve is `|J^T u + w - u| / |w|` with w = dL/dz, whatever its `stop_mode`: a
    small one relative to u would say little where I - J is nearly singular.

    Args:
        solver: the backward solver; its tolerance is relative to the norm of dL/dz.
        warm_start: start the backward solve from what the forward solver learnt of the Jacobian (Broyden does, others
            leave it a cold start), which keeps its memory until then and every sample in the batch.

    Reference:
        Bai, Kolter and Koltun 2019, Deep Equilibrium Models, Theorem 1.
        Ramzi et al. 2022, SHINE: SHaring the INverse Estimate from the forward pass.
    """

    solver: FixedPointSolver = Broyden()
    warm_start: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "solver", build_solver(self.solver))

    def solve(
        self, fn: FlatFn, z0: Tensor, solver: FixedPointSolver, *, training: bool
    ) -> tuple[Tensor, SolveStats, list[SolveStats]]:
        differentiable = torch.is_grad_enabled()
        warm = self.warm_start and solver.learns_jacobian
        z_star, stats, memory = solver.solve(fn, z0, compact=not (warm and differentiable))
        record: list[SolveStats] = []
        if not differentiable:
            return (fn(z_star) if training else z_star), stats, record
        z, f_z = evaluate(fn, z_star)
        value = f_z.detach() if training else z_star
        if not f_z.requires_grad:  # f does without gradients
            return value, stats, record
        start, secants = None, ()
        if warm:
            start, secants = (lambda secants, w: solver.inverse_transposed(secants, stats, w)), solver.secants(memory)
        return _Implicit.apply(f_z, z, value, self.solver, start, record, *secants), stats, record


class _Substitute(torch.autograd.Function):
    """The value given, with the gradient of another tensor."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


@dataclass(frozen=True)
class PhantomGradient:
    """A few damped steps from the equilibrium with ordinary backpropagation; memory grows with their number only.

    One step without damping is Jacobian-free backpropagation. Agrees with the implicit gradient as the number of
    steps grows, and only as well as the solve converged.

    Args:
        num_steps: damped steps z <- (1 - damping) z + damping f(z), each an evaluation of f that is kept for backward.
        damping: in (0, 1].

    Reference:
        Geng et al. 2021, On Training Implicit Models, Eq. 10.
        Fung et al. 2022, JFB: Jacobian-Free Backpropagation for Implicit Networks.
    """

    num_steps: int = 5
    damping: float = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.num_steps, int) or isinstance(self.num_steps, bool) or self.num_steps < 1:
            raise ValueError(f"num_steps must be >= 1, got {self.num_steps!r}")
        if not isinstance(self.damping, (int, float)) or isinstance(self.damping, bool) or not 0 < self.damping <= 1:
            raise ValueError(f"damping must be in (0, 1], got {self.damping!r}")

    def solve(
        self, fn: FlatFn, z0: Tensor, solver: FixedPointSolver, *, training: bool
    ) -> tuple[Tensor, SolveStats, list[SolveStats]]:
        z_star, stats = solver(fn, z0)
        if not training and not torch.is_grad_enabled():
            return z_star, stats, []
        z = z_star
        for _ in range(self.num_steps):
            z = torch.lerp(z, fn(z), self.damping)
        return (z if training else _Substitute.apply(z, z_star)), stats, []


GRADIENTS: dict[str, type] = {
    "implicit": ImplicitGradient,
    "phantom": PhantomGradient,
    "reversible": ReversibleGradient,
}

GradientSpec = GradientEstimator | Mapping[str, Any]
"""An estimator, or what JSON and YAML can say of one: `{"name": "implicit", "solver": {"name": "broyden"}}`."""


def build_gradient(spec: GradientSpec) -> GradientEstimator:
    """Return the gradient estimator that a spec describes.

    Raises:
        ValueError: for what describes no estimator, an unknown name or a setting out of range.
        TypeError: for a setting that the estimator does not have.
    """
    if not isinstance(spec, Mapping):
        if hasattr(spec, "solve") and not isinstance(spec, (FixedPointSolver, type)):
            return spec
        raise ValueError(f"expected a gradient estimator or a mapping such as {{'name': 'implicit'}}, got {spec!r}")
    settings: dict[str, Any] = dict(spec)
    name = settings.pop("name", None)
    if name not in GRADIENTS:
        raise ValueError(f"unknown gradient {name!r}; valid names: {', '.join(sorted(GRADIENTS))}")
    return GRADIENTS[name](**settings)


def spec_of(part: Any) -> Any:
    """Return the spec, in words of JSON, from which `build_solver` or `build_gradient` makes an equal part.

    It is the name and what differs from the defaults. What has no name there, such as a class of your own, is returned
    as it is.
    """
    names = {cls: name for name, cls in [*SOLVERS.items(), *GRADIENTS.items()]}
    if type(part) not in names:
        return part
    settings = [(field, getattr(part, field.name)) for field in fields(part)]
    return {"name": names[type(part)], **{f.name: spec_of(value) for f, value in settings if value != f.default}}
