"""Whether weights fit a model, which architecture they do fit, and what to tell people when they do not."""

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import cache
from itertools import count, takewhile
from typing import Any

import timm
import torch
from torch import Tensor, nn

from .listing import list_models

G, V = ".parametrizations.weight.original0", ".parametrizations.weight.original1"
"""What the names of a weight-normed kernel end in: its length and its direction."""

Shapes = dict[str, tuple[int, ...]]

_ADAPTED = ("num_classes", "in_chans")
"""Arguments that timm adapts weights to."""
_VARIABLE = ("post_norm_affine", "head_channels", "weight_norm")
"""Arguments in which released files of one architecture differ."""


def match_weight_norm(weights: Mapping[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    """Return weights whose kernels are in the form that a model has them in: plain, or length g and direction v.

    Both directions leave the kernel as it is, up to rounding; they are computed in float64, and what comes out is
    float32 at least, whatever the precision of the file.

    Args:
        weights: under this package's names.
        own: the names in the model's state dict.

    Raises:
        ValueError: for a kernel that is there in both forms.
    """
    matched = {}
    for key, value in weights.items():
        stem, kind = next(((key.removesuffix(end), end) for end in (G, V, ".weight") if key.endswith(end)), (key, ""))
        wide = torch.promote_types(value.dtype, torch.float32)
        if kind == ".weight" and stem + V in weights:
            raise ValueError(f"the checkpoint has the kernel {key} twice, plain and with weight norm")
        if kind in (G, V) and stem + ".weight" in own and {stem + G, stem + V} <= weights.keys():
            g, v = weights[stem + G].double(), weights[stem + V].double()
            matched[stem + ".weight"] = (v * (g / _length(v))).to(wide)
        elif kind == ".weight" and stem + V in own:
            length = _length(value.double())
            matched[stem + G] = length.to(wide)
            # A kernel of zeros has no direction; any will do, as its length is zero.
            matched[stem + V] = torch.where(length == 0, torch.ones_like(value), value).to(wide)
        else:
            matched[key] = value
    return matched


def _length(kernel: Tensor) -> Tensor:
    """Return the norm of every output channel's kernel, `(out, 1, ...)`."""
    return kernel.flatten(1).norm(dim=1).view(-1, *(1 for _ in kernel.shape[1:]))


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    """Return the names and shapes of tensors; without batch norms' counters, which old files lack."""
    return {k: tuple(v.shape) for k, v in tensors.items() if not k.endswith(".num_batches_tracked")}


def describe(shapes: Shapes) -> dict[str, Any]:
    """Return the constructor arguments that tensors of these names and shapes tell of.

    The task, classification or segmentation, comes with them under `"task"`.
    """
    cell = "equilibrium.cell"

    def numbered(pattern: str) -> tuple[int, ...]:
        names = takewhile(shapes.__contains__, (pattern.format(i) for i in count()))
        return tuple(width(name) for name in names)

    def width(name: str) -> int:
        return (*shapes.get(name, ()), 0)[0]

    facts: dict[str, Any] = dict(channels=numbered(cell + ".blocks.{}.norm3.weight"))
    if any(facts["channels"][:1]):
        ratio = width(f"{cell}.blocks.0.norm1.weight") / facts["channels"][0]
        facts["expansion"] = int(ratio) if ratio == int(ratio) else ratio
    if len(facts["channels"]) > 1:
        facts["post_norm_affine"] = f"{cell}.post_fuse.0.norm.weight" in shapes
    facts["weight_norm"] = f"{cell}.blocks.0.conv1.parametrizations.weight.original1" in shapes
    if len(kernel := shapes.get("stem.conv1.weight", ())) in (4, 5):
        facts.update(spatial_dims=len(kernel) - 2, in_chans=kernel[1])
    facts["task"] = "segmentation" if "head.conv.weight" in shapes else "classification"
    if facts["task"] == "classification":
        facts["head_channels"] = numbered("head.bottlenecks.{}.conv1.weight")
        facts["num_features"] = width("head.final.0.weight")
    facts["num_classes"] = width("classifier.weight")
    return facts


@cache
def _default(name: str) -> Shapes:
    return shapes_of(timm.create_model(name, device="meta").state_dict())


def differences(facts: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Return those facts that others differ in."""
    return {name: value for name, value in facts.items() if others.get(name) != value}


def identify(weights: Mapping[str, Tensor], layout: str, name: str | None = None) -> tuple[str, dict[str, Any]]:
    """Return the model, and the arguments beside its defaults, that weights under this package's names are of.

    Args:
        weights: the weights.
        layout: the layout they were in; in all but the native one either form of weight norm will do.
        name: the model to be preferred. If no model fits but for arguments in which released files differ, it may
            differ in all but its channels.

    Raises:
        ValueError: if no model fits.
    """
    meta = {key: value.to("meta") for key, value in weights.items()}

    def matched_to(candidate: str) -> Shapes:
        return shapes_of(meta if layout == "native" else match_weight_norm(meta, _default(candidate)))

    found = []
    for candidate in list_models():
        matched = matched_to(candidate)
        args = differences(describe(matched), describe(_default(candidate)))
        variant = set(args) <= {*_ADAPTED, *_VARIABLE}
        if variant or (candidate == name and not {"task", "spatial_dims", "channels"} & set(args)):
            found.append(((not variant, candidate != name, len(args)), candidate, args, matched))
    for _, candidate, args, matched in sorted(found, key=lambda entry: entry[:2]):
        with suppress(ValueError):
            built = timm.create_model(candidate, device="meta", **args)
            if not _problems(matched, shapes_of(built.state_dict())):
                return candidate, args
    if name in list_models():
        problems = _problems(matched_to(name), _default(name), limit=8) or "its arguments contradict each other"
        raise ValueError(f"the checkpoint ({layout} layout) does not fit {name}; {problems}")
    # No name was given, or it is that of a class.
    nearest = min(list_models(), key=lambda candidate: _distance(matched_to(candidate), _default(candidate)))
    try:
        _, args = identify(weights, layout, nearest)
    except ValueError:
        problems = _problems(matched_to(nearest), _default(nearest), limit=1)
        raise ValueError(f"the checkpoint fits none of the models, {nearest} is nearest; {problems}") from None
    text = ", ".join(f"{key}={value}" for key, value in args.items())
    raise ValueError(f"the checkpoint fits {nearest} with {text}; name that model, since others may fit too")


def check_fit(weights: Mapping[str, Tensor], model: nn.Module, layout: str) -> None:
    """Check that weights under this package's names fit a model; see `checkpoint_filter_fn`.

    Raises:
        ValueError: if they do not.
    """
    found, own = shapes_of(weights), shapes_of(model.state_dict())
    cfg = getattr(model, "pretrained_cfg", {})
    replaced = cfg.get("num_classes", model.num_classes) != model.num_classes  # timm then drops the classifier
    headless = layout == "native" and not any(key.startswith("head.") for key in found)
    classes = (found.get("classifier.weight", (model.num_classes,)) or (0,))[:1]
    others = classes != (model.num_classes,)

    def optional(key: str) -> bool:
        if key.startswith("classifier."):
            return replaced or others or layout == "native"
        return headless and key.startswith("head.")

    if not _problems(found, own, optional):
        if others and not replaced:
            raise ValueError(
                f"the checkpoint has {classes[0]} classes, the model {model.num_classes}; pass pretrained_cfg_overlay="
                f"dict(num_classes={classes[0]}) to load it with a new classifier"
            )
        return
    name = cfg.get("architecture", type(model).__name__)
    advice = _advice(weights, layout, describe(own), name)
    problems = _problems(found, own, optional, limit=8 if advice else None)
    raise ValueError(f"the checkpoint ({layout} layout) does not fit {name}{advice}; {problems}")


def _problems(
    found: Shapes, own: Shapes, optional: Callable[[str], bool] = lambda key: False, limit: int | None = None
) -> str:
    """Return what is missing, left over, or of another shape, up to `limit` names of each; nothing if all fits."""
    missing = [key for key in own if key not in found and not optional(key)]
    left = [key for key in found if key not in own and not optional(key)]
    changed = [
        f"{key} {found[key]} instead of {own[key]}"
        for key in own
        if key in found and found[key] != own[key] and not optional(key) and not _other_channels(key, found, own)
    ]
    kinds = (("missing tensors", missing), ("unexpected tensors", left), ("tensors of another shape", changed))
    return "; ".join(f"{kind} ({len(keys)}): {_listed(keys, limit)}" for kind, keys in kinds if keys)


def _distance(found: Shapes, own: Shapes) -> int:
    """Return how many tensors are in one of two models only, or of another shape."""
    return len(set(found.items()) ^ set(own.items()))


def _other_channels(key: str, found: Shapes, own: Shapes) -> bool:
    """Whether this is the stem's kernel for another number of input channels, which timm adapts."""
    a, b = found[key], own[key]
    return key == "stem.conv1.weight" and (*a[:1], *a[2:]) == (*b[:1], *b[2:])


def _advice(weights: Mapping[str, Tensor], layout: str, own: Mapping[str, Any], name: str) -> str:
    """Return the model and arguments that do fit, to go on a sentence; nothing if there are none."""
    try:
        fitting, args = identify(weights, layout, name)
    except ValueError:
        if not _fits_as_described(weights, name):
            return ""
        fitting, args = name, {}
    if fitting == name:
        args = differences(describe(shapes_of(weights)), own)
    text = ", ".join(f"{key}={value}" for key, value in args.items() if key not in _ADAPTED)
    if fitting == name:
        return f" as it is built: pass {text}" if text else ""
    return f": it fits {fitting}" + (f" with {text}" if text else "")


def _fits_as_described(weights: Mapping[str, Tensor], name: str) -> bool:
    """Whether weights fit a model built with all the arguments that they tell of, whatever its size."""
    found = shapes_of(weights)
    args = {key: value for key, value in describe(found).items() if key != "task"}
    with suppress(ValueError, TypeError, RuntimeError, ArithmeticError):  # of a class, or of shapes that no model has
        return not _problems(found, shapes_of(timm.create_model(name, device="meta", **args).state_dict()))
    return False


def _listed(keys: list[str], limit: int | None) -> str:
    more = f" and {len(keys) - limit} more" if limit and len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more
