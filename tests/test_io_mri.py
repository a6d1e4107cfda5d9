"""k-space of every format there and back, and read slice by slice."""

import subprocess
import sys
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alpenglow.io import KSpace, open_kspace, write_kspace
from alpenglow.io.fastmri import open_fastmri, write_fastmri
from alpenglow.operators import FourierSampling
from tests.scans import BRAIN, VOXEL, brain, columns, oblique, random_kspace, simulation, slices_of

SUFFIXES = (".h5", ".mrd", ".cfl", ".npy")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_round_trip(suffix: str, tmp_path: Path) -> None:
    kspace = simulation(mask=columns(24, 17, 4)).kspace
    path = tmp_path / f"scan{suffix}"
    write_kspace(path, kspace)
    back = open_kspace(path)
    assert back.shape == kspace.shape
    assert torch.equal(slices_of(back), slices_of(kspace))
    assert back[0].dtype == torch.complex64
    for index in range(2):
        assert torch.equal(back.sampling_mask(index), kspace.sampling_mask(index))
    assert str(path.stem) in back.source
    assert {file.stem for file in tmp_path.iterdir()} == {"scan"}, "a temporary file is left"
    if suffix in (".h5", ".mrd"):
        assert back.voxel_size == pytest.approx(VOXEL)
        assert back.affine is not None
        assert back.affine == pytest.approx(oblique(), abs=1e-4)
        assert back.header is not None
        assert back.header.encoded.matrix == (24, 17, 1)
    else:
        assert back.voxel_size is back.affine is back.header is None
    if suffix == ".h5":
        assert back.truth is not None
        assert kspace.truth is not None
        assert torch.equal(back.truth[1], kspace.truth[1])
        assert back.mask is not None
        assert back.mask.equal(columns(24, 17, 4))


@settings(max_examples=25, deadline=None)
@given(
    slices=st.integers(1, 3),
    coils=st.integers(1, 4),
    height=st.integers(4, 9),
    width=st.integers(4, 9),
    suffix=st.sampled_from(SUFFIXES),
)
def test_round_trip_of_any_shape(
    slices: int, coils: int, height: int, width: int, suffix: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = random_kspace((slices, coils, height, width), seed=slices + 10 * coils)
    path = tmp_path_factory.mktemp("scan") / f"scan{suffix}"
    write_kspace(path, KSpace(data, voxel_size=VOXEL))
    assert torch.equal(slices_of(open_kspace(path)), data)


@pytest.mark.skipif(not BRAIN.is_file(), reason="`make data` has not been run")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_round_trip_of_a_real_brain(suffix: str, tmp_path: Path) -> None:
    from alpenglow.mri_simulation import simulate_kspace

    image = brain()
    made = simulate_kspace(image, coils=4, covariance=1e-6 * torch.eye(4), seed=1)
    path = tmp_path / f"brain{suffix}"
    write_kspace(path, made.kspace)
    back = open_kspace(path)[0]
    assert torch.equal(back, made.kspace[0])
    coil_images = torch.fft.fftshift(
        torch.fft.ifft2(torch.fft.ifftshift(back, dim=(-2, -1)), norm="ortho"), dim=(-2, -1)
    )
    combined = (coil_images * made.coil_maps[0].conj()).sum(0).abs()
    assert (combined - image).abs().max() < 0.01


def test_the_convention_is_that_of_the_operators() -> None:
    made = simulation(slices=1, coils=2, height=10, width=7)
    image = made.coil_maps[0, 1] * made.images[0]
    operator = FourierSampling(torch.ones(10, 7))
    expected = operator.forward(torch.stack([image.real, image.imag])[None])[0, 0]
    assert (made.kspace[0][1] - expected).abs().max() < 0.06  # noise of 0.01


def test_single_coil_fastmri(tmp_path: Path) -> None:
    path = tmp_path / "knee.h5"
    with h5py.File(path, "w") as file:
        file["kspace"] = random_kspace((3, 8, 6)).numpy()
        file["mask"] = np.array([0, 1, 0, 1, 1, 0], np.float32)
        file["reconstruction_esc"] = np.full((3, 4, 4), 2.0, np.float32)
    kspace = open_fastmri(path)
    assert kspace.shape == (3, 1, 8, 6)
    assert torch.equal(kspace[2][0], random_kspace((3, 8, 6))[2])
    assert torch.equal(kspace.sampling_mask(0)[5], torch.tensor([0, 1, 0, 1, 1, 0], dtype=torch.bool))
    assert kspace.truth is not None
    assert kspace.truth[0].shape == (4, 4)
    assert kspace.voxel_size is None
    write_fastmri(tmp_path / "again.h5", kspace)
    with h5py.File(tmp_path / "again.h5") as file:
        assert file["kspace"].shape == (3, 8, 6)
        assert file["mask"].shape == (6,)
        assert file["reconstruction_esc"].shape == (3, 4, 4)
        assert file.attrs["max"] == 2
        assert file.attrs["norm"] == pytest.approx(2 * 48**0.5)


def test_a_scanners_header(tmp_path: Path) -> None:
    """As a scanner writes it: other elements, an XML declaration, fewer columns than the matrix."""
    grid = "<matrixSize><x>{}</x><y>{}</y><z>1</z></matrixSize>"
    sides = "<fieldOfView_mm><x>{}</x><y>{}</y><z>4.5</z></fieldOfView_mm>"
    header = f"""<?xml version="1.0" encoding="utf-8"?>
<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD" xmlns:xs="http://www.w3.org/2001/XMLSchema">
  <acquisitionSystemInformation><systemVendor>S</systemVendor>
    <relativeReceiverNoiseBandwidth>0.793</relativeReceiverNoiseBandwidth></acquisitionSystemInformation>
  <experimentalConditions><H1resonanceFrequency_Hz>123255074</H1resonanceFrequency_Hz></experimentalConditions>
  <encoding><encodedSpace>{grid.format(32, 20)}{sides.format(280, 162.4)}</encodedSpace>
    <reconSpace>{grid.format(16, 16)}{sides.format(140, 140)}</reconSpace>
    <encodingLimits><kspace_encoding_step_1><minimum>0</minimum><maximum>15</maximum><center>8</center>
    </kspace_encoding_step_1></encodingLimits><trajectory>cartesian</trajectory></encoding>
</ismrmrdHeader>"""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["kspace"] = random_kspace((2, 3, 32, 18)).numpy()
        file["ismrmrd_header"] = np.bytes_(header.encode())
    kspace = open_kspace(tmp_path / "a.h5")
    assert kspace.voxel_size == pytest.approx((280 / 32, 162.4 / 18, 4.5))
    assert kspace.header is not None
    assert kspace.header.recon.matrix == (16, 16, 1)
    assert kspace.header.recon.field_of_view == (140, 140, 4.5)
    assert kspace.header.centre == 8
    assert kspace.header.receiver_noise_bandwidth == 0.793
    write_kspace(tmp_path / "b.h5", kspace)
    assert open_kspace(tmp_path / "b.h5").header == kspace.header


def test_margins_of_zeros_were_not_measured_whatever_the_mask_says(tmp_path: Path) -> None:
    data = random_kspace((1, 2, 8, 6))
    data[..., :2] = 0
    write_kspace(tmp_path / "a.h5", KSpace(data, mask=torch.ones(8, 6, dtype=torch.bool)))
    assert open_kspace(tmp_path / "a.h5").sampling_mask(0).any(0).tolist() == [False] * 2 + [True] * 4


def test_a_mask_of_points_keeps_its_rows(tmp_path: Path) -> None:
    mask = torch.rand(8, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    write_kspace(tmp_path / "a.h5", KSpace(random_kspace((1, 2, 8, 6)) * mask, mask=mask))
    assert torch.equal(open_kspace(tmp_path / "a.h5").sampling_mask(0), mask)


def test_bart_stores_columns_first(tmp_path: Path) -> None:
    data = random_kspace((2, 3, 5, 4))
    write_kspace(tmp_path / "a.cfl", KSpace(data))
    assert (tmp_path / "a.hdr").read_text().split("\n")[1] == "5 4 1 3 1 1 1 1 1 1 1 1 1 2 1 1"
    flat = np.fromfile(tmp_path / "a.cfl", np.complex64)
    stored = flat.reshape((5, 4, 1, 3, *[1] * 9, 2, 1, 1), order="F")
    assert np.array_equal(stored[:, :, 0, :, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0], data[1].permute(1, 2, 0))
    assert open_kspace(tmp_path / "a.hdr").shape == (2, 3, 5, 4)


def test_npy_of_one_slice_and_of_double_precision(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.asfortranarray(random_kspace((3, 5, 4)).numpy().astype(">c16")))
    assert torch.equal(open_kspace(tmp_path / "a.npy")[0], random_kspace((3, 5, 4)))


@pytest.mark.parametrize("suffix", [".h5", ".cfl", ".npy"])
def test_slices_are_read_one_at_a_time(suffix: str, tmp_path: Path) -> None:
    data = torch.ones(1, 1, 256, 256, dtype=torch.complex64).expand(40, 8, 256, 256)  # 168 MB
    path = tmp_path / f"large{suffix}"
    tracemalloc.start()
    write_kspace(path, KSpace(data))
    kspace = open_kspace(path)
    assert kspace[39].shape == (8, 256, 256)
    assert tracemalloc.get_traced_memory()[1] < 30e6
    tracemalloc.stop()


def test_importing_needs_no_optional_library() -> None:
    script = """
import sys
for name in ("sigpy", "ismrmrd", "nibabel"):
    sys.modules[name] = None
import alpenglow, alpenglow.mri_simulation, alpenglow.io
from alpenglow.io.optional import require
try:
    require("ismrmrd", "reading ISMRMRD")
except ValueError as error:
    assert "pip install 'alpenglow[mri]'" in str(error), error
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", script], check=True)
