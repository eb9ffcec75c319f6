"""Checkpoints that are complete or not there at all, and weights read from files that may be damaged or hostile."""

import hashlib
import json
import os
import re
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models._hub import save_config_for_hf  # the half of save_for_hf that writes no weights
from torch import Tensor

import mdeq
from tools.config import BadInput, first_line

STATE_FILE = "checkpoint.pt"
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.yaml"
RESULTS_FILE = "results.json"
UMASK = os.umask(0)  # it can only be read by setting it
os.umask(UMASK)
_ENTRIES = ("ema", "state_dict_ema", "model_ema", "model", "state_dict", "model_state_dict", "net")  # timm's names too
STEPS_FILE, STEPS_PICTURE = "steps.csv", "steps.png"
FORMAT = {"format": "pt"}  # asked for by transformers; one entry, since those of several are written in any order


def run_of(checkpoint: Path) -> Path:
    """Return the folder of weights that are given by it or by their file."""
    return checkpoint if checkpoint.is_dir() else checkpoint.parent


def check_folder(path: Path) -> None:
    """Raise BadInput if a path is no folder to write to: a file is in its place, or it may not be written to."""
    places = [place for place in (path, *path.absolute().parents) if place.exists()]
    for place in places:
        if not place.is_dir():
            raise BadInput(f"{place} is a file, not a folder to write to")
    if not os.access(places[0], os.W_OK):
        raise BadInput(f"cannot write to {path}: no permission for {places[0]}; choose another folder")


def make_folder(path: Path) -> None:
    """Make a folder, if it is not there, and those above it.

    Raises:
        BadInput: if that cannot be done.
    """
    check_folder(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"cannot create {path}: {error.strerror}") from None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what goes wrong when a file is written, on a full disk say, into one line.

    Raises:
        BadInput: if it cannot be written.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # PyTorch and safetensors have their own words for it
        reasons = (getattr(e, "strerror", None) for e in (error, error.__context__))
        reason = next(filter(None, reasons), first_line(error))
        raise BadInput(f"cannot write {path}: {reason}") from None


def clear_leftovers(folder: Path) -> None:
    """Remove the half-written files that a kill left in a run's folder."""
    names = (STATE_FILE, WEIGHTS_FILE, CONFIG_FILE, RESULTS_FILE, STEPS_FILE, STEPS_PICTURE, "config.json", "log.csv")
    for name in names:
        for path in folder.glob(f".{name}.{'?' * 8}"):  # as `tempfile` names them
            path.unlink()


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Have `write` fill a file beside `path`, then put it in place: a kill leaves the old file or the new one.

    Raises:
        BadInput: if it cannot be written; the old file stays.
    """
    with writing(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        try:
            write(Path(name))
            with open(name, "r+b") as file:  # Windows syncs no file that is open for reading
                os.fsync(file.fileno())
            os.chmod(name, 0o666 & ~UMASK)
            _replace(name, path)
        finally:
            Path(name).unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Put a text in place as a whole, with the same ends of lines on every system; see `write_atomically`."""
    write_atomically(path, lambda new: new.write_text(text, encoding="utf-8", newline="\n"))


def _replace(name: str, path: Path) -> None:
    """Put a file in place; on Windows wait for a while where another program has the old one open."""
    for _ in range(20 if os.name == "nt" else 0):
        try:
            return os.replace(name, path)
        except PermissionError:
            time.sleep(0.25)
    os.replace(name, path)


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write all that a run needs to go on."""

    def write(path: Path) -> None:
        with open(path, "wb") as file:  # given a path, PyTorch would not say that the disk is full
            torch.save(state, file)

    write_atomically(folder / STATE_FILE, write)


def load_state(path: Path) -> dict[str, Any]:
    """Return what `save_state` wrote.

    Raises:
        BadInput: for a missing, damaged or hostile file.
    """
    state = _unpickle(path)
    if not isinstance(state, dict) or "optimizer" not in state:
        raise BadInput(f"{path} holds no training state to resume from")
    return state


def sha256(path: Path) -> str:
    """Return the sha256 of a file in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        BadInput: for a missing or damaged file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"no file {path}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path} is damaged: it is not a mapping")
    return content


def export(model: mdeq.Backbone, folder: Path, record: dict[str, Any] | None = None) -> Path:
    """Write model.safetensors and config.json, which timm loads as `local-dir:FOLDER`; return the path of the first.

    What `record` says of the data, such as label names and preprocessing, is added to config.json.
    """

    def write_config(path: Path) -> None:
        save_config_for_hf(model, str(path), record)
        config = read_json(path)
        config.get("model_args", {}).pop("num_classes", None)  # it has it outside too; transformers would pass it twice
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8", newline="\n")

    write_atomically(folder / "config.json", write_config)
    weights = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    write_atomically(folder / WEIGHTS_FILE, lambda path: save_file(weights, path, metadata=FORMAT))
    return folder / WEIGHTS_FILE


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the state dict in a .safetensors file, a folder that holds one, or a PyTorch checkpoint.

    Of a training state the averaged weights are taken where there are any. Pickles are read with weights_only.

    Raises:
        BadInput: for a missing, damaged or hostile file, or one without weights.
    """
    path = Path(path)
    if path.is_dir():
        path = path / WEIGHTS_FILE
    if not path.is_file():
        raise BadInput(f"no checkpoint {path}")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _unpickle(path)
    for _ in range(3):  # a mapping may hold itself
        if isinstance(content, Mapping):
            content = next((content[key] for key in _ENTRIES if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        entries = f"; its entries are {', '.join(map(str, list(content)[:5]))}" if isinstance(content, Mapping) else ""
        raise BadInput(f"{path} holds no weights{entries}")
    odd = [k for k, v in content.items() if v.layout != torch.strided or v.is_meta or v.is_quantized or v.is_complex()]
    if odd:
        raise BadInput(f"{path} holds tensors that cannot be weights (sparse, quantised, complex or meta): {odd[0]}")
    # A small file may promise a model larger than the machine.
    small = [k for k, v in content.items() if v.numel() * v.element_size() > v.untyped_storage().nbytes()]
    if small:
        raise BadInput(f"{path} holds fewer numbers than its tensors have elements: {small[0]}")
    bad = [key for key, value in content.items() if value.is_floating_point() and not _is_finite(value)]
    if bad:
        raise BadInput(f"{path} holds weights that are not finite (nan or inf): {bad[0]}")
    return dict(content)


def _is_finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x.float() if x.element_size() == 1 else x).all())  # numbers of 8 bits have no such test


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    _refuse_pointer(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path} is damaged or not a safetensors file: {error}") from None


def _refuse_pointer(path: Path) -> None:
    """Raise BadInput for what Git leaves in place of a large file that was not fetched."""
    try:
        with open(path, "rb") as file:
            start = file.read(40)
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from None
    if start.startswith(b"version https://git-lfs"):
        raise BadInput(f"{path} is a pointer of Git LFS, not the file itself; fetch that with `git lfs pull`")


def _unpickle(path: Path) -> Any:
    if not path.is_file():
        raise BadInput(f"no checkpoint {path}")
    _refuse_pointer(path)
    try:
        _check_sums(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols: what cannot be read raises all the same
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged pickle raises depends on where it is damaged
        raise BadInput(
            f"{path} is damaged, or needs more than plain weights to be unpickled: {_refusal(error)}"
        ) from None


def _check_sums(path: Path) -> None:
    """Raise an error for a zip file of PyTorch whose content is not what was written: PyTorch itself does not look."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.CRC:  # PyTorch writes none (zero) where it is told so
                    with archive.open(entry) as file:
                        while file.read(2**24):
                            pass


def _refusal(error: Exception) -> str:
    """Return the line of PyTorch's long message that says what it refused."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if any("Unsupported operand" in line or "invalid load key" in line for line in lines):
        return "it is not in PyTorch's format, or pickled by another protocol than torch.save's own"
    telling = [line for line in lines if re.search(r"GLOBAL|^Unsupported|Unpickler error: \S", line)]
    return (telling or lines)[0].rpartition("WeightsUnpickler error: ")[2].partition(". ")[0]


def load_weights(model: mdeq.Backbone, path: str | Path, *, classifier: str, new_classifier: bool) -> list[str]:
    """Load weights, of an official layout too, into a model and return the names of what was left as it is.

    For training (`new_classifier`) they may be of a model of another kind: a classifier for a segmenter or the reverse,
    2D for 3D, of other input channels; see `mdeq.transfer`.

    Args:
        model: the model.
        path: see `read_weights`.
        classifier: name of its last layer.
        new_classifier: whether a classifier for another number of classes is left out, or an error.

    Raises:
        BadInput: if the file does not fit the model.
    """
    try:
        weights = mdeq.translate_checkpoint(read_weights(path), model)
    except ValueError as error:
        raise BadInput(f"{path}: {error}") from None
    except (AttributeError, LookupError, RuntimeError, TypeError) as error:  # shapes that no checkpoint has
        raise BadInput(f"{path} is not an MDEQ checkpoint: {first_line(error)}") from None
    own = model.state_dict()
    if new_classifier and _of_another_kind(weights, own):
        try:
            return list(mdeq.transfer(weights, model).kept)
        except ValueError as error:
            raise BadInput(f"{path} cannot initialise this model: {error}") from None
    key = f"{classifier}.weight"
    there, here = (list(w[key].shape) if key in w else [] for w in (weights, own))
    if there[:1] != here[:1] and there[1:] == here[1:] != []:
        if not new_classifier:
            raise BadInput(f"{path} has {there[0]} classes, this model has {here[0]}")
        weights = {name: w for name, w in weights.items() if not name.startswith(f"{classifier}.")}
    missing = [name for name in own if name not in weights and not name.endswith(".num_batches_tracked")]
    unexpected = [name for name in weights if name not in own]
    changed = [name for name in own if name in weights and own[name].shape != weights[name].shape]
    left = [name for name in missing if new_classifier and name.startswith(f"{classifier}.")]
    for problem, names in (
        ("missing tensors", [n for n in missing if n not in left]),
        ("unexpected tensors", unexpected),
        ("tensors of another shape", changed),
    ):
        if names:
            raise BadInput(f"{path} does not fit the model: {problem} ({len(names)}), such as {names[0]}")
    model.load_state_dict(weights, strict=False)
    return left


def _of_another_kind(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> bool:
    """Whether weights are of another task, number of spatial dimensions or of input channels than the model's."""
    stem, mark = "stem.conv1.weight", "head.conv.weight"  # a segmenter's head has one convolution
    other_task = any(name.startswith("head.") for name in weights) and (mark in weights) != (mark in own)
    return other_task or (stem in weights and weights[stem].shape[1:] != own[stem].shape[1:])
