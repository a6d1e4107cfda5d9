"""Multi-coil k-space in files: which format a file has."""

from collections.abc import Callable
from pathlib import Path

from alpenglow.io.bart import open_bart, write_bart
from alpenglow.io.fastmri import open_fastmri, write_fastmri
from alpenglow.io.ismrmrd import is_ismrmrd, open_ismrmrd
from alpenglow.io.ismrmrd_writer import write_ismrmrd
from alpenglow.io.kspace import KSpace
from alpenglow.io.npy import open_npy, write_npy


def open_kspace(path: str | Path) -> KSpace:
    """k-space of a fastMRI (.h5), ISMRMRD (.h5, .mrd), BART (.cfl, .hdr) or NumPy (.npy) file.

    Only what describes it is read; slices are when they are asked for. Of an .h5 file the content tells
    which it is. Raises ValueError for another suffix, and whatever the reader of the format refuses.
    """
    path = Path(path)
    return _of(_READERS, path, "read")(path)


def write_kspace(path: str | Path, kspace: KSpace) -> None:
    """Write k-space as fastMRI (.h5), ISMRMRD (.mrd), BART (.cfl with .hdr) or NumPy (.npy), atomically.

    Raises ValueError for another suffix, and whatever the writer of the format refuses; then nothing is
    written.
    """
    path = Path(path)
    _of(_WRITERS, path, "write")(path, kspace)


def _open_hdf5(path: Path) -> KSpace:
    return open_ismrmrd(path) if is_ismrmrd(path) else open_fastmri(path)


def _of(functions: dict[str, Callable], path: Path, verb: str) -> Callable:
    function = functions.get(path.suffix.lower())
    if function is None:
        raise ValueError(f"cannot {verb} {path}: expected a name that ends in {', '.join(functions)}")
    return function


_READERS: dict[str, Callable[[Path], KSpace]] = {
    ".h5": _open_hdf5, ".hdf5": _open_hdf5, ".mrd": open_ismrmrd,
    ".cfl": open_bart, ".hdr": open_bart, ".npy": open_npy,
}  # fmt: skip
_WRITERS: dict[str, Callable[[Path, KSpace], None]] = {
    ".h5": write_fastmri, ".hdf5": write_fastmri, ".mrd": write_ismrmrd,
    ".cfl": write_bart, ".hdr": write_bart, ".npy": write_npy,
}  # fmt: skip
