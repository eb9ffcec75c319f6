"""What cannot work or would be ignored without a word is said in one line before anything is trained."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import image_folder, make_run, run, train, validate, write_images

from tools.batches import check_labels
from tools.checkpoint import read_weights
from tools.config import BadInput
from tools.metrics import SolveLog, Tally

# timm's readers leave it to the garbage collector to close an image file.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

FOLDER = ("data.name=folder", "data.num_train=null", "data.batch_size=2")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(folder, "data.num_train=16").ok()
    return folder


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("model.kwargs.features_only=true", "not a classifier"),
        ("model.kwargs.global_pool=''", "leave global_pool at avg"),
        ("model.kwargs.spatial_dims=3", "3D"),
        ("model.kwargs.num_classes=5", "data.num_classes"),
        ("model.kwargs.solver={name: picard}", "model.solver"),
        ("run.epochs=???", "run.epochs"),
        ("data.name=hfdss/x", "hfds/..."),
        ("data.name=foo/bar", "unknown data.name foo/bar"),
        ("data.name=hfds/x", "pip install datasets"),
        ("data.name=WDS/x", "pip install webdataset"),
        ("optim.layer_decay=0", "(0, 1]"),
        ("optim.layer_decay=1.1", "(0, 1]"),
    ],
)
def test_settings(word: str, said: str, tmp_path: Path) -> None:
    with mock.patch("importlib.util.find_spec", return_value=None):
        outcome = train(tmp_path / "run", word)
    assert said in outcome.refusal()
    assert outcome.out == ""
    assert not (tmp_path / "run").exists()


def test_compiled_cell_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "g++ -v"))
    line = train(tmp_path / "run", "run.compile=true").refusal()
    assert line.startswith(f"error: run.compile=true needs a C++ compiler, {tmp_path / 'g++ -v'} is not there")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("word", "said"), [("data.num_train=31", "31"), ("data.batch_size=15", "15")])
def test_mixup_of_an_odd_number_of_images(word: str, said: str, tmp_path: Path) -> None:
    line = train(tmp_path / "run", "data.batch_size=64", "data.mixup=0.5", word).refusal()
    assert f"even number of images per process, got {said}" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data.augment=imagenet", "data.auto_augment=foo"], "data.auto_augment=foo"),
        (["data.augment=imagenet", "data.auto_augment=rand-q9"], "data.auto_augment=rand-q9"),
        (["data.cache_on_device=true"], "data.cache_on_device"),
        (["data.augment=none", "data.reprob=0.5"], "data.reprob is for image folders"),
        (["data.augment=flip", "data.color_jitter=0.4"], "data.color_jitter is for images with masks"),
        (
            ["data.augment=imagenet", "data.auto_augment=rand-m5", "data.color_jitter=0.4"],
            "data.augment=imagenet and no data.auto_augment but 3a",
        ),
        (["run.seed=9223372036854775808"], "run.seed must be below 2**63"),
        (["data.name=torch/image_folder", "data.test_split=nowhere"], "no folder nowhere"),
    ],
    ids=[
        "policy",
        "part of a policy",
        "cache",
        "without augmentation",
        "jitter",
        "jitter and policy",
        "seed",
        "torchvision's folder",
    ],
)
def test_settings_of_an_image_folder(words: list[str], said: str, tmp_path: Path) -> None:
    root = image_folder(tmp_path / "data", count=2)
    assert said in train(tmp_path / "run", *FOLDER, f"data.root={root}", *words).refusal()
    assert not (tmp_path / "run").exists()


def test_splits_of_torchvisions_folder_have_the_same_classes(tmp_path: Path) -> None:
    root = write_images(tmp_path / "data" / "train", ("ant", "bee", "cat"), 1).parent
    write_images(root / "validation", ("ant", "cat"), 1)
    words = [*FOLDER, "data.name=torch/folder", f"data.root={root}"]
    assert "differ in their classes, such as bee" in train(tmp_path / "run", *words).refusal()


@pytest.mark.parametrize("program", ["train", "validate", "convert", "publish"])
def test_words_that_no_program_knows(program: str) -> None:
    line = run(program, "--nonsense").refusal()
    assert "usage" not in line


# Labels and classes.


def test_labels_that_are_no_classes_of_the_model(tmp_path: Path) -> None:
    check_labels(torch.tensor([0, 9]), 10)
    with pytest.raises(BadInput, match="label -1"):
        check_labels(torch.tensor([0, -1]), 10)
    started = make_run(tmp_path / "run", "data.mixup=0.5")
    x = torch.zeros(2, 3, 16, 16)
    with pytest.raises(BadInput, match="label 10, the model only has classes 0 to 9"):
        started.trainer.step(x, torch.tensor([3, 10]), 0, Tally(), SolveLog(), SolveLog())


def test_a_saved_number_of_classes_says_nothing_of_other_data(trained: Path, tmp_path: Path) -> None:
    root = write_images(tmp_path / "data" / "validation", ("ant", "bee", "cat"), 2).parent
    words = ["--checkpoint", trained, *FOLDER, f"data.root={root}"]
    assert "the test split has 3 classes, the model 10" in validate(*words).refusal()
    assert "test accuracy" in validate(*words, "data.num_classes=10").ok()


# Checkpoints.


@pytest.mark.parametrize(
    "odd",
    [torch.eye(3).to_sparse(), torch.zeros(3, device="meta"), torch.zeros(3, dtype=torch.complex64)],
    ids=["sparse", "meta", "complex"],
)
def test_tensors_that_are_no_weights(odd: torch.Tensor, tmp_path: Path) -> None:
    torch.save({"x": odd}, tmp_path / "x.pt")
    with pytest.raises(BadInput, match=r"cannot be weights .*: x$"):
        read_weights(tmp_path / "x.pt")


@pytest.mark.parametrize("shape", [(), (10,), (10, 3), (0,)], ids=str)
def test_a_classifier_of_another_shape(shape: tuple[int, ...], trained: Path, tmp_path: Path) -> None:
    state: dict[str, Any] = torch.load(trained / "checkpoint.pt", weights_only=True)["model"]
    torch.save({**state, "classifier.weight": torch.zeros(shape)}, tmp_path / "odd.pt")
    line = validate("--config", trained / "config.yaml", "--checkpoint", tmp_path / "odd.pt").refusal()
    assert "odd.pt" in line
    assert "10 classes" not in line


def test_a_checkpoint_of_another_width(trained: Path) -> None:
    line = validate("--checkpoint", trained, "model.kwargs.num_features=20").refusal()
    assert "10 classes" not in line
    assert "20" in line or "shape" in line


# What is counted.


def test_evaluations_of_a_line_search_count(tmp_path: Path) -> None:
    words = ["model.solver={name: broyden, max_steps: 3, tol: 0.0, line_search: 2}", "data.num_train=16"]
    model = make_run(tmp_path / "run", *words).model.eval()
    x = 10 * torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        stats = model(x, return_equilibrium=True)[1].stats
    log = SolveLog()
    log.add(stats)
    assert log.summary()["evaluations"] == stats.nfe
