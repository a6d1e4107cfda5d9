"""What a method gives for one measurement, and its figures against the truth."""

import math
from dataclasses import dataclass

from torch import Tensor

from alpenglow.evaluation import psnr, ssim
from alpenglow.posterior import Posterior
from alpenglow.statistics import sample_statistics, student_t_interval

LEVELS = (0.5, 0.9)


@dataclass(frozen=True)
class Estimate:
    """The point estimate image [C, H, W], and for samplers what its intervals are made of.

    samples [N, C, H, W]; std [C, H, W]; effective: the number of independent samples these are worth. nfe:
    network evaluations, per sample. seconds: for all samples, of the processor on a CPU (which other
    processes do not lengthen), of the clock on other devices.
    """

    image: Tensor
    nfe: float
    seconds: float
    samples: Tensor | None = None
    std: Tensor | None = None
    effective: float = 1.0


def of_posterior(posterior: Posterior, seconds: float) -> Estimate:
    """The MMSE estimate of a result of `alpenglow.sample`."""
    return Estimate(
        posterior.mean, posterior.nfe, seconds, posterior.samples, posterior.std, posterior.effective_samples
    )


def of_samples(samples: Tensor, nfe: float, seconds: float) -> Estimate:
    """The MMSE estimate of independent samples [N, C, H, W]."""
    found = sample_statistics(samples)
    return Estimate(found.mean.float(), nfe, seconds, samples, found.std.float(), float(len(samples)))


def score(estimate: Estimate, truth: Tensor) -> dict[str, float]:
    """Figures against the truth [C, H, W]: psnr and ssim of the image, nfe, seconds.

    Of samplers also sample_psnr, the mean over single samples, and coverage_50, coverage_90, width_90 of the
    Student-t predictive intervals (alpenglow.statistics). NaN where the image is not finite.
    """
    figures = {
        "psnr": _or_nan(psnr(estimate.image, truth)),
        "ssim": _or_nan(ssim(estimate.image, truth)),
        "nfe": estimate.nfe,
        "seconds": estimate.seconds,
    }
    if estimate.samples is None or estimate.std is None:
        return figures
    singles = [_or_nan(psnr(sample, truth)) for sample in estimate.samples]
    figures["sample_psnr"] = sum(singles) / len(singles)
    truth = truth.to(estimate.image.device)
    for level in LEVELS:
        lower, upper = student_t_interval(estimate.image, estimate.std, estimate.effective, level)
        inside = (lower <= truth) & (truth <= upper)
        figures[f"coverage_{100 * level:.0f}"] = inside.float().mean().item()
        figures[f"width_{100 * level:.0f}"] = (upper - lower).mean().item()
    return figures


def average(figures: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each figure over images."""
    return {name: sum(f[name] for f in figures) / len(figures) for name in figures[0]}


def mean_psnr(samples: Tensor, truths: Tensor) -> float:
    """PSNR in dB of the mean over samples [M, N, C, H, W], averaged over truths [M, C, H, W]; or NaN."""
    pairs = zip(samples.mean(1), truths, strict=True)
    return sum(_or_nan(psnr(image, truth)) for image, truth in pairs) / len(truths)


def _or_nan(value: float) -> float:
    return value if math.isfinite(value) else math.nan
