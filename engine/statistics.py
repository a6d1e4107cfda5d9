"""Statistics over posterior samples: streaming moments, quantiles, intervals and Monte Carlo error.

Each chain contributes ONE final sample. Chains are independent, unless a particle population was
resampled: then samples that descend from one founding chain share a lineage, which `ancestors` [N] names.
Everything accumulates in float64 whatever the dtype of the samples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.special import stdtrit  # scipy.stats takes half a second more to import
from torch import Tensor


@dataclass(frozen=True)
class RunningMoments:
    """Weighted mean and variance of a stream of images, per pixel.

    count: sum of the weights; squares: sum of their squares; mean, m2 [C, H, W] float64, m2 the weighted sum
    of squared deviations from the mean.
    """

    count: float
    squares: float
    mean: Tensor
    m2: Tensor

    @classmethod
    def empty(cls, image_shape: Sequence[int], device: torch.device | str = "cpu") -> "RunningMoments":
        """Moments of no image yet."""
        zeros = torch.zeros(tuple(image_shape), dtype=torch.float64, device=device)
        return cls(0.0, 0.0, zeros, zeros)

    @property
    def effective_count(self) -> float:
        """Kish's effective number of samples, (sum w)^2 / sum w^2; N for equal weights."""
        return self.count**2 / self.squares if self.squares else 0.0

    @property
    def std(self) -> Tensor:
        """Standard deviation [C, H, W] from the unbiased variance; NaN below two effective samples."""
        # For weights that say how reliable a sample is, m2 / (V1 - V2 / V1) is unbiased; N - 1 for weights 1.
        freedom = self.count - self.squares / self.count if self.count else 0.0
        return (self.m2 / freedom).sqrt() if freedom > 0 else torch.full_like(self.m2, float("nan"))


def update(moments: RunningMoments, batch: Tensor, weights: Tensor | None = None) -> RunningMoments:
    """Moments with the images `batch` [B, C, H, W] added, of weights [B] >= 0 (1 if not given).

    Raises ValueError on other shapes and on weights that are negative or not finite.
    """
    if batch.shape[1:] != moments.mean.shape:
        raise ValueError(
            f"got a batch {tuple(batch.shape)}; expected [B, {', '.join(map(str, moments.mean.shape))}]"
        )
    if len(batch) == 0:
        return moments
    if weights is None:
        images = batch.to(moments.mean.device, torch.float64)
        mean = images.mean(0)
        added = RunningMoments(float(len(batch)), float(len(batch)), mean, (images - mean).square().sum(0))
        return merge(moments, added)
    if weights.shape != batch.shape[:1] or not (weights.isfinite() & (weights >= 0)).all():
        raise ValueError(f"weights must be [{len(batch)}], finite and not negative; got {weights}")
    images, w = (t.to(moments.mean.device, torch.float64) for t in (batch, weights))
    count = w.sum().item()
    if count == 0:
        return moments
    mean = torch.tensordot(w / count, images, 1)
    m2 = torch.tensordot(w, (images - mean).square(), 1)
    return merge(moments, RunningMoments(count, w.square().sum().item(), mean, m2))


def merge(a: RunningMoments, b: RunningMoments) -> RunningMoments:
    """Moments of both streams together (Chan, Golub & LeVeque 1983, eq. 2.1)."""
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"cannot merge moments of images {tuple(a.mean.shape)} and {tuple(b.mean.shape)}")
    count = a.count + b.count
    if count == 0:
        return a
    delta = b.mean - a.mean
    share = b.count / count
    return RunningMoments(
        count, a.squares + b.squares, a.mean + delta * share, a.m2 + b.m2 + delta.square() * (a.count * share)
    )


@dataclass(frozen=True)
class Entry:
    """What a sample needs to enter a reservoir: a key above `least`, by `seed` and its chain id."""

    capacity: int
    seed: int
    least: float


@dataclass(frozen=True)
class Reservoir:
    """A uniform random subset, of at most `capacity` whole samples, of a stream of samples.

    Quantiles of it are exact while no more than `capacity` samples were seen. After that the empirical
    probability of a level-q quantile has standard error sqrt(q (1 - q) / capacity): 0.014 at q = 0.05 for
    256. Which samples stay depends on seed and chain ids alone, neither on batches nor on their order. keys
    [k] float64 in descending order; samples [k, C, H, W].
    """

    capacity: int
    seed: int
    seen: int
    keys: Tensor
    samples: Tensor

    @classmethod
    def empty(
        cls,
        image_shape: Sequence[int],
        *,
        capacity: int = 256,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> "Reservoir":
        """A reservoir that has seen nothing. Raises ValueError unless capacity is at least 1."""
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        keys = torch.empty(0, dtype=torch.float64, device=device)
        return cls(capacity, seed, 0, keys, torch.empty(0, *image_shape, device=device))

    @property
    def entry(self) -> Entry:
        """What a further sample needs to enter."""
        full = len(self.keys) == self.capacity
        return Entry(self.capacity, self.seed, self.keys[-1].item() if full else -1.0)


def _uniform_keys(chains: Tensor, seed: int) -> Tensor:
    """One number in [0, 1) for each chain id (SplitMix64: Steele, Lea & Flood 2014)."""

    def mix(z: np.ndarray) -> np.ndarray:
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    start = mix(np.array([seed % 2**64], dtype=np.uint64))
    ids = chains.cpu().numpy().astype(np.uint64)
    bits = mix(start + (ids + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
    return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def collect(reservoir: Reservoir, batch: Tensor, chains: Tensor) -> Reservoir:
    """The reservoir after the samples `batch` [B, C, H, W] of the chains with unique ids `chains` [B].

    Raises ValueError on other shapes.
    """
    if batch.shape[1:] != reservoir.samples.shape[1:] or chains.shape != batch.shape[:1]:
        raise ValueError(
            f"got a batch {tuple(batch.shape)} and chain ids {tuple(chains.shape)}; expected samples "
            f"{tuple(reservoir.samples.shape[1:])} and one id a sample"
        )
    return unite(reservoir, candidates(reservoir.entry, batch, chains))


def candidates(entry: Entry, batch: Tensor, chains: Tensor) -> Reservoir:
    """Those of the samples `batch` [B, C, H, W], chains `chains` [B], that may enter a reservoir."""
    keys = _uniform_keys(chains, entry.seed)
    best = keys.topk(min(entry.capacity, len(keys)))
    kept = best.indices[best.values > entry.least]
    samples = batch[kept.to(batch.device)]
    return Reservoir(entry.capacity, entry.seed, len(batch), keys[kept].to(batch.device), samples)


def unite(reservoir: Reservoir, other: Reservoir) -> Reservoir:
    """The reservoir of both streams, whose chains differ, on the device of the first."""
    keys = torch.cat([reservoir.keys, other.keys.to(reservoir.keys.device)])
    kept = keys.topk(min(reservoir.capacity, len(keys))).indices
    samples = torch.cat([reservoir.samples, other.samples.to(reservoir.samples)])[kept]
    return replace(reservoir, seen=reservoir.seen + other.seen, keys=keys[kept], samples=samples)


def _by_pixels(function: Callable[[Tensor], Tensor], samples: Tensor) -> Tensor:
    """function([N, p]) -> [..., p] over blocks of pixels of samples [N, C, H, W]: [..., C, H, W].

    Bounds the float64 copies to 32 MB, and stays below the element limit of torch.quantile.
    """
    blocks = samples.flatten(1).split(max(1, 2**22 // len(samples)), dim=1)
    result = torch.cat([function(block) for block in blocks], dim=-1)
    return result.reshape(*result.shape[:-1], *samples.shape[1:])


@dataclass(frozen=True)
class SampleStatistics:
    """Per-pixel statistics [C, H, W] float64 of N samples in `lineages` lineages.

    mcse: Monte Carlo standard error of the mean. ess: effective number of samples, (std / mcse)^2 in [1, N].
    ess_pooled: the same from variances summed over pixels, which varies much less than one pixel's.
    """

    mean: Tensor
    std: Tensor
    mcse: Tensor
    ess: Tensor
    ess_pooled: float
    lineages: int


def sample_statistics(samples: Tensor, ancestors: Tensor | None = None) -> SampleStatistics:
    """Mean, std, MCSE and ESS of samples [N, C, H, W] whose founding chains are `ancestors` [N] (all distinct
    if None).

    mcse^2 = sum over lineages l of (R_l / N)^2 / (1 - n_l / N), R_l the sum of the residuals of its n_l
    samples: the cluster-robust variance of a mean with the CR2 correction of Bell & McCaffrey (2002). std^2
    is the mean squared residual plus mcse^2. Without resampling these are std / sqrt(N), the unbiased
    variance, and ESS = N. The weights of a particle population are assumed equal (after resampling). Samples
    of one lineage say nothing about the error of their mean: mcse is then infinite and ess 1. With N = 1 std
    is NaN.

    What ESS cannot see: an error that all chains share, such as annealing into the wrong modes.
    """
    N = len(samples)
    lineage = _lineages(samples, ancestors)
    sizes = torch.bincount(lineage).double()
    lineages = len(sizes)
    correction = (1 - sizes / N)[:, None]

    def moments(block: Tensor) -> Tensor:
        block = block.double()
        mean = block.mean(0)
        residual = block - mean
        variance = residual.square().mean(0)
        if lineages == 1:
            unbiased = variance * (N / (N - 1)) if N > 1 else torch.full_like(variance, float("nan"))
            return torch.stack([mean, unbiased, torch.full_like(mean, float("inf"))])
        sums = residual.new_zeros(lineages, block.shape[1]).index_add_(0, lineage, residual)
        squared_error = ((sums / N).square() / correction).sum(0)
        return torch.stack([mean, variance + squared_error, squared_error])

    mean, variance, squared_error = _by_pixels(moments, samples)
    ess = (
        torch.where(variance == 0, float(N), variance / squared_error)
        if lineages > 1
        else torch.ones_like(mean)
    )
    total, error = variance.sum().item(), squared_error.sum().item()
    pooled = 1.0 if lineages == 1 else float(N) if error == 0 else total / error
    return SampleStatistics(
        mean,
        variance.sqrt(),
        squared_error.sqrt(),
        ess.clamp(1, N),
        min(max(pooled, 1.0), float(N)),
        lineages,
    )


def _lineages(samples: Tensor, ancestors: Tensor | None) -> Tensor:
    """Lineage numbers [N] from 0 without gaps."""
    if samples.ndim != 4 or len(samples) == 0 or not samples.is_floating_point():
        raise ValueError(
            f"got samples {samples.dtype} {tuple(samples.shape)}; expected real [N, C, H, W], N at least 1"
        )
    if ancestors is None:
        return torch.arange(len(samples), device=samples.device)
    if ancestors.shape != samples.shape[:1] or ancestors.is_floating_point() or ancestors.is_complex():
        raise ValueError(
            f"got ancestors {ancestors.dtype} {tuple(ancestors.shape)}; expected {len(samples)} integers, "
            "the founding chain of each sample"
        )
    return torch.unique(ancestors.to(samples.device), return_inverse=True)[1]


def r_hat(samples: Tensor, ancestors: Tensor | None = None, *, groups: int = 4) -> Tensor:
    """Gelman-Rubin statistic [C, H, W] between `groups` equal groups of samples [N, C, H, W].

    The groups stand in for chains: samples are sorted by lineage (stably) and cut into equal parts, so that a
    lineage falls into one group except at the cuts; up to groups - 1 samples are left out. Values well above
    those of independent samples say that lineages disagree: few ancestors took over, and the spread within a
    group does not cover the spread between groups. Independent samples always pass, whatever the sampler did:
    about 1 + (chi2 / (groups - 1) - 1) groups / (2 N), chi2 of groups - 1 degrees of freedom. With 64 samples
    that is 1.05 at the 95th percentile of pixels and 1.15 at the worst of 784: the usual threshold of 1.01
    does not apply. Gelman & Rubin 1992 without rank normalisation, as arviz.rhat(method="identity") pixel by
    pixel. Raises ValueError with less than 2 groups or 2 samples a group.
    """
    lineage = _lineages(samples, ancestors)
    n = len(samples) // groups if groups >= 2 else 0
    if n < 2:
        raise ValueError(
            f"{len(samples)} samples in {groups} groups; expected 2 or more groups of 2 or more samples"
        )
    order = lineage.argsort(stable=True)[: n * groups]

    def statistic(block: Tensor) -> Tensor:
        chains = block[order].double().reshape(groups, n, -1)
        within = chains.var(1).mean(0)
        between = chains.mean(1).var(0)
        ratio = torch.where(between == 0, 0.0, between / within)  # a constant pixel agrees
        return ((n - 1) / n + ratio).sqrt()

    return _by_pixels(statistic, samples)


def quantile(samples: Tensor, q: float | Sequence[float]) -> Tensor:
    """Quantiles over samples [N, ...], linear between order statistics: [...] for one q, [Q, ...] for
    several.

    Raises ValueError unless every q lies in [0, 1].
    """
    levels = torch.as_tensor(q, dtype=torch.float64)
    if levels.ndim > 1 or not ((levels >= 0) & (levels <= 1)).all():
        raise ValueError(f"quantile levels must lie in [0, 1], got {q}")
    levels = levels.to(samples.device, torch.promote_types(samples.dtype, torch.float32))
    return _by_pixels(lambda block: torch.quantile(block.to(levels.dtype), levels, dim=0), samples)


def quantile_interval(samples: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """Central interval between the (1 -+ level) / 2 sample quantiles; too narrow for few samples (0.848 for
    32 at 0.9)."""
    _check_level(level)
    lower, upper = quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return lower, upper


def student_t_interval(mean: Tensor, std: Tensor, count: float, level: float) -> tuple[Tensor, Tensor]:
    """Predictive interval for a new draw, mean -+ t std sqrt(1 + 1 / count), t with count - 1 degrees of
    freedom.

    Covers `level` exactly for any count where marginals are Gaussian. count: the (effective) number of
    samples behind mean and std. Raises ValueError unless level lies in (0, 1) and count exceeds 1.
    """
    _check_level(level)
    if not count > 1:
        raise ValueError(
            f"a predictive interval needs more than 1 effective sample, got {count:.3g}; draw more samples "
            "(more chains, where all samples descend from one)"
        )
    half = std * (float(stdtrit(count - 1, (1 + level) / 2)) * (1 + 1 / count) ** 0.5)
    return mean - half, mean + half


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1 (0.9 for a 90 % interval), got {level}")
