"""The network whose numbers the official code computed, and official checkpoints in every layout they come in."""

import json
from functools import cache
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

import mdeq
from mdeq.models.official import from_official

DATA = Path(__file__).parent / "data"
EXACT = dict(tol=1e-13, max_steps=200)


def official_model(dtype: torch.dtype = torch.float64) -> mdeq.MDEQ:
    """CIFAR TINY with official weights; it has an equilibrium, which an untrained network may not."""
    model = timm.create_model("mdeq_tiny_cifar", dropout=0.0)
    model.load_state_dict(from_official(official_weights()), strict=True)
    return exact(model.to(dtype))


def official_weights() -> dict[str, Tensor]:
    return load_file(DATA / "official_cifar_tiny.safetensors")


def exact(model: mdeq.MDEQ) -> mdeq.MDEQ:
    model.deq.solver = mdeq.Broyden(**EXACT)
    model.deq.gradient = mdeq.ImplicitGradient(mdeq.Broyden(**EXACT))
    return model.eval()


@cache
def _layouts() -> dict:
    return json.loads((DATA / "official_layouts.json").read_text())


TABLES = sorted(_layouts()["tables"])


def table(name: str) -> tuple[dict[str, tuple[int, ...]], int]:
    """Return keys and shapes of an official state dict, in its order, and the network's number of parameters."""
    entry = _layouts()["tables"][name]
    keys = _layouts()["keys"][entry["keys"]].split(" ")
    shapes = [() if s == "-" else tuple(map(int, s.split("x"))) for s in entry["shapes"].split(" ")]
    return dict(zip(keys, shapes, strict=True)), entry["parameters"]


def random_weights(name: str, device: str = "cpu") -> dict[str, Tensor]:
    """Return weights for the keys of a table, drawn so that a network stays in range; the copies of f agree."""
    weights = {}
    for key, shape in table(name)[0].items():
        if key.endswith("num_batches_tracked"):
            weights[key] = torch.zeros(shape, dtype=torch.int64, device=device)
        elif device == "meta":
            weights[key] = torch.empty(shape, device=device)
        elif key.endswith(("running_var", "weight_g")):
            weights[key] = 0.5 + torch.rand(shape)
        else:
            fan_in = torch.Size(shape[1:]).numel()
            weights[key] = (torch.randn(shape) if len(shape) == 1 else torch.randn(shape) / fan_in**0.5) + (
                1.0 if len(shape) == 1 and key.endswith("weight") else 0.0
            )
    return weights


def older(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return MDEQ-Vision weights as locuslab/mdeq would save them: affine norms after fusion, f four times over."""
    cell = {k.removeprefix("fullstage."): v for k, v in affine(weights).items() if k.startswith("fullstage.")}
    merged = {k.replace("weight_v", "weight"): v for k, v in plain(cell).items()}
    rest = {k: v for k, v in weights.items() if not k.startswith("fullstage.")}
    prefixes = {"fullstage.": cell, "fullstage_copy.": merged, "deq.func.": cell, "deq.func_copy.": merged}
    return {**{prefix + k: v.clone() for prefix, part in prefixes.items() for k, v in part.items()}, **rest}


def torchdeq_cifar(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return MDEQ-Vision weights as TorchDEQ's CIFAR code would save them: weight norm on fusion convolutions too."""
    result = {}
    for key, value in affine(weights).items():
        if ".fuse_layers." in key and key.endswith("conv.weight"):
            result[key + "_g"] = norm(value)
            result[key + "_v"] = value * (0.5 + torch.rand(len(value), 1, 1, 1).to(value))
        else:
            result[key] = value
    return {key.replace("fullstage.", "full_stage."): value for key, value in result.items()}


def torchdeq_imagenet(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return MDEQ-Vision weights as TorchDEQ's ImageNet code would save them: plain kernels after fusion."""
    post = {k: v for k, v in affine(weights).items() if ".post_fuse_layers." in k}
    rest = {k: v for k, v in weights.items() if ".post_fuse_layers." not in k}
    return {f"module.{k.replace('fullstage.', 'full_stage.')}": v for k, v in {**rest, **plain(post)}.items()}


def affine(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights with ones and zeros where they have no affine norm after fusion."""
    added = {}
    for key, value in weights.items():
        if "post_fuse_layers." in key and key.endswith("conv.weight_v"):
            norm_key = key.replace("conv.weight_v", "gnorm")
            added |= {f"{norm_key}.weight": torch.ones_like(value[:, 0, 0, 0])}
            added |= {f"{norm_key}.bias": torch.zeros_like(value[:, 0, 0, 0])}
    return {**added, **weights}


def plain(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights with weight norm folded."""
    folded = {k: v for k, v in weights.items() if not k.endswith(("weight_g", "weight_v"))}
    for key, value in weights.items():
        if key.endswith("weight_v"):
            folded[key.removesuffix("_v")] = value * weights[key.removesuffix("_v") + "_g"] / norm(value)
    return folded


def norm(kernel: Tensor) -> Tensor:
    return torch.linalg.vector_norm(kernel, dim=(1, 2, 3), keepdim=True)
