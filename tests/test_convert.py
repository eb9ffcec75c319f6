"""tools/convert.py: a released file in, a folder that timm loads out, or one line that says why not."""

import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers import run
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mdeq
import tools.convert
from tests import official
from tools.checkpoint import export, load_weights
from tools.config import BadInput
from tools.pretrained import load_checkpoint, load_trained


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """An official CIFAR TINY as the older code would have saved it, before PyTorch's zip format."""
    path = tmp_path / "released.pkl"
    torch.save(official.older(official.official_weights()), path, _use_new_zipfile_serialization=False)
    return path


def local(folder: Path) -> nn.Module:
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def assert_same(a: nn.Module, b: nn.Module) -> None:
    other = b.state_dict()
    assert all(torch.equal(value, other[key]) for key, value in a.state_dict().items())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(a.eval()(x), b.eval()(x))


def test_a_released_file(tmp_path: Path, released: Path) -> None:
    """Model and arguments are found; the folder gives what the ordinary path gives, bit for bit."""
    out = tmp_path / "new" / "folder"
    said = run("convert", released, "--out", out).ok()
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in out.parent.iterdir()] == ["folder"]
    assert "parameters: 158,986" in said
    assert hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest() in said
    config = json.loads((out / "config.json").read_text())
    assert config["architecture"] == "mdeq_tiny_cifar"
    assert config["model_args"]["post_norm_affine"] is True
    assert "num_classes" not in config["model_args"]  # transformers would pass it twice
    cfg = config["pretrained_cfg"]
    assert (cfg["tag"], cfg["license"]) == ("locuslab", "mit")
    assert (config["num_classes"], cfg["num_classes"], cfg["mean"]) == (10, 10, [0.4914, 0.4822, 0.4465])
    assert str(tmp_path) not in (out / "config.json").read_text()
    overlay = dict(file=str(released))
    direct = timm.create_model(
        "mdeq_tiny_cifar", pretrained=True, pretrained_cfg_overlay=overlay, post_norm_affine=True
    )
    assert_same(local(out), direct)
    # Fine-tuning from the folder: another classifier, other channels.
    assert timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=3, in_chans=1).num_classes == 3


def test_model_tag_and_classes(tmp_path: Path) -> None:
    weights = official.official_weights()
    weights |= {
        "classifier.weight": weights["classifier.weight"][:4],
        "classifier.bias": weights["classifier.bias"][:4],
    }
    save_file(weights, tmp_path / "released.safetensors")
    words = ("--model", "mdeq_tiny_cifar", "--tag", "mine_4")
    run("convert", tmp_path / "released.safetensors", "--out", tmp_path / "out", *words).ok()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pretrained_cfg"]["tag"] == "mine_4"
    model = local(tmp_path / "out")
    assert model.num_classes == 4
    assert torch.equal(model.classifier.weight, weights["classifier.weight"])


def test_a_folder_of_a_run(tmp_path: Path) -> None:
    """Native weights with their config.json, which says what shapes cannot."""
    model = timm.create_model("test_mdeq", num_groups=4, stem_stride=1, num_classes=3)
    (tmp_path / "run").mkdir()
    export(model, tmp_path / "run")
    run("convert", tmp_path / "run", "--out", tmp_path / "out", "--tag", "again").ok()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["pretrained_cfg"]["tag"], config["pretrained_cfg"]["license"]) == ("again", "apache-2.0")
    assert_same(local(tmp_path / "out"), model)


@pytest.mark.parametrize("name", ["checkpoint.pt", "best.safetensors"])
def test_a_file_in_the_folder_of_a_run(tmp_path: Path, name: str) -> None:
    """Its config.json says what shapes cannot, as for the whole folder."""
    solver = {"name": "anderson", "max_steps": 3, "tol": 0.1}
    model = timm.create_model("test_mdeq", num_groups=4, solver=solver, num_classes=3)
    source = tmp_path / "run"
    source.mkdir()
    told = {"label_names": ["a", "b", "c"], "label_descriptions": {"a": "an ant"}, "label_colors": [[0, 1, 2]] * 3}
    export(model, source, told)
    (source / "config.yaml").write_text("model: {name: test_mdeq}\n")
    if name == "checkpoint.pt":
        torch.save({"model": model.state_dict()}, source / name)
    else:
        (source / "model.safetensors").rename(source / name)
    run("convert", source / name, "--bf16", "--out", tmp_path / "out").ok()
    again = local(tmp_path / "out")
    assert (again.deq.solver, again.equilibrium.cell.blocks[0].norm1.num_groups) == (mdeq.build_solver(solver), 4)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: config[key] for key in told} == told
    assert (tmp_path / "out" / "config.yaml").is_file()
    assert torch.equal(again.classifier.weight, model.classifier.weight.bfloat16().float())


def test_weights_of_a_run_in_bfloat16(tmp_path: Path) -> None:
    """Half the size, rounded to the nearest, and still a run that can be evaluated."""
    model = timm.create_model("test_mdeq", num_classes=3)
    source = tmp_path / "run"
    source.mkdir()
    export(model, source, {"label_names": ["a", "b", "c"]})
    (source / "config.yaml").write_text("model: {name: test_mdeq}\n")
    run("convert", source, "--bf16", "--out", tmp_path / "out").ok()
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert all(torch.equal(after[key], value.bfloat16()) for key, value in before.items() if value.is_floating_point())
    assert (tmp_path / "out" / "config.yaml").read_text() == (source / "config.yaml").read_text()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["label_names"] == ["a", "b", "c"]
    again = local(tmp_path / "out")
    assert again.classifier.weight.dtype == torch.float32
    assert torch.equal(again.classifier.weight, model.classifier.weight.bfloat16().float())


def test_rescaled_weights_of_a_run(tmp_path: Path) -> None:
    """Kernels of the default length, the same logits, and still a run that can be evaluated."""
    model = timm.create_model("test_mdeq", num_classes=3).eval()
    with torch.no_grad():
        model.stem.conv1.weight.mul_(30)
        logits = model(x := torch.randn(2, 3, 32, 32))
    source = tmp_path / "run"
    source.mkdir()
    export(model, source)
    (source / "config.yaml").write_text("model: {name: test_mdeq}\n")
    run("convert", source, "--rescale", "--out", tmp_path / "out").ok()
    again = local(tmp_path / "out")
    assert again.stem.conv1.weight.flatten(1).norm(dim=1).square().mean().sqrt().item() == pytest.approx(3**-0.5)
    with torch.no_grad():
        assert torch.allclose(again(x), logits, atol=1e-3)
    assert (tmp_path / "out" / "config.yaml").is_file()


def test_native_weights_alone(tmp_path: Path) -> None:
    model = timm.create_model("test_mdeq", weight_norm=False, num_classes=0)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    assert "test_mdeq" in run("convert", tmp_path / "weights.safetensors", "--out", tmp_path / "out").ok()
    assert_same(local(tmp_path / "out"), model)


def test_inflate(tmp_path: Path) -> None:
    """The folder holds a 3D model: of a volume constant along depth it makes what the 2D one makes of a slice."""
    model = timm.create_model("test_mdeq", num_classes=3).eval()
    (tmp_path / "run").mkdir()
    export(model, tmp_path / "run")
    run("convert", tmp_path / "run", "--out", tmp_path / "out", "--inflate").ok()
    volumes = local(tmp_path / "out")
    assert (volumes.spatial_dims, volumes.num_classes) == (3, 3)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        flat, deep = model(x, unroll=4), volumes(x[:, :, None].expand(1, 3, 32, 32, 32), unroll=4)
    torch.testing.assert_close(flat, deep, rtol=1e-4, atol=1e-5)
    assert "already 3D" in run("convert", tmp_path / "out", "--out", tmp_path / "again", "--inflate").refusal()


def test_training_and_validation_read_a_released_file(tmp_path: Path, released: Path) -> None:
    """`model.checkpoint` and `--checkpoint` go through the same function."""
    model = timm.create_model("mdeq_tiny_cifar", post_norm_affine=True)
    assert load_weights(model, released, classifier="classifier", new_classifier=False) == []
    assert torch.equal(model.stem.conv1.weight, official.official_weights()["downsample.0.weight"])
    with pytest.raises(BadInput, match="does not fit the model"):
        load_weights(timm.create_model("mdeq_tiny_cifar"), released, classifier="classifier", new_classifier=False)


# What is refused: one line, exit code 2, nothing left behind.


class Hostile:
    """Runs a command where it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (f"touch {self.canary}",)


def write_hostile(path: Path, **how: Any) -> None:
    torch.save({"fullstage.x": Hostile(path.parent / "canary")}, path, **how)


def write_truncated(path: Path, **how: Any) -> None:
    torch.save(official.official_weights(), path, **how)
    path.write_bytes(path.read_bytes()[:-1000])


def write_flipped(path: Path) -> None:
    """A bit of one weight is another than was written."""
    torch.save({"stem.conv1.weight": torch.ones(4096)}, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def write_lying(path: Path) -> None:
    """A header that promises more than the file holds."""
    header = json.dumps({"stem.conv1.weight": dict(dtype="F32", shape=[10**6, 10**6], data_offsets=[0, 4 * 10**12])})
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + b"\0" * 64)


def write_endless_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
OLD = dict(_use_new_zipfile_serialization=False)
REFUSED: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "hostile": ("a.pkl", write_hostile, "posix.system"),
    "hostile, old format": ("a.pkl", lambda path: write_hostile(path, **OLD), "posix.system"),
    "more than weights": ("a.pth", lambda path: torch.save({"top1": np.float64(3)}, path), "numpy"),
    "truncated": ("a.pth", write_truncated, "damaged"),
    "truncated, old format": ("a.pkl", lambda path: write_truncated(path, **OLD), "damaged"),
    "empty": ("a.pkl", lambda path: path.touch(), "damaged"),
    "header promises more": ("a.safetensors", write_lying, "damaged"),
    "header without end": ("a.safetensors", write_endless_header, "damaged"),
    "a flipped bit": ("a.pth", write_flipped, "Bad CRC-32"),
    "text": ("a.pth", lambda path: path.write_text("<html>not found</html>"), "it is not in PyTorch's format"),
    "not fetched": ("a.safetensors", lambda path: path.write_text(POINTER), "a pointer of Git LFS"),
    "not fetched, pickle": ("a.pth", lambda path: path.write_text(POINTER), "a pointer of Git LFS"),
    "not finite": ("a.pth", lambda path: torch.save({"stem.x": torch.tensor(float("nan"))}, path), "not finite"),
    "repeated": (
        "a.pth",
        lambda path: torch.save({"stem.x": torch.zeros(1).expand(10**9, 4)}, path),
        "holds fewer numbers than its tensors have elements: stem.x",
    ),
    "other entries": ("a.pth", lambda path: torch.save({"teacher": {}}, path), "no weights; its entries are teacher"),
    "no weights": ("a.pth", lambda path: torch.save({"epoch": 3}, path), "holds no weights"),
    "of something else": ("a.pth", lambda path: torch.save({"conv1.weight": torch.ones(1)}, path), "conv1.weight"),
    "of no model": ("a.pth", lambda path: torch.save({"fullstage.x": torch.ones(1)}, path), "fits none of the models"),
    "absurd": (
        "a.safetensors",
        lambda path: save_file({f"stem.conv{i}.weight": torch.zeros([]) for i in (1, 2)}, path),
        "fits none of the models",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_files(tmp_path: Path, case: str) -> None:
    name, write, reason = REFUSED[case]
    write(tmp_path / name)
    line = run("convert", tmp_path / name, "--out", tmp_path / "out").refusal()
    assert reason in line
    assert len(line) < 300
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


def test_a_file_of_another_model(tmp_path: Path, released: Path) -> None:
    line = run("convert", released, "--out", tmp_path / "out", "--model", "mdeq_small").refusal()
    assert "does not fit mdeq_small: it fits mdeq_tiny_cifar" in line
    line = run("convert", released, "--out", tmp_path / "out", "--model", "mdeq_smal").refusal()
    assert "did you mean mdeq_small" in line
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_there(tmp_path: Path, released: Path) -> None:
    assert "is not empty" in run("convert", released, "--out", tmp_path).refusal()
    assert "is a file" in run("convert", released, "--out", released).refusal()
    assert "--tag" in run("convert", released, "--out", tmp_path / "out", "--tag", "../x").refusal()
    assert [path.name for path in tmp_path.iterdir()] == ["released.pkl"]


def test_damaged_weights_beside_a_config(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    path = export(timm.create_model("test_mdeq"), tmp_path / "run")
    path.write_bytes(path.read_bytes()[:-8])
    assert str(tmp_path / "run") in run("convert", path, "--out", tmp_path / "out").refusal()
    (tmp_path / "run" / "config.json").write_text("{}")
    assert "which is not a model of this package" in run("convert", path.parent, "--out", tmp_path / "out").refusal()
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_folder_that_gives_another_model_is_not_kept(
    tmp_path: Path, released: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(model: nn.Module, folder: Path, record: Any) -> None:
        path = export(model, folder)
        weights: dict[str, Tensor] = load_file(path)
        weights["classifier.bias"] = weights["classifier.bias"] + 1
        save_file(weights, path)

    monkeypatch.setattr(tools.convert, "export", damaged)
    assert "nothing was kept" in run("convert", released, "--out", tmp_path / "out").refusal()
    assert [path.name for path in tmp_path.iterdir()] == ["released.pkl"]


@pytest.mark.parametrize("names", [("ema", "model"), ("state_dict_ema", "state_dict"), ("model_ema", "model")])
def test_every_reader_takes_the_averaged_weights(names: tuple[str, str], tmp_path: Path) -> None:
    averaged, raw = (timm.create_model("mdeq_tiny_cifar", num_classes=7) for _ in range(2))
    path = tmp_path / "state.pth"
    torch.save(dict(zip(names, (averaged.state_dict(), raw.state_dict()))), path)
    model = timm.create_model("mdeq_tiny_cifar", num_classes=7)
    load_weights(model, path, classifier="classifier", new_classifier=False)
    for found in (load_checkpoint(path, None)[0], load_trained(str(path)).model, model):
        assert torch.equal(found.stem.conv1.weight, averaged.stem.conv1.weight)


def test_nothing_of_a_release_is_said_of_a_file(tmp_path: Path) -> None:
    """Ten classes need not be those of CIFAR-10."""
    save_file(timm.create_model("mdeq_tiny_cifar").state_dict(), tmp_path / "weights.safetensors")
    trained = load_trained(str(tmp_path / "weights.safetensors"))
    assert trained.label_names == tuple(f"class {k}" for k in range(10))
    run("convert", tmp_path / "weights.safetensors", "--out", tmp_path / "out").ok()
    cfg = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not [word for word in ("CIFAR", "cifar10", "airplane") if word in json.dumps(cfg)]


def test_a_named_model_that_does_not_fit(tmp_path: Path) -> None:
    weights = timm.create_model("mdeq_tiny_cifar").state_dict()
    del weights["stem.conv2.weight"]
    save_file(weights, tmp_path / "a.safetensors")
    line = run("convert", tmp_path / "a.safetensors", "--model", "mdeq_tiny_cifar", "--out", tmp_path / "o").refusal()
    assert "does not fit mdeq_tiny_cifar; missing tensors (1): stem.conv2.weight" in line
