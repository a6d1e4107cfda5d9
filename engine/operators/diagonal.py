"""Operators whose A^T A is diagonal in a basis that a fast transform reaches."""

import abc
from collections.abc import Callable

import torch
from torch import Tensor

from alpenglow.kernels.pixel_step import pixel_step
from alpenglow.kernels.spectral_step import spectral_step
from alpenglow.kernels.step_weights import Step, StepWeights, coefficients
from alpenglow.operators.base import LinearOperator, Normal, per_image


class DiagonalOperator(LinearOperator):
    """A^T A = U^H diag(m) U with an orthonormal U: P and P^(1/2) in closed form, at one U and one U^H each.

    A subclass gives the eigenvalues m, the data term U A^T y and the transform. The pixel basis, U = I, is
    the default. Coefficients may be real or complex; m is real, and such that diag(m) keeps images real.
    """

    @abc.abstractmethod
    def eigenvalues(self, image: Tensor) -> Tensor:
        """m for images like `image` [B, C, H, W], broadcastable to the coefficients; real or bool."""

    @abc.abstractmethod
    def adjoint_coefficients(self, y: Tensor) -> Tensor:
        """U A^T y, in the shape of `to_basis`, without a round trip through the image: 0 where m is 0."""

    @property
    def half_spectrum(self) -> bool:
        """Whether the coefficients are unnormalised half spectra of real images, as of rfft2."""
        return False

    def to_basis(self, x: Tensor) -> Tensor:
        """U x of images [B, C, H, W], up to a constant factor that `from_basis` takes back."""
        return x

    def from_basis(self, coefficients: Tensor, image_shape: tuple[int, ...]) -> Tensor:
        """U^H coefficients as images [B, C, H, W]; image_shape: (C, H, W)."""
        return coefficients

    def data_term(self, y: Tensor) -> Tensor:
        """U A^T y."""
        return self.adjoint_coefficients(y)

    def step(
        self,
        data: Tensor,
        z: Tensor,
        u: Tensor | None,
        grad: Tensor,
        sigma: Tensor,
        noise_std: float,
        weights: StepWeights,
        limit: Tensor,
        counters: Tensor | None,
    ) -> Step:
        """One Langevin step in the basis by a fused kernel: see LinearOperator.step."""
        m, table = self.eigenvalues(grad), coefficients(sigma, noise_std, weights)
        g = self.to_basis(grad)
        if self.half_spectrum:
            return spectral_step(z, u, g, data, m, table, limit, counters, width=grad.shape[-1])
        if not z.is_complex():
            return pixel_step(z, u, g, data, m, table, limit, counters)
        # The spectrum of complex images has no symmetry: its real and imaginary parts are like pixels.
        z, g, data = (torch.view_as_real(part.resolve_conj()) for part in (z, g, data))
        momentum = None if u is None else torch.view_as_real(u)
        moved = pixel_step(z, momentum, g, data, m[..., None].expand(*m.shape, 2), table, limit, counters)
        return moved._replace(
            z=torch.view_as_complex(moved.z), u=None if moved.u is None else torch.view_as_complex(moved.u)
        )

    def normal(self, x: Tensor) -> Tensor:
        """A^T A x for images [B, C, H, W]."""
        return self._filter(x, lambda m: m.to(x.dtype))

    def solve(self, b: Tensor, sigma: Tensor, noise_std: float) -> Tensor:
        """P b [B, C, H, W]; see LinearOperator.solve."""
        level = per_image(sigma, b).square()
        return self._filter(b, lambda m: level * (noise_std**2 / (m * level + noise_std**2)))

    def conditional_mean(self, y: Tensor, prior_mean: Tensor, sigma: Tensor, noise_std: float) -> Tensor:
        """P (A^T y / noise_std^2 + prior_mean / sigma^2), [B, C, H, W]; see LinearOperator."""
        # In the basis both gains are bounded and positive, and an error e in y moves the mean by at most
        # e sigma / (2 noise_std): rounding acts like noise far below noise_std.
        level = per_image(sigma, prior_mean).square()
        precision = self.eigenvalues(prior_mean) * level + noise_std**2
        data = scale(self.adjoint_coefficients(y), level / precision)
        prior = scale(self.to_basis(prior_mean), noise_std**2 / precision)
        return self.from_basis(data + prior, tuple(prior_mean.shape[1:]))

    def draw(
        self, normal: Normal, image_shape: tuple[int, int, int], sigma: Tensor, noise_std: float
    ) -> Tensor:
        """P^(1/2) n, an exact sample of N(0, P), [B, C, H, W]; calls normal(image_shape) once for n."""
        noise = normal(tuple(image_shape))
        level = per_image(sigma, noise).square()
        return self._filter(noise, lambda m: (level * (noise_std**2 / (m * level + noise_std**2))).sqrt())

    def _filter(self, x: Tensor, gain: Callable[[Tensor], Tensor]) -> Tensor:
        """U^H diag(gain(m)) U x."""
        coefficients = scale(self.to_basis(x), gain(self.eigenvalues(x)))
        return self.from_basis(coefficients, tuple(x.shape[1:]))


def scale(coefficients: Tensor, gain: Tensor) -> Tensor:
    """Coefficients (real or complex) times a real gain."""
    if not coefficients.is_complex():
        return coefficients * gain
    # torch would first widen the gain to complex, and do four times the multiplications.
    return torch.view_as_complex(torch.view_as_real(coefficients) * gain[..., None])
