"""tools/train.py: what a run writes and says, and what each option does."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import timm
import torch
from helpers import (
    FOUR_BRANCHES,
    RANDOM,
    changed,
    image_folder,
    losses,
    make_run,
    rows,
    state,
    train,
    validate,
    write_archives,
)
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import mdeq
import tools.train
from mdeq import SolveStatus
from tools.batches import Process
from tools.build import build_model, placed
from tools.config import BadInput, ModelConfig, load_config
from tools.data import Arrays
from tools.engine import evaluate
from tools.metrics import QUANTILES, SolveLog, Tally
from tools.results import command, commit

# One whole run.


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run of two epochs, and what it printed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    words = ["run.epochs=2", "optim.ema_decay=0.9"]
    return folder, train(folder, *words).ok()


def test_files_of_a_run(finished: tuple[Path, str]) -> None:
    names = {path.name for path in finished[0].iterdir()}
    assert names == {"config.yaml", "log.csv", "model.safetensors", "config.json", "checkpoint.pt", "results.json"}


def test_results_are_those_of_the_last_lines(finished: tuple[Path, str]) -> None:
    """And the command holds no place of this machine."""
    folder, out = finished
    record = json.loads((folder / "results.json").read_text())
    metrics, twice = record["evaluation"]["metrics"], record["evaluation"]["metrics_at_twice_the_steps"]
    assert f"test accuracy: {metrics['top1']:.1f} %" in out
    assert f"without tolerance): {twice['top1']:.1f} %" in out
    assert f"residual: mean {metrics['residual_mean']:.2e}" in out
    assert record["evaluation"]["solver"]["name"] == "picard"
    assert record["training"]["seed"] == 0
    assert record["training"]["minutes"] > 0
    command = record["training"]["command"]
    assert command == "python tools/train.py tests/data/tiny.yaml run.out_dir=DIR run.epochs=2 optim.ema_decay=0.9"


def test_saved_config_is_the_effective_one(finished: tuple[Path, str]) -> None:
    config = load_config(finished[0] / "config.yaml")
    assert (config.run.epochs, config.data.num_train, config.optim.clip_grad) == (2, 64, None)
    assert config.run.out_dir == str(finished[0])


def test_log_has_a_row_an_epoch_and_all_its_columns(finished: tuple[Path, str]) -> None:
    log = rows(finished[0])
    assert [row["epoch"] for row in log] == ["0", "1"]
    assert [row["step"] for row in log] == ["4", "8"]
    names = ["loss", "top1", "top5", "evaluations", "residual_mean", *(f"residual_q{q:g}" for q in QUANTILES)]
    names += [status.name.lower() for status in SolveStatus]
    columns = [f"{split}_{name}" for split in ("train", "test") for name in names]
    for row in log:
        for column in [*columns, "lr", "train_images_per_s", "peak_memory_mib", "skipped_steps"]:
            assert math.isfinite(float(row[column])), column
        for split in ("train", "test"):
            assert sum(float(row[f"{split}_{status.name.lower()}"]) for status in SolveStatus) == pytest.approx(1)
            assert 0 <= float(row[f"{split}_top1"]) <= float(row[f"{split}_top5"]) <= 100
            assert float(row[f"{split}_evaluations"]) == 3  # two updates
        assert float(row["peak_memory_mib"]) > 50
        assert float(row["train_images_per_s"]) > 0


def test_records_name_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *words], cwd=tmp_path, check=True)

    monkeypatch.setattr("tools.results.ROOT", tmp_path)
    asked = commit.__wrapped__
    assert asked() == {}
    git("init", "-q")
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-qm", "first")
    clean = asked()["commit"]
    assert re.fullmatch("[0-9a-f]{40}", clean)
    (tmp_path / "file").write_text("b")
    assert asked()["commit"] == f"{clean}+"
    monkeypatch.setattr("tools.results.ROOT", tmp_path / "installed")
    (tmp_path / "installed").mkdir()
    assert asked() == {}
    monkeypatch.setenv("PATH", "")
    assert asked() == {}


def test_a_command_is_told_without_places(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["tools/train.py", "data.root=/home/me/data", "model.checkpoint=/home/me/a.safetensors", "optim.lr=1e-3"]
    monkeypatch.setattr(sys, "argv", [*words, "run.resume=true", "run.max_minutes=5"])  # of one part of a run
    words = "tools/train.py data.root=DIR model.checkpoint=FILE optim.lr=1e-3"
    assert command() == f"python {words}"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for world, start in (("4", "torchrun"), ("8", "torchrun --nnodes 2")):
        monkeypatch.setenv("WORLD_SIZE", world)
        assert command() == f"{start} --nproc-per-node 4 {words}"


def test_memory_format(tmp_path: Path) -> None:
    """Channels last trains alike, and its files are as any others."""
    for name, words in (("first", ()), ("last", ("run.channels_last=true",))):
        train(tmp_path / name, "run.dtype=float64", *words).ok()
    first, last = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "last"))
    assert first.keys() == last.keys()
    for key, value in first.items():
        torch.testing.assert_close(last[key], value, rtol=1e-6, atol=1e-8)
    train(tmp_path / "last", "run.dtype=float64", "run.epochs=2", "run.resume=true", "run.channels_last=false").ok()
    assert "accuracy" in validate("--checkpoint", tmp_path / "last", "run.channels_last=true").ok()
    config = load_config(None, ["run.channels_last=true"])
    conv = placed(timm.create_model("test_mdeq"), config.run, Process()).stem.conv1
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert not conv.weight.is_contiguous()
    with pytest.raises(BadInput, match="for 2D models"):
        placed(timm.create_model("test_mdeq3d"), config.run, Process())


def test_log_has_the_backward_solves(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "data.num_train=32")
    run.model.deq.gradient = mdeq.ImplicitGradient(mdeq.Picard(max_steps=3, tol=0.0))
    assert run.train()
    (row,) = rows(tmp_path / "run")
    assert 2 < float(row["train_backward_evaluations"]) <= 3  # that at zero is known
    assert float(row["train_backward_residual_q0.9"]) > 0
    assert float(row["train_backward_max_steps"]) > 0.5


def test_last_lines(finished: tuple[Path, str]) -> None:
    folder, out = finished
    accuracy = float(rows(folder)[-1]["test_top1"])
    assert f"\ntest accuracy: {accuracy:.1f} %\n" in out
    lines = out[out.index("test accuracy") :].splitlines()
    assert re.fullmatch(r"at twice the solver steps \(4\D*\): \d+\.\d %", lines[1])
    assert lines[2] == "evaluations of f: mean 3.0"
    assert re.fullmatch(r"residual: mean \S+, median \S+, 90 % \S+, 99 % \S+, largest \S+", lines[3])
    assert float(lines[3].split()[2].strip(",")) == pytest.approx(
        float(rows(folder)[-1]["test_residual_mean"]), rel=0.01
    )
    shares = dict(re.findall(r"(\w+) (\d+\.\d) %", lines[4]))
    assert lines[4].startswith("solver status: ")
    assert set(shares) == {status.name.lower() for status in SolveStatus}
    assert sum(float(v) for v in shares.values()) == pytest.approx(100, abs=0.3)
    assert lines[5] == f"checkpoint: {folder / 'model.safetensors'}"


def test_twice_the_steps_are_twice_the_steps(tmp_path: Path) -> None:
    used: list[int] = []
    forward = mdeq.DEQ.forward

    def spy(self: mdeq.DEQ, *args: Any, solver: Any = None, **kwargs: Any) -> Any:
        used.append((solver or self.solver).max_steps)
        return forward(self, *args, solver=solver, **kwargs)

    with mock.patch.object(mdeq.DEQ, "forward", spy):
        train(tmp_path / "run", "data.num_train=16").ok()
    assert used == [2, 2, 2, 4, 4]  # one training batch, two test batches, two again


def test_checkpoint_is_read_with_weights_only(finished: tuple[Path, str]) -> None:
    saved = torch.load(finished[0] / "checkpoint.pt", weights_only=True)
    assert (saved["epoch"], saved["batch"]) == (2, 0)
    assert saved["counts"] == [8, 0, 0]
    exported = load_file(finished[0] / "model.safetensors")
    assert changed(saved["ema"], exported) == set()  # the average is what is exported
    assert changed(saved["model"], exported)
    with safe_open(finished[0] / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["model.kwargs.in_chans=1", "data.num_classes=12"],
        ["model.kwargs.dropout=0.2", "model.solver={name: broyden, max_steps: 5, tol: 1e-4}"],
        FOUR_BRANCHES,
        ["run.dtype=float64"],
    ],
    ids=["plain", "grey, 12 classes", "dropout and solver", "four branches", "float64"],
)
def test_timm_loads_the_folder(words: list[str], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "data.num_train=16", *words)
    run.train()
    card = json.loads((tmp_path / "run" / "config.json").read_text())
    assert card["architecture"] == "test_mdeq"
    assert card["pretrained_cfg"]["input_size"] == [run.model.in_chans, 16, 16]
    model = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True).eval()
    assert model.num_classes == run.model.num_classes
    x = torch.randn(4, run.model.in_chans, 16, 16)
    with torch.no_grad():
        expected = run.final_model.eval()(x.to(next(run.model.parameters()).dtype))
        close = 1e-6 if expected.dtype == torch.float64 else 1e-12
        assert (model(x).double() - expected.double()).abs().max() < close


def test_progress_bar(tmp_path: Path) -> None:
    outcome = train(tmp_path / "run", "data.num_train=32", "run.progress=true")
    assert "test accuracy" in outcome.ok()
    assert "epoch 1/1" in outcome.err
    assert train(tmp_path / "quiet", "data.num_train=32").err == ""


@pytest.mark.parametrize(("words", "warned"), [(["optim.warmup_epochs=1"], True), ([], False)])
def test_warm_up_that_does_not_end(words: list[str], warned: bool, tmp_path: Path) -> None:
    done = train(tmp_path / "run", "run.epochs=1", "optim.schedule=cosine", *words)
    assert done.ok()
    assert ("the rate is still rising when the run ends" in done.err) == warned


def test_train_on_an_image_folder(tmp_path: Path) -> None:
    image_folder(tmp_path / "data")
    words = ["data.name=folder", "data.num_train=null", f"data.root={tmp_path / 'data'}", "data.batch_size=8"]
    run = make_run(tmp_path / "run", *words)
    assert run.model.num_classes == 3
    assert len(run.train_batches) == 3


def test_train_on_cifar10(tmp_path: Path) -> None:
    words = ["data.name=cifar10", f"data.root={write_archives(tmp_path / 'data')}", "data.num_train=24"]
    out = train(tmp_path / "run", *words, "data.batch_size=8", "model.name=test_mdeq", "data.image_size=32").ok()
    assert "test accuracy" in out
    assert [row["step"] for row in rows(tmp_path / "run")] == ["3"]


# Learning.


def separable(train: bool) -> Arrays:
    """Class 0 is bright on the left, class 1 on the right; 64 images."""
    labels = torch.arange(64) % 2
    images = torch.randint(0, 80, (64, 1, 16, 16), generator=torch.Generator().manual_seed(int(train)))
    images[labels == 0, :, :, :8] += 150
    images[labels == 1, :, :, 8:] += 150
    return Arrays(images.byte(), labels)


def test_two_steps_lower_the_loss(tmp_path: Path) -> None:
    with mock.patch("tools.data.read_digits", separable):
        run = make_run(tmp_path / "run", "data.batch_size=64", "optim.schedule=none", "optim.lr=2e-2")
    first, _, third = losses(run, 3)
    assert third < 0.8 * first


def test_separable_data_are_learnt(tmp_path: Path) -> None:
    with mock.patch("tools.data.read_digits", separable):
        train(tmp_path / "run", "run.epochs=8", "run.eval_every=8", "data.batch_size=8", "optim.lr=2e-2").ok()
    assert float(rows(tmp_path / "run")[-1]["test_top1"]) >= 95


def test_a_run_is_repeated_bit_for_bit(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / str(k), *RANDOM) for k in range(2)]
    torch.manual_seed(1)
    assert losses(runs[0], 6) == losses(runs[1], 6)
    assert changed(state(runs[0]), state(runs[1])) == set()
    other = make_run(tmp_path / "other", *RANDOM, "run.seed=1")
    assert changed(state(runs[0]), state(other))


# Steps that are not finite.


def poisoned(run: Any, numbers: set[int]) -> Callable[..., Any]:
    """Return batches of which some, counted over all epochs, hold a NaN."""
    epoch, counter = run.train_batches.epoch, iter(range(10_000))

    def batches(*args: Any) -> Any:
        for x, y in epoch(*args):
            yield (x * math.nan if next(counter) in numbers else x), y

    return batches


def test_nan_step_changes_nothing_and_is_counted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "optim.ema_decay=0.9", "optim.momentum=0.9")
    run.trainer.train_mode()
    batches = iter(run.train_batches.epoch())
    x, y = next(batches)
    args = (0, Tally(), SolveLog(), SolveLog())
    assert math.isfinite(run.trainer.step(x, y, *args))
    before, averaged = state(run), {k: v.clone() for k, v in run.trainer.ema.module.state_dict().items()}
    moments = [v.clone() for s in run.trainer.optimizer.state.values() for v in s.values()]
    assert math.isnan(run.trainer.step(x * math.nan, y, *args))
    assert changed(before, state(run)) == set()
    assert changed(averaged, run.trainer.ema.module.state_dict()) == set()
    assert all(
        torch.equal(a, b)
        for a, b in zip(moments, (v for s in run.trainer.optimizer.state.values() for v in s.values()))
    )
    assert (run.trainer.num_steps, run.trainer.bad_steps, run.trainer.bad_in_a_row) == (2, 1, 1)
    x, y = next(batches)
    assert math.isfinite(run.trainer.step(x, y, *args))
    assert (run.trainer.num_steps, run.trainer.bad_steps, run.trainer.bad_in_a_row) == (3, 1, 0)
    assert all(v.isfinite().all() for v in run.model.state_dict().values())


def test_finite_loss_with_a_gradient_that_is_not(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")

    class Kink(torch.nn.Module):
        def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
            return (logits.square().sum() * 0).sqrt()  # 0, with an infinite slope

    run.trainer.criterion = Kink()
    before = state(run)
    assert math.isnan(losses(run, 1)[0])
    assert changed(before, state(run)) == set()
    assert run.trainer.bad_steps == 1


def test_nan_in_one_part_of_an_accumulated_batch(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "optim.accumulate=2")
    x, y = next(iter(run.train_batches.epoch()))
    x[-1] = math.nan
    before, tally = state(run), Tally()
    assert math.isnan(run.trainer.step(x, y, 0, tally, SolveLog(), SolveLog()))
    assert changed(before, state(run)) == set()
    assert math.isfinite(tally.summary(Process())["loss"])


def test_a_test_that_fails_does_not_cost_the_epoch(tmp_path: Path) -> None:
    words = ["run.epochs=1", "run.checkpoint_minutes=100"]
    run = make_run(tmp_path / "run", *words)
    with (
        mock.patch("tools.train.Run", return_value=run),
        mock.patch.object(run, "evaluate", side_effect=BadInput("cannot read 7.png")),
    ):
        said = train(tmp_path / "run", *words).refusal()
    assert "cannot read 7.png; the run is kept, go on with run.resume=true" in said
    count = run.trainer.num_steps
    train(tmp_path / "run", *words, "run.resume=true").ok()
    assert int(rows(tmp_path / "run")[-1]["step"]) == count  # tested, not trained once more


def test_a_run_that_skipped_every_step_is_no_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "run.epochs=1")
    run.train_batches.epoch = poisoned(run, set(range(1000)))
    with mock.patch("tools.train.Run", return_value=run):
        said = train(tmp_path / "run").refusal()
    assert re.search(r"of all \d+ steps was not finite, so nothing was learnt; .*; nothing was saved", said)


def test_skipped_steps_are_logged_and_printed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "run.epochs=2")
    run.train_batches.epoch = poisoned(run, {1, 2, 5})
    with mock.patch("tools.train.Run", return_value=run):
        assert "skipped steps" in train(tmp_path / "run").ok()
    log = rows(tmp_path / "run")
    assert [row["skipped_steps"] for row in log] == ["2", "3"]
    assert all(math.isfinite(float(row["train_loss"])) for row in log)


def test_training_stops_after_bad_steps_in_a_row(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = make_run(folder, "run.epochs=3", "run.max_bad_steps=3")
    run.train_batches.epoch = poisoned(run, {1, 2, 5, 6, 7, 8, 9})  # 4 steps an epoch
    with mock.patch("tools.train.Run", return_value=run):
        line = train(folder).refusal()
    assert "3 steps in a row" in line
    assert "lower optim.lr" in line
    assert run.trainer.num_steps == 8
    kept = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert (kept["epoch"], kept["counts"]) == (1, [4, 2, 0])
    assert all(value.isfinite().all() for value in kept["model"].values())
    assert changed(load_file(folder / "model.safetensors"), kept["model"]) == set()
    assert [row["epoch"] for row in rows(folder)] == ["0"]
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


# Sums over samples.


def test_tally_counts_samples() -> None:
    tally = Tally()
    logits = torch.eye(10)[torch.tensor([1, 2, 3])] * 5 + torch.linspace(1, 0, 10)
    tally.add(torch.tensor(2.0), logits, torch.tensor([1, 0, 9]))  # right, within the first five, wrong
    tally.add(torch.tensor(5.0), logits[:1], torch.tensor([1]))
    summary = tally.summary(Process())
    assert summary == pytest.approx({"loss": (3 * 2 + 5) / 4, "top1": 50.0, "top5": 75.0})
    soft = Tally()
    soft.add(torch.tensor(2.0), logits, torch.eye(10)[torch.tensor([1, 0, 9])] * 0.7)
    assert soft.summary(Process())["top1"] == pytest.approx(100 / 3)


def test_tally_of_fewer_than_five_classes() -> None:
    tally = Tally()
    tally.add(torch.tensor(1.0), torch.tensor([[1.0, 0, 0]]), torch.tensor([2]))
    assert tally.summary(Process()) == {"loss": 1.0, "top1": 0.0, "top5": 100.0}


def test_solve_log_quantiles() -> None:
    log = SolveLog()
    assert log.summary() == {}
    log.add(None)
    for start in (0, 50):
        residual = torch.arange(start, start + 50) / 100.0
        status = torch.full((50,), int(SolveStatus.CONVERGED if start == 0 else SolveStatus.MAX_STEPS))
        log.add(mdeq.SolveStats(status, residual, torch.full((50,), 3 + start), 9, torch.zeros(9, 50)))
    summary = log.summary(prefix="x_")
    assert summary["x_residual_q0.5"] == pytest.approx(0.5)
    assert summary["x_residual_q0.9"] == pytest.approx(0.9)
    assert summary["x_residual_q0.99"] == pytest.approx(0.99)
    assert summary["x_residual_q1"] == pytest.approx(0.99)
    assert summary["x_residual_mean"] == pytest.approx(0.495)
    assert summary["x_evaluations"] == pytest.approx((4 + 54) / 2)
    assert (summary["x_converged"], summary["x_max_steps"], summary["x_diverged"]) == (0.5, 0.5, 0.0)


def test_evaluation_counts_every_image_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    model = run.model.eval()
    result = evaluate(model, run.test_batches)
    with torch.no_grad():
        batches = list(run.test_batches.epoch())
        logits = torch.cat([model(x) for x, _ in batches])
    y = torch.cat([y for _, y in batches])
    assert len(y) == 20
    assert result["top1"] == pytest.approx(100 * float((logits.argmax(1) == y).double().mean()))
    assert result["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, y)), rel=1e-5)


def test_class_weights_count_with_mixed_labels(tmp_path: Path) -> None:
    words = ("data.mixup=0.5", f"loss.class_weights={[20.0] + [1.0] * 9}")
    criterion = make_run(tmp_path / "run", *words).trainer.criterion
    logits, soft = torch.randn(4, 10), torch.full((4, 10), 0.1)
    weights = torch.tensor([20.0] + [1.0] * 9)
    expected = -(soft * weights * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(criterion(logits, soft), expected)


def test_a_run_keeps_the_solver_that_its_first_weights_brought(tmp_path: Path) -> None:
    """validate.py builds the model with other weights, which bring none."""
    words = ["model.name=mdeq_tiny_cifar.cifar10", "model.pretrained=true", "model.solver=null", "model.gradient=null"]
    run = tools.train.Run(load_config(None, words), tmp_path / "run", Process())
    trained = timm.create_model("mdeq_tiny_cifar.cifar10", pretrained=True)
    assert mdeq.build_solver(run.config.model.solver) == run.model.deq.solver == trained.deq.solver
    assert mdeq.build_gradient(run.config.model.gradient) == run.model.deq.gradient == trained.deq.gradient


def test_one_setting_of_the_model_s_own_solver() -> None:
    config = ModelConfig(name="test_mdeq", solver={"max_steps": 7})
    own = build_model(ModelConfig(name="test_mdeq"), None, for_training=True).deq.solver
    model = build_model(config, None, for_training=True)
    assert model.deq.solver == replace(own, max_steps=7) != own
    assert config.solver == {"max_steps": 7}
    with pytest.raises(BadInput, match="unknown argument max_step; did you mean max_steps"):
        build_model(ModelConfig(name="test_mdeq", solver={"max_step": 7}), None, for_training=True)


def test_a_command_names_no_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of a path that follows a word, nor of one that is part of it."""
    words = [
        f"--checkpoint={tmp_path}/run",
        f"local-dir:{tmp_path}",
        f"model.name=local-dir:{tmp_path}/run",
        str(tmp_path),
    ]
    monkeypatch.setattr(sys, "argv", ["tools/train.py", *words, "optim.lr=0.1", "data.train_split="])
    name = tmp_path.name
    ours = f"--checkpoint=run local-dir:{name} model.name=local-dir:run {name} optim.lr=0.1 data.train_split="
    assert command() == f"python tools/train.py {ours}"
