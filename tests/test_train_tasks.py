"""Training and validating every task by its config: what is said and kept, resumed runs, what does not go together."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import ROOT, assert_same_weights, rows, run, spawn_distributed
from small_sets import blob, decathlon, hippocampus, masks, medmnist, save_nifti

from tools.batches import Process
from tools.config import load_config
from tools.tasks import build_task
from tools.volumes import Preprocessing

SEGMENTER = (
    "task=segmentation", "model.name=mdeq3d_tiny_seg", "model.kwargs={channels: [4, 8], num_groups: 2, expansion: 1}",
    "data.name=hippocampus", "data.test_split=val", "data.patch_size=[16,16,16]", "data.batch_size=2",
    "loss.name=dice_ce",
)  # fmt: skip
CLASSIFIER = (
    "model.name=test_mdeq3d", "model.kwargs={}", "data.name=medmnist3d", "data.test_split=test",
    "data.patch_size=[16,16,16]", "data.batch_size=4", "data.normalise=minmax",
)  # fmt: skip
SMALL = (
    "model.solver={name: picard, max_steps: 2}", "model.gradient={name: phantom, num_steps: 1, damping: 1.0}",
    "run.progress=false", "run.threads=1", "run.device=cpu", "run.epochs=1", "data.workers=0", "data.image_size=null",
)  # fmt: skip


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a set of each kind."""
    root = tmp_path_factory.mktemp("volumes")
    hippocampus(root / "hippocampus.npz", 4, 1)
    medmnist(root / "adrenalmnist3d.npz")
    return root


def config_file(folder: Path) -> Path:
    path = folder / "empty.yaml"
    path.write_text("{}\n")
    return path


def train(folder: Path, root: Path, *words: Any) -> Any:
    folder.parent.mkdir(parents=True, exist_ok=True)
    settings = (f"run.out_dir={folder}", f"data.root={root}", *SMALL, *words)
    return run("train", config_file(folder.parent), *settings)


def preprocessing_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["preprocessing"]


@pytest.fixture(scope="module")
def segmented(volumes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of a segmenter of volumes, and what it printed."""
    folder = tmp_path_factory.mktemp("segmented") / "run"
    return folder, train(folder, volumes, *SEGMENTER, "data.augment=volume", "data.flip_axes=[0]").ok()


def test_segmenter_of_volumes(segmented: tuple[Path, str]) -> None:
    folder, out = segmented
    evaluated = json.loads((folder / "results.json").read_text())["evaluation"]
    dice = evaluated["metrics"]["mean_dice"]
    assert evaluated["metric"] == "mean_dice"
    assert f"test mean Dice: {dice:.3f}\n" in out
    assert f"test {dice:.4f}" in out
    assert "Dice: anterior " in out
    assert "at twice the solver steps (4, without tolerance): 0." in out
    log = rows(folder)
    assert float(log[0]["test_mean_dice"]) == dice
    assert 0 <= float(log[0]["train_mean_dice"]) <= 1
    assert float(log[0]["test_dice_posterior"]) == evaluated["metrics"]["dice_posterior"]


def test_preprocessing_lies_beside_the_weights(segmented: tuple[Path, str]) -> None:
    folder = segmented[0]
    preprocessing = Preprocessing.of_record(preprocessing_in(folder))
    assert preprocessing.patch_size == (16, 16, 16)
    assert preprocessing.label_names == ("background", "anterior", "posterior")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert model.pretrained_cfg["label_names"] == ["background", "anterior", "posterior"]
    assert tuple(model(torch.randn(1, 1, 16, 17, 18)).shape) == (1, 3, 16, 17, 18)


def test_segmenter_is_validated(segmented: tuple[Path, str], tmp_path: Path) -> None:
    folder, printed = segmented
    out = run("validate", "--checkpoint", folder, "--steps", 1, 2, "--out", tmp_path).ok()
    dice = json.loads((folder / "results.json").read_text())["evaluation"]["metrics"]["mean_dice"]
    assert f"test mean Dice: {dice:.4f}, loss " in out
    table = rows(tmp_path, "steps.csv")
    assert [row["steps"] for row in table] == ["1", "2"]
    assert float(table[1]["mean_dice"]) == dice
    assert "twin Dice" in out
    assert "mean HD95" in out
    assert printed.splitlines()[-1].startswith("checkpoint")


def test_windows_of_the_size_of_the_volume_change_nothing(segmented: tuple[Path, str]) -> None:
    folder = segmented[0]
    whole = run("validate", "--checkpoint", folder).ok()
    windows = run("validate", "--checkpoint", folder, "data.inference=sliding", "data.patch_size=[24,24,24]").ok()
    padded = run("validate", "--checkpoint", folder, "data.patch_size=[24,24,24]").ok()
    assert windows == padded
    assert windows != whole
    assert "test mean Dice" in run("validate", "--checkpoint", folder, "data.inference=sliding").ok()


def test_windows_are_compared(segmented: tuple[Path, str], tmp_path: Path) -> None:
    out = run("windows", "--checkpoint", segmented[0], "--window", 16, "--count", 1).ok()
    assert "cold starts: " in out
    assert "warm starts: " in out
    assert "3.00 evaluations a window" in out  # two steps
    assert "1 of 1 bitwise identical" in out
    assert "0.000 % of the labels differ" in run("windows", "--checkpoint", segmented[0], "--window", 96).ok()
    assert "--window must be >= 16" in run("windows", "--checkpoint", segmented[0], "--window", 8).refusal()
    assert "no config" in run("windows", "--checkpoint", tmp_path).refusal()


RECORD = ROOT / "mdeq" / "weights" / "mdeq3d_tiny_seg.hippocampus.json"


@pytest.mark.slow
def test_windows_of_a_release_are_compared(volumes: Path) -> None:
    """A window larger than the small volume holds it whole; the solver is the one of the record."""
    out = run("windows", "--record", RECORD, "--window", 56, "--overlap", 0, "--count", 1, f"data.root={volumes}").ok()
    steps = json.loads(RECORD.read_text())["config"]["model_args"]["solver"]["max_steps"]
    assert f"max_steps={steps}" in out
    assert "of 1 windows converged" in out


def test_a_score_of_the_training_split_is_said_to_be_one(segmented: tuple[Path, str]) -> None:
    said = "tested on the training split itself, train"
    assert said in run("validate", "--checkpoint", segmented[0], "data.test_split=train").ok()
    assert said not in segmented[1]


def test_volumes_are_not_resized_to_one_size(volumes: Path, tmp_path: Path) -> None:
    line = train(tmp_path / "run", volumes, *SEGMENTER, "data.image_size=32").refusal()
    assert "data.image_size=32 is for images with one label each" in line
    assert not (tmp_path / "run").exists()


def test_windows_of_a_release_are_those_of_its_record(volumes: Path) -> None:
    words = ("--record", RECORD, f"data.root={volumes}")
    assert "would change the record's figure" in run("windows", *words, "data.patch_size=[32,32,32]").refusal()
    assert "give --checkpoint" in run("windows", *words, "--checkpoint", volumes).refusal()
    assert "give --checkpoint" in run("windows", "--count", 1).refusal()
    other = RECORD.with_name("mdeq_tiny_cifar.cifar10.json")
    assert "a segmenter is needed" in run("windows", "--record", other, f"data.root={volumes}").refusal()


@pytest.mark.parametrize("task", [SEGMENTER, CLASSIFIER], ids=["segmentation", "classification"])
def test_resumed_run_of_volumes_is_the_uninterrupted_one(task: tuple[str, ...], volumes: Path, tmp_path: Path) -> None:
    words = (*task, "data.augment=volume", "data.flip_axes=[0]", "run.epochs=2", "run.eval_every=2")
    train(tmp_path / "whole", volumes, *words).ok()
    assert "time is up" in train(tmp_path / "parts", volumes, *words, "run.max_minutes=1e-6").ok()
    train(tmp_path / "parts", volumes, *words, "run.resume=true").ok()
    assert_same_weights(tmp_path / "parts", tmp_path / "whole")


def test_classifier_of_volumes(volumes: Path, tmp_path: Path) -> None:
    out = train(tmp_path / "run", volumes, *CLASSIFIER).ok()
    evaluated = json.loads((tmp_path / "run" / "results.json").read_text())["evaluation"]
    assert evaluated["metric"] == "auc"
    assert f"test AUC: {evaluated['metrics']['auc']:.3f}\n" in out
    assert "balanced accuracy" in out
    log = rows(tmp_path / "run")[0]
    assert "train_top1" in log
    assert "train_auc" not in log
    assert "test AUC" in run("validate", "--checkpoint", tmp_path / "run").ok()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rare_classes_can_count_more(dtype: torch.dtype) -> None:
    """In training; a test loss is that of the data as they are."""
    config = load_config(None, ["loss.class_weights=[1.0,5.0,2.0]", "optim.label_smoothing=0.1"])
    model = timm.create_model("test_mdeq", num_classes=3).to(dtype)
    task = build_task(config, model, None, Process())
    logits, labels = torch.randn(7, 3, dtype=dtype), torch.arange(7) % 3
    weight = torch.tensor([1.0, 5.0, 2.0], dtype=dtype)
    expected = F.cross_entropy(logits, labels, weight, label_smoothing=0.1)
    torch.testing.assert_close(task.criterion(logits, labels), expected)
    torch.testing.assert_close(task.loss(logits, labels), F.cross_entropy(logits, labels))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((*SEGMENTER, "task=classification"), "set task=segmentation"),
        ((*CLASSIFIER, "task=segmentation"), "set task=classification"),
        ((*SEGMENTER, "model.name=mdeq3d_tiny"), "is not a segmenter"),
        ((*CLASSIFIER, "model.name=test_mdeq"), "is a 2D model"),
        ((*SEGMENTER, "data.mixup=0.5"), "data.mixup and data.cutmix"),
        ((*CLASSIFIER, "loss.name=dice_ce"), "loss.name=dice_ce"),
        ((*SEGMENTER, "loss.ohem_threshold=0.5"), "loss.ohem_threshold is for loss.name=cross_entropy"),
        ((*CLASSIFIER, "loss.class_weights=[1.0,2.0,3.0]"), "3 entries for 2 classes"),
        ((*CLASSIFIER, "loss.ohem_threshold=0.5"), "loss.ohem_threshold is for task=segmentation"),
        ((*SEGMENTER, "loss.class_weights=[1.0,2.0]"), "2 entries for 3 classes"),
        ((*SEGMENTER, "data.inference=sliding", "data.overlap=1.0"), "data.overlap < 1"),
        ((*SEGMENTER, "data.flip_axes=[3]"), "data.flip_axes"),
        ((*CLASSIFIER, "data.turn_axes=[0]"), "data.turn_axes"),
        ((*CLASSIFIER, "data.augment=crop_flip"), "data.augment"),
    ],
)
def test_what_does_not_go_together(words: tuple[str, ...], said: str, volumes: Path, tmp_path: Path) -> None:
    assert said in train(tmp_path / "run", volumes, *words).refusal()
    assert not (tmp_path / "run").exists()


def test_nifti_pairs_from_files_to_scores(tmp_path: Path) -> None:
    words = ("data.name=nifti", "model.name=mdeq3d_tiny_seg", "data.spacing=[1.0,1.0,1.0]")
    root = decathlon(tmp_path / "task", 5)
    folder = tmp_path / "run"
    out = train(folder, root, *SEGMENTER, *words).ok()
    assert "Dice: front " in out
    assert preprocessing_in(folder)["spacing"] == [1.0, 1.0, 1.0]
    said = run("validate", "--checkpoint", folder).ok()
    assert "Dice: front " in said
    assert "HD95: front " in said
    image, of_image = blob((20, 22, 18), 1)
    for name, array in (("imagesTr", image), ("labelsTr", 0 * of_image)):  # of another spacing, and with an empty mask
        save_nifti(root / name / "case_1.nii.gz", array, np.diag([2.0, 1.0, 1.0, 1.0]))
    said = run("validate", "--checkpoint", folder, "data.spacing=null", "data.test_split=train").ok()
    assert "HD95: front " in said
    # Without a config, the volumes are prepared as those of the training.
    words = ("task=segmentation", "data.name=nifti", f"data.root={root}", "data.test_split=train", *SMALL[-5:])
    words += ("loss.name=dice_ce", "data.batch_size=2")
    alike = run("validate", "--model", f"local-dir:{folder}", *words).ok()
    there = run("validate", "--checkpoint", folder, "data.test_split=train").ok()
    other = run("validate", "--model", f"local-dir:{folder}", *words, "data.spacing=null").ok()
    assert alike.splitlines()[1:] == there.splitlines()[1:]
    assert other.splitlines()[1:] != there.splitlines()[1:]
    description = json.loads((root / "dataset.json").read_text())
    renamed = {**description, "labels": {"0": "background", "1": "left", "2": "right"}}
    (root / "dataset.json").write_text(json.dumps(renamed))
    said = run("validate", "--model", f"local-dir:{folder}", *words).ok()
    assert "background, front, back; classes of the data: background, left, right" in said
    (root / "dataset.json").write_text(json.dumps(description))
    label = root / "labelsTr" / "case_1.nii.gz"
    save_nifti(label, blob((9, 9, 9))[1])
    said = train(tmp_path / "refused", root, *SEGMENTER, *words).refusal()
    assert "case_1.nii.gz has the shape (9, 9, 9), but its image" in said


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["volumes", "images"])
def test_two_processes_give_the_scores_of_one(
    kind: str, segmented: tuple[Path, str], volumes: Path, tmp_path: Path
) -> None:
    """With one test volume the second process has none, and takes part in the sums."""
    words = ["--checkpoint", segmented[0], "data.batch_size=2", "run.progress=false"]
    if kind == "volumes":
        hippocampus(tmp_path / "hippocampus.npz", 1, 4)
        words += [f"data.root={tmp_path}"]
    else:
        root = masks(tmp_path / "masks", 3, (20, 32))
        folder = tmp_path / "run"
        settings = ("task=segmentation", "model.name=mdeq_tiny_seg", "data.name=masks", "data.test_split=val")
        small = ("model.kwargs={channels: [4, 8], num_groups: 2, expansion: 1}", "data.patch_size=[16,16]")
        train(folder, root, *settings, *small, "data.batch_size=2").ok()
        words[1] = folder
    alone = run("validate", *words).ok()
    together = spawn_distributed(tmp_path / "logs", "validate", *words)
    assert [outcome.code for outcome in together] == [0, 0], together[0].err
    assert together[1].out == ""
    assert together[0].out.splitlines()[:2] == alone.splitlines()[:2]
