"""Hyperparameters of the baselines: the published ones, or better ones found on training images."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.baselines.daps import DapsOptions
from benchmarks.baselines.dps import DpsOptions
from benchmarks.quality.estimates import mean_psnr
from benchmarks.quality.methods import Networks, Task, draw

IMAGES, SAMPLES = 2, 2
FACTOR = 2.0
# In dB. A hyperparameter may end in a plateau, whose far end means nothing.
LEAST_GAIN = 0.1


@dataclass(frozen=True)
class Tuned:
    """The options that did best, and what was tried: PSNR in dB on the training images by value."""

    options: DpsOptions | DapsOptions
    name: str
    published: float
    chosen: float
    tried: dict[float, float]

    def record(self) -> dict[str, Any]:
        """For the file of results."""
        tried = [{"value": v, "psnr": None if math.isnan(p) else p} for v, p in sorted(self.tried.items())]
        return {"name": self.name, "published": self.published, "chosen": self.chosen, "tried": tried}


def tune(networks: Networks, task: Task, method: str, nfe: int, dps_scale: float) -> Tuned:
    """The best hyperparameter of "dps" or "daps" for a task of training images, at `nfe` NFE a sample.

    DPS: its scale, from the published one by doubling and halving. DAPS: the noise std b that it assumes, the
    published one and, by doubling and halving, from the true one; its step size stays the published 2 b^2.
    """
    make: Callable[[float], DpsOptions | DapsOptions]
    if method == "dps":
        name, published, start = "scale", dps_scale, dps_scale

        def make(value: float) -> DpsOptions:
            return DpsOptions(value, nfe)

    else:
        base = DapsOptions()
        base = replace(base, annealing_steps=max(1, nfe // base.ode_steps))
        name, published, start = "assumed noise std", base.noise_std, task.noise_std
        ratio = base.step_size / base.noise_std**2

        def make(value: float) -> DapsOptions:
            return replace(base, noise_std=value, step_size=ratio * value**2)

    def evaluate(value: float) -> float:
        samples, _ = draw(networks, task, make(value), lambda share: None)
        return mean_psnr(samples, task.truths)

    tried = climb(evaluate, start)
    if published not in tried:
        tried[published] = evaluate(published)
    chosen = max(tried, key=lambda value: _rank(tried[value]))
    return Tuned(make(chosen), name, published, chosen, tried)


def climb(evaluate: Callable[[float], float], start: float) -> dict[float, float]:
    """`evaluate` at start, and at its multiples by powers of FACTOR in the direction that raises it, as long
    as it rises by LEAST_GAIN: {value: result}. NaN counts as lowest."""
    found = {start: evaluate(start)}
    best = start
    for factor in (FACTOR, 1 / FACTOR):
        while True:
            value = best * factor
            found[value] = evaluate(value)
            if not _rank(found[value]) > _rank(found[best]) + LEAST_GAIN:
                break
            best = value
        if best != start:
            break
    return found


def _rank(psnr: float) -> float:
    return -math.inf if math.isnan(psnr) else psnr
