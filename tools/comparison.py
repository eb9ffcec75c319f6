"""The parts of tools/benchmark.py: each measures some contenders on the same problem and returns rows of the table."""

import copy
import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdeq import (
    DEQ,
    Backbone,
    Broyden,
    CapturedModel,
    ImplicitGradient,
    PhantomGradient,
    ReversibleGradient,
    State,
    compile_cell,
)
from tools.config import BadInput
from tools.contenders import (
    Clocked,
    StateFn,
    TorchDEQ,
    Twin,
    ours,
    parse_case,
    residual,
    resnet_like,
    solvers,
)
from tools.data import read_cifar10
from tools.peak import Peak, in_a_process, is_measurable
from tools.timings import Row, reference, spread, take_turns, timing_rows

BACKWARD_STEPS = range(1, 31)
RAGGED_BATCH, RAGGED_SLOW = 64, 8
MEMORY = (
    "f alone",
    "mdeq Broyden",
    "mdeq Broyden + bf16 history",
    "TorchDEQ Broyden",
    "mdeq Anderson",
    "TorchDEQ Anderson",
)
IMPLICIT = ("mdeq implicit", "mdeq implicit + warm start", "TorchDEQ implicit", "TorchDEQ implicit + hook")
TWIN = "explicit twin"
MEMORY_LIMIT_GIB = 64.0


@dataclass(frozen=True)
class Bench:
    """What all parts share."""

    device: torch.device
    steps: int
    tol: float
    history: int
    repeats: int
    check_every: int = 1
    bf16: bool = False
    compiled: bool = False
    channels_last: bool = False
    data: Path | None = None

    @property
    def most_steps(self) -> int:
        """Steps that a solve may take which a tolerance ends."""
        return 4 * self.steps

    def precision(self) -> AbstractContextManager[Any]:
        """Return the context in which f is evaluated."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def model(self, name: str, width: int = 1) -> Backbone:
        """Return a model without dropout, with its weights where the name has a tag; or a wider one, without."""
        torch.manual_seed(0)
        model: Any = timm.create_model(name, pretrained="." in name and width == 1, dropout=0.0)
        if width > 1:
            wider = [width * channels for channels in model.equilibrium.cell.channels]
            model = timm.create_model(name, channels=wider, dropout=0.0)
        model = self.placed(model) if model.spatial_dims == 2 else model.to(self.device)
        if self.compiled:
            compile_cell(model)
        return model.eval()

    def placed(self, net: nn.Module) -> nn.Module:
        """Return a 2D network on the device, in the memory format that is asked for."""
        form = torch.channels_last if self.channels_last else torch.preserve_format
        return net.to(device=self.device, memory_format=form)  # pyright: ignore[reportCallIssue]

    def inputs(self, model: Backbone, side: int, batch: int) -> Tensor:
        """Return test images of CIFAR-10 where there are any of this size, else smooth noise, `(B, C, *S)`."""
        shape = (batch, model.in_chans, *[side] * model.spatial_dims)
        if self.data is not None and shape[1:] == (3, 32, 32):
            images = self.images(batch)
            mean, std = (torch.tensor(model.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
            return ((images - mean) / std).to(self.device)
        torch.manual_seed(0)
        coarse = torch.randn(batch, model.in_chans, *[max(side // 8, 2)] * model.spatial_dims)
        return F.interpolate(coarse, size=shape[2:], mode="nearest").to(self.device)

    def images(self, count: int) -> Tensor:
        """Return so many test images of CIFAR-10, `(count, 3, 32, 32)` in 0..1.

        Raises:
            BadInput: if there are none, or fewer.
        """
        images = read_cifar10(Path(self.data or "."), train=False, limit=count).images
        if len(images) < count:
            raise BadInput(f"--data {self.data} has {len(images)} test images of CIFAR-10, {count} are needed")
        return images.float() / 255

    @torch.no_grad()
    def problem(self, model: Backbone, x: Tensor) -> tuple[StateFn, State]:
        """Return f for a batch of inputs, and the state of zeros."""
        injection = model.injection(x)
        return model.equilibrium.fn(injection), model.equilibrium.cell.zero_state(injection)

    def solvers(self, steps: int, tol: float) -> dict[str, nn.Module]:
        return {name: layer.eval() for name, layer in solvers(steps, tol, self.history, self.check_every).items()}


@torch.no_grad()
def _timed_solves(
    bench: Bench, part: str, case: str, layers: Mapping[str, nn.Module], fn: StateFn, z0: State
) -> list[Row]:
    """Return rows of solves: time, evaluations, time inside f, what was reached."""
    clocks: dict[str, list[Any]] = {name: [] for name in layers}

    def solve(name: str, layer: Clocked) -> State:
        state = layer(fn, z0).state
        clocks[name].append(layer.clock)
        return state

    runs = {name: partial(solve, name, Clocked(layer)) for name, layer in layers.items()}
    times, states = take_turns(runs, bench.repeats, bench.device, f"{part} {case}")
    rows = timing_rows(part, case, times)
    for name, row in rows.items():
        inside = [clock.seconds for clock in clocks[name][1:]]  # the first is not timed
        found = residual(fn, states[name])
        row["evaluations"] = float(clocks[name][-1].calls)
        row["per_sample"] = clocks[name][-1].samples / len(found)
        row["inside_ms"] = 1e3 * statistics.median(inside)
        row |= spread("overhead", [total / f for total, f in zip(times[name], inside)])
        if TWIN in times:
            row |= spread("over_twin", [mine / plain for mine, plain in zip(times[name], times[TWIN])])
        row["residual"] = float(found.mean())
        row["residual_max"] = float(found.max())
    return list(rows.values())


def _to_tolerance(bench: Bench, rows: Sequence[Row]) -> list[Row]:
    """Return rows with a time relative to a peer's only where both got to the tolerance, and say where one did not."""
    late = {row["contender"] for row in rows if not row["residual_max"] <= bench.tol}  # nan too
    for name in sorted(late):
        print(f"{name} did not reach {bench.tol:g} for every sample: its time is not compared", flush=True)
    result = []
    for row in rows:
        peer = reference(row["contender"], [other["contender"] for other in rows])
        dropped = () if late.isdisjoint({row["contender"], peer}) else ("relative", "relative_low", "relative_high")
        result.append({key: value for key, value in row.items() if key not in dropped})
    return result


def solve_part(bench: Bench, cases: Sequence[str], trained: str) -> list[Row]:
    rows: list[Row] = []
    for case in cases:
        name, side, batch = parse_case(case)
        model = bench.model(name)
        layers = {**bench.solvers(bench.steps, 0.0), TWIN: Twin(bench.steps + 1)}
        rows += _timed_solves(bench, "solve", case, layers, *bench.problem(model, bench.inputs(model, side, batch)))
    return rows


@torch.no_grad()
def inference_part(bench: Bench, cases: Sequence[str], trained: str) -> list[Row]:
    rows: list[Row] = []
    for case in cases:
        name, side, batch = parse_case(case)
        model = bench.model(name)
        x = bench.inputs(model, side, batch)
        layers = bench.solvers(bench.steps, 0.0)
        layers = {k: layers[k] for k in ("mdeq Broyden", "TorchDEQ Broyden", "mdeq Anderson", "TorchDEQ Anderson")}
        layers[TWIN] = Twin(bench.steps + 1)
        runs: dict[str, Callable[[], Tensor]] = {k: partial(_with_layer, model, v, x) for k, v in layers.items()}
        captured: dict[str, CapturedModel] = {}
        if bench.device.type == "cuda":
            for contender in ("mdeq Broyden", "mdeq Anderson"):
                _put(layers[contender].eval(), model)
                captured[f"{contender} + CUDA graph"] = CapturedModel(model, x)
            runs |= {name: partial(model, x) for name, model in captured.items()}
        if model.spatial_dims == 2:
            resnet_name, resnet = resnet_like(model)
            runs[resnet_name] = partial(bench.placed(resnet).eval(), x)
        times, _ = take_turns(runs, bench.repeats, bench.device, f"inference {case}")
        named = timing_rows("inference", case, times)
        for contender, row in named.items():
            row["images_per_s"] = 1e3 * batch / row["ms"]
            if contender in layers:
                row["evaluations"], row["residual"] = _reached(layers[contender], partial(_with_layer, model, x=x))
            elif contender in captured:
                stats = captured[contender](x, return_equilibrium=True)[1].stats
                row["evaluations"], row["residual"] = float(stats.nfe), float(stats.residual.mean())
        rows += named.values()
    return rows


def _reached(layer: nn.Module, run: Callable[[nn.Module], Any]) -> tuple[float, float]:
    """Return how often a layer evaluates f in a run of a model with it, and its mean residual.

    What a gradient evaluates besides counts too, in the forward pass or again in backward; products with the Jacobian
    do not.
    """
    clocked = Clocked(layer)
    run(clocked)
    return float(clocked.clock.calls), float(clocked.residual().mean())


def _with_layer(model: nn.Module, layer: nn.Module, x: Tensor) -> Tensor:
    """Return what a model gives with another equilibrium layer in its place."""
    _put(layer.train(model.training), model)
    return model(x)


def _put(layer: nn.Module, model: nn.Module) -> None:
    """Put an equilibrium layer, ours or another's, into a model."""
    model.equilibrium.deq = layer  # pyright: ignore[reportAttributeAccessIssue]


def tolerance_part(bench: Bench, cases: Sequence[str], trained: str) -> list[Row]:
    name, side, batch = parse_case(trained)
    model = bench.model(name)
    fn, z0 = bench.problem(model, bench.inputs(model, side, batch))
    layers = bench.solvers(bench.most_steps, bench.tol)
    return _to_tolerance(bench, _timed_solves(bench, "tolerance", trained, layers, fn, z0))


def ragged_part(bench: Bench, cases: Sequence[str], trained: str) -> list[Row]:
    name, side, _ = parse_case(trained)
    model = bench.model(name)
    fn, z0 = bench.problem(model, bench.inputs(model, side, RAGGED_BATCH))
    z0, slow, fast = _ragged_start(bench, fn, z0)
    case = f"{name}:{side}:{RAGGED_BATCH}, {RAGGED_SLOW} take {slow} steps and the rest {fast}"
    layers = bench.solvers(bench.most_steps, bench.tol)
    layers = {k: v for k, v in layers.items() if "Picard" not in k}
    return _to_tolerance(bench, _timed_solves(bench, "ragged", case, layers, fn, z0))


@torch.no_grad()
def _ragged_start(bench: Bench, fn: StateFn, z0: State) -> tuple[State, str, str]:
    """Return a start from which a few samples need four times the steps of the rest on average, and the steps of both.

    The few, the first of the batch, start from zero, the others from an iterate that is closer to their equilibrium.
    """
    layer = ours(Broyden(max_steps=bench.most_steps, tol=bench.tol)).eval()
    slow = torch.arange(len(z0[0]), device=z0[0].device) < RAGGED_SLOW
    aim = float(layer(fn, z0).stats.num_steps[slow].double().mean()) / 4
    candidates = []
    for exponent in range(1, 25):
        rough = ours(Broyden(max_steps=bench.most_steps, tol=bench.tol * 1.3**exponent)).eval()(fn, z0).state
        start = tuple(torch.where(slow.view(-1, *[1] * (z.ndim - 1)), zero, z) for z, zero in zip(rough, z0))
        steps = layer(fn, start).stats.num_steps.double()
        candidates.append((abs(float(steps[~slow].mean()) - aim), start, steps))
    _, start, steps = min(candidates, key=lambda candidate: candidate[0])
    told = [f"{float(part.mean()):.0f} (at most {int(part.max())})" for part in (steps[slow], steps[~slow])]
    return start, told[0], told[1]


def training_part(bench: Bench, cases: Sequence[str], trained: str) -> list[Row]:
    name, side, batch = parse_case(trained)
    model = bench.model(name).train()
    x = bench.inputs(model, side, batch)
    labels = torch.randint(model.num_classes, (batch,), generator=torch.Generator().manual_seed(0)).to(bench.device)
    tight = Broyden(max_steps=400, tol=1e-9, history=40)  # or it would keep 400 directions of a large batch
    exact = _reference(copy.deepcopy(model).double(), ours(tight, ImplicitGradient(tight)), x.double(), labels)

    def error(layer: nn.Module) -> float:
        if exact is None:
            return math.nan
        return float((_gradient(model, layer, x, labels).double() - exact).norm() / exact.norm())

    aim = 1.1 * error(training_layer("TorchDEQ implicit", bench.steps, bench.steps))
    layers: dict[str, nn.Module] = {}
    needed: dict[str, int] = {}
    for contender in IMPLICIT:
        counts = (n for n in BACKWARD_STEPS if error(training_layer(contender, bench.steps, n)) <= aim)
        # Where none does, or nobody can say for want of a reference, it takes as many as forward; the errors tell.
        needed[contender] = next(counts, bench.steps)
        layers[contender] = training_layer(contender, bench.steps, needed[contender])
    for contender in ("mdeq phantom 5", "TorchDEQ phantom 5", "mdeq reversible", TWIN):
        layers[contender] = training_layer(contender, bench.steps)
    runs: dict[str, Callable[[], Any]] = {k: partial(_gradient, model, v, x, labels) for k, v in layers.items()}
    if model.spatial_dims == 2:
        resnet_name, resnet = resnet_like(model)
        runs[resnet_name] = partial(_gradient, bench.placed(resnet).train(), None, x, labels)
    times, _ = take_turns(runs, bench.repeats, bench.device, f"training {trained}")
    rows = timing_rows("training", trained, times)
    for contender, row in rows.items():
        row["images_per_s"] = 1e3 * batch / row["ms"]
        if contender in layers:
            row["evaluations"], row["residual"] = _reached(
                layers[contender], partial(_gradient, model, x=x, labels=labels)
            )
            row["gradient_error"] = error(layers[contender])
            if is_measurable(str(bench.device)):
                row["peak_mib"] = measured_peak(bench, trained, contender, needed.get(contender, 0))
        if contender in needed:
            row["backward_steps"] = float(needed[contender])
    return list(rows.values())


def _reference(model: Backbone, layer: DEQ, x: Tensor, labels: Tensor) -> Tensor | None:
    """Return the gradient by a layer that has to converge, forward and backward; None, and a line, if it does not."""
    clocked = Clocked(layer)
    gradient = _gradient(model, clocked, x, labels)
    for stats in (clocked.equilibrium.stats, *clocked.equilibrium.backward_stats):
        if not bool(stats.converged.all()):
            print(
                f"gradient errors are left out: {int((~stats.converged).sum())} of {len(x)} samples are not at "
                f"{layer.solver.tol:g} after {layer.solver.max_steps} steps of the reference; trained weights help"
            )
            return None
    return gradient


def training_layer(contender: str, steps: int, backward_steps: int = 0) -> nn.Module:
    """Return a contender of the part `training`: Broyden of so many steps, and a gradient."""
    forward, gradient = Broyden(max_steps=steps, tol=0.0), contender.partition(" ")[2]
    if contender == TWIN:
        return Twin(steps + 1)
    if contender in ("TorchDEQ implicit", "TorchDEQ implicit + hook"):
        backward: dict[str, Any] = dict(b_solver="broyden", b_max_iter=backward_steps, b_tol=0.0, b_stop_mode="rel")
        return TorchDEQ("broyden", steps + 1, 0.0, ift=True, hook_ift=contender.endswith("hook"), **backward)
    if contender == "TorchDEQ phantom 5":
        return TorchDEQ("broyden", steps + 1, 0.0, grad=5, tau=0.5)
    if gradient == "phantom 5":
        return ours(forward, PhantomGradient(5, 0.5))
    if gradient == "reversible":
        return ours(forward, ReversibleGradient(0.5))
    backward_solver = Broyden(max_steps=backward_steps, tol=0.0)
    return ours(forward, ImplicitGradient(backward_solver, warm_start=gradient == "implicit + warm start"))


def _gradient(model: nn.Module, layer: nn.Module | None, x: Tensor, labels: Tensor) -> Tensor:
    """Return the gradient of the cross-entropy with respect to all parameters, as one vector."""
    model.zero_grad()
    logits = model(x) if layer is None else _with_layer(model, layer, x)
    loss = F.cross_entropy(logits, labels)
    with torch.autocast(x.device.type, enabled=False):  # backward has the precision that forward chose
        loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def memory_part(bench: Bench, cases: Sequence[str], trained: str) -> list[Row]:
    rows: list[Row] = []
    for case in cases:
        peaks = {}
        for name in MEMORY:
            peaks[name] = measured_peak(bench, case, name)
        alone = peaks.pop("f alone")
        for name, peak in peaks.items():
            row: Row = dict(part="memory", case=case, contender=name, solver_mib=peak - alone, f_mib=alone)
            peer = reference(name, list(peaks))
            if peer is not None:
                own, theirs = peak - alone, peaks[peer] - alone
                row["relative"] = own / theirs if theirs > 0 else math.nan  # too little to be seen
            rows.append(row)
    return rows


def measured_peak(bench: Bench, case: str, contender: str, backward_steps: int | None = None, width: int = 1) -> float:
    """Return the peak memory in MiB of a solve, or with `backward_steps` of a training step, from another process."""
    shared = {f.name: getattr(bench, f.name) for f in dataclasses.fields(Bench)}
    shared |= dict(device=str(bench.device), data=None if bench.data is None else str(bench.data))
    settings = dict(bench=shared, case=case, contender=contender, backward_steps=backward_steps, width=width)
    result = in_a_process(str(Path(__file__).with_name("benchmark.py")), settings)
    return float("nan") if result is None else result["mib"]


def measure(text: str) -> None:
    """Print as JSON the peak memory in MiB of what `measured_peak` describes."""
    settings = json.loads(text)
    torch.set_num_threads(1)
    shared = settings["bench"]
    data = None if shared["data"] is None else Path(shared["data"])
    bench = Bench(**{**shared, "device": torch.device(shared["device"]), "data": data})
    if bench.device.type == "cuda":
        torch.cuda.set_device(bench.device)
    name, side, batch = parse_case(settings["case"])
    model, backward_steps = bench.model(name, settings["width"]), settings["backward_steps"]
    if backward_steps is None:
        layer = {**bench.solvers(bench.steps, 0.0), "f alone": Twin(1)}[settings["contender"]]
        run = partial(_solve, bench, model, layer)
    else:
        layer = training_layer(settings["contender"], bench.steps, backward_steps)
        run = partial(_train, model.train(), layer)
    with bench.precision():
        # Libraries set themselves up, compiled cells for the very batch.
        run(bench.inputs(model, side, batch if bench.compiled else 2))()
        call = run(bench.inputs(model, side, batch))
        with Peak(str(bench.device), MEMORY_LIMIT_GIB) as peak:
            call()
    print(json.dumps({"mib": peak.mib}))


def _solve(bench: Bench, model: Backbone, layer: nn.Module, x: Tensor) -> Callable[[], Any]:
    return partial(torch.no_grad()(layer), *bench.problem(model, x))


def _train(model: Backbone, layer: nn.Module, x: Tensor) -> Callable[[], Any]:
    return partial(_gradient, model, layer, x, torch.zeros(len(x), dtype=torch.long, device=x.device))


PARTS: dict[str, Callable[[Bench, Sequence[str], str], list[Row]]] = {
    "solve": solve_part,
    "inference": inference_part,
    "tolerance": tolerance_part,
    "training": training_part,
    "ragged": ragged_part,
    "memory": memory_part,
}
NEED_WEIGHTS = ("tolerance", "ragged")
