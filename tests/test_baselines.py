"""DPS and DAPS against their published update equations, in float64 and by other means than their code."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from tiny import random_denoiser
from torch import Tensor

from alpenglow import operators
from alpenglow.jobs import simulate
from alpenglow.mri_simulation import simulate_coil_maps
from alpenglow.operators import kspace_masks
from alpenglow.operators.base import LinearOperator
from alpenglow.priors.mixture import GaussianPrior, dense_matrix, flatten_measurement, smooth_covariance
from alpenglow.priors.network import NetworkPrior
from alpenglow.priors.protocol import denoise
from benchmarks.baselines import daps, dps
from benchmarks.baselines.denoisers import Denoiser, denoiser_of

SIDE = 4
OPERATORS: dict[str, tuple[int, LinearOperator]] = {
    "inpainting": (1, operators.Inpainting(torch.eye(SIDE) < 0.5)),
    "blur": (1, operators.GaussianBlur(1.0)),
    "super-resolution": (1, operators.SuperResolution(2)),
    "MRI": (
        2,
        operators.SenseMRI(
            simulate_coil_maps(2, (SIDE, SIDE))[0].to(torch.complex128),
            kspace_masks.random_1d((SIDE, SIDE), 2.0, calibration=0.0),
        ),
    ),
}


def gaussian(channels: int) -> tuple[GaussianPrior, Denoiser]:
    shape = (channels, SIDE, SIDE)
    prior = GaussianPrior(torch.full(shape, 0.2), smooth_covariance(shape, std=0.5, length=1.5))
    return prior, lambda x, sigma: denoise(prior, x, sigma)


def independent(std: float) -> Denoiser:
    """The denoiser of pixels N(0, std^2)."""
    return lambda x, sigma: x * (std**2 / (std**2 + sigma.square().reshape(-1, 1, 1, 1)))


def measured(operator: LinearOperator, prior: GaussianPrior) -> Tensor:
    return simulate(operator, prior.sample(1, seed=3)[0], 0.1, seed=4)[None]


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("i", [2, 400, 900])
def test_a_dps_step_is_that_of_the_paper(name: str, i: int) -> None:
    channels, operator = OPERATORS[name]
    prior, denoiser = gaussian(channels)
    y = measured(operator, prior)
    generator = torch.Generator().manual_seed(0)
    shape = (1, channels, SIDE, SIDE)
    x, z = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))

    # Algorithm 1 with DDPM's own coefficients, from beta_1 = 1e-4 to beta_1000 = 0.02.
    beta = np.linspace(1e-4, 0.02, 1000)
    total = np.cumprod(1 - beta)
    b, now, before = beta[i - 1], total[i - 1], total[i - 2]
    A, C, m = dense_matrix(operator, prior.image_shape).numpy(), prior.covariance.numpy(), 0.2
    s2 = (1 - now) / now
    W = C @ np.linalg.inv(C + s2 * np.eye(len(C)))
    data = flatten_measurement(y)[0].numpy()

    def estimate(v: np.ndarray) -> np.ndarray:
        return m + W @ (v / np.sqrt(now) - m)

    def distance(v: np.ndarray) -> float:
        return float(np.linalg.norm(data - A @ estimate(v)))

    v, h = x.flatten().numpy(), 1e-5
    grad = np.array([(distance(v + h * e) - distance(v - h * e)) / (2 * h) for e in np.eye(len(v))])
    expected = (
        np.sqrt(1 - b) * (1 - before) / (1 - now) * v
        + np.sqrt(before) * b / (1 - now) * estimate(v)
        + np.sqrt(b * (1 - before) / (1 - now)) * z.flatten().numpy()
        - 0.7 * grad
    )
    found = dps.step(denoiser, operator, y, x, (now, before), 0.7, z)
    np.testing.assert_allclose(found.flatten().numpy(), expected, rtol=1e-7, atol=1e-8)


def test_the_last_dps_step_is_the_estimate_itself() -> None:
    operator = operators.Denoising()
    x = torch.randn(3, 1, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    signal = dps.schedule(1000, float("inf"))[-2:]
    found = dps.step(independent(0.5), operator, x, x, (signal[0], signal[1]), 0.0, torch.ones_like(x))
    s2 = (1 - signal[0]) / signal[0]
    torch.testing.assert_close(found, x / signal[0] ** 0.5 * (0.25 / (0.25 + s2)))


def test_the_dps_schedule_is_the_published_one_as_far_as_the_network_knows_it() -> None:
    published = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[::-1]
    np.testing.assert_allclose(dps.schedule(1000, float("inf")), [*published, 1.0], rtol=1e-12)
    short = np.array(dps.schedule(1000, 40.0))
    levels = np.sqrt((1 - published) / published)
    assert len(short) - 1 == np.sum(levels <= 40) < 1000
    spread = np.array(dps.schedule(50, 40.0))
    assert len(spread) == 51
    assert (np.diff(spread) > 0).all()
    assert set(spread) <= set(short)
    assert (spread[0], spread[-2]) == (short[0], short[-2])


def test_dps_without_guidance_samples_the_prior() -> None:
    """Its variance is a linear recursion, from that of the start."""
    variance = 1.0
    for now, following in pairwise(dps.schedule(200, 40.0)):
        alpha, s2 = now / following, (1 - now) / now
        gain = (
            alpha**0.5 * (1 - following) + following**0.5 * (1 - alpha) / now**0.5 * 0.09 / (0.09 + s2)
        ) / (1 - now)
        variance = gain**2 * variance + (1 - alpha) * (1 - following) / (1 - now)
    x = dps.sample(
        independent(0.3), operators.Denoising(), torch.zeros(1, 1, 64, 64), dps.DpsOptions(0.0, 200),
        image_shape=(1, 64, 64), generator=torch.Generator().manual_seed(1), sigma_max=40.0,
    )  # fmt: skip
    assert abs(variance**0.5 / 0.3 - 1) < 0.05
    assert abs(x.var().item() / variance - 1) < 5 * (2 / x.numel()) ** 0.5


def test_probability_flow_of_a_gaussian() -> None:
    s, x = 0.4, torch.linspace(-2, 2, 16, dtype=torch.float64).reshape(1, 1, 4, 4)
    sigmas = daps.levels(20.0, 0.01, 5)
    # dx / dsigma = x sigma / (s^2 + sigma^2); a number for each Euler step.
    factor = np.prod([1 + (b - a) * a / (s**2 + a**2) for a, b in pairwise(sigmas)])
    torch.testing.assert_close(daps.probability_flow(independent(s), x, sigmas), x * float(factor))
    exact = x * ((s**2 + 0.01**2) / (s**2 + 20.0**2)) ** 0.5
    fine = daps.probability_flow(independent(s), x, daps.levels(20.0, 0.01, 4000))
    torch.testing.assert_close(fine, exact, rtol=2e-3, atol=0)


def test_daps_levels_are_the_published_ones() -> None:
    found = daps.levels(100.0, 0.1, 200)
    expected = [(100 ** (1 / 7) + i / 200 * (0.1 ** (1 / 7) - 100 ** (1 / 7))) ** 7 for i in range(201)]
    np.testing.assert_allclose(found, expected)
    assert daps.DapsOptions().nfe == 1000


@pytest.mark.parametrize("name", ["blur", "super-resolution", "MRI"])
def test_langevin_has_the_law_of_its_linear_recursion(name: str) -> None:
    """x <- M x + h (x0_hat / r^2 + A^T y / b^2) + sqrt(2 h) z: Gaussian, with mean and covariance known."""
    channels, operator = OPERATORS[name]
    prior, _ = gaussian(channels)
    y, chains, r, b, h, steps = measured(operator, prior), 4000, 0.5, 0.2, 0.02, 12
    x0_hat = prior.sample(1, seed=7)
    A = dense_matrix(operator, prior.image_shape).numpy()
    n = A.shape[1]
    Q = np.eye(n) / r**2 + A.T @ A / b**2
    M = np.eye(n) - h * Q
    start = x0_hat.flatten().numpy()
    target = np.linalg.solve(Q, start / r**2 + A.T @ flatten_measurement(y)[0].numpy() / b**2)
    mean = target + np.linalg.matrix_power(M, steps) @ (start - target)
    powers = [np.linalg.matrix_power(M, j) for j in range(steps)]
    covariance = 2 * h * sum(power @ power for power in powers)

    found = daps.langevin(
        operator, y, x0_hat.expand(chains, -1, -1, -1), r,
        noise_std=b, step_size=h, steps=steps, generator=torch.Generator().manual_seed(2),
    ).flatten(1).numpy()  # fmt: skip
    variance = np.diag(covariance)
    assert (np.abs(found.mean(0) - mean) < 5 * np.sqrt(variance / chains)).all()
    # The variance of an entry of a sample covariance is (c_ii c_jj + c_ij^2) / chains.
    error = np.sqrt((np.outer(variance, variance) + covariance**2) / chains)
    assert (np.abs(np.cov(found.T) - covariance) < 5 * error).all()


def test_langevin_draws_from_the_posterior_of_its_gaussian() -> None:
    """With small steps: N(Q^-1 (x0_hat / r^2 + A^T y / b^2), Q^-1)."""
    _, operator = OPERATORS["blur"]
    prior, _ = gaussian(1)
    y, x0_hat, chains = measured(operator, prior), prior.sample(1, seed=7), 1000
    exact = GaussianPrior(x0_hat[0], 0.25 * torch.eye(16)).posterior(operator, y, 0.2)
    found = daps.langevin(
        operator, y, x0_hat.expand(chains, -1, -1, -1), 0.5,
        noise_std=0.2, step_size=1e-3, steps=600, generator=torch.Generator().manual_seed(2),
    )  # fmt: skip
    assert ((found.mean(0) - exact.mean).abs() < 5 * exact.std / chains**0.5).all()
    # Langevin's variance is too large by h Q / 2 of it, 1.5 % at most here.
    assert ((found.std(0) / exact.std - 1).abs() < 0.0075 + 5 * (2 * chains) ** -0.5).all()


def test_daps_as_a_whole_has_the_law_of_its_recursion() -> None:
    """Of independent Gaussian pixels and denoising: mean and variance of a pixel by two numbers a level."""
    s, eta, value = 0.5, 0.2, 0.7
    options = daps.DapsOptions(noise_std=0.1, step_size=0.01, annealing_steps=8, langevin_steps=6)
    sigmas = [*daps.levels(30.0, 0.1, 8)[:-1], 0.0]
    mean, variance = 0.0, 900.0
    for step, (sigma, following) in enumerate(pairwise(sigmas)):
        ode = daps.levels(sigma, 0.01, 5)
        factor = np.prod([1 + (b - a) * a / (s**2 + a**2) for a, b in pairwise(ode)])
        mean, variance = factor * mean, factor**2 * variance
        h = 0.01 * (1 - 0.99 * step / 9)
        gain, slope = 1.0, 0.0  # of x_0 as a function of x0_hat: gain x0_hat + slope; and its noise
        noise = 0.0
        for _ in range(6):
            shrink = 1 - h * (1 / sigma**2 + 1 / 0.1**2)
            gain = shrink * gain + h / sigma**2
            slope = shrink * slope + h * value / 0.1**2
            noise = shrink**2 * noise + 2 * h
        mean, variance = gain * mean + slope, gain**2 * variance + noise + following**2
    found = daps.sample(
        independent(s), operators.Denoising(), torch.full((1, 1, 128, 128), value), options,
        image_shape=(1, 128, 128), generator=torch.Generator().manual_seed(5), sigma_max=30.0,
    )  # fmt: skip
    assert eta != options.noise_std
    assert abs(found.mean().item() - mean) < 5 * (variance / found.numel()) ** 0.5
    assert abs(found.var().item() / variance - 1) < 5 * (2 / found.numel()) ** 0.5


def test_function_evaluations_are_counted() -> None:
    calls = 0

    def counting(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return independent(0.5)(x, sigma)

    arguments = {"image_shape": (1, 8, 8), "generator": torch.Generator(), "sigma_max": 40.0}
    y, operator = torch.zeros(2, 1, 8, 8), operators.Denoising()
    dps.sample(counting, operator, y, dps.DpsOptions(0.1, 30), **arguments)
    assert calls == 30 == len(dps.schedule(30, 40.0)) - 1
    options = daps.DapsOptions(annealing_steps=4)
    daps.sample(counting, operator, y, options, **arguments)
    assert calls - 30 == 20 == options.nfe


def test_the_prior_as_denoiser_differentiates() -> None:
    prior = NetworkPrior(random_denoiser(), (1, 8, 8), precision="float64")
    generator = torch.Generator().manual_seed(0)
    x, v, w = (torch.randn(2, 1, 8, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    sigma, denoiser = torch.tensor([0.3, 2.0], dtype=torch.float64), denoiser_of(prior)
    torch.testing.assert_close(denoiser(x, sigma), prior.denoise(x, sigma), rtol=1e-9, atol=1e-9)
    leaf = x.clone().requires_grad_()
    (pulled,) = torch.autograd.grad(denoiser(leaf, sigma), leaf, v)
    h = 1e-5
    slope = (prior.denoise(x + h * w, sigma) - prior.denoise(x - h * w, sigma)) / (2 * h)
    torch.testing.assert_close((pulled * w).sum(), (slope * v).sum(), rtol=1e-6, atol=1e-8)
