"""Non-Cartesian MRI through LinearOperator.from_functions: a radial trajectory by mri-nufft."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from alpenglow.operators import FunctionOperator, LinearOperator

mrinufft = pytest.importorskip("mrinufft")
pytest.importorskip("finufft")

SIZE, COILS = 12, 3


def radial(spokes: int, samples: int) -> Tensor:
    """k-space positions [spokes * samples, 2] in cycles a pixel, within [-1/2, 1/2)."""
    radius = torch.arange(samples, dtype=torch.float64) / samples - 0.5
    angle = torch.arange(spokes, dtype=torch.float64) * math.pi / spokes
    positions = torch.stack([angle.sin()[:, None] * radius, angle.cos()[:, None] * radius], -1)
    return positions.reshape(-1, 2)


def coil_maps() -> Tensor:
    """Complex [coils, H, W] with sum_c |S_c|^2 = 1."""
    rows, columns = torch.linspace(-1, 1, SIZE)[:, None], torch.linspace(-1, 1, SIZE)
    maps = torch.stack([torch.polar((c * rows / 2).exp(), columns * (c - 1) + rows) for c in range(COILS)])
    return maps / maps.abs().square().sum(0).sqrt()


def non_cartesian(trajectory: Tensor, maps: Tensor, **options: Any) -> FunctionOperator:
    """The example: a NUFFT as two functions on batches, images [B, 2, H, W] to complex [B, coils, K]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it scales positions to radians, as is meant
        nufft = mrinufft.get_operator("finufft")(
            trajectory.float().numpy(), tuple(maps.shape[1:]),
            n_coils=len(maps), smaps=maps.numpy(), squeeze_dims=True,
        )  # fmt: skip

    def forward(x: Tensor) -> Tensor:
        images = torch.complex(x[:, 0], x[:, 1]).to(torch.complex64).numpy()
        return torch.stack([torch.from_numpy(nufft.op(image)) for image in images])

    def adjoint(y: Tensor) -> Tensor:
        images = torch.stack([torch.from_numpy(nufft.adj_op(k)) for k in y.to(torch.complex64).numpy()])
        return torch.stack([images.real, images.imag], dim=1)

    return LinearOperator.from_functions(forward, adjoint, **options)


def exact(trajectory: Tensor, maps: Tensor) -> Tensor:
    """The same operator as a dense matrix, complex128 [coils K, H W]."""
    at = (torch.arange(SIZE) - SIZE // 2).double()
    phase = trajectory[:, :1, None] * at[:, None] + trajectory[:, 1:, None] * at
    waves = torch.polar(torch.ones(phase.shape).double(), -2 * math.pi * phase)  # [K, H, W]
    scale = (2**2 * SIZE**2) ** 0.5  # mri-nufft divides by (2^d N)^(1/2)
    return (waves * maps.to(torch.complex128)[:, None]).reshape(-1, SIZE**2) / scale


def as_real(matrix: Tensor) -> Tensor:
    """[2 M, 2 N] of a complex matrix [M, N], for parts one after the other."""
    return torch.cat([torch.cat([matrix.real, -matrix.imag], 1), torch.cat([matrix.imag, matrix.real], 1)])


def test_a_radial_trajectory_by_mri_nufft() -> None:
    trajectory, maps = radial(7, 18), coil_maps()
    operator = non_cartesian(trajectory, maps, tolerance=1e-5, max_iterations=500)
    assert operator.measurement_shape((2, SIZE, SIZE)) == (COILS, len(trajectory))
    assert operator.measurement_is_complex
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 2, SIZE, SIZE, generator=generator)
    y = operator.forward(x)
    A = as_real(exact(trajectory, maps))
    expected = x.double().flatten(1) @ A.T
    got = torch.cat([y.real.flatten(1), y.imag.flatten(1)], 1).double()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(operator.adjoint(y).flatten(1).double(), expected @ A, rtol=0, atol=1e-3)

    noise_std, sigma = 0.1, torch.tensor([0.1, 0.3, 1.0, 1.0])
    mean = operator.conditional_mean(y[:1], x, sigma, noise_std).flatten(1).double()
    for i, level in enumerate(sigma.double()):
        Q = A.T @ A / noise_std**2 + torch.eye(A.shape[1]) / level**2
        rhs = expected[0] @ A / noise_std**2 + x[i].double().flatten() / level**2
        error = mean[i] - torch.linalg.solve(Q, rhs)
        assert float((error @ Q @ error / len(error)).sqrt()) < 0.02  # in posterior standard deviations
    # Perturb-then-solve on the same numbers.
    numbers = [torch.randn(4, *s, generator=generator) for s in ((2, SIZE, SIZE), (*y.shape[1:], 2))]
    given = iter(numbers)
    draws = operator.draw(lambda _: next(given), (2, SIZE, SIZE), sigma, noise_std).flatten(1).double()
    n1 = torch.cat([numbers[1][..., 0].flatten(1), numbers[1][..., 1].flatten(1)], 1).double()
    for i, level in enumerate(sigma.double()):
        Q = A.T @ A / noise_std**2 + torch.eye(A.shape[1]) / level**2
        rhs = n1[i] @ A / noise_std + numbers[0][i].double().flatten() / level
        error = draws[i] - torch.linalg.solve(Q, rhs)
        assert float((error @ Q @ error / len(error)).sqrt()) < 0.02
