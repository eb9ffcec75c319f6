"""A trained model from a name, the Hub, a folder or a file, with what its config.json says of classes and inputs."""

import dataclasses
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from timm.data import ImageNetInfo

import mdeq
from tools.build import build_model, data_record, known_model, of_package, renew_cfg
from tools.checkpoint import CONFIG_FILE, WEIGHTS_FILE, read_json, read_weights, run_of
from tools.config import BadInput, ModelConfig, first_line, load_config, nearest
from tools.known_data import DATASETS
from tools.segmentation_data import CITYSCAPES_CLASSES

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".pkl", ".tar")


@dataclass(frozen=True)
class Trained:
    """A model with weights, in eval mode.

    Args:
        model: the model.
        config: its config.json; empty where there is none.
        label_names: of its classes.
    """

    model: mdeq.Backbone
    config: dict[str, Any]
    label_names: tuple[str, ...]


def load_trained(name: str) -> Trained:
    """Return the model of a name, `hf-hub:ORG/NAME`, `local-dir:FOLDER`, a run's folder or a file of weights.

    Beside a file of weights its config.json or the run's config.yaml is read; where there is neither, the weights are
    those of the model that they fit, as tools/convert.py finds it.

    Raises:
        BadInput: if there is no such model, or it has no weights.
    """
    known = name.partition(".")[0] in mdeq.list_models()
    path = Path(name.removeprefix("local-dir:"))
    looks_like_path = "/" in name or os.sep in name or path.suffix in WEIGHT_SUFFIXES or path.exists()
    if name.startswith("local-dir:") or (looks_like_path and not known and not name.startswith("hf-hub:")):
        model, config = _from_path(path)
    else:
        model = build_model(ModelConfig(name=known_model(name), pretrained=True), None, for_training=False)
        config = recorded_config(name)
    if model.num_classes < 1:
        raise BadInput(f"{name} has no classes to predict")
    return Trained(model.eval(), config, _label_names(model, config))


def recorded_config(name: str) -> dict[str, Any]:
    """Return what the config.json of a model of a name, `local-dir:` or `hf-hub:` says; nothing where there is none.

    Raises:
        BadInput: for a damaged file.
        WeightsError: for one on the Hub that cannot be had.
    """
    source, _, place = name.partition(":")
    if source == "hf-hub":
        return read_json(mdeq.hub_config(place))
    if source == "local-dir":
        return config_beside(Path(place))
    release = release_of(name)
    return {} if release is None else dict(release.config)


def release_of(name: str) -> mdeq.Release | None:
    """Return the release of `architecture.tag`; of an architecture alone, the one whose weights timm takes."""
    return next((r for key, r in mdeq.RELEASES.items() if name in (key, key.partition(".")[0])), None)


def load_checkpoint(path: Path, name: str | None) -> tuple[mdeq.Backbone, str]:
    """Return the model of a checkpoint with its weights, through timm's ordinary path, and the layout it was in.

    Raises:
        BadInput: for a file that cannot be read, or fits no model.
    """
    if name is not None and name not in mdeq.list_models():
        raise BadInput(f"unknown model {name}; {nearest(name, mdeq.list_models())}")
    file = path / WEIGHTS_FILE if path.is_dir() else path
    try:
        if file.name == WEIGHTS_FILE and (file.parent / "config.json").is_file():  # it says more than shapes do
            model = timm.create_model(known_model(f"local-dir:{file.parent}"), pretrained=True)
            return of_package(model, str(path)), "native"
        if name is None and config_beside(file).get("architecture") in mdeq.list_models():
            source = ModelConfig(name=f"local-dir:{file.parent}", checkpoint=str(file))
            return build_model(source, None, for_training=False), "native"
        weights = read_weights(file)
        layout, fitting, args = mdeq.identify_checkpoint(weights, name)
        if name not in (None, fitting):
            raise BadInput(f"{path} does not fit {name}: it fits {fitting}")
        default: Any = timm.get_pretrained_cfg(fitting)
        # The tensors, not the file, of which timm takes others where it holds averages too.
        overlay: dict[str, Any] = dict(state_dict=weights, num_classes=args.get("num_classes", default.num_classes))
        if "in_chans" in args:
            overlay["input_size"] = (args["in_chans"], *default.input_size[1:])
        model = of_package(timm.create_model(fitting, pretrained=True, pretrained_cfg_overlay=overlay, **args), fitting)
        # What the architecture's released weights were trained on says nothing of these.
        model.pretrained_cfg |= dict(state_dict=None, description=None, tag="", license=None, hf_hub_id=None)
        if layout == "native":
            model.pretrained_cfg["label_names"] = None
        return model, layout
    except (ValueError, RuntimeError, TypeError, OSError, SafetensorError) as error:
        raise BadInput(f"{path}: {first_line(error)}") from None


def config_beside(checkpoint: Path) -> dict[str, Any]:
    """Return the config.json of a run's folder, or beside a file of weights; nothing where there is none."""
    path = run_of(checkpoint) / "config.json"
    return read_json(path) if path.is_file() else {}


def _from_path(path: Path) -> tuple[mdeq.Backbone, dict[str, Any]]:
    if not path.exists():
        raise BadInput(f"no checkpoint {path}")
    folder, config = run_of(path), config_beside(path)
    if config:
        weights = path / WEIGHTS_FILE if path.is_dir() else path
        # timm knows other names of the file
        where: dict[str, Any] = dict(checkpoint=str(weights)) if weights.exists() else dict(pretrained=True)
        return build_model(ModelConfig(name=f"local-dir:{folder}", **where), None, for_training=False), config
    if not (folder / CONFIG_FILE).is_file():
        return load_checkpoint(path, None)[0], {}
    run = load_config(folder / CONFIG_FILE)
    start, source = run.model, dataclasses.replace(run.model, pretrained=False, checkpoint=str(path))
    classifier = read_weights(path).get("classifier.weight")
    model = build_model(source, None if classifier is None else len(classifier), for_training=False)
    renew_cfg(model, start, run.data)
    return model, data_record(run, ())  # the names of the classes are not in it


def _label_names(model: mdeq.Backbone, config: dict[str, Any]) -> tuple[str, ...]:
    """Return a name for every class: those of config.json, those known of the data, else numbers.

    Where config.json has `label_descriptions` (by name, as timm writes them), or the names are WordNet's numbers, it is
    what these say.
    """
    tag = str(config.get("pretrained_cfg", {}).get("tag") or "")  # of the weights; the model's own may be of others
    known = model.pretrained_cfg.get("label_names") or ()  # those of released weights, if it has as many classes
    names = config.get("label_names") or (known if len(known) == model.num_classes else ())
    if isinstance(names, dict):  # timm allows a dictionary by number
        names = [names.get(str(k), names.get(k, "")) for k in range(model.num_classes)]
    of_official = not config or tag == "locuslab"
    if of_official and isinstance(model, mdeq.MDEQSegmenter) and model.num_classes == len(CITYSCAPES_CLASSES):
        tag = "cityscapes"  # which the official segmenters were trained on
    if not names and tag in DATASETS and len(DATASETS[tag].labels) == model.num_classes:
        names = DATASETS[tag].labels
    if not names and "in1k" in tag and model.num_classes == 1000:
        names = [ImageNetInfo().index_to_description(k) for k in range(1000)]
    if not isinstance(names, (list, tuple)) or len(names) > model.num_classes:
        raise BadInput(f"label_names in config.json must be a list of at most {model.num_classes} names")
    names = [str(name) for name in names] + [""] * (model.num_classes - len(names))
    described = config.get("label_descriptions") or _words(names)
    if not isinstance(described, dict):
        raise BadInput("label_descriptions in config.json must map label names to words")
    # The background is known by its name, which pictures leave black.
    words = (name if name.lower() == "background" else described.get(name) or name for name in names)
    # Whoever made the model named them: a terminal is not to take them for more than text.
    return tuple(_text(str(word)) or f"class {k}" for k, word in enumerate(words))


def _text(name: str) -> str:
    """Return a name in which all that is not to be seen, but for joiners of letters, is a space."""
    return " ".join("".join(c if c.isprintable() or c in "\u200c\u200d" else " " for c in name).split())


def _words(names: Sequence[str]) -> dict[str, str]:
    """Return words for WordNet numbers, the folders of ImageNet; nothing for other names."""
    named = [name for name in names if name]
    if not named or not all(re.fullmatch(r"n\d{8}", name) for name in named):
        return {}
    # Neither list holds all of the other.
    found: dict[str, str] = {}
    for subset in ("imagenet-22k", "imagenet-1k"):
        words: Any = ImageNetInfo(subset).label_descriptions(as_dict=True)
        found |= words
    return found
