"""Official checkpoints of every layout through timm's ordinary path; what does not fit says so."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mdeq
from mdeq.models.fit import match_weight_norm
from mdeq.models.official import checkpoint_filter_fn, identify_checkpoint
from tests import official
from tests.official_network import Official
from tools.build import build_model
from tools.checkpoint import export
from tools.config import BadInput, ModelConfig

AFFINE, PLAIN = dict(post_norm_affine=True), dict(post_norm_affine=False)
WIDE = dict(head_channels=(28, 56, 112, 224))
LAYOUT = {"old_mdeq": "older locuslab/mdeq", "torchdeq": "TorchDEQ"}
# Table -> the model whose defaults it is nearest to, and the arguments that differ.
EXPECTED: dict[str, tuple[str, dict[str, Any]]] = {
    "cifar_TINY": ("mdeq_tiny_cifar", {}),
    "cifar_LARGE": ("mdeq_large_cifar", {}),
    "cifar_LARGE_reg": ("mdeq_large_cifar", {}),
    "imagenet_SMALL": ("mdeq_small", {}),
    "imagenet_SMALL_reg": ("mdeq_small", PLAIN | WIDE),
    "imagenet_LARGE": ("mdeq_large", {}),
    "imagenet_LARGE_reg": ("mdeq_large", PLAIN),
    "imagenet_XL": ("mdeq_xlarge", {}),
    "old_mdeq/cifar_TINY": ("mdeq_tiny_cifar", AFFINE),
    "old_mdeq/cifar_LARGE": ("mdeq_large_cifar", AFFINE),
    "old_mdeq/imagenet_SMALL": ("mdeq_small", {}),
    "old_mdeq/imagenet_LARGE": ("mdeq_xlarge", {}),  # the older LARGE is today's XL
    "old_mdeq/imagenet_XL": ("mdeq_xlarge", {}),
    "torchdeq/cifar_TINY": ("mdeq_tiny_cifar", AFFINE),
    "torchdeq/cifar_LARGE": ("mdeq_large_cifar", AFFINE),
    "torchdeq/imagenet_SMALL": ("mdeq_small", {}),
    "cityscapes_SMALL": ("mdeq_small_seg", {}),
    "cityscapes_LARGE": ("mdeq_large_seg", {}),
    "cityscapes_XL": ("mdeq_xlarge_seg", {}),
    "old_mdeq/cityscapes_SMALL": ("mdeq_small_seg", {}),
    "old_mdeq/cityscapes_LARGE": ("mdeq_large_seg", {}),
    "old_mdeq/cityscapes_XL": ("mdeq_xlarge_seg", {}),
}


def load(name: str, weights: dict[str, Tensor], **kwargs: Any) -> nn.Module:
    """Return a model with weights through timm's ordinary path; `overlay` says what the weights are of."""
    overlay = dict(state_dict=weights) | kwargs.pop("overlay", {})
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


def small(**kwargs: Any) -> dict[str, Tensor]:
    """Return native weights of the smallest model."""
    return timm.create_model("test_mdeq", **kwargs).state_dict()


# -- every configuration of every code line


@pytest.mark.parametrize("name", official.TABLES)
def test_every_table(name: str) -> None:
    """Layout, model and arguments are found from keys and shapes; with them nothing is missing or left over."""
    weights = official.random_weights(name, "meta")
    layout, model_name, args = identify_checkpoint(weights)
    assert layout == LAYOUT.get(name.split("/")[0] if "/" in name else "", "MDEQ-Vision")
    assert (model_name, args) == EXPECTED[name]
    model = load(model_name, weights, device="meta", **args)
    parameters = sum(p.numel() for p in model.parameters())
    # TorchDEQ has lengths for fusion convolutions too (CIFAR), or none after fusion (ImageNet).
    lengths = {"torchdeq/cifar_TINY": 48, "torchdeq/cifar_LARGE": 1600, "torchdeq/imagenet_SMALL": -480}
    assert parameters == official.table(name)[1] - lengths.get(name, 0)
    converted = checkpoint_filter_fn(weights, model)
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in model.state_dict().items()}


NUMBERS = ["torchdeq/cifar_LARGE", "imagenet_SMALL_reg", "cityscapes_SMALL"]
MORE_NUMBERS = [name for name in EXPECTED if name not in NUMBERS]


@pytest.mark.parametrize("name", [*NUMBERS, *(pytest.param(n, marks=pytest.mark.slow) for n in MORE_NUMBERS)])
def test_numbers_of_every_configuration(name: str) -> None:
    """Random weights of every configuration give the scores that ARCHITECTURE's formulas give, in float64."""
    weights = {k: v.double() if v.is_floating_point() else v for k, v in official.random_weights(name).items()}
    model_name, args = EXPECTED[name]
    model = load(model_name, weights, dtype=torch.float64, **args).eval()
    side, stride = (16, 1) if "cifar" in name else (64, 4)
    x = torch.randn(1, 3, side, side, dtype=torch.float64)
    bare = {re.sub(r"^(module|model)\.", "", k): v for k, v in weights.items()}
    network = Official(bare, stride=stride, cell="full_stage" if "torchdeq" in name else "fullstage")
    with torch.no_grad():
        if "cityscapes" in name:
            scores = F.interpolate(network.segment(x, 2), size=(64, 64), mode="bilinear", align_corners=True)
        else:
            scores = network.classify(x, 2)
        torch.testing.assert_close(model(x, unroll=2), scores, rtol=1e-9, atol=1e-9)


# -- numbers of the official code, in every layout

RELAYOUT = {
    "MDEQ-Vision": (lambda w: w, {}),
    "older": (official.older, AFFINE),
    "TorchDEQ CIFAR": (official.torchdeq_cifar, AFFINE),
    "TorchDEQ ImageNet": (official.torchdeq_imagenet, AFFINE),
    "merged": (official.plain, {}),
    "into a model without weight norm": (lambda w: w, dict(weight_norm=False)),
}


@pytest.mark.parametrize("layout", RELAYOUT)
def test_official_numbers_in_every_layout(layout: str) -> None:
    change, args = RELAYOUT[layout]
    weights = {k: v.double() if v.is_floating_point() else v for k, v in official.official_weights().items()}
    model = load("mdeq_tiny_cifar", change(weights), dropout=0.0, dtype=torch.float64, **args)
    case = load_file(official.DATA / "official_cifar_tiny_case.safetensors")
    with torch.no_grad():
        logits = model.eval()(case["input"].double(), unroll=10)
    assert float((logits - case["unrolled.logits"]).norm() / case["unrolled.logits"].norm()) < 1e-11


def write_pickle(content: Any, path: Path) -> None:
    torch.save(content, path)


def write_old_pickle(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


FILES = {
    "released.safetensors": (lambda w: w, save_file),
    "released.pkl": (lambda w: w, write_old_pickle),
    "final.pth": (lambda w: w, write_pickle),
    "resumable.pth.tar": (
        lambda w: dict(epoch=3, best_acc1=torch.tensor(75.7), optimizer=dict(state={}), state_dict=w),
        write_pickle,
    ),
    "parallel.pth": (lambda w: {f"module.model.{k}": v for k, v in w.items()}, write_pickle),
    "with_loss.pkl": (
        lambda w: {"loss.criterion.weight": torch.ones(19)} | {f"model.{k}": v for k, v in w.items()},
        write_old_pickle,
    ),
}


@pytest.mark.parametrize("file", FILES)
def test_files(tmp_path: Path, file: str) -> None:
    """Every kind of file gives the same weights, through `file=`."""
    wrap, write = FILES[file]
    write(wrap(official.official_weights()), tmp_path / file)
    model = timm.create_model(
        "mdeq_tiny_cifar",
        pretrained=True,
        pretrained_cfg_overlay=dict(file=str(tmp_path / file), num_classes=10),
        num_classes=10,
    )
    expected = official.official_model(torch.float32).state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key


def test_a_kernel_of_zeros_stays_one() -> None:
    """A plain kernel has a direction even where its length is zero, else the division gives NaN."""
    weights = official.plain(official.official_weights())
    key = "fullstage.post_fuse_layers.0.conv.weight"
    weights[key][3] = 0
    model = load("mdeq_tiny_cifar", weights)
    torch.testing.assert_close(model.equilibrium.cell.post_fuse[0].conv.weight.detach(), weights[key])


# -- other classes, other channels


def test_another_number_of_classes() -> None:
    """As in timm: the classifier starts afresh where the file is said to have another number, else it is an error."""
    weights = official.official_weights()
    model = load("mdeq_tiny_cifar", weights, num_classes=7)
    assert model.classifier.weight.shape == (7, 200)
    assert torch.equal(model.stem.conv1.weight, weights["downsample.0.weight"])
    assert load("mdeq_tiny_cifar", weights, num_classes=0).get_classifier().__class__ is nn.Identity
    assert load("mdeq_tiny_cifar", weights, num_classes=7, overlay=dict(num_classes=-1)).num_classes == 7
    weights["classifier.weight"], weights["classifier.bias"] = torch.ones(4, 200), torch.ones(4)
    assert load("mdeq_tiny_cifar", weights, num_classes=4, overlay=dict(num_classes=4)).classifier.bias.sum() == 4
    with pytest.raises(
        ValueError, match=r"has 4 classes, the model 10; pass pretrained_cfg_overlay=dict\(num_classes=4"
    ):
        load("mdeq_tiny_cifar", weights)


@pytest.mark.parametrize("in_chans", [1, 2, 5])
def test_another_number_of_channels(in_chans: int) -> None:
    """timm's rule: one channel gets the sum, several get scaled copies."""
    weights = official.official_weights()
    kernel = weights["downsample.0.weight"]
    own = load("mdeq_tiny_cifar", weights, in_chans=in_chans).stem.conv1.weight.detach()
    expected = kernel.sum(1, keepdim=True) if in_chans == 1 else kernel[:, [0, 1, 2, 0, 1][:in_chans]] * 3 / in_chans
    torch.testing.assert_close(own, expected)


@pytest.mark.parametrize("in_chans", [1, 2, 4])
def test_another_number_of_channels_in_3d(in_chans: int) -> None:
    """timm adapts 2D kernels alone; the same rule holds for volumes, here from one channel to several."""
    build = dict(spatial_dims=3, num_classes=2, channels=(8, 8), head_channels=(2, 2), num_features=8, expansion=1)
    weights = mdeq.MDEQ(in_chans=1, **build).state_dict()
    model = mdeq.MDEQ(in_chans=in_chans, **build)
    model.load_state_dict(checkpoint_filter_fn(weights, model), strict=True)
    expected = weights["stem.conv1.weight"].repeat(1, in_chans, 1, 1, 1) / in_chans
    torch.testing.assert_close(model.stem.conv1.weight.detach(), expected)


def test_features_only() -> None:
    features = load("mdeq_tiny_cifar", official.official_weights(), features_only=True).state_dict()
    assert torch.equal(features["model.stem.conv1.weight"], official.official_weights()["downsample.0.weight"])
    # Its own weights, which have a prefix and no head, load again.
    again = load("mdeq_tiny_cifar", features, features_only=True).state_dict()
    assert all(torch.equal(again[key], value) for key, value in features.items())


# -- native checkpoints


def test_native_weights_pass_untouched() -> None:
    weights = small()
    assert checkpoint_filter_fn(weights, timm.create_model("test_mdeq")) is weights
    headless = {k: v for k, v in weights.items() if not k.startswith(("head.", "classifier."))}
    assert checkpoint_filter_fn(headless, timm.create_model("test_mdeq")) is headless
    assert checkpoint_filter_fn(weights, timm.create_model("test_mdeq", num_classes=3)) is weights


def test_native_weights_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"\(native layout\) does not fit mdeq_tiny_cifar: it fits test_mdeq; "):
        load("mdeq_tiny_cifar", small())
    with pytest.raises(ValueError, match="does not fit test_mdeq as it is built: pass weight_norm=False; missing"):
        load("test_mdeq", small(weight_norm=False))


# -- what does not fit

MISFITS = {
    "old_mdeq/cifar_TINY": ("mdeq_tiny_cifar", " as it is built: pass post_norm_affine=True; unexpected tensors (4):"),
    "torchdeq/cifar_LARGE": (
        "mdeq_large_cifar",
        " as it is built: pass post_norm_affine=True; unexpected tensors (8):",
    ),
    "imagenet_SMALL_reg": (
        "mdeq_small",
        " as it is built: pass post_norm_affine=False, head_channels=(28, 56, 112, 224); missing tensors (8):",
    ),
    "imagenet_LARGE_reg": ("mdeq_large", " as it is built: pass post_norm_affine=False; missing tensors (8):"),
    "old_mdeq/imagenet_LARGE": ("mdeq_large", ": it fits mdeq_xlarge; tensors of another shape"),
    "cifar_LARGE": ("mdeq_small", ": it fits mdeq_large_cifar; missing tensors (8):"),
    "imagenet_SMALL": ("mdeq_small_seg", ": it fits mdeq_small; missing tensors (6):"),
    "old_mdeq/cityscapes_SMALL": ("mdeq_small", ": it fits mdeq_small_seg; missing tensors (80):"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_would_fit_is_named(name: str) -> None:
    model_name, message = MISFITS[name]
    weights = official.random_weights(name, "meta")
    classes = 10 if "cifar" in name else 19 if "cityscapes" in name else 1000
    with pytest.raises(ValueError, match=re.escape(f"does not fit {model_name}{message}")):
        load(model_name, weights, device="meta", overlay=dict(num_classes=classes), num_classes=classes)


def test_expansion_is_named() -> None:
    weights = timm.create_model("mdeq_tiny_cifar", expansion=4).state_dict()
    with pytest.raises(ValueError, match="does not fit mdeq_tiny_cifar as it is built: pass expansion=4;"):
        load("mdeq_tiny_cifar", weights)


def test_without_a_name_the_nearest_model_is_told() -> None:
    with pytest.raises(ValueError, match="the checkpoint fits mdeq_tiny_cifar with expansion=4; name that model"):
        identify_checkpoint(timm.create_model("mdeq_tiny_cifar", expansion=4).state_dict())
    weights = official.official_weights()
    del weights["fullstage.branches.1.blocks.0.gn2.bias"]
    nearest = (
        r"the checkpoint fits none of the models, mdeq_tiny_cifar is nearest; missing tensors \(1\): "
        "equilibrium.cell.blocks.1.norm2.bias$"
    )
    with pytest.raises(ValueError, match=nearest):
        identify_checkpoint(weights)


def test_one_tensor_under_two_names_is_refused() -> None:
    one = torch.ones(1)
    with pytest.raises(ValueError, match="twice, under prefixes"):
        identify_checkpoint({"module.stem.conv1.weight": one, "stem.conv1.weight": one})


def test_a_kernel_in_both_forms_is_refused() -> None:
    weights = official.official_weights()
    name = "fullstage.branches.0.blocks.0.conv1.weight"
    for first, second in (([name], []), ([], [name])):  # whichever comes first in the file
        both = {**{key: torch.ones(1) for key in first}, **weights, **{key: torch.ones(1) for key in second}}
        for kwargs in ({}, dict(weight_norm=False)):
            with pytest.raises(ValueError, match=r"has the kernel .* twice, plain"):
                load("mdeq_tiny_cifar", both, **kwargs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_of_few_bits_lose_none_on_the_way(dtype: torch.dtype) -> None:
    """Their length and direction are computed and kept in float32."""
    plain = {key: value.to(dtype) for key, value in small(weight_norm=False).items() if value.is_floating_point()}
    own = timm.create_model("test_mdeq")
    taken_apart = match_weight_norm(plain, own.state_dict().keys())
    own.load_state_dict(taken_apart, strict=False)
    together = match_weight_norm(taken_apart, plain.keys())
    for name, module in own.named_modules():
        key = f"{name}.weight"
        if hasattr(module, "parametrizations"):
            assert relative(module.weight, plain[key]) < 1e-6
            assert relative(together[key], plain[key]) < 1e-6


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.double()).norm() / b.double().norm())


def test_exactly_what_is_missing_or_left_over_is_named() -> None:
    weights = official.official_weights()
    weights.pop("fullstage.branches.1.blocks.0.gn2.bias")
    weights["final_layer.1.weight"] = torch.ones(3)
    weights["fullstage.branches.2.extra"] = torch.ones(1)
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared
        load("mdeq_tiny_cifar", weights)
    assert str(error.value) == (
        "the checkpoint (MDEQ-Vision layout) does not fit mdeq_tiny_cifar; "
        "missing tensors (1): equilibrium.cell.blocks.1.norm2.bias; "
        "unexpected tensors (1): fullstage.branches.2.extra; "
        "tensors of another shape (1): head.final.1.weight (3,) instead of (200,)"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "it has no weights of an implicit layer; its keys are none at all"),
        ({"conv1.weight": torch.ones(1)}, "it has no weights of an implicit layer; its keys are conv1.weight"),
        ({"epoch": 3, "fullstage.x": torch.ones(1)}, "the checkpoint's entry 'epoch' is of type int, not a tensor"),
        ({3: torch.ones(1)}, "the checkpoint's entry 3 has no name"),
        (
            {"stem.a": torch.ones(1), "module.stem.a": torch.ones(1)},
            "twice, under prefixes such as that of stem.a",
        ),
    ],
)
def test_no_checkpoint_of_an_mdeq(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checkpoint_filter_fn(content, timm.create_model("test_mdeq"))


# -- config.json from outside


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that `local-dir:` loads."""
    path = tmp_path_factory.mktemp("local")
    export(timm.create_model("test_mdeq"), path)
    return path


DESCRIPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "another model": (dict(architecture="mdeq_tiny_cifar"), "does not fit mdeq_tiny_cifar: it fits test_mdeq"),
    "infinite": (dict(model_args=dict(expansion=float("inf"))), "cannot convert float infinity to integer"),
    "negative": (dict(model_args=dict(channels=[-8] * 4)), "negative dimension"),
    "a nested list": (dict(model_args=dict(stem_stride=[[1]])), "stem_stride must be 1, 2 or 4"),
}


@pytest.mark.parametrize("case", DESCRIPTIONS)
def test_descriptions_from_outside(folder: Path, tmp_path: Path, case: str) -> None:
    """One line; tests/test_hub.py has more of them."""
    entries, message = DESCRIPTIONS[case]
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **entries}))
    with pytest.raises(BadInput, match=re.escape(message)) as error:
        build_model(ModelConfig(name=f"local-dir:{tmp_path}", pretrained=True), None, for_training=False)
    assert "\n" not in str(error.value)


def test_a_folder_takes_arguments_of_the_caller(folder: Path) -> None:
    """The folder loads, with arguments of the caller, and a misspelt one is the caller's error."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=3, device="cpu")
    assert torch.equal(model.stem.conv1.weight, load_file(folder / "model.safetensors")["stem.conv1.weight"])
    with pytest.raises(TypeError, match="'chanels'"):
        timm.create_model(f"local-dir:{folder}", pretrained=True, chanels=(8,))
