"""How many chains are enough: moments that merge, bounds of the need, and errors that meet their target."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import alpenglow as ag
from alpenglow.priors.mixture import GaussianMixturePrior
from alpenglow.samplers.chains import Population
from alpenglow.scheduler.core import Core
from alpenglow.scheduler.gathered import Gathered
from alpenglow.scheduler.moments import Moments, merge, merged
from alpenglow.scheduler.stopping import FIRST_ROUND, GROUPS, Target, chain_variance, need, next_round
from alpenglow.statistics import sample_statistics
from benchmarks.beds import gaussian, several_modes
from tests.scheduling import SHAPE, Independent, arguments, exact, queue, serve


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- Moments ---


def test_moments_merge_to_those_of_the_whole() -> None:
    images = (normals(57, 2, 3, 4) * 0.3 + 5).exp()
    parts = [images[:1], images[1:20], images[20:20], images[20:]]
    found = merged([Moments.of(part) for part in parts])
    centred = images.double() - images.double().mean(0)
    assert found.count == 57
    torch.testing.assert_close(found.mean, images.double().mean(0), rtol=1e-12, atol=0)
    for power, value in ((2, found.m2), (3, found.m3), (4, found.m4)):
        torch.testing.assert_close(value, centred.pow(power).sum(0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.variance, images.double().var(0), rtol=1e-12, atol=0)


def test_merging_does_not_depend_on_the_order_beyond_rounding() -> None:
    a, b, c = (Moments.of(normals(n, 1, 2, 2, seed=n)) for n in (5, 9, 31))
    left, right = merge(merge(a, b), c), merge(a, merge(c, b))
    for name in ("mean", "m2", "m3", "m4"):
        torch.testing.assert_close(getattr(left, name), getattr(right, name), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("resampled", [False, True])
def test_gathered_populations_have_the_statistics_of_all_samples(resampled: bool) -> None:
    images = normals(60, *SHAPE)
    ancestors = torch.arange(20).repeat_interleave(3).reshape(3, 20) // 2 if resampled else None
    gathered = Gathered.empty(SHAPE, keep_samples=False, seed=0)
    founders = []
    for i, part in enumerate(images.split(20)):
        own = None if ancestors is None else ancestors[i] - ancestors[i].min()
        founders.append(i * 20 + (torch.arange(20) if own is None else own))
        gathered = gathered.add(Population(part, torch.ones(20), own, {"modes": 1 + i}), 40)
    posterior = gathered.posterior({}, {})
    exact = sample_statistics(images, torch.cat(founders))
    torch.testing.assert_close(posterior.mean, exact.mean.float())
    # Errors come from residuals inside each population: its mean is estimated too, one of 20 degrees.
    torch.testing.assert_close(posterior.std, exact.std.float(), rtol=0.02, atol=0)
    ratio = torch.as_tensor(posterior.diagnostics["mcse"]) / exact.mcse
    assert ratio.mean().item() == pytest.approx(1, abs=0.1)
    assert posterior.diagnostics["lineages"] == exact.lineages
    assert posterior.diagnostics["modes"] == 3
    assert posterior.nfe == 2.0


def test_populations_that_disagree_widen_the_error() -> None:
    """Weights of modes are estimates: populations that landed in other masses say so."""
    gathered = Gathered.empty(SHAPE, keep_samples=True, seed=0)
    for i in range(6):
        images = 0.1 * normals(50, *SHAPE, seed=i) + (i % 2)
        gathered = gathered.add(Population(images, torch.ones(50), None, {"resamplings": 1}), 50)
    assert gathered.disagreement > 100
    # Means of six populations, 0 or 1: their mean has a standard error of sqrt(0.3 / 6).
    assert gathered.mcse.mean().item() == pytest.approx(math.sqrt(0.3 / 6), rel=0.05)
    posterior = gathered.posterior({}, {})
    assert posterior.effective_samples < 10


def test_between_and_inside_of_independent_populations_agree() -> None:
    gathered = Gathered.empty(SHAPE, keep_samples=False, seed=0)
    for i in range(40):
        gathered = gathered.add(Population(normals(25, *SHAPE, seed=i), torch.ones(25)), 25)
    # 39 x 16 degrees of freedom: standard error sqrt(2 / 624) = 0.057.
    assert gathered.disagreement == pytest.approx(1, abs=0.2)


# --- The need ---


def test_chain_variance_is_that_of_mean_and_std() -> None:
    gauss = Moments.of(normals(200_000, 1, 1, 1) * 0.5)
    assert chain_variance(gauss, 0.95) == pytest.approx(0.25, rel=0.02)
    # Laplace, of kurtosis 6: its std is known less well than its mean, var (6 - 1) / 4.
    uniform = torch.rand(400_000, generator=torch.Generator().manual_seed(0)) - 0.5
    laplace = -uniform.sign() * torch.log1p(-2 * uniform.abs())
    assert chain_variance(Moments.of(laplace.reshape(-1, 1, 1, 1)), 0.95) == pytest.approx(2 * 1.25, rel=0.05)
    assert chain_variance(Moments.of(torch.ones(10, 1, 1, 1)), 0.95) == 0


def test_the_quantile_is_over_pixels() -> None:
    scale = torch.arange(1.0, 21.0).reshape(1, 4, 5)
    moments = Moments.of(normals(20_000, 1, 4, 5) * scale)
    assert chain_variance(moments, 0.5) == pytest.approx(10**2, rel=0.05)
    assert chain_variance(moments, 0.95) == pytest.approx(19**2, rel=0.05)
    assert chain_variance(moments, 1.0) == pytest.approx(20**2, rel=0.05)


def stopped_at(draw: Callable[[int, int], Tensor], target: Target, shape: tuple[int, ...], run: int) -> int:
    """Chains that the rule takes of draws(count, seed) [count, C, H, W]."""
    groups, done, found, rounds = [Moments.empty(shape)] * GROUPS, 0, None, 0
    while count := next_round(done, found, 10**6):
        parts = draw(count, 1000 * run + rounds).tensor_split(GROUPS)
        groups = [merge(group, Moments.of(part)) for group, part in zip(groups, parts, strict=True)]
        done, rounds = done + count, rounds + 1
        found = need(groups, target)
    assert rounds <= 12
    return done


def exact_posterior(name: str) -> GaussianMixturePrior:
    return {"gaussian": gaussian, "several": several_modes}[name]().posterior


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gaussian", "several"])
def test_the_error_meets_its_target_at_little_more_than_the_least_cost(name: str) -> None:
    """200 runs on exact posterior samples: what the rule itself does, without the sampler's own error."""
    posterior = exact_posterior(name)
    many = posterior.sample(40_000, seed=7)
    per_chain = chain_variance(Moments.of(many), 0.95)
    least = 300
    target = Target(math.sqrt(per_chain / least))

    def draw(count: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return many[torch.randint(len(many), (count,), generator=generator)]

    taken = torch.tensor([stopped_at(draw, target, many.shape[1:], run) for run in range(200)]).double()
    # Of 200 runs 95 % may be 184 by chance (three standard errors of 3.1).
    assert (taken >= least).sum() >= 190
    assert (taken / least).mean() <= 1.3


# --- Requests with a target ---


@pytest.mark.slow
def test_requests_stop_when_their_error_is_met() -> None:
    """End to end: 20 requests with samples of the sampler, their real errors against very many chains."""
    prior, core, least = Independent(batch_size=64), Core(), 300
    options = {"method": "calibrated", "nfe": 20, "weigh": False}
    # What the sampler does at this few NFE is a little off the posterior: the oracle knows the sampler.
    many = ag.sample(prior, **arguments(**options, num_samples=8000, seed=-1))
    target = math.sqrt(many.std.square().max().item() / least)
    assert (many.std / exact()[1] - 1).abs().max() < 0.2
    runs = [
        queue(core, prior, 0, seed=seed, num_samples=None, target_error=target, **options)
        for seed in range(20)
    ]
    serve(core)
    taken, errors = [], []
    for run in runs:
        assert run.result is not None
        assert run.result.diagnostics["target_met"]
        taken.append(run.result.num_samples)
        errors.append((run.result.mean - many.mean).flatten())
    chains = torch.tensor(taken).double()
    assert (chains >= least).sum() >= 18
    assert chains.mean() / least <= 1.3
    # Over the runs the mean of a pixel is off by at most the target, root mean square, in 95 % of pixels;
    # 20 runs know it to 16 %.
    rms = torch.stack(errors).square().mean(0).sqrt()
    assert (rms <= 1.32 * target).double().mean() >= 0.9


def test_a_target_that_is_met_at_once_still_takes_a_first_round() -> None:
    posterior = ag.sample(Independent(), **arguments(num_samples=None), target_error=1.0)
    assert posterior.num_samples == FIRST_ROUND
    assert posterior.diagnostics["target_met"]
    assert "r_hat" in posterior.diagnostics


def test_num_samples_bounds_what_a_target_may_cost() -> None:
    posterior = ag.sample(Independent(), **arguments(num_samples=100), target_error=1e-6)
    assert posterior.num_samples == 100
    assert not posterior.diagnostics["target_met"]
    assert posterior.diagnostics["chains_needed"] > 10**6
    assert posterior.settings["target_error"] == 1e-6


def test_chains_of_a_target_are_those_of_a_number() -> None:
    prior = Independent()
    found = ag.sample(prior, **arguments(num_samples=None), target_error=0.012)
    assert found.num_samples > FIRST_ROUND
    fixed = ag.sample(prior, **arguments(num_samples=found.num_samples))
    assert found.samples is not None
    assert fixed.samples is not None
    assert torch.equal(found.samples, fixed.samples)
    assert torch.equal(found.mean, fixed.mean)
