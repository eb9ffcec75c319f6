"""The equilibrium layer on small things: a line to be learnt, images, states of every shape, and every dtype."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mdeq import DEQ, Anderson, Broyden, ImplicitGradient, PhantomGradient, Picard, SolveStatus, State

TIGHT = Broyden(tol=1e-6, max_steps=50)


class TanhUnit(nn.Module):
    """y = readout(z*), z* = tanh(W z* + U x + b)."""

    def __init__(self, deq: DEQ, width: int = 8) -> None:
        super().__init__()
        self.deq = deq
        self.inner = nn.Linear(width, width)
        self.inject = nn.Linear(1, width)
        self.readout = nn.Linear(width, 1)
        nn.init.normal_(self.inner.weight, std=0.3 / width**0.5)

    def forward(self, x: Tensor, **kwargs: Any) -> tuple[Tensor, Any]:
        u = self.inject(x)
        equilibrium = self.deq(lambda z: (torch.tanh(self.inner(z[0]) + u),), (torch.zeros_like(u),), **kwargs)
        return self.readout(equilibrium.state[0]), equilibrium


def fit(unit: TanhUnit, steps: int, **kwargs: Any) -> list[float]:
    """Train a unit on x -> -x and return its losses."""
    optimizer = torch.optim.Adam(unit.parameters(), lr=0.02)
    losses = []
    for _ in range(steps):
        x = 2 * torch.rand(32, 1) - 1
        y, _ = unit(x, **kwargs)
        loss = (y + x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("gradient", [ImplicitGradient(Broyden(tol=1e-4)), PhantomGradient(5, 0.8)])
def test_learns_minus_x(gradient: Any) -> None:
    unit = TanhUnit(DEQ(Broyden(tol=1e-4), gradient))
    losses = fit(unit.train(), 120)
    assert losses[0] > 0.1
    x = torch.linspace(-1, 1, 21)[:, None]
    with torch.no_grad():
        y, equilibrium = unit.eval()(x)
    residual = float(equilibrium.stats.residual.max())
    assert equilibrium.stats.converged.all(), f"residual {residual:.1e}"
    assert (y + x).abs().max() < 0.1, f"residual {residual:.1e}"
    with torch.no_grad():
        tight, _ = unit(x, solver=TIGHT)
    assert (y - tight).abs().max() < 1e-2, "the answer depends on the solver"


def test_warm_up_then_equilibrium() -> None:
    """A shallow unrolled network and the equilibrium train the same parameters; the loss falls in both phases."""
    unit = TanhUnit(DEQ(TIGHT, ImplicitGradient(TIGHT))).train()
    warm = fit(unit, 30, unroll=3)
    trained = fit(unit, 60)
    assert sum(warm[-5:]) < 0.5 * sum(warm[:5])
    assert sum(trained[-5:]) < 0.5 * sum(trained[:5])


def test_unroll() -> None:
    """f applied n times with its ordinary gradient: no solve, no statistics."""
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    z0 = (torch.ones(2, 3, dtype=torch.float64),)
    equilibrium = DEQ(TIGHT, ImplicitGradient())(lambda z: (weight * z[0] + 1,), z0, unroll=3)
    assert equilibrium.stats is None
    assert equilibrium.jacobian_penalty is None
    assert (equilibrium.state[0] == 1.875).all()
    equilibrium.state[0].mean().backward()
    assert weight.grad is not None
    assert weight.grad.item() == pytest.approx(3 * 0.25 + 2 * 0.5 + 1)  # of w^3 + w^2 + w + 1
    assert equilibrium.backward_stats == []


# Plain maps


def test_identity() -> None:
    """Every point is a fixed point; the start is one."""
    z0 = (torch.randn(3, 4),)
    equilibrium = DEQ(TIGHT, ImplicitGradient())(lambda z: z, z0)
    assert torch.equal(equilibrium.state[0], z0[0])
    assert equilibrium.stats.num_steps.tolist() == [0, 0, 0]


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("gradient", [ImplicitGradient(), PhantomGradient(1, 1.0)])
def test_constant(gradient: Any, train: bool) -> None:
    """A map that ignores its state is solved in one step, and its gradient is that of an ordinary layer."""
    x = torch.randn(3, 4, requires_grad=True)
    equilibrium = DEQ(TIGHT, gradient).train(train)(lambda z: (x.sin(),), (torch.zeros_like(x),))
    torch.testing.assert_close(equilibrium.state[0], x.sin())
    assert equilibrium.stats.num_steps.tolist() == [1, 1, 1]
    equilibrium.state[0].sum().backward()
    torch.testing.assert_close(x.grad, x.detach().cos())


SHAPES = {
    "vector": [(5,)],
    "image": [(4, 6, 5)],
    "volume": [(2, 3, 4, 5)],
    "branches": [(4, 8, 8), (6, 4, 4)],
    "mixed": [(3, 4, 4), (7,), (2, 2, 2, 2)],
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("batch", [1, 4])
def test_states(shapes: list[tuple[int, ...]], batch: int) -> None:
    """z = 0.5 z + c has the answer 2 c, for tensors of any rank and number."""
    c = tuple(torch.randn(batch, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes)

    def f(z: State) -> State:
        return tuple(0.5 * x + y for x, y in zip(z, c, strict=True))

    deq = DEQ(Broyden(tol=1e-13), ImplicitGradient(Broyden(tol=1e-13)))
    equilibrium = deq(f, tuple(torch.zeros_like(x) for x in c))
    residual = float(equilibrium.stats.residual.max())
    for x, y in zip(equilibrium.state, c):
        torch.testing.assert_close(x, 2 * y, rtol=1e-11, atol=1e-11, msg=lambda m: f"{m} (residual {residual:.1e})")
    sum(x.sum() for x in equilibrium.state).backward()
    for y in c:
        torch.testing.assert_close(y.grad, torch.full_like(y, 2), rtol=1e-11, atol=0)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_convolution_and_group_norm(spatial_dims: int) -> None:
    """A convolutional unit on images and volumes: converged, the same alone and in a batch, gradients everywhere."""
    conv = (nn.Conv2d if spatial_dims == 2 else nn.Conv3d)(8, 8, 3, padding=1).double()
    norm = nn.GroupNorm(4, 8).double()
    with torch.no_grad():
        norm.weight.mul_(0.4)
    x = torch.randn(3, 8, *[6] * spatial_dims, dtype=torch.float64, requires_grad=True)
    deq = DEQ(Broyden(tol=1e-10, max_steps=80), ImplicitGradient(Broyden(tol=1e-10, max_steps=80)))

    def solve(x: Tensor) -> Any:
        return deq(lambda z: (norm(torch.relu(conv(z[0]) + x)),), (torch.zeros_like(x),))

    equilibrium = solve(x)
    assert equilibrium.stats.converged.all(), f"residual {float(equilibrium.stats.residual.max()):.1e}"
    for i in range(3):
        single = solve(x[i : i + 1])
        assert single.stats.num_steps[0] == equilibrium.stats.num_steps[i]
        assert (single.state[0][0] - equilibrium.state[0][i]).abs().max() < 1e-10
    (equilibrium.state[0] * torch.randn_like(x)).sum().backward()
    assert equilibrium.backward_stats[0].converged.all()
    for p in (x, *conv.parameters(), *norm.parameters()):
        assert p.grad is not None
        assert p.grad.norm() > 0


def test_take_reaches_the_solver() -> None:
    """A state map with `take` is evaluated on fewer samples once some have converged; the result is the same."""

    class Scaled:
        def __init__(self, factor: Tensor, c: Tensor, sizes: list[int]) -> None:
            self.factor, self.c, self.sizes = factor, c, sizes

        def __call__(self, z: State) -> State:
            self.sizes.append(z[0].shape[0])
            return (self.factor * torch.tanh(z[0]) + self.c,)

        def take(self, index: Tensor) -> "Scaled":
            return Scaled(self.factor[index], self.c[index], self.sizes)

    factor = torch.tensor([0.05, 0.95, 0.05, 0.05], dtype=torch.float64).reshape(4, 1, 1, 1)
    fn = Scaled(factor, torch.randn(4, 2, 3, 3, dtype=torch.float64), [])
    z0 = (torch.zeros(4, 2, 3, 3, dtype=torch.float64),)
    deq = DEQ(Broyden(tol=1e-9), ImplicitGradient())
    with torch.no_grad():
        compact = deq(fn, z0)
        assert set(fn.sizes) == {4, 1}
        whole = deq(lambda z: fn(z), z0)
    assert (compact.state[0] - whole.state[0]).abs().max() < 1e-10
    assert torch.equal(compact.stats.num_steps, whole.stats.num_steps)


# Dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    """f sees the dtype of z0, the solver works in float32 at least, the result has the dtype of z0."""
    seen = set()
    c = torch.full((2, 3), 0.25, dtype=dtype, requires_grad=True)

    def f(z: State) -> State:
        seen.add(z[0].dtype)
        return (0.5 * z[0] + c,)

    equilibrium = DEQ(TIGHT, ImplicitGradient())(f, (torch.zeros(2, 3, dtype=dtype),), jacobian_probes=1)
    assert seen == {dtype}
    assert equilibrium.state[0].dtype == dtype
    assert equilibrium.stats.residual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert equilibrium.jacobian_penalty.dtype == equilibrium.stats.residual.dtype
    torch.testing.assert_close(equilibrium.state[0], torch.full_like(c, 0.5), rtol=1e-2, atol=0)
    equilibrium.state[0].sum().backward()
    assert c.grad.dtype == dtype
    torch.testing.assert_close(c.grad, torch.full_like(c, 2), rtol=2e-2, atol=0)


@pytest.mark.parametrize("gradient", [ImplicitGradient(), PhantomGradient()])
def test_autocast(gradient: Any) -> None:
    """Weights that autocast has cast for the solve still get their gradient, and the state stays in float32."""
    layer, x = nn.Linear(6, 6), torch.randn(4, 6)
    with torch.no_grad():
        layer.weight.mul_(0.5)
    inside = []

    def f(z: State) -> State:
        out = layer(z[0])
        inside.append(out.dtype)
        return (torch.tanh(out + x),)

    deq = DEQ(Broyden(tol=1e-2), gradient)
    grads = {}
    for enabled in (True, False):
        layer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            equilibrium = deq(f, (torch.zeros_like(x),))
        assert inside[-1] == (torch.bfloat16 if enabled else torch.float32)
        assert equilibrium.state[0].dtype == equilibrium.stats.residual.dtype == torch.float32
        equilibrium.state[0].sum().backward()
        grads[enabled] = [p.grad.clone() for p in layer.parameters()]
    for half, full in zip(grads[True], grads[False]):
        assert (half - full).norm() < 0.05 * full.norm()


# Settings


def test_solver_for_one_call() -> None:
    """`solver=` replaces the layer's own for that call; `deq.solver = ` replaces it for good."""
    deq = DEQ(Broyden(tol=1e-3), ImplicitGradient())
    c = torch.randn(2, 3, dtype=torch.float64)

    def steps(**kwargs: Any) -> int:
        with torch.no_grad():
            return int(deq(lambda z: (0.9 * torch.sin(z[0]) + c,), (torch.zeros_like(c),), **kwargs).stats.nfe)

    own = steps()
    assert steps(solver=Picard(max_steps=2, tol=0)) == 3
    assert steps() == own
    deq.solver = Anderson(max_steps=4, tol=0)
    assert steps() == 5


def test_two_layers_of_different_settings() -> None:
    """No setting is shared: each layer does what it does alone."""
    c = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def run(deq: DEQ) -> tuple[Tensor, Tensor, int]:
        equilibrium = deq(lambda z: (0.5 * torch.tanh(z[0]) + c,), (torch.zeros_like(c),))
        return equilibrium.state[0], torch.autograd.grad(equilibrium.state[0].sum(), c)[0], equilibrium.stats.nfe

    makers: list[Callable[[], DEQ]] = [
        lambda: DEQ(Broyden(tol=1e-8), ImplicitGradient(Anderson(tol=1e-8))),
        lambda: DEQ({"name": "picard", "max_steps": 2, "tol": 0}, {"name": "phantom", "num_steps": 1}),
    ]
    single = [run(make()) for make in makers]
    layers = [make() for make in makers]
    for _ in range(2):
        for layer, expected in zip(layers, single):
            actual = run(layer)
            assert torch.equal(actual[0], expected[0])
            assert torch.equal(actual[1], expected[1])
            assert actual[2] == expected[2]
    assert single[0][2] != single[1][2]


def test_specs() -> None:
    deq = DEQ({"name": "anderson", "history": 3}, {"name": "phantom", "damping": 0.9})
    assert deq.solver == Anderson(history=3)
    assert deq.gradient == PhantomGradient(damping=0.9)
    assert "Anderson(" in repr(deq)
    assert "PhantomGradient(" in repr(deq)
    assert not list(deq.parameters())
    assert not deq.state_dict()
    with pytest.raises(ValueError, match="unknown solver 'newton'"):
        DEQ({"name": "newton"}, ImplicitGradient())
    with pytest.raises(ValueError, match="unknown gradient 'adjoint'"):
        DEQ(Broyden(), {"name": "adjoint"})


def test_shape_errors() -> None:
    deq = DEQ(Broyden(), ImplicitGradient())
    for result in (torch.zeros(2, 3), None):
        with pytest.raises(ValueError, match=r"f must return a tuple of tensors.*got (Tensor|NoneType)"):
            deq(lambda z, result=result: result, (torch.zeros(2, 3),))
    with pytest.raises(ValueError, match=r"expected a state of shapes \[\(3,\)\], got \[\(2,\)\]"):
        deq(lambda z: (z[0][:, :2],), (torch.zeros(2, 3),))
    with pytest.raises(ValueError, match="share a batch size"):
        deq(lambda z: z, (torch.zeros(2, 3), torch.zeros(3, 3)))
    for shift, named in ((1j, "complex64"), (torch.zeros(2, 3, dtype=torch.int64), "int64")):
        with pytest.raises(ValueError, match=rf"f must return floating-point tensors, got \[torch\.{named}\]"):
            deq(lambda z, shift=shift: (0 * z[0].to(torch.asarray(shift).dtype) + shift,), (torch.zeros(2, 3),))


def test_a_map_that_writes_into_the_state_is_refused() -> None:
    deq = DEQ(Broyden(), ImplicitGradient())
    with torch.no_grad(), pytest.raises(ValueError, match="f wrote into its argument"):
        deq(lambda z: (z[0].mul_(0.5).add_(1),), (torch.zeros(2, 3),))
    with torch.inference_mode():  # nothing there counts writes
        assert deq(lambda z: (0.5 * z[0] + 1,), (torch.zeros(2, 3),)).stats.converged.all()


def test_what_a_map_may_not_return_is_said() -> None:
    deq, start = DEQ(Broyden(), ImplicitGradient()), (torch.zeros(2, 3),)
    with pytest.raises(ValueError, match=r"f must return floating-point tensors, got \['NoneType'\]"):
        deq(lambda z: (None,), start)
    with pytest.raises(ValueError, match=r"f must keep the device of the state, cpu, got \['meta'\]"):
        deq(lambda z: (z[0].to("meta"),), start)
    with pytest.raises(ValueError, match="a state must be a tuple of tensors"):
        deq(lambda z: z, (1, 2))


def test_jacobian_penalty() -> None:
    """It is taken at the state that is returned and can be added to the loss; solved or unrolled."""
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    z0 = (torch.zeros(50, 40, dtype=torch.float64),)
    for unroll in (0, 2):
        equilibrium = DEQ(TIGHT, ImplicitGradient())(
            lambda z: (weight * z[0] + 1,), z0, unroll=unroll, jacobian_probes=2
        )
        penalty = equilibrium.jacobian_penalty
        assert penalty.item() == pytest.approx(0.25, rel=0.08)
        (grad,) = torch.autograd.grad(penalty, weight)
        assert grad.item() == pytest.approx(2 * penalty.item() / 0.5, rel=1e-12)


def test_no_gradient_to_the_start() -> None:
    z0 = torch.zeros(2, 3, requires_grad=True)
    c = torch.randn(2, 3, requires_grad=True)
    for unroll in (0, 3):
        equilibrium = DEQ(TIGHT, ImplicitGradient())(lambda z: (0.5 * z[0] + c,), (z0,), unroll=unroll)
        equilibrium.state[0].sum().backward()
        assert z0.grad is None
        assert c.grad.norm() > 0


# Surroundings


def test_threads() -> None:
    """Threads may share a layer, each with its own solver, gradient mode and backward pass."""
    deq = DEQ(Broyden(tol=1e-9), ImplicitGradient(Broyden(tol=1e-9)))
    jobs = [(torch.randn(3, 4, dtype=torch.float64), s) for s in (None, Anderson(tol=1e-9), Picard(max_steps=3)) * 4]

    def run(job: tuple[Tensor, Any]) -> tuple[Tensor, Tensor]:
        c = job[0].clone().requires_grad_()
        state = deq(lambda z: (0.5 * torch.tanh(z[0]) + c,), (torch.zeros_like(c),), solver=job[1]).state[0]
        return state.detach(), torch.autograd.grad(state.sum(), c)[0]

    expected = [run(job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        actual = list(pool.map(run, jobs))
    for pair, other in zip(actual, expected):
        assert torch.equal(pair[0], other[0])
        assert torch.equal(pair[1], other[1])


@pytest.mark.parametrize("train", [False, True])
def test_meta_tensors(train: bool) -> None:
    """Shapes without values, backward included."""
    layer = nn.Linear(4, 4, device="meta")
    deq = DEQ(Broyden(max_steps=3), ImplicitGradient(Broyden(max_steps=2))).train(train)
    equilibrium = deq(lambda z: (torch.tanh(layer(z[0])),), (torch.zeros(2, 4, device="meta"),))
    assert equilibrium.state[0].is_meta
    assert equilibrium.state[0].shape == (2, 4)
    assert equilibrium.stats.trace.shape == (4, 2)
    equilibrium.state[0].sum().backward()
    assert layer.weight.grad.shape == (4, 4)
    assert equilibrium.backward_stats[0].trace.shape == (3, 2)


def test_compiled() -> None:
    """In eval mode the layer compiles into one graph, with the result of the eager one."""
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        layer.weight.mul_(0.3)
    deq = DEQ(Broyden(tol=1e-3, max_steps=6), ImplicitGradient()).eval()

    def solve(x: Tensor) -> tuple[Tensor, Tensor]:
        equilibrium = deq(lambda z: (torch.tanh(layer(z[0]) + x),), (torch.zeros_like(x),))
        return equilibrium.state[0], equilibrium.stats.num_steps

    x = torch.randn(3, 4)
    with torch.no_grad():
        state, steps = solve(x)
        compiled, compiled_steps = torch.compile(solve, fullgraph=True, backend="eager")(x)
    assert steps.max() < 6
    assert torch.equal(steps, compiled_steps)
    torch.testing.assert_close(compiled, state, rtol=1e-6, atol=1e-6)


def test_empty_batch() -> None:
    state = DEQ(TIGHT, ImplicitGradient())(lambda z: (z[0].cos(),), (torch.zeros(0, 2, 3, 3),)).state
    assert state[0].shape == (0, 2, 3, 3)


def test_bad_arguments_are_named() -> None:
    x = torch.zeros(3, 2)
    deq = DEQ({"name": "broyden"}, {"name": "implicit", "solver": {"name": "picard"}})
    with pytest.raises(ValueError, match="f must keep the batch size 3, got 1"):
        deq(lambda z: (z[0][:1],), (x,))
    with pytest.raises(ValueError, match="unroll and jacobian_probes must be >= 0"):
        deq(lambda z: z, (x,), unroll=-1)
    with pytest.raises(ValueError, match="expected a gradient estimator"):
        DEQ(Broyden(), Broyden())
    with pytest.raises(ValueError, match="expected a solver"):
        DEQ("broyden", ImplicitGradient())
    with pytest.raises(ValueError, match="expected a solver"):
        ImplicitGradient(solver="x")
    assert deq(lambda z: (0.5 * z[0] + 1,), (x,), solver={"name": "picard"}).stats.converged.all()


def test_divergence_is_not_judged_by_a_lucky_start() -> None:
    """tanh(3 z) leads from 1e-10, near the unstable fixed point 0, to 0.9949: growth, but no divergence."""
    z, stats = Picard(tol=1e-6, max_steps=200)(lambda z: torch.tanh(3 * z) + 1e-10, torch.zeros(1, 3).double())
    assert stats.converged.all()
    assert z[0].tolist() == pytest.approx([0.9949015] * 3, abs=1e-5)


def test_a_jacobian_that_is_not_finite_is_no_zero_gradient() -> None:
    c = torch.ones(1, 1, requires_grad=True)
    eq = DEQ(Broyden(), ImplicitGradient())(lambda z: (0.25 * z[0].sqrt() * c,), (torch.zeros(1, 1),))
    eq.state[0].sum().backward()
    assert eq.backward_stats[0].status.item() == SolveStatus.NONFINITE
    assert torch.isnan(c.grad).all()


def test_solver_and_gradient_may_be_set_by_their_descriptions() -> None:
    deq = DEQ(Picard(), PhantomGradient())
    deq.solver, deq.gradient = {"name": "broyden", "tol": 1e-6}, {"name": "implicit"}
    x = torch.ones(2, 3, requires_grad=True)
    deq(lambda z: (0.5 * z[0] + x,), (torch.zeros(2, 3),)).state[0].sum().backward()
    assert (x.grad - 2).abs().max() < 1e-4


def test_jacobian_penalty_is_that_of_the_returned_state() -> None:
    """It is taken at the state that is returned, not at the start."""
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    z0 = (torch.zeros(50, 40, dtype=torch.float64),)
    eq = DEQ(Broyden(tol=1e-9, max_steps=50), ImplicitGradient())(
        lambda z: (torch.tanh(weight * z[0] + 1),), z0, jacobian_probes=20
    )
    slope = 0.5 * (1 - eq.state[0].detach().square())
    assert eq.jacobian_penalty.item() == pytest.approx(slope.square().mean().item(), rel=0.05)
