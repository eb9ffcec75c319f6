"""Losses of dense prediction: cross-entropy over pixels, with hard pixels alone if asked for, and Dice for volumes."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.config import optional


class PixelLoss(nn.Module):
    """Cross-entropy of logits `(B, K, *S)` and labels `(B, *S)`; with a threshold, of the hard pixels alone (OHEM).

    Args:
        ignored: label of pixels that do not count.
        class_weights: per class, or None.
        threshold: a pixel is hard if its own class has less than this probability; None counts all.
        min_kept: at least so many pixels of a batch are counted, the hardest.
        label_smoothing: share of the label that is spread over all classes.

    Reference:
        Shrivastava, Gupta and Girshick, "Training Region-based Object Detectors with Online Hard Example Mining".
    """

    def __init__(
        self,
        ignored: int,
        class_weights: list[float] | None = None,
        threshold: float | None = None,
        min_kept: int = 131_072,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.ignored, self.threshold, self.min_kept = ignored, threshold, min_kept
        self.label_smoothing = label_smoothing
        self.class_weights: Tensor | None
        weights = None if class_weights is None else torch.tensor(class_weights)
        self.register_buffer("class_weights", weights)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        options: dict[str, Any] = dict(ignore_index=self.ignored, label_smoothing=self.label_smoothing)
        counted = labels != self.ignored
        if not counted.any():  # the mean of nothing is NaN, its gradient 0
            return logits.sum() * 0
        weights = None if self.class_weights is None else self.class_weights.to(logits)
        if self.threshold is None:
            return F.cross_entropy(logits, labels, weight=weights, **options)
        losses = F.cross_entropy(logits, labels, weight=weights, reduction="none", **options)[counted]
        own = labels.masked_fill(~counted, 0).unsqueeze(1)
        probability = logits.detach().softmax(dim=1).gather(1, own).squeeze(1)[counted]
        kept = min(self.min_kept, len(probability))
        limit = probability.kthvalue(kept).values.clamp(min=self.threshold)
        return losses[probability <= limit].mean()


class VolumeLoss(nn.Module):
    """MONAI's Dice loss of the foreground classes plus cross-entropy, of logits `(B, K, *S)` and labels `(B, *S)`.

    Args:
        ignored: label of voxels that do not count; the Dice loss takes them for background.
        class_weights: of the cross-entropy, or None.
        label_smoothing: of the cross-entropy.
    """

    def __init__(self, ignored: int, class_weights: list[float] | None = None, label_smoothing: float = 0.0) -> None:
        super().__init__()
        losses = optional("monai.losses", "volumes")
        self.dice = losses.DiceLoss(to_onehot_y=True, softmax=True, include_background=False)
        self.cross_entropy = PixelLoss(ignored, class_weights, label_smoothing=label_smoothing)
        self.ignored = ignored

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        known = labels.masked_fill(labels == self.ignored, 0)
        return self.dice(logits, known.unsqueeze(1)) + self.cross_entropy(logits, labels)
