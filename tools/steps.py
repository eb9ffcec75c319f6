"""Accuracy against the number of solver steps, beside that of the explicit twin: the same f applied as often."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from mdeq import Picard
from tools.checkpoint import STEPS_FILE, STEPS_PICTURE, make_folder, write_atomically
from tools.scores import Score
from tools.tables import write_csv

SOLVER_COLUMNS = ["residual_mean", "residual_q0.5", "residual_q0.9", "evaluations"]
ALL = "all"
"""The number of samples where they are the whole split."""

Row = dict[str, Any]
"""A row of steps.csv; all but `samples` are numbers."""


def columns(headline: Score) -> list[str]:
    """Return the columns of steps.csv."""
    return ["steps", headline.key, *SOLVER_COLUMNS, f"twin_{headline.key}", "twin_residual_mean", "samples"]


def steps_table(model: Any, steps: Sequence[int], run: Any, headline: Score, samples: int | None = None) -> list[Row]:
    """Return score and residual after each number of solver steps, taken to the last, and those of f applied as often.

    Args:
        model: the model.
        steps: numbers of steps.
        run: `run(label, **options)` returns the results of an evaluation, see `engine.evaluate`.
        headline: the score.
        samples: how many of the split these are; None if all.
    """
    rows, key, counts = [], headline.key, sorted(set(steps))
    picard = Picard(max_steps=counts[-1], tol=0.0, divergence_factor=float("inf"))  # its iterates are those of the twin
    plain = run(f"{counts[-1]} times f, residuals", solver=picard, iterates=counts)
    for count in counts:
        solver = dataclasses.replace(model.deq.solver, max_steps=count, tol=0.0)  # or more steps would change nothing
        row = run(f"{count} steps", solver=solver)
        twin = run(f"{count} times f", unroll=count)
        beside = {f"twin_{key}": twin[key], "twin_residual_mean": plain[f"residual_after_{count}"]}
        row = {"steps": count, "samples": samples or ALL, **row, **beside}
        rows.append({name: row[name] for name in columns(headline)})
    return rows


def step_lines(rows: Sequence[Row], headline: Score) -> Iterator[str]:
    """Yield the table that people read."""
    yield (
        f"{'steps':>6} {headline.short:>8} {'residual':>10} {'evaluations':>12} {f'twin {headline.short}':>11} "
        f"{'twin residual':>14}"
    )
    for row in rows:
        scores = [headline.number(row[key]) for key in (headline.key, f"twin_{headline.key}")]
        yield (
            f"{row['steps']:6d} {scores[0]:>8} {row['residual_mean']:10.2e} {row['evaluations']:12.1f} "
            f"{scores[1]:>11} {row['twin_residual_mean']:14.2e}"
        )


def steps_figure(rows: Sequence[Row], title: str, headline: Score) -> Figure:
    """Return the curves of score and mean residual."""
    steps = [row["steps"] for row in rows]
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(steps, [row[headline.key] for row in rows], "o-", label="solver")
    left.plot(steps, [row[f"twin_{headline.key}"] for row in rows], "s--", label="explicit twin (f applied as often)")
    left.set(xlabel="steps", ylabel=f"{headline.name} (%)" if headline.per_cent else headline.name)
    right.plot(steps, [row["residual_mean"] for row in rows], "o-", label="solver")
    right.plot(steps, [row["twin_residual_mean"] for row in rows], "s--", label="explicit twin")
    right.set(xlabel="steps", ylabel="mean residual", yscale="log")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(steps, [str(s) for s in steps])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(which="both", alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    return figure


def recorded(rows: Sequence[Row], made: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a record says of accuracy against steps; nothing without rows."""
    return {"steps": [dict(row) for row in rows], "steps_by": dict(made)} if rows else {}


def save_table(rows: Sequence[Row], folder: Path, title: str, headline: Score) -> None:
    """Write steps.csv and steps.png."""
    make_folder(folder)
    write_csv(folder / STEPS_FILE, rows, columns(headline))
    figure = steps_figure(rows, title, headline)
    write_atomically(folder / STEPS_PICTURE, lambda path: figure.savefig(path, dpi=120, format="png"))
