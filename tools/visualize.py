"""Draw what a model's equilibrium does: a page of pictures for an image, a volume or a small part of a data set.

    python tools/visualize.py mdeq_tiny_cifar.cifar10 photo.jpg --out pictures
    python tools/visualize.py mdeq3d_tiny_seg.hippocampus scan.nii.gz --out pictures
    python tools/visualize.py mdeq_tiny_cifar.cifar10 --data 64 --out pictures data.root=DIR

MODEL and INPUT are as in tools/predict.py. Residuals of Broyden, Anderson and Picard, feature maps on the way, label
maps of segmenters; with --data also accuracy against steps with the explicit twin, evaluations and spectral radii over
samples of the test split (those that a run held out, where it did), which is that of the model's own data unless
key=value settings say otherwise. Writes PNG files and index.html, which holds them all. docs/visualize.md says how to
read them.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence, Sized
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

import mdeq
from tools.batches import VOID, Process, memory_for
from tools.checkpoint import check_folder, make_folder, write_atomically, write_text
from tools.config import BadInput, split_overrides
from tools.figures import readable
from tools.gallery import CAPTIONS, NEEDS_DATA, DataStudy, Subject
from tools.inputs import add_input_arguments, check_size, input_files
from tools.page import Picture, page
from tools.predictors import Predictor, Sample, settings_of
from tools.pretrained import load_trained
from tools.program import Parser, check_at_least, program
from tools.results import circumstances
from tools.samples import data_config, read_part
from tools.volumes import Volume, padded, prepared_spacing, unpadded

SAMPLES = 64
"""Samples of a data set, where --data has no number."""
MOST_LINES = 16
"""Samples of a data set that stand for its inputs, where none is given."""
PAGE = "index.html"
LEAST_STEPS = 40
"""Solver steps to an equilibrium, unless the model's own solver may take more than half as many."""


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(description=__doc__)
    middle = "segmentation: only a middle window of this size"
    add_input_arguments(parser, inputs="*", patch=middle)
    parser.add_argument("--out", type=Path, required=True, help="output folder")
    parser.add_argument(
        "--data",
        type=int,
        nargs="?",
        const=SAMPLES,
        metavar="N",
        help=f"also draw what needs a data set, from N samples of the test split (default N: {SAMPLES})",
    )
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[1, 2, 4, 8], help="steps to stop at (default: 1 2 4 8)"
    )
    parser.add_argument(
        "--most-steps", type=int, help="maximum solver steps; default: twice the model's own, at least 40"
    )
    overrides, rest = split_overrides(sys.argv[1:])
    arguments = parser.parse_intermixed_args(rest)  # inputs may follow the options
    check_at_least(1, arguments, "data", "most_steps", "steps")
    check_size(arguments.size)
    if not arguments.input and arguments.data is None:
        raise BadInput("nothing to look at: give an image or a volume, or --data")
    if overrides and arguments.data is None:
        raise BadInput(f"settings such as {overrides[0]} need --data")
    check_folder(arguments.out)
    return arguments, overrides


def watch(things: Iterable[Any], text: str) -> Iterable[Any]:
    """Return the things with a progress bar, silent where nobody watches."""
    total = len(things) if isinstance(things, Sized) else None
    return tqdm(things, desc=text, total=total, leave=False, disable=None)


def given_inputs(arguments: argparse.Namespace, predictor: Predictor) -> tuple[list[Sample], dict[str, str]]:
    """Return the inputs of the command line, and what is wrong with those that cannot be read, by name.

    Raises:
        BadInput: if none can be read.
    """
    samples, wrong = [], {}
    files = input_files(arguments.input, predictor.suffixes, arguments.out)
    for k, path in enumerate(files):
        try:
            samples.append(predictor.read(k, path, path.name))
        except BadInput as error:
            if len(files) == 1:
                raise
            wrong[path.name] = str(error).replace(str(path), path.name)
            print(error, file=sys.stderr)
    if not samples:
        raise BadInput(f"none of the {len(files)} inputs could be read")
    return samples, wrong


def spacing_of(sample: Sample, predictor: Predictor) -> Sequence[float] | None:
    """Return the mm per voxel of a volume as the model sees it; None of an image."""
    return prepared_spacing(cast(Volume, sample.origin), predictor.preprocessing) if predictor.is_3d else None


def facts(arguments: argparse.Namespace, predictor: Predictor, about: str, study: DataStudy | None) -> dict[str, str]:
    """Return what the page says of how it was made."""
    made = circumstances(predictor.settings.device)
    parameters = sum(p.numel() for p in predictor.model.parameters())
    return {
        "model": f"{model_name(arguments.model)}, {parameters:,} parameters",
        "solver": repr(predictor.solver),
        "inputs": about if study is None or about.endswith(study.about) else f"{about}, and {study.about}",
        "command": made["command"],
        "made on": f"{made['hardware']}, " + ", ".join(f"{name} {v}" for name, v in made["versions"].items()),
    }


def model_name(word: str) -> str:
    """Return the name of a model without the place where it lies."""
    path = Path(word.removeprefix("local-dir:"))
    return path.name or word if path.exists() else word.removeprefix("hf-hub:")


def main() -> None:
    arguments, overrides = parse_arguments()
    predictor = Predictor(load_trained(arguments.model), settings_of(arguments))
    if isinstance(predictor.model.deq.gradient, mdeq.ReversibleGradient):  # it takes the place of any solver
        predictor.model.deq.gradient = mdeq.ImplicitGradient()
    name, steps = model_name(arguments.model), sorted(set(arguments.steps))
    most = arguments.most_steps or max(LEAST_STEPS, 2 * predictor.solver.max_steps)
    samples, wrong = given_inputs(arguments, predictor) if arguments.input else ([], {})
    inputs = [predictor.window(sample.x.unsqueeze(0)) for sample in samples]
    truth, study, spacing = None, None, spacing_of(samples[0], predictor) if samples else None
    about = f"{len(inputs)} inputs" if len(inputs) > 1 else samples[0].name if inputs else ""
    if arguments.data is not None:
        config = data_config(arguments.model, predictor.model, overrides)
        process = Process(device=predictor.settings.device)
        told = any(word.startswith("data.num_classes=") for word in overrides)  # else it is that of a training
        part = read_part(config, predictor.model, arguments.data, process, watch, subset=told)
        study = DataStudy(predictor, name, steps, most, watch, config, part)
        if not inputs:
            count = min(MOST_LINES, len(part.samples))  # spread over them: a split may be sorted by class
            shown = [part.samples[i * len(part.samples) // count] for i in range(count)]
            inputs = [study.window(x) for x, _ in shown]
            spacing = part.spacings[0] if part.spacings else config.data.spacing if predictor.is_3d else None
            if predictor.dense:  # a window may be larger than its volume, or smaller than the padded one
                size = inputs[0].shape[2:]
                truth = unpadded(padded(shown[0][1][0], size, VOID), size)
            about = study.about if len(inputs) == len(part.samples) else f"{len(inputs)} of {study.about}"
    subject = Subject(predictor, name, inputs, about, truth, spacing, steps, most, watch)
    with memory_for("an input", "--size, --patch or --most-steps"):
        pictures = [*subject.pictures(), *(study.pictures() if study is not None else ())]
    left_out = {} if study is not None else {CAPTIONS[key][0]: "needs a data set, see --data" for key in NEEDS_DATA}
    left_out |= wrong
    if not predictor.dense:
        left_out[CAPTIONS["labels"][0]] = f"{name} is a classifier"
    known = facts(arguments, predictor, about, study)
    save(arguments.out, pictures, page(f"Equilibria of {name}", known, pictures, left_out))
    print(f"{name}, {predictor.solver}, on {known['inputs']}")
    for heading, reason in left_out.items():
        print(f"left out: {heading} ({reason})")
    print(f"saved: {arguments.out / PAGE} and {', '.join(f'{p.name}.png' for p in pictures)}")


def save(folder: Path, pictures: Sequence[Picture], text: str) -> None:
    """Write the pictures, then the page; nothing is written before all of it is there."""
    make_folder(folder)
    for picture in pictures:
        write_atomically(folder / f"{picture.name}.png", lambda path, content=picture.png: path.write_bytes(content))
    write_text(folder / PAGE, readable(text))


if __name__ == "__main__":
    program(main)
