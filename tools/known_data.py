"""What is known of the data sets that weights come from: names, licences, citations, classes, caveats."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from tools.data import CIFAR_CLASSES
from tools.segmentation_data import CAMVID_CLASSES, CITYSCAPES_CLASSES


@dataclass(frozen=True)
class Dataset:
    """What a card says of a data set.

    Args:
        title: its name for people.
        licence: that of the data.
        citation: what its authors ask to be cited.
        task: name of the task on the Hub.
        labels: its classes, where the data do not say them.
        caveats: sentences for the section of limits.
        prepared: what goes into the model.
        weights_licence: of weights trained on it, as the Hub spells licences; None where it is not known.
    """

    title: str
    licence: str
    citation: str
    task: str = "image-classification"
    labels: tuple[str, ...] = ()
    caveats: tuple[str, ...] = ()
    prepared: str = ""
    weights_licence: str | None = "apache-2.0"


NO_DEVICE = "It is not a medical device; it must not be used for diagnosis or treatment."
IMAGES = "Images go in as values from 0 to 1, shifted and scaled by the `mean` and `std` of `model.pretrained_cfg`."
DATASETS = {
    "digits": Dataset(
        "scikit-learn's handwritten digits",
        "CC BY 4.0",
        "E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI 1998",
        labels=tuple("0123456789"),
    ),
    "cifar10": Dataset(
        "CIFAR-10",
        "not stated by its authors, who ask for a citation",
        "A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
        labels=CIFAR_CLASSES,
        prepared=IMAGES,
    ),
    "cityscapes": Dataset(
        "Cityscapes",
        "non-commercial use only, see cityscapes-dataset.com/license",
        "M. Cordts et al., The Cityscapes Dataset for Semantic Urban Scene Understanding, CVPR 2016",
        "image-segmentation",
        labels=CITYSCAPES_CLASSES,
        prepared=IMAGES,
        weights_licence="other",
    ),
    "camvid": Dataset(
        "CamVid",
        "CC BY-NC 4.0, personal and research use",
        "G. Brostow et al., Segmentation and Recognition Using Structure from Motion Point Clouds, ECCV 2008; "
        "G. Brostow et al., Semantic Object Classes in Video, Pattern Recognition Letters 2009",
        "image-segmentation",
        labels=CAMVID_CLASSES,
        prepared=f"{IMAGES} Images of the data set are 360 high and 480 wide.",
        weights_licence="cc-by-nc-4.0",
    ),
    "hippocampus": Dataset(
        "Medical Segmentation Decathlon, Task04 Hippocampus",
        "CC BY-SA 4.0",
        "A. Simpson et al., A Large Annotated Medical Image Dataset for the Development and Evaluation of Segmentation "
        "Algorithms, arXiv:1902.09063, 2019; M. Antonelli et al., The Medical Segmentation Decathlon, Nature "
        "Communications 2022",
        "image-segmentation",
        caveats=(
            NO_DEVICE,
            "Train and val are our own split of the labelled volumes: the Decathlon's test labels are not public.",
        ),
        prepared="Volumes go in at their own size, one voxel per mm, each shifted and scaled to mean 0 and variance 1.",
    ),
    "modelnet10": Dataset(
        "ModelNet10, voxelised",
        "academic research only, as far as is known",
        "Z. Wu et al., 3D ShapeNets, CVPR 2015",
        "other",
        caveats=("72 of the 908 test grids equal one of the training grids, and one of them is empty.",),
        prepared="Volumes are occupancies 0 and 1, 30 voxels per axis, the last axis up, the object within the middle "
        "24, padded by zeros to 32.",
        weights_licence="other",
    ),
    "medmnist3d": Dataset(
        "MedMNIST3D",
        "CC BY 4.0",
        "J. Yang et al., MedMNIST v2, Scientific Data 2023",
        "other",
        caveats=(NO_DEVICE,),
    ),
}


ABOUT_DATA = {
    "data_title": "title",
    "data_license": "licence",
    "data_citation": "citation",
    "license": "weights_licence",
}
"""Options that tell of data which the package does not know, and the fields of `Dataset` that they are."""


_unrecorded = partial(Dataset, licence="not recorded", citation="not recorded", weights_licence=None)
OWN = {
    "folder": _unrecorded("own images", prepared=IMAGES),
    "masks": _unrecorded("own images with masks", task="image-segmentation", prepared=IMAGES),
    "nifti": _unrecorded("own volumes", task="image-segmentation", caveats=(NO_DEVICE,)),
}
"""What can be said of data that the package reads and does not know."""


def dataset(name: str) -> Dataset:
    """Return what is known of a data set; of one that is in no table, its name alone."""
    return DATASETS.get(name) or OWN.get(name) or _unrecorded(name)


def data_of(record: Mapping[str, Any]) -> Dataset:
    """Return what is known of the data of a record; of one's own, what was said when the weights were published."""
    return dataclasses.replace(dataset(record["data"]), **record.get("about_data", {}))


def combined_licence(data: str | None, start: str | None) -> str | None:
    """Return the licence of weights that were trained on data from other weights on.

    Args:
        data: that of weights trained on the data alone, as the Hub spells licences; None where it is not known.
        start: that of the weights which the training started from.
    """
    binding = {licence for licence in (data, start) if licence not in (None, "apache-2.0")}
    if binding:
        return binding.pop() if len(binding) == 1 else "other"
    return None if None in (data, start) else "apache-2.0"
