"""Small data sets for the tests of dense prediction: images with masks, npz files, NIfTI pairs."""

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from PIL import Image

SIZE = (24, 40)  # H, W
SHAPES = ((18, 20, 17), (16, 22, 19), (16, 16, 16), (20, 18, 21), (18, 18, 18))


def blob(shape: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A volume with two bright boxes one behind the other, and their labels 1 and 2."""
    label = np.zeros(shape, np.uint8)
    label[4:10, 4:9, 5:10], label[4:10, 9:14, 5:10] = 1, 2
    noise = np.random.default_rng(seed).normal(0, 5, shape)
    return (100 + 40 * label + noise).astype(np.float32), label


def hippocampus(path: Path, train: int = 3, val: int = 2) -> Path:
    """Write a small file of the hippocampus' kind; return its path."""
    arrays: dict[str, Any] = {"ids": np.arange(1, train + val + 1), "split": np.array([0] * train + [1] * val)}
    for case in arrays["ids"].tolist():
        image, arrays[f"label_{case:03d}"] = blob(SHAPES[case - 1], case)
        lut, code = np.unique(image.round(), return_inverse=True)
        arrays[f"lut_{case:03d}"] = lut.astype(np.float32)
        arrays[f"code_{case:03d}"] = code.reshape(image.shape).astype(np.uint16)
    np.savez(path, **arrays)
    return path


def medmnist(path: Path, shape: tuple[int, ...] = (14, 14, 14), **changes: np.ndarray) -> Path:
    """Write a small file of MedMNIST3D's kind, brighter on one side or the other; return its path."""
    arrays: dict[str, np.ndarray] = {}
    for split, count in (("train", 12), ("val", 4), ("test", 6)):
        labels = np.arange(count, dtype=np.uint8) % 2
        images = np.random.default_rng(count).integers(0, 50, (count, *shape), dtype=np.uint8)
        images[labels == 0, :7] += 200
        images[labels == 1, 7:] += 200
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = images, labels[:, None]
    np.savez(path, **{**arrays, **changes})
    return path


def save_nifti(path: Path, data: np.ndarray, affine: np.ndarray | None = None, codes: int | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(data, np.eye(4) if affine is None else affine)
    if codes is not None:
        image.set_sform(image.affine if codes else None, code=codes)
        image.set_qform(image.affine if codes else None, code=codes)
    nibabel.save(image, path)
    return path


def decathlon(root: Path, count: int = 6) -> Path:
    """Write a data set in the layout of the Medical Segmentation Decathlon; return its folder."""
    pairs = []
    for k in range(count):
        image, label = blob(SHAPES[k % len(SHAPES)], k)
        save_nifti(root / f"imagesTr/case_{k}.nii.gz", image)
        save_nifti(root / f"labelsTr/case_{k}.nii.gz", label)
        pairs.append({"image": f"./imagesTr/case_{k}.nii.gz", "label": f"./labelsTr/case_{k}.nii.gz"})
    labels = {"0": "background", "1": "front", "2": "back"}
    (root / "dataset.json").write_text(json.dumps({"training": pairs, "labels": labels, "modality": {"0": "MRI"}}))
    return root


def picture(k: int, size: tuple[int, int] = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """An image whose red is 20 times its class and whose green is k, and its mask of 3 classes in stripes."""
    mask = (np.arange(size[1]) * 3 // size[1]).astype(np.uint8)[None].repeat(size[0], 0)
    image = np.stack((20 * mask, np.full_like(mask, k), 0 * mask), axis=-1)
    return image, mask


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def masks(root: Path, count: int = 4, size: tuple[int, int] = SIZE) -> Path:
    """Write a folder of pairs with a file of classes."""
    for split in ("train", "val"):
        for k in range(count):
            image, mask = picture(k, size)
            mask[0, 0] = 255
            save(root / split / "images" / f"{k}.png", image)
            save(root / split / "masks" / f"{k}.png", mask)
    (root / "classes.txt").write_text("0 left\n1 middle\n2 right\n")
    return root
