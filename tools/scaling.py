"""The cost model: how the time and memory of a solve grow, and where the limit of f lies."""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from tools.checkpoint import write_atomically
from tools.comparison import Bench, measured_peak
from tools.contenders import parse_case
from tools.timings import Row, save_table, table, take_turns, timing_rows

FACTORS = {"steps": (1 / 3, 2 / 3, 1, 4 / 3, 2), "side": (1 / 2, 3 / 4, 1, 3 / 2, 2), "batch": (1 / 4, 1 / 2, 1, 2)}
WIDTHS = (1, 2, 3, 4)
MATRICES, GPU_MATRICES = (1024, 2048, 4096), (4096, 8192, 16384)


def points(bench: Bench, case: str) -> Iterator[tuple[str, float, dict[str, Any]]]:
    """Yield the axis, the value along it and the settings of every measurement around a case."""
    name, side, batch = parse_case(case)
    axes = bench.model(name).spatial_dims
    base: dict[str, Any] = dict(name=name, side=side, batch=batch, steps=bench.steps, width=1)
    for axis, factors in FACTORS.items():
        values = sorted({max(round(base[axis] * factor), 16 if axis == "side" else 1) for factor in factors})
        for value in values:
            growing = float(value**axes) if axis == "side" else float(value)
            yield ("pixels" if axis == "side" else axis), growing, {**base, axis: value}
    for width in WIDTHS:
        yield "channels", float(width), {**base, "width": width}


@torch.no_grad()
def measured(bench: Bench, case: str) -> list[Row]:
    """Return a row per contender and point: time of a solve and of one f in ms, memory in MiB."""
    rows: list[Row] = []
    names = ("mdeq Broyden", f"mdeq Broyden + history {bench.history}", "mdeq Anderson")
    grid = list(points(bench, case))
    for axis in dict.fromkeys(axis for axis, _, _ in grid):
        runs = {}
        places = [(value, settings) for name, value, settings in grid if name == axis]
        for value, settings in places:
            model = bench.model(settings["name"], width=settings["width"])
            fn, z0 = bench.problem(model, bench.inputs(model, settings["side"], settings["batch"]))
            layers = bench.solvers(settings["steps"], 0.0)
            runs[f"{value:g} f"] = partial(fn, z0)
            runs |= {f"{value:g} {name}": partial(layers[name], fn, z0) for name in names}
        times, _ = take_turns(runs, bench.repeats, bench.device, f"growth with {axis}")
        timed = timing_rows("scaling", case, times)
        for value, settings in tqdm(places, desc=f"memory against {axis}", disable=None, leave=False):
            for name in names:
                rows.append(
                    dict(
                        axis=axis,
                        value=value,
                        contender=name,
                        ms=timed[f"{value:g} {name}"]["ms"],
                        f_ms=timed[f"{value:g} f"]["ms"],
                        peak_mib=_peak(bench, settings, name),
                    )
                )
    return rows


def _peak(bench: Bench, settings: dict[str, Any], contender: str) -> float:
    case = f"{settings['name']}:{settings['side']}:{settings['batch']}"
    return measured_peak(replace(bench, steps=settings["steps"]), case, contender, width=settings["width"])


@torch.no_grad()
def roofline(bench: Bench, cases: Sequence[str]) -> list[Row]:
    """Return for every case the operations of one f, their rate, and the share of the best rate of a matrix product.

    Products have the precision that f has: bfloat16 under --bf16, else float32, of which cuDNN makes TF32 by default.
    """
    on_gpu = bench.device.type == "cuda"
    dtype = torch.bfloat16 if bench.bf16 else torch.float32

    def product(a: Tensor, b: Tensor) -> None:
        own = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32  # one rule for both
        torch.mm(a, b)
        torch.backends.cuda.matmul.allow_tf32 = own  # solvers have the default

    runs: dict[str, Any] = {}
    operations: dict[str, float] = {}
    for side in GPU_MATRICES if on_gpu else MATRICES:
        a, b = (torch.randn(side, side, device=bench.device, dtype=dtype) for _ in range(2))
        name = f"matrix product of {side}"
        runs[name], operations[name] = partial(product, a, b), 2.0 * side**3
    products = len(runs)
    for case in cases:
        name, size, batch = parse_case(case)
        model = bench.model(name)
        fn, z0 = bench.problem(model, bench.inputs(model, size, batch))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            eager = getattr(fn, "eager", None)
            (fn if eager is None else eager())(z0)  # it sees no operation of a compiled cell
        runs[case], operations[case] = partial(fn, z0), float(counter.get_total_flops())
    times, _ = take_turns(runs, 3 * bench.repeats, bench.device, "rates")
    rows = timing_rows("rate", "", times)
    result = []
    for name, row in rows.items():
        rate = operations[name] / row["ms"] / 1e6
        result.append(dict(what=name, gflop=operations[name] / 1e9, ms=row["ms"], gflop_per_s=rate))
    best = max(row["gflop_per_s"] for row in result[:products])
    for row in result:
        row["share"] = row["gflop_per_s"] / best
    return result


def exponent(values: Sequence[float], costs: Sequence[float]) -> float:
    """Return the slope of log cost against log value, by least squares: 1 where growth is linear.

    It is nan where a cost was too small to be measured, or there is one value alone.
    """
    if len(set(values)) < 2 or not all(cost > 0 for cost in costs):
        return math.nan
    return statistics.linear_regression(list(map(math.log, values)), list(map(math.log, costs))).slope


def exponents(rows: Sequence[Row]) -> list[Row]:
    """Return per axis and contender how time and memory grow."""
    result = []
    for axis in dict.fromkeys(row["axis"] for row in rows):
        for name in _contenders(rows):
            line = [row for row in rows if row["axis"] == axis and row["contender"] == name]
            values = [row["value"] for row in line]
            growth = {key: exponent(values, [row[key] for row in line]) for key in ("ms", "peak_mib")}
            result.append(
                dict(axis=axis, contender=name, time_exponent=growth["ms"], memory_exponent=growth["peak_mib"])
            )
    return result


def _contenders(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["contender"] for row in rows))


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    axes_names = list(dict.fromkeys(row["axis"] for row in rows))
    figure = Figure(figsize=(3 * len(axes_names), 5.5), layout="constrained")
    axes = figure.subplots(2, len(axes_names))
    lines: list[Any] = []
    for column, axis in enumerate(axes_names):
        for line, (key, label) in enumerate((("ms", "time of a solve (ms)"), ("peak_mib", "peak memory (MiB)"))):
            ax = axes[line, column]
            lines, slopes, values = [], [], []
            for name, marker in zip(_contenders(rows), "osD"):
                members = [row for row in rows if row["axis"] == axis and row["contender"] == name]
                values, costs = [row["value"] for row in members], [row[key] for row in members]
                lines += ax.loglog(values, costs, f"{marker}-", label=name, markersize=5, alpha=0.8)
                slopes.append(f"{exponent(values, costs):.2f}")
            ax.set_xlabel(f"{axis} (multiple)" if axis == "channels" else axis)
            ax.set_ylabel(label if column == 0 else "")
            ax.set_xticks(values, [f"{value:g}" for value in values], fontsize="x-small")
            ax.minorticks_off()
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter("{x:g}")
            ax.margins(y=0.15)
            ax.grid(alpha=0.3)
            ax.legend(lines, slopes, title="slope", fontsize="x-small", title_fontsize="x-small")
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), fontsize="small")
    figure.suptitle(title, fontsize="small")
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))


def run(bench: Bench, cases: Sequence[str], base: str, folder: Path, title: str) -> None:
    """Measure growth around one case and the rates of several; print both and save scaling.csv and scaling.png."""
    rates = roofline(bench, cases)
    save_table(rates, folder / "rates.csv")
    rows = measured(bench, base)
    print(title)
    for lines in (rows, exponents(rows), rates):
        print("\n".join(table(lines)), end="\n\n")
    save_table(rows, folder / "scaling.csv")
    plot(rows, folder / "scaling.png", f"{base}; {title}")
    print(f"saved: {folder / 'scaling.csv'}, {folder / 'rates.csv'}, {folder / 'scaling.png'}")
