"""What the tests of engines that share requests have in common: requests, and their results by one engine."""

import functools
from typing import Any

import numpy as np
import torch

import alpenglow as ag
from alpenglow.scheduler.spread import BLOCK
from tests.scheduling import Independent, arguments

REQUESTS: list[dict[str, Any]] = [
    {"num_samples": 200},
    {"num_samples": 200, "keep_samples": False},
    {"num_samples": 150, "method": "calibrated", "weigh": False},
    {"num_samples": 150, "method": "calibrated"},  # one population: particles are weighted
    {"num_samples": 150, "method": "calibrated", "population": 40},
    {"num_samples": None, "target_error": 0.02},
    {"num_samples": None, "target_error": 0.015, "keep_samples": False},
    {"num_samples": 70, "method": "mala", "nfe": 20},
    {"num_samples": 64, "keep_samples": False},
]
WHOLE = (3, 8)
"""Those of one population, which one engine does all of."""


def here(prior: Any, request: dict[str, Any]) -> ag.Posterior:
    """By one engine, in the populations that a pool takes."""
    coupled = request.get("method") == "calibrated" and request.get("weigh", True)
    with ag.Scheduler() as scheduler:
        return scheduler.submit(prior, **{"population": None if coupled else BLOCK} | request).result(60)


def asked(index: int) -> dict[str, Any]:
    """The arguments of one of REQUESTS."""
    return arguments(index, **REQUESTS[index])


@functools.cache
def of_one_engine(index: int) -> ag.Posterior:
    """The result of one of REQUESTS."""
    return here(Independent(), asked(index))


def alike(a: ag.Posterior, b: ag.Posterior) -> bool:
    """Whether two results are the same in all but the time that they took, to the last bit."""
    for name in ("mean", "std", "energy", "samples", "reservoir"):
        ours, theirs = getattr(a, name), getattr(b, name)
        if (ours is None) != (theirs is None) or (ours is not None and not torch.equal(ours, theirs)):
            return False
    ours, theirs = ({k: v for k, v in p.diagnostics.items() if k != "seconds"} for p in (a, b))
    known = ours.keys() == theirs.keys() and all(
        np.array_equal(value, theirs[name], equal_nan=True) for name, value in ours.items()
    )
    return known and a.nfe == b.nfe and a.settings == b.settings
