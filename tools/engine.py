"""One epoch of training, and evaluation: no argument parsing, no files, no globals."""

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from mdeq import Backbone, Equilibrium, FixedPointSolver
from tools.batches import Batch, Batches, Process, check_labels, seed_everything
from tools.config import BadInput, DEQConfig, OptimConfig
from tools.metrics import MeanLoss, SolveLog
from tools.tasks import CLASSIFICATION, Task


class Diverged(BadInput):
    """Training came to nothing: one step after another had to be skipped."""


class Stop(IntEnum):
    """Why training is to stop after this step; the larger one counts."""

    NO = 0
    TIME = 1  # it has taken as long as it may
    SIGNAL = 2  # someone wants it to end now


@torch.no_grad()
def evaluate(
    model: Backbone,
    batches: Batches,
    process: Process = Process(),
    task: Task = CLASSIFICATION,
    *,
    amp: Callable[[], Any] = nullcontext,
    solver: FixedPointSolver | None = None,
    unroll: int = 0,
    iterates: Sequence[int] = (),
    watch: Callable[[Iterator[Any]], Iterator[Any]] = iter,
) -> dict[str, float]:
    """Return loss and scores, and how the solves went, of a model in eval mode on a split.

    Args:
        model: a model of this package.
        batches: the split.
        process: this process; results are those of all.
        task: what is counted, and how an input is predicted.
        amp: makes the autocast context.
        solver: replaces the model's own.
        unroll: if above 0, f is applied that many times instead of solving (the explicit twin).
        iterates: numbers of steps, after which the mean residual is reported too, as `residual_after_K`.
        watch: wraps the iterator, for a progress bar.
    """
    model.eval()
    tally, solves, dtype = task.tally(False), SolveLog(), next(model.parameters()).dtype
    for x, y in watch(batches.epoch()):
        if len(y) == 0:
            continue
        if y.ndim == 1:
            check_labels(y, model.num_classes)
        with amp():
            logits, stats = task.inference(model, x.to(dtype), solver=solver, unroll=unroll)
        logits = logits.float()
        tally.add(task.loss(logits, y), logits, y)
        for solve in stats:
            solves.add(solve, iterates)
        del logits  # not beside those of the next batch
    result = {**tally.summary(process), **solves.summary(process)}
    if iterates:
        means = solves.means_of_iterates(process, len(iterates))
        result |= {f"residual_after_{count}": mean for count, mean in zip(iterates, means)}
    return result


def with_bar(
    batches: Batches, process: Process, bar: Callable[..., tqdm]
) -> Callable[[Iterator[Batch]], Iterator[Batch]]:
    """Return a `watch` for `evaluate` that shows how much of a split this process has seen.

    Samples, where their number is known: images of many sizes make more batches than said.

    Args:
        bar: makes a bar of progress.
    """
    samples = batches.num_samples
    unit, total = ("batch", len(batches)) if samples is None else ("sample", -(-samples // process.world_size))

    def watch(iterator: Iterator[Batch]) -> Iterator[Batch]:
        with bar(unit=unit, total=total) as shown:
            for x, y in iterator:
                yield x, y
                shown.update(1 if samples is None else len(y))

    return watch


def jacobian_weight(config: DEQConfig, step: int, epoch: int) -> float:
    """Return the weight of the Jacobian penalty at a step: one value in warm-up, then a staircase, then nothing."""
    if step < config.warmup_steps:
        return config.warmup_jacobian_weight
    if config.jacobian_stop_epoch is not None and epoch >= config.jacobian_stop_epoch:
        return 0.0
    stairs = (step - config.warmup_steps) // config.jacobian_increment_steps
    return config.jacobian_weight + config.jacobian_increment * stairs


@dataclass
class Trainer:
    """What a training step needs; `step` is one optimiser update on one batch."""

    model: nn.Module  # wrapped for several processes where there are any
    bare: Backbone  # the same, not wrapped
    optimizer: torch.optim.Optimizer
    scheduler: Any
    task: Task
    criterion: nn.Module  # the task's, or that of mixed labels
    optim: OptimConfig
    deq: DEQConfig
    process: Process
    seed: int
    scaler: torch.amp.GradScaler
    amp: Callable[[], Any] = nullcontext
    mixup: Any = None
    ema: Any = None
    frozen: tuple[nn.Module, ...] = ()  # modules that stay in eval mode
    max_bad_steps: int = 20
    wants_stop: Callable[[], Stop] = lambda: Stop.NO  # whether this process is to stop
    stop: Stop = Stop.NO  # whether all do, as of the last step
    num_steps: int = 0  # optimiser updates so far, skipped ones included
    bad_steps: int = 0  # skipped ones, in all
    bad_in_a_row: int = 0

    def train_mode(self) -> None:
        self.model.train()
        for module in self.frozen:
            module.eval()

    def step(self, x: Tensor, y: Tensor, epoch: int, tally: MeanLoss, forward: SolveLog, backward: SolveLog) -> float:
        """Update the weights by one batch and return its loss, not finite where the step was skipped.

        Raises:
            Diverged: after `max_bad_steps` skipped steps in a row.
            BadInput: for data that do not fit, or if a batch norm is left with one value.
        """
        # Chance depends on the step alone, so that a resumed run goes the same way; dropout differs between processes.
        draw = random.Random(f"{self.seed} {self.num_steps}").random()
        seed_everything(self.seed, self.num_steps, self.process.rank, 1)
        if y.ndim == 1:
            check_labels(y, self.bare.num_classes)
        if self.mixup is not None:
            if len(y) % 2:
                raise BadInput(f"mixup needs an even number of images per process, got {len(y)} (data.batch_size)")
            x, y = self.mixup(x, y)
        weight = jacobian_weight(self.deq, self.num_steps, epoch)
        probes = self.deq.jacobian_probes if weight > 0 and draw < self.deq.jacobian_prob else 0
        unroll = self.deq.warmup_unroll if self.num_steps < self.deq.warmup_steps else 0
        # A batch norm takes note of a batch before anything can be said of its loss.
        buffers = [b.clone() for b in self.bare.buffers()]
        self.optimizer.zero_grad()
        total, good = 0.0, True
        parts = list(zip(x.chunk(self.optim.accumulate), y.chunk(self.optim.accumulate)))
        for k, (x_k, y_k) in enumerate(parts):
            last = k + 1 == len(parts)
            with nullcontext() if last or self.process.world_size == 1 else cast(Any, self.model).no_sync():
                loss, logits, equilibrium = self._forward(x_k, y_k, unroll, probes)
                penalty = equilibrium.jacobian_penalty
                objective = loss if penalty is None else loss + weight * penalty
                good = good and self.agree(bool(torch.isfinite(objective)))
                total += float(objective.detach()) * len(y_k) / len(y)
                if not good:
                    break
                self.scaler.scale(objective * (len(y_k) / len(y))).backward()
            tally.add(loss, logits.float(), y_k)
            forward.add(equilibrium.stats)
            for stats in equilibrium.backward_stats:
                backward.add(stats)
        if good:
            self.scaler.unscale_(self.optimizer)
            limit = math.inf if self.optim.clip_grad is None else self.optim.clip_grad
            norm = nn.utils.clip_grad_norm_([p for p in self.bare.parameters() if p.requires_grad], limit)
            good = bool(torch.isfinite(norm))
            if good or self.scaler.is_enabled():  # a loss scale that is too large: the scaler skips, and lowers it
                self.scaler.step(self.optimizer)
                self.scaler.update()
        self._count(good, buffers)
        return total if good else math.nan

    def _forward(self, x: Tensor, y: Tensor, unroll: int, probes: int) -> tuple[Tensor, Tensor, Equilibrium]:
        try:
            x = x.to(next(self.bare.parameters()).dtype)
            with self.amp():
                logits, equilibrium = self.model(x, return_equilibrium=True, unroll=unroll, jacobian_probes=probes)
                loss = self.criterion(logits, y)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise BadInput(
                f"a batch of {len(y)} image(s) of {tuple(x.shape[2:])} leaves a batch norm one value per channel; "
                "raise data.batch_size or data.image_size, or set model.freeze_bn=true"
            ) from None
        return loss, logits, equilibrium

    def agree(self, good: bool) -> bool:
        """Whether all processes found their part good; they have to take or skip a step, and to stop, together."""
        stop = self.wants_stop()
        if self.process.world_size > 1:
            flags = torch.tensor([float(good), -float(stop)], device=self.process.device)
            dist.all_reduce(flags, op=dist.ReduceOp.MIN)
            all_good, least = flags.tolist()
            good, stop = bool(all_good), Stop(int(-least))
        self.stop = max(self.stop, stop)
        return good

    def _count(self, good: bool, buffers: list[Tensor]) -> None:
        self.num_steps += 1
        if self.scheduler is not None:
            self.scheduler.step_update(self.num_steps)
        if good:
            self.bad_in_a_row = 0
            if self.ema is not None:
                self.ema.update(self.bare, step=self.num_steps)
            return
        self.optimizer.zero_grad()
        for buffer, before in zip(self.bare.buffers(), buffers):
            buffer.copy_(before)
        self.bad_steps += 1
        self.bad_in_a_row += 1
        if self.bad_in_a_row >= self.max_bad_steps:
            raise Diverged(
                f"stopped: loss or gradient not finite in {self.bad_in_a_row} steps in a row; lower optim.lr, or set "
                "optim.clip_grad"
            )


def train_epoch(
    trainer: Trainer,
    batches: Batches,
    epoch: int,
    *,
    start: int = 0,
    after_step: Callable[[int, float], object] = lambda number, loss: None,
) -> dict[str, float]:
    """Train on the batches of an epoch from number `start` on, until it is to stop, and return the metrics of these.

    Args:
        trainer: model, optimiser and settings.
        batches: the training split.
        epoch: its number.
        start: batches of this epoch that were trained on before.
        after_step: called with the number of batches done and the loss.
    """
    trainer.train_mode()
    tally, forward, backward = trainer.task.tally(True), SolveLog(), SolveLog()
    began, images, done = time.perf_counter(), 0, start
    for x, y in batches.epoch(epoch, start):
        loss = trainer.step(x, y, epoch, tally, forward, backward)
        images += len(y) * trainer.process.world_size
        done += 1
        after_step(done, loss)
        if trainer.stop:
            break
    metrics = tally.summary(trainer.process)
    metrics.update(forward.summary(trainer.process))
    metrics.update(backward.summary(trainer.process, "backward_"))
    metrics["images_per_s"] = images / (time.perf_counter() - began)
    return metrics
