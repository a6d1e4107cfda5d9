"""Preconditioners of multi-coil MRI: approximations of P = (A^H A / noise_std^2 + I / sigma^2)^-1.

Both diagonalise an approximation of A^H A once, and then serve every level and noise_std. A mask that is
constant along rows or columns leaves A^H A in one block a line, which `LineBlocks` diagonalises exactly;
`Circulant` takes every mask.
"""

import torch
from torch import Tensor
from torch.nn import functional

from alpenglow.operators.base import per_image
from alpenglow.operators.diagonal import scale
from alpenglow.operators.transforms import as_spectra, fft2, ifft2

LARGEST_BLOCKS = 2**27
"""Elements of all blocks together that are worth their memory: 1 GiB in single precision."""
_GROUP = 8  # images multiplied at once on a CPU: always as many, so that rounding does not know the batch


def line_axis(mask: Tensor) -> int | None:
    """The axis of a mask [H, W] along which it varies while it is constant along the other, 0 or 1.

    None for a mask that varies along both, or whose `LineBlocks` would be larger than LARGEST_BLOCKS.
    """
    for axis in (1, 0):
        lines, n = mask.shape[1 - axis], mask.shape[axis]
        if lines * n**2 <= LARGEST_BLOCKS and (mask == mask.narrow(1 - axis, 0, 1)).all():
            return axis
    return None


class Circulant:
    """The circulant matrix nearest to A^H A (Frobenius norm), inverted within the support of the maps.

    Its eigenvalues are the diagonal of F A^H A F^H: the mask, blurred by the power spectra of the maps.
    Pixels that no coil sees are apart in A^H A, and are inverted exactly.
    Source: Koolstra et al., Magn Reson Med 2019, doi 10.1002/mrm.27371 (diagonal in k-space).
    """

    def __init__(self, maps: Tensor, mask: Tensor) -> None:
        wide = maps.to(torch.complex128)
        power = torch.fft.fft2(wide).abs().square().sum(0) / mask.numel() ** 2
        # A correlation of the mask with the power, over a periodic k-space.
        spectrum = torch.fft.fft2(torch.fft.ifftshift(mask).double()) * torch.fft.fft2(power).conj()
        eigenvalues = torch.fft.ifft2(spectrum).real.clamp(min=0)
        self._eigenvalues = as_spectra(eigenvalues.to(maps.dtype.to_real()))
        self._support = (maps != 0).any(0).to(maps.dtype.to_real())

    def __call__(self, residual: Tensor, sigma: Tensor, noise_std: float) -> Tensor:
        """An approximation of P residual, up to a factor per image; see IterativeOperator.precondition."""
        seen = residual * self._support
        spectrum = fft2(torch.complex(seen[:, :1], seen[:, 1:]))
        image = ifft2(scale(spectrum, _gain(self._eigenvalues, residual, sigma, noise_std)))
        filtered = torch.cat([image.real, image.imag], 1) * self._support
        hidden = residual * (1 - self._support)
        return filtered + hidden * _gain(hidden.new_zeros(()), residual, sigma, noise_std)


class LineBlocks:
    """A^H A of a mask that depends on one axis of k-space alone, exactly, as its blocks' eigenvectors.

    Along the other axis the two FFTs cancel. With T[w, w'] = t[w - w'] and t the inverse FFT of the mask's
    line, the block of line h is T[w, w'] sum_c conj(S_c[h, w]) S_c[h, w'].

    maps: complex [coils, H, W]; mask: bool [H, W]; axis: its `line_axis`. Memory: lines n^2 complex numbers
    for lines of n pixels.
    """

    def __init__(self, maps: Tensor, mask: Tensor, axis: int) -> None:
        self._transposed = axis == 0
        maps, line = (maps.mT, mask[:, 0]) if self._transposed else (maps, mask[0])
        n = len(line)
        kernel = torch.fft.ifft(torch.fft.ifftshift(line).to(torch.complex128))
        places = torch.arange(n, device=line.device)
        kernel = kernel[(places[:, None] - places) % n]
        shape = (maps.shape[1], n, n)
        self._vectors = torch.empty(shape, dtype=maps.dtype, device=maps.device)
        self._eigenvalues = torch.empty(shape[:2], dtype=maps.dtype.to_real(), device=maps.device)
        for h in range(shape[0]):
            sensitivity = maps[:, h].to(torch.complex128)
            values, vectors = torch.linalg.eigh(kernel * (sensitivity.mH @ sensitivity))
            self._eigenvalues[h], self._vectors[h] = values.clamp(min=0), vectors

    def __call__(self, residual: Tensor, sigma: Tensor, noise_std: float) -> Tensor:
        """P residual up to rounding and a factor per image; see IterativeOperator.precondition."""
        return self._filter(residual, _gain(self._eigenvalues, residual, sigma, noise_std))

    def draw(self, normals: Tensor, sigma: Tensor, noise_std: float) -> Tensor:
        """P^(1/2) n for standard normals n [B, 2, H, W]."""
        level = per_image(sigma, normals).square()
        variance = level * (noise_std**2 / (self._eigenvalues * level + noise_std**2))
        return self._filter(normals, variance.sqrt())

    def _filter(self, x: Tensor, gain: Tensor) -> Tensor:
        """V diag(gain) V^H x for images x [B, 2, H, W]; gain: real [1 or B, 1, lines, n]."""
        images = torch.complex(x[:, 0], x[:, 1])
        lines = (images.mT if self._transposed else images).permute(1, 2, 0)
        gains = gain[:, 0].expand(len(x), *self._eigenvalues.shape).permute(1, 2, 0)
        if x.device.type == "cpu":
            parts = zip(lines.split(_GROUP, -1), gains.split(_GROUP, -1), strict=True)
            lines = torch.cat([self._multiply(*part, pad=_GROUP - len(part[0][0, 0])) for part in parts], -1)
        else:
            lines = self._multiply(lines, gains, pad=0)
        images = lines.permute(2, 0, 1)
        images = images.mT if self._transposed else images
        return torch.stack([images.real, images.imag], 1)

    def _multiply(self, lines: Tensor, gains: Tensor, *, pad: int) -> Tensor:
        """V diag(gains) V^H lines, complex [lines, n, images]; pad: images of zeros to add meanwhile."""
        count = lines.shape[-1]
        lines, gains = (functional.pad(part, (0, pad)) for part in (lines, gains))
        # V^H z as the conjugate of V^T conj(z): torch would first write out a conjugate copy of V.
        coefficients = torch.bmm(self._vectors.mT, lines.conj().resolve_conj().contiguous())
        filtered = scale(coefficients.conj().resolve_conj(), gains)
        return torch.bmm(self._vectors, filtered)[..., :count]


def _gain(eigenvalues: Tensor, image: Tensor, sigma: Tensor, noise_std: float) -> Tensor:
    """P for eigenvalues of A^H A, over its harmonic mean with 1: [1 or B, 1, ...], bounded in every case."""
    level = per_image(sigma, image).square()
    return (level + noise_std**2) / (eigenvalues * level + noise_std**2)
