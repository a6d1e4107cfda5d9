"""Masks and k-space in files: what measurements need beside images."""

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from alpenglow.io.images import read_image


def read_mask(path: str | Path) -> Tensor:
    """A mask [1 or C, H, W] whose ones are measured; values other than 0 and 1 are left for the operator.

    PNG, TIFF: white is 1 and black 0; grey stored as RGB has one channel. NPY: [H, W] or [C, H, W], bool or
    numbers. Raises ValueError for a file that is missing, damaged, or no array of numbers.
    """
    path = Path(path)
    if path.suffix.lower() == ".npy":
        array = _read_npy(path)
        if array.dtype.kind not in "biuf" or array.ndim not in (2, 3):
            raise ValueError(
                f"{path} holds {array.dtype} of shape {array.shape}; expected a mask [H, W] or [C, H, W] "
                "of 0 and 1"
            )
        mask = torch.from_numpy(array[None] if array.ndim == 2 else array)
    else:
        mask = read_image(path)
        mask = (mask + 1) / 2 if (mask.abs() == 1).all() else mask
    return as_grey(mask)


def read_kspace(path: str | Path) -> Tensor:
    """Complex64 k-space from a .npy file: complex [...], or real [2, H, W] as real and imaginary part.

    A slice [H, W] gets a leading dimension of 1. Raises ValueError for a file that is missing, damaged, or of
    real numbers.
    """
    path = Path(path)
    if path.suffix.lower() != ".npy":
        raise ValueError(f"cannot read {path}: k-space is complex, so it comes in a .npy file")
    array = _read_npy(path)
    if array.dtype.kind == "f" and array.ndim == 3 and len(array) == 2:
        array = array[0] + 1j * array[1]
    if array.dtype.kind != "c":
        raise ValueError(
            f"{path} holds {array.dtype} of shape {array.shape}; expected complex k-space [H, W], or its "
            "real and imaginary part [2, H, W]"
        )
    kspace = torch.from_numpy(array.astype(np.complex64))
    return kspace[None] if kspace.ndim == 2 else kspace


def as_grey(image: Tensor) -> Tensor:
    """One channel [1, H, W] of an image [3, H, W] whose channels are equal; any other as it is."""
    return image[:1] if image.ndim == 3 and len(image) == 3 and bool((image == image[:1]).all()) else image


def _read_npy(path: Path) -> np.ndarray:
    if not path.is_file():
        raise ValueError(f"cannot read {path}: no such file")
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"cannot read {path}: {error} (truncated or damaged)") from None
    if not isinstance(array, np.ndarray):
        raise ValueError(f"cannot read {path}: it is an archive of arrays; save one array with numpy.save")
    return array.astype(array.dtype.newbyteorder("="))
