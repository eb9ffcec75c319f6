"""Model files; importing this package registers their entrypoints in timm."""

from . import volumes
from .backbone import Backbone
from .cell import MultiscaleCell
from .implicit import compile_cell
from .listing import list_models
from .mdeq import MDEQ
from .official import identify_checkpoint, translate_checkpoint
from .rescale import rescale
from .segmenter import MDEQSegmenter
from .transfer import Transfer, inflate, transfer
from .weights import HUB_ORG, RELEASES, Release, WeightsError, hub_config, hub_errors, local_file
from .windows import WarmStart

__all__ = [
    "HUB_ORG",
    "MDEQ",
    "RELEASES",
    "Backbone",
    "MDEQSegmenter",
    "MultiscaleCell",
    "Release",
    "Transfer",
    "WarmStart",
    "WeightsError",
    "compile_cell",
    "hub_config",
    "hub_errors",
    "identify_checkpoint",
    "inflate",
    "list_models",
    "local_file",
    "rescale",
    "transfer",
    "translate_checkpoint",
    "volumes",
]
