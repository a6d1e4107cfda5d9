"""The two training objectives: EDM's for the teacher, score matching to the teacher for the energy."""

from collections.abc import Callable

import torch
from torch import Tensor

from alpenglow.distillation.config import LossWeight, SigmaLaw
from alpenglow.networks.denoiser import EDMDenoiser, energy_and_grad

Denoiser = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""D(x, sigma, classes): x [B, C, H, W], sigma [B], one-hot classes [B, K] or None -> [B, C, H, W]."""


def draw_sigma(law: SigmaLaw, index: int, generator: torch.Generator) -> Tensor:
    """The noise level of image `index` of a batch, a scalar.

    Log-normal for even images (where images form), log-uniform for odd ones (so that no level is rare).
    """
    low, high = torch.tensor([law.low, law.high]).log()
    if index % 2:
        log_sigma = low + (high - low) * torch.rand((), generator=generator)
    else:
        log_sigma = law.log_mean + law.log_std * torch.randn((), generator=generator)
    return log_sigma.clamp(low, high).exp()


def teacher_loss(
    model: EDMDenoiser,
    clean: Tensor,
    noisy: Tensor,
    sigma: Tensor,
    *,
    classes: Tensor | None = None,
    augmentation: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """EDM's loss, lambda(sigma) ||D(x + n) - x||^2 with lambda = 1 / c_out^2 (arXiv 2206.00364, table 1).

    Mean over images and pixels, a scalar. clean and noisy [B, C, H, W], sigma [B]. `augmentation` [B, 9]
    tells the network what was done to the images, so that it does not leak into what it generates.
    """
    denoised = model(noisy, sigma, classes, augmentation=augmentation, compute_dtype=compute_dtype)
    return ((denoised - clean) / model.coefficients(sigma).c_out).square().mean()


def energy_loss(
    model: EDMDenoiser,
    teacher: Denoiser,
    clean: Tensor,
    noisy: Tensor,
    sigma: Tensor,
    *,
    weight: LossWeight = "excess",
    classes: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """w ||G(x_t, sigma) - (x_t - D_teacher(x_t, sigma))||^2, a mean over images and pixels.

    Matches the energy's gradient to the teacher's noise estimate (ALPS, arXiv 2601.02594); w is that of
    `weight` (LossWeight). clean, noisy = x_t [B, C, H, W], sigma [B].
    """
    with torch.no_grad():
        denoised = teacher(noisy, sigma, classes)
    _, grad = energy_and_grad(
        model, noisy, sigma, class_label=classes, create_graph=True, compute_dtype=compute_dtype
    )
    error = (grad - (noisy - denoised)).square().mean((1, 2, 3))
    white = model.coefficients(sigma).c_out.square().flatten()
    if weight == "edm":
        return (error / white).mean()
    own = (denoised - clean).square().mean((1, 2, 3))
    # An image that the teacher knows to the last digit (a black crop) would outweigh all others.
    return (error / own.clamp(min=0.01 * white)).mean()
