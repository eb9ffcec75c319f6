"""Layers of f that were changed, or that others were put in the place of: pruning, adapters, wrappers, hooks."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, spectral_norm

import mdeq
from mdeq.models.cell import PostFuse

GRADIENTS = ("implicit", "phantom", "reversible")
SOLVER = {"name": "picard", "max_steps": 100, "tol": 1e-10}


def small(gradient: str = "implicit", **kwargs: Any) -> nn.Module:
    """A model in float64 whose f contracts."""
    torch.manual_seed(0)
    model = timm.create_model("test_mdeq", num_classes=3, solver=SOLVER, gradient={"name": gradient}, **kwargs).double()
    for module in model.equilibrium.cell.modules():
        if isinstance(module, nn.GroupNorm):
            module.eps = 4.0  # which keeps small what is small
    return model.eval()


def picture() -> Tensor:
    return torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def links(model: nn.Module) -> list[nn.Module]:
    """Convolutions of f without weight norm."""
    return [link.conv for links in model.equilibrium.cell.fuse for link in links if hasattr(link, "conv")]


class LowRank(nn.Module):
    """A convolution and a correction of rank one, as libraries of adapters wrap layers."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Conv2d(base.in_channels, 1, 1, bias=False)
        self.up = nn.Conv2d(1, base.out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.1 * self.up(self.down(x))


def wrapped(model: nn.Module) -> nn.Module:
    """A wrapper around a convolution with weight norm, which is then called and not folded."""
    post = model.equilibrium.cell.post_fuse[0]
    post.conv = LowRank(post.conv).double()
    return post.conv


def followed(model: nn.Module) -> nn.Module:
    """A layer of its own after a norm."""
    block = model.equilibrium.cell.blocks[0]
    adapter = nn.Conv2d(4, 4, 1).double()
    nn.init.normal_(adapter.weight, std=0.05)
    block.norm2 = nn.Sequential(block.norm2, adapter)
    return adapter


def biased(model: nn.Module) -> nn.Module:
    """A bias that a convolution did not have."""
    layer = links(model)[0]
    layer.bias = nn.Parameter(torch.zeros(layer.out_channels, dtype=torch.float64))
    return layer


@pytest.mark.parametrize("changed", [wrapped, followed, biased])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_what_is_added_to_f_is_trained(gradient: str, changed: Callable[[nn.Module], nn.Module]) -> None:
    """Also where all else is frozen; by every gradient, as by backpropagation through many applications of f."""
    model = small(gradient)
    model.requires_grad_(False)
    part = changed(model)
    part.requires_grad_()
    if gradient == "phantom":
        model.deq.gradient = mdeq.PhantomGradient(num_steps=20, damping=1.0)
    x, weights = picture(), torch.arange(6.0, dtype=torch.float64).view(2, 3)
    parameters = list(part.parameters())
    expected = torch.autograd.grad((weights * model(x, unroll=25)).sum(), parameters)
    found = torch.autograd.grad((weights * model(x)).sum(), parameters)
    for x, y in zip(found, expected):
        assert y.norm() > 0
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-10)


def test_hooks_of_pruning_run() -> None:
    """They make the weight anew before every call: a pruned model that is loaded is the one that was saved."""

    def pruned(model: nn.Module) -> nn.Module:
        for layer in links(model):
            prune.l1_unstructured(layer, "weight", 0.5)
        return model

    first, second = pruned(small()), pruned(small(drop_rate=0.5))
    with torch.no_grad():
        for p in first.parameters():
            p.add_(0.05 * torch.randn_like(p))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(picture()), second(picture()))
    optimizer = torch.optim.SGD(first.parameters(), 1e-3)
    for _ in range(2):  # the second would go through the graph of the first if the weight were not made anew
        first(picture()).square().sum().backward()
        optimizer.step()


def test_hooks_of_spectral_norm_run() -> None:
    model = small()
    layer = spectral_norm(links(model)[0], n_power_iterations=20)
    model.train()(picture()).square().sum().backward()
    assert layer.weight_orig.grad.norm() > 0
    assert torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2) == pytest.approx(1, rel=1e-3)


class Scaled(nn.Module):
    """A parametrization with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, weight: Tensor) -> Tensor:
        return self.factor * weight


@pytest.mark.parametrize("gradient", ["implicit", "phantom"])
def test_cached_parametrizations_are_trained(gradient: str) -> None:
    """f is first evaluated without gradients, and PyTorch's cache would keep what that computed."""
    model = small(gradient)
    block = model.equilibrium.cell.blocks[0]
    for norm in (block.norm1, block.norm2):
        parametrize.register_parametrization(norm, "weight", Scaled())
    block.conv1.register_forward_hook(lambda *_: None)  # so that its weight norm is not folded
    parameters = dict(model.equilibrium.cell.named_parameters())
    plain = torch.autograd.grad(model(picture()).square().sum(), list(parameters.values()))
    with parametrize.cached():
        cached = torch.autograd.grad(model(picture()).square().sum(), list(parameters.values()))
    for name, x, y in zip(parameters, cached, plain, strict=True):
        torch.testing.assert_close(x, y, msg=name)
    assert float(dict(zip(parameters, cached))["blocks.0.norm1.parametrizations.weight.0.factor"].abs()) > 0


@pytest.mark.parametrize("kind", [nn.GroupNorm, PostFuse])
def test_hooks_see_what_norms_and_fusion_were_given_and_gave(kind: type) -> None:
    """f writes to tensors of its own: what hooks were shown stays as it was, and backward hooks may wrap it."""
    torch.manual_seed(0)
    model = timm.create_model("test_mdeq", solver={"name": "picard", "max_steps": 2}).eval()
    x = torch.randn(2, 3, 32, 32)
    plain = model(x).detach()
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor | None = None) -> None:
        seen.extend((y, y.clone()) for y in (args[0], output) if y is not None)

    watched = [module for module in model.equilibrium.cell.modules() if isinstance(module, kind)]
    hooks = [h for m in watched for h in (m.register_forward_pre_hook(keep), m.register_forward_hook(keep))]
    assert torch.equal(model(x), plain)
    assert len(seen) > len(watched)
    assert all(torch.equal(y, before) for y, before in seen)
    for hook in hooks:
        hook.remove()
    calls: list[nn.Module] = []
    for module in watched:
        module.register_full_backward_hook(lambda module, *_: calls.append(module))
    model(x).square().mean().backward()
    assert set(calls) == set(watched)


def test_hooks_see_what_a_convolution_gave() -> None:
    """f goes on in place, on a copy."""
    model, seen = small(), []
    layer = model.equilibrium.cell.blocks[0].conv2
    plain = model(picture())
    hook = layer.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].clone(), output)))
    with torch.no_grad():  # or there is one evaluation more, which carries the gradient
        hooked, eq = model(picture(), return_equilibrium=True)
    torch.testing.assert_close(hooked, plain, rtol=1e-9, atol=1e-12)
    assert len(seen) == eq.stats.nfe
    for given, output in seen:
        assert torch.equal(output, layer._conv_forward(given, layer.weight, None))
    hook.remove()
    assert layer in model.equilibrium.cell.kernels()


def test_settings_of_a_convolution_count() -> None:
    """With circular padding everywhere an image that is shifted gives maps that are."""
    model = small()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"
    x = picture()
    maps, shifted = (model.forward_intermediates(v)[1][1] for v in (x, x.roll(8, dims=3)))
    torch.testing.assert_close(shifted, maps.roll(maps.shape[3] // 2, dims=3), rtol=1e-6, atol=1e-8)
    layer = model.equilibrium.cell.blocks[0].conv1
    layer.dilation = layer.padding = (2, 2)
    layer._reversed_padding_repeated_twice = [2] * 4
    assert not torch.allclose(model(x), small()(x))
    given = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    padded = F.pad(given, [2] * 4, mode="circular")
    assert torch.equal(
        mdeq.layers.convolve(layer, given, layer.weight), F.conv2d(padded, layer.weight, None, dilation=2)
    )


def test_a_weight_that_two_layers_share_is_counted_once() -> None:
    grads = []
    for gradient in ("implicit", "reversible"):
        model = small(gradient, weight_norm=False)
        first, second = model.equilibrium.cell.post_fuse[:2]
        second.conv.weight, second.norm.weight = first.conv.weight, first.norm.weight
        model(picture()).square().sum().backward()
        grads.append([first.conv.weight.grad, first.norm.weight.grad])
    for implicit, reversible in zip(*grads):
        torch.testing.assert_close(reversible, implicit, rtol=1e-5, atol=1e-10)
