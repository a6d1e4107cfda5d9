"""Kinetic (underdamped) Langevin with mass P^-1, BAOAB splitting, one gradient a step (DESIGN 2).

At a fixed level the positions are exactly invariant for every Gaussian prior and linear operator
(Leimkuhler and Matthews, AMRX 2013, for c = 0). The step size is in units of the preconditioned posterior:
h < 2 is the stability limit where the denoiser is a contraction.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alpenglow.operators.base import per_image
from alpenglow.samplers.problem import Noise, Problem, levels_of

LARGEST_MEMORY = 0.8
"""Momentum that survives a step at most: above it errors of the denoiser are amplified (DESIGN 2)."""


@dataclass(frozen=True)
class KineticState:
    """Chains between two steps.

    x, u: positions and momenta (in units of position), [B, C, H, W]. sigma: level of the last step, [B].
    iteration: steps done, the counter of the noise. diverged: [B] bool, chains that left any reasonable range
    and are held where they were.
    """

    x: Tensor
    u: Tensor
    sigma: Tensor
    iteration: int
    diverged: Tensor
    limit: Tensor


def init(problem: Problem, noise: Noise, sigma: float) -> KineticState:
    """Chains at P A^T y / eta^2 + w, w ~ N(0, P), with momenta from N(0, P), at level sigma."""
    count = len(noise.chain_ids)
    level = torch.full((count,), sigma, dtype=problem.dtype, device=noise.chain_ids.device)
    w = problem.draw(noise.at(0, problem.dtype), level)
    x = problem.conditional_mean(torch.zeros_like(w), level) + w
    u = problem.draw(noise.at(0, problem.dtype, draw=1), level)
    limit = 100 * (sigma + x.abs().amax((1, 2, 3)))
    return KineticState(x, u, level, 0, torch.zeros_like(level, dtype=torch.bool), limit)


def memory(step_size: float, sigma: float, top_std: float) -> float:
    """c, the share of the momentum that survives a step at level sigma.

    The slowest direction has posterior std top_std; at level sigma it asks for friction sigma / top_std.
    """
    return min(LARGEST_MEMORY, math.exp(-2 * step_size * sigma / top_std))


def step(
    problem: Problem,
    state: KineticState,
    sigma: float,
    grad: Tensor,
    noise: Noise,
    *,
    step_size: float,
    memory: float,
) -> KineticState:
    """One step at level sigma from `grad`, the prior's G at state.x and sigma."""
    iteration = state.iteration + 1
    level = levels_of(sigma, len(state.x), state.x)
    # Momenta keep their law N(0, P) where the prior rules, P = sigma^2.
    u = state.u * per_image(level / state.sigma, state.x)
    pull = problem.conditional_mean(state.x - grad, level) - state.x
    u = u + (step_size if state.iteration else step_size / 2) * pull
    x = state.x + step_size / 2 * u
    w = problem.draw(noise.at(iteration, problem.dtype), level)
    u = memory * u + math.sqrt(1 - memory**2) * w
    x = x + step_size / 2 * u
    broken = ~(x.abs().amax((1, 2, 3)) <= state.limit)  # NaN compares false
    diverged = state.diverged | broken
    keep = diverged[:, None, None, None]
    return KineticState(
        torch.where(keep, state.x, x), torch.where(keep, 0, u), level, iteration, diverged, state.limit
    )


def finish(problem: Problem, state: KineticState, grad: Tensor) -> KineticState:
    """Remove the noise of the last level, x + P (D(x) - x) / sigma^2; `grad` is G at state.x, state.sigma."""
    solved = problem.operator.solve(-grad, state.sigma, problem.noise_std)
    return replace(state, x=state.x + solved / per_image(state.sigma.square(), state.x))
