"""What tools/predict.py reports of its inputs: classes, how the equilibrium was reached, the files of all of them."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mdeq import SolveStats, SolveStatus
from tools.tables import csv_text

SHOWN = 40
"""Letters of an input's name in the printed table."""


@dataclass(frozen=True)
class Result:
    """What is reported of one input.

    Args:
        number: of the input, in the order given.
        path: of the input.
        classes: most likely classes and their probabilities, or classes of a label map and their shares.
        solve: see `solve_record`.
        outputs: files written, by kind.
        error: why there is no prediction.
    """

    number: int
    path: Path
    classes: Sequence[tuple[int, float]] = ()
    solve: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    error: str = ""

    @property
    def warning(self) -> str:
        """What has to be said of a solve that did not converge."""
        if not self.solve or self.solve["converged"]:
            return ""
        windows = f" in {self.solve['unconverged']} of {self.solve['windows']} windows"
        part = windows if self.solve["windows"] > 1 else ""
        return f"NOT CONVERGED{part} ({self.solve['status']}, residual {self.solve['residual']:.1e})"


def solve_record(solves: Sequence[SolveStats], sample: int | None) -> dict[str, Any]:
    """Return how the solves of an input went: worst status, residual and steps, and the sum of evaluations of f.

    Args:
        solves: of the windows of one input, or the one of a batch of inputs.
        sample: which of the batch; None: all are of one input.
    """
    at = slice(None) if sample is None else slice(sample, sample + 1)
    names = ("status", "num_steps", "residual", "evaluations")
    status, steps, residual, evaluations = (torch.cat([getattr(s, name)[at].cpu() for s in solves]) for name in names)
    unconverged = int((status != SolveStatus.CONVERGED).sum())
    return {
        "converged": unconverged == 0,
        "status": SolveStatus(int(status.max())).name.lower(),  # their order is that of severity
        "residual": float(residual.max()),
        "steps": int(steps.max()),
        "evaluations": round(float(evaluations.sum())),
        "windows": len(status),
        "unconverged": unconverged,
    }


def printed(results: Sequence[Result], names: Sequence[str], topk: int) -> list[str]:
    """Return the table that people read: how the equilibrium was reached, and so many classes."""
    shown = [str(r.path) if len(str(r.path)) <= SHOWN else f"...{str(r.path)[3 - SHOWN :]}" for r in results]
    width = max(len("input"), *map(len, shown))
    lines = [f"{'input':{width}}  {'residual':>8}  {'steps':>5}  {'evaluations':>11}  classes"]
    for name, result in zip(shown, results):
        if result.error:
            lines.append(f"{name:{width}}  no prediction")
            continue
        listed = ", ".join(f"{names[k]} {100 * share:.1f} %" for k, share in result.classes[:topk])
        more = f", {len(result.classes) - topk} more" if len(result.classes) > topk else ""
        solve, warning = result.solve, f"  {result.warning}" if result.warning else ""
        lines.append(
            f"{name:{width}}  {solve['residual']:8.1e}  {solve['steps']:5d}  {solve['evaluations']:11d}  "
            f"{listed}{more}{warning}"
        )
    return lines


def as_csv(results: Sequence[Result], names: Sequence[str], dense: bool) -> str:
    """Return predictions.csv: the most likely classes in order or, where `dense`, the share of every class."""
    rows = []
    for result in results:
        row: dict[str, Any] = {"input": str(result.path)}
        if dense and not result.error:
            shares = dict(result.classes)
            row.update({f"share {k} {name}": f"{shares.get(k, 0):.6f}" for k, name in enumerate(names)})
        elif not dense:
            for rank, (k, probability) in enumerate(result.classes, start=1):
                row.update({f"class_{rank}": names[k], f"probability_{rank}": f"{probability:.6f}"})
        rows.append({**row, **result.outputs, **result.solve, "error": result.error})
    first = next(row for row, result in zip(rows, results) if not result.error)
    return csv_text(rows, list(first))


def as_json(results: Sequence[Result], names: Sequence[str], dense: bool, about: dict[str, Any]) -> str:
    """Return predictions.json: what there is to say about all, and an entry for each input."""
    entries = []
    for result in results:
        entry: dict[str, Any] = {"input": str(result.path)}
        if result.error:
            entries.append({**entry, "error": result.error})
            continue
        value = "share" if dense else "probability"
        entry["classes"] = [{"class": k, "name": names[k], value: number} for k, number in result.classes]
        # JSON has no infinity, which is the residual of a solve that met nothing finite.
        solve = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in result.solve.items()}
        entries.append({**entry, "outputs": result.outputs, "solve": solve})
    return json.dumps({**about, "predictions": entries}, indent=2, allow_nan=False) + "\n"
