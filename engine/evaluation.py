"""Figures of quality against a known truth, for images in [-1, 1] (data range 2)."""

import torch
from torch import Tensor

from alpenglow.posterior import Posterior

DATA_RANGE = 2.0


def _matching(truth: Tensor, image: Tensor) -> Tensor:
    """The truth on the device of the image; ValueError on another shape."""
    if image.shape != truth.shape or image.ndim != 3:
        raise ValueError(
            f"got images {tuple(image.shape)} and {tuple(truth.shape)}; expected the same [C, H, W]"
        )
    return truth.to(image.device)


def psnr(image: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of an image [C, H, W]; infinite where it equals the truth."""
    from torchmetrics.functional.image import peak_signal_noise_ratio  # a second to import

    truth = _matching(truth, image)
    return peak_signal_noise_ratio(image.double(), truth.double(), data_range=DATA_RANGE).item()


def ssim(image: Tensor, truth: Tensor) -> float:
    """Structural similarity (Wang et al. 2004, Gaussian window of std 1.5) of an image [C, H, W]."""
    from torchmetrics.functional.image import structural_similarity_index_measure  # a second to import

    truth = _matching(truth, image)
    value = structural_similarity_index_measure(
        image[None].double(), truth[None].double(), data_range=DATA_RANGE
    )
    assert isinstance(value, Tensor)
    return value.item()


def interval_width(posterior: Posterior, level: float = 0.9) -> float:
    """Mean width over pixels of the predictive interval, in units of the image."""
    lower, upper = posterior.interval(level)
    return (upper - lower).mean().item()


def error_correlation(posterior: Posterior, truth: Tensor) -> float:
    """Pearson correlation over pixels of posterior std and absolute error of the mean, against the truth
    [C, H, W]; NaN if either is constant."""
    error = (posterior.mean - _matching(truth, posterior.mean)).abs()
    return torch.corrcoef(torch.stack([posterior.std.flatten(), error.flatten()]).double())[0, 1].item()


def evaluate(posterior: Posterior, truth: Tensor, *, level: float = 0.9) -> dict[str, float]:
    """All figures of a posterior against the truth [C, H, W].

    Keys: psnr, ssim (of the mean), map_psnr, map_ssim (if it has a MAP image), coverage, interval_width,
    error_correlation. Raises ValueError on a truth of another shape.
    """
    figures = {"psnr": psnr(posterior.mean, truth), "ssim": ssim(posterior.mean, truth)}
    if posterior.map_image is not None:
        figures |= {
            "map_psnr": psnr(posterior.map_image, truth),
            "map_ssim": ssim(posterior.map_image, truth),
        }
    return figures | {
        "coverage": posterior.coverage(truth, level),
        "interval_width": interval_width(posterior, level),
        "error_correlation": error_correlation(posterior, truth),
    }
