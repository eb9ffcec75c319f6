"""What a data set gives to a training loop: batches whose order depends on seed and epoch alone."""

import math
import os
import random
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tools.config import ARRAYS, BadInput, DataConfig
from tools.peak import lacks_memory

MIN_SIZE, MAX_SIZE = 16, 16384  # the smallest side that a model takes, the largest that a pretrained_cfg may ask for
INTERPOLATIONS = ("bilinear", "bicubic", "nearest", "box", "hamming", "lanczos")  # timm's names
VOID = 255
"""Label of pixels and voxels that do not count, whatever the number they have in the files."""

Batch = tuple[Tensor, Tensor]
"""Normalised images `(B, C, *S)` on the device, and labels: `(B,)` of classes, or `(B, *S)` of pixels or voxels."""


class Batches(Protocol):
    """The batches of one split, as many and in the same order for the same epoch, wherever it is entered."""

    class_names: tuple[str, ...]  # empty where they are not known

    @property
    def num_samples(self) -> int | None:
        """Samples of the split, all processes together; None where it is not known."""

    @property
    def spacings(self) -> Sequence[Sequence[float]] | None:
        """Mm per voxel of the samples of this process, in order, where known."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int = 0, start: int = 0, only: Sequence[int] | None = None) -> Iterator[Batch]:
        """Yield the batches of an epoch: from number `start` on, or `only` those of some numbers, which go up."""
        ...


@dataclass(frozen=True)
class Process:
    """Which process this is, of how many, and the device it computes on."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True)
class ImageSpec:
    """What a model wants to see: `(in_chans, H, W)`, and the normalisation of values in 0..1 per channel."""

    size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    crop_pct: float = 0.875

    @classmethod
    def of(cls, cfg: dict[str, Any], in_chans: int, image_size: int | None) -> "ImageSpec":
        """Return the spec of a model's pretrained_cfg, at another size if one is given.

        Raises:
            BadInput: for a size under 16, or a pretrained_cfg that says nothing sensible.
        """
        _check_cfg(cfg)
        height, width = (image_size, image_size) if image_size else cfg["input_size"][1:]
        if min(height, width) < MIN_SIZE:
            raise BadInput(f"data.image_size must be >= {MIN_SIZE}, got {min(height, width)}")
        mean, std = tuple(cfg["mean"]), tuple(cfg["std"])
        if len(mean) != in_chans:  # a grey or multispectral input has no constants of its own
            mean, std = (sum(mean) / len(mean),) * in_chans, (sum(std) / len(std),) * in_chans
        return cls((in_chans, height, width), mean, std, cfg["interpolation"], cfg.get("crop_pct") or cls.crop_pct)


def _check_cfg(cfg: dict[str, Any]) -> None:
    """Raise BadInput for a pretrained_cfg, which may come from anyone, that says nothing sensible of images."""
    origin = "pretrained_cfg of the model"
    for key in ("input_size", "mean", "std"):
        numbers = cfg.get(key)
        numbers = numbers if isinstance(numbers, (list, tuple)) else ()
        if not numbers or not all(_is_number(x) and (key == "mean" or x > 0) for x in numbers):
            raise BadInput(f"{origin}: {key} must be a list of numbers, positive but for mean, got {cfg.get(key)}")
    size = cfg["input_size"]
    if len(size) != 3 or not all(isinstance(x, int) and x <= MAX_SIZE for x in size):
        raise BadInput(f"{origin}: input_size must be 3 whole numbers up to {MAX_SIZE}, got {size}")
    if len(cfg["mean"]) != len(cfg["std"]):
        raise BadInput(f"{origin}: mean and std must have as many numbers")
    if cfg.get("interpolation") not in INTERPOLATIONS:
        raise BadInput(f"{origin}: interpolation must be one of {', '.join(INTERPOLATIONS)}")
    crop_pct = cfg.get("crop_pct")
    if crop_pct and not (_is_number(crop_pct) and 0.01 <= crop_pct <= 2):
        raise BadInput(f"{origin}: crop_pct must be in 0.01..2, got {crop_pct}")


def _is_number(x: object) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Raise BadInput if one of the labels `(B,)` is no class of the model: on a GPU it would end in an assertion."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise BadInput(
            f"the data set has label {low if low < 0 else high}, the model only has classes 0 to {num_classes - 1}; "
            "set data.num_classes"
        )


@contextmanager
def memory_for(what: str, options: str, how: str = "smaller") -> Iterator[None]:
    """Turn a lack of memory into one line that names what it lacked for and the options that help.

    Raises:
        BadInput: if memory runs out, a GPU's or the machine's.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        raise BadInput(f"{what} does not fit into memory; make {options} {how}") from None


def seed_of(*numbers: int) -> int:
    """Return one seed for a tuple of numbers, such as seed, epoch and step."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*numbers))


def seed_everything(*numbers: int) -> None:
    """Seed the generators of torch, numpy and Python by a tuple of numbers."""
    seed = seed_of(*numbers)
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@dataclass
class _Keys:
    """What `KeyLoader` goes through next; apart from it, so that no cycle keeps its workers alive."""

    lists: Iterable[list[Any]] = ()

    def __iter__(self) -> Iterator[list[Any]]:
        return iter(self.lists)


def stand_apart(worker: int) -> None:
    """Have signals to all processes of a terminal or a job reach the main one alone, which ends its workers."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


class KeyLoader:
    """A data loader for lists of keys that are given anew for every pass, which ends the one before.

    Its workers stay, since to start some takes seconds where they are not forked.

    Args:
        dataset: gives a sample for a key, which says all that is random about it.
        workers: how many processes read it; 0: this one.
        collate: makes a batch of samples.
        process: this process.
    """

    def __init__(self, dataset: Dataset, workers: int, collate: Callable[[list[Any]], Any], process: Process) -> None:
        self._keys = _Keys()
        self._loader = DataLoader(
            dataset,
            batch_sampler=self._keys,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=process.device.type == "cuda",
            persistent_workers=workers > 0,
            worker_init_fn=stand_apart,
            generator=torch.Generator(),  # for the seeds of the workers: the common one stays as it is
        )

    def batches(self, keys: Iterable[list[Any]]) -> Iterator[Any]:
        """Return the batches of lists of keys."""
        self._keys.lists = keys
        return iter(self._loader)


def reads_training_split(config: DataConfig, training: bool) -> bool:
    """Whether samples come from the training split: to train on, or to evaluate on what is held out of it."""
    return training or config.holdout is not None


def split_name(config: DataConfig, training: bool) -> str:
    """Return the split to read."""
    return config.train_split if reads_training_split(config, training) else config.test_split


def evaluated_split(config: DataConfig) -> str:
    """Return what people call the samples that are evaluated on."""
    if config.holdout is not None:
        return "held-out training"
    return "test" if config.name in ARRAYS else config.test_split  # these two have no names for it


def split_lines(config: DataConfig) -> list[str]:
    """Return the line to print where a score is not of the test split."""
    if config.holdout is None:
        same = config.name not in ARRAYS and config.test_split == config.train_split
        return [f"tested on the training split itself, {config.test_split}"] if same else []
    return [f"tested on {config.holdout:,} held-out training samples, not on the test split"]


def chosen(count: int, config: DataConfig, training: bool) -> slice:
    """Return which samples of a split of so many count: `data.num_train` of those that `data.holdout` leaves, or these.

    Raises:
        BadInput: if nothing is left.
    """
    if config.holdout is None:
        return slice(0, config.num_train if training else None)
    rest = count - config.holdout
    if rest < 1:
        raise BadInput(
            f"data.holdout={config.holdout} leaves none of the {count} training samples; lower it, or set "
            "data.holdout=null"
        )
    return slice(0, min(rest, config.num_train or rest)) if training else slice(rest, count)


def require_augment(config: DataConfig, *kinds: str, jittered: Sequence[str] = ()) -> None:
    """Raise BadInput for an augmentation that the data do not have, or a setting of one that would do nothing.

    Args:
        kinds: the augmentations of the data.
        jittered: those with which `data.color_jitter` changes colours.
    """
    if config.augment not in kinds:
        listed = f"{', '.join(kinds[:-1])} or {kinds[-1]}"
        raise BadInput(f"data.augment must be {listed} for {config.name}, got {config.augment}")
    if (config.auto_augment is not None or config.reprob > 0) and (config.augment == "none" or "imagenet" not in kinds):
        setting = "data.reprob" if config.auto_augment is None else "data.auto_augment"
        raise BadInput(
            f"{setting} is for image folders and timm's other readers with data.augment=imagenet; got data.name="
            f"{config.name} and data.augment={config.augment}"
        )
    instead = config.auto_augment is not None and "3a" not in config.auto_augment  # timm leaves it to the policy
    if config.color_jitter and (config.augment not in jittered or instead):
        raise BadInput(
            "data.color_jitter is for images with masks and data.augment=flip or scale_flip, and for image folders and "
            "timm's other readers with data.augment=imagenet and no data.auto_augment but 3a; got data.name="
            f"{config.name}, data.augment={config.augment}, data.auto_augment={config.auto_augment or 'null'}"
        )


class KeyedBatches:
    """Batches whose order and augmentation depend on seed, epoch and batch number alone: a run can be resumed.

    In training every process has as many samples of a batch, or the mean of the processes' gradients is none.

    Args:
        count: samples of the split.
        batch_size: of all processes together.
        process: this process.
        training: whether they are to train on: in random order, without an incomplete batch at the end.
        seed: of the run.

    Raises:
        BadInput: for fewer training samples than processes.
    """

    class_names: tuple[str, ...] = ()

    @property
    def spacings(self) -> Sequence[Sequence[float]] | None:
        """See `Batches`."""
        return None

    def __init__(self, count: int, batch_size: int, process: Process, *, training: bool, seed: int) -> None:
        self.num_samples, self.process, self.training, self.seed = count, process, training, seed
        size = min(batch_size, count)
        if training and size < process.world_size:
            raise BadInput(f"{size} training samples are too few for {process.world_size} processes; start fewer")
        self.batch_size = size - size % process.world_size if training else size

    def __len__(self) -> int:
        return self.num_samples // self.batch_size if self.training else -(-self.num_samples // self.batch_size)

    def places(self, batch: Sequence[int]) -> range:
        """Return which samples of a batch are those of this process."""
        return range(self.process.rank, len(batch), self.process.world_size)

    def parts(self, epoch: int, start: int, only: Sequence[int] | None) -> Iterator[tuple[int, Tensor]]:
        """Yield the number of each batch and the indices of its samples, those of all processes."""
        order = torch.arange(self.num_samples)
        if self.training:
            order = torch.randperm(self.num_samples, generator=generator(self.seed, epoch))
        for number in range(start, len(self)) if only is None else only:
            yield number, order[number * self.batch_size : (number + 1) * self.batch_size]

    def keys(self, epoch: int, start: int, only: Sequence[int] | None) -> Iterator[list[tuple[int, int]]]:
        """Yield what this process has of each batch: the samples' indices, each with the seed of its augmentation."""
        for number, part in self.parts(epoch, start, only):  # one at a time: millions of samples have as many seeds
            batch = part.tolist()
            yield [(batch[place], seed_of(self.seed, epoch, number + 1, place)) for place in self.places(batch)]
