"""The moments of the diffused posterior, against dense matrices and closed forms; a network's path."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import alpenglow as ag
from alpenglow.operators.base import LinearOperator
from alpenglow.priors.mixture import GaussianPrior, smooth_covariance
from alpenglow.priors.protocol import denoise
from alpenglow.samplers import calibrated, moment_matching
from alpenglow.samplers.calibrated import CalibratedOptions, CalibratedPlan
from alpenglow.samplers.chains import drive
from alpenglow.samplers.methods import options_of
from alpenglow.samplers.problem import Noise, Problem, geometric_levels
from benchmarks.beds import gaussian, score, single_mode
from tests.test_sense_mri import bed as sense_bed

SIGMA = 0.4


def problem_of(operator: LinearOperator, shape: tuple[int, int, int] = (1, 6, 6)) -> Problem:
    """A smooth Gaussian of pixel std 0.3, seen with eta 0.1."""
    prior = GaussianPrior(torch.zeros(shape), smooth_covariance(shape, std=0.3, length=1.5))
    y = operator.forward(prior.sample(1, seed=1).float())
    return Problem(prior, operator, y, 0.1)


def images_at(problem: Problem, sigma: float, count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(count, *problem.image_shape, generator=generator)
    return problem.prior.sample(count, seed=4).float() + sigma * noise  # type: ignore[attr-defined]


def dense_mean(problem: Problem, x: Tensor, sigma: float) -> Tensor:
    """E[x | x_sigma, y] of a Gaussian prior: both are measurements of x with independent noise."""
    prior: Any = problem.prior
    n = x[0].numel()
    basis = torch.eye(n).reshape(n, *problem.image_shape)
    seen = problem.operator.forward(basis).reshape(n, -1)
    data = problem.y.reshape(1, -1)
    if seen.is_complex():
        seen, data = (torch.view_as_real(t).flatten(1) for t in (seen, data))
    A, y = seen.T.double(), data.double()
    precision = prior.covariances[0].inverse() + torch.eye(n) / sigma**2 + A.T @ A / problem.noise_std**2
    pull = prior.means[0].flatten() @ prior.covariances[0].inverse().T
    pull = pull + x.double().flatten(1) / sigma**2 + y @ A / problem.noise_std**2
    return torch.linalg.solve(precision, pull.T).T.reshape(x.shape)


def test_the_mean_is_exact_where_one_number_is_measured() -> None:
    """One step of steepest descent solves a system of one equation, whatever C is."""
    mask = torch.zeros(6, 6).index_fill(0, torch.tensor([2]), 0.0)
    mask[2, 3] = 1
    problem = problem_of(ag.operators.Inpainting(mask))
    x = images_at(problem, SIGMA)
    mean = drive(moment_matching.posterior_mean(problem, x, SIGMA), problem)
    torch.testing.assert_close(mean.double(), dense_mean(problem, x, SIGMA), rtol=1e-3, atol=1e-4)
    # The measurement reaches pixels that were not seen, which no step of the static posterior does.
    denoised = denoise(problem.prior, x, torch.full((3,), SIGMA))
    assert ((mean - denoised)[:, 0, 2, 2] / (mean - denoised)[:, 0, 2, 3]).min() > 0.3


def test_the_mean_is_exact_where_two_numbers_are_measured() -> None:
    """Two steps of conjugate gradients solve two equations, also where C ties them together."""
    mask = torch.zeros(6, 6)
    mask[2, 3] = mask[4, 3] = 1
    problem = problem_of(ag.operators.Inpainting(mask))
    x = images_at(problem, SIGMA)
    mean = drive(moment_matching.posterior_mean(problem, x, SIGMA), problem)
    torch.testing.assert_close(mean.double(), dense_mean(problem, x, SIGMA), rtol=1e-3, atol=1e-4)


def test_the_mean_is_exact_for_a_white_prior_with_orthogonal_measurements() -> None:
    shape = (1, 4, 4)
    prior = GaussianPrior(torch.full(shape, 0.2), 0.09 * torch.eye(16))
    operator = ag.operators.Inpainting((torch.arange(16) % 3 == 0).float().reshape(4, 4))
    problem = Problem(prior, operator, operator.forward(prior.sample(1, seed=1).float()), 0.1)
    x = images_at(problem, SIGMA)
    mean = drive(moment_matching.posterior_mean(problem, x, SIGMA), problem)
    torch.testing.assert_close(mean.double(), dense_mean(problem, x, SIGMA), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sigma", [0.1, 0.4, 2.0])
@pytest.mark.parametrize("name", ["half", "blur", "super-resolution", "k-space of real images"])
def test_the_steps_near_the_exact_mean(name: str, sigma: float) -> None:
    """Conjugate gradients in the energy norm of the system lower the error of m along C A^T."""
    generator = torch.Generator().manual_seed(0)
    operators: dict[str, LinearOperator] = {
        "half": ag.operators.Inpainting(torch.rand(6, 6, generator=generator) < 0.5),
        "blur": ag.operators.GaussianBlur(1.0),
        "super-resolution": ag.operators.SuperResolution(2),
        "k-space of real images": ag.operators.FourierSampling(
            torch.rand(6, 6, generator=generator) < 0.5, channels=1
        ),
    }
    problem = problem_of(operators[name])
    x = images_at(problem, sigma)
    exact = dense_mean(problem, x, sigma)
    mean = drive(moment_matching.posterior_mean(problem, x, sigma), problem)
    denoised = denoise(problem.prior, x, torch.full((3,), sigma))
    before, after = ((m.double() - exact).flatten(1).norm(dim=1) for m in (denoised, mean))
    assert (after < (0.75 if moment_matching.steps_at(sigma) == 1 else 0.2) * before).all()


def test_the_mean_under_coils_is_nearer_too() -> None:
    prior, operator, y, noise_std = sense_bed("points")
    problem = Problem(prior, operator, y, noise_std)
    x = images_at(problem, SIGMA)
    exact = dense_mean(problem, x, SIGMA)
    mean = drive(moment_matching.posterior_mean(problem, x, SIGMA), problem)
    denoised = denoise(prior, x, torch.full((3,), SIGMA))
    assert ((mean - exact).flatten(1).norm(dim=1) < 0.5 * (denoised - exact).flatten(1).norm(dim=1)).all()


class Wrong:
    """A prior whose gradient turns images over: its C is negative at every level below 1."""

    image_shape = (1, 4, 4)

    def energy_and_grad(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return x.flatten(1).square().sum(1), 2 * x


def test_a_negative_covariance_leaves_the_denoised_image() -> None:
    problem = Problem(Wrong(), ag.operators.Inpainting(torch.eye(4)), torch.ones(1, 1, 4, 4), 0.1)
    x = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    mean = drive(moment_matching.posterior_mean(problem, x, 0.5), problem)
    torch.testing.assert_close(mean, -x)


def test_where_nothing_is_measured_the_samples_are_the_prior_s() -> None:
    prior = GaussianPrior(torch.full((1, 4, 4), 0.2), 0.09 * torch.eye(16))
    operator, count = LinearOperator.from_functions(lambda x: 0 * x, lambda y: 0 * y), 1000
    posterior = ag.sample(
        prior, operator, torch.zeros(1, 4, 4), noise_std=0.1, num_samples=count, nfe=60, gradient_error=0.2
    )
    # Standard errors: 0.032 stds of a mean, 0.022 of a std.
    assert ((posterior.mean - 0.2) / 0.3).abs().max() < 4 * 0.032
    assert (posterior.std / 0.3 - 1).abs().max() < 4 * 0.022 + 0.03


def test_the_stretch_bounds_how_far_a_vanishing_covariance_reaches() -> None:
    """C next to 0 asks for any multiple of the step; the limit is `stretch` times that of C = s^2."""
    shape = (1, 4, 4)
    prior = GaussianPrior(torch.zeros(shape), 1e-6 * torch.eye(16))
    problem = Problem(prior, ag.operators.Inpainting(torch.ones(4, 4)), torch.ones(1, *shape), 1e-3)
    x = torch.zeros(1, *shape)
    sigma, s2 = 0.5, 0.125
    for stretch in (1.0, 3.0):
        mean = drive(moment_matching.posterior_mean(problem, x, sigma, stretch=stretch), problem)
        C = 1e-6 * sigma**2 / (sigma**2 + 1e-6)
        expected = torch.full(shape, min(C / (C + 1e-6), stretch * C / (s2 + 1e-6)))
        # C is a difference of two G that are nearly x: rounding leaves it 1e-3 of sigma^2 / 0.25 at worst.
        torch.testing.assert_close(mean[0], expected, rtol=0.3, atol=1e-6)


def test_chains_of_the_diffused_posterior_have_its_moments() -> None:
    """White prior and a mask, for which m is exact: N(posterior mean, posterior variance + sigma^2)."""
    shape, eta, last = (1, 4, 4), 0.1, 0.2
    prior = GaussianPrior(torch.full(shape, 0.2), 0.09 * torch.eye(16))
    mask = (torch.arange(16) % 2 == 0).float().reshape(4, 4)
    operator = ag.operators.Inpainting(mask)
    y = operator.forward(prior.sample(1, seed=1).float())
    problem = Problem(prior, operator, y, eta)
    count = 4000
    levels = geometric_levels(20.0, last, 40)
    x, diverged = drive(moment_matching.descend(problem, Noise(0, torch.arange(count)), levels), problem)
    assert not diverged.any()
    exact = prior.posterior(operator, y, eta)
    std = (exact.std.square() + last**2).sqrt()
    # Standard errors: 1 / sqrt(4000) = 0.016 stds of a mean, 1 / sqrt(8000) = 0.011 of a std, relative.
    assert ((x.mean(0) - exact.mean) / std).abs().max() < 4 * 0.016 + 0.01
    assert (x.std(0) / std - 1).abs().max() < 4 * 0.011 + 0.01


def test_chains_that_fly_off_are_held_and_named() -> None:
    class Explosive(Wrong):
        """Throws out images whose mean is above 0.5, at first about two in five chains."""

        def energy_and_grad(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
            mean = x.mean((1, 2, 3), keepdim=True)
            return x.flatten(1).sum(1), torch.where(mean > 0.5, -1e30, 1.0) * x

    problem = Problem(Explosive(), ag.operators.Inpainting(torch.eye(4)), torch.zeros(1, 1, 4, 4), 0.1)
    x, diverged = drive(
        moment_matching.descend(problem, Noise(0, torch.arange(32)), geometric_levels(2.0, 0.1, 10)), problem
    )
    assert diverged.any()
    assert not diverged.all()
    assert x.isfinite().all()


def test_levels_and_cost_of_a_network_s_chains() -> None:
    plan = CalibratedPlan(CalibratedOptions(nfe=100, sigma_min=0.04, gradient_error=0.2), float("inf"))
    assert (plan.descent[0], plan.descent[-1]) == (20.0, pytest.approx(plan.annealed[0]))
    assert (plan.annealed[0], plan.annealed[-1]) == (pytest.approx(0.2), pytest.approx(0.04))
    # 2 NFE a level, 3 below sigma 1, none at the last; 1 a level after it, and 1 to remove the last noise.
    spent = sum(2 if sigma > 1 else 3 for sigma in plan.descent[:-1]) + len(plan.annealed) + 1
    assert 97 <= spent <= 100
    assert calibrated.pilot_nfe(plan.options) == 0


@pytest.mark.parametrize("nfe", [1, 2, 3, 7, 50])
def test_few_nfe_are_kept_to(nfe: int) -> None:
    bed = gaussian()
    posterior = ag.sample(
        bed.prior, bed.operator, bed.y, noise_std=bed.noise_std, num_samples=4, nfe=nfe, gradient_error=0.2
    )
    assert max(nfe - 1, 2) <= posterior.nfe <= max(nfe, 2)


@pytest.mark.slow
def test_independent_chains_of_the_diffused_posterior_find_the_mode_that_the_measurement_picks() -> None:
    """The static path leaves half of the chains in dead modes at this cost (docs/calibration.md)."""
    bed = single_mode()
    options: dict[str, Any] = {"noise_std": bed.noise_std, "num_samples": 500, "weigh": False, "nfe": 100}
    static = ag.sample(bed.prior, bed.operator, bed.y, **options)
    moments = ag.sample(bed.prior, bed.operator, bed.y, gradient_error=0.2, **options)
    assert static.samples is not None
    assert moments.samples is not None
    wrong = [score(bed, posterior.samples).mode_error for posterior in (static, moments)]
    # Standard error of a share of 0.1 of 500 chains: 0.013.
    assert wrong[1] < 0.1 + 3 * 0.013 < wrong[0]


@pytest.mark.slow
def test_a_network_s_samples_are_nearer_to_the_truth_than_those_of_the_static_path() -> None:
    """Two fashion-28 images, 80 % of the pixels hidden: the static path, at the same cost, lags behind."""
    from alpenglow.demo import held_out_images
    from alpenglow.jobs import simulate, with_floor
    from alpenglow.operator_specs import random_mask

    prior = ag.load_prior("fashion-28", batch_size=32)
    truths = with_floor(held_out_images()[:2], 0.02, 0)
    operator = ag.operators.Inpainting(random_mask(prior.image_shape, 0.2, seed=0))
    options = options_of("calibrated", {"nfe": 100}, prior)
    errors = []
    for seed, truth in enumerate(truths):
        y = simulate(operator, truth, 0.05, seed)
        problem, noise = Problem(prior, operator, y[None], 0.05), Noise(0, torch.arange(32))
        plan = CalibratedPlan(options, float("inf"))
        levels = geometric_levels(20.0, options.sigma_min, 99)
        static = drive(calibrated.anneal(problem, noise, levels, pace=plan.pace, weigh=False), problem).x
        moments = drive(calibrated.chains(problem, noise, plan), problem).samples
        errors.append([(x.mean(0) - truth).square().mean() for x in (static, moments)])
        assert (moments - truth).square().mean() < (static - truth).square().mean()
    static_error, error = torch.tensor(errors).mean(0)
    assert error < 0.95 * static_error


def test_the_measurement_takes_hold_of_its_part() -> None:
    """Seen pixels get N(y, P) where eta is far below sigma; pixels that were not seen stay as they are."""
    count, sigma, eta = 4000, 0.2, 0.02
    operator = ag.operators.Inpainting(torch.tensor([[1.0, 0.0]]))
    prior = GaussianPrior(torch.zeros(1, 1, 2), torch.eye(2))
    problem = Problem(prior, operator, torch.tensor([[[[0.7, 0.0]]]]), eta)
    x = torch.randn(count, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    held = moment_matching.hold(problem, Noise(0, torch.arange(count)).at(1), x, sigma)[:, 0, 0]
    torch.testing.assert_close(held[:, 1], x[:, 0, 0, 1])
    f, wide = (eta**2 / (eta**2 + level**2) for level in (sigma, moment_matching.PIXEL_STD))
    rest = held[:, 0] - f * x[:, 0, 0, 0]
    std = (1 - wide) * math.sqrt(f) * sigma
    # Standard errors of 4 000 draws: 0.016 stds of the mean, 0.011 of the std.
    assert abs(rest.mean() - (1 - f) * 0.7) < 4 * 0.016 * std
    assert rest.std().item() == pytest.approx(std, rel=4 * 0.011)


@pytest.mark.parametrize("eta", [0.02, 0.1, 0.2])
def test_a_wide_posterior_keeps_its_variance_under_the_hold(eta: float) -> None:
    """x ~ N(y, eta^2), diffused to sigma: p_sigma(x | y) of a flat prior is N(y, eta^2) again."""
    count, sigma = 4000, 0.1
    prior = GaussianPrior(torch.zeros(1, 1, 1), torch.eye(1))
    problem = Problem(prior, ag.operators.Denoising(), torch.full((1, 1, 1, 1), 0.3), eta)
    generator = torch.Generator().manual_seed(0)
    x = 0.3 + math.hypot(eta, sigma) * torch.randn(count, 1, 1, 1, generator=generator)
    held = moment_matching.hold(problem, Noise(0, torch.arange(count)).at(1), x, sigma)
    # The prior's width of 0.5 leaves up to eta^2 / (eta^2 + 0.25) out; standard errors as above.
    assert abs(held.mean() - 0.3) < 4 * 0.016 * eta
    assert held.std().item() == pytest.approx(eta, rel=4 * 0.011 + eta**2 / (eta**2 + 0.25))


def test_measured_pixels_reach_the_data_however_few_steps_there_are() -> None:
    bed = gaussian()
    y = bed.operator.forward(bed.prior.sample(1, seed=1).float())
    eta = 0.005
    posterior = ag.sample(
        bed.prior, bed.operator, y, noise_std=eta, num_samples=200, nfe=8, gradient_error=0.2
    )
    seen = bed.operator.mask.expand(posterior.mean.shape)  # type: ignore[attr-defined]
    # y has no noise: the mean of a seen pixel is y up to a share of eta, and its std at most eta.
    assert (posterior.mean - y[0])[seen].abs().max() < eta
    assert posterior.std[seen].max() < 1.3 * eta
