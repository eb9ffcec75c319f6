"""How a test input is predicted: in one piece, by windows, or at several scales."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mdeq import Backbone, SolveStats
from tools.config import optional

Prediction = tuple[Tensor, list[SolveStats]]
"""Logits (or log-probabilities) of a batch, and the statistics of every solve that they took."""

Inference = Callable[..., Prediction]
"""`inference(model, x, **options)`; the options are those of a call of the model."""


def whole(model: Backbone, x: Tensor, **options: Any) -> Prediction:
    """Predict in one piece."""
    logits, equilibrium = model(x, return_equilibrium=True, **options)
    return logits.float(), [equilibrium.stats] if equilibrium.stats is not None else []


@dataclass(frozen=True)
class SlidingWindow:
    """Predict windows of one size and average them with Gaussian weights, by MONAI; what fits is one window.

    Args:
        size: of a window, in pixels or voxels.
        overlap: share of a window that its neighbour covers too.
        batch_size: windows that are predicted together.
        progress: whether a bar counts them.
    """

    size: Sequence[int]
    overlap: float = 0.5
    batch_size: int = 1
    progress: bool = False

    def __call__(self, model: Backbone, x: Tensor, **options: Any) -> Prediction:
        if all(n <= s for n, s in zip(x.shape[2:], self.size)):
            return whole(model, x, **options)
        solves: list[SolveStats] = []

        def predict(windows: Tensor) -> Tensor:
            logits, stats = whole(model, windows, **options)
            solves.extend(stats)
            return logits

        sliding = optional("monai.inferers", "volumes").sliding_window_inference
        how = dict(overlap=self.overlap, mode="gaussian", progress=self.progress)
        logits = sliding(x, tuple(self.size), self.batch_size, predict, **how)
        return logits, solves


@dataclass(frozen=True)
class MultiScale:
    """Average the probabilities over resized and mirrored copies of the images.

    Args:
        scales: factors of height and width.
        flip: whether each scale is also seen mirrored.
        inner: how each copy is predicted.
    """

    scales: Sequence[float] = (1.0,)
    flip: bool = False
    inner: Inference = whole

    def __call__(self, model: Backbone, x: Tensor, **options: Any) -> Prediction:
        size, total, solves = x.shape[2:], torch.zeros((), device=x.device), []
        for scale in self.scales:
            scaled = [max(16, round(scale * n)) for n in size]
            resized = x if scale == 1 else F.interpolate(x, size=scaled, mode="bilinear", antialias=scale < 1)
            for mirrored in (False, True)[: 1 + self.flip]:
                logits, stats = self.inner(model, resized.flip(-1) if mirrored else resized, **options)
                probabilities = (logits.flip(-1) if mirrored else logits).softmax(dim=1)
                if probabilities.shape[2:] != size:
                    probabilities = F.interpolate(probabilities, size=size, mode="bilinear")
                total = total + probabilities
                solves += stats
        return (total / (len(self.scales) * (1 + self.flip))).log(), solves
