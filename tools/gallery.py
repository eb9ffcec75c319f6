"""The pictures of tools/visualize.py: what is measured, drawn and said for each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tools import figures, studies
from tools.batches import Batch, Process, evaluated_split
from tools.config import TrainConfig
from tools.engine import evaluate
from tools.page import Picture
from tools.predictors import Predictor
from tools.samples import Part
from tools.steps import steps_figure, steps_table
from tools.tasks import build_task

CAPTIONS = {
    "convergence": (
        "Convergence",
        "Relative residual |f(z) - z| / |f(z)| of the iterate at every evaluation of f, from a state of zeros: a thin "
        "line for each input, a thick one for their median. A line that falls straight converges linearly; one that "
        "levels off high has found no fixed point with this solver. The solvers go on past the tolerance; a line ends "
        "where the residual is exactly zero or no longer finite.",
    ),
    "features": (
        "Feature maps on the way to the equilibrium",
        "Root mean square over the channels of every branch, the finest one above, with one scale per branch. After k "
        "steps: the best iterate of the model's own solver in k steps. Equilibrium: the same solver's, given many more "
        "steps; its residual says how close it came.",
    ),
    "labels": (
        "Label map on the way to the equilibrium",
        "Above: labels after k steps of the model's own solver. Below: those of the explicit twin, the same f applied "
        "k times. Per cent: share of all pixels or voxels whose label differs from that at the equilibrium.",
    ),
    "steps": (
        "Accuracy against steps",
        "Score and mean residual against steps of the model's own solver, whatever its tolerance, and against "
        "applications of the same f (the explicit twin). A flat end says that the score belongs to the equilibrium and "
        "not to a number of steps.",
    ),
    "evaluations": (
        "Evaluations of f",
        "How many evaluations of f the model's own solver took for each sample at its own tolerance and limit "
        "of steps. One evaluation is that of the state it starts from.",
    ),
    "radius": (
        "Spectral radius",
        "Spectral radius of the Jacobian of f at the equilibrium of each sample, by power iteration. Below 1 plain "
        "iteration of f converges near the equilibrium, the faster the smaller it is; above 1 it takes a solver to "
        "get there.",
    ),
}
"""Heading and caption of each picture."""
NEEDS_DATA = ("steps", "evaluations", "radius")


def picture(name: str, figure: Any) -> Picture:
    return Picture(name, *CAPTIONS[name], figures.png(figure))


@dataclass(frozen=True)
class Subject:
    """What is looked at.

    Args:
        predictor: the model, names and colours of its classes.
        name: of the model.
        inputs: each `(1, C, *S)`; the first is looked at closely.
        about: what the inputs are.
        truth: labels `(*S)` of the first input, where there are some.
        spacing: mm per voxel of the first input along each axis, where they are known.
        steps: numbers of steps to stop at.
        most_steps: solver steps to an equilibrium.
        watch: shows how far a picture is.
    """

    predictor: Predictor
    name: str
    inputs: Sequence[Tensor]
    about: str
    truth: Tensor | None
    spacing: Sequence[float] | None
    steps: Sequence[int]
    most_steps: int
    watch: studies.Watch

    def pictures(self) -> Iterator[Picture]:
        """Yield the pictures that need no data set."""
        yield picture("convergence", self._convergence())
        model, x, own = self.predictor.model, self.inputs[0], self.predictor.solver
        settled = studies.equilibrium(model, x, self.most_steps)
        way = [studies.after(model, x, studies.long_run(own, k)) for k in self.watch(self.steps, "steps")]
        labels = settled.logits[0].argmax(dim=0) if self.predictor.dense else None
        view = figures.View.of(x, labels, self.spacing)
        shown = figures.input_picture(x, model, view)
        title = f"Feature maps of {self.name}: root mean square over channels{view.about}"
        yield picture("features", figures.features_figure([*way, settled], shown, view, self.predictor.names, title))
        if self.predictor.dense:
            twins = [studies.unrolled(model, x, k) for k in self.watch(self.steps, "explicit twin")]
            title = f"Labels of {self.name}{view.about}"
            painter = figures.Painter(self.predictor.names, self.predictor.colours, self.predictor.clear, shown, view)
            yield picture("labels", figures.labels_figure(way, twins, settled, self.truth, painter, title))

    def _convergence(self) -> Any:
        own = self.predictor.solver
        traces = {
            name: studies.residual_traces(self.predictor.model, self.inputs, solver, self.watch)
            for name, solver in studies.compared_solvers(own, self.most_steps).items()
        }
        tol = own.tol if own.stop_mode == "rel" else None
        return figures.convergence_figure(traces, type(own).__name__, tol, f"{self.name} on {self.about}")


@dataclass(frozen=True)
class DataStudy:
    """Samples of a test split, and what is counted on them.

    Args:
        predictor, name, steps, most_steps, watch: as in `Subject`.
        config: settings of the data.
        part: the samples.
    """

    predictor: Predictor
    name: str
    steps: Sequence[int]
    most_steps: int
    watch: studies.Watch
    config: TrainConfig
    part: Part

    @property
    def about(self) -> str:
        """What the samples are."""
        return f"{len(self.part.samples)} {evaluated_split(self.config.data)} samples of {self.config.data.name}"

    def window(self, x: Tensor) -> Tensor:
        """Return samples `(B, C, *S)`: whole or, where the data are predicted by windows, the one in the middle."""
        return self.predictor.window(x) if self.config.data.inference == "sliding" else x

    def pictures(self) -> Iterator[Picture]:
        """Yield the pictures that need a data set."""
        model, title = self.predictor.model, f"{self.name} on {self.about}"
        process = Process(device=self.predictor.settings.device)
        task = build_task(self.config, model, self.part, process)

        def run(label: str, **options: Any) -> dict[str, float]:
            def watch(batches: Iterator[Batch]) -> Iterator[Batch]:
                return iter(self.watch(batches, label))

            return evaluate(model, self.part, process, task, watch=watch, **options)

        own = self.predictor.solver.max_steps
        counts = [*self.steps, own, 2 * own]
        rows = steps_table(model, counts, run, task.headline)
        yield picture("steps", steps_figure(rows, title, task.headline))
        log = studies.solve_log(model, self.part.batches, task.inference, self.watch)
        yield picture("evaluations", figures.evaluations_figure(log, self.predictor.solver, title))
        middle = [(self.window(x), y) for x, y in self.part.batches]
        radii = studies.spectral_radii(model, middle, self.most_steps, self.watch)
        yield picture("radius", figures.radius_figure(radii, title))
