"""Sets of volumes, held in memory: npz files, and NIfTI pairs in the layout of the Medical Segmentation Decathlon."""

import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tools.batches import (
    VOID,
    Batch,
    Batches,
    KeyedBatches,
    Process,
    chosen,
    generator,
    require_augment,
    split_name,
)
from tools.config import BadInput, DataConfig, first_line, optional
from tools.nifti_data import Pick, read_nifti
from tools.volumes import Preprocessing, checked_finite, checked_labels, normalised, padded

NAMES = ("hippocampus", "modelnet10", "medmnist3d", "nifti")
SEGMENTED = ("hippocampus", "nifti")

_SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test",)}


@dataclass(frozen=True)
class Volumes:
    """A split: prepared volumes `(C, *S)`, and for each a class or labels `(*S)` uint8; either may be one tensor.

    `spacings` are theirs in mm per voxel, None where they are not known.
    """

    images: Sequence[Tensor] | Tensor
    labels: Sequence[Tensor] | Tensor
    class_names: tuple[str, ...]
    spacings: Sequence[tuple[float, ...]] | None = None


def preprocessing(config: DataConfig, class_names: tuple[str, ...] = ()) -> Preprocessing:
    """Return what a config has done to volumes, and so the axes that a model knows."""
    spacing = None if config.spacing is None else tuple(config.spacing)
    # Those of the hippocampus lie that way in their file; of the shapes nobody says how they lie in space.
    orientation = {"nifti": config.orientation, "hippocampus": "RAS"}.get(config.name, "none")
    return Preprocessing(spacing, orientation, config.normalise, tuple(config.patch_size or ()), tuple(class_names))


def split_key(name: str) -> str:
    """Return train, val or test for any of the names of a split."""
    for key, names in _SPLITS.items():
        if name in names:
            return key
    raise BadInput(f"unknown split {name}; set data.train_split and data.test_split to train, val or test")


# What numpy raises for a damaged file depends on where it is damaged.
_DAMAGED = (OSError, ValueError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error)


@contextmanager
def _npz(root: Path, pattern: str) -> Iterator[Any]:
    """Open the arrays of the file `root`, or of the one file in the folder `root` that fits a pattern."""
    files = [root] if root.is_file() else sorted(root.glob(pattern))
    if not files:
        raise BadInput(f"no file {pattern} in {root}; set data.root to the file or its folder")
    if len(files) > 1:
        raise BadInput(f"{root} has {len(files)} files {pattern}; set data.root to one of them, such as {files[0]}")
    with open(files[0], "rb") as file:
        try:
            arrays = np.load(file, allow_pickle=False)
        except _DAMAGED as error:
            raise BadInput(f"cannot read {files[0]}: {first_line(error)}") from None
        if not isinstance(arrays, np.lib.npyio.NpzFile):
            raise BadInput(f"cannot read {files[0]}: it is not an npz file")
        yield arrays


def _array(arrays: Any, key: str, origin: Path) -> np.ndarray:
    try:
        array = arrays[key]
        return array.astype(array.dtype.newbyteorder("="), copy=False)  # PyTorch knows this machine's order alone
    except KeyError:
        raise BadInput(f"{origin} holds no {key}; it has {', '.join(sorted(arrays.files)[:8])}") from None
    except _DAMAGED as error:
        raise BadInput(f"cannot read {key} in {origin}: {error}") from None


def read_hippocampus(root: Path, split: str, pick: Pick, how: str) -> Volumes:
    """Return the cases of a split: `lut_NNN[code_NNN]` and `label_NNN` for each number NNN in `ids`."""
    if split == "test":
        raise BadInput(f"{root} has the splits train and val; set data.test_split=val")
    images, labels = [], []
    with _npz(root, "hippocampus*.npz") as arrays:
        ids, member = _array(arrays, "ids", root), _array(arrays, "split", root)
        if ids.ndim != 1 or member.shape != ids.shape or ids.dtype.kind not in "iu":
            raise BadInput(f"{root} is damaged: ids {ids.shape} of {ids.dtype}, split {member.shape}")
        ids = ids[member == ("train", "val").index(split)]
        for case in ids[pick(len(ids))].tolist():
            name = f"{root}: case {case:03d}"
            code, lut = (_array(arrays, f"{kind}_{case:03d}", root) for kind in ("code", "lut"))
            label = _array(arrays, f"label_{case:03d}", root)
            if code.ndim != 3 or code.size == 0 or label.shape != code.shape or lut.ndim != 1:
                raise BadInput(f"{name} is damaged: image {code.shape}, labels {label.shape}, grey levels {lut.shape}")
            if code.dtype.kind not in "iu" or code.min() < 0 or code.max() >= len(lut) or lut.dtype.kind not in "iuf":
                raise BadInput(f"{name} is damaged: its image ({code.dtype}) does not fit its {len(lut)} grey levels")
            voxels = checked_finite(torch.from_numpy(lut[code].astype(np.float32)), name)
            images.append(normalised(voxels.unsqueeze(0), how))
            labels.append(checked_labels(label, 3, name))
    return Volumes(images, labels, ("background", "anterior", "posterior"), [(1.0, 1.0, 1.0)] * len(images))


def read_npz(root: Path, pattern: str, split: str, pick: Pick) -> Volumes:
    """Return a split of `{split}_images` `(N, *S)` and `{split}_labels` `(N,)` or `(N, 1)`, the form of MedMNIST3D."""
    with _npz(root, pattern) as arrays:
        images, labels = (_array(arrays, f"{split}_{kind}", root) for kind in ("images", "labels"))
        every = {key: _array(arrays, key, root) for key in arrays.files if key.endswith("_labels")}
        names = tuple(map(str, _array(arrays, "classes", root).ravel())) if "classes" in arrays.files else ()
    if images.ndim != 4 or labels.size != len(images) or images.size == 0:
        raise BadInput(f"{root}: {split} has images {images.shape}, labels {labels.shape}, not (N, D, H, W), (N,)")
    if images.shape[3] <= 4:
        raise BadInput(f"{root}: {split} has images {images.shape}: images with channels, not volumes")
    for key, array in {f"{split}_images": images, **every}.items():
        if array.dtype.kind not in "biuf":
            raise BadInput(f"{root}: {key} must be numbers, got {array.dtype}")
    names = names or tuple(str(k) for k in range(int(max(np.nanmax(a, initial=0) for a in every.values())) + 1))
    checked = checked_labels(labels.reshape(-1), len(names), f"{root}: {split}_labels").long()
    voxels = torch.from_numpy(images)
    if voxels.is_floating_point():
        checked_finite(voxels, f"{root}: {split}_images")
    order = torch.arange(len(voxels))
    if split == "train":  # sorted by class, maybe: the first so many are to be of all
        order = torch.randperm(len(voxels), generator=generator(0))
    order = order[pick(len(voxels))]
    voxels, checked = voxels[order], checked[order]
    return Volumes(voxels.unsqueeze(1), checked, names)


def read_split(config: DataConfig, in_chans: int, training: bool) -> Volumes:
    """Return the training or the test split of a config."""
    split, root = split_key(split_name(config, training)), Path(config.root)
    pick = partial(chosen, config=config, training=training)
    if not root.exists():
        raise BadInput(f"no data in {root}; set data.root")
    if config.name == "nifti":
        return Volumes(*read_nifti(root, split, pick, in_chans, preprocessing(config)))
    if in_chans != 1:
        raise BadInput(f"{config.name} has 1 channel, the model takes {in_chans} (model.kwargs.in_chans)")
    if config.name == "hippocampus":
        return read_hippocampus(root, split, pick, config.normalise)
    return read_npz(root, "*mnist3d*.npz" if config.name == "medmnist3d" else "modelnet10*.npz", split, pick)


def augmentation(config: DataConfig, segmented: bool, *, of_room: bool) -> Any:
    """Return MONAI's transform of a training volume `{"image", "label"}`: a patch, moved and changed at random.

    Args:
        config: what is done.
        segmented: whether there are labels per voxel.
        of_room: whether the volume is what `_room` took of a larger one, with the patch in the middle.
    """
    transforms = optional("monai.transforms", "volumes")
    keys, both = (["image", "label"], ("bilinear", "nearest")) if segmented else (["image"], ("bilinear",))
    size, axes = config.patch_size or (), range(3)
    moves = [transforms.RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in config.flip_axes]
    if config.turn_axes is not None:
        moves += [transforms.RandRotate90d(keys, prob=0.75, max_k=3, spatial_axes=tuple(config.turn_axes))]
    changes = []
    if config.augment == "volume":
        moves += [
            transforms.RandAffined(
                keys,
                prob=0.7,
                rotate_range=_turns(config.spacing),
                # Of a larger volume the patch is anywhere as it is, or has what it is centred on in the middle.
                translate_range=[0.0 if of_room else 0.06 * size[axis] for axis in axes],
                scale_range=[0.1 for _ in axes],
                mode=both,
                padding_mode="zeros",
            ),
        ]
        changes += [
            transforms.RandScaleIntensityd(["image"], factors=0.15, prob=0.5),
            transforms.RandShiftIntensityd(["image"], offsets=0.15, prob=0.5),
            transforms.RandGaussianNoised(["image"], prob=0.3, std=0.1),
        ]
    if of_room:
        steps = [*moves, transforms.CenterSpatialCropd(keys, size), *changes]
    elif segmented and config.foreground > 0:
        share = dict(pos=config.foreground, neg=1 - config.foreground)
        steps = [*moves, *changes, transforms.RandCropByPosNegLabeld(keys, "label", size, num_samples=1, **share)]
    else:
        steps = [*moves, *changes, transforms.RandSpatialCropd(keys, size, random_size=False)]
    return transforms.Compose([*steps, transforms.ToTensord(keys, track_meta=False)])


def _turns(spacing: Sequence[float] | None) -> list[float]:
    """Return the largest turn about each axis, counted in voxels: in mm it is no more than 0.15.

    One of thick slices by as much would shear the volume: their planes would be tilted by half a right angle.
    """
    others = [[s for axis, s in enumerate(spacing or (1, 1, 1)) if axis != about] for about in range(3)]
    return [0.15 * min(pair) / max(pair) for pair in others]


def _room(sample: dict[str, Tensor], size: Sequence[int], foreground: float, seed: int) -> dict[str, Tensor]:
    """Return the surroundings of a patch at random of `{"image", "label"}`, all that may be moved into it.

    The patch is in the middle; what lies outside of the volume is zero. It is centred on a voxel that is not background
    with probability `foreground`, else on one that is, as far as it lies within the volume; with 0 it lies anywhere.
    """
    rng, shape = np.random.default_rng(seed), sample["image"].shape[1:]
    if "label" in sample and foreground > 0:
        labels, inside = sample["label"].flatten(), bool(rng.random() < foreground)
        # A few at random, as one of the kind will be among them: all their places would be many times the volume.
        voxels = rng.integers(len(labels), size=64)
        found = voxels[(labels[torch.from_numpy(voxels)] > 0).numpy() == inside]
        if len(found) == 0:
            places = torch.nonzero((labels > 0) == inside)
            found = places[rng.integers(len(places))].numpy() if len(places) else voxels
        voxel = int(found[0])
        corner = [place - s // 2 for place, s in zip(np.unravel_index(voxel, shape), size)]
    else:
        corner = [int(rng.integers(n - s + 1)) for n, s in zip(shape, size)]
    corner = [min(max(first, 0), n - s) for first, n, s in zip(corner, shape, size)]
    spans = [(first - margin, first + s + margin) for first, s, margin in zip(corner, size, _margins(size))]
    inner = (slice(None), *(slice(max(a, 0), min(b, n)) for (a, b), n in zip(spans, shape)))
    outside = [pair for (a, b), n in zip(spans, shape) for pair in (max(b - n, 0), max(-a, 0))][::-1]
    return {key: F.pad(x[inner], outside) for key, x in sample.items()}


def _margins(size: Sequence[int]) -> list[int]:
    """Return how far beyond a patch the random movements reach: turns by 0.15 about each axis, scales by 0.1."""
    return [math.ceil(0.05 * s + 0.09 * (sum(size) - s)) + 1 for s in size]


class VolumeBatches(KeyedBatches):
    """Batches of volumes.

    A training batch is of patches of one size. A test volume stays whole, padded to at least that size, and its batch
    mates are those that follow it with the same shape; labels of the padding are `VOID`.
    """

    def __init__(self, data: Volumes, config: DataConfig, process: Process, *, training: bool, seed: int = 0) -> None:
        super().__init__(len(data.labels), config.batch_size, process, training=training, seed=seed)
        self.data, self.config, self.class_names = data, config, data.class_names
        self.segmented = config.name in SEGMENTED
        self.size = tuple(config.patch_size or ())
        self.transform = augmentation(config, self.segmented, of_room=False) if training else None
        self.of_room = augmentation(config, self.segmented, of_room=True) if training else None
        self.groups = [] if training else self._groups()

    def _groups(self) -> list[list[int]]:
        groups: list[list[int]] = []
        shape: Any = None
        for index, image in enumerate(self.data.images):
            previous, shape = shape, tuple(max(n, s) for n, s in zip(image.shape[1:], self.size))
            if not groups or shape != previous or len(groups[-1]) == self.batch_size:
                groups.append([])
            groups[-1].append(index)
        return groups

    @property
    def spacings(self) -> list[tuple[float, ...]] | None:
        if self.training or self.data.spacings is None:
            return None
        return [self.data.spacings[group[k]] for group in self.groups for k in self.places(group)]

    def __len__(self) -> int:
        return super().__len__() if self.training else len(self.groups)

    def epoch(self, epoch: int = 0, start: int = 0, only: Sequence[int] | None = None) -> Iterator[Batch]:
        batches = self.keys(epoch, start, only)
        if not self.training:
            groups = self.groups[start:] if only is None else (self.groups[number] for number in only)
            batches = ([(group[place], 0) for place in self.places(group)] for group in groups)
        for keys in batches:
            samples = [self._sample(index, seed) for index, seed in keys]
            if samples:
                x, y = (torch.stack(part).to(self.process.device) for part in zip(*samples))
                yield x, y.long()

    def _sample(self, index: int, seed: int) -> tuple[Tensor, Tensor]:
        image, label = self.data.images[index], self.data.labels[index]
        if not self.segmented:
            image = normalised(image, self.config.normalise)  # held as bytes until now
        image = padded(image, self.size)
        if self.segmented:
            label = padded(label, self.size, 0 if self.training else VOID)
        if self.transform is None:
            return image, label
        sample = {"image": image, "label": label.unsqueeze(0)} if self.segmented else {"image": image}
        transform: Any = self.transform
        # Of a large volume, what is moved is not all of it.
        if any(n > s + 2 * margin for n, s, margin in zip(image.shape[1:], self.size, _margins(self.size))):
            sample, transform = _room(sample, self.size, self.config.foreground, seed), self.of_room
        transform.set_random_state(seed)
        result = transform(sample)
        result = result[0] if isinstance(result, list) else result
        return result["image"].float(), result["label"].squeeze(0) if self.segmented else label


def read_batches(
    config: DataConfig, in_chans: int, process: Process, training: bool, seed: int
) -> tuple[Batches, int | None]:
    """Return the batches of a split of volumes, and the number of classes.

    Raises:
        BadInput: for missing or damaged data, or settings that are not for volumes.
    """
    turns, spacing = config.turn_axes, config.spacing
    if spacing is not None and (len(spacing) != 3 or not all(0 < mm < float("inf") for mm in spacing)):
        raise BadInput(f"data.spacing must be three numbers of mm > 0, got {spacing}")
    own = [1.0, 1.0, 1.0] if config.name == "hippocampus" else None
    if config.name != "nifti" and spacing not in (None, own):
        raise BadInput(f"data.spacing is for nifti; {config.name} is not resampled, got {spacing}")
    require_augment(config, "none", "volume")
    if not set(config.flip_axes) <= {0, 1, 2}:
        raise BadInput(f"data.flip_axes must be among 0, 1 and 2, got {config.flip_axes}")
    if config.patch_size is None or len(config.patch_size) != 3 or min(config.patch_size) < 16:
        raise BadInput(f"data.patch_size must be three numbers of voxels >= 16, got {config.patch_size}")
    if turns is not None and (
        sorted(set(turns)) != sorted(turns)
        or len(turns) != 2
        or not set(turns) <= {0, 1, 2}
        or config.patch_size[turns[0]] != config.patch_size[turns[1]]
    ):
        raise BadInput(f"data.turn_axes must be two of 0, 1 and 2 along which data.patch_size is the same, got {turns}")
    data = read_split(config, in_chans, training)
    batches = VolumeBatches(data, config, process, training=training, seed=seed)
    return batches, len(data.class_names)
