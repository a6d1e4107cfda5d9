"""Slices of NIfTI volumes."""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alpenglow.distillation.sources.recent import Recent
from alpenglow.distillation.sources.units import SkipError

# Of a slice's pixels, at least so many must rise above this share of the volume's white.
BLANK_LEVEL, BLANK_SHARE = 0.05, 0.02


def require_nibabel() -> Any:
    """The library; ValueError where it is not installed."""
    try:
        import nibabel
    except ImportError:
        raise ValueError("NIfTI files need nibabel: pip install 'alpenglow[train]'") from None
    return nibabel


def read_volume(path: Path) -> tuple[np.ndarray, tuple[float, float, float]]:
    """Values [X, Y, Z] float32, axes to the right, anterior and superior, and the edges of a voxel in mm.

    Raises ValueError where the file cannot be read or is not one real volume.
    """
    nibabel = require_nibabel()
    try:
        image = nibabel.as_closest_canonical(_open(path))
        return np.asarray(image.dataobj, np.float32).reshape(image.shape[:3]), image.header.get_zooms()[:3]
    except _damage() as error:
        raise ValueError(f"cannot read {path}: {error}") from None


class NiftiStack:
    """Slices [H, W] of a volume along `axis`, superior or anterior at the top, 0 at -1 and white at 1.

    White is the 99.5th percentile of the positive values (a few exceed it). The volume is read when a slice
    is asked for, and kept in `recent`. Raises SkipError for a file that is not one real volume; a slice that
    is blank, or of a file that turns out to be damaged, raises it when it is asked for.
    """

    def __init__(self, path: Path, axis: int, recent: Recent) -> None:
        self.path, self.axis, self.recent = path, axis, recent
        self.slices: Sequence[int] = range(_extent(path, axis))
        self._damage = ""

    def __len__(self) -> int:
        return len(self.slices)

    def __getitem__(self, index: int) -> np.ndarray:
        plane = self._volume()[:, ::-1, self.slices[index]].T
        if _is_blank(plane):
            raise SkipError(f"{self.path}: the slice {self.slices[index]} is blank")
        return 2 * plane - 1

    def drop_blank(self) -> None:
        """Count only the slices that show something; reads the volume."""
        volume = self._volume()
        self.slices = [k for k in range(volume.shape[2]) if not _is_blank(volume[:, :, k])]

    def _volume(self) -> np.ndarray:
        # Once is enough: a damaged file may take seconds to fail, and has hundreds of slices.
        if self._damage:
            raise SkipError(self._damage)
        try:
            return self.recent.get(self.path, self._read)
        except ValueError as error:
            self._damage = str(error)
            raise SkipError(self._damage) from None

    def _read(self) -> np.ndarray:
        """[.., .., slices] with white at 1."""
        values, _ = read_volume(self.path)
        positive = values[(values > 0) & np.isfinite(values)]
        if not positive.size:
            raise ValueError(f"{self.path} holds no positive values")
        return np.moveaxis(values, self.axis, 2) / np.percentile(positive, 99.5)


def _is_blank(plane: np.ndarray) -> bool:
    return (plane > BLANK_LEVEL).mean() < BLANK_SHARE


def _extent(path: Path, axis: int) -> int:
    """The number of slices, from the header alone: to decode a thousand volumes takes an hour."""
    try:
        image = _open(path)
        turned = require_nibabel().io_orientation(image.affine)[:, 0]
        return image.shape[int(np.flatnonzero(turned == axis)[0])]
    except _damage() as error:
        raise SkipError(f"cannot read {path}: {error}") from None


def _open(path: Path) -> Any:
    image = require_nibabel().load(path)
    if len(image.shape) < 3 or any(extent != 1 for extent in image.shape[3:]) or 0 in image.shape:
        raise ValueError(f"it has the shape {image.shape}, expected one volume")
    if image.get_data_dtype().kind not in "uif":
        raise ValueError(f"it holds {image.get_data_dtype()}, expected real numbers")
    return image


def _damage() -> tuple[type[Exception], ...]:
    """What reading a damaged file raises."""
    nibabel = require_nibabel()
    return (
        nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError,
        nibabel.orientations.OrientationError, OSError, EOFError, ValueError, LookupError, zlib.error,
    )  # fmt: skip
