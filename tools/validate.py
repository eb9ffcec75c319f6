"""Evaluate a model on a test split, and measure its accuracy against the number of solver steps.

    python tools/validate.py --checkpoint runs/digits_mdeq_tiny_cifar/model.safetensors
    python tools/validate.py --config CONFIG --model mdeq_tiny_cifar.cifar10 data.root=DIR --steps 1 2 4 8 16
    python tools/validate.py --record mdeq/weights/NAME.json data.root=DIR
    python tools/validate.py --record mdeq/weights/NAME.json --renew model.solver.max_steps=32 data.root=DIR

Without --config, the config beside the checkpoint is read. For a --model without one the data are those of a release's
record, or given by data.*; volumes are prepared as those of its training. With --steps, the accuracy and residual at
each number of solver steps are printed beside those of the explicit twin (the same f applied that many times), and
saved as steps.csv, steps.png and in results.json. With --record FILE the figure of a release is reproduced from the
weights beside its record; if it differs, or another figure of that evaluation does by more than rounding on another
machine explains, the exit code is 1, otherwise --steps puts the table into the record. With --twice the figure at twice
the steps is reproduced too, in a second pass that takes longer. With --renew the evaluation, with other settings if
given, replaces the record's.
"""

import argparse
import dataclasses
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tqdm import tqdm

from tools import build, segmentation_data, volume_data
from tools.batches import Batches, split_lines
from tools.checkpoint import (
    CONFIG_FILE,
    RESULTS_FILE,
    STATE_FILE,
    STEPS_FILE,
    STEPS_PICTURE,
    WEIGHTS_FILE,
    check_folder,
    make_folder,
    run_of,
)
from tools.config import BadInput, DataConfig, TrainConfig, load_config
from tools.engine import evaluate, with_bar
from tools.inference import MultiScale
from tools.metrics import gather
from tools.pretrained import recorded_config, release_of
from tools.program import Parser, check_at_least, program
from tools.recheck import (
    check_place,
    compared,
    contradictions,
    differing,
    evaluated_config,
    evaluation_settings,
    put_into_card,
    read_release,
    recorded_figure,
    release_config,
    renew_record,
    unkept,
)
from tools.report import headline_lines, result_lines
from tools.results import circumstances, evaluation, write_results
from tools.samples import read_part
from tools.scores import TOP5, Score
from tools.steps import recorded, save_table, step_lines, steps_table
from tools.tasks import Task, build_task
from tools.volumes import Preprocessing

HERE = Path()
"""What --record stands for without a file: the results.json of the folder."""
NOT_OF_A_RECORD = ("config", "model", "checkpoint", "out", "scales", "flip")


def parse_arguments() -> tuple[argparse.Namespace, TrainConfig]:
    """Return the arguments and the settings that come of them; `release` is that of `--record FILE`, else None."""
    parser = Parser(description=__doc__)
    parser.add_argument("--config", type=Path, help="YAML file of the run; default: the one beside the checkpoint")
    parser.add_argument("--model", help="model, instead of the config's; hf-hub: and local-dir: names work too")
    parser.add_argument("--checkpoint", type=Path, help="weights: .safetensors, a run's folder, or a PyTorch file")
    parser.add_argument("--steps", type=int, nargs="+", help="numbers of solver steps to compare")
    parser.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help="with --steps: on N samples spread over the split (default: all)",
    )
    parser.add_argument(
        "--out", type=Path, help="folder of steps.csv and steps.png; default: the checkpoint's, or runs/validate_MODEL"
    )
    parser.add_argument("--scales", type=float, nargs="+", help="2D segmentation: average over resized images")
    parser.add_argument("--flip", action="store_true", help="2D segmentation: average with mirrored images")
    parser.add_argument(
        "--record",
        type=Path,
        nargs="?",
        const=HERE,
        metavar="FILE",
        help="put this evaluation into results.json, for the model card; with FILE, a record in mdeq/weights/: "
        "evaluate the weights beside it on its data and compare",
    )
    parser.add_argument("--renew", action="store_true", help="with --record FILE: put this evaluation into it instead")
    parser.add_argument("--twice", action="store_true", help="with --record FILE: compare at twice the steps too")
    arguments = parser.parse_with_settings()
    check_arguments(arguments)
    arguments.release = None if arguments.record in (None, HERE) else read_release(arguments.record)
    if arguments.release is not None:
        return arguments, release_config(arguments.release, arguments.overrides, renew=arguments.renew)
    return arguments, evaluation_config(arguments)


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise BadInput where arguments do not go together."""
    check_at_least(1, arguments, "steps")
    if arguments.samples is not None and (arguments.steps is None or arguments.samples < 1):
        raise BadInput("--samples needs --steps and must be >= 1")
    if arguments.out is not None:
        check_folder(arguments.out)
    of_release = arguments.record not in (None, HERE)
    if arguments.twice and (not of_release or arguments.renew):
        raise BadInput("--twice needs --record FILE without --renew; otherwise twice the steps are measured anyway")
    if arguments.renew and not of_release:
        raise BadInput("--renew needs --record FILE, a record in mdeq/weights/")
    given = [name for name in NOT_OF_A_RECORD if getattr(arguments, name)]
    if of_release and given:
        raise BadInput(f"--record {arguments.record} already says what to evaluate and how; leave out --{given[0]}")
    changed = [*(f"--{name}" for name in ("scales", "flip") if name in given), *unkept(arguments.overrides)]
    if arguments.record == HERE and changed:
        raise BadInput(f"--record keeps settings of the data and the solver only; leave out {changed[0]}")


def evaluation_config(arguments: argparse.Namespace) -> TrainConfig:
    """Return the settings of an evaluation: those of a config, of the run of a checkpoint, or of a release's record.

    Raises:
        BadInput: if none of the three is given, or the checkpoint is not there.
    """
    path, checkpoint, overrides = arguments.config, arguments.checkpoint, arguments.overrides
    if checkpoint is not None:
        if not checkpoint.exists():
            raise BadInput(f"no checkpoint {checkpoint}")
        beside = run_of(checkpoint) / CONFIG_FILE
        path = path or (beside if beside.exists() else None)
    if path is None and arguments.model is None:
        raise BadInput(f"nothing to evaluate: give --checkpoint with a {CONFIG_FILE} beside it, --config or --model")
    says_data = path is not None or any(word.startswith("data.name=") for word in overrides)
    release = None if says_data or checkpoint is not None else release_of(arguments.model)
    if not says_data and release is None:
        name = build.known_weights(arguments.model)
        raise BadInput(f"cannot tell which data {name} is for; set data.name=NAME")
    if release is not None:
        trained = evaluated_config(release.card, release.name)
        base = TrainConfig(task=trained.task, data=trained.data)
        config = check_place(load_config(None, overrides, base=base))
    else:
        config = load_config(path, overrides)
    if arguments.model is not None:
        config.model = dataclasses.replace(config.model, name=arguments.model)
        if path is None:
            config.data = as_recorded(config.data, arguments.model, overrides)
    if checkpoint is not None:
        config.model = dataclasses.replace(config.model, checkpoint=str(checkpoint), pretrained=False)
    elif arguments.model is not None or config.model.checkpoint is None:
        config.model = dataclasses.replace(config.model, pretrained=True)
    return config


def as_recorded(data: DataConfig, model: str, overrides: Sequence[str]) -> DataConfig:
    """Return settings of data with what was done to the volumes of a model's training, where nothing else is said."""
    record = recorded_config(model).get("preprocessing")
    if record is None or data.name not in volume_data.NAMES:
        return data
    done = Preprocessing.of_record(record)
    values = dict(normalise=done.normalise, patch_size=list(done.patch_size) or None)
    if data.name == "nifti":
        values |= dict(spacing=None if done.spacing is None else list(done.spacing), orientation=done.orientation)
    said = {word.partition("=")[0] for word in overrides}
    return dataclasses.replace(data, **{key: value for key, value in values.items() if f"data.{key}" not in said})


def averaged(task: Task, config: TrainConfig, scales: list[float], flip: bool) -> Task:
    """Return a task whose images are predicted at several scales, and mirrored, too.

    Raises:
        BadInput: if it is not one of images with masks, or for a scale out of range.
    """
    if config.data.name not in segmentation_data.NAMES:
        raise BadInput("--scales and --flip are for image segmentation")
    if not all(0.1 <= scale <= 10 for scale in scales):
        raise BadInput(f"--scales must be from 0.1 to 10, got {' '.join(map(str, scales))}")
    return dataclasses.replace(task, inference=MultiScale(tuple(scales), flip, task.inference))


class Measurements:
    """What is measured of one model on one test split.

    Args:
        arguments: `--steps`, `--samples`, `--scales`, `--flip` count.
        config: settings of model, data and run.
    """

    def __init__(self, arguments: argparse.Namespace, config: TrainConfig) -> None:
        self.arguments, self.config = arguments, config
        self.process = process = build.start_process(config.run)
        torch.backends.cudnn.allow_tf32 = False  # no residual goes below 2e-4 with it: float32 is to mean float32
        # a number of classes that a run saved says nothing of these data
        self.subset = any(word.startswith("data.num_classes=") for word in arguments.overrides)
        self.model, self.batches = build.build_evaluation(config, process, subset=self.subset)
        self.task = build_task(config, self.model, self.batches, process)
        self.with_distances = build_task(config, self.model, self.batches, process, distances=True)
        if arguments.scales or arguments.flip:
            scales = arguments.scales or [1.0]
            self.with_distances = self.task = averaged(self.with_distances, config, scales, arguments.flip)
        self.headline: Score = self.task.headline
        self.watch = partial(tqdm, leave=False, disable=not (config.run.progress and process.is_main))
        self.place = (process.device, process.world_size)

    def run(self, label: str, task: Task, batches: Batches, **kwargs: Any) -> dict[str, float]:
        """Evaluate the model, with a bar of progress that has a label."""
        amp = build.autocast(self.config.run, self.process)
        watch = with_bar(batches, self.process, partial(self.watch, desc=label))
        return evaluate(self.model, batches, self.process, task, amp=amp, watch=watch, **kwargs)

    def test(self) -> dict[str, float]:
        """Return all metrics of the test split."""
        return self.run("test", self.with_distances, self.batches)

    def twice(self) -> dict[str, float]:
        """Return its metrics at twice the steps, without a tolerance."""
        solver = self.model.deq.solver
        more_steps = dataclasses.replace(solver, max_steps=2 * solver.max_steps, tol=0.0)
        return self.run("twice the steps", self.task, self.batches, solver=more_steps)

    def against_steps(self) -> list[dict[str, float]]:
        """Return a row for each number of `--steps`; none without."""
        if not self.arguments.steps:
            return []
        some, samples, process = self.batches, None, self.process
        if self.arguments.samples is not None:
            watch = partial(self.watch, unit="sample")
            size = self.config.data.batch_size
            wanted = self.arguments.samples
            some = read_part(self.config, self.model, wanted, process, watch, subset=self.subset, together=size)
            samples = int(gather(torch.tensor([[len(some.samples)]]), process).sum())
        run = partial(self.run, task=self.task, batches=some)
        return steps_table(self.model, self.arguments.steps, run, self.headline, samples)


def check_release(arguments: argparse.Namespace, measured: Measurements) -> None:
    """Compare what a record says with what is found; with `--steps`, have it hold that table.

    Raises:
        SystemExit: with 1 where they differ.
    """
    release, model, headline = arguments.release, measured.model, measured.headline
    result = measured.test()
    twice = measured.twice() if arguments.twice else None
    if measured.process.is_main:
        line, same = compared(release.name, headline, result[headline.key], recorded_figure(release))
        different = [*([] if same else [line]), *differing(release, result), *contradictions(release, model)]
        print("\n".join([line, *result_lines(result)]))
        if twice is not None:
            said = release.card["evaluation"]["metrics_at_twice_the_steps"][headline.key]
            line, same = compared(f"{release.name} at twice the steps", headline, twice[headline.key], said)
            print(line)
            different += [] if same else [line]
        if different:
            print("\n".join(f"differs: {line}" for line in different), file=sys.stderr)
            sys.exit(1)
    rows = measured.against_steps()
    if rows and measured.process.is_main:
        print("\n".join(step_lines(rows, headline)))
        put_into_card(arguments.record, **recorded(rows, circumstances(*measured.place)))
        print(f"saved: {arguments.record}")


def evaluate_split(arguments: argparse.Namespace, measured: Measurements) -> None:
    """Print what is measured, at twice the steps too; save it where `--record`, `--renew` or `--steps` ask for it."""
    config, headline, model = measured.config, measured.headline, measured.model
    result, twice, rows = measured.test(), measured.twice(), measured.against_steps()
    if not measured.process.is_main:
        return
    title = f"{config.model.name} on {config.data.name}"
    if arguments.checkpoint is not None:  # whose model may have started from released weights, which these are not
        place = arguments.checkpoint.resolve()
        place = place.parent if place.name in (STATE_FILE, WEIGHTS_FILE) else place
        title = f"{model.pretrained_cfg['architecture']} of {place.name} on {config.data.name}"
    print("\n".join([f"{title}, {model.deq.solver}", *split_lines(config.data)]))
    lines = headline_lines(headline, result, twice, model.deq.solver.max_steps, digits=2)
    top5 = f", {TOP5.short} {TOP5.text(result[TOP5.key], 2)}" if TOP5.key in result else ""
    print("\n".join([f"{lines[0]}{top5}, loss {result['loss']:.4f}", *lines[1:], *result_lines(result)]))
    release, here = arguments.release, circumstances(*measured.place)
    words = [*(release.card["evaluation"].get("settings", []) if release else []), *arguments.overrides]
    settings = evaluation_settings(words)
    note = getattr(measured.batches, "note", "")
    record = partial(
        evaluation, model, result, twice, *measured.place, metric=headline.key, settings=settings, data_note=note
    )
    if release is not None:
        renew_record(arguments.record, record(), recorded(rows, here))
        print("\n".join([f"saved: {arguments.record}", *(step_lines(rows, headline) if rows else [])]))
        return
    name = re.sub(r"[^\w.-]+", "_", config.model.name)[-100:]  # it may be a path, and no name of a folder on Windows
    fresh = Path("runs") / f"validate_{name}"
    folder = arguments.out or (fresh if arguments.checkpoint is None else run_of(arguments.checkpoint))
    if arguments.record:
        make_folder(folder)
        write_results(folder, evaluation=record())
    if rows:
        print("\n".join(step_lines(rows, headline)))
        save_table(rows, folder, title, headline)
        if (folder / RESULTS_FILE).exists():
            write_results(folder, **recorded(rows, here | {"settings": settings}))
        print(f"saved: {folder / STEPS_FILE}, {folder / STEPS_PICTURE}")


def tell_other_classes(arguments: argparse.Namespace, config: TrainConfig, batches: Batches) -> None:
    """Print the classes that weights were trained for where those of the data are others.

    Raises:
        BadInput: if a class that both have has another number in the data.
    """
    place = config.model.name if arguments.checkpoint is None else f"local-dir:{run_of(arguments.checkpoint)}"
    known = arguments.checkpoint is not None or config.model.pretrained
    labels = tuple(recorded_config(place).get("label_names") or ()) if known else ()
    if labels and batches.class_names and labels != batches.class_names:
        weights, names = arguments.checkpoint or config.model.name, batches.class_names
        told = f"classes of {weights}: {', '.join(labels)}; classes of the data: {', '.join(names)}"
        moved = [name for name in names if name in labels and labels.index(name) != names.index(name)]
        if moved:
            raise BadInput(f"{told}; {moved[0]} is not the same number in both, so no score would mean anything")
        print(told)


def main() -> None:
    arguments, config = parse_arguments()
    measured = Measurements(arguments, config)
    if measured.process.is_main:
        tell_other_classes(arguments, config, measured.batches)
    if arguments.release is not None and not arguments.renew:
        check_release(arguments, measured)
    else:
        evaluate_split(arguments, measured)


if __name__ == "__main__":
    program(main)
