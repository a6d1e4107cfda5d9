"""The default method: annealed kinetic Langevin, one step a level, from a level that a pilot run finds.

Where the population parts into modes, particle weights keep their masses right (mode_weights.py).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from alpenglow.kernels.philox import uniforms
from alpenglow.samplers import kinetic, mode_weights
from alpenglow.samplers.chains import Chains, Evaluate, Population
from alpenglow.samplers.problem import Noise, Problem, geometric_levels, levels_of

PILOT_CHAINS = 32
PILOT_STEPS = 40
_PILOT_IDS = 2**31  # far from the ids of any request, so that the pilot's noise is its own
_RESAMPLING_STREAM = 2**20
LOOK_RATIO = 0.7
"""Modes are looked for, and their masses measured, when the level has fallen by so much."""
LEAST_ESS = 0.8
"""Share of the particles below which the effective sample size makes them be resampled before the last level.
Early copies part again; a mode's mass is measured anew in any case."""
LAST_DRAWS = 4
"""Draws a particle for the masses at the last level; 1 at those before, which only save particles."""
CLUMPED = 0.4
"""`crowding` of a pilot below which its chains count as parted: 0.2 on mixtures, 0.6 to 0.9 on one mode."""


@dataclass(frozen=True)
class CalibratedOptions:
    """nfe: gradients a sample along the path; where there are several modes, weights add about 20.

    weigh: whether to use particle weights. sigma_min: last level (DESIGN 2: the spread is right to 0.6 % at
    0.01). step_size: h, and modal_step_size where the pilot's chains ended in separate modes: the error of a
    large step moves mass between modes before they part. memory_limit: the largest share of momentum kept
    in a step (0: Leimkuhler-Matthews); of a prior that is only approximately known, see `trusted_memory`.
    """

    nfe: int = 100
    weigh: bool = True
    sigma_min: float = 0.01
    sigma_range: tuple[float, float] = (1.0, 20.0)
    """Where the first level may lie."""
    step_size: float = 1.5
    modal_step_size: float = 0.7
    memory_limit: float = kinetic.LARGEST_MEMORY


def trusted_memory(step_size: float, gradient_error: float) -> float:
    """The share of momentum to keep at most where the prior's gradient has a relative error.

    At level sigma a direction of standard deviation s is held by a share sigma^2 / s^2 of the gradient, which
    an error hides where s > sigma / gradient_error^(1/2). Friction that is critical for that width settles
    every direction that the prior knows; with less, chains walk off along those it does not know.
    """
    return math.exp(-2 * step_size * math.sqrt(gradient_error))


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

    spread: posterior std along the first principal component; crowding: see `crowding`.
    """

    options: CalibratedOptions
    spread: float
    crowding: float

    @property
    def sigma_max(self) -> float:
        """First level: the posterior there is half noise along its widest direction."""
        low, high = self.options.sigma_range
        return min(max(2 * self.spread, low), high)

    @property
    def parted(self) -> bool:
        """Whether the pilot's chains ended in separate modes."""
        return self.crowding <= CLUMPED

    @property
    def step_size(self) -> float:
        """h of the kinetic step."""
        chosen, modal = self.options.step_size, self.options.modal_step_size
        return min(chosen, modal) if self.parted else chosen

    def memory(self, sigma: float) -> float:
        """Share of the momentum that survives a step at level sigma."""
        return min(self.options.memory_limit, kinetic.memory(self.step_size, sigma, self.spread))


def anneal(
    problem: Problem,
    noise: Noise,
    levels: list[float],
    *,
    step_size: float,
    memory: Callable[[float], float],
    weigh: bool,
) -> Chains[Path]:
    """Run the chains of `noise` down `levels`, one kinetic step each, and remove the last noise.

    Raises nothing: chains that diverge are held, and marked.
    """
    count = len(noise.chain_ids)
    state = kinetic.init(problem, noise, levels[0])
    ancestors = torch.arange(count, device=state.x.device)
    resamplings = 0
    looked_at = levels[0]
    for sigma in levels:
        energy, grad = yield Evaluate(state.x, levels_of(sigma, count, state.x))
        # Diverged chains would be weighted away without a word: their population is to be run again.
        if weigh and sigma <= LOOK_RATIO * looked_at and not state.diverged.any():
            looked_at = sigma
            weights = yield from _weigh(problem, noise, state, (energy, grad), sigma, ancestors, draws=1)
            if mode_weights.effective_sample_size(weights) < LEAST_ESS * count:
                parents = _parents(noise, state, weights)
                state, grad, ancestors = _take(state, parents), grad[parents], ancestors[parents]
                resamplings += 1
        state = kinetic.step(problem, state, sigma, grad, noise, step_size=step_size, memory=memory(sigma))
    energy, grad = yield Evaluate(state.x, levels_of(state.sigma, count, state.x))
    weights = mode_weights.equal(count)
    if weigh and not state.diverged.any():
        evaluated = energy, grad
        weights = yield from _weigh(
            problem, noise, state, evaluated, state.sigma, ancestors, draws=LAST_DRAWS
        )
        if mode_weights.effective_sample_size(weights) < count * (1 - 1e-9):
            parents = _parents(noise, state, weights)
            state, grad, ancestors = _take(state, parents), grad[parents], ancestors[parents]
            energy = energy[parents]
            weights = replace(weights, labels=weights.labels[parents.cpu()])
            resamplings += 1
    x = kinetic.finish(problem, state, grad)
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


def _take(state: kinetic.KineticState, parents: Tensor) -> kinetic.KineticState:
    # A particle keeps its slot's noise: copies part at their next step.
    return replace(
        state,
        x=state.x[parents],
        z=state.z[parents],
        u=state.u[parents],
        diverged=state.diverged[parents],
        limit=state.limit[parents],
    )


def top_std(samples: Tensor) -> float:
    """Standard deviation of samples [N, C, H, W] along their first principal component."""
    images = samples.double().flatten(1)
    centred = images - images.mean(0)
    # The Gram matrix of the few chains has the eigenvalues of the covariance of the many pixels.
    largest = torch.linalg.eigvalsh(centred @ centred.T)[-1].item()
    return math.sqrt(max(largest, 0.0) / max(1, len(samples) - 1))


def crowding(samples: Tensor) -> float:
    """Median distance to the nearest sample over the median distance of two: small where samples clump."""
    images = samples.flatten(1).double()
    distance = torch.cdist(images, images)
    others = ~torch.eye(len(images), dtype=torch.bool, device=images.device)
    nearest = distance.masked_fill(~others, torch.inf).amin(1).median()
    return (nearest / distance[others].median().clamp(min=1e-30)).item()


def _scout(
    problem: Problem, noise: Noise, levels: list[float], step_size: float, memory: float
) -> Chains[Path]:
    return anneal(problem, noise, levels, step_size=step_size, memory=lambda sigma: memory, weigh=False)


def prepare(problem: Problem, seed: int, options: CalibratedOptions) -> Chains[CalibratedPlan]:
    """The plan of a request, from a pilot: few chains over the whole range of levels.

    A pilot that diverges is repeated without momentum. Raises RuntimeError when it diverges even so.
    """
    ids = _PILOT_IDS + torch.arange(PILOT_CHAINS, device=problem.y.device)
    levels = geometric_levels(options.sigma_range[1], options.sigma_min, PILOT_STEPS - 1)
    for limit in dict.fromkeys((options.memory_limit, 0.0)):
        scout = yield from _scout(problem, Noise(seed, ids), levels, options.step_size, min(0.5, limit))
        settled = scout.x[~scout.diverged]
        if len(settled) >= 2:
            return CalibratedPlan(replace(options, memory_limit=limit), top_std(settled), crowding(settled))
    raise RuntimeError(_DIVERGED.format(count=int(scout.diverged.sum()), total=len(scout.x), ids="pilot"))


def chains(problem: Problem, noise: Noise, plan: CalibratedPlan) -> Chains[Population]:
    """One sample for each chain of `noise` (DESIGN 2, the measured recipe).

    Chains that diverge are run again without momentum. Raises RuntimeError when chains diverge even so.
    """
    options = plan.options
    levels = geometric_levels(plan.sigma_max, options.sigma_min, options.nfe - 1)
    path = yield from anneal(
        problem, noise, levels, step_size=plan.step_size, memory=plan.memory, weigh=options.weigh
    )
    broken = path.diverged
    if broken.any():
        # A population with weights is one unit; independent chains are repeated alone, so that the others
        # stay what they are.
        together = options.weigh and (path.resamplings > 0 or plan.parted)
        again = torch.ones_like(broken) if together else broken
        ids = noise.chain_ids[again]
        repeated = yield from anneal(
            problem, Noise(noise.seed, ids), levels,
            step_size=plan.step_size, memory=lambda sigma: 0.0, weigh=options.weigh and bool(again.all()),
        )  # fmt: skip
        if repeated.diverged.any():
            lost = ids[repeated.diverged].tolist()
            raise RuntimeError(_DIVERGED.format(count=len(lost), total=len(noise.chain_ids), ids=lost[:5]))
        path = _merge(path, repeated, again)
    return Population(path.x, path.energy, path.ancestors, _diagnose(path, plan, broken))


_DIVERGED = (
    "{count} of {total} chains diverged (chains {ids}), also without momentum: the prior's gradient is not "
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
    return {
        "top_std": plan.spread,
        "sigma_max": plan.sigma_max,
        "modes": weights.modes,
        "mode_shares": [size / len(path.x) for size in sorted(sizes, reverse=True)],
        "mode_log_weight_error": error,
        "modes_measured": math.isfinite(error),
        "resamplings": path.resamplings,
        "diverged": int(broken.sum()),
        "pilot_crowding": plan.crowding,
        "step_size": plan.step_size,
    }
