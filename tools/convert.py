"""Turn a released MDEQ checkpoint into a folder with model.safetensors and config.json, which timm loads.

    python tools/convert.py released.pkl --model mdeq_small --out DIR
    python tools/convert.py released.pkl --out DIR --tag locuslab_in1k

Reads every layout of the official codebases, see docs/checkpoints.md, and the folders of this package's own runs.
Without --model the model is found by the names and shapes of the weights. Arguments in which the file differs from the
model's defaults are found the same way and written to config.json; afterwards

    timm.create_model("local-dir:DIR", pretrained=True)

gives the model, as `hf-hub:` does once the folder is uploaded. With --inflate the 2D weights become those of the same
model over volumes (`mdeq.inflate`), a start for training. With --rescale kernels that grew in training get an
ordinary length again (`mdeq.rescale`): the same outputs, but weights that are easier to fine-tune. With --bf16 they are
rounded to bfloat16, half the size. The config.yaml of a run is copied, so that `tools/validate.py --checkpoint DIR
--record` can evaluate the result.
"""

import argparse
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import timm
import torch
from safetensors.torch import save_file

import mdeq
from tools.build import of_package
from tools.checkpoint import (
    CONFIG_FILE,
    FORMAT,
    RESULTS_FILE,
    UMASK,
    WEIGHTS_FILE,
    check_folder,
    export,
    make_folder,
    read_json,
    read_weights,
    run_of,
    sha256,
    write_atomically,
)
from tools.config import BadInput
from tools.pretrained import config_beside, load_checkpoint
from tools.program import Parser, program
from tools.results import read_results, write_results

OFFICIAL = {
    "MDEQ-Vision": "https://github.com/locuslab/deq",
    "older locuslab/mdeq": "https://github.com/locuslab/mdeq",
    "TorchDEQ": "https://github.com/locuslab/torchdeq",
}
"""Layout of an official checkpoint -> where it is from."""
DATA_KEYS = ("label_names", "label_descriptions", "label_colors", "preprocessing")
"""What a config.json says of the data, which the weights do not."""


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="the file: .pkl, .pth, .safetensors; or a run's folder")
    parser.add_argument("--model", help="the model of the checkpoint; default: the one that the weights fit")
    parser.add_argument("--out", type=Path, required=True, help="folder to create")
    parser.add_argument("--tag", help="name of these weights, as in ARCHITECTURE.TAG; default: locuslab")
    parser.add_argument("--inflate", action="store_true", help="write the 3D model that has the 2D kernels inside")
    parser.add_argument("--rescale", action="store_true", help="give kernels before norms an ordinary length again")
    parser.add_argument("--bf16", action="store_true", help="write the weights in bfloat16")
    arguments = parser.parse_args()
    check_folder(arguments.out)
    if arguments.out.is_dir() and any(arguments.out.iterdir()):
        raise BadInput(f"{arguments.out} is not empty; give --out a new folder")
    if arguments.tag is not None and not re.fullmatch(r"\w+", arguments.tag):
        raise BadInput(f"--tag must consist of letters, digits and underscores, got {arguments.tag!r}")
    return arguments


def inflated(model: mdeq.Backbone) -> mdeq.Backbone:
    """Return the model over volumes that holds the kernels of a model over images.

    Raises:
        BadInput: for a model over volumes.
    """
    if model.spatial_dims != 2:
        raise BadInput("--inflate turns a 2D model into a 3D one; this one is already 3D")
    args = {**model._model_args, "num_classes": model.num_classes, "in_chans": model.in_chans, "spatial_dims": 3}
    name = model.pretrained_cfg["architecture"]
    volumes = of_package(timm.create_model(name, **args), name)
    volumes.load_state_dict(mdeq.inflate(model.state_dict(), volumes))
    volumes.pretrained_cfg.update(model.pretrained_cfg)
    return volumes


@torch.no_grad()
def round_weights(model: mdeq.Backbone) -> None:
    """Round all weights and statistics to bfloat16, in the precision that they are in."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.bfloat16())


def narrow_file(path: Path) -> None:
    """Write the weights of a file, which are rounded already, as bfloat16."""
    # Copies: Windows replaces no file that a tensor is a view of.
    weights = {key: x.bfloat16() if x.is_floating_point() else x.clone() for key, x in read_weights(path).items()}
    write_atomically(path, lambda beside: save_file(weights, beside, metadata=FORMAT))


@torch.no_grad()
def verify(model: mdeq.Backbone, folder: Path) -> None:
    """Check that the folder gives the model again, logits and weights alike, bit for bit.

    Raises:
        BadInput: if it does not.
    """
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    side = min(64 if model.spatial_dims == 2 else 32, model.pretrained_cfg["input_size"][-1])
    x = torch.randn(1, model.in_chans, *[side] * model.spatial_dims, generator=torch.Generator().manual_seed(0))
    weights, other = model.state_dict(), again.state_dict()
    same = weights.keys() == other.keys() and all(torch.equal(weights[key], other[key]) for key in weights)
    if not same or not torch.equal(model.eval()(x), again(x)):
        raise BadInput("the model read back from the folder differs from the checkpoint; nothing was kept")


def main() -> None:
    arguments = parse_arguments()
    model, layout = load_checkpoint(arguments.checkpoint, arguments.model)
    if arguments.inflate:
        model = inflated(model)
    if arguments.rescale:
        mdeq.rescale(model)
    if arguments.bf16:
        round_weights(model)
    cfg = model.pretrained_cfg
    if layout in OFFICIAL:
        cfg.update(license="mit", origin_url=OFFICIAL[layout], tag=arguments.tag or "locuslab")
    elif arguments.tag is not None:
        cfg["tag"] = arguments.tag
    out = arguments.out.absolute()
    make_folder(out.parent)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        config = config_beside(arguments.checkpoint)
        export(model, temporary, {key: config[key] for key in DATA_KEYS if key in config})
        if arguments.bf16:
            narrow_file(temporary / WEIGHTS_FILE)
        same_model = (arguments.bf16 or arguments.rescale) and not arguments.inflate
        run = run_of(arguments.checkpoint)
        if same_model and (run / CONFIG_FILE).is_file():
            shutil.copy(run / CONFIG_FILE, temporary)
            if (run / RESULTS_FILE).is_file():  # what the weights reached is no longer theirs
                training = read_results(run).get("training")
                write_results(temporary, **({} if training is None else {"training": training}))
        verify(model, temporary)
        temporary.chmod(0o777 & ~UMASK)
        if out.is_dir():
            out.rmdir()  # empty, see above; Windows puts nothing in its place
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    config = read_json(out / "config.json")
    print(f"{layout} layout, {cfg['architecture']}, arguments: {config.get('model_args', {})}")
    print(f"parameters: {sum(p.numel() for p in model.parameters()):,}")
    print(f"sha256: {sha256(out / WEIGHTS_FILE)}  {WEIGHTS_FILE}")
    print(f"written and read back, logits equal: {arguments.out}")


if __name__ == "__main__":
    program(main)
