"""What every sampler works on: a prior, an operator, one measurement, and the noise of each chain."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from alpenglow.kernels.philox import chain_counters
from alpenglow.kernels.step_weights import Step, StepWeights
from alpenglow.operators.base import LinearOperator, Normal, normal_streams, real_parts
from alpenglow.priors.protocol import Prior


@dataclass(frozen=True)
class Problem:
    """One posterior p(x | y), y = A x + n with n ~ N(0, noise_std^2) (DESIGN 1).

    y: [1, *measurement_shape]; every tensor of a sampler lives on its device, in `dtype`.
    """

    prior: Prior
    operator: LinearOperator
    y: Tensor
    noise_std: float
    dtype: torch.dtype = torch.float32

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.prior.image_shape

    def conditional_mean(self, denoised: Tensor, sigma: Tensor) -> Tensor:
        """mu = P (A^T y / eta^2 + D / sigma^2) [B, C, H, W] for denoised images D (DESIGN 1)."""
        return self.operator.conditional_mean(self.y, denoised, sigma, self.noise_std)

    def free(self, image: Tensor, sigma: Tensor) -> Tensor:
        """P image / sigma^2 [B, C, H, W]: what the measurement leaves of a change of images at sigma [B].

        As a conditional mean of nothing measured, which CG finds also where sigma is far above noise_std.
        """
        return self.operator.conditional_mean(torch.zeros_like(self.y), image, sigma, self.noise_std)

    def draw(self, normal: Normal, sigma: Tensor) -> Tensor:
        """A sample of N(0, P(sigma)) for each sigma [B]: [B, C, H, W]."""
        return self.operator.draw(normal, self.image_shape, sigma, self.noise_std)

    @cached_property
    def data(self) -> Tensor:
        """The measurement as the operator's steps want it."""
        return self.operator.data_term(self.y)

    def to_basis(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] in the basis in which the operator's steps keep chains."""
        return self.operator.to_basis(x)

    def from_basis(self, z: Tensor) -> Tensor:
        """Images [B, C, H, W] of what `to_basis` returned."""
        return self.operator.from_basis(z, self.image_shape)

    def step(
        self,
        z: Tensor,
        u: Tensor | None,
        grad: Tensor,
        sigma: Tensor,
        weights: StepWeights,
        counters: Tensor | None,
        limit: Tensor | None = None,
    ) -> Step:
        """One Langevin step in the operator's basis (kernels/step_weights.py); grad: G, an image; sigma [B].

        counters: of the noise, None for none; limit [B]: see LinearOperator.step, None for none.
        """
        if limit is None:
            limit = torch.full((1,), torch.inf, dtype=sigma.dtype, device=sigma.device)
        return self.operator.step(self.data, z, u, grad, sigma, self.noise_std, weights, limit, counters)

    def target(self, x: Tensor, grad: Tensor, sigma: Tensor) -> Tensor:
        """mu(x) = P (A^T y / eta^2 + (x - G) / sigma^2) [B, C, H, W]: a step without noise."""
        return self.from_basis(self.step(self.to_basis(x), None, grad, sigma, StepWeights(), None).z)

    def start(self, counters: Tensor, sigma: Tensor) -> Tensor:
        """P A^T y / eta^2 + w, w ~ N(0, P), for each sigma [B], in the operator's basis; see `step`."""
        return self._step_from_nothing(self.data, counters, sigma)

    def draw_in_basis(self, counters: Tensor, sigma: Tensor) -> Tensor:
        """A sample of N(0, P(sigma)) for each sigma [B], in the operator's basis; see `step`."""
        return self._step_from_nothing(torch.zeros_like(self.data), counters, sigma)

    def _step_from_nothing(self, data: Tensor, counters: Tensor, sigma: Tensor) -> Tensor:
        nothing = torch.zeros(len(sigma), *self.image_shape, dtype=self.dtype, device=sigma.device)
        unlimited = torch.full((1,), torch.inf, dtype=sigma.dtype, device=sigma.device)
        return self.operator.step(
            data, self.to_basis(nothing), None, nothing, sigma, self.noise_std, StepWeights(z_w=1.0),
            unlimited, counters,
        ).z  # fmt: skip

    def misfit(self, x: Tensor) -> Tensor:
        """-log p(y | x) up to a constant, ||y - A x||^2 / (2 eta^2), float64 [B]."""
        residual = real_parts(self.y - self.operator.forward(x))
        return residual.double().square().flatten(1).sum(1) / (2 * self.noise_std**2)

    def potential(self, x: Tensor, energy: Tensor, sigma: Tensor) -> Tensor:
        """U = -log p_sigma(x | y) up to a constant, float64 [B]; energy: E(x, sigma) [B]; sigma [B] or []."""
        return energy.double() / sigma.double().square() + self.misfit(x)


@dataclass(frozen=True)
class Noise:
    """Counter-based normals: a chain's stream depends on (seed, chain id, iteration, draw) alone.

    chain_ids: [B] int64 in [0, 2^32).
    """

    seed: int
    chain_ids: Tensor

    def counters(self, iteration: int, *, draw: int = 0) -> Tensor:
        """Philox counters [B, 4] of one draw of one iteration; a draw may use 16 streams."""
        return chain_counters(self.seed, self.chain_ids, iteration=iteration, stream=16 * draw)

    def at(self, iteration: int, dtype: torch.dtype = torch.float32, *, draw: int = 0) -> Normal:
        """normal(shape) -> [B, *shape] for one draw of one iteration; each call takes the next stream."""
        return normal_streams(self.counters(iteration, draw=draw), dtype)


def levels_of(sigma: float, count: int, like: Tensor) -> Tensor:
    """`sigma` for each of `count` chains, [count], in the dtype and on the device of `like`."""
    return torch.full((count,), sigma, dtype=like.dtype, device=like.device)


def rho_levels(high: float, low: float, count: int, rho: float) -> list[float]:
    """`count` levels from `high` down to `low`, even in sigma^(1 / rho) (arXiv 2206.00364, eq. 5)."""
    top, bottom = high ** (1 / rho), low ** (1 / rho)
    return [(top + i / max(1, count - 1) * (bottom - top)) ** rho for i in range(count)]


def geometric_levels(high: float, low: float, count: int) -> list[float]:
    """`count` levels from `high` down to `low`, equally spaced in log sigma."""
    ratio = math.log(low / high) / max(1, count - 1)
    return [high * math.exp(ratio * i) for i in range(count)]
