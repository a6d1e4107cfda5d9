"""Moments up to the fourth of a set of images, per pixel, that merge exactly whatever the parts.

The second moment has a Monte Carlo error of its own, and the fourth tells it.
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 2**22
"""Numbers that are turned to float64 at once: 32 MB."""


@dataclass(frozen=True, eq=False)
class Moments:
    """count images; mean [C, H, W] float64; m2, m3, m4: sums of powers of the deviations from it."""

    count: int
    mean: Tensor
    m2: Tensor
    m3: Tensor
    m4: Tensor

    @classmethod
    def empty(cls, image_shape: Sequence[int]) -> "Moments":
        """Of no image yet."""
        zeros = torch.zeros(tuple(image_shape), dtype=torch.float64)
        return cls(0, zeros, zeros, zeros, zeros)

    @classmethod
    def of(cls, images: Tensor) -> "Moments":
        """Of images [N, C, H, W], on the CPU."""
        blocks = images.split(max(1, _BLOCK // images[0].numel())) if len(images) else ()
        return merged([cls.empty(images.shape[1:]), *map(cls._of_block, blocks)])

    @classmethod
    def _of_block(cls, images: Tensor) -> "Moments":
        images = images.double()
        mean = images.mean(0)
        centred = images - mean
        square = centred.square()
        sums = square.sum(0), (square * centred).sum(0), square.square().sum(0)
        return cls(len(images), mean.cpu(), *(power.cpu() for power in sums))

    @property
    def variance(self) -> Tensor:
        """Unbiased variance [C, H, W]; NaN below two images."""
        return self.m2 / (self.count - 1) if self.count > 1 else torch.full_like(self.m2, torch.nan)


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of both sets together (Pebay, SAND2008-6212, equations 3.1)."""
    if a.count == 0 or b.count == 0:
        return b if a.count == 0 else a
    n, p, q = a.count + b.count, a.count, b.count
    delta = b.mean - a.mean
    square = delta.square()
    return Moments(
        n,
        a.mean + delta * (q / n),
        a.m2 + b.m2 + square * (p * q / n),
        a.m3 + b.m3 + square * delta * (p * q * (p - q) / n**2) + 3 * delta * (p * b.m2 - q * a.m2) / n,
        a.m4
        + b.m4
        + square.square() * (p * q * (p * p - p * q + q * q) / n**3)
        + 6 * square * (p * p * b.m2 + q * q * a.m2) / n**2
        + 4 * delta * (p * b.m3 - q * a.m3) / n,
    )


def merged(parts: Iterable[Moments]) -> Moments:
    """Moments of all parts together, at least one."""
    return functools.reduce(merge, parts)
