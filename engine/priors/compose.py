"""Products of experts: weighted sums of energies, and experts side by side over channels."""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from alpenglow.priors.protocol import (
    Prior,
    check_prior,
    gradient_error,
    noise_floor,
    place_prior,
    sigma_range,
)


class _Experts:
    """What experts have in common: levels that all know, and the device, None where no expert names one."""

    def __init__(self, experts: Sequence[Prior]) -> None:
        self.experts = tuple(experts)
        ranges = [sigma_range(prior) for prior in experts]
        self.gradient_error = max(map(gradient_error, experts))
        self.sigma_range = (max(low for low, _ in ranges), min(high for _, high in ranges))
        if self.sigma_range[0] >= self.sigma_range[1]:
            raise ValueError(f"the priors have no noise level in common: their sigma_range are {ranges}")
        devices = {torch.device(d) for prior in experts if (d := getattr(prior, "device", None)) is not None}
        if len(devices) > 1:
            raise ValueError(f"the priors are on {sorted(map(str, devices))}; move them to one device")
        self.device = devices.pop() if devices else None

    def to(self, device: torch.device | str) -> Self:
        """With every expert there. Raises ValueError where one cannot be moved."""
        other = copy.copy(self)
        other.device = torch.device(device)
        other.experts = tuple(place_prior(prior, other.device) for prior in self.experts)
        return other


class _Sum(_Experts):
    def __init__(self, experts: Mapping[Prior, float]) -> None:
        super().__init__(list(experts))
        self.weights = tuple(experts.values())
        self.image_shape = self.experts[0].image_shape
        # The floor of a product is that of a product of Gaussians: precisions add. One without leaves none.
        floors = [noise_floor(prior) for prior in self.experts]
        parts = zip(self.weights, floors, strict=True)
        precision = sum(weight / floor**2 if floor else math.inf for weight, floor in parts)
        self.noise_floor = precision**-0.5

    def energy_and_grad(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        parts = [prior.energy_and_grad(x, sigma) for prior in self.experts]
        weighted = list(zip(self.weights, parts, strict=True))
        energy = torch.stack([weight * energy for weight, (energy, _) in weighted]).sum(0)
        return energy, torch.stack([weight * grad for weight, (_, grad) in weighted]).sum(0)


class _Stack(_Experts):
    def __init__(self, experts: Sequence[Prior]) -> None:
        super().__init__(experts)
        self.channels = [prior.image_shape[0] for prior in self.experts]
        self.image_shape = (sum(self.channels), *self.experts[0].image_shape[1:])
        # One number for all channels: the smallest adds to no channel what its expert does not state.
        self.noise_floor = min(map(noise_floor, experts))

    def energy_and_grad(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        parts = [
            prior.energy_and_grad(part, sigma)
            for prior, part in zip(self.experts, x.split(self.channels, dim=1), strict=True)
        ]
        return torch.stack([e for e, _ in parts]).sum(0), torch.cat([g for _, g in parts], dim=1)


def compose(experts: Mapping[Prior, float]) -> Prior:
    """Prior with the energy sum_i weight_i E_i(x, sigma): the density is prod_i p_i^weight_i.

    All experts see the whole image. Raises ValueError for no experts, objects that are no priors, weights
    that are not positive numbers, and priors that differ in image shape or device or share no noise level.
    """
    if not experts:
        raise ValueError("compose needs at least one prior, got none; pass {prior: weight, ...}")
    shapes = {check_prior(prior) for prior in experts}
    if len(shapes) > 1:
        raise ValueError(f"composed priors must share one image shape, got {sorted(shapes)}")
    for weight in experts.values():
        if not 0 < weight < float("inf"):
            raise ValueError(f"weights of composed priors must be positive and finite, got {weight}")
    return _Sum(experts)


def stack(experts: Sequence[Prior]) -> Prior:
    """Prior over the experts' channels one after another: independent experts, energies add.

    stack([grey, grey]) makes a prior for complex images (real, imaginary) of one for real images.
    Raises ValueError for no experts, objects that are no priors, and priors that differ in height, width or
    device or share no noise level.
    """
    if not experts:
        raise ValueError("stack needs at least one prior, got none")
    if len({check_prior(prior)[1:] for prior in experts}) > 1:
        raise ValueError(
            f"stacked priors must share height and width, got {[p.image_shape for p in experts]}"
        )
    return _Stack(experts)
