"""Volumes: npz sets, NIfTI pairs, what is done to them and undone, and what is wrong with them."""

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from small_sets import SHAPES, blob, decathlon, hippocampus, medmnist, save_nifti
from torch import Tensor

from tools.batches import VOID, Process
from tools.config import BadInput, DataConfig
from tools.volume_data import VolumeBatches, Volumes, augmentation, preprocessing, read_batches, read_split
from tools.volumes import (
    Preprocessing,
    Volume,
    load_labels,
    load_volume,
    normalised,
    padded,
    prepare,
    prepared_spacing,
    resized,
    restore,
    save_labels,
    unpadded,
)


def data(name: str, root: Path, **settings: Any) -> DataConfig:
    values = dict(test_split="val", patch_size=[16, 16, 16], batch_size=2) | settings
    return DataConfig(name=name, root=str(root), **values)


def batches(config: DataConfig, training: bool, process: Process = Process(), seed: int = 0) -> VolumeBatches:
    return read_batches(config, 1, process, training, seed)[0]


def gather(data: VolumeBatches, epoch: int = 0, start: int = 0) -> list[tuple[Tensor, Tensor]]:
    return list(data.epoch(epoch, start))


def same(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> bool:
    return len(a) == len(b) and all(torch.equal(p, q) for x, y in zip(a, b) for p, q in zip(x, y))


# npz files.


def test_hippocampus_is_lut_of_code_normalised(tmp_path: Path) -> None:
    path = hippocampus(tmp_path / "hippocampus.npz")
    for root in (path, tmp_path):  # the file or its folder
        volumes = read_split(data("hippocampus", root), 1, training=True)
        assert [tuple(x.shape) for x in volumes.images] == [(1, *shape) for shape in SHAPES[:3]]
        assert volumes.class_names == ("background", "anterior", "posterior")
        image, label = blob(SHAPES[1], 2)
        expected = image.round()
        expected = (expected - expected.mean()) / expected.std()
        torch.testing.assert_close(volumes.images[1][0], torch.from_numpy(expected), atol=1e-4, rtol=0)
        assert np.array_equal(volumes.labels[1].numpy(), label)
    assert len(read_split(data("hippocampus", path), 1, training=False).images) == 2
    assert len(read_split(data("hippocampus", path, num_train=2), 1, training=True).images) == 2
    parts = [read_split(data("hippocampus", path, holdout=1), 1, training=training) for training in (True, False)]
    assert [x.shape for part in parts for x in part.images] == [x.shape for x in volumes.images]
    assert len(parts[1].images) == 1


def test_test_volumes_stay_whole_and_padding_does_not_count(tmp_path: Path) -> None:
    path = hippocampus(tmp_path / "hippocampus.npz", 1, 4)
    parts = gather(batches(data("hippocampus", path, patch_size=[18, 20, 18], batch_size=4), training=False))
    shapes = [tuple(y.shape) for _, y in parts]
    assert shapes == [(1, 18, 22, 19), (1, 18, 20, 18), (1, 20, 20, 21), (1, 18, 20, 18)]
    for (x, y), case in zip(parts, (2, 3, 4, 5)):
        true = torch.from_numpy(blob(SHAPES[case - 1], case)[1]).long()
        assert torch.equal(unpadded(y[0], true.shape), true)
        assert int((y == VOID).sum()) == y.numel() - true.numel()
        assert bool((x[:, 0][y == VOID] == 0).all())
    same_shape = gather(batches(data("hippocampus", path, patch_size=[24, 24, 24], batch_size=3), training=False))
    assert [len(y) for _, y in same_shape] == [3, 1]


@pytest.mark.parametrize("augment", ["none", "volume"])
def test_training_patches_depend_on_seed_epoch_and_number(augment: str, tmp_path: Path) -> None:
    path = hippocampus(tmp_path / "hippocampus.npz", 5, 0)
    config = data("hippocampus", path, augment=augment, flip_axes=[0], foreground=0.5)
    first = batches(config, training=True)
    parts = gather(first)
    assert [tuple(x.shape) for x, _ in parts] == [(2, 1, 16, 16, 16)] * 2
    assert parts[0][0].dtype == torch.float32
    assert type(parts[0][0]) is Tensor
    assert set(torch.cat([y for _, y in parts]).unique().tolist()) <= {0, 1, 2}
    torch.manual_seed(5)
    assert same(gather(batches(config, training=True)), parts)
    assert same(gather(first, start=1), parts[1:])
    assert not same(gather(first, epoch=1), parts)
    assert not same(gather(batches(config, training=True, seed=1)), parts)


def test_labels_move_with_their_volume(tmp_path: Path) -> None:
    """Where an augmented volume is bright, there its labels are."""
    path = hippocampus(tmp_path / "hippocampus.npz", 5, 0)
    config = data("hippocampus", path, augment="volume", flip_axes=[0], patch_size=[24, 24, 24], batch_size=5)
    x, y = gather(batches(config, training=True))[0]
    means = [float(x[:, 0][y == k].mean()) for k in (0, 1, 2)]
    assert means[0] < 0.3 < means[1] < means[2]


def numbered(tmp_path: Path, shape: tuple[int, ...] = (40, 17, 64), **settings: Any) -> VolumeBatches:
    """A volume whose voxels hold their own number and are of class 1 where that is above a half of them."""
    numbers = torch.arange(int(np.prod(shape))).view(shape)
    volumes = Volumes([numbers[None].float()], [(numbers > numbers.numel() // 2).byte()], ("background", "half"), None)
    config = data("nifti", tmp_path, batch_size=1, **settings)
    return VolumeBatches(volumes, config, Process(), training=True)


def cubes(tmp_path: Path, shape: tuple[int, ...], size: tuple[int, ...], lesion: int, **settings: Any) -> VolumeBatches:
    """A volume that is 100 all over, with a cube of class 1 in the middle."""
    label = torch.zeros(shape, dtype=torch.uint8)
    label[tuple(slice(n // 2 - lesion // 2, n // 2 - lesion // 2 + lesion) for n in shape)] = 1
    volumes = Volumes([torch.full((1, *shape), 100.0)], [label], ("background", "lesion"), None)
    return VolumeBatches(
        volumes, data("nifti", tmp_path, batch_size=1, patch_size=list(size), **settings), Process(), training=True
    )


def test_a_small_lesion_stays_in_the_middle_of_its_patch(tmp_path: Path) -> None:
    """Also where the volume is moved at random."""
    split = cubes(tmp_path, (60, 60, 60), (16, 16, 16), 3, foreground=1.0, augment="volume")
    for epoch in range(20):
        ((_, y),) = gather(split, epoch)
        assert y[0, 7:10, 7:10, 7:10].any()
        assert y[0, 8, 8, 8] == 1


@pytest.mark.parametrize("size", [(16, 16, 16), (16, 64, 64), (32, 16, 24)])
def test_nothing_that_exists_is_missing_from_a_moved_patch(size: tuple[int, ...], tmp_path: Path) -> None:
    """No voxel of a patch in the middle of a volume comes from beyond the volume, where it would be zero."""
    split = cubes(tmp_path, tuple(3 * s for s in size), size, 1, foreground=1.0, augment="volume")
    for epoch in range(30):
        ((x, _),) = gather(split, epoch)
        assert x.min() > 80


@pytest.mark.parametrize("foreground", [0.0, 0.5])
def test_a_patch_of_a_large_volume_is_any_part_of_it(foreground: float, tmp_path: Path) -> None:
    """Where nothing is moved, it holds the voxels of a place, up to the borders; labels are theirs."""
    split = numbered(tmp_path, foreground=foreground)
    numbers = torch.arange(40 * 17 * 64).view(40, 17, 64)
    corners = []
    for epoch in range(60):
        ((x, y),) = gather(split, epoch)
        corner = [int(k) for k in np.unravel_index(int(x[0, 0, 0, 0, 0]), (40, 17, 64))]
        place = tuple(slice(first, first + 16) for first in corner)
        assert torch.equal(x[0, 0], numbers[place].float())
        assert torch.equal(y[0], (numbers[place] > 40 * 17 * 64 // 2).long())
        corners.append(corner)
    low, high = np.min(corners, axis=0), np.max(corners, axis=0)
    assert (low < (6, 1, 10)).all()
    assert (high > (18, 0, 38)).all()


def test_patches_of_a_large_volume_are_centred_on_what_is_asked_for(tmp_path: Path) -> None:
    split = numbered(tmp_path, foreground=1.0)
    assert all(int(gather(split, epoch)[0][1].sum()) > 0 for epoch in range(20))


def test_a_large_volume_is_moved_without_a_border_of_zeros(tmp_path: Path) -> None:
    """A patch in the middle has no voxel from beyond the volume: its surroundings are moved with it."""
    split = numbered(tmp_path, shape=(16, 16, 400), augment="volume", patch_size=[16, 16, 16])
    config = dataclasses.replace(split.config, augment="none")
    still = VolumeBatches(split.data, config, Process(), training=True)
    moved = 0
    for epoch in range(20):
        (x, y), (plain, _) = gather(split, epoch)[0], gather(still, epoch)[0]
        column, before = x[0, 0, 8, 8], plain[0, 0, 8, 8]
        if 20 < int(before[0]) % 400 < 360:
            assert (column.abs() > 1000).all()
        assert tuple(x.shape[2:]) == tuple(y.shape[1:]) == (16, 16, 16)
        assert x[0, 0][y[0] == 1].mean() > 1.5 * x[0, 0][y[0] == 0].mean()  # labels are moved alike
        moved += not torch.equal(x, plain)
    assert moved > 5


def test_two_processes_share_volumes(tmp_path: Path) -> None:
    path = hippocampus(tmp_path / "hippocampus.npz", 4, 1)
    config = data("hippocampus", path, augment="volume")
    whole = gather(batches(config, training=True))
    halves = [gather(batches(config, training=True, process=Process(rank, 2))) for rank in (0, 1)]
    for (x, y), (x0, y0), (x1, y1) in zip(whole, *halves):
        assert torch.equal(torch.cat((x0, x1)), x)
        assert torch.equal(torch.cat((y0, y1)), y)
    shares = [gather(batches(config, training=False, process=Process(rank, 2))) for rank in (0, 1)]
    assert [len(part) for part in shares] == [1, 0]


def test_medmnist_by_path(tmp_path: Path) -> None:
    path = medmnist(tmp_path / "adrenalmnist3d.npz")
    config = data("medmnist3d", path, normalise="minmax")
    x, y = gather(batches(config, training=False))[0]
    assert tuple(x.shape) == (2, 1, 16, 16, 16)
    assert y.tolist() == [0, 1]
    assert (float(x.min()), float(x.max())) == (0.0, 1.0)
    train = batches(config, training=True)
    assert len(train) == 6
    assert sorted(torch.cat([y for _, y in gather(train)]).tolist()) == [0] * 6 + [1] * 6
    assert len(read_split(data("medmnist3d", tmp_path, test_split="test"), 1, training=False).labels) == 6
    medmnist(tmp_path / "nodulemnist3d.npz")
    with pytest.raises(BadInput, match="2 files"):
        read_split(data("medmnist3d", tmp_path), 1, training=True)


def test_turns_are_quarter_turns(tmp_path: Path) -> None:
    path = medmnist(tmp_path / "adrenalmnist3d.npz", shape=(16, 16, 16))
    config = data("medmnist3d", path, normalise="none", turn_axes=[0, 1], batch_size=12)
    turned = gather(batches(config, training=True))[0][0]
    plain = gather(batches(data("medmnist3d", path, normalise="none", batch_size=12), training=True))[0][0]
    turns = [[torch.equal(t, torch.rot90(p, k, (1, 2))) for k in range(4)] for t, p in zip(turned, plain)]
    assert all(any(row) for row in turns)
    assert len({row.index(True) for row in turns}) == 4


def test_class_names_of_a_file(tmp_path: Path) -> None:
    path = medmnist(tmp_path / "modelnet10.npz", classes=np.array(["bed", "sofa", "desk"]))
    assert read_split(data("modelnet10", path), 1, training=True).class_names == ("bed", "sofa", "desk")


@pytest.mark.parametrize(
    ("name", "changes", "settings", "said"),
    [
        ("medmnist3d", {"val_labels": np.array([[0], [1], [0], [9]]), "classes": np.array(["a", "b"])}, {}, "value 9"),
        ("medmnist3d", {"val_images": np.zeros((4, 16, 16))}, {}, "has images (4, 16, 16)"),
        ("medmnist3d", {"val_labels": np.array([[0], [1]])}, {}, "labels (2, 1)"),
        ("medmnist3d", {"val_images": np.full((4, 16, 16, 16), np.nan)}, {}, "NaN"),
        ("medmnist3d", {}, {"test_split": "held-out"}, "unknown split held-out"),
        ("modelnet10", {}, {"test_split": "val"}, "modelnet10*.npz"),
        ("medmnist3d", {}, {"patch_size": [16, 16]}, "data.patch_size"),
        ("medmnist3d", {}, {"patch_size": None}, "data.patch_size"),
        ("medmnist3d", {}, {"patch_size": [16, 16, 8]}, "data.patch_size"),
        ("medmnist3d", {}, {"spacing": [1.0, 1.0, 1.0]}, "is not resampled"),
        ("hippocampus", {}, {"spacing": [3.0, 3.0, 3.0]}, "is not resampled"),
        ("nifti", {}, {"spacing": [-1.0, 1.0, 1.0]}, "data.spacing must be three numbers"),
        ("nifti", {}, {"spacing": [0.0, 1.0, 1.0]}, "data.spacing must be three numbers"),
        ("nifti", {}, {"spacing": [1.0, 1.0]}, "data.spacing must be three numbers"),
        ("medmnist3d", {"val_labels": np.array(["a", "b", "a", "b"])}, {}, "val_labels must be numbers, got <U1"),
        ("medmnist3d", {"val_images": np.zeros((4, 16, 16, 16), np.complex64)}, {}, "val_images must be numbers"),
        ("medmnist3d", {"val_images": np.zeros((4, 0, 16, 16))}, {}, "has images (4, 0, 16, 16)"),
        ("medmnist3d", {"val_images": np.zeros((4, 28, 28, 3))}, {}, "images with channels, not volumes"),
        ("medmnist3d", {"val_labels": np.array([0.0, 1.0, 0.5, 1.0])}, {}, "has the label value 0.5"),
    ],
)
def test_bad_npz(name: str, changes: dict[str, Any], settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    medmnist(tmp_path / "adrenalmnist3d.npz", **changes)
    with pytest.raises(BadInput) as error:
        batches(data(name, tmp_path, **settings), training=False)
    assert said in str(error.value)


def test_damaged_npz(tmp_path: Path) -> None:
    path = hippocampus(tmp_path / "hippocampus.npz")
    content = path.read_bytes()
    for kept in (b"", b"no archive", content[: len(content) // 2], content[:100]):
        path.write_bytes(kept)
        with pytest.raises(BadInput, match="cannot read"):
            read_split(data("hippocampus", path), 1, training=True)
    with pytest.raises(BadInput, match="no data"):
        read_split(data("hippocampus", tmp_path / "nowhere"), 1, training=True)
    np.savez(path, ids=np.array([1]), split=np.array([0]))
    with pytest.raises(BadInput, match="holds no code_001"):
        read_split(data("hippocampus", path), 1, training=True)


def test_big_endian_numbers(tmp_path: Path) -> None:
    images = np.random.default_rng(0).standard_normal((4, 16, 16, 16))
    path = medmnist(tmp_path / "adrenalmnist3d.npz", val_images=images.astype(">f4"))
    found = read_split(data("medmnist3d", path), 1, training=False).images
    assert np.array_equal(found[:, 0].numpy(), images.astype(np.float32))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"split": np.zeros(9, int)}, "is damaged: ids"),
        ({"code_001": np.full(SHAPES[0], 0.5)}, "does not fit its"),
        ({"code_001": np.full(SHAPES[0], -1)}, "does not fit its"),
        ({"code_001": np.full(SHAPES[0], 999)}, "does not fit its"),
        ({"lut_001": np.zeros((2, 2))}, "is damaged: image"),
        ({"label_001": np.full(SHAPES[0], 7)}, "has the label value 7"),
    ],
)
def test_damaged_hippocampus(changes: dict[str, np.ndarray], said: str, tmp_path: Path) -> None:
    path = hippocampus(tmp_path / "hippocampus.npz")
    with np.load(path) as arrays:
        assert set(changes) <= set(arrays.files)
        np.savez(path, **{**arrays, **changes})
    with pytest.raises(BadInput) as error:
        read_split(data("hippocampus", path), 1, training=True)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("name", "orientation"), [("hippocampus", "RAS"), ("modelnet10", "none"), ("medmnist3d", "none"), ("nifti", "RAS")]
)
def test_orientation_is_recorded_where_it_is_known(name: str, orientation: str, tmp_path: Path) -> None:
    assert preprocessing(data(name, tmp_path)).orientation == orientation
    if name == "nifti":
        assert preprocessing(data(name, tmp_path, orientation="none")).orientation == "none"


def test_no_pickles(tmp_path: Path) -> None:
    np.savez(tmp_path / "hippocampus.npz", ids=np.array([{}], dtype=object), split=np.array([0]))
    with pytest.raises(BadInput, match="cannot read ids"):
        read_split(data("hippocampus", tmp_path), 1, training=True)


def test_channels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="has 1 channel, the model takes 3"):
        read_split(data("hippocampus", hippocampus(tmp_path / "hippocampus.npz")), 3, training=True)


# What is done to a volume.


def test_normalisation() -> None:
    x = torch.stack((torch.arange(8.0), 1e6 * torch.arange(8.0) - 5)).view(2, 2, 2, 2)
    z = normalised(x, "zscore").flatten(1)
    torch.testing.assert_close(z.mean(1), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(z.std(1, correction=0), torch.ones(2))
    unit = normalised(x, "minmax").flatten(1)
    assert unit.amin(1).tolist() == [0, 0]
    assert unit.amax(1).tolist() == [1, 1]
    assert torch.equal(normalised(x, "none"), x)


@pytest.mark.parametrize("how", ["zscore", "minmax"])
@pytest.mark.parametrize("value", [0.0, 7.0, 0.1, 1e6 + 0.3])
def test_a_volume_of_zero_variance_becomes_zeros(how: str, value: float) -> None:
    assert torch.equal(normalised(torch.full((1, 5, 6, 7), value), how), torch.zeros(1, 5, 6, 7))


def test_padding_and_back() -> None:
    x = torch.randn(2, 5, 9, 6)
    y = padded(x, (8, 8, 7), 3.0)
    assert tuple(y.shape) == (2, 8, 9, 7)
    assert torch.equal(unpadded(y, x.shape[1:]), x)
    assert torch.equal(y[:, 1:6, :, :6], x)
    assert float(y[:, 0].mean()) == 3.0


def test_volume_is_turned_to_ras_and_back(tmp_path: Path) -> None:
    """Axes left, inferior, anterior in the file: voxel (i, j, k) of RAS is known by hand."""
    array = np.arange(4 * 5 * 6, dtype=np.float32).reshape(4, 5, 6)
    affine = np.array([[-1, 0, 0, 3], [0, 0, 2, 7], [0, -3, 0, 1], [0, 0, 0, 1]], dtype=float)
    volume = load_volume(save_nifti(tmp_path / "x.nii.gz", array, affine))
    assert volume.spacing == (1, 3, 2)
    plain = Preprocessing(normalise="none")
    x, _ = prepare(volume, plain)
    assert tuple(x.shape) == (1, 4, 6, 5)
    for i, j, k in ((0, 0, 0), (3, 2, 1), (1, 5, 4)):
        assert float(x[0, i, j, k]) == array[3 - i, 4 - k, j]
    canonical = nibabel.as_closest_canonical(nibabel.load(tmp_path / "x.nii.gz")).get_fdata()
    assert np.array_equal(x[0].numpy(), canonical)
    labels = torch.from_numpy(array.astype(np.uint8) % 3)
    moved = prepare(volume, plain, labels)[1]
    scores = torch.nn.functional.one_hot(moved.long(), 3).movedim(-1, 0).float()
    assert torch.equal(restore(scores, volume, plain), labels)
    as_it_lies = Preprocessing(orientation="none", normalise="none")
    assert torch.equal(prepare(volume, as_it_lies)[0], torch.from_numpy(array).unsqueeze(0))


def test_resampling_to_a_spacing_and_back(tmp_path: Path) -> None:
    _, label = blob((16, 20, 18))
    affine = np.diag([1.0, 2.0, 0.5, 1.0])
    volume = load_volume(save_nifti(tmp_path / "x.nii", label.astype(np.float32), affine))
    preprocessing = Preprocessing(spacing=(1.0, 1.0, 1.0), normalise="none")
    x, moved = prepare(volume, preprocessing, torch.from_numpy(label))
    assert tuple(x.shape) == (1, 16, 40, 9)
    assert moved.shape == x.shape[1:]
    assert set(moved.unique().tolist()) == {0, 1, 2}
    assert abs(float(x.mean()) - label.mean()) < 0.01
    scores = torch.nn.functional.one_hot(moved.long(), 3).movedim(-1, 0).float()
    back = restore(scores, volume, preprocessing)
    assert back.shape == label.shape
    assert float((back.numpy() == label).mean()) > 0.98


def test_labels_are_saved_with_the_affine_of_their_volume(tmp_path: Path) -> None:
    affine = np.array([[0, -2, 0, 3], [1, 0, 0, 7], [0, 0, 3, 1], [0, 0, 0, 1]], dtype=float)
    volume = load_volume(save_nifti(tmp_path / "x.nii.gz", blob((6, 16, 17))[0], affine))
    save_labels(tmp_path / "y.nii.gz", torch.ones(volume.shape, dtype=torch.uint8), volume)
    saved = nibabel.load(tmp_path / "y.nii.gz")
    assert np.array_equal(saved.affine, affine)
    assert saved.shape == volume.shape
    assert saved.get_data_dtype() == np.uint8


@pytest.mark.parametrize(("sform", "qform"), [(1, 3), (4, 0), (0, 2), (0, 0)])
def test_labels_lie_in_space_as_their_volume(sform: int, qform: int, tmp_path: Path) -> None:
    """Which of the two matrices a file has, what they are of, and units are kept; what is of its voxels is not."""
    image = nibabel.Nifti1Image(blob((6, 16, 17))[0].astype(np.int16), np.diag([2.0, 3.0, 4.0, 1.0]))
    other = np.diag([2.0, 3.0, 4.0, 1.0])
    other[:3, 3] = 5, 6, 7
    image.set_qform(other if qform else None, code=qform)
    image.set_sform(np.diag([-2.0, 3.0, 4.0, 1.0]) if sform else None, code=sform)
    image.header.set_xyzt_units("mm", "sec")
    image.header["cal_max"], image.header["descrip"] = 900, "a scan"
    nibabel.save(image, tmp_path / "x.nii.gz")
    volume = load_volume(tmp_path / "x.nii.gz")
    save_labels(tmp_path / "y.nii.gz", torch.ones(volume.shape, dtype=torch.uint8), volume)
    before, after = (nibabel.load(tmp_path / f"{name}.nii.gz") for name in ("x", "y"))
    assert (int(after.header["sform_code"]), int(after.header["qform_code"])) == (sform, qform)
    for kind in ("sform", "qform"):
        a, b = (getattr(file.header, f"get_{kind}")(coded=True)[0] for file in (before, after))
        assert (a is None) == (b is None)
        assert a is None or np.allclose(a, b)
    assert np.array_equal(after.affine, before.affine)
    assert after.header.get_zooms() == before.header.get_zooms()
    assert after.header.get_xyzt_units() == ("mm", "sec")
    assert float(after.header["cal_max"]) == 0  # or viewers would show every label as black


@pytest.mark.parametrize(("field", "value"), [("quatern_b", 1.1), ("xyzt_units", 7)])
def test_labels_take_over_a_header_with_a_damaged_field_that_does_not_count(
    field: str, value: float, tmp_path: Path
) -> None:
    image = nibabel.Nifti1Image(blob((6, 16, 17))[0].astype(np.int16), np.diag([2.0, 3.0, 4.0, 1.0]))
    image.set_qform(image.affine, code=1)
    image.header[field] = value
    nibabel.save(image, tmp_path / "x.nii.gz")
    volume = load_volume(tmp_path / "x.nii.gz")
    assert volume.spacing == (2.0, 3.0, 4.0)  # by the sform, in mm
    save_labels(tmp_path / "y.nii.gz", torch.ones(volume.shape, dtype=torch.uint8), volume)
    after = nibabel.load(tmp_path / "y.nii.gz")
    assert np.array_equal(after.affine, image.affine)
    assert after.header[field] == pytest.approx(value)


def test_record_of_the_preprocessing_round_trips() -> None:
    preprocessing = Preprocessing((1.0, 1.5, 2.0), "none", "minmax", (16, 24, 32), ("background", "tumour"))
    record = json.loads(json.dumps(preprocessing.record()))
    assert Preprocessing.of_record({**record, "of_later": 1}) == preprocessing
    with pytest.raises(BadInput, match="LPS"):
        Preprocessing.of_record({**record, "orientation": "LPS"})


# NIfTI sets.


def test_decathlon_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = decathlon(tmp_path)
    train, val = (read_split(data("nifti", root), 1, training) for training in (True, False))
    assert train.class_names == ("background", "front", "back")
    assert [len(part.images) for part in (train, val)] == [4, 2]  # every fifth: cases 0 and 5
    assert np.array_equal(val.labels[0].numpy(), blob(SHAPES[0])[1])
    assert [tuple(x.shape) for x in train.images] == [(1, *SHAPES[k]) for k in (1, 2, 3, 4)]
    description = json.loads((root / "dataset.json").read_text())
    description["validation"] = description["training"][:1]
    description["labels"] = {"background": 0, "front": 1, "back": 2}
    (root / "dataset.json").write_text(json.dumps(description))
    again = [read_split(data("nifti", root), 1, training) for training in (True, False)]
    assert [len(part.images) for part in again] == [6, 1]
    told = "warning: 1 cases are trained and validated on, such as"
    assert capsys.readouterr().err.startswith(f"{told} {description['validation'][0]['image']}")
    assert again[0].class_names == train.class_names


def test_two_channels(tmp_path: Path) -> None:
    array = np.stack([blob((16, 17, 18), k)[0] for k in (0, 1)], axis=-1)
    volume = load_volume(save_nifti(tmp_path / "x.nii.gz", array), in_chans=2)
    assert tuple(volume.voxels.shape) == (2, 16, 17, 18)
    assert np.array_equal(volume.voxels[1].numpy(), array[..., 1])
    one = load_volume(save_nifti(tmp_path / "y.nii.gz", array[..., :1]))  # one volume of a series is a volume
    assert tuple(one.voxels.shape) == (1, 16, 17, 18)


def test_without_affine(tmp_path: Path) -> None:
    """Neither sform nor qform: nothing is known of the orientation, so it is asked for; or the axes are taken as is."""
    path = save_nifti(tmp_path / "x.nii.gz", blob((16, 17, 18))[0], codes=0)
    volume = load_volume(path)
    with pytest.raises(BadInput, match=r"data\.orientation=none"):
        prepare(volume, Preprocessing())
    assert tuple(prepare(volume, Preprocessing(orientation="none"))[0].shape) == (1, 16, 17, 18)
    assert load_volume(save_nifti(tmp_path / "y.nii.gz", blob((16, 17, 18))[0], codes=1)).has_affine


def nan_voxels() -> np.ndarray:
    image = blob((16, 16, 16))[0]
    image[3, 4, 5:7] = np.nan, np.inf
    return image


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.zeros((16, 16, 16, 3), np.float32), "is 4-D (16x16x16x3), 3 channel(s); the model takes 1"),
        (np.zeros((16, 16), np.float32), "has the shape (16, 16)"),
        (np.zeros((16, 16, 16, 2, 2), np.float32), "has the shape (16, 16, 16, 2, 2)"),
        (nan_voxels(), "has 2 voxels that are NaN or infinite"),
        (np.zeros((16, 16, 16), [("R", "u1"), ("G", "u1"), ("B", "u1")]), "RGB or complex voxels"),
        (np.zeros((16, 16, 16), np.complex64), "RGB or complex voxels"),
    ],
)
def test_bad_volumes(array: np.ndarray, said: str, tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "x.nii.gz", array)
    with pytest.raises(BadInput) as error:
        load_volume(path)
    assert said in str(error.value)
    assert str(path) in str(error.value)


def test_an_affine_that_is_not_finite(tmp_path: Path) -> None:
    affine = np.eye(4)
    affine[0, 0] = np.nan
    file = nibabel.Nifti1Image(np.zeros((16, 16, 16), np.float32), None)
    file.header.set_sform(affine, code=1)
    nibabel.save(file, tmp_path / "x.nii")
    with pytest.raises(BadInput, match="an affine that is not finite"):
        load_volume(tmp_path / "x.nii")
    file.header["srow_x"] = 0
    nibabel.save(file, tmp_path / "x.nii")
    with pytest.raises(BadInput, match="an affine that is not invertible"):
        load_volume(tmp_path / "x.nii")


@pytest.mark.parametrize("content", [b"", b"no volume", None])
def test_files_that_are_no_volumes(content: bytes | None, tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "x.nii.gz", blob((16, 16, 16))[0])
    path.write_bytes(path.read_bytes()[:500] if content is None else content)
    with pytest.raises(BadInput, match="cannot read volume"):
        load_volume(path)
    with pytest.raises(BadInput, match="no volume"):
        load_volume(tmp_path / "nowhere.nii.gz")


def test_a_bit_of_a_compressed_file_is_wrong(tmp_path: Path) -> None:
    """What is unpacked is as long as it should be, but other voxels: only the checksum at the end says so."""
    path = save_nifti(tmp_path / "x.nii.gz", blob((16, 16, 16))[0])
    content = bytearray(gzip.compress(gzip.decompress(path.read_bytes()), compresslevel=0, mtime=0))
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    nibabel.load(path).get_fdata()
    with pytest.raises(BadInput, match=r"cannot read volume .*x\.nii\.gz: CRC check failed"):
        load_volume(path)


def test_a_file_of_a_surface_is_no_volume(tmp_path: Path) -> None:
    axes = (nibabel.cifti2.ScalarAxis(["thickness"]), nibabel.cifti2.SeriesAxis(0, 1, 4))
    nibabel.save(nibabel.Cifti2Image(np.zeros((1, 4), np.float32), axes), tmp_path / "x.dscalar.nii")
    with pytest.raises(BadInput, match=r"x\.dscalar\.nii is no NIfTI volume but a Cifti2Image"):
        load_volume(tmp_path / "x.dscalar.nii")


def test_names_of_nnunet(tmp_path: Path) -> None:
    save_nifti(tmp_path / "x_0000.nii.gz", blob((16, 16, 16))[0])
    with pytest.raises(BadInput, match=r"no volume .*x\.nii\.gz; rename x_0000\.nii\.gz, or list it"):
        load_volume(tmp_path / "x.nii.gz")


def test_bad_labels(tmp_path: Path) -> None:
    image, label = blob((16, 17, 18))
    volume = load_volume(save_nifti(tmp_path / "x.nii.gz", image))
    good = save_nifti(tmp_path / "good.nii.gz", label.astype(np.float32))
    assert np.array_equal(load_labels(good, volume, 3).numpy(), label)
    for array, said in (
        (label[1:], "has the shape (15, 17, 18), but its image"),
        (label + 1, "has the label value 3; expected whole numbers from 0 to 2"),
        (label - 1.0, "has the label value -1"),
        (label * 0.5, "has the label value 0.5"),
        (np.where(label == 1, np.nan, label), "has the label value nan"),
    ):
        with pytest.raises(BadInput) as error:
            load_labels(save_nifti(tmp_path / "bad.nii.gz", array), volume, 3)
        assert said in str(error.value)
    moved = save_nifti(tmp_path / "moved.nii.gz", label, np.diag([1.0, 1.0, -1.0, 1.0]))
    with pytest.raises(BadInput, match="by their affines they lie up to 34 voxels apart"):
        load_labels(moved, volume, 3)


@pytest.mark.parametrize(
    ("spacing", "offset", "stretch", "aligned"),
    [
        ((1.0, 1.0, 1.0), 0.05, 1.0, True),
        ((1.0, 1.0, 1.0), 0.2, 1.0, False),
        ((0.5, 0.5, 10.0), 0.0, 1.18, False),  # which is little beside the distance of slices
        ((0.5, 0.5, 10.0), 0.04, 1.0, True),
        ((0.5, 0.5, 10.0), 0.08, 1.0, False),
    ],
)
def test_labels_lie_within_a_tenth_of_a_voxel(
    spacing: tuple[float, ...], offset: float, stretch: float, aligned: bool, tmp_path: Path
) -> None:
    image, label = blob((16, 17, 18))
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = 300.0, -200.0, 150.0
    volume = load_volume(save_nifti(tmp_path / "x.nii.gz", image, affine))
    affine[0, 0] *= stretch
    affine[0, 3] += offset
    path = save_nifti(tmp_path / "y.nii.gz", label, affine)
    if aligned:
        assert np.array_equal(load_labels(path, volume, 3).numpy(), label)
    else:
        with pytest.raises(BadInput, match=r"y\.nii\.gz is not aligned with its image"):
            load_labels(path, volume, 3)


@pytest.mark.parametrize("dtype", [np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]), np.complex64])
def test_labels_of_colours_or_complex_numbers(dtype: Any, tmp_path: Path) -> None:
    volume = load_volume(save_nifti(tmp_path / "x.nii.gz", blob((16, 17, 18))[0]))
    path = save_nifti(tmp_path / "y.nii.gz", np.zeros((16, 17, 18), dtype))
    with pytest.raises(BadInput, match="has RGB or complex labels"):
        load_labels(path, volume, 3)


def test_more_classes_than_a_byte_holds(tmp_path: Path) -> None:
    image, label = blob((16, 17, 18))
    volume = load_volume(save_nifti(tmp_path / "x.nii.gz", image))
    with pytest.raises(BadInput, match="255 classes at most, got 300"):
        load_labels(save_nifti(tmp_path / "y.nii.gz", label), volume, 300)


def test_resampling_to_fewer_voxels_averages() -> None:
    """Planes of 1, 0, 0, 0: a fourth of them would be all of one kind."""
    planes = torch.zeros(1, 32, 16, 16)
    planes[:, ::4] = 1
    volume = Volume(planes, np.diag([0.25, 1.0, 1.0, 1.0]))
    x, _ = prepare(volume, Preprocessing((1.0, 1.0, 1.0), "none", "none"))
    assert tuple(x.shape) == (1, 8, 16, 16)
    assert float(x[:, 2:-2].mean()) == pytest.approx(0.25, abs=0.05)
    assert float(x[:, 2:-2].std()) < 0.05


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (1.5, 0.25, 0.5), (0.2, 2.0, 0.5)])
def test_resampling_keeps_a_constant_up_to_the_border(spacing: tuple[float, ...]) -> None:
    volume = Volume(torch.full((1, 20, 21, 22), -1000.0), np.diag([0.5, 0.5, 0.5, 1.0]))
    x, _ = prepare(volume, Preprocessing(spacing, "none", "none"))
    torch.testing.assert_close(x, torch.full_like(x, -1000.0), rtol=1e-5, atol=0)
    assert torch.equal(prepare(volume, Preprocessing(spacing, "none"))[0], torch.zeros_like(x))


def test_resampling_is_linear_and_keeps_places() -> None:
    """A ramp along every axis stays one, at the places of the new voxels' middles; finer, it is what PyTorch makes."""
    ramps = torch.stack(
        torch.meshgrid(*(torch.arange(n, dtype=torch.float32) + 0.5 for n in (24, 16, 20)), indexing="ij")
    )
    coarse = resized(ramps, (8, 8, 10))
    for axis, (factor, n) in enumerate(((3, 8), (2, 8), (2, 10))):
        line = coarse[axis].movedim(axis, -1)[4, 4]
        expected = factor * (torch.arange(n) + 0.5)
        torch.testing.assert_close(line[1:-1], expected[1:-1], rtol=1e-5, atol=1e-4)
    finer = torch.nn.functional.interpolate(ramps[None], size=(30, 16, 41), mode="trilinear")[0]
    torch.testing.assert_close(resized(ramps, (30, 16, 41)), finer, rtol=1e-5, atol=1e-4)


def test_small_voxels_and_other_units(tmp_path: Path) -> None:
    """500 micron are half a millimetre; voxels of a thousandth of one keep their size, and their side."""
    array = blob((16, 17, 18))[0]
    for unit, mm in (("micron", 0.5), ("mm", 500.0), ("unknown", 500.0), ("meter", 500_000.0)):
        image = nibabel.Nifti1Image(array, np.diag([500.0, 500.0, 500.0, 1.0]))
        image.header.set_xyzt_units(unit)
        nibabel.save(image, tmp_path / "x.nii")
        assert load_volume(tmp_path / "x.nii").spacing == pytest.approx((mm,) * 3)
    affine = np.diag([4e-4, 4e-4, 4e-4, 1.0])
    volume = load_volume(save_nifti(tmp_path / "y.nii", array, affine))
    assert prepared_spacing(volume, Preprocessing()) == (4e-4,) * 3
    label = blob((16, 17, 18))[1]
    load_labels(save_nifti(tmp_path / "same.nii", label, affine), volume, 3)
    with pytest.raises(BadInput, match="is not aligned with its image"):
        load_labels(save_nifti(tmp_path / "mirrored.nii", label, affine * [-1, 1, 1, 1]), volume, 3)


def test_a_volume_of_which_nothing_is_left(tmp_path: Path) -> None:
    """Micrometres taken for millimetres, say; a single slice has no extent, and stays one."""
    array, how = blob((16, 17, 18))[0], Preprocessing(spacing=(1.0, 1.0, 1.0))
    thin = load_volume(save_nifti(tmp_path / "thin.nii", array, np.diag([1.0, 1.0, 0.02, 1.0])))
    with pytest.raises(BadInput, match=r"thin.nii has 16x17x18 voxels of 1x1x0.02 mm, of which nothing is left at the"):
        prepare(thin, how)
    slice_alone = load_volume(save_nifti(tmp_path / "slice.nii", array[:, :, :1], np.diag([1.0, 1.0, 0.02, 1.0])))
    assert prepare(slice_alone, how)[0].shape == (1, 16, 17, 1)


def test_labels_with_a_scale_in_their_header(tmp_path: Path) -> None:
    """They are whole but for rounding."""
    image, label = blob((16, 17, 18))
    volume = load_volume(save_nifti(tmp_path / "x.nii", image))
    file = nibabel.Nifti1Image((127 * label).astype(np.uint8), np.eye(4))
    file.header.set_slope_inter(1 / 127, 0)
    nibabel.save(file, tmp_path / "scaled.nii")
    assert set(np.unique(nibabel.load(tmp_path / "scaled.nii").get_fdata())) != {0, 1, 2}
    found = load_labels(tmp_path / "scaled.nii", volume, 3)
    assert torch.equal(found, torch.from_numpy(label.astype(np.uint8)))


def test_labels_that_are_all_background_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = decathlon(tmp_path, 3)
    read_split(data("nifti", root), 1, training=True)
    assert capsys.readouterr().err == ""
    for path in (root / "labelsTr").iterdir():
        save_nifti(path, np.zeros_like(nibabel.load(path).get_fdata()), nibabel.load(path).affine)
    read_split(data("nifti", root), 1, training=True)
    assert "warning: all labels of the 2 training volumes are 0, background" in capsys.readouterr().err


def test_classes_that_no_volume_has_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = decathlon(tmp_path, 3)
    content = json.loads((root / "dataset.json").read_text(encoding="utf-8"))
    content["labels"][str(len(content["labels"]))] = "nowhere"
    (root / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    read_split(data("nifti", root), 1, training=True)
    line = f"warning: none of the 2 training volumes has nowhere ({len(content['labels']) - 1})"
    assert line in capsys.readouterr().err


def test_turns_of_thick_slices_are_small(tmp_path: Path) -> None:
    """Planes of slices are tilted by no more than volumes of cubes are turned."""
    moves = augmentation(data("nifti", tmp_path, augment="volume", spacing=[0.8, 0.8, 6.0]), True, of_room=False)
    turned = next(t for t in moves.transforms if hasattr(t, "rand_affine"))
    assert turned.rand_affine.rand_affine_grid.rotate_range == pytest.approx([0.02, 0.02, 0.15])


def test_spacings_follow_the_order_of_the_test_split(tmp_path: Path) -> None:
    """Of every process its own samples."""
    root = decathlon(tmp_path, 3)
    config = data("nifti", root, test_split="train", batch_size=2)
    sizes = []
    for k in (1, 2):
        image, label = blob((16, 16, 16), k)
        for name, array in (("imagesTr", image), ("labelsTr", label)):
            save_nifti(root / name / f"case_{k}.nii.gz", array, np.diag([1.0, 1.0, float(k), 1.0]))
    for rank in (0, 1):
        found = batches(config, training=False, process=Process(rank, 2))
        sizes.append(found.spacings)
    assert sizes == [[(1.0, 1.0, 1.0)], [(1.0, 1.0, 2.0)]]
    assert batches(config, training=True).spacings is None


def test_an_empty_mask_is_background(tmp_path: Path) -> None:
    image, label = blob((16, 17, 18))
    volume = load_volume(save_nifti(tmp_path / "x.nii.gz", image))
    empty = load_labels(save_nifti(tmp_path / "empty.nii.gz", 0 * label), volume, 3)
    assert empty.unique().tolist() == [0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no dataset.json"),
        ("{", "does not describe a data set"),
        ("[]", "does not describe a data set"),
        ('{"labels": {"0": "a", "1": "b"}}', "must list pairs"),
        ('{"labels": {"0": "a"}, "training": [{"image": "x", "label": "y"}]}', "a label besides the background, got a"),
        ('{"labels": ["a", "b"], "training": [{"image": "x", "label": "y"}]}', '"labels" must map numbers to names'),
        ('{"labels": {"a": 0, "b": [1, 2]}, "training": []}', '"labels" must map numbers to names'),
        ('\ufeff{"labels": {"0": "a", "1": "b"}, "training": []}', "must list pairs"),
        ('{"labels": {"0": "a", "2": "b"}, "training": [{"image": "x", "label": "y"}]}', "numbered from 0"),
        (
            '{"labels": {"0": "a", "1": "a"}, "training": [{"image": "x", "label": "y"}]}',
            "two labels have the same name",
        ),
        ('{"labels": {"0": "a", "1": "b"}, "training": ["x.nii.gz"]}', "does not describe a data set"),
        ('{"labels": {"0": "a", "1": "b"}, "training": [{"image": "x.nii"}]}', "must list pairs"),
        ('{"labels": {"0": "a", "1": "b"}, "training": [{"image": ["x", "y"], "label": "z"}]}', "one file each"),
        ('{"labels": {"0": "a", "1": "b"}, "training": [{"image": "x", "label": "y"}]}', "too few cases (1) for a"),
        ('{"labels": {"a": 0, "b": 1}, "numTraining": 9}', "nnU-Net v2 has no lists; write them"),
    ],
)
def test_bad_dataset_json(text: str | None, said: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "dataset.json").write_text(text, encoding="utf-8")
    with pytest.raises(BadInput) as error:
        read_split(data("nifti", tmp_path), 1, training=True)
    assert said in str(error.value)


def test_voxels_of_a_volume_object() -> None:
    volume = Volume(torch.zeros(1, 4, 5, 6), np.diag([2.0, 3.0, 4.0, 1.0]))
    assert (volume.shape, volume.spacing) == ((4, 5, 6), (2.0, 3.0, 4.0))


@pytest.mark.parametrize("name", ["nifti", "medmnist3d"])
def test_samples_are_held_out_of_whatever_is_trained_on(name: str, tmp_path: Path) -> None:
    path = decathlon(tmp_path / "set", 10) if name == "nifti" else medmnist(tmp_path / "xmnist3d.npz")
    whole = read_split(data(name, path, train_split="val"), 1, training=True)
    held = dict(train_split="val", holdout=1)
    parts = [read_split(data(name, path, **held), 1, training=training) for training in (True, False)]
    assert [len(part.images) for part in parts] == [len(whole.images) - 1, 1]
    assert torch.equal(parts[1].images[0], whole.images[-1])


def numbered_patches(tmp_path: Path, epochs: int = 12, **settings: Any) -> list[Tensor]:
    numbers = torch.arange(16 * 17 * 18).view(16, 17, 18)
    data = Volumes([numbers[None].float()], [(numbers % 3).byte()], ("a", "b", "c"), None)
    values = dict(name="nifti", root=str(tmp_path), batch_size=1, patch_size=[16, 17, 18]) | settings
    split = VolumeBatches(data, DataConfig(**values), Process(), training=True)
    return numbers, [next(split.epoch(k)) for k in range(epochs)]


def test_volumes_are_mirrored_along_the_axes_named(tmp_path: Path) -> None:
    """Along the axes that are named, and no other; labels alike."""
    numbers, parts = numbered_patches(tmp_path, 20, flip_axes=[0, 2], foreground=0.0)
    ways = [numbers.flip(axes) for axes in ([], [0], [2], [0, 2])]
    found = {next(k for k, way in enumerate(ways) if torch.equal(x[0, 0], way.float())) for x, _ in parts}
    assert found == {0, 1, 2, 3}
    assert all(torch.equal(y[0], x[0, 0].long() % 3) for x, y in parts)


def test_moved_labels_are_of_a_class_that_was_there(tmp_path: Path) -> None:
    """Moved labels are of a class that was there: between 0 and 2 there is no 1."""
    label = torch.zeros(24, 24, 24, dtype=torch.uint8)
    label[6:18, 6:18, 6:18] = 2
    data = Volumes([label[None].float()], [label], ("a", "b", "c"), None)
    config = DataConfig(name="nifti", root=str(tmp_path), batch_size=1, patch_size=[24, 24, 24], augment="volume")
    split = VolumeBatches(data, config, Process(), training=True)
    found = torch.cat([next(split.epoch(k))[1] for k in range(6)])
    assert found.unique().tolist() == [0, 2]


def test_volume_augmentation_changes_brightness_contrast_and_noise(tmp_path: Path) -> None:
    """Brightness, contrast and noise change, and do so in the image alone."""
    data = Volumes([torch.ones(1, 16, 16, 16)], [torch.ones(16, 16, 16).byte()], ("a", "b"), None)
    values = dict(name="nifti", root=str(tmp_path), batch_size=1, patch_size=[16, 16, 16], augment="volume")
    split = VolumeBatches(data, DataConfig(**values), Process(), training=True)
    centres = [next(split.epoch(k))[0][0, 0, 6:10, 6:10, 6:10] for k in range(40)]
    assert len({round(float(x.mean()), 3) for x in centres}) > 4
    assert sum(float(x.std()) > 0.03 for x in centres) > 1  # noise


def test_foreground_of_a_volume_hardly_larger_than_a_patch(tmp_path: Path) -> None:
    """Also of a volume that is hardly larger than a patch: with foreground=1 every patch holds some."""
    label = torch.zeros(24, 24, 24, dtype=torch.uint8)
    label[0, 0, 0] = 1
    data = Volumes([label[None].float()], [label], ("a", "b"), None)
    config = DataConfig(name="nifti", root=str(tmp_path), batch_size=1, patch_size=[16, 16, 16], foreground=1.0)
    split = VolumeBatches(data, config, Process(), training=True)
    assert all(int(next(split.epoch(k))[1].sum()) == 1 for k in range(10))


def test_a_part_of_a_sorted_npz_file_has_several_classes(tmp_path: Path) -> None:
    """Files may be sorted by class: the first so many, and the last, are of several."""
    path = medmnist(tmp_path / "adrenalmnist3d.npz", train_labels=np.repeat(np.arange(2, dtype=np.uint8), 6)[:, None])
    config = DataConfig(name="medmnist3d", root=str(path), test_split="val", patch_size=[16, 16, 16], num_train=6)
    assert len(read_split(config, 1, training=True).labels.unique()) == 2


def test_resampled_labels_lie_on_their_volume() -> None:
    """Resampled labels lie where their image does: by the nearest voxel as PyTorch has it they lie half a voxel off."""
    label = torch.zeros(24, 24, 24, dtype=torch.uint8)
    label[6:17, 8:19, 5:16] = 1
    off = []
    for mm in (0.4, 0.55, 0.7, 1.3, 1.7, 2.2):
        x, y = prepare(Volume(label[None].float(), np.eye(4)), Preprocessing((mm,) * 3, "none", "none"), label)
        axes = torch.stack(torch.meshgrid(*(torch.arange(n).double() for n in y.shape), indexing="ij"))
        off.append((axes * y).sum((1, 2, 3)) / y.sum() - (axes * x[0].double()).sum((1, 2, 3)) / x.sum().double())
    assert float(torch.stack(off).mean(0).abs().max()) < 0.15, torch.stack(off)


def test_axes_in_another_order_keep_their_spacing() -> None:
    affine = np.array([[0, 0, 3.0, 0], [1.0, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 0, 1.0]])
    volume = Volume(torch.randn(1, 10, 20, 30), affine)
    assert prepared_spacing(volume, Preprocessing()) == (3.0, 1.0, 2.0)
    assert prepare(volume, Preprocessing((1.0, 1.0, 1.0)))[0].shape == (1, 90, 10, 40)
