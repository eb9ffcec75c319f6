"""Compare prediction in one piece with prediction in windows that overlap, from cold and from warm starts.

    python tools/windows.py --checkpoint runs/NAME --window 32 --overlap 0.5 --count 20 data.root=DIR
    python tools/windows.py --record mdeq/weights/NAME.json data.root=DIR     the weights and the data of a release

For inputs of the test split, or those that a run held out: the share of labels that differ between one piece and
windows weighted by a Gaussian, the evaluations of f that the windows took from zero and from the equilibria of their
neighbours, and whether a repetition is bitwise identical.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from tqdm import tqdm

from mdeq import MDEQSegmenter, WarmStart
from tools.batches import split_lines
from tools.build import build_evaluation, start_process
from tools.checkpoint import CONFIG_FILE, run_of
from tools.config import BadInput, TrainConfig, load_config, optional
from tools.program import Parser, program
from tools.recheck import read_release, release_config


def parse_arguments() -> tuple[argparse.Namespace, TrainConfig]:
    parser = Parser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="weights, with the run's config.yaml beside them")
    parser.add_argument("--record", type=Path, metavar="FILE", help="a record in mdeq/weights/ instead")
    parser.add_argument("--window", type=int, default=32, help="side of a window, at least 16")
    parser.add_argument("--overlap", type=float, default=0.5, help="share of a side, in [0, 1)")
    parser.add_argument("--count", type=int, default=20, help="how many inputs of the split")
    arguments = parser.parse_with_settings()
    overrides = arguments.overrides
    if arguments.window < 16 or not 0 <= arguments.overlap < 1 or arguments.count < 1:
        raise BadInput("--window must be >= 16, --overlap in [0, 1), --count >= 1")
    if (arguments.checkpoint is None) == (arguments.record is None):
        raise BadInput("give --checkpoint with a run's weights, or --record with a release's record")
    if arguments.record is not None:
        config = release_config(read_release(arguments.record), overrides)
        config.data.batch_size = 1
    else:
        if not arguments.checkpoint.exists():
            raise BadInput(f"no checkpoint {arguments.checkpoint}")
        config = load_config(run_of(arguments.checkpoint) / CONFIG_FILE, [*overrides, "data.batch_size=1"])
        config.model.checkpoint, config.model.pretrained = str(arguments.checkpoint), False
    if config.task != "segmentation":
        origin = arguments.checkpoint or arguments.record
        raise BadInput(f"a segmenter is needed, but {origin} has task={config.task}")
    return arguments, config


@torch.no_grad()
def compare(model: MDEQSegmenter, x: Tensor, window: int, overlap: float) -> dict[str, float]:
    """Return shares, counts and whether two repetitions agree for one input `(1, C, *S)`."""
    size, sliding = [window] * (x.ndim - 2), optional("monai.inferers", "volumes").sliding_window_inference
    whole, warm, solves = model(x).argmax(1), WarmStart(model), []

    def from_zero(part: Tensor, place: object) -> Tensor:
        logits, equilibrium = model(part, return_equilibrium=True)
        solves.append(equilibrium.stats)
        return logits

    def predict(predictor: Callable[..., Tensor]) -> Tensor:
        return sliding(x, size, 1, predictor, overlap, mode="gaussian", with_coord=True)

    cold, logits = predict(from_zero), predict(warm)
    stats = {"cold": solves, "warm": list(warm.stats)}
    row = {
        "differs": float((cold.argmax(1) != whole).float().mean()),
        "differs_warm": float((logits.argmax(1) != whole).float().mean()),
        "windows": len(solves),
        "same_bits": float(torch.equal(predict(warm), logits)),
    }
    for name, taken in stats.items():
        row[f"{name}_evaluations"] = sum(s.nfe for s in taken)
        row[f"{name}_converged"] = sum(int(s.converged.sum()) for s in taken)
    return row


def main() -> None:
    arguments, config = parse_arguments()
    process = start_process(config.run)
    model, batches = build_evaluation(config, process)
    assert isinstance(model, MDEQSegmenter)  # as the task asks for
    rows = []
    for x, _ in tqdm(batches.epoch(), total=min(arguments.count, len(batches)), desc="inputs", disable=None):
        rows.append(compare(model, x.to(model.stem.conv1.weight), arguments.window, arguments.overlap))
        if len(rows) == arguments.count:
            break
    total = {name: sum(row[name] for row in rows) for name in rows[0]}
    print("".join(f"{line}\n" for line in split_lines(config.data)), end="")
    print(f"{len(rows)} inputs, windows of {arguments.window} overlapping by {arguments.overlap:g}, {model.deq.solver}")
    for name, key in (("cold", "differs"), ("warm", "differs_warm")):
        print(
            f"{name} starts: {100 * total[key] / len(rows):.3f} % of the labels differ from those in one piece, "
            f"{total[f'{name}_evaluations'] / total['windows']:.2f} evaluations a window, "
            f"{100 * total[f'{name}_converged'] / total['windows']:.1f} % of {total['windows']:.0f} windows converged"
        )
    print(f"repetition: {total['same_bits']:.0f} of {len(rows)} bitwise identical")


if __name__ == "__main__":
    program(main)
