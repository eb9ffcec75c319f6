"""The scores of results: their keys, and what people, tables, model cards and the Hub call them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """A score.

    Args:
        key: in the results; of a score per class, what its keys begin with.
        name: as it is printed.
        short: for the heads of tables.
        title: for model cards.
        hub: type of metric on the Hub.
        unit: what follows a number.
    """

    key: str
    name: str
    short: str
    title: str = ""
    hub: str = ""
    unit: str = " %"

    @property
    def per_cent(self) -> bool:
        return self.unit == " %"

    def number(self, value: float, digits: int = 2) -> str:
        """Return a value with so many digits of a per cent."""
        return f"{value:.{digits if self.per_cent else digits + 2}f}"

    def text(self, value: float, digits: int) -> str:
        """Return a value as people read it."""
        return "undefined" if math.isnan(value) else self.number(value, digits) + self.unit  # no class occurs

    def by_class(self, results: Mapping[str, float]) -> dict[str, float]:
        """Return the values of a score per class, by label."""
        found = {key.removeprefix(self.key): value for key, value in results.items() if key.startswith(self.key)}
        return {label: value for label, value in found.items() if self.key + label != UNDEFINED}


UNDEFINED = "hd95_undefined"
"""How many pairs of volume and class have no HD95."""
TOP1 = Score("top1", "accuracy", "top-1", "Top-1 accuracy", "accuracy")
TOP5 = Score("top5", "top-5 accuracy", "top-5", "Top-5 accuracy", "accuracy")
DICE = Score("mean_dice", "mean Dice", "Dice", "Mean Dice", "dice", "")
MIOU = Score("miou", "mIoU", "mIoU", "Mean IoU", "mean_iou")
AUC = Score("auc", "AUC", "AUC", "AUC", "roc_auc", "")
BALANCED = Score("balanced_accuracy", "balanced accuracy", "balanced", "Balanced accuracy", "balanced_accuracy")
PIXELS = Score("pixel_accuracy", "pixel accuracy", "pixels", "Pixel accuracy", "accuracy")
HD95 = Score("hd95", "mean HD95", "HD95", "Mean HD95", "hausdorff_distance", " mm")
SCORES = {score.key: score for score in (TOP1, TOP5, DICE, MIOU, AUC, BALANCED, PIXELS, HD95)}
CLASS_SCORES = (
    Score("dice_", "Dice", "Dice", unit=""),
    Score("iou_", "IoU", "IoU"),
    Score("hd95_", "HD95", "HD95", unit=" mm"),
)
