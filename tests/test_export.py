"""Exported graphs against the model itself: torch.export saved and loaded, ONNX in onnxruntime, and tools/export.py."""

import dataclasses
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import timm
import torch
from helpers import run
from timm.models import save_for_hf
from torch import Tensor, nn

import mdeq

OFFICIAL = Path(__file__).parent / "data" / "official_cifar_tiny.safetensors"
SOLVERS = {
    "broyden": mdeq.Broyden(max_steps=3),
    "anderson": mdeq.Anderson(max_steps=3),
    "picard": mdeq.Picard(max_steps=2),
    "broyden-restart": mdeq.Broyden(max_steps=4, history=2),
    "broyden-line-search": mdeq.Broyden(max_steps=2, line_search=1),
    "broyden-bfloat16": mdeq.Broyden(max_steps=3, history_dtype="bfloat16"),
    "anderson-ring": mdeq.Anderson(max_steps=6, history=3),
}
NAMES = ["broyden", *(pytest.param(name, marks=pytest.mark.slow) for name in SOLVERS if name != "broyden")]
# Single-scale, so that a graph is small, and sizes free from 16 on.
MINIMAL: dict[str, Any] = dict(channels=(4,), head_channels=(2,), num_features=8, expansion=1, num_groups=2)


def minimal(**kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("deq_tiny_cifar", **{**MINIMAL, **kwargs}).eval()


MOST = 2**31 - 1  # PyTorch 2.6 and 2.7 need one
NEEDS_ONNX = pytest.mark.skipif(torch.__version__ < (2, 7), reason="ONNX needs a newer PyTorch")


def export(model: nn.Module, x: Tensor, *names: str, least: int = 16) -> torch.export.ExportedProgram:
    """Return the graph of a model; names: of the axes that are left open, where empty the axis is fixed."""
    dims = {i: torch.export.Dim(n, min=least if i > 1 else 1, max=MOST) for i, n in enumerate(names) if n}
    with torch.no_grad():
        return torch.export.export(model, (x,), dynamic_shapes=(dims,) if dims else None)


def fixed(solver: mdeq.FixedPointSolver) -> mdeq.FixedPointSolver:
    """Return the solver that takes all its steps, as a graph does."""
    return dataclasses.replace(solver, tol=0.0)


@pytest.mark.parametrize("name", NAMES)
def test_every_solver_saved_and_loaded(name: str, tmp_path: Path) -> None:
    """One graph serves batches and sizes of every kind, odd ones and the smallest included."""
    model = minimal(solver=fixed(SOLVERS[name]))
    program = export(model, torch.randn(2, 3, 24, 20), "batch", "", "height", "width")
    torch.export.save(program, tmp_path / "model.pt2")
    graph = torch.export.load(tmp_path / "model.pt2").module()
    for batch, *size in ((1, 16, 16), (3, 17, 31), (2, 40, 24)):
        x = torch.randn(batch, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(graph(x), model(x))


def test_the_graph_freezes_what_has_converged() -> None:
    """With a tolerance in the graph a sample rests where the solver would have stopped, whatever its batch mates do."""
    model = minimal(solver=mdeq.Picard(max_steps=6, tol=0.1))
    x = torch.cat((torch.zeros(1, 3, 16, 16), torch.randn(1, 3, 16, 16)))
    graph = export(model, x).module()
    with torch.no_grad():
        expected, equilibrium = model(x, return_equilibrium=True)
        torch.testing.assert_close(graph(x), expected)
    assert int(equilibrium.stats.num_steps.min()) < 6


@pytest.mark.parametrize("name", NAMES)
def test_compiled_as_one_graph(name: str) -> None:
    model = minimal(solver=fixed(SOLVERS[name]))
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace:FutureWarning")
@pytest.mark.parametrize("name", ["broyden", "anderson", "picard"])
def test_traced(name: str) -> None:
    """TorchScript of a trace is the model for every batch and size, and no graph for training is made of it."""
    model = minimal(solver=dataclasses.replace(SOLVERS[name], max_steps=6, tol=0.1))
    traced = torch.jit.trace(model, torch.randn(2, 3, 16, 16))
    x = torch.cat((torch.zeros(1, 3, 16, 16), 3 * torch.randn(2, 3, 16, 16)))
    expected, equilibrium = model(x, return_equilibrium=True)
    torch.testing.assert_close(traced(x), expected.detach())
    assert int(equilibrium.stats.num_steps.min()) < 6
    for size in ((2, 3, 20, 24), (1, 3, 17, 16)):
        x = torch.randn(size)
        torch.testing.assert_close(traced(x), model(x), msg=str(size))
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace would lose the gradients"):
        torch.jit.trace(model.train(), x)


@NEEDS_ONNX
def test_program_writes_both_formats(tmp_path: Path) -> None:
    model = minimal(solver={"name": "anderson", "max_steps": 2, "history": 2})
    save_for_hf(model, str(tmp_path / "model"), safe_serialization=True, model_args=MINIMAL)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["label_names"] = [f"class {i}" for i in range(10)]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))

    out = run("export", tmp_path / "model", "--out", tmp_path / "exported", "--steps", 2, "--dynamic", "batch").ok()
    again = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = again(x, solver=dataclasses.replace(again.deq.solver, max_steps=2, tol=0.0))
    session = onnxruntime.InferenceSession(tmp_path / "exported" / "deq_tiny_cifar.onnx")
    assert [(i.name, i.shape) for i in session.get_inputs()] == [("input", ["batch", 3, 32, 32])]
    assert [(o.name, o.shape) for o in session.get_outputs()] == [("logits", ["batch", 10])]
    torch.testing.assert_close(torch.from_numpy(session.run(None, {"input": x.numpy()})[0]), expected)
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["label_names"])[3] == "class 3"
    assert (about["architecture"], about["steps"]) == ("deq_tiny_cifar", "2")
    extra = {"mdeq.json": ""}
    program = torch.export.load(tmp_path / "exported" / "deq_tiny_cifar.pt2", extra_files=extra)
    assert json.loads(extra["mdeq.json"]) == about
    torch.testing.assert_close(program.module()(x), expected)

    assert "against the model at the same steps: " in out
    assert "mean relative residual at 2 steps: " in out
    assert sorted(p.name for p in (tmp_path / "exported").iterdir()) == ["deq_tiny_cifar.onnx", "deq_tiny_cifar.pt2"]
    for path in (tmp_path / "exported").iterdir():
        assert str(Path(mdeq.__file__).parent).encode() not in path.read_bytes(), "paths of this machine"


def test_a_volume_says_how_it_is_prepared(tmp_path: Path) -> None:
    out = run("export", "mdeq3d_tiny_seg.hippocampus", "--out", tmp_path, "--format", "pt2", "--steps", 1).ok()
    assert "input (1, 1, 36, 52, 36)" in out  # the patches of its training
    extra = {"mdeq.json": ""}
    torch.export.load(tmp_path / "mdeq3d_tiny_seg.pt2", extra_files=extra)
    preprocessing = json.loads(json.loads(extra["mdeq.json"])["preprocessing"])
    assert (preprocessing["orientation"], preprocessing["spacing"]) == ("RAS", [1, 1, 1])


REFUSALS = {
    "unknown model": (["mdeq_smal"], "did you mean mdeq_small?"),
    "no such checkpoint": (["test_mdeq", "--checkpoint", "nowhere.safetensors"], "nowhere.safetensors"),
    "no such tag": (["test_mdeq.nowhere"], "nowhere"),
    "checkpoint of another model": (["test_mdeq", "--checkpoint", OFFICIAL], "official_cifar_tiny"),
    "checkpoint of no model": (["local-dir:nowhere", "--checkpoint", OFFICIAL], "--checkpoint needs a name"),
    "folder without a model": ([Path(__file__).parent], str(Path(__file__).parent)),
    "no steps": (["test_mdeq", "--steps", "0"], "--steps must be >= 1, got 0"),
    "size of wrong rank": (["test_mdeq", "--size", "64"], "--size needs 2 numbers"),
    "size too small": (["test_mdeq", "--size", "15", "64"], "every side must be >= 16, got 15"),
    "size too small to be dynamic": (["test_mdeq", "--size", "32", "64", "--dynamic", "size"], ">= 33 to be dynamic"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_program_refuses_in_one_line(case: str, tmp_path: Path) -> None:
    words, reason = REFUSALS[case]
    assert reason in run("export", *words, "--format", "pt2", "--out", tmp_path / "out").refusal()
    assert list(tmp_path.iterdir()) == []


def test_program_refuses_a_format_that_the_file_is_not(tmp_path: Path) -> None:
    words = ["test_mdeq", "--out", tmp_path / "model.onnx", "--format", "pt2"]
    assert "--format pt2 does not match the file" in run("export", *words).refusal()
    (tmp_path / "file").write_text("")
    assert "is a file" in run("export", "test_mdeq", "--out", tmp_path / "file" / "deeper").refusal()


@NEEDS_ONNX
def test_program_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert 'pip install -e ".[export]"' in run("export", "test_mdeq", "--out", tmp_path / "out").refusal()


def exported_difference(tmp_path: Path, *words: Any) -> dict[str, float]:
    """Return the largest difference between each exported file and the model at the same steps, by kind of file."""
    lines = run("export", *words, "--out", tmp_path / "out").ok().splitlines()
    found = {}
    for line, after in pairwise(lines):
        if line.startswith(str(tmp_path)):
            found[Path(line.partition(": ")[0]).suffix] = float(after.partition(": ")[2].split()[0])
    return found


@NEEDS_ONNX
@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("test_mdeq", "--steps", 8, "--dynamic", "batch", "size"),
        ("test_mdeq", "--steps", 8, "--size", 33, 47),
        ("mdeq_tiny_cifar", "--checkpoint", OFFICIAL, "--steps", 8, "--dynamic", "batch"),
        ("mdeq_tiny_cifar.cifar10", "--steps", 8),
        ("mdeq_tiny_seg", "--steps", 3, "--size", 33, 50, "--dynamic", "batch", "size"),
        ("test_mdeq3d", "--steps", 4, "--size", 17, 16, 19),
        ("mdeq3d_tiny_seg", "--steps", 3, "--size", 17, 24, 19, "--dynamic", "batch", "size"),
    ],
    ids=lambda words: " ".join(str(word) for word in words if not isinstance(word, Path)),
)
def test_models_agree_with_their_exports(words: tuple[Any, ...], tmp_path: Path) -> None:
    found = exported_difference(tmp_path, *words)
    assert set(found) == {".onnx", ".pt2"}
    assert max(found.values()) <= 1e-4
