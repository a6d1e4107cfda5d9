"""How many chains a request needs: until the Monte Carlo error of mean and std is small enough.

The error of a mean over n chains is std / sqrt(n), and std itself is an estimate, as is its quantile over
pixels. A rule that stops at the first estimate below the target stops too early half of the time. So the need
is bounded from above, by the jackknife over groups of chains, and chains are added in rounds: first most of
what is needed for certain, then, with a better estimate, the rest.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from alpenglow.scheduler.moments import Moments, merge

GROUPS = 8
"""Parts of the chains for the jackknife; chains of one lineage are in one part."""
FIRST_ROUND = 64
"""Chains before the first look: enough to look for modes, for r_hat, and for 8 in each group."""
_DEVIATIONS = 1.645
"""Standard errors between the estimate of the need and its bound, the one-sided 95 % of a normal: by
simulation, with all the looks of a request, the error meets the target in 97 to 100 of 100 runs
(docs/scheduler.md)."""
CAUTION = 0.85
"""Share of the estimated need that a round goes for, while the estimate is poor."""


@dataclass(frozen=True)
class Target:
    """error: Monte Carlo standard error to reach, in the units of the image, of mean and of std, in a share
    `quantile` of the pixels."""

    error: float
    quantile: float = 0.95


@dataclass(frozen=True)
class Need:
    """What is known after some chains.

    error: the present Monte Carlo standard error at the target's quantile. chains: estimate of the chains
    needed in total; enough: an upper bound of it.
    """

    error: float
    chains: float
    enough: float


def chain_variance(moments: Moments, quantile: float, deviations: float = 0.0) -> float:
    """n times the squared Monte Carlo error from n independent chains, at a quantile over pixels.

    The larger of that of the mean, std^2, and of that of std, (m4 - std^4) / (4 std^2) by the delta method.
    deviations: standard errors of std^2 by which every pixel is taken larger.
    """
    variance = moments.variance
    excess = (moments.m4 / moments.count - variance.square()).clamp(min=0)
    of_std = torch.where(variance > 0, excess / (4 * variance), 0)
    factor = 1 + deviations * torch.where(variance > 0, (excess / moments.count).sqrt() / variance, 0)
    flat = (torch.stack([variance, of_std]) * factor).flatten(1)
    # Not torch.quantile: it is limited to 2^24 elements.
    rank = min(flat.shape[1], max(1, math.ceil(quantile * flat.shape[1])))
    return flat.kthvalue(rank, dim=1).values.max().item()


def need(groups: Sequence[Moments], target: Target, design_effect: float = 1.0) -> Need:
    """The need, from the moments of groups of chains.

    design_effect: chains that are worth one independent chain, at least 1.
    """
    # Everything before each group, and everything from it on.
    before = list(itertools.accumulate(groups, merge))
    after = list(itertools.accumulate(reversed(groups), merge))[::-1]
    together = before[-1]
    others = [after[1], *map(merge, before, after[2:]), before[-2]]
    value = chain_variance(together, target.quantile)
    without = torch.tensor([chain_variance(part, target.quantile) for part in others], dtype=torch.float64)
    parts = len(groups)
    spread = math.sqrt((parts - 1) / parts) * (without - without.mean()).norm().item()
    # A quantile of noisy numbers is too large; the jackknife sees about half of that.
    unbiased = min(value, max(value / 2, parts * value - (parts - 1) * without.mean().item()))
    # The spread between few groups is at times too small by chance, which a rule that looks often will find;
    # and it misses pixels of a rare mode that would cross the quantile. So also every pixel by its own error.
    margin = max(_DEVIATIONS * spread, chain_variance(together, target.quantile, _DEVIATIONS) - value)
    scale = design_effect / target.error**2
    return Need(
        math.sqrt(value * design_effect / together.count), unbiased * scale, (unbiased + margin) * scale
    )


def next_round(done: int, found: Need | None, limit: int) -> int:
    """Chains of the next round, 0 to stop; found: of the `done` chains, limit: of all rounds together."""
    if found is None or done < FIRST_ROUND:
        return min(FIRST_ROUND, limit) - done
    if done >= found.enough or done >= limit:
        return 0
    # The bound comes nearer to the estimate as 1 / sqrt(n).
    margin = found.enough / max(found.chains, 1.0) - 1
    total = found.chains * (1 + margin * math.sqrt(done / max(done, found.chains)))
    if total > 1.5 * done:
        total = max(CAUTION * found.chains, 1.25 * done)
    step = max(1, math.ceil((total - done) / GROUPS)) * GROUPS
    return min(step, limit - done)
