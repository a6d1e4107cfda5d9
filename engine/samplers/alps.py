"""ALPS as published (arXiv 2601.02594), step by step, faults included (DESIGN 2)."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alpenglow.kernels.step_weights import StepWeights
from alpenglow.samplers.chains import Chains, Evaluate, Population
from alpenglow.samplers.problem import Noise, Problem, levels_of, rho_levels


@dataclass(frozen=True)
class AlpsOptions:
    """The published settings: `levels` noise levels of `steps` steps from sigma_max to sigma_min."""

    levels: int = 50
    steps: int = 5
    sigma_max: float = 100.0
    sigma_min: float = 0.1
    rho: float = 5.0

    @property
    def nfe(self) -> int:
        """Gradient evaluations a sample."""
        return self.levels * self.steps


def schedule(options: AlpsOptions) -> list[float]:
    """(sigma_max^(1/rho) + i / (N - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho, i = 0 .. N - 1."""
    return rho_levels(options.sigma_max, options.sigma_min, options.levels, options.rho)


def step(
    problem: Problem, z: Tensor, sigma: Tensor, counters: Tensor | None
) -> Chains[tuple[Tensor, Tensor]]:
    """x' = P (A^T y / eta^2 + D(x) / sigma^2) + P^(1/2) n; returns x' and the energy E(x, sigma) [B].

    z: x [B, C, H, W] in the operator's basis, as is x'; sigma [B]; counters: of the noise n [B, 4], or None
    at the last step of a level. B NFE.
    """
    energy, grad = yield Evaluate(problem.from_basis(z), sigma)
    weights = StepWeights(z_pull=1.0, z_w=1.0)
    return problem.step(z, None, grad, sigma, weights, counters).z, energy


def chains(problem: Problem, noise: Noise, options: AlpsOptions) -> Chains[Population]:
    """One sample for each chain of `noise`, by the authors' code (JyoChand/ALPS).

    Chains start at P A^T y / eta^2 + P^(1/2) n; the last step of a level is without noise, and what goes to
    the next level gets that level's.
    """
    problem = replace(problem, operator=problem.operator.with_published_noise())
    count = len(noise.chain_ids)
    energy = torch.zeros(count, dtype=problem.dtype, device=noise.chain_ids.device)
    levels = [levels_of(level, count, energy) for level in schedule(options)]
    z = problem.start(noise.counters(0), levels[0])
    iteration = 0
    for index, sigma in enumerate(levels):
        if index:
            z = z + problem.draw_in_basis(noise.counters(iteration), sigma)
        for inner in range(options.steps):
            iteration += 1
            last = inner == options.steps - 1
            z, energy = yield from step(problem, z, sigma, None if last else noise.counters(iteration))
    return Population(problem.from_basis(z), energy)
