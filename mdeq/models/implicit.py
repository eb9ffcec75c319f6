"""The implicit layer: the cell, with all that stays fixed during a solve, and the equilibrium layer around it."""

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.checkpoint import checkpoint

from ..deq import DEQ, Equilibrium
from ..gradients import PhantomGradient, build_gradient
from ..layers import without_metadata
from ..solvers import FixedPointSolver
from ..state import State
from .cell import Injection, Kernels, MultiscaleCell


@dataclass(eq=False)  # not frozen: torch.compile of PyTorch 2.6 does not see the fields of such an object
class CellFn:
    """f for one batch: the cell with all that stays fixed during a solve."""

    cell: MultiscaleCell
    injection: Injection
    masks: State | None
    kernels: Kernels
    checkpoint: bool = False
    """Whether a step that is differentiated keeps its input only and is computed again in backward."""
    is_eager: bool = False
    """Whether the cell is called as it is where it was compiled."""

    def __call__(self, z: State) -> State:
        u = self.injection[0]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and u is not None and u.is_inference():
            return self._differentiable()(z)
        cell = self.cell.forward if self.is_eager else self.cell
        if not torch.compiler.is_compiling() and self.cell._compiled_call_impl is not None:
            for x in (*z, *self.injection, *(self.masks or ())):
                if x is not None:
                    torch._dynamo.maybe_mark_dynamic(x, 0)
        if self.checkpoint and torch.is_grad_enabled():
            return checkpoint(cell, z, self.injection, self.masks, self.kernels, use_reentrant=False)
        return cell(z, self.injection, self.masks, self.kernels)

    def _differentiable(self) -> "CellFn":
        """Return f made of ordinary tensors: its spectral radius is asked for under inference_mode too."""
        injection = tuple(None if u is None else u.clone() for u in self.injection)
        masks = None if self.masks is None else tuple(m.clone() for m in self.masks)
        kernels = {name: kernel.clone() for name, kernel in self.kernels.items()}
        return replace(self, injection=injection, masks=masks, kernels=kernels)

    def eager(self) -> "CellFn":
        """Return f as it is where the cell was compiled: derivatives of a compiled one cannot be differentiated."""
        return replace(self, is_eager=True)

    def take(self, index: Tensor) -> "CellFn":
        """Return f for the samples `index` alone."""
        injection = tuple(None if u is None else u[index] for u in self.injection)
        masks = None if self.masks is None else tuple(m[index] for m in self.masks)
        return replace(self, injection=injection, masks=masks)

    def tensors(self) -> list[Tensor]:
        """Return what f depends on besides its state: injection, kernels, and parameters of which no kernel is made."""
        folded = {id(p) for layer in self.kernels for p in _made_of(layer)}
        others = {id(p): p for m in self.cell.modules() for p in _parameters(m).values() if id(p) not in folded}
        injected = (u for u in self.injection if u is not None)
        return [*injected, *others.values(), *self.kernels.values()]


def _made_of(layer: nn.Module) -> list[Tensor]:
    """Return the parameters that the weight of a convolution is, or is computed from."""
    if is_parametrized(layer, "weight"):
        parts = layer.get_submodule("parametrizations.weight").modules()
        return [p for part in parts for p in _parameters(part).values()]
    return [p for name, p in _parameters(layer).items() if name == "weight"]


def _read_parametrized(cell: MultiscaleCell, kernels: Kernels) -> None:
    """Compute what is parametrized and no kernel, with gradients.

    Under `torch.nn.utils.parametrize.cached()` the first evaluation of f, without gradients, would be remembered.
    """
    for module in cell.modules():
        if is_parametrized(module) and module not in kernels:
            for name in module.get_submodule("parametrizations")._modules:
                getattr(module, name)


def _parameters(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's own parameters by name, also of a replica of nn.DataParallel, which has them elsewhere."""
    found = {**module._parameters, **getattr(module, "_former_parameters", {})}
    return {name: p for name, p in found.items() if p is not None}


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
        kernels = cell.kernels()
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            _read_parametrized(cell, kernels)
        return CellFn(cell, injections, cell.sample_masks(injection), kernels, checkpoint)

    def forward(
        self,
        injection: Tensor,
        z0: State | None = None,
        solver: FixedPointSolver | None = None,
        unroll: int = 0,
        jacobian_probes: int = 0,
    ) -> Equilibrium:
        """Return the equilibrium for an injection into branch 0; other arguments as in `DEQ.forward`."""
        injection = without_metadata(injection)
        start = self.cell.zero_state(injection)
        if z0 is not None:
            given = [tuple(z.shape) for z in z0] if isinstance(z0, (tuple, list)) else type(z0).__name__
            if given != [tuple(z.shape) for z in start]:
                raise ValueError(f"z0 must have shapes {[tuple(z.shape) for z in start]}, got {given}")
            start = tuple(without_metadata(z).to(s) for z, s in zip(z0, start))
        # The implicit gradient goes through one evaluation many times: nothing to gain from computing it again.
        checkpoint = self.grad_checkpointing and (
            unroll > 0 or isinstance(build_gradient(self.deq.gradient), PhantomGradient)
        )
        fn = self.fn(injection, checkpoint)
        return self.deq(fn, start, solver=solver, unroll=unroll, jacobian_probes=jacobian_probes)


register_notrace_module(MultiscaleDEQ)  # as a decorator it would hide the class from type checkers


def compile_cell(model: nn.Module, **options: Any) -> None:
    """Compile the cell of a model by `torch.compile`, for every batch size at once and without graph breaks.

    Sizes other than the batch are constants of the kernels, until a second one is met. What PyTorch tells apart
    anyway has its own kernels: with and without gradients, a batch of one, and on a CPU one below 16. The Jacobian
    penalty uses the uncompiled cell. Sets an option of PyTorch for the whole process: implicit gradients go through the
    backward graph of one evaluation many times (no donated buffers). Such variants may be more than eight: in older
    versions of PyTorch that is an option of the process as well.

    Args:
        model: of this package, changed in place; its state_dict and its copies are those of a plain one.
        options: of `torch.compile`, such as `mode` or `backend`.

    Raises:
        TypeError: for another model.
    """
    layer = getattr(model, "equilibrium", None)
    if not isinstance(layer, MultiscaleDEQ):
        raise TypeError(f"compile_cell takes a model of this package, got {type(model).__name__}")
    dynamo = torch._dynamo.config  # loaded now, with what is below: it takes a while, and few need it
    torch._functorch.config.donated_buffer = False  # pyright: ignore[reportAttributeAccessIssue]
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        # Settings of the process are those of one thread there, and CUDA runs backward in another.
        options = {"recompile_limit": 24, "isolate_recompiles": True, **options}
    else:
        limit = "recompile_limit" if hasattr(dynamo, "recompile_limit") else "cache_size_limit"
        setattr(dynamo, limit, getattr(dynamo, limit) + 16)  # counted over all models, since it is per function
    layer.cell.compile(fullgraph=True, **options)
