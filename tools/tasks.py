"""What a run is for: its loss, what is counted and which count stands in the first line, how a test is predicted."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import mdeq
from tools import segmentation_data, volume_data
from tools.batches import VOID, Batches, Process
from tools.config import BadInput, DataConfig, TrainConfig
from tools.inference import Inference, SlidingWindow, whole
from tools.losses import PixelLoss, VolumeLoss
from tools.metrics import DiceTally, MeanLoss, PixelTally, RankTally, Tally
from tools.scores import AUC, DICE, MIOU, TOP1, Score


@dataclass(frozen=True)
class Task:
    """A task.

    Args:
        headline: the metric that stands for a run.
        criterion: loss of training, of logits and labels.
        loss: loss of an evaluation.
        tally: makes what counts over a split; called with whether it is one of training.
        inference: how a test batch is predicted.
    """

    headline: Score = TOP1
    criterion: nn.Module = nn.CrossEntropyLoss()
    loss: nn.Module = nn.CrossEntropyLoss()
    tally: Callable[[bool], MeanLoss] = lambda training: Tally()
    inference: Inference = whole


CLASSIFICATION = Task()


def build_task(
    config: TrainConfig, model: mdeq.Backbone, batches: Batches, process: Process, *, distances: bool = False
) -> Task:
    """Return the task of a config; with `distances` an evaluation of volumes has HD95 too, where mm are known.

    Raises:
        BadInput: for class weights of another number of classes.
    """
    loss, smoothing = config.loss, config.optim.label_smoothing
    if loss.class_weights is not None and len(loss.class_weights) != model.num_classes:
        raise BadInput(
            f"loss.class_weights has {len(loss.class_weights)} entries for {model.num_classes} classes; "
            "give one for each, or loss.class_weights=null"
        )
    if config.task == "classification":
        weight = None if loss.class_weights is None else torch.tensor(loss.class_weights)
        criterion = nn.CrossEntropyLoss(weight, label_smoothing=smoothing).to(next(model.parameters()))
        if config.data.name not in volume_data.NAMES:
            return Task(criterion=criterion)
        headline = AUC if config.data.name == "medmnist3d" else TOP1
        return Task(headline, criterion, tally=lambda training: Tally() if training else RankTally(model.num_classes))
    names = batches.class_names or tuple(str(k) for k in range(model.num_classes))
    names = names + tuple(str(k) for k in range(len(names), model.num_classes))
    windows = SlidingWindow(tuple(config.data.patch_size or ()), config.data.overlap, config.data.batch_size)
    inference = windows if config.data.inference == "sliding" else whole
    if loss.name == "dice_ce":
        criterion, test = VolumeLoss(VOID, loss.class_weights, smoothing), VolumeLoss(VOID)
    else:
        criterion = PixelLoss(VOID, loss.class_weights, loss.ohem_threshold, loss.ohem_min_kept, smoothing)
        test = PixelLoss(VOID)
    criterion.to(process.device)
    if config.data.name in volume_data.NAMES:
        spacings = batches.spacings if distances else None
        return Task(DICE, criterion, test, lambda training: DiceTally(names, VOID, spacings), inference)
    return Task(MIOU, criterion, test, lambda training: PixelTally(names, VOID, process), inference)


_MASKS, _VOLUMES = segmentation_data.NAMES, volume_data.NAMES
_SETTINGS_OF = {
    "images with masks and for volumes": (_MASKS + _VOLUMES, ("patch_size",)),
    "images with masks": (_MASKS, ("scale_range", "ignore_index")),
    "volumes": (_VOLUMES, ("spacing", "normalise", "flip_axes", "turn_axes")),
    "volumes with labels per voxel": (volume_data.SEGMENTED, ("foreground",)),
    "nifti": (("nifti",), ("orientation",)),
}
"""Settings of the data that mean something for some alone: for which, in words and by name."""


def _written(value: object) -> str:
    """Return a value as it is written on a command line."""
    return "null" if value is None else str(value).replace(" ", "")


def _check_settings_of(data: DataConfig) -> None:
    usual = DataConfig()
    for words, (names, keys) in _SETTINGS_OF.items():
        for key in keys:
            if data.name not in names and getattr(data, key) != getattr(usual, key):
                raise BadInput(
                    f"data.{key} is for {words}, not for {data.name}; set data.{key}={_written(getattr(usual, key))}"
                )
    if data.image_size is not None and data.name in _MASKS + _VOLUMES:
        raise BadInput(
            f"data.image_size={data.image_size} is for images with one label each; {data.name} is not resized to one "
            "size, set data.image_size=null"
        )


def check_task(config: TrainConfig, model: mdeq.Backbone) -> None:
    """Raise BadInput if data, model, loss and task do not go together."""
    data, dense = config.data, config.task == "segmentation"
    volumes = data.name in volume_data.NAMES
    if dense != (data.name in volume_data.SEGMENTED + segmentation_data.NAMES):
        kind = "has labels per pixel or voxel" if not dense else "has one label per image"
        raise BadInput(f"data.name={data.name} {kind}; set task={'classification' if dense else 'segmentation'}")
    if dense != isinstance(model, mdeq.MDEQSegmenter):
        raise BadInput(f"{config.model.name} is {'not ' if dense else ''}a segmenter, but task={config.task}")
    if model.spatial_dims != (3 if volumes else 2):
        raise BadInput(
            f"{config.model.name} is a {model.spatial_dims}D model, but {data.name} has {3 if volumes else 2}D data"
        )
    _check_settings_of(data)
    if dense and (data.mixup > 0 or data.cutmix > 0):
        raise BadInput("data.mixup and data.cutmix are for task=classification")
    if volumes and data.cutmix > 0 and len({*(data.patch_size or ())}) > 1:  # timm measures its box by two axes
        raise BadInput("data.cutmix of volumes needs a data.patch_size with equal sides; use data.mixup")
    if (least := min(config.loss.class_weights or [1])) < 0:
        raise BadInput(f"loss.class_weights must be >= 0, got {least}")
    if config.loss.name == "dice_ce" and not (dense and volumes):
        raise BadInput("loss.name=dice_ce is for volume segmentation")
    if not dense and config.loss.ohem_threshold is not None:
        raise BadInput("loss.ohem_threshold is for task=segmentation")
    if config.loss.name == "dice_ce" and config.loss.ohem_threshold is not None:
        raise BadInput("loss.ohem_threshold is for loss.name=cross_entropy")
    if data.inference == "sliding" and (not dense or data.patch_size is None or data.overlap >= 1):
        raise BadInput("data.inference=sliding needs task=segmentation, data.patch_size and data.overlap < 1")
