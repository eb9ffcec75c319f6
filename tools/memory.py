"""Measure the peak memory of one training step against the size of the input and the number of solver steps.

    python tools/memory.py --model mdeq3d_tiny_seg --sides 32 48 64 96 --steps 6 12 24 --out DIR

Compares the implicit, phantom and reversible gradients with backpropagation through the unrolled solve and with the
untied network, a network of as many cells in a row, each with weights of its own. Sides are compared at the middle
number of steps, steps at the middle side. Every figure is that of a process of its own, on top of what the program
holds before the step; the limit makes running out of memory a row like the others. Prints a table and saves memory.csv
and memory.png.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import timm
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torch import Tensor, nn
from tqdm import tqdm

from mdeq import Anderson, Backbone, Broyden, ImplicitGradient, PhantomGradient, ReversibleGradient
from tools import peak
from tools.batches import MIN_SIZE
from tools.build import find_device, known_weights
from tools.checkpoint import check_folder, write_atomically
from tools.config import BadInput
from tools.program import Parser, check_at_least, program
from tools.timings import save_table


class Untied(nn.Module):
    """As many cells in a row as there are steps, each with weights of its own, in place of an equilibrium."""

    def __init__(self, model: Backbone, steps: int) -> None:
        super().__init__()
        name, classes = model.pretrained_cfg["architecture"], model.num_classes
        self.model = model
        again: list[Any] = [timm.create_model(name, num_classes=classes) for _ in range(steps)]
        self.cells = nn.ModuleList(other.equilibrium.cell for other in again)

    def forward(self, x: Tensor) -> Tensor:
        injection = self.model.injection(x)
        state = self.model.equilibrium.cell.zero_state(injection)
        injections = (injection, *(None for _ in state[1:]))
        for cell in cast(Iterable[Any], self.cells):
            state = cell(state, injections, cell.sample_masks(injection))
        return cast(Any, self.model).head(state)


def _solved(gradient: Any, solver: Any) -> Callable[[Backbone, int], Callable[[Tensor], Tensor]]:
    def build(model: Backbone, steps: int) -> Callable[[Tensor], Tensor]:
        model.deq.solver = solver(steps)
        model.deq.gradient = gradient(steps)
        return model.forward_features

    return build


def _anderson(steps: int) -> Anderson:
    return Anderson(max_steps=steps, tol=0.0, history=5)


# What a training step differentiates, by the name in the table.
GRADIENTS: dict[str, Callable[[Backbone, int], Callable[[Tensor], Tensor]]] = {
    "implicit": _solved(lambda steps: ImplicitGradient(_anderson(steps)), _anderson),
    "implicit, Broyden": _solved(
        lambda steps: ImplicitGradient(Broyden(max_steps=steps, tol=0.0)),
        lambda steps: Broyden(max_steps=steps, tol=0.0),
    ),
    "phantom, 5 steps": _solved(lambda steps: PhantomGradient(5), _anderson),
    "reversible": _solved(lambda steps: ReversibleGradient(0.5, steps), _anderson),
    "unrolled": lambda model, steps: lambda x: model.head(model.solve(x, unroll=steps).state),
    "untied network": Untied,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement."""

    model: str
    gradient: str
    side: int
    steps: int
    batch: int
    device: str
    limit_gib: float


def measure(case: Case) -> dict[str, Any]:
    """Return the row of a case, measured in this process."""
    row = dict(gradient=case.gradient, side=case.side, steps=case.steps)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if case.device.startswith("cuda"):
        torch.cuda.set_device(case.device)
    model: Any = timm.create_model(case.model).to(case.device).train()
    features = GRADIENTS[case.gradient](model, case.steps)
    if isinstance(features, nn.Module):
        features.to(case.device)

    def step(side: int) -> None:
        x = torch.randn(case.batch, model.in_chans, *[side] * model.spatial_dims, device=case.device)
        features(x).square().mean().backward()

    step(16)  # libraries set themselves up, and gradients are allocated
    with peak.Peak(case.device, case.limit_gib) as step_peak:
        step(case.side)
    if math.isnan(step_peak.mib):
        return {**row, "peak_mib": "", "note": f"out of memory at {case.limit_gib:g} GiB"}
    return {**row, "peak_mib": round(step_peak.mib, 1), "note": ""}


def in_a_process(case: Case) -> dict[str, Any]:
    """Return the row of a case, measured in a process of its own."""
    row = dict(gradient=case.gradient, side=case.side, steps=case.steps)
    killed = {**row, "peak_mib": "", "note": "out of memory: killed by the system"}
    return peak.in_a_process(__file__, dataclasses.asdict(case)) or killed


LINES = ("o-", "s--", "D-", "^:", "v-", "P--")  # some lie on each other


def middle(values: list[int]) -> int:
    return values[len(values) // 2]


def save(rows: list[dict[str, Any]], folder: Path, title: str, sides: list[int], steps: list[int]) -> None:
    """Write memory.csv and memory.png."""
    folder.mkdir(parents=True, exist_ok=True)
    save_table(rows, folder / "memory.csv")
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    side, count = middle(sides), middle(steps)
    for ax, x, fixed, value in ((axes[0], "side", "steps", count), (axes[1], "steps", "side", side)):
        for name, line in zip(GRADIENTS, LINES):
            points = [(r[x], r["peak_mib"]) for r in rows if r["gradient"] == name and r[fixed] == value]
            points = [point for point in points if point[1] != ""]
            ax.plot(*zip(*points), line, label=name, alpha=0.8) if points else None
        ax.set(xlabel=x, ylabel="peak memory of a training step (MiB)", yscale="log", title=f"{fixed} {value}")
        ax.set_xticks(sides if x == "side" else steps)
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter("")
        ax.grid(alpha=0.3)
    named = axes[0].get_legend_handles_labels()
    figure.legend(*named, loc="outside lower center", ncols=len(GRADIENTS), fontsize="small")
    figure.suptitle(title)
    write_atomically(folder / "memory.png", lambda path: figure.savefig(path, dpi=120, format="png"))


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield f"{'gradient':<20} {'side':>5} {'steps':>6} {'peak MiB':>10}"
    for row in rows:
        yield f"{row['gradient']:<20} {row['side']:>5} {row['steps']:>6} {row['peak_mib'] or row['note']:>10}"


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", default="mdeq3d_tiny_seg", help="any model of this package")
    parser.add_argument("--sides", type=int, nargs="+", default=[32, 48, 64, 96], help="input sides, equal on all axes")
    parser.add_argument("--steps", type=int, nargs="+", default=[6, 12, 24], help="solver steps")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    parser.add_argument("--limit-gib", type=float, default=16.0, help="memory a step may take, in GiB")
    parser.add_argument(
        "--out", type=Path, default=Path("runs") / "memory", help="folder for memory.csv and memory.png"
    )
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.measure is not None:
        print(json.dumps(measure(Case(**json.loads(arguments.measure)))))
        return
    known_weights(arguments.model)
    check_folder(arguments.out)
    device = str(find_device(arguments.device, "--device"))
    check_at_least(1, arguments, "batch_size", "steps")
    check_at_least(MIN_SIZE, arguments, "sides")
    if not 0 < arguments.limit_gib < math.inf:
        raise BadInput(f"--limit-gib must be above 0, got {arguments.limit_gib:g}")
    peak.check_measurable(device)
    common = dict(batch=arguments.batch_size, device=device, limit_gib=arguments.limit_gib)
    sides, steps = sorted(set(arguments.sides)), sorted(set(arguments.steps))
    side, count = middle(sides), middle(steps)
    grid = [
        Case(model=arguments.model, gradient=name, side=s, steps=k, **common)
        for name, s, k in product(GRADIENTS, sides, steps)
        if s == side or k == count
    ]
    rows = [in_a_process(case) for case in tqdm(grid, unit="case")]
    title = f"{arguments.model}, batch {arguments.batch_size}, {device}, torch {torch.__version__}"
    save(rows, arguments.out, title, sides, steps)
    print("\n".join(table(rows)))
    print(f"saved: {arguments.out / 'memory.csv'}, {arguments.out / 'memory.png'}")


if __name__ == "__main__":
    program(main)
