"""Kinetic (underdamped) Langevin with mass P^-1, BAOAB splitting, one gradient a step (DESIGN 2).

At a fixed level the positions are exactly invariant for every Gaussian prior and linear operator
(Leimkuhler and Matthews, AMRX 2013, for c = 0). The step size is in units of the preconditioned posterior:
h < 2 is the stability limit where the denoiser is a contraction.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alpenglow.kernels.step_weights import StepWeights
from alpenglow.operators.base import real_parts
from alpenglow.samplers.problem import Noise, Problem, levels_of

LARGEST_MEMORY = 0.8
"""Momentum that survives a step at most: above it errors of the denoiser are amplified (DESIGN 2)."""

_RANGE = 1000.0
"""Chains beyond this times their largest first coefficient have diverged."""


@dataclass(frozen=True)
class KineticState:
    """Chains between two steps.

    x: images [B, C, H, W]. z, u: positions and momenta (in units of position) in the operator's basis, where
    steps are taken; in that of the pixels z is x. sigma: level of the last step. iteration: steps done, the
    counter of the noise. diverged: [B] bool, chains that left any reasonable range and are held where they
    were. limit [B]: that range, for the elements of z.
    """

    x: Tensor
    z: Tensor
    u: Tensor
    sigma: float
    iteration: int
    diverged: Tensor
    limit: Tensor


def init(problem: Problem, noise: Noise, sigma: float) -> KineticState:
    """Chains at P A^T y / eta^2 + w, w ~ N(0, P), with momenta from N(0, P), at level sigma."""
    count = len(noise.chain_ids)
    level = torch.full((count,), sigma, dtype=problem.dtype, device=noise.chain_ids.device)
    z = problem.start(noise.counters(0), level)
    return _resting(problem, noise, problem.from_basis(z), z, sigma, 0)


def init_at(problem: Problem, noise: Noise, x: Tensor, sigma: float, iteration: int) -> KineticState:
    """Chains at images x [B, C, H, W], with momenta from N(0, P), at level sigma after `iteration` steps."""
    return _resting(problem, noise, x, problem.to_basis(x), sigma, iteration)


def _resting(
    problem: Problem, noise: Noise, x: Tensor, z: Tensor, sigma: float, iteration: int
) -> KineticState:
    level = levels_of(sigma, len(x), x)
    u = problem.draw_in_basis(noise.counters(iteration, draw=1), level)
    limit = _RANGE * real_parts(z).abs().flatten(1).amax(1)
    diverged = torch.zeros_like(level, dtype=torch.bool)
    return KineticState(x, z, u, sigma, iteration, diverged, limit)


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
    weights = baoab(
        step_size,
        memory,
        # Momenta keep their law N(0, P) where the prior rules, P = sigma^2.
        momentum_scale=sigma / state.sigma,
        first=state.iteration == 0,
    )
    moved = problem.step(
        state.z,
        state.u,
        grad,
        levels_of(sigma, len(state.x), state.x),
        weights,
        noise.counters(iteration),
        limit=torch.where(state.diverged, -1, state.limit),
    )
    assert moved.u is not None
    diverged = state.diverged | ~(moved.largest <= state.limit)  # NaN compares false
    return KineticState(
        problem.from_basis(moved.z), moved.z, moved.u, sigma, iteration, diverged, state.limit
    )


def carry(problem: Problem, state: KineticState, grad: Tensor, following: float) -> KineticState:
    """The chains after `step`, carried on to the following level; grad: the G of that step.

    p_sigma flows as dx / d sigma = G / sigma: images keep their noise in proportion. The measurement holds
    its part of them, so that P / sigma^2 of it is left. One linear solve an image.
    """
    level = levels_of(state.sigma, len(grad), grad)
    stuck = state.diverged.reshape(-1, 1, 1, 1)
    shift = torch.where(stuck, 0, (following / state.sigma - 1) * problem.free(grad, level))
    return replace(state, x=state.x + shift, z=state.z + problem.to_basis(shift))


def take(state: KineticState, parents: Tensor) -> KineticState:
    """Chains that go on from those numbered `parents` [N], each with the noise of its own slot.

    So copies of one chain part at their next step.
    """
    return replace(
        state,
        x=state.x[parents],
        z=state.z[parents],
        u=state.u[parents],
        diverged=state.diverged[parents],
        limit=state.limit[parents],
    )


def baoab(step_size: float, memory: float, *, momentum_scale: float, first: bool) -> StepWeights:
    """The weights of u <- a u + h pull; z += h/2 u; u <- c u + (1 - c^2)^(1/2) w; z += h/2 u.

    a: momentum_scale, c: memory, h: step_size; the first step of all takes half a kick.
    """
    kick = step_size / 2 if first else step_size
    fresh = math.sqrt(1 - memory**2)
    both = step_size / 2 * (1 + memory)
    return StepWeights(
        z_pull=both * kick,
        z_u=both * momentum_scale,
        z_w=step_size / 2 * fresh,
        u_pull=memory * kick,
        u_u=memory * momentum_scale,
        u_w=fresh,
    )


def finish(
    problem: Problem, state: KineticState, grad: Tensor, noise: Noise, *, noise_floor: float = 0.0
) -> Tensor:
    """Images without the last level's noise, x + P (D(x) + w - x) / sigma^2; grad: G at state.x, state.sigma.

    Of images that carry white noise f (`noise_floor`), no denoiser tells that from sigma: D keeps the share
    f^2 / (f^2 + sigma^2) of both, and leaves out a variance of f^2 sigma^2 / (f^2 + sigma^2) at least, since
    the Jacobian of D is no less than that share. w, white, puts it back.
    """
    level = levels_of(state.sigma, len(grad), grad)
    if noise_floor:
        std = noise_floor * state.sigma / math.hypot(noise_floor, state.sigma)
        grad = grad - std * noise.at(state.iteration + 1, problem.dtype)(problem.image_shape)
    return state.x - problem.free(grad, level)
