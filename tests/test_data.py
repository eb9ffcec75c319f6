"""Data sets, their batches, and what is wrong with files."""

import dataclasses
import io
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ROOT, image_folder, png, write_archive, write_archives, write_images
from PIL import ExifTags, Image, ImageOps
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from tools.batches import KeyLoader
from tools.config import BadInput, DataConfig
from tools.data import (
    CIFAR_CLASSES,
    ArrayBatches,
    Arrays,
    Batches,
    ImageSpec,
    Process,
    augment,
    build_batches,
    read_cifar10,
    read_digits,
)
from tools.image_folders import StrictImages
from tools.images import read_image

GREY = ImageSpec((1, 16, 16), (0.5,), (0.25,))
COLOUR = ImageSpec((3, 16, 16), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), crop_pct=1.0)

# timm's readers leave it to the garbage collector to close an image file.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


def numbered(count: int, size: int = 16, channels: int = 1) -> Arrays:
    """Images that hold their own number, which is also their label."""
    labels = torch.arange(count)
    return Arrays(labels.view(-1, 1, 1, 1).expand(-1, channels, size, size).to(torch.uint8).contiguous(), labels)


def batches(
    arrays: Arrays, config: DataConfig, process: Process = Process(), training: bool = True, seed: int = 0
) -> ArrayBatches:
    spec = GREY if arrays.images.shape[1] == 1 else COLOUR
    return ArrayBatches(arrays, spec, config, process, training=training, seed=seed)


def labels(data: Batches, epoch: int = 0, start: int = 0) -> list[list[int]]:
    return [y.tolist() for _, y in data.epoch(epoch, start)]


def flat(lists: list[list[int]]) -> list[int]:
    return [label for part in lists for label in part]


# Digits.


def test_digits_are_split_once_and_for_all() -> None:
    train, test = read_digits(True), read_digits(False)
    assert train.images.shape == (1437, 1, 8, 8)
    assert test.images.shape == (360, 1, 8, 8)
    assert train.images.dtype == torch.uint8
    assert train.images.max() == 255
    digits = load_digits()
    assert torch.equal(test.labels, torch.from_numpy(digits.target[::5]))
    # Together they are all of the digits, each once.
    everything = torch.cat((train.images, test.images)).flatten(1)
    expected = torch.from_numpy(np.round(digits.images * (255 / 16)).astype(np.uint8)).flatten(1)
    assert sorted(everything.tolist()) == sorted(expected.tolist())


def test_no_digit_is_in_both_splits() -> None:
    train, test = ({tuple(x) for x in read_digits(s).images.flatten(1).tolist()} for s in (True, False))
    assert not train & test


# Batches of arrays.


def test_two_processes_share_each_batch() -> None:
    config = DataConfig(batch_size=8)
    whole = labels(batches(numbered(37), config))
    parts = [labels(batches(numbered(37), config, Process(rank, 2))) for rank in range(2)]
    assert len(whole) == 4  # the incomplete batch is left out of training
    for batch, a, b in zip(whole, *parts):
        assert len(a) == len(b) == 4
        assert sorted(a + b) == sorted(batch)


def test_two_processes_share_a_test_split() -> None:
    parts = [batches(numbered(37), DataConfig(batch_size=8), Process(rank, 2), training=False) for rank in range(2)]
    seen = [label for part in parts for batch in labels(part) for label in batch]
    assert sorted(seen) == list(range(37))
    assert len(parts[0]) == len(parts[1]) == 5


def test_test_batches_hold_every_image_in_order() -> None:
    data = batches(numbered(37), DataConfig(batch_size=8), training=False)
    assert flat(labels(data)) == list(range(37))
    assert len(data) == 5


def test_order_depends_on_seed_and_epoch_alone() -> None:
    data = batches(numbered(40), DataConfig(batch_size=8))
    first = labels(data, 0)
    torch.manual_seed(123)
    assert labels(data, 0) == first == labels(batches(numbered(40), DataConfig(batch_size=8)), 0)
    assert sorted(flat(first)) == list(range(40))
    assert labels(data, 1) != first
    assert labels(batches(numbered(40), DataConfig(batch_size=8), seed=1)) != first


@pytest.mark.parametrize("kind", ["flip", "crop_flip"])
def test_an_epoch_is_entered_anywhere(kind: str) -> None:
    data = batches(random_arrays(40), DataConfig(batch_size=8, augment=kind))
    whole = list(data.epoch(3))
    for start in range(6):
        tail = list(data.epoch(3, start))
        assert len(tail) == 5 - start
        for (x, y), (x_whole, y_whole) in zip(tail, whole[start:]):
            assert torch.equal(x, x_whole)
            assert torch.equal(y, y_whole)


def test_fewer_images_than_a_batch_are_one_batch() -> None:
    assert [len(y) for y in labels(batches(numbered(5), DataConfig(batch_size=64)))] == [5]


def test_images_are_normalised() -> None:
    ((x, _),) = batches(numbered(4, channels=3), DataConfig(batch_size=4), training=False).epoch()
    for channel in range(3):
        expected = (torch.arange(4) / 255 - COLOUR.mean[channel]) / COLOUR.std[channel]
        torch.testing.assert_close(x[:, channel, 0, 0], expected)
    assert x.dtype == torch.float32


def test_arrays_on_the_device_give_the_same_batches() -> None:
    arrays = random_arrays(24)
    cached, fresh = (
        list(batches(arrays, DataConfig(batch_size=8, augment="crop_flip", cache_on_device=c)).epoch())
        for c in (True, False)
    )
    assert all(torch.equal(a, b) for pair in zip(cached, fresh) for a, b in zip(*pair))


# Augmentation.


def random_arrays(count: int, size: int = 16) -> Arrays:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(1, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    return Arrays(images, torch.arange(count))


def one_augmentation(images: Tensor, pad: int, seed: int = 0) -> Tensor:
    return augment(images, torch.Generator().manual_seed(seed), pad)


def test_flip_mirrors_some_images_and_leaves_the_others() -> None:
    images = random_arrays(32).images
    out = one_augmentation(images, 0)
    mirrored = [torch.equal(a, b.flip(2)) for a, b in zip(out, images)]
    same = [torch.equal(a, b) for a, b in zip(out, images)]
    assert all(m != s for m, s in zip(mirrored, same))
    assert 0 < sum(mirrored) < 32


@pytest.mark.parametrize("shape", [(16, 16), (17, 23)])
def test_crop_is_a_window_of_the_padded_image(shape: tuple[int, int]) -> None:
    images = torch.randint(1, 256, (24, 3, *shape), dtype=torch.uint8)
    out = one_augmentation(images, 2)
    assert out.shape == images.shape
    assert out.dtype == torch.uint8
    offsets = set()
    for a, b in zip(out, images):
        padded = [torch.nn.functional.pad(x, (2, 2, 2, 2)) for x in (b, b.flip(2))]
        places = [
            (i, j)
            for p in padded
            for i in range(5)
            for j in range(5)
            if torch.equal(a, p[:, i : i + shape[0], j : j + shape[1]])
        ]
        assert len(places) == 1
        offsets.add(places[0])
    assert len(offsets) > 8


def test_augmentation_depends_on_seed_epoch_and_batch() -> None:
    arrays = random_arrays(1).images.expand(32, -1, -1, -1)  # the order of the images shows nowhere
    arrays = Arrays(arrays, torch.arange(32))
    config = DataConfig(batch_size=16, augment="crop_flip")

    def first(epoch: int, number: int, seed: int = 0) -> Tensor:
        torch.rand(epoch + number + 1)  # whatever else draws from the global generator
        return list(batches(arrays, config, seed=seed).epoch(epoch))[number][0]

    assert torch.equal(first(0, 0), first(0, 0))
    for other in (first(0, 1), first(1, 0), first(0, 0, seed=1)):
        assert not torch.equal(first(0, 0), other)


def test_test_images_are_not_augmented() -> None:
    arrays = random_arrays(8)
    config = DataConfig(batch_size=8, augment="crop_flip")
    plain, augmented = (
        next(iter(batches(arrays, c, training=False).epoch()))[0] for c in (DataConfig(batch_size=8), config)
    )
    assert torch.equal(plain, augmented)


# Fitting images to a model.


def test_grey_images_for_a_colour_model_and_the_other_way() -> None:
    grey = numbered(3, size=8).fitted((3, 16, 16), "digits").images
    assert grey.shape == (3, 3, 16, 16)
    assert torch.equal(grey[:, 0], grey[:, 2])
    assert grey[2].unique().tolist() == [2]
    colour = torch.tensor([[[[255]], [[0]], [[0]]]], dtype=torch.uint8).expand(1, 3, 8, 8)
    assert Arrays(colour, torch.zeros(1)).fitted((1, 8, 8), "x").images.unique().tolist() == [76]


@pytest.mark.parametrize("channels", [2, 4])
def test_other_numbers_of_channels_are_refused(channels: int) -> None:
    with pytest.raises(BadInput, match=rf"1 channels.* {channels} "):
        build_batches(DataConfig(), ImageSpec((channels, 16, 16), (0.5,), (0.5,)), Process(), training=True)


@pytest.mark.parametrize("size", [8, 15])
def test_images_under_16_pixels_are_refused(size: int) -> None:
    cfg = dict(input_size=(3, size, 64), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear", crop_pct=1.0)
    with pytest.raises(BadInput, match=f">= 16, got {size}"):
        ImageSpec.of(cfg, 3, None)
    with pytest.raises(BadInput, match=f">= 16, got {size}"):
        ImageSpec.of({**cfg, "input_size": (3, 64, 64)}, 3, size)


def test_odd_sizes_work() -> None:
    data, classes = build_batches(
        DataConfig(batch_size=4), ImageSpec((3, 17, 17), (0.5,) * 3, (0.5,) * 3), Process(), training=False
    )
    assert next(iter(data.epoch()))[0].shape == (4, 3, 17, 17)
    assert classes == 10


def test_number_of_training_images() -> None:
    config = DataConfig(batch_size=10, num_train=35)
    train, _ = build_batches(config, GREY, Process(), training=True)
    test, _ = build_batches(config, GREY, Process(), training=False)
    assert (len(train), len(test)) == (3, 36)


# CIFAR-10.


def test_cifar10_from_archives(tmp_path: Path) -> None:
    write_archives(tmp_path)
    train, test = read_cifar10(tmp_path, True), read_cifar10(tmp_path, False)
    assert train.images.shape == (30, 3, 32, 32)
    assert train.images[:, 0, 0, 0].tolist() == list(range(30))
    assert train.labels.tolist() == [k % 10 for k in range(30)]
    assert len(test.labels) == 10
    assert len(read_cifar10(tmp_path, True, limit=7).labels) == 7


@pytest.mark.parametrize("test_folder", ["test", "val", "validation"])
def test_cifar10_from_image_folders(test_folder: str, tmp_path: Path) -> None:
    write_images(tmp_path / "train", CIFAR_CLASSES, 2, size=(32, 32))
    write_images(tmp_path / test_folder, CIFAR_CLASSES[:3], 1, size=(32, 32))
    train, test = read_cifar10(tmp_path, True), read_cifar10(tmp_path, False)
    assert train.images.shape == (20, 3, 32, 32)
    assert train.labels.tolist() == [k % 10 for k in range(20)]  # classes mixed, for data.num_train
    assert test.labels.tolist() == [0, 1, 2]


def test_cifar10_of_jpeg_files_says_so(tmp_path: Path) -> None:
    """The original pixels are needed for figures that are to be compared; the record of an evaluation tells."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for split, suffix in (("train", "png"), ("test", "jpg")):
        (tmp_path / split / "cat").mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / split / "cat" / f"1.{suffix}", quality=75)
    assert read_cifar10(tmp_path, True).note == ""
    assert "JPEG files (quality about 75)" in read_cifar10(tmp_path, False).note
    config = DataConfig(name="cifar10", root=str(tmp_path))
    batches, _ = build_batches(config, ImageSpec((1, 16, 16), (0.5,), (0.5,)), Process(), training=False)
    assert "quality about 75" in batches.note


def test_cifar10_the_first_images_of_folders_are_of_several_classes(tmp_path: Path) -> None:
    """Folders list class after class: a prefix of that would be airplanes alone."""
    write_images(tmp_path / "train", CIFAR_CLASSES, 5, size=(32, 32))
    assert len(read_cifar10(tmp_path, True, limit=10).labels.unique()) > 1


def test_cifar10_classes_are_those_of_the_model(tmp_path: Path) -> None:
    write_images(tmp_path / "train", ["airplane", "zebra"], 2, size=(32, 32))
    with pytest.raises(BadInput, match="zebra"):
        read_cifar10(tmp_path, True)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.9, 0.98])
def test_cifar10_truncated_archive(share: float, tmp_path: Path) -> None:
    path = write_archives(tmp_path) / "cifar10_train.tar.xz"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(BadInput, match=r"cifar10_train\.tar\.xz"):
        read_cifar10(tmp_path, True)


@pytest.mark.parametrize("content", [b"no archive at all" * 100, bytes(10_000)])
def test_cifar10_something_else_by_the_name_of_an_archive(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "cifar10_train.tar.xz").write_bytes(content)
    with pytest.raises(BadInput, match=r"cifar10_train\.tar\.xz"):
        read_cifar10(tmp_path, True)


def test_cifar10_damaged_byte_in_an_archive(tmp_path: Path) -> None:
    path = write_archives(tmp_path) / "cifar10_train.tar.xz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"cifar10_train\.tar\.xz"):
        read_cifar10(tmp_path, True)


@pytest.mark.parametrize(
    ("members", "named"),
    [
        ([], "cifar10_train.tar.xz"),
        ([("zebra/0.png", png(0))], "zebra"),
        ([("0.png", png(0))], "cifar10_train.tar.xz"),
        ([("cat/0.png", png(0)[:60])], "cat/0.png"),
        ([("cat/0.png", b"")], "cat/0.png"),
        ([("cat/0.png", b"GIF89a but no more")], "cat/0.png"),
    ],
    ids=["empty", "unknown class", "no class", "truncated image", "empty image", "no image"],
)
def test_cifar10_archive_of_something_else(members: list[tuple[str, bytes]], named: str, tmp_path: Path) -> None:
    write_archive(tmp_path / "cifar10_train.tar.xz", members)
    with pytest.raises(BadInput, match=named):
        read_cifar10(tmp_path, True)


def test_cifar10_missing_or_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no CIFAR-10"):
        read_cifar10(tmp_path, True)
    (tmp_path / "train").mkdir()
    with pytest.raises(BadInput, match="no images"):
        read_cifar10(tmp_path, True)
    with pytest.raises(BadInput, match="nowhere"):
        build_batches(DataConfig(name="cifar10", root=str(tmp_path / "nowhere")), COLOUR, Process(), training=True)


def test_cifar10_damaged_download(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"cos\nsystem\n(S'exit'\ntR.")
    with pytest.raises(BadInput, match="CIFAR-10"):
        read_cifar10(tmp_path, True)


# What timm reads.


def reader(root: Path, training: bool, spec: ImageSpec = COLOUR, **kwargs: object) -> tuple[Batches, int | None]:
    config = DataConfig(name="folder", root=str(root), batch_size=4, workers=0, **kwargs)
    return build_batches(config, spec, Process(), training=training)


def test_image_folder(tmp_path: Path) -> None:
    image_folder(tmp_path)
    train, classes = reader(tmp_path, True)
    test, test_classes = reader(tmp_path, False)
    assert (len(train), classes, len(test), test_classes) == (6, 3, 3, 3)
    assert train.class_names == test.class_names == ("ant", "bee", "cat")
    x, y = next(iter(train.epoch()))
    assert x.shape == (4, 3, 16, 16)
    assert y.shape == (4,)
    assert sorted(flat(labels(train))) == [0] * 8 + [1] * 8 + [2] * 8
    assert flat(labels(test)) == [0] * 4 + [1] * 4 + [2] * 4


def test_some_batches_of_an_image_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are those of the whole pass, and no other file is read."""
    data, _ = reader(image_folder(tmp_path), False)
    whole, read, seen = list(data.epoch()), StrictImages.__getitem__, []
    monkeypatch.setattr(StrictImages, "__getitem__", lambda self, key: seen.append(key) or read(self, key))
    for (x, y), expected in zip(data.epoch(only=[0, 2]), (whole[0], whole[2]), strict=True):
        assert torch.equal(x, expected[0])
        assert torch.equal(y, expected[1])
    assert [index for index, _ in seen] == [0, 1, 2, 3, 8, 9, 10, 11]


def test_image_folder_gives_the_pixels_of_its_files(tmp_path: Path) -> None:
    image_folder(tmp_path, count=2)
    write_images(tmp_path / "square" / "validation", ["a"], 1, size=(16, 16))
    ((x, _),) = reader(tmp_path / "square", False)[0].epoch()
    pixels = torch.tensor(np.asarray(Image.open(tmp_path / "square" / "validation" / "a" / "000.png"))).permute(2, 0, 1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (COLOUR.mean, COLOUR.std))
    torch.testing.assert_close(x[0] * std + mean, pixels / 255, atol=1e-6, rtol=0)


def test_archive_of_image_folders(tmp_path: Path) -> None:
    """timm reads a tar file as it reads the folder that was packed."""
    image_folder(tmp_path)
    with tarfile.open(tmp_path / "validation.tar", "w") as archive:
        archive.add(tmp_path / "validation", "")
    plain, packed = (reader(root, False)[0] for root in (tmp_path, tmp_path / "validation.tar"))
    assert labels(packed) == labels(plain)


def test_nobody_trains_on_an_archive(tmp_path: Path) -> None:
    """It has no splits: what is trained on would be tested on."""
    (tmp_path / "images.tar").touch()
    with pytest.raises(BadInput, match="is an archive, which training and testing would both read whole"):
        reader(tmp_path / "images.tar", True)


class Stream(IterableDataset):
    """Pictures in order, as a reader of timm streams them to one of several processes."""

    transform: Any = None

    def __len__(self) -> int:
        return 50

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        for k in range(len(self)):
            yield self.transform(Image.new("RGB", (16, 16), (5 * k, 0, 0))), k


def test_a_stream_is_as_long_as_what_a_process_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.image_folders.create_dataset", lambda *_, **__: Stream())
    config = DataConfig(name="torch/x", root=str(tmp_path), batch_size=60, workers=0, num_classes=50)
    data, _ = build_batches(config, COLOUR, Process(0, 2), training=True)
    ((_, y),) = data.epoch()
    assert y.tolist() == list(range(30))  # a second batch of 30 would not be whole
    with pytest.raises(BadInput, match="50 training images are fewer than one batch"):
        build_batches(dataclasses.replace(config, batch_size=102), COLOUR, Process(0, 2), training=True)


def test_grey_model_on_an_image_folder(tmp_path: Path) -> None:
    x, _ = next(iter(reader(image_folder(tmp_path), True, GREY)[0].epoch()))
    assert x.shape == (4, 1, 16, 16)


@pytest.mark.parametrize(("strength", "changes"), [(None, True), (0.2, True), (0.0, False)])
def test_colours_of_an_image_folder(strength: float | None, changes: bool, tmp_path: Path) -> None:
    for split in ("train", "validation"):
        for name in ("ant", "bee"):
            (tmp_path / split / name).mkdir(parents=True)
            for k in range(4):
                Image.new("RGB", (24, 24), (200, 100, 50)).save(tmp_path / split / name / f"{k}.png")
    data, _ = reader(tmp_path, True, augment="imagenet", color_jitter=strength)
    x, _ = next(iter(data.epoch()))
    assert (float(x.std(dim=0).max()) > 0.02) == changes


@pytest.mark.parametrize("kind", ["none", "flip", "crop_flip", "imagenet"])
def test_image_folder_is_entered_anywhere(kind: str, tmp_path: Path) -> None:
    data, _ = reader(image_folder(tmp_path), True, augment=kind, reprob=0.0 if kind == "none" else 0.5)
    whole = list(data.epoch(2))
    torch.rand(3)
    tail = list(data.epoch(2, 4))
    assert len(tail) == 2
    for (x, y), (x_whole, y_whole) in zip(tail, whole[4:]):
        assert torch.equal(x, x_whole)
        assert torch.equal(y, y_whole)
    assert labels(data, 2) != labels(data, 3)


def test_classes_of_the_test_split_are_those_of_training(tmp_path: Path) -> None:
    """A class without test images must not shift the labels of the others."""
    write_images(tmp_path / "train", ["ant", "bee", "cat"], 4)
    write_images(tmp_path / "validation", ["bee", "cat"], 2)
    config = DataConfig(name="folder", root=str(tmp_path), batch_size=4, workers=0)
    with pytest.raises(BadInput, match="differ in their classes, such as ant"):
        build_batches(config, COLOUR, Process(), training=False)


@pytest.mark.parametrize("kind", ["empty", "unreadable"])
def test_a_class_without_training_images_does_not_shift_the_labels(kind: str, tmp_path: Path) -> None:
    write_images(tmp_path / "train", ["ant", "bee", "cat"], 4)
    write_images(tmp_path / "validation", ["ant", "bee", "cat"], 2)
    for path in (tmp_path / "train" / "bee").iterdir():
        path.unlink() if kind == "empty" else path.rename(path.with_suffix(".heic"))
    with pytest.raises(BadInput, match="validation and train differ in their classes, such as bee"):
        reader(tmp_path, False)


def test_missing_split_is_not_replaced_by_another(tmp_path: Path) -> None:
    """Without a test split the training images must not be taken for it."""
    write_images(tmp_path / "train", ["ant", "bee"], 4)
    with pytest.raises(BadInput, match="validation"):
        reader(tmp_path, False)


@pytest.mark.parametrize(("there", "asked"), [("test", "validation"), ("val", "test")])
def test_a_split_of_another_name_is_not_the_whole_folder(there: str, asked: str, tmp_path: Path) -> None:
    """timm takes the whole folder for a split that it does not find: training images would be tested on."""
    write_images(tmp_path / "train", ["ant", "bee"], 4)
    write_images(tmp_path / there, ["ant", "bee"], 2)
    listed = ", ".join(sorted([there, "train"]))
    with pytest.raises(BadInput, match=rf"no folder {asked}; set data.test_split to one that exists \({listed}\)"):
        reader(tmp_path, False, test_split=asked)
    for nothing in ("", ".", "./"):
        with pytest.raises(BadInput, match=r"no folder .*; set data.test_split to one that exists"):
            reader(tmp_path, False, test_split=nothing)
    with pytest.raises(BadInput, match=r"no folder trainval; set data.train_split to one that exists"):
        reader(tmp_path, True, train_split="trainval")
    assert flat(labels(reader(tmp_path, False, test_split=there)[0])) == [0] * 2 + [1] * 2


def test_classes_are_those_that_the_reader_finds(tmp_path: Path) -> None:
    """Folders without images are no classes, and a class may lie deeper."""
    write_images(tmp_path / "train" / "insects", ["ant", "bee"], 4)
    write_images(tmp_path / "validation", ["ant", "bee"], 2)
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    assert flat(labels(reader(tmp_path, False)[0])) == [0] * 2 + [1] * 2
    write_images(tmp_path / "train" / "insects", ["cat"], 4)
    with pytest.raises(BadInput, match="validation and train differ in their classes, such as cat"):
        reader(tmp_path, False)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_says(orientation: int, tmp_path: Path) -> None:
    picture = Image.fromarray(np.arange(18, dtype=np.uint8).reshape(6, 3))
    picture.getexif()[ExifTags.Base.Orientation] = orientation
    picture.save(tmp_path / "a.png", exif=picture.getexif())
    with Image.open(tmp_path / "a.png") as file:
        expected = np.asarray(ImageOps.exif_transpose(file))
    assert np.array_equal(read_image(tmp_path / "a.png", 1)[0], expected)


def test_odd_exif_does_not_cost_the_picture(tmp_path: Path) -> None:
    """Of a tag of another type than it has to have, Pillow's exif_transpose makes a traceback."""
    picture = Image.fromarray(np.arange(18, dtype=np.uint8).reshape(6, 3))
    entries = [(0x0112, 3, 1, struct.pack("<HH", 6, 0)), (0x0128, 2, 4, b"in\0\0")]  # orientation, unit of resolution
    ifd = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + ifd + bytes(4)
    picture.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as file:
        file.load()
        with pytest.raises((TypeError, struct.error)):
            ImageOps.exif_transpose(file)
    assert np.array_equal(
        read_image(tmp_path / "a.png", 1)[0], np.asarray(picture.transpose(Image.Transpose.ROTATE_270))
    )


def test_what_programs_leave_behind_is_no_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image_folder(tmp_path)
    for place in (".ipynb_checkpoints", "bee/.ipynb_checkpoints", "__MACOSX/bee", "cat/@eaDir/000.png"):
        write_images(tmp_path / "train", [place], 1)
    shutil.copy(tmp_path / "train" / "bee" / "000.png", tmp_path / "train" / "bee" / "._000.png")
    (tmp_path / "train" / "bee" / "self").symlink_to("..")
    for file in ("Thumbs.db", ".DS_Store", "bee/photo.HEIC", "bee/photo2.heic", "cat/notes.txt"):
        (tmp_path / "train" / file).write_bytes(b"")
    train, _ = reader(tmp_path, True)
    assert train.class_names == ("ant", "bee", "cat")
    assert train.num_samples == 24
    assert "3 files of other kinds are left out (.heic, .txt)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (".", "000.png lies in no folder of a class"),
        ("bee/blurry", "holds images and a folder of images, blurry"),
        ("wasps/bee", "would be one class"),
    ],
)
def test_images_of_which_the_class_is_not_clear(place: str, said: str, tmp_path: Path) -> None:
    image_folder(tmp_path)
    shutil.copytree(tmp_path / "train" / "ant", tmp_path / "train" / place, dirs_exist_ok=True)
    for training in (True, False):  # the labels of tests are those of training
        with pytest.raises(BadInput, match=said):
            reader(tmp_path, training)


def test_one_class_is_not_trained_on(tmp_path: Path) -> None:
    write_images(tmp_path / "train", ["ant"], 4)
    with pytest.raises(BadInput, match="holds one class, ant"):
        reader(tmp_path, True)


def test_class_folders_without_splits(tmp_path: Path) -> None:
    """They must not be proposed as splits."""
    write_images(tmp_path, ["ant", "bee"], 4)
    with pytest.raises(
        BadInput, match=r"has no folder train; images belong into .*train.<class> and .*validation.<class>"
    ):
        reader(tmp_path, True)


def test_classes_that_differ_in_case_have_one_order(tmp_path: Path) -> None:
    """timm's is another one in every process."""
    code = "import sys; from tools.image_folders import *; print(*ClassFolders(Path(sys.argv[1])).class_to_idx)"
    write_images(tmp_path, ["b", "B", "01", "1", "10", "2", "a"], 1)
    orders = {
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            env={**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in range(3)
    }  # fmt: skip
    assert orders == {"01 1 2 10 a B b\n"}


def test_without_augmentation_training_sees_what_tests_see(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        for number, name in enumerate(("ant", "bee")):
            (tmp_path / split / name).mkdir(parents=True)
            pixels = np.linspace(0, 255, 64 * 16).reshape(16, 64).astype(np.uint8)[:, :: 1 - 2 * number]
            for k in range(2):
                Image.fromarray(pixels).convert("RGB").save(tmp_path / split / name / f"{k}.png")
    ((x, y),) = reader(tmp_path, True)[0].epoch()
    ((x_test, _),) = reader(tmp_path, False)[0].epoch()
    assert torch.equal(x[y.argsort()], x_test)


@pytest.mark.parametrize("split", ["valid", "eval", "validation"])
def test_names_of_the_validation_split(split: str, tmp_path: Path) -> None:
    image_folder(tmp_path)
    (tmp_path / "validation").rename(tmp_path / "val")
    assert flat(labels(reader(tmp_path, False, test_split=split)[0])) == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.parametrize(("name", "augment"), [("digits", "imagenet"), ("folder", "scale_flip"), ("folder", "volume")])
def test_augmentation_that_the_data_do_not_have(name: str, augment: str, tmp_path: Path) -> None:
    config = DataConfig(name=name, root=str(image_folder(tmp_path)), augment=augment, batch_size=4, workers=0)
    with pytest.raises(BadInput, match=f"data.augment must be none, flip.* for {name}, got {augment}"):
        build_batches(config, COLOUR, Process(), training=True)
    assert len(build_batches(config, GREY, Process(), training=False)[0])


def test_missing_or_empty_image_folders(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="nowhere"):
        reader(tmp_path / "nowhere", True)
    with pytest.raises(BadInput, match=tmp_path.name):
        reader(tmp_path, True)
    (tmp_path / "train" / "ant").mkdir(parents=True)
    with pytest.raises(BadInput, match=tmp_path.name):
        reader(tmp_path, True)


def test_fewer_images_than_a_batch_of_an_image_folder(tmp_path: Path) -> None:
    write_images(tmp_path / "train", ["ant"], 3)
    with pytest.raises(BadInput, match="batch"):
        reader(tmp_path, True)


@pytest.mark.parametrize("name", ["digitz", "foo/bar", "torch/nothing", "hfds/nothing", "wds/nothing", "tfds/nothing"])
def test_unknown_data_set(name: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=name.rpartition("/")[2]):
        build_batches(DataConfig(name=name, root=str(tmp_path / "nowhere")), COLOUR, Process(), training=True)


def test_number_of_training_images_is_for_arrays(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"data\.num_train"):
        reader(image_folder(tmp_path), True, num_train=5)


# Samples held out of the training split.


def test_held_out_samples_are_the_last_ones_and_not_trained_on() -> None:
    whole = read_digits(True).labels
    for limit, expected in ((None, whole[:-100]), (50, whole[:50])):
        config = DataConfig(holdout=100, num_train=limit, batch_size=10)
        train, _ = build_batches(config, GREY, Process(), training=True)
        held, _ = build_batches(config, GREY, Process(), training=False)
        assert torch.equal(train.labels, expected)
        assert torch.equal(held.labels, whole[-100:])
    with pytest.raises(BadInput, match=r"data\.holdout=1437 leaves none of the 1437 training samples"):
        build_batches(DataConfig(holdout=1437), GREY, Process(), training=False)


def test_held_out_samples_need_a_data_set_with_a_name(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"data\.holdout"):
        reader(image_folder(tmp_path), False, holdout=5)


# Image folders as tools/predict.py reads them.


@pytest.mark.parametrize("kind", ["16 bits", "turned", "transparent", "webp"])
def test_a_folder_is_read_as_predictions_are(kind: str, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    folder, name, options = tmp_path / "validation" / "ant", "a.png", {}
    if kind == "16 bits":
        picture = Image.fromarray(pixels[..., 0].astype(np.uint16) * 256)
    elif kind == "transparent":
        picture = Image.fromarray(np.concatenate([pixels, np.zeros_like(pixels[..., :1])], axis=2))
    else:
        picture, name, options = Image.fromarray(pixels), "a.webp", dict(lossless=True)
        if kind == "turned":
            picture.getexif()[ExifTags.Base.Orientation] = 6
            name, options = "a.jpg", dict(exif=picture.getexif())
    for split in ("train", "validation"):
        (tmp_path / split / "ant").mkdir(parents=True)
        picture.save(tmp_path / split / "ant" / name, **options)
    spec = ImageSpec((3, 24, 24), (0.0,) * 3, (1.0,) * 3, crop_pct=1.0)
    x, _ = next(iter(reader(tmp_path, False, spec)[0].epoch()))
    torch.testing.assert_close(x[0], read_image(folder / name, 3) / 255, atol=1e-6, rtol=0)


@pytest.mark.parametrize("workers", [0, 1])
def test_order_and_augmentation_of_a_folder_know_no_processes(workers: int, tmp_path: Path) -> None:
    image_folder(tmp_path)
    config = DataConfig(
        name="folder", root=str(tmp_path), batch_size=4, workers=workers, augment="imagenet", auto_augment="rand-m9"
    )

    def split(rank: int = 0, world: int = 1) -> Batches:
        return build_batches(config, COLOUR, Process(rank, world), training=True, seed=3)[0]

    alone = list(split().epoch(1))
    halves = [list(split(rank, 2).epoch(1, 2)) for rank in (0, 1)]  # from another batch on, too
    assert len(alone) == 6
    for (x, y), (x0, y0), (x1, y1) in zip(alone[2:], *halves, strict=True):
        assert torch.equal(x, torch.stack((x0, x1), dim=1).flatten(0, 1))
        assert y.tolist() == torch.stack((y0, y1), dim=1).flatten().tolist()
    assert not torch.equal(alone[0][0], next(iter(split().epoch(2)))[0])


class Readers(Dataset):
    """A key comes back with the process that read it."""

    def __getitem__(self, key: int) -> tuple[int, int]:
        return key, os.getpid()


def test_workers_stay_from_pass_to_pass() -> None:
    """Also from one that was left in the middle."""
    loader = KeyLoader(Readers(), 2, list, Process())
    first = [sample for batch in loader.batches([[k, k + 1] for k in range(0, 8, 2)]) for sample in batch]
    left = loader.batches([[9]] * 8)
    assert next(left)[0][0] == 9
    second = [sample for batch in loader.batches([[5], [3], [4]]) for sample in batch]
    assert [key for key, _ in first] == list(range(8))
    assert [key for key, _ in second] == [5, 3, 4]
    assert {pid for _, pid in second} == {pid for _, pid in first}
    assert len({pid for _, pid in first} - {os.getpid()}) == 2


def test_crop_flip_moves_images_and_flip_does_not() -> None:
    """By up to an eighth of their side: there padding comes in."""
    image = (torch.arange(256).view(1, 1, 16, 16) % 255 + 1).byte().expand(32, 1, 16, 16).contiguous()
    spec, moved = ImageSpec((1, 16, 16), (0.0,), (1.0,)), {}
    for kind in ("flip", "crop_flip"):
        config = DataConfig(batch_size=32, augment=kind)
        ((x, _),) = ArrayBatches(Arrays(image, torch.arange(32)), spec, config, Process(), training=True).epoch()
        moved[kind] = int((x == 0).flatten(1).any(dim=1).sum())
    assert moved["flip"] == 0
    assert moved["crop_flip"] > 20


def write_large(path: Path) -> None:
    """The header of a picture of 60000x60000 pixels."""
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "png")
    content = bytearray(buffer.getvalue())
    content[16:24] = struct.pack(">II", 60000, 60000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)


def test_a_cifar_image_that_is_a_bomb_is_refused(tmp_path: Path) -> None:
    for kind in CIFAR_CLASSES:
        (tmp_path / "test" / kind).mkdir(parents=True)
    write_large(tmp_path / "test" / CIFAR_CLASSES[0] / "0.png")
    with pytest.raises(BadInput, match=r"cannot read image .*0\.png"):
        build_batches(DataConfig(name="cifar10", root=str(tmp_path)), COLOUR, Process(), training=False)


@pytest.mark.parametrize("root", ["pipe:touch x #", " pipe:true", "https://host/x", "s3://bucket"])
def test_webdatasets_are_not_opened_by_a_shell(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A config.yaml may come along with someone's weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.raises(BadInput, match="webdatasets are read from folders"):
        build_batches(DataConfig(name="wds/imgs", root=root), COLOUR, Process(), training=False)
