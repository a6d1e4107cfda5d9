"""Metropolised Langevin samplers: exact at every level, slow in high dimension (DESIGN 2). References.

One transition serves both: partial refreshment of the momentum, one leapfrog step, accept or reject with a
flip of the momentum (Horowitz 1991). Without memory it is MALA preconditioned by P.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alpenglow.kernels.philox import uniforms
from alpenglow.operators.base import per_image, real_parts
from alpenglow.samplers.chains import Chains, Evaluate, Population
from alpenglow.samplers.problem import Noise, Problem, geometric_levels, levels_of

TARGET_ACCEPTANCE = {False: 0.574, True: 0.8}
"""By whether momentum is kept: MALA's optimum (Roberts and Rosenthal 1998); momentum suffers from flips."""
_ADAPTATION = 0.1
_ACCEPT_STREAM = 2**20


@dataclass(frozen=True)
class MetropolisOptions:
    """`nfe` gradients a sample over levels of `steps` transitions each, from sigma_max to sigma_min.

    memory: share of the momentum that survives a transition, 0 for MALA. step_size: the first one; every
    chain then adapts its own.
    """

    nfe: int = 450
    steps: int = 4
    sigma_max: float = 2.0
    sigma_min: float = 0.01
    memory: float = 0.0
    step_size: float = 0.7


@dataclass(frozen=True)
class MetropolisState:
    """Chains at one level: x, u, and at x the potential U = -log p_sigma(x | y) [B] and pull = -P grad U.

    step_size [B]; accepted [B]: sum of acceptance probabilities.
    """

    x: Tensor
    u: Tensor
    potential: Tensor
    pull: Tensor
    energy: Tensor
    step_size: Tensor
    accepted: Tensor


def _evaluate(problem: Problem, x: Tensor, sigma: Tensor) -> Chains[tuple[Tensor, Tensor, Tensor]]:
    """U [B] float64, -P grad U [B, C, H, W] and E [B] at x; B NFE."""
    energy, grad = yield Evaluate(x, sigma)
    return problem.potential(x, energy, sigma), problem.conditional_mean(x - grad, sigma) - x, energy


def _kinetic_energy(problem: Problem, u: Tensor, sigma: Tensor) -> Tensor:
    """u^T Q u / 2, float64 [B]."""
    measured = real_parts(problem.operator.forward(u))
    seen = measured.double().square().flatten(1).sum(1) / problem.noise_std**2
    return 0.5 * (seen + u.double().square().flatten(1).sum(1) / sigma.double().square())


def step(
    problem: Problem, state: MetropolisState, sigma: Tensor, noise: Noise, iteration: int, memory: float
) -> Chains[MetropolisState]:
    """One transition at levels sigma [B]; B NFE."""
    w = problem.draw(noise.at(iteration, problem.dtype), sigma)
    u = memory * state.u + math.sqrt(1 - memory**2) * w
    h = per_image(state.step_size, state.x)
    before = state.potential + _kinetic_energy(problem, u, sigma)
    half = u + h / 2 * state.pull
    x = state.x + h * half
    potential, pull, energy = yield from _evaluate(problem, x, sigma)
    moved = half + h / 2 * pull
    after = potential + _kinetic_energy(problem, moved, sigma)
    probability = (before - after).exp().clamp(max=1.0).nan_to_num(nan=0.0)
    draw = uniforms(noise.seed, noise.chain_ids, iteration=iteration, stream=_ACCEPT_STREAM)
    accept = draw < probability
    chosen = accept[:, None, None, None]
    gain = _ADAPTATION * (probability - TARGET_ACCEPTANCE[memory > 0])
    return MetropolisState(
        x=torch.where(chosen, x, state.x),
        u=torch.where(chosen, moved, -u),
        potential=torch.where(accept, potential, state.potential),
        pull=torch.where(chosen, pull, state.pull),
        energy=torch.where(accept, energy, state.energy),
        step_size=(state.step_size * gain.exp()).clamp(max=1.9).to(state.step_size.dtype),
        accepted=state.accepted + probability,
    )


def chains(problem: Problem, noise: Noise, options: MetropolisOptions) -> Chains[Population]:
    """One sample for each chain of `noise`; diagnostics: the mean acceptance."""
    count = len(noise.chain_ids)
    levels = geometric_levels(
        options.sigma_max, options.sigma_min, max(1, options.nfe // (options.steps + 1))
    )
    first = torch.full((count,), levels[0], dtype=problem.dtype, device=noise.chain_ids.device)
    w = problem.draw(noise.at(0, problem.dtype), first)
    x = problem.conditional_mean(torch.zeros_like(w), first) + w
    u = problem.draw(noise.at(0, problem.dtype, draw=1), first)
    zeros = torch.zeros(count, dtype=torch.float64, device=x.device)
    state = MetropolisState(x, u, zeros, u, zeros, torch.full_like(first, options.step_size), zeros)
    iteration, previous = 0, levels[0]
    for level in levels:
        sigma = levels_of(level, count, x)
        potential, pull, energy = yield from _evaluate(problem, state.x, sigma)
        state = replace(state, u=state.u * (level / previous), potential=potential, pull=pull, energy=energy)
        for _ in range(options.steps):
            iteration += 1
            state = yield from step(problem, state, sigma, noise, iteration, options.memory)
        previous = level
    acceptance = (state.accepted / max(1, iteration)).mean().item()
    return Population(state.x, state.energy, diagnostics={"acceptance": acceptance})
