"""Two-dimensional FFTs whose result for an image is bitwise the same in every batch.

torch.fft.rfft2, irfft2 and fft2 are not: MKL picks another algorithm for a single plane (measured with
torch 2.13 on CPU: irfft2 on most sizes, rfft2 in float64 at 64 x 64). One-dimensional transforms of
contiguous rows are, and cost the same.

On CPU, spectra come out with the last two dimensions transposed in memory; elementwise arithmetic keeps that
layout, and it makes the transposition of the way back free. On an accelerator they are contiguous, as its FFT
library and the kernels want them; whether that library's result depends on the batch is up to it.
"""

import torch
from torch import Tensor


def rfft2(x: Tensor) -> Tensor:
    """Half spectrum [..., H, W // 2 + 1] of real x [..., H, W], unnormalised."""
    if x.device.type != "cpu":
        return torch.fft.rfft2(x)
    return torch.fft.fft(torch.fft.rfft(x.contiguous()).mT.contiguous()).mT


def irfft2(spectrum: Tensor, width: int) -> Tensor:
    """The inverse of rfft2: a real [..., H, width]."""
    if spectrum.device.type != "cpu":
        return torch.fft.irfft2(spectrum, s=(spectrum.shape[-2], width))
    return torch.fft.irfft(torch.fft.ifft(spectrum.mT.contiguous()).mT.contiguous(), n=width)


def fft2(z: Tensor) -> Tensor:
    """Orthonormal spectrum [..., H, W] of complex z [..., H, W]."""
    if z.device.type != "cpu":
        return torch.fft.fft2(z, norm="ortho")
    rows = torch.fft.fft(z.contiguous(), norm="ortho")
    return torch.fft.fft(rows.mT.contiguous(), norm="ortho").mT


def ifft2(spectrum: Tensor) -> Tensor:
    """The inverse, and adjoint, of fft2."""
    if spectrum.device.type != "cpu":
        return torch.fft.ifft2(spectrum, norm="ortho")
    columns = torch.fft.ifft(spectrum.mT.contiguous(), norm="ortho")
    return torch.fft.ifft(columns.mT.contiguous(), norm="ortho")


def as_spectra(constant: Tensor) -> Tensor:
    """`constant` [H, W'] laid out in memory as the spectra on its device are."""
    return constant.contiguous() if constant.device.type != "cpu" else constant.mT.contiguous().mT
