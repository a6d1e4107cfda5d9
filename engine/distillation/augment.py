"""Augmentation of training images that the network is told of, so that it does not leak (EDM, appendix F.2).

Each image is flipped, scaled, turned, stretched and shifted at random, and a vector of nine numbers, zero
for "nothing was done", conditions the network (`augment_dim` 9). At zero the network has seen the images as
they are; sampling and distillation always ask for zero.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

AUGMENT_DIM = 9
# Standard deviations of log scale, log stretch and the shift's share of the image: EDM's own.
SCALE = STRETCH = 0.2 * math.log(2)
SHIFT = 1 / 8
OVERSAMPLING = 2


def augment(image: Tensor, probability: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(augmented image [C, H, W], what was done [9]); each transformation happens with `probability`.

    The nine numbers are EDM's (table 6): flipped across, flipped along (by the toss of a coin, where a flip
    happens); log of the scale; cosine - 1 and sine of the turn; log of the stretch times cosine and sine of
    its axis; shift right and down as a share of the image. Logs and shares are in their standard deviations,
    angles counterclockwise.
    """
    happens = (torch.rand(6, generator=generator) < probability).tolist()
    chance = torch.rand(5, generator=generator).tolist()
    normal = torch.randn(4, generator=generator).tolist()
    across, along = (flip and chance[k] < 0.5 for k, flip in enumerate(happens[:2]))
    scale = SCALE * normal[0] if happens[2] else 0.0
    turn = math.pi * (2 * chance[2] - 1) if happens[3] else 0.0
    stretch = STRETCH * normal[1] if happens[4] else 0.0
    # Half of the stretches are along the image's own axes.
    axis = math.pi * (2 * chance[3] - 1) if chance[4] < 0.5 else 0.0
    shift = (SHIFT * normal[2], SHIFT * normal[3]) if happens[5] else (0.0, 0.0)
    done = torch.tensor(
        [
            float(across), float(along), scale / SCALE, math.cos(turn) - 1, math.sin(turn),
            stretch / STRETCH * math.cos(axis), stretch / STRETCH * math.sin(axis),
            shift[0] / SHIFT, shift[1] / SHIFT,
        ]
    )  # fmt: skip
    if across:
        image = image.flip(2)
    if along:
        image = image.flip(1)
    if not any((scale, turn, stretch, *shift)):
        return image, done
    inverse = _turn(-turn) @ _stretch(axis, -stretch) * math.exp(-scale)
    return _warp(image, inverse, torch.tensor(shift)), done


def _turn(angle: float) -> Tensor:
    """Counterclockwise as one looks at the image, whose y points down."""
    return torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])


def _stretch(axis: float, log_factor: float) -> Tensor:
    """Stretches along `axis` by the factor and across it by its inverse."""
    factors = torch.diag(torch.tensor([math.exp(log_factor), math.exp(-log_factor)]))
    return _turn(axis) @ factors @ _turn(-axis)


def _warp(image: Tensor, inverse: Tensor, shift: Tensor) -> Tensor:
    """The image [C, H, W] under the affine map whose inverse is given, about its centre, in pixels.

    Mirrored at the edges; sampled on a finer grid that is averaged, so that what is shrunk aliases less.
    """
    height, width = image.shape[1:]
    size = torch.tensor([width, height], dtype=torch.float32)
    rows = (torch.arange(OVERSAMPLING * height) + 0.5) / OVERSAMPLING - height / 2
    columns = (torch.arange(OVERSAMPLING * width) + 0.5) / OVERSAMPLING - width / 2
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    place = (torch.stack([x, y], dim=-1) - shift * size) @ inverse.T
    warped = F.grid_sample(
        image[None],
        (place / (size / 2))[None],
        mode="bicubic",
        padding_mode="reflection",
        align_corners=False,
    )
    return F.avg_pool2d(warped, OVERSAMPLING)[0]
