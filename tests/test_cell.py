"""The multiscale cell in 2D and 3D."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mdeq import DEQ, Broyden, ImplicitGradient, MultiscaleCell, State
from mdeq.models.implicit import CellFn

Case = tuple[MultiscaleCell, State, tuple[Tensor | None, ...]]


def make(
    spatial_dims: int, channels: tuple[int, ...] = (8, 16, 8), size: Any = 9, batch: int = 2, **kwargs: Any
) -> Case:
    """Return a cell in float64 with a random state and an injection into branch 0."""
    settings = dict(expansion=2, num_groups=4) | kwargs
    cell = MultiscaleCell(channels, spatial_dims=spatial_dims, dtype=torch.float64, **settings)
    size = (size,) * spatial_dims if isinstance(size, int) else size
    injection = torch.randn(batch, channels[0], *size, dtype=torch.float64)
    state = tuple(torch.randn_like(z) for z in cell.zero_state(injection))
    return cell, state, (injection, *[None] * (len(channels) - 1))


dims = pytest.mark.parametrize("spatial_dims", [2, 3])


@dims
@pytest.mark.parametrize("channels", [(8,), (8, 16), (4, 8, 8, 16)])
@pytest.mark.parametrize("size", [8, 9, 5])
def test_shapes(spatial_dims: int, channels: tuple[int, ...], size: int) -> None:
    """f keeps the shapes of its state; branches halve rounding up, so odd sizes work."""
    cell, state, injection = make(spatial_dims, channels, size)
    halves = [size]
    for _ in channels[1:]:
        halves.append(-(-halves[-1] // 2))
    expected = [(2, c, *[s] * spatial_dims) for c, s in zip(channels, halves)]
    assert [tuple(z.shape) for z in state] == expected
    out = cell(state, injection)
    assert [tuple(z.shape) for z in out] == expected
    assert all(z.isfinite().all() for z in out)
    assert cell.branch_sizes((size,) * spatial_dims) == tuple((s,) * spatial_dims for s in halves)


@pytest.mark.parametrize(("spatial_dims", "size"), [(2, (7, 12)), (2, (5, 1)), (3, (5, 8, 11)), (3, (1, 6, 9))])
def test_sides_of_their_own(spatial_dims: int, size: tuple[int, ...]) -> None:
    cell, state, injection = make(spatial_dims, size=size)
    assert [z.shape for z in cell(state, injection)] == [z.shape for z in state]


@dims
def test_pure(spatial_dims: int) -> None:
    """Two calls give the same bits and leave the arguments as they were, in train mode too."""
    cell, state, injection = make(spatial_dims, dropout=0.5)
    cell.train()
    copies = [z.clone() for z in (*state, injection[0])]
    buffers = {key: value.clone() for key, value in cell.state_dict().items()}
    masks = cell.sample_masks(injection[0])
    first, second = (cell(state, injection, masks) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second))
    assert all(torch.equal(x, y) for x, y in zip(copies, (*state, injection[0])))
    assert all(torch.equal(value, buffers[key]) for key, value in cell.state_dict().items())


@dims
def test_samples_are_independent(spatial_dims: int) -> None:
    cell, state, injection = make(spatial_dims, batch=3)
    out = cell(state, injection)
    for i in range(3):
        single = cell(tuple(z[i : i + 1] for z in state), (injection[0][i : i + 1], None, None))
        assert all((x[0] - y[i]).abs().max() < 1e-12 for x, y in zip(single, out))


@dims
def test_masks(spatial_dims: int) -> None:
    """One value per sample and channel, 0 or 1 / (1 - p); none in eval mode or at rate 0."""
    cell, state, injection = make(spatial_dims, (32, 64), size=4, batch=16, dropout=0.25)
    masks = cell.train().sample_masks(injection[0])
    assert [tuple(m.shape) for m in masks] == [(16, c, *[1] * spatial_dims) for c in (32, 64)]
    kept = torch.cat([m.flatten() for m in masks])
    assert set(kept.unique().tolist()) == {0.0, 1 / 0.75}
    assert float((kept > 0).double().mean()) == pytest.approx(0.75, abs=0.05)
    other = cell.sample_masks(injection[0])
    assert not torch.equal(masks[0], other[0])
    assert not torch.equal(cell(state, injection, masks)[0], cell(state, injection, other)[0])
    assert cell.eval().sample_masks(injection[0]) is None
    assert make(spatial_dims)[0].train().sample_masks(injection[0]) is None
    ones = tuple(torch.ones_like(m) for m in masks)
    assert all(torch.equal(x, y) for x, y in zip(cell(state, injection, ones), cell(state, injection)))


def test_mask_sits_before_the_injection() -> None:
    """A channel that is dropped passes its injection and its skip all the same."""
    cell, state, injection = make(2, (8,))
    out = cell(state, injection, (torch.zeros(2, 8, 1, 1, dtype=torch.float64),))[0]
    block = cell.blocks[0]
    torch.testing.assert_close(out, block.norm3(torch.relu(block.norm2(injection[0]) + state[0])), rtol=0, atol=1e-12)


@dims
def test_weight_norm(spatial_dims: int) -> None:
    """Kernels folded once give the same f and the same gradients, which reach lengths g and directions v."""
    cell, state, injection = make(spatial_dims)
    kernels = cell.kernels()
    folded, plain = cell(state, injection, kernels=kernels), cell(state, injection)
    assert all(torch.equal(x, y) for x, y in zip(folded, plain))
    weights = [torch.randn_like(x) for x in plain]
    parameters = dict(cell.named_parameters())
    grads = [
        torch.autograd.grad(sum((w * x).sum() for w, x in zip(weights, out)), list(parameters.values()))
        for out in (folded, plain)
    ]
    for name, x, y in zip(parameters, *grads):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)
        assert x.norm() > 0, name
    lengths = [name for name in parameters if name.endswith("weight.original0")]
    assert len(lengths) == 3 * 3  # two convolutions of each block, one after each fusion
    layer = cell.blocks[0].conv1
    expected = layer.parametrizations.weight.original0.flatten()
    torch.testing.assert_close(layer.weight.flatten(1).norm(dim=1), expected, rtol=1e-12, atol=0)


@dims
def test_without_weight_norm(spatial_dims: int) -> None:
    cell, state, injection = make(spatial_dims, weight_norm=False)
    assert not any("parametrizations" in name for name, _ in cell.named_parameters())
    assert all(kernel is layer.weight for layer, kernel in cell.kernels().items())
    assert all(
        torch.equal(x, y) for x, y in zip(cell(state, injection), cell(state, injection, kernels=cell.kernels()))
    )


def test_volume_of_depth_one_is_an_image() -> None:
    """The 3D cell with the 2D kernels in its middle slices, elsewhere noise, on one slice."""
    flat, state, injection = make(2, (8, 16, 8), size=(9, 6), weight_norm=False)
    volume, _, _ = make(3, (8, 16, 8), size=(1, 9, 6), weight_norm=False)
    with torch.no_grad():
        for source, target in zip(flat.modules(), volume.modules(), strict=True):
            if isinstance(source, nn.Conv2d):
                target.weight[:, :, target.weight.shape[2] // 2] = source.weight
            elif isinstance(source, nn.GroupNorm):
                source.weight.normal_()
                source.bias.normal_()
                target.load_state_dict(source.state_dict())
        expected = flat(state, injection)
        actual = volume(tuple(z.unsqueeze(2) for z in state), (injection[0].unsqueeze(2), None, None))
    for x, y in zip(actual, expected):
        assert (x.squeeze(2) - y).abs().max() < 1e-12


def test_single_branch() -> None:
    """One branch: the block's output is f, nothing is fused."""
    cell, state, injection = make(2, (8,))
    block = cell.blocks[0]
    hidden = torch.relu(block.norm1(block.conv1(state[0])))
    expected = block.norm3(torch.relu(block.norm2(block.conv2(hidden) + injection[0]) + state[0]))
    (out,) = cell(state, injection)
    assert torch.equal(out, expected)
    assert {name.split(".")[0] for name, _ in cell.named_parameters()} == {"blocks"}


def test_two_branches_by_hand() -> None:
    """Every branch into every branch, then ReLU, 1x1 convolution and norm."""
    cell, state, injection = make(2, (8, 16))
    kernels = cell.kernels()
    fine, coarse = (block(z, u, None, kernels) for block, z, u in zip(cell.blocks, state, injection))
    up, down = cell.fuse[0][1], cell.fuse[1][0]
    enlarged = up.norm(up.conv(coarse)).repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, :9, :9]
    sums = fine + enlarged, down.norms[0](down.convs[0](fine)) + coarse
    expected = [post.norm(post.conv(torch.relu(x))) for post, x in zip(cell.post_fuse, sums)]
    for x, y in zip(cell(state, injection), expected):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_two_steps_down() -> None:
    """From branch 0 to branch 2: two strided convolutions with their norms, ReLU between them only."""
    cell, state, _ = make(2)
    link = cell.fuse[2][0]
    middle = link.norms[0](link.convs[0](state[0]))
    expected = link.norms[1](link.convs[1](torch.relu(middle)))
    assert middle.shape == (2, 8, 5, 5), "channels change at the last step"
    torch.testing.assert_close(link(state[0], (3, 3), cell.kernels()), expected, rtol=0, atol=1e-12)


@dims
def test_every_injection_counts(spatial_dims: int) -> None:
    cell, state, _ = make(spatial_dims)
    injection = tuple(torch.randn_like(z).requires_grad_() for z in state)
    grads = torch.autograd.grad(sum(x.square().sum() for x in cell(state, injection)), injection)
    assert all(g.norm() > 0 for g in grads)


@dims
def test_take(spatial_dims: int) -> None:
    """f for some of the samples is f for all, restricted: injection and masks go along."""
    cell, state, injection = make(spatial_dims, batch=4, dropout=0.5)
    fn = CellFn(cell, injection, cell.train().sample_masks(injection[0]), cell.kernels())
    index = torch.tensor([3, 1])
    whole = fn(state)
    part = fn.take(index)(tuple(z[index] for z in state))
    once_more = fn.take(index).take(torch.tensor([1]))(tuple(z[[1]] for z in state))
    for x, y, z in zip(whole, part, once_more):
        assert (x[index] - y).abs().max() < 1e-12
        assert (x[[1]] - z).abs().max() < 1e-12
    without = CellFn(cell, injection, None, cell.kernels()).take(index)
    assert without.masks is None
    assert without.injection[1] is None


def test_checkpointing_changes_no_gradient() -> None:
    cell, state, injection = make(2, dropout=0.5)
    masks = cell.train().sample_masks(injection[0])
    grads = []
    for checkpoint in (False, True):
        out = CellFn(cell, injection, masks, cell.kernels(), checkpoint)(state)
        grads.append(torch.autograd.grad(sum(x.square().sum() for x in out), list(cell.parameters())))
    for x, y in zip(*grads):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_zero_state() -> None:
    """In the parameters' dtype, whatever autocast made of the injection."""
    cell = MultiscaleCell((8, 8), num_groups=4, expansion=1)
    state = cell.zero_state(torch.randn(2, 8, 7, 7).bfloat16())
    assert [tuple(z.shape) for z in state] == [(2, 8, 7, 7), (2, 8, 4, 4)]
    assert all(z.dtype == torch.float32 and not z.any() for z in state)


def test_meta() -> None:
    cell = MultiscaleCell((8, 8), num_groups=4, expansion=1, device="meta")
    injection = torch.zeros(2, 8, 7, 7, device="meta")
    assert [tuple(z.shape) for z in cell(cell.zero_state(injection), (injection, None))] == [(2, 8, 7, 7), (2, 8, 4, 4)]


def test_autocast() -> None:
    """Folded kernels are cast once, and gradients reach every parameter through them."""
    cell = MultiscaleCell((8, 8), num_groups=4, expansion=2)
    injection = torch.randn(2, 8, 6, 6)
    deq = DEQ(Broyden(max_steps=4), ImplicitGradient(Broyden(max_steps=4)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fn = CellFn(cell, (injection, None), None, cell.kernels())
        equilibrium = deq(fn, cell.zero_state(injection))
    assert {kernel.dtype for kernel in fn.kernels.values()} == {torch.bfloat16}
    assert {z.dtype for z in equilibrium.state} == {torch.float32}
    weights = [torch.randn_like(z) for z in equilibrium.state]
    sum((w * z).sum() for w, z in zip(weights, equilibrium.state)).backward()
    for name, parameter in cell.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.norm() > 0, name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(spatial_dims=1), "spatial_dims must be 2 or 3, got 1"),
        (dict(num_groups=3), "num_groups must be even and >= 2, got 3"),
        (dict(channels=(8, 12)), "divisible by num_groups=8, got 12"),
        (dict(channels=(8,), expansion=1.5), "divisible by num_groups=8, got 8"),
        (dict(dropout=1.0), r"dropout must be in \[0, 1\), got 1.0"),
        (dict(dropout=-0.1), r"dropout must be in \[0, 1\), got -0.1"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiscaleCell(**(dict(channels=(8, 8)) | settings))


def test_state_of_the_wrong_length() -> None:
    cell, state, injection = make(2)
    with pytest.raises(ValueError, match="argument"):
        cell(state[:2], injection)
    with pytest.raises(ValueError, match="argument"):
        cell(state, injection[:1])
