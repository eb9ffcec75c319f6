"""Export a model to ONNX and to torch.export's .pt2, with the solve as a fixed number of steps.

    python tools/export.py mdeq_tiny_cifar.cifar10 --out exported --steps 8
    python tools/export.py runs/NAME --out model.onnx --dynamic batch size
    python tools/export.py mdeq_small --checkpoint released.pkl --out exported --format pt2 --size 224 224

MODEL is a name of mdeq.list_models() with or without a weight tag, an hf-hub: or local-dir: name, the folder of a run,
or a file of weights with its config.json beside it. A graph cannot stop early: it takes --steps steps for every sample,
without tolerance. Every file is loaded again and compared with the model itself, and the residual at those steps is
reported.
"""

import argparse
import dataclasses
import importlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

import mdeq
from tools.batches import MIN_SIZE
from tools.build import build_model
from tools.checkpoint import check_folder, make_folder, write_atomically
from tools.config import BadInput, ModelConfig
from tools.pretrained import Trained, load_trained
from tools.program import Parser, check_at_least, program

FORMATS = ("onnx", "pt2")
AXES = ("depth", "height", "width")
Run = Callable[[Tensor], Tensor]


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="name, hf-hub:ORG/NAME, local-dir:DIR, a run's folder or file")
    parser.add_argument("--out", type=Path, required=True, help="a folder, or a file that ends in .onnx or .pt2")
    parser.add_argument("--checkpoint", type=Path, help="weights, if MODEL is a name")
    parser.add_argument("--format", nargs="+", choices=FORMATS, help="default: both, or that of the file")
    parser.add_argument("--steps", type=int, help="solver steps; default: the most that the model's own solver takes")
    parser.add_argument("--size", type=int, nargs="+", help="[D] H W of the input; default: the training's")
    parser.add_argument("--batch", type=int, default=1, help="batch size, unless dynamic")
    parser.add_argument("--dynamic", nargs="+", choices=("batch", "size"), default=[], help="what to leave dynamic")
    arguments = parser.parse_args()
    check_at_least(1, arguments, "steps", "batch")
    suffix = arguments.out.suffix.removeprefix(".")
    if suffix in FORMATS and not arguments.out.is_dir():
        if arguments.format not in (None, [suffix]):
            raise BadInput(f"--format {' '.join(arguments.format)} does not match the file {arguments.out}")
        arguments.format, folder = [suffix], arguments.out.parent
    else:
        arguments.format, folder = list(dict.fromkeys(arguments.format or FORMATS)), arguments.out
    check_folder(folder)
    return arguments


def require(formats: Sequence[str]) -> None:
    """Raise BadInput if a format needs a package that is not there, or too old."""
    # Compared as versions. Older exporters do not get on with today's onnxscript.
    if "onnx" in formats and torch.__version__ < "2.7":
        raise BadInput(f"ONNX needs PyTorch 2.7 or newer, this is {torch.__version__}; update it or use --format pt2")
    for package in ("onnx", "onnxscript", "onnxruntime") if "onnx" in formats else ():
        try:
            importlib.import_module(package)
        except ImportError:
            raise BadInput(f'ONNX needs {package}: `pip install -e ".[export]"`, or use --format pt2') from None


def load(name: str, checkpoint: Path | None) -> tuple[Trained, str]:
    """Return a model in eval mode, and where its weights come from."""
    released = {n.partition(".")[0] for n in mdeq.list_models(pretrained=True)}
    if checkpoint is None and (name not in mdeq.list_models() or name in released):
        return load_trained(name), name
    if name.partition(".")[0] not in mdeq.list_models():
        raise BadInput(f"--checkpoint needs a name of mdeq.list_models(), got {name}")
    torch.manual_seed(0)
    config = ModelConfig(name=name, checkpoint=None if checkpoint is None else str(checkpoint))
    origin = "none, these are the initial values" if checkpoint is None else str(checkpoint)
    return Trained(build_model(config, None, for_training=False).eval(), {}, ()), origin


def input_size(trained: Trained, size: Sequence[int] | None, dynamic: Sequence[str]) -> tuple[int, ...]:
    """Return the spatial size to export for: as given, of the patches of the training, or the model's own."""
    model, dims = trained.model, trained.model.spatial_dims
    own = tuple(model.pretrained_cfg["input_size"][1:])  # timm's have two sides
    patch = (trained.config.get("preprocessing") or {}).get("patch_size")
    size = tuple(size or patch or (*own[:1] * (dims - 2), *own))
    if len(size) != dims:
        raise BadInput(f"--size needs {dims} numbers for this model, got {' '.join(map(str, size))}")
    least = smallest_size(model) if "size" in dynamic else MIN_SIZE
    if min(size) < least:
        raise BadInput(f"every side must be >= {least}{' to be dynamic' * ('size' in dynamic)}, got {min(size)}")
    return size


def smallest_size(model: mdeq.Backbone) -> int:
    """Return the least side that one graph for all sizes serves: the coarsest map must not shrink to a single point."""
    return max(MIN_SIZE, model.feature_info[-1]["reduction"] + 1)


def capture(model: mdeq.Backbone, x: Tensor, names: dict[int, str]) -> torch.export.ExportedProgram:
    """Return the graph of a model, with the named axes of x left open."""
    least = smallest_size(model)
    # With a most, which is none: without one, PyTorch 2.6 and 2.7 take a slice of a batch for a limit of its size.
    dims = {a: torch.export.Dim(n, min=least if a > 0 else 1, max=2**31 - 1) for a, n in names.items()}
    with torch.no_grad():
        graph = torch.export.export(model, (x,), dynamic_shapes=(dims,) if dims else None)
    for node in graph.graph.nodes:
        # Where each came from: several times the weights of a small model, and private paths.
        node.meta.pop("stack_trace", None)
    return graph


def save_pt2(graph: torch.export.ExportedProgram, path: Path, names: dict[int, str], about: dict[str, str]) -> None:
    with open(path, "wb") as file:
        torch.export.save(graph, file, extra_files={"mdeq.json": json.dumps(about)})


def save_onnx(graph: torch.export.ExportedProgram, path: Path, names: dict[int, str], about: dict[str, str]) -> None:
    # Its optimiser takes time quadratic in the size of the graph, and the runtimes optimise on their own.
    made = torch.onnx.export(
        graph,
        dynamo=True,
        input_names=["input"],
        output_names=["logits"],
        dynamic_shapes=(names,) if names else None,
        optimize=False,
        verbose=False,
    )
    assert made is not None  # as it is where its dynamo is true
    for node in made.model.graph:
        node.metadata_props.clear()
        # The exporter adds a bias of zeros where there is none; that of 3D convolutions has the wrong shape.
        bias = node.inputs[2] if node.op_type == "Conv" and len(node.inputs) == 3 else None
        if bias is not None and bias.producer() is not None:
            node.resize_inputs(2)
    made.model.metadata_props.update(about)
    made.save(str(path))


def load_pt2(path: Path) -> Run:
    with open(path, "rb") as file:
        module = torch.export.load(file).module()
    return module


def load_onnx(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; it warns of constants that it does not fold
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"input": x.numpy()})[0])


SAVE = {"onnx": save_onnx, "pt2": save_pt2}
LOAD = {"onnx": load_onnx, "pt2": load_pt2}


@dataclass
class Reference:
    """Inputs, and what the model itself makes of them."""

    inputs: list[Tensor]
    fixed: list[Tensor]
    own: list[Tensor]
    residual: Tensor
    own_residual: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: mdeq.Backbone, inputs: list[Tensor], solver: mdeq.FixedPointSolver) -> "Reference":
        fixed = [model(x, return_equilibrium=True, solver=solver) for x in inputs]
        own = [model(x, return_equilibrium=True) for x in inputs]
        residuals = [torch.cat([e.stats.residual for _, e in results]) for results in (fixed, own)]
        return cls(inputs, [y for y, _ in fixed], [y for y, _ in own], *residuals)

    def lines(self, run: Run) -> list[str]:
        """Return what to say of a graph."""
        with torch.no_grad():
            outputs = [run(x) for x in self.inputs]
        largest = max(float(y.abs().max()) for y in self.fixed)
        return [
            f"  against the model at the same steps: {difference(outputs, self.fixed):.2e} at most, "
            f"of logits up to {largest:.3g}, over {len(outputs)} random inputs",
            f"  against the model with its own solver: {difference(outputs, self.own):.2e} at most",
        ]


def difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def random_inputs(model: mdeq.Backbone, size: tuple[int, ...], batch: int, dynamic: Sequence[str]) -> list[Tensor]:
    """Return inputs, the first of the size and batch given, the others of other ones where these are dynamic."""
    generator = torch.Generator().manual_seed(0)
    least = smallest_size(model)
    sizes = [size, size, size]
    if "size" in dynamic:
        sizes = [size, tuple(s + 1 for s in size), tuple(max(least, s - 3 * i) for i, s in enumerate(size))]
    batches = (batch, 1, batch + 1) if "batch" in dynamic else (batch, batch, batch)
    return [torch.randn(b, model.in_chans, *s, generator=generator) for b, s in zip(batches, sizes)]


def about(trained: Trained, solver: mdeq.FixedPointSolver) -> dict[str, str]:
    """Return what travels with a graph."""
    cfg = trained.model.pretrained_cfg
    entries = {
        "architecture": cfg["architecture"],
        "tag": cfg.get("tag"),
        "solver": type(solver).__name__,
        "steps": solver.max_steps,
        "label_names": list(trained.label_names) or None,
        "preprocessing": trained.config.get("preprocessing"),  # of volumes
        **{key: cfg.get(key) for key in ("mean", "std", "interpolation", "crop_pct")},
    }
    return {key: v if isinstance(v, str) else json.dumps(v) for key, v in entries.items() if v is not None}


def write(arguments: argparse.Namespace, trained: Trained, solver: mdeq.FixedPointSolver) -> None:
    """Write the files that were asked for, one after the other, and say how exact each is."""
    model, size = trained.model, input_size(trained, arguments.size, arguments.dynamic)
    batch = 2 if "batch" in arguments.dynamic else arguments.batch  # a batch of 1 would be taken for a constant
    axes = AXES[-model.spatial_dims :]
    names = {0: "batch"} if "batch" in arguments.dynamic else {}
    names |= {i + 2: name for i, name in enumerate(axes)} if "size" in arguments.dynamic else {}
    own = model.deq.solver
    reference = Reference.of(model, random_inputs(model, size, batch, arguments.dynamic), solver)
    start = time.monotonic()
    model.deq.solver = solver
    graph = capture(model, reference.inputs[0], names)
    shape = [names.get(i, str(n)) for i, n in enumerate(reference.inputs[0].shape)]
    print(f"input ({', '.join(shape)}), graph of {len(graph.graph.nodes)} nodes, {time.monotonic() - start:.0f} s")
    whole = arguments.out.suffix.removeprefix(".") in FORMATS and not arguments.out.is_dir()
    folder = arguments.out.parent if whole else arguments.out
    make_folder(folder)
    facts = about(trained, solver)
    for kind in arguments.format:
        path = arguments.out if whole else folder / f"{facts['architecture']}.{kind}"
        start = time.monotonic()
        lines: list[str] = []

        def save(temporary: Path, kind: str = kind, lines: list[str] = lines) -> None:
            SAVE[kind](graph, temporary, names, facts)
            lines += reference.lines(LOAD[kind](temporary))

        write_atomically(path, save)
        print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB, {time.monotonic() - start:.0f} s", *lines, sep="\n")
    mode, limit = "relative" if own.stop_mode == "rel" else "absolute", f"{own.max_steps} steps, tolerance {own.tol:g}"
    print(f"mean {mode} residual at {solver.max_steps} steps: {reference.residual.mean():.2e}")
    print(f"with the model's own solver (at most {limit}): {reference.own_residual.mean():.2e}")


def main() -> None:
    arguments = parse_arguments()
    require(arguments.format)
    trained, source = load(arguments.model, arguments.checkpoint)
    model = trained.model
    steps = arguments.steps or model.deq.solver.max_steps
    solver = dataclasses.replace(model.deq.solver, max_steps=steps, tol=0.0)
    name = model.pretrained_cfg["architecture"]
    print(f"{name}: weights: {source}; {type(solver).__name__}, {steps} steps")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters' own, about their insides
        write(arguments, trained, solver)


if __name__ == "__main__":
    program(main)
