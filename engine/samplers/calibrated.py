"""The default method: annealed kinetic Langevin, one step a level, on p_sigma(x | y) down to sigma_min.

Chains must keep up with their levels. Where the prior is known exactly, momentum does it, from a level that
a pilot run finds. Where a network stands for it, momentum would amplify its errors: chains come down the
diffused posterior instead (moment_matching.py), and are annealed over the last levels only, by small steps
and the flow; see `Pace`. Where the population parts into modes, particle weights keep their masses right
(mode_weights.py).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from alpenglow.kernels.philox import uniforms
from alpenglow.samplers import kinetic, mode_weights, moment_matching
from alpenglow.samplers.chains import Chains, Evaluate, Population
from alpenglow.samplers.problem import Noise, Problem, geometric_levels, levels_of

PILOT_CHAINS = 16
PILOT_STEPS = 20
PILOT_MEMORY = 0.5
"""Share of the momentum that it keeps; nothing is known of the spread yet."""
_PILOT_IDS = 2**31  # far from the ids of any request, so that the pilot's noise is its own
_RESAMPLING_STREAM = 2**20
LOOK_RATIO = 0.7
"""Modes are looked for, and their masses measured, when the level has fallen by so much."""
LEAST_ESS = 0.8
"""Share of the particles below which the effective sample size makes them be resampled before the last level.
Early copies part again; a mode's mass is measured anew in any case."""
LARGEST_CAUTIOUS_STEP = 1.0
"""Stable where the slope of a network's G is up to 4; that of an exact prior's is at most 1."""
ANNEALED_SHARE, ANNEALED_LEVELS = 0.2, 5.0
"""A network's chains spend this share of their NFE on the levels from so many times sigma_min on, where they
forget what moment matching, a Gaussian approximation, got wrong. From higher ones they would lag behind."""
LAST_DRAWS = 4
"""Draws a particle for the masses at the last level; 1 at those before, which only save particles."""


@dataclass(frozen=True)
class CalibratedOptions:
    """nfe: gradients a sample along the path; where there are several modes, weights add about 20.

    weigh: whether to use particle weights. sigma_min: last level (DESIGN 2: the spread is right to 0.6 % at
    0.01). step_size: h of the kinetic step. memory_limit: the largest share of momentum kept in a step (0:
    Leimkuhler-Matthews). gradient_error: relative error of the prior's G at sigma_min (default: the prior's
    own); unless it is 0 chains come down by moment matching, keep no momentum, and h follows from it (see
    `cautious_step`). noise_floor: std of the white noise that the prior's images carry (default: what the
    prior says), see kinetic.finish.
    """

    nfe: int = 100
    weigh: bool = True
    sigma_min: float = 0.01
    sigma_range: tuple[float, float] = (1.0, 20.0)
    """Where the first level may lie; that of a network's chains is the highest."""
    step_size: float = 1.5
    memory_limit: float = kinetic.LARGEST_MEMORY
    gradient_error: float = 0.0
    noise_floor: float = 0.0

    @property
    def by_moments(self) -> bool:
        """Whether chains come down by moment matching before they are annealed."""
        return self.gradient_error > 0


@dataclass(frozen=True)
class Pace:
    """How chains go from a level to the next: h and c of the kinetic step, and whether the flow carries them.

    What is wide beside sigma relaxes slowly, and lags behind its level. Momentum helps where the gradient is
    exact. It also amplifies what an inexact one gets wrong; the flow (`kinetic.carry`) does not.
    """

    step_size: float
    memory: float
    carried: bool

    def calmer(self) -> "Pace":
        """For chains that diverged."""
        return replace(self, memory=0.0) if self.memory else replace(self, step_size=self.step_size / 2)


def cautious_step(sigma: float, following: float, gradient_error: float, sigma_min: float) -> float:
    """h at level sigma of a prior whose G has a relative error eps, which is measured at sigma_min.

    A direction of standard deviation s is held by a share sigma^2 / s^2 of the gradient: an error eps hides
    those with s > sigma / eps^(1/2), and in them chains only walk. While sigma falls by a factor e, steps of
    h walk a variance h^2 sigma^2 / ln(sigma / following), which is to stay below s^2. The errors of the zoo's
    priors fall as sigma^(-1/2), from 0.2 at 0.04 to 0.01 at 10, and so is eps continued here.
    """
    error = gradient_error * math.sqrt(sigma_min / sigma)
    return min(LARGEST_CAUTIOUS_STEP, math.sqrt((1 - following / sigma) / error))


@dataclass(frozen=True)
class Path:
    """Chains at the end of their levels.

    x [N, C, H, W]; energy [N] at the last level; ancestors [N]: founding chain of each; diverged [N] bool.
    """

    x: Tensor
    energy: Tensor
    ancestors: Tensor
    diverged: Tensor
    weights: mode_weights.ModeWeights
    resamplings: int = 0


@dataclass(frozen=True)
class CalibratedPlan:
    """What a request's populations share, found by its pilot.

    spread: posterior std along the first principal component, inf without a pilot; calm: whether the pilot
    diverged at first.
    """

    options: CalibratedOptions
    spread: float
    calm: bool = False

    @property
    def sigma_max(self) -> float:
        """First level: the posterior there is half noise along its widest direction."""
        low, high = self.options.sigma_range
        return min(max(2 * self.spread, low), high)

    @property
    def annealed(self) -> list[float]:
        """Levels of the kinetic steps."""
        options = self.options
        if not options.by_moments:
            return geometric_levels(self.sigma_max, options.sigma_min, max(1, options.nfe - 1))
        first = min(ANNEALED_LEVELS * options.sigma_min, self.sigma_max)
        return geometric_levels(first, options.sigma_min, self._annealed_nfe - 1)

    @property
    def _annealed_nfe(self) -> int:
        return max(2, round(ANNEALED_SHARE * self.options.nfe))

    @property
    def descent(self) -> list[float]:
        """Levels of the diffused posterior, down to the first of `annealed`: as many as the NFE allow."""
        high, low, left = self.sigma_max, self.annealed[0], self.options.nfe - self._annealed_nfe
        levels = [high]
        while True:
            more = geometric_levels(high, low, len(levels) + 1)
            if sum(1 + moment_matching.steps_at(sigma) for sigma in more[:-1]) > left:
                return levels
            levels = more

    def pace(self, sigma: float, following: float) -> Pace:
        """From level sigma to the following one."""
        options = self.options
        if options.by_moments:
            step = cautious_step(sigma, following, options.gradient_error, options.sigma_min)
            pace = Pace(min(step, options.step_size), 0.0, True)
        else:
            memory = kinetic.memory(options.step_size, sigma, self.spread)
            pace = Pace(options.step_size, min(options.memory_limit, memory), False)
        return pace.calmer() if self.calm else pace


def anneal(
    problem: Problem,
    noise: Noise,
    levels: list[float],
    *,
    pace: Callable[[float, float], Pace],
    weigh: bool,
    start: kinetic.KineticState | None = None,
    noise_floor: float = 0.0,
) -> Chains[Path]:
    """Run the chains of `noise` down `levels`, one kinetic step each, and remove the last noise.

    pace: from a level to the following one. start: the chains at levels[0] (None: from nothing).
    noise_floor: see kinetic.finish. Raises nothing: chains that diverge are held, and marked.
    """
    count = len(noise.chain_ids)
    state = kinetic.init(problem, noise, levels[0]) if start is None else start
    ancestors = torch.arange(count, device=state.x.device)
    resamplings = 0
    looked_at = levels[0]
    # A step is as long at the last level as at the one before.
    beyond = levels[-1] ** 2 / levels[-2] if len(levels) > 1 else levels[-1] / 2
    for sigma, following in pairwise([*levels, beyond]):
        energy, grad = yield Evaluate(state.x, levels_of(sigma, count, state.x))
        # Diverged chains would be weighted away without a word: their population is to be run again.
        if weigh and sigma <= LOOK_RATIO * looked_at and not state.diverged.any():
            looked_at = sigma
            weights = yield from _weigh(problem, noise, state, (energy, grad), sigma, ancestors, draws=1)
            if mode_weights.effective_sample_size(weights) < LEAST_ESS * count:
                parents = _parents(noise, state, weights)
                state, grad, ancestors = kinetic.take(state, parents), grad[parents], ancestors[parents]
                resamplings += 1
        way = pace(sigma, following)
        state = kinetic.step(problem, state, sigma, grad, noise, step_size=way.step_size, memory=way.memory)
        if way.carried and following >= levels[-1]:
            state = kinetic.carry(problem, state, grad, following)
    energy, grad = yield Evaluate(state.x, levels_of(state.sigma, count, state.x))
    weights = mode_weights.equal(count)
    if weigh and not state.diverged.any():
        evaluated = energy, grad
        weights = yield from _weigh(
            problem, noise, state, evaluated, state.sigma, ancestors, draws=LAST_DRAWS
        )
        if mode_weights.effective_sample_size(weights) < count * (1 - 1e-9):
            parents = _parents(noise, state, weights)
            state, grad, ancestors = kinetic.take(state, parents), grad[parents], ancestors[parents]
            energy = energy[parents]
            weights = replace(weights, labels=weights.labels[parents.cpu()])
            resamplings += 1
    x = kinetic.finish(problem, state, grad, noise, noise_floor=noise_floor)
    return Path(x, energy, ancestors, state.diverged, weights, resamplings)


def _weigh(
    problem: Problem,
    noise: Noise,
    state: kinetic.KineticState,
    evaluated: tuple[Tensor, Tensor],
    sigma: float,
    ancestors: Tensor,
    *,
    draws: int,
) -> Chains[mode_weights.ModeWeights]:
    # The chains' own noise of an iteration is draw 0 (and 1 at the start).
    normals = (
        noise.at(state.iteration, problem.dtype, draw=2 + i)(problem.image_shape) for i in range(draws)
    )
    return (yield from mode_weights.weigh(problem, state.x, *evaluated, sigma, ancestors, normals))


def _parents(noise: Noise, state: kinetic.KineticState, weights: mode_weights.ModeWeights) -> Tensor:
    uniform = uniforms(
        noise.seed, noise.chain_ids[:1], iteration=state.iteration, stream=_RESAMPLING_STREAM
    ).item()
    return mode_weights.resample(weights, uniform).to(state.x.device)


def top_std(samples: Tensor) -> float:
    """Standard deviation of samples [N, C, H, W] along their first principal component."""
    images = samples.double().flatten(1)
    centred = images - images.mean(0)
    # The Gram matrix of the few chains has the eigenvalues of the covariance of the many pixels.
    largest = torch.linalg.eigvalsh(centred @ centred.T)[-1].item()
    return math.sqrt(max(largest, 0.0) / max(1, len(samples) - 1))


def prepare(problem: Problem, seed: int, options: CalibratedOptions) -> Chains[CalibratedPlan]:
    """The plan of a request, from a pilot: few chains over the whole range of levels.

    Moment matching needs none. A pilot that diverges is repeated more calmly. Raises RuntimeError when it
    diverges even so.
    """
    if options.by_moments:
        return CalibratedPlan(options, math.inf)
    ids = _PILOT_IDS + torch.arange(PILOT_CHAINS, device=problem.y.device)
    levels = geometric_levels(options.sigma_range[1], options.sigma_min, PILOT_STEPS - 1)
    limited = replace(options, memory_limit=min(PILOT_MEMORY, options.memory_limit))
    for calm in (False, True):
        pilot = CalibratedPlan(limited, math.inf, calm)
        scout = yield from anneal(problem, Noise(seed, ids), levels, pace=pilot.pace, weigh=False)
        settled = scout.x[~scout.diverged]
        if len(settled) >= 2:
            return CalibratedPlan(options, top_std(settled), calm)
    raise RuntimeError(_DIVERGED.format(count=int(scout.diverged.sum()), total=len(scout.x), ids="pilot"))


def pilot_nfe(options: CalibratedOptions) -> int:
    """What `prepare` spends at least."""
    return 0 if options.by_moments else PILOT_CHAINS * PILOT_STEPS


def _run(problem: Problem, noise: Noise, plan: CalibratedPlan, *, weigh: bool, calmer: bool) -> Chains[Path]:
    """The whole way of the chains of `noise`; calmer: for those that diverged on it."""

    def pace(sigma: float, following: float) -> Pace:
        found = plan.pace(sigma, following)
        return found.calmer() if calmer else found

    start = None
    if plan.options.by_moments:
        levels = plan.descent
        stretch = 1.0 if calmer else moment_matching.LARGEST_STRETCH
        x, diverged = yield from moment_matching.descend(problem, noise, levels, stretch=stretch)
        steps = len(levels)
        x = moment_matching.hold(problem, noise.at(steps, problem.dtype), x, levels[-1])
        start = replace(kinetic.init_at(problem, noise, x, levels[-1], steps), diverged=diverged)
    return (
        yield from anneal(
            problem, noise, plan.annealed, pace=pace, weigh=weigh, start=start,
            noise_floor=plan.options.noise_floor,
        )
    )  # fmt: skip


def chains(problem: Problem, noise: Noise, plan: CalibratedPlan) -> Chains[Population]:
    """One sample for each chain of `noise` (DESIGN 2, the measured recipe).

    Chains that diverge are run again more calmly. Raises RuntimeError when chains diverge even so.
    """
    options = plan.options
    path = yield from _run(problem, noise, plan, weigh=options.weigh, calmer=False)
    broken = path.diverged
    if broken.any():
        # A population with weights is one unit; independent chains are repeated alone, so that the others
        # stay what they are.
        together = options.weigh and (path.resamplings > 0 or mode_weights.find_modes(path.x[~broken])[0] > 1)
        again = torch.ones_like(broken) if together else broken
        ids = noise.chain_ids[again]
        weigh = options.weigh and bool(again.all())
        repeated = yield from _run(problem, Noise(noise.seed, ids), plan, weigh=weigh, calmer=True)
        if repeated.diverged.any():
            lost = ids[repeated.diverged].tolist()
            raise RuntimeError(_DIVERGED.format(count=len(lost), total=len(noise.chain_ids), ids=lost[:5]))
        path = _merge(path, repeated, again)
    return Population(path.x, path.energy, path.ancestors, _diagnose(path, plan, broken))


_DIVERGED = (
    "{count} of {total} chains diverged (chains {ids}), also at a calmer pace: the prior's gradient is not "
    "that of an energy near these images, or noise_std and the measurement do not belong together; check the "
    "prior's units and noise_std"
)


def _merge(path: Path, repeated: Path, again: Tensor) -> Path:
    if bool(again.all()):
        return repeated
    x, energy = path.x.clone(), path.energy.clone()
    x[again], energy[again] = repeated.x, repeated.energy
    return replace(path, x=x, energy=energy)


def _diagnose(path: Path, plan: CalibratedPlan, broken: Tensor) -> dict[str, Any]:
    """What the run says of itself; see `Posterior.diagnostics`."""
    weights = path.weights
    sizes = torch.bincount(weights.labels).tolist()
    # Of a particle; infinite where a mode that lives was not measured.
    error = weights.error[weights.labels].square().mean().sqrt().item()
    known = {} if plan.options.by_moments else {"top_std": plan.spread}
    return known | {
        "sigma_max": plan.sigma_max,
        "modes": weights.modes,
        "mode_shares": [size / len(path.x) for size in sorted(sizes, reverse=True)],
        "mode_log_weight_error": error,
        "modes_measured": math.isfinite(error),
        "resamplings": path.resamplings,
        "diverged": int(broken.sum()),
    }
