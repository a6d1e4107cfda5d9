"""Reconstructed image volumes in HDF5, as fastMRI wants them, and the part of an image it shows."""

from pathlib import Path

import h5py
import numpy as np
from torch import Tensor

from alpenglow.io.files import atomic_path
from alpenglow.io.kspace import VoxelSize, check_geometry
from alpenglow.io.lazy import Hdf5Slices, open_hdf5

DATASET = "reconstruction"


def write_reconstruction(
    path: str | Path,
    images: Tensor,
    *,
    voxel_size: VoxelSize | None = None,
    affine: np.ndarray | None = None,
) -> None:
    """Write real images [slices, H, W] atomically: the dataset `reconstruction`, float32.

    voxel_size ((H, W, slice), mm) and affine ([4, 4], to right-anterior-superior) become its attributes.
    Raises ValueError for complex or other images and for NaN or infinity; then nothing is written.
    """
    volume = check_images(images, Path(path))
    if voxel_size is not None or affine is not None:
        check_geometry(voxel_size, affine, f"the volume for {path}")
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        dataset = file.create_dataset(DATASET, data=volume)
        for name, value in (("voxel_size", voxel_size), ("affine", affine)):
            if value is not None:
                dataset.attrs[name] = value


def open_reconstruction(path: str | Path) -> Hdf5Slices:
    """The images [slices, H, W] of `write_reconstruction`, read slice by slice.

    Raises ValueError for a file that is damaged or lacks the dataset `reconstruction` of three dimensions.
    """
    path = Path(path)
    with open_hdf5(path) as file:
        dataset = file.get(DATASET)
        if not isinstance(dataset, h5py.Dataset) or dataset.ndim != 3 or dataset.dtype.kind != "f":
            raise ValueError(
                f"{path} has no dataset `{DATASET}` of real images [slices, H, W], only "
                f"{', '.join(file) or 'nothing'}"
            )
        return Hdf5Slices(path, DATASET, dataset.shape, np.float32)


def check_images(images: Tensor, path: Path) -> np.ndarray:
    """Float32 [slices, H, W]; ValueError for anything but finite real images of that shape."""
    if images.ndim != 3 or images.numel() == 0 or images.is_complex():
        raise ValueError(
            f"got {images.dtype} {tuple(images.shape)} for {path}; expected real images [slices, H, W]: of "
            "complex ones the magnitude"
        )
    volume = images.numpy(force=True).astype(np.float32)
    if not np.isfinite(volume).all():
        raise ValueError(f"the images for {path} hold NaN or infinity; nothing was written")
    return volume


def centre_crop(images: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle [..., h, w] of images [..., H, W]: the readout is oversampled, and scanners show less.

    The centre [H // 2, W // 2] comes to [h // 2, w // 2]. Raises ValueError where images are smaller.
    """
    first, second = (_first(images.shape[axis], length) for axis, length in zip((-2, -1), size, strict=True))
    return images[..., first : first + size[0], second : second + size[1]]


def cropped_affine(affine: np.ndarray, full: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """The affine [4, 4] of `centre_crop` to `size`, from that of images of the size `full`."""
    moved = np.array(affine, float)
    moved[:3, 3] += affine[:3, 0] * _first(full[0], size[0]) + affine[:3, 1] * _first(full[1], size[1])
    return moved


def _first(full: int, size: int) -> int:
    if not 0 < size <= full:
        raise ValueError(f"cannot cut {size} pixels out of the middle of {full}")
    return full // 2 - size // 2
