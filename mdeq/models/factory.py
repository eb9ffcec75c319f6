"""How every model of this package comes to timm: its configuration and its construction."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import DefaultCfg, build_model_with_cfg, generate_default_cfgs
from torch import nn

from .backbone import Backbone, Features, feature_table
from .official import checkpoint_filter_fn
from .weights import hub_errors, with_releases, with_weights

MAX_BRANCHES, MAX_PARAMETERS = 16, 2**31
"""What a config.json may ask for: its author may be anybody, and memory is short."""

CODE_LICENCE = "apache-2.0"


def cfg(**kwargs: Any) -> dict[str, Any]:
    """Return a pretrained configuration of timm: that of an ImageNet classifier, but for what is given."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1",
        "classifier": "classifier",
        "license": CODE_LICENCE,
        "paper_ids": ("arXiv:2006.08656", "arXiv:2106.14342"),
        **kwargs,
    }


def default_cfgs_of(untrained: Mapping[str, dict[str, Any]]) -> dict[str, DefaultCfg]:
    """Return a module's `default_cfgs`: tags of released weights where there are any, else what is given."""
    cfgs: dict[str, Any] = with_releases(untrained)
    return generate_default_cfgs(cfgs)


def create(
    model_cls: type[Backbone], variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]
) -> nn.Module:
    """Return a model as `timm.create_model` wants it: with its configuration, weights, features and head.

    Args:
        model_cls: the class.
        variant: name of the architecture.
        pretrained: whether to load weights.
        defaults: the architecture's arguments.
        kwargs: those of the caller, which win. Some callers of timm name an `output_stride`; it can only be that of
            the coarsest branch.

    Raises:
        ValueError: for another output stride, a `feature_cls`, or a config.json that describes no plausible model.
        WeightsError: if there are no weights, or they cannot be loaded.
    """
    brought: dict[str, Any] = {}
    source = kwargs.get("pretrained_cfg")
    repo = None  # on the Hub, where the weights come from one that the caller names
    if pretrained and isinstance(source, Mapping) and source.get("source") == "hf-hub":
        repo = source["hf_hub_id"]
    if pretrained:
        kwargs, brought = with_weights(variant, kwargs)
    args = {**defaults, **brought, **kwargs}
    taps = feature_table(args.get("spatial_dims", 2), args["channels"], args["stem_stride"])
    coarsest = taps[-1]["reduction"]
    if args.pop("output_stride", coarsest) != coarsest:
        raise ValueError(
            f"output_stride of {variant} must be {coarsest}, got {kwargs['output_stride']}: all branches share one "
            "equilibrium, so none can be dilated"
        )
    if args.get("feature_cls") in ("dict", "fx", "hook", "list"):  # timm's, which look for a module of every map
        raise ValueError(f"{variant} does not support feature_cls, leave it out: one solve gives all feature maps")
    if args.get("pretrained_model_args"):  # those of a config.json
        _require_plausible(model_cls, variant, args)
    with nullcontext() if repo is None else hub_errors(repo):
        model: Any = build_model_with_cfg(
            model_cls,
            variant,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg=dict(out_indices=tuple(range(len(taps))), feature_cls=Features),
            **args,
        )
    # None for volumes while timm loads, see `Backbone`; from here on what it saves in a config.json.
    model._traits["first_conv"] = model.pretrained_cfg.get("first_conv")
    names = model.pretrained_cfg.get("label_names")
    if names and not (pretrained and len(names) == getattr(model, "num_classes", 0)):
        del model.pretrained_cfg["label_names"]  # they are those of weights that are not there
        if not (isinstance(source, Mapping) and source.get("source")):  # nor is this said of them, see `Release.cfg`
            model.pretrained_cfg["description"] = None
            if not pretrained:
                model.pretrained_cfg["license"] = CODE_LICENCE
    model._model_args = brought  # timm adds the caller's arguments, and saves all of them in a config.json
    return model


def _require_plausible(model_cls: type[Backbone], variant: str, args: dict[str, Any]) -> None:
    """Raise ValueError before memory is taken for a model of absurd size."""
    if len(args["channels"]) > MAX_BRANCHES:
        raise ValueError(f"channels must have at most {MAX_BRANCHES} entries, got {len(args['channels'])}")
    args = {key: value for key, value in args.items() if key not in ("features_only", "out_indices", "feature_cls")}
    outline = build_model_with_cfg(model_cls, variant, False, **{**args, "device": "meta"})
    count = sum(p.numel() for p in outline.parameters())
    if count > MAX_PARAMETERS:
        raise ValueError(f"config.json describes a model of {count:,} parameters, the limit is {MAX_PARAMETERS:,}")
