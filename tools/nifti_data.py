"""NIfTI pairs in the layout of the Medical Segmentation Decathlon: a folder with dataset.json."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tools.batches import memory_for
from tools.config import BadInput
from tools.volumes import Preprocessing, load_labels, load_volume, prepare, prepared_spacing

HOLD_OUT = 5

Pick = Callable[[int], slice]
"""Says which samples of a training split of so many are wanted."""


def read_dataset_json(root: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], tuple[str, ...]]:
    """Return the pairs to train on, those to validate on, and the names of the labels.

    Where dataset.json lists no "validation", every fifth case of "training" is held out.

    Raises:
        BadInput: for a file that is missing or says something else.
    """
    path = root / "dataset.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        names = content["labels"]
        if not isinstance(names, dict) or not all(isinstance(value, str | int) for value in names.values()):
            raise BadInput(f'{path}: "labels" must map numbers to names, such as {{"0": "background", "1": "liver"}}')
        if all(str(value).isdigit() for value in names.values()):  # also written the other way round
            names = {value: name for name, value in names.items()}
        label_names = tuple(str(name) for _, name in sorted((int(value), name) for value, name in names.items()))
        if sorted(int(value) for value in names) != list(range(len(names))):
            raise BadInput(
                f"{path}: the labels must be numbered from 0 without gaps, got {', '.join(map(str, sorted(names)))}; "
                "renumber them there and in the label files"
            )
        if len(names) < 2:
            raise BadInput(f"{path}: expected a label besides the background, got {', '.join(label_names) or 'none'}")
        if len(set(label_names)) < len(label_names):
            raise BadInput(f"{path}: two labels have the same name: {', '.join(label_names)}")
        listed = {key: [dict(pair) for pair in content.get(key, [])] for key in ("training", "validation")}
        pairs = [pair for part in listed.values() for pair in part]
        if not listed["training"] or not all({"image", "label"} <= set(pair) for pair in pairs):
            more = " (that of nnU-Net v2 has no lists; write them)" if "numTraining" in content else ""
            raise BadInput(f'{path}: "training" and "validation" must list pairs of "image" and "label"{more}')
        for value in (pair[key] for pair in pairs for key in ("image", "label")):
            if not isinstance(value, str):
                raise BadInput(
                    f"{path}: images and labels must be one file each (channels in the fourth axis), got {value}"
                )
    except FileNotFoundError:
        raise BadInput(
            f"no dataset.json in {root}; expected the layout of the Medical Segmentation Decathlon"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"{path} does not describe a data set: {type(error).__name__}: {error}") from None
    train, val = listed["training"], listed["validation"]
    if not val:
        val = [pair for k, pair in enumerate(train) if k % HOLD_OUT == 0]
        train = [pair for k, pair in enumerate(train) if k % HOLD_OUT != 0]
    return train, val, label_names


def read_nifti(
    root: Path, split: str, pick: Pick, in_chans: int, preprocessing: Preprocessing
) -> tuple[Sequence[Tensor], Sequence[Tensor], tuple[str, ...], Sequence[tuple[float, ...]]]:
    """Return the prepared volumes of a split, their labels, the names of the labels, and their spacings.

    Raises:
        BadInput: for files that are missing, damaged or do not belong together.
    """
    train, val, names = read_dataset_json(root)
    if split == "test":
        raise BadInput(f"{root}: the Decathlon's test volumes have no labels; set data.test_split=val")
    cases = train if split == "train" else val
    chosen = cases[pick(len(cases))]
    if not chosen:
        raise BadInput(
            f'{root}: too few cases ({len(train) + len(val)}) for a {split} split; without a "validation" list in '
            "dataset.json two are needed"
        )
    images, labels, spacings = [], [], []
    for pair in chosen:
        with memory_for(str(root / pair["image"]), "the voxels of data.spacing", "larger"):
            volume = load_volume(root / pair["image"], in_chans)
            image, label = prepare(volume, preprocessing, load_labels(root / pair["label"], volume, len(names)))
        images.append(image)
        labels.append(label)
        spacings.append(prepared_spacing(volume, preprocessing))
    if split == "train":
        _warn_of_absent(labels, names)
        if both := {pair["image"] for pair in train} & {pair["image"] for pair in val}:
            print(f"warning: {len(both)} cases are trained and validated on, such as {min(both)}", file=sys.stderr)
    return images, labels, names, spacings


def _warn_of_absent(labels: Sequence[Tensor], names: Sequence[str]) -> None:
    """Say so where the labels of the training volumes are all background, or none of them has one of the classes."""
    found = {int(value) for label in labels for value in label.unique()}
    absent = [f"{names[k]} ({k})" for k in range(len(names)) if k not in found]
    if found == {0}:
        print(f"warning: all labels of the {len(labels)} training volumes are 0, {names[0]}", file=sys.stderr)
    elif absent:
        print(f"warning: none of the {len(labels)} training volumes has {', '.join(absent)}", file=sys.stderr)
