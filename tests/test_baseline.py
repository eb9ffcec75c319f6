"""tools/baseline.py: an explicit network learns by the recipe of a config, and what is not for it is refused."""

import json
from pathlib import Path

import pytest
import torch
from helpers import TINY, run

from tools.baseline import build_net


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


def test_the_stem_for_small_images() -> None:
    x = torch.randn(2, 3, 32, 32)
    large, small = (build_net("resnet10t", 10, (3, 32, 32), [16, 32, 48, 64], small) for small in (False, True))
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in large.parameters()) == 158_402
    assert small.forward_features(x).shape[-1] == 4 * large.forward_features(x).shape[-1] == 4


def test_grey_images(tmp_path: Path) -> None:
    words = (TINY, "--net", "test_resnet", "--out", tmp_path, "run.epochs=1", "model.kwargs.in_chans=1")
    assert "test accuracy" in run("baseline", *words).ok()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--net", "resnet_1"), "--net resnet_1"),
        (("--net", "test_vit3", "--small-images", "data.image_size=160"), "--small-images is for ResNets"),
        (("data.mixup=0.5",), "without mixup"),
        (("task=segmentation",), "for the classification of images"),
        (("--channels", "x"), "invalid int value"),
        (("--net", "vit_tiny_patch16_224"), "--net vit_tiny_patch16_224"),
        (("data.name=modelnet10",), "modelnet10 is of volumes"),
    ],
)
def test_bad_input(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    assert said in run("baseline", TINY, "--out", tmp_path / "out", *words).refusal()
    assert not (tmp_path / "out").exists()
