"""Models of volumes: sizes, channels, strides, and what they share with the models of images."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor, nn

import mdeq

KEYS = Path(__file__).parent / "data" / "test_mdeq3d_keys.json"
CLASSIFIERS = ["mdeq3d_small", "mdeq3d_tiny", "test_mdeq3d"]
SEGMENTERS = ["mdeq3d_small_seg", "mdeq3d_tiny_seg"]
LIMITS = {"mdeq3d_tiny": 300_000, "mdeq3d_tiny_seg": 300_000, "test_mdeq3d": 20_000}
ONE_STEP = dict(solver=mdeq.Broyden(max_steps=1), gradient=mdeq.ImplicitGradient(mdeq.Broyden(max_steps=1)))


def volume(*size: int, channels: int = 1, **kwargs: Any) -> Tensor:
    return torch.randn(2, channels, *size, **kwargs)


def test_registered() -> None:
    assert timm.list_models(module="volumes") == sorted([*CLASSIFIERS, *SEGMENTERS])
    assert set(mdeq.list_models()) == {n for m in ("mdeq", "segmenter", "volumes") for n in timm.list_models(module=m)}
    assert mdeq.list_models("*3d*seg") == SEGMENTERS
    assert sorted(mdeq.list_models(pretrained=True)) == timm.list_models("*deq*", pretrained=True)


@pytest.mark.parametrize("name", CLASSIFIERS + SEGMENTERS)
def test_parameters_and_cfg(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, **ONE_STEP)
    assert sum(p.numel() for p in model.parameters()) < LIMITS.get(name, 5_000_000)
    assert model.spatial_dims == 3
    cfg, keys = model.pretrained_cfg, set(model.state_dict())
    assert {f"{cfg['first_conv']}.weight", f"{cfg['classifier']}.weight"} <= keys
    assert len(cfg["input_size"]) == 3
    assert model.in_chans == cfg["input_size"][0] == len(cfg["mean"]) == len(cfg["std"]) == 1
    logits = model(torch.empty(2, 1, 16, 17, 18, device="meta"))
    assert logits.shape == (2, model.num_classes, *([16, 17, 18] if name in SEGMENTERS else []))


def test_state_dict_keys_are_stable() -> None:
    """The names of a native checkpoint are a promise; a change here breaks every file that people have."""
    assert list(timm.create_model("test_mdeq3d").state_dict()) == json.loads(KEYS.read_text())


@pytest.mark.parametrize("name", CLASSIFIERS + SEGMENTERS)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = timm.create_model(name, **ONE_STEP).train()
    model(volume(16, 18, 17)).square().sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("name", ["mdeq3d_tiny_seg", "test_mdeq3d"])
@pytest.mark.parametrize("in_chans", [1, 2, 3, 4])
def test_channels(name: str, in_chans: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Pretrained weights adapt as timm's do in 2D: summed for one channel, else repeated and scaled."""
    source = timm.create_model(name, in_chans=3)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    overlay = dict(file=str(tmp_path / "weights.safetensors"), input_size=(3, 16, 16))
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, in_chans=in_chans, **ONE_STEP)
    kernel, expected = source.stem.conv1.weight, model.stem.conv1.weight
    if in_chans == 1:
        torch.testing.assert_close(expected, kernel.sum(1, keepdim=True))
    else:
        torch.testing.assert_close(expected, torch.cat([kernel] * 2, 1)[:, :in_chans] * 3 / in_chans)
    assert model(volume(16, 16, 16, channels=in_chans)).shape[:2] == (2, model.num_classes)
    assert "Loading unchanged" not in caplog.text
    save_for_hf(timm.create_model(name, in_chans=in_chans), tmp_path / "saved", safe_serialization=True)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["pretrained_cfg"]["first_conv"] == "stem.conv1"


def test_anisotropic_stem() -> None:
    """Slices far apart: the stem keeps the depth."""
    model = timm.create_model("mdeq3d_tiny_seg", stem_stride=(1, 2, 2), **ONE_STEP).eval()
    logits, equilibrium = model(volume(16, 33, 20), return_equilibrium=True)
    assert logits.shape == (2, 3, 16, 33, 20)
    assert [z.shape[2:] for z in equilibrium.state] == [(16, 18, 10), (8, 9, 5)]  # padded to (16, 36, 20)
    maps = timm.create_model("mdeq3d_tiny", features_only=True, stem_stride=(1, 2, 2), **ONE_STEP)(volume(16, 16, 16))
    assert [m.shape[2:] for m in maps] == [(16, 8, 8), (16, 8, 8), (8, 4, 4)]


@pytest.mark.parametrize("name", ["mdeq3d_tiny", "mdeq3d_tiny_seg"])
def test_single_scale(name: str) -> None:
    args = dict(head_channels=(8,)) if name == "mdeq3d_tiny" else {}
    model = timm.create_model(name, channels=(16,), num_classes=2, **args, **ONE_STEP).eval()
    logits, equilibrium = model(volume(17, 16, 16), return_equilibrium=True)
    assert logits.shape[:2] == (2, 2)
    assert [tuple(z.shape) for z in equilibrium.state] == [(2, 16, 9, 8, 8)]


@pytest.mark.parametrize("name", ["mdeq3d_tiny_seg", "test_mdeq3d"])
def test_local_directory_round_trip(name: str, tmp_path: Path) -> None:
    args = dict(stem_stride=(1, 2, 2), in_chans=2, num_classes=4, solver=dict(name="picard", max_steps=2))
    model = timm.create_model(name, **args).eval()
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = volume(16, 16, 18, channels=2)
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("pool", ["avg", "max", "catavgmax"])
def test_pooling_is_over_all_axes(pool: str) -> None:
    model = timm.create_model("test_mdeq3d", global_pool=pool).eval()
    x = torch.randn(2, 16, 3, 4, 5)
    avg, largest = x.mean((2, 3, 4)), x.amax((2, 3, 4))
    expected = {"avg": avg, "max": largest, "catavgmax": torch.cat([avg, largest], 1)}[pool]
    torch.testing.assert_close(model.forward_head(x, pre_logits=True), expected)
    assert model.forward_head(x).shape == (2, 4)


def randomised(model: nn.Module) -> nn.Module:
    """Return a model in float64 and eval mode, every parameter and statistic of which matters."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, nn.GroupNorm | nn.modules.batchnorm._BatchNorm) and module.weight is not None:
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
    return model.double().eval()


def pair(kind: str, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """Return a 2D and a 3D model of the same settings, every weight of which matters."""
    settings = dict(in_chans=2, num_classes=3, channels=(4, 8, 4), num_groups=2, expansion=2, stem_stride=2) | kwargs
    if kind == "MDEQ":
        settings |= dict(head_channels=(2, 2, 2), num_features=6)
    make = getattr(mdeq, kind)
    return randomised(make(spatial_dims=2, **settings)), randomised(make(spatial_dims=3, **settings))


@pytest.mark.parametrize("kind", ["MDEQ", "MDEQSegmenter"])
@pytest.mark.parametrize("stem_stride", [1, 2, 4])
@pytest.mark.parametrize("weight_norm", [True, False])
def test_inflated_weights_give_the_answer_of_a_slice(kind: str, stem_stride: int, weight_norm: bool) -> None:
    """On a volume constant along depth, after the same applications of f; a solver weighs branches by their voxels."""
    flat, deep = pair(kind, stem_stride=stem_stride, weight_norm=weight_norm)
    deep.load_state_dict(mdeq.inflate(flat.state_dict(), deep))
    image = volume(16, 19, channels=2, dtype=torch.float64)
    with torch.no_grad():
        expected, equilibrium = flat(image, return_equilibrium=True, unroll=5)
        logits, solution = deep(image[:, :, None].expand(-1, -1, 17, -1, -1), return_equilibrium=True, unroll=5)
    if kind == "MDEQSegmenter":
        expected = expected[:, :, None].expand_as(logits)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
    for z, z_flat in zip(solution.state, equilibrium.state):
        torch.testing.assert_close(z, z_flat[:, :, None].expand_as(z), rtol=0, atol=1e-10)


def test_one_slice_is_an_image() -> None:
    """f on volumes of depth 1 whose kernels hold the 2D ones is f on images, bit for bit up to the order of sums."""
    flat, deep = pair("MDEQSegmenter")
    deep.load_state_dict(mdeq.inflate(flat.state_dict(), deep))
    injection = torch.randn(2, 4, 9, 7, dtype=torch.float64)
    state = tuple(torch.randn_like(z) for z in flat.equilibrium.cell.zero_state(injection))
    expected = flat.equilibrium.fn(injection)(state)
    got = deep.equilibrium.fn(injection.unsqueeze(2))(tuple(z.unsqueeze(2) for z in state))
    for a, b in zip(got, expected):
        torch.testing.assert_close(a.squeeze(2), b, rtol=0, atol=1e-12)
