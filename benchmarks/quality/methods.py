"""The methods that are compared, all on the same network."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from alpenglow import api
from alpenglow.operators.base import LinearOperator
from alpenglow.priors.network import NetworkPrior
from benchmarks.baselines import daps, dps
from benchmarks.baselines.denoisers import Denoiser
from benchmarks.quality.estimates import Estimate, of_posterior, of_samples

# Values of images in the baselines' network at once: what a backward pass keeps is many times larger.
CHUNK_VALUES = 2**18


@dataclass(frozen=True, eq=False)
class Networks:
    """The prior twice, for many images at once and for one, and the denoiser of the baselines."""

    prior: NetworkPrior
    single: NetworkPrior
    denoiser: Denoiser


@dataclass(frozen=True, eq=False)
class Task:
    """Images to reconstruct: truths [M, C, H, W] and their measurements y [M, *measurement_shape]."""

    operator: LinearOperator
    noise_std: float
    truths: Tensor
    y: Tensor
    num_samples: int
    seed: int


Progress = Callable[[float], None]
Tuning = dps.DpsOptions | daps.DapsOptions | None
Method = Callable[[Networks, Task, Tuning, Progress], list[Estimate]]


class Stopwatch:
    """Seconds of the processor on a CPU, of the clock on other devices, since it was made."""

    def __init__(self, device: torch.device) -> None:
        self._clock = time.process_time if device.type == "cpu" else time.perf_counter
        self._began = self._clock()

    def seconds(self) -> float:
        return self._clock() - self._began


def _ours(
    networks: Networks, task: Task, tuning: Tuning, progress: Progress, *, method: str
) -> list[Estimate]:
    found = []
    for index, y in enumerate(task.y):
        watch = Stopwatch(networks.prior.device)
        posterior = api.sample(
            networks.prior, task.operator, y,
            noise_std=task.noise_std, num_samples=task.num_samples, method=method, seed=task.seed + index,
            progress=lambda share, done=index: progress((done + share) / len(task.y)),  # type: ignore[misc]
        )  # fmt: skip
        found.append(of_posterior(posterior, watch.seconds()))
    return found


def _map(networks: Networks, task: Task, tuning: Tuning, progress: Progress) -> list[Estimate]:
    found = []
    for index, y in enumerate(task.y):
        watch = Stopwatch(networks.single.device)
        estimate = api.find_map(networks.single, task.operator, y, noise_std=task.noise_std)
        found.append(Estimate(estimate.image, float(estimate.nfe), watch.seconds()))
        progress((index + 1) / len(task.y))
    return found


def _baseline(networks: Networks, task: Task, tuning: Tuning, progress: Progress) -> list[Estimate]:
    watch = Stopwatch(networks.prior.device)
    assert tuning is not None
    samples, nfe = draw(networks, task, tuning, progress)
    seconds = watch.seconds() / len(samples)
    return [of_samples(each, nfe, seconds) for each in samples]


def draw(
    networks: Networks, task: Task, options: dps.DpsOptions | daps.DapsOptions, progress: Progress
) -> tuple[Tensor, float]:
    """Samples [M, N, C, H, W] of a baseline, and its NFE a sample."""
    shape = networks.prior.image_shape
    high = networks.prior.sigma_range[1]
    y = task.y.repeat_interleave(task.num_samples, 0)
    parts = y.split(max(1, CHUNK_VALUES // task.truths[0].numel()))
    # One stream for all parts: their chains must differ.
    generator = torch.Generator(device=y.device).manual_seed(task.seed)
    run: Callable[..., Tensor]
    if isinstance(options, dps.DpsOptions):
        run, nfe = dps.sample, float(len(dps.schedule(options.steps, high)) - 1)
    else:
        run, nfe = daps.sample, float(options.nfe)
    found = [
        run(
            networks.denoiser, task.operator, part, options,
            image_shape=shape, generator=generator, sigma_max=high,
            progress=lambda share, done=done: progress((done + share) / len(parts)),
        )
        for done, part in enumerate(parts)
    ]  # fmt: skip
    return torch.cat(found).reshape(len(task.y), task.num_samples, *shape), nfe


METHODS: dict[str, Method] = {
    "calibrated": partial(_ours, method="calibrated"),
    "alps": partial(_ours, method="alps"),
    "map": _map,
    "dps": _baseline,
    "daps": _baseline,
}
BASELINES = ("dps", "daps")
