"""What the finished populations of a request amount to: merged exactly, in the order of their chain ids."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from alpenglow.posterior import Posterior
from alpenglow.samplers.chains import Population
from alpenglow.scheduler.moments import Moments, merge, merged
from alpenglow.scheduler.stopping import GROUPS
from alpenglow.statistics import (
    Entry,
    Reservoir,
    RunningMoments,
    candidates,
    sample_statistics,
    unite,
    update,
)
from alpenglow.statistics import merge as merge_running

_MERGES: dict[str, Callable[[Sequence[Any]], Any]] = {
    "modes": max,
    "mode_log_weight_error": max,
    "modes_measured": all,
    "resamplings": sum,
    "diverged": sum,
    "acceptance": lambda values: sum(values) / len(values),
    "cg_solves": sum,
    "cg_iterations": sum,
    "cg_iterations_max": max,
}
"""How a diagnostic of several populations becomes one; of others the first population's stands."""


@dataclass(frozen=True, eq=False)
class Gathered:
    """Finished populations; samples [n, C, H, W] and energy [N] stay on their device, the rest is on the CPU.

    groups: moments of GROUPS parts of the chains, cut where lineages end but for one at a cut. squared_error
    [C, H, W]: sum over populations of (n mcse)^2, n chains of Monte Carlo error mcse. means: of the
    populations, weighted by n. lineages: founding chains that have descendants. samples: of each population,
    None where they are not kept; then `reservoir` keeps some. evaluations: NFE, pilot and all.
    """

    groups: tuple[Moments, ...]
    squared_error: Tensor
    means: RunningMoments
    lineages: int = 0
    # One tensor each, not one a population: small ones between large ones would keep memory in pieces.
    energy: Tensor = field(default_factory=lambda: torch.empty(0))
    ancestors: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    samples: tuple[Tensor, ...] | None = ()
    reservoir: Reservoir | None = None
    populations: tuple[dict[str, Any], ...] = ()
    evaluations: int = 0

    @classmethod
    def empty(cls, image_shape: tuple[int, int, int], *, keep_samples: bool, seed: int) -> "Gathered":
        """Nothing yet."""
        moments = Moments.empty(image_shape)
        return cls(
            (moments,) * GROUPS,
            torch.zeros_like(moments.mean),
            RunningMoments.empty(image_shape),
            samples=() if keep_samples else None,
            reservoir=None if keep_samples else Reservoir.empty(image_shape, seed=seed),
        )

    @classmethod
    def of(cls, population: Population, evaluations: int, *, first: int, entry: Entry | None) -> "Gathered":
        """One population, of the chains from `first` on, which took `evaluations` NFE.

        entry: what its samples need to be kept, None for all.
        """
        images, count = population.samples, len(population.samples)
        found = sample_statistics(images, population.ancestors)
        founders = torch.arange(count) if population.ancestors is None else population.ancestors.cpu()
        order = founders.argsort(stable=True).to(images.device)
        weight = torch.tensor([float(count)], dtype=torch.float64)
        return cls(
            groups=tuple(Moments.of(images[part]) for part in order.tensor_split(GROUPS)),
            squared_error=(found.mcse.cpu() * count).square(),
            means=update(RunningMoments.empty(images.shape[1:]), found.mean[None].cpu(), weight),
            lineages=found.lineages,
            energy=population.energy,
            ancestors=founders,
            samples=(images,) if entry is None else None,
            reservoir=None if entry is None else candidates(entry, images, first + torch.arange(count)),
            populations=(population.diagnostics,),
            evaluations=evaluations,
        )

    @property
    def count(self) -> int:
        """Chains of all populations."""
        return len(self.energy)

    @property
    def disagreement(self) -> float:
        """Squared differences between the populations' means over those that their own errors explain.

        About 1; more where populations weighted their modes differently. 1 for fewer than three.
        """
        parts = len(self.populations)
        expected = self.squared_error.sum().item() / self.count**2 if parts > 2 else 0.0
        if not 0 < expected < math.inf:
            return 1.0
        return self.means.m2.sum().item() / (parts - 1) / self.count / expected

    @property
    def mcse(self) -> Tensor:
        """Monte Carlo standard error of the mean [C, H, W].

        Of resampled populations, what they disagree by counts too: their weights are estimates.
        """
        resampled = any(entry.get("resamplings", 0) for entry in self.populations)
        factor = max(1.0, self.disagreement) if resampled else 1.0
        return (self.squared_error * factor).sqrt() / self.count

    @functools.cached_property
    def moments(self) -> Moments:
        """Of all chains."""
        return merged(self.groups)

    @property
    def variance(self) -> Tensor:
        """Posterior variance [C, H, W], unbiased, NaN for one chain; see statistics.sample_statistics."""
        error = self.mcse.square()
        return torch.where(error.isfinite(), self.moments.m2 / self.count + error, self.moments.variance)

    @property
    def ess_pooled(self) -> float:
        """Independent chains that these are worth, from variances summed over pixels."""
        error = self.mcse.square().sum().item()
        if not math.isfinite(error):
            return 1.0
        total = self.variance.sum().item()
        return float(self.count) if error == 0 else min(max(total / error, 1.0), float(self.count))

    @property
    def entry(self) -> Entry | None:
        """What a sample needs to be kept, None where all are."""
        return None if self.reservoir is None else self.reservoir.entry

    def add(self, population: Population, evaluations: int) -> "Gathered":
        """With the next population, which took `evaluations` NFE."""
        return self.join(Gathered.of(population, evaluations, first=self.count, entry=self.entry))

    def join(self, part: "Gathered") -> "Gathered":
        """With the next population, of which `part` is what it amounts to."""
        reservoir = self.reservoir and part.reservoir and unite(self.reservoir, part.reservoir)
        return replace(
            self,
            groups=tuple(map(merge, self.groups, part.groups)),
            squared_error=self.squared_error + part.squared_error,
            means=merge_running(self.means, part.means),
            lineages=self.lineages + part.lineages,
            energy=part.energy if not self.count else torch.cat([self.energy, part.energy]),
            ancestors=torch.cat([self.ancestors, self.count + part.ancestors]),
            samples=None if self.samples is None or part.samples is None else self.samples + part.samples,
            reservoir=reservoir,
            populations=self.populations + part.populations,
            evaluations=self.evaluations + part.evaluations,
        )

    def posterior(self, extra: dict[str, Any], settings: dict[str, Any]) -> Posterior:
        """The result so far; extra: diagnostics of the whole request. At least one population."""
        nfe = self.evaluations / self.count
        diagnostics = self._diagnostics() | extra
        if self.samples is not None:
            return Posterior.from_samples(
                torch.cat(self.samples),
                energy=self.energy,
                nfe=nfe,
                ancestors=self.ancestors,
                diagnostics=diagnostics,
                settings=settings,
            )
        assert self.reservoir is not None
        return Posterior(
            mean=self.moments.mean.float(),
            std=self.variance.sqrt().float(),
            energy=self.energy,
            nfe=nfe,
            reservoir=self.reservoir.samples,
            diagnostics=self._errors() | self._agreement() | {"lineages": self.lineages} | diagnostics,
            settings=settings,
        )

    def _diagnostics(self) -> dict[str, Any]:
        first = dict(self.populations[0]) if self.populations else {}
        if len(self.populations) < 2:
            return first
        for name, combine in _MERGES.items():
            if name in first:
                first[name] = combine([entry[name] for entry in self.populations])
        disagreement = {"populations": len(self.populations), "disagreement": self.disagreement}
        return first | disagreement | self._errors()

    def _errors(self) -> dict[str, Any]:
        """Monte Carlo errors and effective sample sizes, from all populations."""
        error = self.mcse
        ess = torch.where(error > 0, self.variance / error.square(), float(self.count))
        ess = ess.nan_to_num(nan=1.0).clamp(1, self.count)
        return {"mcse": error.float(), "ess": ess.float(), "ess_pooled": self.ess_pooled}

    def _agreement(self) -> dict[str, Any]:
        """r_hat between the groups, as statistics.r_hat has it between four."""
        count = min(group.count for group in self.groups)
        if count < 2:
            return {}
        within = torch.stack([group.variance for group in self.groups]).mean(0)
        between = torch.stack([group.mean for group in self.groups]).var(0)
        r_hat = ((count - 1) / count + torch.where(between == 0, 0.0, between / within)).sqrt().float()
        return {"r_hat": r_hat, "r_hat_max": r_hat.max().item(), "r_hat_median": r_hat.median().item()}
