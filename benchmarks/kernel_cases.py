"""Each kernel beside what it replaces: the composition of torch operators that the published code uses.

The compositions are what a user of torch would write, and what ALPS (arXiv 2601.02594) does: full complex
FFTs, torch.randn, a temporary for every operator.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from alpenglow.kernels.cg_update import cg_direction, cg_residual, cg_start
from alpenglow.kernels.group_norm_silu import composition, group_norm_silu
from alpenglow.kernels.philox import chain_counters
from alpenglow.kernels.pixel_step import pixel_step
from alpenglow.kernels.sense import prepare, sense_normal
from alpenglow.kernels.spectral_step import spectral_step
from alpenglow.kernels.step_weights import StepWeights, coefficients
from benchmarks.published import sense_normal as published_sense_normal

KINETIC = StepWeights(0.9, 0.7, 0.6, 0.5, 0.5, 0.8)
ALPS = StepWeights(z_pull=1.0, z_w=1.0)
SIGMA, NOISE_STD = 0.5, 0.05


@dataclass(frozen=True)
class Case:
    """kernel and eager do the same work (noise aside); bytes is the least that must move, 0 if unknown."""

    name: str
    kernel: Callable[[], object]
    eager: Callable[[], object]
    bytes: int = 0


def _images(device: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


def pixel_cases(device: str, batch: int, size: int) -> list[Case]:
    """Inpainting with one mask for all chains."""
    x, u, grad = (_images(device, batch, 3, size, size) for _ in range(3))
    mask = (_images(device, size, size) > 0)[None]
    data = _images(device, 1, 3, size, size) * mask
    sigma = torch.full((batch,), SIGMA, device=device)
    level = sigma.square()[:, None, None, None]
    limit = torch.full((batch,), 1e6, device=device)
    counters = chain_counters(0, torch.arange(batch, device=device))
    eta2, a = NOISE_STD**2, KINETIC

    def published(x: Tensor, grad: Tensor) -> Tensor:
        precision = mask / eta2 + 1 / level
        return (data / eta2 + (x - grad) / level) / precision + torch.randn_like(x) / precision.sqrt()

    def kinetic(x: Tensor, u: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        precision = mask / eta2 + 1 / level
        pull = (data / eta2 + (x - grad) / level) / precision - x
        w = torch.randn_like(x) / precision.sqrt()
        return (
            x + a.z_pull * pull + a.z_u * u + a.z_w * w,
            a.u_pull * pull + a.u_u * u + a.u_w * w,
        )

    eager = {"alps": lambda: published(x, grad), "kinetic": lambda: kinetic(x, u, grad)}
    compiled = {"alps": (published, (x, grad)), "kinetic": (kinetic, (x, u, grad))}
    cases = []
    for name, weights, momentum, passes in (("alps", ALPS, None, 3), ("kinetic", KINETIC, u, 5)):
        table = coefficients(sigma, NOISE_STD, weights)
        cases.append(
            Case(
                f"pixel_step, {name}",
                lambda table=table, momentum=momentum: pixel_step(
                    x, momentum, grad, data, mask, table, limit, counters
                ),
                eager[name],
                passes * x.nbytes + data.nbytes + mask.nbytes,
            )
        )
        COMPILABLE[cases[-1].name] = compiled[name]
    return cases


COMPILABLE: dict[str, tuple[Callable[..., object], tuple[Tensor, ...]]] = {}
"""The functions and arguments behind `Case.eager`, for torch.compile."""


def spectral_cases(device: str, batch: int, size: int) -> list[Case]:
    """Deblurring: the kernel alone, and the whole step with its two FFTs against five full ones."""
    x, u, grad = (_images(device, batch, 3, size, size) for _ in range(3))
    transfer = torch.fft.fft2(_images(device, size, size) / size)
    half = transfer[:, : size // 2 + 1]
    m = half.abs().square().contiguous()
    data = torch.fft.rfft2(_images(device, 1, 3, size, size)) * half.conj()
    sigma = torch.full((batch,), SIGMA, device=device)
    level = sigma.square()[:, None, None, None]
    limit = torch.full((batch,), 1e9, device=device)
    counters = chain_counters(0, torch.arange(batch, device=device))
    eta2 = NOISE_STD**2
    y = torch.fft.irfft2(data, s=(size, size))
    z, v, g = (torch.fft.rfft2(part) for part in (x, u, grad))
    kinetic, alps = (coefficients(sigma, NOISE_STD, weights) for weights in (KINETIC, ALPS))

    def whole() -> Tensor:
        moved = spectral_step(z, None, torch.fft.rfft2(grad), data, m, alps, limit, counters, width=size)
        return torch.fft.irfft2(moved.z, s=(size, size))

    def published(x: Tensor, grad: Tensor) -> Tensor:
        precision = transfer.abs().square() / eta2 + 1 / level
        spectrum = torch.fft.fft2(y) / eta2 + torch.fft.fft2(x - grad) / level
        noise = torch.fft.fft2(torch.randn_like(x)) / precision.sqrt()
        return torch.fft.ifft2(spectrum / precision).real + torch.fft.ifft2(noise).real

    def kinetic_eager(z: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        a, precision = KINETIC, m / eta2 + 1 / level
        pull = ((data - m * z) / eta2 - g / level) / precision
        w = torch.fft.rfft2(torch.randn_like(x)) / precision.sqrt()
        return z + a.z_pull * pull + a.z_u * v + a.z_w * w, a.u_pull * pull + a.u_u * v + a.u_w * w

    COMPILABLE["spectral_step, alps with FFTs"] = (published, (x, grad))
    COMPILABLE["spectral_step, kinetic"] = (kinetic_eager, (z, v, g))
    return [
        Case(
            "spectral_step, kinetic",
            lambda: spectral_step(z, v, g, data, m, kinetic, limit, counters, width=size),
            lambda: kinetic_eager(z, v, g),
            5 * z.nbytes + data.nbytes + m.nbytes,
        ),
        Case("spectral_step, alps with FFTs", whole, lambda: published(x, grad)),
    ]


def group_norm_cases(device: str, batch: int, size: int) -> list[Case]:
    """Forward, and forward with the derivative, channels last in float16 on a GPU."""
    dtype = torch.float16 if device == "cuda" else torch.float32
    x = _images(device, batch, 128, size, size).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.ones(128, device=device), torch.zeros(128, device=device)

    def derivative(norm: Callable[..., Tensor]) -> Tensor:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(norm(leaf, 32, weight, bias, 1e-6), leaf, x)[0]

    COMPILABLE["group_norm_silu, forward"] = (lambda x: composition(x, 32, weight, bias, 1e-6), (x,))
    return [
        Case(
            "group_norm_silu, forward",
            lambda: group_norm_silu(x, 32, weight, bias, 1e-6),
            lambda: composition(x, 32, weight, bias, 1e-6),
            2 * x.nbytes,
        ),
        Case(
            "group_norm_silu, forward and derivative",
            lambda: derivative(group_norm_silu),
            lambda: derivative(composition),
            5 * x.nbytes,
        ),
    ]


def sense_cases(device: str, batch: int, size: int) -> list[Case]:
    """The normal operator of 8 coils, against the published one with its fftshifts."""
    chains = max(1, batch // 8)
    x = _images(device, chains, 2, size, size)
    maps = torch.view_as_complex(_images(device, 8, size, size, 2))
    mask = _images(device, size, size) > 0
    sense = prepare(maps, mask)

    def published(x: Tensor) -> Tensor:
        combined = published_sense_normal(torch.complex(x[:, :1], x[:, 1:]), maps, mask)
        return torch.cat([combined.real, combined.imag], dim=1)

    COMPILABLE["sense, normal operator"] = (published, (x,))
    return [Case("sense, normal operator", lambda: sense_normal(x, sense), lambda: published(x))]


def cg_cases(device: str, batch: int, size: int) -> list[Case]:
    """What an iteration of CG does beside applying the operator."""
    x, r, d, q = (_images(device, batch, 2, size, size) for _ in range(4))
    eager_state = [part.clone() for part in (x, r, d)]
    # The limit is 0: the images never count as done.
    scalars = cg_start(r, r, torch.zeros(batch, device=device))

    def fused() -> None:
        cg_direction(x, d, r, r, scalars, cg_residual(r, d, q, scalars))

    def inner(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum((1, 2, 3), keepdim=True)

    def published(x: Tensor, r: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rho = inner(r, r)
        alpha = rho / inner(d, q)
        x = x + alpha * d
        r = r - alpha * q
        return x, r, r + inner(r, r) / rho * d

    COMPILABLE["cg_update, an iteration"] = (published, tuple(eager_state))
    return [Case("cg_update, an iteration", fused, lambda: published(*eager_state), 10 * x.nbytes)]


FAMILIES: dict[str, Callable[[str, int, int], list[Case]]] = {
    "pixel_step": pixel_cases,
    "spectral_step": spectral_cases,
    "sense": sense_cases,
    "cg_update": cg_cases,
    "group_norm_silu": group_norm_cases,
}
"""A kernel's cases are one function above and one line here."""
