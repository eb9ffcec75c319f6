"""Kernels as long as PyTorch draws them: the same function, ready for training at ordinary rates."""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..layers import CONV, BatchNorm, Conv
from .cell import ResidualBlock

_CONVS = tuple(CONV.values())
_LENGTH = math.sqrt(1 / 3)  # of a row by PyTorch's default, which is uniform with variance 1 / (3 fan_in)


@torch.no_grad()
def rescale(model: nn.Module) -> None:
    """Scale every kernel whose length a norm cancels to the length of PyTorch's default initialisation, in place.

    Kernels before a norm, and the directions of weight-normed ones, grow while they are trained, under Muon some
    tenfold. What the model computes does not depend on their length, but what training does: a step of the same
    length turns a kernel the less, the longer it is (van Laarhoven 2017, L2 Regularization versus Batch and Weight
    Normalization). Fine-tuning then needs rates of its own, and the ordinary ones learn slowly.

    Logits stay as they are but for rounding, and for the epsilon of group norms, which counts for more before shorter
    kernels; that of batch norms in eval mode is made up for in their statistics. Rows of a kernel whose output hardly
    varies, so that its epsilon is what such a norm divides by, stay longer than the others for that; a second
    call would take them for the kernel's length and shorten the others further.

    Args:
        model: an `MDEQ` or `MDEQSegmenter`; layers that no norm follows, such as classifiers, are left alone.
    """
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            direction = module.get_parameter("parametrizations.weight.original1")  # (out, in, *kernel)
            direction.mul_(_LENGTH / _row_lengths(direction))
    for layer, norm in _pairs(model):
        length = layer.weight.norm()
        if length == 0:
            continue
        scale = (_LENGTH * math.sqrt(len(layer.weight)) / length).expand(len(layer.weight))  # (out,)
        if isinstance(norm, BatchNorm) and norm.running_mean is not None and norm.running_var is not None:
            # scale^2 (variance + eps) is to be what it divides by, and no variance is below zero.
            scale = scale.maximum((norm.eps / (norm.running_var + norm.eps)).sqrt())
            norm.running_mean.mul_(scale)
            norm.running_var.add_(norm.eps).mul_(scale**2).sub_(norm.eps).clamp_(min=0)
        layer.weight.mul_(scale.view(-1, *(1 for _ in layer.weight.shape[1:])))
        if layer.bias is not None:
            layer.bias.mul_(scale)


def _row_lengths(x: Tensor) -> Tensor:
    """Return the length of each x[i], to be broadcast with x; 1 for rows of zeros."""
    lengths = x.flatten(1).norm(dim=1).view(-1, *(1 for _ in x.shape[1:]))
    return torch.where(lengths == 0, 1, lengths)


def _pairs(model: nn.Module) -> list[tuple[Conv, BatchNorm | nn.GroupNorm]]:
    """Return the convolutions without weight norm that a norm follows, each with it."""
    pairs = []
    for parent in model.modules():
        children = list(parent.children())
        if isinstance(parent, ResidualBlock):
            children = children[:2]  # what follows conv2 has the injection added
        if len(children) == 2 and all(isinstance(child, nn.ModuleList) for child in children):  # `Downsample`
            children = [child for pair in zip(*children) for child in pair]
        for layer, norm in pairwise(children):
            plain = isinstance(layer, Conv) and not parametrize.is_parametrized(layer)
            if plain and isinstance(norm, BatchNorm | nn.GroupNorm):
                pairs.append((layer, norm))
    return pairs
