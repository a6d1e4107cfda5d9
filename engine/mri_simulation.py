"""Multi-coil k-space made from a real magnitude image, with everything known that a measurement hides."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alpenglow.io.kspace import KSpace, VoxelSize

# In half widths of the field of view: the cylinder that carries the loops, and the thickness of their wire,
# without which the field at a wire is infinite.
_CYLINDER, _WIRE = 1.25, 0.1
_SEGMENTS = 48
# Two rows of loops cover a head better than one of very small loops.
_LOOPS_IN_A_ROW = 8
_NOISE_SAMPLES = 16384
_PHASE_TERMS = 3


@dataclass(frozen=True, eq=False)
class Simulation:
    """k-space, and its truth: coil maps [slices, coils, H, W] and images [slices, H, W], complex64."""

    kspace: KSpace
    coil_maps: Tensor
    images: Tensor


def simulate_kspace(
    magnitude: Tensor,
    *,
    coils: int,
    covariance: Tensor,
    mask: Tensor | None = None,
    voxel_size: VoxelSize = (1.0, 1.0, 1.0),
    affine: np.ndarray | None = None,
    seed: int = 0,
) -> Simulation:
    """k-space of `coils` loops around an object, a pure function of its arguments.

    The image gets a random smooth phase, the maps are those of `simulate_coil_maps`, k-space is their centred
    orthonormal FFT times the mask, plus noise where it measures. The k-space also has a noise scan of the
    same covariance, and the magnitude as its truth.

    magnitude: not negative, [H, W] or [slices, H, W], in any unit. covariance: Psi = E[n n^H] / 2 of a
    sample's noise [coils], complex Hermitian [coils, coils] in the unit of k-space squared, positive
    semidefinite; noise_std^2 times the identity for independent coils. mask: bool [H, W], or None for all.
    voxel_size ((H, W, slice), mm) and affine: as of KSpace. Raises ValueError for other arguments.
    """
    volume = magnitude[None] if magnitude.ndim == 2 else magnitude
    if volume.ndim != 3 or volume.is_complex() or not volume.isfinite().all() or (volume < 0).any():
        raise ValueError(
            f"got a magnitude of {magnitude.dtype} {tuple(magnitude.shape)}; expected finite numbers of at "
            "least 0, [H, W] or [slices, H, W]"
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != volume.shape[1:]):
        raise ValueError(
            f"got a mask {tuple(mask.shape)} of {mask.dtype} for images {tuple(volume.shape[1:])}; expected "
            "bool [H, W]"
        )
    factor = _noise_factor(covariance, coils)
    generator = torch.Generator().manual_seed(seed)
    slices, height, width = volume.shape
    maps = _loop_maps(coils, (height, width), slices, generator)
    phase = torch.stack([_smooth_phase((height, width), generator) for _ in range(slices)])
    images = torch.polar(volume.cpu().float(), phase)
    data = torch.fft.ifftshift(maps * images[:, None], dim=(-2, -1))
    data = torch.fft.fftshift(torch.fft.fft2(data, norm="ortho"), dim=(-2, -1))
    data = data + torch.einsum("cd,sdhw->schw", factor, _white(data.shape, generator))
    noise = factor @ _white((coils, _NOISE_SAMPLES), generator)
    kspace = KSpace(
        data if mask is None else data * mask.cpu(),
        voxel_size=voxel_size,
        affine=affine,
        mask=None if mask is None else mask.cpu(),
        truth=images.abs(),
        noise=noise,
        source="simulated k-space",
    )
    return Simulation(kspace, maps, images)


def simulate_coil_maps(coils: int, shape: tuple[int, int], *, slices: int = 1, seed: int = 0) -> Tensor:
    """Coil maps of loops on a cylinder around the field of view, complex64 [slices, coils, H, W].

    A map is B_x - i B_y of the loop's field (Biot-Savart, the main field along z), at places and with phases
    that vary with the seed; slices are a pixel apart along the cylinder. The sum of squares over coils is 1
    everywhere. Raises ValueError for numbers that are not positive. Source: reciprocity, Hoult and Richards,
    J Magn Reson 1976.
    """
    if min(coils, slices, *shape) < 1:
        raise ValueError(f"got {coils} coils, {slices} slices of {shape}; expected positive numbers")
    return _loop_maps(coils, shape, slices, torch.Generator().manual_seed(seed))


def _loop_maps(coils: int, shape: tuple[int, int], slices: int, generator: torch.Generator) -> Tensor:
    height, width = shape
    pixel = 2 / max(shape)
    rows, columns, depth = (
        (torch.arange(n, dtype=torch.float64) - (n - 1) / 2) * pixel for n in (height, width, slices)
    )
    points = torch.stack(torch.meshgrid(depth, rows, columns, indexing="ij")[::-1], -1)  # x, y, z
    maps = torch.stack([_field(loop, points) for loop in _loops(coils, generator)], dim=1)
    turns = torch.rand(coils, generator=generator, dtype=torch.float64)
    maps = maps * torch.polar(torch.ones_like(turns), 2 * math.pi * turns)[:, None, None]
    return (maps / maps.abs().square().sum(1, keepdim=True).sqrt()).to(torch.complex64)


def _loops(coils: int, generator: torch.Generator) -> list[Tensor]:
    """Corners [_SEGMENTS, 3] of each loop; neighbours overlap a little, as they are built to."""
    rows = math.ceil(coils / _LOOPS_IN_A_ROW)
    around = math.ceil(coils / rows)
    radius = min(0.9, 1.15 * math.pi * _CYLINDER / around)
    turn = torch.arange(_SEGMENTS, dtype=torch.float64) * (2 * math.pi / _SEGMENTS)
    loops = []
    for index in range(coils):
        row, place = divmod(index, around)
        jitter = torch.randn(2, generator=generator, dtype=torch.float64).tolist()
        angle = 2 * math.pi * (place + 0.5 * row + 0.1 * jitter[0]) / around
        height = 1.5 * radius * (row - (rows - 1) / 2) + 0.1 * jitter[1]
        across, along = radius * turn.cos(), radius * turn.sin()
        loops.append(
            torch.stack(
                [
                    _CYLINDER * math.cos(angle) - across * math.sin(angle),
                    _CYLINDER * math.sin(angle) + across * math.cos(angle),
                    height + along,
                ],
                dim=-1,
            )
        )
    return loops


def _field(corners: Tensor, points: Tensor) -> Tensor:
    """B_x - i B_y of a current along the closed polygon `corners`, at points [..., 3], up to a constant."""
    field = torch.zeros(points.shape[:-1], dtype=torch.complex128)
    for start, end in zip(corners, corners.roll(-1, 0), strict=True):
        step, away = end - start, points - (start + end) / 2
        strength = (away.square().sum(-1) + _WIRE**2) ** -1.5
        across = (step[1] * away[..., 2] - step[2] * away[..., 1]) * strength
        along = (step[2] * away[..., 0] - step[0] * away[..., 2]) * strength
        field += torch.complex(across, -along)
    return field


def _smooth_phase(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Radians [H, W]: a few cosines, the coarsest the strongest."""
    places = torch.arange(_PHASE_TERMS, dtype=torch.float64)
    weights = torch.randn(_PHASE_TERMS, _PHASE_TERMS, generator=generator, dtype=torch.float64)
    weights = weights / (1 + places[:, None] + places)
    rows, columns = (
        torch.cos(math.pi * places * ((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None])
        for n in shape
    )
    return (rows @ weights @ columns.T).float()


def _white(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Complex numbers whose parts are standard normal."""
    return torch.complex(*(torch.randn(shape, generator=generator) for _ in range(2)))


def _noise_factor(covariance: Any, coils: int) -> Tensor:
    """complex64 [coils, coils], the Hermitian root F of the covariance F F^H: the same with every LAPACK."""
    psi = torch.as_tensor(covariance).cpu().to(torch.complex128)
    if psi.shape != (coils, coils) or not torch.allclose(psi, psi.mH, rtol=1e-5, atol=0):
        raise ValueError(f"got a covariance {tuple(psi.shape)}; expected a Hermitian [{coils}, {coils}]")
    values, vectors = torch.linalg.eigh(psi)
    if values[0] < -1e-9 * values.abs().max():
        raise ValueError(f"the covariance has the eigenvalue {values[0]:.3g}; expected none below 0")
    return (vectors * values.clamp(min=0).sqrt() @ vectors.mH).to(torch.complex64)
