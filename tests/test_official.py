"""The numbers that the official MDEQ-Vision code computed for a CIFAR TINY network (weights, results: tests/data)."""

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

import mdeq
from mdeq.models.official import checkpoint_filter_fn, from_official
from tests.official import DATA, official_model


@pytest.fixture(scope="module")
def case() -> dict[str, Tensor]:
    return load_file(DATA / "official_cifar_tiny_case.safetensors")


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.detach() - expected).norm() / expected.norm())


def test_one_application_of_f(case: dict[str, Tensor]) -> None:
    model = official_model()
    with torch.no_grad():
        injection = model.inject(model.stem(case["input"][:1].double()))
        out = model.equilibrium.fn(injection)(tuple(case[f"z_random.{i}"].double() for i in range(2)))
    for i in range(2):
        assert relative(out[i], case[f"f_z_random.{i}"]) < 1e-12


def test_equilibrium_and_logits(case: dict[str, Tensor]) -> None:
    model = official_model()
    with torch.no_grad():
        logits, equilibrium = model(case["input"].double(), return_equilibrium=True)
    assert equilibrium.stats.converged.all()
    assert relative(logits, case["logits"]) < 1e-11
    for i in range(2):
        assert relative(equilibrium.state[i][:1], case[f"z_star.{i}"]) < 1e-11


@pytest.mark.parametrize("solver", [mdeq.Anderson(tol=1e-12, max_steps=300), mdeq.Picard(tol=1e-12, max_steps=300)])
def test_other_solvers_reach_the_same_logits(case: dict[str, Tensor], solver: mdeq.FixedPointSolver) -> None:
    with torch.no_grad():
        logits = official_model()(case["input"].double(), solver=solver)
    assert relative(logits, case["logits"]) < 1e-9


def test_six_broyden_steps(case: dict[str, Tensor]) -> None:
    with torch.no_grad():
        logits = official_model()(case["input"].double(), solver=mdeq.Broyden(tol=0, max_steps=6))
    assert relative(logits, case["six_steps.logits"]) < 1e-8


def test_unrolled_network(case: dict[str, Tensor]) -> None:
    with torch.no_grad():
        logits = official_model()(case["input"].double(), unroll=10)
    assert relative(logits, case["unrolled.logits"]) < 1e-11


def test_float32(case: dict[str, Tensor]) -> None:
    with torch.no_grad():
        logits = official_model(torch.float32)(case["input"], solver=mdeq.Broyden(tol=1e-6, max_steps=50))
    assert (logits.double() - case["logits"]).abs().max() < 1e-4


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_gradients(case: dict[str, Tensor], mode: str) -> None:
    model = official_model().train(mode == "train")
    x = case["input"].double().requires_grad_()
    logits = model(x)
    assert relative(logits, case["logits" if mode == "eval" else "train.logits"]) < 1e-11
    (logits * case["logits_weight"].double()).sum().backward()
    gradients = from_official_inverse(model)
    gradients["input"] = x.grad
    names = [key.removeprefix(f"grad.{mode}.") for key in case if key.startswith(f"grad.{mode}.")]
    assert sorted(names) == sorted(gradients)
    for name in names:
        gradient = gradients[name].flatten()
        step = max(1, gradient.numel() // 200)  # tests/data holds every step-th entry, and the norm of all
        # A bias before a batch norm has no gradient in train mode: zero to rounding on both sides.
        torch.testing.assert_close(gradient[::step], case[f"grad.{mode}.{name}"], rtol=0, atol=atol(case, mode, name))
        torch.testing.assert_close(gradient.norm()[None], case[f"gradnorm.{mode}.{name}"], rtol=1e-9, atol=1e-14)
    if mode == "train":
        for key in (key for key in case if key.startswith("train.after.")):
            (name,) = from_official({key.removeprefix("train.after."): case[key]})
            assert relative(model.state_dict()[name], case[key]) < 1e-9, name


def atol(case: dict[str, Tensor], mode: str, name: str) -> float:
    return 1e-9 * float(case[f"gradnorm.{mode}.{name}"]) + 1e-14


def from_official_inverse(model: mdeq.MDEQ) -> dict[str, Tensor]:
    """Return the model's gradients under the official names."""
    official = load_file(DATA / "official_cifar_tiny.safetensors")
    parameters = dict(model.named_parameters())
    names = {key: next(iter(from_official({key: value}))) for key, value in official.items()}
    return {key: parameters[name].grad for key, name in names.items() if name in parameters}


def test_jacobian_penalty(case: dict[str, Tensor]) -> None:
    """Two probes drawn as the official code draws them, at the equilibrium: figure from the fixture's record."""
    model = official_model()
    with torch.no_grad():
        equilibrium = model.solve(case["input"].double())
        injection = model.inject(model.stem(case["input"].double()))
    layout = mdeq.StateLayout.of(equilibrium.state)
    fn = model.equilibrium.fn(injection)
    torch.manual_seed(0)
    penalty = mdeq.jacobian_frobenius(
        lambda z: layout.flatten(fn(layout.unflatten(z))), layout.flatten(equilibrium.state), num_probes=2
    )
    assert float(penalty.detach()) == pytest.approx(0.37391542778666725, rel=1e-9)


def test_spectral_radius(case: dict[str, Tensor]) -> None:
    """Against the growth rates in the fixture's record, which are themselves estimates from a random start."""
    model = official_model()
    with torch.no_grad():
        equilibrium = model.solve(case["input"].double())
        injection = model.inject(model.stem(case["input"].double()))
    torch.manual_seed(0)
    radius = model.deq.spectral_radius(model.equilibrium.fn(injection), equilibrium.state, num_iters=150)
    assert radius.tolist() == pytest.approx([0.8630667857275162, 0.859780439834459], rel=5e-3)


def test_weights_that_fit_no_model_for_a_model_without_a_name() -> None:
    model = mdeq.MDEQ(channels=(8, 16), head_channels=(4, 4), num_groups=2)
    weights = timm.create_model("test_mdeq").state_dict()
    del weights["stem.conv2.weight"]
    with pytest.raises(ValueError, match=r"the checkpoint \(native layout\) does not fit MDEQ; missing tensors"):
        checkpoint_filter_fn(weights, model)


def test_advice_on_the_arguments_of_a_model_of_another_size() -> None:
    size = dict(channels=(8, 16), head_channels=(4, 4), num_groups=2)
    weights = timm.create_model("test_mdeq", **size, post_norm_affine=True).state_dict()
    model = timm.create_model("test_mdeq", **size, post_norm_affine=False)
    with pytest.raises(ValueError, match=r"does not fit test_mdeq as it is built: pass post_norm_affine=True;"):
        checkpoint_filter_fn(weights, model)
