"""Model files; importing this package registers their entrypoints in timm."""

from .cell import MultiscaleCell
from .mdeq import MDEQ

__all__ = ["MDEQ", "MultiscaleCell"]
