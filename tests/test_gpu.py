"""On a CUDA device: the same answers as on the CPU, and training in mixed precision."""

import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from helpers import spawn_distributed

import mdeq
import tools.benchmark
import tools.scaling
from tests.official import EXACT, official_model
from tools.batches import Process
from tools.config import load_config
from tools.train import Run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


GRADIENTS = [
    mdeq.ImplicitGradient(mdeq.Broyden(**EXACT)),
    mdeq.ImplicitGradient(mdeq.Broyden(**EXACT), warm_start=True),
    mdeq.PhantomGradient(num_steps=3),
]


@pytest.mark.parametrize("gradient", GRADIENTS, ids=str)
def test_equilibrium_and_gradients_equal_those_of_the_cpu(gradient: mdeq.GradientEstimator) -> None:
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    results = []
    for device in ("cpu", "cuda"):
        model = official_model().to(device)
        model.deq.gradient = gradient
        logits, equilibrium = model(x.to(device), return_equilibrium=True)
        logits.square().sum().backward()
        results.append((logits, [p.grad for p in model.parameters()], equilibrium.stats.converged))
    (logits, gradients, converged), (cuda_logits, cuda_gradients, cuda_converged) = results
    assert converged.all()
    assert cuda_converged.all()
    torch.testing.assert_close(cuda_logits.cpu(), logits, rtol=1e-9, atol=1e-10)
    for a, b in zip(cuda_gradients, gradients):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-7, atol=1e-9 * float(b.norm()) + 1e-13)


def test_reversible_gradient_equals_that_of_the_cpu() -> None:
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    gradients = []
    for device in ("cpu", "cuda"):
        model = official_model().to(device)
        model.deq.solver, model.deq.gradient = mdeq.Picard(tol=0.0, max_steps=6), mdeq.ReversibleGradient(beta=0.5)
        model(x.to(device)).square().sum().backward()
        gradients.append([p.grad.cpu() for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9 * float(b.norm()) + 1e-13)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("solver", [mdeq.Broyden, mdeq.Anderson, mdeq.Picard])
def test_samples_that_leave_the_batch(solver: type[mdeq.FixedPointSolver], every: int) -> None:
    """Dark images take fewer steps than bright ones, here and on the CPU; each keeps its own answer."""
    x = torch.randn(6, 3, 32, 32, dtype=torch.float64) * torch.linspace(0, 3, 6, dtype=torch.float64).view(-1, 1, 1, 1)
    model = official_model()
    usual = solver(tol=1e-2, max_steps=30, check_every=every)
    with torch.no_grad():
        logits, equilibrium = model(x, return_equilibrium=True, solver=usual)
        cuda_logits, cuda_equilibrium = model.cuda()(x.cuda(), return_equilibrium=True, solver=usual)
    steps = equilibrium.stats.num_steps
    assert steps.unique().numel() > 2
    assert cuda_equilibrium.stats.num_steps.cpu().equal(steps)
    torch.testing.assert_close(cuda_logits.cpu(), logits, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("solver", [mdeq.Broyden(max_steps=5), mdeq.Anderson(max_steps=5), mdeq.Picard(max_steps=5)])
def test_solve_in_mixed_precision(solver: mdeq.FixedPointSolver) -> None:
    model = official_model(torch.float32).cuda()
    x = torch.randn(2, 3, 32, 32, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16), torch.no_grad():
        _, equilibrium = model(x, return_equilibrium=True, solver=solver)
    assert equilibrium.stats.residual.dtype == torch.float32
    assert torch.isfinite(equilibrium.stats.residual).all()


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("solver", [mdeq.Broyden(max_steps=8), mdeq.Anderson(max_steps=8), mdeq.Picard(max_steps=8)])
def test_captured_model_gives_what_the_model_gives(solver: mdeq.FixedPointSolver, amp: bool) -> None:
    model = official_model(torch.float32 if amp else torch.float64).cuda().eval()
    first, second = torch.randn(2, 4, 3, 32, 32, device="cuda", dtype=model.stem.conv1.weight.dtype)
    tolerance = dict(rtol=0.1, atol=0.1) if amp else dict(rtol=1e-6, atol=1e-8)
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=amp), torch.no_grad():
        captured = mdeq.CapturedModel(model, first, solver=solver)
        results = [captured(x, return_equilibrium=True) for x in (second, first)]
        expected = [model(x, return_equilibrium=True, solver=solver) for x in (second, first)]
    for (logits, equilibrium), (wanted, wanted_equilibrium) in zip(results, expected):
        torch.testing.assert_close(logits, wanted, **tolerance)
        torch.testing.assert_close(equilibrium.stats.trace[0], wanted_equilibrium.stats.trace[0], **tolerance)
        if not amp:
            torch.testing.assert_close(equilibrium.stats.num_steps, wanted_equilibrium.stats.num_steps)
            torch.testing.assert_close(equilibrium.state, wanted_equilibrium.state, **tolerance)
    with pytest.raises(ValueError, match="captured for inputs with shape"):
        captured(first[:2])


def test_captured_model_with_a_compiled_cell() -> None:
    model = official_model(torch.float32).cuda().eval()
    example, x = torch.randn(2, 2, 3, 32, 32, device="cuda")
    solver = mdeq.Broyden(max_steps=8)
    with torch.no_grad():
        wanted = model(x, solver=solver)
        mdeq.compile_cell(model)
        torch.testing.assert_close(model(x, solver=solver), wanted, rtol=1e-2, atol=1e-2)
        captured = mdeq.CapturedModel(model, example, solver=solver)
        torch.testing.assert_close(captured(x), wanted, rtol=1e-2, atol=1e-2)


def test_captured_model_follows_weights_that_change_in_place() -> None:
    model = official_model().cuda().eval()
    x = torch.randn(2, 3, 32, 32, device="cuda", dtype=torch.float64)
    captured = mdeq.CapturedModel(model, x)
    with torch.no_grad():
        model.classifier.bias += 1
        torch.testing.assert_close(captured(x), model(x), rtol=1e-6, atol=1e-8)


def test_captured_model_knows_where_each_volume_lies() -> None:
    """MONAI's tensors come back with what belongs to the input of that call, not to the example."""
    meta = pytest.importorskip("monai.data").MetaTensor
    model = timm.create_model("test_mdeq3d").cuda().eval()
    example, x = (meta(torch.randn(1, 1, 16, 16, 16), affine=k * torch.eye(4)).cuda() for k in (1, 3))
    captured = mdeq.CapturedModel(model, example)
    assert captured(x).affine.diag().tolist() == [3.0, 3.0, 3.0, 3.0]
    assert type(captured(x.as_tensor())) is torch.Tensor


def test_captured_model_keeps_its_weights() -> None:
    """Also when nobody else has the model any more and its memory is asked for; moved weights are not mistaken."""
    model = official_model().cuda().eval()
    x = torch.randn(2, 3, 32, 32, device="cuda", dtype=torch.float64)
    with torch.no_grad():
        wanted = model(x)
    captured = mdeq.CapturedModel(model, x)
    sizes = [p.numel() for p in model.parameters()]
    del model
    others = [torch.full((size,), float("nan"), device="cuda", dtype=torch.float64) for size in sizes]
    torch.testing.assert_close(captured(x), wanted, rtol=1e-6, atol=1e-8)
    del others
    model = official_model().cuda().eval()
    captured = mdeq.CapturedModel(model, x)
    model.float()
    with pytest.raises(ValueError, match="capture the model again"):
        captured(x)


@pytest.mark.parametrize("solver", [mdeq.Broyden, mdeq.Anderson])
def test_a_step_waits_once_for_the_device(solver: type[mdeq.FixedPointSolver]) -> None:
    model = official_model(torch.float32).cuda().eval()
    x = torch.randn(2, 3, 32, 32, device="cuda")
    solver = solver(max_steps=6, tol=0.0)
    with torch.no_grad():
        model(x, solver=solver)  # libraries set themselves up
        for every, waits in ((1, 7), (6, 2)):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    torch.cuda.set_sync_debug_mode("warn")  # which warns of itself
                    model(x, solver=replace(solver, check_every=every))
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            assert len([w for w in caught if "synchronizing CUDA operation" in str(w.message)]) == waits


@pytest.mark.parametrize("words", ["", "--bf16 --channels-last --check-every 3", "--scaling"])
def test_benchmark(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU without a number: cuda, which is also what auto finds. Growth has 51 peaks of memory, a process each."""
    if words == "--scaling":
        monkeypatch.setattr(tools.scaling, "measured_peak", lambda *_, **__: 1.0)
    common = "--device cuda --cases test_mdeq:32:2 --trained mdeq_tiny_cifar.cifar10:32:2 --steps 3 --repeats 1"
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *common.split(), *words.split(), "--out", str(tmp_path)])
    tools.benchmark.main()
    assert (tmp_path / ("scaling.csv" if words == "--scaling" else "benchmark.csv")).exists()


@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_training(amp: str, tmp_path: Path) -> None:
    words = ["model.name=test_mdeq", "data.num_train=64", "data.image_size=32", "data.cache_on_device=true"]
    words += ["run.epochs=2", "run.progress=false", f"run.amp={amp}", f"run.out_dir={tmp_path / 'run'}"]
    run = Run(load_config(None, words), tmp_path / "run", Process(device=torch.device("cuda", 0)))
    assert run.train()
    assert run.trainer.num_steps == 2
    assert (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_training_on_two_devices(tmp_path: Path) -> None:
    words = ["model.name=test_mdeq", "model.pretrained=false", "data.num_train=64", "data.image_size=32"]
    words += ["run.epochs=1", "run.progress=false", f"run.out_dir={tmp_path / 'run'}"]
    for outcome in spawn_distributed(tmp_path / "logs", "train", *words):
        outcome.ok()
    assert (tmp_path / "run" / "model.safetensors").exists()
