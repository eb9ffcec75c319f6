"""Optimiser, schedule and mixing of images, as a config describes them; all of them are timm's."""

from typing import Any

import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import nn

from tools.config import BadInput, OptimConfig, TrainConfig, nearest

SCHEDULES = ("cosine", "step", "tanh", "poly", "wsd", "rsqrt", "constant", "none")


def build_optimizer(optim: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimiser of a model's trainable parameters.

    Raises:
        BadInput: for an optimiser that timm does not know, or cannot make.
    """
    known: Any = list_optimizers()
    if optim.name not in known:
        raise BadInput(f"unknown optim.name {optim.name}; {nearest(optim.name, known)}")
    if get_optimizer_info(optim.name).second_order:
        raise BadInput(f"optim.name={optim.name} needs second derivatives, which an equilibrium does not have")
    try:
        return create_optimizer_v2(
            model,
            opt=optim.name,
            lr=optim.lr,
            weight_decay=optim.weight_decay,
            momentum=optim.momentum,
            layer_decay=optim.layer_decay,
        )
    except (ValueError, TypeError, AssertionError, RuntimeError, ImportError) as error:
        raise BadInput(f"optim.name={optim.name}: {error}") from None


def build_scheduler(optim: OptimConfig, optimizer: torch.optim.Optimizer, epochs: int, steps: int) -> Any:
    """Return the schedule over `epochs` of so many `steps`, set to its start, or None for constant rates.

    Raises:
        BadInput: for a schedule that timm does not know, cannot make, or that would end above its start.
    """
    if optim.schedule not in SCHEDULES:
        raise BadInput(f"unknown optim.schedule {optim.schedule}; {nearest(optim.schedule, SCHEDULES)}")
    if optim.min_lr > optim.lr and optim.schedule != "none":
        raise BadInput(f"optim.min_lr={optim.min_lr} must not be above optim.lr={optim.lr}; lower it")
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=optim.schedule,
            num_epochs=epochs,
            warmup_epochs=optim.warmup_epochs,  # pyright: ignore[reportArgumentType]
            warmup_lr=optim.min_lr,
            warmup_prefix=False,
            min_lr=optim.min_lr,
            decay_epochs=optim.decay_epochs,
            decay_rate=optim.decay_rate,
            step_on_epochs=False,
            updates_per_epoch=steps,
        )
    except (ValueError, AssertionError, RuntimeError) as error:
        raise BadInput(f"optim.schedule={optim.schedule}: {error}") from None
    if scheduler is not None:
        scheduler.step_update(0)
    else:  # it is the scheduler that applies the layer-wise rates
        for group in optimizer.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)
    return scheduler


def build_mixup(config: TrainConfig, num_classes: int) -> Mixup | None:
    """Return what mixes the images of a batch, an even number of them, and their labels; or None."""
    data = config.data
    if data.mixup == 0 and data.cutmix == 0:
        return None
    return Mixup(
        mixup_alpha=data.mixup,
        cutmix_alpha=data.cutmix,
        label_smoothing=config.optim.label_smoothing,
        num_classes=num_classes,
    )
