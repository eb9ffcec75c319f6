"""tools/baseline.py: an explicit network learns by the recipe of a config, and what is not for it is refused."""

import json
from pathlib import Path

import pytest
import torch
from helpers import TINY, publish, run, train, validate

from tools.baseline import build_net
from tools.card import model_card


def test_a_network_learns_and_leaves_a_record(tmp_path: Path) -> None:
    words = (TINY, "--net", "test_resnet", "--out", tmp_path, "run.epochs=3", "optim.lr=1e-2")
    said = run("baseline", *words).ok()
    record = json.loads((tmp_path / "baseline.json").read_text())
    assert f"{record['parameters']:,} parameters, 3 epochs in" in said
    assert record["metrics"]["top1"] > 30  # of ten classes
    assert "evaluations" not in record["metrics"]
    assert "tools/baseline.py" in record["command"]
    assert run("baseline", *words).ok().splitlines()[0].partition("in")[0] in said  # and again, the same
    assert json.loads((tmp_path / "baseline.json").read_text())["metrics"] == record["metrics"]


def test_a_release_takes_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its card has the network beside the model, tested on the same; weights for other data do not take it."""
    monkeypatch.setattr("tools.publish.RELEASES_FOLDER", tmp_path / "weights")
    train(tmp_path / "run", "data.holdout=7").ok()
    validate("--checkpoint", tmp_path / "run", "--record", "data.holdout=null").ok()
    publish(tmp_path / "run", "--release", "test_mdeq.digits", "--ship").ok()
    path = tmp_path / "weights" / "test_mdeq.digits.json"
    before = json.loads(path.read_text())
    net = (TINY, "--net", "test_resnet", "--out", tmp_path / "out", "run.epochs=1", "data.holdout=7")
    metrics = []
    for holdout in (7, "null"):  # training sees the same samples
        run("baseline", *net, f"data.holdout={holdout}").ok()
        metrics.append(json.loads((tmp_path / "out" / "baseline.json").read_text())["metrics"])
    words = (*net, "--record", path)
    run("baseline", *words).ok()
    after = json.loads(path.read_text())
    beside = after["card"].pop("baseline")
    assert beside == json.loads((tmp_path / "out" / "baseline.json").read_text())
    assert after == before
    assert before["card"]["evaluation"]["settings"] == ["data.holdout=null"]
    assert beside["metrics"] == metrics[1] != metrics[0]
    card = model_card("o/n", after["config"], {**after["card"], "baseline": beside})
    row = f"| timm's test_resnet | {beside['parameters']:,} | 1 | {beside['metrics']['top1']:.4g} % |"
    assert row in card.partition("### Beside an explicit network")[2]
    assert "another model, recipe or number of epochs (" in run("baseline", *words, "run.epochs=2").refusal()
    assert "another model, recipe or number of epochs (" in run("baseline", *words, "optim.lr=0.5").refusal()
    after["card"]["data"] = "cifar10"
    path.write_text(json.dumps(after))
    assert "has weights for cifar10, not for digits" in run("baseline", *words).refusal()


def test_the_stem_for_small_images() -> None:
    x = torch.randn(2, 3, 32, 32)
    large, small = (build_net("resnet10t", 10, (3, 32, 32), [16, 32, 48, 64], small) for small in (False, True))
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in large.parameters()) == 158_402
    assert small.forward_features(x).shape[-1] == 4 * large.forward_features(x).shape[-1] == 4


def test_grey_images(tmp_path: Path) -> None:
    words = (TINY, "--net", "test_resnet", "--out", tmp_path, "run.epochs=1", "model.kwargs.in_chans=1")
    assert "test accuracy" in run("baseline", *words).ok()


def test_settings_of_the_run_and_the_loss_count(tmp_path: Path) -> None:
    words = (TINY, "--net", "test_resnet", "--out", tmp_path, "run.epochs=1")
    ways = ((), ("run.dtype=float64", "run.channels_last=true"), ("loss.class_weights=[9,1,1,1,1,1,1,1,1,1]",))
    losses = []
    for way in ways:
        run("baseline", *words, *way).ok()
        losses.append(json.loads((tmp_path / "baseline.json").read_text())["metrics"]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[2] != pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--net", "resnet_1"), "--net resnet_1"),
        (("--net", "test_vit3", "--small-images", "data.image_size=160"), "--small-images is for ResNets"),
        (("data.mixup=0.5",), "without mixup"),
        (("task=segmentation",), "for image classification"),
        (("--channels", "x"), "invalid int value"),
        (("--channels", "8", "8"), "--channels takes four numbers"),
        (("run.max_minutes=1",), "leave out run.max_minutes"),
        (("--net", "vit_tiny_patch16_224"), "--net vit_tiny_patch16_224"),
        (("data.name=modelnet10",), "modelnet10 has volumes"),
    ],
)
def test_bad_input(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    assert said in run("baseline", TINY, "--out", tmp_path / "out", *words).refusal()
    assert not (tmp_path / "out").exists()
