"""alpenglow: calibrated posterior sampling for imaging inverse problems."""

import importlib
from typing import TYPE_CHECKING, Any

from alpenglow._version import __version__

if TYPE_CHECKING:
    from alpenglow import operators, priors
    from alpenglow.api import find_map, sample
    from alpenglow.loading import load_prior
    from alpenglow.posterior import Posterior
    from alpenglow.samplers.map_estimate import MapEstimate
    from alpenglow.scheduler import Scheduler

__all__ = [
    "MapEstimate",
    "Posterior",
    "Scheduler",
    "__version__",
    "find_map",
    "load_prior",
    "operators",
    "priors",
    "sample",
]

# Loaded at first use (PEP 562): `alpenglow --help` answers without torch, and the kernels run where nothing
# but torch and triton is installed.
_HOMES = {
    "MapEstimate": "alpenglow.samplers.map_estimate",
    "Posterior": "alpenglow.posterior",
    "Scheduler": "alpenglow.scheduler",
    "find_map": "alpenglow.api",
    "load_prior": "alpenglow.loading",
    "sample": "alpenglow.api",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in ("operators", "priors"):
        return importlib.import_module(f"alpenglow.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
