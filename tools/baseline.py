r"""Train an explicit timm network with the recipe of a config, for comparison with a model of this package.

    python tools/baseline.py configs/cifar10/mdeq_tiny_cifar.yaml --channels 16 32 48 64 --small-images \
        data.root=DIR

Data, batches, optimiser, schedule and seed are those of the config; what belongs to an equilibrium is left out. ResNets
have stems for 224x224 images: with --small-images the first convolution keeps the size and nothing is pooled after it.
Prints accuracy, parameters and minutes, and saves them as baseline.json; with --record also in the record of a release,
whose card then shows it beside the model: it is tested on the data the release was evaluated on.
"""

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import timm
import torch
from torch import Tensor, nn
from tqdm import tqdm

from mdeq import Equilibrium
from tools import build, volume_data
from tools.batches import evaluated_split, seed_everything
from tools.checkpoint import check_folder, make_folder
from tools.config import BadInput, DEQConfig, TrainConfig, first_line, load_config
from tools.engine import Trainer, evaluate, train_epoch
from tools.optim import build_optimizer, build_scheduler
from tools.program import Parser, program
from tools.recheck import DATA_PLACES, evaluated_config, put_into_card, read_release
from tools.results import circumstances, write_json
from tools.tasks import build_task


class Explicit(nn.Module):
    """A network in the place of a model of this package: there is no equilibrium to tell of."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.spatial_dims = net, 2
        self.num_classes: Any = net.num_classes

    def forward(self, x: Tensor, *, return_equilibrium: bool = False, **options: Any) -> Any:
        logits = self.net(x)
        return (logits, Equilibrium((), None)) if return_equilibrium else logits


def parse_arguments() -> tuple[argparse.Namespace, TrainConfig, TrainConfig]:
    """Return the settings of training and those of the evaluation, which differ where those of a record did."""
    parser = Parser(description=__doc__)
    parser.add_argument("config", type=Path, help="YAML file of an image classification run")
    parser.add_argument("--net", default="resnet10t", help="a timm model name (default: %(default)s)")
    parser.add_argument("--channels", type=int, nargs="+", help="stage widths (ResNets); default: the network's own")
    parser.add_argument("--small-images", action="store_true", help="use a stem that keeps the size, for 32x32 images")
    parser.add_argument("--out", type=Path, default=Path("runs") / "baseline", help="folder for baseline.json")
    parser.add_argument("--record", type=Path, metavar="FILE", help="record in mdeq/weights/ to add the result to")
    arguments = parser.parse_with_settings()
    check_folder(arguments.out)
    config = load_config(arguments.config, arguments.overrides)
    if config.task != "classification" or config.data.mixup or config.data.cutmix or config.optim.ema_decay:
        raise BadInput("a baseline is for image classification, without mixup, cutmix or optim.ema_decay")
    if any(word.startswith("run.max_minutes=") for word in arguments.overrides):
        raise BadInput("a baseline is trained to the end; leave out run.max_minutes")
    if config.data.name in volume_data.NAMES:
        raise BadInput(f"a baseline is for image classification, but {config.data.name} has volumes")
    if arguments.record is None:
        return arguments, config, config
    release = read_release(arguments.record)
    card = release.card
    if card["data"] != config.data.name:
        raise BadInput(f"{arguments.record} has weights for {card['data']}, not for {config.data.name}")
    trained = evaluated_config(card, release.name)
    alike = [(c.model.name.partition(".")[0], c.run.epochs, c.optim) for c in (config, trained)]
    if alike[0] != alike[1]:
        raise BadInput(f"{arguments.record} is for another model, recipe or number of epochs ({trained.model.name})")
    places = {key: getattr(config.data, key) for key in DATA_PLACES}
    data = dataclasses.replace(trained.data, **places)
    return arguments, config, dataclasses.replace(config, data=data)


def build_net(
    name: str, num_classes: int, size: tuple[int, int, int], channels: list[int] | None, small_images: bool
) -> nn.Module:
    """Return a network of timm for images of a size (channels, height, width).

    Raises:
        BadInput: for an unknown one, or one that these settings are not for.
    """
    options: dict[str, Any] = {} if channels is None else {"channels": channels}
    if channels is not None and len(channels) != 4:
        raise BadInput(f"--channels takes four numbers, one for each stage of a ResNet, got {len(channels)}")
    try:
        net = timm.create_model(name, num_classes=num_classes, in_chans=size[0], **options)
        net.eval()(torch.zeros(1, *size))
    except (RuntimeError, TypeError, ValueError, AssertionError, AttributeError) as error:
        raise BadInput(f"--net {name}: {first_line(error)}") from None
    if small_images:
        first = next((m for m in net.modules() if isinstance(m, nn.Conv2d)), None)
        if first is None or not isinstance(getattr(net, "maxpool", None), nn.Module):
            raise BadInput(f"--small-images is for ResNets, got {name}")
        first.stride, net.maxpool = (1, 1), nn.Identity()
    return net


def main() -> None:
    arguments, config, tested = parse_arguments()
    process = build.start_process(config.run)
    if process.world_size > 1:
        raise BadInput("a baseline is trained in one process; start it with python, not torchrun")
    # The model of the config says what images look like to it; the network sees the same.
    spec = build.image_spec(build.build_model(config.model, None, for_training=True), config.data.image_size)
    train, classes = build.build_split(config, spec, process, training=True)
    test, _ = build.build_split(tested, spec, process, training=False)
    classes = config.data.num_classes or classes
    if classes is None:
        raise BadInput("set data.num_classes: this data set does not say how many classes it has")
    seed_everything(config.run.seed)
    net = build_net(arguments.net, classes, spec.size, arguments.channels, arguments.small_images)
    model = build.placed(Explicit(net), config.run, process)
    task = build_task(config, model, test, process)
    optimizer = build_optimizer(dataclasses.replace(config.optim, layer_decay=None), model)
    trainer = Trainer(
        model=model,
        bare=model,
        optimizer=optimizer,
        scheduler=build_scheduler(config.optim, optimizer, config.run.epochs, len(train)),
        task=task,
        criterion=task.criterion,
        optim=config.optim,
        deq=DEQConfig(),
        process=process,
        seed=config.run.seed,
        scaler=torch.amp.GradScaler(process.device.type, enabled=False),
        amp=build.autocast(config.run, process),
    )
    parameters, start = sum(p.numel() for p in model.parameters()), time.monotonic()
    with tqdm(total=config.run.epochs * len(train), unit="step", disable=not config.run.progress, leave=False) as bar:
        for epoch in range(config.run.epochs):
            train_epoch(trainer, train, epoch, after_step=lambda done, loss: bar.update())
    minutes = (time.monotonic() - start) / 60
    result = evaluate(model, test, process, task, amp=trainer.amp)
    told = f"{arguments.net}, {parameters:,} parameters, {config.run.epochs} epochs in {minutes:.1f} minutes"
    split = evaluated_split(tested.data)
    print(f"{told}: {split} accuracy {result['top1']:.2f} %, loss {result['loss']:.4f}")
    record = dict(
        net=arguments.net, channels=arguments.channels, parameters=parameters, minutes=minutes, metrics=result,
        split=split, seed=config.run.seed, epochs=config.run.epochs, **circumstances(process.device),
    )  # fmt: skip
    make_folder(arguments.out)
    write_json(arguments.out / "baseline.json", record)
    print(f"saved: {arguments.out / 'baseline.json'}")
    if arguments.record is not None:
        put_into_card(arguments.record, baseline=record)
        print(f"saved: {arguments.record}")


if __name__ == "__main__":
    program(main)
