"""Fixed-point solvers on problems with known answers, in float64 unless a test says otherwise."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from conftest import SOLVERS, Batched, Problem, affine, affine_rule, contraction, limits
from torch import Tensor

from mdeq import DEQ, Anderson, Broyden, FixedPointSolver, PhantomGradient, Picard, SolveStats, SolveStatus

EXACT: dict[str, Any] = dict(tol=1e-10, max_steps=1000)
CONVERGED, MAX_STEPS, DIVERGED, NONFINITE = SolveStatus


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def report(stats: SolveStats, error: float) -> str:
    return f"residual {float(stats.residual.max()):.1e}, error {error:.1e}, steps {stats.num_steps.tolist()}"


# Answers


def test_known_answers(solver: FixedPointSolver, problem: Problem) -> None:
    """Every solver finds every answer; a contraction by 0.9 has an error of at most 10 residuals."""
    z, stats = limits(solver, **EXACT)(problem.fn, problem.z0)
    error = problem.error(z)
    assert stats.converged.all(), report(stats, error)
    assert stats.residual.max() < 1e-10, report(stats, error)
    assert error < 1.1e-9, report(stats, error)
    assert z.dtype == torch.float64
    if problem.solved:
        assert stats.num_steps.tolist() == [0] * 5
        assert stats.nfe == 1
        assert stats.trace.tolist() == [[0.0] * 5]
        assert torch.equal(z, problem.z0)
    else:
        assert (stats.num_steps > 0).all()


def dense_broyden(path: list[Tensor], values: list[Tensor]) -> list[Tensor]:
    """Return the textbook "good" Broyden direction at every point of a path, from dense inverse Jacobians."""
    z, g = path[0], values[0]
    inverse = -torch.eye(z.shape[1], dtype=z.dtype).repeat(z.shape[0], 1, 1)
    directions = [-torch.einsum("bij,bj->bi", inverse, g)]
    for z_new, g_new in zip(path[1:], values[1:]):
        s, y = z_new - z, g_new - g
        inverse_y = torch.einsum("bij,bj->bi", inverse, y)
        left = torch.einsum("bi,bij->bj", s, inverse)
        curvature = (s * inverse_y).sum(dim=1)[:, None, None]
        inverse = inverse + (s - inverse_y).unsqueeze(2) * left.unsqueeze(1) / curvature
        z, g = z_new, g_new
        directions.append(-torch.einsum("bij,bj->bi", inverse, g))
    return directions


def recorded(log: list[tuple[Tensor, ...]], **settings: Any) -> Broyden:
    """Return a Broyden solver that writes every iterate, residual, direction and next iterate to a log."""

    class Recorded(Broyden):
        def direction(self, memory: Any, z: Tensor, g: Tensor) -> Tensor:
            log.append((z, g, super().direction(memory, z, g)))
            return log[-1][2]

        def advance(self, fn: Any, memory: Any, z: Tensor, g: Tensor, trial: Tensor) -> tuple[Tensor, Tensor, int]:
            result = super().advance(fn, memory, z, g, trial)
            log[-1] += (result[0],)
            return result

    return Recorded(**settings)


@pytest.mark.parametrize("name", ["affine", "cosine", "tanh"])
def test_broyden_is_the_textbook_method(problems: dict[str, Any], name: str) -> None:
    problem, log = problems[name](), []
    recorded(log, tol=0, max_steps=12)(problem.fn.plain(), problem.z0)
    z, g, step, after = (list(column) for column in zip(*log))
    assert len(z) == 12
    for k, expected in enumerate(dense_broyden(z, g)):
        assert torch.equal(after[k], z[k] + step[k])
        assert (step[k] - expected).norm() < 1e-9 * expected.norm() + 1e-13, f"step {k}"


def test_broyden_with_shortened_steps_is_the_textbook_method() -> None:
    """Directions agree when steps were halved, and every step is a halved direction."""
    log: list[tuple[Tensor, ...]] = []
    z0 = torch.tensor([[2.5, -3.0, 4.0], [4.5, 1.0, -2.0]], dtype=torch.float64)
    recorded(log, tol=0, max_steps=7, line_search=8)(lambda z: -(z**3) / 4, z0)
    z, g, step, after = (list(column) for column in zip(*log))
    lengths = []
    for k, expected in enumerate(dense_broyden(z, g)):
        assert (step[k] - expected).norm() < 1e-9 * expected.norm(), f"step {k}"
        length = (after[k] - z[k]).norm(dim=1) / step[k].norm(dim=1)
        assert (length.log2() - length.log2().round()).abs().max() < 1e-6, "a length is not a power of 1/2"
        lengths.append(length)
    assert torch.stack(lengths).min() < 0.6, "no step was shortened, nothing was tested"


def dense_anderson(path: list[Tensor], values: list[Tensor], history: int, beta: float) -> list[Tensor]:
    """Return the textbook Anderson step at every point of a path, by least squares on one sample after another."""
    steps = []
    for k, g in enumerate(values):
        first = max(0, k - history + 1)
        step = beta * g
        if k > first:
            dg = torch.stack([values[j + 1] - values[j] for j in range(first, k)], dim=2)
            dz = torch.stack([path[j + 1] - path[j] for j in range(first, k)], dim=2)
            gamma = torch.linalg.lstsq(dg, g.unsqueeze(2), driver="gelsd").solution
            step = step - ((dz + beta * dg) @ gamma).squeeze(2)
        steps.append(step)
    return steps


@pytest.mark.parametrize("name", ["affine", "tanh"])
@pytest.mark.parametrize(("history", "beta"), [(1, 0.7), (2, 1.0), (3, 0.8), (6, 1.0)])
def test_anderson_is_the_textbook_method(problems: dict[str, Any], name: str, history: int, beta: float) -> None:
    """While the least-squares problem is well posed: the package's is regularised, which shows in the last digits."""
    problem, path = problems[name](), []

    def fn(z: Tensor) -> Tensor:
        path.append(z.clone())
        return problem.fn(z)

    Anderson(history=history, beta=beta, tol=0, max_steps=9)(fn, problem.z0)
    path = path[:9]
    values = [problem.fn(z) - z for z in path]
    for k, expected in enumerate(dense_anderson(path, values, history, beta)[:-1]):
        step = path[k + 1] - path[k]
        assert (step - expected).norm() < 1e-8 * expected.norm(), f"step {k}"


def test_anderson_is_finite_on_linear_problems() -> None:
    """With the whole history it is GMRES: D + 1 steps for D unknowns, where Picard takes many."""
    problem = affine(dim=6, largest=0.99)
    z, stats = Anderson(history=8, tol=1e-8)(problem.fn, problem.z0)
    error = problem.error(z)
    assert stats.num_steps.max() <= 7, report(stats, error)
    assert error < 1e-6, report(stats, error)
    assert Picard(tol=1e-8, max_steps=1000)(problem.fn, problem.z0)[1].num_steps.max() > 30


def test_broyden_is_finite_on_linear_problems() -> None:
    """At most 2 D steps (Gay 1979)."""
    problem = affine(dim=6, largest=0.99)
    z, stats = Broyden(tol=1e-8)(problem.fn, problem.z0)
    assert stats.num_steps.max() <= 13, report(stats, problem.error(z))


def test_broyden_stays_finite_below_the_smallest_numbers() -> None:
    """Squares of its directions are denormal there, and their reciprocals infinite."""
    a = torch.randn(32, 32)
    a = 0.5 * a / torch.linalg.matrix_norm(a, 2)
    z, stats = Broyden(tol=0.0, max_steps=80)(lambda z: torch.tanh(z @ a.mT), torch.randn(16, 32))
    assert not (stats.status == NONFINITE).any()
    assert z.norm() < 1e-18


@pytest.mark.parametrize("compaction", [True, False])
def test_broyden_makes_room_for_directions_as_it_needs_it(monkeypatch: pytest.MonkeyPatch, compaction: bool) -> None:
    assert Broyden(max_steps=10_000).init(torch.zeros(1, 2)).d.shape[1] < 100
    problem = affine(16, 24, 0.99)
    solver = Broyden(tol=1e-12, max_steps=200, line_search=1)
    z, stats = solver.solve(problem.fn, problem.z0, compact=compaction)[:2]
    assert stats.num_steps.max() > 8
    monkeypatch.setattr("mdeq.solvers.broyden._FIRST_SLOTS", 2)
    again, others = solver.solve(problem.fn, problem.z0, compact=compaction)[:2]
    assert torch.equal(z, again)
    assert torch.equal(stats.trace, others.trace)


def test_restart() -> None:
    """A full history is forgotten: overwriting its oldest pair would be unsound."""
    fn = Batched(affine_rule, (contraction(torch.full((5,), 0.9), 40), torch.randn(5, 40, dtype=torch.float64)))
    answer = torch.linalg.solve(torch.eye(40, dtype=torch.float64) - fn.params[0], fn.params[1])
    z, stats = Broyden(history=10, tol=1e-9, max_steps=200)(fn, torch.zeros_like(answer))
    error = relative(z, answer)
    assert stats.converged.all(), report(stats, error)
    assert error < 1.1e-8, report(stats, error)
    assert stats.num_steps.min() > 22, "fewer than two restarts happened"
    _, unlimited = Broyden(tol=1e-9, max_steps=200)(fn, torch.zeros_like(answer))
    assert (unlimited.num_steps <= stats.num_steps).all()


@pytest.mark.parametrize("dim", [300, 60_000])  # the larger one is cast in parts
def test_history_in_bfloat16_takes_the_same_steps(dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    slope, b = (torch.randn(5, dim, generator=generator) for _ in range(2))

    def fn(z: Tensor) -> Tensor:
        return torch.tanh(0.9 * slope * z.roll(1, dims=1) + b)

    z0 = torch.zeros_like(b)
    solver = Broyden(tol=1e-5, max_steps=60)
    z, stats = solver(fn, z0)
    z_half, half, memory = limits(solver, history_dtype="bfloat16").solve(fn, z0)
    assert memory.d.dtype == torch.bfloat16
    assert memory.d.isfinite()[:, : memory.count].all()
    assert half.converged.all(), report(half, relative(z_half, z))
    assert (half.num_steps - stats.num_steps).abs().max() <= 1, report(half, relative(z_half, z))
    assert relative(z_half, z) < 1e-4, report(half, relative(z_half, z))


@pytest.mark.parametrize("line_search", [0, 8])
def test_line_search_rescues(line_search: int) -> None:
    """f(z) = -z^3 / 4 has the one fixed point 0; unit steps from afar wander."""
    line = torch.linspace(-5, 5, 10, dtype=torch.float64)
    z0 = torch.stack((line, line.roll(3).abs() + 0.3))
    solver = Broyden(tol=1e-10, stop_mode="abs", max_steps=100, line_search=line_search)
    z, stats = solver(lambda z: -(z**3) / 4, z0)
    if line_search:
        assert stats.converged.all(), report(stats, float(z.abs().max()))
        assert z.abs().max() < 1e-9, report(stats, float(z.abs().max()))
    else:
        assert not stats.converged.any(), report(stats, float(z.abs().max()))


def test_line_search_costs_nothing_where_steps_are_good() -> None:
    problem = affine(largest=0.3)
    z, stats = Broyden(**EXACT)(problem.fn, problem.z0)
    z_search, stats_search = Broyden(**EXACT, line_search=4)(problem.fn, problem.z0)
    assert torch.equal(z, z_search)
    assert stats.nfe == stats_search.nfe


@pytest.mark.parametrize("name", ["affine", "tanh", "runaway"])
@pytest.mark.parametrize("compaction", [False, True])
def test_looking_less_often_changes_no_result(
    solver: FixedPointSolver, problems: dict[str, Any], name: str, compaction: bool
) -> None:
    problem = affine() if name == "runaway" else problems[name]()
    fn = problem.fn if compaction else problem.fn.plain()
    if name == "runaway":  # some samples diverge, some are not finite
        scale = torch.tensor([1.0, 1e4, 1.0, float("inf"), 1.0], dtype=torch.float64).unsqueeze(1)
        inner, fn = problem.fn.plain(), lambda z: inner(z) * scale
    often = limits(solver, tol=1e-6, max_steps=200)
    rarely = replace(often, check_every=7)
    z, stats = often(fn, problem.z0)
    z_rarely, stats_rarely = rarely(fn, problem.z0)
    assert stats.num_steps.max() > 3
    same = partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)
    for field in ("status", "residual", "num_steps"):
        same(getattr(stats, field), getattr(stats_rarely, field))
    same(z, z_rarely)
    same(stats.trace, stats_rarely.trace[: len(stats.trace)])
    assert stats.nfe <= stats_rarely.nfe <= stats.nfe + 6


def test_a_solver_says_how_to_step() -> None:
    """`init` and `direction` make a solver."""

    class Half(FixedPointSolver):
        def init(self, z0: Tensor) -> None:
            return None

    problem = affine()
    with pytest.raises(NotImplementedError, match="Half must define direction or propose"):
        Half()(problem.fn.plain(), problem.z0)

    class Halved(Half):
        def direction(self, memory: None, z: Tensor, g: Tensor) -> Tensor:
            return 0.5 * g

    settings = dict(tol=1e-6, max_steps=500)
    z, stats = Halved(**settings)(problem.fn.plain(), problem.z0)
    expected, damped = Picard(damping=0.5, **settings)(problem.fn.plain(), problem.z0)
    assert torch.equal(stats.num_steps, damped.num_steps)
    assert torch.allclose(z, expected, rtol=1e-12)


# How a solve ends


def test_max_steps(solver: FixedPointSolver) -> None:
    problem = affine()
    _, stats = limits(solver, tol=1e-12, max_steps=3)(problem.fn, problem.z0)
    assert stats.status.tolist() == [MAX_STEPS] * 5
    assert stats.num_steps.tolist() == [3] * 5
    assert not stats.converged.any()


@pytest.mark.parametrize("stop_mode", ["rel", "abs"])
def test_diverged(stop_mode: Any) -> None:
    """Judged on |f(z) - z|, for the relative residual of z + z^3 saturates at 1."""
    z0 = torch.ones(2, 3, dtype=torch.float64)
    z, stats = Picard(stop_mode=stop_mode)(lambda z: z + z**3, z0)
    assert stats.status.tolist() == [DIVERGED] * 2
    assert stats.num_steps.tolist() == [3, 3]  # 1, 2, 10, 1010: the fourth residual is 1e9 times the first
    assert z.isfinite().all()
    assert (z == 2).all(), "the best iterate is the first"
    if stop_mode == "rel":
        assert stats.trace.max() <= 1


@pytest.mark.parametrize("name", ["broyden", "broyden-restart", "anderson", "anderson-short", "picard"])
def test_diverged_by_every_solver(name: str) -> None:
    z0 = 4 * torch.linspace(-1, 1, 10, dtype=torch.float64).expand(2, 10)
    z, stats = SOLVERS[name](lambda z: -(z**3), z0)
    assert stats.status.tolist() == [DIVERGED] * 2
    assert (stats.num_steps < 30).all()
    assert z.isfinite().all()
    assert stats.residual.isfinite().all()


@pytest.mark.parametrize("name", ["broyden", "broyden-restart", "anderson", "picard"])
def test_no_fixed_point(name: str) -> None:
    """z + 1 has none, and its residual carries no secant information: no division by zero comes of it."""
    z, stats = limits(SOLVERS[name], stop_mode="abs", max_steps=12)(lambda z: z + 1, torch.zeros(2, 4).double())
    assert stats.status.tolist() == [MAX_STEPS] * 2
    assert (stats.trace == 2).all()
    assert z.isfinite().all()


def test_divergence_factor() -> None:
    z0 = torch.ones(1, 2, dtype=torch.float64)
    steps = [
        int(Picard(tol=0, divergence_factor=factor)(lambda z: -2 * z, z0)[1].num_steps) for factor in (7.9, 8.1, 1e4)
    ]
    assert steps == [3, 4, 14]  # the residual doubles at every step


def test_nonfinite() -> None:
    """2 -> log 2 -> log log 2 < 0 -> nan: the best iterate is log 2."""
    z0 = torch.full((1, 1), 2.0, dtype=torch.float64)
    z, stats = Picard()(torch.log, z0)
    assert stats.status.tolist() == [NONFINITE]
    assert stats.num_steps.tolist() == [2]
    torch.testing.assert_close(z, z0.log(), rtol=1e-15, atol=0)
    assert stats.residual.tolist() == stats.trace[1].tolist()
    assert stats.trace[2].isnan().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_from_the_start(solver: FixedPointSolver, value: float) -> None:
    """Where no iterate is finite, the starting point comes back with its residual."""
    z0 = torch.ones(2, 3, dtype=torch.float64)
    z, stats = solver(lambda z: z + value, z0)
    assert stats.status.tolist() == [NONFINITE] * 2
    assert stats.num_steps.tolist() == [0, 0]
    assert torch.equal(z, z0)
    assert not stats.residual.isfinite().any()


@pytest.mark.parametrize("stop_mode", ["rel", "abs"])
def test_the_best_iterate_is_returned(solver: FixedPointSolver, stop_mode: Any) -> None:
    """On a chaotic map residuals go up and down; the one returned is the least after the start."""
    z0 = torch.tensor([[0.1, 0.2], [0.3, 0.7], [0.55, 0.9]], dtype=torch.float64)

    def logistic(z: Tensor) -> Tensor:
        return 3.9 * z * (1 - z)

    z, stats = limits(solver, tol=0, max_steps=5, stop_mode=stop_mode)(logistic, z0)
    g = (logistic(z) - z).norm(dim=1)
    expected = g if stop_mode == "abs" else g / (logistic(z).norm(dim=1) + 1e-9)
    assert torch.equal(stats.residual, stats.trace[1:].min(dim=0).values)
    torch.testing.assert_close(stats.residual, expected, rtol=1e-12, atol=0)


def test_the_start_does_not_compete() -> None:
    """z0 is returned only where it has converged, however bad the iterates that follow are."""
    z0 = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    z, stats = Picard(tol=1e-8, stop_mode="abs", max_steps=4)(lambda z: -1.5 * z, z0)
    assert z.tolist() == [[-1.5], [0.0]]
    assert stats.residual.tolist() == [3.75, 0.0]
    assert stats.trace[0].tolist() == [2.5, 0.0]
    assert stats.status.tolist() == [MAX_STEPS, CONVERGED]
    assert stats.num_steps.tolist() == [4, 0]


@pytest.mark.parametrize("stop_mode", ["rel", "abs"])
@pytest.mark.parametrize("tol", [1e-2, 1e-6])
def test_tolerance(solver: FixedPointSolver, stop_mode: Any, tol: float) -> None:
    """A sample stops at its first residual below tol; residuals are what the docstring says."""
    problem = affine()
    problem.fn.params = (problem.fn.params[0], 50 * problem.fn.params[1])
    z, stats = limits(solver, tol=tol, stop_mode=stop_mode, max_steps=1000)(problem.fn, problem.z0)
    g, f_z = problem.fn(z) - z, problem.fn(z)
    expected = g.norm(dim=1) if stop_mode == "abs" else g.norm(dim=1) / (f_z.norm(dim=1) + 1e-9)
    torch.testing.assert_close(stats.residual, expected, rtol=1e-6, atol=1e-14)
    for i, steps in enumerate(stats.num_steps.tolist()):
        assert stats.trace[steps, i] < tol
        assert (stats.trace[:steps, i] >= tol).all()


def test_the_relative_tolerance_has_no_scale(problems: dict[str, Any]) -> None:
    problem = problems["affine"]()
    a, b = problem.fn.params
    counts = {}
    for mode in ("rel", "abs"):
        solver = Broyden(tol=1e-6, stop_mode=mode, max_steps=100)
        counts[mode] = [solver(Batched(affine_rule, (a, c * b)), problem.z0)[1].num_steps for c in (1, 1024)]
    assert torch.equal(*counts["rel"])
    assert (counts["abs"][1] >= counts["abs"][0]).all()
    assert (counts["abs"][1] > counts["abs"][0]).any()


def test_zero_tolerance_runs_all_steps(solver: FixedPointSolver) -> None:
    problem = affine()
    _, stats = limits(solver, tol=0, max_steps=9)(problem.fn, problem.z0)
    assert stats.num_steps.tolist() == [9] * 5
    assert stats.trace.shape == (10, 5)
    assert stats.status.tolist() == [MAX_STEPS] * 5


def test_zero_residual_with_zero_tolerance(solver: FixedPointSolver, problems: dict[str, Any]) -> None:
    """An exact fixed point is CONVERGED even where no residual is below the tolerance."""
    for name in ("identity", "origin"):
        problem = problems[name]()
        _, stats = limits(solver, tol=0)(problem.fn, problem.z0)
        assert stats.status.tolist() == [CONVERGED] * 5
        assert stats.nfe == 1


def test_finished_samples_rest(solver: FixedPointSolver) -> None:
    """Without `take`, f is evaluated for a finished sample at the point that is returned, and nowhere else."""
    problem, inputs = affine(), []

    def fn(z: Tensor) -> Tensor:
        inputs.append(z.clone())
        return affine_rule(z, *problem.fn.params)

    z, stats = limits(solver, tol=1e-8, max_steps=1000)(fn, problem.z0)
    assert stats.num_steps.min() < stats.num_steps.max() - 2
    halvings = stats.nfe - 1 - int(stats.num_steps.max())  # a line search evaluates f more often than it steps
    for i, steps in enumerate(stats.num_steps.tolist()):
        assert all(torch.equal(later[i], z[i]) for later in inputs[steps + 1 + halvings :])


def test_one_step(solver: FixedPointSolver) -> None:
    """The first step of every solver is a damped Picard step."""
    problem = affine(largest=0.5)
    z, stats = limits(solver, max_steps=1)(problem.fn, problem.z0)
    share = getattr(solver, "beta", getattr(solver, "damping", 1.0))
    torch.testing.assert_close(z, share * problem.fn(problem.z0), rtol=1e-15, atol=0)
    assert stats.num_steps.tolist() == [1] * 5
    assert stats.trace.shape == (2, 5)


def test_statistics(solver: FixedPointSolver) -> None:
    """nfe counts evaluations; the trace has a row per iterate, and a finished sample's last value repeats."""
    problem = affine()
    _, stats = limits(solver, **EXACT)(problem.fn.plain(), problem.z0)
    steps = int(stats.num_steps.max())
    assert len(problem.fn.sizes) == stats.nfe
    assert stats.nfe == steps + 1 or (solver == SOLVERS["broyden-line-search"] and stats.nfe > steps)
    assert stats.trace.shape == (steps + 1, 5)
    assert stats.num_steps.min() < steps, "all samples stopped together, nothing was tested"
    for i, last in enumerate(stats.num_steps.tolist()):
        assert (stats.trace[last:, i] == stats.trace[last, i]).all()
        assert stats.trace[last, i] == stats.residual[i]
    for x in (stats.status, stats.num_steps):
        assert x.dtype == torch.int64
        assert x.shape == (5,)


def test_evaluations_of_a_solve_whose_first_is_known() -> None:
    """They are none for a sample at its answer, also beside one whose line search takes more."""
    torch.manual_seed(0)
    matrix, b = 0.8 * torch.randn(4, 4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    fn = lambda z: z @ matrix + b  # noqa: E731
    z0 = torch.stack((torch.zeros(4, dtype=torch.float64), torch.linalg.solve(torch.eye(4) - matrix.T, b[1])))
    z0[1] = fn(z0)[1]
    solver = Broyden(tol=1e-8, line_search=4)
    _, cold, _ = solver.solve(fn, z0)
    _, warm, _ = solver.solve(fn, z0, f0=fn(z0))
    assert cold.nfe == warm.nfe + 1 > cold.num_steps.max() + 1, "no line search took place"
    assert cold.num_steps.tolist() == warm.num_steps.tolist()
    assert (warm.evaluations[1], cold.evaluations[1]) == (0, 1)
    assert (cold.evaluations[0] - 1 - warm.evaluations[0]).abs() < 1e-12
    assert warm.evaluations[0] == warm.nfe


# One sample does not see another


def alone(solver: FixedPointSolver, problem: Problem) -> list[tuple[Tensor, SolveStats]]:
    rows = torch.arange(len(problem.z0)).split(1)
    return [solver(problem.fn.take(row), problem.z0[row]) for row in rows]


@pytest.mark.parametrize("compaction", [False, True])
@pytest.mark.parametrize("name", ["affine", "tanh"])
def test_batch_independence(solver: FixedPointSolver, problems: dict[str, Any], name: str, compaction: bool) -> None:
    """A sample takes the same steps alone and in a batch, whether or not finished samples leave the batch."""
    problem = problems[name]()
    solver = limits(solver, tol=1e-9, max_steps=1000)
    z, stats = solver(problem.fn if compaction else problem.fn.plain(), problem.z0)
    sizes = list(problem.fn.sizes)
    for i, (z_alone, stats_alone) in enumerate(alone(solver, problem)):
        steps = int(stats_alone.num_steps)
        assert stats.num_steps[i] == steps
        assert stats.status[i] == stats_alone.status[0] == CONVERGED
        assert (z[i] - z_alone[0]).abs().max() < 1e-10, f"residual {float(stats.residual[i]):.1e}"
        torch.testing.assert_close(stats.trace[: steps + 1, i], stats_alone.trace[:, 0], rtol=1e-3, atol=1e-12)
    if compaction:
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] == 5
        assert sizes[-1] <= 2, f"fn saw batches of {sorted(set(sizes))}"
    else:
        assert set(sizes) == {5}


def test_compaction_with_few_slow_samples(solver: FixedPointSolver) -> None:
    """Two slow samples among ten, in the middle of the batch: as without `take`, at a fraction of the evaluations."""
    norms = torch.full((10,), 0.05)
    norms[[3, 6]] = torch.tensor([0.9, 0.95])
    fn = Batched(affine_rule, (contraction(norms, 12), torch.randn(10, 12, dtype=torch.float64)))
    z0 = torch.randn(10, 12, dtype=torch.float64)
    solver = limits(solver, tol=1e-9, max_steps=1000)
    z_plain, plain = solver(fn.plain(), z0)
    whole = sum(fn.sizes)
    fn.sizes.clear()
    z, stats = solver(fn, z0)
    assert sum(fn.sizes) < 0.75 * whole
    assert min(fn.sizes) <= 2
    for field in ("status", "num_steps"):
        assert torch.equal(getattr(stats, field), getattr(plain, field)), field
    assert stats.trace.shape == plain.trace.shape
    torch.testing.assert_close(stats.trace, plain.trace, rtol=1e-3, atol=1e-12)
    assert (z - z_plain).abs().max() < 1e-10


def test_batch_independence_in_float32(solver: FixedPointSolver) -> None:
    problem = affine()
    problem.fn.params = tuple(p.float() for p in problem.fn.params)
    problem.z0 = problem.z0.float()
    solver = limits(solver, tol=1e-5, max_steps=1000)
    z, stats = solver(problem.fn, problem.z0)
    assert stats.converged.all()
    assert z.dtype == stats.residual.dtype == torch.float32
    for i, (z_alone, stats_alone) in enumerate(alone(solver, problem)):
        assert stats_alone.converged.all()
        assert relative(z[i], z_alone[0]) < 1e-3, f"residual {float(stats.residual[i]):.1e}"


@pytest.mark.parametrize("compaction", [False, True])
def test_a_nan_sample_stays_alone(solver: FixedPointSolver, compaction: bool) -> None:
    """Row 1 meets nan at its second evaluation, row 3 at its first; the others converge."""
    problem = affine()
    a, b = (p.clone() for p in problem.fn.params)
    b[3, 5] = float("nan")

    inputs = []

    def rule(z: Tensor, a: Tensor, b: Tensor, poison: Tensor) -> Tensor:
        inputs.append(z.clone())
        return torch.where((poison & (z != 0).any(dim=1))[:, None], torch.nan, affine_rule(z, a, b))

    poison = torch.tensor([False, True, False, False, False])
    fn = Batched(rule, (a, b, poison))
    z, stats = limits(solver, **EXACT)(fn if compaction else fn.plain(), problem.z0)
    assert stats.status.tolist() == [CONVERGED, NONFINITE, CONVERGED, NONFINITE, CONVERGED]
    assert stats.num_steps[3] == 0
    assert z.isfinite().all()
    good = stats.converged
    assert relative(z[good], problem.answer[good]) < 1.1e-9, report(stats, relative(z[good], problem.answer[good]))
    assert torch.equal(z[~good], problem.z0[~good]), "no later iterate was finite"
    assert stats.residual[1] == stats.trace[0, 1] > 0.99, "the residual of the start is reported with it"
    assert all(x.isfinite().all() for x in inputs)
    if not compaction:
        assert torch.equal(inputs[-1][~good], z[~good]), "a failed sample rests at what is returned"


def test_a_diverging_sample_stays_alone(solver: FixedPointSolver) -> None:
    """Its neighbours are what they are beside a benign one, bit for bit."""
    problem = affine(batch=3)
    a, b = problem.fn.params
    cubic = torch.zeros(3, 1, dtype=torch.float64)
    z0 = torch.randn(3, 12, dtype=torch.float64)

    def solve(weight: float) -> tuple[Tensor, SolveStats]:
        cubic[1] = weight
        return limits(solver, **EXACT)(lambda z: affine_rule(z, a, b) - cubic * z**3, z0)

    z_benign, benign = solve(0.0)
    z, stats = solve(1e6)
    assert stats.status[1] == DIVERGED
    assert benign.converged.all()
    for i in (0, 2):
        assert torch.equal(z[i], z_benign[i])
        assert stats.num_steps[i] == benign.num_steps[i]
        assert stats.residual[i] == benign.residual[i]
    assert z.isfinite().all()


def test_residual_of_zeros_in_float16() -> None:
    """The denominator's smallest value must be one that the dtype has."""
    _, stats = Picard()(lambda z: 0 * z, torch.zeros(2, 3, dtype=torch.float16))
    assert stats.converged.all()
    assert stats.residual.tolist() == [0, 0]


@pytest.mark.parametrize("solver", [Broyden(tol=1e-2), Anderson(tol=1e-2), Picard(tol=1e-2)], ids=str)
def test_float16_where_norms_overflow_it(solver: FixedPointSolver) -> None:
    """Norms and inner products of what float16 can hold need not fit into it."""
    torch.manual_seed(0)
    matrix, b = 0.05 * torch.randn(100, 100), 30 * (torch.rand(3, 100) + 0.5)

    def fn(z: Tensor) -> Tensor:
        return torch.tanh(z @ matrix.to(z.dtype) / 30) * 30 + b.to(z.dtype)

    exact, _ = Broyden(tol=1e-6)(fn, torch.zeros(3, 100))
    z, stats = solver(fn, torch.zeros(3, 100, dtype=torch.float16))
    assert stats.converged.all(), stats
    assert z.dtype == torch.float16
    assert relative(z.float(), exact) < 2e-2
    long = torch.rand(1, 1_000_000) + 0.5  # |f(z)| is above 65504, and |g| is not
    z, stats = solver(lambda z: 0.5 * z + 50 * long.to(z.dtype), torch.zeros(1, 1_000_000, dtype=torch.float16))
    assert stats.converged.all(), stats
    assert relative(z.float(), 100 * long) < 2e-2


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float16, 2e-4), (torch.bfloat16, 1e-3)], ids=["fp16", "bf16"])
def test_anderson_in_16_bits(dtype: torch.dtype, tol: float) -> None:
    """What it mixes are whole iterates: weights that are rounded to 16 bits would put it off by a share of them."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 64)
    layer.weight.data *= 0.9 / torch.linalg.matrix_norm(layer.weight.data, 2)
    layer, x = layer.to(dtype), torch.randn(80, 64).to(dtype)
    z, stats = Anderson(tol=tol)(lambda z: torch.tanh(layer(z)) + x, torch.zeros_like(x))
    assert z.dtype == dtype
    assert stats.converged.double().mean() > 0.8, stats.summary()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # PyTorch's own use of it
@pytest.mark.parametrize("solver", [Broyden(tol=1e-12), Anderson(tol=1e-12), Picard(tol=1e-12)], ids=str)
def test_forward_mode_derivatives_pass_by_a_solve(solver: FixedPointSolver) -> None:
    """They come from the steps after it; the solve itself has none to give."""
    scale = torch.linspace(0.1, 0.5, 5, dtype=torch.float64).expand(2, 5)

    def result(x: Tensor) -> Tensor:
        deq = DEQ(solver, PhantomGradient(num_steps=60, damping=1.0)).train()
        return deq(lambda z: (torch.tanh(scale * z[0]) + x,), (torch.zeros_like(x),)).state[0]

    x = torch.randn(2, 5, dtype=torch.float64)
    z, slope = torch.func.jvp(result, (x,), (torch.ones_like(x),))
    inner = scale / torch.cosh(scale * z).square()
    torch.testing.assert_close(slope, 1 / (1 - inner), rtol=1e-9, atol=0)


def test_line_search_in_float16_where_norms_overflow_it() -> None:
    """A start whose |g| is above 65504 is one that a step can improve on."""

    def fn(z: Tensor) -> Tensor:
        return (z - 1000 * torch.atan((z.float() - 50) / 100)).to(z.dtype)

    solver = Broyden(tol=1e-2, max_steps=40, line_search=8)
    z, stats = solver(fn, torch.full((1, 4000), 300, dtype=torch.float16))
    assert z.dtype == torch.float16
    assert stats.converged.all(), stats
    torch.testing.assert_close(z.float(), torch.full_like(z, 50).float(), atol=1, rtol=0)


def test_anderson_in_coarse_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products as rough as those of TF32 do not keep it from the fixed point: no iterate is made of them alone."""

    def coarse(x: Tensor) -> Tensor:
        return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)  # 10 bits of the mantissa

    bmm, rough = torch.bmm, []

    def rough_bmm(x: Tensor, y: Tensor) -> Tensor:
        rough.append(len(x))
        return bmm(coarse(x.contiguous()), coarse(y.contiguous()))

    monkeypatch.setattr(torch, "bmm", rough_bmm)
    for name in ("baddbmm", "matmul", "einsum"):
        monkeypatch.delattr(torch, name)  # other products would not be rough
    monkeypatch.setattr(Tensor, "__matmul__", None)
    torch.manual_seed(0)
    linear, b = torch.nn.Linear(50, 50), torch.randn(4, 50)
    with torch.no_grad():
        linear.weight.mul_(0.9 / torch.linalg.matrix_norm(linear.weight, 2))
    _, stats = Anderson(tol=1e-6, max_steps=60)(lambda z: torch.tanh(linear(z)) + b, torch.zeros(4, 50))
    assert stats.converged.all(), stats
    assert rough


def test_the_ridge_of_anderson_counts() -> None:
    """The setting is the one that is used: a large one makes the mix a plain step."""
    problem = Batched(affine_rule, (contraction(torch.full((3,), 0.9), 8), torch.randn(3, 8, dtype=torch.float64)))
    z0 = torch.zeros(3, 8, dtype=torch.float64)
    plain, mixed, heavy = (
        s(problem, z0)[1].trace
        for s in (Picard(tol=0, max_steps=6), Anderson(tol=0, max_steps=6), Anderson(tol=0, max_steps=6, ridge=1e12))
    )
    torch.testing.assert_close(heavy, plain, rtol=1e-6, atol=0)
    assert (mixed[-1] < 0.5 * plain[-1]).all()


@pytest.mark.parametrize(("steps", "status"), [(58, MAX_STEPS), (66, DIVERGED)])
def test_the_yardstick_of_divergence_grows_with_the_size_of_the_state(steps: int, status: SolveStatus) -> None:
    """A million times 1e-3 sqrt(D), here 1e5, where the start is nearer than that."""
    z0 = torch.full((1, 10_000), 1e-8, dtype=torch.float64)  # |f(z) - z| is 5e-7, and 8e3 and 2e5 at the end
    assert Picard(max_steps=steps, tol=0.0)(lambda z: 1.5 * z, z0)[1].status.tolist() == [status]
