"""Released weights: records, shipped files, the cache, push to and pull from a Hub, and what goes wrong there."""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
import yaml
from helpers import ROOT, TINY, publish, run, train, validate
from hub_client import digest
from hub_server import TOKEN, Hub, serving
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors.torch import load_file, save_file
from timm.data import resolve_data_config

import mdeq
import tools.publish
from mdeq.models import weights
from mdeq.models.weights import DEFAULT_ORG, Release, WeightsError, local_file, with_releases
from tools.build import renew_cfg
from tools.card import model_card
from tools.config import BadInput, DataConfig, ModelConfig, TrainConfig, config_yaml, load_config, parse_config
from tools.known_data import combined_licence
from tools.publish import TABLE_END, TABLE_START, shipped_files, with_table
from tools.recheck import contradictions

# The whole of the architecture, as a released tag has it.
WORDS = ("model.kwargs={}", "model.kwargs.dropout=0.1", "model.solver.max_steps=3", "data.image_size=32")


RELEASE = ("--release", "test_mdeq.digits")

OLD_HUB = int(huggingface_hub.__version__.partition(".")[0]) < 2
# Versions that do not count what came leave it to the sum.
CUT = "is not the released one .* was deleted; try again" if OLD_HUB else "the download of .* was cut short; try again"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of test_mdeq with its table over steps."""
    folder = tmp_path_factory.mktemp("hub") / "run"
    train(folder, *WORDS, "model.kwargs.channels=[4,4,8,8]", "model.kwargs.head_channels=[4,4,4,4]").ok()
    names = ("steps", "top1", "residual_mean", "evaluations", "twin_top1")
    rows = [(1, 40.0, 0.5, 2.0, 39.0), (2, 50.0, 0.25, 3.0, 45.0)]
    results = json.loads((folder / "results.json").read_text())
    results["steps"] = [dict(zip(names, row)) for row in rows]
    (folder / "results.json").write_text(json.dumps(results))
    return folder


@pytest.fixture
def releases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that tools/publish.py takes for the package's."""
    monkeypatch.setattr("tools.publish.RELEASES_FOLDER", tmp_path / "weights")
    return tmp_path / "weights"


def make_release(finished: Path, folder: Path, *words: str) -> Release:
    publish(finished, *RELEASE, *words).ok()
    return Release.read(folder / "test_mdeq.digits.json")


# What is released.


@pytest.mark.parametrize("name", mdeq.RELEASES)
def test_released_weights(name: str) -> None:
    """A record says what timm's cfg says, and names a commit or weights that are in the package."""
    release, cfg = mdeq.RELEASES[name], timm.get_pretrained_cfg(name)
    assert cfg.hf_hub_id == f"{mdeq.HUB_ORG}/{name}"
    assert cfg.license
    assert cfg.paper_ids
    assert cfg.description
    assert release.metrics
    if release.shipped.is_file():
        model = timm.create_model(name, pretrained=True)
        assert digest(model) == digest_of(release.shipped)
        assert contradictions(release, model) == []
    else:
        assert re.fullmatch(r"[0-9a-f]{40}", release.revision or "")


@pytest.mark.parametrize("name", mdeq.RELEASES)
def test_released_figures_belong_to_an_equilibrium(name: str) -> None:
    """At twice the steps they move by less than 0.3 points, a Dice by less than 0.003."""
    evaluation = mdeq.RELEASES[name].card["evaluation"]
    once, twice = (evaluation[key][evaluation["metric"]] for key in ("metrics", "metrics_at_twice_the_steps"))
    assert abs(once - twice) < (0.003 if once < 1 else 0.3)
    assert evaluation["metrics"]["residual_q0.9"] < evaluation["solver"]["tol"]


def digest_of(path: Path) -> str:
    """Return what `digest` says of a model with the weights of a file."""
    total = hashlib.sha256()
    for name, value in sorted(load_file(path).items()):
        value = value.float() if value.dtype == torch.bfloat16 else value  # as a model has them
        total.update(name.encode() + value.numpy().tobytes())
    return total.hexdigest()


@pytest.mark.parametrize("name", sorted(mdeq.RELEASES))
def test_the_recipe_of_a_release_is_the_config_of_its_name(name: str) -> None:
    """configs/DATA/ARCHITECTURE.yaml trains as its record says, wherever the data lie and the run goes."""
    card = mdeq.RELEASES[name].card
    recipe = load_config(ROOT / "configs" / card["data"] / f"{name.partition('.')[0]}.yaml")
    trained = parse_config(card["config"], name)

    def settings(config: TrainConfig) -> list[Any]:
        data = dataclasses.replace(config.data, root="DIR", num_classes=None, workers=0)
        run = (config.run.epochs, config.run.seed, config.run.amp)
        return [config.task, config.model, data, config.loss, config.optim, config.deq, run]

    assert settings(recipe) == settings(trained)


@pytest.mark.parametrize("name", sorted(mdeq.RELEASES))
def test_cards_of_the_releases(name: str) -> None:
    """Each says its figure, how to derive it again, and what it is at other numbers of steps."""
    release = mdeq.RELEASES[name]
    card = model_card(release.repo, release.config, release.card)
    evaluation = release.card["evaluation"]
    assert f"{evaluation['metrics'][evaluation['metric']]:.4g}" in card
    assert f"python tools/validate.py --record mdeq/weights/{name}.json" in card
    assert "### Against the number of solver steps" in card
    assert f"license: {release.config['pretrained_cfg']['license']}\n" in card
    assert ("multiscale" in card.split("## Results")[0]) == name.startswith("mdeq")


def test_shipped_weights_are_small() -> None:
    assert sum(path.stat().st_size for path in shipped_files(weights.FOLDER)) <= 4 * 2**20
    assert all(path.stat().st_size <= 16 * 2**20 for path in weights.FOLDER.glob("*.bf16.safetensors"))


def test_kept_weights_are_of_the_repository_alone(finished: Path, releases: Path, tmp_path: Path) -> None:
    assert "is float32; --keep takes" in publish(finished, "--release", "test_mdeq.digits", "--keep").refusal()
    run("convert", finished, "--bf16", "--out", tmp_path / "narrow").ok()
    assert "has no evaluation" in publish(tmp_path / "narrow", "--release", "test_mdeq.digits", "--keep").refusal()
    assert "test_mdeq" in validate("--checkpoint", tmp_path / "narrow", "--record").ok()
    release = make_release(tmp_path / "narrow", releases, "--keep")
    assert release.shipped == releases / "test_mdeq.digits.bf16.safetensors"
    assert release.size == release.shipped.stat().st_size
    assert local_file(release) == release.shipped
    assert shipped_files(releases) == []
    assert "not allowed with" in publish(finished, "--release", "test_mdeq.digits", "--keep", "--ship").refusal()
    # What setuptools leaves out has this name.
    line = re.search(r"exclude-package-data\].*\n.* = \[\"(.*)\"\]", (ROOT / "pyproject.toml").read_text())[1]
    assert fnmatch(release.shipped.name, line)


def test_only_released_weights_have_a_repository() -> None:
    cfgs = {name: timm.models.get_arch_pretrained_cfgs(name) for name in mdeq.list_models()}
    assert "test_mdeq" in cfgs
    with_repository = {n for tags in cfgs.values() for n, cfg in tags.items() if cfg.hf_hub_id is not None}
    assert with_repository == set(mdeq.list_models(pretrained=True)) == set(mdeq.RELEASES)


def test_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """`pretrained=True` without weights names the models that have some."""
    with pytest.raises(WeightsError, match="no pretrained weights for test_mdeq"):
        timm.create_model("test_mdeq", pretrained=True)
    some = {name: Release(name=name, sha256="", size=0) for name in ("test_mdeq.a", "mdeq_small.b")}
    monkeypatch.setattr(weights, "RELEASES", some)
    with pytest.raises(WeightsError, match=r"there are weights for test_mdeq\.a, mdeq_small\.b$"):
        timm.create_model("test_mdeq", pretrained=True)


def test_cfgs_of_a_release(finished: Path, releases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = make_release(finished, releases, "--ship")
    monkeypatch.setattr(weights, "RELEASES", {release.name: release})
    cfgs = with_releases({"test_mdeq.untrained": {"crop_pct": 1.0}, "mdeq_small.untrained": {"num_classes": 7}})
    assert cfgs["mdeq_small.untrained"] == {"num_classes": 7}
    assert "test_mdeq.untrained" not in cfgs
    cfg = timm.models.PretrainedCfg(**cfgs["test_mdeq.digits"])
    assert cfg.hf_hub_id == f"{mdeq.HUB_ORG}/test_mdeq.digits"
    assert (cfg.num_classes, cfg.input_size, cfg.license) == (10, (3, 32, 32), "apache-2.0")
    assert cfg.label_names == tuple("0123456789")
    assert cfg.description == "test_mdeq trained on scikit-learn's handwritten digits"
    # The weights come with the solver that they were trained with; the caller's wins.
    own = dict(cfgs["test_mdeq.digits"], architecture="test_mdeq", tag="digits")
    model = timm.create_model("test_mdeq", pretrained=True, pretrained_cfg=own)
    assert digest(model) == digest_of(finished / "model.safetensors")
    assert (type(model.deq.solver), model.deq.solver.max_steps) == (mdeq.Picard, 3)
    other = timm.create_model("test_mdeq", pretrained=True, pretrained_cfg=own, solver={"name": "broyden"})
    assert isinstance(other.deq.solver, mdeq.Broyden)
    small = timm.create_model("test_mdeq", pretrained=True, pretrained_cfg=own, num_classes=5, in_chans=1)
    assert (small.num_classes, small.in_chans) == (5, 1)
    assert torch.equal(small.head.final[0].weight, model.head.final[0].weight)


def test_damaged_shipped_weights(finished: Path, releases: Path) -> None:
    release = make_release(finished, releases, "--ship")
    assert local_file(release) == release.shipped
    release.shipped.write_bytes(release.shipped.read_bytes()[:-1] + b"\0")
    with pytest.raises(WeightsError, match="is damaged; install mdeq-vision again"):
        local_file(release)


# The cache, without a server.


def in_cache(release: Release, cache: Path, content: bytes) -> tuple[Path, Path]:
    """Put a file where huggingface_hub keeps it; return its name and its blob."""
    folder = cache / f"models--{DEFAULT_ORG}--{release.name}"
    blob, pointer = folder / "blobs" / "0123", folder / "snapshots" / release.revision / "model.safetensors"
    for path in (blob, pointer):
        path.parent.mkdir(parents=True)
    blob.write_bytes(content)
    pointer.symlink_to(os.path.relpath(blob, pointer.parent))
    return pointer, blob


def test_cached_weights_need_no_network(
    finished: Path, releases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = make_release(finished, releases, "--revision", "a" * 40)
    pointer, _ = in_cache(release, tmp_path / "cache", (finished / "model.safetensors").read_bytes())
    monkeypatch.delattr(weights, "get_hf_file_metadata")
    monkeypatch.delattr(weights, "hf_hub_download")
    assert local_file(release, tmp_path / "cache") == pointer


def test_damaged_cached_weights_are_removed(
    finished: Path, releases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And fetched again; where that cannot be, the error says what to do."""
    release = make_release(finished, releases, "--revision", "a" * 40)
    pointer, blob = in_cache(release, tmp_path / "cache", b"something else")

    def offline(url: str) -> None:
        raise OfflineModeIsEnabled(url)

    monkeypatch.setattr(weights, "get_hf_file_metadata", offline)
    with pytest.raises(WeightsError, match="not in the cache and HF_HUB_OFFLINE is set; unset it to download"):
        local_file(release, tmp_path / "cache")
    assert not pointer.is_symlink()
    assert not blob.exists()


# tools/publish.py without a server.


def test_dry_run_shows_what_would_go(finished: Path) -> None:
    out = publish(finished, "--repo", "org/test_mdeq.digits", "--dry-run").ok()
    sha = hashlib.sha256((finished / "model.safetensors").read_bytes()).hexdigest()
    assert out.startswith("org/test_mdeq.digits:\n")
    assert sha in out
    assert re.search(r"README.md  [\d,]+ bytes", out)


def test_card(finished: Path, tmp_path: Path) -> None:
    """The card holds the figures of the records, says `import mdeq`, and its metadata are YAML."""
    other = tmp_path / "other"
    shutil.copytree(finished, other)
    record = json.loads((other / "results.json").read_text())
    record["training"]["seed"], record["evaluation"]["metrics"]["top1"] = 1, 12.5
    (other / "results.json").write_text(json.dumps(record))
    content = tools_publish().publication(finished, "org/test_mdeq.digits", [other], ["Only a test."])
    card = content.texts["README.md"]
    _, head, text = card.split("---\n", 2)
    meta = yaml.safe_load(head)
    evaluation = json.loads((finished / "results.json").read_text())["evaluation"]
    metrics, twice = evaluation["metrics"], evaluation["metrics_at_twice_the_steps"]
    [result] = meta["model-index"][0]["results"]
    assert meta["library_name"] == "timm"
    assert result["metrics"][0]["value"] == round(metrics["top1"], 4)
    assert f"| Top-1 accuracy, at 3 steps at most | {metrics['top1']:.4g} % |" in text
    assert f"at twice the steps (6, without tolerance) | {twice['top1']:.4g} % |" in text
    assert f"| evaluations of f, mean | {metrics['evaluations']:.1f} |" in text
    assert f"| residual, 0.9 quantile | {metrics['residual_q0.9']:.2e} |" in text
    assert f"{metrics['top1']:.4g} % (seed 0), 12.5 % (seed 1)" in text
    assert "| 1 | 40 | 2 | 0.5 | 39 |\n| 2 | 50 | 3 | 0.25 | 45 |" in text
    assert "name=picard" in text
    assert "import mdeq" in text
    assert 'create_model("hf-hub:org/test_mdeq.digits", pretrained=True)' in text
    assert "- Only a test." in text
    assert "CC BY 4.0" in text
    assert str(tmp_path.parent) not in card
    assert "num_classes" not in content.config["model_args"], "transformers would take it for a second one"
    assert content.config["pretrained_cfg"]["tag"] == "digits"


@pytest.mark.parametrize(
    ("data", "start", "expected"),
    [
        ("apache-2.0", "apache-2.0", "apache-2.0"),
        ("apache-2.0", "cc-by-nc-4.0", "cc-by-nc-4.0"),
        ("cc-by-nc-4.0", "apache-2.0", "cc-by-nc-4.0"),
        ("cc-by-nc-4.0", "cc-by-nc-4.0", "cc-by-nc-4.0"),
        ("other", "cc-by-nc-4.0", "other"),
        (None, "cc-by-nc-4.0", "cc-by-nc-4.0"),
        ("apache-2.0", None, None),
        (None, "apache-2.0", None),
    ],
)
def test_licence_of_weights_that_started_from_others(data: str | None, start: str | None, expected: str | None) -> None:
    assert combined_licence(data, start) == expected


@pytest.mark.parametrize(
    ("name", "pretrained", "data", "expected"),
    [
        ("mdeq_tiny_seg", False, "masks", None),
        ("mdeq_tiny_seg.camvid", True, "masks", "cc-by-nc-4.0"),
        ("mdeq_tiny_cifar.cifar10", True, "digits", "apache-2.0"),
        ("mdeq3d_tiny", False, "modelnet10", "other"),
    ],
)
def test_licence_of_a_run(name: str, pretrained: bool, data: str, expected: str | None) -> None:
    model = timm.create_model(name, pretrained=pretrained)
    if not pretrained:
        model.pretrained_cfg["license"] = "cc-by-nc-4.0"  # of weights that it does not start from
    renew_cfg(model, ModelConfig(name=name, pretrained=pretrained), DataConfig(name=data, image_size=32))
    assert model.pretrained_cfg["license"] == expected


def test_constants_of_a_run_are_as_many_as_its_channels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """timm would say at every save that they are not."""
    model = timm.create_model("test_mdeq", in_chans=1)
    renew_cfg(model, ModelConfig(name="test_mdeq"), DataConfig(name="folder", image_size=32))
    assert (len(model.pretrained_cfg["mean"]), len(model.pretrained_cfg["std"])) == (1, 1)
    spec = resolve_data_config(model=model)
    assert (spec["mean"], spec["std"]) == (model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    assert "does not match" not in capsys.readouterr().out


def test_card_of_weights_that_started_from_others(finished: Path, tmp_path: Path) -> None:
    """The licence in its config.json goes into the card, in its head and in words."""
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    assert config["pretrained_cfg"]["license"] == "apache-2.0"
    config["pretrained_cfg"]["license"] = "cc-by-nc-4.0"
    path.write_text(json.dumps(config))
    content = tools_publish().publication(tmp_path / "run", "org/test_mdeq.digits")
    assert content.config["pretrained_cfg"]["license"] == "cc-by-nc-4.0"
    assert "\nlicense: cc-by-nc-4.0\n" in content.texts["README.md"]
    assert "whose licence they follow too (cc-by-nc-4.0)" in content.texts["README.md"]
    del config["pretrained_cfg"]["license"]
    path.write_text(json.dumps(config))
    card = tools_publish().publication(tmp_path / "run", "org/test_mdeq.digits").texts["README.md"]
    assert "\nlicense:" not in card
    assert "The licence of the weights was not recorded" in card


def own_data(run: Path) -> None:
    """Have a run be one on images of one's own."""
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("name: digits", "name: folder"))
    path = run / "config.json"
    config = json.loads(path.read_text())
    config["pretrained_cfg"].pop("license")  # unknown while it was trained
    path.write_text(json.dumps(config))


def test_card_of_own_data(finished: Path, tmp_path: Path) -> None:
    """What the package does not know of data is said when the weights are published."""
    shutil.copytree(finished, tmp_path / "run")
    own_data(tmp_path / "run")
    plain = tools_publish().publication(tmp_path / "run", "me/leaves").texts["README.md"]
    assert "trained on own images" in plain
    assert "Data: not recorded." in plain
    said = {"title": "Leaves", "licence": "CC BY 4.0", "citation": "A. Botanist 2026", "weights_licence": "cc-by-4.0"}
    content = tools_publish().publication(tmp_path / "run", "me/leaves", about_data=said)
    card = content.texts["README.md"]
    assert content.config["pretrained_cfg"]["license"] == "cc-by-4.0"
    assert content.config["pretrained_cfg"]["description"] == "test_mdeq trained on Leaves"
    for text in (
        "\nlicense: cc-by-4.0\n", "name: Leaves\n", "trained on Leaves:", "Data: A. Botanist 2026.",
        "Code: Apache-2.0. Data: CC BY 4.0. The weights were trained on these data",
    ):  # fmt: skip
        assert text in card
    assert "started from others" not in card


def test_licence_of_own_data_does_not_undo_that_of_the_start(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    own_data(tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    config["pretrained_cfg"]["license"] = "cc-by-nc-4.0"
    path.write_text(json.dumps(config))
    content = tools_publish().publication(tmp_path / "run", "me/leaves", about_data={"weights_licence": "mit"})
    assert content.config["pretrained_cfg"]["license"] == "other"


def test_options_of_own_data(finished: Path, tmp_path: Path) -> None:
    words = ("--repo", "me/leaves", "--dry-run", "--data-title", "Leaves", "--license", "mit")
    line = run("publish", finished, *words).refusal()
    assert "leave out --data-title, --license: what is to be said of digits is known" in line
    assert "--data-title cannot be used with --readme" in run("publish", "--readme", "--data-title", "x").refusal()
    shutil.copytree(finished, tmp_path / "run")
    own_data(tmp_path / "run")
    run("publish", tmp_path / "run", *words).ok()


def test_card_of_a_stopped_run(finished: Path, tmp_path: Path) -> None:
    """What was not recorded is said to be so."""
    shutil.copytree(finished, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "results.json").read_text())
    (tmp_path / "run" / "results.json").write_text(json.dumps({"evaluation": record["evaluation"]}))
    card = tools_publish().publication(tmp_path / "run", "org/test_mdeq.digits").texts["README.md"]
    assert "Seed 0, 1 epochs; time and hardware were not recorded." in card
    assert "The metric against the number of solver steps was not measured." in card


def tools_publish() -> Any:
    return sys.modules["tools.publish"]


def test_all_publishes_the_releases(finished: Path, releases: Path, tmp_path: Path, monkeypatch: Any) -> None:
    shipped = make_release(finished, releases, "--ship")
    monkeypatch.setattr(mdeq, "RELEASES", {})
    assert "there are no releases" in publish("--all", "--dry-run").refusal()
    monkeypatch.setattr(mdeq, "RELEASES", {shipped.name: shipped})
    assert f"{mdeq.HUB_ORG}/test_mdeq.digits:\n" in publish("--all", "--dry-run").ok()
    shipped.shipped.unlink()
    assert "give the folder that holds test_mdeq.digits/ with --runs" in publish("--all", "--dry-run").refusal()
    shutil.copytree(finished, tmp_path / "runs" / shipped.name)
    assert shipped.sha256 in publish("--all", "--dry-run", "--runs", tmp_path / "runs").ok()
    tensors = {name: value + 1 for name, value in load_file(finished / "model.safetensors").items()}
    save_file(tensors, tmp_path / "runs" / shipped.name / "model.safetensors")
    assert "the sha256 differs" in publish("--all", "--dry-run", "--runs", tmp_path / "runs").refusal()


def test_a_release_tells_of_the_weights_that_it_started_from(
    finished: Path, releases: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    record = releases / "test_mdeq.digits.json"
    continued, settings = tmp_path / "continued", yaml.safe_load((finished / "config.yaml").read_text())
    shutil.copytree(finished, continued)

    def start(place: Path) -> None:
        settings["model"]["checkpoint"] = str(place)
        (continued / "config.yaml").write_text(yaml.safe_dump(settings))

    first = make_release(finished, releases, "--ship")
    assert "started from scratch" in publish(finished, *RELEASE, "--stage", record).refusal()
    settings["model"] |= {"pretrained": True, "name": "mdeq_tiny_cifar.cifar10"}
    (continued / "config.yaml").write_text(yaml.safe_dump(settings))
    line = publish(continued, *RELEASE, "--stage", record).refusal()
    assert "started from the weights of mdeq_tiny_cifar.cifar10, not from those of test_mdeq.digits" in line
    settings["model"] |= {"pretrained": False, "name": "test_mdeq"}
    start(finished)
    second, third = (make_release(continued, releases, "--ship", "--stage", record) for _ in range(2))
    others = tmp_path / "model.safetensors"
    start(others)
    make_release(continued, releases, "--ship", "--stage", record)  # weights that are gone cannot be checked
    others.write_bytes(b"others")
    assert "are not the weights of test_mdeq.digits" in publish(continued, *RELEASE, "--stage", record).refusal()
    assert [stage["sha256"] for stage in third.card["stages"]] == [first.sha256, second.sha256]
    card = model_card("org/test_mdeq.digits", third.config, third.card)
    assert card.count(f"It started from weights (sha256 {first.sha256[:12]}) of 1 epochs, 0 minutes, seed 0") == 2
    (tmp_path / "README.md").write_text("# mdeq\n")
    monkeypatch.setattr("tools.publish.ROOT", tmp_path)
    monkeypatch.setattr(mdeq, "RELEASES", {third.name: third})
    assert "the README has no lines" in publish("--readme").refusal()
    (tmp_path / "README.md").write_text(f"before\n{TABLE_START}\nold\n{TABLE_END}\nafter\n")
    publish("--readme").ok()
    before, head, _, row, after = re.fullmatch(
        r"(.*)\n<!--[^\n]*\n(.*)\n(.*)\n(.*)\n<!--[^\n]*\n(.*)\n", (tmp_path / "README.md").read_text()
    ).groups()
    assert (before, after) == ("before", "after")
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert len(cells) == head.strip("|").count("|") + 1
    assert cells[0] == "`test_mdeq.digits`"
    assert cells[3] == f"{third.card['evaluation']['metrics']['top1']:.1f} %"
    assert cells[-1].startswith("1 + 1 + 1 epochs, 0 min")


def test_a_release_comes_with_the_solver_of_its_figure(finished: Path, releases: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    results = json.loads((finished / "results.json").read_text())
    results["evaluation"]["solver"]["max_steps"] = 7
    (tmp_path / "run" / "results.json").write_text(json.dumps(results))
    trained, later = (make_release(run, releases).config["model_args"] for run in (finished, tmp_path / "run"))
    assert trained["solver"]["max_steps"] == 3
    assert later == {**trained, "solver": {**trained["solver"], "max_steps": 7}}
    other = {"name": "anderson", "max_steps": 7, "tol": 0.1, "history": 3}
    results["evaluation"]["solver"] = other
    (tmp_path / "run" / "results.json").write_text(json.dumps(results))
    assert make_release(tmp_path / "run", releases).config["model_args"] == {**trained, "solver": other}


def test_the_readme_says_what_the_records_say() -> None:
    text = (ROOT / "README.md").read_text()
    assert with_table(text) == text, "run tools/publish.py --readme"


def test_seeds_are_runs_that_differ_in_nothing_else(finished: Path, releases: Path, tmp_path: Path) -> None:
    def other(name: str, section: str | None = None, **changes: Any) -> Path:
        folder = tmp_path / name
        shutil.copytree(finished, folder)
        results = json.loads((folder / "results.json").read_text())
        results["training"]["seed"] = 1
        (folder / "results.json").write_text(json.dumps(results))
        settings = yaml.safe_load((folder / "config.yaml").read_text())
        settings["run"]["seed"] = 1
        settings[section or "run"] |= changes
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
        return folder

    [first, second] = make_release(finished, releases, "--seeds", other("again", out_dir="x")).card["seeds"]
    assert (first["seed"], second["seed"]) == (0, 1)
    record, weights = releases / "test_mdeq.digits.json", releases / "test_mdeq.digits.safetensors"
    before = make_release(finished, releases, "--ship")
    later = ("--release", before.name, "--seeds", tmp_path / "again")
    publish(*later, "--dry-run").ok()
    assert len(json.loads(record.read_text())["card"]["seeds"]) == 1
    publish(*later).ok()
    after = json.loads(record.read_text())
    assert after["card"].pop("seeds") == [first, second]
    assert after["card"] == {key: value for key, value in before.card.items() if key != "seeds"}
    assert (after["sha256"], weights.is_file()) == (before.sha256, True)
    assert "runs with different seeds, got 0, 1, 1" in publish(*later).refusal()
    assert "--ship needs the folder of a run; leave out --ship" in publish(*later, "--ship").refusal()
    assert "nothing.tag.json" in publish("--release", "nothing.tag", *later[2:]).refusal()
    assert "differs from test_mdeq.digits" in publish(*later[:3], other("again longer", epochs=2)).refusal()
    assert "give the folder of a run" in publish("--release", before.name).refusal()
    for folder in (other("longer", epochs=2), other("faster", "optim", lr=0.5), other("larger", "data", batch_size=3)):
        assert "differs from" in publish(finished, *RELEASE, "--seeds", folder).refusal()
    assert "runs with different seeds, got 0, 0" in publish(finished, *RELEASE, "--seeds", finished).refusal()
    assert "no folder nowhere" in publish(finished, *RELEASE, "--seeds", "nowhere").refusal()


def test_a_dry_run_writes_nothing(finished: Path, releases: Path, tmp_path: Path, monkeypatch: Any) -> None:
    said = publish(finished, *RELEASE, "--ship", "--dry-run").ok()
    assert said.count("would be written: ") == 2
    assert not releases.exists()
    monkeypatch.setattr("tools.publish.ROOT", tmp_path)
    monkeypatch.setattr(mdeq, "RELEASES", {})
    (tmp_path / "README.md").write_text(f"{TABLE_START}\nold\n{TABLE_END}\n")
    assert "would be written" in publish("--readme", "--dry-run").ok()
    assert "old" in (tmp_path / "README.md").read_text()


def test_weights_of_an_earlier_release_do_not_stay(finished: Path, releases: Path) -> None:
    shipped = make_release(finished, releases, "--ship").shipped
    make_release(finished, releases, "--revision", "a" * 40)
    assert shipped.exists()  # the same
    shipped.write_bytes(b"others")
    make_release(finished, releases, "--revision", "a" * 40)
    assert not shipped.exists()


REPO = ("--repo", "org/name", "--dry-run")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((), "give one of --repo"),
        (("RUN", "--all"), "omit the folder"),
        (("RUN", "--readme"), "omit the folder"),
        (("RUN", "--stage", "nowhere.json", *REPO), "nowhere.json"),
        (("--repo", "org/name"), "give the folder of a run"),
        (("RUN", "--repo", "name"), "must be ORG/NAME"),
        (("RUN", "--repo", "/name"), "must be ORG/NAME"),
        (("RUN", "--repo", "org/a name"), "must be ORG/NAME"),
        (("RUN", "--ship", *REPO), "--ship cannot be used with --repo"),
        (("RUN", "--release", "test_mdeq.digits", "--runs", "x"), "--runs cannot be used with --release"),
        (("--all", "--note", "x", "--dry-run"), "--note cannot be used with --all"),
        (("--readme", "--private"), "--private cannot be used with --readme"),
        (("RUN", "--all", *REPO), "give one of --repo"),
        (("nowhere", *REPO), "no folder nowhere"),
        (("RUN", "--release", "mdeq_small.digits"), "must be test_mdeq.TAG"),
        (("RUN", "--release", "test_mdeq"), "must be test_mdeq.TAG"),
    ],
)
def test_bad_words(words: tuple[str, ...], reason: str, finished: Path, releases: Path) -> None:
    assert reason in publish(*(finished if word == "RUN" else word for word in words)).refusal()
    assert not releases.exists()


def _other_architecture(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "architecture": "resnet18"}))


def _other_shapes(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    config["model_args"]["channels"] = [8, 4, 8, 8]
    (run / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda run: (run / "model.safetensors").unlink(), "no weights"),
        (lambda run: (run / "model.safetensors").write_bytes(b"\0" * 100), "damaged or not a safetensors file"),
        (lambda run: (run / "config.json").unlink(), "no file"),
        (lambda run: (run / "config.json").write_text("[]"), "config.json is damaged"),
        (lambda run: (run / "config.yaml").unlink(), "no config file"),
        (lambda run: (run / "results.json").unlink(), "train to the end"),
        (lambda run: (run / "config.yaml").write_text("data: {holdout: 9}"), "--record data.holdout=null"),
        (lambda run: (run / "results.json").write_text('{"training": {}}'), "has no evaluation"),
        (_other_architecture, "holds resnet18, which is not a model of this package"),
        (_other_shapes, "does not fit its config.json"),
    ],
)
def test_bad_run(damage: Any, reason: str, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    damage(tmp_path / "run")
    assert reason in publish(tmp_path / "run", *REPO).refusal()


def test_too_large_to_ship(finished: Path, releases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.publish.MAX_SHIPPED", 1000)
    assert "too large to ship" in publish(finished, *RELEASE, "--ship").refusal()
    assert not releases.exists()


# Models that others saved.


def _absurd(**args: Any) -> Any:
    def damage(run: Path) -> None:
        config = json.loads((run / "config.json").read_text())
        config["model_args"].update(args)
        (run / "config.json").write_text(json.dumps(config))

    return damage


def _lying(run: Path) -> None:
    header = json.dumps({"stem.conv1.weight": dict(dtype="F32", shape=[10**6] * 2, data_offsets=[0, 4 * 10**12])})
    (run / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode() + b"\0" * 64)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_other_architecture, "holds resnet18, which is not a model of this package"),
        (lambda run: (run / "config.json").write_text("[" * 10**5), "config.json is damaged"),
        (_absurd(channels=[10**5, 10**5], head_channels=[4, 4]), "parameters, the limit is"),
        (_absurd(channels=[4] * 10**5, head_channels=[4] * 10**5), "at most 16 entries"),
        (_absurd(num_features=10**12), "parameters, the limit is"),
        (_absurd(channels="__import__('os')"), "model local-dir:"),
        (_absurd(no_such_argument=1), "unknown argument no_such_argument"),
        (_lying, "model local-dir:"),
    ],
)
def test_hostile_folder(damage: Any, reason: str, finished: Path, tmp_path: Path) -> None:
    """One line, and no memory taken for what cannot be."""
    shutil.copytree(finished, tmp_path / "run")
    damage(tmp_path / "run")
    assert reason in validate("--model", f"local-dir:{tmp_path / 'run'}", *plain_config(tmp_path)).refusal()


def plain_config(folder: Path) -> tuple[Any, ...]:
    """Return the words for a config that leaves the model as it is."""
    (folder / "plain.yaml").write_text("data: {name: digits, image_size: 32}\nrun: {progress: false, device: cpu}\n")
    return ("--config", folder / "plain.yaml")


def test_programs_say_what_the_hub_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(url: str) -> None:
        raise OfflineModeIsEnabled(url)

    monkeypatch.setattr(weights, "get_hf_file_metadata", offline)
    config = plain_config(tmp_path)
    line = validate("--model", "hf-hub:org/no-such-model", *config).refusal()
    assert "org/no-such-model is not in the cache and HF_HUB_OFFLINE is set" in line
    line = validate("--model", "test_mdeq", *config).refusal()
    assert "model test_mdeq: no pretrained weights for test_mdeq.untrained" in line
    (tmp_path / "x.png").touch()
    for name, words in (
        ("predict", [tmp_path / "x.png"]),
        ("visualize", ["--data", "1"]),
        ("export", ["--format", "pt2"]),
    ):
        for source, said in (
            ("org/none", "org/none is not in the cache"),
            ("a/b/c", "a/b/c is not a repository name"),
        ):
            assert said in run(name, f"hf-hub:{source}", *words, "--out", tmp_path / "out").refusal()
    assert not (tmp_path / "out").exists()


def test_another_organisation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MDEQ_HUB_ORG", "elsewhere")
    assert runpy.run_path(weights.__file__)["HUB_ORG"] == "elsewhere"
    monkeypatch.setattr(weights, "HUB_ORG", "elsewhere")
    assert Release(name="test_mdeq.a", sha256="", size=0).repo == "elsewhere/test_mdeq.a"


# Push and pull.


class Talk:
    """What came of the steps of a client, and what it asked the server for in each."""

    def __init__(self, steps: list[list[str]], results: list[dict[str, Any]], requests: list[str]) -> None:
        self.by_step = {" ".join(step): result for step, result in zip(steps, results, strict=True)}
        self.asked: dict[str, list[str]] = {}
        for request in requests:
            if match := re.fullmatch(r"GET /step/(\d+)", request):
                asked = self.asked.setdefault(" ".join(steps[int(match[1])]), [])
            else:
                asked.append(request)

    def problem(self, step: str) -> str:
        """Return the message of a step that failed as it should, in one line."""
        result = self.by_step[step]
        assert result["error"] == "WeightsError", result
        assert "\n" not in result["message"]
        assert result["seconds"] < 10
        return result["message"]


def talk(steps: list[list[str]], endpoint: str, package: Path, home: Path, requests: list[str], **env: str) -> Talk:
    """Have a client with a package and a cache of its own take steps."""
    path = os.pathsep.join(map(str, (package, Path(__file__).parent, ROOT)))
    env = {**os.environ, "PYTHONPATH": path, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), **env}
    env.update(HF_HUB_DISABLE_XET="1", OMP_NUM_THREADS="1", HF_HUB_DISABLE_TELEMETRY="1")
    program = [sys.executable, str(Path(__file__).parent / "hub_client.py")]
    done = subprocess.run(program, input=json.dumps(steps), env=env, capture_output=True, text=True, cwd=home.parent)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["package"].startswith(str(package))
    return Talk(steps, answer["results"], list(requests))


FAULTS = ("damaged", "cut", "gated", "private", "missing", "revision", "file", "full", "mine")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the package, whose releases are the tests'."""
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT / "mdeq", folder / "mdeq", ignore=shutil.ignore_patterns("__pycache__", "weights"))
    (folder / "mdeq" / "weights").mkdir()
    return folder


def add(package: Path, record: dict[str, Any], tag: str, content: bytes, revision: str) -> None:
    """Add a release to a package."""
    record = {**record, "revision": revision, "sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    (package / "mdeq" / "weights" / f"test_mdeq.{tag}.json").write_text(json.dumps(record))


def keep(package: Path, tag: str, content: bytes) -> None:
    """Put weights where `--runs` looks for them."""
    folder = package / "runs" / f"test_mdeq.{tag}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(content)


def fill(hub: Hub, package: Path, finished: Path) -> None:
    """Put releases on a Hub, a good one and one with each fault."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tools.publish.RELEASES_FOLDER", package)
        publish(finished, "--release", "test_mdeq.good").ok()
    record = json.loads((package / "test_mdeq.good.json").read_text())
    good = (finished / "model.safetensors").read_bytes()
    files = {"model.safetensors": good, "config.json": (finished / "config.json").read_bytes()}
    keep(package, "good", good)
    add(package, record, "good", good, hub.put(f"{DEFAULT_ORG}/test_mdeq.good", files))
    hub.put(f"{DEFAULT_ORG}/test_mdeq.good", {"model.safetensors": b"a later commit"})
    for tag in FAULTS:
        # Every file has bytes of its own: the storage is shared.
        header = {"format": "pt", "tag": tag}
        path = package / "model.safetensors"
        save_file(load_file(finished / "model.safetensors"), path, metadata=header)
        content = path.read_bytes()
        keep(package, tag, content)
        files["model.safetensors"] = content
        kept = {"config.json": b"{}"} if tag == "file" else files
        repo = f"{DEFAULT_ORG}/test_mdeq.{tag}"
        commit = "b" * 40
        if tag != "missing":
            commit = hub.put(repo, kept, gated=tag == "gated", private=tag in ("private", "mine"))
        add(package, record, tag, content, "c" * 40 if tag == "revision" else commit)
        if tag in ("damaged", "cut"):
            getattr(hub, tag).add(hashlib.sha256(content).hexdigest())


@pytest.fixture(scope="module")
def online(finished: Path, package: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Talk, Hub, Path]:
    """What a client did on a Hub, the Hub, and the client's cache."""
    home = tmp_path_factory.mktemp("client") / "home"
    steps = [
        ["create", "test_mdeq.good"],
        ["create", "test_mdeq"],
        ["publish", str(finished), "--repo", "org/test_mdeq.digits"],
        ["create", "hf-hub:org/test_mdeq.digits"],
        ["publish", str(finished), "--repo", "someone-else/name"],
        *(["create", f"test_mdeq.{tag}"] for tag in ("damaged", "cut", "missing", "revision", "file")),
        ["anonymous", "create", "test_mdeq.gated"],
        ["anonymous", "create", "test_mdeq.private"],
        ["full", "test_mdeq.full"],
        ["create", "test_mdeq.mine"],
        ["anonymous", "publish", str(finished), "--repo", "org/another"],
        ["publish", "--all", "--runs", str(package / "runs")],
    ]
    with serving() as hub:
        fill(hub, package, finished)
        return talk(steps, hub.endpoint, package, home, hub.requests, HF_TOKEN=TOKEN), hub, home


def test_pull_is_pinned_and_cached(online: tuple[Talk, Hub, Path], finished: Path) -> None:
    talk, hub, _ = online
    first = talk.by_step["create test_mdeq.good"]
    assert first["weights"] == digest_of(finished / "model.safetensors")
    assert (first["tag"], first["steps"]) == ("good", 3)
    pinned = hub.repos[f"{DEFAULT_ORG}/test_mdeq.good"].commits[0][0]
    asked = talk.asked["create test_mdeq.good"]
    assert f"HEAD /{DEFAULT_ORG}/test_mdeq.good/resolve/{pinned}/model.safetensors" in asked
    assert [request for request in asked if request.startswith("GET storage/objects/")]


def test_push_and_pull(online: tuple[Talk, Hub, Path], finished: Path) -> None:
    talk, hub, _ = online
    pushed = talk.by_step[f"publish {finished} --repo org/test_mdeq.digits"]
    assert pushed["code"] == 0, pushed["err"]
    [(commit, files)] = hub.repos["org/test_mdeq.digits"].commits
    assert f"published: revision {commit}" in pushed["out"]
    assert files.keys() == {"model.safetensors", "config.json", "README.md"}
    assert files["model.safetensors"] == (finished / "model.safetensors").read_bytes()
    assert "import mdeq" in files["README.md"].decode()
    pulled = talk.by_step["create hf-hub:org/test_mdeq.digits"]
    assert (pulled["weights"], pulled["steps"]) == (digest_of(finished / "model.safetensors"), 3)


def test_push_without_permission(online: tuple[Talk, Hub, Path], finished: Path) -> None:
    """Not that of another organisation, and none at all without a token."""
    for step, repo in (("publish", "someone-else/name"), ("anonymous publish", "org/another")):
        refused = online[0].by_step[f"{step} {finished} --repo {repo}"]
        assert refused["code"] == 2
        assert re.fullmatch(f"error: no permission for {repo}: log in .*\\n", refused["err"])
        assert repo not in online[1].repos


def test_push_all(online: tuple[Talk, Hub, Path], package: Path) -> None:
    talk, hub, _ = online
    pushed = talk.by_step[f"publish --all --runs {package / 'runs'}"]
    assert pushed["code"] == 0, pushed["err"]
    for tag in ("good", *FAULTS):
        commit, files = hub.repos[f"{DEFAULT_ORG}/test_mdeq.{tag}"].commits[-1]
        assert f"published: revision {commit}" in pushed["out"]
        assert files["model.safetensors"] == (package / "runs" / f"test_mdeq.{tag}" / "model.safetensors").read_bytes()
        assert f"# test_mdeq.{tag}" in files["README.md"].decode()
        assert json.loads((package / "mdeq" / "weights" / f"test_mdeq.{tag}.json").read_text())["revision"] == commit


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        ("create test_mdeq.damaged", "is not the released one .* was deleted; try again"),
        ("create test_mdeq.cut", CUT),
        ("create test_mdeq.missing", "there is no repository .* or it is private: check the name, or log in"),
        ("create test_mdeq.revision", "has no revision c{40}: name another one, or update mdeq-vision"),
        ("create test_mdeq.file", "has no model.safetensors"),
        ("anonymous create test_mdeq.gated", "is gated: ask for access at .*, then log in with `hf auth login`"),
        ("anonymous create test_mdeq.private", "there is no repository .* or it is private: check the name, or log in"),
        ("full test_mdeq.full", "no space left for .*; make room, or set HF_HOME to another disk"),
    ],
)
def test_faults(step: str, reason: str, online: tuple[Talk, Hub, Path]) -> None:
    """One line that says what to do, and nothing broken left in the cache.

    Versions 0 and 1 of huggingface_hub go on with an unfinished download, where 2 begins anew and leaves none.
    """
    talk, _, home = online
    assert re.search(reason, talk.problem(step))
    repo = home / "hub" / f"models--{DEFAULT_ORG}--{step.split()[-1]}"
    left = [path for part in ("blobs", "snapshots") for path in (repo / part).rglob("*") if not path.is_dir()]
    assert [path for path in left if not (OLD_HUB and path.suffix == ".incomplete")] == []


def test_a_token_opens_a_private_repository(online: tuple[Talk, Hub, Path]) -> None:
    assert "weights" in online[0].by_step["create test_mdeq.mine"]


@pytest.fixture(scope="module")
def cut_off(online: tuple[Talk, Hub, Path], finished: Path, package: Path) -> Talk:
    """What the next client did, without a token or a network, with the same cache."""
    shutil.copy(finished / "model.safetensors", package / "mdeq" / "weights" / "test_mdeq.gated.safetensors")
    record = package / "mdeq" / "weights" / "test_mdeq.gated.json"
    sha = hashlib.sha256((finished / "model.safetensors").read_bytes()).hexdigest()
    record.write_text(json.dumps({**json.loads(record.read_text()), "sha256": sha}))
    good, pulled = (
        package / "mdeq" / "weights" / "test_mdeq.good.json",
        online[1].repos[f"{DEFAULT_ORG}/test_mdeq.good"],
    )
    good.write_text(json.dumps({**json.loads(good.read_text()), "revision": pulled.commits[0][0]}))  # before --all
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
    names = ("test_mdeq.good", "hf-hub:org/test_mdeq.digits", "test_mdeq.gated", "test_mdeq.cut")
    return talk([["create", name] for name in names], endpoint, package, online[2], [])


@pytest.mark.parametrize("name", ["test_mdeq.good", "hf-hub:org/test_mdeq.digits", "test_mdeq.gated"])
def test_without_a_network(name: str, cut_off: Talk, finished: Path) -> None:
    """From the cache, by both kinds of name, and from the package."""
    assert cut_off.by_step[f"create {name}"]["weights"] == digest_of(finished / "model.safetensors")


def test_without_a_network_or_cache(cut_off: Talk) -> None:
    assert re.search(r"cannot reach .*; check the connection and try again", cut_off.problem("create test_mdeq.cut"))


def test_names_of_labels_are_those_of_the_weights_that_are_there() -> None:
    def names(**kwargs: Any) -> Any:
        return timm.create_model("mdeq_tiny_cifar", **kwargs).pretrained_cfg.get("label_names")

    assert names(pretrained=True)[0] == "airplane"
    assert names() is None
    assert names(pretrained=True, num_classes=4) is None


def test_the_name_of_a_model_names_no_place() -> None:
    assert tools.publish._without_place("local-dir:/home/someone/run1/") == "local-dir:run1"
    assert tools.publish._without_place("mdeq_tiny_cifar.cifar10") == "mdeq_tiny_cifar.cifar10"


@pytest.mark.parametrize(
    "change",
    [{"solver": {"name": "picard", "max_steps": 9}}, {"settings": ["data.image_size=24"]}, {"metric": "top5"}],
    ids=lambda change: next(iter(change)),
)
def test_seeds_were_evaluated_alike(change: dict[str, Any], tmp_path: Path) -> None:
    config = load_config(TINY)
    now = {"metric": "top1", "metrics": {"top1": 1.0, "top5": 2.0}, "solver": {"name": "picard", "max_steps": 2}}
    (tmp_path / "config.yaml").write_text(config_yaml(config))
    for evaluation, alike in ((now, True), (now | change, False)):
        (tmp_path / "results.json").write_text(json.dumps({"training": {"seed": 1}, "evaluation": evaluation}))
        with contextlib.nullcontext() if alike else pytest.raises(BadInput, match="evaluated in another way"):
            tools.publish._with_seeds("it", config, now, [{"seed": 0, "value": 1.0}], [tmp_path])
