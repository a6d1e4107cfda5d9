"""Priors: energies E(x, sigma) of images, learned by a network or in closed form (DESIGN 1)."""

from alpenglow.priors.compose import compose, stack
from alpenglow.priors.mixture import GaussianMixturePrior, GaussianPrior, smooth_covariance
from alpenglow.priors.network import NetworkPrior
from alpenglow.priors.protocol import Prior

__all__ = [
    "GaussianMixturePrior",
    "GaussianPrior",
    "NetworkPrior",
    "Prior",
    "compose",
    "smooth_covariance",
    "stack",
]
