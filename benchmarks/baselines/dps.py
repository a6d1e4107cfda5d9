"""DPS, diffusion posterior sampling (Chung et al., ICLR 2023, arXiv 2209.14687), with Gaussian noise.

DDPM's chain x_i = sqrt(a_i) x_0 + sqrt(1 - a_i) n (a_i for alpha-bar_i of Ho et al., arXiv 2006.11239) is
sqrt(a_i) times x_0 + sigma_i n with sigma_i = sqrt((1 - a_i) / a_i), so that any denoiser D(x, sigma) gives
the estimate of x_0. With alpha_i = a_i / a_{i-1} and beta_i = 1 - alpha_i a step of algorithm 1 is

    x0_hat  = D(x_i / sqrt(a_i), sigma_i)
    x'      = sqrt(alpha_i) (1 - a_{i-1}) / (1 - a_i) x_i + sqrt(a_{i-1}) beta_i / (1 - a_i) x0_hat
              + sqrt(beta_i (1 - a_{i-1}) / (1 - a_i)) z
    x_{i-1} = x' - scale grad ||y - A x0_hat||,   grad with respect to x_i, through D

The step size is that of the authors' code (DPS2022/diffusion-posterior-sampling): the gradient of the norm
times a constant. In the paper's terms, the gradient of the squared norm times zeta' / ||y - A x0_hat||, it
is zeta' = scale / 2. The code's scale is 0.5 for inpainting, 0.3 for blurs and super-resolution.

Two things differ from that code, which was written for one family of networks: the variance of z is the
posterior one, as no network here learns a variance, and x0_hat is not clipped to [-1, 1], as images here
have a noise floor, or are complex.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from alpenglow.operators.base import LinearOperator
from benchmarks.baselines.denoisers import Denoiser

TRAINING_STEPS, FIRST_BETA, LAST_BETA = 1000, 1e-4, 0.02


@dataclass(frozen=True)
class DpsOptions:
    """scale: of the guidance, see above. steps: of the chain, at most the 1000 that are published."""

    scale: float
    steps: int = TRAINING_STEPS


def schedule(steps: int, sigma_max: float) -> list[float]:
    """a_i from the noisiest step down to the clean image's 1: at most steps + 1 numbers.

    The steps are spread evenly over those of the published linear schedule whose level is one of the
    network's, at most sigma_max: sigma goes up to 157, where few networks were trained. NFE: len - 1.
    """
    betas = torch.linspace(FIRST_BETA, LAST_BETA, TRAINING_STEPS, dtype=torch.float64)
    signal = (1 - betas).cumprod(0)
    signal = signal[(1 - signal) / signal <= sigma_max**2]
    places = torch.linspace(len(signal) - 1, 0, min(steps, len(signal))).round().long()
    return [*signal[places].tolist(), 1.0]


def step(
    denoiser: Denoiser,
    operator: LinearOperator,
    y: Tensor,
    x: Tensor,
    signal: tuple[float, float],
    scale: float,
    noise: Tensor,
) -> Tensor:
    """x_{i-1} [B, C, H, W] of x_i and z = noise, both [B, C, H, W]; y [B, *]; signal: (a_i, a_{i-1}).

    1 NFE, and a backward pass through the network, which costs about as much again.
    """
    now, following = signal
    level = x.new_full((len(x),), ((1 - now) / now) ** 0.5)
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        denoised = denoiser(leaf / now**0.5, level)
    estimate = denoised.detach()
    residual = y - operator.forward(estimate)
    norm = residual.abs().square().flatten(1).sum(1).sqrt().clamp(min=torch.finfo(x.dtype).tiny)
    # A is linear: its adjoint is its derivative's, also where autograd does not reach.
    pull = operator.adjoint(residual) / norm.reshape(-1, 1, 1, 1)
    (grad,) = torch.autograd.grad(denoised, leaf, -pull)
    alpha = now / following
    mean = (alpha**0.5 * (1 - following) * x + following**0.5 * (1 - alpha) * estimate) / (1 - now)
    std = ((1 - alpha) * (1 - following) / (1 - now)) ** 0.5
    return mean + std * noise - scale * grad


def sample(
    denoiser: Denoiser,
    operator: LinearOperator,
    y: Tensor,
    options: DpsOptions,
    *,
    image_shape: tuple[int, int, int],
    generator: torch.Generator,
    sigma_max: float = float("inf"),
    progress: Callable[[float], None] = lambda share: None,
) -> Tensor:
    """One sample [B, C, H, W] for each of y [B, *measurement_shape]; len(schedule) - 1 NFE each."""
    signals = schedule(options.steps, sigma_max)

    def normal() -> Tensor:
        return torch.randn(len(y), *image_shape, generator=generator, device=y.device)

    x = normal()
    for done, signal in enumerate(pairwise(signals)):
        x = step(denoiser, operator, y, x, signal, options.scale, normal())
        progress((done + 1) / (len(signals) - 1))
    return x
