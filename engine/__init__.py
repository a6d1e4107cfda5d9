"""alpenglow: calibrated posterior sampling for imaging inverse problems."""

from alpenglow import operators, priors
from alpenglow._version import __version__
from alpenglow.api import find_map, sample
from alpenglow.posterior import Posterior
from alpenglow.priors.loading import load_prior
from alpenglow.samplers.map_estimate import MapEstimate

__all__ = [
    "MapEstimate",
    "Posterior",
    "__version__",
    "find_map",
    "load_prior",
    "operators",
    "priors",
    "sample",
]
