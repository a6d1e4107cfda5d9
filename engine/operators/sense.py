"""Multi-coil Cartesian MRI."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from alpenglow.kernels.sense import Sense, prepare, sense_adjoint, sense_forward, sense_normal
from alpenglow.operators.base import LinearOperator, Normal, Preconditioner
from alpenglow.operators.fourier import FourierSampling
from alpenglow.operators.general import IterativeOperator
from alpenglow.operators.sense_preconditioners import Circulant, LineBlocks, line_axis
from alpenglow.operators.validation import as_tensor, check_mask

_CHUNK = 2**20  # elements of coil images at once on a CPU: its cache, not the batch, bounds the temporaries


class SenseMRI(IterativeOperator):
    """A = mask * F * S: k-space of every coil, F the centred orthonormal FFT, S the coil maps (SENSE).

    With S_c the map of coil c and x complex (images [B, 2, H, W]: real, imaginary),

        y[c, u] = mask[u] (H W)^(-1/2) sum_h S_c[h] x[h] exp(-2 pi i ((h0 - H // 2)(u0 - H // 2) / H + ...)),

    that is fftshift(fft2(ifftshift(S_c x), norm="ortho")) times the mask, the centred FFT of sigpy, BART and
    fastMRI: image, k-space, maps and mask have their centre at [H // 2, W // 2], and the mask is not in FFT
    order. The measurement is complex, [coils, H, W], 0 where the mask is (and ignored there); noise_std
    holds for its real and for its imaginary part, alike in every coil and independent (`coil_noise.whiten`
    makes it so). Maps are used as they are: with sum_c |S_c|^2 = 1 images and k-space have one scale.

    P is applied by conjugate gradients, and drawn by perturb-then-solve. The preconditioner is made at the
    first solve and kept: exact for a mask that is constant along rows or columns (an eigenvalue problem a
    line, 20 s for 320 x 320 on one core), circulant for others (sense_preconditioners.py). One that is
    moved to another device makes its own: move it once for several runs. All chains read the same maps.

    coil_maps: complex [coils, H, W]; mask: [H, W], bool or 0 and 1; tolerance, max_iterations: see
    IterativeOperator. Raises ValueError for other maps (also NaN, infinity, all zero) or another mask.
    Source: Pruessmann et al., Magn Reson Med 1999 and 2001.
    """

    def __init__(
        self, coil_maps: Any, mask: Any, *, tolerance: float = 1e-6, max_iterations: int = 4000
    ) -> None:
        super().__init__(tolerance=tolerance, max_iterations=max_iterations)
        maps = as_tensor(coil_maps, "coil_maps")
        if maps.ndim != 3 or maps.numel() == 0 or maps.dtype not in (torch.complex64, torch.complex128):
            raise ValueError(
                f"got coil maps {tuple(maps.shape)} of {maps.dtype}; expected complex64 or complex128 "
                "[coils, H, W]: one map a coil, without a batch dimension"
            )
        if not maps.isfinite().all() or not maps.any():
            raise ValueError(
                "coil maps are all zero, or hold NaN or infinity; expected finite numbers: set maps to 0 "
                "where there is no object"
            )
        self.mask: Tensor = check_mask(mask, (2,), "[H, W]").to(maps.device)
        if self.mask.shape != maps.shape[1:]:
            raise ValueError(
                f"got a mask {tuple(self.mask.shape)} for coil maps {tuple(maps.shape)}; expected "
                f"{tuple(maps.shape[1:])}: a mask over the whole k-space of the maps' grid"
            )
        self.coil_maps: Tensor = maps.resolve_conj().contiguous()
        self._line_axis = line_axis(self.mask)
        self._prepared: dict[torch.dtype, Sense] = {}
        self._preconditioners: dict[torch.dtype, Preconditioner] = {}

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "SenseMRI":
        """This operator with its maps and mask on another device; results follow their input's precision."""
        if device is None or torch.device(device) == self.mask.device:
            return self
        return type(self)(
            self.coil_maps.to(device), self.mask.to(device),
            tolerance=self.tolerance, max_iterations=self.max_iterations,
        )  # fmt: skip

    @property
    def measurement_is_complex(self) -> bool:
        """True."""
        return True

    def measurement_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, ...]:
        """(coils, H, W). Raises ValueError if the image does not fit."""
        self.check_image(image_shape)
        return tuple(self.coil_maps.shape)

    def check_image(self, image_shape: tuple[int, int, int]) -> None:
        """Raise ValueError unless images are [2, H, W] on the grid of the maps."""
        super().check_image(image_shape)
        expected = (2, *self.mask.shape)
        if tuple(image_shape) != expected:
            raise ValueError(
                f"got images {tuple(image_shape)}; this SenseMRI expects {expected}: complex images (real, "
                "imaginary) of the size of the coil maps"
            )

    def forward(self, x: Tensor) -> Tensor:
        """The sampled k-space [B, coils, H, W], complex, of images [B, 2, H, W]."""
        return self._in_chunks(partial(sense_forward, sense=self._sense(x.dtype)), x)

    def adjoint(self, y: Tensor) -> Tensor:
        """The coil-combined zero-filled image [B, 2, H, W]."""
        # Rounding of complex products depends on the memory order, and that of y on the batch it came in.
        return self._in_chunks(partial(sense_adjoint, sense=self._sense(y.real.dtype)), y.contiguous())

    def normal(self, x: Tensor) -> Tensor:
        """A^H A x for images [B, 2, H, W]."""
        return self._in_chunks(partial(sense_normal, sense=self._sense(x.dtype)), x)

    def precondition(self, residual: Tensor, sigma: Tensor, noise_std: float) -> Tensor:
        """An approximation of P residual, up to a factor per image; see sense_preconditioners.py."""
        return self._preconditioner(residual.dtype)(residual, sigma, noise_std)

    def draw(
        self, normal: Normal, image_shape: tuple[int, int, int], sigma: Tensor, noise_std: float
    ) -> Tensor:
        """An exact sample of N(0, P), [B, 2, H, W], by perturb-then-solve; see LinearOperator.draw.

        For a mask that is constant along rows or columns P^(1/2) n instead, with normal(image_shape) for n:
        without a solve, and in float32 without the rounding errors that perturb-then-solve amplifies by
        (sigma / noise_std)^2 in directions that are not measured.
        """
        if self._line_axis is None:
            return super().draw(normal, image_shape, sigma, noise_std)
        noise = normal(tuple(image_shape))
        blocks = self._preconditioner(noise.dtype)
        assert isinstance(blocks, LineBlocks)
        return blocks.draw(noise, sigma, noise_std)

    def with_published_noise(self) -> LinearOperator:
        """This operator with the noise of the published ALPS, which ignores the coil maps.

        Its draws have covariance F^H (mask / noise_std^2 + 1 / sigma^2)^-1 F, not P (off by a factor of 0.3
        to 12 along single directions); everything else is as here.
        """
        published = _MaskNoise(
            self.coil_maps, self.mask, tolerance=self.tolerance, max_iterations=self.max_iterations
        )
        # One mask, one set of maps: what was prepared serves both.
        published._prepared, published._preconditioners = self._prepared, self._preconditioners
        return published

    def _in_chunks(self, function: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        if batch.device.type != "cpu":
            return function(batch)
        images = max(1, _CHUNK // self.coil_maps.numel())
        if len(batch) <= images:
            return function(batch)
        return torch.cat([function(part) for part in batch.split(images)])

    @torch.inference_mode(False)  # so that a later gradient may use what is kept
    def _sense(self, dtype: torch.dtype) -> Sense:
        if dtype not in self._prepared:
            self._prepared[dtype] = prepare(self.coil_maps.to(dtype.to_complex()), self.mask)
        return self._prepared[dtype]

    @torch.inference_mode(False)  # as above
    def _preconditioner(self, dtype: torch.dtype) -> Preconditioner:
        if dtype not in self._preconditioners:
            maps = self.coil_maps.to(dtype.to_complex())
            axis = self._line_axis
            self._preconditioners[dtype] = (
                Circulant(maps, self.mask) if axis is None else LineBlocks(maps, self.mask, axis)
            )
        return self._preconditioners[dtype]


class _MaskNoise(SenseMRI):
    """See SenseMRI.with_published_noise."""

    def draw(
        self, normal: Normal, image_shape: tuple[int, int, int], sigma: Tensor, noise_std: float
    ) -> Tensor:
        """F^H (mask / noise_std^2 + 1 / sigma^2)^(-1/2) F n, [B, 2, H, W]; calls normal(image_shape) once."""
        return FourierSampling(self.mask).draw(normal, image_shape, sigma, noise_std)
