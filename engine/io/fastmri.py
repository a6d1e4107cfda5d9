"""k-space in the HDF5 files of the fastMRI data set (Zbontar et al., arXiv 1811.08839)."""

from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from alpenglow.io.files import atomic_path
from alpenglow.io.kspace import KSpace, VoxelSize
from alpenglow.io.lazy import Hdf5Slices, Slices, open_hdf5
from alpenglow.io.mri_header import ScanHeader, make_header, parse_header

TRUTH = ("reconstruction_rss", "reconstruction_esc")


def open_fastmri(path: str | Path) -> KSpace:
    """k-space of the dataset `kspace`, [slices, coils, H, W], or [slices, H, W] of a single coil.

    `mask` ([W], or [H, W]) and the header `ismrmrd_header` are read where they are; `reconstruction_rss` or
    `reconstruction_esc` is the truth. Raises ValueError for a file that is damaged, lacks `kspace`, or whose
    header is of other sizes than its k-space.
    """
    path = Path(path)
    with open_hdf5(path) as file:
        dataset = _dataset(file, path)
        shape = dataset.shape if dataset.ndim == 4 else (len(dataset), 1, *dataset.shape[1:])
        header = None
        if "ismrmrd_header" in file:
            header = parse_header(file["ismrmrd_header"][()], str(path))
            _check_order(path, shape, header)
        mask = _mask(np.asarray(file["mask"]), shape, path) if "mask" in file else None
        affine = np.asarray(file.attrs["affine"], float) if "affine" in file.attrs else None
        truth = None
        for name in TRUTH:
            if name in file:
                truth = Hdf5Slices(path, name, file[name].shape, np.float32)
                break
    return KSpace(
        Hdf5Slices(path, "kspace", shape, np.complex64),
        voxel_size=None if header is None else _voxel_size(header, shape, affine),
        affine=affine,
        header=header,
        mask=mask,
        truth=truth,
        source=str(path),
    )


def write_fastmri(path: str | Path, kspace: KSpace) -> None:
    """Write `kspace` slice by slice, with its header, mask and truth, atomically.

    A single coil is written as [slices, H, W]. The affine is an attribute `affine`, which other readers do
    not look for; noise scan, calibration and averages have no place in this format. Raises ValueError where
    a slice holds NaN or infinity; then nothing is written.
    """
    slices, coils, height, width = kspace.shape
    sizes = (slices, height, width) if coils == 1 else kspace.shape
    header = kspace.header
    if header is None and kspace.voxel_size is not None:
        recon = (height, width) if kspace.truth is None else kspace.truth.shape[1:]
        header = make_header(kspace.shape, kspace.voxel_size, (recon[0], recon[1]))
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        dataset = file.create_dataset("kspace", sizes, np.complex64)
        for index in range(slices):
            dataset[index] = kspace[index].numpy(force=True).reshape(sizes[1:])
        if header is not None:
            file["ismrmrd_header"] = header.xml
        if kspace.mask is not None:
            alike = bool((kspace.mask == kspace.mask[:1]).all())
            file["mask"] = (kspace.mask[0] if alike else kspace.mask).numpy(force=True)
        if kspace.affine is not None:
            file.attrs["affine"] = kspace.affine
        if kspace.truth is not None:
            _write_truth(file, TRUTH[1 if coils == 1 else 0], kspace.truth)


def _write_truth(file: h5py.File, name: str, truth: Slices) -> None:
    dataset = file.create_dataset(name, tuple(truth.shape), np.float32)
    largest, squares = 0.0, 0.0
    for index in range(truth.shape[0]):
        image = truth[index].numpy(force=True)
        dataset[index] = image
        largest, squares = max(largest, float(image.max())), squares + float((image.astype(float) ** 2).sum())
    # fastMRI's own loaders scale their metrics by these.
    file.attrs["max"], file.attrs["norm"] = largest, squares**0.5


def _dataset(file: h5py.File, path: Path) -> h5py.Dataset:
    dataset = file.get("kspace")
    if not isinstance(dataset, h5py.Dataset):
        raise ValueError(f"{path} has no dataset `kspace`, only {', '.join(file) or 'nothing'}")
    if dataset.ndim not in (3, 4) or dataset.dtype.kind != "c":
        raise ValueError(
            f"`kspace` of {path} holds {dataset.dtype} {dataset.shape}; expected complex "
            "[slices, coils, H, W], or [slices, H, W] of a single coil"
        )
    return dataset


def _check_order(path: Path, shape: tuple[int, ...], header: ScanHeader) -> None:
    # Of the columns a file may have left some out; the readout is always whole.
    if shape[2] != header.encoded.matrix[0]:
        rows, columns, _ = header.encoded.matrix
        raise ValueError(
            f"`kspace` of {path} has shape {shape}, and its header a matrix of {rows} x {columns}; expected "
            f"[slices, coils, {rows}, {columns}]: transpose it to that order"
        )


def _voxel_size(header: ScanHeader, shape: tuple[int, ...], affine: np.ndarray | None) -> VoxelSize:
    across, along, through = header.encoded.field_of_view
    # The header knows how thick a slice is, the affine how far the next one is.
    spacing = through / header.encoded.matrix[2] if affine is None else np.linalg.norm(affine[:3, 2])
    return across / shape[2], along / shape[3], float(spacing)


def _mask(mask: np.ndarray, shape: tuple[int, ...], path: Path) -> Tensor:
    if mask.shape not in ((shape[3],), tuple(shape[2:])) or not np.isin(mask, (0, 1)).all():
        raise ValueError(
            f"`mask` of {path} has shape {mask.shape} for k-space {shape}; expected 0 and 1, [{shape[3]}] or "
            f"[{shape[2]}, {shape[3]}]"
        )
    return torch.from_numpy(np.broadcast_to(mask.astype(bool), shape[2:]).copy())
