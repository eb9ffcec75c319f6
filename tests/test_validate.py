"""tools/validate.py: what it prints, the table over solver steps, and what it refuses."""

import csv
import dataclasses
import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from helpers import FOUR_BRANCHES, ROOT, TINY, image_folder, make_run, publish, rows, train, validate
from PIL import Image
from torch import Tensor

from mdeq import Broyden, Picard
from mdeq.models import MDEQ
from tools.batches import evaluated_split
from tools.card import model_card, steps_table
from tools.engine import evaluate
from tools.recheck import compared, evaluated_config, renew_record
from tools.scores import DICE
from tools.steps import columns, save_table
from tools.tasks import TOP1

# timm's readers leave it to the garbage collector to close an image file.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run that learnt something."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    words = ["run.epochs=6", "run.eval_every=6", "data.num_train=80", "data.batch_size=10", "optim.lr=1e-2"]
    train(folder, *words, "model.gradient.num_steps=2").ok()
    return folder


@pytest.fixture(scope="module")
def model(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> MDEQ:
    run = make_run(tmp_path_factory.mktemp("again"), f"model.checkpoint={trained}")
    return run.model.eval()


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tensor, Tensor]:
    """The test images and labels."""
    batches = list(make_run(tmp_path_factory.mktemp("split")).test_batches.epoch())
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def test_a_run_with_held_out_samples_is_published_by_the_test_split(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("tools.publish.RELEASES_FOLDER", tmp_path / "weights")
    folder, words = tmp_path / "run", ("--release", "test_mdeq.digits", "--ship")
    train(folder, "data.holdout=20").ok()
    held_out = json.loads((folder / "results.json").read_text())["evaluation"]["metrics"]
    assert "on held-out training samples; for its figure on the test split run" in publish(folder, *words).refusal()
    validate("--checkpoint", folder, "--steps", 1).ok()  # of held-out samples
    validate("--checkpoint", folder, "--record", "data.holdout=null").ok()
    assert "measured with other data settings (none) than results.json" in publish(folder, *words).refusal()
    validate("--checkpoint", folder, "--record", "data.holdout=null", "--steps", 1).ok()
    publish(folder, *words).ok()
    path = tmp_path / "weights" / "test_mdeq.digits.json"
    release = json.loads(path.read_text())
    assert release["metrics"]["loss"] != held_out["loss"]
    assert "recorded" in validate("--record", path).ok()
    seen = evaluated_config(release["card"], "it").data  # by which also tools/visualize.py takes its samples
    assert (seen.holdout, evaluated_split(seen)) == (None, "test")
    card = model_card("o/n", release["config"], release["card"])
    assert "handwritten digits, the last 20 training samples held out. Seed 0" in card


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return 100 * float((logits.argmax(1) == labels).double().mean())


def printed(out: str) -> float:
    return float(re.search(r"^test accuracy: (\d+\.\d+) %", out, re.M).group(1))


def test_record(trained: Path, tmp_path: Path) -> None:
    """With --record the evaluation takes the place of the one before; how the run was trained stays."""
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    before = json.loads((folder / "results.json").read_text())
    validate("--checkpoint", folder, "--record", "model.solver.max_steps=5").ok()
    after = json.loads((folder / "results.json").read_text())
    assert after["training"] == before["training"]
    assert (before["evaluation"]["solver"]["max_steps"], after["evaluation"]["solver"]["max_steps"]) == (2, 5)
    command = "python tools/validate.py --checkpoint run --record model.solver.max_steps=5"
    assert after["evaluation"]["command"] == command
    (folder / "results.json").write_text("{")
    assert "results.json is damaged" in validate("--checkpoint", folder, "--record").refusal()


@pytest.fixture
def release(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The record of a release made of the run."""
    monkeypatch.setattr("tools.publish.RELEASES_FOLDER", tmp_path / "weights")
    publish(trained, "--release", "test_mdeq.digits", "--ship").ok()
    return tmp_path / "weights" / "test_mdeq.digits.json"


def change(record: Path, difference: float, metric: str = "top1") -> None:
    """Have a record say another figure, wherever it does."""
    content = json.loads(record.read_text())
    metrics = content["card"]["evaluation"]["metrics"]
    metrics[metric] += difference
    content["metrics"] = metrics
    content["card"]["seeds"][0]["value"] = metrics["top1"]
    record.write_text(json.dumps(content))


def test_a_record_is_derived_again(trained: Path, release: Path) -> None:
    """Both figures are printed; what the record rounds away is no difference, anything more ends with exit code 1."""
    figure = float(rows(trained)[-1]["test_top1"])
    out = validate("--record", release).ok()
    assert out.startswith(f"accuracy of test_mdeq.digits: found {figure:.4f} %, recorded {figure:.4f} %\n")
    assert "evaluations of f: mean 3.0" in out
    change(release, 0.04)
    assert (
        f"found {figure:.4f} %, recorded {figure + 0.04:.4f} %" in validate("--record", release, "run.threads=1").ok()
    )
    change(release, 0.02)
    outcome = validate("--record", release)
    assert outcome.code == 1
    line = f"accuracy of test_mdeq.digits: found {figure:.4f} %, recorded {figure + 0.06:.4f} %"
    assert outcome.err == f"differs: {line}\n"
    assert outcome.out.startswith(line)
    assert not list(release.parent.glob("results.json"))
    change(release, -0.06)
    change(release, 0.2, "evaluations")
    assert (
        validate("--record", release).err
        == "differs: mean evaluations of f of test_mdeq.digits: found 3.00, recorded 3.20\n"
    )
    change(release, -0.1, "evaluations")
    change(release, -0.02, "converged")
    assert "differs: share that converged of test_mdeq.digits" in validate("--record", release).err
    change(release, 0.01, "converged")
    validate("--record", release).ok()
    change(release, 1.0, "top5")
    assert "differs: top5 of test_mdeq.digits" not in validate("--record", release).err
    change(release, 9.0, "top5")
    assert "differs: top5 of test_mdeq.digits: found" in validate("--record", release).err
    change(release, math.nan, "residual_mean")
    assert "differs: mean residual" in validate("--record", release).err


def test_figures_at_twice_the_steps_are_derived_again(release: Path, tmp_path: Path) -> None:
    """They are, where they are asked for."""
    figure = json.loads(release.read_text())["card"]["evaluation"]["metrics_at_twice_the_steps"]["top1"]
    line = f"accuracy of test_mdeq.digits at twice the steps: found {figure:.4f} %, recorded"
    assert f"{line} {figure:.4f} %\n" in validate("--record", release, "--twice").ok()
    content = json.loads(release.read_text())
    content["card"]["evaluation"]["metrics_at_twice_the_steps"]["top1"] += 0.1
    release.write_text(json.dumps(content))
    validate("--record", release).ok()
    outcome = validate("--record", release, "--twice")
    assert outcome.code == 1
    assert outcome.err == f"differs: {line} {figure + 0.1:.4f} %\n"
    assert "--twice" in validate("--record", release, "--renew", "--twice").refusal()
    assert "--twice" in validate("--model", "test_mdeq", "--twice").refusal()


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("size", 1),
        ("metrics/top1", 99.5),
        ("card/seeds/0/value", 99.5),
        ("card/evaluation/parameters", 1),
        ("card/evaluation/solver/max_steps", 99),
    ],
)
def test_a_record_agrees_with_itself_and_its_weights(release: Path, where: str, value: float) -> None:
    """What is said twice is said alike."""
    content = json.loads(release.read_text())
    *path, last = [int(word) if word.isdecimal() else word for word in where.split("/")]
    place = content
    for word in path:
        place = place[word]
    assert place[last] != value
    place[last] = value
    release.write_text(json.dumps(content))
    outcome = validate("--record", release)
    assert outcome.code == 1
    assert outcome.err.startswith("differs: ")
    assert f" of test_mdeq.digits: recorded {value}" in outcome.err or str(value) in outcome.err
    assert outcome.err.count("\n") == 1


def test_steps_go_into_a_record(trained: Path, release: Path) -> None:
    """The table of a part of the split, spread over it; a figure that differs leaves the record as it was."""
    before = json.loads(release.read_text())
    out = validate("--record", release, "--steps", 1, 2, 4, "--samples", 12).ok()
    assert f"saved: {release}" in out
    after = json.loads(release.read_text())
    table = after["card"].pop("steps")
    assert after["card"].pop("steps_by")["command"].endswith("--steps 1 2 4 --samples 12")
    assert before["card"].pop("steps") == []
    assert after == before
    assert [(row["steps"], row["samples"], row["evaluations"]) for row in table] == [(1, 12, 2), (2, 12, 3), (4, 12, 5)]
    folder = release.parent / "table"
    validate("--checkpoint", trained, "--steps", 1, 2, 4, "--samples", 12, "--out", folder).ok()
    written = [{key: str(value) for key, value in row.items()} for row in table]
    assert list(csv.DictReader((folder / "steps.csv").read_text().splitlines())) == written
    validate("--checkpoint", trained, "--steps", 1, "--samples", 10_000, "--out", folder).ok()
    assert next(csv.DictReader((folder / "steps.csv").read_text().splitlines()))["samples"] == "20"
    assert "On 12 samples spread over the test split" in "\n".join(steps_table(table, "top1"))
    change(release, 1.0)
    text = release.read_text()
    assert validate("--record", release, "--steps", 1).code == 1
    assert release.read_text() == text


def test_a_record_is_renewed(trained: Path, release: Path) -> None:
    """It holds the new evaluation, with the settings that it departs by, and is derived again with these."""
    before = json.loads(release.read_text())
    before["card"]["seeds"].append({"seed": 7, "value": 1.0})  # evaluated as the record was
    release.write_text(json.dumps(before))
    words = ("model.solver.max_steps=5", "model.solver.check_every=2", "data.image_size=24", "run.threads=1")
    out = validate("--record", release, "--renew", "--steps", 1, *words).ok()
    assert f"saved: {release}" in out
    after = json.loads(release.read_text())
    evaluation = after["card"]["evaluation"]
    assert evaluation["solver"]["max_steps"] == after["config"]["model_args"]["solver"]["max_steps"] == 5
    assert after["config"]["model_args"]["solver"]["check_every"] == 2
    assert "divergence_factor" not in after["config"]["model_args"]["solver"]
    assert evaluation["settings"] == ["data.image_size=24"]
    assert evaluation["metrics"] == after["metrics"] != before["metrics"]
    assert after["card"]["seeds"] == [{"seed": 0, "value": evaluation["metrics"]["top1"]}]
    assert [row["steps"] for row in after["card"]["steps"]] == [1]
    for key in ("training", "config", "data", "notes"):
        assert after["card"][key] == before["card"][key]
    assert (after["sha256"], after["size"]) == (before["sha256"], before["size"])
    assert "recorded" in validate("--record", release, "data.batch_size=7").ok()
    assert "--record FILE" in validate("--checkpoint", trained, "--renew").refusal()
    card = model_card("o/n", after["config"], after["card"])
    assert "data.image_size=24" in card
    assert "the whole test split" in card
    validate("--record", release, "--renew").ok()  # the same again, without a table
    again = json.loads(release.read_text())
    assert again["card"]["steps"] == []
    assert "steps_by" not in again["card"]
    assert again["card"]["evaluation"]["settings"] == ["data.image_size=24"]
    assert again["metrics"]["top1"] == after["metrics"]["top1"]
    for word in ("model.checkpoint=x", "run.amp=bf16"):
        assert word in validate("--record", release, "--renew", word).refusal()


def test_records_that_cannot_be_checked(trained: Path, release: Path, tmp_path: Path) -> None:
    assert "--model" in validate("--record", release, "--model", "test_mdeq").refusal()
    assert "--samples" in validate("--record", release, "--samples", "2").refusal()
    assert "--samples" in validate("--record", release, "--steps", "2", "--samples", "0").refusal()
    assert "--out" in validate("--record", release, "--steps", "2", "--out", tmp_path).refusal()
    assert "run.amp=bf16" in validate("--record", release, "run.amp=bf16").refusal()
    assert "model.solver.max_steps=9" in validate("--record", release, "model.solver.max_steps=9").refusal()
    assert "nowhere.json" in validate("--record", tmp_path / "nowhere.json").refusal()
    shipped = "mdeq_tiny_cifar.cifar10"
    assert f"{shipped}.json" in validate("--record", shipped).refusal()
    of_package = ROOT / "mdeq" / "weights" / shipped
    assert "to the folder of the cifar10 data" in validate("--record", f"{of_package}.json").refusal()
    assert "the .json file beside them" in validate("--record", f"{of_package}.safetensors").refusal()
    line = validate("--model", "mdeq_tiny_cifar.cifar100", "data.name=digits").refusal()
    assert "no weights named mdeq_tiny_cifar.cifar100; did you mean mdeq_tiny_cifar.cifar10" in line
    for words in (["--flip"], ["--scales", "1", "2"], ["model.kwargs.dropout=0.5"], ["run.dtype=float64"]):
        line = validate("--checkpoint", trained, "--record", *words).refusal()
        assert f"--record keeps settings of the data and the solver only; leave out {words[0]}" in line
    without = json.loads(release.read_text())
    del without["card"]["config"]
    for text in (json.dumps(without), "{", "[]", "{}", '{"sha256": "", "size": 1, "card": {"evaluation": 1}}'):
        (tmp_path / "other.json").write_text(text)
        assert "other.json" in validate("--record", tmp_path / "other.json").refusal()
    weights = release.with_suffix(".safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert "damaged" in validate("--record", release).refusal()


def test_accuracy_and_solves(trained: Path, model: MDEQ, split: tuple[Tensor, Tensor]) -> None:
    out = validate("--checkpoint", trained / "model.safetensors").ok()
    x, y = split
    with torch.no_grad():
        logits, equilibrium = model(x, return_equilibrium=True)
    assert printed(out) == pytest.approx(accuracy(logits, y), abs=0.01)
    assert f"loss {float(torch.nn.functional.cross_entropy(logits, y)):.4f}" in out
    assert re.search(r"^at twice the solver steps \(4\D*\): \d+\.\d+ %$", out, re.M)
    assert "\nevaluations of f: mean 3.0\n" in out
    mean, median = re.search(
        r"^residual: mean (\S+), median (\S+), 90 % \S+, 99 % \S+, largest \S+$", out, re.M
    ).groups()
    residual = equilibrium.stats.residual
    assert float(mean) == pytest.approx(float(residual.mean()), rel=0.01)
    assert float(median) == pytest.approx(float(residual.sort().values[10]), rel=0.01)
    assert "solver status: converged 0.0 %, max_steps 100.0 %, diverged 0.0 %, nonfinite 0.0 %" in out
    assert not (trained / "steps.csv").exists()


def test_it_agrees_with_the_end_of_training(trained: Path) -> None:
    out = validate("--checkpoint", trained).ok()
    assert printed(out) == pytest.approx(float(rows(trained)[-1]["test_top1"]), abs=0.01)


@pytest.mark.parametrize("name", ["", "model.safetensors", "checkpoint.pt"])
def test_config_beside_the_checkpoint(name: str, trained: Path) -> None:
    out = validate("--checkpoint", trained / name).ok()
    assert out.startswith("test_mdeq of run on digits, Picard(")
    assert "max_steps=2" in out


def test_another_config_and_overrides(trained: Path, tmp_path: Path) -> None:
    moved = shutil.copy(trained / "model.safetensors", tmp_path / "moved.safetensors")
    assert "nothing to evaluate" in validate("--checkpoint", moved).refusal()
    plain = validate("--config", TINY, "--checkpoint", moved).ok()
    assert printed(plain) == printed(validate("--checkpoint", trained).ok())
    more = validate("--config", TINY, "--checkpoint", moved, "model.solver.max_steps=7").ok()
    assert "max_steps=7" in more
    assert "at twice the solver steps (14" in more


def test_a_model_by_name_with_a_checkpoint(tmp_path: Path) -> None:
    """Without a config, the model, its settings and the weights are all there is."""
    run = make_run(tmp_path / "run", "data.num_train=16", *FOUR_BRANCHES)
    run.train()
    moved = shutil.copy(tmp_path / "run" / "model.safetensors", tmp_path / "moved.safetensors")
    words = ["data.name=digits", "data.image_size=16", "data.batch_size=10", "run.threads=1", "run.progress=false"]
    out = validate("--model", "test_mdeq", "--checkpoint", moved, *words).ok()
    assert out.startswith("test_mdeq of moved.safetensors on digits, Broyden(")
    result = evaluate(run.model, run.test_batches, solver=Broyden(max_steps=8, stop_mode="abs"))
    assert printed(out) == pytest.approx(result["top1"], abs=0.01)


def test_a_model_from_a_folder(trained: Path) -> None:
    """timm's own way to name weights."""
    words = ["data.image_size=16", "data.batch_size=16", "run.threads=1", "run.progress=false"]
    line = validate("--model", f"local-dir:{trained}", *words).refusal()
    assert f"cannot tell which data local-dir:{trained} is for; set data.name=NAME" in line
    out = validate("--model", f"local-dir:{trained}", "data.name=digits", *words).ok()
    assert printed(out) == printed(validate("--checkpoint", trained).ok())


def test_a_release_by_name_is_evaluated_on_its_own_data(tmp_path: Path) -> None:
    """And on others where they are named, but not on the digits of the quickstart unasked."""
    name = "deq_tiny_cifar.cifar10"
    for known in (name, name.partition(".")[0]):  # timm takes these weights for both
        assert "set data.root=FOLDER to the folder of the cifar10 data" in validate("--model", known).refusal()
    assert f"no CIFAR-10 in {tmp_path}" in validate("--model", name, f"data.root={tmp_path}").refusal()
    words = ["data.name=digits", "data.num_train=1", "data.image_size=16", "model.solver.max_steps=1", "run.threads=1"]
    assert validate("--model", name, *words).ok().startswith(f"{name} on digits")


# The table over solver steps.


@pytest.fixture(scope="module")
def table(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a table at 1, 2, 4 and 8 steps, and what was printed."""
    out = tmp_path_factory.mktemp("table") / "new"
    return out, validate("--checkpoint", trained, "--steps", 4, 1, 2, 8, 2, "--out", out).ok()


def test_steps_csv(table: tuple[Path, str], model: MDEQ, split: tuple[Tensor, Tensor]) -> None:
    folder, _ = table
    lines = rows(folder, "steps.csv")
    assert list(lines[0]) == columns(TOP1)
    assert [line["steps"] for line in lines] == ["1", "2", "4", "8"]
    x, y = split
    for line in lines:
        solver = dataclasses.replace(model.deq.solver, max_steps=int(line["steps"]))
        with torch.no_grad():
            logits, equilibrium = model(x, return_equilibrium=True, solver=solver)
        assert float(line["top1"]) == pytest.approx(accuracy(logits, y), abs=1e-6)
        assert float(line["residual_mean"]) == pytest.approx(float(equilibrium.stats.residual.mean()), rel=1e-4)
        assert float(line["evaluations"]) == int(line["steps"]) + 1


def test_explicit_twin(table: tuple[Path, str], model: MDEQ, split: tuple[Tensor, Tensor]) -> None:
    """The twin at K is f applied K times: its accuracy, and its residual |f(z) - z| / |f(z)| there."""
    x, y = split
    for line in rows(table[0], "steps.csv"):
        count = int(line["steps"])
        with torch.no_grad():
            logits, equilibrium = model(x, return_equilibrium=True, unroll=count)
            fn = model.equilibrium.fn(model.injection(x))
            z = torch.cat([s.flatten(1) for s in equilibrium.state], 1)
            f = torch.cat([s.flatten(1) for s in fn(equilibrium.state)], 1)
        assert float(line["twin_top1"]) == pytest.approx(accuracy(logits, y), abs=1e-6)
        residual = ((f - z).norm(dim=1) / f.norm(dim=1)).mean()
        assert float(line["twin_residual_mean"]) == pytest.approx(float(residual), rel=1e-4)


def test_the_twin_and_picard_are_the_same_network(table: tuple[Path, str], model: MDEQ) -> None:
    """The solver of this run is undamped Picard: where its last iterate is its best, it is the twin."""
    assert isinstance(model.deq.solver, Picard)
    for line in rows(table[0], "steps.csv"):
        if line["residual_mean"] == line["twin_residual_mean"]:
            assert line["top1"] == line["twin_top1"]


def test_steps_are_printed(table: tuple[Path, str]) -> None:
    folder, out = table
    lines = out[out.index("\n steps ") + 1 :].splitlines()
    for line, row in zip(lines[1:], rows(folder, "steps.csv")):
        cells = line.split()
        assert cells[0] == row["steps"]
        assert float(cells[1]) == pytest.approx(float(row["top1"]), abs=0.01)
        assert float(cells[-1]) == pytest.approx(float(row["twin_residual_mean"]), rel=0.01)
    assert f"saved: {folder / 'steps.csv'}, {folder / 'steps.png'}" in out


def test_steps_png_is_a_picture(table: tuple[Path, str]) -> None:
    with Image.open(table[0] / "steps.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    assert pixels.shape[0] >= 300
    assert pixels.shape[1] >= 600
    assert 0.01 < (pixels < 200).mean() < 0.5
    assert {path.name for path in table[0].iterdir()} == {"steps.csv", "steps.png"}
    assert not plt.get_fignums()


def test_table_lies_beside_the_checkpoint(trained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained, tmp_path / "run")
    validate("--checkpoint", folder / "model.safetensors", "--steps", 1).ok()
    assert len(rows(folder, "steps.csv")) == 1
    assert (folder / "steps.png").exists()


@pytest.mark.filterwarnings("ignore:Data has no positive values")
def test_table_of_numbers_that_are_not_finite(tmp_path: Path) -> None:
    row = {name: math.inf for name in columns(TOP1)}
    save_table([{**row, "steps": 1}, {**row, "steps": 2, "residual_mean": 0.0}], tmp_path, "x", TOP1)
    assert (tmp_path / "steps.png").exists()


# Image folders.


def test_image_folder_with_classes_of_its_own(tmp_path: Path) -> None:
    """The number of classes is that of the checkpoint beside the config, which does not name it."""
    image_folder(tmp_path / "data")
    words = ["data.name=folder", f"data.root={tmp_path / 'data'}", "data.num_train=null", "data.batch_size=8"]
    train(tmp_path / "run", *words).ok()
    out = validate("--checkpoint", tmp_path / "run").ok()
    assert printed(out) == pytest.approx(float(rows(tmp_path / "run")[-1]["test_top1"]), abs=0.01)
    assert "classes of" not in out
    for old, new in (("cat", "cow"), ("ant", "dog")):
        for split in ("train", "validation"):
            (tmp_path / "data" / split / old).rename(tmp_path / "data" / split / new)
        outcome = validate("--checkpoint", tmp_path / "run" / "model.safetensors")
        if new == "cow":
            assert "model.safetensors: ant, bee, cat; classes of the data: ant, bee, cow" in outcome.ok()
    assert "classes of the data: bee, cow, dog; bee is not the same number in both" in outcome.refusal()


def test_top5_of_three_classes(tmp_path: Path) -> None:
    image_folder(tmp_path / "data")
    words = ["data.name=folder", f"data.root={tmp_path / 'data'}", "data.num_train=null", "data.batch_size=8"]
    out = train(tmp_path / "run", *words, "data.num_classes=3").ok()
    assert "test accuracy" in out
    assert "top-5 100.00 %" in validate("--checkpoint", tmp_path / "run").ok()


# Refusals.


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "--checkpoint"),
        (["run.seed=1"], "--checkpoint"),
        (["--checkpoint", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--model", "mdeq_smal"], "mdeq_small"),
        (["--config", str(TINY), "--steps", "0"], "--steps"),
        (["--config", str(TINY), "--steps", "2", "-1"], "--steps"),
        (["--config", str(TINY), "optim.lrr=1"], "optim.lr"),
        (["--model", "test_mdeq", "data.image_size=16"], "cannot tell which data test_mdeq is for"),
        (["--model", "test_mdeq", "data.name=digits", "data.image_size=16"], "pretrained"),
        (["--model", "local-dir:nowhere"], "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_arguments(words: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert named in validate(*words).refusal()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["stray"], ["--nothing"], ["--steps", "many"]], ids=" ".join)
def test_words_that_are_no_arguments(words: list[str], trained: Path) -> None:
    outcome = validate("--checkpoint", trained, *words)
    assert outcome.code == 2
    assert words[-1] in outcome.err
    assert "Traceback" not in outcome.err


def test_output_folder_that_cannot_be_made(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    assert "file" in validate("--checkpoint", trained, "--steps", 1, "--out", tmp_path / "file").refusal()
    assert (tmp_path / "file").read_text() == "precious"


def test_bad_config_beside_the_checkpoint(trained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained, tmp_path / "run")
    (folder / "config.yaml").write_text("optim: {lrr: 1}")
    line = validate("--checkpoint", folder).refusal()
    assert "config.yaml" in line
    assert "optim.lr" in line


# The evaluation itself.


def test_evaluate_wraps_its_batches(model: MDEQ, tmp_path: Path) -> None:
    seen = []

    def watch(batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            seen.append(len(batch[1]))
            yield batch

    evaluate(model, make_run(tmp_path / "run").test_batches, watch=watch)
    assert seen == [16, 4]
    assert not model.training


def test_no_progress_bar_where_it_is_switched_off(trained: Path) -> None:
    assert validate("--checkpoint", trained).err == ""
    assert "test" in validate("--checkpoint", trained, "run.progress=true").err


def test_twice_the_steps_know_no_tolerance(tmp_path: Path) -> None:
    """At twice the steps, and in the table, no sample stops early, however loose the tolerance of the solver is."""
    folder, found = tmp_path / "run", []
    train(folder, "data.num_train=16", "model.solver.tol=0.99").ok()
    found.append(json.loads((folder / "results.json").read_text())["evaluation"])
    validate("--checkpoint", folder, "--record", "--steps", 4).ok()
    found.append(json.loads((folder / "results.json").read_text())["evaluation"])
    for evaluation in found:
        assert evaluation["metrics"]["evaluations"] < 3
        assert evaluation["metrics_at_twice_the_steps"]["evaluations"] == 5
    assert [float(row["evaluations"]) for row in rows(folder, "steps.csv")] == [5]


def test_figures_agree_to_half_of_the_last_digit() -> None:
    assert [compared("x", DICE, found, 0.8770)[1] for found in (0.8774, 0.8776, 0.8764)] == [True, False, False]
    assert [compared("x", TOP1, found, 90.0)[1] for found in (90.04, 90.06)] == [True, False]


def test_renewing_keeps_what_was_evaluated_alike(tmp_path: Path) -> None:
    """What was evaluated alike stays, what was not goes."""
    path, old = tmp_path / "x.json", {"seed": 7, "value": 2.0}
    now = {"metric": "top1", "metrics": {"top1": 1.0}, "solver": {"name": "picard", "max_steps": 2}}
    card = {"evaluation": now, "training": {"seed": 0}, "seeds": [{"seed": 0, "value": 1.5}, old], "baseline": {}}
    path.write_text(json.dumps({"metrics": {}, "config": {"model_args": {}}, "card": card}))
    renew_record(path, now, {})
    card = json.loads(path.read_text())["card"]
    assert (card["seeds"], "baseline" in card) == ([{"seed": 0, "value": 1.0}, old], True)
    renew_record(path, {**now, "settings": ["data.image_size=24"]}, {})
    card = json.loads(path.read_text())["card"]
    assert (card["seeds"], "baseline" in card) == ([{"seed": 0, "value": 1.0}], False)
