"""What training and tests tell people: result lines, the CSV of a run, TensorBoard and Weights & Biases by a switch."""

import csv
from pathlib import Path
from typing import Any

from mdeq import SolveStatus
from tools.config import RunConfig, optional
from tools.scores import CLASS_SCORES, SCORES, TOP5, UNDEFINED, Score
from tools.tables import write_csv

FIRST_COLUMNS = [
    "epoch", "step", "lr", "minutes", "train_loss", "train_top1", "train_top5", "test_loss", "test_top1", "test_top5",
]  # fmt: skip
"""Of log.csv; what else is logged follows."""


def headline_lines(
    headline: Score, result: dict[str, float], twice: dict[str, float], steps: int, digits: int = 1
) -> list[str]:
    """Return the score of a run, the other scores, and the score at twice the solver steps, one line each."""
    key = headline.key
    return [
        f"test {headline.name}: {headline.text(result[key], digits)}",
        *score_lines(headline, result),
        f"at twice the solver steps ({2 * steps}, without tolerance): {headline.text(twice[key], digits)}",
    ]


def score_lines(headline: Score, result: dict[str, float]) -> list[str]:
    """Return the scores beside the headline's: those of the whole split in one line, those of the classes in others."""
    others = [s for s in SCORES.values() if s.key in result and s not in (headline, TOP5)]
    lines = [", ".join(f"{s.name} {s.text(result[s.key], 1)}" for s in others)] if others else []
    for score in CLASS_SCORES:
        shown = [f"{label} {score.text(value, 1)}" for label, value in score.by_class(result).items()]
        lines += [f"{score.name}: {', '.join(shown)}"] if shown else []
    if result.get(UNDEFINED):
        lines.append(f"HD95 is not defined for {result[UNDEFINED]:.0f} pairs of volume and class")
    return lines


def result_lines(result: dict[str, float]) -> list[str]:
    """Return evaluations, residual quantiles and shares of the statuses of an evaluation, one line each."""
    if "evaluations" not in result:
        return []
    quantiles = ", ".join(
        f"{label} {result[f'residual_q{q}']:.2e}" for label, q in (("median", "0.5"), ("90 %", "0.9"), ("99 %", "0.99"))
    )
    shares = ", ".join(f"{s.name.lower()} {100 * result[s.name.lower()]:.1f} %" for s in SolveStatus)
    return [
        f"evaluations of f: mean {result['evaluations']:.1f}",
        f"residual: mean {result['residual_mean']:.2e}, {quantiles}, largest {result['residual_q1']:.2e}",
        f"solver status: {shares}",
    ]


class RunLog:
    """The log of a run: a CSV with a row an epoch always, and the services that were switched on."""

    def __init__(self, folder: Path, run: RunConfig, settings: dict[str, Any], first_epoch: int, run_id: str) -> None:
        self.path = folder / "log.csv"
        self.rows: list[dict[str, Any]] = []
        if first_epoch > 0 and self.path.exists():  # epochs after the checkpoint are done again
            with open(self.path, newline="", encoding="utf-8") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["epoch"]) < first_epoch]
        self.folder, self.settings, self.id = folder, settings, run_id
        # Looked for at once, opened with the first row: a run that fails to start leaves nothing behind.
        self._tensorboard = optional("torch.utils.tensorboard", "log", "tensorboard") if run.tensorboard else None
        self._wandb = optional("wandb", "log") if run.wandb else None
        self.board: Any = None
        self.wandb: Any = None

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._tensorboard is not None and self.board is None:
            self.board = self._tensorboard.SummaryWriter(str(self.folder))
        if self._wandb is not None and self.wandb is None:
            name, folder = self.folder.name, str(self.folder)
            self.wandb = self._wandb.init(
                project="mdeq", name=name, dir=folder, config=self.settings, resume="allow", id=self.id
            )

    def add(self, row: dict[str, float]) -> None:
        """Add the row of an epoch."""
        self._open()
        self.rows.append(row)
        names = dict.fromkeys(name for r in self.rows for name in r)
        names = [n for n in FIRST_COLUMNS if n in names] + [n for n in names if n not in FIRST_COLUMNS]
        write_csv(self.path, self.rows, names)
        if self.board is not None:
            for name, value in row.items():
                self.board.add_scalar(name, value, row["epoch"])
        if self.wandb is not None:
            self.wandb.log(row, step=int(row["epoch"]))

    def close(self) -> None:
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()
