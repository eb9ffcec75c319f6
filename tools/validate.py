"""Evaluate a model on a test split, and its accuracy against the number of solver steps.

    python tools/validate.py --checkpoint runs/digits_mdeq_tiny_cifar/model.safetensors
    python tools/validate.py --config CONFIG --model mdeq_small.in1k data.root=DIR --steps 1 2 4 8 16

Without --config, the config beside the checkpoint is read. With --steps, the accuracy and residual at each number of
solver steps are printed beside those of the explicit twin (the same f applied that many times), and saved as steps.csv
and steps.png.
"""

import argparse
import csv
import dataclasses
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from tqdm import tqdm

from mdeq import Picard
from tools import build
from tools.checkpoint import CONFIG_FILE, check_folder, write_atomically
from tools.config import BadInput, TrainConfig, load_config, split_overrides
from tools.data import Batches, Process
from tools.engine import evaluate
from tools.report import program, result_lines
from tools.results import evaluation, write_results

COLUMNS = [
    "steps",
    "top1",
    "residual_mean",
    "residual_q0.5",
    "residual_q0.9",
    "evaluations",
    "twin_top1",
    "twin_residual_mean",
]


def parse_arguments() -> tuple[argparse.Namespace, TrainConfig]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="YAML file of the run; default: the one beside the checkpoint")
    parser.add_argument("--model", help="model, instead of the config's; hf-hub: and local-dir: names work too")
    parser.add_argument("--checkpoint", type=Path, help="weights: .safetensors, a run's folder, or a PyTorch file")
    parser.add_argument("--steps", type=int, nargs="+", help="numbers of solver steps to compare")
    parser.add_argument("--out", type=Path, help="folder for steps.csv and steps.png; default: that of the checkpoint")
    parser.add_argument(
        "--record", action="store_true", help="put this evaluation into results.json, for the model card"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the config")
    overrides, rest = split_overrides(sys.argv[1:])
    arguments = parser.parse_args(rest)
    if arguments.overrides:
        parser.error(f"expected key=value, got {arguments.overrides[0]}")
    if arguments.steps is not None and min(arguments.steps) < 1:
        raise BadInput(f"--steps must be >= 1, got {min(arguments.steps)}")
    if arguments.out is not None:
        check_folder(arguments.out)
    path, checkpoint = arguments.config, arguments.checkpoint
    if checkpoint is not None:
        if not checkpoint.exists():
            raise BadInput(f"no checkpoint {checkpoint}")
        beside = (checkpoint if checkpoint.is_dir() else checkpoint.parent) / CONFIG_FILE
        path = path or (beside if beside.exists() else None)
    if path is None and arguments.model is None:
        raise BadInput(f"nothing to evaluate: give --checkpoint with a {CONFIG_FILE} beside it, --config or --model")
    config = load_config(path, overrides)
    if arguments.model is not None:
        config.model = dataclasses.replace(config.model, name=arguments.model)
    if checkpoint is not None:
        config.model = dataclasses.replace(config.model, checkpoint=str(checkpoint), pretrained=False)
    elif arguments.model is not None or config.model.checkpoint is None:
        config.model = dataclasses.replace(config.model, pretrained=True)
    return arguments, config


def load(config: TrainConfig, process: Process) -> tuple[torch.nn.Module, Batches]:
    """Return the model of a config and its test split."""
    classes = config.data.num_classes
    if classes is None and config.data.name in ("digits", "cifar10"):
        classes = 10
    model = build.build_model(config.model, classes, for_training=False)
    spec = build.image_spec(model, config.data.image_size)
    batches, found = build.build_split(config, spec, process, training=False)
    if found is not None and found != model.num_classes and config.data.num_classes is None:
        model = build.build_model(config.model, found, for_training=False)
    build.check_classes(model, found, "the test split")
    return model.to(process.device, build.DTYPES[config.run.dtype]).eval(), batches


def steps_table(model: Any, steps: list[int], run: Any) -> list[dict[str, float]]:
    """Return accuracy and residual at each number of solver steps, and those of f applied as often."""
    rows = []
    for count in sorted(set(steps)):
        row = run(f"{count} steps", solver=dataclasses.replace(model.deq.solver, max_steps=count))
        twin = run(f"{count} times f", unroll=count)
        picard = Picard(max_steps=count, tol=0.0, divergence_factor=float("inf"))
        plain = run(f"{count} times f, residual", solver=picard, last_iterate=True)
        row = {"steps": count, **row, "twin_top1": twin["top1"], "twin_residual_mean": plain["residual_mean"]}
        rows.append({name: row[name] for name in COLUMNS})
    return rows


def save_table(rows: list[dict[str, float]], folder: Path, title: str) -> None:
    """Write steps.csv and steps.png."""
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(folder / "steps.csv", lambda path: path.write_text(text.getvalue()))
    steps = [row["steps"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    left.plot(steps, [row["top1"] for row in rows], "o-", label="solver")
    left.plot(steps, [row["twin_top1"] for row in rows], "s--", label="explicit twin (f applied as often)")
    left.set(xlabel="steps", ylabel="top-1 accuracy (%)")
    right.plot(steps, [row["residual_mean"] for row in rows], "o-", label="solver")
    right.plot(steps, [row["twin_residual_mean"] for row in rows], "s--", label="explicit twin")
    right.set(xlabel="steps", ylabel="mean residual", yscale="log")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(steps, [str(s) for s in steps])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    write_atomically(folder / "steps.png", lambda path: figure.savefig(path, dpi=120, format="png"))
    plt.close(figure)


def main() -> None:
    arguments, config = parse_arguments()
    process = build.start_process(config.run)
    model, batches = load(config, process)
    amp, dtype = build.autocast(config.run, process), build.DTYPES[config.run.dtype]

    def run(label: str, **kwargs: Any) -> dict[str, float]:
        def watch(iterator: Iterator[Any]) -> Iterator[Any]:
            quiet = not (config.run.progress and process.is_main)
            return iter(tqdm(iterator, desc=label, total=len(batches), unit="batch", leave=False, disable=quiet))

        return evaluate(model, batches, process, amp=amp, dtype=dtype, watch=watch, **kwargs)

    solver = model.deq.solver
    result = run("test")
    twice = run("twice the steps", solver=dataclasses.replace(solver, max_steps=2 * solver.max_steps, tol=0.0))
    rows = steps_table(model, arguments.steps, run) if arguments.steps else []
    if not process.is_main:
        return
    print(f"{config.model.name} on {config.data.name}, {solver}")
    print(f"test accuracy: {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, loss {result['loss']:.4f}")
    print(f"at twice the solver steps ({2 * solver.max_steps}, without tolerance): {twice['top1']:.2f} %")
    print("\n".join(result_lines(result)))
    checkpoint = arguments.checkpoint
    fresh = Path("runs") / f"validate_{config.model.name.replace('/', '_')}"
    beside = fresh if checkpoint is None else checkpoint if checkpoint.is_dir() else checkpoint.parent
    folder = arguments.out or beside
    if arguments.record:
        folder.mkdir(parents=True, exist_ok=True)
        write_results(folder, evaluation=evaluation(model, result, twice, process.device, process.world_size))
    if rows:
        print(
            f"{'steps':>6} {'top-1':>8} {'residual':>10} {'evaluations':>12} {'twin top-1':>11} {'twin residual':>14}"
        )
        for row in rows:
            print(
                f"{row['steps']:6d} {row['top1']:8.2f} {row['residual_mean']:10.2e} {row['evaluations']:12.1f} "
                f"{row['twin_top1']:11.2f} {row['twin_residual_mean']:14.2e}"
            )
        save_table(rows, folder, f"{config.model.name} on {config.data.name}")
        print(f"saved: {folder / 'steps.csv'}, {folder / 'steps.png'}")


if __name__ == "__main__":
    program(main)
