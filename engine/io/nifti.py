"""Image volumes as NIfTI, with their place in the patient."""

import gzip
from pathlib import Path

import numpy as np
from torch import Tensor

from alpenglow.io.files import atomic_path
from alpenglow.io.kspace import VoxelSize, check_geometry
from alpenglow.io.optional import require
from alpenglow.io.reconstructions import check_images


def write_nifti(
    path: str | Path, images: Tensor, *, voxel_size: VoxelSize, affine: np.ndarray | None = None
) -> None:
    """Write real images [slices, H, W] atomically, as a float32 volume [H, W, slices].

    voxel_size: (H, W, slice) in mm. affine: [4, 4] from (row, column, slice) to mm (right, anterior,
    superior); without it the file says the voxel size and that its place is unknown. Raises ValueError for
    complex or other images, NaN or infinity, an affine of another voxel size, a name that does not end in
    .nii or .nii.gz, and where nibabel is not installed; then nothing is written.
    """
    path = Path(path)
    nibabel = require("nibabel", "writing NIfTI")
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        raise ValueError(f"cannot write {path}: expected a name that ends in .nii or .nii.gz")
    volume = np.moveaxis(check_images(images, path), 0, 2)
    check_geometry(voxel_size, affine, f"the volume for {path}")
    image = nibabel.Nifti1Image(volume, affine)
    image.header.set_xyzt_units("mm")
    image.header.set_zooms(voxel_size)
    if affine is not None:
        image.set_sform(affine, "scanner")
        image.set_qform(affine, "scanner")
    with atomic_path(path) as temporary:
        # nibabel tells .nii.gz by the whole name, of which a temporary one keeps the last suffix.
        # Without a time in it the same volume is the same file.
        content = image.to_bytes()
        zipped = path.suffix.lower() == ".gz"
        temporary.write_bytes(gzip.compress(content, 6, mtime=0) if zipped else content)
