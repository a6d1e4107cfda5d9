"""ISMRMRD: lines into k-space, noise and calibration apart, places in the patient, and what is refused.

Files are written and read back by the `ismrmrd` library too, which shares no code with ours.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor

from alpenglow.io import KSpace, open_kspace, write_kspace
from alpenglow.io.ismrmrd import open_ismrmrd
from alpenglow.io.mri_header import make_header, parse_header
from alpenglow.operators.coil_noise import noise_covariance
from tests.scans import VOXEL, columns, oblique, simulation, slices_of

ismrmrd = pytest.importorskip("ismrmrd")

HEIGHT, WIDTH, COILS = 8, 6, 2
XML = make_header((1, COILS, HEIGHT, WIDTH), VOXEL, (4, 6)).xml


def samples(seed: int, count: int = HEIGHT, coils: int = COILS) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(coils, count, dtype=torch.complex64, generator=generator).numpy()


def acquisition(data: np.ndarray, step: int, flags: tuple[int, ...] = (), **fields: Any) -> Any:
    line = ismrmrd.Acquisition.from_array(data, center_sample=fields.pop("center_sample", HEIGHT // 2))
    line.idx.kspace_encode_step_1 = step
    for flag in flags:
        line.setFlag(flag)
    for name, value in fields.items():
        setattr(line.idx if hasattr(line.idx, name) else line, name, value)
    return line


def full_scan(**fields: Any) -> Iterator[Any]:
    for step in range(WIDTH):
        yield acquisition(samples(step), step, **fields)


def write(path: Path, lines: list[Any], xml: str = XML) -> Path:
    with ismrmrd.Dataset(path, "dataset", mode="w") as dataset:
        dataset.write_xml_header(xml.encode())
        for line in lines:
            dataset.append_acquisition(line)
    return path


def expected() -> Tensor:
    """[coils, H, W] of `full_scan`."""
    return torch.stack([torch.from_numpy(samples(step)) for step in range(WIDTH)], dim=-1)


def test_lines_are_sorted_in_whatever_order_they_come(tmp_path: Path) -> None:
    lines = list(full_scan())
    lines += [acquisition(10 * samples(step), step, slice=1) for step in range(WIDTH)]
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(0)).tolist()
    kspace = open_kspace(write(tmp_path / "a.h5", [lines[index] for index in order]))
    assert kspace.shape == (2, COILS, HEIGHT, WIDTH)
    assert torch.equal(kspace[0], expected())
    assert torch.equal(kspace[1], 10 * expected())
    assert kspace.voxel_size == pytest.approx(VOXEL)
    assert kspace.header is not None
    assert kspace.header.recon.matrix == (4, 6, 1)
    assert kspace.affine is None
    assert kspace.noise is kspace.calibration is None


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    made = simulation(mask=columns(24, 17, 4))
    write_kspace(tmp_path / "a.mrd", made.kspace)
    back = torch.zeros(2, 3, 24, 17, dtype=torch.complex64)
    with ismrmrd.Dataset(tmp_path / "a.mrd", "dataset", mode="r") as dataset:
        header = ismrmrd.xsd.CreateFromDocument(dataset.read_xml_header())
        assert header.encoding[0].encodedSpace.fieldOfView_mm.x == pytest.approx(24 * VOXEL[0])
        assert header.encoding[0].encodingLimits.kspace_encoding_step_1.center == 8
        assert header.encoding[0].encodingLimits.slice.maximum == 1
        for number in range(dataset.number_of_acquisitions()):
            line = dataset.read_acquisition(number)
            if not line.isFlagSet(ismrmrd.ACQ_IS_NOISE_MEASUREMENT):
                assert line.center_sample == 12
                back[line.idx.slice, :, :, line.idx.kspace_encode_step_1] = torch.from_numpy(line.data)
    assert torch.equal(back, slices_of(made.kspace))


def test_repetitions_and_averages(tmp_path: Path) -> None:
    lines = [
        *full_scan(),
        *full_scan(repetition=1),
        *full_scan(average=1),
        *full_scan(repetition=1, average=1),
    ]
    for line in lines:
        line.data[:] *= 1 + 2 * line.idx.repetition
    path = write(tmp_path / "a.mrd", lines)
    for repetition, factor, averages in ((None, 2, 4), (0, 1, 2), (1, 3, 2)):
        kspace = open_ismrmrd(path, repetition=repetition)
        assert torch.allclose(kspace[0], factor * expected())
        assert kspace.averages == averages
    with pytest.raises(ValueError, match="no lines of an image among 24 acquisitions, in repetition 2"):
        open_ismrmrd(path, repetition=2)
    with pytest.raises(ValueError, match="measured 3 times and others 4 times"):
        open_ismrmrd(write(tmp_path / "b.mrd", lines[:-1]))


def test_noise_is_scaled_to_that_of_the_image(tmp_path: Path) -> None:
    flags = (ismrmrd.ACQ_IS_NOISE_MEASUREMENT,)
    lines = [acquisition(samples(90, 100), 0, flags, sample_time_us=8.0)]
    lines += [acquisition(samples(91, 50), 0, flags, sample_time_us=8.0)]
    lines += list(full_scan(sample_time_us=2.0))
    element = "<acquisitionSystemInformation>"
    xml = XML.replace(
        element, element + "<relativeReceiverNoiseBandwidth>0.64</relativeReceiverNoiseBandwidth>"
    )
    kspace = open_ismrmrd(write(tmp_path / "a.mrd", lines, xml))
    assert torch.equal(kspace[0], expected())
    assert kspace.noise is not None
    measured = np.concatenate([samples(90, 100), samples(91, 50)], axis=1)
    assert torch.allclose(kspace.noise, torch.from_numpy(measured) * 2 / 0.8)
    write_kspace(tmp_path / "b.mrd", dataclasses.replace(kspace, averages=4))
    again = open_kspace(tmp_path / "b.mrd")
    assert again.noise is not None
    assert torch.allclose(again.noise, kspace.noise / 2)


def test_noise_covariance_survives_a_file(tmp_path: Path) -> None:
    made = simulation()
    write_kspace(tmp_path / "a.mrd", made.kspace)
    noise = open_kspace(tmp_path / "a.mrd").noise
    assert noise is not None
    assert torch.allclose(noise_covariance(noise), 1e-4 * torch.eye(3).to(torch.complex128), atol=5e-6)


def test_lines_that_are_no_image_are_left_out(tmp_path: Path) -> None:
    others = [
        acquisition(samples(50), 3, (getattr(ismrmrd, name),))
        for name in dir(ismrmrd)
        if name.startswith("ACQ_IS_") and not any(s in name for s in ("NOISE", "CALIBRATION", "REVERSE"))
    ]
    assert len(others) == 8
    kspace = open_ismrmrd(write(tmp_path / "a.mrd", [*others, *full_scan()]))
    assert torch.equal(kspace[0], expected())
    assert kspace.averages == 1


def test_calibration_is_kept_apart(tmp_path: Path) -> None:
    lines = [acquisition(samples(step), step) for step in (0, 4)]
    lines += [acquisition(samples(2), 2, (ismrmrd.ACQ_IS_PARALLEL_CALIBRATION_AND_IMAGING,))]
    lines += [acquisition(samples(3), 3, (ismrmrd.ACQ_IS_PARALLEL_CALIBRATION,))]
    kspace = open_ismrmrd(write(tmp_path / "a.mrd", lines))
    assert kspace.sampling_mask(0).any(0).tolist() == [True, False, True, False, True, False]
    lines_of, known = kspace.calibration_lines(0)
    assert known.all(0).tolist() == [False, False, True, True, False, False]
    assert torch.equal(lines_of, expected() * known)
    write_kspace(tmp_path / "b.mrd", kspace)
    again = open_kspace(tmp_path / "b.mrd")
    assert torch.equal(again[0], kspace[0])
    assert again.calibration is not None
    assert torch.equal(again.calibration[0], lines_of)


def test_asymmetric_echo_and_partial_fourier(tmp_path: Path) -> None:
    centre = "<center>3</center>"
    assert centre in XML
    lines = [acquisition(samples(step, 7), step, center_sample=4, discard_pre=2) for step in range(4)]
    kspace = open_ismrmrd(write(tmp_path / "a.mrd", lines, XML.replace(centre, "<center>1</center>", 1)))
    assert kspace.sampling_mask(0).any(0).tolist() == [False, False, True, True, True, True]
    # Sample 4 is the centre, and rows 2 to 6 hold samples 2 to 6.
    assert kspace.sampling_mask(0).any(1).tolist() == [False, False, *[True] * 5, False]
    assert torch.equal(kspace[0][:, 4, 3], torch.from_numpy(samples(1, 7)[:, 4]))
    write_kspace(tmp_path / "b.mrd", kspace)
    assert torch.equal(open_kspace(tmp_path / "b.mrd")[0], kspace[0])


# Places in the patient


def placed(heights: list[float], **fields: Any) -> list[Any]:
    """Slices at these heights along an oblique normal, in LPS."""
    columns_of = np.diag([-1, -1, 1]) @ oblique()[:3, :3] / np.array(VOXEL)
    lines = []
    for index, height in enumerate(heights):
        for line in full_scan(slice=index):
            line.read_dir[:], line.phase_dir[:], line.slice_dir[:] = columns_of.T
            line.position[:] = np.array([10.0, 20, 30]) + height * columns_of[:, 2]
            for name, value in fields.items():
                getattr(line, name)[:] = value
            lines.append(line)
    return lines


def test_affine(tmp_path: Path) -> None:
    kspace = open_ismrmrd(write(tmp_path / "a.mrd", placed([0, 5, 10])))
    assert kspace.voxel_size == pytest.approx((1.2, 0.9, 5.0))
    assert kspace.affine is not None
    assert kspace.affine[:3, :3] == pytest.approx(oblique((1.2, 0.9, 5.0))[:3, :3], abs=1e-5)
    # The middle of k-space's images is the middle of the slice.
    assert kspace.affine @ (HEIGHT // 2, WIDTH // 2, 0, 1) == pytest.approx([-10, -20, 30, 1], abs=1e-4)
    write_kspace(tmp_path / "b.mrd", kspace)
    again = open_kspace(tmp_path / "b.mrd")
    assert again.affine == pytest.approx(kspace.affine, abs=1e-4)
    one = open_ismrmrd(write(tmp_path / "c.mrd", placed([0])))
    assert one.voxel_size == pytest.approx(VOXEL)


def test_no_affine_where_places_are_unknown(tmp_path: Path) -> None:
    for lines in (
        placed([0, 5, 11]),
        placed([0, 0]),
        placed([0, 5], read_dir=(0, 0, 0)),
        placed([0, 5], read_dir=(0.5, 0.5, 0)),
    ):
        kspace = open_ismrmrd(write(tmp_path / "a.mrd", lines))
        assert kspace.affine is None
        assert kspace.voxel_size == pytest.approx(VOXEL)


# Bad files


def changed(**fields: Any) -> Callable[[], list[Any]]:
    return lambda: [*full_scan(), acquisition(samples(9), 3, **fields)]


@pytest.mark.parametrize(
    ("lines", "xml", "message"),
    [
        (changed(flags=(22,)), XML, "echo planar"),
        (changed(kspace_encode_step_2=1), XML, "3D scan"),
        (changed(contrast=1), XML, "2 entries of `contrast`"),
        (changed(phase=2), XML, "2 entries of `phase`"),
        (changed(set=1), XML, "2 entries of `set`"),
        (changed(encoding_space_ref=1), XML, "encodings; expected one"),
        (changed(center_sample=5), XML, "does not fit into the encoded matrix of the header, 8 x 6"),
        (changed(slice=2), XML, "no lines of slice 1"),
        (changed(), XML, "measured 1 times and others 2 times"),
        (lambda: [acquisition(samples(0), 6)], XML, r"step 6 of centre 3"),
        (lambda: [*full_scan(), acquisition(samples(0, coils=3), 3)], XML, "numbers of coils"),
        (lambda: [acquisition(samples(0), 0, (19,))], XML, "no lines of an image among 1 acq"),
        (full_scan, XML.replace("cartesian", "radial"), "has a radial trajectory"),
        (full_scan, XML.replace("<z>1</z>", "<z>4</z>"), "3D scan"),
        (full_scan, XML.replace("matrixSize>", "matrix>"), "it has no matrixSize/x"),
        (full_scan, XML[:-5], "cannot be read"),
    ],
)  # fmt: skip
def test_refused(lines: Callable[[], Any], xml: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.mrd", list(lines()), xml)
    with pytest.raises(ValueError, match=message):
        open_kspace(path)


def test_damaged_contents(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mrd", list(full_scan()))
    with h5py.File(path, "a") as file:
        line = file["dataset/data"][2]
        line["data"] = line["data"][:-2]
        file["dataset/data"][2] = line
    with pytest.raises(ValueError, match=r"acquisition 2 .* 30 numbers; its head says 2 coils of 8"):
        open_kspace(path)[0]
    with h5py.File(path, "a") as file:
        del file["dataset/xml"]
    with pytest.raises(ValueError, match="no acquisitions `dataset/data` with a header"):
        open_kspace(path)
    with h5py.File(path, "w") as file:
        file["dataset/data"], file["dataset/xml"] = np.zeros(3), [XML]
    with pytest.raises(ValueError, match="expected acquisitions of ISMRMRD"):
        open_kspace(path)
    with h5py.File(path, "w") as file:
        file["dataset"] = 1
    with pytest.raises(ValueError, match=str(path)):
        open_kspace(path)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    data = torch.ones(1, 2, 8, 6, dtype=torch.complex64)
    wrong = make_header((1, 2, 8, 7), VOXEL, (8, 7))
    late = parse_header(XML.replace("<center>3</center>", "<center>0</center>", 1), "a test")
    for kspace, message in (
        (KSpace(data), "has no voxel size"),
        (KSpace(data, header=wrong), "leave the header out"),
        (KSpace(data, header=late), "column 0 of k-space lies before the first step"),
        (KSpace(0 * data, voxel_size=VOXEL), "slice 0 of k-space holds only zeros"),
    ):
        with pytest.raises(ValueError, match=message):
            write_kspace(tmp_path / "a.mrd", kspace)
    assert not list(tmp_path.iterdir())
