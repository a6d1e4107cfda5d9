"""Weights of particles that repair the mass of each mode, and leave alone what needs no repair (DESIGN 2).

Annealing through p_sigma(x | y) moves probability between modes, and chains cannot follow once the modes have
parted. A population of chains can. Its particles are not weighted one by one, as in plain SMC: in image
dimensions such weights are mostly noise, and resampling on noise destroys the masses that it should repair.
But chains do move inside a mode. So modes are found as clusters of denoised particles, the mass of each is
measured by bridge sampling (bridge.py), and all particles of a mode get one weight, mass over share. While
there is one mode nothing is weighted and no gradient spent.

A few particles often end where there is no mode to speak of, too few to be a mode or to be measured. Their
log density tells: it is tens of nats below what is typical, and they get no weight.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from alpenglow.samplers.bridge import log_masses, log_posterior
from alpenglow.samplers.chains import Chains
from alpenglow.samplers.problem import Problem

NEIGHBOURS = 10
"""Each particle is linked to so many nearest ones: no mode has fewer than NEIGHBOURS + 1 members."""
LARGEST_ERROR = 0.5
"""Standard error of a log mass above which the mode counts as not measured."""
IMPOSSIBLE = 20.0
"""Particles of a mode lie at most this and n / 4 nats (n pixels) below its median log density: a chi-square
of n degrees exceeds that with a probability below 1e-6. What lies deeper has no mass, unless in a mode
wider by a quarter in every direction. A population of one mode is left alone up to n / 2."""
CAUTION = 2.0
"""Standard errors that a weight must exceed to count: with 300 particles one is too few, and slow directions
of a mode make them too small."""
LOST = -1
"""Label of particles that belong to no mode of any mass."""


@dataclass(frozen=True)
class ModeWeights:
    """Log-weights of a population of N particles.

    labels: mode of each particle [N] or LOST, int64, on the CPU. log_weight [K] float64: of the particles of
    each mode. error [K]: standard error of each mode's log mass, infinite where it is not known.
    """

    labels: Tensor
    log_weight: Tensor
    error: Tensor

    @property
    def modes(self) -> int:
        """K."""
        return len(self.log_weight)


def equal(count: int) -> ModeWeights:
    """One mode of `count` particles."""
    zero = torch.zeros(1, dtype=torch.float64)
    return ModeWeights(torch.zeros(count, dtype=torch.int64), zero, zero)


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


def weigh(
    problem: Problem,
    x: Tensor,
    energy: Tensor,
    grad: Tensor,
    sigma: float,
    families: Tensor,
    normals: Iterable[Tensor],
) -> Chains[ModeWeights]:
    """Weights for equally weighted particles x [N, C, H, W] with (E, G) at level sigma.

    families [N] and normals: as in `bridge.log_masses`; no gradient is spent where there is one mode. Where
    no mode can be measured, as in images of many pixels, nothing is weighted.
    """
    modes, labels = find_modes(x - grad)
    density = log_posterior(problem, x, sigma, energy)
    depth = x[0].numel() / (4 if modes > 1 else 2) + IMPOSSIBLE
    typical = torch.stack([density[labels == mode].median() for mode in range(modes)])
    lost = density < typical[labels] - depth
    if modes == 1 and not lost.any():
        return equal(len(x))
    log_mass = yield from log_masses(
        problem, x, density, sigma, labels.masked_fill(lost, LOST), families, normals
    )
    error = log_mass.variance.sqrt()
    known = error < LARGEST_ERROR
    if not known.any():  # then density tells nothing of particles either
        return ModeWeights(labels, torch.zeros_like(error), error)
    labels = labels.masked_fill(lost, LOST)
    share = torch.bincount(labels[~lost], minlength=modes).double() / len(labels)
    heaviest = log_mass.value.masked_fill(~known, -torch.inf).argmax()
    dead = ~known & (typical < typical[heaviest] - depth)
    log_weight = shrink(log_mass.value - share.log(), error, share).masked_fill(dead, -torch.inf)
    return ModeWeights(labels, log_weight, error.masked_fill(dead, 0))


def shrink(log_weight: Tensor, error: Tensor, share: Tensor) -> Tensor:
    """Log-weights [K] of modes that hold `share` [K] of the particles, less what may be chance.

    Each is drawn to the mean of the living modes by the share of its own squared distance that its error
    explains (the positive part of James and Stein 1961, one mode at a time: that a dead mode is far off says
    nothing about the others). Modes that were not measured keep their share of the population.
    """
    known = error < LARGEST_ERROR
    mass = (log_weight + share.log()).masked_fill(~known, -torch.inf).softmax(0)
    distance = log_weight - (mass * log_weight)[known].sum()
    kept = (1 - (CAUTION * error / distance).square()).nan_to_num(0).clamp(min=0)
    shrunk = torch.where(known, kept * distance, 0)
    # The measured modes together keep their share too.
    total = (share * shrunk.exp())[known].sum() / share[known].sum()
    return torch.where(known, shrunk - total.log(), 0)


def probabilities(weights: ModeWeights) -> Tensor:
    """Normalised weights [N], float64."""
    log_weight = weights.log_weight[weights.labels.clamp(min=0)]
    return log_weight.masked_fill(weights.labels == LOST, -torch.inf).softmax(0)


def effective_sample_size(weights: ModeWeights) -> float:
    """Kish's 1 / sum w^2, in [1, N]."""
    return 1 / probabilities(weights).square().sum().item()


def resample(weights: ModeWeights, uniform: float) -> Tensor:
    """Systematic resampling with one number in [0, 1): indices of the parents [N], in increasing order."""
    # Particles of a mode side by side: each mode's number of children is exact to one.
    order = weights.labels.argsort(stable=True)
    count = len(order)
    position = (torch.arange(count, dtype=torch.float64) + uniform) / count
    chosen = torch.searchsorted(probabilities(weights)[order].cumsum(0), position, right=True)
    return order[chosen.clamp(max=count - 1)].sort().values
