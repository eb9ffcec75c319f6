"""Settings of the solvers, and the surroundings that they run in: autocast, meta tensors, compiled graphs."""

import dataclasses
from typing import Any

import pytest
import torch
from conftest import SOLVERS, Batched, affine, affine_rule, limits
from torch import Tensor

from mdeq import Anderson, Broyden, FixedPointSolver, Picard, SolveStats, build_solver

BAD = [
    (Broyden, dict(tol=-1e-3), r"tol must be >= 0, got -0.001"),
    (Picard, dict(tol=float("nan")), r"tol must be >= 0, got nan"),
    (Anderson, dict(max_steps=0), r"max_steps must be >= 1, got 0"),
    (Broyden, dict(stop_mode="relative"), r"stop_mode must be 'rel' or 'abs', got relative"),
    (Broyden, dict(divergence_factor=1.0), r"divergence_factor must be > 1, got 1.0"),
    (Broyden, dict(history=0), r"history must be >= 1, got 0"),
    (Broyden, dict(history=2.5), r"history must be an integer, got 2.5"),
    (Broyden, dict(history_dtype="bf16"), r"history_dtype must be 'bfloat16' or None, got 'bf16'"),
    (Broyden, dict(line_search=1.5), r"line_search must be an integer, got 1.5"),
    (Broyden, dict(max_steps=True), r"max_steps must be an integer, got True"),
    (Broyden, dict(tol="1e-3"), r"tol must be a number, got '1e-3'"),
    (Broyden, dict(divergence_factor="9"), r"divergence_factor must be a number, got '9'"),
    (Anderson, dict(history=2.5), r"history must be an integer, got 2.5"),
    (Anderson, dict(ridge=None), r"ridge must be a number, got None"),
    (Anderson, dict(beta=True), r"beta must be a number, got True"),
    (Picard, dict(damping="0.5"), r"damping must be a number, got '0.5'"),
    (Broyden, dict(line_search=-1), r"line_search must be >= 0, got -1"),
    (Anderson, dict(history=0), r"history must be >= 1, got 0"),
    (Anderson, dict(ridge=-1.0), r"ridge must be >= 0, got -1.0"),
    (Anderson, dict(beta=0.0), r"beta must be > 0, got 0.0"),
    (Picard, dict(damping=0.0), r"damping must be in \(0, 1\], got 0.0"),
    (Picard, dict(damping=1.5), r"damping must be in \(0, 1\], got 1.5"),
]


@pytest.mark.parametrize(("cls", "settings", "message"), BAD)
def test_bad_settings(cls: type[FixedPointSolver], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**settings)
    with pytest.raises(ValueError, match=message):
        build_solver({"name": cls.__name__.lower(), **settings})


@pytest.mark.parametrize("cls", [Broyden, Anderson, Picard])
def test_misspelt_setting(cls: type[FixedPointSolver]) -> None:
    with pytest.raises(TypeError, match="max_step"):
        cls(max_step=3)
    with pytest.raises(TypeError, match="max_step"):
        build_solver({"name": cls.__name__.lower(), "max_step": 3})
    with pytest.raises(TypeError):
        cls(1e-3)  # settings go by name


def test_build_solver() -> None:
    spec = {"name": "broyden", "max_steps": 18, "history": 5}
    assert build_solver(spec) == Broyden(max_steps=18, history=5)
    assert spec == {"name": "broyden", "max_steps": 18, "history": 5}, "the caller's mapping was changed"
    assert build_solver({"name": "anderson", "beta": 0.8}) == Anderson(beta=0.8)
    solver = Picard(damping=0.5)
    assert build_solver(solver) is solver
    for unknown in ({"name": "newton"}, {"max_steps": 3}):
        with pytest.raises(ValueError, match=r"unknown solver .*anderson, broyden, picard"):
            build_solver(unknown)


def test_solvers_are_values(solver: FixedPointSolver) -> None:
    assert solver == dataclasses.replace(solver)
    assert hash(solver) == hash(dataclasses.replace(solver))
    assert solver != limits(solver, tol=0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        solver.tol = 0.5
    assert len(set(SOLVERS.values())) == len(SOLVERS)


# Other surroundings


def test_a_solver_keeps_nothing(solver: FixedPointSolver) -> None:
    """Two calls give the same bits, and z0 is not written to."""
    problem = affine()
    start = problem.z0.clone()
    z, stats = solver(problem.fn, problem.z0)
    solver(lambda z: z.cos(), torch.ones(2, 3))
    again, stats_again = solver(problem.fn, problem.z0)
    assert torch.equal(z, again)
    assert torch.equal(stats.trace, stats_again.trace)
    assert torch.equal(problem.z0, start)


def test_no_graph_is_built(solver: FixedPointSolver) -> None:
    weight = torch.full((3,), 0.5, requires_grad=True)
    z, stats = solver(lambda z: weight * z + 1, torch.zeros(2, 3))
    assert not z.requires_grad
    assert not stats.trace.requires_grad


def test_autocast_leaves_the_solver_alone(solver: FixedPointSolver) -> None:
    """Autocast is for f: the solver's own sums are not rounded to bfloat16."""
    problem = affine()
    fn, z0 = Batched(problem.fn.rule, tuple(p.float() for p in problem.fn.params)), problem.z0.float()

    def full(z: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return fn(z)

    z, stats = solver(full, z0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z_autocast, stats_autocast = solver(full, z0)
    assert z_autocast.dtype == torch.float32
    assert torch.equal(stats.num_steps, stats_autocast.num_steps)
    assert torch.equal(z, z_autocast), f"largest difference {float((z - z_autocast).abs().max()):.1e}"


def test_meta_tensors(solver: FixedPointSolver) -> None:
    """Without values every step is run."""
    z, stats = limits(solver, max_steps=4)(torch.cos, torch.zeros(2, 3, device="meta"))
    assert z.is_meta
    assert z.shape == (2, 3)
    assert stats.trace.shape == (5, 2)
    assert stats.status.is_meta
    assert stats.nfe == 5 + 4 * getattr(solver, "line_search", 0)


def test_compiled_solve() -> None:
    """A compiled graph runs every step; finished samples rest, so that the result is that of the eager solve."""
    problem = affine(batch=3, largest=0.5)
    a, b = problem.fn.params
    solver = Broyden(tol=1e-2, max_steps=6)

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(z0: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, SolveStats]:
        return solver(lambda z: affine_rule(z, a, b), z0)

    z, stats = solver(problem.fn.plain(), problem.z0)
    z_compiled, stats_compiled = compiled(problem.z0, a, b)
    steps = int(stats.num_steps.max())
    assert stats.converged.all()
    assert stats_compiled.trace.shape == (7, 3)
    assert torch.equal(stats_compiled.num_steps, stats.num_steps)
    assert torch.equal(stats_compiled.status, stats.status)
    torch.testing.assert_close(stats_compiled.trace[: steps + 1], stats.trace, rtol=1e-6, atol=1e-12)
    assert (z_compiled - z).abs().max() < 1e-12


def test_summary() -> None:
    stats = SolveStats(
        status=torch.tensor([0, 0, 1, 2, 3]),
        residual=torch.tensor([1.0, 2.0, 3.0, 4.0, float("nan")]),
        num_steps=torch.tensor([1, 2, 3, 4, 0]),
        nfe=7,
        trace=torch.zeros(5, 5),
    )
    assert stats.converged.tolist() == [True, True, False, False, False]
    assert stats.summary() == {
        "nfe": 7.0,
        "steps": 2.0,
        "residual_mean": float("inf"),
        "residual_median": 3.0,
        "residual_max": float("inf"),
        "converged": 0.4,
        "max_steps": 0.2,
        "diverged": 0.2,
        "nonfinite": 0.2,
    }


def test_empty_batch(solver: FixedPointSolver) -> None:
    z, stats = solver(torch.cos, torch.zeros(0, 4))
    assert z.shape == (0, 4)
    assert stats.status.shape == stats.residual.shape == stats.num_steps.shape == (0,)
    assert stats.nfe == 1


@pytest.mark.parametrize("z0", [torch.zeros(3), torch.zeros(2, 3, 1), torch.zeros(2, 3, dtype=torch.int64)])
def test_a_state_that_is_none(solver: FixedPointSolver, z0: Tensor) -> None:
    with pytest.raises(ValueError, match=r"z0 must be a floating-point tensor \(B, D\), got"):
        solver(lambda z: z, z0)


def test_a_map_that_changes_the_shape(solver: FixedPointSolver) -> None:
    with pytest.raises(ValueError, match=r"fn must keep the shape of its argument, \(2, 3\), got \(2, 1\)"):
        solver(lambda z: z[:, :1], torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_states(solver: FixedPointSolver, dtype: torch.dtype) -> None:
    z, stats = solver(lambda z: 0.5 * z + 1, torch.zeros(2, 3, dtype=dtype))
    assert z.dtype == dtype
    assert (z - 2).abs().max() < 0.1
    assert (stats.residual < 0.05).all()


def test_the_summary_of_no_samples(solver: FixedPointSolver) -> None:
    z, stats = solver(lambda z: 0.5 * z + 1, torch.zeros(0, 3))
    assert z.shape == (0, 3)
    assert stats.summary()["converged"] != stats.summary()["converged"], "the mean of nothing is nan"
