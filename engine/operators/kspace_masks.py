"""Cartesian sampling masks, bool [H, W], centred: the middle of k-space is at [H // 2, W // 2].

Every mask measures round(H W / acceleration) samples (whole columns for the 1D ones: round(W / acceleration)
of them), calibration included, so that the acceleration is met to half a sample (half a column). The same
arguments give the same mask on every machine.

shape: (H, W). acceleration: at least 1, H W over the number of samples. calibration: the share of each
undersampled axis that the fully sampled centre spans, in [0, 1]. All functions raise ValueError for other
numbers, and where the calibration region alone holds more samples than the acceleration allows.
"""

import math

import torch
from torch import Tensor

from alpenglow.operators.validation import finite_number, positive_integer, positive_number

Shape = tuple[int, int]


def random_1d(shape: Shape, acceleration: float, *, calibration: float = 0.08, seed: int = 0) -> Tensor:
    """Whole columns, bool [H, W]: the calibration block, and others drawn uniformly without replacement."""
    line, count = _centre((_size(shape)[1],), acceleration, calibration)
    others = (~line).nonzero()[:, 0]
    line[others[torch.randperm(len(others), generator=_generator(seed))[:count]]] = True
    return line.expand(shape).clone()


def equispaced_1d(shape: Shape, acceleration: float, *, calibration: float = 0.08, offset: int = 0) -> Tensor:
    """Whole columns, bool [H, W]: those of the calibration block, and every so many of the others.

    The spacing is counted over the columns outside the block and rounded to whole ones, as far as it is no
    integer; offset: by how many columns the first lies off the edge, modulo the spacing.
    """
    line, count = _centre((_size(shape)[1],), acceleration, calibration)
    others = (~line).nonzero()[:, 0]
    if count:
        spacing = len(others) / count
        first = finite_number(offset, "offset", "columns") % spacing
        places = (first + spacing * torch.arange(count, dtype=torch.float64)).floor().long()
        line[others[places.clamp(max=len(others) - 1)]] = True
    return line.expand(shape).clone()


def random_2d(shape: Shape, acceleration: float, *, calibration: float = 0.08, seed: int = 0) -> Tensor:
    """Single points, bool [H, W]: the calibration box, and others drawn uniformly without replacement."""
    mask, count = _centre(_size(shape), acceleration, calibration)
    others = (~mask).flatten().nonzero()[:, 0]
    mask.view(-1)[others[torch.randperm(len(others), generator=_generator(seed))[:count]]] = True
    return mask


def poisson_disc(shape: Shape, acceleration: float, *, calibration: float = 0.08, seed: int = 0) -> Tensor:
    """Single points, bool [H, W]: the calibration box, and others, evenly dense, that keep a distance.

    Points are tried in random order, and taken where none of those taken lies closer than a radius. The
    radius is the largest, in samples, at which the acceleration is met. Source: dart throwing, Cook, ACM
    Transactions on Graphics 1986.
    """
    mask, count = _centre(_size(shape), acceleration, calibration)
    others = (~mask).flatten().nonzero()[:, 0]
    darts = others[torch.randperm(len(others), generator=_generator(seed))].tolist()
    if not count:
        return mask
    # A jammed set of discs that keep radius r covers 0.55 of the plane with discs of diameter r; on a grid,
    # and at the edges of a small one, more points fit.
    upper = 4 * len(others) / count + 4
    distances = {i * i + j * j for i in range(math.isqrt(int(upper)) + 2) for j in range(i + 1)}
    for squared in sorted((d for d in distances if 0 < d <= upper), reverse=True):
        taken = _throw(darts, shape, squared, count)
        if len(taken) == count:
            break
    mask.view(-1)[torch.tensor(taken)] = True
    return mask


def _throw(darts: list[int], shape: Shape, squared: int, count: int) -> list[int]:
    """The first `count` darts that keep sqrt(squared) from those before; flat indices into the grid."""
    height, width = shape
    reach = math.isqrt(squared - 1)
    free = torch.ones(height + 2 * reach, width + 2 * reach, dtype=torch.bool).numpy()
    offsets = torch.arange(-reach, reach + 1)
    outside = (offsets[:, None].square() + offsets.square() >= squared).numpy()
    taken = []
    for dart in darts:
        row, column = divmod(dart, width)
        if free[row + reach, column + reach]:
            taken.append(dart)
            if len(taken) == count:
                break
            free[row : row + 2 * reach + 1, column : column + 2 * reach + 1] &= outside
    return taken


def _centre(shape: tuple[int, ...], acceleration: float, calibration: float) -> tuple[Tensor, int]:
    """(mask of the calibration region alone, how many samples are still to be added to it)."""
    factor = positive_number(acceleration, "acceleration", "samples over measured samples")
    share = finite_number(calibration, "calibration", "share of an axis")
    if factor < 1 or not 0 <= share <= 1:
        raise ValueError(
            f"got acceleration={acceleration!r}, calibration={calibration!r}; expected an acceleration of at "
            "least 1 and a share in [0, 1]"
        )
    mask = torch.zeros(shape, dtype=torch.bool)
    lengths = [round(share * n) for n in shape]
    mask[tuple(slice(n // 2 - c // 2, n // 2 - c // 2 + c) for n, c in zip(shape, lengths, strict=True))] = (
        True
    )
    total = round(mask.numel() / factor)
    count = total - int(mask.sum())
    if count < 0 or total == 0:
        raise ValueError(
            f"acceleration {factor:g} leaves {total} of {mask.numel()} samples, the calibration region has "
            f"{int(mask.sum())}: take a smaller acceleration or calibration"
        )
    return mask, count


def _size(shape: Shape) -> Shape:
    if len(shape) != 2:
        raise ValueError(f"got shape {tuple(shape)}; expected (H, W)")
    return positive_integer(shape[0], "H"), positive_integer(shape[1], "W")


def _generator(seed: int) -> torch.Generator:
    if type(seed) is not int:
        raise ValueError(f"got seed={seed!r}; expected an integer")
    return torch.Generator().manual_seed(seed)
