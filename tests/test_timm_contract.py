"""What timm's own tests ask of a model, in small; and, where the network allows it, these tests themselves."""

import copy
import os
import re
import subprocess
import sys
import tarfile
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import FeatureInfo, create_feature_extractor
from timm.models._features import FeatureGetterNet
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

import mdeq

ROOT = Path(__file__).resolve().parent.parent
MODELS = ["test_mdeq", "mdeq_tiny_cifar", "deq_tiny_cifar"]
SHORT: Mapping[str, Any] = dict(
    solver={"name": "broyden", "max_steps": 2},
    gradient={"name": "implicit", "solver": {"name": "broyden", "max_steps": 2}},
)


def create(name: str, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **SHORT, **kwargs)


def image(batch: int = 2, channels: int = 3, **kwargs: Any) -> Tensor:
    return torch.randn(batch, channels, 32, 32, **kwargs)


@pytest.mark.parametrize("name", MODELS)
def test_device_and_dtype_reach_every_tensor(name: str) -> None:
    model = create(name, device="meta", dtype=torch.float64)
    tensors = [*model.parameters(), *model.buffers()]
    assert all(t.is_meta for t in tensors)
    assert {t.dtype for t in tensors if t.is_floating_point()} == {torch.float64}
    x = image(device="meta", dtype=torch.float64)
    assert model(x).shape == (2, model.num_classes)
    for training in (False, True):
        model.train(training)
        model.reset_classifier(0)
        model.reset_classifier(2)
        assert all(p.is_meta and p.dtype == torch.float64 for p in model.get_classifier().parameters())
        assert all(module.training == training for module in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_width_before_the_classifier(name: str) -> None:
    """`head_hidden_size` follows pooling, classifier and pruning, whichever way they came about."""
    with torch.device("meta"):
        model = create(name, num_classes=0)
    x = image(device="meta")

    def check(num_classes: int) -> None:
        assert model.forward_head(model.forward_features(x), pre_logits=True).shape[1] == model.head_hidden_size
        assert model(x).shape == (2, num_classes or model.head_hidden_size)

    check(0)
    for pool in ("avg", "max", "catavgmax"):
        model.reset_classifier(7, pool)
        check(7)
    index = len(model.feature_info) - 2
    model.prune_intermediate_layers([index], prune_norm=True)
    model.reset_classifier(7, "avg")
    check(7)
    assert model.head_hidden_size == model.feature_info[index]["num_chs"]
    unpooled = create(name, num_classes=0, global_pool="", device="meta")
    assert unpooled(x).ndim == 4


@pytest.mark.parametrize("name", MODELS)
def test_intermediates_and_pruning(name: str) -> None:
    model = create(name).eval()
    x = image()
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    with torch.no_grad():
        final, taps = model.forward_intermediates(x)
        assert torch.equal(final, model.forward_features(x))
        assert [t.shape[1] for t in taps] == info.channels()
        assert [-(-32 // t.shape[2]) for t in taps] == info.reduction()
        last = len(taps) - 1
        assert torch.equal(model.forward_intermediates(x, stop_early=True)[0], final)  # nothing was stopped
        assert torch.equal(model.forward_intermediates(x, [0], stop_early=True)[0], taps[0])
        kept = copy.deepcopy(model)
        kept.prune_intermediate_layers([last], prune_head=False)
        assert torch.equal(kept(x), model(x))
        for i, tap in enumerate(taps):
            early = model.forward_intermediates(x, indices=[i], stop_early=True, intermediates_only=True)
            assert torch.equal(early[0], tap)
            pruned = copy.deepcopy(model)
            assert pruned.prune_intermediate_layers([i], prune_norm=True) == [i]
            assert torch.equal(pruned.forward_features(x), tap)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("feature_cls", ["getter", FeatureGetterNet])
def test_features_by_timms_own_getter(name: str, feature_cls: Any) -> None:
    model = timm.create_model(name, features_only=True, feature_cls=feature_cls, out_indices=(0, 2), **SHORT).train()
    maps = model(image())
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    sum(m.square().sum() for m in maps).backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", MODELS)
def test_weights_for_other_channels_and_classes(name: str, tmp_path: Path) -> None:
    """timm's path from a file to a model: the first layer adapted, another classifier left out, features alone."""
    model = create(name)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    source = dict(
        pretrained=True,
        pretrained_cfg_overlay=dict(file=str(tmp_path / "model.safetensors"), num_classes=model.num_classes),
    )
    own = model.state_dict()
    for channels, classes in ((1, 5), (1, 0), (5, model.num_classes)):
        loaded = create(name, in_chans=channels, num_classes=classes, **source)
        weights = loaded.state_dict()
        same = {key for key in own if key in weights and torch.equal(own[key], weights[key])}
        new = {"stem.conv1.weight", "classifier.weight"} - (
            {"classifier.weight"} if classes == model.num_classes else set()
        )
        assert set(weights) - same <= new | {"classifier.bias"}
        if channels == 1:
            torch.testing.assert_close(weights["stem.conv1.weight"], own["stem.conv1.weight"].sum(1, keepdim=True))
    features = create(name, features_only=True, **source).eval()
    x = image()
    with torch.no_grad():
        expected = model.eval().forward_intermediates(x, intermediates_only=True)
        for found, tap in zip(features(x), expected, strict=True):
            assert torch.equal(found, tap)


@pytest.mark.parametrize("name", MODELS)
def test_layer_decay(name: str) -> None:
    """Stem, equilibrium and head learn at rates that grow in this order; no parameter is forgotten."""
    model = create(name)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=1.0, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert set(scale) == {id(p) for p in model.parameters()}
    parts = (model.stem.conv1, model.equilibrium, model.head.bottlenecks, model.classifier)
    rates = [scale[id(next(part.parameters()))] for part in parts]
    assert rates == sorted(set(rates))
    assert rates[-1] == 1


@pytest.mark.parametrize("name", MODELS)
def test_traced_model_trains(name: str) -> None:
    model = create(name)
    x = image()
    output = create_feature_extractor(model.train(), ["classifier"])(x)["classifier"]
    output.square().mean().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", MODELS)
def test_copies(name: str) -> None:
    model = create(name).train()
    model(image()).sum().backward()
    again = copy.deepcopy(model).eval()
    x = image()
    assert torch.equal(again(x), model.eval()(x))
    with torch.no_grad():
        again.stem.conv1.weight.zero_()
    assert bool((model.stem.conv1.weight != 0).any())


def fetch_timms_tests(folder: Path) -> None:
    """Put timm's tests of models into a folder, from the source distribution of the version that is installed."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--retries", "1"]
    done = subprocess.run([*command, f"timm=={timm.__version__}"], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"timm's source distribution does not come: {(done.stderr or done.stdout).splitlines()[-1]}")
    with tarfile.open(next(folder.glob("timm-*.tar.gz"))) as archive:
        file = archive.extractfile(f"timm-{timm.__version__}/tests/test_models.py")
        (folder / "test_models.py").write_bytes(file.read())


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MODELS, "mdeq_small"])
def test_timms_own_tests(name: str, tmp_path: Path) -> None:
    fetch_timms_tests(tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "timm_plugin", "-p", "no:warnings", "test_models.py"]
    environment = {**os.environ, "MODELS": name, "PYTHONPATH": path}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 9  # forward, backward, cfg, features, intermediates (2), pruning, fx (2)


def test_models_of_other_packages_are_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs may come from a module of the same name."""

    def foreign_net(pretrained: bool = False, **kwargs: Any) -> None: ...

    monkeypatch.setattr(foreign_net, "__module__", "elsewhere.segmenter")
    monkeypatch.setitem(sys.modules, "elsewhere.segmenter", types.ModuleType("elsewhere.segmenter"))
    registry = timm.models._registry
    for name in ("_model_entrypoints", "_model_to_module", "_module_to_models", "_model_default_cfgs"):
        monkeypatch.setattr(registry, name, copy.deepcopy(getattr(registry, name)))
    timm.models.register_model(foreign_net)
    assert "foreign_net" in timm.list_models()
    assert "foreign_net" not in mdeq.list_models()
    assert mdeq.list_models(filter="*3d_tiny_seg") == ["mdeq3d_tiny_seg"]
