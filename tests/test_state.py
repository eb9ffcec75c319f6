"""States as tuples of tensors and as one flat tensor."""

import dataclasses

import pytest
import torch
from torch import Tensor

from mdeq import State, StateLayout

SHAPES = {
    "vector": [(5,)],
    "image": [(4, 6, 7)],
    "volume": [(2, 3, 4, 5)],
    "branches": [(4, 8, 8), (6, 4, 4), (8, 2, 2)],
    "mixed": [(3, 4, 4), (7,), (2, 2, 2, 2)],
    "scalar": [()],
    "scalar-and-image": [(), (2, 3, 3)],
}


@pytest.fixture(params=SHAPES)
def state(request: pytest.FixtureRequest) -> State:
    return tuple(torch.randn(3, *shape, dtype=torch.float64) for shape in SHAPES[request.param])


def test_round_trip(state: State) -> None:
    layout = StateLayout.of(state)
    z = layout.flatten(state)
    assert layout.dim == sum(x[0].numel() for x in state)
    assert z.shape == (3, layout.dim)
    back = layout.unflatten(z)
    assert [x.shape for x in back] == [x.shape for x in state]
    assert all(torch.equal(x, y) for x, y in zip(state, back))


def test_order(state: State) -> None:
    """A row is one sample, its tensors in order, each in row-major order."""
    z = StateLayout.of(state).flatten(state)
    for i in range(3):
        assert torch.equal(z[i], torch.cat([x[i].reshape(-1) for x in state]))


def test_views_alias(state: State) -> None:
    """`unflatten` copies nothing, `flatten` does."""
    layout = StateLayout.of(state)
    z = layout.flatten(state)
    parts = layout.unflatten(z)
    for part in parts:
        assert part.untyped_storage().data_ptr() == z.untyped_storage().data_ptr()
        part.fill_(7.0)
    assert (z == 7).all()
    assert not any((x == 7).any() for x in state)


def test_feature_maps_that_lie_channels_last() -> None:
    """They stay so: nothing is copied on the way out, and the flat form has the channels of a pixel side by side."""
    image = torch.randn(3, 4, 6, 7).contiguous(memory_format=torch.channels_last)
    volume = torch.randn(3, 2, 3, 4, 5).contiguous(memory_format=torch.channels_last_3d)
    state = (image, volume, torch.randn(3, 4, 6, 7), torch.randn(3, 5))
    layout = StateLayout.of(state)
    assert layout.channels_last == (True, True, False, False)
    z = layout.flatten(state)
    assert torch.equal(z[:, : image[0].numel()], image.permute(0, 2, 3, 1).flatten(1))
    back = layout.unflatten(z)
    assert all(torch.equal(x, y) for x, y in zip(state, back))
    assert all(x.stride()[1:] == y.stride()[1:] for x, y in zip(state, back))
    assert StateLayout.of(back) == layout
    assert all(x.untyped_storage().data_ptr() == z.untyped_storage().data_ptr() for x in back)
    elsewhere = tuple(x.contiguous() for x in state)  # of another memory format than at the start
    assert torch.equal(layout.flatten(elsewhere), z)


def test_dtype(state: State) -> None:
    layout = StateLayout.of(state)
    assert layout.flatten(state).dtype == torch.float64
    assert layout.flatten(state, torch.float32).dtype == torch.float32
    assert layout.unflatten(torch.zeros(2, layout.dim, dtype=torch.bfloat16))[0].dtype == torch.bfloat16


def test_other_batch_sizes(state: State) -> None:
    layout = StateLayout.of(state)
    for batch in (0, 1, 4):
        z = torch.randn(batch, layout.dim)
        assert torch.equal(layout.flatten(layout.unflatten(z)), z)


def test_gradients_pass(state: State) -> None:
    leaves = tuple(x.requires_grad_() for x in state)
    layout = StateLayout.of(leaves)
    weights = torch.randn(3, layout.dim, dtype=torch.float64)
    grads = torch.autograd.grad((layout.flatten(leaves) * weights).sum(), leaves)
    assert torch.equal(layout.flatten(grads), weights)


def test_layouts_are_values() -> None:
    state: tuple[Tensor, ...] = (torch.zeros(2, 3), torch.zeros(2, 4, 5))
    layout = StateLayout.of(state)
    assert layout == StateLayout.of(tuple(x[:1] for x in state))
    assert hash(layout) == hash(StateLayout.of(state))
    assert layout != StateLayout.of(state[:1])
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.shapes = ()


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"share a batch size, got \[\(2, 3\), \(4, 3\)\]"):
        StateLayout.of((torch.zeros(2, 3), torch.zeros(4, 3)))
    for state in ((), torch.zeros(2, 3), (torch.zeros(()),)):
        with pytest.raises(ValueError, match="a state must be a tuple of tensors"):
            StateLayout.of(state)
    for state in ((torch.zeros(2, dtype=torch.int64),), (torch.zeros(2), torch.zeros(2).double())):
        with pytest.raises(ValueError, match="share a floating-point dtype"):
            StateLayout.of(state)
    layout = StateLayout.of((torch.zeros(2, 3),))
    with pytest.raises(ValueError, match=r"expected a state of shapes \[\(3,\)\], got \[\(4,\)\]"):
        layout.flatten((torch.zeros(2, 4),))
    with pytest.raises(ValueError, match="expected a state of shapes"):
        layout.flatten((torch.zeros(2, 3), torch.zeros(2, 3)))
    with pytest.raises(RuntimeError, match="split"):
        layout.unflatten(torch.zeros(2, 4))
