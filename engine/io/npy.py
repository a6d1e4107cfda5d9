"""k-space in NPY files."""

from pathlib import Path

import numpy as np

from alpenglow.io.files import atomic_path
from alpenglow.io.kspace import KSpace
from alpenglow.io.lazy import MappedSlices, existing_file


def open_npy(path: str | Path) -> KSpace:
    """k-space of complex numbers [slices, coils, H, W], or [coils, H, W] of one slice. No geometry.

    Raises ValueError for a file that is missing, truncated, or of something else.
    """
    return KSpace(open_array(path), source=str(path))


def open_array(path: str | Path) -> MappedSlices:
    """Complex64 [slices, coils, H, W] of a .npy file, mapped into memory. Raises ValueError as `open_npy`."""
    path = existing_file(Path(path))
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"cannot read {path}: {error} (truncated or damaged)") from None
    if not isinstance(array, np.ndarray):
        array.close()
        raise ValueError(f"cannot read {path}: it is an archive of arrays; save one array with numpy.save")
    if array.dtype.kind != "c" or array.ndim not in (3, 4):
        raise ValueError(
            f"{path} holds {array.dtype} {array.shape}; expected complex [slices, coils, H, W], or "
            "[coils, H, W] of one slice"
        )
    return MappedSlices(array if array.ndim == 4 else array[None], np.complex64)


def write_npy(path: str | Path, kspace: KSpace) -> None:
    """Write [slices, coils, H, W] complex64 slice by slice, atomically; the rest has no place in it.

    Raises ValueError where a slice holds NaN or infinity; then nothing is written.
    """
    header = {"descr": "<c8", "fortran_order": False, "shape": kspace.shape}
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        for index in range(len(kspace)):
            stream.write(kspace[index].contiguous().numpy(force=True).astype("<c8").tobytes())
