"""Coil noise: covariance, whitening and noise_std against known ones."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from alpenglow.operators import SenseMRI
from alpenglow.operators.coil_noise import (
    background_covariance,
    corners,
    estimate_noise_std,
    noise_covariance,
    whiten,
    whitening_matrix,
)


def normals(*shape: int, seed: int = 0) -> Tensor:
    """Complex, each part N(0, 1)."""
    parts = torch.randn(*shape, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.view_as_complex(parts)


def known(coils: int = 4) -> Tensor:
    """A covariance per real component, its coils correlated and of unequal noise."""
    root = normals(coils, coils, seed=5) * 0.3 + torch.diag(torch.arange(1, coils + 1).double())
    return 0.01 * root @ root.mH


def noise_of(psi: Tensor, *shape: int, seed: int = 1) -> Tensor:
    """Noise [coils, *shape] of covariance psi."""
    return torch.tensordot(torch.linalg.cholesky(psi), normals(len(psi), *shape, seed=seed), dims=1)


def check(estimate: Tensor, psi: Tensor, count: int) -> None:
    # An entry from `count` complex samples has variance Psi_ii Psi_jj / count, shared by its two parts.
    error = (psi.diag().real[:, None] * psi.diag().real / count).sqrt()
    assert ((estimate - psi).abs() / error).max() < 5
    assert torch.equal(estimate, estimate.mH)


def test_covariance_of_a_noise_scan() -> None:
    psi = known()
    check(noise_covariance(noise_of(psi, 40, 50)), psi, 2000)
    check(noise_covariance(noise_of(psi, 2000).to(torch.complex64).numpy()), psi, 2000)


def test_covariance_of_the_background() -> None:
    """The noise of orthonormal FFT images is that of k-space; the object stays out of the corners."""
    psi = known()
    images = torch.fft.ifft2(noise_of(psi, 100, 120), norm="ortho")
    images[:, 20:80, 20:100] += 100
    check(background_covariance(images), psi, 4 * 10 * 12)
    region = torch.zeros(100, 120)
    region[:20] = 1
    check(background_covariance(images, region), psi, 20 * 120)
    assert int(corners(100, 120).sum()) == 4 * 10 * 12
    assert corners(3, 3).sum() == 4


def test_whitened_noise_is_white_with_noise_std_1() -> None:
    psi = known()
    matrix = whitening_matrix(psi)
    torch.testing.assert_close(matrix @ psi @ matrix.mH, torch.eye(4, dtype=torch.complex128))
    assert torch.equal(matrix, matrix.tril())
    white = whiten(noise_of(psi, 50, 60), matrix)
    check(noise_covariance(white), torch.eye(4).to(white), 3000)
    # 24 000 numbers: a standard error of 1 / sqrt(48 000) = 0.0046.
    assert torch.view_as_real(white).std().item() == pytest.approx(1, abs=5 * 0.0046)


def test_whitening_k_space_and_maps_keeps_the_image() -> None:
    maps, x = normals(4, 6, 7).to(torch.complex64), torch.randn(2, 2, 6, 7)
    mask, matrix = torch.rand(6, 7) < 0.7, whitening_matrix(known())
    y = SenseMRI(maps, mask).forward(x)
    white = whiten(y, matrix)
    assert white.dtype == torch.complex64
    torch.testing.assert_close(white, SenseMRI(whiten(maps, matrix), mask).forward(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("signal", [False, True])
def test_noise_std_from_the_rim_of_k_space(signal: bool) -> None:
    mask = torch.rand(64, 48, generator=torch.Generator().manual_seed(2)) < 0.5
    k_space = 0.05 * normals(3, 64, 48)
    if signal:
        rows, columns = (torch.arange(n).double() - n // 2 for n in (64, 48))
        k_space += 50 * torch.exp(-(rows[:, None].square() + columns.square()) / 20)
    count = 0.3 * 3 * 64 * 48 * 0.5 * 2
    # The median of |N(0, 1)| has standard error 1 / (2 f sqrt(count)), f = 0.636 its density there, and
    # 0.674 is its size: relative 1.17 / sqrt(count).
    estimate = estimate_noise_std(k_space * mask, mask)
    assert estimate == pytest.approx(0.05, rel=5 * 1.17 / math.sqrt(count))
    assert estimate_noise_std(k_space[None] * mask, mask, outer=0.2) == pytest.approx(estimate, rel=0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: noise_covariance(torch.ones(4, 100)), "complex"),
        (lambda: noise_covariance(normals(4, 7)), "at least 8"),
        (lambda: noise_covariance(normals(4, 9) * torch.nan), "NaN"),
        (lambda: background_covariance(normals(4, 20)), "coils"),
        (lambda: background_covariance(normals(2, 4, 20, 20)), r"\[coils, H, W\]"),
        (lambda: background_covariance(normals(4, 20, 20), np.ones((20, 19))), "background"),
        (lambda: background_covariance(normals(4, 5, 5)), "background region"),
        (lambda: corners(9, 9, 0.6), "0.5"),
        (lambda: whitening_matrix(torch.ones(3, 3)), "dead"),
        (lambda: whitening_matrix(normals(3, 3)), "Hermitian"),
        (lambda: whitening_matrix(torch.ones(3)), "Hermitian"),
        (lambda: whiten(normals(3, 4, 4), torch.eye(2)), "2 coils"),
        (lambda: estimate_noise_std(normals(3, 4, 4), torch.ones(4, 4)), "100 numbers|numbers of median"),
        (lambda: estimate_noise_std(normals(3, 40, 40) * 0, torch.ones(40, 40)), "noise_std"),
        (lambda: estimate_noise_std(normals(3, 40, 40), torch.ones(40, 30)), "mask"),
        (lambda: estimate_noise_std(normals(3, 40, 40), torch.ones(40, 40), outer=0), "share"),
    ],
)
def test_refuses(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
