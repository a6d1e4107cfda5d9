"""Particle weights that repair the mass of each mode, and leave alone what needs no repair (DESIGN 2).

Annealing through p_sigma(x | y) moves probability between modes, and chains cannot follow once the modes have
parted. A population of chains can: from level s to level t a particle at x gains the log-weight

    l(x) = log p_t(x) - log p_s(x) = E(x, s) / s^2 - E(x, t) / t^2     (+ a constant of s and t).

Used as it stands (plain SMC) l is mostly noise: each of d dimensions adds variance at every level, and
resampling on noise destroys the very masses that it should repair. But chains do move inside a mode, and what
they forget there cannot matter. So a particle gets what its mode gains, the ratio Z_t / Z_s of the mode's
normalisers (the conditional expectation of its increment, Rao-Blackwell), by thermodynamic integration: the
mean of l over the particles of the mode. While there is one mode nothing is weighted and no gradient spent.

Two more reductions of variance. Stein's identity E[(x - c) . score] = -d holds inside every mode for every
constant c; as a control variate it takes away up to 95 % of the standard deviation of l. And log-weights are
shrunk by the share of their spread that their own standard error explains (James and Stein 1961), so that a
population too small to tell masses apart stays unweighted.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from alpenglow.samplers.problem import Problem

NEIGHBOURS = 10
"""Each particle is linked to so many nearest ones: no mode has fewer than NEIGHBOURS + 1 members."""
CORRELATION_TIME = 8.0
"""Levels over which the noise of an increment persists, which scales the variance of log-weights: slow
directions of a mode. With 2, log masses were off by twice their standard error on benchmarks.beds."""
_RELABEL_RATIO = 0.93


@dataclass(frozen=True)
class ModeWeights:
    """Log-weights of a population of N particles.

    labels: mode of each particle [N], int64, on the CPU; modes: their number; labelled_at: level of the last
    look. log_weight [N] float64, of particles; variance [N]: of its statistical error.
    """

    labels: Tensor
    modes: int
    labelled_at: float
    log_weight: Tensor
    variance: Tensor


def init(count: int) -> ModeWeights:
    """Equal weights, one mode, to be looked at anew at the first level."""
    zeros = torch.zeros(count, dtype=torch.float64)
    return ModeWeights(torch.zeros(count, dtype=torch.int64), 1, float("inf"), zeros, zeros)


def find_modes(denoised: Tensor, neighbours: int = NEIGHBOURS) -> tuple[int, Tensor]:
    """Number of modes, and the mode [N] of each particle, from denoised images [N, C, H, W].

    Chains of one mode denoise to overlapping clouds, those of parted modes do not. Modes are the connected
    components of the graph that links every particle to its `neighbours` nearest. A mode of fewer particles
    would link to others and join them: such strays are found first (by links that are mutual), kept out of
    the graph, and then added to the mode of their nearest particle.
    """
    images = denoised.flatten(1).cpu()
    images = (images - images.mean(0)).float()  # centred, so that squared distances do not cancel
    count = len(images)
    if count < 2 * (neighbours + 1):
        return 1, torch.zeros(count, dtype=torch.int64)
    blocks = torch.arange(count).split(1024)
    nearest = torch.cat([_distances(images, rows).topk(neighbours, largest=False).indices for rows in blocks])
    starts = np.arange(0, count * neighbours + 1, neighbours)
    graph = csr_matrix((np.ones(count * neighbours), nearest.flatten().numpy(), starts), shape=(count, count))
    mutual = torch.as_tensor(connected_components(graph.multiply(graph.T), directed=False)[1]).long()
    settled = torch.bincount(mutual)[mutual] > neighbours
    if not settled.any():
        return 1, torch.zeros(count, dtype=torch.int64)
    core = settled.nonzero().flatten()
    inside = graph[core.numpy()][:, core.numpy()]
    labels = torch.zeros(count, dtype=torch.int64)
    labels[core] = torch.as_tensor(connected_components(inside, directed=False)[1]).long()
    for rows in (~settled).nonzero().flatten().split(1024):
        labels[rows] = labels[_distances(images, rows).masked_fill(~settled, torch.inf).argmin(1)]
    present, labels = labels.unique(return_inverse=True)
    return len(present), labels


def _distances(images: Tensor, rows: Tensor) -> Tensor:
    """Distances [R, N] of the particles `rows` to all, infinite to themselves."""
    distance = torch.cdist(images[rows], images)
    distance[torch.arange(len(rows)), rows] = torch.inf
    return distance


def look(weights: ModeWeights, denoised: Tensor, sigma: float) -> ModeWeights:
    """Find the modes again, from denoised images at level sigma, where the level has changed enough."""
    if sigma > _RELABEL_RATIO * weights.labelled_at:
        return weights
    modes, labels = find_modes(denoised)
    return replace(weights, labels=labels, modes=modes, labelled_at=sigma)


def reweigh(
    problem: Problem,
    weights: ModeWeights,
    x: Tensor,
    levels: tuple[float, float],
    before: tuple[Tensor, Tensor],
    after: tuple[Tensor, Tensor],
) -> ModeWeights:
    """The weights after the chains x [N, C, H, W] of one level, from (E, G) at its two neighbours `levels`.

    Half the central difference of -E / sigma^2 is d log Z / d level, integrated over the levels by the
    trapezoidal rule. On levels equally spaced in log sigma its error comes from the ends alone (Euler and
    Maclaurin), and unlike log E[exp l] it needs no variance of l.
    """
    (high, low), dimension = levels, x[0].numel()
    increment = 0.5 * (before[0].double() / high**2 - after[0].double() / low**2).cpu()
    # The score at the level between: levels are close, and its error is the same in every mode.
    prior_score = 0.5 * (before[1].double() / high**2 + after[1].double() / low**2)
    score = -(prior_score + problem.misfit_grad(x).double()).flatten(1).cpu()
    # Resampling may have emptied a mode since the last look.
    sizes = torch.bincount(weights.labels, minlength=weights.modes).clamp(min=1).double()

    def mode_mean(values: Tensor) -> Tensor:
        total = torch.zeros(weights.modes, *values.shape[1:], dtype=torch.float64)
        return total.index_add_(0, weights.labels, values) / sizes.reshape(-1, *[1] * (values.ndim - 1))

    images = x.double().flatten(1).cpu()
    images = x.double().flatten(1).cpu()
    virial = ((images - mode_mean(images)[weights.labels]) * score).sum(1)
    # Deviations from a mean of the same particles miss a share of 1 / sizes of the expectation.
    virial = virial + dimension * (1 - 1 / sizes[weights.labels])
    mean_increment, mean_virial = mode_mean(increment), mode_mean(virial)
    centred = increment - mean_increment[weights.labels]
    centred_virial = virial - mean_virial[weights.labels]
    slope = (centred_virial * centred).sum() / centred_virial.square().sum().clamp(min=1e-300)
    log_ratio = mean_increment - slope * mean_virial
    variance = CORRELATION_TIME * mode_mean((centred - slope * centred_virial).square()) / sizes
    return replace(
        weights,
        log_weight=weights.log_weight + log_ratio[weights.labels],
        variance=weights.variance + variance[weights.labels],
    )


def shrinkage(weights: ModeWeights) -> float:
    """The share of the spread of log-weights that their statistical error does not explain, in [0, 1]."""
    probability = weights.log_weight.softmax(0)
    # Spread over the unweighted population: one mode of large weight must not hide the others.
    spread = weights.log_weight.var(correction=0).item()
    error = max(weights.variance.mean().item(), (probability * weights.variance).sum().item())
    return max(0.0, 1.0 - error / spread) if spread > 0 else 0.0


def probabilities(weights: ModeWeights) -> Tensor:
    """Normalised, shrunk weights [N], float64."""
    return (shrinkage(weights) * weights.log_weight).softmax(0)


def effective_sample_size(weights: ModeWeights) -> float:
    """Kish's 1 / sum w^2 of the shrunk weights, in [1, N]."""
    return 1 / probabilities(weights).square().sum().item()


def resample(weights: ModeWeights, uniform: float) -> tuple[Tensor, ModeWeights]:
    """Systematic resampling with one number in [0, 1): indices of the parents [N], and the weights left.

    What shrinkage did not use stays with the particles.
    """
    count = len(weights.log_weight)
    used = shrinkage(weights) * weights.log_weight
    position = (torch.arange(count, dtype=torch.float64) + uniform) / count
    parents = torch.searchsorted(used.softmax(0).cumsum(0), position).clamp(max=count - 1)
    left = weights.log_weight - used
    return parents, replace(
        weights,
        labels=weights.labels[parents],
        log_weight=left[parents],
        variance=weights.variance[parents],
    )
