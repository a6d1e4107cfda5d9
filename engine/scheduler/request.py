"""A request: one posterior to sample, checked, with everything that its result depends on."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from alpenglow._version import __version__
from alpenglow.samplers.inputs import as_problem
from alpenglow.samplers.methods import METHODS, Method, options_of
from alpenglow.samplers.problem import Problem
from alpenglow.scheduler.memory import LARGEST_POPULATION, chain_bytes
from alpenglow.scheduler.stopping import Target

DEFAULT_SAMPLES = 64
DEFAULT_LIMIT = 16384
"""Chains that a target error may cost where num_samples does not say."""
MAX_CHAINS = 2**31


@dataclass(frozen=True, eq=False)
class Request:
    """What is asked; the samples follow from it and the prior alone, whatever else runs.

    num_samples: chains; with a target the most that it may cost. population: chains that run together at
    most, None for what memory allows. output: file for all samples. keep_samples: whether the result has them
    all. priority: higher goes first. timeout: seconds, or None.
    """

    problem: Problem
    method: str
    options: Any
    seed: int
    num_samples: int
    target: Target | None = None
    population: int | None = None
    output: Path | None = None
    keep_samples: bool = True
    priority: int = 0
    timeout: float | None = None
    name: str = "request"
    operator_name: str = ""

    @property
    def sampler(self) -> Method:
        """The method."""
        return METHODS[self.method]

    @property
    def chain_bytes(self) -> int:
        """Estimate of the memory of one chain."""
        y = self.problem.y
        return chain_bytes(self.problem.image_shape, y.numel() * (2 if y.is_complex() else 1))

    @property
    def coupled(self) -> bool:
        """Whether a sample depends on the other chains of its population: where particles are weighted."""
        return bool(getattr(self.options, "weigh", False))

    def population_limit(self, max_memory: int) -> int:
        """Chains that run together at most where their state may take `max_memory` bytes."""
        return min(self.population or LARGEST_POPULATION, max(1, max_memory // self.chain_bytes))

    def expected_nfe(self, chains: int) -> int:
        """NFE of so many chains and the pilot, weights of modes not counted."""
        return self.sampler.pilot_nfe(self.options) + chains * int(self.options.nfe)

    @property
    def settings(self) -> dict[str, Any]:
        """How a result was made, JSON-able: `Posterior.settings`."""
        prior, y = self.problem.prior, self.problem.y
        chosen = {
            "method": self.method,
            "operator": self.operator_name,
            "prior": getattr(prior, "name", type(prior).__name__),
            "noise_std": self.problem.noise_std,
            "num_samples": self.num_samples,
            "seed": self.seed,
            "options": {option.name: getattr(self.options, option.name) for option in fields(self.options)},
            "alpenglow": __version__,
            "torch": torch.__version__,
            "device": str(y.device),
        }
        if self.target is not None:
            chosen |= {"target_error": self.target.error, "target_quantile": self.target.quantile}
        return chosen


def make_request(
    prior: Any,
    operator: Any,
    y: Any,
    *,
    noise_std: Any,
    num_samples: int | None = None,
    target_error: float | None = None,
    target_quantile: float = 0.95,
    method: str = "calibrated",
    seed: int = 0,
    population: int | None = None,
    output: str | Path | None = None,
    keep_samples: bool = True,
    priority: int = 0,
    timeout: float | None = None,
    name: str = "request",
    **options: Any,
) -> Request:
    """A checked request; see `alpenglow.sample` and `Scheduler.submit`. Raises ValueError on bad input."""
    problem = as_problem(prior, operator, y, noise_std)
    if num_samples is None:
        num_samples = DEFAULT_SAMPLES if target_error is None else DEFAULT_LIMIT
    if type(num_samples) is not int or not 1 <= num_samples < MAX_CHAINS:
        raise ValueError(f"num_samples is {num_samples!r}; expected a positive integer")
    if not isinstance(keep_samples, bool):
        raise ValueError(f"keep_samples is {keep_samples!r}; expected True or False")
    for key, whole in (("seed", seed), ("priority", priority)):
        if type(whole) is not int:
            raise ValueError(f"{key} is {whole!r}; expected an integer")
    if population is not None and (type(population) is not int or population < 1):
        raise ValueError(f"population is {population!r}; expected a positive integer, or None")
    if timeout is not None and not _positive(timeout):
        raise ValueError(f"timeout is {timeout!r}; expected a positive number of seconds, or None")
    target = None
    if target_error is not None:
        if not _positive(target_error):
            raise ValueError(
                f"target_error is {target_error!r}; expected a positive number, the Monte Carlo standard "
                "error of mean and std in the units of the image, or None"
            )
        if not (_positive(target_quantile) and target_quantile <= 1):
            raise ValueError(
                f"target_quantile is {target_quantile!r}; expected a share of the pixels in (0, 1]"
            )
        target = Target(float(target_error), float(target_quantile))
    path = None if output is None else Path(output)
    if path is not None and path.is_dir():
        raise ValueError(f"output is the folder {path}; give the name of a file, such as samples.h5")
    return Request(
        problem, method, options_of(method, options, prior), seed, num_samples, target, population, path,
        keep_samples and path is None, priority, timeout, name, type(operator).__name__,
    )  # fmt: skip


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0
