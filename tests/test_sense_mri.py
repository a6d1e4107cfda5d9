"""Multi-coil MRI: against sigpy and dense matrices; its draws, preconditioners and samples."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import alpenglow as ag
from alpenglow.mri_simulation import simulate_coil_maps
from alpenglow.operators import LinearOperator, SenseMRI, count_iterations
from alpenglow.operators.sense_preconditioners import Circulant, LineBlocks, line_axis
from alpenglow.priors.mixture import GaussianPrior, smooth_covariance
from alpenglow.samplers import alps
from alpenglow.samplers.chains import drive
from alpenglow.samplers.problem import Noise, Problem, levels_of

MASKS = {
    "points": lambda H, W: random_points(H, W),
    "columns": lambda H, W: random_points(1, W).expand(H, W),
    "rows": lambda H, W: random_points(H, 1).expand(H, W),
}


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_points(H: int, W: int) -> Tensor:
    mask = torch.rand(H, W, generator=torch.Generator().manual_seed(1)) < 0.35
    mask[H // 2, W // 2] = True
    return mask


def smooth_maps(coils: int, H: int, W: int, *, cropped: bool = False) -> Tensor:
    """Gaussian profiles with a phase of their own, sum_c |S_c|^2 = 1; cropped: 0 outside an ellipse."""
    rows, columns = torch.linspace(-1, 1, H).double()[:, None], torch.linspace(-1, 1, W).double()
    maps = []
    for c in range(coils):
        angle = 2 * math.pi * c / coils
        distance = (rows - 1.2 * math.sin(angle)).square() + (columns - 1.2 * math.cos(angle)).square()
        phase = math.cos(angle) * rows + math.sin(angle) * columns + angle
        maps.append(torch.polar((-distance / 1.5).exp(), phase))
    stack = torch.stack(maps)
    stack = stack / stack.abs().square().sum(0).sqrt()
    return stack * ((rows / 0.95).square() + (columns / 0.8).square() < 1) if cropped else stack


def dense(operator: ag.operators.LinearOperator, shape: tuple[int, int, int]) -> Tensor:
    """A as a real matrix [2 coils H W, 2 H W]."""
    n = math.prod(shape)
    y = operator.forward(torch.eye(n, dtype=torch.float64).reshape(n, *shape))
    return torch.view_as_real(y.resolve_conj().contiguous()).flatten(1).T


def precision(
    operator: ag.operators.LinearOperator, shape: tuple[int, int, int], sigma: float, noise_std: float
) -> Tensor:
    A = dense(operator, shape)
    return A.T @ A / noise_std**2 + torch.eye(A.shape[1], dtype=torch.float64) / sigma**2


def covariance_of_draws(operator: SenseMRI, H: int, W: int, sigma: float, noise_std: float) -> Tensor:
    """L L^T with draw = L n, from one basis vector of the normals after the other."""
    sizes: list[tuple[int, ...]] = []

    def record(size: tuple[int, ...]) -> Tensor:
        sizes.append(size)
        return torch.zeros(1, *size, dtype=torch.float64)

    operator.draw(record, (2, H, W), torch.tensor([sigma]), noise_std)
    lengths = [math.prod(size) for size in sizes]
    parts = iter(torch.eye(sum(lengths), dtype=torch.float64).split(lengths, dim=1))
    level = torch.full((sum(lengths),), sigma, dtype=torch.float64)
    L = operator.draw(lambda size: next(parts).reshape(-1, *size), (2, H, W), level, noise_std).flatten(1)
    return L.T @ L


@pytest.mark.parametrize("size", [(8, 10), (9, 7)], ids=str)
def test_is_sigpys_sense(size: tuple[int, int]) -> None:
    linop = pytest.importorskip("sigpy.mri.linop")
    maps, mask = smooth_maps(4, *size).to(torch.complex64), random_points(*size)
    theirs = linop.Sense(maps.numpy(), weights=mask.float().numpy())
    operator = SenseMRI(maps, mask)
    x = rand(2, 2, *size, dtype=torch.float32)
    y = operator.forward(x)
    assert y.dtype == torch.complex64
    back = operator.adjoint(y)
    for i in range(2):
        image = torch.complex(x[i, 0], x[i, 1]).numpy()
        torch.testing.assert_close(y[i], torch.from_numpy(theirs * image), rtol=0, atol=1e-5)
        combined = torch.from_numpy(theirs.H * y[i].numpy())
        torch.testing.assert_close(torch.complex(*back[i]), combined, rtol=0, atol=1e-5)
        normal = torch.from_numpy(theirs.N * image)
        torch.testing.assert_close(torch.complex(*operator.normal(x)[i]), normal, rtol=0, atol=1e-5)


def test_one_coil_of_ones_is_fourier_sampling() -> None:
    mask, x = random_points(7, 8), rand(3, 2, 7, 8)
    operator, sampling = SenseMRI(torch.ones(1, 7, 8) + 0j, mask), ag.operators.FourierSampling(mask)
    torch.testing.assert_close(operator.forward(x), sampling.forward(x))
    sigma = torch.tensor([0.1, 1.0, 3.0])
    torch.testing.assert_close(
        operator.solve(x, sigma, 0.3), sampling.solve(x, sigma, 0.3), rtol=0, atol=1e-6
    )


def test_a_batch_in_chunks_is_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    operator, x = SenseMRI(smooth_maps(3, 6, 5), random_points(6, 5)), rand(7, 2, 6, 5)
    whole = operator.forward(x), operator.normal(x), operator.adjoint(operator.forward(x))
    monkeypatch.setattr("alpenglow.operators.sense._CHUNK", 2 * 3 * 6 * 5)
    chunked = operator.forward(x), operator.normal(x), operator.adjoint(operator.forward(x))
    for one, other in zip(whole, chunked, strict=True):
        assert torch.equal(one, other)


# --- The conditional Gaussian, 12 x 12 and 4 coils ---


@pytest.mark.parametrize("cropped", [False, True])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("sigma", "noise_std"), [(0.05, 0.05), (5.0, 1.0)])
def test_mean_and_draws_against_a_dense_solve(
    kind: str, cropped: bool, sigma: float, noise_std: float
) -> None:
    maps = smooth_maps(4, 12, 12, cropped=cropped)
    operator = SenseMRI(maps, MASKS[kind](12, 12), tolerance=1e-12)
    A, Q = dense(operator, (2, 12, 12)), precision(operator, (2, 12, 12), sigma, noise_std)
    level, D = torch.full((2,), sigma, dtype=torch.float64), rand(2, 2, 12, 12)
    y = operator.forward(rand(1, 2, 12, 12, seed=3)) + noise_std * torch.complex(
        rand(1, 4, 12, 12, seed=4), rand(1, 4, 12, 12, seed=5)
    )
    rhs = torch.view_as_real(y * operator.mask).flatten(1) @ A / noise_std**2 + D.flatten(1) / sigma**2
    mean = operator.conditional_mean(y, D, level, noise_std).flatten(1)
    torch.testing.assert_close(mean, torch.linalg.solve(Q, rhs.T).T, rtol=0, atol=1e-8)
    P = torch.linalg.inv(Q)
    drawn = covariance_of_draws(operator, 12, 12, sigma, noise_std)
    torch.testing.assert_close(drawn, P, rtol=0, atol=1e-8 * float(P.abs().max()))


@pytest.mark.parametrize("kind", ["points", "columns"])
def test_empirical_covariance_of_draws(kind: str) -> None:
    """Float32, with the generator of the samplers."""
    count, sigma, noise_std = 4000, 0.3, 0.1
    operator = SenseMRI(smooth_maps(4, 12, 12), MASKS[kind](12, 12))
    P = torch.linalg.inv(precision(operator, (2, 12, 12), sigma, noise_std))
    normal = Noise(11, torch.arange(count)).at(1)
    draws = operator.draw(normal, (2, 12, 12), torch.full((count,), sigma), noise_std).double().flatten(1)
    # A mean of products of jointly Gaussian a, b has variance (P_aa P_bb + P_ab^2) / count.
    error = ((P.diag()[:, None] * P.diag() + P.square()) / count).sqrt()
    z = ((draws.T @ draws / count - P) / error).triu()
    # 41 616 entries: the chance that a normal one is beyond 5.5 is 1.6e-3 for all together.
    assert z.abs().max() < 5.5
    # Their mean square is 1, with a standard error of less than that of the 288 independent pixels.
    assert z.square().sum() / (288 * 289 / 2) == pytest.approx(1, abs=5 * math.sqrt(2 / 288))
    assert (draws.mean(0) / (P.diag() / count).sqrt()).abs().max() < 5


@pytest.mark.parametrize("kind", MASKS)
def test_float32_is_right_to_a_small_part_of_a_posterior_std(kind: str) -> None:
    operator = SenseMRI(smooth_maps(4, 12, 12, cropped=True), MASKS[kind](12, 12))
    exact = SenseMRI(operator.coil_maps, operator.mask, tolerance=1e-12)
    truth = rand(1, 2, 12, 12, seed=8).float().double()
    y = operator.forward(truth.float())
    for sigma, noise_std in ((0.01, 0.05), (1.0, 0.05), (20.0, 0.1), (20.0, 0.01)):
        Q = precision(operator, (2, 12, 12), sigma, noise_std)
        level = torch.full((3,), sigma, dtype=torch.float64)

        def draw(which: SenseMRI, level: Tensor, eta: float = noise_std) -> Tensor:
            numbers = iter(
                [rand(3, 2, 12, 12).float().to(level), rand(3, 4, 12, 12, 2, seed=1).float().to(level)]
            )
            return which.draw(lambda _: next(numbers), (2, 12, 12), level, eta).double()

        D = truth + min(sigma, 1.0) * rand(3, 2, 12, 12, seed=9).float().double()
        mean = operator.conditional_mean(y, D.float(), level.float(), noise_std).double()
        for e in (
            draw(operator, level.float()) - draw(exact, level),
            mean - exact.conditional_mean(y.to(torch.complex128), D, level, noise_std),
        ):
            assert float(((e.flatten(1) @ Q) * e.flatten(1)).mean().sqrt()) < 0.05


def test_draws_stop_where_their_error_is_small_beside_the_posterior() -> None:
    """At low levels earlier than at `tolerance`, and nowhere with more than the documented error."""
    size, noise_std = (2, 24, 24), 0.01
    maps, mask = simulate_coil_maps(4, size[1:], seed=0)[0].to(torch.complex128), random_points(24, 24)
    operator, exact = SenseMRI(maps, mask), SenseMRI(maps, mask, tolerance=1e-12)
    for ratio in (2, 20, 100, 400):
        level = torch.full((3,), ratio * noise_std, dtype=torch.float64)

        def drawn(draw: Callable[..., Tensor], which: SenseMRI, level: Tensor = level) -> tuple[Tensor, int]:
            numbers = iter([rand(3, *size), rand(3, 4, 24, 24, 2, seed=1)])
            with count_iterations() as count:
                return draw(which, lambda _: next(numbers), size, level, noise_std), int(count.total)

        truth, _ = drawn(SenseMRI.draw, exact)
        found, iterations = drawn(SenseMRI.draw, operator)
        _, at_tolerance = drawn(LinearOperator.draw, operator)
        e = found - truth
        whitened = e * (operator.normal(e) / noise_std**2 + e / level.reshape(-1, 1, 1, 1) ** 2)
        assert float(whitened.mean().sqrt()) < 0.01
        assert iterations < at_tolerance or ratio == 400


# --- Preconditioners ---


def test_the_mask_picks_the_preconditioner() -> None:
    assert line_axis(MASKS["columns"](6, 8)) == 1
    assert line_axis(MASKS["rows"](6, 8)) == 0
    assert line_axis(MASKS["points"](6, 8)) is None
    assert line_axis(torch.ones(1, 1, dtype=torch.bool).expand(2**10, 2**10)) is None  # 8 GiB


@pytest.mark.parametrize("size", [(6, 9), (7, 8)], ids=str)
def test_circulant_is_the_nearest_one(size: tuple[int, int]) -> None:
    """Its eigenvalues are the diagonal of F A^H A F^H."""
    maps, mask = smooth_maps(3, *size), random_points(*size)
    operator = SenseMRI(maps, mask)
    plane_waves = torch.fft.ifft2(torch.eye(math.prod(size), dtype=torch.complex128).reshape(-1, *size))
    plane_waves = plane_waves * math.prod(size) ** 0.5
    seen = operator.forward(torch.stack([plane_waves.real, plane_waves.imag], 1)).abs().square()
    expected = seen.flatten(1).sum(1).reshape(size)
    torch.testing.assert_close(Circulant(maps, mask)._eigenvalues, expected)


@pytest.mark.parametrize("kind", ["columns", "rows"])
def test_line_blocks_invert_exactly(kind: str) -> None:
    maps, mask = smooth_maps(3, 7, 10, cropped=True), MASKS[kind](7, 10)
    axis = line_axis(mask)
    assert axis is not None
    operator, blocks = SenseMRI(maps, mask), LineBlocks(maps, mask, axis)
    x, sigma = rand(11, 2, 7, 10), torch.linspace(0.1, 5, 11).double()
    Qx = operator.normal(x) / 0.05**2 + x / sigma.reshape(-1, 1, 1, 1).square()
    back = blocks(Qx, sigma, 0.05)
    factor = (1 / 0.05**2 + 1 / sigma.square()).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(back / factor, x, rtol=1e-9, atol=1e-9)


class Plain(SenseMRI):
    def precondition(self, residual: Tensor, sigma: Tensor, noise_std: float) -> Tensor:
        return residual


@pytest.mark.parametrize(("kind", "share"), [("points", 0.75), ("columns", 0.05), ("rows", 0.05)])
@pytest.mark.parametrize("cropped", [False, True])
def test_preconditioners_save_iterations(kind: str, share: float, cropped: bool) -> None:
    maps, mask = smooth_maps(4, 24, 24, cropped=cropped), MASKS[kind](24, 24)
    b, sigma = rand(2, 2, 24, 24), torch.tensor([0.5, 1.0]).double()
    most, results = [], []
    for operator in (Plain(maps, mask, tolerance=1e-8), SenseMRI(maps, mask, tolerance=1e-8)):
        pull = operator.adjoint(operator.forward(b))
        with count_iterations() as count:
            results.append(operator.solve(pull, sigma, 0.05))
        assert count.solves == 2
        assert int(count.largest) <= int(count.total) <= 2 * int(count.largest)
        most.append(int(count.largest))
    assert most[1] <= share * most[0]
    assert kind == "points" or most[1] == 1
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5 * float(results[0].abs().max()))


# --- The published noise ---


@pytest.mark.parametrize("kind", ["points", "columns"])
def test_published_noise_ignores_the_coil_maps(kind: str) -> None:
    sigma, noise_std, mask = 0.7, 0.2, MASKS[kind](6, 6)
    published = SenseMRI(smooth_maps(3, 6, 6), mask).with_published_noise()
    assert isinstance(published, SenseMRI)
    P = torch.linalg.inv(precision(ag.operators.FourierSampling(mask), (2, 6, 6), sigma, noise_std))
    torch.testing.assert_close(covariance_of_draws(published, 6, 6, sigma, noise_std), P)
    plain = ag.operators.FourierSampling(mask)
    assert plain.with_published_noise() is plain


def bed(kind: str, *, tolerance: float = 1e-6) -> tuple[GaussianPrior, SenseMRI, Tensor, float]:
    """A smooth complex 8 x 8 Gaussian, pixel std 0.3, seen by 3 coils with eta 0.2."""
    prior = GaussianPrior(torch.zeros(2, 8, 8), smooth_covariance((2, 8, 8), std=0.3, length=1.5))
    operator = SenseMRI(smooth_maps(3, 8, 8).to(torch.complex64), MASKS[kind](8, 8), tolerance=tolerance)
    y = operator.forward(prior.sample(1, seed=2).float())
    noise = torch.view_as_complex(rand(*y.shape, 2, seed=3, dtype=torch.float32))
    return prior, operator, y + 0.2 * noise * operator.mask, 0.2


def test_alps_draws_the_published_noise() -> None:
    # Solved as far as float32 goes: where CG stops depends on its first guess, which is not compared here.
    prior, operator, y, noise_std = bed("points", tolerance=1e-8)
    noise, options = Noise(5, torch.arange(3)), alps.AlpsOptions(levels=2, steps=2, sigma_max=2.0)
    problem = Problem(prior, operator, y, noise_std)
    samples = drive(alps.chains(problem, noise, options), problem).samples
    high, low = levels_of(2.0, 3, samples), levels_of(0.1, 3, samples)
    sampling = ag.operators.FourierSampling(operator.mask)

    def step(x: Tensor, sigma: Tensor) -> Tensor:
        return problem.conditional_mean(x - prior.energy_and_grad(x, sigma)[1], sigma)

    def draw(iteration: int, sigma: Tensor) -> Tensor:
        return sampling.draw(noise.at(iteration), (2, 8, 8), sigma, noise_std)

    x = problem.conditional_mean(torch.zeros(3, 2, 8, 8), high) + draw(0, high)
    x = step(x, high) + draw(1, high)
    x = step(x, high) + draw(2, low)
    x = step(x, low) + draw(3, low)
    x = step(x, low)
    torch.testing.assert_close(samples, x, rtol=1e-4, atol=1e-4)


# --- Sampling ---


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["points", "columns"])
def test_samples_have_the_moments_of_the_closed_form_posterior(kind: str) -> None:
    prior, operator, y, noise_std = bed(kind)
    exact = prior.posterior(operator, y, noise_std)
    count = 200
    # From sigma_max 2, near which 2 s_top lies here, instead of the pilot's 20: a quarter of the time.
    posterior = ag.sample(
        prior, operator, y, noise_std=noise_std, num_samples=count, nfe=40, sigma_range=(1.0, 2.0)
    )
    z = (posterior.mean.double() - exact.mean) / exact.std
    ratio = posterior.std.double() / exact.std
    # Standard errors a pixel: 1 / sqrt(200) = 0.07 of a mean, in posterior stds, and 1 / sqrt(400) = 0.05
    # of a std, relative; less in the median over 128 correlated pixels. The sampler adds less than 0.05.
    assert z.square().mean().sqrt() < 0.07 + 0.05
    assert abs(float(ratio.median()) - 1) < 0.05
    assert (ratio - 1).abs().max() < 0.05 + 4 * 0.05
    solves, total, most = (
        posterior.diagnostics["cg_" + n] for n in ("solves", "iterations", "iterations_max")
    )
    assert 0 < total <= solves * most
    assert most > 1 if kind == "points" else most == 1


def test_diagnostics_count_iterations_only_where_there_are_any() -> None:
    prior, operator, y, noise_std = bed("points")
    posterior = ag.sample(prior, operator, y, noise_std=noise_std, num_samples=2, method="alps", levels=2)
    # Of two chains: ten steps, the start, and the noise of the second level, which has nothing to solve.
    assert posterior.diagnostics["cg_solves"] == 2 * 12
    assert posterior.diagnostics["cg_iterations"] >= 2 * 11
    sampling = ag.operators.FourierSampling(operator.mask)
    single = ag.sample(prior, sampling, y[:, :1], noise_std=0.1, num_samples=2, method="alps", levels=2)
    assert "cg_solves" not in single.diagnostics


# --- Bad input ---


def test_no_convergence_is_one_clear_error() -> None:
    operator = SenseMRI(smooth_maps(4, 12, 12), MASKS["points"](12, 12), max_iterations=3)
    with pytest.raises(RuntimeError, match=r"SenseMRI: CG stopped.*after 3 iterations.*max_iterations"):
        operator.solve(operator.adjoint(operator.forward(rand(1, 2, 12, 12))), torch.tensor([5.0]), 0.01)


MAPS = torch.ones(2, 4, 5, dtype=torch.complex64)


@pytest.mark.parametrize(
    ("maps", "mask", "message"),
    [
        (MAPS.real, torch.ones(4, 5), "complex64 or complex128"),
        (MAPS[None], torch.ones(4, 5), "without a batch"),
        (MAPS[:0], torch.ones(4, 5), r"\[coils, H, W\]"),
        (MAPS * 0, torch.ones(4, 5), "all zero"),
        (MAPS * torch.nan, torch.ones(4, 5), "NaN"),
        (MAPS, torch.ones(5, 4), r"expected \(4, 5\)"),
        (MAPS, torch.zeros(4, 5), "nothing is measured"),
        (MAPS, torch.full((4, 5), 0.5), "other than 0 and 1"),
        ("maps", torch.ones(4, 5), "tensor"),
    ],
)
def test_constructor_refuses(maps: Any, mask: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SenseMRI(maps, mask)


def test_images_and_measurements_that_do_not_fit() -> None:
    operator = SenseMRI(MAPS.numpy(), torch.ones(4, 5).numpy())
    assert operator.measurement_shape((2, 4, 5)) == (2, 4, 5)
    assert operator.to("cpu", torch.float64) is operator
    for shape in ((1, 4, 5), (2, 5, 4)):
        with pytest.raises(ValueError, match="complex images"):
            operator.check_image(shape)
    with pytest.raises(ValueError, match="shape"):
        operator.check_measurement(torch.zeros(1, 3, 4, 5, dtype=torch.complex64), (2, 4, 5))
