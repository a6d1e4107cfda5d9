"""Complex MR images of brains, synthesised from the few real volumes that packages carry (DESIGN 7)."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from alpenglow.distillation.sources.nifti import read_volume, require_nibabel

FOLDER = Path("data/brain")

# A slice is held out by its place along the normal: 4 mm in every 40; the 2 mm beside are used by nobody.
PERIOD_MM, HELD_OUT_MM, GUARD_MM = 40.0, 4.0, 2.0
# A slice of less tissue than this share of its pixels is no image of a brain.
LEAST_TISSUE = 0.1
OVERSAMPLING = 2


@dataclass(frozen=True)
class Scan:
    """One volume: its file, the tissue maps that go with it, and how often it is drawn."""

    file: str
    weight: float
    tissues: tuple[str, ...] = ()


_MNI = "mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
SCANS = (
    Scan("ch2.nii.gz", 0.35),
    Scan("ch2better.nii.gz", 0.25),
    Scan(_MNI.format("t1"), 0.3, (_MNI.format("gm"), _MNI.format("wm"))),
    Scan("inia19-t1-brain.nii.gz", 0.1),
)

DESCRIPTION = f"""\
Complex MR slices of 128x128 pixels (real and imaginary part), made as they are drawn from four volumes:
Colin27 with skull (1 mm) and without (0.5 mm) and the INIA19 macaque T1 (Debian package `mricron-data`,
BSD), and the MNI152 average with its grey and white matter maps (`nilearn`, BSD). A draw takes an axial,
coronal or sagittal slice, a random affine and elastic deformation, a random contrast (a curve of the T1
intensity; for MNI152 also a mixture of the tissue maps), a random coil bias and a random smooth phase; the
99th percentile of the magnitude lies between 0.7 and 1.1. There are few anatomies here: it is a prior for
demonstrations and method research, not for patients. Held out: along each of the three axes of every volume,
the slices in {HELD_OUT_MM:g} mm of every {PERIOD_MM:g} mm, with {GUARD_MM:g} mm on either side that nobody
uses. Other orientations of the same head cross them, so the figures below flatter the prior for other
heads."""


@dataclass(frozen=True)
class _Volume:
    """channels [1 + tissues, X, Y, Z] uint8, right-anterior-superior; voxel edge in mm."""

    channels: Tensor
    voxel_mm: float
    weight: float
    places: dict[str, list[tuple[int, int]]]
    """(axis, index) of the usable slices, by split."""


def _split(position_mm: float) -> str:
    offset = position_mm % PERIOD_MM
    if offset < HELD_OUT_MM:
        return "held out"
    return "guard" if offset < HELD_OUT_MM + GUARD_MM or offset >= PERIOD_MM - GUARD_MM else "training"


def _read(folder: Path, scan: Scan) -> _Volume:
    channels: list[Tensor] = []
    for name in (scan.file, *scan.tissues):
        values, edges = read_volume(folder / name)
        # Intensities have no unit: white matter's is near 0.8; the tissue maps are shares of 255.
        top = 255.0 if channels else 1.25 * float(np.percentile(values[values > 0], 90))
        channels.append(torch.from_numpy(np.clip(values * (255 / top), 0, 255).round().astype(np.uint8)))
    volume, voxel = torch.stack(channels), float(edges[0])
    places: dict[str, list[tuple[int, int]]] = {"training": [], "held out": [], "guard": []}
    for axis in range(3):
        tissue = (volume[0] > 25).float().mean(tuple(a for a in range(3) if a != axis))
        for index, share in enumerate(tissue.tolist()):
            if share >= LEAST_TISSUE:
                places[_split(index * voxel)].append((axis, index))
    return _Volume(volume, voxel, scan.weight, places)


class BrainSlices:
    """Random complex brain slices [2, 128, 128]; volumes are read at the first draw (73 MB of memory).

    Raises ValueError where a volume is missing or cannot be read.
    """

    description = DESCRIPTION

    def __init__(self, folder: Path = FOLDER, size: int = 128) -> None:
        require_nibabel()
        names = [name for scan in SCANS for name in (scan.file, *scan.tissues)]
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{folder} lacks the MR volumes {', '.join(missing)}; run `make data`")
        self.folder, self.size = folder, size
        self.image_shape = (2, size, size)

    @cached_property
    def volumes(self) -> list[_Volume]:
        return [_read(self.folder, scan) for scan in SCANS]

    def draw(self, generator: torch.Generator) -> Tensor:
        return self._image("training", generator)

    def held_out(self, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.stack([self._image("held out", generator) for _ in range(count)])

    def _image(self, split: str, generator: torch.Generator) -> Tensor:
        weights = torch.tensor([volume.weight for volume in self.volumes])
        volume = self.volumes[int(torch.multinomial(weights, 1, generator=generator))]
        places = volume.places[split]
        axis, index = places[int(torch.randint(len(places), (), generator=generator))]
        plane = _upright(volume.channels.select(axis + 1, index).float() / 255)
        # The head fills nine tenths of the field of view, whatever its size in mm.
        extent = 1.1 * max(volume.channels.shape[1:])
        channels = _deform(plane, extent, self.size, generator, mirror=axis != 0)
        magnitude = _contrast(channels, generator) * (0.3 * _smooth(self.size, 4, generator)).exp()
        peak = magnitude.flatten().kthvalue(int(0.99 * magnitude.numel())).values.clamp(min=1e-3)
        magnitude = magnitude * (0.7 + 0.4 * torch.rand((), generator=generator)) / peak
        phase = _phase(self.size, generator)
        return torch.stack([magnitude * phase.cos(), magnitude * phase.sin()])


def _upright(plane: Tensor) -> Tensor:
    """[C, a, b] of a RAS volume -> [C, H, W] with superior (in an axial slice anterior) at the top."""
    return plane.transpose(1, 2).flip(1)


def _smooth(size: int, knots: int, generator: torch.Generator) -> Tensor:
    """A random smooth field [size, size] of about unit variance: bicubic between `knots`^2 normals."""
    field = torch.randn(1, 1, knots, knots, generator=generator)
    return F.interpolate(field, (size, size), mode="bicubic", align_corners=True)[0, 0]


def _deform(plane: Tensor, extent: float, size: int, generator: torch.Generator, *, mirror: bool) -> Tensor:
    """The plane [C, H, W] under a random affine and elastic map, as [C, size, size] over `extent` voxels."""
    normal = torch.randn(7, generator=generator).tolist()
    angle, shear = 0.2 * normal[0], 0.07 * normal[1]
    across, along = (0.85 * math.exp(0.09 * normal[2]), 0.85 * math.exp(0.09 * normal[3]))
    fine = OVERSAMPLING * size
    unit = (torch.arange(fine) + 0.5) * (2 / fine) - 1
    v, u = torch.meshgrid(unit, unit, indexing="ij")
    u = u + 0.02 * _smooth(fine, 6, generator) + shear * v
    v = v + 0.02 * _smooth(fine, 6, generator)
    if mirror and normal[6] > 0:
        u = -u
    rotated_u = (math.cos(angle) * u - math.sin(angle) * v) * across + 0.05 * normal[4]
    rotated_v = (math.sin(angle) * u + math.cos(angle) * v) * along + 0.05 * normal[5]
    height, width = plane.shape[1:]
    grid = torch.stack([rotated_u * (extent / width), rotated_v * (extent / height)], dim=-1)
    sampled = F.grid_sample(plane[None], grid[None], mode="bilinear", align_corners=False)
    # Averaging blocks is the partial volume effect, and keeps what is finer than a pixel from aliasing.
    return F.avg_pool2d(sampled, OVERSAMPLING)[0]


def _contrast(channels: Tensor, generator: torch.Generator) -> Tensor:
    """Magnitude [H, W] of a random sequence: a curve of the T1 intensity, or a mixture of tissues."""
    t1, tissues = channels[0], channels[1:]
    kind, gamma, *levels = torch.rand(9, generator=generator).tolist()
    if kind < 0.4:
        curve = [(0.25 * k) ** (0.6 + gamma) for k in range(5)]
    else:
        curve = [0.0, *(0.15 + 0.85 * level for level in levels[:4])]
    magnitude = _piecewise_linear(t1, curve)
    if len(tissues) and kind > 0.6:
        rest = (1 - tissues.sum(0)).clamp(min=0)
        grey, white = (0.15 + 0.85 * level for level in levels[4:6])
        magnitude = magnitude * rest + grey * tissues[0] + white * tissues[1]
    return magnitude


def _piecewise_linear(x: Tensor, values: list[float]) -> Tensor:
    """The curve through `values` at 0, 1 / n, .., 1, evaluated at x in [0, 1]."""
    knots = torch.tensor(values)
    position = x.clamp(0, 1) * (len(values) - 1)
    left = position.floor().clamp(max=len(values) - 2).long()
    return torch.lerp(knots[left], knots[left + 1], position - left)


def _phase(size: int, generator: torch.Generator) -> Tensor:
    """A constant, a ramp and a smooth field, in radians: shim, echo centre, coils."""
    constant, across, along = torch.rand(3, generator=generator).tolist()
    unit = torch.linspace(-1, 1, size)
    ramp = (across - 0.5) * unit[None, :] + (along - 0.5) * unit[:, None]
    return 2 * math.pi * constant + 2 * ramp + 0.6 * _smooth(size, 4, generator)
