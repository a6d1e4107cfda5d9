"""Posteriors known in closed form, on which every sampler is proven first (DESIGN 2).

The same beds serve the tests and docs/calibration.md.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from alpenglow.operators import GaussianBlur, Inpainting, LinearOperator
from alpenglow.priors.mixture import GaussianMixturePrior, GaussianPrior, smooth_covariance


@dataclass(frozen=True)
class Bed:
    """A prior, an operator, a measurement y [1, ...], and the exact posterior."""

    prior: GaussianMixturePrior
    operator: LinearOperator
    y: Tensor
    noise_std: float
    posterior: GaussianMixturePrior


def _measured(
    prior: GaussianMixturePrior, operator: LinearOperator, noise_std: float, truth: Tensor, seed: int
) -> Bed:
    clean = operator.forward(truth)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed), dtype=clean.dtype)
    if isinstance(operator, Inpainting):
        noise = noise * operator.mask
    y = (clean + noise_std * noise).float()
    return Bed(prior, operator, y, noise_std, prior.posterior(operator, y, noise_std))


def gaussian(seed: int = 0, *, blur: bool = False) -> Bed:
    """Smooth 16 x 16 Gaussian, pixel std 0.3, eta 0.05; a random half of the pixels, or a blur of sigma 2."""
    prior = GaussianPrior(torch.zeros(1, 16, 16), smooth_covariance((1, 16, 16), std=0.3, length=2.0))
    mask = torch.rand(16, 16, generator=torch.Generator().manual_seed(seed)) < 0.5
    operator: LinearOperator = GaussianBlur(2.0) if blur else Inpainting(mask)
    return _measured(prior, operator, 0.05, prior.sample(1, seed=seed + 1), seed + 2)


def _mixture(seed: int, *, same_covariance: bool = False) -> GaussianMixturePrior:
    """Eight smooth Gaussians in 8 x 8, many of their own standard deviations apart, of unequal width."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.linalg.cholesky(smooth_covariance((1, 8, 8), std=1.0, length=2.0))
    means = (torch.randn(8, 64, generator=generator, dtype=torch.float64) @ root.T).reshape(8, 1, 8, 8)
    widths = torch.full((8,), 0.2) if same_covariance else 0.18 + 0.04 * torch.rand(8, generator=generator)
    covariances = [smooth_covariance((1, 8, 8), std=w, length=1.5, jitter=1e-2) for w in widths.tolist()]
    weights = torch.rand(8, generator=generator) + 0.3
    return GaussianMixturePrior(weights, means, torch.stack(covariances))


def several_modes(seed: int = 0) -> Bed:
    """Two of eight columns are seen, and up to three modes agree on them: several stay alive."""
    prior = _mixture(seed)
    means = prior.means.clone()
    generator = torch.Generator().manual_seed(seed + 3)
    for member, head in ((1, 0), (2, 0), (4, 3), (6, 5), (7, 5)):
        nearly = 0.02 * torch.randn(1, 8, 2, generator=generator, dtype=torch.float64)
        means[member, :, :, :2] = means[head, :, :, :2] + nearly
    prior = GaussianMixturePrior(prior.weights, means, prior.covariances)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:, :2] = True
    return _measured(prior, Inpainting(mask), 0.05, prior.sample(1, seed=seed + 1), seed + 2)


def single_mode(seed: int = 0) -> Bed:
    """A quarter of the pixels is seen: the measurement picks one of eight modes."""
    prior = _mixture(seed)
    seen = torch.randperm(64, generator=torch.Generator().manual_seed(seed + 3))[:16]
    mask = torch.zeros(64, dtype=torch.bool).index_fill(0, seen, True).reshape(8, 8)
    return _measured(prior, Inpainting(mask), 0.05, prior.sample(1, seed=seed + 1), seed + 2)


def steady_modes(seed: int = 0) -> Bed:
    """Modes of equal width, told apart by nothing seen: their weights hardly change with the level."""
    prior = _mixture(seed, same_covariance=True)
    means = prior.means.clone()
    means[:, :, :, :2] = means[:1, :, :, :2]
    prior = GaussianMixturePrior(prior.weights, means, prior.covariances)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:, :2] = True
    return _measured(prior, Inpainting(mask), 0.05, prior.sample(1, seed=seed + 1), seed + 2)


BEDS: dict[str, Callable[[int], Bed]] = {
    "gaussian, half the pixels": gaussian,
    "gaussian, blur": lambda seed: gaussian(seed, blur=True),
    "several modes": several_modes,
    "single mode": single_mode,
    "steady modes": steady_modes,
}


@dataclass(frozen=True)
class Score:
    """Samples against the exact posterior.

    ratio: estimated / true std over pixels, (5th percentile, median, 95th). std_error: mean |ratio - 1|.
    coverage: of the interval between the 5 and 95 % quantiles, over exact draws. mean_error: RMS of
    (mean - truth) / true std, less what N samples allow. mode_error: total variation between mode masses.
    """

    ratio: tuple[float, float, float]
    std_error: float
    coverage: float
    mean_error: float
    mode_error: float


def score(bed: Bed, samples: Tensor, *, exact_draws: int = 4000) -> Score:
    """Compare samples [N, C, H, W] with the exact posterior of a bed."""
    images = samples.double()
    mean, std = images.mean(0), images.std(0)
    ratio = (std / bed.posterior.std).flatten()
    low, middle, high = ratio.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist()
    squared = ((mean - bed.posterior.mean) / bed.posterior.std).square().mean().item() - 1 / len(images)
    masses = bed.posterior.responsibilities(images).mean(0)
    lower, upper = images.quantile(0.05, dim=0), images.quantile(0.95, dim=0)
    draws = bed.posterior.sample(exact_draws, seed=99)
    coverage = ((draws >= lower) & (draws <= upper)).double().mean().item()
    return Score(
        (low, middle, high),
        (ratio - 1).abs().mean().item(),
        coverage,
        max(squared, 0.0) ** 0.5,
        0.5 * (masses - bed.posterior.weights).abs().sum().item(),
    )
