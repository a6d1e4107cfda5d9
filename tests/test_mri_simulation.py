"""Simulated k-space: maps as coils have them, noise as it is asked for, and nothing but its arguments."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alpenglow.mri_simulation import simulate_coil_maps, simulate_kspace
from alpenglow.operators import SenseMRI
from alpenglow.operators.coil_noise import noise_covariance
from tests.scans import BRAIN, brain, columns, head


def correlated(coils: int, noise_std: float = 0.05) -> torch.Tensor:
    """A covariance of different coils that share noise."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.eye(coils) + 0.3 * torch.randn(coils, coils, dtype=torch.complex64, generator=generator)
    return noise_std**2 * mixing @ mixing.mH


@settings(max_examples=20, deadline=None)
@given(
    coils=st.integers(1, 20), height=st.integers(2, 12), width=st.integers(2, 12), slices=st.integers(1, 2),
    seed=st.integers(0, 5),
)  # fmt: skip
def test_maps_have_unit_sum_of_squares(coils: int, height: int, width: int, slices: int, seed: int) -> None:
    maps = simulate_coil_maps(coils, (height, width), slices=slices, seed=seed)
    assert maps.shape == (slices, coils, height, width)
    assert torch.allclose(maps.abs().square().sum(1), torch.ones(slices, height, width), atol=1e-5)
    assert torch.equal(maps, simulate_coil_maps(coils, (height, width), slices=slices, seed=seed))


def test_maps_are_smooth_and_differ() -> None:
    maps = simulate_coil_maps(8, (64, 64), slices=2)[0]
    rows, across = torch.linspace(-1, 1, 64)[:, None], torch.linspace(-1, 1, 64)
    inside = (rows**2 + across**2 < 0.85)[1:, 1:]
    for axis in (1, 2):
        change = maps.diff(dim=axis)[:, -63:, -63:].abs()
        assert change[:, inside].max() < 0.12
    # Each coil sees its own part: no two maps are alike, and where one is strongest others are weak.
    overlap = torch.einsum("chw,dhw->cd", maps.conj(), maps).abs()
    overlap = overlap / overlap.diagonal().sqrt().outer(overlap.diagonal().sqrt())
    assert overlap.fill_diagonal_(0).max() < 0.8
    assert (maps.abs().amax((1, 2)) > 0.8).all()
    assert maps[0].angle()[inside.nonzero()[:, 0], inside.nonzero()[:, 1]].std() > 0.1
    assert not torch.equal(maps, simulate_coil_maps(8, (64, 64), slices=2)[1])
    assert not torch.allclose(maps, simulate_coil_maps(8, (64, 64), seed=1)[0], atol=0.1)


def test_kspace_is_sense_of_the_truth_plus_noise() -> None:
    mask = columns(40, 33, 8)
    covariance = correlated(5)
    made = simulate_kspace(head(2, 40, 33), coils=5, covariance=covariance, mask=mask, seed=3)
    assert torch.equal(made.kspace.sampling_mask(1), mask)
    assert made.kspace.truth is not None
    assert torch.allclose(made.kspace.truth[1], head(2, 40, 33)[1], atol=1e-6)
    assert made.images.angle()[made.images.abs() > 0.1].std() > 0.1
    errors = []
    for index in range(2):
        image = made.images[index]
        operator = SenseMRI(made.coil_maps[index], mask)
        clean = operator.forward(torch.stack([image.real, image.imag])[None])[0]
        errors.append((made.kspace[index] - clean)[:, mask])
    found = noise_covariance(torch.cat(errors, 1))
    assert (found - covariance).abs().max() < 0.1 * covariance.abs().max()
    assert made.kspace.noise is not None
    assert (noise_covariance(made.kspace.noise) - covariance).abs().max() < 0.05 * covariance.abs().max()


def test_it_is_a_function_of_the_seed() -> None:
    def made(seed: int, noise_std: float = 0.1) -> torch.Tensor:
        covariance = noise_std**2 * torch.eye(3)
        return simulate_kspace(head(1, 16, 16)[0], coils=3, covariance=covariance, seed=seed).kspace[0]

    state = torch.random.get_rng_state()
    assert torch.equal(made(0), made(0))
    assert torch.equal(state, torch.random.get_rng_state())
    assert not torch.allclose(made(0), made(1), atol=0.1)
    assert torch.allclose(made(0, 0.0) + (made(0) - made(0, 0.0)), made(0))
    assert torch.equal(
        simulate_kspace(head(1, 16, 16), coils=3, covariance=torch.eye(3), seed=4).coil_maps,
        simulate_coil_maps(3, (16, 16), seed=4),
    )


@pytest.mark.skipif(not BRAIN.is_file(), reason="`make data` has not been run")
def test_a_real_brain_is_recovered_from_what_is_measured() -> None:
    mask = columns(112, 96, 12)
    made = simulate_kspace(brain()[::2, ::2], coils=8, covariance=1e-6 * torch.eye(8), mask=mask)
    operator = SenseMRI(made.coil_maps[0], mask)
    sigma = torch.full((1,), 100.0)
    solved = operator.solve(operator.adjoint(made.kspace[0][None]) / 1e-6, sigma, 1e-3)
    image = torch.complex(solved[0, 0], solved[0, 1])
    assert (image - made.images[0]).abs().mean() < 0.01


def test_refused() -> None:
    good = torch.ones(8, 8)
    for magnitude, covariance, message in (
        (-good, torch.eye(2), "at least 0"),
        (good * torch.nan, torch.eye(2), "finite"),
        (good[0], torch.eye(2), r"\[H, W\] or"),
        (good, torch.eye(3), r"expected a Hermitian \[2, 2\]"),
        (good, torch.tensor([[1.0, 0.5], [0.2, 1]]), "Hermitian"),
        (good, torch.tensor([[1.0, 2], [2, 1]]), "has the eigenvalue -1; expected none below 0"),
    ):
        with pytest.raises(ValueError, match=message):
            simulate_kspace(magnitude, coils=2, covariance=covariance)
    with pytest.raises(ValueError, match="expected positive numbers"):
        simulate_coil_maps(0, (8, 8))
    with pytest.raises(ValueError, match="expected bool"):
        simulate_kspace(good, coils=2, covariance=torch.eye(2), mask=torch.ones(4, 8, dtype=torch.bool))
