"""Weights of one model as a start for another."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import mdeq
from tools.build import build_model
from tools.config import BadInput, ModelConfig

SHARED = ("stem.", "inject.", "equilibrium.")


def classifier(**kwargs: Any) -> mdeq.MDEQ:
    settings = dict(channels=(4, 8), head_channels=(2, 2), num_features=6, num_groups=2, expansion=2, num_classes=4)
    return mdeq.MDEQ(**(settings | kwargs))


def segmenter(**kwargs: Any) -> mdeq.MDEQSegmenter:
    return mdeq.MDEQSegmenter(**(dict(channels=(4, 8), num_groups=2, expansion=2, stem_stride=4) | kwargs))


def assert_report(report: mdeq.Transfer, source: nn.Module, model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    """Assert that a report is complete and true."""
    own, given = model.state_dict(), source.state_dict()
    assert sorted(report.taken + report.kept) == sorted(own)
    assert sorted(report.taken + report.unused) == sorted(given)
    assert all(torch.equal(own[name], before[name]) for name in report.kept)


@pytest.mark.parametrize(("source", "model"), [(classifier(), segmenter()), (segmenter(), classifier())])
def test_classifier_and_segmenter(source: nn.Module, model: nn.Module) -> None:
    """Stem, injection and equilibrium go over in both directions; the head stays."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = mdeq.transfer(source.state_dict(), model)
    assert_report(report, source, model, before)
    assert set(report.taken) == {name for name in before if name.startswith(SHARED)}
    assert all(name.startswith(("head.", "classifier.")) for name in report.kept + report.unused)
    x = torch.randn(1, 3, 20, 24)
    for a, b in zip(model.eval().solve(x).state, source.eval().solve(x).state):
        assert torch.equal(a, b)


def test_registered_models() -> None:
    with torch.device("meta"):
        source, model = timm.create_model("mdeq_small").state_dict(), timm.create_model("mdeq_small_seg").state_dict()
    shared = {name: value.shape for name, value in source.items() if name.startswith(SHARED)}
    assert shared == {name: value.shape for name, value in model.items() if name.startswith(SHARED)}


def test_images_to_volumes() -> None:
    """A 2D classifier of three channels starts a 3D segmenter of one."""
    source, model = classifier(), segmenter(spatial_dims=3, in_chans=1)
    report = mdeq.transfer(source.state_dict(), model)
    assert set(report.taken) == {name for name in model.state_dict() if name.startswith(SHARED)}
    kernel = model.stem.conv1.weight
    torch.testing.assert_close(kernel[:, :, 1], source.stem.conv1.weight.sum(1, keepdim=True))
    assert not kernel[:, :, [0, 2]].any()


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize(("given", "wanted"), [(1, 3), (3, 2), (4, 1), (2, 4)])
def test_other_channels(spatial_dims: int, given: int, wanted: int) -> None:
    """Inputs whose channels are all equal to the mean of the old ones' give what they gave, where one divides."""
    source, model = (segmenter(spatial_dims=spatial_dims, in_chans=n).double().eval() for n in (given, wanted))
    report = mdeq.transfer(source.state_dict(), model)
    assert (report.kept, report.unused) == ((), ())
    x = torch.randn(1, 1, *[16] * spatial_dims, dtype=torch.float64)
    if 1 in (given, wanted):
        a, b = (m.stem(x.expand(-1, n, *x.shape[2:])) for m, n in ((source, given), (model, wanted)))
        torch.testing.assert_close(a, b)


def test_the_same_model_with_other_classes() -> None:
    model = segmenter(num_classes=2)
    report = mdeq.transfer(segmenter(num_classes=5).state_dict(), model)
    assert report.kept == report.unused == ("classifier.weight", "classifier.bias")


@pytest.mark.parametrize("args", [dict(channels=(4, 4)), dict(channels=(4,)), dict(post_norm_affine=False)])
def test_another_equilibrium_is_refused(args: dict[str, Any]) -> None:
    model = segmenter()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"stem or the equilibrium do not fit, such as equilibrium\.cell"):
        mdeq.transfer(segmenter(**args).state_dict(), model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_volumes_do_not_start_images() -> None:
    with pytest.raises(ValueError, match=r"do not fit, such as stem\.conv1\.weight"):
        mdeq.transfer(segmenter(spatial_dims=3).state_dict(), segmenter())


def test_fine_tuning_from_another_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A classifier's checkpoint starts a segmenter of volumes in training, and nothing else."""
    settings = dict(channels=[8, 8], num_groups=2, expansion=1, stem_stride=2, post_norm_affine=False)
    source = timm.create_model("mdeq_tiny_cifar", **settings)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    config = ModelConfig("mdeq3d_tiny_seg", kwargs=settings, checkpoint=str(tmp_path / "weights.safetensors"))
    model = build_model(config, 2, for_training=True)
    assert torch.equal(model.stem.conv2.weight[:, :, 1], source.stem.conv2.weight)
    line = capsys.readouterr().out
    assert "head.conv.weight" in line
    assert "not loaded" in line
    with pytest.raises(BadInput, match=r"does not fit the model: missing tensors \(6\), such as head\.conv\.weight"):
        build_model(config, 2, for_training=False)
    other = ModelConfig("mdeq_tiny_seg", kwargs={"channels": [8, 16]}, checkpoint=config.checkpoint)
    with pytest.raises(BadInput, match=r"cannot initialise this model: .* do not fit"):
        build_model(other, 2, for_training=True)


def test_old_files_without_counts_of_batches() -> None:
    source, model = timm.create_model("test_mdeq"), timm.create_model("test_mdeq")
    weights = {key: w for key, w in source.state_dict().items() if not key.endswith("num_batches_tracked")}
    done = mdeq.transfer(weights, model)
    assert {name.rpartition(".")[2] for name in done.kept} == {"num_batches_tracked"}
    torch.testing.assert_close(model.stem.conv1.weight, source.stem.conv1.weight)
