"""Predict images or volumes with a trained model: classes, or label maps with pictures to look at.

    python tools/predict.py mdeq_tiny_cifar.cifar10 photo.jpg --out predictions
    python tools/predict.py runs/camvid_mdeq_tiny_seg frames/ --out predictions
    python tools/predict.py hf-hub:ORG/NAME scan.nii.gz --out predictions --patch 48

MODEL is a name of a model with weights, hf-hub:ORG/NAME, local-dir:FOLDER, the folder of a run or a file of weights;
INPUT an image, a NIfTI volume, a folder of either, or a pattern such as "frames/*.png". predictions.csv and
predictions.json have a row for every input, with how its equilibrium was reached; inputs that did not converge are
marked there and on the pictures. docs/predict.md has the details.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm

from tools.checkpoint import check_folder, make_folder, write_atomically
from tools.config import BadInput
from tools.inputs import add_input_arguments, check_size, input_files
from tools.predictions import Result, as_csv, as_json, printed
from tools.predictors import Predictor, Sample, settings_of
from tools.pretrained import load_trained
from tools.program import Parser, check_at_least, program


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    windows = "segmentation: window size in pixels or voxels, one number or one per axis"
    add_input_arguments(parser, inputs="+", patch=windows)
    parser.add_argument("--out", type=Path, required=True, help="output folder; not that of the inputs")
    parser.add_argument("--topk", type=int, default=5, help="classes to list (default: 5)")
    parser.add_argument("--solver-steps", type=int, help="maximum solver steps; default: the model's own")
    parser.add_argument("--batch-size", type=int, default=1, help="inputs, or windows of one, per batch (default: 1)")
    parser.add_argument(
        "--overlap", type=float, default=0.5, help="share of a window that its neighbour covers (default: 0.5)"
    )
    arguments = parser.parse_args()
    check_at_least(1, arguments, "topk", "solver_steps", "batch_size")
    if not 0 <= arguments.overlap < 1:
        raise BadInput(f"--overlap must be >= 0 and < 1, got {arguments.overlap:g}")
    check_size(arguments.size)
    check_folder(arguments.out)
    return arguments


def output_names(files: Sequence[Path]) -> list[str]:
    """Return a name for the outputs of each input: its own without the suffix, numbered where that is taken."""
    names: list[str] = []
    taken: set[str] = set()  # also on file systems that do not tell upper from lower case
    for file in files:
        stem = file.name[:-7] if file.name.lower().endswith(".nii.gz") else file.stem
        name, count = stem, 1
        while name.casefold() in taken:
            count += 1
            name = f"{stem}_{count}"
        taken.add(name.casefold())
        names.append(name)
    return names


def predicted(predictor: Predictor, files: Sequence[Path], watch: Callable[..., Any]) -> Iterator[list[Result]]:
    """Yield the results of all inputs in groups; one that fails does not keep the others from being predicted."""
    waiting: list[Sample] = []

    def flush() -> list[Result]:
        samples = list(waiting)
        waiting.clear()
        if not samples:
            return []
        try:
            return predictor.predict(samples)
        except BadInput as error:
            return [Result(sample.number, sample.path, error=str(error)) for sample in samples]

    for number, (path, name) in enumerate(watch(list(zip(files, output_names(files))))):
        try:
            sample = predictor.read(number, path, name)
        except BadInput as error:
            yield [Result(number, path, error=str(error))]
            continue
        if waiting and waiting[0].x.shape != sample.x.shape:
            yield flush()
        waiting.append(sample)
        if len(waiting) == predictor.batch_size:
            yield flush()
    yield flush()


def save_tables(results: Sequence[Result], predictor: Predictor, model: str) -> None:
    """Write predictions.csv and predictions.json."""
    out, names, dense = predictor.settings.out, predictor.names, predictor.dense
    make_folder(out)
    about: dict[str, Any] = {"model": model, "solver": repr(predictor.solver)}
    if predictor.is_3d:
        about["preprocessing"] = predictor.preprocessing.record()
    text = {
        "predictions.csv": as_csv(results, names, dense),
        "predictions.json": as_json(results, names, dense, about),
    }
    for name, content in text.items():
        data = content.encode(errors="backslashreplace")  # names of files may be no text
        write_atomically(out / name, lambda path, data=data: path.write_bytes(data))


def main() -> None:
    arguments = parse_arguments()
    more = {name: getattr(arguments, name) for name in ("topk", "batch_size", "overlap", "solver_steps")}
    settings = settings_of(arguments, **more)
    predictor = Predictor(load_trained(arguments.model), settings)
    files = input_files(arguments.input, predictor.suffixes, arguments.out)
    results: list[Result] = []

    def watch(inputs: Sequence[Any]) -> Any:
        return tqdm(inputs, desc="predicting", unit="input", disable=None)  # silent where nobody watches

    try:
        for group in predicted(predictor, files, watch):
            for result in group:
                if result.error and len(files) > 1:
                    tqdm.write(f"error: {result.error}", file=sys.stderr)
            results += group
    finally:  # what was predicted before an interruption has its rows
        results.sort(key=lambda result: result.number)
        if any(not result.error for result in results):
            save_tables(results, predictor, arguments.model)
    failed = [result for result in results if result.error]
    if len(failed) == len(results):
        raise BadInput(failed[0].error if len(failed) == 1 else f"none of the {len(failed)} inputs could be predicted")
    print("\n".join(printed(results, predictor.names, arguments.topk)))
    marked = sum(bool(result.warning) for result in results)
    print(
        f"{marked} of {len(results) - len(failed)} inputs did not converge in {predictor.solver.max_steps} solver steps"
    )
    print(f"saved: {settings.out}")
    if failed:
        raise BadInput(f"{len(failed)} of {len(results)} inputs could not be predicted, see above")


if __name__ == "__main__":
    program(main)
