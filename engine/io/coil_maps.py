"""Coil maps: from a file, or by ESPIRiT from the calibration lines of k-space."""

from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from alpenglow.io.bart import open_cfl
from alpenglow.io.kspace import KSpace
from alpenglow.io.lazy import Hdf5Slices, Slices, open_hdf5
from alpenglow.io.npy import open_array
from alpenglow.io.optional import require

# Wider regions cost time with the fourth power and give no better maps (Uecker et al.).
_WIDEST = 24


def open_coil_maps(path: str | Path, kspace: KSpace, *, dataset: str = "coil_maps") -> Slices:
    """Complex64 maps [slices, coils, H, W] for `kspace`, read slice by slice.

    From .npy, .cfl with its .hdr, or the dataset `dataset` of an HDF5 file (.h5, .hdf5); [coils, H, W]
    will do where k-space has one slice. Raises ValueError for other or damaged files, and for
    maps of another shape than k-space.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    maps: Slices
    if suffix == ".npy":
        maps = open_array(path)
    elif suffix in (".cfl", ".hdr"):
        maps = open_cfl(path)
    elif suffix in (".h5", ".hdf5"):
        maps = _open_hdf5(path, dataset)
    else:
        raise ValueError(f"cannot read {path}: expected a name that ends in .npy, .cfl, .h5 or .hdf5")
    if tuple(maps.shape) != kspace.shape:
        raise ValueError(
            f"the coil maps of {path} have shape {tuple(maps.shape)}, {kspace.source} {kspace.shape}; "
            "expected the same, [slices, coils, H, W]"
        )
    return maps


def estimate_coil_maps(
    k_space: Tensor, mask: Tensor, *, kernel_width: int = 6, threshold: float = 0.02, crop: float = 0.8
) -> Tensor:
    """Coil maps, complex64 [coils, H, W], by ESPIRiT from the fully sampled middle of one slice of k-space.

    Their sum of squares over coils is 1 where there is an object, and 0 elsewhere; their phase is that of
    the coil with the most signal. Whiten k-space first (`coil_noise.whiten`) where coils differ in noise.

    k_space: complex [coils, H, W], centred. mask: bool [H, W], what of it was measured: for lines that serve
    calibration alone those. kernel_width: of the kernels, in samples. threshold: singular values below this
    share of the largest are noise. crop: maps are 0 where the eigenvalue is below it; 0.95 cuts into tissue
    where the lines are few. Raises ValueError where sigpy is not installed, where fewer than 2 kernel_width
    fully sampled lines are in the middle, and where these are 0. Source: Uecker et al.,
    Magn Reson Med 2014; sigpy.mri.app.EspiritCalib.
    """
    if k_space.ndim != 3 or not k_space.is_complex() or mask.shape != k_space.shape[1:]:
        raise ValueError(
            f"got k-space {tuple(k_space.shape)} of {k_space.dtype} and a mask {tuple(mask.shape)}; expected "
            "complex [coils, H, W] and [H, W]"
        )
    width, needed = calibration_width(mask), 2 * kernel_width
    if width < needed:
        raise ValueError(
            f"the middle of k-space has {width} fully sampled lines, ESPIRiT needs {needed}; give coil maps "
            "in a file, or measure more lines for calibration"
        )
    mri = require("sigpy.mri", "ESPIRiT")
    width = min(width, _WIDEST)
    energy = centre(k_space, width).abs().double().square().sum((1, 2))
    if not energy.isfinite().all() or not energy.any():
        raise ValueError(f"the {width} calibration lines are all 0, or hold NaN or infinity")
    # sigpy takes the phase of the first coil, which a dead one has not.
    order = energy.argsort(descending=True)
    app = mri.app.EspiritCalib(
        k_space[order].to(torch.complex64).numpy(force=True), calib_width=width, kernel_width=kernel_width,
        thresh=threshold, crop=crop, show_pbar=False,
    )  # fmt: skip
    maps = torch.empty_like(k_space, dtype=torch.complex64, device="cpu")
    maps[order.cpu()] = torch.from_numpy(np.ascontiguousarray(app.run()))
    return maps


def calibration_width(mask: Tensor) -> int:
    """The side of the largest fully sampled square, in samples, around the middle [H // 2, W // 2] of a mask.

    Where whole columns are measured, that is the number of fully sampled ones in the middle (but H, where
    there are more). mask: bool [H, W].
    """
    widths = range(1, min(mask.shape) + 1)
    return max((width for width in widths if bool(centre(mask, width).all())), default=0)


def centre(k_space: Tensor, width: int) -> Tensor:
    """The square [..., width, width] around the middle of k-space [..., H, W]."""
    rows, columns = (n // 2 - width // 2 for n in k_space.shape[-2:])
    return k_space[..., rows : rows + width, columns : columns + width]


def _open_hdf5(path: Path, name: str) -> Slices:
    with open_hdf5(path) as file:
        dataset = file.get(name)
        if not isinstance(dataset, h5py.Dataset):
            raise ValueError(
                f"{path} has no dataset `{name}`, only {', '.join(file) or 'nothing'}; give its name"
            )
        if dataset.dtype.kind != "c" or dataset.ndim not in (3, 4):
            raise ValueError(
                f"`{name}` of {path} holds {dataset.dtype} {dataset.shape}; expected complex "
                "[slices, coils, H, W], or [coils, H, W] of one slice"
            )
        if dataset.ndim == 3:
            return torch.from_numpy(dataset[()].astype(np.complex64))[None]
        return Hdf5Slices(path, name, dataset.shape, np.complex64)
