"""Bad data and damaged or hostile files: one line, exit code 2, nothing half written."""

import contextlib
import os
import pickle
import random
import shutil
import stat
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    FOUR_BRANCHES,
    ROOT,
    TINY,
    assert_nothing_partial,
    few_digits,
    image_folder,
    rows,
    run,
    spawn_train,
    train,
    validate,
    write_images,
)
from safetensors.torch import save_file

import tools.train
from tools.checkpoint import clear_leftovers, load_state, read_weights, save_state, write_atomically
from tools.config import BadInput
from tools.program import program

# timm's readers leave it to the garbage collector to close an image file.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

FOLDER = ("data.name=folder", "data.num_train=null")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run on digits."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(folder, "data.num_train=16").ok()
    return folder


# Data.


@pytest.mark.parametrize("name", ["folder", "cifar10"])
def test_missing_data_folder(name: str, tmp_path: Path) -> None:
    words = [f"data.name={name}", f"data.root={tmp_path / 'nowhere'}", "data.num_train=null"]
    assert "nowhere" in train(tmp_path / "run", *words).refusal()
    assert_nothing_partial(tmp_path / "run")


@pytest.mark.parametrize("name", ["folder", "cifar10"])
def test_empty_data_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty" / "train").mkdir(parents=True)
    words = [f"data.name={name}", f"data.root={tmp_path / 'empty'}", "data.num_train=null"]
    assert "empty" in train(tmp_path / "run", *words).refusal()
    assert_nothing_partial(tmp_path / "run")


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "text": b"this is no image"}[how])


@pytest.mark.parametrize(
    ("split", "how", "workers"),
    [("train", "truncated", 0), ("train", "empty", 1), ("validation", "text", 0), ("validation", "truncated", 1)],
)
def test_unreadable_image(split: str, how: str, workers: int, tmp_path: Path) -> None:
    image_folder(tmp_path / "data")
    damage(tmp_path / "data" / split / "bee" / "001.png", how)
    words = [*FOLDER, f"data.root={tmp_path / 'data'}", f"data.workers={workers}", "data.batch_size=8"]
    line = spawn_train(tmp_path / "run", *words).refusal()
    assert os.path.join("data", split, "bee", "001.png") in line
    if split == "train":
        assert_nothing_partial(tmp_path / "run")


def test_unreadable_image_under_a_progress_bar(tmp_path: Path) -> None:
    """The line begins a line of the terminal: it does not go on where the bar ended."""
    image_folder(tmp_path / "data")
    damage(tmp_path / "data" / "train" / "bee" / "001.png", "truncated")
    words = [*FOLDER, f"data.root={tmp_path / 'data'}", "data.batch_size=8", "run.progress=true"]
    outcome = spawn_train(tmp_path / "run", *words)
    assert outcome.code == 2
    lines = [line for line in outcome.err.replace("\r", "\n").splitlines() if "error" in line]
    assert len(lines) == 1
    assert lines[0].startswith("error: "), lines[0]


def test_unreadable_image_when_validating(tmp_path: Path) -> None:
    image_folder(tmp_path / "data")
    words = [*FOLDER, f"data.root={tmp_path / 'data'}", "data.batch_size=8"]
    train(tmp_path / "run", *words, "data.num_classes=3").ok()
    damage(tmp_path / "data" / "validation" / "cat" / "002.png", "truncated")
    assert "002.png" in validate("--checkpoint", tmp_path / "run").refusal()


def test_image_under_16_pixels(tmp_path: Path) -> None:
    assert "15" in train(tmp_path / "run", "data.image_size=15").refusal()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("channels", [2, 4])
def test_wrong_number_of_channels(channels: int, tmp_path: Path) -> None:
    line = train(tmp_path / "run", f"model.kwargs.in_chans={channels}").refusal()
    assert "1 channels" in line
    assert f"takes {channels}" in line
    assert not (tmp_path / "run").exists()


def test_wrong_number_of_channels_for_an_image_folder(tmp_path: Path) -> None:
    image_folder(tmp_path / "data")
    line = train(tmp_path / "run", *FOLDER, f"data.root={tmp_path / 'data'}", "model.kwargs.in_chans=2").refusal()
    assert "in_chans" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [["data.batch_size=1"], ["data.num_train=1"], ["optim.accumulate=16"]])
def test_a_batch_norm_left_with_one_value(words: list[str], tmp_path: Path) -> None:
    line = train(tmp_path / "run", *FOUR_BRANCHES, *words).refusal()
    assert "batch norm" in line
    assert "model.freeze_bn=true" in line
    assert_nothing_partial(tmp_path / "run")


def test_a_batch_of_one_image_trains_with_frozen_batch_norms(tmp_path: Path) -> None:
    train(tmp_path / "run", *FOUR_BRANCHES, "data.batch_size=1", "data.num_train=2", "model.freeze_bn=true").ok()


def test_a_last_batch_of_one_test_image(tmp_path: Path) -> None:
    """A test split of 20 images in batches of 19: the smallest map of the model has one pixel, for one image."""
    train(tmp_path / "run", *FOUR_BRANCHES, "data.batch_size=19", "data.num_train=19").ok()


def test_more_classes_than_the_model_has(tmp_path: Path) -> None:
    assert "data.num_classes=10" in train(tmp_path / "run", "data.num_classes=5").refusal()
    assert not (tmp_path / "run").exists()


# The output folder.


def test_a_folder_that_holds_a_run_is_left_alone(trained: Path) -> None:
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    assert "run.resume=true" in train(trained, "optim.lr=0.5").refusal()
    assert {path.name: path.read_bytes() for path in trained.iterdir()} == before


def test_new_runs_get_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/data_tiny", "runs/data_tiny-2"):
        assert f"{folder}/model.safetensors" in train_here()
    assert "runs/data_tiny-2/" in train_here("run.resume=true")  # the newest
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["data_tiny", "data_tiny-2"]


def train_here(*words: str) -> str:
    return run("train", TINY, "data.num_train=16", *words).ok()


@pytest.mark.parametrize("place", ["file", "file/run"])
def test_output_folder_that_cannot_be_made(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    assert "file" in train(tmp_path / place).refusal()
    assert (tmp_path / "file").read_text() == "precious"


def test_resuming_what_is_not_there(tmp_path: Path) -> None:
    assert "run.resume=true" in train(tmp_path / "run", "run.resume=true").refusal()
    assert not (tmp_path / "run").exists()


# Checkpoint files.


class Hostile:
    """Unpickled with trust, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (open, (str(self.path), "w"))


def test_hostile_pickles_do_not_run(trained: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    hostile = {"model": {"x": Hostile(ran)}, "optimizer": Hostile(ran)}
    torch.save(hostile, tmp_path / "zip.pt")
    torch.save(hostile, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(hostile))
    (tmp_path / "script.pt").write_bytes(b"cos\nsystem\n(S'touch " + str(ran).encode() + b"'\ntR.")
    for name in ("zip.pt", "legacy.pt", "plain.pt", "script.pt"):
        words = ["--config", trained / "config.yaml", "--checkpoint", tmp_path / name]
        line = validate(*words).refusal()
        assert name in line
        assert "weights_only" not in line  # no advice to read it with trust
        assert name in train(tmp_path / "run", f"model.checkpoint={tmp_path / name}").refusal()
        assert not (tmp_path / "run").exists()
        (tmp_path / "resumed").mkdir(exist_ok=True)
        shutil.copy(tmp_path / name, tmp_path / "resumed" / "checkpoint.pt")
        assert "checkpoint.pt" in train(tmp_path / "resumed", "run.resume=true").refusal()
        assert not ran.exists()
    torch.load(tmp_path / "zip.pt", weights_only=False)  # the trap works
    assert ran.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "checkpoint.pt"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_truncated_checkpoint(name: str, share: float, trained: Path, tmp_path: Path) -> None:
    content = (trained / name).read_bytes()
    broken = tmp_path / name
    broken.write_bytes(content[: int(share * len(content))])
    assert str(broken) in validate("--config", trained / "config.yaml", "--checkpoint", broken).refusal()
    assert str(broken) in train(tmp_path / "run", f"model.checkpoint={broken}").refusal()
    assert not (tmp_path / "run").exists()


def test_truncated_state_is_not_resumed_from(trained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained, tmp_path / "run")
    content = (folder / "checkpoint.pt").read_bytes()
    (folder / "checkpoint.pt").write_bytes(content[: len(content) // 2])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "checkpoint.pt" in train(folder, "run.resume=true", "run.epochs=2").refusal()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    "state",
    [{"optimizer": 1}, {"model": {}}, {"optimizer": {}, "model": {}}, [1], torch.zeros(3)],
    ids=["no model", "no optimizer", "empty", "list", "tensor"],
)
def test_state_of_something_else_is_not_resumed_from(state: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    torch.save(state, tmp_path / "run" / "checkpoint.pt")
    assert "checkpoint.pt" in train(tmp_path / "run", "run.resume=true").refusal()


@pytest.mark.parametrize(
    "words",
    [
        ["model.kwargs.num_features=20"],
        ["optim.name=lion"],
        ["optim.name=sgd"],
        ["model.freeze=true"],
        ["optim.ema_decay=0.9"],
    ],
    ids=lambda words: words[0],
)
def test_state_of_other_settings_is_not_resumed_from(words: list[str], trained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained, tmp_path / "run")
    before = (folder / "checkpoint.pt").read_bytes()
    assert "checkpoint.pt" in train(folder, "run.resume=true", "data.num_train=16", "run.epochs=2", *words).refusal()
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert len(rows(folder)) == 1


def test_state_that_is_damaged_anywhere_is_refused_or_read(trained: Path, tmp_path: Path) -> None:
    """No kind of damage makes anything but BadInput."""
    content, rng = (trained / "checkpoint.pt").read_bytes(), random.Random(0)
    path = tmp_path / "checkpoint.pt"
    for k in range(150):
        broken = bytearray(content)
        for _ in range(rng.choice([1, 10, 1000])):
            broken[rng.randrange(min(len(broken), 3000) if k % 2 else len(broken))] = rng.randrange(256)
        if k % 3 == 0:
            broken = bytearray(rng.randbytes(rng.randrange(300)))
        path.write_bytes(broken)
        for read in (load_state, read_weights):
            with warnings.catch_warnings(), contextlib.suppress(BadInput):
                warnings.simplefilter("ignore")
                read(path)


@pytest.mark.parametrize("content", [{"model": {"x": 1}}, {}, 3, {"model": {}}], ids=str)
def test_file_without_weights(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(BadInput, match="no weights"):
        read_weights(tmp_path / "x.pt")


@pytest.mark.parametrize("names", [["net"], ["model_state_dict"], ["model", "state_dict"], ["state_dict", "model"]])
def test_weights_among_the_entries_of_a_training_program(names: list[str], tmp_path: Path) -> None:
    content: Any = {"x": torch.ones(1)}
    for name in reversed(names):
        content = {name: content, "epoch": 3}
    torch.save(content, tmp_path / "x.pt")
    assert list(read_weights(tmp_path / "x.pt")) == ["x"]


def test_a_mapping_that_holds_itself_is_refused(tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    content["model"] = content
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(BadInput, match="holds no weights"):
        read_weights(tmp_path / "x.pt")


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_a_file_that_may_not_be_read_is_told(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).touch()

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(BadInput, match="Permission denied"):
        read_weights(tmp_path / name)


def test_a_file_without_checksums_is_read(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    torch.save({"x": torch.ones(1)}, tmp_path / "x.pt")
    torch.serialization.set_crc32_options(before)
    assert list(read_weights(tmp_path / "x.pt")) == ["x"]


def test_missing_checkpoint(tmp_path: Path) -> None:
    for path in (tmp_path / "x.pt", tmp_path / "x.safetensors", tmp_path):
        with pytest.raises(BadInput, match="no checkpoint"):
            read_weights(path)
    assert "x.pt" in train(tmp_path / "run", f"model.checkpoint={tmp_path / 'x.pt'}").refusal()


def test_checkpoint_of_another_architecture(trained: Path, tmp_path: Path) -> None:
    weights = shutil.copy(trained / "model.safetensors", tmp_path / "weights.safetensors")
    words = ["model.kwargs.num_features=20", f"model.checkpoint={weights}"]
    assert "does not fit" in train(tmp_path / "run", *words).refusal()
    assert not (tmp_path / "run").exists()
    line = validate("--model", "mdeq_tiny_cifar", "--checkpoint", weights, "data.name=digits").refusal()
    assert "weights.safetensors" in line
    save_file({"x": torch.zeros(3)}, tmp_path / "x.safetensors")
    words = ["--config", str(trained / "config.yaml"), "--checkpoint", str(tmp_path / "x.safetensors")]
    assert "not an MDEQ checkpoint" in validate(*words).refusal()


def test_checkpoint_with_another_number_of_classes(trained: Path) -> None:
    line = validate("--checkpoint", trained, "data.num_classes=12").refusal()
    assert "10 classes" in line
    assert "12" in line


def test_checkpoint_with_fewer_classes_than_the_data(trained: Path, tmp_path: Path) -> None:
    root = write_images(tmp_path / "data" / "validation", [f"class{k:02d}" for k in range(12)], 1).parent
    line = validate("--checkpoint", trained, *FOLDER, f"data.root={root}").refusal()
    assert "12" in line
    assert "10" in line


# Writing.


def test_write_atomically_leaves_the_old_file_where_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("new, half")
        raise OSError("disk full")

    with pytest.raises(BadInput, match="disk full"):
        write_atomically(path, fail)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"
    write_atomically(path, lambda temporary: temporary.write_text("new"))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "new"


def test_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = {"optimizer": {"state": {0: torch.arange(3.0)}}, "counts": [1, 2], "config": "a: 1"}
    save_state(tmp_path, written)
    state = load_state(tmp_path / "checkpoint.pt")
    assert torch.equal(state["optimizer"]["state"][0], written["optimizer"]["state"][0])
    assert state["counts"] == [1, 2]


@pytest.mark.skipif(os.name != "posix", reason="a mask of POSIX")
def test_files_are_written_as_the_umask_says(tmp_path: Path) -> None:
    script = "import sys, pathlib, tools.checkpoint as c; c.write_text(pathlib.Path(sys.argv[1]), '')"
    for mask, mode in ((0o077, 0o600), (0o022, 0o644)):
        path = tmp_path / f"{mask}"
        subprocess.run([sys.executable, "-c", script, path], check=True, cwd=ROOT, umask=mask)
        assert stat.S_IMODE(path.stat().st_mode) == mode


def test_only_what_a_kill_left_is_cleared_away(tmp_path: Path) -> None:
    for name in (".config.yaml.swp", ".log.csv.mine", ".config.yaml.a1b2c3d4"):
        (tmp_path / name).touch()
    clear_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".config.yaml.swp", ".log.csv.mine"]


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
@pytest.mark.parametrize("length", [10, 2**17])
def test_output_that_nobody_reads(length: int) -> None:
    """As of `... | head`: no traceback, neither at once nor at the end, when what was printed is written."""
    code = f"from tools.program import program\nprogram(lambda: print('x' * {length}))"
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as pipe:
        done = subprocess.run([sys.executable, "-c", code], stdout=pipe, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_closed_stream(stream: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As after `>&-`, and without a console on Windows: there is nobody to tell, and nothing wrong."""
    monkeypatch.setattr("sys.argv", ["train.py", str(TINY), f"run.out_dir={tmp_path / 'run'}", "run.progress=true"])
    monkeypatch.setattr("sklearn.datasets.load_digits", few_digits)
    monkeypatch.setattr(sys, stream, None)
    program(tools.train.main)
    assert (tmp_path / "run" / "model.safetensors").exists()
    getattr(sys, stream).close()


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    assert "File name too long: " in train(tmp_path / ("x" * 300)).refusal()
