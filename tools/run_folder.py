"""The folder of a run: a new one is claimed, an old one is gone on with by the settings that it was started with."""

import contextlib
import dataclasses
import errno
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tools.checkpoint import STATE_FILE, WEIGHTS_FILE, check_folder, load_state, make_folder
from tools.config import DEFAULT_CONFIG, BadInput, TrainConfig, load_config, parse_config

RUNS = Path("runs")
LOCK_FILE = ".lock"
FREE = (
    "run.max_minutes", "run.resume", "run.autoresume", "run.out_dir", "run.device", "run.threads", "run.compile",
    "run.channels_last", "run.eval_every", "run.checkpoint_minutes", "run.max_bad_steps", "run.tensorboard",
    "run.wandb", "run.progress", "data.root", "data.download", "data.workers", "data.cache_on_device",
)  # fmt: skip
"""Settings that may differ when a run goes on; `run.epochs` may grow. Any other one makes another run."""


@dataclass(frozen=True)
class Plan:
    """What a run starts from.

    Attributes:
        config: its settings.
        name: of a new folder in runs/, with a number where it is taken.
        folder: where it lies; None for a new folder in runs/.
        state: what to go on from; None for a new run.
        written: the file of the state, as it was when it was read.
    """

    config: TrainConfig
    name: str
    folder: Path | None
    state: dict[str, Any] | None = None
    written: tuple[int, int] | None = None


def plan(path: Path | None, overrides: Sequence[str]) -> Plan:
    """Return the plan of a config file and `key=value` words.

    A run that goes on keeps the settings in its checkpoint; a config file and words are held against them.

    Args:
        path: the config file; None if none was given, a new run is then that of digits.
        overrides: the words.

    Raises:
        BadInput: for a bad setting, nothing to resume from, or settings of another run.
    """
    config, name = load_config(path or DEFAULT_CONFIG, overrides), _run_name(path or DEFAULT_CONFIG)
    folder = None if config.run.out_dir is None else Path(config.run.out_dir)
    if config.run.autoresume and folder is None:
        raise BadInput("run.autoresume=true needs run.out_dir, where the run is or is to be")
    there = folder is not None and (folder / STATE_FILE).exists()
    resume = config.run.resume or (config.run.autoresume and there)
    if not resume:
        return Plan(config, name, folder)
    if folder is None:
        folder = _newest(name)
    if not (folder / STATE_FILE).exists():
        raise BadInput(f"run.resume=true, but {folder} holds no {STATE_FILE}; leave it out to start a new run")
    written = _written(folder / STATE_FILE)
    state = load_state(folder / STATE_FILE)
    return Plan(_resumed(state, folder, path, overrides), name, folder, state, written)


def _written(path: Path) -> tuple[int, int]:
    """Return what tells a file from one that has taken its place since."""
    stat = path.stat()
    return stat.st_ino, stat.st_mtime_ns


def _run_name(path: Path) -> str:
    """Return the name of the runs of a config file."""
    path = path.resolve()
    return f"{path.parent.name}_{path.stem}"


def _numbers(name: str) -> dict[int, Path]:
    """Return the folders of a name in runs/ by their numbers."""
    folders = RUNS.iterdir() if RUNS.is_dir() else ()
    found = ((re.fullmatch(rf"{re.escape(name)}(?:-(\d+))?", folder.name), folder) for folder in folders)
    return {int(match[1] or 1): folder for match, folder in found if match}


def _newest(name: str) -> Path:
    """Return the last of the folders of a name that holds a checkpoint, or the first folder if none does."""
    used = sorted((k, folder) for k, folder in _numbers(name).items() if (folder / STATE_FILE).exists())
    return used[-1][1] if used else RUNS / name


def _resumed(state: Mapping[str, Any], folder: Path, path: Path | None, overrides: Sequence[str]) -> TrainConfig:
    """Return the settings in a checkpoint, updated by those that may change.

    Raises:
        BadInput: for another setting that is not what it was.
    """
    origin = folder / STATE_FILE
    if not isinstance(state.get("config"), str):
        raise BadInput(f"{origin} holds no settings of a run")
    saved = parse_config(state["config"], str(origin))
    # Of a session, not of the run.
    saved.run = dataclasses.replace(saved.run, resume=True, autoresume=False, max_minutes=None, out_dir=str(folder))
    config = load_config(path, overrides, base=saved)
    if config.data.num_classes is None:  # as many as the data have, and that has been found out
        config.data.num_classes = saved.data.num_classes
    config.run.out_dir = str(folder)
    before, now = _flat(dataclasses.asdict(saved)), _flat(dataclasses.asdict(config))
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key) and key not in FREE]
    if config.run.epochs > saved.run.epochs:
        changed.remove("run.epochs")
    if changed:
        listed = ", ".join(f"{key}={before.get(key)} (not {now.get(key)})" for key in changed)
        raise BadInput(
            f"{origin} is from a run with {listed}; resume it with run.out_dir={folder} run.resume=true alone, or "
            "start a new run in another run.out_dir"
        )
    return config


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


@contextlib.contextmanager
def claimed(plan: Plan, *, is_main: bool) -> Iterator[Path]:
    """Hold the folder of a run as long as it goes on, so that no other run writes there; one left empty is removed.

    Args:
        plan: what the run starts from.
        is_main: whether this process is the one that writes; others only get to know the folder.

    Raises:
        BadInput: for a folder that holds another run, that another process writes to, or that cannot be written to.
    """
    if not is_main:
        yield plan.folder or RUNS / plan.name
        return
    if plan.folder is not None:
        check_folder(plan.folder)
    made = [place for place in (plan.folder or RUNS, *(plan.folder or RUNS).parents) if not place.exists()]
    folder = plan.folder or _new(plan.name)
    if plan.folder is None:
        made.insert(0, folder)
    try:
        make_folder(folder)
        with _locked(folder):
            if plan.state is None and (folder / STATE_FILE).exists():
                raise BadInput(
                    f"{folder} already holds a run; set run.resume=true to continue it, or choose another run.out_dir"
                )
            if plan.state is None and (folder / WEIGHTS_FILE).exists():
                raise BadInput(f"{folder} already holds weights ({WEIGHTS_FILE}); choose another run.out_dir")
            if plan.written is not None and plan.written != _written(folder / STATE_FILE):  # before the lock was free
                raise BadInput(f"another process has just gone on with the run in {folder}; start this one again")
            yield folder
    finally:
        with contextlib.suppress(OSError):  # the first that is not empty
            for place in made:
                place.rmdir()


def _new(name: str) -> Path:
    """Make the next folder of a name; two runs that start at once get two."""
    make_folder(RUNS)
    for number in itertools.count(max(_numbers(name), default=0) + 1):
        folder = RUNS / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        except OSError as error:
            raise BadInput(f"cannot create {folder}: {error.strerror}") from None
        return folder
    raise AssertionError("there is always another number")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which the system gives back however the process ends."""
    path = folder / LOCK_FILE
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BadInput(f"another run is writing to {folder}; choose another run.out_dir") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):  # a file system without locks
            raise BadInput(f"cannot write to {folder}: {error.strerror}") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes it once it is closed
            path.unlink()
        lock.release()
