"""Reconstructed volumes: NIfTI with its place in the patient, fastMRI's HDF5, the middle of images."""

import gzip
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alpenglow.io import open_reconstruction, write_nifti, write_reconstruction
from alpenglow.io.reconstructions import centre_crop, cropped_affine
from tests.scans import VOXEL, head, oblique

VOLUME = head(3, 8, 6)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_nifti(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    write_nifti(path, VOLUME, voxel_size=VOXEL, affine=oblique())
    image = nibabel.load(path)
    assert np.array_equal(image.get_fdata(dtype=np.float32), VOLUME.permute(1, 2, 0))
    assert image.affine == pytest.approx(oblique(), abs=1e-5)
    assert image.get_qform() == pytest.approx(oblique(), abs=1e-4)
    assert image.header.get_zooms() == pytest.approx(VOXEL)
    assert image.header.get_xyzt_units()[0] == "mm"
    assert image.header["sform_code"] == image.header["qform_code"] == 1
    assert (
        path.read_bytes()[:2] == b"\x1f\x8b"
        if name.endswith("gz")
        else len(path.read_bytes()) == 352 + 4 * 144
    )
    assert list(tmp_path.iterdir()) == [path]


def test_nifti_without_a_place_says_so(tmp_path: Path) -> None:
    write_nifti(tmp_path / "a.nii.gz", VOLUME.double(), voxel_size=VOXEL)
    image = nibabel.load(tmp_path / "a.nii.gz")
    assert image.header.get_zooms() == pytest.approx(VOXEL)
    assert image.header["sform_code"] == image.header["qform_code"] == 0
    assert image.get_data_dtype() == np.float32
    first = gzip.decompress((tmp_path / "a.nii.gz").read_bytes())
    assert len(first) == 352 + 4 * 144


def test_reconstruction(tmp_path: Path) -> None:
    write_reconstruction(tmp_path / "a.h5", VOLUME.double(), voxel_size=VOXEL, affine=oblique())
    with h5py.File(tmp_path / "a.h5") as file:
        dataset = file["reconstruction"]
        assert dataset.dtype == np.float32
        assert np.array_equal(dataset, VOLUME)
        assert dataset.attrs["voxel_size"] == pytest.approx(VOXEL)
        assert dataset.attrs["affine"] == pytest.approx(oblique())
    back = open_reconstruction(tmp_path / "a.h5")
    assert back.shape == (3, 8, 6)
    assert torch.equal(back[1], VOLUME[1])
    write_reconstruction(tmp_path / "b.h5", VOLUME)
    with h5py.File(tmp_path / "b.h5") as file:
        assert not dict(file["reconstruction"].attrs)


def test_refused_and_nothing_written(tmp_path: Path) -> None:
    bad = VOLUME.clone()
    bad[0, 0, 0] = torch.inf
    for images, message in (
        (VOLUME.to(torch.complex64), "expected real images .* magnitude"),
        (VOLUME[0], r"expected real images \[slices, H, W\]"),
        (VOLUME[:0], "expected real images"),
        (bad, "NaN or infinity; nothing was written"),
    ):
        with pytest.raises(ValueError, match=message):
            write_nifti(tmp_path / "a.nii", images, voxel_size=VOXEL)
        with pytest.raises(ValueError, match=message):
            write_reconstruction(tmp_path / "a.h5", images)
    with pytest.raises(ValueError, match="give the same"):
        write_nifti(tmp_path / "a.nii", VOLUME, voxel_size=(1, 1, 1), affine=oblique())
    with pytest.raises(ValueError, match="give both"):
        write_reconstruction(tmp_path / "a.h5", VOLUME, affine=oblique())
    with pytest.raises(ValueError, match=r"ends in \.nii or \.nii\.gz"):
        write_nifti(tmp_path / "a.img", VOLUME, voxel_size=VOXEL)
    assert not list(tmp_path.iterdir())


def test_bad_reconstructions(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with pytest.raises(ValueError, match="no such file"):
        open_reconstruction(path)
    for name, value in (("image", np.zeros((1, 2, 2))), ("reconstruction", np.zeros((2, 2)))):
        with h5py.File(path, "w") as file:
            file[name] = value
        with pytest.raises(ValueError, match=f"no dataset `reconstruction` of real images .*only {name}"):
            open_reconstruction(path)


@settings(deadline=None)
@given(full=st.tuples(st.integers(2, 9), st.integers(2, 9)), data=st.data())
def test_a_crop_keeps_the_centre_and_its_place(full: tuple[int, int], data: st.DataObject) -> None:
    size = (data.draw(st.integers(1, full[0])), data.draw(st.integers(1, full[1])))
    image = torch.zeros(2, *full)
    image[:, full[0] // 2, full[1] // 2] = 1
    cropped = centre_crop(image, size)
    assert cropped.shape == (2, *size)
    assert cropped[0, size[0] // 2, size[1] // 2] == 1
    moved = cropped_affine(oblique(), full, size) @ (size[0] // 2, size[1] // 2, 3, 1)
    assert moved == pytest.approx(oblique() @ (full[0] // 2, full[1] // 2, 3, 1))


def test_no_crop_to_more_than_there_is() -> None:
    with pytest.raises(ValueError, match="cannot cut 7 pixels out of the middle of 6"):
        centre_crop(VOLUME, (8, 7))
