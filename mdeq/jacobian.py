"""The Jacobian J of the fixed-point map at a point: a regulariser and a diagnostic, by vector-Jacobian products."""

import torch
from torch import Tensor

from .solvers import FlatFn


def evaluate(fn: FlatFn, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return z as a fresh leaf, and f(z) with its graph."""
    with torch.inference_mode(False), torch.enable_grad():
        z = z.detach().clone().requires_grad_()
        return z, fn(z)


def vjp(f_z: Tensor, z: Tensor, v: Tensor, **kwargs: bool) -> Tensor:
    """Return v^T J `(B, D)`; zeros where f ignores z."""
    if not f_z.requires_grad:
        return torch.zeros_like(z)
    (product,) = torch.autograd.grad(f_z, z, v, allow_unused=True, **kwargs)
    return torch.zeros_like(z) if product is None else product


def jacobian_frobenius(fn: FlatFn, z: Tensor, num_probes: int = 1) -> Tensor:
    """Return an unbiased estimate of the squared Frobenius norm of J at z, over the number of elements of z.

    A scalar, differentiable in what fn closes over where gradients are enabled.

    Args:
        fn: the map `(B, D) -> (B, D)`.
        z: `(B, D)` where J is taken.
        num_probes: standard-normal vectors e over which `|e^T J|^2` is averaged.

    Raises:
        ValueError: if num_probes is below 1.

    Reference:
        Bai, Koltun and Kolter 2021, Stabilizing Equilibrium Models by Jacobian Regularization, Eq. 7.
    """
    if num_probes < 1:
        raise ValueError(f"num_probes must be >= 1, got {num_probes}")
    differentiable = torch.is_grad_enabled()
    z, f_z = evaluate(fn, z)
    total = z.new_zeros(())
    for probe in range(num_probes):
        retain = differentiable or probe + 1 < num_probes
        product = vjp(f_z, z, torch.randn_like(z), create_graph=differentiable, retain_graph=retain)
        total = total + product.square().sum()
    return total / (num_probes * max(z.numel(), 1))  # an empty batch has no penalty


def spectral_radius(fn: FlatFn, z: Tensor, num_iters: int = 100) -> Tensor:
    """Return the largest absolute eigenvalue of J at z for each sample, `(B,)`.

    Power iteration on J^T from a random vector. The estimate is the geometric mean of the growth over the second half,
    which is right also where the dominant eigenvalues are a complex pair and a Rayleigh quotient is not. Where J is
    then far from normal, the growth oscillates as the vector turns, and the estimate is off by up to
    log(c) / (num_iters / 2), with c the condition of its eigenvectors: by a few per cent, differently at every call.

    Args:
        fn: the map `(B, D) -> (B, D)`.
        z: `(B, D)` where J is taken.
        num_iters: vector-Jacobian products.

    Raises:
        ValueError: if num_iters is below 2.
    """
    if num_iters < 2:
        raise ValueError(f"num_iters must be >= 2, got {num_iters}")
    z, f_z = evaluate(fn, z)
    v = torch.randn_like(z)
    v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True)
    log_growth = []
    for _ in range(num_iters):
        v = vjp(f_z, z, v, retain_graph=True)
        growth = torch.linalg.vector_norm(v, dim=1, keepdim=True)
        log_growth.append(growth.squeeze(1).log())
        v = v / torch.where(growth > 0, growth, torch.ones_like(growth))  # a nilpotent J ends in zeros: radius 0
    return torch.stack(log_growth[num_iters // 2 :]).mean(dim=0).exp()
