"""Multiscale deep equilibrium models. Importing this package registers its models in timm.

Shapes in docstrings: `B` batch, `C` channels, `S` spatial axes (`*S` is `H, W` or `D, H, W`), `D` elements of one
sample's flat state, `M` history of a solver. Branch 0 has the highest resolution.
"""

from ._version import __version__
from .capture import CapturedModel
from .deq import DEQ, Equilibrium
from .gradients import GradientEstimator, ImplicitGradient, PhantomGradient, build_gradient, spec_of
from .jacobian import jacobian_frobenius, spectral_radius
from .models import (
    HUB_ORG,
    MDEQ,
    RELEASES,
    Backbone,
    MDEQSegmenter,
    MultiscaleCell,
    Release,
    Transfer,
    WarmStart,
    WeightsError,
    compile_cell,
    hub_config,
    hub_errors,
    identify_checkpoint,
    inflate,
    list_models,
    local_file,
    rescale,
    transfer,
    translate_checkpoint,
)
from .reversible import ReversibleGradient
from .solvers import Anderson, Broyden, FixedPointSolver, Picard, SolveStats, SolveStatus, build_solver
from .state import State, StateLayout

__all__ = [
    "DEQ",
    "HUB_ORG",
    "MDEQ",
    "RELEASES",
    "Anderson",
    "Backbone",
    "Broyden",
    "CapturedModel",
    "Equilibrium",
    "FixedPointSolver",
    "GradientEstimator",
    "ImplicitGradient",
    "MDEQSegmenter",
    "MultiscaleCell",
    "PhantomGradient",
    "Picard",
    "Release",
    "ReversibleGradient",
    "SolveStats",
    "SolveStatus",
    "State",
    "StateLayout",
    "Transfer",
    "WarmStart",
    "WeightsError",
    "__version__",
    "build_gradient",
    "build_solver",
    "compile_cell",
    "hub_config",
    "hub_errors",
    "identify_checkpoint",
    "inflate",
    "jacobian_frobenius",
    "list_models",
    "local_file",
    "rescale",
    "spec_of",
    "spectral_radius",
    "transfer",
    "translate_checkpoint",
]
