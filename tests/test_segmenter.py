"""Segmenters in 2D and 3D: sizes, the head by hand, the official counts, and what timm asks of a model."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from timm.models import create_feature_extractor, save_for_hf
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

import mdeq

KEYS = Path(__file__).parent / "data" / "segmenter_keys.json"
OFFICIAL_PARAMETERS = {"mdeq_small_seg": 8_968_467, "mdeq_large_seg": 55_955_859, "mdeq_xlarge_seg": 79_551_755}

dims = pytest.mark.parametrize("spatial_dims", [2, 3])


def small(spatial_dims: int = 2, **kwargs: Any) -> mdeq.MDEQSegmenter:
    """Return a segmenter with few channels whose solve is short."""
    settings = dict(in_chans=1, num_classes=5, channels=(4, 8), num_groups=2, expansion=2, spatial_dims=spatial_dims)
    settings |= dict(solver=mdeq.Broyden(max_steps=4), gradient=mdeq.ImplicitGradient(mdeq.Broyden(max_steps=4)))
    return mdeq.MDEQSegmenter(**(settings | kwargs))


def batch(*size: int, channels: int = 1, **kwargs: Any) -> Tensor:
    return torch.randn(2, channels, *size, **kwargs)


def test_registered() -> None:
    assert sorted(timm.list_models(module="segmenter")) == sorted([*OFFICIAL_PARAMETERS, "mdeq_tiny_seg"])


@pytest.mark.parametrize("name", [*OFFICIAL_PARAMETERS, "mdeq_tiny_seg"])
def test_parameters_and_cfg(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    count = sum(p.numel() for p in model.parameters())
    assert count == OFFICIAL_PARAMETERS[name] if name in OFFICIAL_PARAMETERS else count < 1_500_000
    cfg, keys = model.pretrained_cfg, set(model.state_dict())
    assert {f"{cfg['first_conv']}.weight", f"{cfg['classifier']}.weight"} <= keys
    assert (cfg["mean"], cfg["std"]) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    classes = 11 if cfg["tag"] == "camvid" else 19  # those of the released weights, where there are any
    assert cfg["num_classes"] == model.num_classes == classes
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 4
    assert {m.momentum for m in norms} == {0.01}
    model.deq.solver = mdeq.Broyden(max_steps=1)
    x = torch.empty(1, 3, 64, 96, device="meta")
    assert model(x).shape == (1, classes, 64, 96)
    assert model.forward_head(model.forward_features(x)).shape == (1, classes, 16, 24)


def test_official_limits() -> None:
    with torch.device("meta"):
        model = timm.create_model("mdeq_small_seg")
    assert (model.deq.solver.max_steps, model.deq.gradient.solver.max_steps) == (27, 30)
    assert (model.deq.solver.stop_mode, model.deq.gradient.solver.stop_mode) == ("abs", "abs")


def test_state_dict_keys_are_stable() -> None:
    """The names of a native checkpoint are a promise; a change here breaks every file that people have."""
    assert list(small().state_dict()) == json.loads(KEYS.read_text())


@pytest.mark.parametrize("size", [(16, 16), (17, 23), (16, 17, 18)])
@pytest.mark.parametrize("stem_stride", [1, 2, 4])
def test_logits_at_input_size(size: tuple[int, ...], stem_stride: int) -> None:
    model = small(len(size), stem_stride=stem_stride).eval()
    logits, equilibrium = model(batch(*size), return_equilibrium=True)
    assert logits.shape == (2, 5, *size)
    fine = tuple(-(-s // stem_stride) for s in size)
    assert model.forward_head(model.forward_features(batch(*size))).shape == (2, 5, *fine)
    assert [z.shape[2:] for z in equilibrium.state] == [fine, tuple(-(-s // 2) for s in fine)]


@dims
def test_head_by_hand(spatial_dims: int) -> None:
    """All branches at the finest resolution, side by side; corners are aligned here and in the last enlargement."""
    model = small(spatial_dims).double().eval()
    x = batch(*[18] * spatial_dims, dtype=torch.float64)
    logits, equilibrium = model(x, return_equilibrium=True)
    mode = {2: "bilinear", 3: "trilinear"}[spatial_dims]
    coarse = F.interpolate(equilibrium.state[1], size=equilibrium.state[0].shape[2:], mode=mode, align_corners=True)
    y = F.relu(model.head.norm(model.head.conv(torch.cat([equilibrium.state[0], coarse], 1))))
    low = model.classifier(y)
    assert torch.equal(model.forward_head(model.forward_features(x)), low)
    assert torch.equal(logits, F.interpolate(low, size=x.shape[2:], mode=mode, align_corners=True))
    corner = (..., *[0] * spatial_dims)
    torch.testing.assert_close(logits[corner], low[corner])


@dims
def test_every_parameter_gets_a_gradient(spatial_dims: int) -> None:
    model = small(spatial_dims).train()
    logits, equilibrium = model(batch(*[16] * spatial_dims), return_equilibrium=True, jacobian_probes=1)
    labels = torch.randint(5, (2, *[16] * spatial_dims))
    (F.cross_entropy(logits, labels) + equilibrium.jacobian_penalty).backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert len(equilibrium.backward_stats) == 1


@dims
def test_single_scale(spatial_dims: int) -> None:
    model = small(spatial_dims, channels=(8,)).eval()
    logits, equilibrium = model(batch(*[17] * spatial_dims), return_equilibrium=True)
    assert logits.shape == (2, 5, *[17] * spatial_dims)
    assert len(equilibrium.state) == 1


@pytest.mark.parametrize(("dims", "size"), [(2, (33, 40)), (3, (17, 24, 19))])
def test_labels_lie_alike_at_odd_and_even_sizes(dims: int, size: tuple[int, ...]) -> None:
    """An odd input gives what the same input gives with a last row of zeros, which the stem adds there anyway."""
    torch.manual_seed(0)
    model = small(dims).eval()
    x = batch(*size)
    even = F.pad(x, [k for n in reversed(size) for k in (0, n % 2)])
    with torch.no_grad():
        expected = model(even)[(..., *map(slice, size))]
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "stem_stride", "whole"),
    [((18, 21), 2, (20, 24)), ((17, 24, 19), 2, (20, 24, 20)), ((17, 17, 18), (1, 2, 4), (18, 20, 24))],
)
def test_padded_to_the_coarsest_stride(size: tuple[int, ...], stem_stride: Any, whole: tuple[int, ...]) -> None:
    """What the same input gives with zeros at its ends, cropped; by every way into the model."""
    model = small(len(size), stem_stride=stem_stride, pad_to_stride=True).eval()
    x = batch(*size)
    even = F.pad(x, [k for n, m in zip(reversed(size), reversed(whole)) for k in (0, m - n)])
    with torch.no_grad():
        logits, equilibrium = model(x, return_equilibrium=True)
        assert torch.equal(logits, model(even)[(..., *map(slice, size))])
        assert torch.equal(model.forward_features(x), model.forward_features(even))
        assert torch.equal(model.solve(x).state[1], equilibrium.state[1])
        maps = model.forward_intermediates(x, intermediates_only=True)
        assert torch.equal(maps[-1], equilibrium.state[1])
        warm = mdeq.WarmStart(model)  # a second solve of the same window starts where the first ended
        place = [slice(0, 1), slice(0, 1), *map(slice, [0] * len(size), size)]
        warm(x[:1], [place])
        seen = warm._start(x[:1], [place])
        assert torch.equal(seen[0], warm._seen[0][0][None])


def test_warm_start_solver_and_unroll() -> None:
    model = small().eval()
    x = batch(16, 16)
    solver = mdeq.Picard(max_steps=2, tol=0.0)
    _, first = model(x, return_equilibrium=True, solver=solver)
    assert first.stats.nfe == 3
    _, second = model(x, return_equilibrium=True, solver=solver, z0=first.state)
    assert (second.stats.trace[0] <= first.stats.residual * (1 + 1e-5)).all()
    _, unrolled = model(x, return_equilibrium=True, unroll=2)
    assert unrolled.stats is None


@dims
def test_features(spatial_dims: int) -> None:
    name = {2: "mdeq_tiny_seg", 3: "mdeq3d_tiny_seg"}[spatial_dims]
    model = timm.create_model(name, features_only=True)
    x = batch(*[32] * spatial_dims, channels={2: 3, 3: 1}[spatial_dims])
    maps, equilibrium = model(x, return_equilibrium=True, solver=mdeq.Broyden(max_steps=1))
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    assert [32 // m.shape[2] for m in maps] == model.feature_info.reduction()
    assert equilibrium.stats.nfe == 2
    assert not any(key.startswith(("model.head", "model.classifier")) for key in model.state_dict())


@dims
def test_classifier_can_be_replaced(spatial_dims: int) -> None:
    model = small(spatial_dims).eval()
    x = batch(*[16] * spatial_dims)
    assert model.get_classifier() is model.classifier
    model.reset_classifier(7)
    assert model(x).shape[1] == model.num_classes == 7
    assert float(model.classifier.weight.detach().std()) == pytest.approx(0.01, rel=0.5)
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(0)
    assert torch.equal(model.forward_head(model.forward_features(x)), features)
    assert model(x).shape == (2, model.num_features, *x.shape[2:])
    assert features.shape[1] == model.head_hidden_size == 12
    with pytest.raises(ValueError, match="no pooling, got global_pool='avg'"):
        model.reset_classifier(3, "avg")


@pytest.mark.parametrize("last", [0, 1, 2])
def test_pruned(last: int) -> None:
    """No parameter is left without a use."""
    model = small().train()
    assert model.prune_intermediate_layers([last]) == [last]
    out = model.forward_features(batch(16, 16))
    assert out.shape[1] == model.num_features == model.feature_info[last]["num_chs"]
    out.square().sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("stem_stride", [1, 2, 4, (4, 2)])
@pytest.mark.parametrize("last", [0, 1, 2])
def test_pruned_models_give_logits_of_the_whole_input(stem_stride: int | tuple[int, int], last: int) -> None:
    model = small(in_chans=3, stem_stride=stem_stride).eval()
    model.prune_intermediate_layers([last], prune_head=False)
    x = torch.randn(1, 3, 64, 48)
    other = x.clone()
    other[..., 40:, :] = 0  # what a magnified corner of the map would not see
    logits, changed = model(x), model(other)
    assert logits.shape == (1, 5, 64, 48)
    assert not torch.equal(logits[..., 32:, :], changed[..., 32:, :])
    assert torch.equal(logits[..., :16, :], changed[..., :16, :]) == (last < len(model.feature_info) - 2)


@pytest.mark.parametrize("gradient", [mdeq.ImplicitGradient(), mdeq.PhantomGradient(2)])
def test_gradient_checkpointing_changes_nothing(gradient: mdeq.GradientEstimator) -> None:
    model = small(3, gradient=gradient, dtype=torch.float64).train()
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    x = batch(16, 16, 16, dtype=torch.float64)
    for m in (model, other):
        m(x).square().sum().backward()
    for a, b in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


@dims
def test_bfloat16(spatial_dims: int) -> None:
    model = small(spatial_dims, dtype=torch.bfloat16).eval()
    logits, equilibrium = model(batch(*[16] * spatial_dims, dtype=torch.bfloat16), return_equilibrium=True)
    assert logits.dtype == torch.bfloat16
    assert equilibrium.stats.residual.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, equilibrium = small(spatial_dims)(batch(*[16] * spatial_dims), return_equilibrium=True)
    assert logits.shape == (2, 5, *[16] * spatial_dims)
    assert all(z.dtype == torch.float32 for z in equilibrium.state)


@dims
def test_fx(spatial_dims: int) -> None:
    model = small(spatial_dims).eval()
    x = batch(*[16] * spatial_dims)
    with torch.no_grad():
        low = create_feature_extractor(model, ["classifier"])(x)["classifier"]
        assert torch.equal(low, model.forward_head(model.forward_features(x)))


def test_layer_decay() -> None:
    groups = create_optimizer_v2(small(), "sgd", lr=0.1, layer_decay=0.5).param_groups
    assert len({group["lr_scale"] for group in groups}) == 4


def test_local_directory_round_trip(tmp_path: Path) -> None:
    settings = dict(channels=(8, 8), expansion=1, num_classes=4, solver=dict(name="broyden", max_steps=3))
    model = timm.create_model("mdeq_tiny_seg", **settings).eval()
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = batch(20, 24, channels=3)
    assert isinstance(again, mdeq.MDEQSegmenter)
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("solver", [mdeq.Broyden(max_steps=3), mdeq.Anderson(max_steps=3)])
def test_tensors_of_monai(spatial_dims: int, solver: mdeq.FixedPointSolver) -> None:
    """They go in and come out, with where they lie in space; what is computed is what plain ones give."""
    model = small(spatial_dims, solver=solver)
    x = batch(*(16, 20, 18)[:spatial_dims])
    known = MetaTensor(x, affine=torch.diag(torch.tensor([2.0, 1.0, 1.0, 1.0])))
    logits = model(known)
    logits.square().mean().backward()
    assert isinstance(logits, MetaTensor)
    assert torch.equal(logits.affine, known.affine)
    assert all(type(p.grad) is torch.Tensor for p in model.parameters() if p.grad is not None)
    model.eval()
    found, equilibrium = model(known, return_equilibrium=True)
    assert torch.equal(found.as_tensor(), model(x))
    assert all(type(z) is torch.Tensor for z in equilibrium.state)
    again = model(known, z0=tuple(MetaTensor(z) for z in equilibrium.state), return_equilibrium=True)[1]
    assert all(type(z) is torch.Tensor for z in again.state)
    warm = mdeq.WarmStart(model)
    warm(known[:1], [[slice(0, 1), slice(0, 1), *(slice(0, n) for n in x.shape[2:])]])
    assert all(type(z) is torch.Tensor for z in warm._seen[0])
    deq = mdeq.DEQ(solver, mdeq.ImplicitGradient())  # any f over such tensors
    assert deq(lambda z: (0.5 * z[0] + 1,), (MetaTensor(torch.zeros(2, 3)),)).state[0].shape == (2, 3)


def test_bad_input_is_named() -> None:
    model = small(3).eval()
    with pytest.raises(ValueError, match=r"expected a floating-point input, got torch\.uint8"):
        model(batch(16, 16, 16).byte())
    with pytest.raises(ValueError, match="in_chans must be >= 1, got 0"):
        small(3, in_chans=0)
    with pytest.raises(ValueError, match=r"every side of the input must be >= 16, got \(16, 15, 16\)"):
        model(batch(16, 15, 16))
    with pytest.raises(ValueError, match=r"expected an input of shape \(batch, 1, D, H, W\), got \(2, 1, 16, 16\)"):
        model(batch(16, 16))
    with pytest.raises(ValueError, match="stem_stride must be 1, 2 or 4, or a sequence of 3 of these, got 3"):
        small(3, stem_stride=3)
    with pytest.raises(TypeError, match="head_channels"):
        timm.create_model("mdeq_tiny_seg", head_channels=(3,))
