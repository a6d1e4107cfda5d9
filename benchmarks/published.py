"""The way of the published code, for timing beside ours in the same run.

Written anew after ALPS (arXiv 2601.02594) and its code (JyoChand/ALPS: utils.py, operators.py,
MRI/sense_new.py): the same passes over memory, full complex FFTs, a graph for second derivatives.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from alpenglow.networks.denoiser import energy
from alpenglow.priors.network import NetworkPrior
from alpenglow.samplers.alps import AlpsOptions, schedule

Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def energy_gradient(prior: NetworkPrior) -> Evaluate:
    """E [B] and G [B, C, H, W] by autograd, weights trainable, with a graph for a second derivative.

    G = eps - J_psi^T eps with eps = x - psi, the vector of the product divided by sigma and multiplied back;
    of an energy of another form, which no published code has, the gradient by the same passes.
    """
    denoiser = copy.deepcopy(prior.denoiser).requires_grad_(True)

    def evaluate(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().detach().requires_grad_()
        level = sigma[:, None, None, None]
        if denoiser.form != "alps":
            total = energy(denoiser, x, sigma, prior.one_hot(len(x)))
            (grad,) = torch.autograd.grad(total, x, 1 / sigma, create_graph=True)
            return total, grad * level
        denoised = denoiser(x, sigma, prior.one_hot(len(x)))
        eps = x - denoised
        (pulled,) = torch.autograd.grad(denoised, x, eps / level, create_graph=True)
        return 0.5 * eps.abs().square().sum((1, 2, 3)), eps - pulled * level

    return evaluate


class Conditional(Protocol):
    """What the published loop asks of an operator."""

    @property
    def noise_std(self) -> float:
        """In the units of y."""
        ...

    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y."""
        ...

    def precondition(self, b: Tensor, sigma: float) -> Tensor:
        """P b."""
        ...

    def modulate(self, n: Tensor, sigma: float) -> Tensor:
        """P^(1/2) n."""
        ...


@dataclass(frozen=True)
class PixelMask:
    """Inpainting; mask broadcasts to images."""

    mask: Tensor
    noise_std: float

    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y."""
        return self.mask * y

    def precondition(self, b: Tensor, sigma: float) -> Tensor:
        """P b."""
        return b * (1 / (self.mask / self.noise_std**2 + 1 / sigma**2))

    def modulate(self, n: Tensor, sigma: float) -> Tensor:
        """P^(1/2) n."""
        return n * (1 / (self.mask / self.noise_std**2 + 1 / sigma**2)).sqrt()


@dataclass(frozen=True)
class Blur:
    """A periodic convolution; transfer: its full spectrum [H, W]. Two full FFTs a call, real or not."""

    transfer: Tensor
    noise_std: float

    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y."""
        return torch.fft.ifft2(torch.fft.fft2(y) * self.transfer.conj()).real

    def precondition(self, b: Tensor, sigma: float) -> Tensor:
        """P b."""
        return torch.fft.ifft2(torch.fft.fft2(b) / self._precision(sigma)).real

    def modulate(self, n: Tensor, sigma: float) -> Tensor:
        """P^(1/2) n."""
        return torch.fft.ifft2(torch.fft.fft2(n) / self._precision(sigma).sqrt()).real

    def _precision(self, sigma: float) -> Tensor:
        return self.transfer.abs().square() / self.noise_std**2 + 1 / sigma**2


@dataclass(frozen=True)
class KSpaceMask:
    """Single-coil MRI on complex images [B, 1, H, W], every FFT between two shifts; mask: centred [H, W]."""

    mask: Tensor
    noise_std: float

    def adjoint(self, y: Tensor) -> Tensor:
        """A^H y."""
        return centred(torch.fft.ifft2, y * self.mask)

    def precondition(self, b: Tensor, sigma: float) -> Tensor:
        """P b."""
        return self._filter(b, 1 / self._precision(sigma))

    def modulate(self, n: Tensor, sigma: float) -> Tensor:
        """P^(1/2) n."""
        return self._filter(n, 1 / self._precision(sigma).sqrt())

    def _precision(self, sigma: float) -> Tensor:
        return self.mask / self.noise_std**2 + 1 / sigma**2

    def _filter(self, x: Tensor, gain: Tensor) -> Tensor:
        return centred(torch.fft.ifft2, centred(torch.fft.fft2, x) * gain)


def centred(transform: Callable[..., Tensor], z: Tensor) -> Tensor:
    """An orthonormal FFT with its origin in the middle, by two shifts."""
    shifted = torch.fft.ifftshift(z, dim=(-2, -1))
    return torch.fft.fftshift(transform(shifted, norm="ortho"), dim=(-2, -1))


def sense_normal(z: Tensor, maps: Tensor, mask: Tensor) -> Tensor:
    """A^H A z for complex images [B, 1, H, W], coil maps [coils, H, W], mask [H, W]."""
    images = centred(torch.fft.ifft2, centred(torch.fft.fft2, z * maps) * mask)
    return (images * maps.conj()).sum(1, keepdim=True)


def conjugate_gradient(
    apply: Callable[[Tensor], Tensor], b: Tensor, *, tolerance: float, max_iterations: int
) -> Tensor:
    """x with apply(x) = b, from 0, without a preconditioner, until every image's relative residual is small.

    The published one stops at a sum of residuals of 1e-3 whatever the scale; this one at the accuracy of
    ours, so that the two do the same work. Raises RuntimeError if it does not get there.
    """

    def inner(a: Tensor, b: Tensor) -> Tensor:
        return (a.conj() * b).sum((1, 2, 3), keepdim=True).real

    x, r = torch.zeros_like(b), b
    p, rho = r, inner(r, r)
    limit = tolerance**2 * rho
    for _ in range(max_iterations):
        q = apply(p)
        alpha = rho / inner(p, q)
        x = x + alpha * p
        r = r - alpha * q
        new = inner(r, r)
        if bool((new <= limit).all()):
            return x
        p = r + new / rho * p
        rho = new
    raise RuntimeError(f"no convergence to {tolerance:g} in {max_iterations} iterations")


def alps(
    operator: Conditional, evaluate: Evaluate, y: Tensor, image_shape: tuple[int, int, int], count: int,
    options: AlpsOptions = AlpsOptions(),  # noqa: B008 (frozen)
) -> Tensor:  # fmt: skip
    """The published loop: `count` samples [N, C, H, W] at options.nfe gradients each, as one batch."""
    levels = schedule(options)
    data = operator.adjoint(y) / operator.noise_std**2

    def noise(sigma: float) -> Tensor:
        return operator.modulate(torch.randn(count, *image_shape), sigma)

    x = operator.precondition(data, levels[0]) + noise(levels[0])
    for i, level in enumerate(levels):
        sigma = torch.full((count,), level)
        for inner in range(options.steps):
            _, grad = evaluate(x, sigma)
            denoised = (x - grad).detach()
            x = operator.precondition(data + denoised / level**2, level).detach()
            if inner < options.steps - 1:
                x = x + noise(level)
        if i < len(levels) - 1:
            x = x + noise(levels[i + 1])
    return x
