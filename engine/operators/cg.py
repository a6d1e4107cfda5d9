"""Batched preconditioned conjugate gradients, every image on its own."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from alpenglow.kernels import cg_update
from alpenglow.kernels.cg_update import cg_direction, cg_residual, cg_start, dot

_CHECK_INTERVAL = (
    8  # iterations between looks at the convergence flags of an accelerator: each look is a sync
)


@dataclass(frozen=True)
class CgInfo:
    """How a solve went: iterations, relative residual ||b - A x|| / ||b||, converged, each [B]."""

    iterations: Tensor
    residual: Tensor
    converged: Tensor


@torch.no_grad()
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
    [B, ...] image by image, in the dtype of b, and keep no reference to what they get: it is updated in
    place. b, guess: [B, ...], real. An image is done when its residual, as CG updates it, is at most
    `tolerance` times ||b||, or when its curvature p^T A p is not positive (A is then not positive definite,
    or holds NaN); from then on it is frozen, so its result does not depend on its batch mates. Lack of
    convergence raises nothing: see the info. The result carries no gradient.

    Source: Saad, Iterative Methods for Sparse Linear Systems (2003), algorithm 9.1.
    """
    x = torch.zeros_like(b, memory_format=torch.contiguous_format) if guess is None else _copy(guess)
    residual = _copy(b) if guess is None else (b - apply(guess)).contiguous()
    z = residual if precondition is None else precondition(residual)
    direction = _copy(z)
    norm = dot(b, b).sqrt()
    scalars = cg_start(residual, z, tolerance * norm)
    interval = 1 if b.device.type == "cpu" else _CHECK_INTERVAL
    for step in range(max_iterations):
        if step % interval == 0 and not scalars[:, cg_update.ACTIVE].any():
            break
        sums = cg_residual(residual, direction, apply(direction), scalars)
        z = residual if precondition is None else precondition(residual)
        scalars = cg_direction(x, direction, residual, z, scalars, sums)
    remaining = scalars[:, cg_update.SQUARED].sqrt()
    relative = torch.where(remaining == 0, 0, remaining / norm)
    iterations = scalars[:, cg_update.ITERATIONS].long()
    return x, CgInfo(iterations, relative, remaining <= scalars[:, cg_update.LIMIT])


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)
