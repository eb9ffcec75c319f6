"""Settings: the schema, its errors, and how a program ends when it is told something wrong."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import ROOT, TINY, run, train
from timm.optim import list_optimizers

import mdeq
from tools.config import DEFAULT_CONFIG, BadInput, TrainConfig, config_yaml, load_config, split_overrides
from tools.program import program

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))

# What was typed, and the nearest valid thing, which the one line has to name.
UNKNOWN = [
    ("optim.lrr=1", "optim.lr"),
    ("optimm.lr=1", "optim"),
    ("lr=1", "optim.lr"),
    ("max_minutes=3", "run.max_minutes"),
    ("model.kwarg={}", "model.kwargs"),
    ("optim..lr=3", "optim.lr"),
    ("=3", "task"),
    ("task=segmentatoin", "classification"),
    ("data.augment=flop", "flip"),
    ("run.amp=bf17", "bf16"),
    ("run.dtype=float8", "float32"),
]

WRONG_TYPES = [
    "run.epochs=many", "run.epochs=1.5", "optim.lr=fast", "optim.lr=null", "optim.lr=[1", "optim=3", "model.kwargs=3",
    "model.freeze=perhaps", "data.name={a: 1}",
]  # fmt: skip

# Names of things that are looked up when the run is built.
UNKNOWN_NAMES = [
    ("model.name=mdeq_tiny_cifr", "mdeq_tiny_cifar"),
    ("model.name=resnet18", "test_mdeq"),
    ("model.name=test_mdeq.nowhere", "test_mdeq"),
    ("model.kwargs.drop_out=0.1", "dropout"),
    ("model.solver.name=broydn", "broyden"),
    ("model.solver.max_stepz=3", "max_steps"),
    ("model.gradient.name=implict", "implicit"),
    ("optim.name=adamww", "adamw"),
    ("optim.schedule=cosime", "cosine"),
    ("data.name=digitz", "digits"),
    ("run.device=gpu", "cpu"),
]

# Values that nothing can work with, and the setting that the line has to name.
IMPOSSIBLE = [
    (["optim.lr=-1"], "optim.lr"),
    (["optim.lr=nan"], "optim.lr"),
    (["optim.lr=1e39"], "optim.lr must be > 0 and finite in single precision"),
    (["optim.min_lr=-1"], "min_lr"),
    (["optim.lr=1e-4", "optim.min_lr=1e-3"], "optim.min_lr=0.001 must not be above optim.lr=0.0001"),
    (["optim.label_smoothing=2"], "label_smoothing"),
    (["optim.name=sgd", "optim.momentum=0"], "momentum"),
    (["optim.name=sgd", "optim.momentum=1.5"], r"optim.momentum must be in [0, 1)"),
    (["optim.name=adahessian"], "optim.name=adahessian needs second derivatives"),
    (["data.patch_size=[64,64]"], "data.patch_size is for images with masks and for volumes, not for digits"),
    (["data.scale_range=[1.0,2.0]"], "data.scale_range is for images with masks"),
    (["data.turn_axes=[0,1]"], "data.turn_axes is for volumes"),
    (["data.foreground=0.5"], "data.foreground is for volumes with labels per voxel"),
    (["data.orientation=none"], "data.orientation is for nifti"),
    (["optim.accumulate=3"], "optim.accumulate"),
    (["data.batch_size=0"], "data.batch_size"),
    (["data.mixup=0.2", "data.batch_size=15"], "batch_size"),
    (["data.num_train=0"], "data.num_train"),
    (["data.image_size=15"], "data.image_size"),
    (["data.num_classes=5"], "data.num_classes"),
    (["model.kwargs.dropout=5"], "dropout"),
    (["model.kwargs.features_only=true"], "is not a classifier or segmenter of this package"),
    (["run.epochs=0"], "run.epochs"),
    (["run.seed=-1"], "seed"),
    (["run.max_minutes=0"], "run.max_minutes"),
    (["run.threads=0"], "run.threads"),
    (["run.device=cuda:97"], "run.device"),
    (["deq.jacobian_probes=0"], "deq.jacobian_probes"),
    (["model.pretrained=true"], "pretrained"),
]


@pytest.mark.parametrize(("word", "named"), UNKNOWN, ids=[w for w, _ in UNKNOWN])
def test_unknown_key_or_choice(word: str, named: str, tmp_path: Path) -> None:
    assert named in train(tmp_path / "run", word).refusal().replace(word, "", 1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("word", WRONG_TYPES)
def test_wrong_type(word: str, tmp_path: Path) -> None:
    assert word.partition("=")[0] in train(tmp_path / "run", word).refusal()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("word", "named"), UNKNOWN_NAMES, ids=[w for w, _ in UNKNOWN_NAMES])
def test_unknown_name(word: str, named: str, tmp_path: Path) -> None:
    line = train(tmp_path / "run", word).refusal()
    assert named in line.replace(word.partition("=")[2], "")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("words", "named"), IMPOSSIBLE, ids=[" ".join(w) for w, _ in IMPOSSIBLE])
def test_impossible_value(words: list[str], named: str, tmp_path: Path) -> None:
    assert named in train(tmp_path / "run", *words).refusal()
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize("text", ["optim: {lrr: 1}", "lr: 1", "optim: {lr: fast}"])
def test_errors_in_a_file_name_the_file_and_the_setting(text: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    line = run("train", path, f"run.out_dir={tmp_path / 'run'}").refusal()
    assert "wrong.yaml" in line
    assert "optim.lr" in line


@pytest.mark.parametrize("text", ["optim: {lr: 1", "\tx", "- 1\n- 2", "model: [", "a: b: c", "\x00"])
def test_file_that_is_no_mapping_of_settings(text: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    assert "wrong.yaml" in run("train", path).refusal()


@pytest.mark.parametrize("name", ["nowhere.yaml", "", "binary.yaml"])
def test_file_that_cannot_be_read(name: str, tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(bytes(range(128, 256)))
    assert str(tmp_path / name) in run("train", tmp_path / name).refusal()


def test_word_without_a_value(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="key=value"):
        load_config(None, ["optim.lr"])
    assert train(tmp_path / "run", "--lr").code == 2
    assert train(tmp_path / "run", "optim.lr").code == 2
    assert not (tmp_path / "run").exists()


def test_a_path_with_an_equals_sign_is_no_setting() -> None:
    assert split_overrides(["--checkpoint", "runs/lr=0.1", "run.out_dir=runs/lr=0.1"]) == (
        ["run.out_dir=runs/lr=0.1"],
        ["--checkpoint", "runs/lr=0.1"],
    )


def test_split_overrides() -> None:
    assert split_overrides(["c.yaml", "a.b=1", "--steps", "2", "--out=x"]) == (
        ["a.b=1"],
        ["c.yaml", "--steps", "2", "--out=x"],
    )


@pytest.mark.parametrize("path", [None, *CONFIGS, TINY], ids=lambda p: p.stem if p else "defaults")
def test_config_loads_and_survives_writing(path: Path | None, tmp_path: Path) -> None:
    config = load_config(path)
    assert config.model.name.partition(".")[0] in mdeq.list_models()
    assert config.optim.name in list_optimizers()
    (tmp_path / "again.yaml").write_text(config_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config
    assert yaml.safe_load(config_yaml(config)).keys() == {"task", "model", "data", "loss", "optim", "deq", "run"}


def test_the_default_config_is_one_of_those_in_configs() -> None:
    assert DEFAULT_CONFIG in CONFIGS


def test_overrides_win_over_the_file_and_the_last_one_wins() -> None:
    assert load_config(None).run.epochs == 10
    assert load_config(TINY).run.epochs == 1
    assert load_config(TINY, ["run.epochs=3", "run.epochs=4"]).run.epochs == 4
    kwargs = load_config(TINY, ["model.kwargs.dropout=0.5", "model.kwargs.num_features=8"]).model.kwargs
    assert kwargs == {"channels": [4, 8], "head_channels": [4, 4], "num_features": 8, "dropout": 0.5}


def test_another_solver_or_gradient_takes_the_place_of_the_file_s(tmp_path: Path) -> None:
    """An estimator that has other settings than the file's cannot inherit them."""
    word = "model.gradient={name: implicit, solver: {name: picard, max_steps: 2}}"
    train(tmp_path / "run", word, "run.epochs=1", "data.num_train=16").ok()


@pytest.mark.parametrize("number", ["3e-4", "3.0e-4", "0.0003"])
def test_numbers_with_an_exponent_are_numbers(number: str, tmp_path: Path) -> None:
    path = tmp_path / "numbers.yaml"
    path.write_text(f"optim: {{lr: {number}}}\nmodel: {{solver: {{name: broyden, tol: {number}}}}}\n")
    words = [f"optim.min_lr={number}", f"model.kwargs.dropout={number}"]
    config = load_config(path, words)
    values: list[Any] = [
        config.optim.lr,
        config.model.solver["tol"],
        config.optim.min_lr,
        config.model.kwargs["dropout"],
    ]
    assert values == [3e-4] * 4
    assert all(type(value) is float for value in values)


def test_defaults_have_the_types_of_the_schema() -> None:
    assert load_config(None) == TrainConfig()


def test_program_prints_the_last_line_of_a_message_alone(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise BadInput("Caught BadInput in DataLoader worker\nTraceback ...\ntools.config.BadInput: no image\n")

    with pytest.raises(SystemExit) as end:
        program(main)
    assert end.value.code == 2
    assert capsys.readouterr() == ("", "error: no image\n")


def test_program_that_is_interrupted(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        program(main)
    assert end.value.code == 130
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("place", ["1e3", "0123", "a #1", "a: b", "a=b"])
def test_a_path_is_taken_as_it_stands(place: str) -> None:
    config = load_config(None, [f"run.out_dir={place}", f"data.root={place}", f"model.checkpoint={place}"])
    assert (config.run.out_dir, config.data.root, config.model.checkpoint) == (place, place, place)


def test_a_path_in_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert load_config(None, ["run.out_dir=~/x"]).run.out_dir == "/home/somebody/x"
    assert load_config(None, ["run.out_dir=null"]).run.out_dir is None
    with pytest.raises(BadInput, match=r"data\.root: there is no home folder for ~nobody-of-this-name/x; write it out"):
        load_config(None, ["data.root=~nobody-of-this-name/x"])


def test_a_path_that_is_not_utf8() -> None:
    """YAML and safetensors could not write it, which would be told after the first epoch."""
    with pytest.raises(BadInput, match=r"run\.out_dir: the name '/x/l.*uf' is not UTF-8; rename it"):
        load_config(None, ["run.out_dir=/x/l\udce4uf"])


def test_settings_do_not_read_the_environment(tmp_path: Path) -> None:
    """A config.yaml of someone else's would tell of it in its error, or in what the run writes."""
    (tmp_path / "a.yaml").write_text("data: {root: '/data/${oc.env:HOME}'}")
    for arguments in ((tmp_path / "a.yaml",), (None, ["data.root=${oc.env:HOME}"])):
        with pytest.raises(BadInput, match="settings may not refer to others or to the environment"):
            load_config(*arguments)


def test_a_word_may_be_longer_than_the_name_of_a_file() -> None:
    word = "model.kwargs={" + ", ".join(f"a{k}: 1" for k in range(80)) + "}"
    assert split_overrides([word]) == ([word], [])


def test_a_file_with_an_equals_sign_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rep=2.png").touch()
    assert split_overrides(["rep=2.png", "a.b=1"]) == (["a.b=1"], ["rep=2.png"])
