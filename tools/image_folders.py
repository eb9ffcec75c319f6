"""Image sets that timm reads: folders, and whatever its readers know."""

import importlib.util
import itertools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from timm.data import ImageDataset, create_dataset, create_loader
from timm.data.readers.img_extensions import set_img_extensions
from timm.data.readers.reader import Reader
from timm.utils.misc import natural_key
from torch.utils.data import IterableDataset, default_collate

from tools.batches import (
    Batch,
    Batches,
    ImageSpec,
    KeyedBatches,
    KeyLoader,
    Process,
    require_augment,
    seed_everything,
    stand_apart,
)
from tools.config import BadInput, DataConfig, nearest
from tools.images import SUFFIXES, left_out_line, read_picture

LITTER = ("__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini")  # beside what begins with a dot
READERS = {
    "hfds": "datasets", "hfids": "datasets", "wds": "webdataset", "tfds": "tensorflow_datasets", "torch": "torchvision",
}  # fmt: skip
"""Prefixes of timm's readers, and the package that each needs."""
DATA_NAMES = (
    "digits", "cifar10", "folder", "camvid", "cityscapes", "masks", "hippocampus", "modelnet10", "medmnist3d", "nifti",
    *(f"{prefix}/..." for prefix in READERS),
)  # fmt: skip

# An image that cannot be read ends a run with one line, see StrictImages; timm would say so a second time.
logging.getLogger("timm.data.dataset").setLevel(logging.ERROR)
set_img_extensions(SUFFIXES)  # timm knows three; a class of files of another kind would be missing without a word


class StrictImages(torch.utils.data.Dataset):
    """A timm image data set that reads files as tools/predict.py does, and stops at one that cannot be read.

    timm skips that one, clips 16-bit values to white, and leaves pictures on their side that EXIF says how to turn. An
    index comes with the seed of its augmentation.
    """

    def __init__(self, dataset: Any, in_chans: int) -> None:
        self.dataset, self.in_chans = dataset, in_chans

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        index, seed = key
        seed_everything(seed)
        try:
            if not hasattr(self.dataset, "reader"):  # torchvision's
                return self.dataset[index]
            file, target = self.dataset.reader[index]
            with file:
                content = file.read()
        except (RuntimeError, OSError, SyntaxError):
            raise BadInput(f"cannot read image {self._name(index)}") from None
        try:
            image = read_picture(("", content), self.in_chans)
        except BadInput:
            image = read_picture((self._name(index), content), self.in_chans)  # raises again, and names the file
        return self.dataset.transform(image), -1 if target is None else target

    def _name(self, index: int) -> str:
        """Return the name of a file; of some readers that takes reading it once more."""
        if hasattr(self.dataset, "filename"):
            return self.dataset.filename(index, absolute=True)
        return self.dataset.samples[index][0] if hasattr(self.dataset, "samples") else f"number {index}"


class FileBatches(KeyedBatches):
    """Batches of files; timm's own samplers go other ways with one process than with several."""

    def __init__(
        self,
        dataset: StrictImages,
        config: DataConfig,
        process: Process,
        class_names: tuple[str, ...],
        *,
        training: bool,
        seed: int,
    ) -> None:
        super().__init__(len(dataset), config.batch_size, process, training=training, seed=seed)
        self.class_names = class_names
        self.loader = KeyLoader(dataset, config.workers, default_collate, process)

    def epoch(self, epoch: int = 0, start: int = 0, only: Sequence[int] | None = None) -> Iterator[Batch]:
        for x, y in self.loader.batches(filter(None, self.keys(epoch, start, only))):
            yield x.to(self.process.device, non_blocking=True), y.to(self.process.device, non_blocking=True)


def _init_worker(timms: Callable[[int], None] | None, worker: int) -> None:
    stand_apart(worker)
    if timms is not None:
        timms(worker)


class StreamBatches:
    """Batches of a timm loader of a stream."""

    num_samples: int | None = None  # a stream's length is that of a process, or a guess
    spacings: Sequence[Sequence[float]] | None = None

    def __init__(self, loader: Any, process: Process, seed: int, class_names: tuple[str, ...]) -> None:
        self.loader, self.process, self.seed, self.class_names = loader, process, seed, class_names
        self.loader.worker_init_fn = partial(_init_worker, loader.worker_init_fn)

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, epoch: int = 0, start: int = 0, only: Sequence[int] | None = None) -> Iterator[Batch]:
        if hasattr(self.loader.dataset, "set_epoch"):
            self.loader.dataset.set_epoch(epoch)
        rank = self.process.rank
        seed_everything(self.seed, epoch, 0, rank)  # the seeds of the workers
        batches = iter(self.loader)
        for number in range(len(self) if only is None else max(only, default=-1) + 1):
            seed_everything(self.seed, epoch, number + 1, rank)  # augmentation, where there are no workers
            x, y = next(batches)
            if number >= start if only is None else number in only:
                yield x.to(self.process.device), y.to(self.process.device)


SPLITS = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation"))


def _split_folder(root: Path, split: str) -> Path | None:
    """Return the folder of a split, by its name or one of the others that timm knows it by."""
    names = (split, *next((names for names in SPLITS if split in names), ()))
    return next((root / name for name in names if (root / name).is_dir()), None)


def _require_reader(name: str) -> None:
    """Raise BadInput where timm would take a name that it does not know for an image folder, or lacks a package."""
    prefix, separator, _ = name.lower().partition("/")
    if name != "folder" and not (separator and prefix in READERS):
        raise BadInput(f"unknown data.name {name}; {nearest(name, DATA_NAMES)}")
    package = READERS.get(prefix)
    if package is not None and importlib.util.find_spec(package) is None:
        raise BadInput(f"data.name={name} needs `pip install {package.replace('_', '-')}`")


def _require_split(root: Path, split: str, training: bool) -> Path:
    """Return the folder of a split, or the archive that root is.

    Raises:
        BadInput: if it is not there: timm would take the whole folder for it.
    """
    if not root.exists():
        raise BadInput(f"no data folder {root}; set data.root")
    if not root.is_dir():
        if training:
            raise BadInput(f"{root} is an archive, which training and testing would both read whole; unpack it")
        return root
    setting = "data.train_split" if training else "data.test_split"
    folder = _split_folder(root, split) if split.strip("./ ") else None
    if folder is None:
        there, known = _folders(root), {"test", *itertools.chain(*SPLITS)}
        what = f"{root} has no folder {split or '(without a name)'}"
        if not known & {*there}:  # what is there may well be classes
            raise BadInput(
                f"{what}; images belong into {root / 'train' / '<class>'} and {root / 'validation' / '<class>'}"
            )
        raise BadInput(
            f"{what}; set {setting} to one that exists ({', '.join(there[:4])}) and has a folder for each class"
        )
    return folder


def _walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield the folders of a split and the files in each, without what editors and operating systems leave there."""
    for name, folders, files in os.walk(root, followlinks=True):
        place = Path(name)
        folders[:] = [f for f in sorted(folders) if not (f.startswith(".") or f in LITTER or _leads_back(place / f))]
        yield place, sorted(f for f in files if not (f.startswith(".") or f in LITTER))


def _leads_back(folder: Path) -> bool:
    return folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve())


class ClassFolders(Reader):
    """A reader, as timm's data sets take them, of images in a folder for each class; the innermost folder is the class.

    So it is with timm's own, which takes hidden folders for classes too, mixes images of folders that are named alike,
    and sorts names that differ in case or in leading zeros another way in every process.

    Args:
        root: the folder of a split.

    Raises:
        BadInput: if there is no image, or one of which the class is not clear.
    """

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root, self.left_out = root, list[Path]()
        found: dict[Path, list[str]] = {}
        for place, files in _walk(root):
            images = [file for file in files if file.lower().endswith(SUFFIXES)]
            self.left_out += [place / file for file in {*files} - {*images}]
            if images:
                found[place] = images
        if not found:
            raise BadInput(
                f"no images in {root}; expected {root / '<class>'}/*{SUFFIXES[0]} (or {', '.join(SUFFIXES[1:])})"
            )
        if root in found:
            raise BadInput(f"{root / found[root][0]} lies in no folder of a class; expected {root / '<class>'}/...")
        classes: dict[str, Path] = {}
        for place in found:
            if above := next((folder for folder in place.parents if folder in found), None):
                raise BadInput(
                    f"{above} holds images and a folder of images, {place.name}; which of them is the class?"
                )
            if place.name in classes:
                raise BadInput(f"{classes[place.name]} and {place} would be one class; give them different names")
            classes[place.name] = place
        names = sorted(classes, key=lambda name: (natural_key(name), name))
        self.class_to_idx = {name: number for number, name in enumerate(names)}
        samples = [(str(place / file), self.class_to_idx[place.name]) for place in found for file in found[place]]
        self.samples = sorted(samples, key=lambda sample: (natural_key(sample[0]), sample[0]))

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        path, target = self.samples[index]
        return open(path, "rb"), target

    def __len__(self) -> int:
        return len(self.samples)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = self.samples[index][0]
        if basename:
            return os.path.basename(path)
        return path if absolute else os.path.relpath(path, self.root)


def _require_same_classes(root: Path, train_split: str, classes: set[str], split: str, *, torchvision: bool) -> None:
    """Raise BadInput if a split lacks a class of the training folder: the labels of the others would shift."""
    folder = _split_folder(root, train_split)
    if folder is None:
        return
    differing = {*(_folders(folder) if torchvision else ClassFolders(folder).class_to_idx)} ^ classes
    if differing:
        raise BadInput(f"{root}: {split} and {folder.name} differ in their classes, such as {min(differing)}")


def _folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def _color_jitter(config: DataConfig) -> float:
    if config.augment != "imagenet":
        return 0.0
    return 0.4 if config.color_jitter is None else config.color_jitter  # timm's own default


def _loader(config: DataConfig, spec: ImageSpec, process: Process, dataset: Any, training: bool) -> Any:
    per_process = config.batch_size // process.world_size
    try:
        return create_loader(
            dataset,
            input_size=spec.size,
            batch_size=per_process if training else min(per_process, len(dataset)),
            is_training=training,
            no_aug=config.augment == "none",
            train_crop_mode={"crop_flip": "rkrr", "flip": "rkrc"}.get(config.augment),
            scale=(1.0, 1.0) if config.augment == "flip" else None,
            ratio=(1.0, 1.0) if config.augment == "flip" else None,
            color_jitter=_color_jitter(config),
            auto_augment=config.auto_augment,
            re_prob=config.reprob,
            interpolation=spec.interpolation,
            mean=spec.mean,
            std=spec.std,
            crop_pct=spec.crop_pct,
            num_workers=config.workers,
            pin_memory=process.device.type == "cuda",
            device=process.device,
            use_prefetcher=False,
            persistent_workers=config.workers > 0 and not training,  # those of a stream get new seeds every epoch
        )
    except (AssertionError, ValueError, LookupError, TypeError) as error:
        if config.auto_augment is None:
            raise
        reason = str(error) or "not a timm policy"
        raise BadInput(f"data.auto_augment={config.auto_augment}: {reason}") from None


def read_batches(
    config: DataConfig, spec: ImageSpec, process: Process, training: bool, seed: int
) -> tuple[Batches, int | None]:
    name = "" if config.name == "folder" else config.name
    _require_reader(config.name)
    if config.holdout is not None:
        raise BadInput("data.holdout is not for image folders or timm's readers; move images to a split of their own")
    split = config.train_split if training else config.test_split
    reader = name.lower().split("/")
    # webdataset hands what is not a file to a shell, and settings may come along with someone's weights.
    if reader[0] == "wds" and (re.match(r"\s*\w[\w+.-]+:", config.root) or "pipe:" in split):
        raise BadInput(f"data.root={config.root}: webdatasets are read from folders, so download their shards first")
    is_torchvision = reader[0] == "torch" and reader[-1] in ("folder", "image_folder")
    is_folder = not name or is_torchvision
    root = _require_split(Path(config.root), split, training) if is_folder else config.root
    if training:
        require_augment(config, "none", "flip", "crop_flip", "imagenet", jittered=["imagenet"])
    mode = "L" if spec.size[0] == 1 else "RGB"
    per_process = config.batch_size // process.world_size
    try:
        if not name and Path(root).is_dir():
            folders = ClassFolders(Path(root))
            if process.is_main and folders.left_out:
                print(left_out_line(folders.root, folders.left_out), file=sys.stderr)
            dataset: Any = ImageDataset(str(root), reader=folders, input_img_mode=mode)
        else:
            dataset = create_dataset(
                name,
                root=os.path.join(".", root) if reader[0] == "wds" else str(root),  # whatever it is, a path
                split=split,
                search_split=not is_folder,  # root is that of the split already; timm knows fewer names
                is_training=training,
                download=config.download,
                batch_size=per_process,
                input_img_mode=mode,
            )
    except (RuntimeError, OSError, ValueError, LookupError, TypeError, ImportError, AssertionError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise BadInput(f"cannot read data set {config.name} in {config.root}: {reason}") from None
    if spec.size[0] not in (1, 3):
        raise BadInput(f"image files have 1 or 3 channels, the model takes {spec.size[0]} (model.kwargs.in_chans)")
    classes = getattr(getattr(dataset, "reader", dataset), "class_to_idx", None)
    if is_folder and classes and not training:
        place = (Path(config.root), config.train_split)
        _require_same_classes(*place, set(classes), split, torchvision=is_torchvision)
    if training and classes and len(classes) < 2:
        raise BadInput(f"{root} holds one class, {next(iter(classes))}; expected two or more")
    if training and config.num_train is not None:
        raise BadInput("data.num_train is not for image folders or timm's readers; use a smaller split or folder")
    count, is_stream = len(dataset), isinstance(dataset, IterableDataset)
    # It gives the data set its transform; timm's without augmentation would squash what tests keep in proportion.
    loader = _loader(config, spec, process, dataset, training and (is_stream or config.augment != "none"))
    names = tuple(str(name) for name in sorted(classes, key=classes.__getitem__)) if classes else ()
    if training and (len(loader) == 0 if is_stream else count < config.batch_size):
        raise BadInput(f"{count} training images are fewer than one batch; lower data.batch_size={config.batch_size}")
    if is_stream:
        batches: Batches = StreamBatches(loader, process, seed, names)
    else:
        images = StrictImages(dataset, spec.size[0])
        batches = FileBatches(images, config, process, names, training=training, seed=seed)
    return batches, len(names) or None
