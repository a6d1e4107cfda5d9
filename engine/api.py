"""The front door: `sample` and `find_map`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from alpenglow.operators.base import LinearOperator
from alpenglow.posterior import Posterior
from alpenglow.priors.protocol import Prior, gradient_error, sigma_range
from alpenglow.samplers import map_estimate
from alpenglow.samplers.inputs import as_problem
from alpenglow.samplers.map_estimate import MapEstimate
from alpenglow.samplers.methods import check_names, check_numbers
from alpenglow.scheduler.core import Core
from alpenglow.scheduler.request import make_request

Progress = Callable[[float], None]


def sample(
    prior: Prior,
    operator: LinearOperator,
    y: Any,
    *,
    noise_std: float,
    num_samples: int | None = None,
    target_error: float | None = None,
    target_quantile: float = 0.95,
    method: str = "calibrated",
    seed: int = 0,
    batch_size: int | None = None,
    max_memory: int | None = None,
    output: str | Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Posterior:
    """Posterior samples of x given y = A x + n, n ~ N(0, noise_std^2) per real component.

    prior: anything of the protocol `alpenglow.priors.Prior`; it decides the device. operator: a
    LinearOperator, or any object with forward and adjoint. y: one measurement [*measurement_shape], with or
    without a batch dimension of 1 (tensor, numpy or DLPack array), in the prior's units. noise_std in the
    units of y.

    num_samples: 64 by default. target_error: instead, go on until the Monte Carlo standard errors of mean and
    std, in the units of the image, are below it in a share `target_quantile` of the pixels, and num_samples
    (16 384) bounds the cost; diagnostics["target_met"] says whether it was enough.

    output: an HDF5 file for `Posterior.load`, to which all samples go; the posterior that is returned then
    holds a random subset of 256. A run that was killed goes on from it, to the same samples. batch_size:
    chains whose gradient is evaluated at once, at most (the samples are the same). max_memory: bytes for the
    chains, half of the device's by default; more chains than fit run one population after the other.
    progress: called with the share of work done, in [0, 1].

    method "calibrated" (DESIGN 2; options nfe, weigh, sigma_min, step_size, memory_limit, gradient_error,
    noise_floor), "alps" (as published; levels, steps, sigma_max, sigma_min, rho), and the exact references
    "mala" and "kinetic-metropolis" (nfe, steps, sigma_max, sigma_min, memory, step_size). A chain's sample
    depends on the seed and its number alone, to the last bit, unless the posterior has several modes and the
    chains form one population (diagnostics["modes"] > 1; weigh=False keeps them apart).

    For many requests at once see `alpenglow.Scheduler`. Raises ValueError on bad input, SamplingError, a
    RuntimeError, when chains diverge or the prior or the disk fails.
    """
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
        raise ValueError(f"batch_size is {batch_size!r}; expected a positive integer, or None")
    core = Core(batch_size=batch_size, max_memory=max_memory)
    request = make_request(
        prior, operator, y, noise_std=noise_std, num_samples=num_samples, target_error=target_error,
        target_quantile=target_quantile, method=method, seed=seed, output=output, name="sample", **options,
    )  # fmt: skip
    run = core.make(request)
    core.queue(run)
    while core.turn():
        if progress is not None:
            progress(run.share)
    if run.error is not None:
        raise run.error
    assert run.result is not None
    if progress is not None:
        progress(1.0)
    return run.result


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

    Arguments as for `sample`; options: those of MapOptions, levels by default the prior's own. Returns
    image [C, H, W], objective (a list that never rises), converged, nfe. Raises ValueError on bad input.
    """
    problem = as_problem(prior, operator, y, noise_std)
    if type(max_iterations) is not int or max_iterations < 1:
        raise ValueError(f"max_iterations is {max_iterations!r}; expected a positive integer")
    check_names("find_map", options, map_estimate.MapOptions)
    low, high = sigma_range(prior)
    limits: dict[str, Any] = {
        "sigma": max(map_estimate.MapOptions.sigma, low),
        "sigma_max": min(20.0, high),
        "gradient_error": gradient_error(prior),
    }
    chosen = map_estimate.MapOptions(**(limits | options | {"max_iterations": max_iterations}))
    check_numbers("find_map", chosen)
    estimate = map_estimate.find(problem, chosen, _reporter(progress, chosen.levels + max_iterations))
    if progress is not None:
        progress(1.0)
    return estimate


def _reporter(progress: Progress | None, total: int) -> Callable[[int], None]:
    """Counts NFE into shares of the work."""
    done = 0

    def report(nfe: int) -> None:
        nonlocal done
        done += nfe
        if progress is not None:
            progress(min(done / total, 0.999))

    return report
