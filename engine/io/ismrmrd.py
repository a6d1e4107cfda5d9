"""k-space in ISMRMRD files (Inati et al., Magn Reson Med 2017): reading Cartesian 2D scans, line by line."""

from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from alpenglow.io.ismrmrd_geometry import affine_of
from alpenglow.io.kspace import KSpace
from alpenglow.io.lazy import open_hdf5
from alpenglow.io.mri_header import ScanHeader, parse_header

GROUP = "dataset"

# Flags of an acquisition, as ISMRMRD counts them: from 1.
NOISE, CALIBRATION, CALIBRATION_AND_IMAGING, _REVERSE = 19, 20, 21, 22
# Navigators, phase correction, feedback, dummy scans, surface coil correction and phase stabilisation.
_NO_IMAGE = (23, 24, 26, 27, 28, 29, 30, 31)


@dataclass(frozen=True)
class Line:
    """Acquisition `number` of a file: of its samples [first, last) go to `column`, from `row` on."""

    number: int
    samples: int
    first: int
    last: int
    column: int
    row: int


@dataclass(frozen=True)
class IsmrmrdSlices:
    """Slices [coils, H, W], each put together when it is asked for; repeated lines are averaged."""

    path: Path
    shape: tuple[int, int, int, int]
    lines: tuple[tuple[Line, ...], ...]

    def __getitem__(self, index: int, /) -> Tensor:
        _, coils, height, width = self.shape
        total = np.zeros((coils, height, width), np.complex64)
        count = np.zeros(width, np.float32)
        stored = _read(self.path, {line.number: (coils, line.samples) for line in self.lines[index]})
        for line in self.lines[index]:
            samples = stored[line.number][:, line.first : line.last]
            total[:, line.row : line.row + samples.shape[1], line.column] += samples
            count[line.column] += 1
        return torch.from_numpy(total / np.maximum(count, 1))


def is_ismrmrd(path: str | Path) -> bool:
    """Whether an HDF5 file holds acquisitions of ISMRMRD. Raises ValueError for a damaged one."""
    with open_hdf5(Path(path)) as file:
        return isinstance(file.get(f"{GROUP}/data"), h5py.Dataset)


def open_ismrmrd(path: str | Path, *, repetition: int | None = None) -> KSpace:
    """k-space of a Cartesian 2D scan: lines sorted by slice and encoding step, repeated lines averaged.

    H and W are the encoded matrix; asymmetric echoes and lines that were not measured leave zeros.
    repetition: take this one alone; None averages all of them, and all averages. Noise scans become
    `noise`, scaled by the dwell times and the receiver's noise bandwidth to that of one line in the middle
    of the image. Lines for calibration alone are kept out of the data: `calibration` holds these and those
    that are flagged as both. The affine follows from the positions where slices are evenly spaced.

    Raises ValueError for a damaged file, for scans that are not Cartesian, 3D, echo planar, or of several
    contrasts, phases, sets, encodings or numbers of coils, for steps outside the encoded matrix, and where
    lines differ in how often they were measured: their noise then differs.
    """
    path = Path(path)
    heads, header = _read_heads(path)
    noise = _flagged(heads, NOISE)
    use = ~noise & ~_flagged(heads, *_NO_IMAGE)
    if repetition is not None:
        use &= heads["idx"]["repetition"] == repetition
    both = _flagged(heads, CALIBRATION_AND_IMAGING)
    calibration = use & (_flagged(heads, CALIBRATION) | both)
    imaging = use & (both | ~calibration)
    if not imaging.any():
        raise ValueError(f"{path} has no lines of an image among {len(heads)} acquisitions{_of(repetition)}")
    _check_scan(path, heads[use], header)
    shape = _shape(heads, imaging, header)
    lines = _sorted_lines(path, heads, imaging, header, shape)
    affine, spacing = affine_of(heads[imaging], header, shape)
    return KSpace(
        IsmrmrdSlices(path, shape, lines),
        voxel_size=(
            header.encoded.field_of_view[0] / shape[2],
            header.encoded.field_of_view[1] / shape[3],
            spacing,
        ),
        affine=affine,
        header=header,
        noise=_read_noise(path, heads, noise, imaging, header) if noise.any() else None,
        calibration=(
            IsmrmrdSlices(path, shape, _sorted_lines(path, heads, calibration, header, shape))
            if calibration.any()
            else None
        ),
        averages=_averages(path, lines),
        source=str(path),
    )


def _flagged(heads: np.ndarray, *flags: int) -> np.ndarray:
    """Which acquisitions have any of the flags."""
    bits = np.uint64(sum(1 << (flag - 1) for flag in flags))
    return (heads["flags"] & bits) != 0


def _of(repetition: int | None) -> str:
    return "" if repetition is None else f", in repetition {repetition}"


def _read_heads(path: Path) -> tuple[np.ndarray, ScanHeader]:
    """The heads of all acquisitions, without their samples, and the header of the scan."""
    with open_hdf5(path) as file:
        data, xml = file.get(f"{GROUP}/data"), file.get(f"{GROUP}/xml")
        if not isinstance(data, h5py.Dataset) or not isinstance(xml, h5py.Dataset):
            raise ValueError(
                f"{path} has no acquisitions `{GROUP}/data` with a header `{GROUP}/xml`, only "
                f"{', '.join(file) or 'nothing'}"
            )
        if {"head", "data"} - set(data.dtype.names or ()):
            raise ValueError(f"`{GROUP}/data` of {path} holds {data.dtype}; expected acquisitions of ISMRMRD")
        if not len(data) or not len(xml):
            raise ValueError(f"{path} has no acquisitions, or no header")
        return data.fields("head")[:], parse_header(xml[0], str(path))


def _read(path: Path, shapes: dict[int, tuple[int, int]]) -> dict[int, np.ndarray]:
    """The samples, complex64 of these shapes [coils, samples], of some acquisitions, by their number."""
    numbers = sorted(shapes)
    with open_hdf5(path) as file:
        stored = file[f"{GROUP}/data"].fields("data")[numbers] if numbers else []
    lines = {}
    for number, values in zip(numbers, stored, strict=True):
        coils, samples = shapes[number]
        if values.size != 2 * coils * samples:
            raise ValueError(
                f"acquisition {number} of {path} has {values.size} numbers; its head says {coils} coils of "
                f"{samples} complex samples"
            )
        lines[number] = np.ascontiguousarray(values, np.float32).view(np.complex64).reshape(coils, samples)
    return lines


def _check_scan(path: Path, heads: np.ndarray, header: ScanHeader) -> None:
    depth = header.encoded.matrix[2]
    if header.trajectory != "cartesian":
        raise ValueError(f"{path} has a {header.trajectory} trajectory; expected a cartesian one")
    if depth != 1 or heads["idx"]["kspace_encode_step_2"].any():
        raise ValueError(f"{path} is a 3D scan ({depth} partitions); expected 2D slices")
    for name in ("contrast", "phase", "set"):
        found = np.unique(heads["idx"][name])
        if len(found) > 1:
            raise ValueError(f"{path} holds {len(found)} entries of `{name}`; expected one: split the file")
    if _flagged(heads, _REVERSE).any():
        raise ValueError(f"{path} holds lines that were read backwards (echo planar); expected a spin warp")
    if len(np.unique(heads["active_channels"])) > 1:
        raise ValueError(f"{path} holds lines of different numbers of coils; expected one number")
    if header.encodings != 1 or heads["encoding_space_ref"].any():
        raise ValueError(f"{path} has {header.encodings} encodings; expected one: split the file")


def _shape(heads: np.ndarray, imaging: np.ndarray, header: ScanHeader) -> tuple[int, int, int, int]:
    first = heads[imaging][0]
    slices = int(heads["idx"]["slice"][imaging].max()) + 1
    return slices, int(first["active_channels"]), header.encoded.matrix[0], header.encoded.matrix[1]


def _sorted_lines(
    path: Path, heads: np.ndarray, chosen: np.ndarray, header: ScanHeader, shape: tuple[int, int, int, int]
) -> tuple[tuple[Line, ...], ...]:
    slices, _, height, width = shape
    lines: list[list[Line]] = [[] for _ in range(slices)]
    for number in np.flatnonzero(chosen):
        head = heads[number]
        step, place = int(head["idx"]["kspace_encode_step_1"]), int(head["idx"]["slice"])
        first, last = int(head["discard_pre"]), int(head["number_of_samples"]) - int(head["discard_post"])
        column = step - header.centre + width // 2
        row = height // 2 - (int(head["center_sample"]) - first)
        if not (0 <= column < width and row >= 0 and first < last and row + last - first <= height):
            raise ValueError(
                f"acquisition {number} of {path} (step {step} of centre {header.centre}, {last - first} "
                f"samples of centre {int(head['center_sample']) - first}) does not fit into the encoded "
                f"matrix of the header, {height} x {width}"
            )
        if place < slices:
            lines[place].append(Line(int(number), int(head["number_of_samples"]), first, last, column, row))
    return tuple(tuple(line) for line in lines)


def _averages(path: Path, lines: tuple[tuple[Line, ...], ...]) -> int:
    """How often each line was measured; ValueError where that is not one number."""
    counts: set[int] = set()
    for index, chosen in enumerate(lines):
        if not chosen:
            raise ValueError(f"{path} has no lines of slice {index}, and some of slice {len(lines) - 1}")
        counts |= set(np.unique([line.column for line in chosen], return_counts=True)[1].tolist())
    if len(counts) > 1:
        raise ValueError(
            f"{path} holds lines that were measured {min(counts)} times and others {max(counts)} times, "
            "so that their noise differs; read one repetition alone, or drop the surplus lines"
        )
    return counts.pop()


def _read_noise(
    path: Path, heads: np.ndarray, noise: np.ndarray, imaging: np.ndarray, header: ScanHeader
) -> Tensor:
    """[coils, samples]; the variance of noise goes as the bandwidth, the inverse of the dwell time."""
    dwell = float(heads["sample_time_us"][imaging][0])
    coils = int(heads["active_channels"][imaging][0])
    numbers = np.flatnonzero(noise).tolist()
    parts = []
    for number, samples in _read(
        path, {n: (coils, int(heads["number_of_samples"][n])) for n in numbers}
    ).items():
        own = float(heads["sample_time_us"][number])
        ratio = own / dwell if own > 0 and dwell > 0 else 1.0
        parts.append(samples * np.float32((ratio / header.receiver_noise_bandwidth) ** 0.5))
    return torch.from_numpy(np.concatenate(parts, axis=1))
