"""tools/predict.py: classes and label maps with known answers, what did not converge, what it writes and refuses."""

import csv
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn
from unittest import mock

import nibabel
import numpy as np
import pytest
import timm
import torch
from helpers import ROOT, Outcome, run
from PIL import Image
from timm.models import save_for_hf
from torch import Tensor, nn

import mdeq
from tools import images, pictures, volumes
from tools.checkpoint import write_atomically
from tools.config import BadInput
from tools.inference import whole
from tools.predict import output_names
from tools.predictions import solve_record
from tools.predictors import Predictor, Settings
from tools.pretrained import _label_names, load_trained

RECORD = {"spacing": None, "orientation": "RAS", "normalise": "zscore", "patch_size": [24, 16, 16]}
NAMES = ["background", "left", "right"]
COLOURS = [[0, 0, 0], [200, 10, 20], [30, 40, 250]]
SOLVER = {"name": "picard", "max_steps": 4, "tol": 0.9, "damping": 0.5}  # all converge, but not before the first step
TINY: dict[str, Any] = dict(channels=(4, 8), num_groups=2, expansion=1, solver=SOLVER)


def predict(*words: Any) -> Outcome:
    return run("predict", *words)


def saved(folder: Path, name: str, record: dict[str, Any], **kwargs: Any) -> tuple[Path, nn.Module]:
    """Write a small model with random weights as a run leaves it; return its folder and the model."""
    torch.manual_seed(1)
    model = timm.create_model(name, **{**TINY, **kwargs}).eval()
    with torch.no_grad():  # classes that differ by more than rounding
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        if isinstance(model, mdeq.MDEQSegmenter):  # each of which occurs
            example = torch.randn(1, model.in_chans, *(32,) * model.spatial_dims)
            model.classifier.bias.sub_(model(example).mean(dim=[0, *range(2, example.ndim)]))
    folder.mkdir(parents=True)
    save_for_hf(model, str(folder), model_config=dict(record), safe_serialization=True)
    return folder, model


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    folder = tmp_path_factory.mktemp("classifier") / "run"
    record = {"label_names": ["ant", "bee", "cat", "dog"]}
    return saved(folder, "mdeq_tiny_cifar", record, num_classes=4, head_channels=(2, 2), num_features=8)


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    folder = tmp_path_factory.mktemp("segmenter") / "run"
    return saved(folder, "mdeq_tiny_seg", {"label_names": NAMES, "label_colors": COLOURS}, num_classes=3)


@pytest.fixture(scope="module")
def volume_segmenter(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    folder = tmp_path_factory.mktemp("volumes") / "run"
    return saved(folder, "mdeq3d_tiny_seg", {"label_names": NAMES, "preprocessing": RECORD}, num_classes=3)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three images of 32x32."""
    folder = tmp_path_factory.mktemp("photos")
    for k in range(3):
        write_image(folder / f"{k}.png", seed=k)
    return folder


def write_image(path: Path, size: tuple[int, int] = (32, 32), seed: int = 0) -> Path:
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def write_volume(path: Path, voxels: np.ndarray, affine: np.ndarray | None = None) -> Path:
    image = nibabel.Nifti1Image(voxels.astype(np.float32), np.eye(4) if affine is None else affine)
    if affine is None:
        image.set_sform(None, code=0)
        image.set_qform(None, code=0)
    nibabel.save(image, path)
    return path


def voxels(*shape: int) -> np.ndarray:
    """Blobs, different along every axis."""
    x, y, z = np.meshgrid(*(np.linspace(0, 1, n) for n in shape), indexing="ij")
    return 100 + 50 * np.sin(9 * x) * np.cos(5 * y + 1) + 40 * np.sin(3 * z + 4 * x)


def normalised(path: Path, model: nn.Module) -> Tensor:
    pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    return ((pixels - mean) / std).unsqueeze(0)


def table(out: Path) -> list[dict[str, str]]:
    with open(out / "predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


def answer(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)[0]


def test_classes(classifier: tuple[Path, nn.Module], photos: Path, tmp_path: Path) -> None:
    """The table has the softmax of the model's logits, in order, with the names from config.json."""
    folder, model = classifier
    out = tmp_path / "out"
    said = predict(folder, photos, "--out", out, "--topk", 3).ok()
    rows = table(out)
    assert [row["input"] for row in rows] == [str(photos / f"{k}.png") for k in range(3)]
    entries = json.loads((out / "predictions.json").read_text())["predictions"]
    for k, (row, entry) in enumerate(zip(rows, entries)):
        x = normalised(photos / f"{k}.png", model)
        probabilities, classes = answer(model, x).softmax(0).topk(3)
        expected = [["ant", "bee", "cat", "dog"][c] for c in classes]
        assert [row[f"class_{rank}"] for rank in (1, 2, 3)] == expected == [c["name"] for c in entry["classes"]]
        found = [float(row[f"probability_{rank}"]) for rank in (1, 2, 3)]
        assert found == pytest.approx(probabilities.tolist(), abs=2e-6)
        assert (row["converged"], row["status"], row["windows"]) == ("True", "converged", "1")
        with torch.no_grad():
            stats = model(x, return_equilibrium=True)[1].stats
        assert (int(row["steps"]), int(row["evaluations"])) == (int(stats.num_steps), int(stats.num_steps) + 1)
        assert float(row["residual"]) == pytest.approx(float(stats.residual), rel=1e-4)
        assert f"{expected[0]} {100 * probabilities[0]:.1f} %" in said
    assert "NOT CONVERGED" not in said
    assert "0 of 3 inputs did not converge" in said
    batched = tmp_path / "batched"
    predict(folder, photos, "--out", batched, "--topk", 3, "--batch-size", 2).ok()
    for one, other in zip(rows, table(batched)):
        assert [one[f"class_{k}"] for k in (1, 2, 3)] == [other[f"class_{k}"] for k in (1, 2, 3)]
        assert float(one["residual"]) == pytest.approx(float(other["residual"]), rel=1e-3)


def test_one_unreadable_file(classifier: tuple[Path, nn.Module], photos: Path, tmp_path: Path) -> None:
    """It has a line and a row; the rest is predicted, and the exit code is 2."""
    bad = tmp_path / "bad.png"
    bad.write_bytes((photos / "0.png").read_bytes()[:90])
    said = predict(classifier[0], bad, photos / "1.png", tmp_path / "none.png", "--out", tmp_path / "out")
    assert said.code == 2
    first, second, last = said.err.splitlines()
    assert first.startswith(f"error: cannot read image {bad}")
    assert second == f"error: no image {tmp_path / 'none.png'}"
    assert last == "error: 2 of 3 inputs could not be predicted, see above"
    rows = table(tmp_path / "out")
    assert [bool(row["error"]) for row in rows] == [True, False, True]
    assert rows[1]["class_1"]
    assert "no prediction" in said.out


def test_files_of_other_kinds_are_left_out(classifier: tuple[Path, nn.Module], photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    for name in ("a.HEIC", "notes.txt", "b.heic", ".hidden"):
        (tmp_path / "photos" / name).touch()
    outcome = predict(classifier[0], tmp_path / "photos", "--out", tmp_path / "out")
    outcome.ok()
    assert f"warning: {tmp_path / 'photos'}: 3 files of other kinds are left out (.heic, .txt)" in outcome.err


def test_label_maps(segmenter: tuple[Path, nn.Module], tmp_path: Path) -> None:
    """Labels are the argmax at the image's size; map and overlay are there; all is marked where nothing converged."""
    folder, model = segmenter
    photo = write_image(tmp_path / "photo.png", (37, 21))
    out = tmp_path / "out"
    predict(folder, photo, "--out", out).ok()
    logits = answer(model, normalised(photo, model))
    with Image.open(out / "photo_labels.png") as file:
        labels, palette = np.asarray(file), file.getpalette()
        assert file.mode == "P"
    assert (out / "photo_labels.png").read_bytes()[24] == 8  # bits, also of so few classes
    assert np.array_equal(labels, logits.argmax(0).numpy())
    assert len(np.unique(labels)) > 1, "one class everywhere shows nothing"
    assert palette[:9] == [value for colour in COLOURS for value in colour]
    row = table(out)[0]
    assert [float(row[f"share {k} {name}"]) for k, name in enumerate(NAMES)] == pytest.approx(
        [(labels == k).mean() for k in range(3)], abs=1e-6
    )
    assert {path.name for path in out.iterdir()} == {
        "photo_labels.png", "photo_map.png", "photo_overlay.png", "predictions.csv", "predictions.json",
    }  # fmt: skip
    assert row["map"] == "photo_map.png"
    assert not marked(out / "photo_map.png")
    again = predict(folder, photo, "--out", out, "--solver-steps", 1).ok()  # one is enough here
    assert "0 of 1 inputs did not converge in 1 solver steps" in again


def marked(path: Path) -> bool:
    """Whether a picture has something in the colour of warnings."""
    with Image.open(path) as file:
        return bool((np.asarray(file) == pictures.WARNING).all(axis=2).any())


def test_what_did_not_converge_is_marked(tmp_path: Path, photos: Path) -> None:
    strict = dict(SOLVER, tol=0.0)
    folder, _ = saved(tmp_path / "run", "mdeq_tiny_seg", {}, num_classes=3, solver=strict)
    out = tmp_path / "out"
    said = predict(folder, photos / "0.png", "--out", out, "--solver-steps", 3).ok()
    assert "NOT CONVERGED (max_steps, residual " in said
    assert "1 of 1 inputs did not converge in 3 solver steps" in said
    assert "class 0" in said + (out / "predictions.csv").read_text(), "names for classes that have none"
    row = table(out)[0]
    assert (row["converged"], row["status"], row["steps"], row["evaluations"]) == ("False", "max_steps", "3", "4")
    assert marked(out / "0_map.png")
    assert marked(out / "0_overlay.png")
    # As windows, all of which are counted: 32 pixels by windows of 16 that overlap by half.
    predict(folder, photos / "0.png", "--out", out, "--patch", 16, "--solver-steps", 3).ok()
    row = table(out)[0]
    assert (row["windows"], row["unconverged"], row["evaluations"]) == ("9", "9", "36")


def test_size_seen_by_the_model(segmenter: tuple[Path, nn.Module], tmp_path: Path) -> None:
    """With --size the model sees a resized image; the label map still has the size of the image."""
    folder, model = segmenter
    photo = write_image(tmp_path / "photo.png", (40, 24))
    predict(folder, photo, "--out", tmp_path / "out", "--size", 48, 80).ok()
    x = nn.functional.interpolate(normalised(photo, model), size=(48, 80), mode="bilinear", antialias=True)
    expected = nn.functional.interpolate(answer(model, x).unsqueeze(0), size=(24, 40), mode="bilinear")[0].argmax(0)
    with Image.open(tmp_path / "out" / "photo_labels.png") as file:
        assert (np.asarray(file) == expected.numpy()).mean() > 0.99  # rounding may decide a pixel on a border


AFFINE = np.array([[0, 0, 1.5, -10], [-1, 0, 0, 20], [0, 2, 0, 5.25], [0, 0, 0, 1]], dtype=np.float64)
"""Axes of the file: towards posterior, superior, right."""


def test_volumes(volume_segmenter: tuple[Path, nn.Module], tmp_path: Path) -> None:
    """A label volume has the affine and the axes of its file; how the file lies on disk changes nothing."""
    folder, model = volume_segmenter
    ras = voxels(24, 16, 16)
    straight = np.diag([1.5, 1, 2, 1])
    (tmp_path / "in").mkdir()
    write_volume(tmp_path / "in/ras.nii.gz", ras, straight)
    write_volume(tmp_path / "in/turned.nii", ras.transpose(1, 2, 0)[::-1], AFFINE)
    out = tmp_path / "out"
    said = predict(folder, tmp_path / "in", "--out", out).ok()
    assert "0 of 2 inputs did not converge" in said
    x = torch.from_numpy(ras.astype(np.float32))
    x = (x - x.mean()) / x.std(correction=0)
    expected = answer(model, x[None, None]).argmax(0).numpy()
    assert len(np.unique(expected)) > 1, "one class everywhere shows nothing"
    a, b = (nibabel.load(out / f"{name}_labels.nii.gz") for name in ("ras", "turned"))
    assert np.array_equal(np.asarray(a.dataobj), expected)
    assert np.array_equal(np.asarray(b.dataobj), expected.transpose(1, 2, 0)[::-1])
    assert np.array_equal(a.affine, straight)
    assert np.array_equal(b.affine, AFFINE)
    assert a.get_data_dtype() == b.get_data_dtype() == np.uint8
    with Image.open(out / "ras_sheet.png") as one, Image.open(out / "turned_sheet.png") as other:
        assert one.width > 320  # twelve pairs of slices
        below = np.asarray(one)[60:], np.asarray(other)[60:]  # under the caption, which has the name
        assert below[0].shape == below[1].shape
        assert (np.abs(below[0].astype(int) - below[1]) <= 1).mean() > 0.999
    record = json.loads((out / "predictions.json").read_text())
    assert record["preprocessing"]["patch_size"] == RECORD["patch_size"]


def test_without_affine_axes_are_kept(volume_segmenter: tuple[Path, nn.Module], tmp_path: Path) -> None:
    """A file that does not say how it lies in space gets labels that do not say so either."""
    path = write_volume(tmp_path / "x.nii.gz", voxels(24, 16, 16))
    predict(volume_segmenter[0], path, "--out", tmp_path / "out", "--orientation", "none").ok()
    header = nibabel.load(tmp_path / "out" / "x_labels.nii.gz").header
    assert (int(header["sform_code"]), int(header["qform_code"])) == (0, 0)


def test_evaluations_of_a_line_search_are_counted(classifier: tuple[Path, nn.Module]) -> None:
    model, x = classifier[1], torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    solver = mdeq.Broyden(max_steps=20, tol=0.0, line_search=2)
    with torch.no_grad():
        stats = model(x, return_equilibrium=True, solver=solver)[1].stats
    assert solve_record([stats], None)["evaluations"] == stats.nfe
    assert stats.nfe > 21, "without a halving this shows nothing"


@pytest.mark.parametrize(
    ("failure", "caught"),
    [
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), True),
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("shapes do not match"), False),
    ],
)
@pytest.mark.parametrize("stage", ["volumes.prepare", "whole", "volumes.restore"])
def test_an_input_beyond_memory_keeps_no_other_from_its_prediction(
    stage: str, failure: Exception, caught: bool, volume_segmenter: tuple[Path, nn.Module], tmp_path: Path
) -> None:
    """What was predicted has its row, whatever went wrong after it."""
    small = write_volume(tmp_path / "a.nii.gz", voxels(16, 16, 16), np.eye(4))
    large = write_volume(tmp_path / "b.nii.gz", voxels(24, 16, 24), np.eye(4))
    inner = {"volumes.prepare": volumes.prepare, "whole": whole, "volumes.restore": volumes.restore}[stage]

    def lacking(*words: Any, **options: Any) -> Any:
        if any(getattr(word, "shape", (0,))[-1] == 24 for word in words):
            raise failure
        return inner(*words, **options)

    words = (volume_segmenter[0], small, large, "--out", tmp_path / "out", "--whole")
    with mock.patch(f"tools.predictors.{stage}", lacking):
        if not caught:
            with pytest.raises(RuntimeError, match="shapes do not match"):
                predict(*words)
            assert [row["error"] for row in table(tmp_path / "out")] == [""]
            return
        said = predict(*words)
    assert said.code == 2
    first, last = said.err.splitlines()
    assert first.startswith(f"error: {large}")
    assert "does not fit into memory; make " in first
    assert last == "error: 1 of 2 inputs could not be predicted, see above"
    assert [bool(row["error"]) for row in table(tmp_path / "out")] == [False, True]


def test_a_volume_for_a_run_without_config_json(volume_segmenter: tuple[Path, nn.Module], tmp_path: Path) -> None:
    """A run that was stopped has config.yaml alone: what it does to volumes is done to those that are predicted."""
    torch.save({"model": volume_segmenter[1].state_dict(), "optimizer": {}}, tmp_path / "checkpoint.pt")
    (tmp_path / "config.yaml").write_text(
        "task: segmentation\nmodel: {name: mdeq3d_tiny_seg, kwargs: {channels: [4, 8], num_groups: 2, expansion: 1}}\n"
        "data: {name: nifti, patch_size: [16, 24, 16], spacing: [2, 1, 1], orientation: none, normalise: minmax}\n"
    )
    trained = load_trained(str(tmp_path / "checkpoint.pt"))
    record = trained.config["preprocessing"]
    assert (record["spacing"], record["orientation"], record["normalise"]) == ([2.0, 1.0, 1.0], "none", "minmax")
    assert record["patch_size"] == [16, 24, 16]
    assert tuple(trained.model.pretrained_cfg["input_size"])[1:] == (24, 16)


def test_windows_of_a_volume(volume_segmenter: tuple[Path, nn.Module], tmp_path: Path) -> None:
    """Volumes above the training patch are predicted by windows of it unless --whole is given, smaller ones padded."""
    folder, model = volume_segmenter
    large = write_volume(tmp_path / "large.nii.gz", voxels(24, 24, 16), np.eye(4))
    small = write_volume(tmp_path / "small.nii.gz", voxels(10, 12, 16), np.eye(4))
    predict(folder, large, small, "--out", tmp_path / "out", "--batch-size", 2).ok()
    assert [row["windows"] for row in table(tmp_path / "out")] == ["2", "1"]
    x = torch.from_numpy(voxels(10, 12, 16).astype(np.float32))
    x = nn.functional.pad((x - x.mean()) / x.std(correction=0), (0, 0, 2, 2, 7, 7))
    expected = answer(model, x[None, None]).argmax(0)[7:17, 2:14]
    found = nibabel.load(tmp_path / "out" / "small_labels.nii.gz")
    assert np.array_equal(np.asarray(found.dataobj), expected.numpy())
    assert nibabel.load(tmp_path / "out" / "large_labels.nii.gz").shape == (24, 24, 16)
    predict(folder, large, "--out", tmp_path / "whole", "--whole").ok()
    assert table(tmp_path / "whole")[0]["windows"] == "1"


def test_classes_of_a_volume(tmp_path: Path) -> None:
    folder, model = saved(
        tmp_path / "run", "test_mdeq3d", {"label_names": ["a", "b", "c", "d"]}, num_classes=4, head_channels=(2, 2)
    )
    path = write_volume(tmp_path / "scan.nii", voxels(20, 16, 18))
    predict(folder, path, "--out", tmp_path / "out", "--orientation", "none").ok()
    x = torch.from_numpy(voxels(20, 16, 18).astype(np.float32))
    probabilities = answer(model, ((x - x.mean()) / x.std(correction=0))[None, None]).softmax(0)
    row = table(tmp_path / "out")[0]
    assert row["class_1"] == "abcd"[int(probabilities.argmax())]
    assert float(row["probability_1"]) == pytest.approx(float(probabilities.max()), abs=2e-6)


@pytest.mark.parametrize("source", ["local-dir", "file", "config.yaml", "official"])
def test_where_a_model_comes_from(
    source: str, classifier: tuple[Path, nn.Module], photos: Path, tmp_path: Path
) -> None:
    folder, model = classifier
    alone = tmp_path / "weights.safetensors"
    if source == "local-dir":
        name: Any = f"local-dir:{folder}"
    elif source == "file":
        name = folder / "model.safetensors"
    elif source == "official":
        name = ROOT / "tests" / "data" / "official_cifar_tiny.safetensors"
    else:  # a run that was stopped before its first evaluation
        name = tmp_path / "checkpoint.pt"
        torch.save({"model": model.state_dict(), "optimizer": {}}, name)
        kwargs = "{channels: [4, 8], num_groups: 2, expansion: 1, head_channels: [2, 2], num_features: 8}"
        solver = "{name: picard, max_steps: 4, tol: 0.9, damping: 0.5}"
        alone.with_name("config.yaml").write_text(
            f"model:\n  name: mdeq_tiny_cifar\n  kwargs: {kwargs}\n  solver: {solver}\n"
        )
    predict(name, photos / "0.png", "--out", tmp_path / "out", "--topk", 1, "--solver-steps", 2).ok()
    row = table(tmp_path / "out")[0]
    if source != "official":
        probabilities = answer(model, normalised(photos / "0.png", model)).softmax(0)
        assert float(row["probability_1"]) == pytest.approx(float(probabilities.max()), abs=2e-6)
        names = (
            ["class 0", "class 1", "class 2", "class 3"] if source == "config.yaml" else ["ant", "bee", "cat", "dog"]
        )
        assert row["class_1"] == names[int(probabilities.argmax())]


def png16() -> Image.Image:
    return Image.fromarray(np.array([[0, 255, 256], [32768, 65279, 65535]], dtype=np.uint16))


def turned() -> Image.Image:
    image = Image.fromarray(np.array([[10, 20, 30], [40, 50, 60]], dtype=np.uint8))
    image.getexif()[0x0112] = 6  # to be turned a quarter clockwise
    return image


def glass() -> Image.Image:
    return Image.fromarray(np.array([[[9, 9, 9, 0], [9, 9, 9, 255]]], dtype=np.uint8))


@pytest.mark.parametrize(
    ("make", "suffix", "expected"),
    [
        (png16, "png", [[0, 0, 1], [128, 254, 255]]),
        (turned, "png", [[40, 10], [50, 20], [60, 30]]),
        (glass, "png", [[255, 9]]),
        (lambda: Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32)), "tif", [[0, 128, 255]]),
        (lambda: Image.fromarray(np.array([[True, False]])), "png", [[255, 0]]),
    ],
    ids=["16-bit", "exif", "transparent", "float", "1-bit"],
)
def test_kinds_of_images(
    make: Callable[[], Image.Image], suffix: str, expected: list[list[int]], tmp_path: Path
) -> None:
    image, path = make(), tmp_path / f"image.{suffix}"
    image.save(path, exif=image.getexif())
    assert np.asarray(images.read_picture(path, 1)).tolist() == expected
    colour = np.asarray(images.read_picture(path, 3))
    assert colour.shape[2] == 3
    assert (colour == np.asarray(expected)[:, :, None]).all()


def test_colour_for_a_grey_model(photos: Path) -> None:
    with Image.open(photos / "0.png") as file:
        assert np.array_equal(np.asarray(images.read_picture(photos / "0.png", 1)), np.asarray(file.convert("L")))


@pytest.mark.parametrize(
    ("values", "says"), [([[0.0, 2.0]], "must be in 0..1"), ([[0.0, np.nan]], "NaN")], ids=["range", "nan"]
)
def test_float_images_out_of_range(values: list[list[float]], says: str, tmp_path: Path) -> None:
    Image.fromarray(np.array(values, dtype=np.float32)).save(tmp_path / "image.tif")
    with pytest.raises(BadInput, match=says):
        images.read_picture(tmp_path / "image.tif", 3)


@pytest.mark.parametrize(
    ("model", "word", "says"),
    [
        ("classifier", "none.png", "no image none.png"),
        ("classifier", "none/*.png", "no files match none/*.png"),
        ("classifier", "EMPTY", "no .png"),
        ("classifier", "VOLUME", "is a volume, the model takes images"),
        ("segmenter", "TINY", "is 12x20; every side must be at least 16 pixels"),
        ("volume_segmenter", "PHOTO", "is not a NIfTI file"),
        ("volume_segmenter", "FOUR_D", "is 4-D (16x16x16x2), 2 channel(s); the model takes 1"),
        ("volume_segmenter", "NAN", "has 1 voxels that are NaN or infinite"),
        ("volume_segmenter", "FLAT", "has the same value everywhere (7)"),
        ("volume_segmenter", "NO_AFFINE", "has no affine, so its orientation is unknown; --orientation none"),
        ("volume_segmenter", "DAMAGED", "cannot read volume"),
        ("mdeq_tiny_cifr", "PHOTO", "did you mean mdeq_tiny_cifar?"),
        ("mdeq_xlarge_seg", "PHOTO", "no pretrained weights for mdeq_xlarge_seg"),
        ("none.safetensors", "PHOTO", "no checkpoint none.safetensors"),
        ("local-dir:none", "PHOTO", "no checkpoint none"),
    ],
)
def test_bad_input(model: str, word: str, says: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """One line that says what is wrong, exit code 2, and nothing is written."""
    cube = voxels(16, 16, 16)
    makers: dict[str, Callable[[], Path]] = {
        "EMPTY": lambda: (tmp_path / "empty").mkdir() or tmp_path / "empty",
        "PHOTO": lambda: write_image(tmp_path / "photo.png"),
        "TINY": lambda: write_image(tmp_path / "photo.png", (12, 20)),
        "VOLUME": lambda: write_volume(tmp_path / "scan.nii.gz", cube, np.eye(4)),
        "FOUR_D": lambda: write_volume(tmp_path / "scan.nii", np.stack([cube, cube], axis=3), np.eye(4)),
        "NAN": lambda: write_volume(tmp_path / "scan.nii", np.where(cube == cube.max(), np.nan, cube), np.eye(4)),
        "FLAT": lambda: write_volume(tmp_path / "scan.nii", np.full_like(cube, 7), np.eye(4)),
        "NO_AFFINE": lambda: write_volume(tmp_path / "scan.nii", cube),
        "DAMAGED": lambda: damaged(write_volume(tmp_path / "scan.nii.gz", cube, np.eye(4))),
    }
    folder = request.getfixturevalue(model)[0] if model in ("classifier", "segmenter", "volume_segmenter") else model
    path = makers[word]() if word in makers else word
    refused = predict(folder, path, "--out", tmp_path / "out").refusal()
    assert says in refused
    assert not (tmp_path / "out").exists()


def damaged(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-200])
    return path


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--out", "FILE"), "is a file, not a folder to write to"),
        (("--out", "HERE"), "give --out another folder"),
        (("--out", "out", "--topk", 0), "--topk must be >= 1, got 0"),
        (("--out", "out", "--solver-steps", 0), "--solver-steps must be >= 1, got 0"),
        (("--out", "out", "--overlap", 1), "--overlap must be >= 0 and < 1, got 1"),
        (("--out", "out", "--size", 8), "--size must be one or two numbers of at least 16, got 8"),
        (("--out", "out", "--patch", 16), "--patch is for segmentation"),
        (("--out", "out", "--orientation", "none"), "--orientation is for volumes"),
        (("--out", "out", "--device", "tpu"), "--device"),
    ],
)
def test_bad_options(
    words: tuple[Any, ...], says: str, classifier: tuple[Path, nn.Module], photos: Path, tmp_path: Path
) -> None:
    places = {"FILE": photos / "0.png", "HERE": photos, "out": tmp_path / "out"}
    refused = predict(classifier[0], photos / "0.png", *(places.get(word, word) for word in words)).refusal()
    assert says in refused
    assert not (tmp_path / "out").exists()


def test_size_of_a_volume_is_refused(volume_segmenter: tuple[Path, nn.Module], tmp_path: Path) -> None:
    path = write_volume(tmp_path / "scan.nii.gz", voxels(16, 16, 16), np.eye(4))
    refused = predict(volume_segmenter[0], path, "--out", tmp_path / "out", "--size", 32).refusal()
    assert "--size is for images" in refused


def test_official_segmenters_have_the_names_of_cityscapes(tmp_path: Path) -> None:
    model = timm.create_model("mdeq_tiny_seg", num_classes=19, **TINY)
    named = [
        _label_names(model, config) for config in ({}, {"pretrained_cfg": {"tag": "locuslab"}}, {"num_classes": 19})
    ]
    assert named[0][:2] == named[1][:2] == ("road", "sidewalk")
    assert named[2][:2] == ("class 0", "class 1")


def test_classes_are_told_in_words() -> None:
    """The folders of ImageNet are numbers of WordNet; timm's config.json may describe any name."""
    model = timm.create_model("test_mdeq", num_classes=3)
    fish = {"label_names": ["n01440764", "n01443537", "n15075141"]}  # the last is in ImageNet-22k alone
    assert _label_names(model, fish)[0] == "tench, Tinca tinca"
    assert not any(name.startswith("n") and name[1:].isdigit() for name in _label_names(model, fish))
    assert _label_names(model, {"label_names": ["n01440764", "mine"]}) == ("n01440764", "mine", "class 2")
    described = {"label_names": ["a", "b", "c"], "label_descriptions": {"a": "an ant", "c": "a cat"}}
    assert _label_names(model, described) == ("an ant", "b", "a cat")
    gaps = {"label_names": {"0": "n01440764", "2": "n04399382"}}  # the last is in ImageNet-1k alone
    assert _label_names(model, gaps) == ("tench, Tinca tinca", "class 1", "teddy, teddy bear")
    empty = {"label_names": ["background", "b", "c"], "label_descriptions": {"background": "all else", "b": None}}
    assert _label_names(model, empty) == ("background", "b", "c")  # pictures know the background by its name
    with pytest.raises(BadInput, match=r"label_descriptions in config\.json must map label names"):
        _label_names(model, {"label_names": ["a", "b", "c"], "label_descriptions": ["an ant", "", ""]})


def test_a_model_of_another_package(photos: Path, tmp_path: Path) -> None:
    save_for_hf(timm.create_model("test_resnet"), str(tmp_path / "other"), safe_serialization=True)
    said = predict(tmp_path / "other", photos, "--out", tmp_path / "out").refusal()
    assert "holds test_resnet, which is not a model of this package" in said


def test_files_are_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "labels.nii.gz"
    path.write_text("before")

    def fail(place: Path) -> None:
        place.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(BadInput, match=r"cannot write .*labels.nii.gz: No space left on device"):
        write_atomically(path, fail)
    assert path.read_text() == "before"
    write_atomically(path, lambda place: place.write_text("after"))
    assert path.read_text() == "after"
    assert [file.name for file in tmp_path.iterdir()] == ["labels.nii.gz"]


def test_names_that_are_no_text(classifier: tuple[Path, nn.Module], photos: Path, tmp_path: Path) -> None:
    """They are Latin-1, from an old disk; the tables show the byte."""
    folder = tmp_path / "in"
    folder.mkdir()
    source = next(path for path in sorted(photos.iterdir()) if path.suffix == ".png")
    try:
        shutil.copy(source, os.fsdecode(os.fsencode(folder) + b"/M\xfcller.png"))
    except OSError:
        pytest.skip("the file system takes no such names")
    said = predict(classifier[0], folder, "--out", tmp_path / "out").ok()
    assert "M\udcfcller.png" in said
    assert table(tmp_path / "out")[0]["input"].endswith(r"M\udcfcller.png")
    (entry,) = json.loads((tmp_path / "out" / "predictions.json").read_text())["predictions"]
    assert entry["input"].endswith("M\udcfcller.png")


def test_a_link_to_nothing_is_an_input_that_cannot_be_read(
    classifier: tuple[Path, nn.Module], photos: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for path in sorted(photos.iterdir())[:2]:
        shutil.copy(path, folder)
    (folder / "later.png").symlink_to(tmp_path / "nowhere.png")
    outcome = predict(classifier[0], folder, "--out", tmp_path / "out")
    assert outcome.code == 2
    assert "later.png" in outcome.err
    assert "1 of 3 inputs could not be predicted" in outcome.err


def test_output_names() -> None:
    files = ["a/x.png", "b/x.png", "b/X.jpg", "x_2.png", "scan.nii.gz", "scan.v2.nii"]
    assert output_names([Path(file) for file in files]) == ["x", "x_2", "X_3", "x_2_2", "scan", "scan.v2"]


def test_label_colours() -> None:
    colours = pictures.label_colours([f"class {k}" for k in range(60)])
    assert len(set(colours)) == 60
    assert pictures.label_colours(["Background", "organ"])[0] == (0, 0, 0)
    assert pictures.label_colours(NAMES, COLOURS) == tuple(map(tuple, COLOURS))
    for bad in (COLOURS[:2], [*COLOURS[:2], [0, 0, 256]], [*COLOURS[:2], [0, 0]], [*COLOURS[:2], "red"], [0, 0, 0]):
        with pytest.raises(BadInput, match=r"label_colors in config\.json must be 3 triples"):
            pictures.label_colours(NAMES, bad)


def test_overlay_leaves_out_a_class() -> None:
    image = Image.new("RGB", (2, 1), (100, 100, 100))
    shown = pictures.overlaid(image, np.array([[0, 1]]), COLOURS, clear=0, opacity=1)
    assert np.asarray(shown).tolist() == [[[100, 100, 100], COLOURS[1]]]


def test_labels_of_one_slice_are_shown() -> None:
    """The sheet has the slices around them; red is where the class is: to the right, in front."""
    volume, labels = np.zeros((8, 8, 30)), np.zeros((8, 8, 30), dtype=np.uint8)
    labels[6:, 6:, 20] = 1
    sheet = np.asarray(pictures.contact_sheet(volume, labels, (1, 1, 1), COLOURS, clear=0)).astype(int)
    red = (sheet[:, :, 0] - sheet[:, :, 1]) > 50  # the numbers of the slices are yellow
    assert red.sum() == 40 * 40  # a quarter of 160 pixels each way


def test_places_that_are_not_ours(
    classifier: tuple[Path, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before anything is predicted. To root everything is allowed, so the system's answers are replaced."""

    def refuse(path: Path) -> NoReturn:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", refuse)
        assert f"Permission denied: {tmp_path}" in predict(classifier[0], tmp_path, "--out", tmp_path / "out").refusal()
    monkeypatch.setattr("os.access", lambda place, mode: False)
    line = predict(classifier[0], tmp_path, "--out", tmp_path / "new" / "out").refusal()
    assert f"no permission for {tmp_path}; choose another folder" in line


STRANGE: list[tuple[str, Any]] = [
    ("pretrained_cfg.architecture", "../../escaped"),
    ("pretrained_cfg", [1]),
    ("model_args.device", "meta"),
    ("pretrained_cfg.interpolation", "x"),
    ("pretrained_cfg.crop_pct", 1e-9),
    ("pretrained_cfg.mean", None),
    ("pretrained_cfg.std", [0, 0, 0]),
    ("pretrained_cfg.input_size", [3, 1_000_000, 1_000_000]),
    ("label_names", True),
    ("preprocessing", "x"),
    ("preprocessing", {"spacing": [0, 0, 0]}),
    ("preprocessing", {"spacing": []}),
    ("preprocessing", {"patch_size": [16, 16]}),
    ("preprocessing", {"patch_size": [10**9] * 3}),
]


@pytest.mark.parametrize(("key", "value"), STRANGE, ids=[f"{key}={value}" for key, value in STRANGE])
def test_a_strange_config_is_refused(key: str, value: Any, tmp_path: Path) -> None:
    saved(tmp_path / "run", "mdeq_tiny_cifar", {}, num_classes=2, head_channels=(2, 2), num_features=8)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    section, _, name = key.rpartition(".")
    (config.setdefault(section, {}) if section else config)[name] = value
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput):
        Predictor(load_trained(f"local-dir:{tmp_path / 'run'}"), Settings(out=tmp_path / "out"))


def test_names_of_classes_are_text_alone() -> None:
    model = SimpleNamespace(num_classes=2, pretrained_cfg={})
    names = ["\x1b]0;title\x07red\x1b[2J", "two\nfake.png healthy 100 %"]
    assert _label_names(model, {"label_names": names}) == ("]0;title red [2J", "two fake.png healthy 100 %")
