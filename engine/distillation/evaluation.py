"""How good a distilled prior is: against its teacher at each noise level, and in the posteriors it gives."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from alpenglow import api, operators
from alpenglow.evaluation import DATA_RANGE
from alpenglow.networks.denoiser import EDMDenoiser
from alpenglow.priors.network import NetworkPrior

DEFAULT_SIGMAS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


@torch.no_grad()
def evaluate_prior(
    prior: NetworkPrior,
    teacher: EDMDenoiser,
    images: Tensor,
    sigmas: Sequence[float] = DEFAULT_SIGMAS,
    *,
    seed: int = 0,
) -> list[dict[str, float]]:
    """One row a level, for images [N, C, H, W] in [-1, 1] that training did not see, x = image + sigma n.

    Keys: sigma; gradient_error = ||G - (x - D_teacher)|| / ||x - D_teacher||, norms over all images; psnr of
    x - G and teacher_psnr of D_teacher against the image, in dB of the mean squared error over all images.
    Levels share their n. Raises ValueError for images that do not fit the prior and for wrong sigmas.
    """
    _check(prior, images)
    if not sigmas or not all(0 < sigma < math.inf for sigma in sigmas):
        raise ValueError(f"sigmas are {list(sigmas)}; expected positive finite noise levels")
    images = images.to(prior.device, torch.float32)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed)).to(images)
    return [_level(prior, teacher, images, noise, float(sigma)) for sigma in sigmas]


def _level(
    prior: NetworkPrior, teacher: EDMDenoiser, images: Tensor, noise: Tensor, sigma: float
) -> dict[str, float]:
    difference = size = error = teacher_error = 0.0
    for clean, n in zip(images.split(prior.batch_size), noise.split(prior.batch_size), strict=True):
        x, level = clean + sigma * n, clean.new_full((len(clean),), sigma)
        grad, target = prior.energy_and_grad(x, level)[1], x - teacher(x, level)
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


def _check(prior: NetworkPrior, images: Tensor) -> None:
    if images.ndim != 4 or len(images) == 0 or tuple(images.shape[1:]) != prior.image_shape:
        expected = ", ".join(map(str, prior.image_shape))
        raise ValueError(f"got images {tuple(images.shape)}; {prior.name} expects [N, {expected}], N > 0")
