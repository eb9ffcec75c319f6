"""mdeq.compile_cell: one graph for every batch size, with the results of the cell as it is."""

import copy
import threading
from unittest import mock

import pytest
import timm
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import mdeq

TINY = dict(channels=(8, 16), num_groups=2, expansion=1, num_classes=3)


def small() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("mdeq_tiny_cifar", solver=dict(name="picard", max_steps=2), **TINY).eval()


def test_one_graph_serves_every_batch_size() -> None:
    """Also where the batch is as large as another axis: 8 and 16 channels, 16 and 8 pixels a side."""
    model, counter = small(), CompileCounter()
    mdeq.compile_cell(model, backend=counter)
    graphs = {}
    with torch.no_grad():
        for batch in (3, 2, 8, 15, 16, 17, 32, 3, 1, 1):
            x = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))
            torch.testing.assert_close(model(x), small()(x))
            graphs[batch] = counter.frame_count
    assert graphs[15] == 1
    # PyTorch's choice of a convolution's kernels on a CPU looks at whether a batch has 16 samples.
    assert graphs[32] <= 2
    assert graphs[3] == graphs[32]
    assert graphs[1] == graphs[32] + 1


@pytest.mark.filterwarnings("ignore")  # torch.compile warns of what it does itself
@pytest.mark.parametrize("gradient", ["implicit", "phantom"])
def test_gradients_and_penalty_are_those_of_the_plain_cell(gradient: str) -> None:
    plain = small().double().train()
    plain.deq.gradient = mdeq.build_gradient({"name": gradient})
    compiled = copy.deepcopy(plain)
    mdeq.compile_cell(compiled, backend="aot_eager")
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    results = []
    for model in (plain, compiled):
        torch.manual_seed(1)
        logits, equilibrium = model(x, return_equilibrium=True, jacobian_probes=1)
        (logits.square().sum() + equilibrium.jacobian_penalty).backward()
        results.append([logits, equilibrium.jacobian_penalty, *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_many_models_are_compiled_in_one_process() -> None:
    """PyTorch counts the graphs of all models together."""
    for _ in range(8):
        model = small()
        mdeq.compile_cell(model, backend="eager")
        with torch.no_grad():
            for batch in (3, 17, 1):
                model(torch.randn(batch, 3, 16, 16))


@pytest.mark.filterwarnings("ignore")  # as above
def test_backward_in_another_thread() -> None:
    """As on CUDA. PyTorch's settings of a process may hold in one thread alone; a reversible gradient evaluates f."""
    for _ in range(10):
        model = small().train()
        model.deq.gradient = mdeq.ReversibleGradient()
        mdeq.compile_cell(model, backend="eager")
        loss = model(torch.randn(3, 3, 16, 16)).square().sum()
    thread = threading.Thread(target=loss.backward)
    with mock.patch("threading.excepthook") as failed:
        thread.start()
        thread.join()
    assert not failed.called, failed.call_args


def test_another_model_is_refused() -> None:
    with pytest.raises(TypeError, match="takes a model of this package, got Linear"):
        mdeq.compile_cell(nn.Linear(2, 2))
