"""The implicit layer: the cell, with all that stays fixed during a solve, and the equilibrium layer around it."""

from dataclasses import dataclass, replace

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..deq import DEQ, Equilibrium
from ..gradients import PhantomGradient
from ..solvers import FixedPointSolver
from ..state import State
from .cell import Injection, Kernels, MultiscaleCell


@dataclass(frozen=True)
class CellFn:
    """f for one batch: the cell with all that stays fixed during a solve."""

    cell: MultiscaleCell
    injection: Injection
    masks: State | None
    kernels: Kernels
    checkpoint: bool = False
    """Whether a step that is differentiated keeps its input only and is computed again in backward."""

    def __call__(self, z: State) -> State:
        if self.checkpoint and torch.is_grad_enabled():
            return checkpoint(self.cell, z, self.injection, self.masks, self.kernels, use_reentrant=False)
        return self.cell(z, self.injection, self.masks, self.kernels)

    def take(self, index: Tensor) -> "CellFn":
        """Return f for the samples `index` alone."""
        injection = tuple(None if u is None else u[index] for u in self.injection)
        masks = None if self.masks is None else tuple(m[index] for m in self.masks)
        return replace(self, injection=injection, masks=masks)

    def tensors(self) -> list[Tensor]:
        """Return what f is made of beside its state: injection, kernels, norms."""
        norms = [p for m in self.cell.modules() if isinstance(m, nn.GroupNorm) for p in m.parameters()]
        return [*(u for u in self.injection if u is not None), *self.kernels.values(), *norms]


@register_notrace_module
class MultiscaleDEQ(nn.Module):
    """The implicit layer: a multiscale cell and the equilibrium layer that solves for its fixed point.

    It takes tensors and is a leaf to fx, since its loop depends on data.
    """

    def __init__(self, cell: MultiscaleCell, deq: DEQ) -> None:
        super().__init__()
        self.cell = cell
        self.deq = deq
        self.grad_checkpointing = False

    def fn(self, injection: Tensor, checkpoint: bool = False) -> CellFn:
        """Return f for a batch, given the injection into branch 0 `(B, C_0, *S)`; draws the dropout masks."""
        cell = self.cell
        injections = (injection, *[None] * (len(cell.channels) - 1))
        return CellFn(cell, injections, cell.sample_masks(injection), cell.kernels(), checkpoint)

    def forward(
        self,
        injection: Tensor,
        z0: State | None = None,
        solver: FixedPointSolver | None = None,
        unroll: int = 0,
        jacobian_probes: int = 0,
    ) -> Equilibrium:
        """Return the equilibrium for an injection into branch 0; other arguments as in `DEQ.forward`."""
        start = self.cell.zero_state(injection)
        if z0 is not None:
            given = [tuple(z.shape) for z in z0] if isinstance(z0, (tuple, list)) else type(z0).__name__
            if given != [tuple(z.shape) for z in start]:
                raise ValueError(f"z0 must have shapes {[tuple(z.shape) for z in start]}, got {given}")
            start = tuple(z.to(s) for z, s in zip(z0, start))
        # With everything upstream frozen no backward solve is due, although f(z) depends on z.
        learns = injection.requires_grad or any(p.requires_grad for p in self.cell.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            # The implicit gradient goes through one evaluation many times: nothing to gain from computing it again.
            checkpoint = self.grad_checkpointing and (unroll > 0 or isinstance(self.deq.gradient, PhantomGradient))
            fn = self.fn(injection, checkpoint)
            return self.deq(fn, start, solver=solver, unroll=unroll, jacobian_probes=jacobian_probes)
