"""Batched preconditioned conjugate gradients, every image on its own."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_CHECK_INTERVAL = (
    8  # iterations between looks at the convergence flags of an accelerator: each look is a sync
)


@dataclass(frozen=True)
class CgInfo:
    """How a solve went: iterations, relative residual ||b - A x|| / ||b||, converged, each [B]."""

    iterations: Tensor
    residual: Tensor
    converged: Tensor


def conjugate_gradient(
    apply: Callable[[Tensor], Tensor],
    b: Tensor,
    *,
    precondition: Callable[[Tensor], Tensor] | None = None,
    guess: Tensor | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 200,
) -> tuple[Tensor, CgInfo]:
    """Solve A x = b for each image of a batch, A symmetric positive definite per image.

    apply: A; precondition: an approximation of A^-1, symmetric positive definite; both map [B, ...] to
    [B, ...] image by image. b, guess: [B, ...], real. An image is done when its residual, as CG updates it,
    is at most `tolerance` times ||b||, or when its curvature p^T A p is not positive (A is then not positive
    definite, or holds NaN); from then on it is frozen, so its result does not depend on its batch mates.
    Lack of convergence raises nothing: see the info.

    Source: Saad, Iterative Methods for Sparse Linear Systems (2003), algorithm 9.1.
    """
    x = torch.zeros_like(b) if guess is None else guess
    residual = b if guess is None else b - apply(guess)
    direction = z = residual if precondition is None else precondition(residual)
    squared = dot(residual, residual)
    rho = squared if z is residual else dot(residual, z)
    norm = dot(b, b).sqrt()
    active = ~(squared.sqrt() <= tolerance * norm)  # so that NaN is not taken for convergence
    iterations = torch.zeros(len(b), dtype=torch.int64, device=b.device)
    interval = 1 if b.device.type == "cpu" else _CHECK_INTERVAL
    for step in range(max_iterations):
        if step % interval == 0 and not active.any():
            break
        image = apply(direction)
        curvature = dot(direction, image)
        active = active & (curvature > 0)
        length = _spread(torch.where(active, rho / curvature, 0), b)
        x = x + length * direction
        residual = residual - length * image
        squared = dot(residual, residual)
        z = residual if precondition is None else precondition(residual)
        previous, rho = rho, squared if z is residual else dot(residual, z)
        direction = z + _spread(torch.where(active, rho / previous, 0), b) * direction
        iterations = iterations + active
        active = active & ~(squared.sqrt() <= tolerance * norm)
    remaining = squared.sqrt()
    relative = torch.where(remaining == 0, 0, remaining / norm)
    return x, CgInfo(iterations, relative, remaining <= tolerance * norm)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products [B] of the real images a and b [B, ...], bitwise the same in every batch.

    Halves are added until one number is left: torch's sums and dot products choose their order of summation
    by the number of images and of threads, elementwise addition has no order to choose.
    """
    terms = (a * b).flatten(1)
    while terms.shape[1] > 1:
        half, odd = divmod(terms.shape[1], 2)
        folded = terms[:, :half] + terms[:, half : 2 * half]
        if odd:
            folded[:, 0] += terms[:, -1]
        terms = folded
    return terms[:, 0]


def _spread(scalars: Tensor, like: Tensor) -> Tensor:
    """Scalars [B] as [B, 1, ...], to multiply `like`."""
    return scalars.reshape(-1, *[1] * (like.ndim - 1))
