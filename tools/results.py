"""results.json: what a run reached, how, and on what; the records from which model cards and tables are made."""

import dataclasses
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch

import mdeq
from tools.checkpoint import RESULTS_FILE, read_json, write_text
from tools.config import BadInput

ROOT = Path(__file__).resolve().parent.parent
PLACES = {"data.root": "DIR", "run.out_dir": "DIR", "model.checkpoint": "FILE"}
"""Settings that say where, not what, and what stands for them in a command."""
OF_A_PART = ("run.max_minutes=", "run.resume=", "run.autoresume=")
"""Settings of one part of a run, which say nothing of the whole."""


def hardware(device: torch.device, processes: int = 1) -> str:
    """Return what a run ran on, as `1 x NVIDIA H100` or `a CPU, 2 of 8 cores (x86_64)`."""
    if device.type == "cuda":
        return f"{processes} x {torch.cuda.get_device_name(device)}"
    count = f"{processes} x " if processes > 1 else ""
    used = min(torch.get_num_threads(), os.cpu_count() or 1)
    return f"a CPU, {count}{used} of {os.cpu_count()} cores ({platform.machine()})"


def command(*, resumed: bool = False) -> str:
    """Return the command line of this program for people elsewhere: relative to the repository, without places.

    Args:
        resumed: whether that it goes on with an earlier run belongs to it.
    """
    world, local = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    nodes = ["--nnodes", str(world // local)] if world > local else []
    program = ["python"] if world == 1 else ["torchrun", *nodes, "--nproc-per-node", str(local)]
    left_out = OF_A_PART[:1] if resumed else OF_A_PART
    words = [word for word in sys.argv if not word.startswith(left_out)]
    return shlex.join([*program, *map(_elsewhere, words)])


def _elsewhere(word: str) -> str:
    key, equals, value = word.partition("=")
    if equals and not os.path.exists(word):
        return f"{key}={PLACES[key] if key in PLACES else _elsewhere(value)}"
    if word.startswith("local-dir:"):
        return f"local-dir:{_elsewhere(word.removeprefix('local-dir:'))}"
    path = Path(word)
    if not word or not (path.is_absolute() or os.path.exists(path)):
        return word
    path = path.resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


@cache
def commit() -> dict[str, str]:
    """Return `{"commit": hash}` of this checkout, with `+` where files differ from it; nothing if it is none.

    It is asked once, by a training before its first step: the checkout may move on until its end.
    """

    def git(*words: str) -> str:
        # Names of files come in their own coding, not in that of the console.
        return os.fsdecode(subprocess.run(["git", *words], cwd=ROOT, capture_output=True, check=True).stdout).strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return {}  # the repository of something else, around an installed copy
        changed = "+" if git("status", "--porcelain", "--untracked-files=no") else ""
        return {"commit": git("rev-parse", "HEAD") + changed}
    except (OSError, subprocess.SubprocessError):
        return {}


def circumstances(device: torch.device, processes: int = 1) -> dict[str, Any]:
    """Return command, hardware, versions and commit of this process."""
    versions = {"mdeq": mdeq.__version__, "torch": torch.__version__, "timm": timm.__version__}
    return {"command": command(), "hardware": hardware(device, processes), "versions": {**versions, **commit()}}


def solver_settings(solver: mdeq.FixedPointSolver) -> dict[str, Any]:
    """Return all settings of a solver, its name first, as `mdeq.build_solver` takes them."""
    return {"name": type(solver).__name__.lower(), **dataclasses.asdict(solver)}


def evaluation(
    model: Any,
    result: dict[str, float],
    twice: dict[str, float],
    device: torch.device,
    processes: int = 1,
    *,
    metric: str = "top1",
    settings: Sequence[str] = (),
    data_note: str = "",
) -> dict[str, Any]:
    """Return the record of an evaluation.

    Args:
        model: what was evaluated.
        result: its metrics at its own solver, as `engine.evaluate` returns them.
        twice: its metrics at twice the steps, without tolerance.
        device, processes: where.
        metric: name of the metric that counts.
        settings: `key=value` words of the data in which it departs from the config.
        data_note: what a card has to say of the data as they were read.
    """
    more = {"settings": list(settings), "data_note": data_note}
    return {
        **{key: value for key, value in more.items() if value},
        "parameters": sum(p.numel() for p in model.parameters()),
        "metric": metric,
        "metrics": result,
        "metrics_at_twice_the_steps": twice,
        "solver": solver_settings(model.deq.solver),
        **circumstances(device, processes),
    }


def write_results(folder: Path, **sections: Any) -> None:
    """Put sections, such as `training`, into the results.json of a folder; others stay as they are."""
    path = folder / RESULTS_FILE
    record = read_results(folder) if path.exists() else {}
    write_json(path, {**record, **sections})


def write_json(path: Path, record: dict[str, Any], indent: int = 2) -> None:
    """Write a record, with null for numbers that JSON has no word for."""
    text = json.dumps(_finite(record), indent=indent, allow_nan=False) + "\n"
    write_text(path, text)


def _finite(value: Any) -> Any:
    """Return a record with null for numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_results(folder: Path) -> dict[str, Any]:
    """Return the results.json of a folder.

    Raises:
        BadInput: if there is none, or a damaged one.
    """
    if not (folder / RESULTS_FILE).exists():
        raise BadInput(f"{folder} has no {RESULTS_FILE}; train to the end, or run tools/validate.py --record on it")
    return read_json(folder / RESULTS_FILE)
