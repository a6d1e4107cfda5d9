"""Chains of the diffused posterior by moment matching: how those of a network come down from pure noise.

Of x ~ p(x | y), the images x_sigma = x + sigma n have the score (m - x_sigma) / sigma^2 with
m = E[x | x_sigma, y]. Taking p(x | x_sigma) = N(D, C), which for a Gaussian prior it is, with
C = sigma^2 dD/dx = sigma^2 (I - dG/dx):

    m = D + C A^T (eta^2 + A C A^T)^-1 (y - A D)

Source: Rozet et al., NeurIPS 2024 (arXiv 2405.13712); the same moments: Boys et al., arXiv 2310.06721. G is
the gradient of an energy, so C is symmetric, and C times an image is a difference of two G.

The system is solved by two steps of conjugate gradients, by one where noise is wide beside the images. A
network knows its G to some per cent, and how G changes less well: more steps, along directions that C makes
ever narrower, let single chains fly off.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from alpenglow.kernels.cg_update import dot
from alpenglow.operators.base import Normal, per_image, real_parts
from alpenglow.samplers.chains import Chains, Evaluate
from alpenglow.samplers.problem import Noise, Problem, levels_of

PIXEL_STD = 0.5
"""sigma_data of EDM (arXiv 2206.00364), for images in [-1, 1]: knowing nothing else, C is s^2 with
s = sigma PIXEL_STD / (sigma^2 + PIXEL_STD^2)^(1/2), which preconditions the system."""
LARGEST_STRETCH = 5.0
"""Largest multiple of the step that C = s^2 asks for: C may be smaller, but not without bound."""
FIRST_SECOND_STEP = 1.0
"""Highest level of a second step. Above it a network's C is known too badly: what the first step leaves of
the system is more than there was, under masks, blurs and coils alike."""
PROBE = 0.05
"""Length of the step for dG/dx beside the noise's: a shorter one meets rounding, a longer one curvature."""
_RANGE = 1000.0
"""Chains beyond this times the first level have diverged."""


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products [B] of measurements, those of their real and imaginary parts where they are complex."""
    return dot(real_parts(a), real_parts(b))


def steps_at(sigma: float) -> int:
    """Steps of conjugate gradients at level sigma; each takes a gradient beside that of D."""
    return 1 if sigma > FIRST_SECOND_STEP else 2


def posterior_mean(
    problem: Problem, x: Tensor, sigma: float, *, stretch: float = LARGEST_STRETCH
) -> Chains[Tensor]:
    """m [B, C, H, W] at x [B, C, H, W] and level sigma by `steps_at` steps; 1 NFE and 1 a step.

    Exact for a Gaussian prior where A C A^T has no more eigenvalues than there are steps. stretch: see
    LARGEST_STRETCH.
    """
    levels = levels_of(sigma, len(x), x)
    operator, variance = problem.operator, problem.noise_std**2
    _, grad = yield Evaluate(x, levels)
    mean = x - grad
    residual = problem.y - operator.forward(mean)
    p = _precondition(problem, residual, sigma)
    for steps_left in reversed(range(steps_at(sigma))):
        towards = operator.adjoint(p)
        length = dot(towards, towards).sqrt()
        probe = PROBE * sigma * math.sqrt(x[0].numel()) / torch.where(length > 0, length, 1)
        _, there = yield Evaluate(x + per_image(probe, x) * towards, levels)
        spread = sigma**2 * (towards - (there - grad) / per_image(probe, x))  # C A^T p

        # The line search: r.p / p.(eta^2 + A C A^T) p. A network's C may be negative there: then m stays.
        known = dot(towards, spread)
        slope, curvature = _dot(residual, p).clamp(min=0), variance * _dot(p, p) + known
        step = torch.where(known > 0, (slope / curvature).clamp(max=stretch), 0)
        mean = mean + per_image(step, x) * spread
        if steps_left:
            product = variance * p + operator.forward(spread)
            residual = residual - per_image(step, residual) * product
            z = _precondition(problem, residual, sigma)
            # Conjugate to the last direction by its product as it was found: C is symmetric only nearly.
            overlap = torch.where(curvature > 0, _dot(z, product) / curvature, 0)
            p = z - per_image(overlap, z) * p
    return mean


def _precondition(problem: Problem, residual: Tensor, sigma: float) -> Tensor:
    """(eta^2 + s^2 A A^T)^-1 r, by the conditional mean of a pixel known to s (Woodbury)."""
    operator, variance = problem.operator, problem.noise_std**2
    pull = operator.adjoint(residual) / variance
    s = levels_of(sigma * PIXEL_STD / math.hypot(sigma, PIXEL_STD), len(pull), pull)
    return (residual - operator.forward(operator.solve(pull, s, problem.noise_std))) / variance


def descend(
    problem: Problem, noise: Noise, levels: list[float], *, stretch: float = LARGEST_STRETCH
) -> Chains[tuple[Tensor, Tensor]]:
    """Chains from noise at levels[0] down to x [B, C, H, W] of levels[-1]; and which diverged, bool [B].

    The reverse diffusion by DPM-Solver++(2M) SDE (Lu et al., arXiv 2211.01095), which takes m as linear in
    log sigma. 1 NFE and `steps_at` a level but the last. Chains that diverged are held where they were.
    """
    x = levels[0] * noise.at(0, problem.dtype)(problem.image_shape)
    diverged = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    before: tuple[Tensor, float] | None = None
    for iteration, (sigma, following) in enumerate(pairwise(levels), start=1):
        mean = yield from posterior_mean(problem, x, sigma, stretch=stretch)
        ratio = following / sigma
        ahead = mean
        if before is not None:
            last, step = before
            ahead = mean + 0.5 * math.log(ratio) / step * (mean - last)
        before = mean, math.log(ratio)
        normals = noise.at(iteration, problem.dtype)(problem.image_shape)
        moved = ratio**2 * x + (1 - ratio**2) * ahead + following * math.sqrt(1 - ratio**2) * normals
        diverged = diverged | ~(moved.abs().flatten(1).amax(1) <= _RANGE * levels[0])  # NaN compares false
        x = torch.where(diverged.reshape(-1, 1, 1, 1), x, moved)
    return x, diverged


def hold(problem: Problem, normal: Normal, x: Tensor, sigma: float) -> Tensor:
    """Chains x [B, C, H, W] of the diffused posterior at level sigma as chains of p_sigma(x | y).

    The measurement takes hold of its part of them. It leaves of noise sigma in x the share f = P / sigma^2.
    What it does not know, w ~ N(0, P), is added where it says more than PIXEL_STD, so that a wide posterior
    keeps its variance, and not where it says nothing, and x has all of its noise already.
    """
    levels, wide = levels_of(sigma, len(x), x), levels_of(PIXEL_STD, len(x), x)
    w = problem.draw(normal, levels)
    return problem.conditional_mean(x, levels) + w - problem.free(w, wide)
