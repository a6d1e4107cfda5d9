"""Multi-coil scans of a head drawn here, for the tests of MRI."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from alpenglow.io.kspace import KSpace
from alpenglow.mri_simulation import Simulation, simulate_kspace

BRAIN = Path(__file__).parents[1] / "data" / "brain" / "ch2.nii.gz"

VOXEL = (1.2, 0.9, 4.0)


def head(slices: int, height: int, width: int) -> Tensor:
    """Magnitude images [slices, H, W]: a skull, a brain, and lesions that differ between the slices."""
    images = torch.zeros(slices, height, width)
    v, u = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    for index in range(slices):
        for top, left, tall, wide, value in (
            (0.0, 0.0, 0.85, 0.7, 0.9), (0.0, 0.0, 0.75, 0.6, -0.5), (-0.2, 0.2, 0.2, 0.1, 0.3),
            (0.3, -0.15 + 0.1 * index, 0.12, 0.15, 0.5),
        ):  # fmt: skip
            images[index] += value * (((v - top) / tall) ** 2 + ((u - left) / wide) ** 2 < 1)
    return images


def brain(height: int = 224, width: int = 192) -> Tensor:
    """An axial slice [H, W] of Colin27, where `make data` has put it."""
    import nibabel

    plane = np.asarray(nibabel.load(BRAIN).dataobj[:, :, 90], np.float32)[:, ::-1].T
    rows, columns = ((full - own) // 2 for full, own in zip((height, width), plane.shape, strict=True))
    image = torch.zeros(height, width)
    image[rows : rows + plane.shape[0], columns : columns + plane.shape[1]] = torch.from_numpy(plane.copy())
    return image / image.max()


def columns(height: int, width: int, calibration: int, step: int = 2) -> Tensor:
    """A mask [H, W] of every `step`-th column and `calibration` ones in the middle."""
    line = torch.arange(width) % step == 0
    line[width // 2 - calibration // 2 : width // 2 - calibration // 2 + calibration] = True
    return line.expand(height, width).clone()


def oblique(voxel: tuple[float, float, float] = VOXEL) -> np.ndarray:
    """An affine of turned axes."""
    angle = 0.3
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    tilt = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ tilt @ np.diag(voxel)
    affine[:3, 3] = (-80.0, 25.0, 12.5)
    return affine


def simulation(
    slices: int = 2,
    coils: int = 3,
    height: int = 24,
    width: int = 17,
    *,
    mask: Tensor | None = None,
    seed: int = 0,
) -> Simulation:
    return simulate_kspace(
        head(slices, height, width), coils=coils, covariance=1e-4 * torch.eye(coils), mask=mask,
        voxel_size=VOXEL, affine=oblique(), seed=seed,
    )  # fmt: skip


def slices_of(kspace: KSpace) -> Tensor:
    """All of it, [slices, coils, H, W]."""
    return torch.stack([kspace[index] for index in range(len(kspace))])


def random_kspace(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed))
