"""Volumes as a model sees them, and the way back to their own grid.

Preprocessing                   what is done to a volume; its record lies in config.json beside the weights
Preprocessing.of_record(dict)   from `config.json`'s entry "preprocessing"
load_volume(path)               a NIfTI file: voxels `(C, *S)` in the file's own axes, and its affine
load_labels(path, like=...)     the label volume of an image
prepare(volume, preprocessing)  oriented, resampled and normalised voxels `(C, *S)`
restore(scores, volume, ...)    scores `(K, *S)` of the prepared volume -> labels on the file's own grid
save_labels(path, labels, volume)
"""

import dataclasses
import gzip
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tools.config import BadInput, first_line, optional

NORMALISATIONS = ("zscore", "minmax", "none")
ORIENTATIONS = ("RAS", "none")
UNITS = {"meter": 1e3, "micron": 1e-3}
"""Units of length in NIfTI files in mm; a file that names none is in mm."""
PLACE = (
    "xyzt_units", "qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z",
    "sform_code", "srow_x", "srow_y", "srow_z",
)  # fmt: skip
"""Where a volume lies, as its header has it; `pixdim` belongs to it."""
ALIGNED = 0.1
"""Voxels that labels may lie apart from their volume at its corners: affines are written with few digits."""
MOST_CLASSES = 255
"""Labels are bytes, of which one stands for voxels that do not count."""


@dataclass(frozen=True)
class Preprocessing:
    """What is done to a volume before a model sees it.

    Args:
        spacing: mm per voxel along each axis after resampling; None leaves the file's own.
        orientation: `"RAS"`: axes are turned to point right, anterior, superior; `"none"`: taken as they lie.
        normalise: per volume and channel: `"zscore"`, `"minmax"` (to 0..1) or `"none"`.
        patch_size: voxels of the patch that the model was trained on; smaller volumes are padded to it.
        label_names: of the classes, background first.
    """

    spacing: tuple[float, ...] | None = None
    orientation: str = "RAS"
    normalise: str = "zscore"
    patch_size: tuple[int, ...] = ()
    label_names: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """Return this as what JSON can hold."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(self).items()}

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> "Preprocessing":
        """Return what `record` made a dictionary of; keys that are not its own are passed over.

        Raises:
            BadInput: for an orientation or a normalisation that there is not, or sizes that are none.
        """
        if not isinstance(record, dict):
            raise BadInput(f"preprocessing in config.json must be a mapping, got {record!r}")
        for key, kinds, least, most in (("spacing", (int, float), 1e-6, 1e6), ("patch_size", int, 1, 4096)):
            sizes = record.get(key)
            three = sizes if isinstance(sizes, (list, tuple)) and len(sizes) == 3 else ()
            none = sizes is None or (key == "patch_size" and sizes in ([], ()))
            if not none and not (three and all(isinstance(n, kinds) and least <= n <= most for n in three)):
                raise BadInput(
                    f"unknown preprocessing: {key} must be 3 numbers from {least:g} to {most:g}, got {sizes}"
                )
        names = {f.name for f in dataclasses.fields(cls)}
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items() if k in names}
        result = cls(**values)
        if result.orientation not in ORIENTATIONS or result.normalise not in NORMALISATIONS:
            raise BadInput(f"unknown preprocessing: orientation {result.orientation}, normalise {result.normalise}")
        return result


@dataclass(frozen=True)
class Volume:
    """Voxels `(C, *S)` float32 in the axes of their file, the affine `(4, 4)` from voxels to mm, and a name.

    `header` is the file's, which label volumes take the place in space from; None for voxels of no file. `unit` is that
    of the affine in mm.

    Raises:
        BadInput: for an affine that is not invertible.
    """

    voxels: Tensor
    affine: np.ndarray
    name: str = "volume"
    has_affine: bool = True
    header: Any = None
    unit: float = 1.0

    def __post_init__(self) -> None:
        if np.linalg.matrix_rank(self.affine[:3, :3]) < 3:
            raise BadInput(f"{self.name} has an affine that is not invertible")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.voxels.shape[1:])

    @property
    def spacing(self) -> tuple[float, ...]:
        """Mm per voxel along each axis of the file."""
        return tuple(self.unit * float(s) for s in np.sqrt((self.affine[:3, :3] ** 2).sum(axis=0)))


def _open(path: Path) -> tuple[Any, np.ndarray]:
    nibabel = optional("nibabel", "volumes")
    try:
        file = nibabel.load(path)
        if not isinstance(file, nibabel.Nifti1Pair):  # files of surfaces (CIFTI) end in .nii too
            raise BadInput(f"{path} is no NIfTI volume but a {type(file).__name__}")
        data = np.asanyarray(file.dataobj)
        _check_gzip(path)
    except BadInput:
        raise
    except FileNotFoundError:
        raise BadInput(f"no volume {path}{_channel_hint(path)}") from None
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        reason = first_line(error)
        raise BadInput(f"cannot read volume {path}: {reason}") from None
    while data.ndim > 3 and data.shape[-1] == 1:
        data = data[..., 0]
    return file, data


def _check_gzip(path: Path) -> None:
    """Read a compressed file to its end, which nibabel does not: there its checksum is, and damage is noticed."""
    if path.name.lower().endswith(".gz"):
        with gzip.open(path) as file:
            while file.read(1 << 20):
                pass


def _channel_hint(path: Path) -> str:
    """Return what to say of a missing file where nnU-Net's name of its first channel is there."""
    first = path.with_name(path.name.replace(".nii", "_0000.nii", 1))
    return f"; rename {first.name}, or list it: nnU-Net's numbers of channels are not added" if first.exists() else ""


def load_volume(path: str | Path, in_chans: int = 1) -> Volume:
    """Return the volume in a NIfTI file; a fourth axis holds the channels.

    Raises:
        BadInput: if it cannot be read, has other axes or channels than a model takes, or voxels that are not finite.
    """
    path = Path(path)
    file, data = _open(path)
    if data.dtype.kind not in "biuf":
        raise BadInput(f"{path} has RGB or complex voxels ({data.dtype}); expected one number each")
    if not np.isfinite(file.affine).all():
        raise BadInput(f"{path} has an affine that is not finite")
    if data.ndim not in (3, 4) or min(data.shape) < 1:
        raise BadInput(f"{path} has the shape {data.shape}; expected 3 axes, or 4 with channels last")
    channels = data.shape[3] if data.ndim == 4 else 1
    if channels != in_chans:
        shape = "x".join(map(str, data.shape))
        raise BadInput(
            f"{path} is {data.ndim}-D ({shape}), {channels} channel(s); the model takes {in_chans} "
            "(model.kwargs.in_chans)"
        )
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and said below
        voxels = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32)).reshape(*data.shape[:3], channels)
    checked_finite(voxels, str(path))
    known = any(int(file.header[code]) > 0 for code in ("sform_code", "qform_code") if code in file.header)
    voxels = voxels.permute(3, 0, 1, 2).contiguous()
    return Volume(voxels, np.asarray(file.affine), str(path), known, file.header, _unit(file.header))


def _unit(header: Any) -> float:
    """Return the mm of a unit of length of a file; 1 where it names none, or one that there is not."""
    try:
        return UNITS.get(header.get_xyzt_units()[0], 1.0)
    except (AttributeError, KeyError):
        return 1.0


def checked_finite(voxels: Tensor, name: str) -> Tensor:
    """Return the voxels if all are finite, else raise BadInput."""
    bad = int((~torch.isfinite(voxels)).sum())
    if bad:
        raise BadInput(f"{name} has {bad} voxels that are NaN or infinite; give them a value, such as the background's")
    return voxels


def load_labels(path: str | Path, like: Volume, num_classes: int) -> Tensor:
    """Return the labels `like.shape` uint8 of an image, in the axes of its file.

    Raises:
        BadInput: for another shape or affine than the image's, or values that are no classes.
    """
    path = Path(path)
    file, data = _open(path)
    if data.shape != like.shape:
        raise BadInput(f"{path} has the shape {data.shape}, but its image {like.name} has {like.shape}")
    if like.has_affine:
        away = _distance(file.affine, like)
        if not away <= ALIGNED:
            apart = f"by their affines they lie up to {away:.3g} voxels apart"
            raise BadInput(f"{path} is not aligned with its image {like.name}: {apart}")
    return checked_labels(data, num_classes, str(path))


def _distance(affine: np.ndarray, volume: Volume) -> float:
    """Return how many of its voxels, at most, a volume's corners are from where another affine puts them."""
    corners = np.array([*itertools.product(*((0, n - 1) for n in volume.shape))]).T
    corners = np.vstack([corners, np.ones(corners.shape[1])])
    return float(np.abs((np.linalg.inv(volume.affine) @ affine @ corners - corners)[:3]).max())


def checked_labels(data: np.ndarray, num_classes: int, name: str) -> Tensor:
    """Return label values as uint8, after checking that all are whole numbers from 0 to `num_classes` - 1.

    Those of a file with a scale in its header are whole but for rounding.
    """
    if data.dtype.kind not in "biuf":
        raise BadInput(f"{name} has RGB or complex labels ({data.dtype}); expected whole numbers")
    if num_classes > MOST_CLASSES:
        raise BadInput(f"{name}: labels are 8-bit numbers, {MOST_CLASSES} classes at most, got {num_classes}")
    values = np.unique(data)
    whole = np.round(values)
    bad = values[~((whole >= 0) & (whole < num_classes) & np.isclose(values, whole, rtol=0, atol=1e-3))]
    if len(bad):
        raise BadInput(f"{name} has the label value {bad[0]:g}; expected whole numbers from 0 to {num_classes - 1}")
    data = np.ascontiguousarray(data)
    return torch.from_numpy((np.round(data) if data.dtype.kind == "f" else data).astype(np.uint8))


def normalised(voxels: Tensor, how: str) -> Tensor:
    """Return voxels `(C, *S)` as float32, normalised per channel; a channel of one value becomes zeros."""
    voxels = voxels.float()
    if how == "none":
        return voxels
    flat = voxels.flatten(1).double()  # a copy; raw intensities go up to millions
    low, high = torch.aminmax(flat, dim=1, keepdim=True)
    if how == "minmax":
        centre, width = low, high - low
    else:
        centre, width = flat.mean(dim=1, keepdim=True), flat.std(dim=1, keepdim=True, correction=0)
    rounding = 1e-6 * torch.maximum(low.abs(), high.abs())  # is no contrast
    width = torch.where(width > rounding, width, torch.inf)
    return flat.sub_(centre).div_(width).float().view_as(voxels)


def _axes(volume: Volume, orientation: str) -> tuple[list[int], list[int]]:
    """Return which axis of the file each axis of the prepared volume is, and which of these are reversed."""
    if orientation == "none":
        return [0, 1, 2], []
    if not volume.has_affine:
        raise BadInput(
            f"{volume.name} does not give its orientation (sform and qform codes are 0); give it an affine, or set "
            "data.orientation=none to take its axes as they are"
        )
    to_ras = optional("nibabel", "volumes").io_orientation(volume.affine)  # per axis of the file: axis of RAS, sign
    order = [int(np.flatnonzero(to_ras[:, 0] == axis)[0]) for axis in range(3)]
    return order, [axis for axis in range(3) if to_ras[order[axis], 1] < 0]


def oriented(x: Tensor, volume: Volume, orientation: str) -> Tensor:
    """Return x `(C, *S)` in the volume's axes, turned to an orientation."""
    order, reverse = _axes(volume, orientation)
    return x.permute(0, *(1 + axis for axis in order)).flip([1 + axis for axis in reverse])


def prepared_spacing(volume: Volume, preprocessing: Preprocessing) -> tuple[float, ...]:
    """Return the mm per voxel of the prepared volume, to four digits."""
    order, _ = _axes(volume, preprocessing.orientation)
    return tuple(float(f"{s:.4g}") for s in preprocessing.spacing or [volume.spacing[axis] for axis in order])


def _grid(volume: Volume, preprocessing: Preprocessing) -> tuple[int, ...]:
    """Return the shape of the prepared volume.

    Raises:
        BadInput: for a volume that is thinner than half a voxel of the new spacing.
    """
    order, _ = _axes(volume, preprocessing.orientation)
    shape = [volume.shape[axis] for axis in order]
    spacing, target = [volume.spacing[axis] for axis in order], preprocessing.spacing
    if target is None:
        return tuple(shape)
    resampled = [round(n * mm / new) for n, mm, new in zip(shape, spacing, target)]
    if any(n > 1 and m == 0 for n, m in zip(shape, resampled)):
        told, mm, wanted = ("x".join(f"{v:.4g}" for v in values) for values in (shape, spacing, target))
        raise BadInput(
            f"{volume.name} has {told} voxels of {mm} mm, of which nothing is left at the model's {wanted} mm; "
            "correct the spacing in its header, or data.spacing"
        )
    return tuple(max(1, m) for m in resampled)  # a single slice has no extent


def resized(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Return x `(C, *S)` with other axes, linearly; those that get shorter are averaged over what a voxel then covers.

    PyTorch does so for images: it is done over the last two axes, and then over the first.
    """
    depth, height, width = shape
    options: dict[str, Any] = dict(mode="bilinear", antialias=True)
    x = F.interpolate(x.transpose(0, 1), size=(height, width), **options)  # (D, C, H, W)
    x = F.interpolate(x.permute(2, 1, 0, 3), size=(depth, width), **options)  # (H, C, D, W)
    return x.permute(1, 2, 0, 3)


def prepare(volume: Volume, preprocessing: Preprocessing, labels: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Return voxels `(C, *S)` float32 as a model sees them, and labels `(*S)` on the same grid.

    Raises:
        BadInput: for a volume of unknown orientation, where that matters, or of which no voxel is left.
    """
    shape = _grid(volume, preprocessing)
    x = oriented(volume.voxels, volume, preprocessing.orientation)
    if tuple(x.shape[1:]) != shape:
        x = resized(x, shape)
    if labels is not None:
        labels = oriented(labels.unsqueeze(0), volume, preprocessing.orientation)
        if tuple(labels.shape[1:]) != shape:
            labels = F.interpolate(labels.unsqueeze(0).float(), size=shape, mode="nearest-exact").squeeze(0).byte()
        labels = labels.squeeze(0).contiguous()
    return normalised(x.contiguous(), preprocessing.normalise), labels


def restore(scores: Tensor, volume: Volume, preprocessing: Preprocessing) -> Tensor:
    """Return labels `volume.shape` uint8 on the file's own grid, of scores `(K, *S)` of the prepared volume."""
    order, reverse = _axes(volume, preprocessing.orientation)
    shape = [volume.shape[axis] for axis in order]
    labels, best = scores.new_zeros(shape, dtype=torch.uint8), scores.new_full(shape, -torch.inf)
    for k, one in enumerate(scores):  # class by class: all at once would be many times the size of the file
        if list(one.shape) != shape:
            one = F.interpolate(one[None, None], size=shape, mode="trilinear")[0, 0]
        labels.masked_fill_(one > best, k)
        torch.maximum(best, one, out=best)
    labels = labels.flip(reverse)
    return labels.permute([order.index(axis) for axis in range(3)]).contiguous()


def save_labels(path: Path, labels: Tensor, volume: Volume) -> None:
    """Write labels as a .nii.gz file that lies where their volume does: its sform, its qform and its units.

    They may differ, a file may have one or none of them, and the one that does not count may be damaged.
    """
    nibabel = optional("nibabel", "volumes")
    image = nibabel.Nifti1Image(labels.numpy().astype(np.uint8), volume.affine)
    if isinstance(volume.header, nibabel.Nifti1Header):
        for name in PLACE:
            image.header[name] = volume.header[name]
        image.header["pixdim"][:4] = volume.header["pixdim"][:4]
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))


def padding(shape: Sequence[int], size: Sequence[int]) -> list[tuple[int, int]]:
    """Return the voxels to add before and after each axis so that a shape, in the middle, has at least a size."""
    missing = [max(0, s - n) for n, s in zip(shape, size)]
    return [(m // 2, m - m // 2) for m in missing]


def padded(x: Tensor, size: Sequence[int], value: float = 0.0) -> Tensor:
    """Return x, its last axes padded on both sides to at least a size."""
    flat = [n for pair in reversed(padding(x.shape[-len(size) :], size)) for n in pair]
    return F.pad(x, flat, value=value) if any(flat) else x


def unpadded(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the middle part of x that `padded` put there: its last axes have the given shape."""
    for axis, ((before, _), n) in enumerate(zip(padding(shape, x.shape[-len(shape) :]), shape)):
        x = x.narrow(x.ndim - len(shape) + axis, before, n)
    return x
