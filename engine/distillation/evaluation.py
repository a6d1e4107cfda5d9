"""How good a distilled prior is: against its teacher, as an energy, and in the posteriors it gives."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Any

import torch
from torch import Tensor

from alpenglow import api, operators
from alpenglow.distillation.energy_checks import RANKING_SIGMAS, energy_consistency, rank_energies
from alpenglow.distillation.generation import draw_unconditional
from alpenglow.distillation.losses import Denoiser
from alpenglow.distillation.non_local_means import tune_non_local_means
from alpenglow.distillation.sources import ImageSource
from alpenglow.evaluation import DATA_RANGE
from alpenglow.priors.network import NetworkPrior

DEFAULT_SIGMAS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
# The span over which the gradient error is averaged, evenly in log sigma.
AVERAGED = (0.02, 10.0)
COVERAGE_SAMPLES = 32
SHOWN = 16
# Images are fewer where they are large, so that a report takes minutes: 256 of Fashion-MNIST, 64 of MR.
EVALUATION_VALUES, MOST_IMAGES = 2**21, 256
COVERAGE_VALUES, MOST_COVERAGE_IMAGES = 2**16, 16


LARGEST_ERROR = 0.2
"""Relative gradient error from which on a level does samplers more harm than good (DESIGN 2)."""


@dataclass(frozen=True)
class PriorReport:
    """All that is measured of a prior; `levels` and `ranking` have one row a level."""

    levels: list[dict[str, float]]
    mean_gradient_error: float
    """Over levels in AVERAGED, evenly in log sigma."""
    sigma_range: tuple[float, float]
    """The levels to use the prior at, see `trusted_levels`."""
    largest_gradient_error: float
    """Within sigma_range."""
    gradient_consistency: float
    """Of `energy_consistency`."""
    ranking: list[dict[str, float]]
    figures: dict[str, Any]
    """What else was measured, as {text: value}."""
    samples: Tensor
    """Unconditional samples [N, C, H, W]."""
    images: Tensor
    """As many held-out images, with the noise floor."""


def report_prior(
    prior: NetworkPrior,
    teacher: Denoiser,
    source: ImageSource,
    *,
    noise_floor: float = 0.0,
    sigmas: Sequence[float] = DEFAULT_SIGMAS,
) -> PriorReport:
    """Measure `prior` on the images that `source` holds out, with the noise floor of its training added.

    Non-local means is tuned on the same images, to compare with. Takes some minutes. Raises ValueError for
    images that do not fit the prior, and without scikit-image.
    """
    count = min(MOST_IMAGES, EVALUATION_VALUES // math.prod(prior.image_shape))
    clean = source.held_out(max(count, SHOWN))
    _check(prior, clean)
    floor = noise_floor * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    images = (clean + floor).to(prior.device)
    low, high = prior.sigma_range
    levels = evaluate_prior(prior, teacher, images, [s for s in sigmas if low <= s <= high])
    figures = {"held-out images in these tables": len(images)} | _baseline(prior, images)
    trusted, error = trusted_levels(levels, prior.sigma_range)
    covered = max(1, min(MOST_COVERAGE_IMAGES, COVERAGE_VALUES // math.prod(prior.image_shape)))
    return PriorReport(
        levels=levels,
        mean_gradient_error=_log_mean([(r["sigma"], r["gradient_error"]) for r in levels]),
        sigma_range=trusted,
        largest_gradient_error=error,
        gradient_consistency=energy_consistency(prior.denoiser, images[:2].cpu()),
        ranking=rank_energies(prior, images, [s for s in RANKING_SIGMAS if low <= s <= high]),
        figures=figures | _coverage(prior.trusted(trusted, error), clean[:covered], noise_floor),
        samples=draw_unconditional(prior, len(images[:SHOWN])),
        images=images[:SHOWN].cpu(),
    )


def trusted_levels(
    levels: list[dict[str, float]], sigma_range: tuple[float, float]
) -> tuple[tuple[float, float], float]:
    """The part of `sigma_range` above the highest level whose gradient error exceeds LARGEST_ERROR.

    levels: of `evaluate_prior`, in rising order; between them the error is taken as linear in log sigma. Also
    returns the largest error of what is left. All of it is left where even the highest level's is too large:
    the error then tells what there is to trust.
    """
    downwards = [(row["gradient_error"], math.log(row["sigma"])) for row in reversed(levels)]
    trusted = list(takewhile(lambda level: level[0] <= LARGEST_ERROR, downwards))
    if not trusted or len(trusted) == len(downwards):
        return sigma_range, max((error for error, _ in downwards), default=0.0)
    (above, log_above), (below, log_below) = trusted[-1], downwards[len(trusted)]
    share = (LARGEST_ERROR - above) / (below - above)
    low, high = sigma_range
    return (max(math.exp(log_above + share * (log_below - log_above)), low), high), LARGEST_ERROR


@torch.no_grad()
def evaluate_prior(
    prior: NetworkPrior,
    teacher: Denoiser,
    images: Tensor,
    sigmas: Sequence[float] = DEFAULT_SIGMAS,
    *,
    seed: int = 0,
) -> list[dict[str, float]]:
    """One row a level, for images [N, C, H, W] that training did not see, x = image + sigma n.

    Keys: sigma; gradient_error = ||G - (x - D_teacher)|| / ||x - D_teacher||, norms over all images; psnr of
    x - G and teacher_psnr of D_teacher against the image, in dB of the mean squared error over all images,
    for a data range of 2. Levels share their n. Raises ValueError for images that do not fit the prior and
    for wrong sigmas.
    """
    _check(prior, images)
    if not sigmas or not all(0 < sigma < math.inf for sigma in sigmas):
        raise ValueError(f"sigmas are {list(sigmas)}; expected positive finite noise levels")
    images = images.to(prior.device, torch.float32)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed)).to(images)
    return [_level(prior, teacher, images, noise, float(sigma)) for sigma in sigmas]


def _level(
    prior: NetworkPrior, teacher: Denoiser, images: Tensor, noise: Tensor, sigma: float
) -> dict[str, float]:
    difference = size = error = teacher_error = 0.0
    for clean, n in zip(images.split(prior.batch_size), noise.split(prior.batch_size), strict=True):
        x, level = clean + sigma * n, clean.new_full((len(clean),), sigma)
        grad, target = prior.energy_and_grad(x, level)[1], x - teacher(x, level, prior.one_hot(len(x)))
        difference += _squares(grad - target)
        size += _squares(target)
        error += _squares(x - grad - clean)
        teacher_error += _squares(x - target - clean)
    return {
        "sigma": sigma,
        "gradient_error": math.sqrt(difference / size),
        "psnr": _psnr(error / images.numel()),
        "teacher_psnr": _psnr(teacher_error / images.numel()),
    }


def _squares(x: Tensor) -> float:
    return x.double().square().sum().item()


def _psnr(mean_square: float) -> float:
    return 10 * math.log10(DATA_RANGE**2 / mean_square)


def _log_mean(points: list[tuple[float, float]]) -> float:
    """Average over log sigma in AVERAGED of values at some levels (trapezoids); NaN for fewer than two."""
    inside = [(math.log(s), value) for s, value in points if AVERAGED[0] <= s <= AVERAGED[1]]
    if len(inside) < 2:
        return math.nan
    area = sum((b - a) * (u + v) / 2 for (a, u), (b, v) in pairwise(inside))
    return area / (inside[-1][0] - inside[0][0])


def _baseline(prior: NetworkPrior, images: Tensor, sigma: float = 0.1) -> dict[str, Any]:
    """The prior's denoiser beside non-local means, which is tuned on the same images."""
    images = images[:16]
    noisy = images + sigma * torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).to(images)
    level = images.new_full((len(images),), sigma)
    ours = _psnr((prior.denoise(noisy, level) - images).square().mean().item())
    best = _psnr(tune_non_local_means(noisy, images, sigma))
    text = f"denoising {len(images)} images at sigma {sigma:g}, PSNR"
    return {
        f"{text} of the prior, dB": ours,
        f"{text} of non-local means, strength and patch tuned on these images, dB": best,
    }


def evaluate_coverage(
    prior: NetworkPrior,
    images: Tensor,
    *,
    noise_floor: float = 0.0,
    seen: float = 0.5,
    noise_std: float = 0.05,
    level: float = 0.9,
    num_samples: int = 32,
    seed: int = 0,
) -> list[dict[str, float]]:
    """One row for each of images [N, C, H, W], inpainted: the share of true pixels in the `level` interval.

    The truth is the image plus the noise floor of the prior's training data; a random share `seen` of its
    pixels is measured, with noise of noise_std; the default sampler draws num_samples. Keys: coverage, and
    coverage_clean, the share of the image's own pixels (higher: the interval also spans the floor). Raises
    ValueError for images that do not fit the prior, RuntimeError when chains diverge.
    """
    _check(prior, images)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index, image in enumerate(images.float().cpu()):
        operator = operators.Inpainting(torch.rand(image.shape[1:], generator=generator) < seen)
        truth = image + noise_floor * torch.randn(image.shape, generator=generator)
        y = operator.forward(truth + noise_std * torch.randn(image.shape, generator=generator))
        posterior = api.sample(
            prior, operator, y, noise_std=noise_std, num_samples=num_samples, seed=seed + index
        )
        rows.append(
            {
                "coverage": posterior.coverage(truth, level),
                "coverage_clean": posterior.coverage(image, level),
            }
        )
    return rows


def _coverage(prior: NetworkPrior, images: Tensor, noise_floor: float) -> dict[str, float]:
    rows = evaluate_coverage(prior, images, noise_floor=noise_floor, num_samples=COVERAGE_SAMPLES)
    setting = (
        f"held-out images: {len(images)}; 50 % random pixels seen with noise_std 0.05, "
        f"{COVERAGE_SAMPLES} samples each, defaults of `alpenglow.sample`"
    )

    covered, clean = ([row[key] for row in rows] for key in ("coverage", "coverage_clean"))
    return {
        f"coverage of the 90 % interval ({setting})": statistics.mean(covered),
        "lowest coverage of one image": min(covered),
        "coverage of the pixels without the noise floor": statistics.mean(clean),
    }


def _check(prior: NetworkPrior, images: Tensor) -> None:
    if images.ndim != 4 or len(images) == 0 or tuple(images.shape[1:]) != prior.image_shape:
        expected = ", ".join(map(str, prior.image_shape))
        raise ValueError(f"got images {tuple(images.shape)}; {prior.name} expects [N, {expected}], N > 0")
