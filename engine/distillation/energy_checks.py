"""Whether E is an energy worth the name: its gradient is G, and it ranks images below what is none."""

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from alpenglow import operators
from alpenglow.networks.denoiser import EDMDenoiser, energy_and_grad
from alpenglow.priors.network import NetworkPrior

RANKING_SIGMAS = (0.05, 0.1, 0.2, 0.5)


def energy_consistency(
    denoiser: EDMDenoiser, images: Tensor, sigmas: Sequence[float] = (0.02, 0.2, 2.0), *, seed: int = 0
) -> float:
    """Largest relative difference between <G, v> and the central difference of E along v, in float64.

    For images [N, C, H, W] plus noise of each level, along a random unit direction v an image: that the
    gradient is that of the energy, to the accuracy of the difference (about 1e-8). Relative to the length of
    G times that of a random direction's share of it, ||G|| / sqrt(number of pixels).
    """
    exact = copy.deepcopy(denoiser).to("cpu", torch.float64)
    generator = torch.Generator().manual_seed(seed)
    worst = 0.0
    for sigma in sigmas:
        x = images.double() + sigma * torch.randn(images.shape, generator=generator, dtype=torch.float64)
        level = x.new_full((len(x),), sigma)
        direction = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        direction /= direction.flatten(1).norm(dim=1)[:, None, None, None]
        step = 1e-4 * sigma
        above, below = (energy_and_grad(exact, x + s * direction, level)[0] for s in (step, -step))
        grad = energy_and_grad(exact, x, level)[1].flatten(1)
        slope = (grad * direction.flatten(1)).sum(1)
        size = grad.norm(dim=1) / math.sqrt(grad.shape[1])
        worst = max(worst, (((above - below) / (2 * step) - slope).abs() / size).max().item())
    return worst


def rank_energies(
    prior: NetworkPrior, images: Tensor, sigmas: Sequence[float] = RANKING_SIGMAS, *, seed: int = 0
) -> list[dict[str, float]]:
    """How surely E tells images [N, C, H, W] from others, one row a level: the area under the ROC curve.

    1: every image has less energy than every altered one; 0.5: chance. E is taken at the images themselves.
    Keys: sigma; blurred (Gaussian, 1.5 pixels), noisy (white noise of a tenth of the images' std), scrambled
    (an image's own power spectrum with random phases: right in every second moment, and no image).
    """
    generator = torch.Generator().manual_seed(seed)
    altered = {
        "blurred": operators.GaussianBlur(1.5).forward(images),
        "noisy": images + 0.1 * images.std() * torch.randn(images.shape, generator=generator).to(images),
        "scrambled": _scramble(images, generator),
    }
    rows = []
    for sigma in sigmas:
        level = images.new_full((len(images),), float(sigma))
        energy = prior.energy_and_grad(images, level)[0]
        rows.append(
            {"sigma": float(sigma)}
            | {name: _auc(energy, prior.energy_and_grad(x, level)[0]) for name, x in altered.items()}
        )
    return rows


def _scramble(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each channel's mean and power spectrum, its phases those of white noise."""
    noise = torch.fft.rfft2(torch.randn(images.shape, generator=generator).to(images))
    spectrum = torch.fft.rfft2(images)
    scrambled = spectrum.abs() * noise / noise.abs()
    scrambled[..., 0, 0] = spectrum[..., 0, 0]
    return torch.fft.irfft2(scrambled, s=images.shape[-2:])


def _auc(lower: Tensor, higher: Tensor) -> float:
    """Probability that a value of `lower` is below one of `higher`; ties count half (Mann-Whitney)."""
    difference = higher[None, :] - lower[:, None]
    return ((difference > 0).double() + 0.5 * (difference == 0).double()).mean().item()
