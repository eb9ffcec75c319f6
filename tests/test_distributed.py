"""Two processes on one CPU, joined by gloo, against one process with the whole batch."""

import json
import math
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import (
    ROOT,
    TINY,
    Outcome,
    assert_nothing_partial,
    image_folder,
    record_losses,
    recorded,
    rows,
    signal_after_step,
    spawn,
    spawn_distributed,
)
from safetensors.torch import load_file

from tools.batches import KeyedBatches, Process
from tools.config import BadInput
from tools.data import ArrayBatches

# What makes two processes compute what one does: no batch statistics, no dropout.
EXACT = ("run.dtype=float64", "model.freeze_bn=true", "model.kwargs.dropout=0.0", "optim.clip_grad=1.0")
LINES = ("test accuracy", "at twice", "evaluations", "residual", "solver status")


def results(out: str) -> list[str]:
    return [line for line in out.splitlines() if line.startswith(LINES)]


def mean(a: list[float], b: list[float]) -> list[float]:
    return [(x + y) / 2 for x, y in zip(a, b, strict=True)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Outcome]]:
    """A folder with 20 steps of one process in `one`, and of two in `two`; what each printed."""
    base = tmp_path_factory.mktemp("pair")
    words = [TINY, *EXACT, "run.epochs=5", "optim.lr=1e-2", "optim.weight_decay=0.01"]
    alone = spawn(base / "logs", "train", *words, f"run.out_dir={base / 'one'}", hook=record_losses(base))
    both = spawn_distributed(base / "logs", "train", *words, f"run.out_dir={base / 'two'}", hook=record_losses(base))
    for outcome in (alone, *both):
        outcome.ok()
    return base, [alone, *both]


def test_twenty_losses_equal_those_of_one_process(pair: tuple[Path, list[Outcome]]) -> None:
    base, _ = pair
    alone = recorded(base, "alone")
    both = mean(recorded(base, 0), recorded(base, 1))
    assert len(alone) == len(both) == 20
    assert both == pytest.approx(alone, rel=0, abs=1e-6)
    assert recorded(base, 0) != recorded(base, 1)  # each has its own half of a batch
    assert alone[-1] < alone[0]


def test_weights_and_logs_equal_those_of_one_process(pair: tuple[Path, list[Outcome]]) -> None:
    base, _ = pair
    one, two = (load_file(base / name / "model.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-6, atol=1e-8, msg=name)
    for a, b in zip(rows(base / "one"), rows(base / "two"), strict=True):
        for column in (
            "train_loss",
            "train_top1",
            "test_loss",
            "test_top1",
            "train_residual_mean",
            "test_residual_q0.9",
        ):
            assert float(a[column]) == pytest.approx(float(b[column]), abs=1e-6), column


def test_only_the_first_process_speaks(pair: tuple[Path, list[Outcome]]) -> None:
    base, (alone, first, second) = pair
    assert results(first.out) == results(alone.out)
    assert len(results(first.out)) == 5
    assert second.out == ""
    assert {path.name for path in (base / "two").iterdir()} == {path.name for path in (base / "one").iterdir()}


def test_validate_equals_one_process(pair: tuple[Path, list[Outcome]]) -> None:
    base, _ = pair
    words = ["--checkpoint", base / "one", "--steps", 1, 3]
    alone = spawn(base / "logs", "validate", *words, "--out", base / "a").ok()
    first, second = spawn_distributed(base / "logs", "validate", *words, "--out", base / "b")
    assert results(first.ok()) == results(alone)
    assert second.ok() == ""
    for a, b in zip(rows(base / "a", "steps.csv"), rows(base / "b", "steps.csv"), strict=True):
        assert a.pop("samples") == b.pop("samples") == "all"
        assert {k: float(v) for k, v in a.items()} == pytest.approx({k: float(v) for k, v in b.items()})


def test_bad_input_ends_every_process(tmp_path: Path) -> None:
    words = [TINY, f"run.out_dir={tmp_path / 'run'}", "data.name=folder", "data.root=nowhere", "data.num_train=null"]
    for outcome in spawn_distributed(tmp_path / "logs", "train", *words):
        assert outcome.code == 2
        errors = [line for line in outcome.err.splitlines() if line.strip()]
        assert [line.startswith("error: ") for line in errors] == [True], outcome.err
        assert "nowhere" in errors[0]
    assert_nothing_partial(tmp_path / "run")


def test_a_batch_that_cannot_be_shared(tmp_path: Path) -> None:
    words = [TINY, f"run.out_dir={tmp_path / 'run'}", "data.batch_size=15"]
    for outcome in spawn_distributed(tmp_path / "logs", "train", *words):
        assert "data.batch_size=15" in outcome.refusal()


def _poison(number: int) -> None:
    """Give process 1 a NaN in its part of one training batch."""
    epoch = ArrayBatches.epoch

    def batches(self, *args):
        for k, (x, y) in enumerate(epoch(self, *args)):
            bad = self.training and self.process.rank == 1 and k == number
            yield (x * math.nan if bad else x), y

    ArrayBatches.epoch = batches


def _poison_and_record(folder: Path) -> None:
    _poison(1)
    record_losses(folder)()


def test_all_processes_skip_a_step_that_is_bad_for_one(tmp_path: Path) -> None:
    words = [TINY, f"run.out_dir={tmp_path / 'run'}", *EXACT, "optim.accumulate=2"]
    for outcome in spawn_distributed(tmp_path / "logs", "train", *words, hook=partial(_poison_and_record, tmp_path)):
        outcome.ok()
    for rank in range(2):
        assert [math.isnan(loss) for loss in recorded(tmp_path, rank)] == [False, True, False, False]
    (row,) = rows(tmp_path / "run")
    assert row["skipped_steps"] == "1"
    assert math.isfinite(float(row["train_loss"]))


@pytest.mark.slow
def test_two_processes_resume(tmp_path: Path) -> None:
    words = [TINY, "run.epochs=2", "model.kwargs.dropout=0.2", "data.augment=crop_flip", "optim.ema_decay=0.9"]
    for folder, *more in (
        ("whole",),
        ("run", "run.max_minutes=1e-7"),
        ("run", "run.resume=true", "run.max_minutes=1e-7"),
        ("run", "run.resume=true"),
    ):
        for outcome in spawn_distributed(tmp_path / "logs", "train", *words, *more, f"run.out_dir={tmp_path / folder}"):
            outcome.ok()
    whole, run = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    for name, value in whole.items():
        torch.testing.assert_close(run[name], value, rtol=0, atol=0, msg=name)


def test_a_signal_to_one_process_stops_both(tmp_path: Path) -> None:
    words = [TINY, "run.epochs=2", f"run.out_dir={tmp_path / 'run'}"]
    hook = signal_after_step(2, signal.SIGTERM, signal.SIGTERM, rank=1)  # torchrun passes on what came already
    for outcome in spawn_distributed(tmp_path / "logs", "train", *words, hook=hook):
        assert outcome.code == 128 + signal.SIGTERM, outcome.err
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert (state["epoch"], state["batch"]) == (0, 3)


def test_image_folder_with_an_odd_number_of_test_images(tmp_path: Path) -> None:
    """A sampler pads the test split so that all processes have as much; what it adds is not counted."""
    image_folder(tmp_path / "data")
    (tmp_path / "data" / "validation" / "ant" / "000.png").unlink()  # 11 are left
    words = [TINY, *EXACT, "data.name=folder", f"data.root={tmp_path / 'data'}", "data.num_train=null"]
    words += ["data.batch_size=8", "run.epochs=1"]
    for outcome in spawn_distributed(tmp_path / "logs", "train", *words, f"run.out_dir={tmp_path / 'run'}"):
        outcome.ok()
    alone = spawn(tmp_path / "logs", "validate", "--checkpoint", tmp_path / "run", "data.num_classes=3").ok()
    accuracy = float(alone.partition("test accuracy: ")[2].split()[0])
    (row,) = rows(tmp_path / "run")
    assert float(row["test_top1"]) == pytest.approx(accuracy, abs=0.01)
    assert (float(row["test_top1"]) * 11 / 100) == pytest.approx(round(float(row["test_top1"]) * 11 / 100), abs=1e-6)


@pytest.mark.parametrize("count", [1, 2])
def test_fewer_test_images_than_processes_share(count: int, tmp_path: Path) -> None:
    """A process without test images does not leave the others waiting."""
    words = [TINY, f"run.out_dir={tmp_path / 'run'}", "data.num_train=16"]
    for outcome in spawn_distributed(tmp_path / "logs", "train", *words, hook=partial(_few_test_images, count)):
        outcome.ok()


def _few_test_images(count: int) -> None:
    import tools.data

    read = tools.data.read_digits

    def few(train: bool) -> tools.data.Arrays:
        arrays = read(train)
        return arrays if train else tools.data.Arrays(arrays.images[:count], arrays.labels[:count])

    tools.data.read_digits = few


def torchrun(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "tools/train.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, words)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    done = torchrun(TINY, f"run.out_dir={tmp_path / 'run'}", *EXACT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test accuracy") == 1
    assert (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.slow
def test_torchrun_with_bad_input(tmp_path: Path) -> None:
    done = torchrun(TINY, f"run.out_dir={tmp_path / 'run'}", "optim.lrr=1")
    assert done.returncode != 0
    errors = [line for line in (done.stdout + done.stderr).splitlines() if "optim.lrr" in line and "did you" in line]
    assert len(errors) == 1, errors
    assert 'tools/train.py", line' not in done.stderr  # no traceback of ours
    assert not (tmp_path / "run").exists()


def test_a_test_by_two_processes_is_of_the_weights_that_are_saved(tmp_path: Path) -> None:
    """Batch norms of each process have seen other samples; one of them is exported, and tested."""
    folder = tmp_path / "run"
    for outcome in spawn_distributed(tmp_path / "logs", "train", TINY, f"run.out_dir={folder}", "run.dtype=float64"):
        outcome.ok()
    spawn(tmp_path / "logs", "validate", "--checkpoint", folder, "--record").ok()
    (row,) = rows(folder)
    alone = json.loads((folder / "results.json").read_text())["evaluation"]["metrics"]
    assert float(row["test_loss"]) == pytest.approx(alone["loss"], rel=1e-6)


def test_fewer_samples_than_processes() -> None:
    with pytest.raises(BadInput, match="1 training samples are too few for 2 processes"):
        KeyedBatches(1, 16, Process(0, 2), training=True, seed=0)
