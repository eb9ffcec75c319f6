"""Checkpoints of the official code lines under this package's names, and the filter that timm loads weights through.

Three layouts exist, told apart by their keys alone: MDEQ-Vision (locuslab/deq), the older locuslab/mdeq, and TorchDEQ's
(locuslab/torchdeq). `docs/checkpoints.md` compares them.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any, cast

from torch import Tensor, nn

from .backbone import Backbone
from .fit import G, V, check_fit, identify, match_weight_norm
from .transfer import adapt_input

_WRAPPERS = (
    r"^(?:(?:module|model|_orig_mod)\.)+"  # of data parallelism, network with loss, features_only, torch.compile
)
_COPIES = ("fullstage_copy.", "deq.", "loss.")  # a second and third copy of f, and the class weights of the loss

_CELL = r"^full_?stage\."
_RENAMES = [
    (_CELL + r"branches\.(\d+)\.blocks\.0\.conv([12])\.", r"equilibrium.cell.blocks.\1.conv\2."),
    (_CELL + r"branches\.(\d+)\.blocks\.0\.gn([123])\.", r"equilibrium.cell.blocks.\1.norm\2."),
    (_CELL + r"fuse_layers\.(\d+)\.(\d+)\.net\.(\d+)\.conv\.", r"equilibrium.cell.fuse.\1.\2.convs.\3."),
    (_CELL + r"fuse_layers\.(\d+)\.(\d+)\.net\.(\d+)\.gnorm\.", r"equilibrium.cell.fuse.\1.\2.norms.\3."),
    (_CELL + r"fuse_layers\.(\d+)\.(\d+)\.net\.conv\.", r"equilibrium.cell.fuse.\1.\2.conv."),
    (_CELL + r"fuse_layers\.(\d+)\.(\d+)\.net\.gnorm\.", r"equilibrium.cell.fuse.\1.\2.norm."),
    (_CELL + r"post_fuse_layers\.(\d+)\.conv\.", r"equilibrium.cell.post_fuse.\1.conv."),
    (_CELL + r"post_fuse_layers\.(\d+)\.gnorm\.", r"equilibrium.cell.post_fuse.\1.norm."),
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
    (r"^last_layer\.0\.", "head.conv."),
    (r"^last_layer\.1\.", "head.norm."),
    (r"^last_layer\.3\.", "classifier."),
    (r"\.weight_g$", G),
    (r"\.weight_v$", V),
]


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of a checkpoint in any layout under the names of a model, checked to fit it.

    A native one is returned as it is; it may lack the head. The classifier, where timm is to drop it, and the channels
    of the input, which timm adapts, need not fit.

    Raises:
        ValueError: for weights that do not fit, naming them, and the argument or architecture that does fit if any.
    """
    weights, layout = _translated(state_dict, model)
    check_fit(weights, model, layout)
    return weights


def translate_checkpoint(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of a checkpoint in any layout under the names of a model, whether it fits it or not.

    Raises:
        ValueError: for what is no checkpoint of an MDEQ.
    """
    return _translated(state_dict, model)[0]


def _translated(state_dict: Mapping[str, Any], model: nn.Module) -> tuple[dict[str, Tensor], str]:
    weights = unwrapped(state_dict)
    layout = layout_of(weights)
    if layout != "native":
        weights = match_weight_norm(from_official(weights), model.state_dict().keys())
    if isinstance(model, Backbone) and model.spatial_dims == 3:  # timm adapts images' channels alone
        weights = adapt_input(weights, model)
    return weights, layout


def identify_checkpoint(state_dict: Mapping[str, Any], name: str | None = None) -> tuple[str, str, dict[str, Any]]:
    """Return the layout of a checkpoint, its model, and the arguments beside that model's defaults.

    Args:
        state_dict: the checkpoint, in any layout.
        name: the model to be preferred where several fit; see docs/checkpoints.md for what may differ.

    Raises:
        ValueError: if no model fits.
    """
    weights = unwrapped(state_dict)
    layout = layout_of(weights)
    return layout, *identify(weights if layout == "native" else from_official(weights), layout, name)


def unwrapped(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights in a checkpoint, without what a training program or a wrapping module put around them.

    Raises:
        ValueError: if there is something else among them.
    """
    if isinstance(state_dict.get("state_dict"), Mapping):
        state_dict = state_dict["state_dict"]
    for key, value in state_dict.items():
        if not isinstance(key, str):
            raise ValueError(f"the checkpoint's entry {key!r} has no name")
        if not isinstance(value, Tensor):
            raise ValueError(f"the checkpoint's entry {key!r} is of type {type(value).__name__}, not a tensor")
    if any(re.match(_WRAPPERS, key) for key in state_dict):
        bare = {re.sub(_WRAPPERS, "", key): value for key, value in state_dict.items()}
        if len(bare) < len(state_dict):
            counts = Counter(re.sub(_WRAPPERS, "", key) for key in state_dict)
            double = next(key for key in state_dict if counts[re.sub(_WRAPPERS, "", key)] > 1)
            raise ValueError(f"the checkpoint holds weights twice, under prefixes such as that of {double}")
        return bare
    return cast(dict[str, Tensor], state_dict)


def layout_of(keys: Collection[str]) -> str:
    """Return which layout the keys of unwrapped weights are of.

    Raises:
        ValueError: for keys of none.
    """
    if any(key.startswith(("stem.conv1.", "inject.", "equilibrium.")) for key in keys):
        return "native"
    if any(key.startswith("full_stage.") for key in keys):
        return "TorchDEQ"
    if any(key.startswith("fullstage.") for key in keys):
        return "older locuslab/mdeq" if any(key.startswith("fullstage_copy.") for key in keys) else "MDEQ-Vision"
    sample = ", ".join(list(keys)[:3]) or "none at all"
    raise ValueError(f"not an MDEQ checkpoint: it has no weights of an implicit layer; its keys are {sample}")


def from_official(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return unwrapped official weights of any layout under this package's names, without their copies of f."""
    renamed = {}
    for key, value in weights.items():
        if key.startswith(_COPIES):
            continue
        for pattern, replacement in _RENAMES:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed
