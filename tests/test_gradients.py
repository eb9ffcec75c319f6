"""Gradients through an equilibrium, and the Jacobian's diagnostics, against closed forms in float64."""

import gc
import weakref
from typing import Any

import pytest
import timm
import torch
from conftest import affine_rule, contraction
from torch import Tensor

from mdeq import (
    DEQ,
    Anderson,
    Broyden,
    Equilibrium,
    FixedPointSolver,
    ImplicitGradient,
    PhantomGradient,
    Picard,
    SolveStats,
    SolveStatus,
    build_gradient,
    jacobian_frobenius,
    spectral_radius,
)

EXACT = Broyden(tol=1e-13, max_steps=100)


def relative(actual: Tensor | None, expected: Tensor) -> float:
    assert actual is not None
    return float((actual - expected).norm() / expected.norm())


class Affine:
    """f(z) = A z + b with leaves A and b; counts its evaluations."""

    def __init__(self, radius: float = 0.8, batch: int = 3, dim: int = 6, scale: float = 1.0) -> None:
        matrix = torch.randn(dim, dim, dtype=torch.float64)
        self.a = (radius * matrix / torch.linalg.matrix_norm(matrix, 2)).requires_grad_()
        self.b = (scale * torch.randn(batch, dim, dtype=torch.float64)).requires_grad_()
        self.upstream = torch.randn(batch, dim, dtype=torch.float64)
        self.calls = 0

    @property
    def zeros(self) -> tuple[Tensor]:
        return (torch.zeros_like(self.b),)

    def __call__(self, z: tuple[Tensor, ...]) -> tuple[Tensor]:
        self.calls += 1
        return (z[0] @ self.a.mT + self.b,)

    def closed_form(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return z* and the gradients of (upstream * z*).sum() to A and b."""
        with torch.no_grad():
            system = torch.eye(self.a.shape[0], dtype=torch.float64) - self.a
            z = torch.linalg.solve(system, self.b.mT).mT
            grad_b = torch.linalg.solve(system.mT, self.upstream.mT).mT
            return z, grad_b.mT @ z, grad_b

    def solve(self, gradient: Any, *, train: bool = False, **kwargs: Any) -> Equilibrium:
        return DEQ(EXACT, gradient).train(train)(self, self.zeros, **kwargs)

    def backward(self, equilibrium: Equilibrium, scale: float = 1.0, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the gradients to A and b of scale * (upstream * z).sum()."""
        self.a.grad = self.b.grad = None
        (scale * self.upstream * equilibrium.state[0]).sum().backward(**kwargs)
        assert self.a.grad is not None
        assert self.b.grad is not None
        return self.a.grad, self.b.grad


# Values


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("gradient", "unroll"),
    [
        (ImplicitGradient(EXACT), 0),
        (PhantomGradient(150, 1.0), 0),
        (PhantomGradient(250, 0.5), 0),
        (ImplicitGradient(), 150),
    ],
    ids=["implicit", "phantom", "phantom-damped", "unroll"],
)
def test_closed_form(gradient: Any, unroll: int, train: bool) -> None:
    """Implicit differentiation, a long phantom gradient and a long unrolled network agree with the closed form."""
    f = Affine()
    z, grad_a, grad_b = f.closed_form()
    equilibrium = f.solve(gradient, train=train, unroll=unroll)
    residual = 0.0 if equilibrium.stats is None else float(equilibrium.stats.residual.max())
    assert relative(equilibrium.state[0].detach(), z) < 1e-11, f"residual {residual:.1e}"
    actual_a, actual_b = f.backward(equilibrium)
    assert relative(actual_a, grad_a) < 1e-11, f"residual {residual:.1e}"
    assert relative(actual_b, grad_b) < 1e-11, f"residual {residual:.1e}"


@pytest.mark.parametrize("train", [False, True])
def test_gradcheck(train: bool) -> None:
    deq = DEQ(EXACT, ImplicitGradient(EXACT)).train(train)
    weight = (0.4 * torch.randn(4, 4, dtype=torch.float64)).requires_grad_()
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def layer(weight: Tensor, x: Tensor) -> Tensor:
        equilibrium = deq(lambda z: (torch.tanh(z[0] @ weight + x),), (torch.zeros_like(x),))
        assert equilibrium.stats.residual.max() < 1e-12
        return equilibrium.state[0]

    assert torch.autograd.gradcheck(layer, (weight, x))


def test_gradcheck_of_several_tensors() -> None:
    """Two branches of different rank that see each other."""
    deq = DEQ(EXACT, ImplicitGradient(EXACT))
    weight = (0.3 * torch.randn(3, 4, dtype=torch.float64)).requires_grad_()
    x = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)

    def layer(weight: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        def f(z: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return torch.tanh(0.3 * z[0] + x + (z[1] @ weight.mT).unsqueeze(2)), torch.sin(z[0].sum(2) @ weight)

        return deq(f, (torch.zeros_like(x), x.new_zeros(2, 4))).state

    assert torch.autograd.gradcheck(layer, (weight, x))


@pytest.mark.parametrize("tol", [1e-3, 1e-6, 1e-9])
def test_the_error_follows_the_backward_residual(tol: float) -> None:
    f = Affine()
    _, _, grad_b = f.closed_form()
    equilibrium = f.solve(ImplicitGradient(Broyden(tol=tol, max_steps=100)))
    _, actual = f.backward(equilibrium)
    (stats,) = equilibrium.backward_stats
    residual = float(stats.residual.max())
    assert residual < tol
    assert relative(actual, grad_b) < 1 / (1 - 0.8) * residual * 1.01, f"residual {residual:.1e}"


def test_one_phantom_step_is_jacobian_free() -> None:
    """One undamped step: the gradient of f at z*, with z* held."""
    f = Affine()
    equilibrium = f.solve(PhantomGradient(1, 1.0))
    grads = f.backward(equilibrium)
    (f_z,) = f((equilibrium.state[0].detach(),))
    expected = torch.autograd.grad(f_z, (f.a, f.b), f.upstream)
    assert torch.equal(grads[0], expected[0])
    assert torch.equal(grads[1], expected[1])


@pytest.mark.parametrize(("num_steps", "damping"), [(1, 0.5), (3, 1.0), (4, 0.3)])
def test_phantom_steps_are_a_neumann_series(num_steps: int, damping: float) -> None:
    """dL/db = damping * sum_k ((1 - damping) I + damping A^T)^k dL/dz."""
    f = Affine()
    _, actual = f.backward(f.solve(PhantomGradient(num_steps, damping), train=True))
    step = (1 - damping) * torch.eye(6, dtype=torch.float64) + damping * f.a.detach()
    expected = sum(damping * f.upstream @ torch.linalg.matrix_power(step, k) for k in range(num_steps))
    assert relative(actual, expected) < 1e-13


# What the modes return


@pytest.mark.parametrize("gradient", [ImplicitGradient(), PhantomGradient()])
def test_eval_returns_the_solution(gradient: Any) -> None:
    """Bit for bit, with and without a gradient."""
    f = Affine()
    loose = Broyden(tol=1e-2)
    deq = DEQ(loose, gradient).eval()
    z_star, _ = loose(lambda z: f((z,))[0], f.zeros[0])
    with torch.no_grad():
        without = deq(f, f.zeros).state[0]
    with_gradient = deq(f, f.zeros).state[0]
    assert torch.equal(without, z_star)
    assert torch.equal(with_gradient, z_star)
    assert with_gradient.requires_grad
    assert not without.requires_grad
    with_gradient.sum().backward()
    assert f.a.grad.norm() > 0
    assert f.b.grad.norm() > 0


@pytest.mark.parametrize("enabled", [False, True])
def test_train_returns_the_last_step(enabled: bool) -> None:
    """f(z*) for the implicit gradient, the last damped step for the phantom one, with and without a gradient."""
    f = Affine()
    loose = Broyden(tol=1e-2)
    z_star, _ = loose(lambda z: f((z,))[0], f.zeros[0])
    with torch.no_grad():
        image = f((z_star,))[0]
    with torch.set_grad_enabled(enabled):
        implicit = DEQ(loose, ImplicitGradient()).train()(f, f.zeros).state[0]
        phantom = DEQ(loose, PhantomGradient(1, 0.25)).train()(f, f.zeros).state[0]
    assert torch.equal(implicit, image)
    torch.testing.assert_close(phantom, 0.75 * z_star + 0.25 * image, rtol=1e-14, atol=0)
    assert implicit.requires_grad == phantom.requires_grad == enabled


# The backward solve


def test_backward_statistics() -> None:
    f = Affine()
    equilibrium = f.solve(ImplicitGradient(EXACT))
    assert equilibrium.backward_stats == []
    f.backward(equilibrium)
    (stats,) = equilibrium.backward_stats
    assert stats.converged.all()
    assert stats.status.shape == (3,)
    assert stats.residual.max() < 1e-13
    assert f.solve(PhantomGradient()).backward_stats == []


def test_failure_of_the_backward_solve_is_data() -> None:
    f = Affine()
    equilibrium = f.solve(ImplicitGradient(Broyden(tol=1e-12, max_steps=2)))
    grads = f.backward(equilibrium)
    (stats,) = equilibrium.backward_stats
    assert stats.status.tolist() == [SolveStatus.MAX_STEPS] * 3
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_nonfinite_upstream_gradient_stays_nonfinite(value: float) -> None:
    """It is not zeroed, so that a gradient scaler sees it; the other samples have their gradient."""
    f = Affine()
    _, _, grad_b = f.closed_form()
    f.upstream[1, 2] = value
    equilibrium = f.solve(ImplicitGradient(EXACT))
    _, actual = f.backward(equilibrium)
    assert not actual[1].isfinite().any()
    assert relative(actual[[0, 2]], grad_b[[0, 2]]) < 1e-11
    assert equilibrium.backward_stats[0].status[1] == SolveStatus.NONFINITE


@pytest.mark.parametrize("row", [None, 1])
def test_zero_upstream_gradient(row: int | None) -> None:
    """Zero in, zero out, without a step; other samples are not touched by it."""
    f = Affine()
    f.upstream[slice(None) if row is None else row] = 0
    _, _, grad_b = f.closed_form()
    equilibrium = f.solve(ImplicitGradient(EXACT))
    _, actual = f.backward(equilibrium)
    (stats,) = equilibrium.backward_stats
    assert stats.converged.all()
    zero = (f.upstream == 0).all(dim=1)
    assert (stats.num_steps[zero] == 0).all()
    assert (stats.num_steps[~zero] > 0).all()
    assert (actual[zero] == 0).all()
    if row is not None:
        assert relative(actual, grad_b) < 1e-11


def test_the_gradient_scales_with_the_loss() -> None:
    """Exactly, by powers of two: the backward solve stops alike at every scale."""
    f = Affine()
    gradient = ImplicitGradient(Broyden(tol=1e-2))
    one = f.backward(f.solve(gradient))
    for scale in (2.0**-60, 1024.0):
        scaled = f.backward(f.solve(gradient), scale=scale)
        assert torch.equal(scaled[0], scale * one[0])
        assert torch.equal(scaled[1], scale * one[1])


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e25])
def test_gradients_whose_squares_leave_the_range_of_float32(scale: float) -> None:
    z = torch.ones(2, 3, requires_grad=True)
    eq = DEQ(Picard(tol=1e-6), ImplicitGradient(Picard(tol=1e-6)))(lambda s: (0.5 * s[0] + z,), (torch.zeros(2, 3),))
    (scale * eq.state[0]).sum().backward()
    assert z.grad is not None
    assert (z.grad.double() / (2 * scale) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("stop_mode", ["rel", "abs"])
@pytest.mark.parametrize("solver", [Broyden, Anderson, Picard])
def test_the_backward_residual_is_relative_to_the_right_hand_side(solver: type, stop_mode: Any) -> None:
    """Relative to u it would be small where I - J is nearly singular and u, right or wrong, is long."""
    rows = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))[0]
    radii = torch.tensor([1.05, *torch.linspace(-0.5, 0.5, 11).tolist()], dtype=torch.float64)
    a, b = rows @ torch.diag(radii) @ rows.mT, torch.randn(8, 12, dtype=torch.float64, requires_grad=True)
    gradient = ImplicitGradient(solver(tol=1e-3, max_steps=40, stop_mode=stop_mode))
    eq = DEQ(EXACT, gradient)(lambda z: (z[0] @ a.mT + b,), (torch.zeros_like(b),))
    w = torch.randn_like(b)
    (w * eq.state[0]).sum().backward()
    assert b.grad is not None
    (stats,) = eq.backward_stats
    residual = (b.grad @ a + w - b.grad).norm(dim=1) / w.norm(dim=1)
    assert torch.allclose(residual.detach(), stats.residual, rtol=1e-6)
    assert stats.converged.all() == (solver is not Picard)
    assert (residual[stats.converged] < 1e-3).all()


def test_a_backward_solver_with_a_constructor_of_its_own() -> None:
    class Own(Broyden):
        def __init__(self, tol: float) -> None:
            super().__init__(tol=tol, max_steps=100)

    f = Affine()
    _, grad_b = f.backward(f.solve(ImplicitGradient(Own(1e-10))))
    assert relative(grad_b, f.closed_form()[2]) < 1e-8


def test_a_frozen_map_needs_no_backward_solve() -> None:
    class Frozen(Affine):
        def tensors(self) -> list[Tensor]:
            return [self.a, self.b]

    f = Frozen()
    assert f.solve(ImplicitGradient()).state[0].requires_grad
    for x in f.tensors():
        x.requires_grad_(False)
    assert not f.solve(ImplicitGradient()).state[0].requires_grad
    plain = torch.no_grad()(Affine())
    assert not DEQ(EXACT, ImplicitGradient())(plain, (torch.zeros(3, 6, dtype=torch.float64),)).state[0].requires_grad


def test_absolute_tolerance_of_a_tiny_gradient() -> None:
    """It is in units of the incoming gradient, so that a mean over a large batch does not pass for converged."""
    f = Affine()
    _, _, grad_b = f.closed_form()
    gradient = ImplicitGradient(Broyden(tol=1e-8, stop_mode="abs", max_steps=100))
    equilibrium = f.solve(gradient)
    _, actual = f.backward(equilibrium, scale=1e-12)
    (stats,) = equilibrium.backward_stats
    residual = float(stats.residual.max())
    assert residual < 1e-8
    assert relative(actual, 1e-12 * grad_b) < 5.1e-8, f"residual {residual:.1e}"


def test_backward_twice() -> None:
    f = Affine()
    equilibrium = f.solve(ImplicitGradient(EXACT))
    loss = (f.upstream * equilibrium.state[0]).sum()
    loss.backward(retain_graph=True)
    once = f.a.grad.clone()
    loss.backward()
    assert torch.equal(f.a.grad, 2 * once)
    assert len(equilibrium.backward_stats) == 2
    assert torch.equal(equilibrium.backward_stats[0].trace, equilibrium.backward_stats[1].trace)


def test_double_backward() -> None:
    """Said clearly for the implicit gradient; a long phantom one has it."""
    a = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    b = torch.ones(1, 1, dtype=torch.float64)

    def first(gradient: Any) -> Tensor:
        z = DEQ(EXACT, gradient)(lambda z: (a * z[0] + b,), (torch.zeros_like(b),)).state[0]
        return torch.autograd.grad(z.sum(), a, create_graph=True)[0]

    with pytest.raises(RuntimeError, match=r"implicit gradient does not support double backward .*create_graph=True"):
        first(ImplicitGradient(EXACT))
    derivative = first(PhantomGradient(100, 1.0))
    assert derivative.item() == pytest.approx(4.0, rel=1e-12)  # z = 1 / (1 - a)
    assert torch.autograd.grad(derivative, a)[0].item() == pytest.approx(16.0, rel=1e-12)


def test_a_map_that_ignores_the_state() -> None:
    """f(z) = 2 x has J = 0, and the gradient of its fixed point is that of f."""
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    equilibrium = DEQ(EXACT, ImplicitGradient(EXACT))(lambda z: (2 * x,), (torch.zeros_like(x),))
    equilibrium.state[0].sum().backward()
    assert (x.grad == 2).all()
    assert equilibrium.backward_stats[0].converged.all()


# Cost


@pytest.mark.parametrize(
    ("train", "enabled", "extra"), [(True, True, 1), (True, False, 1), (False, True, 1), (False, False, 0)]
)
def test_evaluations(train: bool, enabled: bool, extra: int) -> None:
    """One evaluation of f beside the solve carries the gradient, and backward makes none."""
    f = Affine()
    with torch.set_grad_enabled(enabled):
        equilibrium = f.solve(ImplicitGradient(EXACT), train=train)
    assert f.calls == equilibrium.stats.nfe + extra
    if enabled:
        f.backward(equilibrium)
        assert f.calls == equilibrium.stats.nfe + extra


@pytest.mark.parametrize("gradient", [ImplicitGradient(EXACT), PhantomGradient(2)])
@pytest.mark.parametrize("backward", [False, True])
def test_nothing_is_kept(gradient: Any, backward: bool) -> None:
    """All memory of a solve goes with its result: no reference cycle waits for the garbage collector."""
    f = Affine()
    gc.collect()
    gc.disable()
    try:
        equilibrium = f.solve(gradient)
        if backward:
            f.backward(equilibrium)
        alive = weakref.ref(f), weakref.ref(equilibrium.state[0])
        stats = equilibrium.stats, equilibrium.backward_stats  # may be kept: they hold no iterate and no graph
        del equilibrium, f
        assert [ref() for ref in alive] == [None, None]
        assert stats[0] is not None
    finally:
        gc.enable()


# Construction


def test_build_gradient() -> None:
    spec = {"name": "implicit", "solver": {"name": "broyden", "max_steps": 20}}
    assert build_gradient(spec) == ImplicitGradient(Broyden(max_steps=20))
    assert spec == {"name": "implicit", "solver": {"name": "broyden", "max_steps": 20}}
    assert build_gradient({"name": "phantom", "num_steps": 3}) == PhantomGradient(3)
    gradient = PhantomGradient()
    assert build_gradient(gradient) is gradient
    with pytest.raises(ValueError, match=r"unknown gradient 'adjoint'; valid names: implicit, phantom"):
        build_gradient({"name": "adjoint"})
    with pytest.raises(ValueError, match=r"unknown solver 'newton'"):
        build_gradient({"name": "implicit", "solver": {"name": "newton"}})
    with pytest.raises(TypeError, match="num_step"):
        build_gradient({"name": "phantom", "num_step": 3})
    with pytest.raises(ValueError, match=r"expected a gradient estimator or .*, got <class .*PhantomGradient'>"):
        build_gradient(PhantomGradient)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(num_steps=0), "num_steps must be >= 1, got 0"),
        (dict(damping=0.0), r"damping must be in \(0, 1\], got 0.0"),
        (dict(damping=1.1), r"damping must be in \(0, 1\], got 1.1"),
    ],
)
def test_bad_phantom_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PhantomGradient(**settings)


# The Jacobian


def test_frobenius_norm_of_a_diagonal_map() -> None:
    """Standard error over the 4 x 5 x 500 squared probes: sqrt(2 / 2000) per entry."""
    c = torch.tensor([0.1, 0.5, 1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    estimate = jacobian_frobenius(lambda z: c * z, torch.randn(4, 5, dtype=torch.float64), num_probes=500)
    (grad,) = torch.autograd.grad(estimate, c)
    value = float(estimate.detach())
    assert value == pytest.approx(float(c.detach().square().mean()), rel=0.08)
    assert float((grad * c.detach()).sum()) == pytest.approx(2 * value, rel=1e-12)  # homogeneous of degree 2
    torch.testing.assert_close(grad, 2 * c.detach() / 5, rtol=0.12, atol=0)


def test_frobenius_norm_of_an_explicit_jacobian() -> None:
    weight = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    z = torch.randn(3, 6, dtype=torch.float64)

    def f(z: Tensor) -> Tensor:
        return torch.tanh(z @ weight)

    exact = torch.stack([torch.autograd.functional.jacobian(f, row) for row in z]).square().sum() / z.numel()
    estimate = jacobian_frobenius(f, z, num_probes=600)
    assert float(estimate.detach()) == pytest.approx(float(exact.detach()), rel=0.08)


def test_frobenius_probes() -> None:
    """It does not depend on z where f is linear, averages over probes, and has a graph only where one is wanted."""
    c = torch.full((3,), 2.0, dtype=torch.float64, requires_grad=True)
    z = torch.ones(2, 3, dtype=torch.float64)
    torch.manual_seed(1)
    probes = torch.stack([torch.randn_like(z) for _ in range(2)])
    torch.manual_seed(1)
    estimate = jacobian_frobenius(lambda z: c * z, z, num_probes=2)
    assert estimate.item() == pytest.approx(4 * float(probes.square().mean()), rel=1e-14)
    assert estimate.requires_grad
    with torch.no_grad():
        assert not jacobian_frobenius(lambda z: c * z, z).requires_grad
    with pytest.raises(ValueError, match="num_probes must be >= 1, got 0"):
        jacobian_frobenius(lambda z: c * z, z, num_probes=0)


def matrix_of(eigenvalues: list[complex], shear: float) -> Tensor:
    """Return a real non-normal matrix with these eigenvalues; a complex one stands for its pair."""
    blocks = [
        torch.tensor([[v.real, -v.imag], [v.imag, v.real]]) if v.imag else torch.tensor([[v.real]])
        for v in map(complex, eigenvalues)
    ]
    matrix = torch.block_diag(*blocks).double()
    basis = torch.eye(len(matrix), dtype=torch.float64) + shear * torch.randn_like(matrix)
    return basis @ matrix @ basis.inverse()


@pytest.mark.parametrize(
    ("eigenvalues", "radius"),
    [
        ([0.9 * complex(0.6, 0.8), 0.5, -0.3, 0.1], 0.9),
        ([complex(0, 0.9), -0.6], 0.9),
        ([-0.7, 0.4, 0.1], 0.7),
        ([1.5, complex(0.3, 0.3)], 1.5),
    ],
)
def test_spectral_radius(eigenvalues: list[complex], radius: float) -> None:
    """Also of a dominant complex pair, where the growth of one step says little."""
    matrix = matrix_of(eigenvalues, shear=0.2)
    estimate = spectral_radius(lambda z: z @ matrix.mT, torch.randn(4, len(matrix), dtype=torch.float64))
    assert estimate.shape == (4,)
    assert estimate.tolist() == pytest.approx([radius] * 4, rel=0.015)


def test_spectral_radius_per_sample() -> None:
    scale = torch.tensor([[0.0], [0.25], [0.9], [3.0]], dtype=torch.float64)
    radius = spectral_radius(lambda z: scale * z, torch.randn(4, 3, dtype=torch.float64))
    assert radius.tolist() == pytest.approx([0.0, 0.25, 0.9, 3.0], rel=1e-12)
    assert not radius.requires_grad


def test_spectral_radius_of_a_nilpotent_map() -> None:
    shift = torch.diag(torch.ones(3, dtype=torch.float64), 1)
    assert spectral_radius(lambda z: z @ shift, torch.randn(2, 4, dtype=torch.float64)).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="num_iters must be >= 2, got 1"):
        spectral_radius(lambda z: z @ shift, torch.randn(2, 4, dtype=torch.float64), num_iters=1)


def test_jacobian_of_a_map_that_ignores_the_state() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    assert float(jacobian_frobenius(lambda z: 2 * x, torch.zeros(2, 3))) == 0
    assert spectral_radius(lambda z: 2 * x, torch.zeros(2, 3)).tolist() == [0.0, 0.0]


def test_spectral_radius_of_a_state() -> None:
    """`DEQ.spectral_radius` takes states, also of several tensors and in bfloat16; no gradient mode is needed."""
    state = (torch.zeros(2, 3), torch.zeros(2, 2, 4, 4))
    with torch.no_grad():
        radius = DEQ.spectral_radius(lambda z: (0.5 * z[0], -0.8 * z[1]), state)
        half = DEQ.spectral_radius(lambda z: tuple(0.5 * x for x in z), tuple(x.bfloat16() for x in state))
    assert radius.tolist() == pytest.approx([0.8, 0.8], rel=1e-5)
    assert half.dtype == torch.float32
    assert half.tolist() == pytest.approx([0.5, 0.5], rel=1e-2)


class Counted(torch.autograd.Function):
    """The identity, which notes every backward pass through it in a list."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, passes: list[int]) -> Tensor:
        ctx.passes = passes
        return z.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.passes.append(1)
        return grad, None


@pytest.mark.parametrize("steps", [3, 7])
def test_the_first_backward_evaluation_is_known(steps: int) -> None:
    """From zero it is J^T 0 + dL/dz: k steps cost k products with the Jacobian, and one more for what f closes over."""
    x, passes = torch.randn(2, 5, dtype=torch.float64, requires_grad=True), []
    deq = DEQ(Broyden(tol=1e-10), ImplicitGradient(Broyden(max_steps=steps, tol=0.0)))
    eq = deq(lambda z: (torch.tanh(0.5 * Counted.apply(z[0], passes) + x),), (torch.zeros_like(x),))
    eq.state[0].sum().backward()
    assert len(passes) == steps + 1
    assert eq.backward_stats[0].nfe == steps


@pytest.mark.parametrize("solver", [Broyden(max_steps=9, tol=0.0), Anderson(max_steps=9, tol=0.0)])
def test_a_known_first_evaluation_changes_nothing_else(solver: FixedPointSolver) -> None:
    matrix = torch.randn(6, 6, dtype=torch.float64) / 5
    z0, b = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)

    def fn(z: Tensor) -> Tensor:
        return z @ matrix + b

    z, stats, _ = solver.solve(fn, z0)
    known, known_stats, _ = solver.solve(fn, z0, f0=fn(z0))
    assert torch.equal(z, known)
    assert torch.equal(stats.trace, known_stats.trace)
    assert known_stats.nfe == stats.nfe - 1


def test_diagnostics_under_inference_mode() -> None:
    """They need a graph of their own, which no surrounding mode may take away: zeros would pass for a contraction."""
    with torch.inference_mode():
        z = torch.zeros(2, 3)
        assert spectral_radius(lambda z: -0.5 * z, z).tolist() == pytest.approx([0.5, 0.5], rel=1e-6)
        assert jacobian_frobenius(lambda z: -0.5 * z, z) > 0


def test_diagnostics_of_a_model_under_inference_mode() -> None:
    """f is then made of tensors that autograd refuses."""
    model = timm.create_model("test_mdeq", dropout=0.1, solver=Broyden(max_steps=2)).train()
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        eq = model.solve(x, jacobian_probes=1)
        assert eq.jacobian_penalty > 0
        assert (DEQ.spectral_radius(model.equilibrium.fn(model.injection(x)), eq.state, 4) > 0).all()


@pytest.mark.parametrize("settings", [{}, dict(history=4), dict(history_dtype="bfloat16")], ids=str)
def test_warm_start_of_the_backward_solve(settings: dict[str, Any]) -> None:
    """It starts nearer to the solution, ends at the same one, and takes fewer steps."""
    f = Affine(radius=0.9, batch=4, dim=20)
    forward = Broyden(tol=1e-10, max_steps=80, **settings)
    results = {}
    for warm in (False, True):
        deq = DEQ(forward, ImplicitGradient(Broyden(tol=1e-10, max_steps=80), warm_start=warm))
        eq = deq(f, f.zeros)
        grads = f.backward(eq)
        results[warm] = (eq.backward_stats[0], grads)
    for actual, expected in zip(results[True][1], f.closed_form()[1:]):
        assert relative(actual, expected) < 1e-8
    cold, warm = results[False][0], results[True][0]
    assert (warm.trace[0] < 0.9 * cold.trace[0]).all()
    assert warm.num_steps.sum() < cold.num_steps.sum()


def test_the_transposed_inverse_is_that_of_the_textbook_update() -> None:
    """Good Broyden's inverse, built as a matrix from the same steps, sample by sample."""
    f = Affine(radius=0.9, batch=3, dim=8)
    iterates = []

    def recorded(z: Tensor) -> Tensor:
        iterates.append(z)
        return f((z,))[0]

    solver = Broyden(tol=0.0, max_steps=6)
    with torch.no_grad():
        _, stats, memory = solver.solve(recorded, f.zeros[0])
        actual = solver.inverse_transposed(solver.secants(memory), stats, f.upstream)
        for i in range(3):
            inverse = -torch.eye(8, dtype=torch.float64)
            points = [z[i] for z in iterates[:6]]  # the last step's own update has no direction after it
            images = [f((z,))[0][i] for z in iterates[:6]]
            for k in range(5):
                dz = points[k + 1] - points[k]
                dg = (images[k + 1] - points[k + 1]) - (images[k] - points[k])
                h_dg = inverse @ dg
                inverse = inverse + torch.outer(dz - h_dg, dz @ inverse) / (dz @ h_dg)
            assert relative(actual[i], -inverse.mT @ f.upstream[i]) < 1e-9


def test_a_warm_start_keeps_a_failed_sample_apart() -> None:
    """Sample 0 leaves the domain of its logarithm after a step; what Broyden holds of it then is not finite."""
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    b = torch.tensor([[-3.0], [1.0]], dtype=torch.float64)

    def f(z: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (weight * torch.log(2 + z[0]) + b,)

    found = []
    for warm in (False, True):
        deq = DEQ(Broyden(tol=1e-10, max_steps=50), ImplicitGradient(Broyden(tol=1e-10, max_steps=50), warm_start=warm))
        eq = deq(f, (torch.zeros_like(b),))
        assert eq.stats.status.tolist() == [SolveStatus.NONFINITE, SolveStatus.CONVERGED]
        found.append(torch.autograd.grad(eq.state[0][1].sum(), weight)[0])
    assert torch.isfinite(found[0])
    torch.testing.assert_close(found[1], found[0])


def test_a_warm_start_is_let_go_of_in_backward() -> None:
    """The solver's memory does not live as long as the loss."""
    f = Affine()
    histories = []

    class Watched(Broyden):
        def init(self, z0: Tensor) -> Any:
            memory = super().init(z0)
            histories.append(weakref.ref(memory.d.untyped_storage()))
            return memory

    loss = DEQ(Watched(), ImplicitGradient(Broyden(), warm_start=True))(f, f.zeros).state[0].sum()
    gc.collect()
    assert all(history() is not None for history in histories)
    loss.backward(retain_graph=True)
    loss.backward()
    gc.collect()
    assert all(history() is None for history in histories)


@pytest.mark.parametrize("solver", [Anderson(tol=1e-9, max_steps=60), Picard(tol=1e-9, max_steps=200)], ids=str)
def test_a_warm_start_from_nothing_is_a_cold_one(solver: FixedPointSolver) -> None:
    """With no evaluation for it, no memory kept, and samples that leave the batch."""
    f, found = Affine(), []
    for warm in (False, True):
        eq = DEQ(solver, ImplicitGradient(EXACT, warm_start=warm))(f, f.zeros)
        grads = f.backward(eq)
        found.append((eq.stats.nfe, eq.backward_stats[0].nfe, *grads))
    for cold, warm in zip(*found):
        assert torch.equal(torch.as_tensor(cold), torch.as_tensor(warm))


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("scale", [1, 3000])
def test_implicit_in_float16(warm: bool, scale: float) -> None:
    """Also of a gradient whose norm, 94868 for the larger scale, float16 does not hold."""
    torch.manual_seed(0)
    b = torch.randn(2, 1000).half().requires_grad_()
    estimator = ImplicitGradient(Broyden(tol=1e-2), warm_start=warm)
    solver = Broyden(tol=1e-2, line_search=2)
    z, _, record = estimator.solve(lambda z: 0.5 * z + b, torch.zeros_like(b), solver, training=True)
    z.backward(torch.full_like(z, scale))
    assert record[0].converged.all()
    torch.testing.assert_close(b.grad, torch.full_like(b, 2 * scale), rtol=2e-2, atol=0)


def test_a_warm_start_takes_any_memory() -> None:
    """Of a solver of one's own, which says what of it is kept until backward."""
    f, seen = Affine(), []

    class Own(Picard):
        def init(self, z0: Tensor) -> dict[str, Tensor]:
            return {"start": z0}

        def secants(self, memory: dict[str, Tensor]) -> tuple[Tensor, ...]:
            return (memory["start"],)

        def inverse_transposed(self, secants: tuple[Tensor, ...], stats: SolveStats, w: Tensor) -> Tensor:
            seen.extend(secants)
            return w

    eq = DEQ(Own(tol=1e-12, max_steps=200), ImplicitGradient(EXACT, warm_start=True))(f, f.zeros)
    grad_a, _ = f.backward(eq)
    assert len(seen) == 1
    assert torch.equal(seen[0], f.zeros[0])
    assert relative(grad_a, f.closed_form()[1]) < 1e-9


def test_a_warm_start_keeps_every_sample_in_the_batch() -> None:
    """Of a map with `take`: samples that finish early stay in the batch, or the memory would be of others."""
    batch, dim = 4, 10
    a = contraction(torch.tensor([1e-4, 0.9, 1e-4, 0.95]), dim)
    b = torch.randn(batch, dim, dtype=torch.float64, requires_grad=True)
    system = torch.eye(dim, dtype=torch.float64) - a

    class Map:
        def __init__(self, a: Tensor, b: Tensor) -> None:
            self.a, self.b = a, b

        def __call__(self, z: Any) -> Any:
            return (affine_rule(z[0], self.a, self.b),)

        def take(self, index: Tensor) -> "Map":
            return Map(self.a[index], self.b[index])

    solver = Broyden(tol=1e-10, max_steps=60)
    forward = Broyden(tol=1e-3, max_steps=4)  # which the two slow samples use up together
    eq = DEQ(forward, ImplicitGradient(solver, warm_start=True))(Map(a, b), (torch.zeros_like(b),))
    assert eq.stats.converged.tolist() == [True, False, True, False]
    eq.state[0].sum().backward()
    torch.testing.assert_close(b.grad, torch.linalg.solve(system.mT, torch.ones_like(b)), rtol=1e-7, atol=1e-8)
