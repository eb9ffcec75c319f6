"""Model files; importing this package registers their entrypoints in timm."""

from . import volumes
from .cell import MultiscaleCell
from .factory import list_models
from .mdeq import MDEQ
from .segmenter import MDEQSegmenter

__all__ = ["MDEQ", "MDEQSegmenter", "MultiscaleCell", "list_models", "volumes"]
