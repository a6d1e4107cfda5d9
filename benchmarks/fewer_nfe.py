"""What 64 chains of one posterior cost: ways to spend fewer NFE, on posteriors known in closed form.

python -m benchmarks.fewer_nfe -o docs
python -m benchmarks.fewer_nfe -o docs --network

writes fewer-nfe.json, fewer-nfe.png and fewer-nfe.md (the table of docs/calibration.md). Every error is that
of 64 chains, over 20 repetitions and 3 beds of a kind; NFE are a sample's, with its share of the pilot.
--network: fashion-28 on two held-out images, against 256 chains of 200 NFE, into fewer-nfe-network.md.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.progress import track
from torch import Tensor

import alpenglow as ag
from alpenglow.demo import held_out_images
from alpenglow.io.files import atomic_path
from alpenglow.jobs import simulate, with_floor
from alpenglow.priors.mixture import GaussianMixturePrior
from alpenglow.samplers import calibrated, kinetic
from alpenglow.samplers.calibrated import CalibratedOptions, CalibratedPlan
from alpenglow.samplers.chains import Chains, Evaluate, drive
from alpenglow.samplers.problem import Noise, Problem, geometric_levels, levels_of, rho_levels
from benchmarks.beds import BEDS, Bed

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SAMPLES, REPETITIONS, SEEDS = 64, 20, (0, 1, 2)
_FORKED_IDS = 10**6
"""Numbers of the chains below a fork, far from those of their trunk: their noise is their own."""


@dataclass(frozen=True)
class Way:
    """How 64 samples are drawn.

    nfe: levels of a chain. start: its first level, None for the one that a pilot finds. rho: even steps in
    sigma^(1 / rho), None for log sigma. trunk: chains above the level `fork`, where each becomes several.
    last: last level, None for that of the plan; averaged: take conditional means there, and add the
    conditional variance (Rao-Blackwell), instead of the images without their last noise. by_moments: chains
    come down the diffused posterior, as those of a network do.
    """

    name: str
    nfe: int
    start: float | None = None
    rho: float | None = None
    trunk: int = SAMPLES
    fork: float = 0.0
    last: float | None = None
    averaged: bool = False
    by_moments: bool = False

    def levels(self, plan: CalibratedPlan) -> list[float]:
        """From the first to the last."""
        high, low = self.start or plan.sigma_max, self.last or plan.options.sigma_min
        if self.rho is not None:
            return rho_levels(high, low, self.nfe - 1, self.rho)
        return geometric_levels(high, low, self.nfe - 1)


PILOT_NFE = calibrated.PILOT_CHAINS * calibrated.PILOT_STEPS / SAMPLES
WAYS = [
    *(Way("independent, from sigma 20", nfe, start=20.0) for nfe in (50, 100)),
    *(Way("start found by the pilot", nfe) for nfe in (25, 45, 95)),
    *(Way("pilot, levels even in sigma^(1/15)", nfe, rho=15.0) for nfe in (25, 45, 95)),
    *(
        Way(f"pilot, {trunk} chains forked at {fork:g}", nfe, trunk=trunk, fork=fork)
        for trunk, fork in ((8, 0.5), (16, 0.5), (32, 0.5), (32, 1.0))
        for nfe in (45, 95)
    ),
    *(Way(f"pilot, conditional means at {last:g}", 45, last=last, averaged=True) for last in (0.1, 0.03)),
    *(Way("moment matching", nfe, by_moments=True) for nfe in (30, 50, 100)),
]
NETWORK_NFE = (30, 50, 70, 100)


def moments(
    problem: Problem, plan: CalibratedPlan, way: Way, seed: int, repetitions: int = REPETITIONS
) -> Chains[tuple[Tensor, ...]]:
    """Samples [R, 64, C, H, W], the variance that is to be added to theirs, and NFE a sample, all counted."""
    noise = Noise(seed, torch.arange(repetitions * way.trunk))
    if way.by_moments:
        options = CalibratedOptions(nfe=way.nfe, weigh=False, gradient_error=0.2)
        own = yield from calibrated.prepare(problem, seed, options)
        population = yield from calibrated.chains(problem, noise, own)
        samples = population.samples.unflatten(0, (repetitions, SAMPLES))
        return samples, torch.zeros(()), torch.tensor(float(way.nfe))
    levels = way.levels(plan)
    state, spent, together = kinetic.init(problem, noise, levels[0]), 0, way.trunk < SAMPLES
    for sigma, following in zip(levels, [*levels[1:], levels[-1]], strict=True):
        if together and sigma <= way.fork:
            samples = torch.arange(repetitions * SAMPLES)
            parents = samples // SAMPLES * way.trunk + samples % way.trunk
            state, noise = kinetic.take(state, parents), Noise(seed, _FORKED_IDS + samples)
            together = False
        _, grad = yield Evaluate(state.x, levels_of(sigma, len(state.x), state.x))
        spent += len(state.x)
        pace = plan.pace(sigma, following)
        state = kinetic.step(problem, state, sigma, grad, noise, step_size=pace.step_size, memory=pace.memory)
    level = levels_of(state.sigma, len(state.x), state.x)
    _, grad = yield Evaluate(state.x, level)
    spent += len(state.x)
    if way.averaged:
        x = problem.target(state.x, grad, level)
        seen = problem.operator.normal(torch.ones_like(x[:1]))  # the diagonal of A^T A of a mask
        extra = 1 / (seen / problem.noise_std**2 + 1 / state.sigma**2)
    else:
        x, extra = kinetic.finish(problem, state, grad, noise), torch.zeros(())
    nfe = spent / (repetitions * SAMPLES) + (0 if way.start else PILOT_NFE)
    return x.unflatten(0, (repetitions, SAMPLES)), extra, torch.tensor(nfe)


def errors(truth: GaussianMixturePrior, samples: Tensor, extra: Tensor | float = 0.0) -> dict[str, float]:
    """Of the moments of 64 samples, samples [R, 64, C, H, W], averaged over R.

    mean, std: RMS over pixels, in true standard deviations; tv: total variation between mode masses; tv_all:
    the same of all repetitions together, what more chains would not mend.
    """
    samples = samples.double()
    std = (samples.var(1) + extra).sqrt()
    masses = truth.responsibilities(samples.flatten(0, 1)).unflatten(0, samples.shape[:2]).mean(1)

    def variation(found: Tensor) -> float:
        return (found - truth.weights).abs().sum(-1).div(2).mean().item()

    return {
        "mean": _rms((samples.mean(1) - truth.mean) / truth.std),
        "std": _rms((std - truth.std) / truth.std),
        "tv": variation(masses),
        "tv_all": variation(masses.mean(0)),
    }


def _rms(relative: Tensor) -> float:
    """Over the pixels of errors [R, C, H, W], then the mean over R."""
    return relative.square().flatten(1).mean(1).sqrt().mean().item()


def rows(kind: str) -> Iterator[dict[str, Any]]:
    """Every way on a kind of bed, and exact draws."""
    beds = [BEDS[kind](seed) for seed in SEEDS]
    problems = [Problem(bed.prior, bed.operator, bed.y, bed.noise_std) for bed in beds]
    plans = [drive(calibrated.prepare(p, 0, CalibratedOptions()), p) for p in problems]
    yield {"bed": kind, "way": "exact draws", "nfe": 0.0, **_average([_exact(bed) for bed in beds])}
    for way in track(WAYS, description=kind):
        if way.averaged and "blur" in kind:
            continue  # its P is not diagonal over pixels
        found = []
        for bed, problem, plan in zip(beds, problems, plans, strict=True):
            samples, extra, nfe = drive(moments(problem, plan, way, seed=1), problem)
            found.append({"nfe": nfe.item(), **errors(bed.posterior, samples, extra)})
        yield {"bed": kind, "way": way.name, "levels": way.nfe, **_average(found)}


def network_rows() -> Iterator[dict[str, Any]]:
    """A network's posteriors of two images, half of their pixels seen, against many long chains."""
    prior = ag.load_prior("fashion-28", batch_size=SAMPLES)
    mask = torch.rand(28, 28, generator=torch.Generator().manual_seed(0)) < 0.5
    operator = ag.operators.Inpainting(mask)
    measured = [simulate(operator, x, 0.05, 0) for x in with_floor(held_out_images()[:2], 0.02, 0)]

    def drawn(y: Tensor, count: int, nfe: int, seed: int) -> Tensor:
        posterior = ag.sample(prior, operator, y, noise_std=0.05, num_samples=count, nfe=nfe, seed=seed)
        assert posterior.samples is not None
        return posterior.samples.double()

    truths = [drawn(y, 4 * SAMPLES, 200, 2) for y in measured]
    for nfe in track(NETWORK_NFE, description="network"):
        found = []
        for y, truth in zip(measured, truths, strict=True):
            mean, std = truth.mean(0), truth.std(0)
            samples = drawn(y, SAMPLES, nfe, 1)
            apart = (samples.mean(0) - mean, samples.std(0) - std)
            of_mean, of_std = (_rms((each / std)[None]) for each in apart)
            found.append({"nfe": float(nfe), "mean": of_mean, "std": of_std})
        yield _average(found)


def _exact(bed: Bed) -> dict[str, float]:
    draws = bed.posterior.sample(REPETITIONS * SAMPLES, seed=5)
    return errors(bed.posterior, draws.unflatten(0, (REPETITIONS, SAMPLES)))


def _average(found: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.fmean(each[key] for each in found) for key in found[0]}


def table(found: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = ["| bed | 64 chains | NFE | error of mean | of std | TV | TV of all |", "| --- " * 7 + "|"]
    last = None
    for row in found:
        lines.append(
            f"| {'' if row['bed'] == last else row['bed']} | {row['way']} | {row['nfe']:.0f} | "
            f"{row['mean']:.3f} | {row['std']:.3f} | {row['tv']:.3f} | {row['tv_all']:.3f} |"
        )
        last = row["bed"]
    return "\n".join(lines) + "\n"


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """Errors of std and of mode masses against NFE, one column a bed."""
    figure, axes = plt.subplots(
        2, len(BEDS), figsize=(3.2 * len(BEDS), 6), sharex=True, constrained_layout=True
    )
    ways = list(dict.fromkeys(way.name for way in WAYS))
    for column, bed in enumerate(BEDS):
        here = [row for row in found if row["bed"] == bed]
        for axis, key in zip(axes[:, column], ("std", "tv"), strict=True):
            for way in ways:
                chosen = [row for row in here if row["way"] == way]
                axis.plot([r["nfe"] for r in chosen], [r[key] for r in chosen], "o-", ms=3, lw=1, label=way)
            axis.axhline(here[0][key], color="grey", lw=0.8, ls="--", label="64 exact draws")
            axis.set_ylim(bottom=0)
        axes[0, column].set_title(bed, fontsize=9)
        axes[1, column].set_xlabel("NFE a sample")
    axes[0, 0].set_ylabel("error of std, in true std")
    axes[1, 0].set_ylabel("total variation of mode masses")
    axes[0, -1].legend(fontsize=5, frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("docs"))
    parser.add_argument("--network", action="store_true")
    options = parser.parse_args()
    output: Path = options.output
    output.mkdir(parents=True, exist_ok=True)
    if options.network:
        lines = [f"| {row['nfe']:.0f} | {row['mean']:.3f} | {row['std']:.3f} |" for row in network_rows()]
        head = "| NFE of 64 chains | error of mean | of std |\n| --- | --- | --- |\n"
        (output / "fewer-nfe-network.md").write_text(head + "\n".join(lines) + "\n")
        return
    found = [row for kind in BEDS for row in rows(kind)]
    (output / "fewer-nfe.json").write_text(json.dumps(found, indent=1) + "\n")
    (output / "fewer-nfe.md").write_text(table(found))
    plot(found, output / "fewer-nfe.png")


if __name__ == "__main__":
    main()
