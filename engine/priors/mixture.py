"""Gaussian and Gaussian-mixture priors: every quantity of DESIGN 1 in closed form.

They are the ground truth for samplers, and usable priors for small images in their own right.
"""

import math
from typing import Any

import torch
from torch import Tensor

from alpenglow.operators.base import LinearOperator, real_parts


def _float64(value: Any, name: str) -> Tensor:
    tensor = torch.as_tensor(value, dtype=torch.float64)
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} holds NaN or infinity; give finite numbers")
    return tensor


def dense_matrix(operator: LinearOperator, image_shape: tuple[int, int, int]) -> Tensor:
    """The operator as a real matrix [m, C*H*W] (a complex sample gives two rows), float64."""
    basis = torch.eye(math.prod(image_shape), dtype=torch.float64).reshape(-1, *image_shape)
    return flatten_measurement(operator.forward(basis)).T


def flatten_measurement(y: Tensor) -> Tensor:
    """Measurements [B, ...] as real rows [B, m]."""
    return real_parts(y).flatten(1).double()


class GaussianMixturePrior:
    """Mixture of K Gaussians over images: p(x) = sum_k w_k N(x; m_k, C_k).

    weights [K] (positive, normalised here), means [K, C, H, W], covariances [K, n, n] with n = C*H*W
    (pixels in C, H, W order). Computed in float64 whatever the dtype of x; works on the device of x.
    Raises ValueError on wrong shapes, weights that are not positive, covariances that are not
    symmetric positive semidefinite.
    """

    def __init__(self, weights: Any, means: Any, covariances: Any) -> None:
        weights, means = _float64(weights, "weights"), _float64(means, "means")
        covariances = _float64(covariances, "covariances")
        if means.ndim != 4 or weights.shape != means.shape[:1]:
            raise ValueError(
                f"got weights {tuple(weights.shape)} and means {tuple(means.shape)}; expected [K] and "
                "[K, C, H, W]"
            )
        n = means[0].numel()
        if covariances.shape != (len(means), n, n):
            raise ValueError(
                f"got covariances {tuple(covariances.shape)}; expected {(len(means), n, n)} for images "
                f"{tuple(means.shape[1:])}"
            )
        if not (weights > 0).all():
            raise ValueError(
                f"weights must be positive, got {weights.tolist()}; leave out components of weight 0"
            )
        scale = covariances.abs().amax((1, 2), keepdim=True)
        if not ((covariances - covariances.mT).abs() <= 1e-8 * scale).all():
            raise ValueError("a covariance is not symmetric; pass (C + C.T) / 2")
        variances, axes = torch.linalg.eigh((covariances + covariances.mT) / 2)
        if not (variances >= -1e-8 * scale[:, :, 0]).all():
            raise ValueError(f"a covariance has the negative eigenvalue {variances.min().item():.3g}")
        self.image_shape: tuple[int, int, int] = tuple(means.shape[1:])
        self.weights = weights / weights.sum()
        self.means = means
        self.covariances = covariances
        self._variances = variances.clamp(min=0)
        self._axes = axes

    def to(self, device: torch.device | str) -> "GaussianMixturePrior":
        """This prior on another device."""
        return GaussianMixturePrior(
            self.weights.to(device), self.means.to(device), self.covariances.to(device)
        )

    def _components(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """log(w_k N(x; m_k, C_k + sigma^2)) [K, B] and its negated gradients [K, B, n]."""
        centred = x.double().flatten(1) - self.means.flatten(1)[:, None]
        rotated = centred @ self._axes
        variance = self._variances[:, None] + sigma.double().square()[None, :, None]
        scaled = rotated / variance
        log_density = -0.5 * ((rotated * scaled).sum(-1) + variance.log().sum(-1))
        return log_density + self.weights.log()[:, None], scaled @ self._axes.mT

    def responsibilities(self, x: Tensor, sigma: float = 0.0) -> Tensor:
        """Posterior probability of each component at images x [B, C, H, W]: [B, K]."""
        log_joint, _ = self._components(x, torch.full((len(x),), sigma, device=x.device))
        return log_joint.softmax(0).T

    def energy_and_grad(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """E(x, sigma) = -sigma^2 log p_sigma(x) (up to a constant of sigma) [B] and its gradient G."""
        log_joint, pulls = self._components(x, sigma)
        grad = torch.einsum("kb,kbn->bn", log_joint.softmax(0), pulls)
        level = sigma.double().square()
        energy = -level * log_joint.logsumexp(0)
        return energy.to(x.dtype), (level[:, None] * grad).reshape(x.shape).to(x.dtype)

    def score(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Gradient of log p_sigma at x [B, C, H, W]."""
        return -self.energy_and_grad(x, sigma)[1] / sigma.square().reshape(-1, 1, 1, 1)

    @property
    def mean(self) -> Tensor:
        """Mean image [C, H, W]."""
        return torch.einsum("k,kchw->chw", self.weights, self.means)

    @property
    def covariance(self) -> Tensor:
        """Covariance of the whole mixture [n, n]."""
        centred = self.means.flatten(1) - self.mean.flatten()
        return torch.einsum(
            "k,kij->ij", self.weights, self.covariances + centred[:, :, None] * centred[:, None]
        )

    @property
    def std(self) -> Tensor:
        """Standard deviation of each pixel [C, H, W]."""
        return self.covariance.diagonal().sqrt().reshape(self.image_shape)

    def sample(self, num_samples: int, *, seed: int = 0) -> Tensor:
        """Exact samples [num_samples, C, H, W], float64. Raises ValueError for num_samples below 1."""
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}; expected a positive integer")
        generator = torch.Generator().manual_seed(seed)
        component = torch.multinomial(self.weights.cpu(), num_samples, replacement=True, generator=generator)
        normal = torch.randn(num_samples, self.means[0].numel(), generator=generator, dtype=torch.float64)
        images = torch.empty_like(normal)
        for k in range(len(self.weights)):
            chosen = component == k
            axes = self._axes[k].cpu()
            # By the symmetric root: eigenvectors, and so the samples of a seed, depend on LAPACK and the CPU.
            deviation = (normal[chosen] @ axes * self._variances[k].cpu().sqrt()) @ axes.T
            images[chosen] = self.means[k].flatten().cpu() + deviation
        return images.reshape(num_samples, *self.image_shape).to(self.means.device)

    def posterior(
        self, operator: LinearOperator, y: Tensor, noise_std: float, *, sigma: float = 0.0
    ) -> "GaussianMixturePrior":
        """The exact posterior p_sigma(x | y), again a mixture: its moments and samples are exact.

        y: one measurement, with or without a batch dimension of 1. `sigma` > 0 gives the static
        posterior of an annealing level. Raises ValueError for several measurements.
        """
        A = dense_matrix(operator, self.image_shape)
        if y.shape == operator.measurement_shape(self.image_shape):
            y = y[None]
        if len(y) != 1:
            raise ValueError(f"got {len(y)} measurements; expected one: each has a posterior of its own")
        data = flatten_measurement(y)[0]
        log_weights, means, covariances = [], [], []
        eye = torch.eye(A.shape[1], dtype=torch.float64)
        for weight, mean, covariance in zip(
            self.weights, self.means.flatten(1), self.covariances, strict=True
        ):
            prior = covariance + sigma**2 * eye
            innovation = A @ prior @ A.T + noise_std**2 * torch.eye(len(A), dtype=torch.float64)
            factor = torch.linalg.cholesky(innovation)
            gain = torch.cholesky_solve(A @ prior, factor).T
            residual = data - A @ mean
            whitened = torch.linalg.solve_triangular(factor, residual[:, None], upper=False)
            log_weights.append(weight.log() - 0.5 * whitened.square().sum() - factor.diagonal().log().sum())
            means.append(mean + gain @ residual)
            # Joseph's form stays symmetric and positive where prior - gain A prior cancels.
            shrink = eye - gain @ A
            covariances.append(shrink @ prior @ shrink.T + noise_std**2 * gain @ gain.T)
        weights = torch.stack(log_weights).softmax(0).clamp(min=torch.finfo(torch.float64).tiny)
        return GaussianMixturePrior(
            weights, torch.stack(means).reshape(-1, *self.image_shape), torch.stack(covariances)
        )


class GaussianPrior(GaussianMixturePrior):
    """Gaussian over images: mean [C, H, W], covariance [n, n] with n = C*H*W."""

    def __init__(self, mean: Any, covariance: Any) -> None:
        mean, covariance = _float64(mean, "mean"), _float64(covariance, "covariance")
        if mean.ndim != 3:
            raise ValueError(f"got mean {tuple(mean.shape)}; expected an image [C, H, W]")
        super().__init__(torch.ones(1), mean[None], covariance[None])


def smooth_covariance(
    image_shape: tuple[int, int, int], *, std: float, length: float, jitter: float = 1e-6
) -> Tensor:
    """Squared-exponential covariance [n, n] with pixel std `std` and correlation `length` in pixels.

    Channels are independent. `jitter` times std^2 on the diagonal keeps it positive definite.
    """
    C, H, W = image_shape
    rows, columns = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    position = torch.stack([rows.flatten(), columns.flatten()], dim=1).double()
    plane = torch.exp(-0.5 * torch.cdist(position, position).square() / length**2)
    plane = plane + jitter * torch.eye(H * W, dtype=torch.float64)
    return std**2 * torch.kron(torch.eye(C, dtype=torch.float64), plane)
