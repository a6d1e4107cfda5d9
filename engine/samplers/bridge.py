"""Log masses of the modes of one density, by bridge sampling against a Gaussian fitted to each mode.

The energy gives log p_sigma(x | y) up to one constant, the same in every mode. So the mass Z_k of a mode is a
ratio of normalisers, p restricted to the mode against a Gaussian g_k whose normaliser is known, and Bennett's
acceptance ratio (J. Comp. Phys. 22, 1976; Meng and Wong, Statistica Sinica 6, 1996) is the estimate of least
variance from particles of the one and draws of the other. It asks where particles are now, not how they came
there: errors of the path do not matter.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from alpenglow.samplers.chains import Chains, Evaluate
from alpenglow.samplers.problem import Problem, levels_of

FOLDS = 4
"""A Gaussian is tried on particles that it was not fitted to: each of so many parts against the others."""
PRIOR_STRENGTHS = (0.25, 1.0, 4.0, 16.0, 64.0)
"""Particles that the modes' common shape may count for in the covariance of one mode, in dimensions."""

DIMENSIONS = 4.0
"""A covariance of n dimensions from N particles costs about n^2 / (4 N) nats of overlap: more than this times
the square root of N dimensions are not tried. With 256 of 2 000 particles (a factor of 5.7) masses were wrong
by a total variation of 0.15 to 0.44, and the standard errors did not say so."""


@dataclass(frozen=True)
class Gaussian:
    """N(mean, root root^T) in n dimensions: mean [n], root [n, n], its inverse, and log |root|."""

    mean: Tensor
    root: Tensor
    inverse: Tensor
    log_volume: float

    def draw(self, normals: Tensor) -> Tensor:
        """Samples [B, n] from standard normals [B, n]."""
        return self.mean + normals @ self.root.T

    def log_density(self, images: Tensor) -> Tensor:
        """Log density [B] of images [B, n], without (2 pi)^(-n/2)."""
        return -0.5 * ((images - self.mean) @ self.inverse.T).square().sum(1) - self.log_volume


@dataclass(frozen=True)
class LogMasses:
    """Log mass [K] of each mode up to a common constant, and its variance [K], both float64.

    A mode has infinite variance where its particles are too few to tell.
    """

    value: Tensor
    variance: Tensor


def log_posterior(problem: Problem, x: Tensor, sigma: float, energy: Tensor) -> Tensor:
    """log p_sigma(x | y) up to a constant, [N] float64 on the CPU; energy [N]: E(x, sigma)."""
    return -problem.potential(x, energy, torch.tensor(sigma, dtype=torch.float64)).cpu()


def common_root(images: Tensor, labels: Tensor, modes: int) -> Tensor:
    """Cholesky factor [n, n] of the covariance of images [N, n] inside their modes.

    Raises torch.linalg.LinAlgError where there are too few images to tell.
    """
    counts = torch.bincount(labels, minlength=modes).clamp(min=1)
    means = torch.zeros(modes, images.shape[1], dtype=images.dtype).index_add_(0, labels, images)
    inside = images - (means / counts[:, None])[labels]
    return torch.linalg.cholesky(inside.T @ inside / (len(images) - modes))


def fit(images: Tensor, held_out: Tensor, shape: Tensor) -> Gaussian:
    """A Gaussian for images [M, n] of one mode, M >= 2.

    Its covariance is the sample covariance shrunk towards the common one, of Cholesky factor `shape`, scaled
    to the mode's own size (inverse Wishart prior); of PRIOR_STRENGTHS the one that suits images `held_out`.
    """
    count, dimension = images.shape
    mean = images.mean(0)

    def whiten(x: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(shape, (x - mean).T, upper=False).T

    white = whiten(images)
    scatter, axes = torch.linalg.eigh(white.T @ white)
    size = scatter.sum() / ((count - 1) * dimension)
    strength = dimension * torch.tensor(PRIOR_STRENGTHS, dtype=images.dtype)[:, None]
    # 1 / count: the mean itself is uncertain by as much.
    variance = (scatter.clamp(min=0) + strength * size) / (count - 1 + strength) * (1 + 1 / count)
    square = (whiten(held_out) @ axes).square().mean(0)
    std = variance[(square / variance + variance.log()).sum(1).argmin()].sqrt()
    # Symmetric in whitened coordinates: eigenvectors alone depend on LAPACK and the CPU.
    root = shape @ (axes * std) @ axes.T
    inverse = torch.linalg.solve_triangular(shape.T, axes / std @ axes.T, upper=True).T
    log_volume = (std.log().sum() + shape.diagonal().log().sum()).item()
    return Gaussian(mean, root, inverse, log_volume)


def acceptance_ratio(particles: Tensor, draws: Tensor) -> tuple[float, float]:
    """log Z and its variance, from log(p / g) at particles of p / Z and at draws of g (Bennett 1976).

    Both sets independent. Without overlap the variance is near one for each set, not infinite.
    """
    offset = math.log(len(particles) / len(draws))
    everything = torch.cat([particles, draws])
    low, high = everything.min().item() - abs(offset), everything.max().item() + abs(offset)
    for _ in range(60):
        middle = (low + high) / 2
        towards = torch.sigmoid(draws - middle + offset)
        back = torch.sigmoid(middle - offset - particles)
        low, high = (middle, high) if towards.sum() > back.sum() else (low, middle)

    def relative_variance(values: Tensor) -> float:
        return (values.var() / values.mean().square() / len(values)).item()

    return middle, relative_variance(towards) + relative_variance(back)


def log_masses(
    problem: Problem,
    x: Tensor,
    density: Tensor,
    sigma: float,
    labels: Tensor,
    families: Tensor,
    normals: Iterable[Tensor],
) -> Chains[LogMasses]:
    """The log mass of each mode from particles x [N, C, H, W], equally weighted; K = labels.max() + 1 modes.

    density [N]: log p at x and level sigma up to a constant, float64, on the CPU; labels [N]: mode of each,
    negative for none; families [N]: particles that have an ancestor in common, which must not test each
    other's fit. normals: standard normals [N, C, H, W] for draws, each for N NFE.
    """
    modes, dimension = int(labels.max()) + 1, x[0].numel()
    unknown = torch.full((modes,), torch.inf, dtype=torch.float64)
    if dimension > DIMENSIONS * math.sqrt(len(x)):
        return LogMasses(torch.zeros_like(unknown), unknown)
    images = x.double().flatten(1).cpu()
    fold = families.unique(return_inverse=True)[1].cpu() % FOLDS
    sizes = torch.bincount(labels.clamp(min=0) * FOLDS + fold, labels >= 0, modes * FOLDS).reshape(-1, FOLDS)
    # Every fold holds particles to test, and the other folds some to fit.
    usable = (sizes >= 2).all(1)
    try:
        fits = _fit_folds(images, labels, fold, usable)
    except torch.linalg.LinAlgError:
        return LogMasses(torch.zeros_like(unknown), unknown)
    at_particles = torch.zeros_like(density)
    for ours, gaussian in fits:
        at_particles[ours] = density[ours] - gaussian.log_density(images[ours])
    at_draws = []
    for normal in normals:
        drawn = normal.double().flatten(1).cpu()
        log_density = torch.zeros_like(density)
        for ours, gaussian in fits:
            drawn[ours] = gaussian.draw(drawn[ours])
            log_density[ours] = gaussian.log_density(drawn[ours])
        image = drawn.to(x).reshape(x.shape)
        energy, _ = yield Evaluate(image, levels_of(sigma, len(x), x))
        at_draws.append(log_posterior(problem, image, sigma, energy) - log_density)
    estimate, variance = torch.zeros_like(unknown), unknown
    for mode in usable.nonzero().flatten().tolist():
        ours = labels == mode
        # One equation for all folds: each Gaussian is normalised.
        draws = torch.cat([log_ratio[ours] for log_ratio in at_draws])
        estimate[mode], variance[mode] = acceptance_ratio(at_particles[ours], draws)
    return LogMasses(estimate, variance)


def _fit_folds(images: Tensor, labels: Tensor, fold: Tensor, usable: Tensor) -> list[tuple[Tensor, Gaussian]]:
    """For each fold of each usable mode its particles, as a mask [N], and a Gaussian fitted to the others."""
    fits = []
    for part in range(FOLDS):
        others = (labels >= 0) & (fold != part)
        shape = common_root(images[others], labels[others], len(usable))
        for mode in usable.nonzero().flatten().tolist():
            inside = labels == mode
            ours = inside & (fold == part)
            fits.append((ours, fit(images[inside & others], images[ours], shape)))
    return fits
