"""Stacks of slices that stay in their file: each is read when it is asked for."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import h5py
import numpy as np
import torch
from torch import Tensor


class Slices(Protocol):
    """A tensor, or whatever has the shape of one and gives it one slice at a time."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(slices, ...)."""

    def __getitem__(self, index: int, /) -> Tensor:
        """One slice, without the dimension of slices."""


@dataclass(frozen=True)
class Hdf5Slices:
    """A dataset of an HDF5 file as slices of `shape[1:]` and `dtype`.

    The file is open only while a slice is read: nothing has to be closed, and workers can share it. A slice
    that cannot be read raises ValueError.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: type[np.generic]

    def __getitem__(self, index: int, /) -> Tensor:
        with open_hdf5(self.path) as file:
            array = np.asarray(file[self.name][index])
        return torch.from_numpy(array.astype(self.dtype)).reshape(self.shape[1:])


class MappedSlices:
    """An array of numbers that is mapped into memory, [slices, ...] in any strides, as slices of `dtype`."""

    def __init__(self, array: np.ndarray, dtype: type[np.generic]) -> None:
        self._array, self._dtype = array, dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """(slices, ...)."""
        return self._array.shape

    def __getitem__(self, index: int, /) -> Tensor:
        return torch.from_numpy(np.array(self._array[index], self._dtype, order="C"))


@contextmanager
def open_hdf5(path: Path) -> Iterator[h5py.File]:
    """The file, open for reading; ValueError where it is missing, truncated, damaged or no HDF5 file.

    So does whatever fails in it while it is read.
    """
    existing_file(path)
    if not h5py.is_hdf5(path):
        raise ValueError(f"cannot read {path}: not an HDF5 file")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"cannot read {path}: truncated or damaged ({error})") from error


def existing_file(path: Path) -> Path:
    """`path`; ValueError where it is no file."""
    if not path.is_file():
        raise ValueError(f"cannot read {path}: no such file")
    return path
