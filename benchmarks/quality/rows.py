"""The degradations that are compared: a row of the table each."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from alpenglow import operators
from alpenglow.mri_simulation import simulate_coil_maps
from alpenglow.operator_specs import Shape, random_mask
from alpenglow.operators import kspace_masks
from alpenglow.operators.base import LinearOperator

COILS = 4
MRI_NOISE_STD = 0.02


@dataclass(frozen=True)
class Row:
    """One degradation.

    noise_std: eta, per real component. build: makes the operator for images [C, H, W], always the same one.
    dps_scale: that of DPS's published configuration of this kind, or of the nearest kind it has.
    """

    name: str
    title: str
    noise_std: float
    dps_scale: float
    build: Callable[[Shape], LinearOperator]


def rows_for(image_shape: Shape) -> dict[str, Row]:
    """The rows that images [C, H, W] have, by name: multi-coil MRI for C = 2, which are complex images."""
    return {row.name: row for row in (MRI if image_shape[0] == 2 else PICTURES)}


def _random(shape: Shape) -> LinearOperator:
    return operators.Inpainting(random_mask(shape, 0.2, seed=0))


def _box_inpainting(shape: Shape) -> LinearOperator:
    """Half of the side, as the 128 of 256 pixels of the papers."""
    _, height, width = shape
    mask = torch.ones(height, width, dtype=torch.bool)
    mask[height // 4 : height // 4 + height // 2, width // 4 : width // 4 + width // 2] = False
    return operators.Inpainting(mask)


def _sense(shape: Shape, mask: Callable[..., torch.Tensor], acceleration: float) -> LinearOperator:
    size = (shape[1], shape[2])
    return operators.SenseMRI(simulate_coil_maps(COILS, size, seed=0)[0], mask(size, acceleration, seed=0))


PICTURES = (
    *(
        Row(f"random-inpainting-{eta:g}", f"80 % random pixels hidden, eta {eta:g}", eta, 0.5, _random)
        for eta in (0.05, 0.1, 0.5)
    ),
    Row("box-inpainting", "box of half the side hidden, eta 0.05", 0.05, 0.5, _box_inpainting),
    Row(
        "gaussian-blur", "Gaussian blur, sigma 2 pixels, eta 0.05", 0.05, 0.3,
        lambda shape: operators.GaussianBlur(2.0),
    ),
    Row(
        "motion-blur", "motion blur, 9 pixels at 30 degrees, eta 0.05", 0.05, 0.3,
        lambda shape: operators.MotionBlur(9.0, 30.0),
    ),
    Row(
        "super-resolution", "super-resolution 4x, eta 0.05", 0.05, 0.3,
        lambda shape: operators.SuperResolution(4),
    ),
)  # fmt: skip
MRI = tuple(
    Row(
        f"mri-{acceleration}x-{kind}",
        f"MRI, {COILS} coils, {acceleration}x {kind.upper()}, eta {MRI_NOISE_STD:g}",
        MRI_NOISE_STD,
        0.5,
        lambda shape, mask=mask, factor=acceleration: _sense(shape, mask, factor),  # type: ignore[misc]
    )
    for acceleration, kind, mask in (
        (2, "1d", kspace_masks.random_1d),
        (8, "1d", kspace_masks.random_1d),
        (6, "2d", kspace_masks.poisson_disc),
    )
)
