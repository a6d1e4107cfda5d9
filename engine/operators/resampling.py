"""Super-resolution: periodic low-pass filter, then decimation."""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from alpenglow.operators.base import LinearOperator, Normal, per_image
from alpenglow.operators.diagonal import scale
from alpenglow.operators.transforms import irfft2, rfft2
from alpenglow.operators.validation import positive_integer

Filter = Literal["box", "gaussian", "bicubic"]


class SuperResolution(LinearOperator):
    """y[i] = sum_j w[j] x[factor i + j] along rows and along columns, periodic.

    The measurement is [C, H / factor, W / factor].
    filter, each of sum 1 and centred on the block of pixels that a sample stands for:
    "box", the mean of the block; "gaussian", standard deviation factor / 2 pixels, out to 4 of them;
    "bicubic", Keys' kernel (a = -1/2) stretched by the factor, as antialiased resizing in Pillow and MATLAB.
    Raises ValueError for a factor that is no positive integer, an unknown filter, and (for an image) H or W
    that the factor does not divide.

    In the Fourier domain A^T A has rank one within each group of factor^2 aliased frequencies, so that
    Sherman-Morrison gives P and P^(1/2) (Zhao et al., IEEE TIP 2016, doi 10.1109/TIP.2016.2567075).
    With m the eigenvalues of A A^T, a periodic convolution on the small grid, and s^2 = eta^2 + sigma^2 m:

        P = sigma^2 (I - A^T diag(sigma^2 / s^2) A)
        P^(1/2) = sigma (I - A^T diag(sigma^2 / (s (s + eta))) A)

    so only the small images are ever transformed, and for "box", where A A^T = I / factor^2, nothing is.
    """

    def __init__(self, factor: int, filter: Filter = "box") -> None:
        if filter not in get_args(Filter):
            raise ValueError(f"got filter={filter!r}; expected one of {', '.join(get_args(Filter))}")
        self.factor = positive_integer(factor, "factor")
        self.filter = filter
        self._taps = _filter_taps(self.factor, filter)
        self._eigenvalues: dict[tuple[int, int, torch.device, torch.dtype], Tensor] = {}

    def measurement_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, ...]:
        """(C, H / factor, W / factor). Raises ValueError if the factor does not divide H and W."""
        self.check_image(image_shape)
        C, H, W = image_shape
        return (C, H // self.factor, W // self.factor)

    def check_image(self, image_shape: tuple[int, int, int]) -> None:
        """Raise ValueError unless the factor divides H and W of images [C, H, W]."""
        super().check_image(image_shape)
        if image_shape[1] % self.factor or image_shape[2] % self.factor:
            raise ValueError(
                f"got images {tuple(image_shape)}; SuperResolution({self.factor}) expects H and W "
                f"divisible by {self.factor}: crop the image or pick another factor"
            )

    def forward(self, x: Tensor) -> Tensor:
        """The small images [B, C, H / factor, W / factor]."""
        return self._decimate(self._decimate(x, -2), -1)

    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y, [B, C, H, W]."""
        return self._spread(self._spread(y, -1), -2)

    def solve(self, b: Tensor, sigma: Tensor, noise_std: float) -> Tensor:
        """P b [B, C, H, W]; see LinearOperator.solve."""
        level = per_image(sigma, b).square()
        seen = self._filter_small(self.forward(b), lambda m: level / (noise_std**2 + level * m))
        return level * (b - self.adjoint(seen))

    def conditional_mean(self, y: Tensor, prior_mean: Tensor, sigma: Tensor, noise_std: float) -> Tensor:
        """P (A^T y / noise_std^2 + prior_mean / sigma^2), [B, C, H, W]; see LinearOperator."""
        # P A^T / noise_std^2 = sigma^2 A^T diag(1 / s^2) has no difference of large numbers, as P has.
        level = per_image(sigma, prior_mean).square()
        residual = y - self.forward(prior_mean)
        return prior_mean + self.adjoint(
            self._filter_small(residual, lambda m: level / (noise_std**2 + level * m))
        )

    def draw(
        self, normal: Normal, image_shape: tuple[int, int, int], sigma: Tensor, noise_std: float
    ) -> Tensor:
        """P^(1/2) n, an exact sample of N(0, P), [B, C, H, W]; calls normal(image_shape) once for n."""
        noise = normal(tuple(image_shape))
        deviation = per_image(sigma, noise)

        def gain(m: Tensor) -> Tensor:
            root = (noise_std**2 + deviation.square() * m).sqrt()
            return deviation.square() / (root * (root + noise_std))

        return deviation * (noise - self.adjoint(self._filter_small(self.forward(noise), gain)))

    # Taps are added one by one, with plain products and sums: reductions and fused multiply-adds may round
    # differently from batch to batch.

    def _decimate(self, x: Tensor, dim: int) -> Tensor:
        """Filter and decimate one dimension."""
        terms = (
            weight * _every(x, self.factor, phase, dim).roll(-block, dim)
            for (block, phase), weight in self._taps.items()
        )
        total = next(terms)
        for term in terms:
            total = total + term
        return total

    def _spread(self, y: Tensor, dim: int) -> Tensor:
        """The adjoint of _decimate."""
        shape = list(y.shape)
        shape[dim] *= self.factor
        x = y.new_zeros(shape)
        for (block, phase), weight in self._taps.items():
            target = _every(x, self.factor, phase, dim)
            target += weight * y.roll(block, dim)
        return x

    def _filter_small(self, y: Tensor, gain: Callable[[Tensor], Tensor]) -> Tensor:
        """gain(A A^T) y for small images y."""
        if self.filter == "box":
            return y * gain(y.new_tensor(self.factor**-2))
        return irfft2(scale(rfft2(y), gain(self._small_eigenvalues(y))), y.shape[-1])

    @torch.inference_mode(False)  # so that a later gradient may use what is kept
    def _small_eigenvalues(self, y: Tensor) -> Tensor:
        """Eigenvalues of A A^T on the half spectrum of the small grid, made once for a kind of image."""
        h, w = y.shape[-2:]
        key = (h, w, y.device, y.dtype)
        if key not in self._eigenvalues:
            impulse = torch.zeros(1, 1, h, w, dtype=torch.float64)
            impulse[..., 0, 0] = 1
            response = rfft2(self.forward(self.adjoint(impulse)))[0, 0]
            self._eigenvalues[key] = response.real.clamp(min=0).to(y.device, y.dtype)
        return self._eigenvalues[key]


def _every(x: Tensor, factor: int, phase: int, dim: int) -> Tensor:
    """The view x[phase::factor] along dimension -2 or -1."""
    return x[..., phase::factor, :] if dim == -2 else x[..., phase::factor]


def _filter_taps(factor: int, filter: Filter) -> dict[tuple[int, int], float]:
    """Weights w[j] of sum 1 by (j // factor, j % factor), j counted from the first pixel of a block."""
    centre = (factor - 1) / 2
    if filter == "box":
        offsets, weights = torch.arange(factor), torch.ones(factor, dtype=torch.float64)
    else:
        reach = 2 * factor
        offsets = torch.arange(-reach, reach + factor)
        distance = (offsets.double() - centre).abs() / factor
        weights = _keys(distance) if filter == "bicubic" else _gaussian(distance)
    weights = weights / weights.sum()
    return {
        divmod(int(offset), factor): float(weight)
        for offset, weight in zip(offsets, weights, strict=True)
        if weight != 0
    }


def _gaussian(t: Tensor) -> Tensor:
    """exp(-t^2 / (2 / 4)), a standard deviation of 1/2, out to t = 2."""
    return torch.where(t <= 2, torch.exp(-2 * t.square()), 0)


def _keys(t: Tensor) -> Tensor:
    """Keys' cubic convolution kernel with a = -1/2 (IEEE TASSP 1981, eq. 15) at distances t >= 0."""
    near = 1.5 * t**3 - 2.5 * t**2 + 1
    far = -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    return torch.where(t < 1, near, torch.where(t < 2, far, 0))
