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
    rest = torch.tensor((noise_std**2, *weights), dtype=sigma.dtype, device=sigma.device)
    return torch.cat([sigma.square()[:, None], rest.expand(len(sigma), -1)], dim=1)


def per_image_columns(table: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """The columns of a table [1 or B, COLUMNS], each to multiply images of as many dimensions as `like`."""
    return table.to(like.dtype).reshape(-1, COLUMNS, *[1] * (like.ndim - 1)).unbind(1)


def hold(new: Tensor, old: Tensor, limit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(`new` where its modulus is within limit [B], else `old`; where not; largest modulus [B])."""
    size = new.abs().nan_to_num_(nan=torch.inf)
    beyond = size > limit.to(size.dtype).reshape(-1, *[1] * (new.ndim - 1))
    largest = size.flatten(1).amax(1) if len(new) else size.new_zeros(0)
    return torch.where(beyond, old, new), beyond, largest
