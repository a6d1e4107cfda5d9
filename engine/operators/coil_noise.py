"""Noise of receiver coils: its covariance, and whitening. Pure functions on tensors.

A noise sample n [coils] is complex Gaussian. As everywhere in this package, noise is counted per real
component: its covariance is Psi = E[n n^H] / 2, and noise_std the standard deviation of the real and of the
imaginary part. After `whiten`, every coil has noise_std 1 and no coil knows of another's noise, which is what
SenseMRI takes for granted; the maps must be whitened by the same matrix.
Source: Pruessmann et al., Magn Reson Med 2001, appendix A.
"""

import math
from typing import Any

import torch
from torch import Tensor

from alpenglow.operators.validation import as_tensor, check_mask, finite_number

_MEDIAN = 0.6744897501960817  # of |N(0, 1)|


def noise_covariance(noise: Any) -> Tensor:
    """Psi [coils, coils], complex128 and Hermitian, of a scan without signal, complex [coils, ...].

    Its relative error is about sqrt(coils / samples). Raises ValueError unless there are at least twice as
    many samples as coils.
    """
    samples = _coil_data(noise, "the noise scan", 2).flatten(1).to(torch.complex128)
    coils, count = samples.shape
    if count < 2 * coils:
        raise ValueError(
            f"got {count} noise samples of {coils} coils; expected at least {2 * coils}: take a longer noise "
            "scan, or a larger background region"
        )
    samples = samples - samples.mean(1, keepdim=True)
    psi = samples @ samples.mH / (2 * (count - 1))
    return (psi + psi.mH) / 2  # a matrix product with fused operations is Hermitian only up to rounding


def background_covariance(coil_images: Any, background: Any = None) -> Tensor:
    """Psi [coils, coils] of fully sampled coil images, complex [coils, H, W], where there is only air.

    The images are orthonormal FFTs of k-space: then its noise and theirs have one covariance. background:
    bool or 0 and 1, [H, W]; by default the four corners, each a tenth of both sides. Raises ValueError as
    `noise_covariance`.
    """
    images = _coil_data(coil_images, "coil_images", 3)
    if images.ndim != 3:
        raise ValueError(f"got coil images {tuple(images.shape)}; expected [coils, H, W]")
    region = corners(*images.shape[1:]) if background is None else check_mask(background, (2,), "[H, W]")
    if region.shape != images.shape[1:]:
        raise ValueError(
            f"got a background {tuple(region.shape)} for coil images {tuple(images.shape)}; expected [H, W]"
        )
    return noise_covariance(images[:, region.to(images.device)])


def corners(height: int, width: int, share: float = 0.1) -> Tensor:
    """The four corners of an image, each of `share` of both sides: bool [height, width]."""
    part = finite_number(share, "share", "the sides of the image")
    if not 0 < part <= 0.5:
        raise ValueError(f"got share={share!r}; expected a number in (0, 0.5]")
    rows, columns = (max(1, round(part * n)) for n in (height, width))
    region = torch.zeros(height, width, dtype=torch.bool)
    for row in (slice(0, rows), slice(height - rows, height)):
        for column in (slice(0, columns), slice(width - columns, width)):
            region[row, column] = True
    return region


def whitening_matrix(covariance: Any) -> Tensor:
    """W = L^-1 with Psi = L L^H (Cholesky), complex128 [coils, coils]: then W n has covariance I.

    Raises ValueError unless the covariance is [coils, coils], Hermitian and positive definite.
    """
    psi = as_tensor(covariance, "the covariance").to(torch.complex128)
    if psi.ndim != 2 or psi.shape[0] != psi.shape[1] or not torch.allclose(psi, psi.mH, rtol=1e-5, atol=0):
        raise ValueError(f"got a covariance {tuple(psi.shape)}; expected a Hermitian matrix [coils, coils]")
    factor, failure = torch.linalg.cholesky_ex(psi)
    if failure:
        raise ValueError(
            "the covariance is not positive definite: a coil is dead, or two are one; leave such coils out, "
            "or take more noise samples"
        )
    unit = torch.eye(len(psi), dtype=psi.dtype, device=psi.device)
    return torch.linalg.solve_triangular(factor, unit, upper=False)


def whiten(data: Any, matrix: Tensor) -> Tensor:
    """W data, in its precision: k-space or coil images, complex [..., coils, H, W], or maps [coils, H, W].

    matrix: of `whitening_matrix`. Raises ValueError where the numbers of coils differ.
    """
    values = _coil_data(data, "data", 3)
    if values.shape[-3] != matrix.shape[-1]:
        raise ValueError(
            f"got data {tuple(values.shape)} for {matrix.shape[-1]} coils; expected [..., coils, H, W]"
        )
    return torch.einsum("ij,...jhw->...ihw", matrix.to(values.device, values.dtype), values)


def estimate_noise_std(k_space: Any, mask: Any, *, outer: float = 0.3) -> float:
    """noise_std of k-space, complex [..., coils, H, W], from its rim, where it is nearly only noise.

    Of the measured samples it takes the share `outer` that is farthest from the middle, in half widths of
    k-space, and the median modulus of their parts over that of a standard normal: a few samples with signal
    do no harm. Where coils differ it is a kind of average; `whiten` first. mask: [H, W], bool or 0 and 1.
    Raises ValueError for fewer than 100 numbers, and for a median of 0.
    """
    values = _coil_data(k_space, "k-space", 3)
    measured = check_mask(mask, (2,), "[H, W]").to(values.device)
    share = finite_number(outer, "outer", "the measured samples")
    if measured.shape != values.shape[-2:] or not 0 < share <= 1:
        raise ValueError(
            f"got a mask {tuple(measured.shape)} for k-space {tuple(values.shape)} and outer={outer!r}; "
            "expected [H, W] and a share in (0, 1]"
        )
    rows, columns = ((torch.arange(n, device=values.device) - n // 2) * (2 / n) for n in measured.shape)
    radius = torch.hypot(*torch.meshgrid(rows, columns, indexing="ij"))[measured]
    inner = radius.sort().values[math.floor((1 - share) * (len(radius) - 1))]
    rim = values[..., measured][..., radius >= inner]
    parts = torch.view_as_real(rim).abs().double()
    middle = parts.median().item()
    if parts.numel() < 100 or middle == 0:
        raise ValueError(
            f"the rim of k-space holds {parts.numel()} numbers of median modulus {middle:g}: too little to "
            "see the noise; give noise_std, or a larger share `outer`"
        )
    return middle / _MEDIAN


def _coil_data(data: Any, name: str, least: int) -> Tensor:
    tensor = as_tensor(data, name).resolve_conj()
    if tensor.ndim < least or not tensor.is_complex() or tensor.numel() == 0:
        raise ValueError(
            f"got {tensor.dtype} {tuple(tensor.shape)} for {name}; expected complex numbers with a dimension "
            "of coils"
        )
    if not tensor.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinity")
    return tensor
