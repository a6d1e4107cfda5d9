"""One slice of k-space as a problem in the prior's units: coils whitened, on the grid of its images."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from alpenglow.io.coil_maps import estimate_coil_maps
from alpenglow.io.kspace import KSpace
from alpenglow.io.lazy import Slices
from alpenglow.mri.grid import Grid, grid_of
from alpenglow.operators.coil_noise import estimate_noise_std, noise_covariance, whiten, whitening_matrix
from alpenglow.operators.sense import SenseMRI

TYPICAL_PEAK = 0.9
"""99th percentile of the magnitude of the images that the zoo's MR priors were trained on (0.7 to 1.1)."""
_RIM_SLICES = 16


@dataclass(frozen=True, eq=False)
class CoilNoise:
    """What a scan's noise is: k-space times `matrix` has noise_std per real component, alike in every coil.

    noise_std: in k-space's units. matrix: complex128 [coils, coils], None where k-space stays as it is.
    source: how it was found, for the record.
    """

    noise_std: float
    matrix: Tensor | None
    source: str

    def whiten(self, values: Tensor) -> Tensor:
        """k-space or maps [coils, H, W] of the whitened coils."""
        return values if self.matrix is None else whiten(values, self.matrix)


@dataclass(frozen=True, eq=False)
class SliceProblem:
    """What `alpenglow.sample` takes, for one slice.

    y: complex64 [coils, height, width]; noise_std: per real component. Both, and the images
    [2, height, width], are in the prior's units: times `scale` images are in those of the file.
    """

    operator: SenseMRI
    y: Tensor
    noise_std: float
    scale: float
    grid: Grid


def find_noise(kspace: KSpace, noise_std: float | None = None) -> CoilNoise:
    """The noise of a scan: of its noise scan, else as given, else of the rim of k-space.

    noise_std: of k-space, per real component; it goes before the level that a noise scan has. Raises
    ValueError where the noise scan is of dead coils, and where the rim holds too little.
    """
    if kspace.noise is not None:
        covariance = noise_covariance(kspace.noise)
        # Of equal mean power: whitened k-space stays in the units of the file.
        power = math.sqrt(covariance.diagonal().real.mean().item())
        matrix = whitening_matrix(covariance) * power
        if noise_std is not None:
            return CoilNoise(noise_std, matrix, "given; coils whitened by the noise scan")
        return CoilNoise(power / math.sqrt(kspace.averages), matrix, "noise scan")
    if noise_std is not None:
        return CoilNoise(noise_std, None, "given")
    step = math.ceil(len(kspace) / _RIM_SLICES)
    slices = (kspace[i] for i in range(0, len(kspace), step))
    rims = [estimate_noise_std(samples, kspace.measured(samples)) for samples in slices]
    return CoilNoise(torch.tensor(rims).median().item(), None, "estimated from the rim of k-space")


def prepare_slice(
    kspace: KSpace, index: int, noise: CoilNoise, maps: Slices | None = None, *, size_multiple: int = 1
) -> SliceProblem:
    """Slice `index` as a problem: coils are whitened, then the grid is changed (Grid), then all is scaled.

    maps: [slices, coils, H, W] for the coils of the file; None for ESPIRiT (of a single coil: 1 everywhere).
    size_multiple: of height and width, which the prior's network wants. The scale takes the 99th percentile
    of the magnitude of a least-squares image to TYPICAL_PEAK. Raises ValueError for a slice of which nothing
    was measured, and what `estimate_coil_maps` and SenseMRI refuse.
    """
    samples = kspace[index]
    measured = kspace.measured(samples)
    if not measured.any():
        raise ValueError(f"slice {index} of {kspace.source} holds no sample: all of it is 0; leave it out")
    grid = grid_of(kspace, measured, size_multiple)
    mask = grid.mask(measured)
    y = grid.kspace(noise.whiten(samples)) * mask
    if maps is not None:
        coil_maps = grid.maps(noise.whiten(maps[index].to(torch.complex64)))
    elif len(y) == 1:
        coil_maps = torch.ones_like(y)
    elif kspace.calibration is None:
        coil_maps = estimate_coil_maps(y, mask)
    else:
        lines, there = kspace.calibration_lines(index)
        coil_maps = estimate_coil_maps(grid.kspace(noise.whiten(lines)), grid.mask(there))
    operator = SenseMRI(coil_maps, mask)
    noise_std = noise.noise_std * grid.gain
    scale = _peak(operator, y, noise_std) / TYPICAL_PEAK
    return SliceProblem(operator, y / scale, noise_std / scale, scale, grid)


def _peak(operator: SenseMRI, y: Tensor, noise_std: float) -> float:
    """99th percentile of the magnitude of the image, of which y [coils, height, width] says as much."""
    zero_filled = operator.adjoint(y[None])
    # A Gaussian prior as wide as the image is bright: least squares where the coils tell, 0 elsewhere.
    width = zero_filled.square().sum(1).mean().sqrt().reshape(1)
    image = operator.conditional_mean(y[None], torch.zeros_like(zero_filled), width, noise_std)
    return image.square().sum(1).sqrt().quantile(0.99).item()
