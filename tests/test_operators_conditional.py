"""The conditional Gaussian of the operators against dense linear algebra; conjugate gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from alpenglow.operators import (
    Convolution,
    Denoising,
    FourierSampling,
    FunctionOperator,
    GaussianBlur,
    Inpainting,
    LinearOperator,
    MotionBlur,
    Preconditioner,
    SenseMRI,
    SuperResolution,
    conjugate_gradient,
)
from alpenglow.operators.cg import dot

Shape = tuple[int, int, int]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_mask(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.4


def matrix_operator(shape: Shape, *, complex_data: bool, **options: object) -> LinearOperator:
    """A dense random matrix as an operator from functions."""
    n = shape[0] * shape[1] * shape[2]
    matrix = rand(n // 2, n, seed=2) / n**0.5
    if complex_data:
        matrix = torch.complex(matrix, rand(n // 2, n, seed=3) / n**0.5)
    return LinearOperator.from_functions(
        lambda x: x.flatten(1).to(matrix.dtype) @ matrix.T,
        lambda y: (y @ matrix.conj()).real.reshape(-1, *shape).contiguous(),
        **options,  # type: ignore[arg-type]
    )


def sense(H: int, W: int, mask: Tensor) -> SenseMRI:
    """Three coils that do not see a corner of the image."""
    maps = torch.complex(rand(3, H, W, seed=5), rand(3, H, W, seed=6)) / 6**0.5
    maps[:, :2, :3] = 0
    return SenseMRI(maps, mask, tolerance=1e-13, max_iterations=3000)


MATRIX = {"tolerance": 1e-13, "max_iterations": 3000}
CASES: dict[str, tuple[LinearOperator, Shape]] = {
    "denoising": (Denoising(), (1, 4, 4)),
    "inpainting": (Inpainting(some_mask(8, 8)), (2, 8, 8)),
    "inpainting-channels": (Inpainting(some_mask(2, 5, 6)), (2, 5, 6)),
    "convolution": (Convolution(rand(3, 4) / 4), (1, 8, 8)),
    "convolution-odd": (Convolution(rand(4, 3) / 4), (2, 7, 5)),
    "kernel-larger-than-image": (Convolution(rand(9, 9) / 9), (1, 4, 5)),
    "gaussian": (GaussianBlur(1.1), (1, 8, 8)),
    "motion": (MotionBlur(4.5, 35), (1, 7, 8)),
    "box-2": (SuperResolution(2), (2, 8, 8)),
    "box-3": (SuperResolution(3), (1, 9, 6)),
    "gaussian-2": (SuperResolution(2, "gaussian"), (1, 8, 8)),
    "bicubic-2": (SuperResolution(2, "bicubic"), (1, 8, 6)),
    "bicubic-4": (SuperResolution(4, "bicubic"), (1, 8, 8)),
    "fourier-complex": (FourierSampling(some_mask(8, 8)), (2, 8, 8)),
    "fourier-complex-odd": (FourierSampling(some_mask(7, 6)), (2, 7, 6)),
    "fourier-real": (FourierSampling(some_mask(8, 8), channels=1), (1, 8, 8)),
    "fourier-real-odd": (FourierSampling(some_mask(5, 7), channels=1), (1, 5, 7)),
    "matrix-sense": (sense(6, 7, some_mask(6, 7)), (2, 6, 7)),
    "matrix-sense-columns": (sense(6, 7, some_mask(1, 7).expand(6, 7)), (2, 6, 7)),
    "matrix-sense-rows": (sense(6, 5, some_mask(6, 1).expand(6, 5)), (2, 6, 5)),
    "matrix": (matrix_operator((1, 6, 6), complex_data=False, **MATRIX), (1, 6, 6)),
    "matrix-complex": (matrix_operator((2, 4, 5), complex_data=True, **MATRIX), (2, 4, 5)),
}
LEVELS = [(0.002, 1e-3), (0.3, 0.05), (2.0, 0.2), (100.0, 1.0)]


def real_rows(y: Tensor) -> Tensor:
    return (torch.view_as_real(y.resolve_conj()) if y.is_complex() else y).flatten(1)


def dense(operator: LinearOperator, shape: Shape) -> Tensor:
    """A as a real matrix [m, n]."""
    n = shape[0] * shape[1] * shape[2]
    return real_rows(operator.forward(torch.eye(n, dtype=torch.float64).reshape(n, *shape))).T


def precision(operator: LinearOperator, shape: Shape, sigma: float, noise_std: float) -> Tensor:
    A = dense(operator, shape)
    return A.T @ A / noise_std**2 + torch.eye(A.shape[1], dtype=torch.float64) / sigma**2


def draw_matrix(operator: LinearOperator, shape: Shape, sigma: float, noise_std: float) -> Tensor:
    """L with draw = L n, from the basis vectors of all the normals that one draw asks for."""
    sizes: list[tuple[int, ...]] = []

    def record(size: tuple[int, ...]) -> Tensor:
        sizes.append(size)
        return torch.zeros(1, *size, dtype=torch.float64)

    operator.draw(record, shape, torch.tensor([sigma]), noise_std)
    lengths = [torch.Size(size).numel() for size in sizes]
    parts = iter(torch.eye(sum(lengths), dtype=torch.float64).split(lengths, dim=1))
    level = torch.full((sum(lengths),), sigma, dtype=torch.float64)
    return operator.draw(lambda size: next(parts).reshape(-1, *size), shape, level, noise_std).flatten(1).T


@pytest.mark.parametrize(("sigma", "noise_std"), LEVELS)
@pytest.mark.parametrize("name", CASES)
def test_solve_and_mean_against_dense(name: str, sigma: float, noise_std: float) -> None:
    operator, shape = CASES[name]
    A, Q = dense(operator, shape), precision(operator, shape, sigma, noise_std)
    level = torch.tensor([sigma], dtype=torch.float64)
    b = rand(3, *shape, seed=4)
    expected = torch.linalg.solve(Q, b.flatten(1).T).T
    tolerance = 1e-9 * float(expected.abs().max())
    torch.testing.assert_close(
        operator.solve(b, level, noise_std).flatten(1), expected, rtol=0, atol=tolerance
    )

    y = operator.forward(rand(1, *shape, seed=5))
    rhs = (real_rows(y) @ A) / noise_std**2 + b.flatten(1) / sigma**2
    mean = operator.conditional_mean(y, b, level, noise_std)
    torch.testing.assert_close(mean.flatten(1), torch.linalg.solve(Q, rhs.T).T, rtol=0, atol=1e-8)
    torch.testing.assert_close(
        operator.solve(rhs.reshape(b.shape), level, noise_std), mean, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(("sigma", "noise_std"), LEVELS)
@pytest.mark.parametrize("name", CASES)
def test_draw_has_covariance_P(name: str, sigma: float, noise_std: float) -> None:
    operator, shape = CASES[name]
    L = draw_matrix(operator, shape, sigma, noise_std)
    P = torch.linalg.inv(precision(operator, shape, sigma, noise_std))
    torch.testing.assert_close(L @ L.T, P, rtol=0, atol=1e-8 * float(P.abs().max()))


@pytest.mark.parametrize("name", ["inpainting", "motion", "bicubic-2", "fourier-real", "matrix-complex"])
def test_sigma_is_per_image_and_one_measurement_serves_all(name: str) -> None:
    operator, shape = CASES[name]
    sigma = torch.tensor([0.01, 0.3, 5.0])
    x, y = rand(3, *shape), operator.forward(rand(1, *shape, seed=6))
    together = operator.conditional_mean(y, x, sigma, 0.1)
    for i in range(3):
        alone = operator.conditional_mean(y, x[i : i + 1], sigma[i : i + 1], 0.1)
        torch.testing.assert_close(together[i : i + 1], alone)
    torch.testing.assert_close(
        operator.solve(x, torch.tensor([0.3]), 0.1), operator.solve(x, sigma[1].expand(3), 0.1)
    )


CLOSED_FORMS = [name for name in CASES if not name.startswith("matrix")]


@pytest.mark.parametrize("noise_std", [1e-3, 1.0])
@pytest.mark.parametrize("sigma", [0.002, 1.0, 100.0])
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_float32_is_right_to_a_small_part_of_a_posterior_std(
    name: str, sigma: float, noise_std: float
) -> None:
    operator, shape = CASES[name]
    Q = precision(operator, shape, sigma, noise_std)
    level = torch.full((4,), sigma, dtype=torch.float64)
    truth, normals = rand(1, *shape, seed=7), rand(4, *shape, seed=8)
    # Inputs are the same float32 numbers in both precisions.
    prior_mean = (truth + sigma * rand(4, *shape, seed=9)).float().double()
    y = operator.forward(truth)
    y = (y + noise_std * torch.ones_like(y)).to(torch.complex64 if y.is_complex() else torch.float32)
    wide = y.to(torch.complex128 if y.is_complex() else torch.float64)
    normals = normals.float().double()

    def whitened(difference: Tensor) -> float:
        """Root mean square error in posterior standard deviations."""
        e = difference.double().flatten(1)
        return float(((e @ Q) * e).mean().sqrt())

    draw = operator.draw(lambda _: normals.float(), shape, level.float(), noise_std)
    assert draw.dtype == torch.float32
    assert whitened(draw - operator.draw(lambda _: normals, shape, level, noise_std)) < 0.02
    mean = operator.conditional_mean(y, prior_mean.float(), level.float(), noise_std)
    assert mean.dtype == torch.float32
    assert whitened(mean - operator.conditional_mean(wide, prior_mean, level, noise_std)) < 0.02
    solution, exact = (operator.solve(n, level, noise_std) for n in (normals.float(), normals))
    assert float((solution - exact).norm() / exact.norm()) < 1e-5


def test_float32_perturb_then_solve() -> None:
    # A tolerance beyond float32 must not lead astray.
    operator = LinearOperator.from_functions(*_blur_and_mask(8, 8), tolerance=1e-9, max_iterations=1000)
    for sigma, noise_std in ((0.002, 1e-3), (0.3, 0.05), (1.0, 0.05), (100.0, 1.0), (20.0, 0.01)):
        Q = precision(operator, (1, 8, 8), sigma, noise_std)
        results = []
        for dtype in (torch.float32, torch.float64):
            numbers = iter([rand(4, 1, 8, 8, seed=seed).float().to(dtype) for seed in (1, 2)])
            level = torch.full((4,), sigma, dtype=dtype)
            results.append(operator.draw(lambda _, n=numbers: next(n), (1, 8, 8), level, noise_std))  # type: ignore[misc]
        e = (results[0].double() - results[1]).flatten(1)
        assert float(((e @ Q) * e).mean().sqrt()) < 0.02


def _blur_and_mask(H: int, W: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    blur, mask = GaussianBlur(0.8), some_mask(H, W)
    return lambda x: blur.forward(x) * mask, lambda y: blur.adjoint(y * mask)


def test_guess_and_preconditioner_save_iterations() -> None:
    blur, weights = GaussianBlur(0.35), torch.logspace(-2, 0.5, 144, dtype=torch.float64).reshape(12, 12)
    calls = 0

    def forward(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return blur.forward(x) * weights

    def adjoint(y: Tensor) -> Tensor:
        return blur.adjoint(y * weights)

    def jacobi(residual: Tensor, sigma: Tensor, noise_std: float) -> Tensor:
        return residual / (weights.square() / noise_std**2 + sigma.reshape(-1, 1, 1, 1) ** -2)

    def build(preconditioner: Preconditioner | None = None) -> FunctionOperator:
        return LinearOperator.from_functions(
            forward, adjoint, preconditioner=preconditioner, tolerance=1e-8, max_iterations=2000
        )

    def count(solve: Callable[[], Tensor]) -> tuple[Tensor, int]:
        nonlocal calls
        calls = 0
        return solve(), calls

    plain, helped = build(), build(jacobi)
    b, sigma = rand(3, 1, 12, 12), torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    cold_result, cold = count(lambda: plain.solve(b, sigma, 0.05))
    warm_result, warm = count(lambda: plain.solve(b, sigma, 0.05, guess=cold_result * 1.0001))
    jacobi_result, preconditioned = count(lambda: helped.solve(b, sigma, 0.05))
    torch.testing.assert_close(warm_result, cold_result, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(jacobi_result, cold_result, rtol=1e-4, atol=1e-4)
    assert warm < cold
    assert preconditioned < cold / 2
    y, x = plain.forward(rand(1, 1, 12, 12, seed=3)), rand(3, 1, 12, 12, seed=4)
    mean = plain.conditional_mean(y, x, sigma, 0.05)
    warm_mean, calls_from_the_mean = count(lambda: plain.conditional_mean(y, x, sigma, 0.05, guess=mean))
    torch.testing.assert_close(warm_mean, mean, rtol=1e-5, atol=1e-5)
    assert calls_from_the_mean <= 5


def test_no_convergence_is_one_clear_error() -> None:
    forward, adjoint = _blur_and_mask(16, 16)
    b, sigma = rand(3, 1, 16, 16), torch.tensor([1e-3, 5.0, 1e-3])
    with pytest.raises(
        RuntimeError, match=r"residual .* after 4 iterations.*image 1, .*sigma 5.*max_iterations"
    ):
        LinearOperator.from_functions(forward, adjoint, max_iterations=4).solve(b, sigma, 0.01)
    wrong = LinearOperator.from_functions(forward, lambda y: -adjoint(y))
    with pytest.raises(RuntimeError, match="adjoint"):
        wrong.solve(b, sigma, 0.01)
    hollow = LinearOperator.from_functions(lambda x: x * torch.nan, adjoint)
    with pytest.raises(RuntimeError, match="residual"):
        hollow.solve(b, sigma, 0.01)


def test_conjugate_gradient_info() -> None:
    root = rand(4, 6, 6)
    matrices = root @ root.mT + torch.eye(6)
    b = rand(4, 6, seed=1)
    b[2] = 0

    def apply(v: Tensor) -> Tensor:
        return (matrices * v[:, None]).sum(-1)

    x, info = conjugate_gradient(apply, b, tolerance=1e-12, max_iterations=50)
    torch.testing.assert_close(x, torch.linalg.solve(matrices, b))
    assert info.converged.all()
    assert info.residual.max() <= 1e-12
    assert info.iterations[2] == 0
    assert info.iterations.max() <= 12
    _, solved = conjugate_gradient(apply, b, guess=x, tolerance=1e-9)
    assert solved.iterations.max() == 0
    _, cut = conjugate_gradient(apply, b, tolerance=1e-12, max_iterations=2)
    assert cut.converged.tolist() == [False, False, True, False]
    assert cut.iterations.tolist() == [2, 2, 0, 2]


def test_preconditioned_conjugate_gradient_and_dot() -> None:
    diagonal = torch.logspace(0, 6, 40, dtype=torch.float64)
    b = rand(2, 40)
    x, info = conjugate_gradient(lambda v: diagonal * v, b, precondition=lambda r: r / diagonal)
    torch.testing.assert_close(x, b / diagonal)
    assert info.iterations.tolist() == [1, 1]
    for n in (1, 2, 3, 7, 64, 101):
        a = rand(3, n)
        torch.testing.assert_close(dot(a, a + 1), (a * (a + 1)).sum(1))
