"""From a config to the objects of a run: device and processes, model, data."""

import inspect
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from torch import nn

import mdeq
from tools import volume_data
from tools.batches import Batches, ImageSpec, Process
from tools.checkpoint import load_weights, read_json
from tools.config import ARRAYS, BadInput, DataConfig, ModelConfig, RunConfig, TrainConfig, first_line, nearest
from tools.data import build_batches
from tools.known_data import combined_licence, dataset
from tools.tasks import check_task

_UNUSABLE = (
    TypeError, ValueError, RuntimeError, OSError, AssertionError, AttributeError, LookupError, ArithmeticError,
    SafetensorError,
)  # fmt: skip

ELSEWHERE = {
    "num_classes": "data.num_classes",
    "pretrained": "model.pretrained",
    "checkpoint_path": "model.checkpoint",
    "solver": "model.solver",
    "gradient": "model.gradient",
}
"""Arguments of a model that have settings of their own."""


def find_device(name: str, setting: str) -> torch.device:
    """Return a device by its name; auto is a GPU where there is one.

    Args:
        name: auto, cpu, cuda or cuda:1.
        setting: what the name was given as, for the error.

    Raises:
        BadInput: for a device that is not there.
    """
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        device = torch.device(chosen)
        if device.type not in ("cpu", "cuda"):
            raise BadInput(f"{setting} must be auto, cpu or cuda, got {name}")
        device = torch.empty(0, device=device).device  # with the number of a GPU, which set_device asks for
    except (RuntimeError, AssertionError):
        raise BadInput(f"device {name} is not available; set {setting}=cpu") from None
    return device


def check_compiler(device: torch.device, setting: str) -> None:
    """Raise BadInput where torch.compile would not find the C++ compiler that its kernels for CPUs need.

    Args:
        device: of the kernels; those for GPUs are Triton's.
        setting: what asks for it, for the error.
    """
    if device.type != "cpu":
        return
    compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    if not shutil.which(compiler) and not shutil.which(compiler.split()[0]):  # as in CXX="ccache g++"
        raise BadInput(f"{setting} needs a C++ compiler, {compiler} is not there; install it or name yours in CXX")


def start_process(run: RunConfig) -> Process:
    """Return this process, after joining the others where torchrun started several.

    Raises:
        BadInput: for a device that is not there, or a group without ranks.
    """
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        device = find_device(run.device, "run.device")
        if device.type == "cuda":  # what names no device, as pinned memory does, is not to wake the first one
            torch.cuda.set_device(device)
        return Process(device=device)
    if "RANK" not in os.environ:
        raise BadInput(f"WORLD_SIZE={world} without RANK: start several processes with torchrun, or unset WORLD_SIZE")
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    # Each process looks at its own GPU alone: something on the first would be there once for every process.
    on_gpu = run.device.partition(":")[0] in ("auto", "cuda") and torch.cuda.is_available()
    device = find_device(f"cuda:{local}" if on_gpu else run.device, "run.device")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.distributed.init_process_group("nccl", device_id=device)
    else:
        torch.distributed.init_process_group("gloo")
    return Process(rank, world, device)


def known_model(name: str) -> str:
    """Return the name if it is one of this package's models, its weight tag aside, or a saved one of them.

    Raises:
        BadInput: naming the nearest model.
        WeightsError: for one on the Hub that cannot be had.
    """
    valid = mdeq.list_models()
    source, _, place = name.partition(":")
    if source in ("hf-hub", "local-dir"):
        path = mdeq.hub_config(place) if source == "hf-hub" else Path(place) / "config.json"
        config = read_json(path)
        saved, parts = config.get("architecture"), [config.get(key) or {} for key in ("pretrained_cfg", "model_args")]
        if saved not in valid:
            raise BadInput(f"{name} holds {saved}, which is not a model of this package")
        # Whoever wrote it may be a stranger: exports are named by the inner architecture, arguments are passed on.
        if not all(isinstance(part, dict) for part in parts) or (parts[0].get("architecture") or saved) != saved:
            raise BadInput(f"{path} is damaged: its pretrained_cfg is of another model, or its parts are no mappings")
        if foreign := {"device", "dtype"} & set(parts[1]):
            raise BadInput(f"{path}: model_args must not hold {min(foreign)}")
    elif name.partition(".")[0] not in valid:
        raise BadInput(f"unknown model {name}; {nearest(name, valid)} (all: {', '.join(valid)})")
    return name


def known_weights(name: str) -> str:
    """Return the name if it is one of this package's models and, where it has a tag, weights go by it.

    Raises:
        BadInput: naming those that there are.
    """
    known_model(name)
    valid = mdeq.list_models(pretrained=True)
    if "." in name and ":" not in name and name not in valid:
        raise BadInput(f"no weights named {name}; {nearest(name, valid)} (all: {', '.join(valid)})")
    return name


def _reason(error: Exception) -> str:
    """Return the first line of an error, with the nearest argument where an unknown one was given."""
    text = first_line(error)
    unknown = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", text)
    if unknown is None or not hasattr(mdeq, unknown[1]):
        return text
    valid = list(inspect.signature(getattr(mdeq, unknown[1])).parameters)
    return f"unknown argument {unknown[2]}; {nearest(unknown[2], valid)}"


def build_model(config: ModelConfig, num_classes: int | None, *, for_training: bool) -> mdeq.Backbone:
    """Return the model of a config with its weights.

    Args:
        config: name, arguments, weights; a solver without a name gets what it lacks from that of the model itself.
        num_classes: classes; None for the model's own.
        for_training: whether a checkpoint with another number of classes gives the rest of its weights, or is an error.

    Raises:
        BadInput: for an unknown model or argument, or weights that do not fit.
    """
    kwargs = dict(config.kwargs)
    for name, setting in ELSEWHERE.items():
        if name in kwargs:
            raise BadInput(f"set {setting} instead of model.kwargs.{name}")
    for name in ("solver", "gradient"):
        if getattr(config, name) is not None:
            kwargs[name] = getattr(config, name)
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    what = f"model {config.name} with {config.kwargs}"
    try:
        name = known_weights(config.name) if config.pretrained else known_model(config.name)
        create = partial(timm.create_model, name, pretrained=config.pretrained)
        if config.solver is not None and "name" not in config.solver:  # a few settings of the model's own
            rest = {key: value for key, value in kwargs.items() if key != "solver"}
            kwargs["solver"] = mdeq.spec_of(of_package(create(**rest), what).deq.solver) | config.solver
        model = of_package(create(**kwargs), what)
    except mdeq.WeightsError as error:
        hint = "; model.pretrained=false starts from scratch" if for_training else ""
        raise BadInput(f"model {config.name}: {error}{hint}") from None
    except _UNUSABLE as error:
        raise BadInput(f"model {config.name}: {_reason(error)}") from None
    if isinstance(model, mdeq.MDEQ) and not model.global_pool.pool_type:
        raise BadInput(f"{what} gives features of every pixel, not of an image; leave global_pool at avg")
    if config.checkpoint is not None:
        classifier = model.pretrained_cfg["classifier"]
        left = load_weights(model, config.checkpoint, classifier=classifier, new_classifier=for_training)
        if left and os.environ.get("RANK", "0") == "0":
            taken, more = len(model.state_dict()) - len(left), ", ..." if len(left) > 3 else ""
            print(f"{config.checkpoint}: {taken} tensors loaded; {len(left)} not loaded: {', '.join(left[:3])}{more}")
    return model


def of_package(model: nn.Module, what: str) -> mdeq.Backbone:
    """Return a model if it is one of this package, else raise BadInput that says of what."""
    if not isinstance(model, mdeq.Backbone):
        raise BadInput(f"{what} is not a classifier or segmenter of this package")
    return model


def freeze(model: mdeq.Backbone, config: ModelConfig) -> tuple[nn.Module, ...]:
    """Freeze what the config says, and return the modules that have to stay in eval mode."""
    norms = tuple(m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    if not config.freeze:
        return norms if config.freeze_bn else ()
    head: list[Any] = [model.head, model.head_drop, model.get_classifier()]
    trained = {id(p) for part in head for p in part.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    backbone = tuple(m for name, m in model.named_children() if m not in head)
    return (*backbone, *norms) if config.freeze_bn else backbone


def image_spec(model: mdeq.Backbone, image_size: int | None) -> ImageSpec:
    return ImageSpec.of(model.pretrained_cfg, model.in_chans, image_size)


def renew_cfg(model: mdeq.Backbone, start: ModelConfig, data: DataConfig) -> None:
    """Have a model's pretrained_cfg say what it is trained on, and no longer what was said of other weights.

    Args:
        model: the model.
        start: the weights that it starts from; those of a file have no licence that is known here.
        data: what it is trained on.
    """
    spec = image_spec(model, data.image_size)
    licence = dataset(data.name).weights_licence
    if start.pretrained or start.checkpoint is not None:
        before = None if start.checkpoint is not None else model.pretrained_cfg.get("license")
        licence = combined_licence(licence, before)
    size = (spec.size[0], *(data.patch_size or spec.size)[-2:])  # timm's has three numbers for volumes too
    # config.json gets the names of labels from the data.
    anew = {
        "input_size": size,
        "mean": spec.mean,  # as many as the model has channels
        "std": spec.std,
        **({"crop_pct": 1.0} if data.name in ARRAYS else {}),  # which are resized as a whole
        "tag": "",
        "license": licence,
        **dict.fromkeys(("hf_hub_id", "file", "description", "label_names")),
    }
    model.pretrained_cfg = {**model.pretrained_cfg, **anew}


def placed(model: Any, run: RunConfig, process: Process) -> Any:
    """Return a model on the device of a run, in its precision and memory format.

    Raises:
        BadInput: for channels last in a model of volumes, whose convolutions do not keep that format.
    """
    model = model.to(process.device, getattr(torch, run.dtype))
    if run.channels_last and model.spatial_dims == 3:
        raise BadInput("run.channels_last is for 2D models; leave it out")
    return model.to(memory_format=torch.channels_last) if run.channels_last else model


def autocast(run: RunConfig, process: Process) -> Callable[[], Any]:
    """Return what makes the autocast context of a run."""
    if run.amp == "none":
        return nullcontext
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[run.amp]
    return partial(torch.autocast, process.device.type, dtype=dtype)


def build_split(
    config: TrainConfig, spec: ImageSpec, process: Process, *, training: bool
) -> tuple[Batches, int | None]:
    """Return the batches of a split and its number of classes; see `build_batches`."""
    parts = process.world_size * (config.optim.accumulate if training else 1)
    if config.data.batch_size % parts:
        raise BadInput(
            f"data.batch_size={config.data.batch_size} must be divisible by {parts}, the number of processes times "
            "optim.accumulate"
        )
    # One process downloads, the others then find it.
    in_turns = config.data.download and process.world_size > 1
    if in_turns and not process.is_main:
        torch.distributed.barrier()
    split = build_batches(config.data, spec, process, training=training, seed=config.run.seed)
    if in_turns and process.is_main:
        torch.distributed.barrier()
    return split


def build_test_split(config: TrainConfig, model: mdeq.Backbone, process: Process, *, subset: bool = False) -> Batches:
    """Return the test split of a config for a model, which has its classes or, if it is said to be a subset, fewer.

    Raises:
        BadInput: for missing data, or data that are not of the model's kind.
    """
    check_task(config, model)
    batches, found = build_split(config, image_spec(model, config.data.image_size), process, training=False)
    check_classes(model, found, "the test split", exactly=not subset)
    return batches


def build_evaluation(config: TrainConfig, process: Process, *, subset: bool = False) -> tuple[mdeq.Backbone, Batches]:
    """Return the model of a config and its test split, which has fewer classes only if it is said to be a subset."""
    classes = config.data.num_classes
    if classes is None and config.data.name in ARRAYS:
        classes = 10
    model = build_model(config.model, classes, for_training=False)
    batches = build_test_split(config, model, process, subset=subset)
    return placed(model, config.run, process).eval(), batches


def check_classes(model: mdeq.Backbone, found: int | None, origin: str, *, exactly: bool = False) -> None:
    """Raise BadInput if data have more classes than a model, or, if it is to be `exactly` as many, fewer."""
    if found is None or found == model.num_classes or (found < model.num_classes and not exactly):
        return
    fix = f"set data.num_classes={found}"
    if exactly:
        fix = f"set data.num_classes={model.num_classes} if its classes are the model's first {found}"
        fix = fix if found < model.num_classes else "its labels are not those of the model"
    raise BadInput(f"{origin} has {found} classes, the model {model.num_classes}; {fix}")


def data_record(config: TrainConfig, class_names: Sequence[str]) -> dict[str, Any]:
    """Return what config.json says of the data a model was trained on: label names, and how volumes are prepared."""
    record: dict[str, Any] = {}
    if class_names:
        record["label_names"] = list(class_names)
    if config.data.name in volume_data.NAMES:
        record["preprocessing"] = volume_data.preprocessing(config.data, tuple(class_names)).record()
    return record
