"""tools/benchmark.py on tiny sizes: that it works and what its numbers mean. Nothing here looks at a time."""

import csv
import ctypes
import json
import math
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import timm
import torch

import tools.benchmark
from mdeq import DEQ, Broyden, PhantomGradient
from tools import comparison, scaling
from tools.comparison import Bench
from tools.config import BadInput
from tools.contenders import Clocked, TorchDEQ, Twin, parse_case, residual, resnet_like, solvers
from tools.program import keep_freed_memory
from tools.timings import plot, reference, spread, table, take_turns, timing_rows

CPU = torch.device("cpu")


def bench(**settings: Any) -> Bench:
    return Bench(**{"device": CPU, "steps": 3, "tol": 0.3, "history": 3, "repeats": 1, **settings})


def problem(batch: int = 2) -> Any:
    torch.manual_seed(0)
    model = timm.create_model("test_mdeq").eval()
    b = bench()
    return b.problem(model, b.inputs(model, 16, batch))


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *words])
    tools.benchmark.main()


# Contenders


def test_all_contenders_take_the_same_number_of_evaluations() -> None:
    fn, z0 = problem()
    with torch.no_grad():
        for name, layer in {**solvers(5, 0.0, 3), "twin": Twin(6)}.items():
            clocked = Clocked(layer.eval())
            clocked(fn, z0)
            assert clocked.clock.calls == 6, name
            assert clocked.clock.samples == 12, name
            assert clocked.clock.seconds > 0, name


def test_the_peer_solves_the_same_problem() -> None:
    """Broyden from the same start is the same iteration: in float64 both end at the same point."""
    fn, z0 = problem()
    fn.cell.double()
    fn = fn.__class__(fn.cell, tuple(None if u is None else u.double() for u in fn.injection), None, fn.cell.kernels())
    z0 = tuple(z.double() for z in z0)
    with torch.no_grad():
        own = DEQ(Broyden(max_steps=4, tol=0.0), PhantomGradient()).eval()(fn, z0)
        peer = TorchDEQ("broyden", 5, 0.0).eval()(fn, z0)
    assert torch.equal(own.stats.trace[1:].argmin(0), torch.full((2,), 3)), "the last iterate is the best"
    for mine, theirs in zip(own.state, peer.state):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)
    reached = residual(fn, own.state)
    torch.testing.assert_close(reached, own.stats.residual, rtol=1e-6, atol=0)


def test_autocast_is_for_f_alone() -> None:
    """No contender computes its own products in bfloat16: with an f that autocast leaves alone nothing changes."""
    b = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))

    def fn(z: Any) -> Any:
        return (torch.tanh(0.9 * z[0].roll(1, dims=1) + b),)

    for name, layer in solvers(5, 0.0, 3).items():
        layer.eval()
        with torch.no_grad():
            expected = layer(fn, (torch.zeros_like(b),)).state[0]
            with torch.autocast("cpu", torch.bfloat16):
                actual = layer(fn, (torch.zeros_like(b),)).state[0]
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6, msg=name)


def test_samples_that_left_the_batch_are_not_counted() -> None:
    fn, z0 = problem(batch=4)
    with torch.no_grad():
        exact = DEQ(Broyden(max_steps=200, tol=1e-2), PhantomGradient()).eval()(fn, z0)
        assert exact.stats.converged.any()
        layer = Clocked(DEQ(Broyden(max_steps=200, tol=1e-2), PhantomGradient()).eval())
        start = tuple(z.clone() for z in z0)
        for z, solved in zip(start, exact.state):
            z[:3] = solved[:3]
        layer(fn, start)
    assert layer.clock.samples < 4 * layer.clock.calls


def test_memory_format() -> None:
    model = bench(channels_last=True).model("test_mdeq")
    assert model.stem.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert bench(channels_last=True).model("test_mdeq3d").spatial_dims == 3


def test_the_nearest_resnet() -> None:
    name, net = resnet_like(timm.create_model("mdeq_large_cifar", num_classes=10))
    assert name == "timm resnet18, 11M"
    assert net.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


# Timings


def test_turns() -> None:
    """Every contender once unmeasured, then all of them in each round, begun by another one."""
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) or name for name in "ab"}
    times, results = take_turns(runs, 2, CPU, "test")
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert results == {"a": "a", "b": "b"}
    assert [len(values) for values in times.values()] == [2, 2]


def test_a_time_to_a_tolerance_that_was_not_reached_is_compared_with_none(capsys: Any) -> None:
    names = {"mdeq A": 0.05, "TorchDEQ A": 0.2, "mdeq B": math.nan, "TorchDEQ B": 0.1}
    rows = [dict(contender=name, residual_max=worst, relative=1.0) for name, worst in names.items()]
    assert [row["contender"] for row in comparison._to_tolerance(bench(tol=0.1), rows) if "relative" in row] == [
        "TorchDEQ B"
    ]
    assert capsys.readouterr().out.count("did not reach 0.1") == 2


def test_a_panel_without_ratios_says_why(tmp_path: Path) -> None:
    rows = [dict(part="tolerance", case="x:32:2", contender="mdeq A", ms=1.0)]
    with mock.patch("matplotlib.axes.Axes.text", autospec=True) as text:
        plot(rows, tmp_path / "plot.png", "title")
    assert [call.args[3] for call in text.call_args_list] == ["tolerance not reached"]


def test_rows_are_relative_to_the_peer_turn_by_turn() -> None:
    """The machine became four times slower in the second turn, which says nothing of either."""
    times = {"mdeq A": [1.0, 4.0, 1.2], "TorchDEQ A": [2.0, 8.0, 2.4], "other": [4.0, 16.0, 4.8]}
    rows = timing_rows("part", "case", times)
    assert [rows[name]["relative"] for name in times] == [0.5, 1.0, 2.0]
    assert rows["mdeq A"]["ms"] == 1200
    assert rows["mdeq A"]["ms_low"] == pytest.approx(1100)


def test_namesakes() -> None:
    names = ["mdeq A", "TorchDEQ B", "TorchDEQ A", "mdeq A + warm start", "explicit twin"]
    assert [reference(name, names) for name in names] == ["TorchDEQ A", "TorchDEQ B", *["TorchDEQ A"] * 2, "TorchDEQ B"]
    assert reference("mdeq A", ["mdeq A"]) is None


def test_quartiles_and_table() -> None:
    assert spread("x", [3.0]) == {"x": 3.0, "x_low": 3.0, "x_high": 3.0}
    assert spread("x", [1.0, 2.0, 3.0, 4.0, 5.0]) == {"x": 3.0, "x_low": 2.0, "x_high": 4.0}
    assert list(table([{"name": "a", "x": 1.0}, {"name": "bc", "y": 12345.678}])) == [
        "name  x          y",
        "a     1",
        "bc       1.235e+04",
    ]


# Parts


def test_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    words = "--parts solve inference tolerance training ragged --cases test_mdeq:16:2 --steps 3 --repeats 1 --tol 0.3"
    asked: list[tuple[str, int]] = []

    def peak(bench: Bench, case: str, contender: str, backward_steps: int) -> float:
        asked.append((contender, backward_steps))
        return 1.5

    monkeypatch.setattr(comparison, "measured_peak", peak)  # a process each
    monkeypatch.setattr(comparison, "BACKWARD_STEPS", (1, 3))
    monkeypatch.setattr(comparison, "RAGGED_BATCH", 8)
    monkeypatch.setattr(comparison, "RAGGED_SLOW", 1)
    call(monkeypatch, *words.split(), "--trained", "mdeq_tiny_cifar.cifar10:16:2", "--out", str(tmp_path))
    rows = list(csv.DictReader((tmp_path / "benchmark.csv").read_text().splitlines()))
    parts = {part: [row for row in rows if row["part"] == part] for part in comparison.PARTS}
    assert [len(members) for members in parts.values()] == [9, 6, 8, 9, 6, 0]
    for row in parts["solve"]:
        assert float(row["evaluations"]) == 4, row
        assert float(row["overhead"]) >= 1, row
        assert float(row["ms"]) > float(row["inside_ms"]) > 0, row
    broyden = {row["contender"]: float(row["residual"]) for row in parts["solve"]}
    assert broyden["mdeq Broyden"] == pytest.approx(broyden["TorchDEQ Broyden"], rel=1e-3)
    assert all(float(row["residual_max"]) < 0.3 for row in parts["tolerance"] if row["contender"].startswith("mdeq"))
    errors = {row["contender"]: row["gradient_error"] for row in parts["training"]}
    assert float(errors["mdeq phantom 5"]) == pytest.approx(float(errors["TorchDEQ phantom 5"]), rel=1e-2)
    assert all(0 < float(value) < 2 for name, value in errors.items() if "timm" not in name)
    own = [row for row in parts["training"] if "timm" not in row["contender"]]
    assert [name for name, _ in asked] == [row["contender"] for row in own]
    assert all((backward > 0) == ("implicit" in name) for name, backward in asked)
    assert {row["peak_mib"] for row in own} <= {"1.5", ""}
    evaluations = {row["contender"]: int(float(row["evaluations"])) for row in own}
    # Four of the solve, and what the gradient adds: one at the equilibrium, or the steps of the phantom.
    assert evaluations["mdeq implicit"] == 5
    assert evaluations["mdeq phantom 5"] == evaluations["TorchDEQ phantom 5"] == 9
    assert evaluations["explicit twin"] == 4
    for row in [row for row in parts["inference"] if "timm" not in row["contender"]]:
        solved = next(r for r in parts["solve"] if r["contender"] == row["contender"])
        assert float(row["residual"]) == pytest.approx(float(solved["residual"]), rel=1e-4)
        assert row["evaluations"] == solved["evaluations"]
    assert (tmp_path / "benchmark.png").stat().st_size > 20_000
    made = json.loads((tmp_path / "benchmark.json").read_text())
    assert made["versions"]["torch"] == torch.__version__
    assert "3 steps" in made["title"]
    assert "TorchDEQ Broyden" in capsys.readouterr().out
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory of a process is read from /proc")
def test_memory_of_a_solver() -> None:
    """Broyden keeps a vector a step here, half of one as an option, and two in the peer's form."""
    rows = {row["contender"]: row for row in comparison.memory_part(bench(steps=12), ["mdeq_tiny_cifar:32:16"], "")}
    assert rows["mdeq Broyden"]["relative"] < 0.75
    state_mib = 16 * 30720 * 4 / 2**20
    assert 12 * state_mib <= rows["mdeq Broyden"]["solver_mib"] <= 20 * state_mib
    assert 6 * state_mib <= rows["mdeq Broyden + bf16 history"]["solver_mib"] <= 14 * state_mib


def test_memory_that_is_too_little_to_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "measured_peak", lambda bench, case, contender: 1.0)
    rows = comparison.memory_part(bench(), ["test_mdeq:16:1"], "")
    assert [row["solver_mib"] for row in rows] == [0.0] * (len(comparison.MEMORY) - 1)
    assert all(math.isnan(row["relative"]) for row in rows)
    assert math.isnan(scaling.exponent([1.0, 2.0], [0.0, 1.0]))


def test_what_was_measured_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that fails takes nothing of those before it along."""

    def fail(bench: Bench, cases: Any, trained: str) -> list[Any]:
        raise BadInput("no more")

    monkeypatch.setitem(tools.benchmark.PARTS, "inference", fail)
    words = "--parts solve inference --cases test_mdeq:16:1 --steps 1 --repeats 1 --out"
    with pytest.raises(BadInput, match="no more"):
        call(monkeypatch, *words.split(), str(tmp_path))
    rows = list(csv.DictReader((tmp_path / "benchmark.csv").read_text().splitlines()))
    assert len(rows) == 1 + len(solvers(1, 0.0, 5))
    assert all(float(row["overhead_low"]) <= float(row["overhead"]) <= float(row["overhead_high"]) for row in rows)


def test_a_reference_that_does_not_converge(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(comparison, "Broyden", lambda **settings: Broyden(**{**settings, "max_steps": 3}))
    monkeypatch.setattr(comparison, "measured_peak", lambda *_: 1.0)
    rows = comparison.training_part(bench(), [], "mdeq_tiny_cifar.cifar10:16:2")
    assert "gradient errors are left out: 2 of 2 samples" in capsys.readouterr().out
    own = [row for row in rows if "timm" not in row["contender"]]
    assert all(math.isnan(row["gradient_error"]) and row["ms"] > 0 for row in own)
    assert {row["backward_steps"] for row in rows if "backward_steps" in row} == {3.0}


def test_fewer_images_than_a_batch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Two:
        images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)

    monkeypatch.setattr(comparison, "read_cifar10", lambda *_, **__: Two)
    with pytest.raises(BadInput, match="has 2 test images of CIFAR-10, 8 are needed"):
        bench(data=tmp_path).inputs(timm.create_model("test_mdeq"), 32, 8)


def test_steps_between_looks() -> None:
    layers = bench(check_every=4).solvers(8, 0.1)
    assert {layers[f"mdeq {name}"].solver.check_every for name in ("Broyden", "Anderson", "Picard")} == {4}


@pytest.mark.slow
def test_operations_of_a_compiled_f() -> None:
    """They are those of the plain one."""
    plain, compiled = (scaling.roofline(bench(compiled=c), ["deq_tiny_cifar:16:2"])[-1] for c in (False, True))
    assert plain["gflop"] == compiled["gflop"] > 0


@pytest.mark.parametrize("settings", [{"bf16": True}, {"channels_last": True}])
def test_training_part_in_other_settings(settings: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference stays in float64."""
    monkeypatch.setattr(comparison, "BACKWARD_STEPS", (2,))
    monkeypatch.setattr(comparison, "measured_peak", lambda *_: 1.0)
    b = bench(**settings)
    with b.precision():
        rows = comparison.training_part(b, [], "mdeq_tiny_cifar.cifar10:16:2")
    errors = [row["gradient_error"] for row in rows if "gradient_error" in row]
    assert len(errors) == 8
    assert all(0 < error < 2 for error in errors)


def test_growth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """What grows with the square of the side is linear in pixels; memory is measured elsewhere."""

    def peak(bench: Bench, case: str, contender: str, width: int) -> float:
        _, side, batch = parse_case(case)
        return float(side**2 * batch * width)

    monkeypatch.setattr(scaling, "measured_peak", peak)
    monkeypatch.setattr(scaling, "FACTORS", {"steps": (1, 2), "side": (1, 1.5), "batch": (1, 2)})
    monkeypatch.setattr(scaling, "WIDTHS", (1, 2))
    monkeypatch.setattr(scaling, "MATRICES", (32, 64))
    words = "--scaling --cases test_mdeq:16:1 --trained deq_tiny_cifar:16:1 --steps 2 --repeats 1"
    monkeypatch.setattr(tools.benchmark, "list_models", lambda pretrained: ["deq_tiny_cifar"])
    call(monkeypatch, *words.split(), "--out", str(tmp_path))
    rows = list(csv.DictReader((tmp_path / "scaling.csv").read_text().splitlines()))
    assert {row["axis"] for row in rows} == {"steps", "pixels", "batch", "channels"}
    growth = {
        (row["axis"], row["contender"]): row["memory_exponent"]
        for row in scaling.exponents(
            [{**row, **{k: float(row[k]) for k in ("value", "ms", "peak_mib")}} for row in rows]
        )
    }
    assert growth == {
        (axis, name): pytest.approx(0.0 if axis == "steps" else 1.0)
        for axis in ("steps", "pixels", "batch", "channels")
        for name in ("mdeq Broyden", "mdeq Broyden + history 5", "mdeq Anderson")
    }
    assert (tmp_path / "scaling.png").stat().st_size > 20_000
    rates = list(csv.DictReader((tmp_path / "rates.csv").read_text().splitlines()))
    assert [row["what"] for row in rates] == ["matrix product of 32", "matrix product of 64", "test_mdeq:16:1"]
    assert max(float(row["share"]) for row in rates[:2]) == 1
    assert "time_exponent" in capsys.readouterr().out


def test_operations_of_f() -> None:
    """One branch: 3x3 convolutions of 24 to 120 channels and back at full resolution, two operations a product."""
    rows = scaling.roofline(bench(), ["deq_tiny_cifar:16:2"])
    assert rows[-1]["gflop"] == pytest.approx(2 * 2 * 2 * 24 * 120 * 9 * 16**2 / 1e9)


def test_exponent() -> None:
    values = [1.0, 2.0, 5.0]
    assert scaling.exponent(values, [3 * v**1.5 for v in values]) == pytest.approx(1.5)
    assert math.isclose(scaling.exponent(values, [7.0] * 3), 0, abs_tol=1e-12)


# Bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--cases mdeq_tiny_cifar", "a case is MODEL:SIDE:BATCH"),
        ("--cases mdeq_tiny_cifar:32:0", "a case is MODEL:SIDE:BATCH"),
        ("--cases mdeq_tiny:32:1", "did you mean"),
        (
            "--cases mdeq_tiny_cifar.foo:32:2",
            r"no weights named mdeq_tiny_cifar.foo; did you mean mdeq_tiny_cifar.cifar10",
        ),
        ("--parts solve --cases test_mdeq:16:1 --data {folder}", "CIFAR-10"),
        ("--parts training --trained mdeq_tiny_seg.camvid:32:1", "--parts training is for classifiers"),
        ("--check-every 0", "--check-every must be >= 1"),
        ("--history 1", "--history must be >= 2"),
        ("--cases mdeq_tiny_cifar:8:1", "must be >= 16"),
        ("--trained mdeq_small:64:1", "--parts tolerance ragged needs a --trained model with weights"),
        ("--steps 0", "--steps must be >= 1"),
        ("--tol 0", r"--tol must be in \(0, 1\)"),
        ("--threads 0", "--threads must be >= 1"),
        ("--parts everything", "invalid choice"),
        ("--device cuda:99", "device cuda:99 is not available"),
        ("--out {file}", "is a file, not a folder"),
    ],
)
def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, message: str) -> None:
    file = tmp_path / "file"
    file.touch()
    out = tmp_path / "out"
    with pytest.raises(BadInput, match=message):
        call(monkeypatch, "--out", str(out), *words.format(file=file, folder=tmp_path).split())
    assert not out.exists()


def test_missing_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "g++"))
    with pytest.raises(BadInput, match="--compile needs a C"):
        call(monkeypatch, "--cases", "test_mdeq:16:1", "--compile")


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchdeq", None)
    with pytest.raises(BadInput, match=r'torchdeq: pip install -e "\.\[bench\]"'):
        call(monkeypatch, "--cases", "test_mdeq:16:1")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory of a process is read from /proc")
@pytest.mark.parametrize(("contender", "backward_steps"), [("mdeq Anderson", None), ("mdeq implicit", 2)])
def test_a_measurement_in_a_process_of_its_own(contender: str, backward_steps: int | None) -> None:
    assert comparison.measured_peak(bench(bf16=True), "test_mdeq:64:4", contender, backward_steps) > 0


# The allocator


@pytest.mark.skipif(sys.platform != "linux", reason="the C library of Linux")
@pytest.mark.parametrize("variable", [None, "MALLOC_TRIM_THRESHOLD_"])
def test_freed_memory_is_kept_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, variable: str | None
) -> None:
    calls: list[tuple[int, int]] = []

    class Library:
        def mallopt(self, option: int, value: int) -> int:
            calls.append((option, value))
            return 1

    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    if variable is not None:
        monkeypatch.setenv(variable, "65536")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())
    keep_freed_memory()
    assert bool(calls) == (variable is None)
