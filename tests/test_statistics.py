"""Statistics over samples against batch formulas, closed forms and brute-force replicates."""

import itertools
import math

import arviz
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alpenglow import statistics
from alpenglow.statistics import Reservoir, RunningMoments

SHAPE = (2, 3, 4)


def draws(count: int, seed: int = 0, *, offset: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return offset + torch.randn(count, *SHAPE, generator=generator)


def stream(samples: torch.Tensor, cuts: list[int], weights: torch.Tensor | None = None) -> RunningMoments:
    moments = RunningMoments.empty(SHAPE)
    bounds = [0, *sorted(min(cut, len(samples)) for cut in cuts), len(samples)]
    for a, b in itertools.pairwise(bounds):
        moments = statistics.update(moments, samples[a:b], None if weights is None else weights[a:b])
    return moments


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 40), st.lists(st.integers(0, 40), max_size=6), st.integers(0, 99), st.floats(-1e4, 1e4))
def test_streaming_equals_batch(count: int, cuts: list[int], seed: int, offset: float) -> None:
    samples = draws(count, seed, offset=offset)
    moments = stream(samples, cuts)
    assert moments.count == count
    torch.testing.assert_close(moments.mean, samples.double().mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moments.std, samples.double().std(0), rtol=1e-9, atol=1e-12)


def test_variance_survives_a_large_mean() -> None:
    samples = draws(1000) * 0.01 + 1000
    expected = samples.double().std(0)
    torch.testing.assert_close(stream(samples, [1, 7, 500]).std, expected, rtol=1e-10, atol=0)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0, 5), min_size=3, max_size=20).filter(lambda w: sum(x > 0.01 for x in w) > 1))
def test_weights(weights: list[float]) -> None:
    samples, w = draws(len(weights)), torch.tensor(weights, dtype=torch.float64)
    moments = stream(samples, [2], w)
    mean = torch.tensordot(w / w.sum(), samples.double(), 1)
    variance = torch.tensordot(w, (samples - mean).square(), 1) / (w.sum() - w.square().sum() / w.sum())
    torch.testing.assert_close(moments.mean, mean)
    torch.testing.assert_close(moments.std, variance.sqrt())
    assert moments.effective_count == pytest.approx(w.sum().item() ** 2 / w.square().sum().item())


def test_weighted_variance_is_unbiased() -> None:
    generator = torch.Generator().manual_seed(1)
    samples = torch.randn(5, 1, 100, 200, generator=generator)
    weights = torch.tensor([3.0, 1.0, 0.5, 2.0, 0.1])
    moments = statistics.update(RunningMoments.empty((1, 100, 200)), samples, weights)
    assert moments.std.square().mean().item() == pytest.approx(1, abs=5 * math.sqrt(2 / 2 / 20000))


@settings(max_examples=25, deadline=None)
@given(st.tuples(*[st.integers(0, 12)] * 3), st.integers(0, 99))
def test_merge_is_associative_and_commutative(counts: tuple[int, ...], seed: int) -> None:
    a, b, c = (
        statistics.update(RunningMoments.empty(SHAPE), draws(n, seed + i, offset=i))
        for i, n in enumerate(counts)
    )
    left = statistics.merge(statistics.merge(a, b), c)
    for other in (statistics.merge(a, statistics.merge(b, c)), statistics.merge(c, statistics.merge(b, a))):
        assert left.count == other.count
        torch.testing.assert_close(left.mean, other.mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(left.m2, other.m2, rtol=1e-10, atol=1e-10)


def test_moments_refuse_bad_input() -> None:
    empty = RunningMoments.empty(SHAPE)
    assert empty.std.isnan().all()
    for weights in (torch.ones(2), torch.tensor([1.0, -1.0, 1.0]), torch.tensor([1.0, float("nan"), 1.0])):
        with pytest.raises(ValueError, match="weights must be"):
            statistics.update(empty, draws(3), weights)
    with pytest.raises(ValueError, match="expected"):
        statistics.update(empty, torch.zeros(2, 1, 3, 4))
    with pytest.raises(ValueError, match="merge"):
        statistics.merge(empty, RunningMoments.empty((1, 3, 4)))


@pytest.mark.parametrize("q", [0.0, 0.05, 0.5, 1.0, [0.1, 0.9]])
def test_quantile_is_exact(q: float | list[float]) -> None:
    samples = draws(37)
    expected = np.quantile(samples.numpy().astype(np.float64), q, axis=0)
    np.testing.assert_allclose(statistics.quantile(samples, q).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_quantile_of_more_elements_than_torch_takes() -> None:
    samples = torch.arange(5.0)[:, None, None, None].expand(5, 1, 1800, 2000)  # 18 million
    assert (statistics.quantile(samples, 0.25) == 1).all()


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(20)), st.integers(1, 19))
def test_reservoir_ignores_order_and_batches(order: list[int], cut: int) -> None:
    samples = draws(20)
    whole = statistics.collect(Reservoir.empty(SHAPE, capacity=8, seed=3), samples, torch.arange(20))
    parts = Reservoir.empty(SHAPE, capacity=8, seed=3)
    ids = torch.tensor(order)
    for chunk in (ids[:cut], ids[cut:]):
        parts = statistics.collect(parts, samples[chunk], chunk)
    assert parts.seen == whole.seen == 20
    torch.testing.assert_close(parts.samples, whole.samples, rtol=0, atol=0)


def test_reservoir_keeps_everything_up_to_its_capacity() -> None:
    samples = draws(9)
    kept = statistics.collect(Reservoir.empty(SHAPE, capacity=9), samples, torch.arange(9))
    torch.testing.assert_close(statistics.quantile(kept.samples, 0.3), statistics.quantile(samples, 0.3))


def test_reservoir_is_uniform_within_its_stated_error() -> None:
    # The kept share of the lowest 5 % of samples, over seeds: mean 0.05, standard error as documented (finite
    # population factor included).
    total, capacity, q, repeats = 2000, 256, 0.05, 400
    values = torch.arange(float(total)).reshape(-1, 1, 1, 1)
    shares = []
    for seed in range(repeats):
        kept = statistics.collect(
            Reservoir.empty((1, 1, 1), capacity=capacity, seed=seed), values, torch.arange(total)
        )
        shares.append((kept.samples < q * total).double().mean().item())
    error = math.sqrt(q * (1 - q) / capacity * (1 - capacity / total))
    assert np.mean(shares) == pytest.approx(q, abs=4 * error / math.sqrt(repeats))
    assert np.std(shares) == pytest.approx(error, rel=4 / math.sqrt(2 * repeats))


@pytest.mark.parametrize("count", [2, 8, 32])
@pytest.mark.parametrize("level", [0.5, 0.9])
def test_student_t_interval_covers_its_level(count: int, level: float) -> None:
    pixels = 40_000
    generator = torch.Generator().manual_seed(count)
    samples = 3 + 0.2 * torch.randn(count + 1, 1, 1, pixels, generator=generator, dtype=torch.float64)
    truth, rest = samples[0], samples[1:]
    lower, upper = statistics.student_t_interval(rest.mean(0), rest.std(0), count, level)
    covered = ((lower <= truth) & (truth <= upper)).double().mean().item()
    assert covered == pytest.approx(level, abs=4 * math.sqrt(level * (1 - level) / pixels))


def test_quantile_interval_of_few_samples_is_too_narrow() -> None:
    samples = torch.randn(33, 1, 1, 40_000, generator=torch.Generator().manual_seed(0))
    lower, upper = statistics.quantile_interval(samples[1:], 0.9)
    covered = ((lower <= samples[0]) & (samples[0] <= upper)).double().mean().item()
    assert covered == pytest.approx(0.848, abs=0.01)  # DESIGN 2


def test_independent_chains() -> None:
    samples = draws(20)
    result = statistics.sample_statistics(samples)
    torch.testing.assert_close(result.std, samples.double().std(0))
    torch.testing.assert_close(result.mcse, samples.double().std(0) / math.sqrt(20))
    torch.testing.assert_close(result.ess, torch.full(SHAPE, 20.0, dtype=torch.float64))
    assert (result.ess_pooled, result.lineages) == (pytest.approx(20), 20)


def population(share: float, pixels: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Samples of variance 1, `share` of it common to a lineage; ancestors; true variance of the mean."""
    generator = torch.Generator().manual_seed(5)
    ancestors = torch.randint(0, 40, (120,), generator=generator) * 7  # ids with gaps, in no order
    common = torch.randn(300, pixels, generator=generator)[ancestors]
    own = torch.randn(120, pixels, generator=generator)
    samples = math.sqrt(share) * common + math.sqrt(1 - share) * own
    weights = torch.bincount(ancestors) / 120
    variance = share * weights.square().sum().item() + (1 - share) / 120
    return samples.reshape(120, 1, 1, pixels), ancestors, variance


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_mcse_of_lineages_against_replicates(share: float) -> None:
    # Pixels are replicates of the whole population: the spread of their means is the true Monte Carlo error.
    samples, ancestors, variance = population(share, 10_000)
    result = statistics.sample_statistics(samples, ancestors)
    assert result.mean.var().item() == pytest.approx(variance, rel=0.06)
    assert result.mcse.square().mean().item() == pytest.approx(variance, rel=0.06)
    assert result.ess_pooled == pytest.approx(1 / variance, rel=0.06)
    assert result.std.square().mean().item() == pytest.approx(1, abs=0.02)
    assert result.lineages == len(ancestors.unique())
    assert (result.ess >= 1).all()
    assert (result.ess <= 120).all()


def test_predictive_interval_of_a_resampled_population() -> None:
    samples, ancestors, _ = population(1.0, 20_000)
    result = statistics.sample_statistics(samples, ancestors)
    truth = torch.randn(1, 1, 20_000, generator=torch.Generator().manual_seed(6))
    lower, upper = statistics.student_t_interval(result.mean, result.std, result.ess_pooled, 0.9)
    assert ((lower <= truth) & (truth <= upper)).double().mean().item() == pytest.approx(0.9, abs=0.01)


def test_one_lineage_knows_nothing_of_its_error() -> None:
    result = statistics.sample_statistics(draws(6), torch.full((6,), 3))
    assert result.mcse.isinf().all()
    assert (result.ess == 1).all()
    assert result.ess_pooled == 1
    torch.testing.assert_close(result.std, draws(6).double().std(0))
    with pytest.raises(ValueError, match="effective sample"):
        statistics.student_t_interval(result.mean, result.std, result.ess_pooled, 0.9)


def test_constant_pixels_and_a_single_sample() -> None:
    constant = statistics.sample_statistics(torch.ones(8, *SHAPE))
    assert (constant.std == 0).all()
    assert (constant.ess == 8).all()
    assert (statistics.r_hat(torch.ones(8, *SHAPE)) < 1.01).all()
    assert statistics.sample_statistics(draws(1)).std.isnan().all()


def test_r_hat_equals_arviz() -> None:
    samples = draws(42)
    got = statistics.r_hat(samples)
    for index in np.ndindex(SHAPE):
        chains = samples[:40][(slice(None), *index)].reshape(4, 10).numpy()
        assert got[index].item() == pytest.approx(arviz.rhat(chains, method="identity"), rel=1e-5)


def test_r_hat_sees_lineages_that_disagree() -> None:
    ancestors = torch.arange(64) % 4
    samples = draws(64)
    assert statistics.r_hat(samples, ancestors).max() < 1.3
    assert statistics.r_hat(samples + 3 * ancestors[:, None, None, None], ancestors).min() > 2
    with pytest.raises(ValueError, match="groups"):
        statistics.r_hat(draws(7))


def test_lineages_refuse_bad_input() -> None:
    for ancestors in (torch.arange(3), torch.zeros(4)):
        with pytest.raises(ValueError, match="ancestors"):
            statistics.sample_statistics(draws(4), ancestors)
    with pytest.raises(ValueError, match="samples"):
        statistics.sample_statistics(torch.zeros(4, 4))
    for level in (0, 1, 90):
        with pytest.raises(ValueError, match="level"):
            statistics.quantile_interval(draws(4), level)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        statistics.quantile(draws(4), 5)
