"""The reversible gradient, against autograd through the same iteration written out."""

import gc
import warnings
import weakref
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from mdeq import DEQ, Broyden, PhantomGradient, Picard, ReversibleGradient, SolveStatus, build_gradient


class Tanh:
    """f(z) = tanh(A z + b) over a tuple of one tensor; A a leaf, b what a layer gave."""

    def __init__(self, batch: int = 4, dim: int = 5, dtype: torch.dtype = torch.float64) -> None:
        self.a = (torch.randn(dim, dim, dtype=dtype) / dim**0.5).requires_grad_()
        self.weight = torch.randn(dim, dtype=dtype, requires_grad=True)
        self.b = torch.randn(batch, dim, dtype=dtype) * self.weight  # no leaf
        self.upstream = torch.randn(batch, dim, dtype=dtype)

    def __call__(self, z: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (torch.tanh(z[0] @ self.a.mT + self.b),)

    def tensors(self) -> list[Tensor]:
        return [self.a, self.b]

    def take(self, index: Tensor) -> "Tanh":
        part = object.__new__(type(self))
        part.a, part.b = self.a, self.b[index]
        return part

    def grads(self, z: Tensor) -> list[Tensor]:
        loss = (self.upstream * z).sum()
        return list(torch.autograd.grad(loss, (self.a, self.weight), retain_graph=True))

    def written_out(self, steps: Tensor, beta: float) -> Tensor:
        """Return z after as many coupled steps as each sample took."""
        y = z = torch.zeros_like(self.b)
        rows = [z]
        for _ in range(int(steps.max())):
            y = (1 - beta) * y + beta * self((z,))[0]
            z = (1 - beta) * z + beta * self((y,))[0]
            rows.append(z)
        return torch.stack(rows)[steps, torch.arange(len(steps))]


def difficult() -> Tanh:
    """An f that neither contracts nor expands, but for tanh: the error of a reversal grows fast."""
    f = Tanh(16, 64)
    f.a = torch.linalg.qr(f.a.detach())[0].requires_grad_()
    return f


@pytest.mark.parametrize("beta", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("train", [False, True])
def test_equals_autograd_through_the_iteration(beta: float, train: bool) -> None:
    f = Tanh()
    solver = Broyden(tol=0.0, max_steps=6, divergence_factor=1e9)
    rounding = torch.finfo(torch.float64).eps * ((1 + beta) / (1 - beta)) ** 12  # per state, two states a step
    eq = DEQ(solver, ReversibleGradient(beta)).train(train)(f, (torch.zeros_like(f.b),))
    best = eq.stats.trace[1:].argmin(dim=0) + 1
    expected = f.written_out(best, beta)
    torch.testing.assert_close(eq.state[0], expected, rtol=1e-10, atol=1e-12)
    for actual, exact in zip(f.grads(eq.state[0]), f.grads(expected)):
        torch.testing.assert_close(actual, exact, rtol=rounding, atol=rounding)


def test_samples_of_different_step_counts() -> None:
    f = Tanh(batch=8)
    f.a = (0.4 * f.a.detach()).requires_grad_()
    f.b = torch.linspace(0.01, 4, 8, dtype=torch.float64).unsqueeze(1) * f.b
    eq = DEQ(Broyden(tol=1e-5, max_steps=60), ReversibleGradient(0.5))(f, (torch.zeros_like(f.b),))
    assert eq.stats.converged.all()
    assert len(eq.stats.num_steps.unique()) > 2
    expected = f.written_out(eq.stats.num_steps, 0.5)
    torch.testing.assert_close(eq.state[0], expected, rtol=1e-10, atol=1e-12)
    for actual, exact in zip(f.grads(eq.state[0]), f.grads(expected)):
        torch.testing.assert_close(actual, exact, rtol=1e-6, atol=1e-8)


@pytest.mark.filterwarnings("ignore:in backward, the reversible iteration missed")
@pytest.mark.parametrize(("beta", "steps", "error"), [(0.8, 10, 2e-7), (0.8, 14, 4e-3), (0.5, 18, 3e-10)])
def test_the_error_that_the_documentation_states(beta: float, steps: int, error: float) -> None:
    f = difficult()
    eq = DEQ(Picard(tol=0.0, max_steps=steps), ReversibleGradient(beta, steps))(f, (torch.zeros_like(f.b),))
    expected = f.written_out(eq.stats.trace[1:].argmin(dim=0) + 1, beta)
    errors = [float((x - y).norm() / y.norm()) for x, y in zip(f.grads(eq.state[0]), f.grads(expected))]
    assert max(errors) < 3 * error  # another matrix, another rounding
    assert max(errors) > 1e-3 * error  # or the documentation is out of date


def test_single_precision_is_reversed_exactly_enough() -> None:
    f = Tanh(dtype=torch.float32)
    deq = DEQ(Picard(tol=0.0, max_steps=10), ReversibleGradient(0.8))
    eq = deq(f, (torch.zeros_like(f.b),))
    expected = f.written_out(eq.stats.trace[1:].argmin(dim=0) + 1, 0.8)
    for actual, exact in zip(f.grads(eq.state[0]), f.grads(expected)):
        torch.testing.assert_close(actual, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beta", [0.5, 0.8, 0.95])
def test_many_steps_are_exact_with_pairs_that_are_kept(beta: float) -> None:
    f = difficult()
    eq = DEQ(Picard(tol=0.0, max_steps=40), ReversibleGradient(beta))(f, (torch.zeros_like(f.b),))
    expected = f.written_out(eq.stats.trace[1:].argmin(dim=0) + 1, beta)
    for actual, exact in zip(f.grads(eq.state[0]), f.grads(expected)):
        assert float((actual - exact).norm() / exact.norm()) < 1e-6


def test_pairs_of_samples_that_leave_the_batch() -> None:
    """Kept pairs are those of the samples that are still on their way, wherever these lie in the batch."""
    f = Tanh(batch=8)
    f.a = (0.4 * f.a.detach()).requires_grad_()
    f.b = torch.linspace(4, 0.01, 8, dtype=torch.float64).unsqueeze(1) * f.b
    eq = DEQ(Broyden(tol=1e-9, max_steps=60), ReversibleGradient(0.5, 3))(f, (torch.zeros_like(f.b),))
    assert len(eq.stats.num_steps.unique()) > 2
    assert eq.stats.num_steps.max() > 9
    expected = f.written_out(eq.stats.num_steps, 0.5)
    for actual, exact in zip(f.grads(eq.state[0]), f.grads(expected)):
        torch.testing.assert_close(actual, exact, rtol=1e-11, atol=1e-12)


def test_a_reversal_that_goes_astray_says_so() -> None:
    f = difficult()
    eq = DEQ(Picard(tol=0.0, max_steps=40), ReversibleGradient(0.8, 40))(f, (torch.zeros_like(f.b),))
    with pytest.warns(UserWarning, match=r"lower ReversibleGradient's beta or store_every"):
        f.grads(eq.state[0])


@pytest.mark.parametrize("name", ["mdeq_tiny_cifar", "test_mdeq"])
def test_the_default_is_exact_at_the_default_steps_of_a_model(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4, dropout=0.0).train()
    x = torch.randn(2, 3, 32, 32)
    model.deq.gradient = ReversibleGradient()
    injection = model.injection(x).detach()
    z0 = model.equilibrium.cell.zero_state(injection)
    eq = model.deq(model.equilibrium.fn(injection), z0)
    parameters = [p for p in model.equilibrium.parameters() if p.requires_grad]
    own = torch.autograd.grad(sum(z.square().sum() for z in eq.state), parameters, allow_unused=True)
    fn = model.equilibrium.fn(injection)
    y = z = tuple(x.double() for x in z0)
    rows = [z]
    for _ in range(int(eq.stats.num_steps.max())):
        f_z = fn(tuple(x.float() for x in z))
        y = tuple(0.5 * a + 0.5 * b.double() for a, b in zip(y, f_z))
        f_y = fn(tuple(x.float() for x in y))
        z = tuple(0.5 * a + 0.5 * b.double() for a, b in zip(z, f_y))
        rows.append(z)
    best = eq.stats.trace[1:].argmin(dim=0) + 1
    state = [torch.stack([rows[k][i][b] for b, k in enumerate(best.tolist())]) for i in range(len(z0))]
    for found, written in zip(eq.state, state):
        torch.testing.assert_close(found, written.float(), rtol=1e-6, atol=1e-7)
    loss = sum(z.float().square().sum() for z in state)
    exact = torch.autograd.grad(loss, parameters, allow_unused=True)
    pairs = [(a, b) for a, b in zip(own, exact) if b is not None]
    error = sum(float((a - b).square().sum()) for a, b in pairs) / sum(float(b.square().sum()) for _, b in pairs)
    assert error**0.5 < 1e-2


def test_what_is_saved_does_not_grow_with_the_steps() -> None:
    f = Tanh()

    def saved(steps: int, every: int | None = None) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            DEQ(Picard(tol=0.0, max_steps=steps), ReversibleGradient(0.5, every))(f, (torch.zeros_like(f.b),))
        return sum(sizes)

    assert saved(2) == saved(6) == saved(100, 101) > 0
    one = saved(8) - saved(6)
    assert saved(100) == saved(6) + 14 * one  # a pair every 7 steps


def test_eval_is_the_same_with_and_without_gradients() -> None:
    f = Tanh()
    deq = DEQ(Picard(tol=1e-6), ReversibleGradient()).eval()
    with torch.no_grad():
        plain = deq(f, (torch.zeros_like(f.b),)).state[0]
    assert torch.equal(deq(f, (torch.zeros_like(f.b),)).state[0], plain)


@pytest.mark.parametrize("stop_mode", ["rel", "abs"])
def test_the_residual_is_that_of_the_state_returned(stop_mode: Any) -> None:
    f = Tanh(16)
    with torch.no_grad():
        eq = DEQ(Picard(tol=1e-4, max_steps=30, stop_mode=stop_mode), ReversibleGradient())(f, (torch.zeros_like(f.b),))
        (z,) = eq.state
        residual = (f((z,))[0] - z).norm(dim=1)
        residual = residual / (f((z,))[0].norm(dim=1) if stop_mode == "rel" else 1)
    assert eq.stats.converged.any()
    assert torch.allclose(residual, eq.stats.residual, rtol=1e-6)


def test_evaluations_are_counted() -> None:
    calls = []
    f = Tanh()
    original = Tanh.__call__

    class Counted(Tanh):
        def __call__(self, z: tuple[Tensor, ...]) -> tuple[Tensor]:
            calls.append(1)
            return original(self, z)

    f.__class__ = Counted
    eq = DEQ(Picard(tol=0.0, max_steps=5), ReversibleGradient(0.8))(f, (torch.zeros_like(f.b),))
    assert eq.stats.nfe == len(calls) == 12
    assert eq.stats.evaluations.tolist() == [12] * 4
    # A sample that stopped after 2 of 5 steps took part in 3 of 6 pairs of evaluations.
    part = replace(eq.stats, num_steps=torch.tensor([5, 2, 5, 5]))
    assert part.evaluations.tolist() == [12, 6, 12, 12]


def test_what_it_cannot_do_is_said() -> None:
    f = Tanh()
    with pytest.raises(ValueError, match=r"tensors\(\)"):
        DEQ(Picard(), ReversibleGradient())(lambda z: f(z), (torch.zeros_like(f.b),))
    with pytest.raises(ValueError, match="beta must be in"):
        ReversibleGradient(1.0)
    for every in (0, True, 2.0):
        with pytest.raises(ValueError, match="store_every must be"):
            ReversibleGradient(0.5, every)
    eq = DEQ(Picard(max_steps=3), ReversibleGradient())(f, (torch.zeros_like(f.b),))
    with pytest.raises(RuntimeError, match="does not support double backward"):
        torch.autograd.grad(eq.state[0].sum(), f.a, create_graph=True)


def test_a_bad_sample_does_not_touch_the_others() -> None:
    f = Tanh()
    f.b = f.b.clone()
    f.b[1] = float("nan")
    eq = DEQ(Picard(tol=1e-6, max_steps=50), ReversibleGradient(0.5))(f, (torch.zeros_like(f.b),))
    assert eq.stats.status[1] == SolveStatus.NONFINITE
    (grad,) = torch.autograd.grad((f.upstream * eq.state[0]).sum(), f.b)
    assert torch.isnan(grad[1]).all()
    assert torch.isfinite(grad[[0, 2, 3]]).all()


@pytest.mark.parametrize("bad", [[1], [0, 1, 2, 3]], ids=["one", "all"])
def test_a_failed_sample_shows_in_all_gradients(bad: list[int]) -> None:
    """Zeros, or none at all, would pass for gradients; relu is one whose derivative at nan is no nan."""

    class Relu(Tanh):
        def __call__(self, z: tuple[Tensor, ...]) -> tuple[Tensor]:
            return (torch.relu(z[0] @ self.a + self.b),)

    f = Relu()
    with torch.no_grad():
        f.b[bad] = float("nan")
    eq = DEQ(Picard(tol=1e-6, max_steps=5), ReversibleGradient(0.5))(f, (torch.zeros_like(f.b),))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing to say of how far a sample came back that went nowhere
        grad_a, grad_b = torch.autograd.grad((f.upstream * eq.state[0]).sum(), (f.a, f.b))
    assert torch.isnan(grad_a).all()
    good = [i for i in range(4) if i not in bad]
    assert torch.isnan(grad_b[bad]).all()
    assert torch.isfinite(grad_b[good]).all()


def test_a_model_trains_with_it() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_mdeq", gradient={"name": "reversible", "beta": 0.5}, solver=Picard(max_steps=4))
    model.double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)

    def grads(gradient: Any) -> dict[str, Tensor]:
        model.deq.gradient = gradient
        model.train().zero_grad()
        model(x).square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    own = grads(build_gradient({"name": "reversible", "beta": 0.5}))
    assert all(torch.isfinite(g).all() for g in own.values())
    # The same iteration, its steps kept: a coupled solver that autograd looks through.
    written_out = grads(_WrittenOut(0.5, 4))
    for name, grad in own.items():
        error = float((grad - written_out[name]).norm() / written_out[name].norm())
        assert error < 1e-5, f"{name}: {error}"  # f is no contraction here, and reversal amplifies


class _WrittenOut(nn.Module):
    """The coupled iteration with ordinary backpropagation, as a gradient estimator."""

    def __init__(self, beta: float, steps: int) -> None:
        super().__init__()
        self.beta, self.steps = beta, steps

    def solve(self, fn: Any, z0: Tensor, solver: Any, *, training: bool) -> Any:
        _, stats, _ = PhantomGradient().solve(fn, z0, solver, training=training)
        reversible = ReversibleGradient(self.beta).solve(fn, z0, solver, training=training)[1]
        best = reversible.trace[1:].argmin(dim=0) + 1
        y, z, rows = z0, z0, [z0]
        for _ in range(self.steps):
            y = y + self.beta * (fn(z) - y)
            z = z + self.beta * (fn(y) - z)
            rows.append(z)
        return torch.stack(rows)[best, torch.arange(len(best))], stats, []


def test_a_start_at_the_equilibrium_has_no_gradient() -> None:
    """No step was taken that could be differentiated; zero would pass for a gradient, where one is due."""
    torch.manual_seed(0)
    f = Tanh()
    deq = DEQ(Broyden(tol=1e-3), ReversibleGradient())
    state = DEQ(Broyden(tol=1e-9, max_steps=90), PhantomGradient())(f, (torch.zeros_like(f.b),)).state[0].detach()
    start = torch.cat((state[:1], torch.zeros_like(state[1:])))
    f.b = f.b.detach().requires_grad_()
    eq = deq(f, (start,))
    assert eq.stats.num_steps[0] == 0 < eq.stats.num_steps[1:].min()
    (grad,) = torch.autograd.grad(eq.state[0].sum(), f.b, retain_graph=True)
    assert torch.isnan(grad[0]).all()
    assert torch.isfinite(grad[1:]).all()
    (grad,) = torch.autograd.grad(eq.state[0][1:].sum(), f.b)  # none is due to the first
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("backward", [False, True])
def test_nothing_is_kept(backward: bool) -> None:
    """All of f goes with the result: no reference cycle waits for the garbage collector."""

    class Map:
        def __init__(self, bias: Tensor) -> None:
            self.bias = bias

        def __call__(self, z: Any) -> Any:
            return (torch.tanh(z[0] + self.bias),)

        def take(self, index: Tensor) -> "Map":
            return Map(self.bias[index])

        def tensors(self) -> list[Tensor]:
            return [self.bias]

    f = Map(torch.zeros(3, 4, requires_grad=True))
    gc.collect()
    gc.disable()
    try:
        equilibrium = DEQ(Picard(max_steps=3), ReversibleGradient())(f, (torch.ones(3, 4),))
        if backward:
            equilibrium.state[0].sum().backward()
        alive = weakref.ref(f)
        del equilibrium, f
        assert alive() is None
    finally:
        gc.enable()
