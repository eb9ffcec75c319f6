"""Images with masks: data sets, joint transforms, losses and scores, averaged predictions, and bad files."""

import io
import math
import struct
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import rows, run
from PIL import Image
from sklearn.metrics import roc_auc_score
from small_sets import SIZE, masks, picture, save
from test_train_tasks import SMALL, config_file
from torch import Tensor, nn
from torchmetrics.classification import MulticlassJaccardIndex
from torchvision import tv_tensors
from tqdm import tqdm

from tools.batches import VOID, ImageSpec, Process
from tools.config import BadInput, DataConfig, LossConfig, TrainConfig
from tools.engine import with_bar
from tools.images import read_image, read_mask
from tools.inference import MultiScale, SlidingWindow, whole
from tools.losses import PixelLoss, VolumeLoss
from tools.metrics import DiceTally, PixelTally, RankTally
from tools.report import headline_lines
from tools.segmentation_data import (
    CAMVID_CLASSES,
    CITYSCAPES_CLASSES,
    CITYSCAPES_IDS,
    PairBatches,
    RandomScale,
    label_table,
    read_batches,
    read_cityscapes,
)
from tools.tasks import DICE, MIOU, build_task

SPEC = ImageSpec((3, 32, 32), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


def camvid_zip(root: Path) -> Path:
    """Write a file like camvid.zip, listed in an order that is not that of the names."""
    with zipfile.ZipFile(root / "camvid.zip", "w") as archive:
        for split in ("train", "test"):
            names = []
            for k in (2, 0, 1):
                image, mask = picture(k)
                mask[0, 0] = 11
                for name, array in ((f"{split}/{k}.png", image), (f"{split}annot/{k}.png", mask)):
                    file = io.BytesIO()
                    Image.fromarray(array).save(file, "PNG")
                    archive.writestr(name, file.getvalue())
                names.append(f"{split}/{k}.png {split}annot/{k}.png")
            archive.writestr(f"{split}.txt", "\n".join(names))
    return root


def data(name: str, root: Path, **settings: Any) -> DataConfig:
    values = dict(test_split="val", patch_size=[16, 16], batch_size=2, workers=0) | settings
    return DataConfig(name=name, root=str(root), **values)


def batches(config: DataConfig, training: bool, process: Process = Process(), seed: int = 0) -> PairBatches:
    return read_batches(config, SPEC, process, training, seed)[0]


def gather(data: PairBatches, epoch: int = 0, start: int = 0) -> list[tuple[Tensor, Tensor]]:
    return list(data.epoch(epoch, start))


def pixels(x: Tensor) -> Tensor:
    """Undo the normalisation: 0..255."""
    return (255 * (x * torch.tensor(SPEC.std).view(3, 1, 1) + torch.tensor(SPEC.mean).view(3, 1, 1))).round()


def same(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> bool:
    return len(a) == len(b) and all(torch.equal(p, q) for x, y in zip(a, b) for p, q in zip(x, y))


# Data sets.


def test_folder_of_pairs(tmp_path: Path) -> None:
    found = batches(data("masks", masks(tmp_path), batch_size=3), training=False)
    assert found.class_names == ("left", "middle", "right")
    parts = gather(found)
    assert [tuple(y.shape) for _, y in parts] == [(3, *SIZE), (1, *SIZE)]
    x, y = parts[0]
    image, mask = picture(2)
    mask[0, 0] = VOID
    assert torch.equal(pixels(x[2]), torch.from_numpy(image).permute(2, 0, 1).float())
    assert torch.equal(y[2], torch.from_numpy(mask).long())


@pytest.mark.parametrize(
    "text",
    ["0 traffic light\n1 traffic sign\n2 road\n", "traffic light\ntraffic sign\nroad\n",
    "0 traffic light 1 2 3\n1 traffic sign 4 5 6\n2 road 7 8 9\n"],
)  # fmt: skip
def test_names_of_classes_may_have_spaces(text: str, tmp_path: Path) -> None:
    (masks(tmp_path) / "classes.txt").write_text(text)
    assert batches(data("masks", tmp_path), training=True).class_names == ("traffic light", "traffic sign", "road")


@pytest.mark.parametrize(
    "text", ["\ufeff0 left\n1 middle\n2 right\n", "# a comment\n0, left\n1: middle\n2;right", "left\nmiddle\n\nright\n"]
)
def test_ways_to_write_classes(text: str, tmp_path: Path) -> None:
    (masks(tmp_path) / "classes.txt").write_text(text, encoding="utf-8")
    assert batches(data("masks", tmp_path), training=True).class_names == ("left", "middle", "right")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("id name\n0 left\n1 right\n", "got 'id name' among others"),
        ("0 left\nright\n", "got 'right' among others"),
        ("0 left\n0 middle\n1 right\n", "two classes have the same number"),
    ],
)
def test_classes_that_are_unclear(text: str, said: str, tmp_path: Path) -> None:
    (masks(tmp_path) / "classes.txt").write_text(text)
    with pytest.raises(BadInput, match=said):
        batches(data("masks", tmp_path), training=True)


def test_a_class_with_the_number_that_is_ignored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (masks(tmp_path) / "classes.txt").read_text()
    for name, is_class in (("void", False), ("Don't care", False), ("tumour", True)):
        (tmp_path / "classes.txt").write_text(f"{text.rstrip()}\n255 {name}\n")
        batches(data("masks", tmp_path), training=True)
        said = capsys.readouterr().err
        assert said.startswith("warning: 255 tumour of ") == is_class == bool(said)


@pytest.mark.parametrize("value", [0, 255])
def test_masks_of_one_value_are_told(value: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    masks(tmp_path)
    for path in tmp_path.glob("*/masks/*.png"):
        save(path, np.full_like(picture(0)[1], value, dtype=np.uint8))
    if value == 255:
        with pytest.raises(BadInput, match=r"every pixel of the \d+ training masks is data\.ignore_index=255"):
            batches(data("masks", tmp_path), training=True)
        return
    batches(data("masks", tmp_path), training=True)
    assert capsys.readouterr().err == "warning: the first masks hold only class left\n"


def test_masks_of_0_and_255_are_suspicious(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    masks(tmp_path)
    for path in tmp_path.glob("*/masks/*.png"):
        save(path, np.where(picture(0)[1] > 1, 255, 0).astype(np.uint8))
    batches(data("masks", tmp_path), training=True)
    said = capsys.readouterr().err
    assert said.startswith("warning: the first masks hold only class left; 3")
    assert "list it in classes.txt (255 NAME)" in said
    (tmp_path / "classes.txt").write_text("0 background\n255 cell\n")  # as it says
    with pytest.raises(BadInput, match=r"2 to 255 classes .* besides data\.ignore_index=255, got 0 background"):
        batches(data("masks", tmp_path), training=True)
    found = batches(data("masks", tmp_path, ignore_index=254), training=False)
    assert found.class_names == ("background", "cell")
    assert torch.equal(gather(found)[0][1][0], torch.from_numpy(picture(0)[1] > 1).long())
    assert capsys.readouterr().err == ""
    masks(tmp_path)
    batches(data("masks", tmp_path), training=True)
    assert capsys.readouterr().err == ""


def test_two_masks_of_one_name(tmp_path: Path) -> None:
    save(masks(tmp_path) / "train" / "masks" / "0.tif", picture(0)[1])
    with pytest.raises(BadInput, match=r"two masks with the same name: .*0\.png and .*0\.tif"):
        batches(data("masks", tmp_path), training=True)


def test_two_images_of_one_name(tmp_path: Path) -> None:
    """One of them would be learnt by the other's mask."""
    save(masks(tmp_path) / "train" / "images" / "0.tif", picture(0)[0])
    with pytest.raises(BadInput, match=r"two images with the same name: .*0\.png and .*0\.tif"):
        batches(data("masks", tmp_path), training=True)


def test_files_that_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = masks(tmp_path) / "train"
    count = batches(data("masks", tmp_path), training=True).num_samples
    for name in ("images/._0.png", "masks/._0.png", "images/.DS_Store"):
        (root / name).write_bytes(b"hidden")
    batches(data("masks", tmp_path), training=True)
    assert capsys.readouterr().err == ""
    (root / "images" / "more.png").mkdir()
    (root / "images" / "notes.txt").touch()
    save(root / "masks" / "lonely.png", picture(0)[1])
    assert batches(data("masks", tmp_path), training=True).num_samples == count
    left_out, lonely = capsys.readouterr().err.splitlines()
    assert left_out == f"warning: {root / 'images'}: 2 files of other kinds are left out (.png, .txt)"
    assert lonely == f"warning: 1 masks in {root / 'masks'} have no image, such as lonely"
    batches(data("masks", tmp_path), training=False)
    assert capsys.readouterr().err == ""


def test_an_accent_of_its_own(tmp_path: Path) -> None:
    """macOS writes a letter with an accent as two characters."""
    root = masks(tmp_path) / "train"
    count = batches(data("masks", tmp_path), training=True).num_samples
    save(root / "images" / "Gr\u00f6\u00dfe.png", picture(0)[0])
    save(root / "masks" / "Gro\u0308\u00dfe.png", picture(0)[1])
    assert batches(data("masks", tmp_path), training=True).num_samples == count + 1


def test_a_class_that_no_mask_holds_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = masks(tmp_path) / "classes.txt"
    path.write_text(f"{path.read_text().rstrip()}\n7 unicorn\n")
    batches(data("masks", tmp_path), training=True)
    assert capsys.readouterr().err == "warning: no training mask holds unicorn\n"


def grey_png(path: Path, values: np.ndarray, bits: int) -> Path:
    """Write a grey PNG of 1, 2 or 4 bits, which Pillow does not."""
    per_byte = 8 // bits
    rows = np.pad(values, ((0, 0), (0, -values.shape[1] % per_byte))).reshape(len(values), -1, per_byte)
    packed = (rows << np.arange(8 - bits, -1, -bits)).sum(2).astype(np.uint8)
    lines = np.pad(packed, ((0, 0), (1, 0))).tobytes()

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_masks_of_few_bits(bits: int, tmp_path: Path) -> None:
    """Pillow stretches them to 8 bits, by which class 1 would be 85 or 17 and the highest one 255, which is ignored."""
    values = np.arange(5 * 7).reshape(5, 7) % 2**bits
    path = grey_png(tmp_path / "mask.png", values, bits)
    assert np.array_equal(read_mask(path, label_table(2**bits, (VOID,))).numpy(), values)
    with pytest.raises(BadInput, match=f"has the label value {2**bits - 1}, .*{'of 1 bit' if bits == 1 else ''}"):
        read_mask(path, label_table(2**bits - 1, (VOID,)))


def test_images_are_read_as_for_prediction(tmp_path: Path) -> None:
    """On white where they are transparent, and turned as their EXIF says; so is a mask, which has to say the same."""
    image, mask = picture(0)
    glass = Image.fromarray(np.dstack([image, np.where(mask == 2, 0, 255).astype(np.uint8)]))
    glass.save(tmp_path / "glass.png")
    read = read_image(tmp_path / "glass.png", 3)
    assert torch.equal(read[:, 0, -1], torch.tensor([255, 255, 255], dtype=torch.uint8))
    assert np.array_equal(read[:, :, 0].numpy().T, image[:, 0])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    for array, name in ((image, "image.png"), (mask, "mask.png")):
        Image.fromarray(array).save(tmp_path / name, exif=exif)
    assert tuple(read_image(tmp_path / "image.png", 3).shape[1:]) == SIZE[::-1]
    assert np.array_equal(read_mask(tmp_path / "mask.png", label_table(3, (VOID,))).numpy(), np.rot90(mask, -1))
    root = masks(tmp_path / "set")
    Image.fromarray(image).save(root / "val/images/0.png", exif=exif)
    with pytest.raises(BadInput, match=r"0\.png and its mask .*0\.png have different EXIF"):
        gather(batches(data("masks", root), training=False))


def test_pixels_that_are_neither_grey_nor_colours(tmp_path: Path) -> None:
    Image.new("LAB", (20, 20)).save(tmp_path / "lab.tif")
    with pytest.raises(BadInput, match="mode LAB is neither grey nor RGB"):
        read_image(tmp_path / "lab.tif", 1)


def test_class_that_is_ignored_by_its_number(tmp_path: Path) -> None:
    (masks(tmp_path) / "classes.txt").write_text("left\nmiddle\nvoid\n")
    with pytest.raises(BadInput, match="label value 255, which is not a class"):
        gather(batches(data("masks", tmp_path, ignore_index=2), training=False))
    for path in tmp_path.glob("*/masks/*.png"):
        save(path, picture(0)[1])
    found = batches(data("masks", tmp_path, ignore_index=2), training=False)
    assert found.class_names == ("left", "middle")
    assert gather(found)[0][1].unique().tolist() == [0, 1, VOID]


def test_camvid_from_the_zip_and_from_folders(tmp_path: Path) -> None:
    camvid_zip(tmp_path)
    parts = gather(batches(data("camvid", tmp_path, test_split="test"), training=False))
    assert [int(pixels(x)[1].mean()) for part, _ in parts for x in part] == [2, 0, 1]  # in the order of the list
    assert parts[0][1].unique().tolist() == [0, 1, 2, VOID]
    with zipfile.ZipFile(tmp_path / "camvid.zip") as archive:
        archive.extractall(tmp_path / "folders")
    folders = gather(batches(data("camvid", tmp_path / "folders", test_split="test"), training=False))
    assert sorted(int(pixels(x)[1].mean()) for part, _ in folders for x in part) == [0, 1, 2]
    assert batches(data("camvid", tmp_path), training=True).class_names == CAMVID_CLASSES
    whole, *parts = (
        batches(data("camvid", tmp_path, holdout=holdout), training=training).dataset.data.pairs
        for holdout, training in ((None, True), (1, True), (1, False))
    )
    assert [len(part) for part in parts] == [len(whole) - 1, 1]
    assert [*parts[0], *parts[1]] == whole
    with pytest.raises(BadInput, match="validation"):
        batches(data("camvid", tmp_path, test_split="validation"), training=False)
    content = (tmp_path / "camvid.zip").read_bytes()
    (tmp_path / "camvid.zip").write_bytes(content[: len(content) // 2])
    with pytest.raises(BadInput, match="is damaged"):
        batches(data("camvid", tmp_path), training=True)


def test_cityscapes_has_its_train_ids(tmp_path: Path) -> None:
    ids = np.arange(34, dtype=np.uint8).reshape(2, 17).repeat(8, 0)
    save(tmp_path / "leftImg8bit/val/ulm/ulm_000000_000019_leftImg8bit.png", np.zeros((16, 17, 3), np.uint8))
    save(tmp_path / "gtFine/val/ulm/ulm_000000_000019_gtFine_labelIds.png", ids)
    y = gather(batches(data("cityscapes", tmp_path), training=False))[0][1][0]
    expected = [CITYSCAPES_IDS.index(k) if k in CITYSCAPES_IDS else VOID for k in range(34)]
    assert torch.cat((y[0], y[8])).tolist() == expected
    assert len(CITYSCAPES_CLASSES) == 19
    assert (expected[7], expected[11], expected[26], expected[33]) == (0, 2, 13, 18)  # road, building, car, bicycle
    (tmp_path / "gtFine/val/ulm/ulm_000000_000019_gtFine_labelIds.png").unlink()
    with pytest.raises(BadInput, match="has no mask"):
        read_cityscapes(tmp_path, "val")


# Joint transforms.


@pytest.mark.parametrize("augment", ["none", "flip", "scale_flip"])
def test_masks_move_with_their_images(augment: str, tmp_path: Path) -> None:
    config = data("masks", masks(tmp_path), augment=augment, patch_size=[32, 48], batch_size=4)
    x, y = gather(batches(config, training=True))[0]
    assert tuple(x.shape) == (4, 3, 32, 48)
    red = torch.stack([pixels(image)[0] for image in x]) / 20
    known = y != VOID
    close = (red - y).abs()[known] < 0.5
    assert float(close.float().mean()) > (0.9 if augment == "scale_flip" else 0.999)  # bilinear between classes
    assert bool((red[~known] < 0.01).float().mean() > 0.5)  # padding is black and does not count
    assert int((~known).sum()) >= 4


def test_colours_change_and_masks_do_not(tmp_path: Path) -> None:
    root = masks(tmp_path)

    def first(training: bool = True, **settings: Any) -> tuple[Tensor, Tensor]:
        config = data("masks", root, patch_size=[64, 64], batch_size=4, augment="flip", **settings)
        x, y = gather(batches(config, training=training))[0]
        return torch.stack([pixels(image) for image in x]), y

    (plain, labels), (changed, same_labels) = first(), first(color_jitter=0.5)
    for y, z in zip(labels, same_labels):
        assert torch.equal(y.flatten().bincount(), z.flatten().bincount())  # mirrored or not
    assert float((changed - plain).abs().mean()) > 2
    void = (same_labels == VOID).unsqueeze(1).expand_as(changed)
    assert bool((changed[void] < 0.01).float().mean() > 0.5)  # padding comes after the change
    assert torch.equal(first(training=False, color_jitter=0.5)[0], first(training=False)[0])


def test_a_resized_mask_lies_on_its_image() -> None:
    """Resized by the nearest pixel as torchvision does, it would be half a pixel too low and too far right."""
    mask = torch.zeros(60, 80, dtype=torch.uint8)
    mask[20:31, 30:51] = 1
    away = []
    for seed in range(40):
        torch.manual_seed(seed)
        image, resized = RandomScale(0.5, 2)(tv_tensors.Image((255 * mask).expand(3, -1, -1)), tv_tensors.Mask(mask))
        assert isinstance(resized, tv_tensors.Mask)
        assert resized.dtype == torch.uint8
        assert set(resized.unique().tolist()) == {0, 1}
        away.append(centre(resized) - centre(image[0]))
    assert float(torch.stack(away).mean(dim=0).abs().max()) < 0.15


def centre(x: Tensor) -> Tensor:
    """Return the centre of mass of an image `(H, W)`."""
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in x.shape)
    x = x.double()
    return torch.stack(((x.sum(1) * rows).sum(), (x.sum(0) * columns).sum())) / x.sum()


def test_order_and_augmentation_depend_on_seed_epoch_and_number(tmp_path: Path) -> None:
    config = data("masks", masks(tmp_path, 5), augment="scale_flip")
    parts = gather(batches(config, training=True))
    assert [len(y) for _, y in parts] == [2, 2]
    torch.manual_seed(4)
    before = torch.get_rng_state()
    again = batches(config, training=True)
    assert same(gather(again), parts)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(gather(again, start=1), parts[1:])
    assert not same(gather(again, epoch=1), parts)
    assert not same(gather(batches(config, training=True, seed=1)), parts)
    halves = [gather(batches(config, training=True, process=Process(rank, 2))) for rank in (0, 1)]
    for (x, _), (x0, _), (x1, _) in zip(parts, *halves):
        assert torch.equal(torch.cat((x0, x1)), x)


def test_images_of_other_sizes_are_tested_on_their_own(tmp_path: Path) -> None:
    root = masks(tmp_path)
    image, mask = picture(0, (20, 30))
    save(root / "val/images/1.png", image)
    save(root / "val/masks/1.png", mask)
    split, bars = batches(data("masks", root, batch_size=4), training=False), []

    def bar(**kwargs: Any) -> tqdm:
        bars.append(tqdm(file=io.StringIO(), **kwargs))
        return bars[-1]

    parts = list(with_bar(split, Process(), bar)(split.epoch()))
    assert sorted(tuple(y.shape) for _, y in parts) == [(1, 20, 30), (3, *SIZE)]
    assert (bars[0].unit, bars[0].n, bars[0].total) == ("sample", 4, 4), "of the bar of progress"


# Files.


def test_kinds_of_pixels(tmp_path: Path) -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    wide = grey.astype(np.uint16) * 257
    for name, array in (("grey", grey), ("wide", wide), ("rgba", np.dstack([grey] * 4))):
        for channels in (1, 3):
            x = read_image(save(tmp_path / f"{name}.png", array), channels)
            assert tuple(x.shape) == (channels, 16, 16)
            if name != "rgba":
                assert all(np.array_equal(channel.numpy(), grey) for channel in x)
    palette = Image.fromarray(grey % 3, mode=None).convert("P")
    palette.putpalette([9, 9, 9] * 256)
    palette.putdata((grey % 3).ravel().tolist())
    palette.save(tmp_path / "palette.png")
    wide_mask = save(tmp_path / "wide_mask.png", (grey % 3).astype(np.uint16))
    for path in (tmp_path / "palette.png", wide_mask):
        assert np.array_equal(read_mask(path, label_table(3, (VOID,))).numpy(), grey % 3)
    with pytest.raises(BadInput, match="the model takes 4"):
        read_image(tmp_path / "grey.png", 4)


def test_bad_masks_and_images(tmp_path: Path) -> None:
    table = label_table(3, (VOID,))
    mask = picture(0)[1]
    for array, said in (
        (mask + 1, "has the label value 3, which is not a class"),
        (mask.astype(np.uint16) + 300, "has the label value 300"),
        (np.dstack([mask] * 3), "has mode RGB"),
    ):
        with pytest.raises(BadInput, match=said):
            read_mask(save(tmp_path / "x.png", array), table)
    good = save(tmp_path / "good.png", picture(0)[0])
    for content in (b"", b"no image", good.read_bytes()[:60]):
        (tmp_path / "bad.png").write_bytes(content)
        with pytest.raises(BadInput, match=r"cannot read image .*bad\.png"):
            read_image(tmp_path / "bad.png", 3)
    with pytest.raises(BadInput, match="no image"):
        read_image(tmp_path / "nowhere.png", 3)


def test_mask_of_another_size(tmp_path: Path) -> None:
    root = masks(tmp_path)
    save(root / "val/masks/2.png", picture(2, (24, 39))[1])
    with pytest.raises(BadInput, match=r"is 40x24, its mask .*2\.png 39x24"):
        gather(batches(data("masks", root), training=False))


def test_image_under_16_pixels(tmp_path: Path) -> None:
    """No model takes it whole; of a crop it is a part, and the rest does not count."""
    root = masks(tmp_path, size=(12, 40))
    with pytest.raises(BadInput, match=r"0\.png is 40x12; every side must be at least 16 pixels"):
        gather(batches(data("masks", root), training=False))
    (x, y), *_ = gather(batches(data("masks", root, patch_size=[16, 16], augment="none"), training=True))
    assert tuple(x.shape[2:]) == (16, 16)
    assert int((y == VOID).sum()) >= 4 * 16


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"augment": "crop_flip"}, "data.augment"),
        ({"patch_size": [16, 16, 16]}, "data.patch_size"),
        ({"patch_size": [8, 16]}, "data.patch_size"),
        ({"scale_range": [2.0, 0.5]}, "data.scale_range"),
        ({"test_split": "test"}, "expected test/images and test/masks"),
        ({"ignore_index": 300}, "data.ignore_index must be a mask value from 0 to 255, got 300"),
        ({"ignore_index": -100}, "data.ignore_index must be a mask value"),
        ({"root": "/nowhere"}, "no data in /nowhere"),
        ({"name": "camvid"}, "no CamVid"),
        ({"name": "cityscapes"}, "no Cityscapes"),
    ],
)
def test_bad_settings(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    values = {"name": "masks", "root": masks(tmp_path), **settings}
    with pytest.raises(BadInput) as error:
        batches(data(**values), training=False)
    assert said in str(error.value)


def test_crops_are_for_training(tmp_path: Path) -> None:
    config = data("masks", masks(tmp_path), patch_size=None)
    assert len(gather(batches(config, training=False))) == 2
    with pytest.raises(BadInput, match=r"data\.patch_size must be set for masks"):
        batches(config, training=True)


def test_bad_folders_of_pairs(tmp_path: Path) -> None:
    root = masks(tmp_path)
    (root / "val/masks/3.png").unlink()
    with pytest.raises(BadInput, match="has no mask with the same name"):
        batches(data("masks", root), training=False)
    (root / "classes.txt").write_text("0 a\n2 b\n")
    with pytest.raises(BadInput, match="label value 1, which is not a class"):
        batches(data("masks", root), training=True)
    for text in ("", "0 a\n", "0 a\n256 b\n"):
        (root / "classes.txt").write_text(text)
        with pytest.raises(BadInput, match="expected 2 to 255 classes numbered 0 to 255"):
            batches(data("masks", root), training=True)
    (root / "classes.txt").write_text("0 a b\n1 a b\n2 c\n")
    with pytest.raises(BadInput, match="two classes have the same name: a b, a b, c"):
        batches(data("masks", root), training=True)
    (root / "classes.txt").unlink()
    with pytest.raises(BadInput, match="NUMBER NAME"):
        batches(data("masks", root), training=True)


# Losses and scores.


def test_pixel_loss_is_cross_entropy_of_the_pixels_that_count() -> None:
    logits, labels = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    labels[0, 0] = VOID
    counted = labels != VOID
    flat, kept = logits.movedim(1, -1)[counted], labels[counted]
    torch.testing.assert_close(PixelLoss(VOID)(logits, labels), nn.functional.cross_entropy(flat, kept))
    weights = [0.5, 1.0, 2.0]
    expected = nn.functional.cross_entropy(flat, kept, weight=torch.tensor(weights))
    torch.testing.assert_close(PixelLoss(VOID, weights)(logits, labels), expected)
    logits.requires_grad_()
    nothing = PixelLoss(VOID)(logits, torch.full_like(labels, VOID))
    nothing.backward()
    assert (nothing.item(), float(logits.grad.abs().sum())) == (0.0, 0.0)


def test_ohem_counts_hard_pixels_alone() -> None:
    logits = torch.tensor([[[[0.0, 1.0, 2.0, 3.0, 9.0]], [[0.0, 0.0, 0.0, 0.0, 0.0]]]])  # (1, 2, 1, 5)
    labels = torch.tensor([[[0, 0, 0, 0, VOID]]])
    losses = nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=VOID)[0, 0]
    for threshold, kept, count in ((0.8, 1, 2), (0.8, 3, 3), (0.1, 1, 1), (0.99, 1, 4), (0.1, 99, 4)):
        loss = PixelLoss(VOID, threshold=threshold, min_kept=kept)(logits, labels)
        torch.testing.assert_close(loss, losses[:count].mean())


def test_volume_loss_of_a_perfect_and_of_a_wrong_answer() -> None:
    labels = torch.zeros(1, 6, 6, 6, dtype=torch.long)
    labels[0, :3], labels[0, 4] = 1, 2
    perfect = 50.0 * nn.functional.one_hot(labels, 3).movedim(-1, 1)
    loss = VolumeLoss(VOID)
    assert float(loss(perfect, labels)) == pytest.approx(0, abs=1e-3)
    assert float(loss(perfect.roll(1, dims=1), labels)) > 10


def test_smoothing_and_weights_are_of_training_alone() -> None:
    """Both losses take them where a model is trained; a test loss is comparable between recipes."""
    labels = torch.arange(4).view(1, 1, 2, 2) % 2
    logits = torch.randn(1, 2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    plain, smooth = VolumeLoss(VOID), VolumeLoss(VOID, label_smoothing=0.3)
    assert float(smooth(logits, labels) - plain(logits, labels)) == pytest.approx(
        float(
            nn.functional.cross_entropy(logits, labels, label_smoothing=0.3)
            - nn.functional.cross_entropy(logits, labels)
        ),
        abs=1e-6,
    )
    config = TrainConfig(task="segmentation", data=data("hippocampus", Path("x")))
    config.loss = LossConfig("dice_ce", class_weights=[1.0, 5.0])
    config.optim.label_smoothing = 0.1
    task = build_task(config, SimpleNamespace(num_classes=2), SimpleNamespace(class_names=(), spacing=None), Process())
    assert (task.criterion.cross_entropy.label_smoothing, task.loss.cross_entropy.label_smoothing) == (0.1, 0.0)
    assert task.criterion.cross_entropy.class_weights.tolist() == [1.0, 5.0]
    assert task.loss.cross_entropy.class_weights is None


def test_a_score_of_nothing_is_undefined() -> None:
    """Every pixel is void, no voxel is labelled or found: there is no score, and the line says so."""
    tally, logits = PixelTally(("a", "b"), VOID, Process()), torch.zeros(1, 2, 16, 16)
    tally.add(torch.tensor(0.0), logits, torch.full((1, 16, 16), VOID))
    dice = DiceTally(("background", "a"), VOID, [(1.0, 1.0, 1.0)])
    logits = torch.stack((torch.ones(1, 6, 6, 6), torch.zeros(1, 6, 6, 6)), dim=1)
    dice.add(torch.tensor(0.0), logits, torch.zeros(1, 6, 6, 6, dtype=torch.long))
    for headline, result in ((MIOU, tally.summary(Process())), (DICE, dice.summary(Process()))):
        lines = headline_lines(headline, result, result, 4)
        assert lines[0].endswith(": undefined")
        assert "nan" not in " ".join(lines)


def test_iou_equals_torchmetrics_in_parts() -> None:
    names = ("a", "b", "c", "d")
    tally = PixelTally(names, VOID, Process())
    expected = MulticlassJaccardIndex(4, average="none", ignore_index=VOID)
    right = total = 0
    for seed in range(3):
        torch.manual_seed(seed)
        logits, labels = torch.randn(2, 4, 5, 6), torch.randint(0, 3, (2, 5, 6))
        logits[:, 3] = -9  # class d is nowhere: it has no IoU
        labels[0, 0] = VOID
        tally.add(torch.tensor(float(seed)), logits, labels)
        found, counted = logits.argmax(1), labels != VOID
        expected.update(found, labels)
        right, total = right + int((found == labels)[counted].sum()), total + int(counted.sum())
    result, iou = tally.summary(Process()), 100 * expected.compute()
    assert [result[f"iou_{name}"] for name in "abc"] == pytest.approx(iou[:3].tolist())
    assert math.isnan(result["iou_d"])
    assert result["miou"] == pytest.approx(float(iou[:3].mean()))
    assert result["pixel_accuracy"] == pytest.approx(100 * right / total)
    assert result["loss"] == pytest.approx(1.0)


def test_dice_and_hd95_of_boxes() -> None:
    """Boxes of 4x4x4 voxels, one moved by 2 of spacing 1.5 mm: half of each is common, the surfaces are 3 mm apart."""
    labels = torch.zeros(3, 12, 12, 12, dtype=torch.long)
    found = labels.clone()
    labels[:2, 2:6, 4:8, 4:8] = 1
    found[0, 4:8, 4:8, 4:8] = 1
    found[1, 2:6, 4:8, 4:8] = 1
    labels[:, 11], found[:, 11] = VOID, 1  # padding
    found[2, 2, 2, 2] = 1  # a class that is not there: Dice 0, no distance
    spacings = [(1.5, 1.0, 1.0), (1.0, 1.0, 1.0), (1.0, 1.0, 1.0), (3.0, 1.0, 1.0)]
    tally = DiceTally(("background", "box", "nowhere"), VOID, spacings)
    logits = nn.functional.one_hot(found, 3).movedim(-1, 1).float()
    tally.add(torch.tensor(0.0), logits, labels)
    result = tally.summary(Process())
    assert result["dice_box"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert math.isnan(result["dice_nowhere"])
    assert result["mean_dice"] == pytest.approx(0.5)
    assert result["hd95_box"] == pytest.approx((3 + 0) / 2)
    assert result["hd95_undefined"] == 1
    tally.add(torch.tensor(0.0), logits[:1], labels[:1])  # the same box in a volume of another spacing
    assert tally.summary(Process())["hd95_box"] == pytest.approx((3 + 0 + 6) / 3)


def test_auc_and_balanced_accuracy() -> None:
    tally = RankTally(2)
    scores = torch.tensor([0.1, 0.4, 0.35, 0.8])  # of class 1
    tally.add(torch.tensor(0.0), torch.stack((1 - scores, scores), 1).log(), torch.tensor([0, 0, 1, 1]))
    result = tally.summary(Process())
    assert result["auc"] == pytest.approx(0.75)
    assert (result["balanced_accuracy"], result["top1"]) == (75.0, 75.0)
    one = RankTally(2)
    one.add(torch.tensor(0.0), torch.zeros(2, 2), torch.tensor([1, 1]))
    assert math.isnan(one.summary(Process())["auc"])
    assert one.summary(Process())["balanced_accuracy"] == 0.0  # of the class that is there
    sure = RankTally(2)  # probabilities of all four would round to 1 in their own class
    sure.add(
        torch.tensor(0.0),
        torch.tensor([[0.0, 50.0], [0.0, 60.0], [0.0, 70.0], [0.0, 80.0]]),
        torch.tensor([0, 0, 1, 1]),
    )
    assert sure.summary(Process())["auc"] == 1.0


def test_the_loss_of_pixels_is_that_of_no_batch() -> None:
    """The mean over the pixels that count, however the images are put together."""
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 3, 8, 8), torch.randint(0, 3, (4, 8, 8))
    labels[0, :7], labels[1] = VOID, VOID
    for size in (1, 2, 4):
        tally = PixelTally(("a", "b", "c"), VOID, Process())
        for x, y in zip(logits.split(size), labels.split(size)):
            tally.add(PixelLoss(VOID)(x, y), x, y)
        expected = float(nn.functional.cross_entropy(logits, labels, ignore_index=VOID))
        assert tally.summary(Process())["loss"] == pytest.approx(expected, rel=1e-5)


# Predictions.


class Local(nn.Module):
    """Logits that are the pixels themselves; notes the sizes it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, x: Tensor, *, return_equilibrium: bool) -> tuple[Tensor, Any]:
        self.sizes.append(tuple(x.shape[2:]))
        return torch.cat((x, -x), dim=1), SimpleNamespace(stats="stats")


@pytest.mark.parametrize("shape", [(40, 33), (20, 33, 18)])
def test_windows_of_a_local_model_are_the_whole(shape: tuple[int, ...]) -> None:
    model, x = Local(), torch.randn(2, 1, *shape)
    expected, _ = whole(model, x)
    logits, stats = SlidingWindow((16,) * len(shape), 0.5)(model, x)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert set(model.sizes[1:]) == {(16,) * len(shape)}
    assert stats == ["stats"] * (len(model.sizes) - 1)
    once = len(model.sizes)
    assert torch.equal(SlidingWindow(shape, 0.5)(model, x)[0], expected)
    assert len(model.sizes) == once + 1


def test_scales_and_flips_are_averaged() -> None:
    model, x = Local(), torch.randn(1, 1, 32, 48)
    plain = whole(model, x)[0].softmax(1)
    flipped, stats = MultiScale((1.0,), True)(model, x)
    torch.testing.assert_close(flipped.exp(), plain)  # a local model sees the same mirrored
    assert len(stats) == 2
    model.sizes.clear()
    scaled, stats = MultiScale((0.5, 1.0, 1.5), True)(model, torch.full_like(x, 0.3))
    assert sorted(set(model.sizes)) == [(16, 24), (32, 48), (48, 72)]
    assert (len(stats), tuple(scaled.shape)) == (6, (1, 2, 32, 48))
    torch.testing.assert_close(scaled.exp()[0, 0], torch.full((32, 48), 0.3).mul(2).sigmoid())


# The programs.


def test_train_and_validate_a_segmenter(tmp_path: Path) -> None:
    root, folder = masks(tmp_path / "data", size=(20, 32)), tmp_path / "run"
    words = (
        "task=segmentation", "model.name=mdeq_tiny_seg", "model.kwargs={channels: [4, 8], num_groups: 2, expansion: 1}",
        "data.name=masks", "data.test_split=val", "data.patch_size=[16,16]", "data.batch_size=2",
        "data.augment=scale_flip", "loss.ohem_threshold=0.7", "loss.ohem_min_kept=50", "run.epochs=2",
    )  # fmt: skip
    out = run("train", config_file(tmp_path), f"run.out_dir={folder}", f"data.root={root}", *SMALL, *words).ok()
    assert "test mIoU: " in out
    assert "IoU: left " in out
    assert "pixel accuracy " in out
    log = rows(folder)
    assert len(log) == 2
    assert 0 <= float(log[1]["test_miou"]) <= 100
    plain = run("validate", "--checkpoint", folder).ok()
    assert f"test mIoU: {float(log[1]['test_miou']):.2f} %, loss " in plain
    averaged = run("validate", "--checkpoint", folder, "--scales", 1, 1.5, "--flip").ok()
    assert "test mIoU: " in averaged
    assert averaged != plain
    assert "test mIoU: " in run("validate", "--checkpoint", folder, "data.inference=sliding").ok()
    assert "--scales must" in run("validate", "--checkpoint", folder, "--scales", 0).refusal()


def test_volume_loss_is_dice_of_the_foreground_and_cross_entropy() -> None:
    """Dice of the foreground classes alone, plus cross-entropy over the voxels that count."""
    logits, labels = torch.randn(2, 3, 4, 4, 4), torch.randint(0, 3, (2, 4, 4, 4))
    labels[0, 0] = VOID
    p, known = logits.softmax(1), labels.masked_fill(labels == VOID, 0)
    t = nn.functional.one_hot(known, 3).movedim(-1, 1).float()
    axes = (2, 3, 4)
    dice = 1 - (2 * (p * t).sum(axes) + 1e-5) / (p.sum(axes) + t.sum(axes) + 1e-5)
    expected = dice[:, 1:].mean() + nn.functional.cross_entropy(logits, labels, ignore_index=VOID)
    torch.testing.assert_close(VolumeLoss(VOID)(logits, labels), expected)


def test_hard_pixels_keep_weights_and_smoothing() -> None:
    logits, labels = torch.randn(1, 2, 3, 3), torch.randint(0, 2, (1, 3, 3))
    weights, options = [1.0, 5.0], dict(label_smoothing=0.1)
    loss = PixelLoss(VOID, weights, threshold=1.0, **options)(logits, labels)  # every pixel is hard
    expected = nn.functional.cross_entropy(logits, labels, torch.tensor(weights), reduction="none", **options).mean()
    torch.testing.assert_close(loss, expected)


def test_auc_of_three_classes() -> None:
    tally, labels, logits = RankTally(3), torch.arange(30) % 7 % 3, torch.randn(30, 3)
    for x, y in zip(logits.split(7), labels.split(7)):
        tally.add(torch.tensor(0.0), x, y)
    expected = roc_auc_score(labels, logits.double().softmax(1), multi_class="ovr", average="macro")
    assert tally.summary(Process())["auc"] == pytest.approx(expected, abs=1e-9)


def test_mean_dice_is_the_mean_of_the_classes() -> None:
    """The mean of the classes' means: a class in few volumes counts as one in many does."""
    labels = torch.zeros(2, 4, 4, 4, dtype=torch.long)
    labels[:, 0], labels[0, 1] = 1, 2
    found = labels.clone()
    found[1] = 0  # class 1: Dice 1 and 0; class 2: 1, and not there
    tally = DiceTally(("background", "a", "b"), VOID)
    tally.add(torch.tensor(0.0), nn.functional.one_hot(found, 3).movedim(-1, 1).float(), labels)
    assert tally.summary(Process())["mean_dice"] == pytest.approx((0.5 + 1) / 2)


def training_batches(root: Path, **settings: Any) -> PairBatches:
    values = dict(name="masks", root=str(root), test_split="val", batch_size=8, workers=0) | settings
    spec = ImageSpec((3, 32, 32), (0.0,) * 3, (1.0,) * 3)
    return read_batches(DataConfig(**values), spec, Process(), True, 0)[0]


def test_masks_are_mirrored_cropped_and_scaled(tmp_path: Path) -> None:
    """Some are mirrored and some are not, crops lie anywhere, and sizes are of the range that is asked for."""
    root = masks(tmp_path, 8)
    _, y = next(training_batches(root, augment="flip", patch_size=list(SIZE)).epoch())
    assert {tuple(m[4, [0, -1]].tolist()) for m in y} == {(0, 2), (2, 0)}
    _, y = next(training_batches(root, augment="none", patch_size=[16, 16]).epoch())
    assert len({int((m[-1] == 0).sum()) for m in y}) > 2  # columns of the left class
    for low, high in ((1.0, 1.0), (2.0, 3.0)):
        _, y = next(training_batches(root, augment="scale_flip", patch_size=[96, 160], scale_range=[low, high]).epoch())
        widths = {int((m != VOID).any(0).sum()) for m in y}
        assert widths == {40} if high == 1 else (min(widths) >= 80 and len(widths) > 3)


def test_every_mask_has_its_own_crop(tmp_path: Path) -> None:
    """Copies of one image in one batch, and in the next epoch, are cropped at different places."""
    root = masks(tmp_path, 1)
    for k in range(1, 8):
        for kind in ("images", "masks"):
            (root / "train" / kind / f"{k}.png").write_bytes((root / "train" / kind / "0.png").read_bytes())
    data = training_batches(root, augment="flip", patch_size=[16, 16])
    (x, _), (again, _) = next(data.epoch(0)), next(data.epoch(1))
    assert len({tuple(image.flatten().tolist()) for image in x}) > 3
    assert not torch.equal(x, again)
