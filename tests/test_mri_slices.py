"""A slice as a problem: its grid against FFTs by hand, its noise and scale against what was simulated."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scans import VOXEL, columns, head, oblique, simulation
from torch import Tensor

import alpenglow as ag
from alpenglow.io.kspace import KSpace
from alpenglow.io.mri_header import make_header
from alpenglow.io.reconstructions import centre_crop
from alpenglow.mri.grid import Grid, grid_of
from alpenglow.mri.slices import TYPICAL_PEAK, find_noise, prepare_slice
from alpenglow.mri.volumes import window_of
from alpenglow.mri_simulation import simulate_kspace


def fft(images: Tensor) -> Tensor:
    """The centred orthonormal FFT."""
    unshifted = torch.fft.ifftshift(images, dim=(-2, -1))
    return torch.fft.fftshift(torch.fft.fft2(unshifted, norm="ortho"), dim=(-2, -1))


def ifft(samples: Tensor) -> Tensor:
    unshifted = torch.fft.ifftshift(samples, dim=(-2, -1))
    return torch.fft.fftshift(torch.fft.ifft2(unshifted, norm="ortho"), dim=(-2, -1))


def complex_normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.complex128, generator=torch.Generator().manual_seed(seed))


def oversampled(coils: int = 3, noise_std: float = 0.0) -> tuple[KSpace, Tensor, Tensor]:
    """k-space of 40 rows, of which the header shows the 20 in the middle; those of the image; the maps."""
    shown = head(1, 20, 18)
    whole = torch.zeros(1, 40, 18)
    whole[:, 10:30] = shown
    made = simulate_kspace(
        whole, coils=coils, covariance=noise_std**2 * torch.eye(coils), mask=columns(40, 18, 12),
        voxel_size=VOXEL, affine=oblique(),
    )  # fmt: skip
    header = make_header((1, coils, 40, 18), VOXEL, (20, 18))
    k = made.kspace
    return (
        KSpace(k.data, voxel_size=VOXEL, affine=k.affine, header=header, mask=k.mask, noise=k.noise),
        made.images[0, 10:30],
        made.coil_maps,
    )


def test_the_readout_is_cut_to_what_the_header_shows() -> None:
    image = complex_normal(2, 40, 18)
    image[:, :10] = image[:, 30:] = 0
    grid = Grid((40, 18), (20, 18), (20, 18))
    torch.testing.assert_close(grid.kspace(fft(image)), fft(image[:, 10:30]))
    kspace, _, _ = oversampled()
    assert kspace.header is not None
    assert kspace.header.recon.field_of_view[0] == pytest.approx(kspace.header.encoded.field_of_view[0] / 2)
    assert grid_of(kspace, columns(40, 18, 12), 1) == grid
    odd = make_header((1, 3, 25, 18), VOXEL, (25, 18))
    whole = KSpace(complex_normal(1, 3, 25, 18).to(torch.complex64), voxel_size=VOXEL, header=odd)
    assert grid_of(whole, columns(25, 18, 12), 1).shown == (25, 18)  # nothing is oversampled
    points = columns(40, 18, 12)
    points[0, 0] = ~points[0, 0]  # not every readout is whole
    assert grid_of(kspace, points, 1) == Grid((40, 18), (40, 18), (40, 18))


@given(st.integers(3, 9), st.integers(3, 9), st.integers(1, 8))
def test_padding_keeps_the_image_on_a_finer_grid(height: int, width: int, multiple: int) -> None:
    k = complex_normal(1, height, width)
    measured = torch.ones(height, width, dtype=torch.bool)
    grid = grid_of(KSpace(k.to(torch.complex64)[None]), measured, multiple)
    assert all(
        n % multiple == 0 and n - m < multiple for n, m in zip(grid.size, (height, width), strict=True)
    )
    assert grid.mask(measured).sum() == height * width
    fine, coarse = ifft(grid.kspace(k)), ifft(k)
    # Of the trigonometric polynomial that both sample, at the places of the coarse grid.
    rows, across = (_places(n, m) for n, m in zip((height, width), grid.size, strict=True))
    torch.testing.assert_close(_resample(fine, rows, across), coarse)


def _places(count: int, fine: int) -> Tensor:
    """Places of a coarse grid's pixels in a fine one, of the same field of view."""
    return (torch.arange(count) - count // 2).double() * (fine / count) + fine // 2


def _resample(image: Tensor, rows: Tensor, across: Tensor) -> Tensor:
    """The image's trigonometric polynomial at other places, with its coefficients at hand."""
    k = fft(image)
    height, width = image.shape[-2:]

    def waves(places: Tensor, n: int) -> Tensor:
        frequency = torch.arange(n).double() - n // 2
        return torch.exp(2j * math.pi * (places - n // 2)[:, None] * frequency / n) / math.sqrt(n)

    return waves(rows, height) @ k @ waves(across, width).T


def test_noise_stays_white_and_of_its_std() -> None:
    noise = complex_normal(4000, 12, 6) * math.sqrt(2)  # 1 per real component
    grid = Grid((12, 6), (6, 6), (8, 8))
    white = grid.kspace(noise)[:, grid.mask(torch.ones(12, 6, dtype=torch.bool))] / grid.gain
    covariance = white.mH @ white / (2 * len(white))
    # 36 x 36 entries of standard error 1/sqrt(8000) (diagonal) at most; 4.5 of them is one in 150 000.
    torch.testing.assert_close(
        covariance, torch.eye(36, dtype=covariance.dtype), atol=4.5 / 8000**0.5, rtol=0
    )


def test_maps_are_interpolated_over_the_same_field_of_view() -> None:
    grid = Grid((24, 10), (12, 10), (16, 16))
    rows = torch.arange(24).double()[:, None] - 12
    across = torch.arange(10).double() - 5
    maps = torch.complex(rows * 2 + across, rows - across)[None]
    fine_rows = ((torch.arange(16) - 8) * (12 / 16)).clamp(-6, 5)[:, None]
    fine_across = ((torch.arange(16) - 8) * (10 / 16)).clamp(-5, 4)
    expected = torch.complex(fine_rows * 2 + fine_across, fine_rows - fine_across)[None]
    torch.testing.assert_close(grid.maps(maps), expected.to(torch.complex128))


def mixing(coils: int) -> Tensor:
    """The covariance of coils that share noise."""
    factor = torch.eye(coils, dtype=torch.complex128) + 0.3 * complex_normal(coils, coils, seed=5)
    return 4e-4 * factor @ factor.mH


def test_coils_are_whitened_and_the_noise_is_that_of_the_scan() -> None:
    psi = mixing(4)
    made = simulate_kspace(head(1, 32, 24), coils=4, covariance=psi, seed=1)
    noise = find_noise(made.kspace)
    assert noise.source == "noise scan"
    assert noise.matrix is not None
    whitened = noise.matrix @ psi @ noise.matrix.mH
    # Of a covariance from 16 384 complex samples: relative standard error 1/128.
    torch.testing.assert_close(
        whitened / noise.noise_std**2, torch.eye(4, dtype=psi.dtype), atol=4.5 / 128, rtol=0
    )
    twice = KSpace(made.kspace.data, noise=made.kspace.noise, averages=2)
    assert find_noise(twice).noise_std == pytest.approx(noise.noise_std / math.sqrt(2))
    assert find_noise(made.kspace, 0.5).noise_std == 0.5


def test_without_a_noise_scan_the_noise_is_given_or_estimated() -> None:
    made = simulate_kspace(head(2, 128, 96), coils=4, covariance=0.1**2 * torch.eye(4))
    bare = KSpace(made.kspace.data)
    assert find_noise(bare).noise_std == pytest.approx(0.1, rel=0.1)
    assert "rim" in find_noise(bare).source
    given = find_noise(bare, 0.3)
    assert (given.noise_std, given.matrix, given.source) == (0.3, None, "given")


def test_a_problem_predicts_its_measurement() -> None:
    """y - A truth is noise of noise_std, in the prior's units, with maps from a file."""
    made = simulate_kspace(head(1, 32, 20), coils=4, covariance=mixing(4), mask=columns(32, 20, 8), seed=2)
    noise = find_noise(made.kspace)
    problem = prepare_slice(made.kspace, 0, noise, made.coil_maps, size_multiple=1)
    truth = torch.stack([made.images[0].real, made.images[0].imag])[None] / problem.scale
    residual = (problem.y - problem.operator.forward(truth)[0])[:, problem.operator.mask]
    parts = torch.view_as_real(residual).flatten() / problem.noise_std
    count = len(parts)
    # The whitening is off by 1/128 a coil (above); the mean square has standard error sqrt(2 / count).
    assert parts.square().mean().item() == pytest.approx(1, abs=4 * math.sqrt(2 / count) + 3 / 128)
    peak = truth.square().sum(1).sqrt().quantile(0.99).item()
    assert peak == pytest.approx(TYPICAL_PEAK, rel=0.1)


def test_the_posterior_holds_the_image_in_the_units_of_the_file() -> None:
    """A broad Gaussian prior, every second column, four coils: cut, sampled, scaled back."""
    kspace, image, maps = oversampled(coils=4, noise_std=1e-3)
    problem = prepare_slice(kspace, 0, find_noise(kspace), maps)
    shape = (2, *problem.grid.size)
    prior = ag.priors.GaussianPrior(torch.zeros(shape), torch.eye(math.prod(shape)))
    posterior = ag.sample(
        prior, problem.operator, problem.y, noise_std=problem.noise_std, num_samples=16, nfe=20, weigh=False
    ).scaled(problem.scale)
    moduli = posterior.magnitude()
    truth = image.abs()
    tissue = truth > 0.2
    assert ((moduli.mean[0] - truth).abs() / truth)[tissue].median() < 0.03
    assert moduli.diagnostics["ess_pooled"] == posterior.diagnostics["ess_pooled"]


def test_a_padded_slice_is_what_its_operator_measures_of_the_finer_image() -> None:
    """As a scanner measures: the middle of the k-space of an image that is finer than its samples tell."""
    made = simulate_kspace(head(1, 24, 24), coils=4, covariance=1e-8 * torch.eye(4))
    grid = Grid((20, 18), (20, 18), (24, 24))
    data = made.kspace.data
    assert isinstance(data, Tensor)
    kspace = KSpace(centre_crop(data, (20, 18)) / grid.gain)
    coarse_maps = Grid((24, 24), (24, 24), (20, 18)).maps(made.coil_maps[0])[None]
    problem = prepare_slice(kspace, 0, find_noise(kspace, 1e-4), coarse_maps, size_multiple=8)
    assert problem.grid == grid
    assert problem.noise_std * problem.scale == pytest.approx(1e-4 * grid.gain)
    truth = torch.stack([made.images[0].real, made.images[0].imag])[None] / problem.scale
    residual = problem.y - problem.operator.forward(truth)[0] * problem.operator.mask
    # Half a percent is what maps lose that are interpolated there and back.
    assert residual.norm() / problem.y.norm() < 0.01


def test_windows_stay_where_the_patient_is() -> None:
    kspace, _, _ = oversampled()
    cut = window_of(kspace, Grid((40, 18), (20, 18), (20, 18)))
    assert cut.size == (20, 18)
    assert cut.voxel_size == pytest.approx(VOXEL)
    fine = window_of(kspace, Grid((40, 18), (20, 18), (24, 24)), first=2)
    assert fine.size == (24, 24)
    assert fine.voxel_size == pytest.approx((VOXEL[0] * 20 / 24, VOXEL[1] * 18 / 24, VOXEL[2]))
    # The middle of the field of view is one place, on every grid.
    assert kspace.affine is not None
    assert cut.affine is not None
    assert fine.affine is not None
    middle = kspace.affine @ [20, 9, 0, 1]
    np.testing.assert_allclose(cut.affine @ [10, 9, 0, 1], middle)
    np.testing.assert_allclose(fine.affine @ [12, 12, 0, 1], kspace.affine @ [20, 9, 2, 1])
    whole = window_of(kspace, Grid((40, 18), (40, 18), (40, 18)))
    assert whole.size == (20, 18)
    np.testing.assert_allclose(whole.affine @ [10, 9, 0, 1], middle)


def test_a_slice_of_zeros_is_refused() -> None:
    made = simulation()
    data = made.kspace.data
    assert isinstance(data, Tensor)
    kspace = KSpace(torch.cat([data[:1], torch.zeros_like(data[:1])]))
    with pytest.raises(ValueError, match="slice 1 of k-space holds no sample"):
        prepare_slice(kspace, 1, find_noise(kspace, 0.01), made.coil_maps)
