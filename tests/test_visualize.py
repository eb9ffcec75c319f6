"""tools/visualize.py: what is measured and drawn, by known answers; the page; what it leaves out and refuses."""

import base64
import io
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers import Outcome, run, train
from PIL import Image
from small_sets import blob, hippocampus, save_nifti
from timm.models import save_for_hf
from torch import Tensor, nn

from mdeq import DEQ, Anderson, Broyden, Picard
from tools import figures, studies
from tools.batches import Batch
from tools.figures import Painter, View
from tools.metrics import SolveLog
from tools.page import Picture, page
from tools.pictures import label_colours
from tools.predictors import Predictor, Settings
from tools.pretrained import load_trained
from tools.samples import Part
from tools.scores import TOP1
from tools.steps import steps_figure
from tools.studies import Snapshot

SOLVER = {"name": "broyden", "max_steps": 3, "tol": 0.5}
TINY: dict[str, Any] = dict(channels=(4, 8), num_groups=2, expansion=1, solver=SOLVER)
RECORD = {"spacing": None, "orientation": "RAS", "normalise": "zscore", "patch_size": [20, 16, 16]}
ALWAYS = {"convergence.png", "features.png", "index.html"}
QUICK = ("--steps", 1, 2, "--most-steps", 5)


def visualize(*words: Any) -> Outcome:
    return run("visualize", *words)


def saved(folder: Path, name: str, record: dict[str, Any], **kwargs: Any) -> tuple[Path, nn.Module]:
    """Write a small model with random weights as a run leaves it; return its folder and the model."""
    torch.manual_seed(1)
    model = timm.create_model(name, **{**TINY, **kwargs}).eval()
    folder.mkdir(parents=True)
    save_for_hf(model, str(folder), model_config=dict(record), safe_serialization=True)
    return folder, model


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    folder = tmp_path_factory.mktemp("classifier") / "ants"
    names = {"label_names": ["ant", "bee", "cat"]}
    return saved(folder, "mdeq_tiny_cifar", names, num_classes=3, head_channels=(2, 2), num_features=8)


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    return path


def silent(things: Iterable[Any], text: str) -> Iterable[Any]:
    return things


# What is measured.


def flat(state: Iterable[Tensor]) -> Tensor:
    return torch.cat([z.flatten(1) for z in state], dim=1)


@pytest.fixture(scope="module")
def image() -> Tensor:
    return torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_traces_are_the_residuals_of_the_iterates(classifier: tuple[Path, nn.Module], image: Tensor) -> None:
    model = classifier[1]
    inputs = [image, 2 * image]
    table = studies.residual_traces(model, inputs, studies.compared_solvers(Broyden(), 4)["Picard"], silent)
    assert table.shape == (5, 2)
    for k, x in enumerate(inputs):
        fn = model.equilibrium.fn(model.injection(x))
        z = model.equilibrium.cell.zero_state(model.injection(x))
        for residual in table[:, k]:
            image_of_z = fn(z)
            expected = (flat(image_of_z) - flat(z)).norm() / flat(image_of_z).norm()
            assert residual == pytest.approx(float(expected), rel=1e-4)
            z = image_of_z


def test_compared_solvers() -> None:
    """Each of the three, the model's own kind with its own settings; none stops before its steps are spent."""
    own = Anderson(history=3, tol=0.1, stop_mode="abs", max_steps=7)
    solvers = studies.compared_solvers(own, 20)
    assert list(solvers) == ["Broyden", "Anderson", "Picard"]
    assert solvers["Anderson"].history == 3
    for solver in solvers.values():
        assert (solver.max_steps, solver.tol, solver.stop_mode) == (20, 0.0, "rel")


def test_traces_have_no_zeros_and_nothing_infinite() -> None:
    """A constant f is solved at the first step, a quickly growing one is no longer finite after some."""

    class Model:
        def __init__(self, factor: float, constant: float) -> None:
            self.factor, self.constant = factor, constant

        def solve(self, x: Tensor, solver: Any) -> Any:
            return DEQ(solver, {"name": "phantom"}).eval()(lambda z: (self.factor * z[0] + self.constant,), (x,))

    solver = studies.long_run(Picard(), 6)
    table = studies.residual_traces(Model(0.0, 2.0), [torch.zeros(1, 3)], solver, silent)
    assert table[0, 0] == pytest.approx(1)
    assert np.isnan(table[1:]).all()
    table = studies.residual_traces(Model(1e30, 1.0), [torch.zeros(1, 3)], solver, silent)
    assert np.isfinite(table[0]).all()
    assert np.isnan(table[-1]).all()


@torch.no_grad()
def test_snapshots(classifier: tuple[Path, nn.Module], image: Tensor) -> None:
    """One step of Picard is f applied once; the residual is that of the state, and the equilibrium's the least."""
    model = classifier[1]
    once, twin = studies.after(model, image, studies.long_run(Picard(), 1)), studies.unrolled(model, image, 1)
    assert (once.title, twin.title, twin.residual) == ("after 1 step", "f applied once", None)
    torch.testing.assert_close(flat(once.state), flat(twin.state))
    torch.testing.assert_close(once.logits, model(image, unroll=1))
    solved = studies.after(model, image, studies.long_run(Broyden(), 3))
    f = flat(model.equilibrium.fn(model.injection(image))(solved.state))
    assert solved.residual == pytest.approx(float((f - flat(solved.state)).norm() / f.norm()), rel=1e-3)
    settled = studies.equilibrium(model, image, 60)
    assert settled.title == "equilibrium"
    assert settled.residual < solved.residual


class Linear:
    """A model whose f is z -> x z, so that its spectral radius is x."""

    def __init__(self) -> None:
        self.deq = DEQ(Broyden(), {"name": "phantom"}).eval()
        self.injection = nn.Identity()
        self.equilibrium = SimpleNamespace(fn=lambda x: lambda z: (x * z[0] + 1,))

    def solve(self, x: Tensor, solver: Any) -> Any:
        return self.deq(self.equilibrium.fn(x), (torch.zeros(len(x), 5),), solver=solver)


def test_spectral_radii() -> None:
    batches = [(torch.tensor([[0.5], [-0.25]]), torch.zeros(2)), (torch.tensor([[1.5]]), torch.zeros(1))]
    radii = studies.spectral_radii(Linear(), batches, 40, silent)
    assert radii == pytest.approx([0.5, 0.25, 1.5], rel=1e-5)


class Numbers:
    """A split whose sample k is the number k; the last two are of another shape."""

    class_names = ("a", "b")

    def __init__(self, count: int) -> None:
        self.count = count
        self.spacings = [(1.0, 1.0, float(k)) for k in range(count)]

    def __len__(self) -> int:
        return self.count

    def epoch(self, epoch: int = 0, start: int = 0, only: Sequence[int] | None = None) -> Iterator[Batch]:
        for k in range(start, self.count) if only is None else only:
            yield torch.full((1, 1, 3 if k < self.count - 2 else 4), float(k)), torch.tensor([k])


def test_part_of_a_split() -> None:
    """Samples are spread over the split, and lie together in batches of one shape."""
    part = Part(Numbers(100), 10, silent)
    assert [int(y) for _, y in part.samples] == list(range(0, 100, 10))
    assert [len(y) for _, y in part.epoch()] == [8, 2]
    assert (len(part), part.class_names) == (2, ("a", "b"))
    assert [mm[2] for mm in part.spacings] == list(range(0, 100, 10))
    whole = Part(Numbers(5), 50, silent)
    assert [y.tolist() for _, y in whole.epoch()] == [[0, 1, 2], [3, 4]]
    assert [y.tolist() for _, y in whole.epoch(start=1)] == [[3, 4]]


# What is drawn.


def test_convergence_figure() -> None:
    table = np.array([[1.0, 1.0, 1.0], [0.1, 0.2, 0.4], [0.01, np.nan, 0.3]])
    figure = figures.convergence_figure({"Broyden": table, "Picard": table[:, :1]}, "Broyden", 0.15, "title")
    left, right = figure.axes
    assert left.get_title() == "Broyden, the model's own\n1 of 3 reach 0.15"
    assert right.get_title() == "Picard\ntolerance reached at evaluation 2"
    thick = max(left.lines, key=lambda line: line.get_linewidth())
    assert thick.get_xdata().tolist() == [1, 2, 3]
    assert thick.get_ydata().tolist() == pytest.approx([1, 0.2, 0.155])
    assert left.get_yscale() == "log"
    assert left.get_ylim() == right.get_ylim()


def test_convergence_of_nothing_finite() -> None:
    table = np.full((3, 2), np.nan)
    figure = figures.convergence_figure({"Picard": table}, "Broyden", None, "title")
    assert figure.axes[0].get_title() == "Picard"
    assert figures.png(figure).startswith(b"\x89PNG")


def test_reached() -> None:
    table = np.array([[1.0, 1.0, 1.0, 1.0], [0.1, 0.5, 0.5, 0.5], [0.5, 0.1, 0.1, 0.5]])
    assert figures.reached(table, 0.2) == "3 of 4 reach 0.2, half by evaluation 3"
    assert figures.reached(table[:, 3:], 0.2) == "tolerance not reached"


def test_view_of_a_volume() -> None:
    """The slice with most labels; the first axis to the right, the second upwards, in maps of half the size too."""
    x, labels = torch.zeros(1, 1, 4, 6, 8), torch.zeros(4, 6, 8)
    assert View.of(x).depth == 4
    assert View.of(x, labels).depth == 4
    labels[1:3, :, 6] = 2
    view = View.of(x, labels)
    assert view.depth == 6
    x[0, 0, 3, 5, 6] = 1
    seen = view.flat(x[0, 0])
    assert seen.shape == (6, 4)
    assert np.argwhere(seen).tolist() == [[0, 3]]
    half = torch.zeros(2, 3, 4)
    half[0, 0, 3] = 1
    assert np.argwhere(view.flat(half)).tolist() == [[2, 0]]


def snapshot(title: str, labels: list[list[int]], residual: float | None = None) -> Snapshot:
    logits = nn.functional.one_hot(torch.tensor(labels), 3).movedim(-1, 0).unsqueeze(0).float()
    return Snapshot(title, (torch.ones(1, 2, 2, 2),), logits, residual)


def test_labels_figure() -> None:
    """Shares of labels that differ from the equilibrium's, and the classes' colours where labels are drawn."""
    colours = ((0, 0, 0), (200, 0, 0), (0, 0, 200))
    black = Image.new("RGB", (2, 2))
    painter = Painter(("background", "left", "right"), colours, 0, black, View((2, 2)))
    assert np.asarray(painter.paint(torch.tensor([[0, 1], [2, 255]]))).tolist() == [
        [[0, 0, 0], [120, 0, 0]],
        [[0, 0, 120], [0, 0, 0]],
    ]
    way, settled = [snapshot("after 1 step", [[0, 0], [0, 0]], 0.5)], snapshot("equilibrium", [[0, 1], [2, 2]], 1e-4)
    twins, truth = [snapshot("f applied once", [[0, 1], [2, 0]])], torch.tensor([[0, 1], [2, 2]])
    figure = figures.labels_figure(way, twins, settled, truth, painter, "title")
    said = {ax.get_title(): ax.get_xlabel() for ax in figure.axes if ax.axison}
    assert said == {
        "input": "",
        "after 1 step\nresidual 5.0e-01": "75.00 % differ",
        "equilibrium\nresidual 1.0e-04": "",
        "labels of the data": "",
        "f applied once": "25.00 % differ",
    }
    legend = next(ax.get_legend() for ax in figure.axes if ax.get_legend())
    assert [text.get_text() for text in legend.get_texts()] == ["left", "right"]
    settled = snapshot("equilibrium", [[0, 0], [0, 0]])
    for early, truth, names in ((way, torch.tensor([[0, 1], [0, 255]]), ["left"]), (twins, None, ["left", "right"])):
        figure = figures.labels_figure(early, [], settled, truth, painter, "title")
        legend = next(ax.get_legend() for ax in figure.axes if ax.get_legend())
        assert [text.get_text() for text in legend.get_texts()] == names  # of the data, or of an early step alone


def test_a_legend_has_the_colours_of_its_classes() -> None:
    """256 colours for a whole picture leave none to small patches, unless they are kept for them."""
    torch.manual_seed(0)
    colours = label_colours([str(k) for k in range(12)])
    picture = Image.fromarray((255 * torch.rand(64, 64, 3)).byte().numpy())
    painter = Painter([str(k) for k in range(12)], colours, None, picture, View((64, 64)))
    logits = torch.zeros(1, 12, 64, 64)
    logits[0, 0] = 1
    logits[0, torch.arange(12), 0, torch.arange(12)] = 2
    settled = Snapshot("equilibrium", (torch.ones(1, 2, 2, 2),), logits, None)
    drawn = figures.png(figures.labels_figure([settled] * 4, [], settled, None, painter, "title"))
    with Image.open(io.BytesIO(drawn)) as image:
        there = set(map(tuple, np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0).tolist()))
    assert {*colours, (255, 255, 255)} <= there


def test_residuals_within_a_decade_can_be_read() -> None:
    rows = [
        {"steps": n, "top1": 50.0, "residual_mean": 0.4 / n, "twin_top1": 50.0, "twin_residual_mean": 0.4 / n}
        for n in (1, 2, 3)
    ]
    figure = steps_figure(rows, "title", TOP1)
    figure.draw_without_rendering()
    axis = figure.axes[1].yaxis
    low, high = axis.get_view_interval()
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    assert sum(bool(t.label1.get_text()) and low <= t.get_loc() <= high for t in ticks) >= 2


def test_the_legend_of_radii_hides_no_bar() -> None:
    figure = figures.radius_figure(np.array([1.0] * 9 + [2.0] * 9), "title")
    figure.draw_without_rendering()
    [ax] = figure.axes
    assert max(bar.get_window_extent().y1 for bar in ax.patches) < ax.get_legend().get_window_extent().y0


def test_wide_pictures_leave_room_for_words() -> None:
    wide, size = Image.new("RGB", (400, 40)), (40, 400)
    settled = Snapshot("equilibrium", (torch.ones(1, 2, 4, 40),), torch.randn(1, 12, 40, 400), 0.1)
    painter = Painter([str(k) for k in range(12)], label_colours([str(k) for k in range(12)]), None, wide, View(size))
    figure = figures.labels_figure([], [], settled, None, painter, "title")
    figure.draw_without_rendering()
    [legend] = [ax.get_legend() for ax in figure.axes if ax.get_legend()]
    assert legend.get_window_extent().height < 0.7 * figure.bbox.height
    figure = figures.features_figure([replace(settled, logits=torch.zeros(1, 2))], wide, View(size), ("a", "b"), "t")
    assert figure.bbox.height / figure.dpi >= 1.5


def test_features_figure() -> None:
    """Root mean squares over the channels, with one scale for all columns of a branch."""
    states = [(torch.full((1, 2, 2, 2), v), torch.full((1, 3, 1, 1), 10 * v)) for v in (3.0, 4.0)]
    states[0][0][0, 1] = 1.0
    snapshots = [Snapshot("after 1 step", states[0], torch.zeros(1, 2), 0.5)]
    snapshots.append(Snapshot("equilibrium", states[1], torch.tensor([[0.0, 100.0]]), 0.01))
    figure = figures.features_figure(snapshots, Image.new("RGB", (2, 2)), View((2, 2)), ("a", "b"), "title")
    maps = [ax.images[0] for ax in figure.axes if ax.images and ax.images[0].get_array().ndim == 2]
    values = [float(drawn.get_array().mean()) for drawn in maps]
    assert values == pytest.approx([5**0.5, 4, 30, 40])
    assert maps[0].get_clim() == maps[1].get_clim() != maps[2].get_clim() == maps[3].get_clim()
    titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
    assert titles == ["input", "after 1 step\nresidual 5.0e-01\na 50 %", "equilibrium\nresidual 1.0e-02\nb 100 %"]


def test_evaluations_figure() -> None:
    log = SolveLog()
    log.evaluations, log.status = [torch.tensor([3.0, 4.0, 4.0]), torch.tensor([9.0])], [torch.tensor([0, 0, 0, 1])]
    ax = figures.evaluations_figure(log, Broyden(max_steps=8, tol=0.1), "title").axes[0]
    bars = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in ax.patches if bar.get_height()}
    assert bars == {3: 1, 4: 2, 9: 1}
    assert ax.get_title() == "75 % converged: Broyden, relative tolerance 0.1, at most 8 steps"
    assert "mean 5.0" in [text.get_text() for text in ax.get_legend().get_texts()]
    log.evaluations, log.status = [torch.arange(2.0, 200.0)], [torch.ones(198)]
    ax = figures.evaluations_figure(log, Broyden(), "title").axes[0]
    assert sum(bar.get_height() for bar in ax.patches) == 198


def test_radius_figure() -> None:
    ax = figures.radius_figure(np.array([0.5, 0.6, 1.2, np.nan]), "title").axes[0]
    assert sum(bar.get_height() for bar in ax.patches) == 3
    assert ax.get_title() == "1 of 4 samples above 1"
    assert "median 0.60" in [text.get_text() for text in ax.get_legend().get_texts()]


# The page and the program.


def embedded(html: str) -> list[bytes]:
    return [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', html)]


def test_voxels_that_are_no_cubes() -> None:
    """They are as high as their spacing says, in every picture."""
    x, spacing = torch.zeros(1, 1, 4, 6, 8), (0.5, 2.0, 1.0)
    view = View.of(x, spacing=spacing)
    picture = Image.new("L", (4, 6))
    assert view.ratio(picture) == 4 * 6 / 4
    assert View.of(x[..., 0], spacing=spacing).ratio(Image.new("L", (4, 6))) == 6 / 4  # of an image nobody knows
    snapshots = [Snapshot("x", (torch.rand(1, 2, 4, 6, 8),), torch.rand(1, 2), 0.1)]
    figure = figures.features_figure(snapshots, picture, view, ("a", "b"), "title")
    assert figure.axes[0].get_aspect() == 4
    assert figure.axes[1].get_box_aspect() == 6


def test_page() -> None:
    """What is said stands there as it is, and nothing is fetched from anywhere."""
    picture = Picture("x", "A < B", "because & so", b"\x89PNG")
    html = page("T <1>", {"model": "m&m"}, [picture], {"Radius": "no <data>"})
    for text in ("T <1>", "m&m", "A < B", "because & so", "no <data>"):
        assert text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") in html
    assert "color-scheme: light dark" in html
    assert embedded(html) == [picture.png]
    assert not re.search(r"https?:|<script|<link|@import|url\(", html)
    assert "Left out" not in page("t", {}, [picture], {})


def check_page(out: Path) -> str:
    html = (out / "index.html").read_text(encoding="utf-8")
    order = {path.read_bytes() for path in out.glob("*.png")}
    assert set(embedded(html)) == order
    for path in out.glob("*.png"):
        with Image.open(path) as picture:
            assert min(picture.size) >= 200
        assert path.stat().st_size < 200_000
    return html


def test_an_image(classifier: tuple[Path, nn.Module], photo: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    said = visualize(classifier[0], photo, "--out", out, *QUICK).ok()
    assert {path.name for path in out.iterdir()} == ALWAYS
    html = check_page(out)
    for text in ("Accuracy against steps", "Evaluations of f", "Spectral radius", "ants is a classifier"):
        assert text in html
        assert text in said
    assert "photo.png" in html
    assert str(photo.parent) not in html


def test_solvers_are_compared_whatever_the_gradient(photo: Path, tmp_path: Path) -> None:
    """A reversible gradient takes the place of any solver."""
    folder, _ = saved(tmp_path / "run", "mdeq_tiny_cifar", {}, head_channels=(2, 2), gradient={"name": "reversible"})
    visualize(folder, photo, "--out", tmp_path / "reversible", *QUICK).ok()
    config = folder / "config.json"
    config.write_text(config.read_text().replace("reversible", "implicit"))
    visualize(folder, photo, "--out", tmp_path / "implicit", *QUICK).ok()
    drawn = [(tmp_path / name / "convergence.png").read_bytes() for name in ("reversible", "implicit")]
    assert drawn[0] == drawn[1]


def test_inputs_after_the_options_and_one_that_is_none(
    classifier: tuple[Path, nn.Module], photo: Path, tmp_path: Path
) -> None:
    """The others are looked at, and the page says what was wrong."""
    (tmp_path / "bad.png").write_bytes(b"no image")
    outcome = visualize(classifier[0], "--out", tmp_path / "out", "--most-steps", 5, photo, tmp_path / "bad.png")
    assert "bad.png" in outcome.err
    assert outcome.code == 0
    html = check_page(tmp_path / "out")
    assert "bad.png" in html.partition("Left out")[2]
    assert str(tmp_path) not in html
    assert (
        "none of the 2 inputs"
        in visualize(classifier[0], tmp_path / "bad.png", tmp_path / "nowhere.png", "--out", tmp_path / "other").err
    )
    assert not (tmp_path / "other").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text there")
def test_a_file_name_that_is_no_text(classifier: tuple[Path, nn.Module], photo: Path, tmp_path: Path) -> None:
    shutil.copy(photo, tmp_path / os.fsdecode(b"caf\xe9.png"))
    visualize(classifier[0], tmp_path / os.fsdecode(b"caf\xe9.png"), "--out", tmp_path / "out", *QUICK).ok()
    assert "caf?" in (tmp_path / "out" / "index.html").read_text()


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a segmenter of volumes."""
    names = {"label_names": ["background", "front", "back"], "preprocessing": RECORD}
    return saved(tmp_path_factory.mktemp("segmenter") / "run", "mdeq3d_tiny_seg", names, num_classes=3)[0]


def test_window_in_the_middle(segmenter: Path, tmp_path: Path) -> None:
    """Padded to the training patch, cut to it where it is larger; whole if that is said."""
    x, trained = torch.randn(2, 1, 18, 20, 17), load_trained(str(segmenter))
    seen = Predictor(trained, Settings(tmp_path)).window(x)
    assert seen.shape == (2, 1, 20, 16, 16)
    assert torch.equal(seen[:, :, 1:19], x[..., 2:18, 0:16])
    assert Predictor(trained, Settings(tmp_path, whole=True)).window(x).shape == (2, 1, 20, 20, 17)


def test_a_volume(segmenter: Path, tmp_path: Path) -> None:
    scan, out = save_nifti(tmp_path / "scan.nii.gz", blob((18, 20, 17))[0]), tmp_path / "out"
    visualize(segmenter, scan, "--out", out, *QUICK).ok()
    assert {path.name for path in out.iterdir()} == ALWAYS | {"labels.png"}
    assert "slice" not in check_page(out).partition("<h2>Left out")[2]


def test_the_data_of_a_run(tmp_path: Path) -> None:
    """The test split is that of the run; without an input its samples are looked at."""
    train(tmp_path / "run", "data.num_train=16").ok()
    out = tmp_path / "out"
    said = visualize(tmp_path / "run", "--data", 3, "--out", out, *QUICK).ok()
    assert {path.name for path in out.iterdir()} == ALWAYS | {"steps.png", "evaluations.png", "radius.png"}
    assert "3 test samples of digits" in said
    assert "3 test samples of digits" in check_page(out)


@pytest.mark.slow
@pytest.mark.parametrize("inference", ["whole", "sliding"])
def test_the_data_of_a_segmenter(inference: str, segmenter: Path, tmp_path: Path) -> None:
    words = ["data.name=hippocampus", f"data.root={hippocampus(tmp_path / 'hippocampus.npz')}", "data.test_split=val"]
    out = tmp_path / "out"
    words += ["data.patch_size=[16,16,16]", f"data.inference={inference}"]
    visualize(segmenter, "--data", 2, "--out", out, *words, *QUICK).ok()
    assert {path.name for path in out.iterdir()} == ALWAYS | {
        "labels.png", "steps.png", "evaluations.png", "radius.png",
    }  # fmt: skip
    check_page(out)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "--data"),
        (["nowhere.png"], "nowhere.png"),
        (["PHOTO", "data.root=x"], "--data"),
        (["PHOTO", "--data", "2", "optim.lr=1"], "optim.lr=1"),
        (["PHOTO", "--data", "2", "data.rot=1"], "data.root"),
        (["PHOTO", "--data", "2", "data.name=cifar10", "data.root=nowhere"], "nowhere"),
        (["PHOTO", "--data", "2", "data.name=hippocampus", "task=segmentation"], "segmenter"),
        (["PHOTO", "--data", "2"], "set data.name=NAME"),
        (["PHOTO", "--data", "0"], "--data"),
        (["PHOTO", "--data", "some"], "--data"),
        (["PHOTO", "--steps", "0"], "--steps"),
        (["PHOTO", "--most-steps", "0"], "--most-steps"),
        (["PHOTO", "--size", "8"], "--size"),
        (["PHOTO", "--patch", "16"], "--patch"),
        (["PHOTO", "--device", "tpu"], "--device"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_refusals(
    words: list[str],
    named: str,
    classifier: tuple[Path, nn.Module],
    photo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One line, and nothing is written, also where an input was fine and the data are not."""
    monkeypatch.chdir(tmp_path)
    words = [str(photo) if word == "PHOTO" else word for word in words]
    assert named in visualize(classifier[0], *words, "--out", "out").refusal()
    assert list(tmp_path.iterdir()) == []


def test_output_folder_that_is_a_file(classifier: tuple[Path, nn.Module], photo: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    assert "file" in visualize(classifier[0], photo, "--out", tmp_path / "file").refusal()
    assert (tmp_path / "file").read_text() == "precious"


def test_names_are_drawn_as_they_stand() -> None:
    """Dollars, which matplotlib takes for formulas."""
    logits = torch.zeros(1, 2, 4, 4)
    logits[:, 1, :2] = 1
    settled = Snapshot("equilibrium", (torch.zeros(1, 4, 4, 4),), logits, 0.1)
    names = (r"cost $\frac$ of", "price $x_{$")
    picture, view = Image.new("L", (4, 4)), View((4, 4))
    painter = Painter(names, label_colours(names), None, picture, view)
    title = r"price $x_{$.png"
    assert figures.png(figures.labels_figure([settled], [], settled, None, painter, title))
    classified = replace(settled, logits=torch.zeros(1, 2))
    assert figures.png(figures.features_figure([classified], picture, view, names, title))
