"""What the tests of the programs share: runs in this process and in others, small data sets, ways to die."""

import contextlib
import csv
import io
import multiprocessing
import os
import signal
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO
from unittest import mock

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.utils import Bunch
from torch import Tensor

import tools.baseline
import tools.convert
import tools.export
import tools.predict
import tools.publish
import tools.train
import tools.validate
import tools.visualize
import tools.windows
from tools.batches import Process
from tools.config import TrainConfig, load_config
from tools.data import CIFAR_CLASSES
from tools.engine import Trainer
from tools.metrics import SolveLog, Tally
from tools.program import program

ROOT = Path(__file__).resolve().parent.parent
TINY = Path(__file__).parent / "data" / "tiny.yaml"
MAIN = {
    "baseline": tools.baseline.main,
    "convert": tools.convert.main,
    "export": tools.export.main,
    "predict": tools.predict.main,
    "publish": tools.publish.main,
    "train": tools.train.main,
    "validate": tools.validate.main,
    "visualize": tools.visualize.main,
    "windows": tools.windows.main,
}

# The whole test_mdeq: at 16x16 its smallest maps have one pixel.
FOUR_BRANCHES = (
    "model.kwargs.channels=[4,4,8,8]", "model.kwargs.head_channels=[4,4,4,4]", "model.kwargs.num_features=32",
)  # fmt: skip

# Everything that chance has a part in, at once.
RANDOM = (
    "model.kwargs.dropout=0.2", "data.augment=crop_flip", "data.mixup=0.4", "data.cutmix=0.4", "optim.ema_decay=0.9",
    "optim.label_smoothing=0.1", "optim.warmup_epochs=0.5", "deq.jacobian_weight=0.1", "deq.jacobian_prob=0.5",
    "deq.warmup_steps=2", "deq.warmup_unroll=2",
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """How a program ended and what it said."""

    code: int
    out: str
    err: str

    def ok(self) -> str:
        """Return what it printed, after asserting that all went well."""
        assert self.code == 0, self.err
        return self.out

    def refusal(self) -> str:
        """Return the one line that said why it refused, after asserting that it was one line and exit code 2."""
        assert self.code == 2, f"exit code {self.code}\n{self.err}"
        assert "Traceback" not in self.out + self.err
        assert len(self.err.splitlines()) == 1, self.err
        assert self.err.startswith("error: ")
        assert self.err.strip() not in ("error:", "error: None")
        return self.err


def few_digits() -> Bunch:
    """The first 100 digits: 80 to train on and 20 to test."""
    digits = load_digits()
    return Bunch(images=digits.images[:100], target=digits.target[:100])


def run(name: str, *words: Any) -> Outcome:
    """Run a program in this process, on few digits."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch("sys.argv", [f"tools/{name}.py", *map(str, words)]))
        stack.enter_context(mock.patch("sklearn.datasets.load_digits", few_digits))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            program(MAIN[name])
        except SystemExit as end:
            code = end.code
    return Outcome(code, out.getvalue(), err.getvalue())


def train(folder: Path, *words: Any) -> Outcome:
    """Train by the tiny config into a folder."""
    return run("train", TINY, f"run.out_dir={folder}", *words)


def validate(*words: Any) -> Outcome:
    return run("validate", *words)


def publish(*words: Any) -> Outcome:
    return run("publish", *words)


def make_config(folder: Path, *words: str) -> TrainConfig:
    return load_config(TINY, [f"run.out_dir={folder}", *words])


def make_run(folder: Path, *words: str) -> tools.train.Run:
    """Return what tools/train.py trains by the tiny config, before its first step."""
    with mock.patch("sklearn.datasets.load_digits", few_digits):
        return tools.train.Run(make_config(folder, *words), folder, Process())


def losses(run: tools.train.Run, count: int) -> list[float]:
    """Return the losses of so many steps, taken over as many epochs as that needs."""
    return list(islice(steps(run), count))


def steps(run: tools.train.Run) -> Iterator[float]:
    """Take a step whenever the next loss is asked for."""
    run.trainer.train_mode()
    for epoch in range(1000):
        for x, y in run.train_batches.epoch(epoch):
            yield run.trainer.step(x, y, epoch, Tally(), SolveLog(), SolveLog())


def state(run: tools.train.Run) -> dict[str, Tensor]:
    """Return a copy of a model's parameters and buffers."""
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def rows(folder: Path, name: str = "log.csv") -> list[dict[str, str]]:
    with open(folder / name, newline="") as file:
        return list(csv.DictReader(file))


def assert_same_weights(a: Path, b: Path) -> None:
    """Assert that two runs ended with the same bits, and say where they differ if not."""
    weights, expected = (load_file(folder / "model.safetensors") for folder in (a, b))
    assert weights.keys() == expected.keys()
    differing = {n for n, w in weights.items() if w.numpy().tobytes() != expected[n].numpy().tobytes()}
    assert not differing, f"{len(differing)} of {len(weights)} tensors differ, such as {min(differing)}"


def assert_nothing_partial(folder: Path) -> None:
    """Assert that a folder that a program refused to go on in holds complete files alone."""
    files = {path.name for path in folder.iterdir()} if folder.exists() else set()
    assert files <= {"config.yaml"}
    if files:
        load_config(folder / "config.yaml")


def write_images(
    folder: Path, classes: Sequence[str], count: int, size: tuple[int, int] = (24, 20), channels: int = 3
) -> Path:
    """Write `count` PNG files a class, `<class>/<number>.png`, bright where the class says so; return the folder."""
    rng = np.random.default_rng(0)
    for k, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 60, (size[1], size[0], channels))
            pixels[:, k * size[0] // len(classes) : (k + 1) * size[0] // len(classes)] += 150
            Image.fromarray(pixels.squeeze().astype(np.uint8)).save(folder / name / f"{i:03d}.png")
    return folder


def image_folder(root: Path, classes: Sequence[str] = ("ant", "bee", "cat"), count: int = 8) -> Path:
    """Write an image folder with the splits train and validation; return its root."""
    write_images(root / "train", classes, count)
    write_images(root / "validation", classes, 4)
    return root


def png(value: int) -> bytes:
    """A PNG file of noise with `value` in its first pixel."""
    pixels = np.random.default_rng(value).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    pixels[0, 0] = value
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_archive(path: Path, members: Sequence[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w:xz") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def write_archives(root: Path) -> Path:
    """Write both archives: image k starts with the value k and is of class k modulo 10."""
    root.mkdir(exist_ok=True)
    for split, count in (("train", 30), ("test", 10)):
        members = [(f"{CIFAR_CLASSES[k % 10]}/{k}.png", png(k)) for k in range(count)]
        write_archive(root / f"cifar10_{split}.tar.xz", members)
    return root


# Other processes come from a server that has the libraries loaded: a quarter of a second each.
_START = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"  # Windows
_SERVER = multiprocessing.get_context(_START)
_PRELOAD = (
    "torch torch.distributed timm.data timm.models timm.optim timm.task torchvision.datasets sklearn.datasets "
    "omegaconf matplotlib.pyplot safetensors.torch tqdm pytest _pytest.config"
)
if _START == "forkserver":
    _SERVER.set_forkserver_preload(_PRELOAD.split())

Hook = Callable[[], None]
"""Called in another process before the program, to change what happens there."""


class Started:
    """A program in another process."""

    def __init__(self, logs: Path, name: str, words: Sequence[Any], hook: Hook | None, env: Mapping[str, str]) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.out, self.err = logs / "out", logs / "err"
        arguments = (name, [str(w) for w in words], hook, dict(env), self.out, self.err)
        self.process = _SERVER.Process(target=_child, args=arguments)
        self.process.start()

    def wait(self, seconds: float = 300) -> Outcome:
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still running after {seconds} s: {self.err.read_text()}")
        return Outcome(self.process.exitcode, self.out.read_text(), self.err.read_text())


def _child(name: str, words: list[str], hook: Hook | None, env: dict[str, str], out: Path, err: Path) -> None:
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(env)
    if sys.platform == "linux":
        multiprocessing.set_start_method("fork", force=True)  # what workers of data loaders start by, the fastest
    torch.set_num_threads(1)
    sys.argv = [f"tools/{name}.py", *words]
    with mock.patch("sklearn.datasets.load_digits", few_digits):
        if hook is not None:
            hook()
        program(MAIN[name])


def spawn(logs: Path, name: str, *words: Any, hook: Hook | None = None) -> Outcome:
    """Run a program in a process of its own, on few digits, with its output in the folder `logs`."""
    return Started(logs, name, words, hook, {}).wait()


def spawn_train(folder: Path, *words: Any, hook: Hook | None = None) -> Outcome:
    """Train by the tiny config into a folder, in a process of its own."""
    return spawn(folder.parent / "logs", "train", TINY, f"run.out_dir={folder}", *words, hook=hook)


def spawn_distributed(logs: Path, name: str, *words: Any, world: int = 2, hook: Hook | None = None) -> list[Outcome]:
    """Run a program in several processes that form a group, as torchrun does."""
    # The store lives here and holds its port from the start, as torchrun's does: a port that was only looked for may be
    # taken by another test before the group is there.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    group = dict(WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port))
    group |= dict(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
    started = [
        Started(logs / str(rank), name, words, hook, {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world)
    ]
    return [process.wait() for process in started]


def _die() -> None:
    sys.stdout.flush()
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))  # Windows ends a process by either at once


def _patch(owner: Any, name: str, number: int, before: Callable[..., None] | None, after: Hook | None) -> None:
    """Have something happen before or after call `number` of a function, counted from 1."""
    original, calls = getattr(owner, name), iter(range(1, 1_000_000))

    def patched(*args: Any, **kwargs: Any) -> Any:
        this = next(calls) == number
        if this and before is not None:
            before(*args, **kwargs)
        result = original(*args, **kwargs)
        if this and after is not None:
            after()
        return result

    setattr(owner, name, patched)


def _kill_after_step(number: int) -> None:
    _patch(Trainer, "step", number, None, _die)


def _signal_after(what: str, number: int, codes: Sequence[int], rank: int) -> None:
    def send() -> None:
        if int(os.environ.get("RANK", "0")) == rank:
            for code in codes:
                os.killpg(0, code)

    os.setpgid(0, 0)  # signals of a terminal go to all processes of a group, those of data loaders too
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the tests were started to ignore
    if what == "save_state":
        _patch(tools.train, what, number, lambda *_: send(), None)
    else:
        _patch(Trainer if what == "step" else tools.train, what, number, None, send)


def _kill_in_save(number: int) -> None:
    save = torch.save

    def half(content: Any, file: BinaryIO) -> None:
        buffer = io.BytesIO()
        save(content, buffer)
        file.write(buffer.getvalue()[: len(buffer.getvalue()) // 2])
        file.flush()
        _die()

    _patch(torch, "save", number, half, None)


def _kill_at_replace(name: str, number: int, done: bool) -> None:
    replace, calls = os.replace, iter(range(1, 1_000_000))

    def patched(source: Any, target: Any) -> None:
        this = Path(target).name == name and next(calls) == number
        if this and not done:
            _die()
        replace(source, target)
        if this:
            _die()

    os.replace = patched


def signal_after_step(number: int, *codes: int, rank: int = 0) -> Hook:
    """Have one process and those that it started get signals after a step, counted from 1."""
    return partial(_signal_after, "step", number, codes, rank)


def signal_in_save(number: int, *codes: int) -> Hook:
    """Have the process get signals at the beginning of a checkpoint, counted from 1."""
    return partial(_signal_after, "save_state", number, codes, 0)


def signal_after_test(number: int, *codes: int) -> Hook:
    """Have the process get signals at the end of a test, counted from 1, before anything is made of its result."""
    return partial(_signal_after, "evaluate", number, codes, 0)


def kill_after_step(number: int) -> Hook:
    """Kill -9 after training step `number` of the process."""
    return partial(_kill_after_step, number)


def kill_in_save(number: int) -> Hook:
    """Kill -9 when half the bytes of checkpoint `number` of the process are on disk."""
    return partial(_kill_in_save, number)


def kill_before_replace(name: str, number: int) -> Hook:
    """Kill -9 with version `number` of a file written beside it, not yet in its place."""
    return partial(_kill_at_replace, name, number, False)


def kill_after_replace(name: str, number: int) -> Hook:
    """Kill -9 as soon as version `number` of a file is in its place."""
    return partial(_kill_at_replace, name, number, True)


def _record_losses(folder: Path) -> None:
    step, path = Trainer.step, folder / f"losses.{os.environ.get('RANK', 'alone')}"

    def recorded(self: Trainer, *args: Any) -> float:
        loss = step(self, *args)
        with open(path, "a") as file:
            print(repr(loss), file=file)
        return loss

    Trainer.step = recorded


def record_losses(folder: Path) -> Hook:
    """Write the loss of each step to `losses.<rank>`, `losses.alone` where there is one process."""
    return partial(_record_losses, folder)


def recorded(folder: Path, rank: int | str) -> list[float]:
    return [float(line) for line in (folder / f"losses.{rank}").read_text().split()]
