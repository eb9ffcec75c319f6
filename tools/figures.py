"""Figures of tools/visualize.py, drawn from what tools/studies.py measured."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from mdeq import Backbone, FixedPointSolver, SolveStatus
from tools.metrics import SolveLog
from tools.pictures import Colour, overlaid
from tools.studies import Snapshot

SOLVER_COLOURS = {"Broyden": "#0072B2", "Anderson": "#D55E00", "Picard": "#009E73"}
GREY = "#555555"
CELL = 1.45
"""Inches of a small picture in a row of several."""
DPI = 110
MOST_ENTRIES = 14
"""Lines of a legend of classes."""


def convergence_figure(traces: Mapping[str, np.ndarray], own: str, tol: float | None, title: str) -> Figure:
    """Return a panel for each solver: residual against evaluations, a line for each input and one for their median.

    Args:
        traces: `(evaluations, inputs)` of relative residuals by name of the solver.
        own: name of the model's own solver.
        tol: the model's own relative tolerance.
        title: what was solved.
    """
    figure = Figure(figsize=(3.1 * len(traces) + 0.6, 3.6), layout="constrained")
    panels = figure.subplots(1, len(traces), sharex=True, sharey=True, squeeze=False)[0]
    for ax, (name, table) in zip(panels, traces.items()):
        evaluations, colour = np.arange(1, len(table) + 1), SOLVER_COLOURS[name]
        count = table.shape[1]
        if count > 1:
            ax.plot(evaluations, table, color=colour, alpha=max(0.15, 0.6 / count**0.5), linewidth=0.9)
            ax.plot([], [], color=colour, alpha=0.5, linewidth=0.9, label="one input")
        ax.plot(evaluations, median(table), color=colour, linewidth=2.4, label="median" if count > 1 else "the input")
        words = f"{name}, the model's own" if name == own else name
        if tol is not None:
            ax.axhline(tol, color=GREY, linestyle="--", linewidth=1, label=f"tolerance {tol:g}")
            words += f"\n{reached(table, tol)}"
        ax.set_title(words, fontsize=9)
        ax.set(xlabel="evaluations of f", yscale="log", xlim=(1, len(table)))
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.minorticks_off()
        ax.legend(fontsize=8, loc="best", framealpha=0.8)
        plain(ax)
    panels[0].set_ylabel("relative residual |f(z) - z| / |f(z)|")
    entitle(figure, title)
    return figure


def reached(table: np.ndarray, tol: float) -> str:
    """Return how many inputs came below a tolerance, and by which evaluation half of them had, in words."""
    below = np.nan_to_num(table, nan=np.inf) < tol
    first = np.sort(np.where(below.any(axis=0), below.argmax(axis=0) + 1, np.inf))
    count, half = len(first), first[(len(first) - 1) // 2]
    if count == 1:
        return f"tolerance reached at evaluation {half:.0f}" if np.isfinite(half) else "tolerance not reached"
    when = f", half by evaluation {half:.0f}" if np.isfinite(half) else ""
    return f"{int(np.isfinite(first).sum())} of {count} reach {tol:g}{when}"


def median(table: np.ndarray) -> np.ndarray:
    """Return the median over the second axis of what is not nan; nan where there is nothing."""
    result = np.full(len(table), np.nan)
    some = ~np.isnan(table).all(axis=1)
    result[some] = np.nanmedian(table[some], axis=1)
    return result


def readable(text: str) -> str:
    """Return a text without what cannot be written, such as bytes in names of files that are no UTF-8."""
    return text.encode(errors="replace").decode()


def entitle(figure: Figure, title: str) -> None:
    """Set the title of a whole figure, in lines that fit."""
    lines = textwrap.fill(readable(title), max(40, int(12 * figure.get_figwidth())))
    figure.suptitle(lines, fontsize=11, parse_math=False)


def plain(ax: Axes) -> None:
    """Leave of the frame what is needed."""
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=9)


@dataclass(frozen=True)
class View:
    """How an input and its maps are shown: an image as it is, a volume by one slice across its last axis.

    Args:
        size: of the input.
        depth: number of the slice of the input; None for an image.
        stretch: height of a pixel or voxel over its width.
    """

    size: tuple[int, ...]
    depth: int | None = None
    stretch: float = 1.0

    @classmethod
    def of(cls, x: Tensor, labels: Tensor | None = None, spacing: Sequence[float] | None = None) -> "View":
        """Return the view of an input `(1, C, *S)`: the slice with most labels `(*S)` other than 0, else the middle.

        Its voxels are as long and high as their spacing, in mm along each axis, says.
        """
        size = tuple(x.shape[2:])
        if len(size) == 2:
            return cls(size)
        counts = torch.zeros(size[2]) if labels is None else (labels != 0).sum(dim=(0, 1))
        stretch = 1.0 if spacing is None else spacing[1] / spacing[0]
        return cls(size, int(counts.argmax()) if counts.any() else size[2] // 2, stretch)

    def ratio(self, picture: Image.Image) -> float:
        """Return the height of a picture as it is shown over its width."""
        return self.stretch * picture.height / picture.width

    def flat(self, values: Tensor) -> np.ndarray:
        """Return values `(*S_i)`, of the input's size or coarser, as a picture `(H, W)`."""
        array = values.float().cpu().numpy() if values.is_floating_point() else values.cpu().numpy()
        if self.depth is None:
            return array
        level = min(self.depth * array.shape[2] // self.size[2], array.shape[2] - 1)
        return array[:, ::-1, level].T  # the first axis to the right, the second upwards

    @property
    def about(self) -> str:
        return "" if self.depth is None else f", slice {self.depth + 1} of {self.size[2]} of the last axis"


def input_picture(x: Tensor, model: Backbone, view: View) -> Image.Image:
    """Return what a model sees of an input `(1, C, *S)`, in colour or grey."""
    values = x[0].float().cpu()
    if view.depth is None:
        cfg = model.pretrained_cfg
        if len(cfg["mean"]) == len(values):
            mean, std = (torch.tensor(cfg[key]).view(-1, 1, 1) for key in ("mean", "std"))
            values = values * std + mean
        if len(values) == 3:
            return Image.fromarray((255 * values.clamp(0, 1)).round().byte().permute(1, 2, 0).numpy())
    grey = view.flat(values.mean(dim=0))
    low, high = np.percentile(grey, (0.5, 99.5))
    return Image.fromarray((255 * np.clip((grey - low) / max(high - low, 1e-12), 0, 1)).astype(np.uint8))


def features_figure(
    snapshots: Sequence[Snapshot], picture: Image.Image, view: View, names: Sequence[str], title: str
) -> Figure:
    """Return the maps of every branch at several points: the root mean square over its channels, one scale a branch.

    Args:
        snapshots: the points, in the order of the columns.
        picture: of the input.
        view: which slice of a volume.
        names: of the classes.
        title: of the whole.
    """
    branches, columns = len(snapshots[0].state), len(snapshots) + 1
    ratio = view.ratio(picture)
    row = max(CELL * ratio, 0.8)  # room for the two lines beside it
    figure = Figure(figsize=(CELL * columns + 1.1, row * branches + 0.95), layout="constrained")
    axes = figure.subplots(branches, columns, squeeze=False)
    for i in range(branches):
        maps = [view.flat(s.state[i][0].float().square().mean(dim=0).sqrt()) for s in snapshots]
        finite = np.concatenate([m[np.isfinite(m)] for m in maps] or [np.zeros(1)])
        low, high = np.percentile(finite, (0.5, 99.5)) if len(finite) else (0.0, 1.0)
        drawn: Any = None
        for ax, values in zip(axes[i, 1:], maps):
            drawn = ax.imshow(values, cmap="viridis", vmin=low, vmax=high, aspect="auto", interpolation="nearest")
            ax.set_box_aspect(ratio)
            bare(ax)
        bar = figure.colorbar(drawn, ax=axes[i, 1:].tolist(), fraction=0.04, pad=0.01, aspect=14)
        bar.ax.tick_params(labelsize=7)
        shape = snapshots[0].state[i].shape
        axes[i, 1].set_ylabel(f"branch {i}\n{shape[1]} x {'x'.join(map(str, shape[2:]))}", fontsize=8)
        axes[i, 0].axis("off")
    axes[0, 0].axis("on")
    show(axes[0, 0], picture, "input", view)
    for ax, snapshot in zip(axes[0, 1:], snapshots):
        ax.set_title(heading(snapshot) + likeliest(snapshot, names), fontsize=9, parse_math=False)
    entitle(figure, title)
    return figure


def heading(snapshot: Snapshot) -> str:
    residual = "" if snapshot.residual is None else f"\nresidual {snapshot.residual:.1e}"
    return snapshot.title + residual


def likeliest(snapshot: Snapshot, names: Sequence[str]) -> str:
    """Return the class of a classifier's logits and its probability, as one more line."""
    if snapshot.logits.ndim > 2:
        return ""
    probability, index = snapshot.logits[0].double().softmax(dim=0).max(dim=0)
    return f"\n{names[int(index)]} {100 * float(probability):.0f} %"


def show(ax: Axes, picture: Image.Image, title: str, view: View) -> None:
    ax.imshow(np.asarray(picture), cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect=view.stretch)
    ax.set_title(title, fontsize=9)
    bare(ax)


def bare(ax: Axes) -> None:
    """Take away ticks and frame."""
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


@dataclass(frozen=True)
class Painter:
    """How label maps are drawn: names and colours of the classes, the one that stays clear, the input, the view."""

    names: Sequence[str]
    colours: Sequence[Colour]
    clear: int | None
    picture: Image.Image
    view: View

    def paint(self, labels: Tensor) -> Image.Image:
        """Return labels `(*S)` laid over the input; those that are no class are left out."""
        flat = self.view.flat(labels)
        known = flat < len(self.names)
        painted = overlaid(self.picture, np.where(known, flat, 0), self.colours, self.clear, opacity=0.6)
        return Image.composite(painted, self.picture.convert("RGB"), Image.fromarray(known))


def labels_figure(
    way: Sequence[Snapshot],
    twins: Sequence[Snapshot],
    settled: Snapshot,
    truth: Tensor | None,
    painter: Painter,
    title: str,
) -> Figure:
    """Return two rows of label maps: of the solver up to the equilibrium, and of the explicit twin."""
    view, ratio = painter.view, painter.view.ratio(painter.picture)
    columns = len(way) + 2
    maps = [snapshot.logits[0].argmax(dim=0) for snapshot in (*way, settled, *twins)]
    final = maps[len(way)]
    painted = {int(k) for labels in (*maps, *([] if truth is None else [truth])) for k in np.unique(view.flat(labels))}
    present = [k for k in range(len(painter.names)) if k in painted and k != painter.clear]
    patches = [
        Patch(color="#{:02x}{:02x}{:02x}".format(*painter.colours[k]), label=painter.names[k].replace("$", r"\$"))
        for k in present[:MOST_ENTRIES]
    ]
    if len(present) > MOST_ENTRIES:
        patches.append(Patch(color="none", label=f"and {len(present) - MOST_ENTRIES} more"))
    rows = [CELL * ratio + 0.42, max(CELL * ratio, 0.13 * len(patches)) + 0.42]  # the second has the legend
    figure = Figure(figsize=(CELL * columns + 0.2, sum(rows) + 0.75), layout="constrained")
    axes = figure.subplots(2, columns, squeeze=False, height_ratios=rows)
    show(axes[0, 0], painter.picture, "input", view)
    for ax, snapshot, labels in zip((*axes[0, 1:], *axes[1, 1:]), (*way, settled, *twins), maps):
        show(ax, painter.paint(labels), heading(snapshot), view)
        if snapshot is not settled:
            ax.set_xlabel(f"{100 * float((labels != final).float().mean()):.2f} % differ", fontsize=8)
    for ax in (axes[1, 0], axes[1, -1]):
        ax.axis("off")
    if truth is not None:
        axes[1, 0].axis("on")
        show(axes[1, 0], painter.paint(truth), "labels of the data", view)
    axes[1, -1].legend(handles=patches, loc="center", fontsize=8 if len(patches) < 9 else 6, frameon=False)
    entitle(figure, title)
    return figure


def evaluations_figure(log: SolveLog, solver: FixedPointSolver, title: str) -> Figure:
    """Return a histogram of evaluations of f, apart for samples that converged and others."""
    counts = torch.cat(log.evaluations).cpu().numpy()
    converged = (torch.cat(log.status) == SolveStatus.CONVERGED).cpu().numpy()
    figure = Figure(figsize=(6.2, 3.5), layout="constrained")
    ax = figure.subplots()
    first, last = int(counts.min()), int(np.ceil(counts.max()))
    width = max(1, (last - first) // 40)
    edges = np.arange(first - 0.5, last + 0.5 + width, width)
    room = max(0.5, 5 - (last - first) / 2)  # a few bars are not to fill the picture
    parts = [(counts[converged], "converged", "#0072B2"), (counts[~converged], "not converged", "#D55E00")]
    parts = [part for part in parts if len(part[0])]
    data, labels, colours = zip(*parts)
    ax.hist(data, edges.tolist(), stacked=True, label=labels, color=colours, edgecolor="white", linewidth=0.6)
    ax.axvline(counts.mean(), color=GREY, linestyle="--", linewidth=1, label=f"mean {counts.mean():.1f}")
    ax.set(xlabel="evaluations of f", ylabel="samples", xlim=(edges[0] - room, edges[-1] + room))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(fontsize=8)
    plain(ax)
    mode = "relative" if solver.stop_mode == "rel" else "absolute"
    ax.set_title(
        f"{100 * converged.mean():.0f} % converged: {type(solver).__name__}, {mode} tolerance {solver.tol:g}, at most "
        f"{solver.max_steps} steps",
        fontsize=9,
    )
    entitle(figure, title)
    return figure


def radius_figure(radii: np.ndarray, title: str) -> Figure:
    """Return a histogram of spectral radii."""
    finite = radii[np.isfinite(radii)]
    figure = Figure(figsize=(6.2, 3.5), layout="constrained")
    ax = figure.subplots()
    ax.hist(finite, bins=min(20, max(5, len(finite) // 3)), color="#0072B2", edgecolor="white", linewidth=0.6)
    ax.axvline(1, color="#D55E00", linewidth=1.5, label="1: plain iteration of f stops converging")
    if len(finite):
        ax.axvline(np.median(finite), color=GREY, linestyle="--", linewidth=1, label=f"median {np.median(finite):.2f}")
    ax.set(xlabel="spectral radius of the Jacobian of f at the equilibrium", ylabel="samples")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylim(top=1.3 * ax.get_ylim()[1])  # room for the legend
    ax.legend(fontsize=8, loc="upper center", ncols=2)
    plain(ax)
    ax.set_title(f"{int((finite > 1).sum())} of {len(radii)} samples above 1", fontsize=9)
    entitle(figure, title)
    return figure


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG file of 256 colours, a third of the size that full colour would take."""
    drawn, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, dpi=DPI, format="png")
    # Patches of a legend are small; by their share of the picture they would get the mean of several colours.
    exact = legend_colours(figure)
    with Image.open(drawn) as image:
        whole = image.convert("RGB")
        few = whole.quantize(256 - len(exact), Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        palette, index, pixels = few.getpalette()[: 3 * (256 - len(exact))], np.array(few), np.asarray(whole)
        for colour in exact:
            index[(pixels == colour).all(axis=2)] = len(palette) // 3
            palette += colour
        few = Image.fromarray(index)
        few.putpalette(palette)
        few.save(packed, "PNG", optimize=True)
    return packed.getvalue()


def legend_colours(figure: Figure) -> list[Colour]:
    """Return the colours of the patches in a figure's legends."""
    legends = [ax.get_legend() for ax in figure.axes]
    patches = [p for legend in legends if legend is not None for p in legend.get_patches()]
    shares = (to_rgb(p.get_facecolor()) for p in patches)
    return sorted({(round(255 * r), round(255 * g), round(255 * b)) for r, g, b in shares})
