"""Images with masks: CamVid, Cityscapes, and any folder of pairs with a file of classes."""

import re
import sys
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from tools.batches import (
    MIN_SIZE,
    VOID,
    Batch,
    Batches,
    ImageSpec,
    KeyedBatches,
    KeyLoader,
    Process,
    chosen,
    require_augment,
    split_name,
)
from tools.config import BadInput, DataConfig
from tools.images import SUFFIXES, Source, exif_orientation, left_out_line, name_of, read_image, read_mask

NAMES = ("camvid", "cityscapes", "masks")

CAMVID_CLASSES = (
    "Sky", "Building", "Pole", "Road", "Pavement", "Tree", "SignSymbol", "Fence", "Car", "Pedestrian", "Bicyclist",
)  # fmt: skip
CITYSCAPES_CLASSES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # of the train ids 0 to 18
LOOKED_AT = 50
"""Masks that are looked at before a training."""


@dataclass(frozen=True)
class Pairs:
    """A split: images and their masks, the label of each value in a mask, and the names of the classes."""

    pairs: Sequence[tuple[Source, Source]]
    table: np.ndarray
    class_names: tuple[str, ...]


def label_table(num_classes: int, ignored: Sequence[int]) -> np.ndarray:
    """Return the label of each value 0 to 255 of a mask: its own if it is a class, `VOID`, or -1 for an error."""
    table = np.full(256, -1)
    table[:num_classes] = np.arange(num_classes)
    table[list(ignored)] = VOID
    return table


def matched(images: Sequence[Path], masks: Path, origin: Path) -> list[tuple[Source, Source]]:
    """Return each image with the mask of the same name, whatever its suffix."""
    masks_by_name, images_by_name = _by_name(_files(masks), "masks"), _by_name(images, "images")
    for name, path in images_by_name.items():
        if name not in masks_by_name:
            raise BadInput(f"image {path} has no mask with the same name in {masks}")
    if not images:
        raise BadInput(f"no images in {origin}")
    return [(path, masks_by_name[name]) for name, path in images_by_name.items()]


def _by_name(files: Sequence[Path], what: str) -> dict[str, Path]:
    """Return files by their names without suffix, in order; macOS may write an accent as a character of its own."""
    found: dict[str, Path] = {}
    for path in files:
        name = unicodedata.normalize("NFC", path.stem)
        if name in found:
            raise BadInput(f"two {what} with the same name: {found[name]} and {path}")
        found[name] = path
    return found


def _files(folder: Path) -> list[Path]:
    return _sorted_out(folder)[0]


def _sorted_out(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the images in a folder, and all else in it that is not hidden."""
    images: list[Path] = []
    others: list[Path] = []
    for path in sorted(folder.glob("*")):
        if not path.name.startswith("."):
            is_image = path.suffix.lower() in SUFFIXES and not path.is_dir()
            (images if is_image else others).append(path)
    return images, others


def warn_of_left_out(root: Path, split: str) -> None:
    """Say so where a split has files that are not read, or masks without an image."""
    names = {}
    for kind in ("images", "masks"):
        files, others = _sorted_out(root / split / kind)
        names[kind] = {*_by_name(files, kind)}
        if others:
            print(left_out_line(root / split / kind, others), file=sys.stderr)
    if unused := names["masks"] - names["images"]:
        place = root / split / "masks"
        print(f"warning: {len(unused)} masks in {place} have no image, such as {min(unused)}", file=sys.stderr)


def read_camvid(root: Path, split: str) -> Pairs:
    """Return a split of `camvid.zip` (`train.txt` lists pairs), or of the folders `train`, `trainannot` and so on."""
    table = label_table(len(CAMVID_CLASSES), (len(CAMVID_CLASSES), VOID))
    archive = root if root.is_file() else root / "camvid.zip"
    if not archive.is_file():
        if not (root / split).is_dir() or not (root / f"{split}annot").is_dir():
            raise BadInput(f"no CamVid in {root}: expected camvid.zip, or the folders {split} and {split}annot")
        pairs = matched(_files(root / split), root / f"{split}annot", root / split)
        return Pairs(pairs, table, CAMVID_CLASSES)
    try:
        with zipfile.ZipFile(archive) as members:
            lines = members.read(f"{split}.txt").decode().splitlines()
            names = [line.split() for line in lines if line.strip()]
            # 29 MB in all: held in memory, since an open archive does not survive a fork.
            pairs: Any = [tuple((f"{archive.name}: {name}", members.read(name)) for name in pair) for pair in names]
    except KeyError as error:
        raise BadInput(f"{archive}: {error.args[0]}") from None
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise BadInput(f"{archive} is damaged: {error}") from None
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise BadInput(f"{archive}: each line of {split}.txt must name an image and its mask")
    return Pairs(pairs, table, CAMVID_CLASSES)


def read_cityscapes(root: Path, split: str) -> Pairs:
    """Return a split of the official folders leftImg8bit and gtFine, with the 19 train ids."""
    images = sorted((root / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
    if not images:
        raise BadInput(f"no Cityscapes in {root}: expected leftImg8bit/{split}/CITY/*_leftImg8bit.png, and gtFine")
    pairs: list[tuple[Source, Source]] = []
    for path in images:
        name = path.name.replace("_leftImg8bit", "_gtFine_labelIds")
        mask = root / "gtFine" / split / path.parent.name / name
        if not mask.is_file():
            raise BadInput(f"image {path} has no mask {mask}")
        pairs.append((path, mask))
    table = np.full(256, -1)
    table[:34], table[VOID] = VOID, VOID
    table[list(CITYSCAPES_IDS)] = np.arange(len(CITYSCAPES_IDS))
    return Pairs(pairs, table, CITYSCAPES_CLASSES)


def _read_classes(path: Path) -> dict[int, str]:
    """Return the classes in a file of lines `NUMBER NAME`, or `NAME`; lines that begin with # are none."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise BadInput(f"{path} is not UTF-8; save it as such") from None
    except OSError:
        raise BadInput(f"cannot read {path}; expected a line `NUMBER NAME` (or `NAME`) for each class") from None
    lines = [line for line in lines if line and not line.startswith("#")]
    found: list[Any] = [re.match(r"(\d+)[\s,:;]+(\S.*)", line) for line in lines]
    without = [line for line, match in zip(lines, found) if match is None]
    if without and len(without) < len(lines):
        raise BadInput(f"{path}: lines must all be `NUMBER NAME` or all be `NAME`; got {without[0]!r} among others")
    if not without and len({int(match[1]) for match in found}) < len(lines):
        raise BadInput(f"{path}: two classes have the same number")
    # A name may have spaces; a colour R G B after it, as in CamVid's file, is none of it.
    texts = [re.sub(r"([\s,]+\d+){3}$", "", line if without else match[2]) for line, match in zip(lines, found)]
    return {k if without else int(match[1]): text for k, (match, text) in enumerate(zip(found, texts))}


def read_masks(root: Path, split: str, ignored: int) -> Pairs:
    """Return `SPLIT/images` and `SPLIT/masks` of a folder; `classes.txt` has a line `NUMBER NAME` for each class."""
    path = root / "classes.txt"
    names = _read_classes(path)
    names.pop(ignored, None)
    if len(names) < 2 or max(names) > 255 or len(names) > VOID:
        raise BadInput(
            f"{path}: expected 2 to {VOID} classes numbered 0 to 255 besides data.ignore_index={ignored}, got "
            f"{', '.join(f'{k} {names[k]}' for k in sorted(names)[:8]) or 'none'}"
        )
    if len(set(names.values())) < len(names):
        raise BadInput(f"{path}: two classes have the same name: {', '.join(names[k] for k in sorted(names))}")
    folders = [root / split / kind for kind in ("images", "masks")]
    for folder in folders:
        if not folder.is_dir():
            raise BadInput(f"no folder {folder}; expected {split}/images and {split}/masks in {root}")
    pairs = matched(_files(folders[0]), folders[1], folders[0])
    table = np.full(256, -1)
    table[sorted(names)] = np.arange(len(names))  # numbers may have gaps, as those of masks of 0 and 255
    table[ignored] = VOID
    return Pairs(pairs, table, tuple(names[k] for k in sorted(names)))


def warn_of_ignored_class(root: Path, ignored: int) -> None:
    """Say so where classes.txt gives a name to the value to ignore that sounds like a class."""
    name = _read_classes(root / "classes.txt").get(ignored)
    if name is not None and not re.search("void|ignore|unlabel|undefined|unknown|border|boundar|don.?t", name.lower()):
        print(
            f"warning: {ignored} {name} of {root / 'classes.txt'} is ignored, since data.ignore_index={ignored}. "
            "If it is a class, set data.ignore_index to a value that no mask has",
            file=sys.stderr,
        )


def warn_of_absent_classes(data: Pairs, ignored: int) -> None:
    """Say so where masks lack classes: all but one of them in the first masks, of 0 and 255 it may be, or some in all.

    Raises:
        BadInput: if there is none in any mask.
    """
    counts = np.zeros(256, np.int64)
    for _, mask in data.pairs[:LOOKED_AT]:
        counts += np.bincount(read_mask(mask, data.table).numpy().ravel(), minlength=256)
    present = np.flatnonzero(counts[:VOID])
    if len(present) == 0:
        if len(data.pairs) <= LOOKED_AT:
            raise BadInput(
                f"every pixel of the {len(data.pairs)} training masks is data.ignore_index={ignored} and ignored: "
                "there is nothing to learn"
            )
        print(f"warning: the first {LOOKED_AT} masks hold only data.ignore_index={ignored}", file=sys.stderr)
    elif len(data.class_names) > 1 and len(present) == 1 and not counts[VOID]:
        print(f"warning: the first masks hold only class {data.class_names[present[0]]}", file=sys.stderr)
    elif len(data.class_names) > 1 and len(present) == 1:
        share = 100 * counts[VOID] / counts.sum()
        print(
            f"warning: the first masks hold only class {data.class_names[present[0]]}; {share:.0f} % of their pixels "
            f"are data.ignore_index={ignored} and ignored. If that is a class, list it in classes.txt ({ignored} NAME) "
            f"and set data.ignore_index to a value that no mask has",
            file=sys.stderr,
        )
    elif len(data.pairs) <= LOOKED_AT and len(present) < len(data.class_names):
        absent = [name for k, name in enumerate(data.class_names) if k not in present]
        print(f"warning: no training mask holds {', '.join(absent)}", file=sys.stderr)


class RandomScale(v2.Transform):
    """Resizes image and mask by a random factor from a range."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.range = (low, high)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        low, high = self.range
        return {"scale": low + (high - low) * float(torch.rand(()))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        size = [max(1, round(params["scale"] * n)) for n in inpt.shape[-2:]]
        if not isinstance(inpt, tv_tensors.Mask):
            return self._call_kernel(v2.functional.resize, inpt, size)
        # torchvision resizes masks by "nearest", which moves them half a pixel to the lower right of their image.
        exact = v2.functional.resize_image(inpt.unsqueeze(0), size, interpolation=v2.InterpolationMode.NEAREST_EXACT)
        return tv_tensors.wrap(exact.squeeze(0), like=inpt)  # pyright: ignore[reportCallIssue]


def transforms(config: DataConfig, spec: ImageSpec, training: bool) -> v2.Compose:
    """Return the joint transform of an image and its mask."""
    steps: list[v2.Transform] = []
    if training:
        if config.color_jitter:  # before the crop: its black padding stays black
            strengths = dict.fromkeys(("brightness", "contrast", "saturation"), config.color_jitter)
            steps.append(v2.ColorJitter(**strengths))
        if config.augment == "scale_flip":
            steps.append(RandomScale(*config.scale_range))
        if config.patch_size is not None:
            # Black before the normalisation, as in the official recipe.
            fill: Any = {tv_tensors.Image: 0, tv_tensors.Mask: VOID}
            steps.append(v2.RandomCrop(config.patch_size, pad_if_needed=True, fill=fill))
        if config.augment in ("flip", "scale_flip"):
            steps.append(v2.RandomHorizontalFlip())
    steps += [v2.ToDtype({tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64}, scale=True)]
    return v2.Compose([*steps, v2.Normalize(spec.mean, spec.std), v2.ToPureTensor()])


class PairDataset(Dataset):
    """Images `(C, H, W)`, `whole` or cropped, and labels `(H, W)`; an index comes with the seed of its augmentation."""

    def __init__(self, data: Pairs, transform: v2.Compose, in_chans: int, *, whole: bool) -> None:
        self.data, self.transform, self.in_chans, self.whole = data, transform, in_chans, whole

    def __len__(self) -> int:
        return len(self.data.pairs)

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        index, seed = key
        source, mask_source = self.data.pairs[index]
        image, mask = read_image(source, self.in_chans), read_mask(mask_source, self.data.table)
        if exif_orientation(source) != exif_orientation(mask_source):
            raise BadInput(
                f"image {name_of(source)} and its mask {name_of(mask_source)} have different EXIF orientations; save "
                "both upright"
            )
        if image.shape[1:] != mask.shape:
            sizes = [f"{x.shape[-1]}x{x.shape[-2]}" for x in (image, mask)]
            raise BadInput(f"image {name_of(source)} is {sizes[0]}, its mask {name_of(mask_source)} {sizes[1]}")
        if self.whole and min(mask.shape) < MIN_SIZE:
            height, width = mask.shape
            raise BadInput(
                f"image {name_of(source)} is {width}x{height}; every side must be at least {MIN_SIZE} pixels"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.transform(tv_tensors.Image(image), tv_tensors.Mask(mask))


class PairBatches(KeyedBatches):
    """Batches of images and masks. Test images stay whole; a batch of them is of one size."""

    def __init__(
        self, data: Pairs, spec: ImageSpec, config: DataConfig, process: Process, *, training: bool, seed: int = 0
    ) -> None:
        super().__init__(len(data.pairs), config.batch_size, process, training=training, seed=seed)
        self.class_names = data.class_names
        whole = not training or config.patch_size is None  # a crop is padded
        self.dataset = PairDataset(data, transforms(config, spec, training), spec.size[0], whole=whole)
        self.loader = KeyLoader(self.dataset, config.workers, _collate, process)

    def epoch(self, epoch: int = 0, start: int = 0, only: Sequence[int] | None = None) -> Iterator[Batch]:
        for parts in self.loader.batches(filter(None, self.keys(epoch, start, only))):
            for x, y in parts:
                yield x.to(self.process.device, non_blocking=True), y.to(self.process.device, non_blocking=True)


def _collate(samples: list[Batch]) -> list[tuple[Tensor, ...]]:
    """Return the samples as batches of one size."""
    groups: dict[Any, list[Batch]] = {}
    for sample in samples:
        groups.setdefault(sample[0].shape, []).append(sample)
    return [tuple(torch.stack(tensors) for tensors in zip(*group)) for group in groups.values()]


def read_batches(
    config: DataConfig, spec: ImageSpec, process: Process, training: bool, seed: int
) -> tuple[Batches, int | None]:
    """Return the batches of a split of images with masks, and the number of classes.

    Raises:
        BadInput: for data that are missing or do not belong together, or settings that are not for masks.
    """
    _check(config, process, training)
    root, split = Path(config.root), split_name(config, training)
    if not root.exists():
        raise BadInput(f"no data in {root}; set data.root")
    if config.name == "camvid":
        data = read_camvid(root, split)
    elif config.name == "cityscapes":
        data = read_cityscapes(root, split)
    else:
        data = read_masks(root, split, config.ignore_index)
    data = Pairs(data.pairs[chosen(len(data.pairs), config, training)], data.table, data.class_names)
    batches = PairBatches(data, spec, config, process, training=training, seed=seed)
    if training and process.is_main and config.name == "masks":
        warn_of_left_out(root, split)
        warn_of_ignored_class(root, config.ignore_index)
        warn_of_absent_classes(data, config.ignore_index)
    return batches, len(data.class_names)


def _check(config: DataConfig, process: Process, training: bool) -> None:
    if not 0 <= config.ignore_index <= 255:
        raise BadInput(f"data.ignore_index must be a mask value from 0 to 255, got {config.ignore_index}")
    require_augment(config, "none", "flip", "scale_flip", jittered=["flip", "scale_flip"])
    many = config.augment == "scale_flip" or config.batch_size > process.world_size
    if training and many and config.patch_size is None:
        raise BadInput(f"data.patch_size must be set for {config.name}: the size (H, W) of the training crops")
    if config.patch_size is not None and (len(config.patch_size) != 2 or min(config.patch_size) < 16):
        raise BadInput(f"data.patch_size must be two numbers of pixels >= 16, got {config.patch_size}")
    low, high = config.scale_range if len(config.scale_range) == 2 else (0, 0)
    if not 0 < low <= high:
        raise BadInput(f"data.scale_range must be two factors, the smaller first, got {config.scale_range}")
