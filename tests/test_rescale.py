"""mdeq.rescale: kernels as long as PyTorch draws them, and the same function."""

import math
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import mdeq

NEW = math.sqrt(1 / 3)


def grown(name: str, **kwargs: Any) -> nn.Module:
    """A model in float64 whose kernels are of odd lengths and whose batch norms have seen data."""
    model = timm.create_model(name, solver={"name": "broyden", "tol": 1e-9, "max_steps": 60}, **kwargs).double()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 2 and parameter[0].numel() > 1:
                parameter.mul_(30 * (1 + torch.rand(())))
    return model.eval()


def length(kernel: Tensor) -> float:
    """Of a row, the root of the mean of squares."""
    return kernel.detach().flatten(1).norm(dim=1).square().mean().sqrt().item()


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("test_mdeq", {}),
        ("test_mdeq", {"weight_norm": False}),
        ("test_mdeq", {"channels": (8, 16, 16), "head_channels": (4, 4, 4)}),
        ("test_mdeq3d", {}),
        ("mdeq_tiny_seg", {"channels": (8, 8, 8, 8), "num_classes": 3}),
        ("deq_tiny_cifar", {}),
    ],
)
def test_the_function_stays(name: str, kwargs: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = grown(name, **kwargs)
    x = torch.randn(2, model.in_chans, *[32] * model.spatial_dims).double()
    injection = model.injection(x)
    z = tuple(torch.randn_like(zero) for zero in model.equilibrium.cell.zero_state(injection))
    f = model.equilibrium.cell(z, (injection, *[None] * (len(z) - 1)))
    head = model.forward_head(model.head(z))
    mdeq.rescale(model)
    torch.testing.assert_close(model.injection(x), injection, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(model.forward_head(model.head(z)), head, rtol=1e-8, atol=1e-8)
    # Group norms have no statistics to make up for their epsilon.
    for now, before in zip(model.equilibrium.cell(z, (injection, *[None] * (len(z) - 1))), f):
        torch.testing.assert_close(now, before, rtol=1e-3, atol=1e-3)


def test_lengths_are_the_default_ones() -> None:
    """Every kernel but the classifier's, and a block's second without weight norm: the injection is added to it."""
    model = grown("test_mdeq")
    classifier = model.classifier.weight.clone()
    lengths = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("original0")}
    mdeq.rescale(model)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 2 and not name.endswith("original0"):
            assert length(parameter) == pytest.approx(NEW), name
        if name in lengths:
            assert torch.equal(parameter, lengths[name])
    assert torch.equal(model.classifier.weight, classifier)
    plain = grown("test_mdeq", weight_norm=False)
    second = plain.equilibrium.cell.blocks[0].conv2.weight.clone()
    mdeq.rescale(plain)
    assert torch.equal(plain.equilibrium.cell.blocks[0].conv2.weight, second)
    assert length(plain.equilibrium.cell.blocks[0].conv1.weight) == pytest.approx(NEW)


def test_zeros_stay_zeros() -> None:
    model = timm.create_model("test_mdeq")
    with torch.no_grad():
        model.stem.conv1.weight.zero_()
        model.equilibrium.cell.blocks[0].conv1.parametrizations.weight.original1[0].zero_()
    mdeq.rescale(model)
    assert not model.stem.conv1.weight.any()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_outputs_that_hardly_vary_stay() -> None:
    """Their batch norm divides by the root of its epsilon, which no variance can make up for in shorter kernels."""
    torch.manual_seed(0)
    model = grown("deq_tiny_cifar")
    norm = model.stem.norm1
    norm.running_var[0], norm.running_var[1] = 1e-9, 0
    x = torch.randn(2, 3, 32, 32).double()
    before, kernel = model.injection(x), model.stem.conv1.weight.detach().clone()
    mdeq.rescale(model)
    torch.testing.assert_close(model.injection(x), before, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(model.stem.conv1.weight[:2], kernel[:2], rtol=1e-3, atol=0)
    rows = model.stem.conv1.weight.detach().flatten(1).norm(dim=1)
    assert rows[2:].square().mean().sqrt() < 2 * NEW < rows[:2].min()
