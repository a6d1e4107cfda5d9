"""The front door: `sample` and `find_map`."""

import inspect
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from alpenglow._version import __version__
from alpenglow.operators.base import LinearOperator
from alpenglow.operators.cg import count_iterations
from alpenglow.posterior import Posterior
from alpenglow.priors.protocol import Prior, check_prior
from alpenglow.samplers import alps, calibrated, map_estimate, metropolis
from alpenglow.samplers.map_estimate import MapEstimate
from alpenglow.samplers.problem import Noise, Problem

Progress = Callable[[float], None]
_MAX_CHAINS = 2**31


def _run_calibrated(
    problem: Problem, noise: Noise, options: Any, progress: Callable[[int], None]
) -> Posterior:
    result = calibrated.sample(problem, noise, options, progress)
    return Posterior.from_samples(
        result.samples,
        energy=result.energy,
        nfe=result.nfe,
        ancestors=result.ancestors,
        diagnostics=result.diagnostics,
    )


def _run_alps(problem: Problem, noise: Noise, options: Any, progress: Callable[[int], None]) -> Posterior:
    samples, energy = alps.sample(problem, noise, options, progress)
    return Posterior.from_samples(samples, energy=energy, nfe=options.nfe)


def _run_metropolis(
    problem: Problem, noise: Noise, options: Any, progress: Callable[[int], None]
) -> Posterior:
    samples, energy, acceptance, nfe = metropolis.sample(problem, noise, options, progress)
    return Posterior.from_samples(
        samples, energy=energy, nfe=nfe, diagnostics={"acceptance": acceptance.mean().item()}
    )


@dataclass(frozen=True)
class Method:
    """How to run a sampler on a problem, the dataclass of its options, and defaults that differ from it."""

    run: Callable[..., Posterior]
    options: type
    defaults: dict[str, Any] = field(default_factory=dict)


METHODS: dict[str, Method] = {
    "calibrated": Method(_run_calibrated, calibrated.CalibratedOptions),
    "alps": Method(_run_alps, alps.AlpsOptions),
    "mala": Method(_run_metropolis, metropolis.MetropolisOptions),
    "kinetic-metropolis": Method(_run_metropolis, metropolis.MetropolisOptions, {"memory": 0.7}),
}
"""A sampler is one file in samplers/ and one line here."""


def sample(
    prior: Prior,
    operator: LinearOperator,
    y: Any,
    *,
    noise_std: float,
    num_samples: int = 64,
    method: str = "calibrated",
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Posterior:
    """Posterior samples of x given y = A x + n, n ~ N(0, noise_std^2) per real component.

    prior: anything of the protocol `alpenglow.priors.Prior`; it decides the device. operator: a
    LinearOperator, or any object with forward and adjoint. y: one measurement [*measurement_shape], with or
    without a batch dimension of 1 (tensor, numpy or DLPack array), in the prior's units. noise_std in the
    units of y. batch_size: chains whose gradient is evaluated at once (None: all; the samples are the same).
    progress: called with the share of work done, in [0, 1].

    method "calibrated" (DESIGN 2; options nfe, weigh, sigma_min, step_size, memory_limit), "alps" (as
    published; levels, steps, sigma_max, sigma_min, rho), and the exact references "mala" and
    "kinetic-metropolis" (nfe, steps, sigma_max, sigma_min, memory, step_size). A chain's sample depends on
    the seed and its number alone, to the last bit, unless the posterior has several modes and the chains
    form one population (diagnostics["modes"] > 1; weigh=False keeps them apart).

    Raises ValueError on bad input, RuntimeError when chains diverge.
    """
    problem = _problem(prior, operator, y, noise_std, batch_size)
    if type(num_samples) is not int or not 1 <= num_samples < _MAX_CHAINS:
        raise ValueError(f"num_samples is {num_samples!r}; expected a positive integer")
    if type(seed) is not int:
        raise ValueError(f"seed is {seed!r}; expected an integer")
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; expected one of {', '.join(METHODS)}")
    chosen = _options(method, options, prior)
    noise = Noise(seed, torch.arange(num_samples, device=problem.y.device))
    began = time.perf_counter()
    report = _reporter(progress, num_samples * chosen.nfe)
    with count_iterations() as solved:
        posterior = METHODS[method].run(problem, noise, chosen, report)
    if solved.solves:
        posterior.diagnostics.update(
            cg_solves=solved.solves, cg_iterations=int(solved.total), cg_iterations_max=int(solved.largest)
        )
    posterior.diagnostics["seconds"] = time.perf_counter() - began
    posterior.settings.update(
        method=method,
        operator=type(operator).__name__,
        prior=getattr(prior, "name", type(prior).__name__),
        noise_std=problem.noise_std,
        num_samples=num_samples,
        seed=seed,
        options={option.name: getattr(chosen, option.name) for option in fields(chosen)},
        alpenglow=__version__,
        torch=torch.__version__,
        device=str(problem.y.device),
    )
    if progress is not None:
        progress(1.0)
    return posterior


def find_map(
    prior: Prior,
    operator: LinearOperator,
    y: Any,
    *,
    noise_std: float,
    max_iterations: int = 300,
    progress: Progress | None = None,
    **options: Any,
) -> MapEstimate:
    """The image of highest posterior density at a small level sigma, by a monotone minimisation.

    Arguments as for `sample`; options: sigma, sigma_max, levels, tolerance (see MapOptions). Returns image
    [C, H, W], objective (a list that never rises), converged, nfe. Raises ValueError on bad input.
    """
    problem = _problem(prior, operator, y, noise_std, None)
    if type(max_iterations) is not int or max_iterations < 1:
        raise ValueError(f"max_iterations is {max_iterations!r}; expected a positive integer")
    _check_names("find_map", options, map_estimate.MapOptions)
    low, high = getattr(prior, "sigma_range", (0.0, math.inf))
    limits: dict[str, Any] = {"sigma": max(map_estimate.MapOptions.sigma, low), "sigma_max": min(20.0, high)}
    chosen = map_estimate.MapOptions(**(limits | options | {"max_iterations": max_iterations}))
    _check_numbers("find_map", chosen)
    estimate = map_estimate.find(problem, chosen, _reporter(progress, chosen.levels + max_iterations))
    if progress is not None:
        progress(1.0)
    return estimate


def _problem(prior: Any, operator: Any, y: Any, noise_std: Any, batch_size: int | None) -> Problem:
    """Everything checked, on the prior's device, in float32."""
    shape = check_prior(prior)
    if not isinstance(operator, LinearOperator):
        missing = [n for n in ("forward", "adjoint") if not callable(getattr(operator, n, None))]
        if missing or inspect.isclass(operator):
            raise ValueError(
                f"got {operator!r} for the operator; expected an instance of alpenglow.operators, or an "
                "object with forward and adjoint"
            )
        operator = LinearOperator.from_functions(operator.forward, operator.adjoint)
    try:
        noise = float(noise_std)
    except (TypeError, ValueError):
        noise = math.nan
    if not (math.isfinite(noise) and noise > 0):
        raise ValueError(
            f"noise_std is {noise_std!r}; expected a positive finite number, the standard deviation of the "
            "noise in the units of y (per real and per imaginary part)"
        )
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
        raise ValueError(f"batch_size is {batch_size!r}; expected a positive integer, or None")
    measurement = operator.check_measurement(y, shape)
    if len(measurement) != 1:
        raise ValueError(
            f"got {len(measurement)} measurements; expected one: call sample once for each measurement"
        )
    device = _device(prior, measurement)
    dtype = torch.complex64 if measurement.is_complex() else torch.float32
    moved = operator.to(device=device, dtype=torch.float32)
    return Problem(prior, moved, measurement.to(device, dtype), noise, batch_size=batch_size)


def _device(prior: Any, measurement: Tensor) -> torch.device:
    """The prior's device where it names one, else that of the measurement."""
    device = getattr(prior, "device", None)
    return torch.device(device) if device is not None else measurement.device


def _options(method: str, given: dict[str, Any], prior: Any) -> Any:
    """The method's options, with those that the prior knows better than the defaults."""
    kind: Any = METHODS[method].options
    _check_names(f'method "{method}"', given, kind)
    low, high = getattr(prior, "sigma_range", (0.0, math.inf))
    options = METHODS[method].defaults | given
    if "sigma_min" not in options and method != "alps":
        options["sigma_min"] = max(kind.sigma_min, low)
    if method == "calibrated" and "sigma_range" not in options:
        smallest, largest = kind.sigma_range
        options["sigma_range"] = (min(smallest, high), min(largest, high))
    chosen = kind(**options)
    _check_numbers(f'method "{method}"', chosen)
    return chosen


def _check_names(what: str, given: dict[str, Any], kind: type) -> None:
    known = [option.name for option in fields(kind)]
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"{what} has no option {', '.join(unknown)}; it has {', '.join(known)}")


def _check_numbers(what: str, options: Any) -> None:
    for option in fields(options):
        value, name = getattr(options, option.name), option.name
        if option.type in (bool, "bool"):
            good = isinstance(value, bool)
        elif option.type in (int, "int"):
            good = type(value) is int and value >= 1
        elif option.type in (float, "float"):
            zero = name in ("memory", "memory_limit")
            good = (
                isinstance(value, int | float)
                and math.isfinite(value)
                and (value > 0 or (zero and value == 0))
            )
        else:
            good = len(value) == 2 and 0 < value[0] <= value[1]
        if not good:
            raise ValueError(f"{what}: {name} is {value!r}, which is no valid {option.type}")


def _reporter(progress: Progress | None, total: int) -> Callable[[int], None]:
    """Counts NFE into shares of the work; what goes beyond the plan (weights) stays below 1."""
    done = 0

    def report(nfe: int) -> None:
        nonlocal done
        done += nfe
        if progress is not None:
            progress(min(done / total, 0.999))

    return report
