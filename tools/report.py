"""What a program tells people: result lines, the CSV of a run, TensorBoard and Weights & Biases by a switch."""

import argparse
import csv
import ctypes
import io
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from mdeq import SolveStatus, WeightsError
from tools.config import BadInput, RunConfig, optional, split_overrides
from tools.scores import CLASS_SCORES, SCORES, TOP5, UNDEFINED, Score
from tools.tables import write_csv

METRICS = [
    "epoch", "step", "lr", "minutes", "train_loss", "train_top1", "train_top5", "test_loss", "test_top1", "test_top5",
]  # fmt: skip


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
        names = [n for n in METRICS if n in names] + [n for n in names if n not in METRICS]
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


class Parser(argparse.ArgumentParser):
    """A parser of a program's words whose complaints are bad input: one line, as any other."""

    def __init__(self, *, description: str | None) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message}; see --help")

    def parse_with_settings(self) -> argparse.Namespace:
        """Return the arguments of the command line; `overrides` are its `key=value` words."""
        self.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the config")
        overrides, rest = split_overrides(sys.argv[1:])
        arguments = self.parse_args(rest)
        if arguments.overrides:
            raise BadInput(f"expected key=value, got {arguments.overrides[0]!r}")
        arguments.overrides = overrides
        return arguments


def check_at_least(least: int, arguments: argparse.Namespace, *names: str) -> None:
    """Raise BadInput for an argument, or one of several numbers of one, below the least; None is passed over."""
    for name in names:
        value = getattr(arguments, name)
        lowest = min(value) if isinstance(value, list) else value
        if lowest is not None and lowest < least:
            raise BadInput(f"--{name.replace('_', '-')} must be >= {least}, got {lowest}")


def keep_freed_memory() -> None:
    """Have the C library of Linux keep what tensors free for the next ones, unless the environment says otherwise.

    It would give large blocks back to the system, which hands every page of the next one out anew: on CPUs with two and
    more threads that is up to two fifths of the time of f (docs/benchmark.md).
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # the C library may be another than glibc
    if mallopt is not None:
        trim_threshold, most_mapped = -1, -4
        mallopt(most_mapped, 0)
        mallopt(trim_threshold, 2**31 - 1)


def program(main: Callable[[], None]) -> None:
    """Run a program; bad input ends it with one line on stderr and exit code 2."""
    keep_freed_memory()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the terminal cannot show must not end the program
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except (BadInput, WeightsError) as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(3)  # mostly the first process says the same, and torchrun ends this one with it
        # From a data loader's worker the message comes wrapped in that worker's traceback.
        message = [line for line in str(error).splitlines() if line.strip()][-1]
        print(f"error: {message.removeprefix('tools.config.BadInput: ')}", file=sys.stderr, flush=True)
        os._exit(2) if "RANK" in os.environ else sys.exit(2)  # the other processes must not wait for this one
    except PermissionError as error:
        print(f"error: {error.strerror}: {error.filename}", file=sys.stderr, flush=True)
        os._exit(2) if "RANK" in os.environ else sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
