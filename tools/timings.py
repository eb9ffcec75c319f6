"""Timings of things that take turns, and tables of them."""

import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from tools.checkpoint import write_atomically
from tools.tables import write_csv

Row = dict[str, Any]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(
    runs: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device, what: str
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Return the times of every run in seconds, and what it returned last.

    All run once before anything is timed; then they take turns, and another one begins each round.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    results: dict[str, Any] = {}
    order = list(runs)
    with tqdm(total=len(runs) * (repeats + 1), desc=what, disable=None, leave=False) as bar:
        for turn in range(repeats + 1):
            for name in order:
                synchronize(device)
                start = time.perf_counter()
                results[name] = runs[name]()
                synchronize(device)
                if turn > 0:
                    times[name].append(time.perf_counter() - start)
                bar.update()
            order.append(order.pop(0))
    return times, results


def reference(name: str, names: Sequence[str]) -> str | None:
    """Return the peer that a contender is compared with: its namesake, else the first one, None for a peer itself."""
    peers = [other for other in names if other.startswith("TorchDEQ")]
    namesake = name.replace("mdeq ", "TorchDEQ ").partition(" + ")[0]
    return namesake if namesake in peers else (peers or [None])[0]


def timing_rows(part: str, case: str, times: Mapping[str, list[float]]) -> dict[str, Row]:
    """Return a row per contender: median and quartiles in ms, and the time relative to its peer, turn by turn."""
    rows = {}
    for name, seconds in times.items():
        row = dict(part=part, case=case, contender=name, **spread("ms", [1e3 * value for value in seconds]))
        peer = reference(name, list(times))
        if peer is not None:
            row |= spread("relative", [mine / theirs for mine, theirs in zip(seconds, times[peer])])
        rows[name] = row
    return rows


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Return the median of values by a name, and the quartiles by that name and `_low`, `_high`."""
    low, middle, high = map(float, np.percentile(values, (25, 50, 75)))
    return {name: middle, f"{name}_low": low, f"{name}_high": high}


def columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of a table, each column as wide as it needs."""
    names = columns(rows)
    cells = [names, *([_text(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(len(line[k]) for line in cells) for k in range(len(names))]
    numbers = [all(not isinstance(row.get(name), str) for row in rows) for name in names]
    for line in cells:
        yield "  ".join(
            cell.rjust(width) if number else cell.ljust(width) for cell, width, number in zip(line, widths, numbers)
        ).rstrip()


def _text(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def save_table(rows: Sequence[Row], path: Path) -> None:
    write_csv(path, rows, columns(rows))


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw a panel per part and case, with quartiles: overhead for solves, else time or memory relative to TorchDEQ."""
    panels: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        panels.setdefault((row["part"], row["case"]), []).append(row)
    width = min(3, len(panels))
    lines = -(-len(panels) // width)
    figure = Figure(figsize=(4.6 * width, 2.4 * lines + 0.4), layout="constrained")
    axes = figure.subplots(lines, width, squeeze=False)
    for ax, ((part, case), members) in zip(axes.flat, panels.items()):
        key = "overhead" if part == "solve" else "relative"
        shown = [row for row in reversed(members) if key in row]
        bars = ax.barh(
            [row["contender"] for row in shown],
            [row[key] for row in shown],
            xerr=list(zip(*(_whiskers(row, key) for row in shown))) or None,
            error_kw=dict(elinewidth=0.8, ecolor="0.3"),
            color=[_colour(row["contender"]) for row in shown],
        )
        if not shown:
            ax.text(0.5, 0.5, "tolerance not reached", transform=ax.transAxes, ha="center", fontsize="small")
            ax.set(xticks=[], yticks=[])
        ax.bar_label(bars, fmt=lambda x: f"{x:.2f}" if x >= 0.1 else f"{x:.1g}", padding=3, fontsize="small")
        ax.axvline(1, color="black", linewidth=0.6)
        ax.margins(x=0.14)
        name, _, note = case.partition(", ")
        ax.set_title("\n".join([f"{part}, {name}", *textwrap.wrap(note, 44)]), fontsize="small", loc="left")
        label = "solver memory relative to TorchDEQ" if part == "memory" else "time relative to TorchDEQ"
        ax.set_xlabel("time of the solve over time inside f" if part == "solve" else label, fontsize="small")
        ax.tick_params(labelsize="small")
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    figure.suptitle(title, fontsize="small")
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=90, format="png"))


def _whiskers(row: Row, key: str) -> tuple[float, float]:
    """Return how far the quartiles lie below and above a value, 0 where it has none."""
    return row[key] - row.get(f"{key}_low", row[key]), row.get(f"{key}_high", row[key]) - row[key]


def _colour(contender: str) -> str:
    owner = contender.partition(" ")[0]
    return {"mdeq": "tab:blue", "TorchDEQ": "tab:orange"}.get(owner, "tab:gray")
