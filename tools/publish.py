"""Publish weights on the Hub: model.safetensors, config.json and a model card made from the run's records.

    python tools/publish.py runs/NAME --repo ORG/NAME [--private] [--dry-run]
    python tools/publish.py runs/NAME --release ARCHITECTURE.TAG [--ship | --keep]    add it to the package's releases
    python tools/publish.py --release ARCHITECTURE.TAG --seeds RUN ...        add runs of other seeds to its record
    python tools/publish.py --all [--runs DIR] [--dry-run]                    publish every release
    python tools/publish.py --readme                                          bring the README's table up to date

A release is a record in mdeq/weights/, and with --ship the weights beside it: small ones, which the package then holds.
With --keep the repository holds them, but not the package: those of `tools/convert.py --bf16`, up to 16 MiB.
Weights that are neither are looked for in DIR/ARCHITECTURE.TAG.
"""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import timm
import torch
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id

import mdeq
from tools.card import model_card, releases_table
from tools.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    read_json,
    read_weights,
    sha256,
    write_atomically,
    write_text,
)
from tools.config import BadInput, TrainConfig, config_yaml, first_line, load_config, parse_config
from tools.known_data import ABOUT_DATA, DATASETS, combined_licence, data_of
from tools.program import Parser, program
from tools.recheck import put_into_card, read_release, solver_of_record
from tools.results import ROOT, read_results, write_json

RELEASES_FOLDER = ROOT / "mdeq" / "weights"
TABLE_START, TABLE_END = "<!-- tools/publish.py --readme -->", "<!-- end of the table -->"
MAX_SHIPPED = 4 * 2**20  # bytes, of all weights in the package
MAX_KEPT = 16 * 2**20  # of a file in the repository


@dataclass(frozen=True)
class Publication:
    """What goes to one repository."""

    repo: str
    weights: Path
    config: Mapping[str, Any]
    record: Mapping[str, Any]

    @property
    def texts(self) -> dict[str, str]:
        """The small files by their names."""
        return {
            "config.json": json.dumps(self.config, indent=2) + "\n",
            "README.md": model_card(self.repo, self.config, self.record),
        }


WORDS_OF = {
    "repo": ("seeds", "stage", "note", *ABOUT_DATA, "private"),
    "release": ("seeds", "stage", "note", *ABOUT_DATA, "ship", "keep", "revision"),
    "all": ("runs", "private"),
    "readme": (),
}
"""What goes with each thing to do; --dry-run goes with all."""


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, help="folder of a finished run of tools/train.py")
    parser.add_argument("--repo", help="ORG/NAME; the name ends in the weight tag, such as mdeq_tiny_cifar.cifar10")
    parser.add_argument("--release", metavar="ARCHITECTURE.TAG", help="make the run a release of the package")
    places = parser.add_mutually_exclusive_group()
    places.add_argument("--ship", action="store_true", help="with --release: put the weights into the package")
    places.add_argument("--keep", action="store_true", help="with --release: put them only into the repository")
    parser.add_argument("--revision", help="with --release: the commit on the Hub that holds the weights")
    parser.add_argument("--all", action="store_true", help="publish every release")
    parser.add_argument("--readme", action="store_true", help="write the table of releases into the README")
    parser.add_argument("--runs", type=Path, help="with --all: folder with the weights that are not shipped")
    parser.add_argument("--seeds", type=Path, nargs="+", default=[], help="runs of the same config with other seeds")
    parser.add_argument(
        "--stage", type=Path, metavar="RECORD", help="record in mdeq/weights/ of the weights that the run started from"
    )
    parser.add_argument("--note", action="append", default=[], help="a sentence for the card's limits; repeatable")
    parser.add_argument("--license", help="own data: licence of the weights, as the Hub spells it, such as cc-by-4.0")
    parser.add_argument("--data-title", help="own data: their name")
    parser.add_argument("--data-license", help="own data: their licence")
    parser.add_argument("--data-citation", help="own data: whom to cite")
    parser.add_argument("--private", action="store_true", help="make new repositories private")
    parser.add_argument("--dry-run", action="store_true", help="only show what would be sent or written")
    arguments = parser.parse_args()
    if sum(bool(getattr(arguments, mode)) for mode in WORDS_OF) != 1:
        raise BadInput("give one of --repo ORG/NAME, --release ARCHITECTURE.TAG, --all or --readme")
    of_releases = arguments.all or arguments.readme
    adds_seeds = arguments.release is not None and arguments.run is None and bool(arguments.seeds)
    if of_releases == (arguments.run is not None) and not adds_seeds:
        flag = "--all" if arguments.all else "--readme"
        raise BadInput(f"{flag} is for all releases; omit the folder" if of_releases else "give the folder of a run")
    [mode] = [mode for mode in WORDS_OF if getattr(arguments, mode)]
    others = [word for words in WORDS_OF.values() for word in words if word not in WORDS_OF[mode]]
    if unused := [word for word in others if getattr(arguments, word)]:
        raise BadInput(f"--{unused[0].replace('_', '-')} cannot be used with --{mode}")
    if adds_seeds and (unused := [word for word in WORDS_OF["release"][1:] if getattr(arguments, word)]):
        word = unused[0].replace("_", "-")
        raise BadInput(f"--{word} needs the folder of a run; leave out --{word} to add seeds")
    if arguments.repo is not None:
        try:
            validate_repo_id(arguments.repo)
        except HFValidationError as error:
            raise BadInput(f"--repo must be ORG/NAME, got {arguments.repo}: {error}") from None
        if "/" not in arguments.repo:
            raise BadInput(f"--repo must be ORG/NAME, got {arguments.repo}")
    return arguments


def about_data(arguments: argparse.Namespace) -> dict[str, str]:
    """Return what the command line says of the data, by fields of `known_data.Dataset`."""
    return {field: getattr(arguments, word) for word, field in ABOUT_DATA.items() if getattr(arguments, word)}


def record_of(
    run: Path,
    seeds: Sequence[Path] = (),
    notes: Sequence[str] = (),
    stage: Path | None = None,
    about_data: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return all that the model card of a run needs.

    Args:
        run: its folder.
        seeds: folders of runs that differ in the seed alone.
        notes: sentences for the section of limits.
        stage: record of the release that the run started from, whose training is then told too.
        about_data: what is to be said of data that the package does not know, by fields of `known_data.Dataset`.

    Raises:
        BadInput: if the folder lacks something.
    """
    if not run.is_dir():
        raise BadInput(f"no folder {run}")
    config = load_config(run / CONFIG_FILE)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model,
            name=_without_place(config.model.name),
            checkpoint="FILE" if config.model.checkpoint else None,
        ),
        data=dataclasses.replace(config.data, root="DIR"),
        run=dataclasses.replace(config.run, out_dir=None, resume=False),
    )
    if about_data and config.data.name in DATASETS:
        words = ", ".join(f"--{word.replace('_', '-')}" for word, field in ABOUT_DATA.items() if field in about_data)
        raise BadInput(f"leave out {words}: what is to be said of {config.data.name} is known")
    results = _results(run)
    measured = results.get("steps_by", {}).get("settings")
    if measured is not None and measured != results["evaluation"].get("settings", []):
        raise BadInput(
            f"the steps of {run} were measured with other data settings ({' '.join(measured) or 'none'}) than "
            "results.json; run tools/validate.py --record with --steps, which measures both"
        )
    if "steps_by" in results and "steps" not in results:
        raise BadInput(f"results.json in {run} lacks its table over steps; run tools/validate.py --steps again")
    return {
        "data": config.data.name,
        **({"about_data": dict(about_data)} if about_data else {}),
        "steps": [],
        **results,
        "stages": [] if stage is None else _stages(stage, run),
        "seeds": _with_seeds(run, load_config(run / CONFIG_FILE), results["evaluation"], [_seed(results)], seeds),
        "notes": list(notes),
        "config": config_yaml(config),
    }


def _results(run: Path) -> dict[str, Any]:
    results = read_results(run)
    if "evaluation" not in results:
        raise BadInput(f"{run / 'results.json'} has no evaluation; run tools/validate.py --record on it")
    config = load_config(run / CONFIG_FILE, results["evaluation"].get("settings", []))  # of what was evaluated
    if config.data.holdout is not None:
        raise BadInput(
            f"{run} was evaluated on held-out training samples; for its figure on the test split run "
            f"tools/validate.py --checkpoint {run} --record data.holdout=null"
        )
    # A run that was stopped has no record of its end, only that of an evaluation afterwards.
    return {"training": {"seed": config.run.seed, "epochs": config.run.epochs}, **results}


def _stages(record: Path, run: Path) -> list[dict[str, Any]]:
    """Return how the weights came about that a run started from, those of a release; oldest first.

    Raises:
        BadInput: if it started from others.
    """
    release, model = read_release(record), load_config(run / CONFIG_FILE).model
    if model.checkpoint is None and not model.pretrained:
        raise BadInput(f"{run} started from scratch, not from the weights of {release.name}")
    named = model.checkpoint is None and ":" not in model.name
    if named and model.name not in (release.name, release.name.partition(".")[0]):
        raise BadInput(f"{run} started from the weights of {model.name}, not from those of {release.name}")
    start = Path(model.checkpoint or "")
    start = start / WEIGHTS_FILE if model.checkpoint and start.is_dir() else start
    if start.is_file() and sha256(start) != release.sha256:
        raise BadInput(f"{run} started from {start}, which are not the weights of {release.name}: sha256 differs")
    return [*release.card.get("stages", []), {"sha256": release.sha256, **release.card["training"]}]


def _without_place(name: str) -> str:
    """Return the name of a model; of `local-dir:` the folder alone."""
    return re.sub(r"^local-dir:.*[/\\]", "local-dir:", name.rstrip("/\\"))


def _with_seeds(
    of: Path | str, config: TrainConfig, evaluation: Mapping[str, Any], known: Sequence[Mapping[str, Any]],
    runs: Sequence[Path],
) -> list[Mapping[str, Any]]:  # fmt: skip
    """Return the seeds that are known, and those of runs of the same config and evaluation.

    Args:
        of: run or release that the others are seeds of, for errors.
        config: by which it was trained.
        evaluation: of it.
        known: seeds with their figures.
        runs: folders of the others.

    Raises:
        BadInput: for a run that differs in more than the seed, or has one that is known.
    """

    def kind(config: TrainConfig, evaluation: Mapping[str, Any]) -> list[Any]:
        model = dataclasses.replace(config.model, name=_without_place(config.model.name), checkpoint=None)
        data = dataclasses.replace(config.data, root="", workers=0, download=False, cache_on_device=False)
        run = dataclasses.replace(TrainConfig().run, epochs=config.run.epochs, amp=config.run.amp)
        trained = dataclasses.replace(config, model=model, data=data, run=run)
        return [trained, evaluation["metric"], evaluation["solver"], sorted(evaluation.get("settings", []))]

    seeds = list(known)
    for folder in runs:
        if not folder.is_dir():
            raise BadInput(f"no folder {folder}")
        results = _results(folder)
        if kind(load_config(folder / CONFIG_FILE), results["evaluation"]) != kind(config, evaluation):
            raise BadInput(f"{folder} differs from {of} in more than the seed, or was evaluated in another way")
        seeds.append(_seed(results))
    numbers = [seed["seed"] for seed in seeds]
    if len(set(numbers)) < len(numbers):
        raise BadInput(f"--seeds takes runs with different seeds, got {', '.join(map(str, numbers))}")
    return seeds


def _seed(results: Mapping[str, Any]) -> dict[str, Any]:
    evaluation = results["evaluation"]
    return {"seed": results["training"]["seed"], "value": evaluation["metrics"][evaluation["metric"]]}


def add_seeds(record: Path, runs: Sequence[Path], *, dry_run: bool) -> None:
    """Add the figures of runs of other seeds to the record of a release; its weights stay those that they are.

    Args:
        record: the file.
        runs: their folders; see `_with_seeds`.
        dry_run: check alone.
    """
    release = read_release(record)
    card = release.card
    config = parse_config(card["config"], f"the record of {release.name}")
    seeds = _with_seeds(release.name, config, card["evaluation"], card["seeds"], runs)
    if not dry_run:
        put_into_card(record, seeds=seeds)


def config_of(run: Path, name: str, record: Mapping[str, Any], stage: Path | None) -> dict[str, Any]:
    """Return the config.json of a run as it is published under a name `architecture.tag` or any other.

    Args:
        run: its folder.
        name: to publish it under.
        record: see `record_of`.
        stage: record of the release that it started from, whose licence counts too.
    """
    config = read_json(run / "config.json")
    architecture, _, tag = name.partition(".")
    if config.get("architecture") not in mdeq.list_models():
        raise BadInput(f"{run} holds {config.get('architecture')}, which is not a model of this package")
    facts, licence = data_of(record), config["pretrained_cfg"].get("license")
    if said := record.get("about_data", {}).get("weights_licence"):  # it was not known at the training
        licence = combined_licence(said, licence or said)
    if stage is not None:
        licence = combined_licence(facts.weights_licence, read_release(stage).config["pretrained_cfg"].get("license"))
    cfg = {
        **config["pretrained_cfg"],
        "test_input_size": None,  # that of other weights of this architecture
        "tag": tag if architecture == config["architecture"] else "",
        "license": licence,
        "description": f"{config['architecture']} trained on {facts.title}",
    }
    # transformers passes the number of classes itself, and takes a second one for an error.
    args = {key: value for key, value in config.get("model_args", {}).items() if key != "num_classes"}
    labels = {"label_names": list(facts.labels)} if len(facts.labels) == config["num_classes"] else {}
    return {**labels, **config, "model_args": args, "pretrained_cfg": cfg}


def checked_weights(weights: Path, config: Mapping[str, Any]) -> Path:
    """Return the weights of a run after loading them into the model that its config describes.

    Raises:
        BadInput: if there are none, or they do not fit.
    """
    if not weights.is_file():
        raise BadInput(f"no weights {weights}")
    args = {**config["model_args"], "num_classes": config["num_classes"]}
    try:
        model = timm.create_model(config["architecture"], **args)
        model.load_state_dict(read_weights(weights))
    except (RuntimeError, ValueError, TypeError) as error:
        raise BadInput(f"{weights} does not fit its config.json: {first_line(error)}") from None
    return weights


def publication(
    run: Path,
    repo: str,
    seeds: Sequence[Path] = (),
    notes: Sequence[str] = (),
    stage: Path | None = None,
    about_data: Mapping[str, str] | None = None,
) -> Publication:
    """Return what goes to a repository from the folder of a run; see `record_of`."""
    record = record_of(run, seeds, notes, stage, about_data)
    config = config_of(run, repo.rpartition("/")[2], record, stage)
    # Weights come with the solver by which their figure was measured, which need not be the one of their training.
    trained = config["model_args"].get("solver") or {}
    config["model_args"]["solver"] = solver_of_record(trained, record["evaluation"]["solver"])
    return Publication(repo, checked_weights(run / WEIGHTS_FILE, config), config, record)


def released(release: mdeq.Release, runs: Path | None) -> Publication:
    """Return what goes to the repository of a release; weights that are not shipped come from a folder in `runs`."""
    weights = release.shipped
    if not weights.is_file():
        if runs is None:
            raise BadInput(
                f"the weights of {release.name} are not in the package; give the folder that holds {release.name}/ "
                "with --runs"
            )
        weights = runs / release.name / WEIGHTS_FILE
    checked_weights(weights, release.config)
    if sha256(weights) != release.sha256:
        raise BadInput(f"{weights} are not the weights of {release.name}: the sha256 differs")
    return Publication(release.repo, weights, release.config, release.card)


def make_release(run: Path, name: str, folder: Path, arguments: argparse.Namespace) -> list[Path]:
    """Write the record of a release, with `--ship` or `--keep` its weights too; return the files.

    Weights that lie beside the record and are others are removed. With `--dry-run` nothing is written.
    """
    content = publication(
        run, f"{mdeq.HUB_ORG}/{name}", arguments.seeds, arguments.note, arguments.stage, about_data(arguments)
    )
    architecture, _, tag = name.partition(".")
    if architecture != content.config["architecture"] or not tag:
        raise BadInput(f"--release must be {content.config['architecture']}.TAG, got {name}")
    size, digest = content.weights.stat().st_size, sha256(content.weights)
    written = [folder / f"{name}.json"]
    if arguments.ship or arguments.keep:
        others = sum(p.stat().st_size for p in shipped_files(folder) if p.stem != name)
        if arguments.ship and others + size > MAX_SHIPPED:
            raise BadInput(f"too large to ship: {size:,} bytes, at most {MAX_SHIPPED:,} together with the others")
        if arguments.keep and size > MAX_KEPT:
            raise BadInput(f"too large to keep: {size:,} bytes, at most {MAX_KEPT:,}")
        if arguments.keep and any(x.dtype == torch.float32 for x in read_weights(content.weights).values()):
            raise BadInput(f"{content.weights} is float32; --keep takes bfloat16, see tools/convert.py --bf16")
        written.insert(0, folder / f"{name}{'.bf16' if arguments.keep else ''}.safetensors")
    if arguments.dry_run:
        return written
    folder.mkdir(exist_ok=True)
    if written[1:]:
        data = content.weights.read_bytes()
        write_atomically(written[0], lambda path: path.write_bytes(data))
    for old in (folder / f"{name}.safetensors", folder / f"{name}.bf16.safetensors"):
        if old.is_file() and sha256(old) != digest:
            old.unlink()
    record = {
        "sha256": digest,
        "size": size,
        "revision": arguments.revision,
        "metrics": content.record["evaluation"]["metrics"],
        "config": content.config,
        "card": content.record,
    }
    write_json(written[-1], record, indent=1)
    return written


def shipped_files(folder: Path) -> list[Path]:
    """Return the weights that the package holds, of those that the repository does."""
    return [path for path in sorted(folder.glob("*.safetensors")) if not path.stem.endswith(".bf16")]


def with_table(text: str) -> str:
    """Return a README with the table of releases that the records say.

    Raises:
        BadInput: if it has no place for one.
    """
    before, start, rest = text.partition(TABLE_START)
    _, end, after = rest.partition(TABLE_END)
    if not end:
        raise BadInput(f"the README has no lines {TABLE_START} and {TABLE_END}")
    table = releases_table({name: release.card for name, release in sorted(mdeq.RELEASES.items())})
    return f"{before}{start}\n{table}\n{end}{after}"


def push(content: Publication, private: bool) -> str:
    """Upload all files in one commit and return its hash.

    Raises:
        BadInput: without a token, permission or connection.
    """
    api = HfApi(library_name="mdeq-vision", library_version=mdeq.__version__)
    files = {**{name: text.encode() for name, text in content.texts.items()}, WEIGHTS_FILE: content.weights}
    try:
        with mdeq.hub_errors(content.repo):
            api.create_repo(content.repo, private=private, exist_ok=True)
            commit = api.create_commit(
                content.repo,
                [CommitOperationAdd(name, file) for name, file in files.items()],
                commit_message=f"mdeq-vision {mdeq.__version__}",
            )
    except (mdeq.WeightsError, ValueError, OSError) as error:
        raise BadInput(first_line(error)) from None
    return commit.oid


def show(content: Publication) -> None:
    """Print what would go to a repository."""
    print(f"{content.repo}:")
    print(f"  {WEIGHTS_FILE}  {content.weights.stat().st_size:,} bytes  sha256 {sha256(content.weights)}")
    for name, text in content.texts.items():
        print(f"  {name}  {len(text.encode()):,} bytes")


def main() -> None:
    arguments = parse_arguments()
    done = "would be written" if arguments.dry_run else "written"
    if arguments.readme:
        path = ROOT / "README.md"
        text = with_table(path.read_text(encoding="utf-8"))
        if not arguments.dry_run:
            write_text(path, text)
        print(f"{done}: {path}")
        return
    if arguments.release is not None and arguments.run is None:
        record = RELEASES_FOLDER / f"{arguments.release}.json"
        add_seeds(record, arguments.seeds, dry_run=arguments.dry_run)
        print(f"{done}: {record}")
        return
    if arguments.release is not None:
        for path in make_release(arguments.run, arguments.release, RELEASES_FOLDER, arguments):
            print(f"{done}: {path}")
        return
    if arguments.all:
        if not mdeq.RELEASES:
            raise BadInput("there are no releases; make one with --release")
        contents = [released(release, arguments.runs) for release in mdeq.RELEASES.values()]
    else:
        words = (arguments.seeds, arguments.note, arguments.stage, about_data(arguments))
        contents = [publication(arguments.run, arguments.repo, *words)]
    for content in contents:
        show(content)  # makes what goes: all of it before the first goes
    if arguments.dry_run:
        return
    for content in contents:
        commit = push(content, arguments.private)
        print(f"published: revision {commit} of {content.repo}")
        if arguments.all:  # the record says from now on where the weights are
            release = mdeq.RELEASES[content.repo.rpartition("/")[2]]
            path = release.folder / f"{release.name}.json"
            write_json(path, {**read_json(path), "revision": commit}, indent=1)
            print(f"written: {path}")


if __name__ == "__main__":
    program(main)
