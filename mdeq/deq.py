"""The equilibrium layer: a solver and a gradient estimator joined into one module, for any map over tensors."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .gradients import GradientSpec, build_gradient
from .jacobian import jacobian_frobenius, spectral_radius
from .solvers import SolverSpec, SolveStats, SolveStatus, build_solver
from .state import State, StateLayout

StateFn = Callable[[State], State]
"""A map over states, sample by sample; may offer `take(index)` and `tensors()`, see `mdeq.solvers.FlatFn`."""


@dataclass
class Equilibrium:
    """The result of an equilibrium layer.

    Attributes:
        state: the equilibrium, differentiable where gradients are enabled.
        stats: how the solve went, per sample; None when unrolled.
        jacobian_penalty: differentiable scalar to add to the loss; None unless asked for.
        backward_stats: the implicit backward solves, appended by `loss.backward()`.
    """

    state: State
    stats: SolveStats | None
    jacobian_penalty: Tensor | None = None
    backward_stats: list[SolveStats] = field(default_factory=list)


class _FlatFn:
    """A map over states as a map over `(B, D)`. The solver's dtype stays outside: fn sees that of its own state."""

    def __init__(self, fn: StateFn, layout: StateLayout, inner: torch.dtype, outer: torch.dtype) -> None:
        self.fn, self.layout, self.inner, self.outer = fn, layout, inner, outer
        if (take := getattr(fn, "take", None)) is not None:
            self.take = lambda index: _FlatFn(take(index), layout, inner, outer)
        if (tensors := getattr(fn, "tensors", None)) is not None:
            self.tensors = tensors

    def __call__(self, z: Tensor) -> Tensor:
        x = z.to(self.inner)
        # Tensors of inference mode have no such count, and in graphs a write is a matter of the graph.
        counted = not torch.compiler.is_compiling() and not x.is_inference()
        before = x._version if counted else 0
        state = self.fn(self.layout.unflatten(x))
        if counted and x._version != before:
            raise ValueError("f wrote into its argument, which is the solver's iterate; use no in-place operation on z")
        if not isinstance(state, (tuple, list)):
            raise ValueError(f"f must return a tuple of tensors, one per branch, got {type(state).__name__}")
        if not all(isinstance(x, Tensor) and x.is_floating_point() for x in state):
            kinds = [x.dtype if isinstance(x, Tensor) else type(x).__name__ for x in state]
            raise ValueError(f"f must return floating-point tensors, got {kinds}")
        if any(x.device != z.device for x in state):
            raise ValueError(f"f must keep the device of the state, {z.device}, got {[str(x.device) for x in state]}")
        f_z = self.layout.flatten(tuple(state), self.outer)
        if f_z.shape != z.shape:
            raise ValueError(f"f must keep the batch size {z.shape[0]}, got {f_z.shape[0]}")
        return f_z

    def eager(self) -> "_FlatFn":
        """Return the map as it is where parts of it were compiled."""
        eager = getattr(self.fn, "eager", None)
        return self if eager is None else _FlatFn(eager(), self.layout, self.inner, self.outer)


def _flatten(fn: StateFn, state: State) -> tuple[_FlatFn, Tensor]:
    """Return a map and a state in the form and dtype that solvers work in, at least float32."""
    layout, inner = StateLayout.of(state), state[0].dtype
    outer = torch.promote_types(inner, torch.float32)
    return _FlatFn(fn, layout, inner, outer), layout.flatten(state, outer)


class DEQ(nn.Module):
    """Finds z* = f(z*) and differentiates through it, for any f over a tuple of tensors `(B, ...)` of any rank.

    The solver works in at least float32; f sees its state in the dtype of z0, and the result has that dtype.
    In eval mode the state returned is the solver's z*, bit for bit the same with and without gradients; in train mode
    it is what the gradient estimator returns, f(z*) for the implicit one. For a sample where f gives nothing finite
    from the start, such as one with nan in its input, the state is nan, while a solver returns the starting point.

    Args:
        solver: the forward solver; `deq.solver = ...` replaces it at any time. `ReversibleGradient` takes
            only its settings that all solvers have, such as tolerance and number of steps, in both modes.
        gradient: the gradient estimator, likewise.

    Raises:
        ValueError, TypeError: for a spec that names something unknown.

    Example:
        >>> deq = DEQ(Broyden(tol=1e-6), ImplicitGradient())
        >>> eq = deq(lambda z: (torch.tanh(layer(z[0]) + x),), (torch.zeros_like(x),))
        >>> eq.state[0], eq.stats.converged
    """

    def __init__(self, solver: SolverSpec, gradient: GradientSpec) -> None:
        super().__init__()
        self.solver = build_solver(solver)
        self.gradient = build_gradient(gradient)

    def forward(
        self,
        fn: StateFn,
        z0: State,
        *,
        solver: SolverSpec | None = None,
        unroll: int = 0,
        jacobian_probes: int = 0,
    ) -> Equilibrium:
        """Return the equilibrium of fn.

        Args:
            fn: the map.
            z0: starting point; no gradient flows to it.
            solver: replaces `self.solver` for this call.
            unroll: if above 0, apply fn that many times with ordinary backpropagation instead of solving (the
                weight-tied warm-up phase of training).
            jacobian_probes: if above 0, estimate the Jacobian penalty with that many probes.

        Raises:
            ValueError: for a z0 of mixed batch sizes or an fn that changes shapes.
        """
        if unroll < 0 or jacobian_probes < 0:
            raise ValueError(f"unroll and jacobian_probes must be >= 0, got {unroll} and {jacobian_probes}")
        # Where nothing in f is trained no backward solve is due, although f(z) depends on z.
        tensors = getattr(fn, "tensors", None)
        learns = torch.is_grad_enabled() and (tensors is None or any(x.requires_grad for x in tensors()))
        if learns and torch.jit.is_tracing():  # TorchScript keeps no gradient that is defined in Python
            if self.training:
                raise RuntimeError("torch.jit.trace would lose the gradients of an equilibrium; trace in eval mode")
            learns = False
        with torch.set_grad_enabled(learns):
            return self._forward(fn, z0, solver, unroll, jacobian_probes)

    def _forward(
        self, fn: StateFn, z0: State, solver: SolverSpec | None, unroll: int, jacobian_probes: int
    ) -> Equilibrium:
        flat, z_start = _flatten(fn, z0)
        z_start = z_start.detach()
        forward_solver = build_solver(self.solver if solver is None else solver)
        if unroll > 0:
            z, stats, record = z_start, None, []
            for _ in range(unroll):
                z = flat(z)
        else:
            gradient = build_gradient(self.gradient)
            z, stats, record = gradient.solve(flat, z_start, forward_solver, training=self.training)
        if stats is not None:
            # Where f gave nothing finite from the start, a head would make a prediction of the start: it gets nan.
            # Added, so that the gradient is what the estimator says; as 0 / 0: PyTorch 2.7 saves no nan in a graph.
            failed = (stats.status == SolveStatus.NONFINITE) & (stats.num_steps <= 1)
            z = z + (torch.zeros_like(stats.residual) / ~failed).to(z.dtype).unsqueeze(1)
        penalty = jacobian_frobenius(flat.eager(), z, jacobian_probes) if jacobian_probes > 0 else None
        return Equilibrium(flat.layout.unflatten(z.to(flat.inner)), stats, penalty, record)

    @staticmethod
    def spectral_radius(fn: StateFn, state: State, num_iters: int = 100) -> Tensor:
        """Return the spectral radius of the Jacobian of fn at a state, `(B,)`; see `mdeq.spectral_radius`."""
        return spectral_radius(*_flatten(fn, state), num_iters)

    def extra_repr(self) -> str:
        return f"solver={self.solver}, gradient={self.gradient}"
