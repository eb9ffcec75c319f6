"""The registered models: what timm, torch.compile, fx, autocast and meta tensors ask of them."""

import copy
import json
from collections import OrderedDict
from pathlib import Path

import pytest
import timm
import torch
from timm.models import create_feature_extractor, save_for_hf
from torch import Tensor, nn

import mdeq
from tests.official import official_model

MODELS = timm.list_models(module="mdeq")
LIGHT = ["test_mdeq", "mdeq_tiny_cifar", "deq_tiny_cifar"]
OFFICIAL_PARAMETERS = {
    "mdeq_tiny_cifar": 158_890,
    "mdeq_large_cifar": 11_097_438,
    "mdeq_small": 16_808_936,
    "mdeq_large": 67_063_624,
    "mdeq_xlarge": 90_463_280,
}
KEYS = Path(__file__).parent / "data" / "test_mdeq_keys.json"


def small(name: str = "test_mdeq", **kwargs: object) -> mdeq.MDEQ:
    """Return a model whose solve is short."""
    model = timm.create_model(name, num_classes=10, **kwargs)
    model.deq.solver = mdeq.Broyden(max_steps=5)
    model.deq.gradient = mdeq.ImplicitGradient(mdeq.Broyden(max_steps=5))
    return model


def image(*size: int, batch: int = 2, channels: int = 3, **kwargs: object) -> Tensor:
    return torch.randn(batch, channels, *size, **kwargs)


def test_channels_last() -> None:
    """The memory format changes neither results nor gradients, and the state keeps it through the solver."""
    torch.manual_seed(0)
    plain = timm.create_model("mdeq_tiny_cifar.cifar10", pretrained=True).double()
    other = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    x = torch.linspace(0.2, 3, 5, dtype=torch.float64).view(-1, 1, 1, 1) * torch.randn(5, 3, 16, 16).double()
    for train in (False, True):
        results = []
        for model in (plain.train(train), other.train(train)):
            logits, equilibrium = model(x, return_equilibrium=True)
            model.zero_grad()
            logits.square().sum().backward()
            results.append((logits, equilibrium, [p.grad for p in model.parameters()]))
        (logits, eq, gradients), (logits_last, eq_last, gradients_last) = results
        torch.testing.assert_close(logits_last, logits, rtol=1e-6, atol=1e-8)
        assert torch.equal(eq_last.stats.num_steps, eq.stats.num_steps)
        assert all(z.stride(1) == 1 and z.stride(-1) == z.shape[1] for z in eq_last.state)
        assert all(z.stride(-1) == 1 for z in eq.state)
        for a, b in zip(gradients_last, gradients):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max()) + 1e-12)
    assert len(eq.stats.num_steps.unique()) > 1, "nobody left the batch early"


def test_registered() -> None:
    assert sorted(MODELS) == sorted([*OFFICIAL_PARAMETERS, "deq_tiny_cifar", "test_mdeq"])


@pytest.mark.parametrize("name", MODELS)
def test_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in timm.create_model(name).parameters())
    if name in OFFICIAL_PARAMETERS:
        assert count == OFFICIAL_PARAMETERS[name]
    elif name == "test_mdeq":
        assert count < 20_000


@pytest.mark.parametrize("name", MODELS)
def test_default_cfg(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    cfg = model.pretrained_cfg
    keys = set(model.state_dict())
    assert f"{cfg['first_conv']}.weight" in keys
    assert f"{cfg['classifier']}.weight" in keys
    if "cifar" in name:
        assert cfg["input_size"] == (3, 32, 32)
        assert cfg["mean"] == (0.4914, 0.4822, 0.4465)
        assert cfg["std"] == (0.2023, 0.1994, 0.201)
    else:
        assert cfg["mean"] == (0.485, 0.456, 0.406)
        assert cfg["std"] == (0.229, 0.224, 0.225)
    features = model.forward_features(torch.empty(1, *cfg["input_size"], device="meta"))
    assert features.shape == (1, model.num_features, *cfg["pool_size"])


def test_state_dict_keys_are_stable() -> None:
    """The names of a native checkpoint are a promise; a change here breaks every file that people have."""
    assert list(timm.create_model("test_mdeq").state_dict()) == json.loads(KEYS.read_text())


@pytest.mark.parametrize("name", LIGHT)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = small(name).train()
    model(image(32, 32)).square().sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mdeq_small", "mdeq_large_cifar", "mdeq_large", "mdeq_xlarge"])
def test_large_models_run(name: str) -> None:
    model = small(name).train()
    model(image(64, 64)).square().sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", LIGHT)
@pytest.mark.parametrize("size", [(16, 16), (17, 23), (33, 18)])
def test_any_size(name: str, size: tuple[int, int]) -> None:
    model = small(name).eval()
    logits, equilibrium = model(image(*size), return_equilibrium=True)
    assert logits.shape == (2, 10)
    assert len(equilibrium.state) == len(model.equilibrium.cell.channels)
    for fine, coarse in zip(equilibrium.state, equilibrium.state[1:]):
        assert coarse.shape[2:] == tuple((s + 1) // 2 for s in fine.shape[2:])


def test_bad_input_is_named() -> None:
    model = small().eval()
    with pytest.raises(ValueError, match=r"every side of the input must be >= 16, got \(15, 16\)"):
        model(image(15, 16))
    with pytest.raises(ValueError, match=r"expected an input of shape \(batch, 3, H, W\), got \(2, 4, 16, 16\)"):
        model(image(16, 16, channels=4))
    with pytest.raises(ValueError, match="z0 must have shapes"):
        model(image(32, 32), z0=model.solve(image(16, 16)).state)
    with pytest.raises(TypeError, match="chanels"):
        timm.create_model("test_mdeq", chanels=3)


@pytest.mark.parametrize("name", LIGHT)
def test_eval_sees_the_equilibrium_itself(name: str) -> None:
    """Bit for bit the same with and without gradients, and the head's input is the state that is reported."""
    model = small(name).eval()
    x = image(32, 32)
    with_grad, equilibrium = model(x, return_equilibrium=True)
    with torch.no_grad():
        without, other = model(x, return_equilibrium=True)
        head = model.forward_head(model.head(other.state))
    assert with_grad.requires_grad
    assert torch.equal(with_grad, without)
    assert all(torch.equal(a, b) for a, b in zip(equilibrium.state, other.state))
    assert torch.equal(head, without)


def test_train_mode_sees_one_more_application_of_f() -> None:
    model = small("mdeq_tiny_cifar", dropout=0.0).eval()
    x = image(16, 16)
    injection = model.injection(x).detach()
    state = model.equilibrium(injection).state
    expected = model.equilibrium.fn(injection)(state)
    model.equilibrium.train()
    for a, b in zip(model.equilibrium(injection).state, expected):
        torch.testing.assert_close(a, b)


def test_solver_and_gradient_can_be_replaced() -> None:
    model = small().eval()
    x = image(32, 32)
    model.deq.solver = mdeq.Picard(max_steps=3, tol=0.0)
    _, equilibrium = model(x, return_equilibrium=True)
    assert equilibrium.stats.nfe == 4
    _, equilibrium = model(x, return_equilibrium=True, solver=mdeq.Anderson(max_steps=2, tol=0.0))
    assert equilibrium.stats.nfe == 3
    model.deq.gradient = mdeq.PhantomGradient(num_steps=2)
    logits, equilibrium = model(x, return_equilibrium=True)
    logits.sum().backward()
    assert equilibrium.backward_stats == []


def test_warm_start_saves_steps() -> None:
    """From the equilibrium of the same input no step is left, from that of a similar one fewer are."""
    model = official_model(torch.float32)
    solver = mdeq.Broyden(max_steps=60, tol=1e-3)
    x = image(16, 16)
    with torch.no_grad():
        first = model.solve(x, solver=solver)
        again = model.solve(x, z0=first.state, solver=solver)
        similar = model.solve(x + 1e-3 * image(16, 16), z0=first.state, solver=solver)
    assert first.stats.converged.all()
    assert again.stats.num_steps.tolist() == [0, 0]
    assert (similar.stats.num_steps < first.stats.num_steps).all()


def test_finished_samples_leave_the_batch() -> None:
    """With compaction the answers are those of the samples alone."""
    model = official_model()
    x = torch.cat([image(16, 16, dtype=torch.float64), image(16, 16, batch=3, dtype=torch.float64).cumsum(3)])
    solver = mdeq.Broyden(max_steps=60, tol=1e-3)
    with torch.no_grad():
        logits, together = model(x, return_equilibrium=True, solver=solver)
        for i in range(len(x)):
            alone_logits, alone = model(x[i : i + 1], return_equilibrium=True, solver=solver)
            assert alone.stats.num_steps[0] == together.stats.num_steps[i]
            torch.testing.assert_close(alone_logits[0], logits[i], rtol=0, atol=1e-10)
    assert together.stats.converged.all()
    assert len(set(together.stats.num_steps.tolist())) > 1


def test_unroll_and_penalty() -> None:
    model = small("mdeq_tiny_cifar").train()
    logits, equilibrium = model(image(16, 16), return_equilibrium=True, unroll=3, jacobian_probes=2)
    assert equilibrium.stats is None
    (logits.sum() + equilibrium.jacobian_penalty).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_frozen_backbone_needs_no_backward_solve() -> None:
    model = small().train()
    for p in model.parameters():
        p.requires_grad_(False)
    for p in model.get_classifier().parameters():
        p.requires_grad_(True)
    logits, equilibrium = model(image(32, 32), return_equilibrium=True)
    logits.sum().backward()
    assert equilibrium.backward_stats == []
    assert model.classifier.weight.grad is not None


@pytest.mark.parametrize("gradient", [mdeq.ImplicitGradient(), mdeq.PhantomGradient(2)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing_changes_nothing(gradient: mdeq.GradientEstimator, checkpointing: bool) -> None:
    torch.manual_seed(0)
    model = small("mdeq_tiny_cifar").double().train()
    model.deq.gradient = gradient
    x = image(16, 16, dtype=torch.float64)
    reference = copy.deepcopy(model)
    model.set_grad_checkpointing(checkpointing)
    gradients = []
    for m in (reference, model):
        torch.manual_seed(1)
        m(x).square().sum().backward()
        gradients.append([p.grad for p in m.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", LIGHT)
def test_bfloat16_model(name: str) -> None:
    """The solve runs in float32, the result has the model's dtype."""
    model = small(name).to(torch.bfloat16).eval()
    logits, equilibrium = model(image(16, 16, dtype=torch.bfloat16), return_equilibrium=True)
    assert logits.dtype == torch.bfloat16
    assert all(z.dtype == torch.bfloat16 for z in equilibrium.state)
    assert equilibrium.stats.residual.dtype == torch.float32
    logits.float().sum().backward()


@pytest.mark.parametrize("training", [False, True])
def test_autocast(training: bool) -> None:
    """Gradients reach every parameter, although the solve before runs without them; the state is float32."""
    model = small("mdeq_tiny_cifar").train(training)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, equilibrium = model(image(16, 16), return_equilibrium=True, jacobian_probes=1)
        loss = logits.float().square().sum() + equilibrium.jacobian_penalty
    loss.backward()
    assert all(z.dtype == torch.float32 for z in equilibrium.state)
    assert [key for key, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()] == []


def test_two_models_of_different_settings() -> None:
    a, b = small("mdeq_tiny_cifar").eval(), small("mdeq_tiny_cifar", expansion=2, num_groups=4).eval()
    x = image(16, 16)
    first = a(x)
    b(x)
    assert torch.equal(a(x), first)
    assert a.equilibrium.cell.blocks[0].norm1.num_groups == 8


def test_volumes() -> None:
    """The same class over 3D maps."""
    model = mdeq.MDEQ(
        in_chans=1,
        num_classes=4,
        spatial_dims=3,
        channels=(8, 16),
        head_channels=(4, 4),
        num_features=16,
        stem_stride=2,
    )
    model.deq.solver = mdeq.Broyden(max_steps=3)
    logits, equilibrium = model(image(16, 17, 18, channels=1), return_equilibrium=True)
    assert logits.shape == (2, 4)
    assert [z.shape[2:] for z in equilibrium.state] == [(8, 9, 9), (4, 5, 5)]
    logits.sum().backward()
    anisotropic = mdeq.MDEQ(spatial_dims=3, channels=(8,), head_channels=(4,), num_features=16, stem_stride=(1, 2, 4))
    assert anisotropic.solve(image(16, 16, 16)).state[0].shape[2:] == (16, 8, 4)
    with pytest.raises(ValueError, match="stem_stride"):
        mdeq.MDEQ(spatial_dims=3, stem_stride=(1, 3, 2))


@pytest.mark.parametrize("name", LIGHT)
def test_fx(name: str) -> None:
    model = small(name).eval()
    x = image(32, 32)
    with torch.no_grad():
        expected = model(x)
        extracted = create_feature_extractor(model, ["classifier"])(x)["classifier"]
    assert torch.equal(extracted, expected)


@pytest.mark.parametrize("name", ["test_mdeq", *(pytest.param(n, marks=pytest.mark.slow) for n in LIGHT[1:])])
def test_compile_is_one_graph(name: str) -> None:
    model = small(name).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = image(32, 32)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x, solver=mdeq.Broyden(max_steps=5, tol=0.0)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch, where a graph breaks
def test_compile_in_training() -> None:
    """The phantom gradient compiles as one graph; the implicit one breaks it, and gives the same gradient."""
    x = image(16, 16)
    for gradient, fullgraph in (
        (mdeq.PhantomGradient(2), True),
        (mdeq.ImplicitGradient(mdeq.Broyden(max_steps=3)), False),
    ):
        torch.manual_seed(0)
        model = small("mdeq_tiny_cifar", dropout=0.0).train()
        model.deq.solver, model.deq.gradient = mdeq.Broyden(max_steps=3, tol=0.0), gradient
        compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=fullgraph)
        model(x).square().sum().backward()
        compiled(x).square().sum().backward()
        for a, b in zip(model.parameters(), compiled.parameters()):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_export_with_free_batch_and_size() -> None:
    model = small().eval()
    batch, height, width = torch.export.Dim("b"), torch.export.Dim("h", min=33), torch.export.Dim("w", min=33)
    program = torch.export.export(model, (image(64, 96),), dynamic_shapes=({0: batch, 2: height, 3: width},))
    x = image(40, 72, batch=3)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x, solver=mdeq.Broyden(max_steps=5, tol=0.0)))


@pytest.mark.parametrize("name", LIGHT)
def test_features(name: str) -> None:
    model = timm.create_model(name, features_only=True, out_indices=(0, 1, 2))
    x = image(64, 64)
    maps, equilibrium = model(x, return_equilibrium=True, solver=mdeq.Broyden(max_steps=2))
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    assert [64 // m.shape[2] for m in maps] == model.feature_info.reduction()
    assert equilibrium.stats.nfe == 3


def test_local_directory_round_trip(tmp_path: Path) -> None:
    model = small("test_mdeq").eval()
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = image(32, 32)
    assert torch.equal(again(x), model(x))
    for options in (dict(), dict(feature_cls="getter"), dict(output_stride=32)):
        maps = timm.create_model(
            f"local-dir:{tmp_path}", pretrained=True, features_only=True, out_indices=(1, 3), **options
        )
        expected = model.forward_intermediates(x, [1, 3], intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(maps.eval()(x), expected, strict=True))


@pytest.mark.parametrize("given", ["as objects", "as mappings", "afterwards"])
def test_a_saved_model_comes_back_with_its_solver_and_gradient(given: str, tmp_path: Path) -> None:
    solver = mdeq.Anderson(history=3, max_steps=4, stop_mode="abs")
    gradient = mdeq.ImplicitGradient(mdeq.Broyden(tol=1e-5, history_dtype="bfloat16"), warm_start=True)
    kwargs = {"solver": solver, "gradient": gradient}
    if given == "as mappings":
        kwargs = {
            "solver": {"name": "anderson", "history": 3, "max_steps": 4, "stop_mode": "abs"},
            "gradient": {
                "name": "implicit",
                "solver": {"name": "broyden", "tol": 1e-5, "history_dtype": "bfloat16"},
                "warm_start": True,
            },
        }
    model = timm.create_model("test_mdeq", **({} if given == "afterwards" else kwargs))
    model.deq.solver, model.deq.gradient = mdeq.build_solver(kwargs["solver"]), mdeq.build_gradient(kwargs["gradient"])
    save_for_hf(copy.deepcopy(model), str(tmp_path), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert (again.deq.solver, again.deq.gradient) == (solver, gradient)


def test_a_saved_model_says_nothing_of_the_usual_solver_and_refuses_one_without_a_name(tmp_path: Path) -> None:
    class Own(mdeq.Picard):
        pass

    model = timm.create_model("test_mdeq")
    save_for_hf(model, str(tmp_path / "usual"))
    args = json.loads((tmp_path / "usual" / "config.json").read_text())["model_args"]
    assert not {"solver", "gradient"} & set(args)
    model.deq.solver = Own(max_steps=3)
    with pytest.raises(ValueError, match="'solver' is not serializable"):
        save_for_hf(model, str(tmp_path / "own"))


def test_reset_classifier() -> None:
    model = small().eval()
    x = image(32, 32)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    model.reset_classifier(7, "catavgmax")
    assert model(x).shape == (2, 7)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, model.num_features, 1, 1)
    model.reset_classifier(7)
    with pytest.raises(ValueError, match="a classifier needs pooled features"):
        model(x)


@pytest.mark.parametrize("name", LIGHT)
def test_pruned_models_end_at_the_last_map(name: str) -> None:
    model = small(name).train()
    x = image(32, 32)
    for last in range(len(model.feature_info)):
        pruned = copy.deepcopy(model)
        assert pruned.prune_intermediate_layers([last]) == [last]
        features = pruned.forward_features(x)
        assert features.shape[1] == pruned.num_features == model.feature_info[last]["num_chs"]
        features.square().sum().backward()
        assert [key for key, p in pruned.named_parameters() if p.grad is None] == []
        final, maps = pruned.eval().forward_intermediates(x)  # of those that are left
        assert len(maps) >= last + 1
        assert torch.equal(final, pruned.forward_features(x))
        assert torch.equal(pruned.forward_intermediates(x, [0])[0], final)
        assert torch.equal(maps[last], final)
    model.prune_intermediate_layers([0])
    with pytest.raises(AssertionError, match="out of range"):
        model.prune_intermediate_layers([2])  # which is gone
    for use in (lambda: model.deq, lambda: model.solve(x)):
        with pytest.raises(RuntimeError, match="pruned to its stem"):
            use()


@pytest.mark.parametrize("frozen", [False, True], ids=["all train", "stem frozen"])
@pytest.mark.parametrize("gradient", ["implicit", "phantom", "reversible"])
def test_replicas_of_data_parallel_train_all_that_the_model_does(gradient: str, frozen: bool) -> None:
    """In a replica parameters are plain tensors, which parameters() does not list."""
    model = timm.create_model("test_mdeq", gradient={"name": gradient}, solver=mdeq.Picard(max_steps=2)).train()
    if frozen:
        model.stem.requires_grad_(False)
        model.inject.requires_grad_(False)
    x = image(32, 32)
    trained = []
    for net in (model, replica(model)):
        model.zero_grad()
        net(x).square().sum().backward()
        trained.append({name for name, p in model.named_parameters() if p.grad is not None})
    assert trained[0] == trained[1] == {name for name, p in model.named_parameters() if p.requires_grad}


def replica(model: nn.Module) -> nn.Module:
    """Return what torch.nn.parallel.replicate makes of a model for one device, without one."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, other in copies.items():
        other._former_parameters = OrderedDict()
        for name, child in module._modules.items():
            setattr(other, name, copies.get(child))
        for name, p in module._parameters.items():
            other._former_parameters[name] = None if p is None else p.view_as(p)
            setattr(other, name, other._former_parameters[name])
    return copies[model]


def test_groups_of_one_element() -> None:
    """A coarsest map of one pixel with a channel a group: a sample can be solved alone, as beside others."""
    torch.manual_seed(0)
    args = dict(channels=(8,) * 4, head_channels=(4,) * 4, num_features=8, num_groups=8, expansion=2, num_classes=3)
    model = mdeq.MDEQ(**args, solver=mdeq.Broyden(tol=1e-4, max_steps=40)).eval()
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        together = model(x)
        alone = torch.cat([model(sample) for sample in x.split(1)])
    torch.testing.assert_close(alone, together, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", LIGHT)
@pytest.mark.parametrize("train", [False, True])
def test_nan_in_one_image_is_nan_in_its_output_alone(name: str, train: bool) -> None:
    """The solver's best finite iterate would be the start, of which a head makes a confident prediction."""
    model = small(name).train(train)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # it would spread nan over the batch
    clean = image(32, 32)
    x = clean.clone()
    x[0, 0, 0, 0] = float("nan")
    with torch.no_grad():
        found, equilibrium = model(x, return_equilibrium=True)
    assert found[0].isnan().all()
    assert all(z[0].isnan().all() for z in equilibrium.state)
    assert equilibrium.stats.status[0] == mdeq.SolveStatus.NONFINITE
    assert found[1:].isfinite().all()
    if not train:
        torch.testing.assert_close(found[1:], model(clean)[1:], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["fx", "hook", "list"])
def test_maps_come_from_one_solve(kind: str) -> None:
    with pytest.raises(ValueError, match="test_mdeq does not support feature_cls"):
        timm.create_model("test_mdeq", features_only=True, feature_cls=kind)


def test_a_model_has_branches() -> None:
    with pytest.raises(ValueError, match="channels must have at least one entry"):
        timm.create_model("test_mdeq", channels=())


def test_a_model_says_of_its_weights_what_is_true_of_them() -> None:
    """One from scratch is not trained on the data of the released weights, nor bound by their terms."""
    trained = timm.get_pretrained_cfg("mdeq_tiny_seg")
    assert (trained.license, trained.description) == ("cc-by-nc-4.0", "mdeq_tiny_seg trained on CamVid")
    scratch = timm.create_model("mdeq_tiny_seg").pretrained_cfg
    assert (scratch["license"], scratch["description"]) == ("apache-2.0", None)
    released = timm.create_model("mdeq_tiny_cifar", pretrained=True).pretrained_cfg
    assert released["description"] == "mdeq_tiny_cifar trained on CIFAR-10"
    assert timm.create_model("mdeq_tiny_cifar", pretrained=True, num_classes=5).pretrained_cfg["description"] is None


def test_drop_rate_drops_features_of_the_head() -> None:
    model = timm.create_model("test_mdeq", drop_rate=0.5).train()
    seen = model.forward_head(torch.ones(4, 32, 2, 2), pre_logits=True)
    assert set(seen.unique().tolist()) == {0.0, 2.0}


def test_default_solvers_are_those_of_the_official_configurations() -> None:
    with torch.device("meta"):
        small, cifar = (timm.create_model(name) for name in ("mdeq_small", "mdeq_large_cifar"))
    assert small.deq.solver == mdeq.Broyden(max_steps=26, stop_mode="abs")
    assert small.deq.gradient == mdeq.ImplicitGradient(mdeq.Broyden(max_steps=27, stop_mode="abs"))
    assert cifar.deq.solver == mdeq.Broyden(max_steps=18)
    assert cifar.deq.gradient == mdeq.ImplicitGradient(mdeq.Broyden(max_steps=20))


def test_grad_checkpointing_computes_the_steps_again_in_backward() -> None:
    model = timm.create_model("test_mdeq", gradient={"name": "phantom", "num_steps": 2}).train()
    calls, again = [], []
    model.equilibrium.cell.register_forward_pre_hook(lambda *_: calls.append(1))
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        loss = model(torch.randn(2, 3, 32, 32)).sum()
        before = len(calls)
        loss.backward()
        again.append(len(calls) - before)
    assert again == [0, 2]
