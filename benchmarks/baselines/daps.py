"""DAPS, decoupled annealing posterior sampling (Zhang et al., CVPR 2025, arXiv 2407.01521).

Algorithm 1: at every level sigma of an annealing, from x = x_0 + sigma n:

    x0_hat: the probability flow ODE dx / dsigma = (x - D(x, sigma)) / sigma (Karras et al., arXiv 2206.00364,
            equation 1) from sigma down to 0.01 in a few Euler steps
    x_0:    Langevin steps from x0_hat, with N(x0_hat, sigma^2 I) for p(x_0 | x), and noise of std b in y:
            x_0 <- x_0 + h ((x0_hat - x_0) / sigma^2 + A^T (y - A x_0) / b^2) + sqrt(2 h) z
    x:      x_0 + sigma' z at the next level sigma', which is 0 at last

Levels of both are EDM's with rho 7; h falls linearly from `step_size` to a hundredth of it. The defaults
are those of the authors' code for blur and random inpainting (zhangbingliang2019/DAPS, "DAPS-1k", 1000
NFE). There b does not know the noise: the code's tau = 0.01 has the data term 2 A^T (y - A x) / tau^2, that
is b = tau / sqrt(2), where the noise's std is 0.05, and h = 2 b^2, the stability limit where A^T A = 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from alpenglow.operators.base import LinearOperator
from alpenglow.samplers.problem import rho_levels
from benchmarks.baselines.denoisers import Denoiser

RHO = 7
LAST_STEP_RATIO = 0.01


@dataclass(frozen=True)
class DapsOptions:
    """noise_std: b, the std that Langevin assumes for the noise of y. step_size: h at the first level.

    NFE: annealing_steps times ode_steps; Langevin's steps evaluate the operator alone.
    """

    noise_std: float = 0.01 / 2**0.5
    step_size: float = 1e-4
    annealing_steps: int = 200
    ode_steps: int = 5
    langevin_steps: int = 100
    sigma_max: float = 100.0
    sigma_min: float = 0.1
    ode_sigma_min: float = 0.01

    @property
    def nfe(self) -> int:
        """Denoised images a sample."""
        return self.annealing_steps * self.ode_steps


def levels(high: float, low: float, steps: int) -> list[float]:
    """steps + 1 of EDM's levels from high to low."""
    return rho_levels(high, low, steps + 1, RHO)


def probability_flow(denoiser: Denoiser, x: Tensor, sigmas: list[float]) -> Tensor:
    """Euler steps of the probability flow ODE through `sigmas`, from x [B, C, H, W] at the first."""
    for sigma, following in pairwise(sigmas):
        slope = (x - denoiser(x, x.new_full((len(x),), sigma))) / sigma
        x = x + (following - sigma) * slope
    return x


def langevin(
    operator: LinearOperator,
    y: Tensor,
    x0_hat: Tensor,
    sigma: float,
    *,
    noise_std: float,
    step_size: float,
    steps: int,
    generator: torch.Generator,
) -> Tensor:
    """x_0 [B, C, H, W] after `steps` Langevin steps on N(x0_hat, sigma^2 I) N(y; A x_0, noise_std^2 I)."""
    x = x0_hat
    for _ in range(steps):
        score = (x0_hat - x) / sigma**2 + operator.adjoint(y - operator.forward(x)) / noise_std**2
        z = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        x = x + step_size * score + (2 * step_size) ** 0.5 * z
    return x


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    operator: LinearOperator,
    y: Tensor,
    options: DapsOptions,
    *,
    image_shape: tuple[int, int, int],
    generator: torch.Generator,
    sigma_max: float = float("inf"),
    progress: Callable[[float], None] = lambda share: None,
) -> Tensor:
    """One sample [B, C, H, W] for each of y [B, *measurement_shape]; options.nfe NFE each.

    sigma_max: the largest level that the denoiser knows; the annealing starts there at most.
    """
    count = options.annealing_steps
    sigmas = [*levels(min(options.sigma_max, sigma_max), options.sigma_min, count)[:-1], 0.0]

    def normal() -> Tensor:
        return torch.randn(len(y), *image_shape, generator=generator, device=y.device)

    x = sigmas[0] * normal()
    for done, (sigma, following) in enumerate(pairwise(sigmas)):
        x0_hat = probability_flow(denoiser, x, levels(sigma, options.ode_sigma_min, options.ode_steps))
        # The code counts the end of the annealing as a step of its own.
        fall = 1 + done / (count + 1) * (LAST_STEP_RATIO - 1)
        x = langevin(
            operator, y, x0_hat, sigma,
            noise_std=options.noise_std, step_size=options.step_size * fall,
            steps=options.langevin_steps, generator=generator,
        )  # fmt: skip
        if following:
            x = x + following * normal()
        progress((done + 1) / count)
    return x
