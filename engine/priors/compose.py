"""Products of experts: weighted sums of energies, and experts side by side over channels."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from alpenglow.priors.protocol import Prior


class _Sum:
    def __init__(self, experts: Sequence[tuple[Prior, float]]) -> None:
        self.experts = tuple(experts)
        self.image_shape = self.experts[0][0].image_shape

    def energy_and_grad(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        parts = [(weight, *prior.energy_and_grad(x, sigma)) for prior, weight in self.experts]
        energy = torch.stack([weight * energy for weight, energy, _ in parts]).sum(0)
        return energy, torch.stack([weight * grad for weight, _, grad in parts]).sum(0)


class _Stack:
    def __init__(self, experts: Sequence[Prior]) -> None:
        self.experts = tuple(experts)
        self.channels = [prior.image_shape[0] for prior in self.experts]
        self.image_shape = (sum(self.channels), *self.experts[0].image_shape[1:])

    def energy_and_grad(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        parts = [
            prior.energy_and_grad(part, sigma)
            for prior, part in zip(self.experts, x.split(self.channels, dim=1), strict=True)
        ]
        return torch.stack([e for e, _ in parts]).sum(0), torch.cat([g for _, g in parts], dim=1)


def compose(experts: Mapping[Prior, float]) -> Prior:
    """Prior with the energy sum_i weight_i E_i(x, sigma): the density is prod_i p_i^weight_i.

    All experts see the whole image. Raises ValueError for no experts, weights that are not positive
    numbers, or image shapes that differ.
    """
    if not experts:
        raise ValueError("compose needs at least one prior, got none; pass {prior: weight, ...}")
    shapes = {tuple(prior.image_shape) for prior in experts}
    if len(shapes) > 1:
        raise ValueError(f"composed priors must share one image shape, got {sorted(shapes)}")
    for weight in experts.values():
        if not 0 < weight < float("inf"):
            raise ValueError(f"weights of composed priors must be positive and finite, got {weight}")
    return _Sum(list(experts.items()))


def stack(experts: Sequence[Prior]) -> Prior:
    """Prior over the experts' channels one after another: independent experts, energies add.

    stack([grey, grey]) makes a prior for complex images (real, imaginary) of one for real images.
    Raises ValueError for no experts or heights and widths that differ.
    """
    if not experts:
        raise ValueError("stack needs at least one prior, got none")
    if len({tuple(prior.image_shape[1:]) for prior in experts}) > 1:
        raise ValueError(
            f"stacked priors must share height and width, got {[p.image_shape for p in experts]}"
        )
    return _Stack(experts)
