"""Periodic convolutions, diagonal in the Fourier basis: Gaussian blur, motion blur, any kernel."""

import math
from typing import Any

import torch
from torch import Tensor

from alpenglow.operators.diagonal import DiagonalOperator
from alpenglow.operators.transforms import irfft2, rfft2
from alpenglow.operators.validation import as_tensor, finite_number, positive_number

_TRUNCATION = 4.0  # a Gaussian kernel ends at 4 standard deviations, as in scipy.ndimage
_LARGEST_SIGMA = 250.0  # pixels; a kernel of 2001 x 2001
_LARGEST_LENGTH = 2000.0  # pixels
_POINTS_PER_PIXEL = 64  # of a motion path; the kernel is right to about 1e-4 of its peak


class Convolution(DiagonalOperator):
    """Periodic convolution of every channel with one real kernel.

    kernel: [h, w], its origin at [h // 2, w // 2]: (A x)[i] = sum_j kernel[j] x[i - (j - origin)], indices
    modulo the image; a kernel that is larger than the image wraps around. It is not normalised.
    The measurement has the image's shape. Raises ValueError unless the kernel is real, finite and not zero.
    """

    def __init__(self, kernel: Any) -> None:
        kernel = as_tensor(kernel, "kernel")
        if kernel.ndim != 2 or kernel.numel() == 0 or kernel.is_complex():
            raise ValueError(
                f"got a {kernel.dtype} kernel of shape {tuple(kernel.shape)}; expected real numbers [h, w]"
            )
        if not kernel.isfinite().all() or not kernel.any():
            raise ValueError(
                "kernel is all zero, or holds NaN or infinity; expected finite numbers, not all zero"
            )
        self.kernel: Tensor = kernel.to("cpu", torch.float64, copy=True)
        self._transfers: dict[tuple[int, int, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        """The blurred images [B, C, H, W]."""
        return irfft2(multiply(rfft2(x), self._transfer(x)[0]), x.shape[-1])

    def adjoint(self, y: Tensor) -> Tensor:
        """Correlation with the kernel, [B, C, H, W]."""
        return irfft2(self.adjoint_coefficients(y), y.shape[-1])

    def adjoint_coefficients(self, y: Tensor) -> Tensor:
        """The half spectrum of A^T y, complex [B, C, H, W // 2 + 1]."""
        return multiply(rfft2(y), self._transfer(y)[0].conj())

    def eigenvalues(self, image: Tensor) -> Tensor:
        """|transfer function|^2 on the half spectrum [H, W // 2 + 1]."""
        return self._transfer(image)[1]

    @property
    def half_spectrum(self) -> bool:
        """True."""
        return True

    def to_basis(self, x: Tensor) -> Tensor:
        """The half spectrum of x [B, C, H, W], complex [B, C, H, W // 2 + 1]."""
        return rfft2(x)

    def from_basis(self, coefficients: Tensor, image_shape: tuple[int, ...]) -> Tensor:
        """The images [B, C, H, W] of half spectra [B, C, H, W // 2 + 1]."""
        return irfft2(coefficients, image_shape[-1])

    @torch.inference_mode(False)  # so that a later gradient may use what is kept
    def _transfer(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The transfer function on the half spectrum, and its squared modulus; made once a kind of image."""
        H, W = image.shape[-2:]
        key = (H, W, image.device, image.dtype)
        if key not in self._transfers:
            h, w = self.kernel.shape
            rows, columns = (torch.arange(h) - h // 2) % H, (torch.arange(w) - w // 2) % W
            periodic = torch.zeros(H, W, dtype=torch.float64)
            periodic.index_put_((rows[:, None], columns), self.kernel, accumulate=True)
            exact = rfft2(periodic)  # float64, so that deep zeros of a blur stay deep in float32
            squared = exact.real.square() + exact.imag.square()
            self._transfers[key] = (
                exact.to(image.device, image.dtype.to_complex()),
                squared.to(image.device, image.dtype),
            )
        return self._transfers[key]


class GaussianBlur(Convolution):
    """Periodic blur with an isotropic Gaussian of standard deviation `sigma` pixels.

    Sampled at the pixels out to int(4 sigma + 0.5) and normalised to sum 1, exactly as
    scipy.ndimage.gaussian_filter(mode="wrap"). Raises ValueError unless 0 < sigma <= 250.
    """

    def __init__(self, sigma: float) -> None:
        self.sigma = positive_number(sigma, "sigma", "pixels", largest=_LARGEST_SIGMA)
        profile = gaussian_profile(self.sigma)
        super().__init__(torch.outer(profile, profile))


class MotionBlur(Convolution):
    """Periodic blur along a straight path of `length` pixels at `angle_deg` degrees.

    The angle is counted from the row direction (left to right) counter-clockwise as displayed, that is
    towards smaller row indices. The path is centred; every point of it is shared between its four
    neighbouring pixels with bilinear weights, and the kernel is normalised to sum 1.
    Raises ValueError unless 0 < length <= 2000 and the angle is finite.
    """

    def __init__(self, length: float, angle_deg: float) -> None:
        self.length = positive_number(length, "length", "pixels", largest=_LARGEST_LENGTH)
        self.angle_deg = finite_number(angle_deg, "angle_deg", "degrees")
        super().__init__(_line_kernel(self.length, math.radians(self.angle_deg)))


def gaussian_profile(sigma: float) -> Tensor:
    """A sampled Gaussian [2 r + 1], r = int(4 sigma + 0.5), of sum 1, float64; sigma in pixels."""
    radius = int(_TRUNCATION * sigma + 0.5)
    profile = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=torch.float64) / sigma).square())
    return profile / profile.sum()


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """The complex product, rounded alike at every position.

    torch's own complex product fuses multiply and add in its vector loop but not in its scalar tail, so it
    depends on where in memory, hence in which batch, an element lies.
    """
    real = a.real * b.real - a.imag * b.imag
    return torch.complex(real, a.real * b.imag + a.imag * b.real)


def _line_kernel(length: float, angle: float) -> Tensor:
    """A path of `length` pixels through the centre of a square odd kernel, of sum 1, float64."""
    count = math.ceil(_POINTS_PER_PIXEL * length)
    along = ((torch.arange(count, dtype=torch.float64) + 0.5) / count - 0.5) * length
    radius = math.ceil(length / 2) + 1
    row, column = radius - math.sin(angle) * along, radius + math.cos(angle) * along
    top, left = row.floor(), column.floor()
    kernel = torch.zeros(2 * radius + 1, 2 * radius + 1, dtype=torch.float64)
    for step_down in (0, 1):
        for step_right in (0, 1):
            weight = (1 - (row - top - step_down).abs()) * (1 - (column - left - step_right).abs())
            index = ((top + step_down).long(), (left + step_right).long())
            kernel.index_put_(index, weight / count, accumulate=True)
    return kernel
