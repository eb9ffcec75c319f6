"""Train a model.

    python tools/train.py                                             built-in digits, a minute or two on a CPU
    python tools/train.py configs/cifar10/mdeq_tiny_cifar.yaml data.root=DIR optim.lr=4e-3
    torchrun --nproc-per-node 8 tools/train.py CONFIG key=value       several GPUs

A config file holds what a run changes; `key=value` overrides it; all settings and defaults are in tools/config.py.
"""

import dataclasses
import gc
import math
import os
import signal
import sys
import time
import uuid
from functools import partial
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import mdeq
from tools import build
from tools.batches import Batches, Process, split_lines
from tools.checkpoint import (
    CONFIG_FILE,
    RESULTS_FILE,
    STATE_FILE,
    STEPS_FILE,
    STEPS_PICTURE,
    clear_leftovers,
    export,
    make_folder,
    save_state,
    write_text,
)
from tools.config import BadInput, TrainConfig, config_yaml, first_line, parse_config
from tools.engine import Diverged, Stop, Trainer, evaluate, train_epoch, with_bar
from tools.optim import build_mixup, build_optimizer, build_scheduler
from tools.program import DeferredSignals, Parser, message_of, program
from tools.report import RunLog, headline_lines, result_lines
from tools.results import circumstances, command, commit, evaluation, write_results
from tools.run_folder import Plan, claimed, plan
from tools.tasks import build_task, check_task


def parse_arguments() -> Plan:
    parser = Parser(description=__doc__)
    parser.add_argument("config", nargs="?", type=Path, help="YAML file; default: digits")
    arguments = parser.parse_with_settings()
    return plan(arguments.config, arguments.overrides)


class Run:
    """A training run from its config to its last line.

    Args:
        config: its settings.
        folder: where it writes.
        process: this process.
        state: what it goes on from, as `save` wrote it; None for a new run.

    Raises:
        BadInput: for settings, data or a state that do not go together.
    """

    def __init__(
        self, config: TrainConfig, folder: Path, process: Process, state: dict[str, Any] | None = None
    ) -> None:
        self.config, self.folder, self.process = config, folder, process
        self.amp = build.autocast(config.run, process)
        torch.manual_seed(config.run.seed)  # the weights
        self.model, self.train_batches, self.test_batches = self._model_and_data(resumed=state is not None)
        self.task = build_task(config, self.model, self.test_batches, process)
        self.trainer = self._trainer()
        self.epoch, self.batch = 0, 0  # where to go on: this epoch, after so many batches of it
        self.trained: dict[str, float] | None = None  # metrics of this epoch's training, if it only lacks its test
        self.id = uuid.uuid4().hex[:12]
        commit()  # what is trained by
        self.deadline = math.inf if config.run.max_minutes is None else time.monotonic() + 60 * config.run.max_minutes
        self.signals = DeferredSignals()
        self.started = self.saved = time.monotonic()
        self.earlier: float | None = 0.0  # minutes until this process began, None where a state does not say
        self.command = command()  # by which the run began
        self.result: dict[str, float] = {}  # of the last evaluation
        if state is not None:
            self._restore(state)
        if process.world_size > 1:
            places = torch.tensor([self.trainer.num_steps, -self.trainer.num_steps], device=process.device)
            torch.distributed.all_reduce(places, op=torch.distributed.ReduceOp.MIN)
            if places[0] != -places[1]:
                raise BadInput("processes would go on from different steps; run.out_dir must be a folder that all see")
        if process.is_main:
            self.log = RunLog(self.folder, config.run, dataclasses.asdict(config), self.epoch, self.id)

    def _model_and_data(self, resumed: bool) -> tuple[mdeq.Backbone, Batches, Batches]:
        config, process = self.config, self.process
        bare = dataclasses.replace(config.model, checkpoint=None)
        start = bare if resumed else config.model  # a resumed run has its weights; those it began with may be gone
        probing = config.data.num_classes is None
        model = build.build_model(bare if probing else start, config.data.num_classes, for_training=True)
        check_task(config, model)
        spec = build.image_spec(model, config.data.image_size)
        train_batches, classes = build.build_split(config, spec, process, training=True)
        test_batches, test_classes = build.build_split(config, spec, process, training=False)
        if probing and (start.checkpoint is not None or classes not in (None, model.num_classes)):
            torch.manual_seed(config.run.seed)
            model = build.build_model(start, classes, for_training=True)
        for found, origin in ((classes, "the training split"), (test_classes, "the test split")):
            build.check_classes(model, found, origin)
        names, test_names = train_batches.class_names, test_batches.class_names
        if names and test_names and names != test_names:  # the same number would be of another class
            raise BadInput(
                f"classes of the training split: {', '.join(names)}; of the test split: {', '.join(test_names)}"
            )
        config.data.num_classes = model.num_classes  # the effective config, from which validate.py builds the model
        # And the solver and gradient that were brought by weights which the model is not built with any more then.
        for name, part in (("solver", model.deq.solver), ("gradient", model.deq.gradient)):
            if "name" not in (getattr(config.model, name) or {}):
                setattr(config.model, name, mdeq.spec_of(part))
        build.renew_cfg(model, config.model, config.data)
        return build.placed(model, config.run, process), train_batches, test_batches

    def _trainer(self) -> Trainer:
        config, process, model = self.config, self.process, self.model
        optim = config.optim
        if process.world_size > 1 and process.device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(model)  # before anything holds on to the batch norms it replaces
        frozen = build.freeze(model, config.model)
        if config.run.compile:
            torch._dynamo.config.optimize_ddp = False  # it would cut the cell in two where buckets of gradients end
            mdeq.compile_cell(model)
        optimizer = build_optimizer(optim, model)
        scheduler = build_scheduler(optim, optimizer, config.run.epochs, len(self.train_batches))
        mixup, criterion = build_mixup(config, model.num_classes), self.task.criterion
        if mixup is not None:  # classes that are mixed: their smoothing is the mixing's
            criterion = nn.CrossEntropyLoss(cast(nn.CrossEntropyLoss, criterion).weight)
        ema = None
        if optim.ema_decay is not None:
            ema = ModelEmaV3(model, decay=optim.ema_decay, use_warmup=True)
        wrapped = model
        if process.world_size > 1:
            wrapped = DistributedDataParallel(
                model,
                device_ids=[process.device] if process.device.type == "cuda" else None,
                gradient_as_bucket_view=True,  # one copy of the gradients, not two
            )
        return Trainer(
            model=wrapped,
            bare=model,
            optimizer=optimizer,
            scheduler=scheduler,
            task=self.task,
            criterion=criterion,
            optim=optim,
            deq=config.deq,
            process=process,
            seed=config.run.seed,
            scaler=torch.amp.GradScaler(process.device.type, enabled=config.run.amp == "fp16"),
            amp=self.amp,
            mixup=mixup,
            ema=ema,
            frozen=frozen,
            max_bad_steps=config.run.max_bad_steps,
            wants_stop=self._wants_stop,
        )

    @property
    def final_model(self) -> mdeq.Backbone:
        """The weights that are evaluated and exported: the average, where one is kept."""
        return self.model if self.trainer.ema is None else self.trainer.ema.module

    def save(self, final: bool = False) -> None:
        """Write the state to resume from, then the weights for use.

        Amid steps that had to be skipped the last good checkpoint stays, unless this one is the last; weights that are
        not finite never take its place.

        Raises:
            BadInput: if the last weights are not finite.
        """
        trainer = self.trainer
        if final and not trainer.agree(self._finite()):  # all processes are here, or the others would wait for this one
            raise BadInput(f"the weights are no longer finite; lower optim.lr, or set optim.clip_grad; {self._kept}")
        if self.process.is_main and (final or (trainer.bad_in_a_row == 0 and self._finite())):
            make_folder(self.folder)
            clear_leftovers(self.folder)
            run = dataclasses.replace(self.config.run, resume=False, autoresume=False)
            text = config_yaml(dataclasses.replace(self.config, run=run))
            state = {
                "epoch": self.epoch,
                "batch": self.batch,
                "trained": self.trained,
                "model": self.model.state_dict(),
                "ema": None if trainer.ema is None else trainer.ema.module.state_dict(),
                "optimizer": trainer.optimizer.state_dict(),
                "scaler": trainer.scaler.state_dict(),
                "minutes": self.minutes,
                "command": self.command,
                "counts": [trainer.num_steps, trainer.bad_steps, trainer.bad_in_a_row],
                "config": text,
                "data": self._data,
                "id": self.id,
            }
            save_state(self.folder, state)  # first: where it fails, what there is belongs together as before
            for name in (RESULTS_FILE, STEPS_FILE, STEPS_PICTURE):  # of weights that are replaced
                (self.folder / name).unlink(missing_ok=True)
            write_text(self.folder / CONFIG_FILE, text)
            export(self.final_model, self.folder, build.data_record(self.config, self.test_batches.class_names))
            self.saved = time.monotonic()
        if final:
            trainer.agree(True)  # the others wait: torchrun would end this process with the first that ends

    @property
    def minutes(self) -> float | None:
        """What the run has taken so far, over all processes that it was resumed by."""
        return None if self.earlier is None else self.earlier + (time.monotonic() - self.started) / 60

    def _finite(self) -> bool:
        """Whether all weights are finite; a loss can be so although they are not any more."""
        models = {id(model): model for model in (self.model, self.final_model)}.values()
        finite = [torch.isfinite(x).all() for model in models for x in model.state_dict().values()]
        return bool(torch.stack(finite).all())

    @property
    def _kept(self) -> str:
        """What there is to go on from after a failure, in words."""
        return "the last good checkpoint is kept" if (self.folder / STATE_FILE).exists() else "nothing was saved"

    @property
    def _data(self) -> dict[str, Any]:
        """What the data of a run are known by."""
        splits = {"training": self.train_batches, "test": self.test_batches}
        counts = {f"number of {name} samples": split.num_samples for name, split in splits.items()}
        return {"classes": ", ".join(self.test_batches.class_names), **counts}

    def data_line(self) -> str:
        """Return what it trains on, in words."""
        counts = [batches.num_samples for batches in (self.train_batches, self.test_batches)]
        train, test = ("unknown numbers of" if count is None else f"{count:,}" for count in counts)
        names = self.test_batches.class_names
        listed = f" ({', '.join(names[:10])}{', ...' if len(names) > 10 else ''})" if names else ""
        return f"{train} training and {test} test samples, {self.model.num_classes} classes{listed}"

    def _restore(self, state: dict[str, Any]) -> None:
        trainer, origin = self.trainer, self.folder / STATE_FILE
        try:
            for what, now in self._data.items():
                before = state.get("data", {}).get(what, now)  # earlier states do not say
                if before != now:
                    raise BadInput(
                        f"{origin} is from a run on other data ({what}: {before}, not {now}); resume with the same "
                        f"data, or start from its weights in another run.out_dir: model.checkpoint={self.folder}"
                    )
            self.model.load_state_dict(state["model"])
            if trainer.ema is not None:
                trainer.ema.module.load_state_dict(state["ema"])
            trainer.optimizer.load_state_dict(state["optimizer"])
            trainer.scaler.load_state_dict(state["scaler"])
            trainer.num_steps, trainer.bad_steps, trainer.bad_in_a_row = state["counts"]
            self.epoch, self.batch = state["epoch"], state["batch"]
            self.trained, self.id = state.get("trained"), state.get("id", self.id)
            self.command = str(state.get("command", self.command))
            if self.config.run.epochs > parse_config(state["config"], str(origin)).run.epochs:
                self.command += f"\n{command(resumed=True)}"
            self.earlier = None if (minutes := state.get("minutes")) is None else float(minutes)
        except (RuntimeError, ValueError, AttributeError, TypeError, LookupError) as error:
            reason = first_line(error)
            raise BadInput(f"{origin} is damaged, or from another model: {reason}") from None
        for number in (self.epoch, self.batch, trainer.num_steps, trainer.bad_steps, trainer.bad_in_a_row):
            if type(number) is not int or number < 0:
                raise BadInput(f"{origin} is damaged: it counts {number!r} epochs or steps")
        if not isinstance(self.id, str) or not (self.trained is None or isinstance(self.trained, dict)):
            raise BadInput(f"{origin} is damaged: its id is {self.id!r}, its metrics {self.trained!r}")
        if trainer.scheduler is not None:
            trainer.scheduler.step_update(trainer.num_steps)

    def _wants_stop(self) -> Stop:
        if self.signals.received is not None:
            return Stop.SIGNAL
        return Stop.TIME if time.monotonic() > self.deadline else Stop.NO

    def train(self) -> bool:
        """Train to the last epoch; return False if it had to stop before.

        Raises:
            BadInput: where steps come to nothing, or data cannot be read; the last checkpoint stays.
        """
        with self.signals:
            while self.epoch < self.config.run.epochs:
                if self.trained is None:
                    metrics = self._train_epoch()
                    self.trainer.agree(True)  # also on signals that came late in the last step
                    if self.batch == len(self.train_batches):
                        self.trained = metrics
                    if self.trained is None or self.trainer.stop == Stop.SIGNAL:  # which does not wait for a test
                        self.save(final=True)
                        return False
                self._end_epoch(self.trained)
                self.trainer.agree(True)  # on the time that the test took
                if self.trainer.stop == Stop.SIGNAL or (self.trainer.stop and self.epoch < self.config.run.epochs):
                    self.save(final=True)  # also after a step that was skipped
                    return False
        return True

    def _train_epoch(self) -> dict[str, float]:
        if self.process.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.process.device)
        title = f"epoch {self.epoch + 1}/{self.config.run.epochs}"
        bar = self._bar(title, "step", total=len(self.train_batches), initial=self.batch)

        def after_step(done: int, loss: float) -> None:
            self.batch = done
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
            due = time.monotonic() - self.saved > 60 * self.config.run.checkpoint_minutes
            if due and self.process.is_main and not self.trainer.stop:  # where it stops it saves anyway
                self.save()

        try:
            with bar:  # an error must not be said on the line of the bar
                return train_epoch(
                    self.trainer, self.train_batches, self.epoch, start=self.batch, after_step=after_step
                )
        except Diverged as error:
            raise BadInput(f"{error}; {self._kept}") from None

    def _end_epoch(self, train: dict[str, float]) -> None:
        config, trainer = self.config, self.trainer
        row: dict[str, float] = {
            "epoch": self.epoch,
            "step": trainer.num_steps,
            "lr": trainer.optimizer.param_groups[-1]["lr"],
            "minutes": self.minutes or math.nan,  # to the end of its training, tests of earlier epochs included
        }
        row.update({f"train_{key}": value for key, value in train.items()})
        last = self.epoch + 1 == config.run.epochs
        if last and trainer.bad_steps == trainer.num_steps:
            raise BadInput(
                f"the loss or gradient of all {trainer.num_steps} steps was not finite, so nothing was learnt; lower "
                f"optim.lr, or set optim.clip_grad; {self._kept}"
            )
        if last or (self.epoch + 1) % config.run.eval_every == 0:
            self.save(final=last)  # a test that fails must not cost the epoch
            try:
                with self.signals.acted_on():
                    self.result = self.evaluate()
            except BadInput as error:
                raise BadInput(f"{message_of(error)}; the run is kept, go on with run.resume=true") from None
            row.update({f"test_{key}": value for key, value in self.result.items()})
        row["skipped_steps"] = trainer.bad_steps
        if self.process.device.type == "cuda":
            row["peak_memory_mib"] = torch.cuda.max_memory_allocated(self.process.device) / 2**20
        elif os.name == "posix":
            row["peak_memory_mib"] = _peak_resident_mib()
        self.epoch, self.batch, self.trained = self.epoch + 1, 0, None
        if self.process.is_main:
            self.log.add(row)
            line = self.task.headline
            scores = [f"loss {train['loss']:.4f}"]
            scores += [f"train {line.text(train[line.key], 2)}"] if line.key in train else []
            scores += [f"test {line.text(self.result[line.key], 2)}"] if "test_loss" in row else []
            tqdm.write(
                f"epoch {self.epoch}/{config.run.epochs}: {', '.join(scores)}, "
                f"{train['images_per_s']:.0f} images/s"
                + (f", residual {row['test_residual_mean']:.1e}" if "test_residual_mean" in row else "")
            )
        self.save(final=last)

    def _bar(self, desc: str, unit: str, **kwargs: Any) -> tqdm:
        quiet = not (self.config.run.progress and self.process.is_main)
        return tqdm(desc=desc, unit=unit, leave=False, disable=quiet, **kwargs)

    def evaluate(self, **kwargs: Any) -> dict[str, float]:
        """Return the metrics of the test split; arguments as in `engine.evaluate`."""
        if self.process.world_size > 1:  # every process has batch norms of its own samples; one of them is exported
            for buffer in self.final_model.buffers():
                torch.distributed.broadcast(buffer, 0)
        return evaluate(
            self.final_model,
            self.test_batches,
            self.process,
            self.task,
            amp=self.amp,
            watch=with_bar(self.test_batches, self.process, partial(self._bar, "test")),
            **kwargs,
        )

    def finish(self) -> None:
        """Print the result: the scores at the solver's steps and at twice as many, and how the solves went."""
        solver = self.final_model.deq.solver
        result = self.result or self.evaluate()
        twice = self.evaluate(solver=dataclasses.replace(solver, max_steps=2 * solver.max_steps, tol=0.0))
        if not self.process.is_main:
            return
        self.log.close()
        print("\n".join(headline_lines(self.task.headline, result, twice, solver.max_steps)))
        print("\n".join(result_lines(result)))
        if self.trainer.bad_steps:
            print(f"skipped steps (loss or gradient not finite): {self.trainer.bad_steps}")
        self._record(result, twice)
        print(f"checkpoint: {self.folder / 'model.safetensors'}")

    def _record(self, result: dict[str, float], twice: dict[str, float]) -> None:
        """Write results.json, from which tools/publish.py makes the model card."""
        config, where = self.config, (self.process.device, self.process.world_size)
        training = {"seed": config.run.seed, "epochs": config.run.epochs, "minutes": self.minutes}
        training |= {**circumstances(*where), "command": self.command}  # more than one line if it was prolonged
        note = getattr(self.test_batches, "note", "")
        reached = evaluation(self.final_model, result, twice, *where, metric=self.task.headline.key, data_note=note)
        write_results(self.folder, training=training, evaluation={**reached, "command": self.command})


def _peak_resident_mib() -> float:
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024  # in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def main() -> None:
    start = parse_arguments()
    process = build.start_process(start.config.run)
    if start.config.run.compile:
        build.check_compiler(process.device, "run.compile=true")
    with claimed(start, is_main=process.is_main) as folder:
        run = Run(start.config, folder, process, start.state)
        if process.is_main:
            count = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
            model = start.config.model
            origin = model.checkpoint or ("released weights" if model.pretrained else "scratch")
            spec = build.image_spec(run.model, start.config.data.image_size)
            size = "x".join(map(str, (spec.size[0], *(start.config.data.patch_size or spec.size[1:]))))
            what = f"{count:,} trainable parameters, input {size}, on {process.device}"
            print(f"{model.name} from {origin}: {what}, run in {folder}")
            for line in (run.data_line(), *split_lines(start.config.data)):
                print(line)
            optim, epochs = start.config.optim, start.config.run.epochs
            if optim.schedule != "none" and optim.warmup_epochs >= epochs:
                print(
                    f"warning: the rate is still rising when the run ends (optim.warmup_epochs={optim.warmup_epochs}, "
                    f"run.epochs={epochs})",
                    file=sys.stderr,
                )
        code = 0
        if run.train():
            run.finish()
        else:
            what = "time is up"
            if run.trainer.stop == Stop.SIGNAL:
                what = "interrupted"
                code = 128 + (run.signals.received or signal.SIGTERM)  # it may be another process's
            if process.is_main:
                place = f"epoch {run.epoch + 1}, step {run.trainer.num_steps}"
                print(f"{what} at {place}; continue with run.resume=true")
    if process.world_size > 1:  # not after an error: NCCL would wait for processes that wait for this one
        # The run holds the group too: freed by it, PyTorch 2.6 joins a thread that waits for Python's lock.
        del run
        gc.collect()
        torch.distributed.destroy_process_group()
    if code:
        sys.exit(code)


if __name__ == "__main__":
    program(main)
