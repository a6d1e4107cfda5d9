"""The grid that a slice is reconstructed on: without the readout's oversampling, and of even multiples."""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from alpenglow.io.kspace import KSpace
from alpenglow.io.reconstructions import centre_crop

_CENTRED = partial(torch.fft.fftshift, dim=-2), partial(torch.fft.ifftshift, dim=-2)


@dataclass(frozen=True)
class Grid:
    """From the whole k-space of a file, [H, W], to that of the images [height, width].

    file: (H, W). shown: (rows, W), of the part of the field of view that is reconstructed. size: (height,
    width), at least `shown`: the same field of view in finer pixels.

    The middle of a grid of n is n // 2, in image and k-space. All maps are exact: cutting the field of view
    is a change of basis where every readout is whole, and padding adds samples that nobody measured.
    """

    file: tuple[int, int]
    shown: tuple[int, int]
    size: tuple[int, int]

    @property
    def pixel(self) -> tuple[float, float]:
        """Edges (H, W) of a pixel of the images, in pixels of the file's grid."""
        return self.shown[0] / self.size[0], self.shown[1] / self.size[1]

    @property
    def gain(self) -> float:
        """What samples and noise_std are multiplied with, so that images keep their values."""
        return math.sqrt(math.prod(self.size) / math.prod(self.shown))

    def kspace(self, samples: Tensor) -> Tensor:
        """k-space [coils, H, W] of the file as that of the images, [coils, height, width]."""
        if self.shown != self.file:
            shift, unshift = _CENTRED
            images = shift(torch.fft.ifft(unshift(samples), dim=-2, norm="ortho"))
            shown = centre_crop(images, self.shown)
            samples = shift(torch.fft.fft(unshift(shown), dim=-2, norm="ortho"))
        return self.gain * self._pad(samples)

    def mask(self, measured: Tensor) -> Tensor:
        """A mask [H, W] of the file, [height, width]; False in the padding."""
        return self._pad(measured[: self.shown[0]])

    def maps(self, maps: Tensor) -> Tensor:
        """Coil maps [coils, H, W] over the file's field of view, interpolated: [coils, height, width]."""
        maps = centre_crop(maps, self.shown)
        for axis in (-2, -1):
            maps = _interpolate(maps, self.size[axis], axis)
        return maps

    def _pad(self, values: Tensor) -> Tensor:
        before = [n // 2 - m // 2 for n, m in zip(self.size, self.shown, strict=True)]
        after = [n - m - b for n, m, b in zip(self.size, self.shown, before, strict=True)]
        return functional.pad(values, (before[1], after[1], before[0], after[0]))


def grid_of(kspace: KSpace, measured: Tensor, size_multiple: int = 1) -> Grid:
    """The grid for a slice of which `measured`, bool [H, W], was sampled.

    Rows beyond the field of view that the header shows are cut where every readout is whole. Height and width
    are the next multiples of `size_multiple`.
    """
    height, width = kspace.shape[2:]
    rows = height
    if kspace.header is not None and (measured == measured[:1]).all():
        share = kspace.header.recon.field_of_view[0] / kspace.header.encoded.field_of_view[0]
        if share < 1:
            rows = min(height, max(2, 2 * round(height * share / 2)))
    size = [math.ceil(n / size_multiple) * size_multiple for n in (rows, width)]
    return Grid((height, width), (rows, width), (size[0], size[1]))


def _interpolate(values: Tensor, count: int, axis: int) -> Tensor:
    """Linear, of `count` points along an axis over the same length, middles at n // 2."""
    own = values.shape[axis]
    if count == own:
        return values
    places = (torch.arange(count) - count // 2) * (own / count) + own // 2
    places = places.clamp(0, own - 1)
    left = places.floor().long().clamp(max=max(0, own - 2))
    shape = [1] * values.ndim
    shape[axis] = count
    weight = (places - left).reshape(shape)
    right = (left + 1).clamp(max=own - 1)
    return values.index_select(axis, left) * (1 - weight) + values.index_select(axis, right) * weight
