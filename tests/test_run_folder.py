"""The folder of a run: claimed once, gone on with by its own settings, and whole whatever happens to the disk."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    TINY,
    assert_nothing_partial,
    assert_same_weights,
    image_folder,
    make_run,
    rows,
    run,
    spawn_train,
    train,
)

from tools import run_folder
from tools.checkpoint import export, write_atomically
from tools.config import BadInput, load_config
from tools.run_folder import Plan, claimed

# timm's readers leave it to the garbage collector to close an image file.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

STOP = "run.max_minutes=1e-7"  # at the next step
OWN = ("optim.lr=5e-3", "data.num_train=32", "model.kwargs.dropout=0.2")  # 2 steps an epoch


def resume(folder: Path, *words: str) -> Any:
    """Go on with a run, told no more than its folder."""
    return run("train", f"run.out_dir={folder}", "run.resume=true", *words)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was stopped after its first step."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    train(folder, *OWN, STOP).ok()
    return folder


def test_a_run_goes_on_with_its_own_settings(stopped: Path, tmp_path: Path) -> None:
    train(tmp_path / "whole", *OWN).ok()
    subprocess.run(["cp", "-r", stopped, tmp_path / "run"], check=True)
    assert "test accuracy" in resume(tmp_path / "run").ok()
    assert_same_weights(tmp_path / "run", tmp_path / "whole")
    saved = load_config(tmp_path / "run" / "config.yaml")
    assert (saved.optim.lr, saved.data.num_train, saved.run.resume) == (5e-3, 32, False)


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("optim.lr=1e-3", "optim.lr=0.005 (not 0.001)"),
        ("data.name=cifar10", "data.name=digits (not cifar10)"),
        ("model.kwargs.dropout=0.1", "model.kwargs.dropout=0.2 (not 0.1)"),
        ("model.solver.max_steps=3", "model.solver.max_steps=2 (not 3)"),
        ("run.seed=1", "run.seed=0 (not 1)"),
    ],
)
def test_settings_of_another_run_are_named_and_refused(word: str, named: str, stopped: Path) -> None:
    before = {path.name: path.read_bytes() for path in stopped.iterdir()}
    assert named in resume(stopped, word).refusal()
    assert {path.name: path.read_bytes() for path in stopped.iterdir()} == before


def test_a_config_file_is_held_against_the_run(stopped: Path) -> None:
    line = train(stopped, "run.resume=true").refusal()  # the words of its start are missing
    assert "data.num_train=32 (not 64)" in line
    assert "optim.lr=0.005 (not 0.001)" in line


def test_fewer_epochs_are_another_run(tmp_path: Path) -> None:
    train(tmp_path / "run", "data.num_train=32", "run.epochs=2", STOP).ok()
    assert "run.epochs=2 (not 1)" in resume(tmp_path / "run", "run.epochs=1").refusal()


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("epoch", "x"), ("epoch", -1), ("batch", 0.5), ("counts", [1, 0]), ("config", "a: [1"), ("config", "a: 1"),
        ("config", 3), ("id", 3), ("trained", [1]), ("data", [1]),
    ],
)  # fmt: skip
def test_a_state_that_makes_no_sense(entry: str, value: Any, stopped: Path, tmp_path: Path) -> None:
    state = torch.load(stopped / "checkpoint.pt", weights_only=True)
    (tmp_path / "run").mkdir()
    torch.save({**state, entry: value}, tmp_path / "run" / "checkpoint.pt")
    assert "checkpoint.pt" in resume(tmp_path / "run").refusal()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint.pt"]


# Claims.


def test_two_new_runs_get_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = Plan(load_config(TINY), "x", None)
    with claimed(plan, is_main=True) as first, claimed(plan, is_main=True) as second:
        assert [str(first), str(second)] == ["runs/x", "runs/x-2"]
        (second / "log.csv").touch()
    assert [path.name for path in Path("runs").iterdir()] == ["x-2"]  # nothing was written to the first


def test_a_run_that_went_on_meanwhile(tmp_path: Path) -> None:
    """A job that begins while its predecessor still saves must not go on from what that one had saved before."""
    folder = tmp_path / "run"
    train(folder, STOP).ok()
    begun = run_folder.plan(None, [f"run.out_dir={folder}", "run.resume=true"])
    with claimed(begun, is_main=True):
        pass
    resume(folder, STOP).ok()
    with pytest.raises(BadInput, match="start this one again"), claimed(begun, is_main=True):
        pass
    assert "test accuracy" in resume(folder).ok()


HOLD = """
import sys
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_folder_is_written_to_by_one_process_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    command = [sys.executable, "-I", "-c", HOLD, folder / ".lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        assert "another run is writing" in train(folder).refusal()
        other.kill()
    train(folder, "data.num_train=16").ok()  # the system has given the lock back
    assert not (folder / ".lock").exists()


def test_nothing_is_left_of_a_claim_that_came_to_nothing(tmp_path: Path) -> None:
    assert "unknown model" in train(tmp_path / "a" / "run", "model.name=nonsense").refusal()
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("place", ["/proc/run", "/proc/self/run"])
def test_a_folder_that_cannot_be_made(place: str) -> None:
    assert place in train(Path(place)).refusal()


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"cannot write .*nowhere"):
        write_atomically(tmp_path / "nowhere" / "file", lambda path: path.write_text("x"))


def limit_files() -> None:
    """Let no file grow above 8 KiB, as if the disk were full."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (2**13, 2**13))


def test_a_full_disk(tmp_path: Path) -> None:
    line = spawn_train(tmp_path / "run", "data.num_train=32", hook=limit_files).refusal()
    assert "cannot write" in line
    assert "checkpoint.pt: File too large" in line
    assert_nothing_partial(tmp_path / "run")


def test_a_full_disk_leaves_a_finished_run_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(folder).ok()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    spawn_train(folder, "run.resume=true", "run.epochs=3", hook=limit_files).refusal()
    assert "results.json" in before
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# What is kept.


def test_a_test_image_that_cannot_be_read_costs_no_epoch(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "data")
    image = root / "validation" / "bee" / "001.png"
    content = image.read_bytes()
    image.write_bytes(b"")
    words = ["data.name=folder", "data.num_train=null", f"data.root={root}", "data.batch_size=8"]
    assert "001.png" in train(tmp_path / "run", *words).refusal()
    kept = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert (kept["epoch"], kept["batch"]) == (0, 3)
    assert not (tmp_path / "run" / "log.csv").exists()
    image.write_bytes(content)
    resume(tmp_path / "run").ok()
    (row,) = rows(tmp_path / "run")
    assert float(row["train_loss"]) == kept["trained"]["loss"]


def test_weights_are_not_written_over(tmp_path: Path) -> None:
    """What tools/convert.py made has no state of a run beside it."""
    started = make_run(tmp_path / "run")
    (tmp_path / "run").mkdir()
    export(started.model, tmp_path / "run")
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    line = train(tmp_path / "run").refusal()
    assert "already holds weights (model.safetensors); choose another run.out_dir" in line
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


def test_weights_that_are_not_finite_take_the_place_of_none(tmp_path: Path) -> None:
    started = make_run(tmp_path / "run")
    started.save()
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    with torch.no_grad():
        next(started.model.parameters()).fill_(float("nan"))
    started.save()
    with pytest.raises(BadInput, match=r"weights are no longer finite.*; the last good checkpoint is kept"):
        started.save(final=True)  # a result of theirs would stand beside other weights
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


def test_steps_that_come_to_nothing_before_the_first_checkpoint(tmp_path: Path) -> None:
    line = train(tmp_path / "run", "run.max_bad_steps=1", "optim.lr=1e30", "run.epochs=3").refusal()
    kept = (tmp_path / "run" / "checkpoint.pt").exists()
    assert ("the last good checkpoint is kept" in line, "nothing was saved" in line) == (kept, not kept)


def test_no_setting_that_may_change_is_misspelt() -> None:
    config = load_config(None)
    valid = {f"{s}.{f.name}" for s in ("run", "data") for f in dataclasses.fields(getattr(config, s))}
    assert set(run_folder.FREE) <= valid
