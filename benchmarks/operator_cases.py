"""Conditional mean, draw and step of every operator family beside a composition of torch operators.

The published code (published.py) has pixel masks, blurs and k-space; where it has no such operator, or
another accuracy, the other side is what a user of torch would write: conjugate gradients, without a
preconditioner, to the accuracy of ours.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from alpenglow.kernels.step_weights import StepWeights
from alpenglow.operators.base import LinearOperator, Normal
from alpenglow.operators.fourier import FourierSampling
from alpenglow.operators.general import FunctionOperator
from alpenglow.operators.pixel import Inpainting
from alpenglow.operators.resampling import SuperResolution
from alpenglow.operators.sense import SenseMRI
from alpenglow.operators.spectral import GaussianBlur
from alpenglow.samplers.problem import Noise
from benchmarks.published import Blur, Conditional, KSpaceMask, PixelMask, conjugate_gradient, sense_normal

SIGMA, NOISE_STD = 0.5, 0.05
TOLERANCE, MAX_ITERATIONS = 1e-6, 2000
BLUR = 1.5  # pixels
COILS = 8

Mean = Callable[[Tensor], Tensor]
"""P (A^T y / noise_std^2 + D / sigma^2) for denoised images D [B, C, H, W]."""
Draw = Callable[[Normal], Tensor]
"""A sample of N(0, P), [B, C, H, W]."""


@dataclass(frozen=True)
class Family:
    """An operator, one measurement [1, ...], images [B, C, H, W], and the other way to its mean and draw."""

    name: str
    operator: LinearOperator
    y: Tensor
    images: Tensor
    mean: Mean
    draw: Draw

    @property
    def sigma(self) -> Tensor:
        """[B]."""
        return torch.full((len(self.images),), SIGMA)

    def our_mean(self) -> Tensor:
        """By the operator."""
        return self.operator.conditional_mean(self.y, self.images, self.sigma, NOISE_STD)

    def our_draw(self) -> Tensor:
        """By the operator, with the noise that belongs to each chain."""
        noise = Noise(0, torch.arange(len(self.images))).at(1)
        return self.operator.draw(noise, self.image_shape, self.sigma, NOISE_STD)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        C, H, W = self.images.shape[1:]
        return C, H, W

    def their_mean(self) -> Tensor:
        """By the composition."""
        return self.mean(self.images)

    def their_draw(self) -> Tensor:
        """By the composition, with torch.randn."""
        count = len(self.images)
        return self.draw(lambda shape: torch.randn(count, *shape))

    def step_runs(self) -> tuple[Callable[[], object], Callable[[], object]]:
        """A step of the published method, ours in the operator's basis: mean and draw at once."""
        operator, x, grad = self.operator, self.images, 0.1 * self.images
        z, data = operator.to_basis(x), operator.data_term(self.y)
        weights, unlimited = StepWeights(z_pull=1.0, z_w=1.0), torch.full((1,), torch.inf)
        counters = Noise(0, torch.arange(len(x))).counters(1)

        def ours() -> Tensor:
            moved = operator.step(data, z, None, grad, self.sigma, NOISE_STD, weights, unlimited, counters)
            return operator.from_basis(moved.z, self.image_shape)  # where the next gradient is evaluated

        return ours, lambda: self.mean(x - grad) + self.their_draw()


def _images(batch: int, channels: int, size: int) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(0))


def _mask(size: int) -> Tensor:
    return torch.rand(size, size, generator=torch.Generator().manual_seed(1)) < 0.3


def _closed_form(name: str, operator: LinearOperator, images: Tensor, published: Conditional) -> Family:
    """Where the published code has the operator."""
    y = operator.forward(images[:1])
    data = published.adjoint(y) / NOISE_STD**2
    is_complex = y.is_complex()

    def mean(denoised: Tensor) -> Tensor:
        d = _join(denoised) if is_complex else denoised
        result = published.precondition(data + d / SIGMA**2, SIGMA)
        return _split(result) if is_complex else result

    def draw(normal: Normal) -> Tensor:
        n = normal(tuple(images.shape[1:]))
        return _split(published.modulate(_join(n), SIGMA)) if is_complex else published.modulate(n, SIGMA)

    return Family(name, operator, y, images, mean, draw)


def _by_cg(
    name: str, operator: LinearOperator, images: Tensor, normal_operator: Mean, mean_tolerance: float
) -> Family:
    """Mean and draw (perturb-then-solve) by plain conjugate gradients; A and A^T for the draw are ours."""
    y = operator.forward(images[:1])
    data = operator.adjoint(y) / NOISE_STD**2

    def solve(b: Tensor, tolerance: float = TOLERANCE) -> Tensor:
        return conjugate_gradient(
            lambda v: normal_operator(v) / NOISE_STD**2 + v / SIGMA**2,
            b,
            tolerance=tolerance,
            max_iterations=MAX_ITERATIONS,
        )

    def draw(normal: Normal) -> Tensor:
        image = normal(tuple(images.shape[1:]))  # as LinearOperator.draw: the image's noise comes first
        if y.is_complex():
            noise = torch.view_as_complex(normal((*y.shape[1:], 2)).contiguous())
        else:
            noise = normal(tuple(y.shape[1:]))
        return solve(operator.adjoint(noise) / NOISE_STD + image / SIGMA)

    return Family(name, operator, y, images, lambda d: solve(data + d / SIGMA**2, mean_tolerance), draw)


def _join(x: Tensor) -> Tensor:
    """[B, 2, H, W] -> complex [B, 1, H, W]."""
    return torch.complex(x[:, :1], x[:, 1:])


def _split(z: Tensor) -> Tensor:
    return torch.cat([z.real, z.imag], dim=1)


def coil_maps(size: int) -> Tensor:
    """Smooth complex maps [COILS, H, W] around the image, the sum of their squared moduli 1."""
    axis = torch.linspace(-1, 1, size)
    angle = 2 * torch.pi * torch.arange(COILS) / COILS
    rows, columns = 1.2 * angle.sin()[:, None, None], 1.2 * angle.cos()[:, None, None]
    distance = (axis[:, None] - rows) ** 2 + (axis - columns) ** 2
    maps = torch.polar((-distance).exp(), angle[:, None, None] + axis[:, None] * columns + axis * rows)
    return maps / maps.abs().square().sum(0).sqrt()


def families(batch: int, size: int, *, tolerance: float = TOLERANCE) -> list[Family]:
    """All of them, images of `size` x `size` on the CPU; tolerance: of our solves, see IterativeOperator."""
    rgb, brain, mask = _images(batch, 3, size), _images(max(1, batch // 4), 2, size), _mask(size)
    blur, box, maps = GaussianBlur(BLUR), SuperResolution(4), coil_maps(size)
    impulse = torch.zeros(1, 1, size, size)
    impulse[..., 0, 0] = 1
    transfer = torch.fft.fft2(blur.forward(impulse))[0, 0]

    def box_normal(x: Tensor) -> Tensor:
        small = torch.nn.functional.avg_pool2d(x, 4)
        return small.repeat_interleave(4, -2).repeat_interleave(4, -1) / 16

    functions = FunctionOperator(blur.forward, blur.adjoint, tolerance=tolerance)
    sense = SenseMRI(maps, mask, tolerance=tolerance)
    return [
        _closed_form("inpainting", Inpainting(mask), rgb, PixelMask(mask.float(), NOISE_STD)),
        _closed_form("blur", blur, rgb, Blur(transfer, NOISE_STD)),
        _closed_form("k-space", FourierSampling(mask), brain, KSpaceMask(mask.float(), NOISE_STD)),
        _by_cg("super-resolution", box, rgb, box_normal, TOLERANCE),
        _by_cg("functions", functions, rgb, blur.normal, functions.mean_tolerance),
        _by_cg(
            "SENSE", sense, brain, lambda x: _split(sense_normal(_join(x), maps, mask)), sense.mean_tolerance
        ),
    ]  # fmt: skip
