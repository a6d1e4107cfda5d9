"""Multi-coil Cartesian k-space of a stack of slices, wherever its samples lie."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from alpenglow.io.lazy import Slices
from alpenglow.io.mri_header import ScanHeader

VoxelSize = tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class KSpace:
    """k-space [slices, coils, H, W]: H along the readout, W along the phase encoding, both centred.

    Its centre is at [H // 2, W // 2], and an image is fftshift(ifft2(ifftshift(k), norm="ortho")): the
    convention of SenseMRI, fastMRI and BART. `kspace[i]` is slice i, complex64 [coils, H, W]; `data` may
    lie in a file, which then is read only as far as that.

    data: what slices are read from. source: what messages call it.
    voxel_size: (H, W, slice) in mm, of the images of the whole k-space; None where nobody says.
    affine: [4, 4], from (row, column, slice) of those images to mm (right, anterior, superior), or None.
    header: what an ISMRMRD header says, or None.
    mask: bool [H, W], for every slice, where the file says what was sampled; see `sampling_mask`.
    truth: magnitude images [slices, h, w], float32, where the file has them.
    noise: a scan without signal, complex64 [coils, samples], scaled to the noise of one measurement of
        `data`; for `coil_noise.noise_covariance`.
    calibration: fully sampled lines for coil maps alone, shaped as `data`, 0 elsewhere.
    averages: of how many measurements a sample of `data` is the mean: its noise variance is that of `noise`
        over this.

    Raises ValueError where these do not fit together.
    """

    data: Slices
    voxel_size: VoxelSize | None = None
    affine: np.ndarray | None = None
    header: ScanHeader | None = None
    mask: Tensor | None = None
    truth: Slices | None = None
    noise: Tensor | None = None
    calibration: Slices | None = None
    averages: int = 1
    source: str = "k-space"

    def __post_init__(self) -> None:
        shape = tuple(self.data.shape)
        if len(shape) != 4 or min(shape) < 1:
            raise ValueError(f"{self.source} has shape {shape}; expected [slices, coils, H, W]")
        slices, coils, height, width = shape
        # No array has so many coils; an array with coils last looks so.
        if coils > min(height, width):
            raise ValueError(
                f"{self.source} has shape {shape}: more coils ({coils}) than rows or columns; expected the "
                "order [slices, coils, H, W]: transpose it"
            )
        if self.mask is not None and (self.mask.dtype != torch.bool or self.mask.shape != (height, width)):
            raise ValueError(
                f"got a mask {tuple(self.mask.shape)} of {self.mask.dtype} for {self.source} {shape}; "
                "expected bool [H, W]"
            )
        if self.truth is not None and (len(self.truth.shape) != 3 or self.truth.shape[0] != slices):
            raise ValueError(
                f"the truth of {self.source} has shape {tuple(self.truth.shape)}; expected "
                f"[{slices}, h, w]: an image a slice"
            )
        if self.noise is not None and (self.noise.ndim != 2 or len(self.noise) != coils):
            raise ValueError(
                f"the noise scan of {self.source} has shape {tuple(self.noise.shape)}; expected "
                f"[{coils}, samples]"
            )
        if self.calibration is not None and tuple(self.calibration.shape) != shape:
            raise ValueError(
                f"the calibration of {self.source} has shape {tuple(self.calibration.shape)}; expected "
                f"{shape}"
            )
        if self.voxel_size is not None or self.affine is not None:
            check_geometry(self.voxel_size, self.affine, self.source)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(slices, coils, H, W)."""
        slices, coils, height, width = self.data.shape
        return slices, coils, height, width

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> Tensor:
        """Slice `index`, complex64 [coils, H, W]; ValueError where it holds NaN or infinity."""
        if not 0 <= index < len(self):
            raise IndexError(f"got slice {index}; {self.source} has the slices 0 to {len(self) - 1}")
        values = self.data[index].to(torch.complex64)
        if not values.isfinite().all():
            raise ValueError(
                f"slice {index} of {self.source} holds NaN or infinity; leave it out, or repair it"
            )
        return values

    def sampling_mask(self, index: int) -> Tensor:
        """What was measured of slice `index`, bool [H, W]; see `measured`."""
        return self.measured(self[index])

    def measured(self, samples: Tensor) -> Tensor:
        """What was measured of a slice [coils, H, W] that was read, bool [H, W].

        A sample that is exactly 0 in every coil was not measured, whatever the file's mask says: noise never
        is 0, and fastMRI fills the margins of k-space with zeros that its masks count.
        """
        measured = (samples != 0).any(0)
        return measured if self.mask is None else measured & self.mask

    def calibration_lines(self, index: int) -> tuple[Tensor, Tensor]:
        """(k-space [coils, H, W], what of it was measured, bool [H, W]) to estimate coil maps from.

        Those are the lines for calibration alone where there are any, else the slice itself.
        """
        if self.calibration is None:
            samples = self[index]
            return samples, self.measured(samples)
        lines = self.calibration[index].to(torch.complex64)
        return lines, (lines != 0).any(0)


def check_geometry(voxel_size: VoxelSize | None, affine: np.ndarray | None, source: str) -> None:
    """ValueError unless voxel_size is three lengths in mm, and the affine (if any) a 4x4 matrix of them."""
    if voxel_size is None:
        raise ValueError(f"{source} has an affine and no voxel size; give both")
    if len(voxel_size) != 3 or not all(0 < edge < float("inf") for edge in voxel_size):
        raise ValueError(f"got the voxel size {voxel_size} for {source}; expected (H, W, slice) in mm")
    if affine is None:
        return
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or not np.allclose(affine[3], (0, 0, 0, 1)):
        raise ValueError(f"got the affine {affine.tolist()} for {source}; expected 4x4, the last row 0 0 0 1")
    edges = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.allclose(edges, voxel_size, rtol=0.01):
        raise ValueError(
            f"the affine of {source} has voxels of {edges.round(4).tolist()} mm, and its voxel size is "
            f"{voxel_size}; give the same"
        )
