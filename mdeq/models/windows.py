"""Warm starts for windows that overlap: a solve begins where those of the windows before it ended."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers import without_metadata
from ..solvers import FixedPointSolver, SolveStats
from ..state import State
from .backbone import padded
from .segmenter import MDEQSegmenter

Place = Sequence[slice]
"""Where a window lies: slices of the batch (one volume), of the channels and of space, as MONAI gives them."""


class WarmStart:
    """A segmenter as the predictor of a sliding window, with warm starts.

    Where a window overlaps earlier ones its solve starts from their equilibria, elsewhere from zero. The window at the
    origin begins a new volume and forgets the one before, so that a repetition is bitwise identical.

    Args:
        model: the segmenter, in eval mode.
        solver: replaces the model's own.

    Attributes:
        stats: of every solve of the current volume.

    Example:
        >>> predictor = WarmStart(model)
        >>> logits = sliding_window_inference(volume, (32, 32, 32), 1, predictor, overlap=0.5, with_coord=True)
        >>> sum(stats.nfe for stats in predictor.stats)
    """

    def __init__(self, model: MDEQSegmenter, solver: FixedPointSolver | None = None) -> None:
        self.model, self.solver = model, solver
        self.stats: list[SolveStats] = []
        self._seen: dict[int, State] = {}  # per volume of the batch: (C_i, *S_i) of the part seen so far, zero in gaps

    @torch.no_grad()
    def __call__(self, windows: Tensor, places: Sequence[Place] | None = None) -> Tensor:
        """Return logits for windows `(B, C, *S)` of one size, and keep their equilibria.

        Raises:
            TypeError: without the places of the windows.
        """
        if places is None:
            raise TypeError(
                "WarmStart needs the windows' coordinates; call sliding_window_inference with with_coord=True"
            )
        windows = without_metadata(windows)
        for place in places:
            if all(axis.start == 0 for axis in place[2:]):
                self._seen.pop(place[0].start, None)
                self.stats = self.stats if place[0].start else []
        z0 = self._start(windows, places)
        logits, equilibrium = self.model(windows, return_equilibrium=True, z0=z0, solver=self.solver)
        self.stats.append(equilibrium.stats)
        for k, place in enumerate(places):
            found = tuple(z[k] for z in equilibrium.state)
            seen = self._seen.get(place[0].start, tuple(z[:, :0] for z in found))
            corners = [self._corner(place, i) for i in range(len(found))]
            self._seen[place[0].start] = tuple(_pasted(*parts) for parts in zip(seen, found, corners))
        return logits

    def _start(self, windows: Tensor, places: Sequence[Place]) -> State:
        """Return the state to start from: what is known of each window, and zero."""
        whole = padded(windows, self.model.size_divisor)
        size = [-(-s // stride) for s, stride in zip(whole.shape[2:], self.model.stem_stride)]
        z0 = self.model.equilibrium.cell.zero_state(windows.new_zeros((len(windows), 1, *size)))
        for k, place in enumerate(places):
            for i, seen in enumerate(self._seen.get(place[0].start, ())):
                known = seen[_region(self._corner(place, i), z0[i].shape[2:])]
                z0[i][k][_region([0] * (known.ndim - 1), known.shape[1:])] = known
        return z0

    def _corner(self, place: Place, branch: int) -> list[int]:
        """Return where a window begins on a branch, rounded where the window begins between its points."""
        return [round(axis.start / (s * 2**branch)) for axis, s in zip(place[2:], self.model.stem_stride)]


def _region(corner: Sequence[int], size: Sequence[int]) -> tuple[slice, ...]:
    return (slice(None), *(slice(first, first + length) for first, length in zip(corner, size)))


def _pasted(canvas: Tensor, z: Tensor, corner: Sequence[int]) -> Tensor:
    """Return the canvas with z at a corner, grown by zeros where that is needed."""
    growth = [max(first + n - have, 0) for first, n, have in zip(corner, z.shape[1:], canvas.shape[1:])]
    canvas = F.pad(canvas, [side for extra in reversed(growth) for side in (0, extra)])
    canvas[_region(corner, z.shape[1:])] = z
    return canvas
