"""k-space in the files of BART: name.hdr, the sizes as text, and name.cfl, complex64 in column-major order.

Dimensions of BART: 0 readout, 1 and 2 phase encoding, 3 coils, 4 sets of maps, 13 slices; the others (echoes,
times, averages, ...) must be 1 here. Source: src/misc/mri.h of BART.
"""

import math
from pathlib import Path

import numpy as np

from alpenglow.io.files import atomic_path
from alpenglow.io.kspace import KSpace
from alpenglow.io.lazy import MappedSlices, existing_file

DIMENSIONS = 16
READOUT, PHASE, PHASE_2, COILS, MAPS, SLICES = 0, 1, 2, 3, 4, 13

_ADVICE = {
    PHASE_2: "3D k-space, or slices or coils out of place: `bart transpose 2 13` makes it slices, "
    "`bart transpose 2 3` coils",
    MAPS: "several sets of maps: `bart slice 4 0` takes the first",
}


def open_bart(path: str | Path) -> KSpace:
    """k-space of name.cfl beside name.hdr; either name will do. No geometry: BART's files have none.

    Raises ValueError for a file that is missing, shorter or longer than its sizes say, or of other
    dimensions than readout, phase encoding, coils and slices.
    """
    path = Path(path)
    return KSpace(open_cfl(path), source=str(path))


def open_cfl(path: str | Path) -> MappedSlices:
    """Complex64 [slices, coils, H, W] of name.cfl, mapped into memory. Raises ValueError as `open_bart`."""
    data = existing_file(Path(path).with_suffix(".cfl"))
    sizes = _read_sizes(existing_file(data.with_suffix(".hdr")))
    for axis, size in enumerate(sizes):
        if size != 1 and axis not in (READOUT, PHASE, COILS, SLICES):
            advice = _ADVICE.get(axis, f"`bart slice {axis} 0` takes the first")
            raise ValueError(f"{data} has {size} entries along dimension {axis}, expected 1; {advice}")
    found, expected = data.stat().st_size, math.prod(sizes) * np.dtype(np.complex64).itemsize
    if found != expected:
        raise ValueError(
            f"{data} has {found} bytes, and its .hdr says {' x '.join(map(str, sizes))} samples: {expected} "
            "bytes; it is truncated, or the .hdr belongs to another file"
        )
    stored = tuple(sizes[axis] for axis in (SLICES, COILS, PHASE, READOUT))
    return MappedSlices(np.memmap(data, "<c8", "r", shape=stored).swapaxes(2, 3), np.complex64)


def write_bart(path: str | Path, kspace: KSpace) -> None:
    """Write name.cfl and name.hdr slice by slice, atomically; what is not k-space has no place in them.

    Raises ValueError where a slice holds NaN or infinity; then nothing is written.
    """
    path = Path(path)
    sizes = [1] * DIMENSIONS
    sizes[SLICES], sizes[COILS], sizes[READOUT], sizes[PHASE] = kspace.shape
    # The .hdr comes last into its place: without it a .cfl is not yet there for anyone.
    with (
        atomic_path(path.with_suffix(".hdr")) as header,
        atomic_path(path.with_suffix(".cfl")) as data,
        data.open("wb") as stream,
    ):
        header.write_text(f"# Dimensions\n{' '.join(map(str, sizes))}\n")
        for index in range(len(kspace)):
            stream.write(kspace[index].mT.contiguous().numpy(force=True).astype("<c8").tobytes())


def _read_sizes(path: Path) -> list[int]:
    try:
        lines = path.read_text().splitlines()
        sizes = [int(word) for word in lines[lines.index("# Dimensions") + 1].split()]
    except (ValueError, IndexError, UnicodeDecodeError):
        raise ValueError(f"cannot read {path}: expected `# Dimensions` and a line of sizes") from None
    if not 0 < len(sizes) <= DIMENSIONS or min(sizes) < 1:
        raise ValueError(f"{path} has the sizes {sizes}; expected up to {DIMENSIONS} positive numbers")
    return sizes + [1] * (DIMENSIONS - len(sizes))
