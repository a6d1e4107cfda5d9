"""Priors that evaluate images in batches of one size, whatever the caller's batch is."""

import copy
from typing import Self

import torch
from torch import Tensor


class BatchedPrior:
    """What the priors that run a network have in common; a subclass has `run`.

    The result for an image does not depend, to the last bit, on the other images of the call, on their
    number or order: libraries choose their algorithm by the shape of the batch, so `run` only ever sees
    `batch_size` images, the last batch padded with copies.

    image_shape: (C, H, W). dtype and device: of what `run` takes. sigma_range: the levels it was trained for.
    gradient_error: relative error of G. noise_floor: std of the white noise that its images carry.
    """

    name: str
    image_shape: tuple[int, int, int]
    sigma_range: tuple[float, float]
    gradient_error: float
    noise_floor: float
    dtype: torch.dtype
    device: torch.device
    _batch_size: int | None = None

    @property
    def batch_size(self) -> int:
        """Images that the network sees at once. Default: 16 on CPU, 64 on a GPU."""
        return self._batch_size or (16 if self.device.type == "cpu" else 64)

    def with_batch_size(self, batch_size: int) -> Self:
        """The same prior (weights are shared) with another batch of the network, and so other last bits."""
        other = copy.copy(self)
        other._batch_size = batch_size
        return other

    def run(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """E [B] and G [B, C, H, W] at contiguous x, sigma of `dtype`, B = batch_size, unchecked."""
        raise NotImplementedError

    def energy_and_grad(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """E [B] and G [B, C, H, W] at x [B, C, H, W], sigma [B] > 0, in the dtype of x; B NFE.

        Raises ValueError for wrong shapes, dtypes or devices, and on CPU for values of x that are not
        finite or sigma that is not positive (on a GPU that check would make the host wait each time).
        """
        self._check(x, sigma)
        energy = torch.empty(len(x), dtype=x.dtype, device=x.device)
        grad = torch.empty_like(x, memory_format=torch.contiguous_format)
        for start in range(0, len(x), self.batch_size):
            chunk = slice(start, start + self.batch_size)
            energy[chunk], grad[chunk] = self._padded(x[chunk], sigma[chunk])
        return energy, grad

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """MMSE denoiser D(x, sigma) = x - G [B, C, H, W]."""
        return x - self.energy_and_grad(x, sigma)[1]

    def _padded(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """At most `batch_size` images, padded to it."""
        count, missing = len(x), self.batch_size - len(x)
        x, sigma = x.to(self.dtype), sigma.to(self.dtype)
        if missing:
            x = torch.cat([x, x[-1:].expand(missing, -1, -1, -1)])
            sigma = torch.cat([sigma, sigma[-1:].expand(missing)])
        # Contiguous: a channels-last input would take another convolution, with other roundings.
        energy, grad = self.run(x.contiguous(), sigma.contiguous())
        return energy[:count], grad[:count]

    def _check(self, x: Tensor, sigma: Tensor) -> None:
        if x.ndim != 4 or tuple(x.shape[1:]) != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise ValueError(f"got x {tuple(x.shape)}; {self.name} expects images [B, {expected}]")
        if sigma.shape != x.shape[:1]:
            raise ValueError(
                f"got sigma {tuple(sigma.shape)} for {len(x)} images; expected [{len(x)}], a level an image"
            )
        if not x.is_floating_point() or not sigma.is_floating_point():
            raise ValueError(f"got x {x.dtype} and sigma {sigma.dtype}; expected real floating-point tensors")
        if x.device != self.device or sigma.device != self.device:
            raise ValueError(
                f"x is on {x.device}, sigma on {sigma.device}, {self.name} on {self.device}; "
                "move them to one device"
            )
        if x.device.type == "cpu":
            if not torch.isfinite(x).all():
                raise ValueError("x holds NaN or infinity; the chain that made it has diverged")
            if not ((sigma > 0) & torch.isfinite(sigma)).all():
                raise ValueError(
                    f"sigma must be positive and finite, got {sigma.min().item()} to {sigma.max().item()}"
                )


def check_batch_size(batch_size: int | None) -> None:
    """ValueError unless it is None or a positive number."""
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected a positive number, or None")
