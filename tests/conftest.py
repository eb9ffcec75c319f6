"""Seeds, the solvers of the grids, and fixed-point problems whose answers are known."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from mdeq import Anderson, Broyden, FixedPointSolver, Picard
from mdeq.solvers import SOLVERS as REGISTERED


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random state, on one thread."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


@dataclass
class Batched:
    """A map with parameters per sample, `rule(z, *params)`, that offers `take` and notes the batch sizes it saw."""

    rule: Callable[..., Tensor]
    params: tuple[Tensor, ...] = ()
    sizes: list[int] = field(default_factory=list)

    def __call__(self, z: Tensor) -> Tensor:
        self.sizes.append(z.shape[0])
        return self.rule(z, *self.params)

    def take(self, index: Tensor) -> "Batched":
        return Batched(self.rule, tuple(p[index] for p in self.params), self.sizes)

    def plain(self) -> Callable[[Tensor], Tensor]:
        """The same map as a callable that has no `take`."""
        return lambda z: self(z)


@dataclass
class Problem:
    """z = fn(z) from z0 `(B, D)`, with its answer; where `solved`, z0 is a fixed point already."""

    fn: Batched
    z0: Tensor
    answer: Tensor
    solved: bool = False

    def error(self, z: Tensor) -> float:
        """Return the largest error of a sample, relative to its answer (to 1 where that is 0)."""
        size = self.answer.norm(dim=1)
        return float(((z.double() - self.answer).norm(dim=1) / torch.where(size > 0, size, 1)).max())


def contraction(norms: Tensor, dim: int) -> Tensor:
    """Return random symmetric matrices `(B, D, D)` of the given 2-norms, which are their spectral radii."""
    matrices = torch.randn(len(norms), dim, dim, dtype=torch.float64)
    matrices = matrices + matrices.mT
    return matrices * (norms.double() / torch.linalg.matrix_norm(matrices, 2))[:, None, None]


def affine_rule(z: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("bij,bj->bi", a, z) + b


def affine(batch: int = 5, dim: int = 12, largest: float = 0.9) -> Problem:
    """A z + b, answer (I - A)^-1 b; the samples are of very different difficulty."""
    a = contraction(torch.linspace(0.1, largest, batch), dim)
    b = torch.randn(batch, dim, dtype=torch.float64)
    answer = torch.linalg.solve(torch.eye(dim, dtype=torch.float64) - a, b)
    return Problem(Batched(affine_rule, (a, b)), torch.zeros_like(b), answer)


def cosine() -> Problem:
    z0 = torch.randn(5, 7, dtype=torch.float64)
    return Problem(Batched(torch.cos), z0, torch.full_like(z0, 0.7390851332151607))


def tanh() -> Problem:
    """tanh(A z + b), with b made for an answer drawn before."""
    answer = 1.6 * torch.rand(5, 9, dtype=torch.float64) - 0.8
    a = contraction(torch.linspace(0.2, 0.9, 5), 9)
    b = torch.atanh(answer) - torch.einsum("bij,bj->bi", a, answer)
    return Problem(Batched(lambda z, a, b: torch.tanh(affine_rule(z, a, b)), (a, b)), torch.zeros_like(b), answer)


def identity() -> Problem:
    z0 = torch.randn(5, 6, dtype=torch.float64)
    return Problem(Batched(lambda z: z), z0, z0, solved=True)


def constant() -> Problem:
    b = torch.randn(5, 6, dtype=torch.float64)
    return Problem(Batched(lambda z, b: b, (b,)), torch.zeros_like(b), b)


def origin() -> Problem:
    """A map with f(0) = 0, started there."""
    z0 = torch.zeros(5, 6, dtype=torch.float64)
    return Problem(
        Batched(lambda z, a: torch.einsum("bij,bj->bi", a, z), (contraction(torch.ones(5), 6),)), z0, z0, True
    )


PROBLEMS = {f.__name__: f for f in (affine, cosine, tanh, identity, constant, origin)}


@pytest.fixture
def problems() -> dict[str, Callable[..., Problem]]:
    """The makers of all problems, by name."""
    return PROBLEMS


@pytest.fixture(params=PROBLEMS)
def problem(request: pytest.FixtureRequest) -> Problem:
    """Each problem in turn."""
    return PROBLEMS[request.param]()


SOLVERS: dict[str, FixedPointSolver] = {
    **{name: cls() for name, cls in REGISTERED.items()},  # a new solver joins the grids by itself
    "broyden-restart": Broyden(history=10),
    "broyden-bfloat16": Broyden(history_dtype="bfloat16"),
    "broyden-line-search": Broyden(line_search=4),
    "anderson-short": Anderson(history=2, beta=0.8),
    "picard-damped": Picard(damping=0.7),
}


@pytest.fixture(params=SOLVERS)
def solver(request: pytest.FixtureRequest) -> FixedPointSolver:
    """Each solver in turn, with its default limits."""
    return SOLVERS[request.param]


def limits(solver: FixedPointSolver, **settings: Any) -> Any:
    """Return the solver with other settings."""
    return dataclasses.replace(solver, **settings)
