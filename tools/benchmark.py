"""Compare solvers and gradients with TorchDEQ, the explicit twin and a ResNet, side by side in one process.

    python tools/benchmark.py --cases mdeq_tiny_cifar:32:32 mdeq_large_cifar:32:8 --data DIR --out OUT

All run on the same cell, weights, inputs and precision, and take turns, so that a machine whose speed drifts is as slow
for one as for the others. A case is MODEL:SIDE:BATCH. Parts:

    solve      a solve of a fixed number of steps, and the time inside f; the ratio of the two is the overhead
    inference  images/s of whole models at that number of steps, and the residual reached
    tolerance  time to a relative residual, on trained weights
    training   a training step, its peak memory, and the error of its gradient against float64; implicit gradients take
               as many backward steps as they need for the error that TorchDEQ has after --steps, or 1.1 times that
    ragged     a batch of 64 on trained weights, 8 of which need four times the steps of the rest
    memory     what a solve holds beyond f itself, each in a process of its own

`--scaling` measures how time and memory grow with steps, pixels, channels and batch instead, and the share of the
machine's matrix-multiplication rate that f reaches. Prints a table and saves it as CSV and PNG, with the command, the
hardware and the versions as JSON.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from mdeq import list_models
from tools import comparison, scaling
from tools.build import check_compiler, find_device, known_weights
from tools.checkpoint import check_folder, make_folder
from tools.comparison import NEED_WEIGHTS, PARTS, Bench
from tools.config import BadInput, optional
from tools.contenders import parse_case
from tools.peak import check_measurable
from tools.program import Parser, check_at_least, program
from tools.results import circumstances, write_json
from tools.timings import plot, save_table, table

CASES = ["mdeq_tiny_cifar:32:32", "mdeq_large_cifar:32:8", "mdeq_small:224:2"]


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help="default: all")
    parser.add_argument("--cases", nargs="+", default=CASES, help="MODEL:SIDE:BATCH, for solve, inference and memory")
    parser.add_argument(
        "--trained",
        default="mdeq_tiny_cifar.cifar10:32:32",
        help="the case for the other parts, with weights for tolerance and ragged (default: %(default)s)",
    )
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10, for test images instead of noise")
    parser.add_argument("--steps", type=int, default=18, help="solver steps")
    parser.add_argument(
        "--tol", type=float, help="relative residual, for tolerance and ragged (default: 1e-3, in bfloat16 1e-2)"
    )
    parser.add_argument("--history", type=int, default=5, help="history of Anderson, and of one Broyden")
    parser.add_argument("--check-every", type=int, default=1, help="steps of our solvers between residual checks")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1")
    parser.add_argument("--bf16", action="store_true", help="run f under bfloat16 autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the cell, for all contenders alike")
    parser.add_argument("--channels-last", action="store_true", help="run 2D models in that memory format")
    parser.add_argument("--scaling", action="store_true", help="measure growth instead")
    parser.add_argument("--out", type=Path, default=Path("runs") / "benchmark", help="folder for CSV and PNG")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser.parse_args()


def checked(arguments: argparse.Namespace) -> Bench:
    """Return what is to be measured.

    Raises:
        BadInput: for a setting that is out of range, an unknown model or a missing package.
    """
    check_at_least(1, arguments, "steps", "check_every", "repeats", "threads")
    tol = (1e-2 if arguments.bf16 else 1e-3) if arguments.tol is None else arguments.tol  # bfloat16's eps: 8e-3
    if not 0 < tol < 1:
        raise BadInput(f"--tol must be in (0, 1), got {tol}")
    for case in (*arguments.cases, arguments.trained):
        name, side, _ = parse_case(case)
        known_weights(name)
        if side < 16:
            raise BadInput(f"the side of a case must be >= 16, got {case}")
    needing = [part for part in arguments.parts if part in NEED_WEIGHTS and not arguments.scaling]
    if needing and parse_case(arguments.trained)[0] not in list_models(pretrained=True):
        known = ", ".join(list_models(pretrained=True))
        raise BadInput(f"--parts {' '.join(needing)} needs a --trained model with weights, one of {known}")
    if "training" in arguments.parts and not arguments.scaling and "_seg" in parse_case(arguments.trained)[0]:
        raise BadInput(f"--parts training is for classifiers, got --trained {arguments.trained}; leave that part out")
    if arguments.history < 2:
        raise BadInput(f"--history must be >= 2, got {arguments.history}: TorchDEQ's Anderson keeps at least two")
    device = find_device(arguments.device, "--device")
    if "memory" in arguments.parts or arguments.scaling:  # rather now than after other parts
        check_measurable(str(device))
    if arguments.compile:
        check_compiler(device, "--compile")
    check_folder(arguments.out)
    optional("torchdeq", "bench")
    bench = Bench(
        device=device,
        steps=arguments.steps,
        tol=tol,
        history=arguments.history,
        repeats=arguments.repeats,
        check_every=arguments.check_every,
        bf16=arguments.bf16,
        compiled=arguments.compile,
        channels_last=arguments.channels_last,
        data=arguments.data,
    )
    if bench.data is not None:
        bench.images(1)  # so is this
    return bench


def title(bench: Bench, arguments: argparse.Namespace) -> str:
    device = f"{torch.get_num_threads()} CPU threads"
    if bench.device.type == "cuda":
        device = torch.cuda.get_device_name(bench.device)
    settings = f"{arguments.steps} steps, {arguments.repeats} repeats"
    return f"{device}, torch {torch.__version__}, {'bf16' if arguments.bf16 else 'float32'}, {settings}"


def main() -> None:
    torch.backends.cudnn.allow_tf32 = False  # the errors of gradients would be its own; for speed there is --bf16
    arguments = parse_arguments()
    if arguments.measure is not None:
        comparison.measure(arguments.measure)
        return
    bench = checked(arguments)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    if bench.device.type == "cuda":
        torch.cuda.set_device(bench.device)
    make_folder(arguments.out)
    what = "scaling" if arguments.scaling else "benchmark"
    write_json(arguments.out / f"{what}.json", {"title": title(bench, arguments), **circumstances(bench.device)})
    with bench.precision():
        if arguments.scaling:
            scaling.run(bench, arguments.cases, arguments.trained, arguments.out, title(bench, arguments))
            return
        print(title(bench, arguments))
        rows = []
        for part in arguments.parts:
            found = PARTS[part](bench, arguments.cases, arguments.trained)
            print("", *table(found), sep="\n", flush=True)
            rows += found
            save_table(rows, arguments.out / "benchmark.csv")  # what was measured stays, whatever becomes of the rest
    plot(rows, arguments.out / "benchmark.png", title(bench, arguments))
    print(f"saved: {arguments.out / 'benchmark.csv'}, {arguments.out / 'benchmark.png'}")


if __name__ == "__main__":
    program(main)
