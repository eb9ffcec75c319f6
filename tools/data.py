"""The batches of a split by the name of its data set; small image sets for classification, held in memory."""

import dataclasses
import lzma
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.datasets import CIFAR10

from tools import image_folders, segmentation_data, volume_data
from tools.batches import (
    Batch,
    Batches,
    ImageSpec,
    KeyedBatches,
    Process,
    chosen,
    generator,
    reads_training_split,
    require_augment,
)
from tools.config import BadInput, DataConfig, first_line

CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class Arrays:
    """A split held in memory: images `(N, C, H, W)` uint8 and labels `(N,)` int64."""

    images: Tensor
    labels: Tensor
    note: str = ""  # what a card has to say of them

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
        return dataclasses.replace(self, images=images.contiguous())


class ArrayBatches(KeyedBatches):
    """Batches of arrays."""

    def __init__(
        self, arrays: Arrays, spec: ImageSpec, config: DataConfig, process: Process, *, training: bool, seed: int = 0
    ) -> None:
        super().__init__(len(arrays.labels), config.batch_size, process, training=training, seed=seed)
        home = process.device if config.cache_on_device else torch.device("cpu")
        self.images, self.labels = arrays.images.to(home), arrays.labels.to(home)
        self.note = arrays.note
        self.augment = config.augment if training else "none"
        constants: dict[str, Any] = dict(device=process.device, dtype=torch.float32)
        self.mean = 255 * torch.tensor(spec.mean, **constants).view(1, -1, 1, 1)
        self.std = 255 * torch.tensor(spec.std, **constants).view(1, -1, 1, 1)

    def epoch(self, epoch: int = 0, start: int = 0, only: Sequence[int] | None = None) -> Iterator[Batch]:
        for number, batch in self.parts(epoch, start, only):
            index = batch[self.process.rank :: self.process.world_size].to(self.images.device)
            x = self.images[index].to(self.process.device, non_blocking=True)
            y = self.labels[index].to(self.process.device, non_blocking=True)
            if self.augment != "none":
                rng = generator(self.seed, epoch, number + 1, self.process.rank)
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


def read_digits(train: bool) -> Arrays:
    """Return scikit-learn's 8x8 handwritten digits: every fifth image is a test image, 1,437 and 360 in all."""
    from sklearn.datasets import load_digits  # a second to import, which other data do without

    digits: Any = load_digits()
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
        raise BadInput(f"cannot read CIFAR-10 in {root}: {first_line(error)}") from None
    images = torch.from_numpy(dataset.data[:limit]).permute(0, 3, 1, 2).contiguous()
    return Arrays(images, torch.tensor(dataset.targets[:limit]))


def _stack(samples: Iterator[tuple[Image.Image, int]], limit: int | None, origin: Path) -> Arrays:
    chosen = [(np.asarray(image), label, image.info["jpeg"]) for image, label in islice(samples, limit)]
    if not chosen:
        raise BadInput(f"no images in {origin}")
    images, labels, jpeg = zip(*chosen)
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return Arrays(stacked, torch.tensor(labels), _jpeg_note(max(jpeg)))


def _jpeg_note(quality: int) -> str:
    """Return what to say of images that had been compressed, at a quality of 0 where they had not."""
    if quality == 0:
        return ""
    kind = f"JPEG files (quality about {quality})"
    return f"The images were {kind}, not the original pixels: figures are not exactly comparable with published ones."


def _jpeg_quality(image: Image.Image) -> int:
    """Return the quality that the usual encoder was asked for, 0 of an image of another kind."""
    if image.format != "JPEG":
        return 0
    first = next(iter(getattr(image, "quantization").values()))[0]  # noqa: B009
    # It is 16 at quality 50, scaled by 2 - quality / 50 above and by 50 / quality below.
    return round(50 * (2 - first / 16)) if first <= 16 else round(50 * 16 / first)


def _pixels(file: Any, name: str) -> Image.Image:
    try:
        image = Image.open(file)
        pixels = image.convert("RGB").resize((32, 32))
        pixels.info["jpeg"] = _jpeg_quality(image)
        return pixels
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise BadInput(f"cannot read image {name}: {error}") from None


def _label(name: str, origin: Path) -> int:
    if name not in CIFAR_CLASSES:
        raise BadInput(f"{origin}: {name!r} is not a class of CIFAR-10")
    return CIFAR_CLASSES.index(name)


def _read_archive(path: Path) -> Iterator[tuple[Image.Image, int]]:
    try:
        with tarfile.open(path, "r|xz") as archive:
            for member in archive:
                if member.isfile():
                    name = f"{path.name}: {member.name}"
                    yield _pixels(archive.extractfile(member), name), _label(Path(member.name).parent.name, path)
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise BadInput(f"{path} is damaged: {error}") from None


def _read_folder(root: Path) -> Iterator[tuple[Image.Image, int]]:
    files = [path for path in root.glob("*/*") if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".bmp")]
    for path in sorted(files, key=lambda path: (path.name, path.parent.name)):  # classes mixed, for data.num_train
        yield _pixels(path, str(path)), _label(path.parent.name, root)


def build_batches(
    config: DataConfig, spec: ImageSpec, process: Process, *, training: bool, seed: int = 0
) -> tuple[Batches, int | None]:
    """Return the batches of the training or the test split, and the number of classes where the data tell it.

    Raises:
        BadInput: for missing or unreadable data, or data that do not fit the model.
    """
    root = Path(config.root)
    from_train = reads_training_split(config, training)
    if config.name == "digits":
        arrays = read_digits(from_train)
    elif config.name == "cifar10":
        if not root.is_dir() and not config.download:
            raise BadInput(f"no data folder {root}; set data.root, or data.download=true to fetch CIFAR-10 into it")
        limit = config.num_train if training and config.holdout is None else None
        arrays = read_cifar10(root, from_train, limit, config.download)
    elif config.name in volume_data.NAMES:
        return volume_data.read_batches(config, spec.size[0], process, training, seed)
    elif config.name in segmentation_data.NAMES:
        return segmentation_data.read_batches(config, spec, process, training, seed)
    else:
        return image_folders.read_batches(config, spec, process, training, seed)
    if training:
        require_augment(config, "none", "flip", "crop_flip")
    part = chosen(len(arrays.labels), config, training)
    arrays = dataclasses.replace(arrays, images=arrays.images[part], labels=arrays.labels[part])
    arrays = arrays.fitted(spec.size, config.name)
    return ArrayBatches(arrays, spec, config, process, training=training, seed=seed), 10
