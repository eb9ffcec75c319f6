"""Data sets and loaders. Small image sets are arrays in memory; everything else is read by timm."""

import logging
import lzma
import random
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import create_dataset, create_loader
from timm.task.evaluator import evaluation_sample_limit
from torch import Tensor
from torchvision.datasets import CIFAR10

from tools.config import BadInput, DataConfig, nearest

CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MIN_SIZE = 16
DATA_NAMES = ("digits", "cifar10", "folder", "hfds/...", "hfids/...", "wds/...", "tfds/...", "torch/...")

# An image that cannot be read ends a run with one line, see StrictImages; timm would say so a second time.
logging.getLogger("timm.data.dataset").setLevel(logging.ERROR)

Batch = tuple[Tensor, Tensor]
"""Normalised images `(B, C, H, W)` on the device, labels `(B,)`."""


class Batches(Protocol):
    """The batches of one split, as many and in the same order for the same epoch, wherever it is entered."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from number `start` on."""
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
            BadInput: for a size under 16.
        """
        height, width = (image_size, image_size) if image_size else cfg["input_size"][1:]
        if min(height, width) < MIN_SIZE:
            raise BadInput(f"data.image_size must be >= {MIN_SIZE}, got {min(height, width)}")
        mean, std = tuple(cfg["mean"]), tuple(cfg["std"])
        if len(mean) != in_chans:  # a grey or multispectral input has no constants of its own
            mean, std = (sum(mean) / len(mean),) * in_chans, (sum(std) / len(std),) * in_chans
        return cls((in_chans, height, width), mean, std, cfg["interpolation"], cfg["crop_pct"])


@dataclass(frozen=True)
class Arrays:
    """A split held in memory: images `(N, C, H, W)` uint8 and labels `(N,)` int64."""

    images: Tensor
    labels: Tensor

    def fitted(self, size: tuple[int, int, int], name: str) -> "Arrays":
        """Return the images with the channels and size of a model's input.

        Raises:
            BadInput: if grey and colour are not all that differs.
        """
        images, channels = self.images, size[0]
        if images.shape[1] != channels:
            if {images.shape[1], channels} != {1, 3}:
                raise BadInput(
                    f"{name} has {images.shape[1]} channels, the model takes {channels} (model.kwargs.in_chans)"
                )
            gray = images.float().mul(torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)) if channels == 1 else None
            images = images.expand(-1, 3, -1, -1) if gray is None else gray.sum(1, keepdim=True).round().byte()
        if images.shape[2:] != size[1:]:
            resized = F.interpolate(images.float(), size=size[1:], mode="bilinear", antialias=True)
            images = resized.round().clamp(0, 255).byte()
        return Arrays(images.contiguous(), self.labels)


class ArrayBatches:
    """Batches of arrays. Order and augmentation depend on seed, epoch and batch number alone: a run can be resumed."""

    def __init__(
        self, arrays: Arrays, spec: ImageSpec, config: DataConfig, process: Process, *, training: bool, seed: int = 0
    ) -> None:
        home = process.device if config.cache_on_device else torch.device("cpu")
        self.images, self.labels = arrays.images.to(home), arrays.labels.to(home)
        self.training, self.seed, self.process = training, seed, process
        self.batch_size = min(config.batch_size, len(self.labels))
        if training:  # every process has as many images of a batch, or the mean of the processes' gradients is none
            self.batch_size -= self.batch_size % process.world_size
        self.augment = config.augment if training else "none"
        constants = dict(device=process.device, dtype=torch.float32)
        self.mean = 255 * torch.tensor(spec.mean, **constants).view(1, -1, 1, 1)
        self.std = 255 * torch.tensor(spec.std, **constants).view(1, -1, 1, 1)

    def __len__(self) -> int:
        count = len(self.labels)
        return count // self.batch_size if self.training else -(-count // self.batch_size)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        order = torch.arange(len(self.labels))
        if self.training:
            order = torch.randperm(len(self.labels), generator=_generator(self.seed, epoch))
        for number in range(start, len(self)):
            batch = order[number * self.batch_size : (number + 1) * self.batch_size]
            index = batch[self.process.rank :: self.process.world_size].to(self.images.device)
            x = self.images[index].to(self.process.device, non_blocking=True)
            y = self.labels[index].to(self.process.device, non_blocking=True)
            if self.augment != "none":
                rng = _generator(self.seed, epoch, number + 1, self.process.rank)
                x = augment(x, rng, pad=x.shape[-1] // 8 if self.augment == "crop_flip" else 0)
            yield (x.float() - self.mean) / self.std, y


def augment(x: Tensor, rng: torch.Generator, pad: int) -> Tensor:
    """Return x `(B, C, H, W)`, each image flipped or not, and cropped at random from its copy padded by zeros."""
    batch, _, height, width = x.shape
    flip = torch.rand(batch, generator=rng).lt(0.5).to(x.device)
    x = torch.where(flip.view(-1, 1, 1, 1), x.flip(3), x)
    if pad == 0:
        return x
    offset = torch.randint(0, 2 * pad + 1, (2, batch, 1), generator=rng).to(x.device)
    rows = offset[0] + torch.arange(height, device=x.device)  # (B, H)
    columns = offset[1] + torch.arange(width, device=x.device)  # (B, W)
    sample = torch.arange(batch, device=x.device).view(-1, 1, 1)
    padded = F.pad(x, (pad, pad, pad, pad)).permute(0, 2, 3, 1)  # (B, H + 2 pad, W + 2 pad, C)
    return padded[sample, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(_seed(*numbers))


def seed_everything(*numbers: int) -> None:
    """Seed the generators of torch, numpy and Python by a tuple of numbers, such as seed, epoch and step."""
    seed = _seed(*numbers)
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def read_digits(train: bool) -> Arrays:
    """Return scikit-learn's 8x8 handwritten digits: every fifth image is a test image, 1,437 and 360 in all."""
    digits = load_digits()
    chosen = (np.arange(len(digits.target)) % 5 != 0) == train
    images = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)  # grey levels 0..16
    return Arrays(torch.from_numpy(images).unsqueeze(1), torch.from_numpy(digits.target[chosen]).long())


def read_cifar10(root: Path, train: bool, limit: int | None = None, download: bool = False) -> Arrays:
    """Return CIFAR-10 from any of its three forms under `root`.

    These are `cifar10_train.tar.xz` and `cifar10_test.tar.xz` (members `<class>/<name>`), one folder of image folders
    per split, or torchvision's download.

    Raises:
        BadInput: if none is there, or it cannot be read.
    """
    archive = root / f"cifar10_{'train' if train else 'test'}.tar.xz"
    folders = [
        root / name for name in (("train",) if train else ("test", "val", "validation")) if (root / name).is_dir()
    ]
    if archive.exists():
        return _stack(_read_archive(archive), limit, archive)
    if folders:
        return _stack(_read_folder(folders[0]), limit, folders[0])
    if not download and not (root / CIFAR10.base_folder).is_dir():
        raise BadInput(
            f"no CIFAR-10 in {root}: expected {archive.name}, a folder {'train' if train else 'test'}/ of images, "
            f"or {CIFAR10.base_folder}/; data.download=true fetches the last"
        )
    try:
        dataset = CIFAR10(str(root), train=train, download=download)
    except (RuntimeError, OSError) as error:
        raise BadInput(f"cannot read CIFAR-10 in {root}: {str(error).splitlines()[0]}") from None
    images = torch.from_numpy(dataset.data[:limit]).permute(0, 3, 1, 2).contiguous()
    return Arrays(images, torch.tensor(dataset.targets[:limit]))


def _stack(samples: Iterator[tuple[np.ndarray, int]], limit: int | None, origin: Path) -> Arrays:
    chosen = list(islice(samples, limit))
    if not chosen:
        raise BadInput(f"no images in {origin}")
    images, labels = zip(*chosen)
    return Arrays(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels))


def _pixels(file: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(Image.open(file).convert("RGB").resize((32, 32)))
    except (OSError, SyntaxError) as error:
        raise BadInput(f"cannot read image {name}: {error}") from None


def _label(name: str, origin: Path) -> int:
    if name not in CIFAR_CLASSES:
        raise BadInput(f"{origin}: {name!r} is no class of CIFAR-10")
    return CIFAR_CLASSES.index(name)


def _read_archive(path: Path) -> Iterator[tuple[np.ndarray, int]]:
    try:
        with tarfile.open(path, "r|xz") as archive:
            for member in archive:
                if member.isfile():
                    name = f"{path.name}: {member.name}"
                    yield _pixels(archive.extractfile(member), name), _label(Path(member.name).parent.name, path)
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise BadInput(f"{path} is damaged: {error}") from None


def _read_folder(root: Path) -> Iterator[tuple[np.ndarray, int]]:
    files = [path for path in root.glob("*/*") if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".bmp")]
    for path in sorted(files, key=lambda path: (path.name, path.parent.name)):  # classes mixed, for data.num_train
        yield _pixels(path, str(path)), _label(path.parent.name, root)


class StrictImages(torch.utils.data.Dataset):
    """A timm image data set that stops at an image that cannot be read, where timm skips it."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        dataset._max_retries = 1

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except (RuntimeError, OSError, SyntaxError):
            raise BadInput(f"cannot read image {self.dataset.filename(index, absolute=True)}") from None

    @property
    def transform(self) -> Any:
        return self.dataset.transform

    @transform.setter
    def transform(self, value: Any) -> None:  # create_loader sets it
        self.dataset.transform = value


class ReaderBatches:
    """Batches of a timm loader."""

    def __init__(self, loader: Any, process: Process, seed: int) -> None:
        self.loader, self.process, self.seed = loader, process, seed
        self.limit = evaluation_sample_limit(loader)

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        for part in (self.loader.dataset, self.loader.sampler):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        seed_everything(self.seed, epoch)  # the order, and the seeds of the workers
        batches = iter(self.loader)
        seen = 0
        for number in range(len(self)):
            seed_everything(self.seed, epoch, number + 1)  # augmentation, where there are no workers
            x, y = next(batches)
            keep = len(y) if self.limit is None else min(len(y), self.limit - seen)  # a sampler's padding is no data
            seen += len(y)
            if number >= start:
                yield x[:keep].to(self.process.device), y[:keep].to(self.process.device)


_SPLITS = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation", "test"))


def _split_folder(root: Path, split: str) -> Path | None:
    """Return the folder of a split, by its name or one of the others that timm knows it by."""
    names = (split, *next((names for names in _SPLITS if split in names), ()))
    return next((root / name for name in names if (root / name).is_dir()), None)


def _require_split(root: Path, split: str) -> None:
    """Raise BadInput where timm would take the whole folder for a split that is not there."""
    if not root.exists():
        raise BadInput(f"no data folder {root}; set data.root")
    if root.is_dir() and _split_folder(root, split) is None:
        raise BadInput(f"{root} has no folder {split}; set data.train_split and data.test_split to what is there")


def _require_same_classes(root: Path, train_split: str, classes: set[str], split: str) -> None:
    """Raise BadInput if a split lacks a class of the training folder: the labels of the others would shift."""
    folder = _split_folder(root, train_split)
    if folder is not None:
        differing = {path.name for path in folder.iterdir() if path.is_dir()} ^ classes
        if differing:
            raise BadInput(f"{root}: {split} and {folder.name} differ in their classes, such as {min(differing)}")


def _reader_batches(
    config: DataConfig, spec: ImageSpec, process: Process, training: bool, seed: int
) -> tuple[Batches, int | None]:
    name = "" if config.name == "folder" else config.name
    if name and "/" not in name:
        raise BadInput(f"unknown data.name {name}; {nearest(name, DATA_NAMES)}")
    split = config.train_split if training else config.test_split
    if name == "":
        _require_split(Path(config.root), split)
    per_process = config.batch_size // process.world_size
    try:
        dataset = create_dataset(
            name,
            root=config.root,
            split=split,
            is_training=training,
            download=config.download,
            batch_size=per_process,
            input_img_mode="L" if spec.size[0] == 1 else "RGB",
        )
    except (RuntimeError, OSError, ValueError, LookupError, TypeError, ImportError, AssertionError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise BadInput(f"cannot read data set {config.name} in {config.root}: {reason}") from None
    if spec.size[0] not in (1, 3):
        raise BadInput(f"image files have 1 or 3 channels, the model takes {spec.size[0]} (model.kwargs.in_chans)")
    classes = getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    if name == "" and classes and not training:
        _require_same_classes(Path(config.root), config.train_split, set(classes), split)
    if not isinstance(dataset, torch.utils.data.IterableDataset):
        if training and config.num_train is not None:
            raise BadInput("data.num_train is for digits and cifar10; use a split or a smaller folder")
        dataset = StrictImages(dataset)
    loader = create_loader(
        dataset,
        input_size=spec.size,
        batch_size=per_process if training else min(per_process, len(dataset)),
        is_training=training,
        no_aug=config.augment == "none",
        train_crop_mode={"crop_flip": "rkrr", "flip": "rkrc"}.get(config.augment),
        scale=(1.0, 1.0) if config.augment == "flip" else None,
        ratio=(1.0, 1.0) if config.augment == "flip" else None,
        color_jitter=0.4 if config.augment == "imagenet" else 0.0,
        auto_augment=config.auto_augment,
        re_prob=config.reprob,
        interpolation=spec.interpolation,
        mean=spec.mean,
        std=spec.std,
        crop_pct=spec.crop_pct,
        num_workers=config.workers,
        distributed=process.world_size > 1,
        pin_memory=process.device.type == "cuda",
        device=process.device,
        use_prefetcher=False,
        persistent_workers=False,
    )
    if len(loader) == 0:
        raise BadInput(
            f"{len(dataset)} training images are fewer than one batch; lower data.batch_size={config.batch_size}"
        )
    return ReaderBatches(loader, process, seed), len(classes) if classes else None


def build_batches(
    config: DataConfig, spec: ImageSpec, process: Process, *, training: bool, seed: int = 0
) -> tuple[Batches, int | None]:
    """Return the batches of the training or the test split, and the number of classes where the data tell it.

    Raises:
        BadInput: for missing or unreadable data, or data that do not fit the model.
    """
    root = Path(config.root)
    if config.name == "digits":
        arrays = read_digits(training)
    elif config.name == "cifar10":
        if not root.is_dir() and not config.download:
            raise BadInput(f"no data folder {root}; set data.root, or data.download=true to fetch CIFAR-10 into it")
        arrays = read_cifar10(root, training, config.num_train if training else None, config.download)
    else:
        return _reader_batches(config, spec, process, training, seed)
    if training and config.num_train is not None:
        arrays = Arrays(arrays.images[: config.num_train], arrays.labels[: config.num_train])
    arrays = arrays.fitted(spec.size, config.name)
    return ArrayBatches(arrays, spec, config, process, training=training, seed=seed), 10
