"""What predict.py and visualize.py are given: a model, inputs, and how these are prepared."""

import argparse
import glob
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.config import BadInput
from tools.images import left_out_line


def add_input_arguments(parser: argparse.ArgumentParser, *, inputs: str, patch: str) -> None:
    """Have a parser take a model, inputs and how these are prepared.

    Args:
        parser: the parser.
        inputs: how many inputs there may be: `"+"` or `"*"`.
        patch: what `--patch` does.
    """
    parser.add_argument("model", metavar="MODEL", help="name with weights, hf-hub:, local-dir:, run's folder, or file")
    parser.add_argument("input", metavar="INPUT", nargs=inputs, help="image, NIfTI volume, folder or pattern")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    parser.add_argument(
        "--size", type=int, nargs="+", help="images: size in pixels that the model sees, one number or height and width"
    )
    windows = parser.add_mutually_exclusive_group()
    windows.add_argument("--patch", type=int, nargs="+", help=patch)
    windows.add_argument("--whole", action="store_true", help="volumes: no windows, whatever the training patch was")
    parser.add_argument(
        "--orientation", choices=["RAS", "none"], help="volumes: none uses the axes as stored in the file"
    )


def check_size(size: Sequence[int] | None) -> None:
    """Raise BadInput for a `--size` that is not one or two numbers of pixels."""
    if size is not None and (len(size) > 2 or min(size) < 16):
        raise BadInput(f"--size must be one or two numbers of at least 16, got {' '.join(map(str, size))}")


def input_files(words: Sequence[str], suffixes: Sequence[str], out: Path) -> list[Path]:
    """Return the files that the inputs name; of a folder those with one of the suffixes, by name.

    Raises:
        BadInput: for a folder or pattern without any, or inputs that lie where the outputs go.
    """
    found: list[Path] = []
    for word in words:
        path = Path(word)
        if path.is_dir():
            # A link to nothing is an input that cannot be read, and said to be.
            there = [file for file in sorted(path.iterdir()) if not file.is_dir() and not file.name.startswith(".")]
            files = [file for file in there if file.name.lower().endswith(tuple(suffixes))]
            if not files:
                raise BadInput(f"no {', '.join(suffixes)} files in {path}")
            if others := {*there} - {*files}:
                print(left_out_line(path, others), file=sys.stderr)
        elif not path.exists() and glob.has_magic(word):
            files = [Path(name) for name in sorted(glob.glob(word))]
            if not files:
                raise BadInput(f"no files match {word}")
        else:
            files = [path]  # one that is not there is said when it is read
        found += [file for file in files if file not in found]
    if any(file.parent.resolve() == out.resolve() for file in found):
        raise BadInput(f"the inputs are in {out}; give --out another folder")
    return found
