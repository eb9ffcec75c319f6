"""The names under which this package's models are registered with timm."""

import timm
from timm.models import model_entrypoint


def list_models(filter: str = "", pretrained: bool = False) -> list[str]:
    """Return the names of this package's models; arguments and order as in `timm.list_models`.

    Args:
        filter: a pattern with wildcards that the names must match.
        pretrained: list the names with tag that have weights.
    """
    names = timm.list_models(filter, pretrained=pretrained)
    return [name for name in names if model_entrypoint(name).__module__.startswith(f"{__package__}.")]
