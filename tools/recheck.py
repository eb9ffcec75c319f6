"""Re-deriving the figure of a release from its weights: what its record says of model and data, and the comparison."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mdeq
from mdeq import Backbone, build_solver
from tools.checkpoint import read_json
from tools.config import BadInput, ModelConfig, TrainConfig, load_config, parse_config
from tools.results import solver_settings, write_json
from tools.scores import Score

DATA_PLACES = ("root", "workers", "download", "cache_on_device", "batch_size")
PLACES = (*(f"data.{key}=" for key in DATA_PLACES), "run.")
"""Settings that say where and how, and leave the figure as it is."""
PRECISION = ("run.amp=", "run.dtype=")
"""Those that do not."""
WORDS = {
    "evaluations": ("mean evaluations of f", ".2f"),
    "residual_mean": ("mean residual", ".2e"),
    "converged": ("share that converged", ".4f"),
}
"""Of some of the figures beside the one that counts, words and format."""
SHARES = ("converged", "max_steps", "diverged", "nonfinite")
"""Of samples, whose solves ended in this way."""
RENEWED = ("data.", "model.solver.")
"""Settings that another evaluation of the same weights may have; a record keeps them."""


def read_release(path: Path) -> mdeq.Release:
    """Return the release of a record.

    Raises:
        BadInput: for a file that is none, or one without an evaluation.
    """
    if not path.exists() and path.name in mdeq.RELEASES:
        raise BadInput(
            f"{path} is the name of a release; its record is {mdeq.RELEASES[path.name].folder / path.name}.json"
        )
    if path.suffix == ".safetensors":
        raise BadInput(f"{path} holds weights; their record is the .json file beside them")
    content = read_json(path)
    try:
        release = mdeq.Release(name=path.stem, folder=path.parent, **content)
        recorded_figure(release)
        if "config" in release.card and {"architecture", "model_args", "num_classes"} <= release.config.keys():
            return release
    except (KeyError, TypeError, AttributeError):
        pass
    raise BadInput(f"{path} is not the record of a release")


def recorded_figure(release: mdeq.Release) -> float:
    """Return what a record says of the metric that counts."""
    evaluation = release.card["evaluation"]
    return float(evaluation["metrics"][evaluation["metric"]])


def neutral(word: str) -> bool:
    """Whether a `key=value` word leaves the figure of an evaluation as it is."""
    return word.startswith(PLACES) and not word.startswith(PRECISION)


def unkept(words: Sequence[str]) -> list[str]:
    """Return the `key=value` words that change the figure of an evaluation, and that no record keeps."""
    return [word for word in words if not neutral(word) and not word.startswith(RENEWED)]


def evaluation_settings(words: Sequence[str]) -> list[str]:
    """Return the last word of each setting of the data that changes the figure: what a record keeps."""
    told = {word.partition("=")[0]: word for word in words if word.startswith("data.") and not neutral(word)}
    return list(told.values())


def evaluated_config(card: Mapping[str, Any], name: str) -> TrainConfig:
    """Return the settings by which a record's figure was measured: of its training, but those that it departs by.

    Args:
        card: of the record.
        name: of the release, for errors.
    """
    trained = parse_config(card["config"], f"the record of {name}")
    return load_config(None, card["evaluation"].get("settings", []), base=trained)


def check_place(config: TrainConfig) -> TrainConfig:
    """Return settings that came of a record.

    Raises:
        BadInput: if nobody has said where the data lie: a record does not know.
    """
    if config.data.root == "DIR" and config.data.name != "digits" and not Path("DIR").exists():
        raise BadInput(f"set data.root=FOLDER to the folder of the {config.data.name} data")
    return config


def release_config(release: mdeq.Release, overrides: Sequence[str], *, renew: bool = False) -> TrainConfig:
    """Return the settings to evaluate a release as users have it: its own arguments and weights, its record's data.

    Args:
        release: what to evaluate.
        overrides: `key=value` words.
        renew: for an evaluation that takes the place of the record's: words may change the figure.

    Raises:
        BadInput: for an override that would change the figure, or weights that are not those of the record.
    """
    config = evaluated_config(release.card, release.name)
    other = [word for word in overrides if not neutral(word)]
    if other and not renew:
        raise BadInput(f"{other[0]} would change the record's figure; leave it out, or see tools/validate.py --renew")
    if bad := unkept(overrides):
        raise BadInput(f"--renew takes settings of the data and the solver only, got {bad[0]}")
    try:
        weights = mdeq.local_file(release)
    except mdeq.WeightsError as error:
        raise BadInput(str(error)) from None
    own = ("solver", "gradient")
    args = release.config["model_args"]
    config.model = ModelConfig(
        name=release.config["architecture"],
        checkpoint=str(weights),
        kwargs={key: value for key, value in args.items() if key not in (*own, "num_classes")},
        **{key: args.get(key) for key in own},
    )
    config.data.num_classes = release.config["num_classes"]
    return check_place(load_config(None, overrides, base=config))


def put_into_card(path: Path, **sections: Any) -> None:
    """Have what the record of a release keeps for its card hold sections, in place of those that it has."""
    record = read_json(path)
    record["card"] |= sections
    write_json(path, record, indent=1)


def renew_record(path: Path, evaluation: Mapping[str, Any], steps: Mapping[str, Any]) -> None:
    """Put an evaluation into the record of a release in place of the one that it has; it then comes with its solver.

    Other seeds stay only if they were evaluated alike, an explicit network only if it was tested on the same.

    Args:
        path: of the record.
        evaluation: what took its place.
        steps: `steps` and `steps_by`, accuracy against steps, if that was measured too; nothing keeps the old one.
    """
    record = read_json(path)
    card, figure = record["card"], evaluation["metrics"][evaluation["metric"]]
    before = card["evaluation"]
    alike = all(before.get(key) == evaluation.get(key) for key in ("solver", "settings"))
    seed = card["training"]["seed"]
    others = [s for s in card["seeds"] if s["seed"] != seed] if alike else []
    card["seeds"] = [{"seed": seed, "value": figure}, *others]
    card["evaluation"], record["metrics"] = dict(evaluation), evaluation["metrics"]
    card.pop("steps_by", None)
    card |= {"steps": [], **steps}
    if before.get("settings") != evaluation.get("settings"):
        card.pop("baseline", None)
    args, solver = record["config"]["model_args"], evaluation["solver"]
    args["solver"] = solver_of_record(args.get("solver") or {}, solver)
    write_json(path, record, indent=1)


def solver_of_record(trained: Mapping[str, Any], solver: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the solver of an evaluation for a config.json: those said before and those that matter."""
    usual = dataclasses.asdict(build_solver({"name": solver["name"]}))
    return {
        key: value
        for key, value in solver.items()
        if key == "name" or value != usual[key] or (key in trained and trained.get("name") == solver["name"])
    }


def contradictions(release: mdeq.Release, model: Backbone) -> list[str]:
    """Return, in words, where a record does not agree with itself or with its weights.

    Args:
        release: the record's.
        model: as `release_config` has it built.
    """
    evaluation, seed = release.card["evaluation"], release.card["training"]["seed"]
    figures = [entry["value"] for entry in release.card["seeds"] if entry["seed"] == seed]
    pairs = {
        "size": (release.size, mdeq.local_file(release).stat().st_size),
        "metrics": (release.metrics, evaluation["metrics"]),
        f"card.seeds, seed {seed}": (figures, [recorded_figure(release)]),
        "card.evaluation.parameters": (evaluation["parameters"], sum(p.numel() for p in model.parameters())),
        "card.evaluation.solver": (evaluation["solver"], solver_settings(model.deq.solver)),
    }
    return [
        f"{name} of {release.name}: recorded {said}, should be {true}"
        for name, (said, true) in pairs.items()
        if said != true
    ]


def differing(release: mdeq.Release, found: Mapping[str, float]) -> list[str]:
    """Return, in words, what an evaluation found otherwise than a record says, beside the figure that counts.

    Rounding differs between machines: within 5 %, or one point of a share of samples, they are the same. The largest
    residual is that of one sample, maybe one that does not converge: within a half.
    """
    evaluation, lines = release.card["evaluation"], []
    for key, value in evaluation["metrics"].items():
        recorded = math.nan if value is None else value  # JSON has no word for what is not finite
        there = found.get(key, math.nan)
        allowed = 0.01 if key in SHARES else (0.5 if key == "residual_q1" else 0.05) * abs(recorded)
        allowed = max(allowed, 1) if key == "hd95_undefined" else allowed  # a count
        finite = math.isfinite(there) or math.isfinite(recorded)
        if key != evaluation["metric"] and finite and not abs(there - recorded) <= allowed:
            words, digits = WORDS.get(key, (key, ".4g"))
            lines.append(f"{words} of {release.name}: found {there:{digits}}, recorded {recorded:{digits}}")
    return lines


def compared(name: str, headline: Score, found: float, recorded: float) -> tuple[str, bool]:
    """Return the figure of a record and the one that was found, in words, and whether they are the same.

    They are where they differ by no more than half of the last digit that is published: 0.1 % or, of a Dice, 0.001.

    Args:
        name: what the figure is of.
        headline: which it is.
        found, recorded: the two.
    """
    half = 0.5 * 10 ** -(1 if headline.per_cent else 3)
    same = abs(found - recorded) <= half
    texts = [headline.text(value, 4) for value in (found, recorded)]
    return f"{headline.name} of {name}: found {texts[0]}, recorded {texts[1]}", same
