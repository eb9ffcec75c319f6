"""Train a model.

    python tools/train.py                                             digits, embedded, a few minutes on a CPU
    python tools/train.py configs/cifar10/mdeq_tiny_cifar.yaml data.root=DIR optim.lr=5e-4
    torchrun --nproc-per-node 8 tools/train.py CONFIG key=value       several GPUs

A config file holds what a run changes; `key=value` overrides it; all settings and defaults are in tools/config.py.
"""

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch._functorch.config
from omegaconf import OmegaConf
from timm.loss import SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from tools import build
from tools.batches import Batches, Process
from tools.checkpoint import (
    CONFIG_FILE,
    STATE_FILE,
    check_folder,
    clear_leftovers,
    export,
    load_state,
    save_state,
    write_atomically,
)
from tools.config import DEFAULT_CONFIG, BadInput, TrainConfig, config_yaml, load_config, split_overrides
from tools.engine import Trainer, evaluate, train_epoch
from tools.optim import build_mixup, build_optimizer, build_scheduler
from tools.report import RunLog, headline_lines, program, result_lines
from tools.results import circumstances, evaluation, write_results
from tools.tasks import build_task, check_task


def parse_arguments() -> tuple[Path, TrainConfig]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, default=DEFAULT_CONFIG, help="YAML file; default: digits")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the file")
    overrides, rest = split_overrides(sys.argv[1:])
    arguments = parser.parse_args(rest)
    if arguments.overrides:
        raise BadInput(f"expected key=value, got {arguments.overrides[0]!r}")
    path = arguments.config
    return path, load_config(path, overrides)


def run_folder(config: TrainConfig, name: str) -> Path:
    """Return the folder of this run: a new one, or the one to go on in.

    Raises:
        BadInput: if it holds another run already, or nothing to resume.
    """
    if config.run.out_dir is not None:
        folder = Path(config.run.out_dir)
        check_folder(folder)
        if not config.run.resume and (folder / STATE_FILE).exists():
            raise BadInput(
                f"{folder} holds a run already; set run.resume=true to go on with it, or another run.out_dir"
            )
    else:
        runs = [Path("runs") / (name if k == 1 else f"{name}-{k}") for k in range(1, 10_000)]
        used = [folder for folder in runs if (folder / CONFIG_FILE).exists()]
        folder = next(folder for folder in runs if folder not in used)
        if config.run.resume:
            folder = next((f for f in reversed(used) if (f / STATE_FILE).exists()), runs[0])
    if config.run.resume and not (folder / STATE_FILE).exists():
        raise BadInput(f"run.resume=true, but {folder} holds no {STATE_FILE}; leave it out to start anew")
    return folder


class Run:
    """A training run from its config to its last line."""

    def __init__(self, config: TrainConfig, name: str, process: Process) -> None:
        self.config, self.process = config, process
        self.folder = run_folder(config, name)
        self.amp = build.autocast(config.run, process)
        self.dtype = build.DTYPES[config.run.dtype]
        torch.manual_seed(config.run.seed)  # the weights
        self.model, self.train_batches, self.test_batches = self._model_and_data()
        self.task = build_task(config, self.model, self.test_batches, process)
        self.trainer = self._trainer()
        self.epoch, self.batch = 0, 0  # where to go on: this epoch, after so many batches of it
        self.deadline = None if config.run.max_minutes is None else time.monotonic() + 60 * config.run.max_minutes
        self.started = self.saved = time.monotonic()
        self.result: dict[str, float] = {}  # of the last evaluation
        if config.run.resume:
            self._restore(load_state(self.folder / STATE_FILE))
        if process.is_main:
            self.log = RunLog(self.folder, config.run, dataclasses.asdict(config), self.epoch)

    def _model_and_data(self) -> tuple[nn.Module, Batches, Batches]:
        config, process = self.config, self.process
        probe = build.build_model(config.model, None, for_training=True) if config.data.num_classes is None else None
        model = probe or build.build_model(config.model, config.data.num_classes, for_training=True)
        check_task(config, model)
        spec = build.image_spec(model, config.data.image_size)
        train_batches, classes = build.build_split(config, spec, process, training=True)
        test_batches, test_classes = build.build_split(config, spec, process, training=False)
        if probe is not None and classes is not None and classes != model.num_classes:
            torch.manual_seed(config.run.seed)
            model = build.build_model(config.model, classes, for_training=True)
        for found, origin in ((classes, "the training split"), (test_classes, "the test split")):
            build.check_classes(model, found, origin)
        config.data.num_classes = model.num_classes  # the effective config, from which validate.py builds the model
        size = (spec.size[0], *(config.data.patch_size or spec.size)[-2:])  # timm's has three numbers for volumes too
        anew = {"input_size": size, "tag": "", "hf_hub_id": None, "file": None, "description": None}
        anew["label_names"] = None  # config.json gets those of the data
        model.pretrained_cfg = {**model.pretrained_cfg, **anew}
        return model.to(process.device, self.dtype), train_batches, test_batches

    def _trainer(self) -> Trainer:
        config, process, model = self.config, self.process, self.model
        optim = config.optim
        if process.world_size > 1 and process.device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(model)  # before anything holds on to the batch norms it replaces
        frozen = build.freeze(model, config.model)
        if config.run.compile:
            # The implicit gradient goes through the backward graph of one evaluation many times.
            torch._functorch.config.donated_buffer = False
            model.equilibrium.cell.compile(dynamic=True)
        optimizer = build_optimizer(optim, model)
        scheduler = build_scheduler(optim, optimizer, config.run.epochs, len(self.train_batches))
        mixup = build_mixup(config, model.num_classes, process)
        ema = None
        if optim.ema_decay is not None:
            ema = ModelEmaV3(model, decay=optim.ema_decay, use_warmup=True)
        wrapped = model
        if process.world_size > 1:
            wrapped = DistributedDataParallel(
                model, device_ids=[process.device] if process.device.type == "cuda" else None
            )
        return Trainer(
            model=wrapped,
            bare=model,
            optimizer=optimizer,
            scheduler=scheduler,
            task=self.task,
            criterion=self.task.criterion if mixup is None else SoftTargetCrossEntropy(),
            optim=optim,
            deq=config.deq,
            process=process,
            seed=config.run.seed,
            scaler=torch.amp.GradScaler(process.device.type, enabled=config.run.amp == "fp16"),
            amp=self.amp,
            dtype=self.dtype,
            mixup=mixup,
            ema=ema,
            frozen=frozen,
            max_bad_steps=config.run.max_bad_steps,
        )

    @property
    def final_model(self) -> nn.Module:
        """The weights that are evaluated and exported: the average, where one is kept."""
        return self.model if self.trainer.ema is None else self.trainer.ema.module

    def save(self, final: bool = False) -> None:
        """Write the state to resume from, then the weights for use.

        Amid steps that had to be skipped the last good checkpoint stays, unless this one is the last and its weights
        are finite.
        """
        trainer = self.trainer
        good = trainer.bad_in_a_row == 0 or (final and all(torch.isfinite(p).all() for p in self.model.parameters()))
        if self.process.is_main and good:
            self.folder.mkdir(parents=True, exist_ok=True)
            clear_leftovers(self.folder)
            write_atomically(self.folder / CONFIG_FILE, lambda path: path.write_text(config_yaml(self.config)))
            state = {
                "epoch": self.epoch,
                "batch": self.batch,
                "model": self.model.state_dict(),
                "ema": None if trainer.ema is None else trainer.ema.module.state_dict(),
                "optimizer": trainer.optimizer.state_dict(),
                "scaler": trainer.scaler.state_dict(),
                "counts": [trainer.num_steps, trainer.bad_steps, trainer.bad_in_a_row],
                "config": config_yaml(self.config),
            }
            save_state(self.folder, state)
            export(self.final_model, self.folder, build.data_record(self.config, self.test_batches))
        self.saved = time.monotonic()

    def _restore(self, state: dict[str, Any]) -> None:
        trainer = self.trainer
        try:
            before = OmegaConf.create(state["config"]).optim.name
            if before != self.config.optim.name:
                raise ValueError(f"optim.name={before}")
            self.model.load_state_dict(state["model"])
            if trainer.ema is not None:
                trainer.ema.module.load_state_dict(state["ema"])
            trainer.optimizer.load_state_dict(state["optimizer"])
            trainer.scaler.load_state_dict(state["scaler"])
            trainer.num_steps, trainer.bad_steps, trainer.bad_in_a_row = state["counts"]
            self.epoch, self.batch = state["epoch"], state["batch"]
        except (RuntimeError, ValueError, AttributeError, TypeError, LookupError) as error:
            reason = str(error).splitlines()[0]
            raise BadInput(f"{self.folder / STATE_FILE} is of a run with other settings: {reason}") from None
        if trainer.scheduler is not None:
            trainer.scheduler.step_update(trainer.num_steps)

    def _out_of_time(self) -> bool:
        late = self.deadline is not None and time.monotonic() > self.deadline
        if self.process.world_size > 1 and self.deadline is not None:  # all stop at the same step
            flag = torch.tensor(float(late), device=self.process.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            late = bool(flag)
        return late

    def train(self) -> bool:
        """Train to the last epoch; return False if time ran out before."""
        config = self.config
        while self.epoch < config.run.epochs:
            title = f"epoch {self.epoch + 1}/{config.run.epochs}"
            bar = self._bar(title, "step", total=len(self.train_batches), initial=self.batch)

            def after_step(done: int, loss: float, bar: tqdm = bar) -> bool:
                self.batch = done
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update()
                if self._out_of_time():
                    return False
                if self.process.is_main and time.monotonic() - self.saved > 60 * config.run.checkpoint_minutes:
                    self.save()
                return True

            with bar:  # an error must not be said on the line of the bar
                result = train_epoch(
                    self.trainer, self.train_batches, self.epoch, start=self.batch, after_step=after_step
                )
            if not result.complete:
                self.save(final=True)
                return False
            self._end_epoch(result.metrics)
            if self._out_of_time() and self.epoch < config.run.epochs:
                return False
        return True

    def _end_epoch(self, train: dict[str, float]) -> None:
        config, trainer = self.config, self.trainer
        row: dict[str, float] = {
            "epoch": self.epoch,
            "step": trainer.num_steps,
            "lr": trainer.optimizer.param_groups[-1]["lr"],
        }
        row.update({f"train_{key}": value for key, value in train.items()})
        last = self.epoch + 1 == config.run.epochs
        if last or (self.epoch + 1) % config.run.eval_every == 0:
            self.result = self.evaluate()
            row.update({f"test_{key}": value for key, value in self.result.items()})
        row["skipped_steps"] = trainer.bad_steps
        if self.process.device.type == "cuda":
            row["peak_memory_mib"] = torch.cuda.max_memory_allocated(self.process.device) / 2**20
        else:
            row["peak_memory_mib"] = _peak_resident_mib()
        self.epoch, self.batch = self.epoch + 1, 0
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

    def _bar(self, desc: str, unit: str, iterable: Any = None, **kwargs: Any) -> tqdm:
        quiet = not (self.config.run.progress and self.process.is_main)
        return tqdm(iterable, desc=desc, unit=unit, leave=False, disable=quiet, **kwargs)

    def evaluate(self, **kwargs: Any) -> dict[str, float]:
        """Return the metrics of the test split; arguments as in `engine.evaluate`."""
        return evaluate(
            self.final_model,
            self.test_batches,
            self.process,
            self.task,
            amp=self.amp,
            dtype=self.dtype,
            watch=lambda batches: iter(self._bar("test", "batch", batches, total=len(self.test_batches))),
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
        minutes = None if config.run.resume else (time.monotonic() - self.started) / 60
        training = {"seed": config.run.seed, "epochs": config.run.epochs, "minutes": minutes, **circumstances(*where)}
        reached = evaluation(self.final_model, result, twice, *where, metric=self.task.headline.key)
        write_results(self.folder, training=training, evaluation=reached)


def _peak_resident_mib() -> float:
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    path, config = parse_arguments()
    process = build.start_process(config.run)
    run = Run(config, f"{path.parent.name}_{path.stem}", process)
    if process.is_main:
        count = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
        print(f"{config.model.name}: {count:,} trainable parameters on {process.device}, run in {run.folder}")
    try:
        if run.train():
            run.finish()
        elif process.is_main:
            print(
                f"time is up at epoch {run.epoch + 1}, step {run.trainer.num_steps}; run.resume=true goes on from there"
            )
    finally:
        if process.world_size > 1:
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    program(main)
