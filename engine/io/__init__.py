"""Reading and writing images, results and k-space."""

from alpenglow.io.coil_maps import estimate_coil_maps, open_coil_maps
from alpenglow.io.files import atomic_path
from alpenglow.io.images import read_image, write_image
from alpenglow.io.kspace import KSpace
from alpenglow.io.mri import open_kspace, write_kspace
from alpenglow.io.nifti import write_nifti
from alpenglow.io.reconstructions import open_reconstruction, write_reconstruction

__all__ = [
    "KSpace",
    "atomic_path",
    "estimate_coil_maps",
    "open_coil_maps",
    "open_kspace",
    "open_reconstruction",
    "read_image",
    "write_image",
    "write_kspace",
    "write_nifti",
    "write_reconstruction",
]
