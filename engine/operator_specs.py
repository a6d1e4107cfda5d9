"""Operators by kind and numbers, as job files and the command line give them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, StrictInt
from torch import Tensor

from alpenglow import operators
from alpenglow.io.measurements import read_mask
from alpenglow.operators.base import LinearOperator

Shape = tuple[int, int, int]
MASK = "a mask file: PNG, TIFF (white: measured) or NPY (1: measured)"


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    def build(self, image_shape: Shape) -> LinearOperator:
        """The operator for images [C, H, W]. Raises ValueError where they do not fit each other."""
        raise NotImplementedError


class DenoisingSpec(_Spec):
    """The measurement is the image with noise."""

    kind: Literal["denoising"]

    def build(self, image_shape: Shape) -> LinearOperator:
        return operators.Denoising()


class InpaintingSpec(_Spec):
    """Pixels of a mask file are measured."""

    kind: Literal["inpainting"]
    mask: Path = Field(description=MASK)

    def build(self, image_shape: Shape) -> LinearOperator:
        mask = read_mask(self.mask)
        with naming(self.mask):
            operator = operators.Inpainting(mask)
            operator.check_image(image_shape)
        return operator


class BoxInpaintingSpec(_Spec):
    """All pixels are measured but those of a box."""

    kind: Literal["box-inpainting"]
    box: tuple[StrictInt, StrictInt, StrictInt, StrictInt] = Field(
        description="four integers: top, left, height and width of the hidden box, in pixels"
    )

    def build(self, image_shape: Shape) -> LinearOperator:
        (top, left, height, width), (_, H, W) = self.box, image_shape
        if min(top, left) < 0 or min(height, width) < 1 or top + height > H or left + width > W:
            raise ValueError(
                f"operator.box is {self.box} (top, left, height, width); expected a box of at least 1 x 1 "
                f"within the prior's images of {H} x {W} pixels"
            )
        mask = torch.ones(H, W, dtype=torch.bool)
        mask[top : top + height, left : left + width] = False
        return operators.Inpainting(mask)


class RandomInpaintingSpec(_Spec):
    """A random share of the pixels is measured; for simulations."""

    kind: Literal["random-inpainting"]
    keep: float = Field(0.5, gt=0, le=1, description="a number in (0, 1]: the probability to keep a pixel")
    mask_seed: StrictInt = Field(0, description="an integer: the seed of the mask")

    def build(self, image_shape: Shape) -> LinearOperator:
        return operators.Inpainting(random_mask(image_shape, self.keep, self.mask_seed))


class GaussianBlurSpec(_Spec):
    """Periodic Gaussian blur."""

    kind: Literal["gaussian-blur"]
    sigma: float = Field(description="a positive number of pixels: the standard deviation of the blur")

    def build(self, image_shape: Shape) -> LinearOperator:
        return operators.GaussianBlur(self.sigma)


class MotionBlurSpec(_Spec):
    """Periodic blur along a straight path."""

    kind: Literal["motion-blur"]
    length: float = Field(description="a positive number of pixels: the length of the path")
    angle: float = Field(0.0, description="a number of degrees, counter-clockwise from the row direction")

    def build(self, image_shape: Shape) -> LinearOperator:
        return operators.MotionBlur(self.length, self.angle)


class SuperResolutionSpec(_Spec):
    """Low-pass filter, then decimation."""

    kind: Literal["super-resolution"]
    factor: StrictInt = Field(
        ge=1, description="a positive integer that divides the height and width of the image"
    )
    filter: Literal["box", "gaussian", "bicubic"] = Field("box", description="box, gaussian or bicubic")

    def build(self, image_shape: Shape) -> LinearOperator:
        return operators.SuperResolution(self.factor, self.filter)


class FourierSamplingSpec(_Spec):
    """Single-coil Cartesian k-space, sampled where the centred mask says."""

    kind: Literal["fourier-sampling"]
    mask: Path = Field(description=MASK)

    def build(self, image_shape: Shape) -> LinearOperator:
        mask = read_mask(self.mask)
        with naming(self.mask):
            operator = operators.FourierSampling(mask[0] if len(mask) == 1 else mask, channels=image_shape[0])
            operator.check_image(image_shape)
        return operator


OperatorSpec = (
    DenoisingSpec | InpaintingSpec | BoxInpaintingSpec | RandomInpaintingSpec | GaussianBlurSpec
    | MotionBlurSpec | SuperResolutionSpec | FourierSamplingSpec
)  # fmt: skip
OPERATORS: dict[str, type[_Spec]] = {
    spec.model_fields["kind"].annotation.__args__[0]: spec for spec in OperatorSpec.__args__
}
"""A new operator is one class above, in the union, with its options in cli.py."""


def random_mask(image_shape: Shape, keep: float, seed: int) -> Tensor:
    """A bool mask [H, W] whose pixels are 1 with probability `keep`."""
    return torch.rand(image_shape[1:], generator=torch.Generator().manual_seed(seed)) < keep


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the file's name in front of a ValueError that does not know of it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
