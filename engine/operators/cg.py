"""Batched preconditioned conjugate gradients, every image on its own."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
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


@dataclass
class CgCount:
    """Solves of one image, their iterations in total, and the most that one took; see `count_iterations`."""

    solves: int = 0
    # Tensors of the solves' device: adding to them makes no accelerator wait.
    total: Tensor | int = 0
    largest: Tensor | int = 0

    def add(self, iterations: Tensor) -> None:
        """Count a batch of solves, iterations [B]."""
        if len(iterations) == 0:
            return
        self.solves += len(iterations)
        self.total = iterations.sum() + self.total
        self.largest = iterations.max().clamp(min=self.largest)


_counts: ContextVar[tuple[CgCount, ...]] = ContextVar("counts", default=())


@contextmanager
def count_iterations() -> Iterator[CgCount]:
    """Counts the iterations of every `conjugate_gradient` of this thread within the block."""
    count = CgCount()
    token = _counts.set((*_counts.get(), count))
    try:
        yield count
    finally:
        _counts.reset(token)


@torch.no_grad()
def conjugate_gradient(
    apply: Callable[[Tensor], Tensor],
    b: Tensor,
    *,
    precondition: Callable[[Tensor], Tensor] | None = None,
    guess: Tensor | None = None,
    tolerance: float | Tensor = 1e-6,
    max_iterations: int = 200,
) -> tuple[Tensor, CgInfo]:
    """Solve A x = b for each image of a batch, A symmetric positive definite per image.

    apply: A; precondition: an approximation of A^-1, symmetric positive definite; both map [B, ...] to
    [B, ...] image by image, in the dtype of b, and keep no reference to what they get: it is updated in
    place. b, guess: [B, ...], real. An image is done when its residual, as CG updates it, is at most
    `tolerance` (one for all, or [B]) times ||b||, or when its curvature p^T A p is not positive (A is then
    not positive definite, or holds NaN); from then on it is frozen, so its result does not depend on its
    batch mates. Lack of convergence raises nothing: see the info. The result carries no gradient.

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
    for count in _counts.get():
        count.add(iterations)
    return x, CgInfo(iterations, relative, remaining <= scalars[:, cg_update.LIMIT])


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)
