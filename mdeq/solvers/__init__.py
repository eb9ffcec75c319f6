"""Fixed-point solvers over flat batched states `(B, D)`."""

from collections.abc import Mapping
from typing import Any

from .anderson import Anderson
from .base import (
    FixedPointSolver,
    FlatFn,
    SolveStats,
    SolveStatus,
    full_precision,
    is_static,
    small_dtype,
    static_solves,
)
from .broyden import Broyden
from .picard import Picard

SOLVERS: dict[str, type[FixedPointSolver]] = {"anderson": Anderson, "broyden": Broyden, "picard": Picard}

SolverSpec = FixedPointSolver | Mapping[str, Any]
"""A solver, or what JSON and YAML can say of one: `{"name": "broyden", "max_steps": 18}`."""


def build_solver(spec: SolverSpec) -> FixedPointSolver:
    """Return the solver that a spec describes.

    Raises:
        ValueError: for what describes no solver, an unknown name or a setting out of range.
        TypeError: for a setting that the solver does not have.
    """
    if isinstance(spec, FixedPointSolver):
        return spec
    if not isinstance(spec, Mapping):
        raise ValueError(f"expected a solver or a mapping such as {{'name': 'broyden'}}, got {spec!r}")
    settings = dict(spec)
    name = settings.pop("name", None)
    if name not in SOLVERS:
        raise ValueError(f"unknown solver {name!r}; valid names: {', '.join(sorted(SOLVERS))}")
    return SOLVERS[name](**settings)


__all__ = [
    "SOLVERS",
    "Anderson",
    "Broyden",
    "FixedPointSolver",
    "FlatFn",
    "Picard",
    "SolveStats",
    "SolveStatus",
    "SolverSpec",
    "build_solver",
    "full_precision",
    "is_static",
    "small_dtype",
    "static_solves",
]
