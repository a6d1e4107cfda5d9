"""Coil maps from files, and by ESPIRiT from calibration lines: how good they are, and what is refused."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alpenglow.io import KSpace, estimate_coil_maps, open_coil_maps, write_kspace
from alpenglow.io.coil_maps import calibration_width
from alpenglow.mri_simulation import Simulation, simulate_kspace
from alpenglow.operators import SenseMRI
from tests.scans import BRAIN, brain, columns, head, simulation

pytest.importorskip("sigpy")


def agreement(maps: Tensor, made: Simulation) -> tuple[float, float]:
    """(share of the object's pixels with maps, mean |<estimated, true>| there: 1 is exact up to a phase)."""
    known = maps.abs().sum(0) > 0
    tissue = made.images[0].abs() > 0.05
    products = (maps.conj() * made.coil_maps[0]).sum(0).abs()
    return (known & tissue).sum().item() / tissue.sum().item(), products[known & tissue].mean().item()


@pytest.mark.parametrize("lines", [12, 24])
def test_espirit_finds_the_maps_of_the_simulation(lines: int) -> None:
    mask = columns(64, 60, lines, step=3)
    made = simulate_kspace(head(1, 64, 60), coils=6, covariance=1e-6 * torch.eye(6), mask=mask)
    maps = estimate_coil_maps(made.kspace[0], made.kspace.sampling_mask(0))
    share, product = agreement(maps, made)
    assert share > 0.99
    assert product > (0.995 if lines == 12 else 0.999)
    squares = maps.abs().square().sum(0)
    assert ((squares - 1).abs() < 1e-3)[squares > 0].all()


@pytest.mark.skipif(not BRAIN.is_file(), reason="`make data` has not been run")
def test_espirit_on_a_real_brain() -> None:
    mask = columns(224, 192, 16, step=4)
    made = simulate_kspace(brain(), coils=8, covariance=4e-4 * torch.eye(8), mask=mask, seed=1)
    maps = estimate_coil_maps(made.kspace[0], mask)
    share, product = agreement(maps, made)
    assert share > 0.99
    assert product > 0.999
    SenseMRI(maps, mask)


def test_a_dead_coil_and_calibration_of_its_own() -> None:
    made = simulation(slices=1, coils=4, height=40, width=40)
    data = made.kspace[0]
    data[0] = 0
    middle = columns(40, 40, 20, step=100)
    kspace = KSpace((data * columns(40, 40, 0))[None], calibration=(data * middle)[None])
    lines, known = kspace.calibration_lines(0)
    assert torch.equal(known, middle)
    maps = estimate_coil_maps(lines, known)
    assert maps.isfinite().all()
    assert maps[0].abs().max() < 1e-3
    with pytest.raises(ValueError, match="has 0 fully sampled lines"):
        estimate_coil_maps(kspace[0], kspace.sampling_mask(0) & ~middle)


@settings(max_examples=30, deadline=None)
@given(height=st.integers(4, 20), width=st.integers(4, 20), lines=st.integers(0, 20))
def test_calibration_width(height: int, width: int, lines: int) -> None:
    lines = min(lines, width)
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[:, width // 2 - lines // 2 : width // 2 - lines // 2 + lines] = True
    assert calibration_width(mask) == min(lines, height)
    mask[height // 2, width // 2] = False
    assert calibration_width(mask) == 0


def test_missing_calibration_says_how_much_is_there() -> None:
    made = simulation(slices=1, height=40, width=40, mask=columns(40, 40, 9))
    with pytest.raises(ValueError, match=r"has 9 fully sampled lines, ESPIRiT needs 12; give coil maps"):
        estimate_coil_maps(made.kspace[0], made.kspace.sampling_mask(0))
    with pytest.raises(ValueError, match="has 9 fully sampled lines, ESPIRiT needs 10"):
        estimate_coil_maps(made.kspace[0], made.kspace.sampling_mask(0), kernel_width=5)


def test_bad_calibration() -> None:
    full = torch.ones(20, 20, dtype=torch.bool)
    data = torch.ones(2, 20, 20, dtype=torch.complex64)
    for k_space, mask, message in (
        (0 * data, full, "are all 0"),
        (data * float("nan"), full, "NaN"),
        (data.real, full, "expected complex"),
        (data[0], full, "expected complex"),
        (data, full[1:], r"\[coils, H, W\] and \[H, W\]"),
    ):
        with pytest.raises(ValueError, match=message):
            estimate_coil_maps(k_space, mask)


def test_maps_from_files(tmp_path: Path) -> None:
    made = simulation()
    np.save(tmp_path / "maps.npy", made.coil_maps.numpy())
    write_kspace(tmp_path / "maps.cfl", KSpace(made.coil_maps))
    with h5py.File(tmp_path / "maps.h5", "w") as file:
        file["coil_maps"] = made.coil_maps.numpy()
        file["other/maps"] = made.coil_maps.numpy().astype(np.complex128)
    for name, dataset in (
        ("maps.npy", ""),
        ("maps.cfl", ""),
        ("maps.h5", "coil_maps"),
        ("maps.h5", "other/maps"),
    ):
        maps = open_coil_maps(tmp_path / name, made.kspace, dataset=dataset)
        assert torch.equal(maps[1], made.coil_maps[1])


def test_maps_of_one_slice(tmp_path: Path) -> None:
    made = simulation(slices=1)
    np.save(tmp_path / "maps.npy", made.coil_maps[0].numpy())
    with h5py.File(tmp_path / "maps.hdf5", "w") as file:
        file["coil_maps"] = made.coil_maps[0].numpy()
    for name in ("maps.npy", "maps.hdf5"):
        assert torch.equal(open_coil_maps(tmp_path / name, made.kspace)[0], made.coil_maps[0])


def test_bad_files_of_maps(tmp_path: Path) -> None:
    made = simulation()
    np.save(tmp_path / "maps.npy", made.coil_maps[:, :2].numpy())
    with h5py.File(tmp_path / "maps.h5", "w") as file:
        file["magnitude"] = made.coil_maps.abs().numpy()
    for name, dataset, message in (
        ("maps.npy", "", r"shape \(2, 2, 24, 17\), .* \(2, 3, 24, 17\); expected the same"),
        ("maps.h5", "coil_maps", "no dataset `coil_maps`, only magnitude"),
        ("maps.h5", "magnitude", "holds float32 .*expected complex"),
        ("maps.png", "", "ends in"),
        ("none.npy", "", "no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            open_coil_maps(tmp_path / name, made.kspace, dataset=dataset)
