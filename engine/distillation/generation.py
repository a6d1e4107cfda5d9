"""Unconditional samples of a prior: what it has learnt, to look at."""

from itertools import pairwise

import torch
from torch import Tensor

from alpenglow.priors.network import NetworkPrior


def draw_unconditional(prior: NetworkPrior, count: int, *, steps: int = 32, seed: int = 0) -> Tensor:
    """`count` samples [count, C, H, W] of the prior alone, by Heun steps (arXiv 2206.00364, algorithm 1).

    Deterministic given the noise; levels by EDM's rho = 7 over the prior's span; 2 * steps - 1 NFE a sample.
    """
    low, high = prior.sigma_range
    ramp = torch.linspace(0, 1, steps)
    sigmas = [*((high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7).tolist(), 0.0]
    x = sigmas[0] * torch.randn(count, *prior.image_shape, generator=torch.Generator().manual_seed(seed))
    x = x.to(prior.device)

    def slope(x: Tensor, sigma: float) -> Tensor:
        return prior.energy_and_grad(x, x.new_full((count,), sigma))[1] / sigma

    for sigma, following in pairwise(sigmas):
        first = slope(x, sigma)
        ahead = x + (following - sigma) * first
        if following:
            ahead = x + (following - sigma) * (first + slope(ahead, following)) / 2
        x = ahead
    return x.cpu()
