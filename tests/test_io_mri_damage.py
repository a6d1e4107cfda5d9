"""k-space of every format: one clear error for every bad file, and nothing partial left."""

import dataclasses
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from alpenglow.io import KSpace, open_kspace, write_kspace
from alpenglow.io.mri_header import make_header
from tests.scans import VOXEL, oblique, random_kspace, simulation, slices_of

SUFFIXES = (".h5", ".mrd", ".cfl", ".npy")


def truncate(path: Path, share: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])


def hdf5(path: Path, **datasets: Any) -> None:
    with h5py.File(path, "w") as file:
        for name, value in datasets.items():
            file[name] = value


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.97])
def test_a_truncated_file_is_one_error(suffix: str, share: float, tmp_path: Path) -> None:
    path = tmp_path / f"scan{suffix}"
    write_kspace(path, simulation().kspace)
    truncate(path, share)
    with pytest.raises(ValueError, match=f"{path}"):
        slices_of(open_kspace(path))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_nan_is_not_read(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"scan{suffix}"
    write_kspace(path, simulation().kspace)
    if suffix in (".h5", ".mrd"):
        with h5py.File(path, "a") as file:
            if suffix == ".h5":
                file["kspace"][1, 2, 3, 4] = np.nan
            else:
                line = file["dataset/data"][-1]
                line["data"][5] = np.nan
                file["dataset/data"][-1] = line
    else:
        data = bytearray((path).read_bytes())
        data[-8:] = np.complex64(np.nan).tobytes()
        path.write_bytes(data)
    kspace = open_kspace(path)
    assert kspace[0].isfinite().all()
    with pytest.raises(ValueError, match=r"slice 1 of .* holds NaN or infinity"):
        kspace[1]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_nan_is_not_written_and_an_older_file_stays(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"scan{suffix}"
    data = random_kspace((3, 2, 6, 6))
    data[2, 0, 0, 0] = complex("nan")
    bad = KSpace(data, voxel_size=VOXEL)
    with pytest.raises(ValueError, match="slice 2 of k-space holds NaN"):
        write_kspace(path, bad)
    assert not list(tmp_path.iterdir())
    write_kspace(path, KSpace(random_kspace((1, 2, 6, 6)), voxel_size=VOXEL))
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="slice 2 of k-space holds NaN"):
        write_kspace(path, bad)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_bad_fastmri(tmp_path: Path) -> None:
    path = tmp_path / "scan.h5"
    good = random_kspace((2, 3, 12, 8)).numpy()
    header = make_header((2, 3, 12, 8), VOXEL, (12, 8)).xml
    for datasets, message in (
        ({"image": good}, "no dataset `kspace`, only image"),
        ({}, "no dataset `kspace`, only nothing"),
        ({"kspace": good.real}, r"float32 \(2, 3, 12, 8\); expected complex"),
        ({"kspace": good[0, 0]}, "expected complex"),
        ({"kspace": good.transpose(0, 2, 3, 1)}, "more coils"),
        ({"kspace": good.transpose(0, 1, 3, 2), "ismrmrd_header": header}, "matrix of 12 x 8.*transpose"),
        ({"kspace": good, "ismrmrd_header": header[:-50]}, "header of .* cannot be read"),
        ({"kspace": good, "ismrmrd_header": "<ismrmrdHeader/>"}, "it has no encoding"),
        ({"kspace": good, "ismrmrd_header": header.replace("<x>12</x>", "<x>0</x>")}, "expected positive"),
        ({"kspace": good, "mask": np.ones(12)}, r"`mask` of .* \(12,\).*expected 0 and 1, \[8\]"),
        ({"kspace": good, "mask": np.full(8, 0.5)}, "expected 0 and 1"),
        ({"kspace": good, "reconstruction_rss": np.ones((3, 4, 4))}, "an image a slice"),
    ):
        hdf5(path, **datasets)
        with pytest.raises(ValueError, match=message):
            open_kspace(path)
    path.write_bytes(b"not HDF5 at all")
    with pytest.raises(ValueError, match="not an HDF5 file"):
        open_kspace(path)


def test_a_damaged_chunk_is_an_error_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "scan.h5"
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset(
            "kspace", data=random_kspace((2, 2, 8, 8)), chunks=(1, 2, 8, 8), fletcher32=True
        )
        start = dataset.id.get_chunk_info(1).byte_offset
    data = bytearray(path.read_bytes())
    data[start + 8] ^= 0xFF
    path.write_bytes(data)
    kspace = open_kspace(path)
    kspace[0]
    with pytest.raises(ValueError, match="truncated or damaged"):
        kspace[1]


def test_bad_bart(tmp_path: Path) -> None:
    path = tmp_path / "scan.cfl"

    def bart(sizes: str, samples: int) -> None:
        (tmp_path / "scan.hdr").write_text(f"# Dimensions\n{sizes}\n")
        np.zeros(samples, np.complex64).tofile(path)

    for sizes, samples, message in (
        ("8 6 1 2", 95, r"760 bytes, and its .hdr says .*: 768 bytes; it is truncated"),
        ("8 6 1 2", 97, "776 bytes"),
        ("8 6 2 1", 96, "2 entries along dimension 2.*bart transpose 2 13"),
        ("8 6 1 1 2", 96, "bart slice 4 0"),
        ("8 6 1 1 1 3", 144, "dimension 5, expected 1"),
        ("8 6 1 -2", 96, "expected up to 16 positive numbers"),
        ("8 6 one", 96, "expected `# Dimensions`"),
        ("", 96, "expected up to 16"),
        ("2 6 1 8", 96, "more coils"),
    ):
        bart(sizes, samples)
        with pytest.raises(ValueError, match=message):
            open_kspace(path)
    (tmp_path / "scan.hdr").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="expected `# Dimensions`"):
        open_kspace(path)
    (tmp_path / "scan.hdr").unlink()
    with pytest.raises(ValueError, match=r"scan\.hdr: no such file"):
        open_kspace(path)


def test_bad_npy(tmp_path: Path) -> None:
    path = tmp_path / "scan.npy"
    for array, message in (
        (np.zeros((2, 3, 4, 4)), "float64"),
        (np.zeros((4, 4), complex), r"expected complex \[slices"),
        (np.zeros((1, 4, 4, 2), complex), "more coils"),
        (np.zeros((0, 2, 4, 4), complex), r"expected \[slices, coils, H, W\]|truncated or damaged"),
    ):
        np.save(path, array)
        with pytest.raises(ValueError, match=message):
            open_kspace(path)
    with path.open("wb") as stream:
        np.savez(stream, kspace=np.zeros((1, 2, 4, 4), complex))
    with pytest.raises(ValueError, match="archive of arrays"):
        open_kspace(path)


def test_other_names_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ends in \.h5, .*\.npy"):
        open_kspace(tmp_path / "scan.dat")
    with pytest.raises(ValueError, match="cannot write"):
        write_kspace(tmp_path / "scan.dat", simulation().kspace)
    for suffix in SUFFIXES:
        with pytest.raises(ValueError, match="no such file"):
            open_kspace(tmp_path / f"scan{suffix}")


def test_parts_that_do_not_fit() -> None:
    kspace = simulation().kspace
    for change, message in (
        ({"data": torch.zeros(2, 3, 4)}, r"expected \[slices, coils, H, W\]"),
        ({"mask": torch.ones(17, 24, dtype=torch.bool)}, r"expected bool \[H, W\]"),
        ({"mask": torch.ones(24, 17)}, r"expected bool \[H, W\]"),
        ({"truth": torch.zeros(3, 24, 17)}, "an image a slice"),
        ({"noise": torch.zeros(2, 100)}, r"expected \[3, samples\]"),
        ({"calibration": torch.zeros(2, 3, 24, 16)}, "the calibration of"),
        ({"voxel_size": None}, "give both"),
        ({"voxel_size": (1.2, 0.9, 5.0)}, "give the same"),
        ({"voxel_size": (1.2, 0.9, 0.0), "affine": None}, "expected .* in mm"),
        ({"affine": np.eye(3)}, "expected 4x4"),
        ({"affine": oblique() * np.nan}, "expected 4x4"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(kspace, **change)
    with pytest.raises(IndexError, match="the slices 0 to 1"):
        kspace[2]
    assert len(list(kspace)) == 2
