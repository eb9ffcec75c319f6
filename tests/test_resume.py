"""A run that was stopped or killed, and resumed, ends with the same bits as one that was not."""

import json
import math
import re
import signal
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers import (
    RANDOM,
    TINY,
    Hook,
    assert_same_weights,
    changed,
    image_folder,
    kill_after_replace,
    kill_after_step,
    kill_before_replace,
    kill_in_save,
    rows,
    run,
    signal_after_step,
    signal_after_test,
    signal_in_save,
    spawn_train,
    train,
)

from tools.config import load_config

# timm's readers leave it to the garbage collector to close an image file.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

EVERY_STEP = "run.checkpoint_minutes=1e-9"
TWO_EPOCHS = (*RANDOM, "run.epochs=2")  # of 4 steps


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 8 steps with all that is random."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    train(folder, *TWO_EPOCHS).ok()
    return folder


def assert_one_log(folder: Path, reference: Path, epochs: int = 2) -> None:
    """Assert that a log has each epoch once, and the test results of another."""
    log, expected = rows(folder), rows(reference)
    assert [row["epoch"] for row in log] == [str(e) for e in range(epochs)]
    for row, other in zip(log, expected):
        for column in ("step", "lr", "test_loss", "test_top1", "test_residual_mean"):
            assert row[column] == other[column], column


def test_saving_often_changes_nothing(uninterrupted: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", *TWO_EPOCHS, EVERY_STEP).ok()
    assert_same_weights(tmp_path / "run", uninterrupted)


def test_out_of_time_in_the_middle_of_an_epoch(uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    out = train(folder, *TWO_EPOCHS, "run.max_minutes=1e-7").ok()
    assert "run.resume=true" in out
    assert "test accuracy" not in out
    stopped = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert (stopped["epoch"], stopped["batch"]) == (0, 1)  # at the next step
    assert stopped["minutes"] > 0
    assert stopped["command"].startswith("python ")
    torch.save({**stopped, "minutes": 1000.0, "command": "that by which it began"}, folder / "checkpoint.pt")
    out = train(folder, *TWO_EPOCHS, "run.resume=true").ok()
    assert "test accuracy" in out
    training = json.loads((folder / "results.json").read_text())["training"]
    assert 1000 < training["minutes"] < 1010, "the time of both processes"
    assert 1000 < float(rows(folder)[-1]["minutes"]) < 1010
    assert training["command"] == "that by which it began"
    assert_same_weights(folder, uninterrupted)
    assert_one_log(folder, uninterrupted)


def test_out_of_time_again_and_again(uninterrupted: Path, tmp_path: Path) -> None:
    """Step after step in a program of its own, over the ends of epochs."""
    folder = tmp_path / "run"
    train(folder, *TWO_EPOCHS, "run.max_minutes=1e-7").ok()
    places = []
    for _ in range(7):
        out = train(folder, *TWO_EPOCHS, "run.max_minutes=1e-7", "run.resume=true").ok()
        state = torch.load(folder / "checkpoint.pt", weights_only=True)
        places.append((state["epoch"], state["batch"]))
    assert places == [(0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3), (2, 0)]
    assert "test accuracy" in out
    assert_same_weights(folder, uninterrupted)
    assert_one_log(folder, uninterrupted)


def test_resuming_a_finished_run_prints_its_result_again(uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = train(folder, *TWO_EPOCHS).ok()
    before = {name: (folder / name).read_bytes() for name in ("model.safetensors", "checkpoint.pt", "log.csv")}
    again = train(folder, *TWO_EPOCHS, "run.resume=true").ok()
    assert again[again.index("test accuracy") :] == first[first.index("test accuracy") :]
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert_same_weights(folder, uninterrupted)


def test_resuming_for_more_epochs(tmp_path: Path) -> None:
    words = [*RANDOM, "optim.schedule=none", "optim.warmup_epochs=0"]
    train(tmp_path / "whole", *words, "run.epochs=2").ok()
    train(tmp_path / "run", *words, "run.epochs=1").ok()
    train(tmp_path / "run", *words, "run.epochs=2", "run.resume=true").ok()
    assert_same_weights(tmp_path / "run", tmp_path / "whole")
    assert load_config(tmp_path / "run" / "config.yaml").run.epochs == 2
    record = json.loads((tmp_path / "run" / "results.json").read_text())
    began, prolonged = record["training"]["command"].splitlines()
    assert ("run.epochs=1" in began, "run.resume=true" in began) == (True, False)
    assert ("run.epochs=2" in prolonged, "run.resume=true" in prolonged) == (True, True)
    assert record["evaluation"]["command"] == record["training"]["command"]


@pytest.mark.parametrize(
    "words",
    [
        ["optim.accumulate=2", "optim.clip_grad=0.5", "model.gradient.num_steps=2"],
        ["optim.name=sgd", "optim.schedule=step", "optim.decay_epochs=1", "optim.layer_decay=0.7"],
        ["model.freeze=true", "optim.ema_decay=0.9", "model.kwargs.dropout=0.3"],
        ["run.amp=bf16", "run.dtype=float32", "data.augment=flip", "model.kwargs.drop_rate=0.5"],
        ["run.dtype=float64", "optim.schedule=none", "model.freeze_bn=true"],
    ],
    ids=["accumulate", "sgd and step", "freeze", "bfloat16", "float64"],
)
def test_other_settings_are_resumed_as_well(words: list[str], tmp_path: Path) -> None:
    words = [*words, "run.epochs=2", "data.num_train=32"]
    train(tmp_path / "whole", *words).ok()
    train(tmp_path / "run", *words, "run.max_minutes=1e-7").ok()
    train(tmp_path / "run", *words, "run.resume=true").ok()
    assert_same_weights(tmp_path / "run", tmp_path / "whole")


def test_skipped_steps_are_remembered(tmp_path: Path) -> None:
    words = ["optim.lr=1e30", "run.max_bad_steps=100"]
    train(tmp_path / "whole", *words).ok()
    train(tmp_path / "run", *words, "run.max_minutes=1e-7").ok()
    for _ in range(2):
        train(tmp_path / "run", *words, "run.max_minutes=1e-7", "run.resume=true").ok()
    train(tmp_path / "run", *words, "run.resume=true").ok()
    skipped = [row["skipped_steps"] for row in rows(tmp_path / "whole")]
    assert int(skipped[-1]) > 0
    assert [row["skipped_steps"] for row in rows(tmp_path / "run")] == skipped
    assert_same_weights(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("code", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("number", "place"), [(1, (0, 2)), (4, (0, 4))])
def test_a_signal_stops_with_a_checkpoint(
    code: int, number: int, place: tuple[int, int], uninterrupted: Path, tmp_path: Path
) -> None:
    """After the next step; in the last one of an epoch before the test, which takes long."""
    folder = tmp_path / "run"
    outcome = spawn_train(folder, *TWO_EPOCHS, hook=signal_after_step(number, code))
    assert outcome.code == 128 + code, outcome.err
    assert "interrupted at epoch 1" in outcome.out
    assert "continue with run.resume=true" in outcome.out
    assert position(folder) == place
    assert not (folder / "log.csv").exists()
    spawn_train(folder, *TWO_EPOCHS, "run.autoresume=true").ok()
    assert_same_weights(folder, uninterrupted)
    assert_one_log(folder, uninterrupted)


@pytest.mark.parametrize("code", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_passes_by_the_workers_of_a_data_loader(code: int, tmp_path: Path) -> None:
    image_folder(tmp_path / "data")
    words = ["data.name=folder", f"data.root={tmp_path / 'data'}", "data.num_train=null", "data.batch_size=8"]
    words += ["data.workers=2", "run.epochs=2"]
    train(tmp_path / "whole", *words).ok()
    outcome = spawn_train(tmp_path / "run", *words, hook=signal_after_step(1, code))
    assert outcome.code == 128 + code, outcome.err
    assert position(tmp_path / "run") == (0, 2)
    train(tmp_path / "run", *words, "run.autoresume=true").ok()
    assert_same_weights(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("number", [1, 2, 4])
@pytest.mark.parametrize(("code", "end"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)])
def test_a_signal_in_a_checkpoint_waits_for_it(
    number: int, code: int, end: int, uninterrupted: Path, tmp_path: Path
) -> None:
    """Of the first epoch before its test, which it does not wait for, after it, and of the last epoch."""
    folder = tmp_path / "run"
    outcome = spawn_train(folder, *TWO_EPOCHS, hook=signal_in_save(number, code))
    assert outcome.code == (128 + code if number % 2 == 0 else end), outcome.err
    assert position(folder) == {1: (0, 4), 2: (1, 0), 4: (2, 0)}[number]
    assert "test accuracy" in spawn_train(folder, *TWO_EPOCHS, "run.autoresume=true").ok()
    assert_same_weights(folder, uninterrupted)
    assert_one_log(folder, uninterrupted)


def test_a_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    outcome = spawn_train(tmp_path / "run", hook=signal_after_step(1, signal.SIGINT, signal.SIGINT))
    assert (outcome.code, outcome.err.splitlines()[-1]) == (130, "interrupted")
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize(("code", "end"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)])
def test_a_signal_in_a_test_stops_at_once(code: int, end: int, uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert spawn_train(folder, *TWO_EPOCHS, hook=signal_after_test(1, code)).code == end
    assert position(folder) == (0, 4)
    assert not (folder / "log.csv").exists()
    spawn_train(folder, *TWO_EPOCHS, "run.resume=true").ok()
    assert_same_weights(folder, uninterrupted)
    assert_one_log(folder, uninterrupted)


def test_autoresume_starts_and_continues(uninterrupted: Path, tmp_path: Path) -> None:
    folder, words = tmp_path / "run", [*TWO_EPOCHS, "run.autoresume=true"]
    train(folder, *words, "run.max_minutes=1e-7").ok()
    assert load_config(folder / "config.yaml").run.autoresume is False
    train(folder, *words).ok()
    assert_same_weights(folder, uninterrupted)
    assert "autoresume" not in json.loads((folder / "results.json").read_text())["training"]["command"]
    assert "optim.lr" in train(folder, *words, "optim.lr=1e-4").refusal()


def test_autoresume_needs_a_folder() -> None:
    assert "needs run.out_dir" in run("train", TINY, "run.autoresume=true").refusal()


MOMENTS: list[tuple[str, Hook]] = [
    ("after a step that was not saved", kill_after_step(2)),
    ("half-way through a checkpoint", kill_in_save(2)),
    ("with a checkpoint that is not in place", kill_before_replace("checkpoint.pt", 2)),
    ("between the checkpoint and the weights", kill_after_replace("checkpoint.pt", 1)),
    ("with weights that are not in place", kill_before_replace("model.safetensors", 1)),
    ("between config.json and the weights", kill_after_replace("config.json", 1)),
    ("before the row of an epoch", kill_before_replace("log.csv", 1)),
    ("after the row of an epoch, before its checkpoint", kill_after_replace("log.csv", 1)),
]


def position(folder: Path) -> tuple[int, int]:
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    return state["epoch"], state["batch"]


def test_killed_at_one_moment_after_another(uninterrupted: Path, tmp_path: Path) -> None:
    """Each kill -9 hits the run that goes on from the one before."""
    folder = tmp_path / "run"
    places = []
    for number, (moment, hook) in enumerate(MOMENTS):
        resume = f"run.resume={'true' if number else 'false'}"
        outcome = spawn_train(folder, *TWO_EPOCHS, EVERY_STEP, resume, hook=hook)
        assert outcome.code == -signal.SIGKILL, f"{moment}: {outcome.err}"
        places.append(position(folder))
    assert all(a <= b for a, b in pairwise(places)), places
    assert places[0] == (0, 1)
    spawn_train(folder, *TWO_EPOCHS, EVERY_STEP, "run.resume=true").ok()
    assert_same_weights(folder, uninterrupted)
    assert_one_log(folder, uninterrupted)
    json.loads((folder / "config.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("kind", ["step", "save", "checkpoint.pt", "model.safetensors", "config.json", "log.csv"])
def test_killed_once_at_any_moment(kind: str, number: int, uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    hooks = {"step": kill_after_step, "save": kill_in_save}
    hook = hooks[kind](number + 1) if kind in hooks else kill_before_replace(kind, number + (kind != "log.csv"))
    assert spawn_train(folder, *TWO_EPOCHS, EVERY_STEP, hook=hook).code == -signal.SIGKILL
    spawn_train(folder, *TWO_EPOCHS, EVERY_STEP, "run.resume=true").ok()
    assert_same_weights(folder, uninterrupted)
    assert_one_log(folder, uninterrupted)


def test_killed_before_the_first_checkpoint(uninterrupted: Path, tmp_path: Path) -> None:
    """There is nothing to resume from, and nothing in the way of a new start."""
    folder = tmp_path / "run"
    outcome = spawn_train(folder, *TWO_EPOCHS, hook=kill_in_save(1))
    assert outcome.code == -signal.SIGKILL
    assert not (folder / "checkpoint.pt").exists()
    assert "leave it out" in train(folder, *TWO_EPOCHS, "run.resume=true").refusal()
    train(folder, *TWO_EPOCHS).ok()
    assert_same_weights(folder, uninterrupted)


def test_half_written_files_of_a_kill_are_cleared_away(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for hook in (kill_in_save(1), kill_before_replace("model.safetensors", 1)):
        assert spawn_train(folder, hook=hook).code == -signal.SIGKILL
    assert [path for path in folder.iterdir() if path.name.startswith(".")]
    train(folder, "run.resume=true", "run.epochs=2").ok()
    left = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    assert not left


def test_log_of_an_epoch_whose_last_step_was_saved(tmp_path: Path) -> None:
    """Killed after the last step of an epoch, saved within it: the epoch had a loss, and it was not 0."""
    folder = tmp_path / "run"
    hook = kill_after_replace("checkpoint.pt", 4)  # 4 steps an epoch
    assert spawn_train(folder, EVERY_STEP, hook=hook).code == -signal.SIGKILL
    assert position(folder) == (0, 4)
    train(folder, "run.resume=true").ok()
    (row,) = rows(folder)
    loss = float(row["train_loss"] or math.nan)
    assert loss != 0


def folder_words(root: Path, workers: int) -> list[str]:
    """Return the words of 6 steps on an image folder with all that is random."""
    return [
        "data.name=folder", f"data.root={image_folder(root)}", "data.num_train=null", f"data.workers={workers}",
        "data.batch_size=8", "data.augment=imagenet", "data.auto_augment=rand-m5-mstd0.5", "data.reprob=0.5",
        *(word for word in RANDOM if not word.startswith("data.augment")), "run.epochs=2",
    ]  # fmt: skip


def test_image_folder_is_resumed(tmp_path: Path) -> None:
    words = folder_words(tmp_path / "data", workers=0)
    train(tmp_path / "whole", *words).ok()
    train(tmp_path / "run", *words, "run.max_minutes=1e-7").ok()
    train(tmp_path / "run", *words, "run.max_minutes=1e-7", "run.resume=true").ok()
    assert position(tmp_path / "run") == (0, 2)
    train(tmp_path / "run", *words, "run.resume=true").ok()
    assert_same_weights(tmp_path / "run", tmp_path / "whole")
    assert [row["epoch"] for row in rows(tmp_path / "run")] == ["0", "1"]


def test_other_data_are_no_data_to_resume_with(tmp_path: Path) -> None:
    """Their held-out samples may be those that were trained on, and their classes in another order."""
    words = folder_words(tmp_path / "data", workers=0)
    train(tmp_path / "run", *words, "run.max_minutes=1e-7").ok()
    folder = tmp_path / "data" / "train" / "ant"
    last = max(folder.iterdir())
    last.rename(tmp_path / last.name)
    line = train(tmp_path / "run", *words, "run.resume=true").refusal()
    assert re.search(r"other data \(number of training samples: (\d+), not (\d+)\)", line)
    (tmp_path / last.name).rename(last)
    for split in ("train", "validation"):
        (tmp_path / "data" / split / "ant").rename(tmp_path / "data" / split / "cow")
    line = train(tmp_path / "run", *words, "run.resume=true").refusal()
    assert "(classes: ant, bee, cat, not bee, cat, cow)" in line
    for split in ("train", "validation"):
        (tmp_path / "data" / split / "cow").rename(tmp_path / "data" / split / "ant")
    train(tmp_path / "run", *words, "run.resume=true").ok()


def test_image_folder_read_by_a_worker_is_resumed(tmp_path: Path) -> None:
    words = folder_words(tmp_path / "data", workers=1)
    spawn_train(tmp_path / "whole", *words).ok()
    outcome = spawn_train(tmp_path / "run", *words, EVERY_STEP, hook=kill_after_step(3))
    assert outcome.code == -signal.SIGKILL
    assert position(tmp_path / "run") == (0, 2)
    spawn_train(tmp_path / "run", *words, "run.resume=true").ok()
    assert_same_weights(tmp_path / "run", tmp_path / "whole")


def test_averaged_weights_are_resumed(uninterrupted: Path) -> None:
    """What the tests above compare is the average, and it is not the weights."""
    state = torch.load(uninterrupted / "checkpoint.pt", weights_only=True)
    assert len(changed(state["ema"], state["model"])) > 10


def test_a_resumed_run_needs_no_longer_what_it_started_from(tmp_path: Path) -> None:
    first, folder = tmp_path / "first", tmp_path / "run"
    train(first).ok()
    start = first / "model.safetensors"
    train(folder, f"model.checkpoint={start}", "run.max_minutes=1e-7").ok()
    start.unlink()
    assert "test accuracy" in train(folder, "run.resume=true").ok()


def test_results_of_earlier_weights_do_not_stay(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(folder).ok()
    (folder / "steps.csv").write_text("steps\n1\n")
    train(folder, "run.resume=true", "run.epochs=3", "run.max_minutes=1e-7").ok()
    assert not (folder / "results.json").exists()
    assert not (folder / "steps.csv").exists()
    train(folder, "run.resume=true", "run.epochs=3").ok()
    assert (folder / "results.json").exists()


def test_the_loss_scale_is_resumed(tmp_path: Path) -> None:
    """The loss scale that a run has found is that with which it goes on."""
    words = ["run.amp=fp16", "run.epochs=2"]
    train(tmp_path / "run", *words, "run.max_minutes=1e-7").ok()
    path = tmp_path / "run" / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    state["scaler"]["scale"] = 8.0
    torch.save(state, path)
    train(tmp_path / "run", *words, "run.resume=true", "run.max_minutes=1e-7").ok()
    assert torch.load(path, weights_only=True)["scaler"]["scale"] == 8.0
