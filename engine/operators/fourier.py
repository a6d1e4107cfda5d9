"""Single-coil Cartesian k-space sampling."""

import math
from typing import Any

import torch
from torch import Tensor

from alpenglow.operators.diagonal import DiagonalOperator
from alpenglow.operators.spectral import multiply
from alpenglow.operators.transforms import as_spectra, fft2, ifft2, irfft2, rfft2
from alpenglow.operators.validation import check_mask


class FourierSampling(DiagonalOperator):
    """A = mask * F with F the centred orthonormal FFT.

    y[u] = mask[u] (H W)^(-1/2) sum_h x[h] exp(-2 pi i ((h0 - H // 2)(u0 - H // 2) / H + ...)), that is
    fftshift(fft2(ifftshift(x), norm="ortho")) times the mask: image and k-space have their centre at
    [H // 2, W // 2]. The measurement is complex, [1, H, W], 0 where the mask is (and ignored there);
    noise_std holds for its real and for its imaginary part.

    mask: [H, W], bool or 0 and 1. channels: 2 for complex images (real, imaginary), 1 for real images.
    Raises ValueError for another mask or number of channels.
    """

    # Images are never shifted. A circular shift commutes with every function of A^T A, and the image's centre
    # is a phase ramp over k-space; only y, once and not per chain, is brought to the order of the FFT.

    def __init__(self, mask: Any, *, channels: int = 2) -> None:
        if channels not in (1, 2):
            raise ValueError(f"got channels={channels!r}; expected 2 (complex images) or 1 (real images)")
        self.channels = channels
        self.mask: Tensor = check_mask(mask, (2,), "[H, W]")
        self._eigenvalues: dict[torch.dtype, Tensor] = {}
        self._ramps: dict[torch.dtype, Tensor] = {}

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "FourierSampling":
        """This operator with its mask on another device (a mask has no real dtype)."""
        return self if device is None else FourierSampling(self.mask.to(device), channels=self.channels)

    @property
    def measurement_is_complex(self) -> bool:
        """True."""
        return True

    def measurement_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, ...]:
        """(1, H, W): one complex k-space. Raises ValueError if the image does not fit."""
        self.check_image(image_shape)
        return (1, *image_shape[1:])

    def check_image(self, image_shape: tuple[int, int, int]) -> None:
        """Raise ValueError unless the mask and the number of channels fit images of this shape [C, H, W]."""
        super().check_image(image_shape)
        expected = (self.channels, *self.mask.shape)
        if tuple(image_shape) != expected:
            raise ValueError(
                f"got images {tuple(image_shape)}; this FourierSampling expects {expected}: use a mask of "
                "the image's size, and channels=2 for complex images (real, imaginary) or 1 for real ones"
            )

    def forward(self, x: Tensor) -> Tensor:
        """The sampled k-space [B, 1, H, W], complex, of images [B, channels, H, W]."""
        self.check_image((x.shape[1], x.shape[2], x.shape[3]))  # the FFT would take two real images as one
        image = torch.complex(x[:, :1], x[:, 1:] if self.channels == 2 else torch.zeros_like(x))
        centred = torch.fft.fftshift(multiply(fft2(image), self._ramp(x.dtype)), dim=(-2, -1))
        return centred * self.mask

    def adjoint(self, y: Tensor) -> Tensor:
        """The zero-filled image [B, channels, H, W] (for real images its real part)."""
        return self.from_basis(self.adjoint_coefficients(y), (self.channels, *self.mask.shape))

    def adjoint_coefficients(self, y: Tensor) -> Tensor:
        """The spectrum of A^T y: all of it for complex images, for real ones half and times (H W)^(1/2)."""
        ramp = self._ramp(y.real.dtype).conj()
        spectrum = multiply(torch.fft.ifftshift(y * self.mask, dim=(-2, -1)), ramp)
        if self.channels == 2:
            return spectrum
        # The real part of an image has the Hermitian part of its spectrum.
        half = 0.5 * (spectrum + _negate_frequencies(spectrum).conj())[..., : y.shape[-1] // 2 + 1]
        return half * math.sqrt(self.mask.numel())

    @torch.inference_mode(False)  # so that a later gradient may use what is kept
    def eigenvalues(self, image: Tensor) -> Tensor:
        """The mask [H, W] in FFT order; for real images the mean with its mirror image, [H, W // 2 + 1]."""
        if image.dtype not in self._eigenvalues:
            mask = torch.fft.ifftshift(self.mask).to(image.dtype)
            if self.channels == 1:
                mask = 0.5 * (mask + _negate_frequencies(mask))[:, : mask.shape[1] // 2 + 1]
            self._eigenvalues[image.dtype] = as_spectra(mask)
        return self._eigenvalues[image.dtype]

    @property
    def half_spectrum(self) -> bool:
        """True for real images."""
        return self.channels == 1

    def to_basis(self, x: Tensor) -> Tensor:
        """The spectrum of images: [B, 1, H, W], or unnormalised [B, 1, H, W // 2 + 1] for real images."""
        return rfft2(x) if self.channels == 1 else fft2(torch.complex(x[:, :1], x[:, 1:]))

    def from_basis(self, coefficients: Tensor, image_shape: tuple[int, ...]) -> Tensor:
        """Images [B, channels, H, W] of a spectrum."""
        if self.channels == 1:
            return irfft2(coefficients, image_shape[-1])
        image = ifft2(coefficients)
        return torch.cat([image.real, image.imag], dim=1)

    @torch.inference_mode(False)  # so that a later gradient may use what is kept
    def _ramp(self, dtype: torch.dtype) -> Tensor:
        """exp(2 pi i (u0 (H // 2) / H + u1 (W // 2) / W)), FFT order: it moves the origin to the centre."""
        if dtype not in self._ramps:
            # Reducing c u modulo n in integers keeps the ramp of an even size exactly +-1.
            rows, columns = (
                torch.arange(n, device=self.mask.device) * (n // 2) % n / torch.tensor(n, dtype=torch.float64)
                for n in self.mask.shape
            )
            angle = 2 * math.pi * ((rows[:, None] + columns) % 1)
            ramp = torch.polar(torch.ones_like(angle), angle).to(dtype.to_complex())
            self._ramps[dtype] = as_spectra(ramp)
        return self._ramps[dtype]


def _negate_frequencies(spectrum: Tensor) -> Tensor:
    """spectrum[-u] of a full spectrum [..., H, W] in FFT order."""
    return spectrum.flip((-2, -1)).roll((1, 1), (-2, -1))
