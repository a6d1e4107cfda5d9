"""The slices of a scan as volumes: what is shown of each, where it lies in the patient, and the files."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from alpenglow.io.kspace import KSpace, VoxelSize
from alpenglow.io.nifti import write_nifti
from alpenglow.io.reconstructions import centre_crop, cropped_affine, write_reconstruction
from alpenglow.mri.grid import Grid
from alpenglow.posterior import Posterior

LEVEL = 0.9


@dataclass(frozen=True, eq=False)
class Window:
    """What of the images [height, width] of a grid is shown, and where it lies.

    size: (h, w), the field of view that the header shows, cut out of the middle. voxel_size: (H, W, slice) in
    mm, None where nobody says. affine: [4, 4] from (row, column, slice) to mm, or None.
    """

    size: tuple[int, int]
    voxel_size: VoxelSize | None
    affine: np.ndarray | None


def window_of(kspace: KSpace, grid: Grid, first: int = 0) -> Window:
    """The window of images on `grid`; `first`: the slice of the scan that is the volume's first."""
    share = [1.0, 1.0]
    if kspace.header is not None:
        encoded, recon = kspace.header.encoded.field_of_view, kspace.header.recon.field_of_view
        share = [min(1.0, recon[axis] / encoded[axis]) for axis in (0, 1)]
    left = [share[axis] * grid.file[axis] / grid.shown[axis] for axis in (0, 1)]
    size = [min(n, round(n * part)) for n, part in zip(grid.size, left, strict=True)]
    voxel = kspace.voxel_size
    if voxel is not None:
        voxel = (voxel[0] * grid.pixel[0], voxel[1] * grid.pixel[1], voxel[2])
    affine = kspace.affine
    if affine is not None:
        finer = np.array(affine, float)
        for axis in (0, 1):
            finer[:3, axis] *= grid.pixel[axis]
            shift = grid.file[axis] // 2 - grid.size[axis] // 2 * grid.pixel[axis]
            finer[:3, 3] += affine[:3, axis] * shift
        finer[:3, 3] += affine[:3, 2] * first
        affine = cropped_affine(finer, grid.size, (size[0], size[1]))
    return Window((size[0], size[1]), voxel, affine)


def write_volumes(folder: Path, posteriors: Iterable[Posterior], window: Window) -> dict[str, Path]:
    """Write the magnitude images of slices [2, height, width] as NIfTI volumes, and one in fastMRI's format.

    mean.nii.gz: E |x|; std.nii.gz: its standard deviation; lower.nii.gz and upper.nii.gz: the 90 % interval;
    map.nii.gz where all slices have a MAP image; reconstruction.h5: the mean once more. Posteriors are taken
    one after another. Without a voxel size the NIfTI header says 1 mm. Returns the paths by name; raises what
    the writers raise.
    """
    stacks: dict[str, list[Tensor]] = {}
    for posterior in posteriors:
        for name, image in _images(posterior).items():
            stacks.setdefault(name, []).append(centre_crop(image, window.size))
    count = len(stacks["mean"])
    paths = {}
    for name, images in stacks.items():
        if len(images) == count:
            paths[name] = folder / f"{name}.nii.gz"
            write_nifti(
                paths[name], torch.stack(images),
                voxel_size=window.voxel_size or (1.0, 1.0, 1.0), affine=window.affine,
            )  # fmt: skip
    paths["reconstruction"] = folder / "reconstruction.h5"
    write_reconstruction(
        paths["reconstruction"], torch.stack(stacks["mean"]),
        voxel_size=window.voxel_size, affine=window.affine,
    )  # fmt: skip
    return paths


def _images(posterior: Posterior) -> dict[str, Tensor]:
    """Magnitude images [height, width] by the names of their volumes."""
    moduli = posterior.magnitude()
    lower, upper = moduli.interval(LEVEL)
    images = {"mean": moduli.mean, "std": moduli.std, "lower": lower.clamp(min=0), "upper": upper}
    if moduli.map_image is not None:
        images["map"] = moduli.map_image
    return {name: image[0].cpu() for name, image in images.items()}
