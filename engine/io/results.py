"""Records of tensors, numbers and settings in HDF5 files, written whole or not at all.

A record is {name: Tensor | None}, diagnostics and settings. Any HDF5 reader opens it: arrays are
gzip-compressed with checksums, the rest is JSON text.
"""

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from alpenglow._version import __version__
from alpenglow.io.files import atomic_path

FORMAT = "alpenglow.posterior"
SCHEMA_VERSION = 1


def _write_array(group: h5py.Group, name: str, array: np.ndarray) -> None:
    # Scalars and empty arrays cannot be chunked, so neither compressed nor checksummed.
    options = (
        {"compression": "gzip", "compression_opts": 1, "shuffle": True, "fletcher32": True}
        if array.size > 1
        else {}
    )
    group.create_dataset(name, data=array, **(options if array.ndim else {}))


class _Target(io.FileIO):
    """A new file that seems to take every write; the first error is kept in `error`.

    Where a write fails, as on a full disk, HDF5 does not give up: it tries again at closing, and then crashes
    the process (segmentation fault, HDF5 1.14).
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w+b")
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of it."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        with self._kept():
            while len(rest):
                rest = rest[super().write(rest) :]
        return size

    def truncate(self, size: int | None = None) -> int:
        """Cut or lengthen the file."""
        with self._kept():
            return super().truncate(size)
        return size or 0

    @contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = self.error or error


@contextmanager
def _new_file(path: Path) -> Iterator[h5py.File]:
    """A new HDF5 file; OSError where the disk refuses."""
    with _Target(path) as target:
        try:
            with h5py.File(target, "w") as file:
                yield file
        except Exception as error:
            raise target.error or error from None
        if target.error is not None:
            raise target.error


def _write_blocks(group: h5py.Group, name: str, blocks: Iterable[Tensor]) -> None:
    """A dataset of blocks [n, ...] one after another, of which one is in memory at a time."""
    dataset = None
    for block in blocks:
        array = block.numpy()
        if dataset is None:
            dataset = group.create_dataset(
                name, data=array, maxshape=(None, *array.shape[1:]), chunks=(1, *array.shape[1:]),
                compression="gzip", compression_opts=1, shuffle=True, fletcher32=True,
            )  # fmt: skip
        else:
            dataset.resize(len(dataset) + len(array), axis=0)
            dataset[-len(array) :] = array


def write_result(
    path: str | Path,
    tensors: Mapping[str, Tensor | None],
    diagnostics: Mapping[str, Any],
    settings: Mapping[str, Any],
    blocks: Mapping[str, Iterable[Tensor]] | None = None,
) -> None:
    """Write a record to an HDF5 file, atomically; blocks: further tensors, part by part along the first axis.

    Arrays among the diagnostics become datasets of the group "diagnostics"; its other values, and the
    settings, must be JSON-able. Raises ValueError where they are not; a file that was at `path` then stays as
    it was.
    """
    arrays = {k: v for k, v in diagnostics.items() if isinstance(v, np.ndarray)}
    try:
        values = json.dumps({k: v for k, v in diagnostics.items() if k not in arrays})
        text = json.dumps(dict(settings))
    except TypeError as error:
        raise ValueError(
            f"diagnostics and settings must be arrays, numbers, text, lists or dicts: {error}"
        ) from error
    with atomic_path(path) as temporary, _new_file(temporary) as file:
        file.attrs["format"] = FORMAT
        file.attrs["schema_version"] = SCHEMA_VERSION
        file.attrs["alpenglow_version"] = __version__
        for name, tensor in tensors.items():
            if tensor is not None:
                _write_array(file, name, tensor.detach().cpu().numpy())
        for name, parts in (blocks or {}).items():
            _write_blocks(file, name, parts)
        file["settings"] = text
        group = file.create_group("diagnostics")
        for name, array in arrays.items():
            _write_array(group, name, array)
        file["diagnostics_values"] = values


def read_result(
    path: str | Path, names: tuple[str, ...]
) -> tuple[dict[str, Tensor | None], dict[str, Any], dict[str, Any]]:
    """Read the tensors `names` (None where the file has none), diagnostics and settings of `write_result`.

    Raises ValueError when the file is missing, truncated, damaged, not one of ours, or of another schema
    version.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"cannot load {path}: no such file")
    if not h5py.is_hdf5(path):
        raise ValueError(f"cannot load {path}: not an HDF5 file; expected one written by Posterior.save")
    try:
        with h5py.File(path, "r") as file:
            _check_header(path, file)
            tensors = {name: torch.as_tensor(file[name][()]) if name in file else None for name in names}
            diagnostics = json.loads(file["diagnostics_values"].asstr()[()])
            diagnostics |= {name: dataset[()] for name, dataset in file["diagnostics"].items()}
            return tensors, diagnostics, json.loads(file["settings"].asstr()[()])
    except (OSError, KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"cannot load {path}: truncated or damaged ({error})") from error


def _check_header(path: Path, file: h5py.File) -> None:
    if file.attrs.get("format") != FORMAT:
        raise ValueError(f"cannot load {path}: an HDF5 file, but not one written by Posterior.save")
    version = file.attrs.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"cannot load {path}: schema version {version}, written by alpenglow "
            f"{file.attrs.get('alpenglow_version')}; this alpenglow {__version__} reads version "
            f"{SCHEMA_VERSION}: install the version that wrote the file"
        )
