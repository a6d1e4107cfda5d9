"""Images in NPY and HDF5 files, of which only what is drawn is read.

Files are opened for every image, which takes a fraction of a millisecond: an open handle would not survive
the fork of a worker process.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from alpenglow.distillation.sources.units import PIXELS, SkipError, is_pixels

CHANNELS = (1, 2, 3, 4)


class NpyImage:
    """The one image of a file: [H, W], [C, H, W] or [H, W, C], C up to 4. Raises SkipError for another."""

    def __init__(self, path: Path) -> None:
        self.path = path
        shape, dtype = (array := _open_npy(path)).shape, array.dtype
        colours = len(shape) == 3 and (shape[0] in CHANNELS or shape[2] in CHANNELS)
        if not (len(shape) == 2 or colours) or not is_pixels(dtype):
            raise SkipError(
                f"{path} holds {dtype} {shape}; expected one image [H, W], [C, H, W] or [H, W, C], C up to "
                f"4, of {PIXELS} (a stack of images is given as the source itself)"
            )

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> np.ndarray:
        return _open_npy(self.path)


class NpyStack:
    """The images of a file: [N, H, W], [N, C, H, W] or [N, H, W, C]. Raises SkipError for another shape."""

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, _stack_length(_open_npy(path), path)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> np.ndarray:
        return _open_npy(self.path)[index]


class Hdf5Stack:
    """The images of a dataset of a file, as in NpyStack; without a name, of the only one of 3 or more axes.

    Raises SkipError where there is no such dataset, or more than one.
    """

    def __init__(self, path: Path, dataset: str | None) -> None:
        self.path = path
        with _hdf5(path) as file:
            self.dataset = dataset or _only_stack(file, path)
            stack = file.get(self.dataset)
            if not isinstance(stack, h5py.Dataset):
                raise SkipError(f"{path} has no dataset {self.dataset!r}")
            self.count = _stack_length(stack, path)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> np.ndarray:
        with _hdf5(self.path) as file:
            return file[self.dataset][index]


def _open_npy(path: Path) -> np.ndarray:
    """Mapped, not read."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise SkipError(f"{path} is not a readable .npy array: {error}") from None
    if not isinstance(array, np.ndarray):
        raise SkipError(f"{path} is an archive of arrays (.npz)")
    return array


@contextmanager
def _hdf5(path: Path) -> Iterator[Any]:
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, KeyError, RuntimeError) as error:
        raise SkipError(f"cannot read {path}: {error}") from None


def _only_stack(file: Any, path: Path) -> str:
    names: list[str] = []
    file.visititems(lambda name, item: names.append(name) if getattr(item, "ndim", 0) >= 3 else None)
    if len(names) != 1:
        raise SkipError(f"{path} holds {len(names)} stacks ({', '.join(names)}); name one in `dataset`")
    return names[0]


def _stack_length(stack: Any, path: Path) -> int:
    if stack.ndim not in (3, 4) or 0 in stack.shape or not is_pixels(stack.dtype):
        raise SkipError(
            f"{path} holds {stack.dtype} {stack.shape}; expected [N, H, W], [N, C, H, W] or [N, H, W, C], "
            f"N > 0, of {PIXELS}"
        )
    return len(stack)
