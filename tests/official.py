"""The network whose numbers the official code computed; it has an equilibrium, which an untrained one may not."""

from pathlib import Path

import timm
import torch
from safetensors.torch import load_file

import mdeq
from mdeq.models.official import from_official

DATA = Path(__file__).parent / "data"
EXACT = dict(tol=1e-13, max_steps=200)


def official_model(dtype: torch.dtype = torch.float64) -> mdeq.MDEQ:
    model = timm.create_model("mdeq_tiny_cifar", dropout=0.0)
    model.load_state_dict(from_official(load_file(DATA / "official_cifar_tiny.safetensors")), strict=True)
    model.deq.solver = mdeq.Broyden(**EXACT)
    model.deq.gradient = mdeq.ImplicitGradient(mdeq.Broyden(**EXACT))
    return model.to(dtype).eval()
