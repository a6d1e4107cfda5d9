"""Where the slices of an ISMRMRD scan lie in the patient.

ISMRMRD gives the middle of each slice and the directions of readout, phase and slice in mm of the patient's
coordinates, left-posterior-superior; affines here are right-anterior-superior, as in NIfTI.
"""

import numpy as np

from alpenglow.io.mri_header import ScanHeader

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])
# mm, relative to the spacing of slices: positions are stored as float32.
_TOLERANCE = 1e-2


def affine_of(
    heads: np.ndarray, header: ScanHeader, shape: tuple[int, int, int, int]
) -> tuple[np.ndarray | None, float]:
    """([4, 4] from (row, column, slice) to mm, spacing of slices in mm) of imaging lines.

    The affine is None where directions are missing or no rotation, or slices are not evenly spaced; the
    spacing is then the thickness.
    """
    slices, _, height, width = shape
    thickness = header.encoded.field_of_view[2]
    firsts = [heads[heads["idx"]["slice"] == index][:1] for index in range(slices)]
    if any(len(first) == 0 for first in firsts):
        return None, thickness
    places = np.concatenate(firsts)
    directions = np.stack([places[name].astype(float) for name in ("read_dir", "phase_dir", "slice_dir")], -1)
    if not np.allclose(directions.mT @ directions, np.eye(3), atol=1e-3):
        return None, thickness
    positions = places["position"].astype(float)
    step = (positions[-1] - positions[0]) / (slices - 1) if slices > 1 else thickness * directions[0, :, 2]
    spacing = float(np.linalg.norm(step))
    even = positions[0] + np.arange(slices)[:, None] * step
    if (
        spacing == 0
        or np.abs(even - positions).max() > _TOLERANCE * spacing
        or np.ptp(directions, 0).max() > 1e-4
    ):
        return None, thickness
    edges = [header.encoded.field_of_view[0] / height, header.encoded.field_of_view[1] / width]
    columns = np.stack([*(directions[0, :, :2] * edges).T, step], -1)
    affine = np.eye(4)
    affine[:3, :3] = _LPS_TO_RAS @ columns
    affine[:3, 3] = _LPS_TO_RAS @ (positions[0] - columns[:, :2] @ (height // 2, width // 2))
    return affine, spacing


def place_of(affine: np.ndarray, index: int, height: int, width: int) -> dict[str, tuple[float, ...]]:
    """Position and directions that an acquisition of slice `index` says, by the names of its fields."""
    columns = _LPS_TO_RAS @ affine[:3, :3]
    middle = _LPS_TO_RAS @ (affine @ (height // 2, width // 2, index, 1))[:3]
    read, phase = (columns[:, axis] / np.linalg.norm(columns[:, axis]) for axis in (0, 1))
    through = np.cross(read, phase)
    # ISMRMRD's slice direction may be either normal; the one along which slices are counted says more.
    through = through if through @ columns[:, 2] > 0 else -through
    vectors = {"position": middle, "read_dir": read, "phase_dir": phase, "slice_dir": through}
    return {name: tuple(map(float, vector)) for name, vector in vectors.items()}
