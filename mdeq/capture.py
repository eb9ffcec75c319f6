"""Inference of a whole model as one CUDA graph, for models whose kernels take longer to launch than to run."""

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from .deq import Equilibrium
from .layers import with_metadata, without_metadata
from .solvers import FixedPointSolver, SolveStats, static_solves

_WARMUP_CALLS = 3  # in which libraries choose kernels and set up workspaces, none of which may happen in a capture


class CapturedModel:
    """A model in eval mode, captured for inputs of one shape; calling it replays every kernel with one launch.

    A graph cannot look at values: the solve takes all `max_steps` steps of its solver, and never waits for the host.
    Samples that have converged stay where they are, so results are those of the model itself, up to rounding, and so
    are statistics, but for `nfe` and the length of `trace`. Weights are read in place: in-place changes take effect in
    the next call, replaced tensors (`load_state_dict(assign=True)`) do not.

    Args:
        model: a model of this package in eval mode, on a CUDA device.
        example: an input; later ones need its shape, dtype and device.
        solver: replaces the model's own; its `max_steps` is what every call takes.

    Raises:
        ValueError: for a model in train mode or an example that is not on a CUDA device.

    Example:
        >>> model = timm.create_model("mdeq_small").cuda().eval()
        >>> captured = mdeq.CapturedModel(model, torch.randn(8, 3, 224, 224, device="cuda"))
        >>> logits = captured(images)
    """

    def __init__(self, model: nn.Module, example: Tensor, *, solver: FixedPointSolver | None = None) -> None:
        if model.training:
            raise ValueError("CapturedModel needs a model in eval mode; call model.eval() first")
        if not example.is_cuda:
            raise ValueError(f"model and example must be on a CUDA device, got an example on {example.device}")
        with torch.inference_mode(False):  # or later calls could not write into it
            self._input = without_metadata(example).detach().clone()
        # The graph knows addresses alone: without these references their memory might serve something else.
        self._weights = [(x, x.detach(), x.data_ptr()) for x in (*model.parameters(), *model.buffers())]
        self._graph = torch.cuda.CUDAGraph()
        # A weight that autocast has cached would lie outside the graph, and be freed.
        precision = torch.autocast(
            "cuda", torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda"), cache_enabled=False
        )
        with torch.no_grad(), torch.cuda.device(example.device), precision:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream), static_solves():  # the kernels of the capture, not those of a usual call
                for _ in range(_WARMUP_CALLS):
                    model(self._input, solver=solver)
            torch.cuda.current_stream().wait_stream(stream)
            # A stream of this device: torch's own capture stream is that of the first device it was used on. Not the
            # warm-up's: cuBLAS keeps a workspace for each stream, and the graph would use one that is not its own.
            with torch.cuda.graph(self._graph, stream=torch.cuda.Stream()):
                self._output, self._equilibrium = model(self._input, return_equilibrium=True, solver=solver)

    @torch.no_grad()
    def __call__(self, x: Tensor, *, return_equilibrium: bool = False) -> Any:
        """Return the model's output, or it and the `Equilibrium` it came from, as tensors of their own.

        Raises:
            ValueError: for an input of another shape, dtype or device than the example's, or a model that was moved or
                cast since.
        """
        for name in ("shape", "dtype", "device"):
            given, wanted = getattr(x, name), getattr(self._input, name)
            if given != wanted:
                raise ValueError(f"captured for inputs with {name} {wanted}, got {given}; capture the model again")
        if any(x.data_ptr() != place for x, _, place in self._weights):
            raise ValueError("the weights have moved in memory since the capture; capture the model again")
        self._input.copy_(without_metadata(x))
        self._graph.replay()
        output = _copy(self._output)
        if isinstance(output, Tensor):
            output = with_metadata(output, x)
        return (output, _copy_equilibrium(self._equilibrium)) if return_equilibrium else output


def _copy(output: Any) -> Any:
    """Return copies of a tensor, or of a list or tuple of them."""
    return output.clone() if isinstance(output, Tensor) else type(output)(_copy(part) for part in output)


def _copy_equilibrium(equilibrium: Equilibrium | None) -> Equilibrium | None:
    if equilibrium is None:
        return None
    stats = equilibrium.stats
    if stats is not None:
        tensors = {f.name: getattr(stats, f.name) for f in fields(SolveStats)}
        stats = replace(stats, **{name: x.clone() for name, x in tensors.items() if isinstance(x, Tensor)})
    return replace(equilibrium, state=_copy(equilibrium.state), stats=stats)
