"""Re-deriving the figure of a release from its weights: what its record says of model and data, and the comparison."""

from collections.abc import Sequence
from pathlib import Path

import mdeq
from tools.checkpoint import read_json
from tools.config import BadInput, ModelConfig, TrainConfig, load_config, parse_config
from tools.tasks import Headline

PLACES = ("data.root=", "data.workers=", "data.download=", "data.cache_on_device=", "run.")
"""Settings that say where and how, and leave the figure as it is."""
PRECISION = ("run.amp=", "run.dtype=")
"""Those that do not."""


def read_release(path: Path) -> mdeq.Release:
    """Return the release of a record.

    Raises:
        BadInput: for a file that is none, or one without an evaluation.
    """
    content = read_json(path)
    try:
        release = mdeq.Release(name=path.stem, folder=path.parent, **content)
        recorded_figure(release)
        if "config" in release.card and {"architecture", "model_args", "num_classes"} <= release.config.keys():
            return release
    except (KeyError, TypeError, AttributeError):
        pass
    raise BadInput(f"{path} is no record of a release")


def recorded_figure(release: mdeq.Release) -> float:
    """Return what a record says of the metric that counts."""
    evaluation = release.card["evaluation"]
    return float(evaluation["metrics"][evaluation["metric"]])


def release_config(release: mdeq.Release, overrides: Sequence[str]) -> TrainConfig:
    """Return the settings to evaluate a release as users have it: its own arguments and weights, its record's data.

    Raises:
        BadInput: for an override that would change the figure, or weights that are not those of the record.
    """
    other = [word for word in overrides if not word.startswith(PLACES) or word.startswith(PRECISION)]
    if other:
        raise BadInput(f"{other[0]} would give another figure than the record's; leave it out")
    config = parse_config(release.card["config"], f"the record of {release.name}")
    config = load_config(None, overrides, base=config)
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
    return config


def compared(release: mdeq.Release, headline: Headline, found: float) -> tuple[str, bool]:
    """Return the figure of a record and the one that was found, in words, and whether they are the same.

    They are where they differ by no more than half of the last digit that is published: 0.1 % or, of a Dice, 0.001.
    """
    recorded = recorded_figure(release)
    half = 0.5 * 10 ** -(1 if headline.per_cent else 3)
    same = abs(found - recorded) <= half
    texts = [headline.text(value, 4) for value in (found, recorded)]
    return f"{headline.name} of {release.name}: found {texts[0]}, recorded {texts[1]}", same
