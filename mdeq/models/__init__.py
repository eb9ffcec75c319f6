"""Model files; importing this package registers their entrypoints in timm."""

from .cell import MultiscaleCell
from .factory import list_models
from .mdeq import MDEQ

__all__ = ["MDEQ", "MultiscaleCell", "list_models"]
