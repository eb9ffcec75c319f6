"""What each option of tools/train.py does."""

import math
import shutil
import sys
import types
from itertools import islice, pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import changed, image_folder, losses, make_run, rows, state, steps, train
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch import Tensor

import mdeq
from tools.config import DEQConfig
from tools.engine import jacobian_weight

EXACT = ("run.dtype=float64", "model.freeze_bn=true", "model.kwargs.dropout=0.0")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(folder, "optim.ema_decay=0.9", "data.num_train=32").ok()
    return folder


def test_freeze_trains_the_head_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "model.freeze=true", "model.kwargs.dropout=0.2", "optim.weight_decay=0.1")
    before = state(run)
    losses(run, 3)
    moved = changed(before, state(run))
    assert moved
    assert all(name.startswith(("head.", "classifier.")) for name in moved)
    heads = {n for n, _ in run.model.named_parameters() if n.startswith(("head.", "classifier."))}
    assert {n for n, p in run.model.named_parameters() if p.requires_grad} == heads
    assert heads <= moved | {"head.downsamples.0.0.bias"} | {n for n in heads if n.endswith(".bias")}


def test_freeze_bn_keeps_all_statistics(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "model.freeze_bn=true")
    before = state(run)
    losses(run, 2)
    moved = changed(before, state(run))
    statistics = {name for name in before if "running_" in name or "num_batches" in name}
    assert statistics
    assert not moved & statistics
    assert {"stem.conv1.weight", "stem.norm1.weight", "classifier.weight"} <= moved
    run = make_run(tmp_path / "plain")
    losses(run, 1)
    assert changed(before, state(run)) >= statistics


def test_ema_has_a_warm_up(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "optim.ema_decay=0.999", "optim.schedule=none")
    start = state(run)
    taken = steps(run)
    average, expected = run.trainer.ema, {k: v.clone() for k, v in start.items()}
    assert isinstance(average, ModelEmaV3)
    for number in range(1, 5):
        next(taken)
        decay = average.get_decay(number)
        assert decay < 0.9  # 0.999 would keep the random weights
        for name, value in state(run).items():
            if value.is_floating_point():
                expected[name].lerp_(value, 1 - decay)
                torch.testing.assert_close(average.module.state_dict()[name], expected[name], msg=name)
    assert run.final_model is average.module
    assert changed(average.module.state_dict(), state(run))


def test_label_smoothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "optim.label_smoothing=0.2")
    logits, labels = torch.randn(5, 10), torch.tensor([0, 3, 5, 9, 1])
    log_p = logits.log_softmax(1)
    expected = -(0.8 * log_p[torch.arange(5), labels] + 0.02 * log_p.sum(1)).mean()
    assert float(run.trainer.criterion(logits, labels)) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_images_have_mixed_labels(kind: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", f"data.{kind}=1.0", "optim.label_smoothing=0.1")
    seen: list[tuple[Tensor, Tensor]] = []
    forward = run.trainer.criterion.forward
    run.trainer.criterion.forward = lambda logits, y: seen.append((logits, y)) or forward(logits, y)
    assert all(math.isfinite(loss) for loss in losses(run, 3))
    for _, y in seen:
        assert y.shape == (16, 10)
        torch.testing.assert_close(y.sum(1), torch.ones(16))
        assert y.min() == pytest.approx(0.01)
    assert any((y > 0.05).sum() > 16 for _, y in seen)  # some images are of two classes


def learning_rates(folder: Path, *words: str, count: int) -> list[float]:
    run = make_run(folder, *words)
    group = run.trainer.optimizer.param_groups[0]
    return [group["lr"], *(group["lr"] for _ in islice(steps(run), count))]


def test_cosine_schedule(tmp_path: Path) -> None:
    words = ["run.epochs=2", "optim.lr=0.1", "optim.min_lr=0.01", "optim.schedule=cosine"]
    rates = learning_rates(tmp_path / "run", *words, count=8)
    expected = [0.01 + 0.045 * (1 + math.cos(math.pi * t / 8)) for t in range(9)]
    assert rates == pytest.approx(expected)


def test_cosine_schedule_with_warm_up(tmp_path: Path) -> None:
    words = ["run.epochs=3", "optim.lr=0.1", "optim.min_lr=0.01", "optim.warmup_epochs=1"]
    rates = learning_rates(tmp_path / "run", *words, count=12)
    assert rates[:4] == pytest.approx([0.01, 0.0325, 0.055, 0.0775])
    assert rates[4:] == pytest.approx([0.01 + 0.045 * (1 + math.cos(math.pi * t / 12)) for t in range(4, 13)])


def test_step_schedule(tmp_path: Path) -> None:
    words = ["run.epochs=4", "optim.lr=0.1", "optim.schedule=step", "optim.decay_epochs=1", "optim.decay_rate=0.5"]
    rates = learning_rates(tmp_path / "run", *words, count=8)
    assert rates == pytest.approx([0.1] * 4 + [0.05] * 4 + [0.025])


def test_no_schedule(tmp_path: Path) -> None:
    assert learning_rates(tmp_path / "run", "optim.lr=0.1", "optim.schedule=none", count=5) == [0.1] * 6


@pytest.mark.parametrize("schedule", ["cosine", "none"])
def test_layer_decay_gives_the_stem_the_smallest_rate(schedule: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "optim.layer_decay=0.5", "optim.lr=0.1", f"optim.schedule={schedule}")
    rate = {id(p): g["lr"] for g in run.trainer.optimizer.param_groups for p in g["params"]}
    names = {name: rate[id(p)] for name, p in run.model.named_parameters()}
    chain = ["stem.conv1.weight", "inject.conv.weight", "head.bottlenecks.0.conv1.weight", "head.final.0.weight"]
    rates = [names[name] for name in [*chain, "classifier.weight"]]
    assert rates[-1] == pytest.approx(0.1)
    for earlier, later in pairwise(rates):
        assert earlier == pytest.approx(0.5 * later)
    assert {v for n, v in names.items() if n.startswith("equilibrium.")} == {names["inject.conv.weight"]}
    assert {v for n, v in names.items() if n.startswith("stem.")} == {names["stem.conv1.weight"]}


def test_accumulation_equals_the_whole_batch(tmp_path: Path) -> None:
    one, four = (
        losses(make_run(tmp_path / str(n), *EXACT, f"optim.accumulate={n}", "optim.clip_grad=1.0"), 6) for n in (1, 4)
    )
    assert four == pytest.approx(one, rel=0, abs=1e-9)
    assert one[0] != one[4]


def test_clip_grad_bounds_the_step(tmp_path: Path) -> None:
    words = ["optim.name=momentum", "optim.momentum=0", "optim.lr=1.0", "optim.schedule=none"]

    def distance(*more: str) -> float:
        run = make_run(tmp_path / "run", *words, *more)
        before = [p.detach().clone() for p in run.model.parameters()]
        losses(run, 1)
        return float(torch.stack([(p.detach() - q).norm() for p, q in zip(run.model.parameters(), before)]).norm())

    assert distance("optim.clip_grad=1e-2") == pytest.approx(1e-2, rel=1e-3)
    assert distance() > 2e-2


@pytest.fixture
def solves(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of each call of a DEQ in train mode, and its result."""
    calls: list[dict[str, Any]] = []
    forward = mdeq.DEQ.forward

    def spy(self: mdeq.DEQ, *args: Any, **kwargs: Any) -> Any:
        result = forward(self, *args, **kwargs)
        if self.training:
            calls.append({**kwargs, "result": result})
        return result

    monkeypatch.setattr(mdeq.DEQ, "forward", spy)
    return calls


def test_warm_up_steps_are_unrolled(solves: list[dict[str, Any]], tmp_path: Path) -> None:
    words = ["deq.warmup_steps=3", "deq.warmup_unroll=5", "optim.accumulate=2"]
    losses(make_run(tmp_path / "run", *words), 6)
    assert [call["unroll"] for call in solves] == [5] * 6 + [0] * 6
    assert all((call["result"].stats is None) == (call["unroll"] > 0) for call in solves)


def test_a_run_that_is_all_warm_up(tmp_path: Path) -> None:
    train(tmp_path / "run", "deq.warmup_steps=100", "deq.warmup_unroll=2").ok()
    (row,) = rows(tmp_path / "run")
    assert "train_residual_mean" not in row
    assert float(row["test_evaluations"]) == 3


def test_jacobian_penalty_is_added_to_the_loss(solves: list[dict[str, Any]], tmp_path: Path) -> None:
    words = [*EXACT, "model.gradient.num_steps=2"]
    without = losses(make_run(tmp_path / "a", *words), 1)[0]
    penalised = losses(make_run(tmp_path / "b", *words, "deq.jacobian_weight=0.5", "deq.jacobian_probes=3"), 1)[0]
    assert [call["jacobian_probes"] for call in solves] == [0, 3]
    penalty = float(solves[1]["result"].jacobian_penalty.detach())
    assert penalty > 0
    assert penalised - without == pytest.approx(0.5 * penalty, rel=1e-9)


def test_jacobian_penalty_lowers_the_jacobian(solves: list[dict[str, Any]], tmp_path: Path) -> None:
    words = ["deq.jacobian_weight=100", "optim.lr=1e-2", "optim.schedule=none"]
    losses(make_run(tmp_path / "run", *words), 16)
    penalties = [float(call["result"].jacobian_penalty.detach()) for call in solves]
    assert sum(penalties[-4:]) < 0.5 * sum(penalties[:4])


def test_jacobian_penalty_at_a_share_of_the_steps(solves: list[dict[str, Any]], tmp_path: Path) -> None:
    losses(make_run(tmp_path / "run", "deq.jacobian_weight=1", "deq.jacobian_prob=0.5"), 12)
    first = [call["jacobian_probes"] for call in solves]
    assert 2 <= sum(first) <= 10
    losses(make_run(tmp_path / "again", "deq.jacobian_weight=1", "deq.jacobian_prob=0.5"), 12)
    assert [call["jacobian_probes"] for call in solves[12:]] == first


def test_jacobian_schedule() -> None:
    config = DEQConfig(
        warmup_steps=10,
        warmup_jacobian_weight=0.25,
        jacobian_weight=1.0,
        jacobian_increment=0.5,
        jacobian_increment_steps=4,
        jacobian_stop_epoch=3,
    )
    weights = [jacobian_weight(config, step, epoch=0) for step in (0, 9, 10, 13, 14, 18, 22)]
    assert weights == [0.25, 0.25, 1.0, 1.0, 1.5, 2.0, 2.5]
    assert jacobian_weight(config, 14, epoch=2) == 1.5
    assert jacobian_weight(config, 14, epoch=3) == 0
    assert jacobian_weight(DEQConfig(), 0, 0) == 0


def test_fine_tuning_with_another_number_of_classes(finished: Path, tmp_path: Path) -> None:
    source = finished / "model.safetensors"
    saved = load_file(source)
    for place in (source, finished, finished / "checkpoint.pt"):
        run = make_run(tmp_path / "run", f"model.checkpoint={place}", "data.num_classes=12")
        different = {name for name, value in state(run).items() if not torch.equal(value, saved[name])}
        assert different == {"classifier.weight", "classifier.bias"}
        assert run.model.classifier.weight.shape[0] == 12
    assert len(losses(run, 2)) == 2
    same = make_run(tmp_path / "same", f"model.checkpoint={source}")
    assert changed(state(same), saved) == set()


def test_fine_tuning_on_an_image_folder(finished: Path, tmp_path: Path) -> None:
    image_folder(tmp_path / "data")
    words = [f"data.root={tmp_path / 'data'}", f"model.checkpoint={finished}", "data.batch_size=8"]
    run = make_run(tmp_path / "run", "data.name=folder", "data.num_train=null", *words)
    saved = load_file(finished / "model.safetensors")
    assert run.model.num_classes == 3
    assert torch.equal(run.model.stem.conv1.weight, saved["stem.conv1.weight"])


def test_number_of_training_images(tmp_path: Path) -> None:
    train(tmp_path / "run", "data.num_train=33", "run.epochs=2").ok()
    assert [row["step"] for row in rows(tmp_path / "run")] == ["2", "4"]


def test_images_on_the_device_change_nothing(tmp_path: Path) -> None:
    words = ["data.augment=crop_flip", "run.epochs=2"]
    a, b = (losses(make_run(tmp_path / w, *words, f"data.cache_on_device={w}"), 6) for w in ("true", "false"))
    assert a == b


def test_evaluations_every_other_epoch(tmp_path: Path) -> None:
    train(tmp_path / "run", "run.epochs=3", "run.eval_every=2", "data.num_train=16").ok()
    assert [row["test_top1"] != "" for row in rows(tmp_path / "run")] == [False, True, True]


def test_bfloat16(tmp_path: Path) -> None:
    words = ["run.amp=bf16", "optim.clip_grad=1.0", "model.gradient.num_steps=2"]
    plain, mixed = (losses(make_run(tmp_path / "run", *w), 4) for w in (words[1:], words))
    assert mixed == pytest.approx(plain, rel=0.15)
    assert mixed != plain
    train(tmp_path / "run", *words, "data.num_train=16").ok()
    assert load_file(tmp_path / "run" / "model.safetensors")["stem.conv1.weight"].dtype == torch.float32


def test_float16_finds_its_loss_scale(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "run.amp=fp16", "run.epochs=10")
    found = losses(run, 24)
    assert all(math.isfinite(loss) for loss in found[-4:])
    assert run.trainer.bad_steps == sum(math.isnan(loss) for loss in found)
    assert run.trainer.scaler.get_scale() <= 2**16
    assert all(value.isfinite().all() for value in run.model.state_dict().values())


def test_float64(tmp_path: Path) -> None:
    train(tmp_path / "run", "run.dtype=float64", "data.num_train=16", "optim.ema_decay=0.9").ok()
    assert load_file(tmp_path / "run" / "model.safetensors")["stem.conv1.weight"].dtype == torch.float64


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb", "muon"])
def test_optimisers_of_timm(name: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", f"optim.name={name}")
    before = state(run)
    assert all(math.isfinite(loss) for loss in losses(run, 2))
    assert "classifier.weight" in changed(before, state(run))


@pytest.mark.parametrize(("switch", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_logging_to_a_package_that_is_missing(switch: str, module: str, tmp_path: Path) -> None:
    with mock.patch.dict(sys.modules, {module: None}):
        line = train(tmp_path / "run", f"run.{switch}=true").refusal()
    assert switch in line
    assert "pip install" in line
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    writer = mock.Mock()
    board = types.SimpleNamespace(SummaryWriter=mock.Mock(return_value=writer))
    with mock.patch.dict(sys.modules, {"torch.utils.tensorboard": board}):
        train(tmp_path / "run", "run.tensorboard=true", "run.epochs=2", "data.num_train=16").ok()
    board.SummaryWriter.assert_called_once_with(str(tmp_path / "run"))
    points = {(name, epoch): value for (name, value, epoch) in (c.args for c in writer.add_scalar.call_args_list)}
    last = rows(tmp_path / "run")[-1]
    assert points["test_top1", 1] == pytest.approx(float(last["test_top1"]))
    assert {name for name, _ in points} >= set(last) - {"epoch"}
    writer.close.assert_called_once()


def test_weights_and_biases_get_every_row(tmp_path: Path) -> None:
    session = mock.Mock()
    package = types.SimpleNamespace(init=mock.Mock(return_value=session))
    with mock.patch.dict(sys.modules, {"wandb": package}):
        train(tmp_path / "run", "run.wandb=true", "run.epochs=2", "data.num_train=16").ok()
    assert package.init.call_args.kwargs["config"]["optim"]["name"] == "adamw"
    assert [call.kwargs["step"] for call in session.log.call_args_list] == [0, 1]
    session.finish.assert_called_once()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore")  # torch.compile warns of what it does itself
def test_compiled_cell_trains_alike(tmp_path: Path) -> None:
    small = "model.kwargs={channels: [8, 8], num_groups: 2, expansion: 1, dropout: 0.0}"
    words = [*EXACT, "model.gradient.num_steps=2", "model.name=mdeq_tiny_cifar", small]
    plain, compiled = (losses(make_run(tmp_path / w, *words, f"run.compile={w}"), 4) for w in ("false", "true"))
    assert compiled == pytest.approx(plain, abs=1e-9)


def test_clip_grad_in_float16(tmp_path: Path) -> None:
    """The limit is of the gradient, not of what the loss scale makes of it."""
    words = ["optim.name=momentum", "optim.momentum=0", "optim.lr=1.0", "optim.schedule=none", "optim.clip_grad=1e-2"]
    run = make_run(tmp_path / "run", *words, "run.amp=fp16")
    run.trainer.scaler = torch.amp.GradScaler("cpu", init_scale=128.0)  # one that fits from the start
    before = [p.detach().clone() for p in run.model.parameters()]
    assert math.isfinite(losses(run, 1)[0])
    moved = torch.stack([(p.detach() - q).norm() for p, q in zip(run.model.parameters(), before)]).norm()
    assert float(moved) == pytest.approx(1e-2, rel=1e-2)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixup_and_cutmix_are_told_apart(kind: str, tmp_path: Path) -> None:
    """Mixup blends whole images, cutmix pastes a box."""
    mix = make_run(tmp_path / "run", f"data.{kind}=1.0").trainer.mixup
    assert (mix.mixup_alpha, mix.cutmix_alpha) == ((1.0, 0.0) if kind == "mixup" else (0.0, 1.0))


def test_weight_decay_and_momentum_reach_the_optimiser(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "optim.weight_decay=0.3", "optim.name=sgd", "optim.momentum=0.7")
    groups = run.trainer.optimizer.param_groups
    assert {g["weight_decay"] for g in groups} == {0.0, 0.3}
    assert {g["momentum"] for g in groups} == {0.7}


def test_a_run_in_bfloat16_is_tested_in_it(tmp_path: Path) -> None:
    """A run in bfloat16 is tested in it: f of the test sees the weights as autocast gives them."""
    run, seen = make_run(tmp_path / "run", "run.amp=bf16", "data.num_train=16"), []
    run.model.stem.conv1.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    run.evaluate()
    assert set(seen) == {torch.bfloat16}
