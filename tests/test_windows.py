"""Prediction in windows that overlap, from cold and warm starts."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from monai.inferers import sliding_window_inference
from safetensors.torch import load_file
from torch import Tensor

import mdeq
from mdeq.models.official import from_official
from tests.official import DATA

SOLVER = mdeq.Broyden(tol=1e-2, max_steps=60)


def converging() -> mdeq.MDEQSegmenter:
    """Return a 2D segmenter with the equilibrium of the official CIFAR TINY network, which converges."""
    model = mdeq.MDEQSegmenter(
        num_classes=4, channels=(24, 24), expansion=5, stem_stride=1, post_norm_affine=False, solver=SOLVER
    )
    mdeq.transfer(from_official(load_file(DATA / "official_cifar_tiny.safetensors")), model)
    return model.eval()


def smooth(*size: int, batch: int = 1) -> Tensor:
    return F.avg_pool2d(torch.randn(batch, 3, *size), 7, 1, 3) * 7


def predict(x: Tensor, predictor: Any, window: int = 16, overlap: float = 0.75, **kwargs: Any) -> Tensor:
    roi = [window] * (x.ndim - 2)
    return sliding_window_inference(x, roi, 1, predictor, overlap=overlap, mode="gaussian", **kwargs)


def evaluations(predictor: mdeq.WarmStart) -> int:
    return sum(stats.nfe for stats in predictor.stats)


def test_warm_starts_save_evaluations() -> None:
    model, x = converging(), smooth(36, 36)
    cold: list[mdeq.SolveStats] = []

    def from_zero(window: Tensor) -> Tensor:
        logits, equilibrium = model(window, return_equilibrium=True)
        cold.append(equilibrium.stats)
        return logits

    warm = mdeq.WarmStart(model)
    with torch.no_grad():
        expected, logits = predict(x, from_zero, 24), predict(x, warm, 24, with_coord=True)
    assert len(cold) == len(warm.stats) == 9
    assert all(stats.converged.all() for stats in (*cold, *warm.stats))
    assert warm.stats[0].nfe == cold[0].nfe
    assert evaluations(warm) < 0.95 * sum(stats.nfe for stats in cold)
    assert float((logits - expected).norm() / expected.norm()) < 2e-2  # the tolerance of the solves is 1e-2


def test_a_warm_start_asks_for_places() -> None:
    with pytest.raises(TypeError, match="with_coord=True"):
        predict(smooth(36, 36), mdeq.WarmStart(converging()), 24)


def test_a_window_seen_before_needs_no_step() -> None:
    model, x = converging(), smooth(24, 24)
    warm = mdeq.WarmStart(model, mdeq.Broyden(tol=1e-3, max_steps=60))
    place = [slice(0, 1), slice(None), slice(8, 32), slice(4, 28)]
    first, again = warm(x, [place]), warm(x, [place])
    assert warm.stats[1].nfe == 1
    assert torch.equal(first, again)


def test_repetition_gives_the_same_bits() -> None:
    warm = mdeq.WarmStart(converging())
    a, b = smooth(24, 20), smooth(20, 20)
    first = predict(a, warm, with_coord=True)
    count = evaluations(warm)
    predict(b, warm, with_coord=True)
    assert torch.equal(predict(a, warm, with_coord=True), first)
    assert evaluations(warm) == count


def test_volumes_of_a_batch_are_apart() -> None:
    warm = mdeq.WarmStart(converging())
    x = smooth(20, 20, batch=2)
    together = predict(x, warm, with_coord=True)
    for i in range(2):
        assert torch.equal(predict(x[i : i + 1], warm, with_coord=True), together[i : i + 1])


@pytest.mark.parametrize("stem_stride", [2, (1, 2, 2)])
@pytest.mark.parametrize("sw_batch_size", [1, 3])
def test_volumes(stem_stride: Any, sw_batch_size: int) -> None:
    """Sizes that no stride divides, smaller than a window too; the state pasted lies where it came from."""
    model = mdeq.MDEQSegmenter(
        1, 3, spatial_dims=3, channels=(4, 8), num_groups=2, expansion=2, stem_stride=stem_stride, solver=SOLVER
    ).eval()
    model.deq.solver = mdeq.Picard(max_steps=1, tol=0.0)
    x = torch.randn(1, 1, 19, 27, 15)
    for predictor, with_coord in ((model, False), (mdeq.WarmStart(model), True)):
        with torch.no_grad():
            logits = sliding_window_inference(
                x, (16, 16, 16), sw_batch_size, predictor, overlap=0.4, with_coord=with_coord
            )
        assert logits.shape == (1, 3, 19, 27, 15)
        assert logits.isfinite().all()


def test_start_of_a_shifted_window() -> None:
    """What is known lies where it was found, on every branch; the rest is zero."""
    model = mdeq.MDEQSegmenter(1, 2, channels=(4, 8), num_groups=2, expansion=2, stem_stride=(1, 2)).eval()
    model.deq.solver = mdeq.Picard(max_steps=1, tol=0.0)
    seen: list[mdeq.State] = []
    model.equilibrium.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    model.equilibrium.register_forward_hook(lambda module, args, result: seen.append(result.state))
    warm = mdeq.WarmStart(model)
    for row, column in ((0, 0), (4, 8)):
        warm(torch.randn(1, 1, 16, 32), [[slice(0, 1), slice(None), slice(row, row + 16), slice(column, column + 32)]])
    start, state, shifted, _ = seen
    assert not any(z.any() for z in start)
    for z, known, rows, columns in zip(shifted, state, (4, 2), (4, 2)):
        assert torch.equal(z[:, :, :-rows, :-columns], known[:, :, rows:, columns:])
        assert not z[:, :, -rows:].any()
        assert not z[:, :, :, -columns:].any()
