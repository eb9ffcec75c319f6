"""What CUDA devices and graphs need, as far as a CPU can tell; tests/test_gpu.py runs and captures."""

from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mdeq
from mdeq.solvers import static_solves
from tests.official import official_model


class Foreign(TorchDispatchMode):
    """Collects operators that take or give a tensor of another device than the one that all should be on."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        if any(x.device.type != self.device for x in tensors):
            self.found.add(str(func))
        return result


SOLVERS = [
    mdeq.Broyden(max_steps=6, history=3, line_search=1),
    mdeq.Broyden(max_steps=3, history_dtype="bfloat16"),
    mdeq.Anderson(max_steps=6, history=3),
    mdeq.Picard(max_steps=3, damping=0.5),
]


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("name", ["test_mdeq", "test_mdeq3d"])
def test_a_solve_of_fixed_length_stays_on_the_device(name: str, solver: mdeq.FixedPointSolver) -> None:
    """Meta tensors take the steps that a capture takes. A tensor made on the host would have to be copied over."""
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        x = torch.zeros(2, model.in_chans, *[32] * model.spatial_dims)
    with torch.no_grad(), Foreign("meta") as foreign:
        _, equilibrium = model(x, return_equilibrium=True, solver=solver)
    assert foreign.found == set()
    assert len(equilibrium.stats.trace) == solver.max_steps + 1


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_a_solve_of_fixed_length_gives_what_a_usual_one_gives(solver: mdeq.FixedPointSolver) -> None:
    """The steps of a capture, taken on a CPU: to the last, though some samples converge, and start there."""
    model = official_model().eval()
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    solver = replace(solver, max_steps=24, tol=2e-2)
    with torch.no_grad():
        logits, usual = model(x, return_equilibrium=True, solver=solver)
        with static_solves():
            again, fixed = model(x, return_equilibrium=True, solver=solver)
        _, after = model(x, return_equilibrium=True, solver=solver)
    assert len(fixed.stats.trace) == 25
    assert len(usual.stats.trace) == len(after.stats.trace) < 25
    assert torch.equal(fixed.stats.num_steps, usual.stats.num_steps)
    torch.testing.assert_close(again, logits, rtol=1e-6, atol=1e-9)


def test_the_watch_sees_a_tensor_of_the_host() -> None:
    with Foreign("meta") as foreign:
        torch.zeros(2, device="meta") + torch.tensor(1.0)
    assert foreign.found


def fakes_cuda() -> bool:
    """Whether tensors without values can be on a CUDA device that is not there: in PyTorch 2.6 they need its driver."""
    try:
        with FakeTensorMode():
            torch.zeros(1, device="cuda").new_zeros(1).uniform_()
    except RuntimeError:
        return False
    return True


@pytest.mark.skipif(not fakes_cuda(), reason="this PyTorch has no fake CUDA tensors without a driver")
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("solver", [mdeq.Broyden, mdeq.Anderson, mdeq.Picard])
def test_a_solve_mixes_no_devices(
    solver: type[mdeq.FixedPointSolver], every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors without values tell their device. The looks at who goes on and who got better find what is said here:
    steps in which all get better, some get worse, one ends and rests, and more do, which then leave the batch.
    """
    looks = iter([a + 2**32 * b for a, b in ((8, 0), (8, 8), (7, 5), (5, 5), (5, 4), (3, 4), (3, 3))])
    monkeypatch.setattr(FakeTensor, "item", lambda _: next(looks))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with FakeTensorMode():
        with torch.device("cuda"):
            model = timm.create_model("test_mdeq").eval()
            x = torch.zeros(8, 3, 32, 32)
        with torch.no_grad():
            logits, equilibrium = model(x, return_equilibrium=True, solver=solver(max_steps=6, check_every=every))
    stats = equilibrium.stats
    for result in (logits, *equilibrium.state, stats.status, stats.residual, stats.num_steps, stats.trace):
        assert (result.device.type, result.shape[-1 if result is stats.trace else 0]) == ("cuda", 8)
    assert len(list(looks)) == (0 if every == 1 else 4)


def test_a_capture_needs_eval_mode_and_a_cuda_device() -> None:
    model = timm.create_model("test_mdeq")
    x = torch.zeros(1, 3, 32, 32)
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        mdeq.CapturedModel(model.train(), x)
    with pytest.raises(ValueError, match="on a CUDA device, got an example on cpu"):
        mdeq.CapturedModel(model.eval(), x)
