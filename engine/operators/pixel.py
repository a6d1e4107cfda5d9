"""Operators that act on each pixel alone: denoising and inpainting."""

from typing import Any

import torch
from torch import Tensor

from alpenglow.operators.diagonal import DiagonalOperator
from alpenglow.operators.validation import check_mask


class Denoising(DiagonalOperator):
    """A = I: the measurement is the image, [C, H, W], with noise."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] itself."""
        return x

    def adjoint(self, y: Tensor) -> Tensor:
        """y [B, C, H, W] itself."""
        return y

    def adjoint_coefficients(self, y: Tensor) -> Tensor:
        """y [B, C, H, W] itself."""
        return y

    def eigenvalues(self, image: Tensor) -> Tensor:
        """1, a scalar []."""
        return image.new_ones(())


class Inpainting(DiagonalOperator):
    """A = diag(mask): pixels where the mask is 1 are measured.

    mask: [H, W], [1, H, W] or [C, H, W], bool or 0 and 1. The measurement has the image's shape; where the
    mask is 0 it is 0 (and ignored). Raises ValueError for another shape, other numbers, or an all-zero mask.
    """

    def __init__(self, mask: Any) -> None:
        mask = check_mask(mask, (2, 3), "[H, W], [1, H, W] or [C, H, W]")
        self.mask: Tensor = mask[None] if mask.ndim == 2 else mask

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Inpainting":
        """This operator with its mask on another device (a mask has no real dtype)."""
        return self if device is None else Inpainting(self.mask.to(device))

    def check_image(self, image_shape: tuple[int, int, int]) -> None:
        """Raise ValueError unless the mask covers images of this shape [C, H, W]."""
        super().check_image(image_shape)
        if self.mask.shape[1:] != tuple(image_shape[1:]) or len(self.mask) not in (1, image_shape[0]):
            raise ValueError(
                f"got a mask of shape {tuple(self.mask.shape)} for images {tuple(image_shape)}; expected "
                f"{tuple(image_shape)}, or one channel for all: crop or resize the mask"
            )

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] where measured, 0 elsewhere."""
        return x * self.mask

    def adjoint(self, y: Tensor) -> Tensor:
        """y [B, C, H, W] where measured, 0 elsewhere."""
        return y * self.mask

    def adjoint_coefficients(self, y: Tensor) -> Tensor:
        """y [B, C, H, W] where measured, 0 elsewhere."""
        return y * self.mask

    def eigenvalues(self, image: Tensor) -> Tensor:
        """The mask, bool [1 or C, H, W]."""
        return self.mask
