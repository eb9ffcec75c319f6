"""A small part of a test split: samples spread over it, and the settings of the data of a model."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

import mdeq
from tools.batches import Batch, Batches, Process
from tools.build import build_test_split
from tools.checkpoint import CONFIG_FILE, run_of
from tools.config import BadInput, TrainConfig, load_config
from tools.recheck import check_place, evaluated_config
from tools.studies import Watch

TOGETHER = 8
"""Samples that are solved for at once."""


def data_config(name: str, model: mdeq.Backbone, overrides: Sequence[str]) -> TrainConfig:
    """Return the settings of the data of a model: those of its run or release, where it has one, then the overrides.

    Args:
        name: what the model was loaded by, see `pretrained.load_trained`.
        model: the model.
        overrides: `key=value`.

    Raises:
        BadInput: for a setting that is none of the data's, settings that cannot be read, or data that nobody names.
    """
    other = [word for word in overrides if not word.startswith(("data.", "task="))]
    if other:
        raise BadInput(f"{other[0]} is not a data setting; --data takes data.* and task")
    place = Path(name.removeprefix("local-dir:"))
    path = run_of(place) / CONFIG_FILE
    release = mdeq.RELEASES.get(f"{place.name.partition('.')[0]}.{model.pretrained_cfg.get('tag')}")
    base = nothing = TrainConfig(task="segmentation" if isinstance(model, mdeq.MDEQSegmenter) else "classification")
    if place.exists() and path.is_file():
        base = load_config(path)
    elif release is not None:
        base = evaluated_config(release.card, release.name)
    config = check_place(load_config(None, overrides, base=base))
    if base is nothing and not any(word.startswith("data.name=") for word in overrides):
        raise BadInput(f"cannot tell which data {name} is for; set data.name=NAME")
    config.model = dataclasses.replace(config.model, name=name)
    return config


def read_part(
    config: TrainConfig,
    model: mdeq.Backbone,
    count: int,
    process: Process,
    watch: Watch,
    *,
    subset: bool,
    together: int = TOGETHER,
) -> "Part":
    """Return samples of the test split of a config, so many of all processes; raises as `build.build_test_split` does.

    Args:
        config, model, process, subset: see there.
        count, watch, together: see `Part`.
    """
    # In batches of one, so that any sample can be taken by itself.
    single = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=process.world_size))
    whole = build_test_split(single, model, process, subset=subset)
    return Part(whole, max(1, count // process.world_size), watch, together)


class Part:
    """A small part of a split, spread over it evenly and held in memory; it can be gone through as the whole can.

    Args:
        whole: the split, in batches of one sample.
        count: samples to take; all, if there are no more.
        watch: shows how far the reading is.
        together: samples of one shape that are given, and so solved for, at once.
    """

    def __init__(self, whole: Batches, count: int, watch: Watch, together: int = TOGETHER) -> None:
        count = min(count, len(whole))
        places = [k * len(whole) // count for k in range(count)]
        self.class_names, self.num_samples = whole.class_names, None  # other processes have theirs
        known = whole.spacings
        self.spacings = None if known is None else [known[k] for k in places if k < len(known)]
        self.samples: list[Batch] = list(watch(whole.epoch(only=places), "reading"))
        self.batches = list(_joined(self.samples, together))

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int = 0, start: int = 0, only: Sequence[int] | None = None) -> Iterator[Batch]:
        yield from self.batches[start:] if only is None else (self.batches[number] for number in only)


def _joined(samples: Sequence[Batch], together: int) -> Iterator[Batch]:
    """Yield samples that follow each other and have one shape together, up to so many of them."""
    waiting: list[Batch] = []
    for sample in [*samples, None]:
        changed = sample is None or (waiting and waiting[0][0].shape != sample[0].shape)
        if waiting and (changed or len(waiting) == together):
            yield torch.cat([x for x, _ in waiting]), torch.cat([y for _, y in waiting])
            waiting = []
        waiting += [] if sample is None else [sample]
