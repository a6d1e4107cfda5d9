"""Writing k-space as ISMRMRD: a noise scan, and every measured line of every slice."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from alpenglow.io.files import atomic_path
from alpenglow.io.ismrmrd import CALIBRATION, CALIBRATION_AND_IMAGING, GROUP, NOISE
from alpenglow.io.ismrmrd_geometry import place_of
from alpenglow.io.kspace import KSpace
from alpenglow.io.mri_header import ScanHeader, make_header
from alpenglow.io.optional import require

_NOISE_SAMPLES = 256  # of an acquisition of noise; their number is 16 bits


def write_ismrmrd(path: str | Path, kspace: KSpace) -> None:
    """Write the lines of which any sample was measured, the noise scan and the calibration, atomically.

    A mean of several measurements is written as one, with the noise that it has; the truth has no place
    in this format. Raises ValueError where ismrmrd is not installed, k-space has neither header nor voxel
    size, its header is of another matrix, or a slice holds NaN or infinity; then nothing is written.
    """
    dtype = require("ismrmrd.hdf5", "writing ISMRMRD").acquisition_dtype
    header = _header(kspace)
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        file.create_dataset(f"{GROUP}/xml", (1,), h5py.special_dtype(vlen=bytes))[0] = header.xml.encode()
        data = file.create_dataset(f"{GROUP}/data", (0,), dtype, maxshape=(None,))
        if kspace.noise is not None:
            _append(data, _noise(dtype, kspace, kspace.noise, header))
        for index in range(len(kspace)):
            _append(data, _slice(dtype, kspace, index, header))


def _append(data: h5py.Dataset, acquisitions: np.ndarray) -> None:
    count = len(data)
    data.resize(count + len(acquisitions), axis=0)
    data[count:] = acquisitions


def _header(kspace: KSpace) -> ScanHeader:
    height, width = kspace.shape[2:]
    if kspace.header is None:
        if kspace.voxel_size is None:
            raise ValueError(f"ISMRMRD says a field of view, and {kspace.source} has no voxel size; give one")
        return make_header(kspace.shape, kspace.voxel_size, (height, width))
    if kspace.header.encoded.matrix != (height, width, 1):
        raise ValueError(
            f"the header of {kspace.source} has the matrix {kspace.header.encoded.matrix}, its k-space "
            f"{height} x {width}; leave the header out (header=None), and a new one is made"
        )
    return kspace.header


def _slice(dtype: np.dtype, kspace: KSpace, index: int, header: ScanHeader) -> np.ndarray:
    """The acquisitions of a slice."""
    height, width = kspace.shape[2:]
    columns, lines, flags = zip(*_lines(kspace, index), strict=True)
    steps = np.array(columns) - width // 2 + header.centre
    if steps.min() < 0:
        raise ValueError(
            f"column {min(columns)} of {kspace.source} lies before the first step of its header, whose "
            f"middle is {header.centre}; leave the header out (header=None), and a new one is made"
        )
    acquisitions = _acquisitions(dtype, lines)
    heads = acquisitions["head"]
    heads["flags"], heads["center_sample"] = flags, height // 2
    heads["idx"]["kspace_encode_step_1"], heads["idx"]["slice"] = steps, index
    if kspace.affine is not None:
        for name, vector in place_of(kspace.affine, index, height, width).items():
            heads[name] = vector
    return acquisitions


def _lines(kspace: KSpace, index: int) -> Iterator[tuple[int, Tensor, int]]:
    """(column, samples [coils, H], flags) of every measured line of a slice."""
    measured = kspace.sampling_mask(index)
    imaging = kspace[index] * measured
    calibration = torch.zeros_like(imaging) if kspace.calibration is None else kspace.calibration[index]
    sampled, known = measured.any(0), (calibration != 0).any((0, 1))
    if not sampled.any():
        raise ValueError(f"slice {index} of {kspace.source} holds only zeros; leave it out")
    for column in (sampled | known).nonzero()[:, 0].tolist():
        line, other = imaging[:, :, column], calibration[:, :, column]
        both = torch.equal(line, other)
        if sampled[column]:
            yield column, line, _bit(CALIBRATION_AND_IMAGING) if both else 0
        if known[column] and not both:
            yield column, other, _bit(CALIBRATION)


def _noise(dtype: np.dtype, kspace: KSpace, noise: Tensor, header: ScanHeader) -> np.ndarray:
    # A reader divides by the bandwidth, and takes a mean of measurements for one.
    scaled = noise * (header.receiver_noise_bandwidth / kspace.averages) ** 0.5
    acquisitions = _acquisitions(dtype, scaled.split(_NOISE_SAMPLES, dim=1))
    acquisitions["head"]["flags"] = _bit(NOISE)
    return acquisitions


def _acquisitions(dtype: np.dtype, lines: Any) -> np.ndarray:
    """Acquisitions of lines [coils, samples]."""
    acquisitions = np.zeros(len(lines), dtype)
    heads = acquisitions["head"]
    heads["version"] = 1
    heads["active_channels"] = heads["available_channels"] = len(lines[0])
    heads["number_of_samples"] = [line.shape[1] for line in lines]
    for number, line in enumerate(lines):
        samples = line.to(torch.complex64).contiguous().numpy(force=True)
        acquisitions["data"][number] = samples.view(np.float32).ravel()
        acquisitions["traj"][number] = np.zeros(0, np.float32)
    return acquisitions


def _bit(flag: int) -> int:
    return 1 << (flag - 1)
