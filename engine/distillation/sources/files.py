"""Training images from files: a folder of images, or stacks of slices in NPY, HDF5 and NIfTI files."""

import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from alpenglow.distillation.config import DataConfig
from alpenglow.distillation.sources.indexed import IndexedSource, SkipError
from alpenglow.io import read_image

IMAGES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".npy")
HDF5 = (".h5", ".hdf5")
NIFTI = (".nii", ".nii.gz")
# Of a slice's pixels, at least so many must rise above this share of the volume's white.
BLANK_LEVEL, BLANK_SHARE = 0.05, 0.02
CACHED_FILES = 64


class _Place(NamedTuple):
    """Where an image lies: a file, and for a stack which of its slices."""

    path: Path
    index: int | None


class FileItems:
    """The images of files, read when they are asked for; the last CACHED_FILES decoded ones are kept."""

    def __init__(self, places: list[_Place], config: DataConfig) -> None:
        self.places, self.config = places, config

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Tensor | np.ndarray:
        path, slice_index = self.places[index]
        if slice_index is None:
            return _image(path)
        stack = _stack(path, self.config.dataset, self.config.axis)
        if _kind(path) == NIFTI[0]:
            return _nifti_slice(stack, slice_index)
        return np.asarray(stack[slice_index])


def read_files(config: DataConfig) -> IndexedSource:
    """The images of the file or folder `config.source`. Files that cannot be read are skipped with a count.

    Raises ValueError when the place is missing or holds no image that can be read, when a name in
    `config.held_out` is not there, and for stacks of another form than [N, H, W] or [N, C, H, W].
    """
    path = Path(config.source)
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if _kind(file) and not file.name.startswith(".")]
        if not files:
            raise ValueError(f"the folder {path} holds no image file ({', '.join((*IMAGES, *HDF5, *NIFTI))})")
    elif path.is_file() and (_kind(path) in (*HDF5, *NIFTI) or path.suffix == ".npy"):
        files = [path]
    else:
        raise ValueError(
            f"data source {config.source!r} is neither 'fashion-mnist' nor 'brain' nor a folder, nor an existing .npy, "
            ".h5 or NIfTI file"
        )
    places, unreadable = [], []
    for file in files:
        try:
            places += list(_places(file, config, alone=path.is_file()))
        except SkipError as error:
            if path.is_file():
                raise ValueError(str(error)) from None
            unreadable.append(str(error))
    if unreadable:
        message = f"{len(unreadable)} of {len(files)} files in {path} cannot be read; {unreadable[0]}"
        if not places:
            raise ValueError(message)
        warnings.warn(f"{message}. They are skipped", stacklevel=2)
    return IndexedSource(
        FileItems(places, config),
        held_out=_held_out(places, config),
        image_size=config.image_size,
        description=_describe(config),
    )


def _held_out(places: list[_Place], config: DataConfig) -> list[int] | None:
    if not config.held_out:
        return None
    missing = set(config.held_out) - {place.path.name for place in places}
    if missing:
        raise ValueError(f"held_out names {', '.join(sorted(missing))}, which {config.source} does not hold")
    return [k for k, place in enumerate(places) if place.path.name in config.held_out]


def _describe(config: DataConfig) -> str:
    held = (
        f"the files {', '.join(config.held_out)}"
        if config.held_out
        else "the last 5 % of the images (at least one); where neighbours are alike, as slices of a volume "
        "are, the figures below flatter the prior"
    )
    origin = config.attribution or "Their licence is that of their owner."
    crops = f" Random square crops, scaled to {config.image_size} pixels." if config.image_size else ""
    return f"`{config.source}`.{crops} {origin} Held out: {held}."


def _kind(path: Path) -> str:
    """The suffix by which a file is read; empty where it is none of ours."""
    name = path.name.lower()
    if name.endswith(NIFTI):
        return NIFTI[0]
    return path.suffix.lower() if path.suffix.lower() in (*IMAGES, *HDF5) else ""


def _places(path: Path, config: DataConfig, *, alone: bool) -> Iterator[_Place]:
    """Of one file. An NPY file that is the source itself is a stack, one in a folder an image."""
    if _kind(path) in IMAGES and not alone:
        _open_image(path)
        yield _Place(path, None)
        return
    stack = _stack(path, config.dataset, config.axis)
    if _kind(path) == NIFTI[0]:
        count = stack.shape[2]
    else:
        if stack.ndim not in (3, 4) or stack.dtype.kind not in "uifc" or not len(stack):
            raise SkipError(f"{path} holds {stack.dtype} {stack.shape}; expected [N, H, W] or [N, C, H, W], N > 0")
        count = len(stack)
    yield from (_Place(path, index) for index in range(count))


def _open_image(path: Path) -> None:
    """Look at the header alone: a folder may hold a million images."""
    import PIL.Image

    if path.suffix.lower() in (".png", ".jpg", ".jpeg"):
        try:
            with PIL.Image.open(path):
                return
        except (OSError, ValueError, PIL.Image.DecompressionBombError) as error:
            raise SkipError(f"{path}: {error}") from None
    _image(path)


@lru_cache(maxsize=CACHED_FILES)
def _image(path: Path) -> Tensor:
    try:
        return read_image(path)
    except (ValueError, OSError) as error:
        raise SkipError(str(error)) from None


@lru_cache(maxsize=CACHED_FILES)
def _stack(path: Path, dataset: str | None, axis: int) -> Any:
    """What gives slice i as stack[i]; for NIfTI the canonical volume with the slices along the last axis."""
    try:
        if _kind(path) == NIFTI[0]:
            return _nifti(path, axis)
        return _hdf5(path, dataset) if path.suffix.lower() in HDF5 else _npy(path)
    except (OSError, EOFError, KeyError, ValueError, RuntimeError) as error:
        raise SkipError(f"{path} cannot be read: {error}") from None


def _npy(path: Path) -> np.ndarray:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.ndarray):
        raise SkipError(f"{path} is an archive of arrays (.npz)")
    return array


def _hdf5(path: Path, dataset: str | None) -> Any:
    import h5py

    file = h5py.File(path, "r")
    if dataset is None:
        names: list[str] = []
        file.visititems(lambda name, item: names.append(name) if getattr(item, "ndim", 0) >= 3 else None)
        if len(names) != 1:
            raise SkipError(f"{path} holds {len(names)} stacks ({', '.join(names)}); name one in `dataset`")
        dataset = names[0]
    if not isinstance(file.get(dataset), h5py.Dataset):
        raise SkipError(f"{path} has no dataset {dataset!r}")
    return file[dataset]


def _nifti(path: Path, axis: int) -> np.ndarray:
    """[.., .., slices], float32, with white, the 99.5th percentile of what is not 0, at 1."""
    try:
        import nibabel
    except ImportError:
        raise ValueError("NIfTI files need nibabel: pip install 'alpenglow[mri]'") from None
    try:
        image = nibabel.as_closest_canonical(nibabel.load(path))  # type: ignore[attr-defined]
        volume = np.asarray(image.dataobj, np.float32)
    except (nibabel.filebasedimages.ImageFileError, OSError, EOFError, ValueError) as error:
        raise SkipError(f"{path}: {error}") from None
    if volume.ndim != 3 or not (volume > 0).any():
        raise SkipError(f"{path} holds {volume.shape}; expected one volume with positive values")
    return np.moveaxis(volume, axis, 2) / np.percentile(volume[volume > 0], 99.5)


def _nifti_slice(volume: np.ndarray, index: int) -> np.ndarray:
    """[H, W] in [-1, 1] (white may exceed it), superior or anterior at the top."""
    plane = volume[:, ::-1, index].T
    if (plane > BLANK_LEVEL).mean() < BLANK_SHARE:
        raise SkipError("the slice is blank")
    return np.ascontiguousarray(2 * plane - 1)
