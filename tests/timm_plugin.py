"""A pytest plugin for timm's own tests: their lists of models become ours, named in the environment variable MODELS."""

import fnmatch
import os
from collections.abc import Sequence
from typing import Any

import pytest
import timm

import mdeq

MODELS = os.environ.get("MODELS", "test_mdeq").split()
assert set(MODELS) <= set(mdeq.list_models())
RELEASED = [name for name in mdeq.list_models(pretrained=True) if name.partition(".")[0] in MODELS]


def list_models(filter: str | Sequence[str] = "", *args: Any, pretrained: bool = False, **kwargs: Any) -> list[str]:
    """Stand in for timm.list_models: exclusions and modules are about timm's models."""
    patterns = [filter] if isinstance(filter, str) else filter
    names = RELEASED if pretrained else MODELS
    return [n for n in names if not filter or any(fnmatch.fnmatch(n, p) for p in patterns)]


timm.list_models = list_models
timm.list_pretrained = lambda *args, **kwargs: []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep what is about our models, TorchScript excepted."""
    items[:] = [i for i in items if any(name in i.name for name in MODELS) and "torchscript" not in i.name]
