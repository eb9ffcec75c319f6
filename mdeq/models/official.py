"""Names of the official checkpoints, translated to the names of this package."""

import re

from torch import Tensor, nn

_RENAMES = [
    (
        r"^full_?stage\.branches\.(\d+)\.blocks\.0\.conv([12])\.weight_([gv])$",
        r"equilibrium.cell.blocks.\1.conv\2.weight_\3",
    ),
    (r"^full_?stage\.branches\.(\d+)\.blocks\.0\.gn([123])\.", r"equilibrium.cell.blocks.\1.norm\2."),
    (r"^full_?stage\.fuse_layers\.(\d+)\.(\d+)\.net\.(\d+)\.conv\.", r"equilibrium.cell.fuse.\1.\2.convs.\3."),
    (r"^full_?stage\.fuse_layers\.(\d+)\.(\d+)\.net\.(\d+)\.gnorm\.", r"equilibrium.cell.fuse.\1.\2.norms.\3."),
    (r"^full_?stage\.fuse_layers\.(\d+)\.(\d+)\.net\.conv\.", r"equilibrium.cell.fuse.\1.\2.conv."),
    (r"^full_?stage\.fuse_layers\.(\d+)\.(\d+)\.net\.gnorm\.", r"equilibrium.cell.fuse.\1.\2.norm."),
    (r"^full_?stage\.post_fuse_layers\.(\d+)\.conv\.", r"equilibrium.cell.post_fuse.\1.conv."),
    (r"^full_?stage\.post_fuse_layers\.(\d+)\.gnorm\.", r"equilibrium.cell.post_fuse.\1.norm."),
    (r"^downsample\.0\.", "stem.conv1."),
    (r"^downsample\.1\.", "stem.norm1."),
    (r"^downsample\.3\.", "stem.conv2."),
    (r"^downsample\.4\.", "stem.norm2."),
    (r"^stage0\.0\.", "inject.conv."),
    (r"^stage0\.1\.", "inject.norm."),
    (r"^incre_modules\.(\d+)\.0\.downsample\.", r"head.bottlenecks.\1.shortcut."),
    (r"^incre_modules\.(\d+)\.0\.conv(\d)\.", r"head.bottlenecks.\1.conv\2."),
    (r"^incre_modules\.(\d+)\.0\.bn(\d)\.", r"head.bottlenecks.\1.norm\2."),
    (r"^downsamp_modules\.(\d+)\.", r"head.downsamples.\1."),
    (r"^final_layer\.", "head.final."),
    (r"\.weight_g$", ".parametrizations.weight.original0"),
    (r"\.weight_v$", ".parametrizations.weight.original1"),
]


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return a state dict under this package's names; a native one passes through."""
    return from_official(state_dict) if any(key.startswith("fullstage.") for key in state_dict) else state_dict


def from_official(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return an official state dict (MDEQ-Vision layout) under this package's names."""
    renamed = {}
    for key, value in state_dict.items():
        for pattern, replacement in _RENAMES:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed
