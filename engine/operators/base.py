"""The measurement operator protocol, and the conditional Gaussian that every sampler draws from.

Q(sigma) = A^T A / noise_std^2 + I / sigma^2 and P = Q^-1 (DESIGN 1). A^T is the adjoint with respect to
real inner products: <A x, y> = Re sum(conj(A x) y).
"""

import abc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alpenglow.kernels.philox import chain_normals
from alpenglow.kernels.step_weights import Step, StepWeights, coefficients, combine, hold
from alpenglow.operators.validation import as_tensor

if TYPE_CHECKING:
    from alpenglow.operators.general import FunctionOperator

# normal(shape) returns fresh independent standard normals [B, *shape], one stream per chain.
Normal = Callable[[tuple[int, ...]], Tensor]
# (residual [B, C, H, W], sigma [B], noise_std) -> an approximation of P residual, up to one factor per image.
Preconditioner = Callable[[Tensor, Tensor, float], Tensor]


class LinearOperator(abc.ABC):
    """A linear map A from real images [B, C, H, W] to measurements [B, *measurement_shape].

    Images are float32 or float64 (a complex MR image is C = 2: real, imaginary), and every result follows
    the dtype and the device of its input. Unless a subclass says otherwise, the result for an image is
    bitwise the same whatever the batch it comes in.

    A subclass gives `forward`, `adjoint` and `solve`, and overrides `conditional_mean` and `draw` where a
    closed form is faster or more accurate.
    """

    @abc.abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """A x: images [B, C, H, W] to measurements [B, *measurement_shape]."""

    @abc.abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y: measurements [B, *measurement_shape] to images [B, C, H, W]."""

    @abc.abstractmethod
    def solve(self, b: Tensor, sigma: Tensor, noise_std: float) -> Tensor:
        """P b for b [B, C, H, W]; sigma: [B] (or [1]), in the image's units; noise_std: in those of y."""

    def normal(self, x: Tensor) -> Tensor:
        """A^T A x for images [B, C, H, W]."""
        return self.adjoint(self.forward(x))

    @property
    def measurement_is_complex(self) -> bool:
        """Whether measurements are complex; noise_std then holds for each of the two parts."""
        return False

    def measurement_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, ...]:
        """Shape of the measurement of one image [C, H, W]. Raises ValueError if the image does not fit."""
        self.check_image(image_shape)
        return tuple(image_shape)

    def check_image(self, image_shape: tuple[int, int, int]) -> None:
        """Raise ValueError unless the operator can measure images of this shape [C, H, W]."""
        if len(image_shape) != 3 or min(image_shape) < 1:
            raise ValueError(f"got image shape {tuple(image_shape)}; expected (C, H, W), all at least 1")

    def check_measurement(self, y: Any, image_shape: tuple[int, int, int]) -> Tensor:
        """The measurement as a batched tensor [1 or B, *measurement_shape], values untouched.

        y: torch tensor, numpy array or DLPack array, with or without a batch dimension.
        Raises ValueError for a wrong shape or dtype, for NaN and for infinity.
        """
        tensor, expected = as_tensor(y, "the measurement"), self.measurement_shape(image_shape)
        if self.measurement_is_complex:
            dtypes, advice = (
                (torch.complex64, torch.complex128),
                "combine the parts with torch.complex(real, imag)",
            )
        else:
            dtypes, advice = (torch.float32, torch.float64), "convert it, in the prior's units, with .float()"
        if tensor.dtype not in dtypes:
            raise ValueError(
                f"got a measurement of {tensor.dtype}; {type(self).__name__} expects {dtypes[0]} or "
                f"{dtypes[1]}: {advice}"
            )
        batched = tensor[None] if tensor.ndim == len(expected) else tensor
        if batched.shape[1:] != expected or len(batched) == 0:
            raise ValueError(
                f"got a measurement of shape {tuple(tensor.shape)}; {type(self).__name__} expects {expected} "
                f"with or without a batch dimension, for images {tuple(image_shape)}: reshape the "
                "measurement, or use the operator and the prior that belong to it"
            )
        if not batched.isfinite().all():
            raise ValueError("the measurement holds NaN or infinity; set what was not measured to 0")
        return batched

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "LinearOperator":
        """This operator with its tensors on another device, in another real dtype (itself if it has none)."""
        return self

    def conditional_mean(self, y: Tensor, prior_mean: Tensor, sigma: Tensor, noise_std: float) -> Tensor:
        """P (A^T y / noise_std^2 + prior_mean / sigma^2), the mean of x given y and N(prior_mean, sigma^2 I).

        y: [1 or B, *measurement_shape]; prior_mean: [B, C, H, W]; sigma: [B] (or [1]).
        """
        # The sum as written loses prior_mean / sigma^2 to rounding in float32 where sigma >> noise_std. The
        # innovation form is equal, and leaves alone what A does not see.
        residual = y - self.forward(prior_mean)
        return prior_mean + self.solve(self.adjoint(residual) / noise_std**2, sigma, noise_std)

    def draw(
        self, normal: Normal, image_shape: tuple[int, int, int], sigma: Tensor, noise_std: float
    ) -> Tensor:
        """An exact sample of N(0, P), [B, C, H, W], linear in the numbers that `normal` returns.

        Perturb-then-solve (Papandreou and Yuille, NeurIPS 2010): P (A^T n1 / noise_std + n2 / sigma), here in
        the innovation form of `conditional_mean`. Calls normal(image_shape) for n2, then
        normal(measurement_shape), or normal((*measurement_shape, 2)) where measurements are complex, for n1.
        """
        image, pull = self._perturb(normal, image_shape, sigma, noise_std)
        return image + self.solve(pull, sigma, noise_std)

    def _perturb(
        self, normal: Normal, image_shape: tuple[int, int, int], sigma: Tensor, noise_std: float
    ) -> tuple[Tensor, Tensor]:
        """n2 sigma, and the b [B, C, H, W] such that n2 sigma + P b is a draw."""
        image = normal(tuple(image_shape))
        image = image * per_image(sigma, image)
        predicted = self.forward(image)
        shape = tuple(predicted.shape[1:])
        if predicted.is_complex():
            noise = torch.view_as_complex(normal((*shape, 2)).contiguous())
        else:
            noise = normal(shape)
        return image, self.adjoint(noise * noise_std - predicted) / noise_std**2

    def with_published_noise(self) -> "LinearOperator":
        """The operator that method "alps" runs: its draws are those of the published ALPS, by default P's."""
        return self

    def to_basis(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] in the basis in which `step` keeps chains; images by default."""
        return x

    def from_basis(self, coefficients: Tensor, image_shape: tuple[int, ...]) -> Tensor:
        """Images [B, C, H, W] of what `to_basis` returned; image_shape: (C, H, W)."""
        return coefficients

    def data_term(self, y: Tensor) -> Tensor:
        """What `step` needs of the measurement, computed once a run; y itself by default."""
        return y

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
        """One Langevin step of every chain; see kernels/step_weights.py.

        data: of `data_term`. z, u (or None): position and momentum in the basis. grad: the prior's G, an
        image. sigma [B]. limit [B] (or [1]): elements of the new z beyond it keep their old value.
        counters: of the noise, int64 [B, 4], or None for a step without noise.
        """
        pull = self.conditional_mean(data, z - grad, sigma, noise_std) - z
        w = None
        if counters is not None:
            w = self.draw(normal_streams(counters, z.dtype), _chw(z), sigma, noise_std)
        new, momentum = combine(z, u, pull, w, coefficients(sigma, noise_std, weights))
        return Step(*hold(new, momentum, z, limit))

    @staticmethod
    def from_functions(
        forward: Callable[[Tensor], Tensor],
        adjoint: Callable[[Tensor], Tensor],
        *,
        preconditioner: Preconditioner | None = None,
        tolerance: float = 1e-6,
        max_iterations: int = 200,
    ) -> "FunctionOperator":
        """An operator from two functions on batches; see FunctionOperator for their contract."""
        from alpenglow.operators.general import FunctionOperator  # general builds on this module

        return FunctionOperator(
            forward,
            adjoint,
            preconditioner=preconditioner,
            tolerance=tolerance,
            max_iterations=max_iterations,
        )


def normal_streams(counters: Tensor, dtype: torch.dtype) -> Normal:
    """normal(shape) -> [B, *shape]; every call takes the next stream after that of counters [B, 4]."""
    following = counters.clone()

    def normal(shape: tuple[int, ...]) -> Tensor:
        values = chain_normals(following, shape).to(dtype)
        following[:, 3] += 1
        return values

    return normal


def _chw(x: Tensor) -> tuple[int, int, int]:
    C, H, W = x.shape[1:]
    return C, H, W


def per_image(sigma: Tensor, like: Tensor) -> Tensor:
    """sigma [B] as [B, 1, ...], to multiply images or measurements [B, ...] like `like`, in its dtype."""
    return sigma.to(device=like.device, dtype=like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def real_parts(y: Tensor) -> Tensor:
    """Complex numbers [...] as real ones [..., 2]; real ones as they are."""
    return torch.view_as_real(y.resolve_conj()) if y.is_complex() else y
