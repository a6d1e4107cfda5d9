"""Analytic priors against Bayes' rule written out densely, and compositions of priors."""

import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

import alpenglow as ag
from alpenglow.operators import (
    Denoising,
    FourierSampling,
    GaussianBlur,
    Inpainting,
    LinearOperator,
    SuperResolution,
)
from alpenglow.priors import GaussianMixturePrior, GaussianPrior, compose, smooth_covariance, stack
from alpenglow.priors.protocol import Prior, check_prior, noise_floor

Shape = tuple[int, int, int]
F64 = torch.float64


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=F64)


def random_covariance(n: int, std: float, seed: int) -> Tensor:
    """A full covariance with eigenvalues from 0.1 to 1 times std^2."""
    axes = torch.linalg.qr(rand(n, n, seed=seed)).Q
    return std**2 * (axes * torch.linspace(0.1, 1, n, dtype=F64)) @ axes.T


def gaussian(shape: Shape = (1, 4, 4), std: float = 0.5, seed: int = 0) -> GaussianPrior:
    return GaussianPrior(0.4 * rand(*shape, seed=seed), random_covariance(math.prod(shape), std, seed + 100))


def mixture(
    shape: Shape = (1, 4, 4), count: int = 3, std: float = 0.4, seed: int = 0
) -> GaussianMixturePrior:
    """Components that overlap at some levels and part at others."""
    n = math.prod(shape)
    weights = torch.arange(1, count + 1)
    covariances = torch.stack([random_covariance(n, std * (1 + 0.3 * k), seed + k) for k in range(count)])
    return GaussianMixturePrior(weights, 0.8 * rand(count, *shape, seed=seed + 50), covariances)


ANALYTIC: dict[str, Callable[[], GaussianMixturePrior]] = {"gaussian": gaussian, "mixture": mixture}
any_prior = pytest.mark.parametrize("make", ANALYTIC.values(), ids=ANALYTIC.keys())
SIGMAS = [0.01, 0.1, 0.5, 2.0, 20.0]


def at(prior: GaussianMixturePrior, sigma: float, count: int, seed: int = 7) -> tuple[Tensor, Tensor]:
    """Draws of p_sigma, and their levels."""
    clean = prior.sample(count, seed=seed)
    return clean + sigma * rand(*clean.shape, seed=seed + 1), torch.full((count,), sigma, dtype=F64)


def joint(prior: GaussianMixturePrior, x: Tensor, sigma: float) -> Tensor:
    """log w_k N(x; m_k, C_k + sigma^2 I), [B, K], by torch.distributions."""
    eye = torch.eye(prior.covariances.shape[1], dtype=F64)
    smooth = MultivariateNormal(prior.means.flatten(1), prior.covariances + sigma**2 * eye)
    return smooth.log_prob(x.flatten(1)[:, None]) + prior.weights.log()


# The energy and its gradient


@any_prior
@pytest.mark.parametrize("sigma", SIGMAS)
def test_energy_is_minus_log_density(make: Callable[[], GaussianMixturePrior], sigma: float) -> None:
    """E / sigma^2 + log p_sigma is one constant for all images of a level."""
    prior = make()
    x, levels = at(prior, sigma, 50)
    x[25:] *= 2  # the tails too
    energy, _ = prior.energy_and_grad(x, levels)
    log_density = joint(prior, x, sigma).logsumexp(1)
    constant = energy / sigma**2 + log_density
    torch.testing.assert_close(constant, constant[:1].expand(50), rtol=1e-11, atol=1e-9)
    assert log_density.std() > 1


def test_levels_share_one_constant() -> None:
    """The constant is n/2 log 2 pi at every level: particle weights compare energies across levels."""
    prior = mixture()
    for sigma in SIGMAS:
        x, levels = at(prior, sigma, 5)
        constant = prior.energy_and_grad(x, levels)[0] / sigma**2 + joint(prior, x, sigma).logsumexp(1)
        torch.testing.assert_close(constant, torch.full_like(constant, -8 * math.log(2 * math.pi)))


@any_prior
def test_gradient_is_that_of_the_energy(make: Callable[[], GaussianMixturePrior]) -> None:
    """By autograd through the energy, each image at its own level, and by central differences."""
    prior = make()
    sigma = torch.tensor(SIGMAS, dtype=F64)
    x = (prior.sample(5, seed=1) + sigma[:, None, None, None] * rand(5, *prior.image_shape)).requires_grad_()
    energy, grad = prior.energy_and_grad(x, sigma)
    (expected,) = torch.autograd.grad(energy.sum(), x)
    torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-12)
    x, direction = x.detach(), rand(5, *prior.image_shape, seed=3)
    step = 1e-5 * sigma
    ahead, behind = (
        prior.energy_and_grad(x + s * step[:, None, None, None] * direction, sigma)[0] for s in (1, -1)
    )
    slope = (grad * direction).flatten(1).sum(1)
    torch.testing.assert_close((ahead - behind) / (2 * step), slope.detach(), rtol=1e-6, atol=1e-8)


@any_prior
@pytest.mark.parametrize("sigma", SIGMAS)
def test_is_the_mmse_denoiser(make: Callable[[], GaussianMixturePrior], sigma: float) -> None:
    """Tweedie's x - G against E[x0 | x] by Bayes' rule, component by component."""
    prior = make()
    x, levels = at(prior, sigma, 40)
    responsibility = joint(prior, x, sigma).softmax(1)
    means = torch.zeros(40, len(prior.weights), x[0].numel(), dtype=F64)
    for k, (m, C) in enumerate(zip(prior.means.flatten(1), prior.covariances, strict=True)):
        gain = C @ torch.linalg.inv(C + sigma**2 * torch.eye(len(C), dtype=F64))
        means[:, k] = m + (x.flatten(1) - m) @ gain.T
    expected = torch.einsum("bk,bkn->bn", responsibility, means).reshape(x.shape)
    torch.testing.assert_close(x - prior.energy_and_grad(x, levels)[1], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(prior.responsibilities(x, sigma), responsibility, rtol=1e-5, atol=1e-6)


def test_is_the_posterior_mean_of_denoising() -> None:
    """x - G, and the posterior of x = x0 + sigma n, are one thing said twice."""
    prior, sigma = mixture(), 0.3
    x, levels = at(prior, sigma, 1)
    posterior = prior.posterior(Denoising(), x, sigma)
    torch.testing.assert_close(posterior.mean, (x - prior.energy_and_grad(x, levels)[1])[0])


@any_prior
def test_score(make: Callable[[], GaussianMixturePrior]) -> None:
    prior = make()
    x, levels = at(prior, 0.7, 4)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(joint(prior, x, 0.7).logsumexp(1).sum(), x)
    torch.testing.assert_close(prior.score(x, levels), expected)


@pytest.mark.parametrize("size", [8, 16])
@pytest.mark.parametrize("sigma", [0.01, 0.1, 1.0, 5.0, 20.0])
def test_float32_is_precise_enough_for_particle_weights(size: int, sigma: float) -> None:
    """E / sigma^2 is a log-weight: the float32 result must keep it to 1e-3, far below one particle's."""
    shape = (1, size, size)
    covariance = smooth_covariance(shape, std=0.3, length=2.0)
    prior = GaussianMixturePrior(torch.ones(5), rand(5, *shape), covariance.expand(5, -1, -1))
    x, levels = at(prior, sigma, 200)
    x, levels = x.float(), levels.float()
    energy, grad = prior.energy_and_grad(x, levels)
    exact, exact_grad = prior.energy_and_grad(x.double(), levels.double())
    assert energy.dtype == grad.dtype == torch.float32
    error = (energy / levels.square() - exact / levels.double().square()).abs().max()
    assert error < 1e-3
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-6, atol=1e-30)


def test_an_image_has_the_same_float32_bits_in_any_batch() -> None:
    prior = mixture((1, 8, 8), count=5)
    x, levels = at(prior, 0.3, 100)
    x, levels = x.float(), levels.float()
    energy, grad = prior.energy_and_grad(x, levels)
    for count in (1, 2, 3, 7, 64):
        pick = torch.randperm(100, generator=generator(count))[:count]
        e, g = prior.energy_and_grad(x[pick], levels[pick])
        assert torch.equal(e, energy[pick])
        assert torch.equal(g, grad[pick])


# Moments and samples


def within(estimate: Tensor, expected: Tensor, standard_error: Tensor, count: float = 5.0) -> None:
    """All entries within `count` standard errors: 5 leaves a right estimate of 1 000 entries 6e-4 to fail."""
    excess = ((estimate - expected).abs() / standard_error.clamp(min=1e-12)).max().item()
    assert excess < count, f"off by {excess:.1f} standard errors"


@any_prior
def test_samples_have_the_moments_of_the_prior(make: Callable[[], GaussianMixturePrior]) -> None:
    prior, count = make(), 40_000
    samples = prior.sample(count, seed=3)
    assert samples.dtype == F64
    assert samples.shape == (count, *prior.image_shape)
    flat = samples.flatten(1)
    centred = flat - prior.mean.flatten()
    within(flat.mean(0), prior.mean.flatten(), prior.std.flatten() / math.sqrt(count))
    products = centred[:, :, None] * centred[:, None]
    within(products.mean(0), prior.covariance, products.std(0) / math.sqrt(count))
    torch.testing.assert_close(prior.std.flatten(), prior.covariance.diagonal().sqrt())
    # Component shares: E[r_k(x)] = w_k, whatever the overlap.
    shares = prior.responsibilities(samples)
    within(shares.mean(0), prior.weights, shares.std(0) / math.sqrt(count))
    # Gaussian along a random direction, beyond the second moment: E of a cosine is known.
    direction = rand(flat.shape[1], seed=9)
    cosine = (flat @ direction).cos()
    m, C = prior.means.flatten(1) @ direction, prior.covariances @ direction @ direction
    within(cosine.mean(0), (prior.weights * m.cos() * (-C / 2).exp()).sum(), cosine.std(0) / math.sqrt(count))


def test_samples_follow_the_seed() -> None:
    prior = mixture()
    assert torch.equal(prior.sample(5, seed=1), prior.sample(5, seed=1))
    assert not torch.equal(prior.sample(5, seed=1), prior.sample(5, seed=2))


def test_mixture_moments_by_hand() -> None:
    prior = GaussianMixturePrior([1, 3], [[[[0.0]]], [[[2.0]]]], [[[1.0]], [[4.0]]])
    assert prior.mean.item() == pytest.approx(1.5)
    assert prior.covariance.item() == pytest.approx(0.25 * 1 + 0.75 * 4 + 0.25 * 0.75 * 2**2)
    assert prior.weights.tolist() == [0.25, 0.75]


def test_a_singular_covariance_samples_in_its_subspace() -> None:
    direction = torch.tensor([1.0, 2.0, 2.0, 0.0], dtype=F64) / 3
    prior = GaussianPrior(torch.zeros(1, 2, 2), torch.outer(direction, direction))
    samples = prior.sample(100).flatten(1)
    across = samples - (samples @ direction)[:, None] * direction
    assert across.abs().max() < 1e-7
    assert 0.7 < (samples @ direction).std() < 1.3


def test_smooth_covariance() -> None:
    covariance = smooth_covariance((2, 3, 4), std=0.5, length=1.5, jitter=0)
    assert covariance.shape == (24, 24)
    assert torch.equal(covariance[:12, 12:], torch.zeros(12, 12, dtype=F64))
    torch.testing.assert_close(covariance[:12, :12], covariance[12:, 12:])
    # Pixels (0, 0) and (1, 2) are sqrt(5) apart.
    assert covariance[0, 6].item() == pytest.approx(0.25 * math.exp(-0.5 * 5 / 1.5**2))
    assert GaussianPrior(torch.zeros(2, 3, 4), covariance).std.flatten()[5].item() == pytest.approx(0.5)


# The posterior


def mask(*shape: int) -> Tensor:
    return torch.rand(shape, generator=generator(1)) < 0.4


OPERATORS: dict[str, tuple[LinearOperator, Shape]] = {
    "denoising": (Denoising(), (1, 3, 3)),
    "inpainting": (Inpainting(mask(5, 5)), (1, 5, 5)),
    "inpainting-channels": (Inpainting(mask(2, 3, 4)), (2, 3, 4)),
    "blur": (GaussianBlur(1.0), (1, 6, 6)),
    "fourier-real": (FourierSampling(mask(4, 5), channels=1), (1, 4, 5)),
    "fourier-complex": (FourierSampling(mask(4, 4)), (2, 4, 4)),
    "super-resolution": (SuperResolution(2), (1, 6, 4)),
}
any_operator = pytest.mark.parametrize(("operator", "shape"), OPERATORS.values(), ids=OPERATORS.keys())


def noise_like(y: Tensor, seed: int) -> Tensor:
    """Unit noise for each real component."""
    if y.is_complex():
        return torch.complex(rand(*y.shape, seed=seed), rand(*y.shape, seed=seed + 1000))
    return rand(*y.shape, seed=seed)


def measure(prior: GaussianMixturePrior, operator: LinearOperator, eta: float) -> Tensor:
    clean = operator.forward(prior.sample(1, seed=11))
    return clean + eta * noise_like(clean, 12)


def real(y: Tensor) -> Tensor:
    """Rows of real numbers: real parts first, then imaginary ones."""
    flat = y.flatten(1)
    return torch.cat([flat.real, flat.imag], 1) if flat.is_complex() else flat


def columns(operator: LinearOperator, shape: Shape) -> Tensor:
    """The real matrix [m, n] of the operator, from one basis image after another."""
    images = [e.reshape(1, *shape) for e in torch.eye(math.prod(shape), dtype=F64)]
    return torch.cat([real(operator.forward(image)) for image in images]).T


@any_operator
@pytest.mark.parametrize("sigma", [0.0, 0.5])
@pytest.mark.parametrize("eta", [0.05, 0.5])
def test_posterior_is_bayes_rule(operator: LinearOperator, shape: Shape, eta: float, sigma: float) -> None:
    """Means and covariances in information form, weights by the evidence: another route than the code's."""
    prior = mixture(shape)
    y = measure(prior, operator, eta)
    A, data = columns(operator, shape), real(y)[0]
    eye = torch.eye(len(A.T), dtype=F64)
    posterior = prior.posterior(operator, y, eta, sigma=sigma)
    evidence = []
    for k, (w, m, C) in enumerate(
        zip(prior.weights, prior.means.flatten(1), prior.covariances + sigma**2 * eye, strict=True)
    ):
        covariance = torch.linalg.inv(A.T @ A / eta**2 + torch.linalg.inv(C))
        mean = covariance @ (A.T @ data / eta**2 + torch.linalg.solve(C, m))
        torch.testing.assert_close(posterior.covariances[k], covariance, rtol=1e-8, atol=1e-11)
        torch.testing.assert_close(posterior.means[k].flatten(), mean, rtol=1e-8, atol=1e-9)
        marginal = MultivariateNormal(A @ m, A @ C @ A.T + eta**2 * torch.eye(len(A), dtype=F64))
        evidence.append(w.log() + marginal.log_prob(data))
    torch.testing.assert_close(posterior.weights, torch.stack(evidence).softmax(0), rtol=1e-7, atol=1e-12)


@any_operator
def test_posterior_density_is_likelihood_times_prior(operator: LinearOperator, shape: Shape) -> None:
    """log p(x | y) - log p(y | x) - log p(x) is constant in x, with the operator itself in p(y | x)."""
    prior, eta = mixture(shape), 0.4
    y = measure(prior, operator, eta)
    posterior = prior.posterior(operator, y, eta)
    x = torch.cat([posterior.sample(20), prior.sample(20)])
    misfit = real(y - operator.forward(x)).square().sum(1) / (2 * eta**2)
    log_prior, log_posterior = (joint(p, x, 0.0).logsumexp(1) for p in (prior, posterior))
    constant = log_posterior + misfit - log_prior
    torch.testing.assert_close(constant, constant[:1].expand(40), rtol=1e-7, atol=1e-6)


SMALL: dict[str, tuple[LinearOperator, Shape]] = {
    "inpainting": (Inpainting(torch.tensor([[1, 0], [0, 0]])), (1, 2, 2)),
    "blur": (GaussianBlur(0.6), (1, 2, 2)),
    "fourier-complex": (FourierSampling(torch.tensor([[1, 0]])), (2, 1, 2)),
    "super-resolution": (SuperResolution(2), (1, 2, 2)),
}


@pytest.mark.parametrize(("operator", "shape"), SMALL.values(), ids=SMALL.keys())
def test_posterior_against_importance_sampling(operator: LinearOperator, shape: Shape) -> None:
    """Prior samples weighted by the likelihood; standard errors of self-normalised weights (delta method)."""
    prior, eta, count = mixture(shape, count=2), 0.5, 100_000
    y = measure(prior, operator, eta)
    x = prior.sample(count, seed=21)
    misfit = real(y - operator.forward(x)).square().sum(1) / (2 * eta**2)
    weight = (-misfit).softmax(0)
    assert 1 / weight.square().sum() > count / 50
    posterior = prior.posterior(operator, y, eta)

    def check(values: Tensor, expected: Tensor) -> None:
        estimate = weight @ values
        standard_error = (weight.square() @ (values - estimate).square()).sqrt()
        within(estimate, expected, standard_error)

    flat = x.flatten(1)
    check(flat, posterior.mean.flatten())
    centred = flat - posterior.mean.flatten()
    check((centred[:, :, None] * centred[:, None]).flatten(1), posterior.covariance.flatten())
    # A component's posterior weight is the mean of its prior responsibility over the posterior.
    check(prior.responsibilities(x), posterior.weights)


def test_posterior_samples() -> None:
    """The posterior is a prior of its own: energies, moments and samples come with it."""
    operator, shape = OPERATORS["inpainting"]
    prior, eta, count = mixture(shape), 0.1, 20_000
    posterior = prior.posterior(operator, measure(prior, operator, eta), eta)
    assert check_prior(posterior, probe=torch.zeros(2, *shape)) == shape
    samples = posterior.sample(count, seed=5).flatten(1)
    within(samples.mean(0), posterior.mean.flatten(), posterior.std.flatten() / math.sqrt(count))
    squares = (samples - posterior.mean.flatten()).square()
    within(squares.mean(0), posterior.covariance.diagonal(), squares.std(0) / math.sqrt(count))


def test_posterior_weights_follow_the_measurement() -> None:
    """A measurement near one mode leaves that mode alone, at levels where the other is far away."""
    means = torch.stack([torch.full((1, 2, 2), v, dtype=F64) for v in (-1.0, 1.0)])
    prior = GaussianMixturePrior([0.5, 0.5], means, 0.01 * torch.eye(4).expand(2, 4, 4))
    operator = Inpainting(torch.tensor([[1, 0], [0, 0]]))
    posterior = prior.posterior(operator, torch.tensor([[[0.9, 0.0], [0.0, 0.0]]], dtype=F64), 0.05)
    assert posterior.weights[1] > 1 - 1e-12
    assert posterior.mean[0, 1, 1].item() == pytest.approx(1.0)
    undecided = prior.posterior(operator, torch.zeros(1, 2, 2, dtype=F64), 0.05)
    assert undecided.weights.tolist() == pytest.approx([0.5, 0.5])


def test_posterior_takes_a_measurement_as_it_comes() -> None:
    """With or without a batch dimension, in single precision, whatever stands where nothing was measured."""
    operator, shape = OPERATORS["fourier-complex"]
    prior = mixture(shape)
    y = measure(prior, operator, 0.1)
    posterior = prior.posterior(operator, y, 0.1)
    assert torch.equal(prior.posterior(operator, y[0], 0.1).means, posterior.means)
    single = prior.posterior(operator, y.to(torch.complex64), 0.1)
    torch.testing.assert_close(single.means, posterior.means, rtol=1e-4, atol=1e-5)
    junk = y + 100 * (~mask(4, 4))
    torch.testing.assert_close(prior.posterior(operator, junk, 0.1).means, posterior.means)
    torch.testing.assert_close(prior.posterior(operator, junk, 0.1).weights, posterior.weights)


# Bad input


def means(count: int = 2) -> Tensor:
    return torch.zeros(count, 1, 2, 2)


def eyes(count: int = 2) -> Tensor:
    return torch.eye(4, dtype=F64).repeat(count, 1, 1)


def with_entry(value: float, row: int, column: int) -> Tensor:
    covariances = eyes()
    covariances[1, row, column] = value
    return covariances


BAD_MIXTURES: dict[str, tuple[tuple[object, object, object], str]] = {
    "weights": (([1.0], means(), eyes()), r"weights \(1,\).*\[K\] and"),
    "means": (([1.0, 1.0], torch.zeros(2, 2, 2), eyes()), r"means \(2, 2, 2\).*\[K, C, H, W\]"),
    "covariances": (([1.0, 1.0], means(), eyes()[:, :3]), r"covariances \(2, 3, 4\); expected \(2, 4, 4\)"),
    "one covariance": (([1.0, 1.0], means(), eyes()[0]), r"expected \(2, 4, 4\)"),
    "zero weight": (([1.0, 0.0], means(), eyes()), "weights must be positive.*leave out"),
    "negative weight": (([1.0, -1.0], means(), eyes()), "weights must be positive"),
    "asymmetric": (([1.0, 1.0], means(), with_entry(0.1, 0, 1)), r"not symmetric; pass \(C \+ C.T\) / 2"),
    "indefinite": (([1.0, 1.0], means(), with_entry(-0.5, 2, 2)), "negative eigenvalue -0.5"),
    "nan weight": (([1.0, math.nan], means(), eyes()), "weights holds NaN"),
    "nan mean": (([1.0, 1.0], means() * math.nan, eyes()), "means holds NaN"),
    "infinite covariance": (
        ([1.0, 1.0], means(), with_entry(math.inf, 1, 1)),
        "covariances holds NaN or infinity",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_MIXTURES.values(), ids=BAD_MIXTURES.keys())
def test_bad_mixtures(arguments: tuple[object, object, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianMixturePrior(*arguments)


@pytest.mark.parametrize(
    ("mean", "covariance", "message"),
    [
        (torch.zeros(2, 2), torch.eye(4), r"mean \(2, 2\); expected an image \[C, H, W\]"),
        (torch.zeros(1, 1, 2, 2), torch.eye(4), r"mean \(1, 1, 2, 2\)"),
        (torch.zeros(1, 2, 2), torch.eye(3), r"covariances \(1, 3, 3\); expected \(1, 4, 4\)"),
        (torch.zeros(1, 2, 2), torch.full((4, 4), math.nan), "covariance holds NaN"),
        (torch.zeros(1, 2, 2), -torch.eye(4), "negative eigenvalue"),
    ],
)
def test_bad_gaussians(mean: Tensor, covariance: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianPrior(mean, covariance)


def test_numpy_and_lists_are_taken() -> None:
    prior = GaussianPrior(torch.zeros(1, 1, 2).numpy(), [[1.0, 0.5], [0.5, 1.0]])
    assert prior.image_shape == (1, 1, 2)
    assert prior.covariance.dtype == F64


# Compositions


def static(precision: Tensor, mean: Tensor, x: Tensor) -> Tensor:
    return MultivariateNormal(mean, precision_matrix=precision).log_prob(x.flatten(1))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 2.0)], ids=str)
@pytest.mark.parametrize("sigma", SIGMAS)
def test_a_product_of_gaussians_is_the_gaussian_it_should_be(weights: Sequence[float], sigma: float) -> None:
    """prod_i N(m_i, C_i + sigma^2)^w_i has the precision sum_i w_i (C_i + sigma^2)^-1."""
    experts = [gaussian(seed=0), gaussian(std=0.9, seed=30)]
    product = compose(dict(zip(experts, weights, strict=True)))
    eye = torch.eye(16, dtype=F64)
    precisions = [
        w * torch.linalg.inv(p.covariance + sigma**2 * eye) for p, w in zip(experts, weights, strict=True)
    ]
    precision = precisions[0] + precisions[1]
    pull = sum(Q @ p.mean.flatten() for Q, p in zip(precisions, experts, strict=True))
    mean = torch.linalg.solve(precision, pull)
    x = (mean + sigma * rand(30, 16)).reshape(30, 1, 4, 4)
    energy, grad = product.energy_and_grad(x, torch.full((30,), sigma, dtype=F64))
    constant = energy / sigma**2 + static(precision, mean, x)
    torch.testing.assert_close(constant, constant[:1].expand(30), rtol=1e-8, atol=1e-8)
    expected = sigma**2 * (x.flatten(1) - mean) @ precision
    torch.testing.assert_close(grad.flatten(1), expected, rtol=1e-8, atol=1e-10)


def test_composed_energies_are_weighted_sums() -> None:
    """Also of priors without a closed form, and each image at its own level."""
    experts: dict[Prior, float] = {mixture(): 0.5, gaussian(seed=30): 2.0, mixture(seed=60): 1.0}
    sigma = torch.tensor(SIGMAS, dtype=F64)
    x = rand(5, 1, 4, 4)
    energy, grad = compose(experts).energy_and_grad(x, sigma)
    parts = [(w, *prior.energy_and_grad(x, sigma)) for prior, w in experts.items()]
    torch.testing.assert_close(energy, sum(w * e for w, e, _ in parts), rtol=1e-13, atol=0)
    torch.testing.assert_close(grad, sum(w * g for w, _, g in parts), rtol=1e-13, atol=1e-15)
    assert check_prior(compose(experts), probe=torch.zeros(3, 1, 4, 4)) == (1, 4, 4)


def test_a_weight_is_a_power_of_the_density() -> None:
    prior, x, sigma = mixture(), rand(4, 1, 4, 4), torch.full((4,), 0.3, dtype=F64)
    energy, grad = compose({prior: 2.0}).energy_and_grad(x, sigma)
    once = prior.energy_and_grad(x, sigma)
    assert torch.equal(energy, 2 * once[0])
    assert torch.equal(grad, 2 * once[1])


def test_sampling_a_product_of_gaussians() -> None:
    """The whole way: white experts, whose product is known, a measurement, samples with the exact moments."""
    shape, eta, count = (1, 4, 4), 0.1, 1500
    eye = torch.eye(16, dtype=F64)
    first = GaussianPrior(torch.full(shape, 0.5), 0.5 * eye)
    second = GaussianPrior(torch.full(shape, -0.2), 0.25 * eye)
    operator = Inpainting(mask(4, 4))
    product = GaussianPrior(torch.full(shape, (0.5 / 0.5 - 0.2 / 0.25) / 6), eye / 6)
    y = measure(product, operator, eta)
    exact = product.posterior(operator, y, eta)
    drawn = ag.sample(
        compose({first: 1.0, second: 1.0}), operator, y.float(), noise_std=eta, num_samples=count, seed=2
    )
    # The sampler's own error, at most 3 % of a std in Gaussian beds (DESIGN 2), adds to Monte Carlo's.
    monte_carlo = 1 / math.sqrt(2 * count)
    ratio = (drawn.std.double() / exact.std).flatten()
    assert (ratio - 1).abs().max() < 0.03 + 4 * monte_carlo
    assert ((drawn.mean.double() - exact.mean) / exact.std).abs().max() < 0.03 + 4 / math.sqrt(count)


def test_stacked_experts_are_independent() -> None:
    """Energies add, gradients stand side by side, and two Gaussians make the block-diagonal one."""
    first, second = gaussian((1, 3, 4)), gaussian((2, 3, 4), seed=40)
    both = stack([first, second])
    assert check_prior(both, probe=torch.zeros(2, 3, 3, 4)) == (3, 3, 4)
    covariance = torch.block_diag(first.covariance, second.covariance)
    whole = GaussianPrior(torch.cat([first.mean, second.mean]), covariance)
    x, sigma = rand(5, 3, 3, 4), torch.tensor(SIGMAS, dtype=F64)
    for got, expected in zip(both.energy_and_grad(x, sigma), whole.energy_and_grad(x, sigma), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_one_grey_prior_makes_a_complex_one() -> None:
    grey = mixture()
    x, sigma = rand(3, 2, 4, 4), torch.full((3,), 0.4, dtype=F64)
    energy, grad = stack([grey, grey]).energy_and_grad(x, sigma)
    (e0, g0), (e1, g1) = (grey.energy_and_grad(x[:, c : c + 1], sigma) for c in (0, 1))
    torch.testing.assert_close(energy, e0 + e1)
    torch.testing.assert_close(grad, torch.cat([g0, g1], 1))


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_bad_weights(weight: float) -> None:
    with pytest.raises(ValueError, match=f"must be positive and finite, got {weight}"):
        compose({gaussian(): 1.0, gaussian(seed=2): weight})


def test_bad_compositions() -> None:
    with pytest.raises(ValueError, match=r"at least one prior.*weight"):
        compose({})
    with pytest.raises(ValueError, match=r"share one image shape, got \[\(1, 3, 4\), \(1, 4, 4\)\]"):
        compose({gaussian((1, 4, 4)): 1.0, gaussian((1, 3, 4)): 1.0})
    with pytest.raises(ValueError, match="at least one prior"):
        stack([])
    for shapes in itertools.permutations([(1, 4, 4), (1, 3, 4)]):
        with pytest.raises(ValueError, match="share height and width"):
            stack([gaussian(shape) for shape in shapes])


def test_public_names() -> None:
    for name in ("GaussianPrior", "GaussianMixturePrior", "NetworkPrior", "compose", "stack"):
        assert callable(getattr(ag.priors, name))


class Ranged:
    """A prior that knows its levels and its device, as networks do."""

    image_shape = (1, 2, 2)

    def __init__(
        self, low: float, high: float, device: str = "cpu", error: float = 0.0, floor: float = 0.0
    ) -> None:
        self.sigma_range, self.device = (low, high), torch.device(device)
        self.gradient_error, self.noise_floor = error, floor

    def energy_and_grad(self, x: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return 0.5 * x.square().flatten(1).sum(1), x


def test_composed_priors_know_their_levels_error_and_device() -> None:
    gaussian = GaussianPrior(torch.zeros(1, 2, 2), torch.eye(4))
    for joined in (
        compose({Ranged(0.01, 10.0, error=0.1): 1.0, Ranged(0.02, 20.0, error=0.2): 2.0, gaussian: 1.0}),
        stack([Ranged(0.01, 10.0, error=0.2), Ranged(0.02, 20.0, error=0.1)]),
    ):
        assert joined.gradient_error == 0.2  # type: ignore[attr-defined]
        assert joined.sigma_range == (0.02, 10.0)  # type: ignore[attr-defined]
        assert joined.device == torch.device("cpu")  # type: ignore[attr-defined]
    for join in (lambda a, b: compose({a: 1.0, b: 1.0}), lambda a, b: stack([a, b])):
        with pytest.raises(ValueError, match="no noise level in common"):
            join(Ranged(0.01, 0.1), Ranged(0.2, 1.0))
        with pytest.raises(ValueError, match="move them to one device"):
            join(Ranged(0.01, 0.1), Ranged(0.01, 0.1, device="meta"))
        with pytest.raises(ValueError, match="str is not a prior"):
            join(Ranged(0.01, 0.1), "fashion-28")


def test_composed_priors_know_their_noise_floor() -> None:
    """White noise of 0.1, and of 0.2 to the power 2, multiply to precision 100 + 2 * 25."""
    first, second, exact = (Ranged(0.01, 10.0, floor=f) for f in (0.1, 0.2, 0.0))
    floor = noise_floor(compose({first: 1.0, second: 2.0}))
    assert floor == pytest.approx(150**-0.5)
    assert noise_floor(compose({first: 0.5, Ranged(0.01, 10.0, floor=0.1): 0.5})) == pytest.approx(0.1)
    assert noise_floor(stack([first, second])) == 0.1
    for joined in (compose({first: 1.0, exact: 1.0}), stack([first, exact])):
        assert noise_floor(joined) == 0.0


class Movable(Ranged):
    def to(self, device: torch.device) -> "Movable":
        return Movable(*self.sigma_range, device=str(device))


def test_composed_priors_move_with_their_experts() -> None:
    for joined in (compose({Movable(0.01, 10.0): 2.0}), stack([Movable(0.01, 10.0), Movable(0.02, 10.0)])):
        moved = joined.to("meta")  # type: ignore[attr-defined]
        assert moved.device == torch.device("meta")
        assert {prior.device for prior in moved.experts} == {torch.device("meta")}
        assert joined.device == torch.device("cpu")  # type: ignore[attr-defined]
        assert (moved.image_shape, moved.sigma_range) == (joined.image_shape, joined.sigma_range)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="Ranged is on cpu and has no to"):
        compose({Ranged(0.01, 10.0): 1.0}).to("meta")  # type: ignore[attr-defined]


def test_one_sample_and_one_measurement_at_least_and_at_most() -> None:
    prior = GaussianPrior(torch.zeros(1, 2, 2), torch.eye(4))
    with pytest.raises(ValueError, match="num_samples is 0"):
        prior.sample(0)
    with pytest.raises(ValueError, match="got 2 measurements"):
        prior.posterior(Denoising(), torch.zeros(2, 1, 2, 2), 0.1)
