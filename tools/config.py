"""The schema of a run: every setting of tools/train.py, with its default. Unknown keys and wrong types are errors."""

import dataclasses
import difflib
import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

DEFAULT_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "digits" / "mdeq_tiny_cifar.yaml"

ARRAYS = ("digits", "cifar10")
"""Data sets of 10 classes whose images are held in memory, resized as a whole; see `tools.data.Arrays`."""


class BadInput(Exception):
    """Something that the user has to change, said in one line. Programs print it and exit with code 2."""


def first_line(error: BaseException) -> str:
    """Return what an error says, in one line; its type where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def optional(module: str, extra: str, package: str | None = None) -> Any:
    """Return a module of an optional dependency.

    Args:
        module: to import.
        extra: of this package, which brings it.
        package: that the module is of; None where its name says so.

    Raises:
        BadInput: naming the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise BadInput(f'this needs {package or module.partition(".")[0]}: pip install -e ".[{extra}]"') from None


@dataclass
class ModelConfig:
    name: str = "mdeq_tiny_cifar"  # a name of mdeq.list_models(), with or without a weight tag
    pretrained: bool = False
    checkpoint: str | None = None  # .safetensors or .pt file to start from; a classifier of other size is left out
    freeze: bool = False  # train only the head; all else stays as it is, batch-norm statistics included
    freeze_bn: bool = False  # batch norms use and keep their running statistics
    kwargs: dict[str, Any] = field(default_factory=dict)  # passed to timm.create_model
    solver: dict[str, Any] | None = None  # {name: broyden, max_steps: 18}; None: the model's own
    gradient: dict[str, Any] | None = None  # {name: phantom, num_steps: 5, damping: 0.5}; None: the model's own


@dataclass
class DataConfig:
    # Images: digits | cifar10 | folder | any prefix of timm's readers, such as hfds/..., wds/... Images with masks:
    # camvid | cityscapes | masks. Volumes: hippocampus | nifti (with labels per voxel), modelnet10 | medmnist3d.
    name: str = "digits"
    root: str = "data"
    train_split: str = "train"
    test_split: str = "validation"
    download: bool = False
    num_train: int | None = None  # use only the first N training samples
    holdout: int | None = None  # hold out the last N training samples and evaluate on them, not on the test split
    num_classes: int | None = None  # None: as many as the data have, where that is known
    image_size: int | None = None  # images with one label each; None: the model's own
    batch_size: int = 64  # images of one optimiser step, over all processes and accumulated parts
    # none | flip | crop_flip (padded by an eighth) | imagenet (timm's random resized crop); images with masks: none |
    # flip | scale_flip; volumes: none | volume (small rotations, shifts, scales and changes of intensity).
    augment: str = "none"
    # Strength of random changes of brightness, contrast and saturation: for imagenet augmentation (None: 0.4) and, with
    # flip and scale_flip, for images with masks (None: 0).
    color_jitter: float | None = None
    # timm's policy string, for imagenet augmentation; it takes the place of color_jitter, but for 3a.
    auto_augment: str | None = None
    reprob: float = 0.0  # random erasing, for imagenet augmentation
    mixup: float = 0.0  # timm's alpha of mixed images and labels; classification, 0: none
    cutmix: float = 0.0  # timm's alpha of exchanged boxes, likewise
    workers: int = 2
    cache_on_device: bool = False  # digits and cifar10: hold the images on the device and augment there
    # Segmentation and volumes.
    patch_size: list[int] | None = None  # pixels (H, W) or voxels to train on; smaller inputs are padded
    inference: str = "whole"  # whole | sliding: windows of patch_size, where a test input is larger
    overlap: float = 0.5  # of neighbouring windows
    scale_range: list[float] = field(default_factory=lambda: [0.5, 2.0])  # scale_flip: range of resize factors
    ignore_index: int = 255  # masks: value of pixels that are ignored
    spacing: list[float] | None = None  # nifti: mm to resample to, per axis; None: the files' own
    orientation: str = "RAS"  # nifti: RAS | none (axes as stored in the file)
    normalise: str = "zscore"  # volumes, each by itself: zscore | minmax | none
    foreground: float = 0.0  # share of training patches centred on a voxel that is not background; 0: anywhere
    flip_axes: list[int] = field(default_factory=list)  # volumes: axes that are mirrored at random
    turn_axes: list[int] | None = None  # volumes: the two axes of random quarter turns


@dataclass
class LossConfig:
    name: str = "cross_entropy"  # cross_entropy | dice_ce (Dice and cross-entropy, for volumes)
    class_weights: list[float] | None = None
    ohem_threshold: float | None = None  # count only pixels whose class has less than this probability
    ohem_min_kept: int = 131_072  # but keep at least this many per batch


@dataclass
class OptimConfig:
    name: str = "adamw"  # any of timm.optim.list_optimizers() without second derivatives
    lr: float = 1e-3
    weight_decay: float = 0.0
    momentum: float = 0.9
    schedule: str = "cosine"  # cosine | step | tanh | poly | wsd | rsqrt | constant (all timm's) | none
    warmup_epochs: float = 0.0
    min_lr: float = 1e-6
    decay_epochs: float = 30.0  # step schedule: epochs between decays
    decay_rate: float = 0.1
    clip_grad: float | None = None  # largest gradient norm
    layer_decay: float | None = None  # rate of learning-rate decay from head to stem
    accumulate: int = 1  # parts a batch is split into, one after the other
    label_smoothing: float = 0.0
    ema_decay: float | None = None  # moving average of the weights, with warm-up; it is what is evaluated and exported


@dataclass
class DEQConfig:
    warmup_steps: int = 0  # optimiser steps of weight-tied training before the solver takes over
    warmup_unroll: int = 10  # applications of f in that phase
    jacobian_weight: float = 0.0  # of the Jacobian penalty, added to the loss
    jacobian_prob: float = 1.0  # share of steps at which it is computed
    jacobian_probes: int = 1  # random vectors that it is estimated by
    jacobian_increment: float = 0.0  # added to the weight every jacobian_increment_steps after warm-up
    jacobian_increment_steps: int = 1
    jacobian_stop_epoch: int | None = None  # from this epoch on, counted from 0, there is no penalty
    warmup_jacobian_weight: float = 0.0  # of the penalty during warm-up, in place of jacobian_weight


@dataclass
class RunConfig:
    epochs: int = 10
    seed: int = 0
    max_minutes: float | None = None  # stop at the next training step after this long, with a checkpoint to resume from
    resume: bool = False  # continue the run in out_dir, or the newest one of this config
    autoresume: bool = False  # continue the run in out_dir if there is one, else start it there
    out_dir: str | None = None  # None: a new folder in runs/
    device: str = "auto"  # auto | cpu | cuda | cuda:1
    threads: int | None = None  # CPU threads; None: torch's choice
    amp: str = "none"  # automatic mixed precision: none | bf16 | fp16; the solver keeps float32
    dtype: str = "float32"  # of weights and data: float32 | float64
    compile: bool = False  # torch.compile of the cell
    channels_last: bool = False  # memory format of images; on CPUs faster for narrow models, slower for wide ones
    eval_every: int = 1  # epochs between evaluations; the last is always evaluated
    checkpoint_minutes: float = 10.0  # also save within an epoch, this often
    max_bad_steps: int = 20  # stop after this many steps in a row without a finite loss and gradient
    tensorboard: bool = False
    wandb: bool = False
    progress: bool = True


@dataclass
class TrainConfig:
    task: str = "classification"  # classification | segmentation
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    deq: DEQConfig = field(default_factory=DEQConfig)
    run: RunConfig = field(default_factory=RunConfig)


_PATHS = ("data.root", "run.out_dir", "model.checkpoint")
_CHOICES = {
    "task": ("classification", "segmentation"),
    "data.augment": ("none", "flip", "crop_flip", "imagenet", "scale_flip", "volume"),
    "data.inference": ("whole", "sliding"),
    "data.orientation": ("RAS", "none"),
    "data.normalise": ("zscore", "minmax", "none"),
    "loss.name": ("cross_entropy", "dice_ce"),
    "run.amp": ("none", "bf16", "fp16"),
    "run.dtype": ("float32", "float64"),
}
_AT_LEAST_ONE = (
    "data.batch_size", "data.image_size", "data.num_train", "data.holdout", "data.num_classes", "optim.accumulate",
    "deq.warmup_unroll", "deq.jacobian_probes", "deq.jacobian_increment_steps", "run.epochs", "run.eval_every",
    "run.max_bad_steps", "run.threads", "loss.ohem_min_kept",
)  # fmt: skip
_POSITIVE = ("optim.lr", "optim.clip_grad", "optim.decay_epochs", "run.checkpoint_minutes", "run.max_minutes")
_NOT_NEGATIVE = (
    "data.workers", "data.color_jitter", "data.mixup", "data.cutmix", "optim.weight_decay",
    "optim.warmup_epochs", "optim.min_lr", "optim.decay_rate", "deq.warmup_steps", "deq.jacobian_weight",
    "deq.jacobian_increment", "deq.warmup_jacobian_weight", "run.seed",
)  # fmt: skip
_SHARES = (
    "data.reprob", "data.overlap", "data.foreground", "loss.ohem_threshold", "optim.label_smoothing",
    "optim.ema_decay", "deq.jacobian_prob",
)  # fmt: skip


_LARGEST = 3.4028235e38  # in single precision


def nearest(word: str, valid: Sequence[str]) -> str:
    """Return a hint that names the entry of `valid` most like `word`."""
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.0)
    return f"did you mean {close[0]}?" if close else "none is available"


def load_config(
    path: str | Path | None, overrides: Sequence[str] = (), *, base: TrainConfig | None = None
) -> TrainConfig:
    """Return settings, those of `base` or the defaults, updated by a YAML file and then by `key=value` overrides.

    Raises:
        BadInput: for a missing or malformed file, an unknown key, a wrong type or a value out of range.
    """
    config = OmegaConf.structured(base or TrainConfig)
    if path is not None:
        config = _merge(config, lambda: OmegaConf.load(path), str(path))
    for override in overrides:
        if "=" not in override:
            raise BadInput(f"expected key=value, got {override!r}")
        config = _merge(config, lambda o=override: _read_override(o), override)
    return _checked(config)


def _read_override(word: str) -> Any:
    """Return what a `key=value` word sets; a path is taken as it stands, also where YAML would see a number in it."""
    key, _, value = word.partition("=")
    if key not in _PATHS or value in ("", "null"):
        return OmegaConf.from_dotlist([word])
    section, _, name = key.partition(".")
    return OmegaConf.create({section: {name: value}})


def parse_config(text: str, origin: str) -> TrainConfig:
    """Return the settings in a YAML text, such as `config_yaml` makes; raises as `load_config` does."""
    return _checked(_merge(OmegaConf.structured(TrainConfig), lambda: OmegaConf.create(text), origin))


def _checked(config: Any) -> TrainConfig:
    try:
        result: Any = OmegaConf.to_object(config)
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise BadInput(f"config: {first_line(error)}") from None
    _check(result)
    for key in _PATHS:
        section, _, name = key.partition(".")
        if (path := getattr(getattr(result, section), name)) is not None:
            setattr(getattr(result, section), name, _path(key, path))
    return result


def _path(key: str, path: str) -> str:
    """Return a path with the home folder in place of `~`: no shell does so after a "="."""
    try:
        path.encode()  # as YAML and safetensors will
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except UnicodeEncodeError:
        raise BadInput(f"{key}: the name {path!r} is not UTF-8; rename it, or take a locale of UTF-8") from None
    except RuntimeError:
        raise BadInput(f"{key}: there is no home folder for {path}; write it out") from None


def _merge(config: Any, read: Any, origin: str) -> Any:
    try:
        update = read()
        if not OmegaConf.is_dict(update):
            raise BadInput(f"{origin}: expected a mapping of settings")
        content: Any = OmegaConf.to_container(update)  # with references unresolved
        _check_keys(content, origin)
        if "${" in str(content):
            raise BadInput(f"{origin}: settings may not refer to others or to the environment (${{...}})")
        missing = OmegaConf.missing_keys(update)  # a merge would leave what was there
        if missing:
            raise BadInput(f"{origin}: {min(missing)} has no value")
        for key in ("solver", "gradient"):
            # Another solver has other settings: it takes the place of the one before instead of adding to it.
            if "name" in (OmegaConf.select(update, f"model.{key}") or {}):
                config.model[key] = None
        return OmegaConf.merge(config, update)
    except FileNotFoundError:
        raise BadInput(f"no config file {origin}") from None
    except YAMLError as error:
        raise BadInput(f"{origin}: not valid YAML: {' '.join(str(error).split())}") from None
    except (OmegaConfBaseException, ValueError, TypeError, OSError) as error:
        key = getattr(error, "full_key", None)
        reason = first_line(error)
        raise BadInput(f"{origin}: {f'{key}: ' if key else ''}{reason}") from None


def _keys(schema: Any, prefix: str = "") -> list[str]:
    """Return every dotted key of a schema, sections before their settings."""
    keys = []
    for f in dataclasses.fields(schema):
        keys.append(prefix + f.name)
        if dataclasses.is_dataclass(f.type):
            keys += _keys(f.type, f"{prefix}{f.name}.")
    return keys


def _check_keys(update: dict[Any, Any], origin: str, schema: Any = TrainConfig, prefix: str = "") -> None:
    """Raise on the first key of `update` that the schema lacks; free-form mappings (kwargs, solver) are not entered."""
    fields = {f.name: f.type for f in dataclasses.fields(schema)}
    for key, value in update.items():
        if key not in fields:
            valid = [k for k in _keys(TrainConfig) if k.startswith(prefix)]
            # A setting named without its section is looked up by its own name.
            by_name = {k.rpartition(".")[2]: k for k in valid}
            hint = f"did you mean {by_name[key]}?" if key in by_name else nearest(f"{prefix}{key}", valid)
            raise BadInput(f"{origin}: unknown key {prefix}{key}; {hint}")
        if dataclasses.is_dataclass(fields[key]) and isinstance(value, dict):
            _check_keys(value, origin, fields[key], f"{prefix}{key}.")


def _check(config: TrainConfig) -> None:
    def value(key: str) -> Any:
        return attrgetter(key)(config)

    for key, choices in _CHOICES.items():
        if value(key) not in choices:
            raise BadInput(f"{key} must be one of {', '.join(choices)}, got {value(key)}")
    for key in _AT_LEAST_ONE:
        if value(key) is not None and value(key) < 1:
            raise BadInput(f"{key} must be >= 1, got {value(key)}")
    if config.run.seed >= 2**63:
        raise BadInput(f"run.seed must be below 2**63, got {config.run.seed}")
    if config.data.cache_on_device and config.data.name not in ARRAYS:
        raise BadInput(f"data.cache_on_device is for digits and cifar10, not for {config.data.name}")
    for keys, rule, holds in (
        (("optim.momentum",), "in [0, 1)", lambda number: 0 <= number < 1),
        (("optim.layer_decay",), "in (0, 1]", lambda number: 0 < number <= 1),
        (_POSITIVE, "> 0", lambda number: number > 0),
        (_NOT_NEGATIVE, ">= 0", lambda number: number >= 0),
        (_SHARES, "in [0, 1]", lambda number: 0 <= number <= 1),
    ):
        for key in keys:
            number = value(key)
            if number is not None and not (abs(number) <= _LARGEST and holds(number)):
                raise BadInput(f"{key} must be {rule} and finite in single precision, got {number}")


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the `key=value` words of a command line, and the rest."""
    keys = {word: word.partition("=")[0] for word in words if "=" in word and not word.startswith("-")}
    # A path may have a = in it.
    overrides = [word for word in words if word in keys and "/" not in keys[word] and not os.path.exists(word)]
    return overrides, [word for word in words if word not in overrides]


def config_yaml(config: TrainConfig) -> str:
    """Return the whole effective config as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
