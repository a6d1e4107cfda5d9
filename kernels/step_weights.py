"""What the step kernels share: the numbers of a step, and what it returns.

Every Langevin step of this package is linear in the position z, the momentum u, the pull P grad log p(x | y)
and a draw w ~ N(0, P), P = (A^T A / eta^2 + I / sigma^2)^-1 (DESIGN 2):

    z <- z + z_pull pull + z_u u + z_w w
    u <-     u_pull pull + u_u u + u_w w

ALPS has z_pull = z_w = 1 (z_w = 0 at the last step of a level); BAOAB fills all six.
"""

from typing import NamedTuple

import torch
from torch import Tensor

COLUMNS = 8
"""Of a table of coefficients: sigma^2, eta^2, z_pull, z_u, z_w, u_pull, u_u, u_w."""


class StepWeights(NamedTuple):
    """The six numbers of a step."""

    z_pull: float = 1.0
    z_u: float = 0.0
    z_w: float = 0.0
    u_pull: float = 0.0
    u_u: float = 0.0
    u_w: float = 0.0


class Step(NamedTuple):
    """What a step kernel returns for a batch of B chains.

    z, u: the new state; u is None where none was given. largest [B]: the largest modulus of the new z before
    elements beyond the limit were held, infinite where it is NaN. energy [B] and grad_square [B]: of the
    gradient that the step took, 0.5 ||eps||^2 (0 without eps) and ||G||^2, None unless asked for.
    network_input: the new z, scaled, in low precision, None unless asked for.
    """

    z: Tensor
    u: Tensor | None
    largest: Tensor
    energy: Tensor | None = None
    grad_square: Tensor | None = None
    network_input: Tensor | None = None


def coefficients(sigma: Tensor, noise_std: float, weights: StepWeights) -> Tensor:
    """The table of a step, one row a chain, [B, COLUMNS]; sigma: levels [B]."""
    table = torch.empty(len(sigma), COLUMNS, dtype=sigma.dtype, device=sigma.device)
    table[:, 0] = sigma.square()
    for column, number in enumerate((noise_std**2, *weights), start=1):
        table[:, column] = number  # a fill: copying a host tensor would make a GPU wait
    return table


def per_image_columns(table: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """The columns of a table [1 or B, COLUMNS], each to multiply images of as many dimensions as `like`."""
    return table.to(like.dtype).reshape(-1, COLUMNS, *[1] * (like.ndim - 1)).unbind(1)


def advance(
    z: Tensor,
    u: Tensor | None,
    grad: Tensor,
    data: Tensor,
    diagonal: Tensor,
    table: Tensor,
    normals: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """New z and u in plain torch, where A^T A is `diagonal`; arguments as for `pixel_step`.

    normals: N(0, I) in the basis of z, overwritten; None for a step without noise. Few temporaries.
    """
    level, noise = per_image_columns(table, z)[:2]
    # The gains have the size of one image where all chains are at one level and share a mask.
    data_gain = level / (diagonal * level + noise)
    pull = (z * diagonal).neg_().add_(data).mul_(data_gain)
    prior_gain = data_gain.mul_(noise / level)
    pull.sub_(grad * prior_gain)
    w = None if normals is None else normals.mul_(prior_gain.mul_(level).sqrt_())
    return combine(z, u, pull, w, table)


def combine(
    z: Tensor, u: Tensor | None, pull: Tensor, w: Tensor | None, table: Tensor
) -> tuple[Tensor, Tensor | None]:
    """New z and u from the pull and the draw w ~ N(0, P), which are overwritten."""
    _, _, z_pull, z_u, z_w, u_pull, u_u, u_w = per_image_columns(table, z)
    new, momentum = (pull * z_pull).add_(z), None
    if u is not None:
        new.add_(u * z_u)
        momentum = (u * u_u).add_(pull.mul_(u_pull))
    if w is not None:
        new.add_(w * z_w)
        if momentum is not None:
            momentum.add_(w.mul_(u_w))
    return new, momentum


def hold(
    new: Tensor, momentum: Tensor | None, old: Tensor, limit: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(`new` where its modulus is within limit [1 or B], else `old`; momentum, there 0; largest modulus)."""
    size = new.abs()
    largest = size.flatten(1).amax(1) if size.numel() else size.new_zeros(len(new))
    largest = largest.nan_to_num_(nan=torch.inf, posinf=torch.inf)
    limit = limit.to(size.dtype)
    # Only a CPU may look whether there is anything to hold.
    if new.device.type == "cpu" and bool((largest <= limit).all()):
        return new, momentum, largest
    beyond = ~(size <= limit.reshape(-1, *[1] * (new.ndim - 1)))  # NaN compares false
    if momentum is not None:
        momentum.masked_fill_(beyond, 0)
    return torch.where(beyond, old, new), momentum, largest
