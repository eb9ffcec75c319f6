"""What tools/benchmark.py compares, as equilibrium layers that can take each other's place in a model.

All are called as `mdeq.DEQ` is, `layer(fn, z0) -> Equilibrium`: this package's own, TorchDEQ's around the same f, and
the explicit twin, which applies f a number of times. `Clocked` notes the time that any of them spends inside f.
"""

import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn

from mdeq import DEQ, Anderson, Backbone, Broyden, Equilibrium, FixedPointSolver, PhantomGradient, Picard, State
from tools.config import BadInput, optional

StateFn = Callable[[State], State]
RESNETS = ("test_resnet", "resnet10t", "resnet14t", "resnet18", "resnet26", "resnet34", "resnet50", "resnet101")


class Clock:
    """How often f was evaluated, on how many samples in all, and for how long."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.calls = self.samples = 0
        self.spans: list[tuple[Any, Any]] = []

    def measure(self, fn: StateFn, z: State) -> State:
        start = self._now()
        result = fn(z)
        self.spans.append((start, self._now()))
        self.calls += 1
        self.samples += len(z[0])
        return result

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @property
    def seconds(self) -> float:
        if self.device.type != "cuda":
            return sum(end - start for start, end in self.spans)
        torch.cuda.synchronize(self.device)
        return sum(start.elapsed_time(end) for start, end in self.spans) / 1e3


class ClockedFn:
    """f with a clock; what f offers beside its call it offers too."""

    def __init__(self, fn: Any, clock: Clock) -> None:
        self.fn, self.clock = fn, clock
        if hasattr(fn, "take"):
            self.take = lambda index: ClockedFn(fn.take(index), clock)
        if hasattr(fn, "tensors"):
            self.tensors = fn.tensors

    def __call__(self, z: State) -> State:
        return self.clock.measure(self.fn, z)


class Clocked(nn.Module):
    """An equilibrium layer whose evaluations of f are timed; of its last call, `clock` and `equilibrium` stay."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, fn: Any, z0: State, **options: Any) -> Equilibrium:
        self.fn, self.clock = fn, Clock(z0[0].device)
        self.equilibrium = self.layer(ClockedFn(fn, self.clock), z0, **options)
        return self.equilibrium

    def residual(self) -> Tensor:
        """Return the residual of each sample after the last call, `(B,)`."""
        return residual(self.fn, tuple(z.detach() for z in self.equilibrium.state))


class Twin(nn.Module):
    """The explicit twin: f applied `steps` times and nothing else, differentiated by ordinary backpropagation."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, fn: StateFn, z0: State, **options: Any) -> Equilibrium:
        z = z0
        for _ in range(self.steps):
            z = fn(z)
        return Equilibrium(z, None)


class TorchDEQ(nn.Module):
    """The layer of the package torchdeq (Geng and Kolter 2023) around the same f.

    Args:
        solver: broyden, anderson or fixed_point_iter.
        evaluations: most evaluations of f in the forward solve.
        tol: relative tolerance of the forward solve, as the library judges it.
        history: of Anderson, its `m`.
        gradient: settings of the gradient, such as `ift=True`.
    """

    def __init__(self, solver: str, evaluations: int, tol: float, history: int = 6, **gradient: Any) -> None:
        super().__init__()
        torchdeq = optional("torchdeq", "bench")
        # Its Broyden counts steps, one fewer than evaluations; the other two count evaluations.
        most = evaluations - 1 if solver == "broyden" else evaluations
        self.deq = torchdeq.get_deq(f_solver=solver, f_max_iter=most, f_tol=tol, f_stop_mode="rel", **gradient)
        self.options = {"m": history}

    def forward(self, fn: StateFn, z0: State, **options: Any) -> Equilibrium:
        device = z0[0].device.type
        amp, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

        def in_precision(*z: Tensor) -> State:
            with torch.autocast(device, dtype, enabled=amp):
                return tuple(new.to(old.dtype) for new, old in zip(fn(z), z))

        # Autocast is for f, not for state and products of a solver, here as in this package.
        with torch.autocast(device, enabled=False):
            states, _ = self.deq(in_precision, z0, solver_kwargs=self.options)
        return Equilibrium(tuple(states[-1]), None)


def ours(solver: FixedPointSolver, gradient: Any = PhantomGradient()) -> DEQ:
    return DEQ(solver, gradient)


def solvers(steps: int, tol: float, history: int, check_every: int = 1) -> dict[str, nn.Module]:
    """Return the layers that solve, by name, each with at most `steps` + 1 evaluations of f."""
    limits: dict[str, Any] = dict(max_steps=steps, tol=tol, check_every=check_every)
    return {
        "mdeq Broyden": ours(Broyden(**limits)),
        f"mdeq Broyden + history {history}": ours(Broyden(history=history, **limits)),
        "mdeq Broyden + bf16 history": ours(Broyden(history_dtype="bfloat16", **limits)),
        "TorchDEQ Broyden": TorchDEQ("broyden", steps + 1, tol),
        "mdeq Anderson": ours(Anderson(history=history, **limits)),
        "TorchDEQ Anderson": TorchDEQ("anderson", steps + 1, tol, history),
        "mdeq Picard": ours(Picard(**limits)),
        "TorchDEQ Picard": TorchDEQ("fixed_point_iter", steps + 1, tol),
    }


def resnet_like(model: Backbone) -> tuple[str, nn.Module]:
    """Return the timm ResNet whose number of parameters is nearest to a model's, and its name."""

    def count(net: nn.Module) -> int:
        return sum(p.numel() for p in net.parameters())

    def build(name: str) -> nn.Module:
        return timm.create_model(name, num_classes=model.num_classes, in_chans=model.in_chans)

    with torch.device("meta"):
        sizes = {name: count(build(name)) for name in RESNETS}
    nearest = min(sizes, key=lambda name: abs(sizes[name] - count(model)))
    return f"timm {nearest}, {sizes[nearest] / 1e6:.2g}M", build(nearest)


@torch.no_grad()
def residual(fn: StateFn, state: State) -> Tensor:
    """Return |f(z) - z| / |f(z)| of each sample, `(B,)`, in the precision that f has."""

    def flat(z: State) -> Tensor:
        return torch.cat([branch.double().flatten(1) for branch in z], dim=1)

    image = flat(fn(state))
    return torch.linalg.vector_norm(image - flat(state), dim=1) / torch.linalg.vector_norm(image, dim=1)


def parse_case(text: str) -> tuple[str, int, int]:
    """Return model, side and batch size of a case MODEL:SIDE:BATCH.

    Raises:
        BadInput: for what is none.
    """
    name, *numbers = text.split(":")
    if len(numbers) != 2 or not all(number.isdigit() and int(number) > 0 for number in numbers):
        raise BadInput(f"a case is MODEL:SIDE:BATCH, such as mdeq_tiny_cifar:32:32, got {text}")
    return name, int(numbers[0]), int(numbers[1])
