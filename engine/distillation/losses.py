"""The two losses: EDM's for the teacher, gradient matching for the energy."""

import torch
from torch import Tensor

from alpenglow.distillation.config import SigmaLaw
from alpenglow.networks.denoiser import EDMDenoiser, energy_and_grad


def draw_sigma(law: SigmaLaw, size: int, generator: torch.Generator) -> Tensor:
    """Noise levels [size], half log-normal (where images form), half log-uniform (so that none is rare)."""
    normal = (law.log_mean + law.log_std * torch.randn(size, generator=generator)).exp()
    low, high = torch.tensor([law.low, law.high]).log()
    uniform = (low + (high - low) * torch.rand(size, generator=generator)).exp()
    chosen = torch.where(torch.arange(size) % 2 == 0, normal, uniform)
    return chosen.clamp(law.low, law.high)


def teacher_loss(model: EDMDenoiser, clean: Tensor, sigma: Tensor, generator: torch.Generator) -> Tensor:
    """EDM's loss, lambda(sigma) ||D(x + n) - x||^2 with lambda = 1 / c_out^2 (arXiv 2206.00364, table 1).

    Mean over images and pixels, a scalar. clean [B, C, H, W], sigma [B].
    """
    noise = torch.randn(clean.shape, generator=generator)
    residual = model(clean + sigma[:, None, None, None] * noise, sigma) - clean
    return (residual / model.coefficients(sigma).c_out).square().mean()


def energy_loss(
    model: EDMDenoiser, teacher: EDMDenoiser, clean: Tensor, sigma: Tensor, generator: torch.Generator
) -> Tensor:
    """||G(x_t, sigma) - (x_t - D_teacher(x_t, sigma))||^2 (1 / sigma^2 + 1 / sigma_data^2), a mean.

    Matches the energy's gradient to the teacher's noise estimate (ALPS, arXiv 2601.02594), over images and
    pixels. The weight is the teacher's own, 1 / c_out^2: that of ALPS, 1 / sigma^2, below sigma_data; above,
    where 1 / sigma^2 all but forgets the levels, an error of the denoiser counts alike at every level.
    """
    noisy = clean + sigma[:, None, None, None] * torch.randn(clean.shape, generator=generator)
    with torch.no_grad():
        target = noisy - teacher(noisy, sigma)
    _, grad = energy_and_grad(model, noisy, sigma, create_graph=True)
    return ((grad - target) / model.coefficients(sigma).c_out).square().mean()
