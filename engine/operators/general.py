"""Operators that no fast basis diagonalises: data consistency by conjugate gradients."""

from collections.abc import Callable

import torch
from torch import Tensor

from alpenglow.operators.base import LinearOperator, Normal, Preconditioner, per_image
from alpenglow.operators.cg import CgInfo, conjugate_gradient
from alpenglow.operators.validation import positive_integer, positive_number

LARGEST_TOLERANCE = 1e-4
"""Relative residual of a conditional mean, and of draws at low sigma; see IterativeOperator."""
_DRAW_ERROR = 0.2


class IterativeOperator(LinearOperator):
    """`solve` by batched CG; a subclass gives `forward` and `adjoint`, and may give `precondition`.

    tolerance: relative residual ||b - Q x|| / ||b|| at which an image is done, at least 4 machine epsilons
    (5e-7 in float32). `conditional_mean` and `draw` may do with less, up to 100 times the tolerance but at
    most 1e-4. Their errors, in posterior standard deviations (the norm of Q over all pixels), were measured
    against solves to 1e-13; blur, masked blur, 6x 2D SENSE:

    - A mean moves by a few deviations a step, and is done at that limit, in half of the iterations: its error
      was 0.0003 at sigma = 20 noise_std, and below 0.009 at every sigma up to 2000 noise_std.
    - A draw moves by sigma. Done at 1e-4 it was off by 0.003 at 20 noise_std, 0.03 at 100 and 0.3 at 400, so
      it is done at 0.2 (noise_std / sigma)^2 between the limits: an error below 0.01 up to 400 noise_std.
      Beyond, the tolerance rules: at 1e-6 0.006 at 400.

    Raises ValueError unless the tolerance is positive and max_iterations at least 1.
    """

    def __init__(self, *, tolerance: float = 1e-6, max_iterations: int = 200) -> None:
        self.tolerance = positive_number(tolerance, "tolerance", "relative residual")
        self.max_iterations = positive_integer(max_iterations, "max_iterations")

    @property
    def mean_tolerance(self) -> float:
        """Relative residual at which a conditional mean is done; see above."""
        return max(self.tolerance, min(100 * self.tolerance, LARGEST_TOLERANCE))

    def draw_tolerance(self, sigma: Tensor, noise_std: float) -> Tensor:
        """Relative residual at which a draw at level sigma [B] is done; see above."""
        return (_DRAW_ERROR * (noise_std / sigma).square()).clamp(self.tolerance, self.mean_tolerance)

    def precondition(self, residual: Tensor, sigma: Tensor, noise_std: float) -> Tensor:
        """About P residual [B, C, H, W], up to a factor per image; the residual itself by default."""
        return residual

    def solve(self, b: Tensor, sigma: Tensor, noise_std: float, *, guess: Tensor | None = None) -> Tensor:
        """P b to a relative residual of `tolerance`; see LinearOperator.solve.

        guess: [B, C, H, W], where CG starts (0 by default). Raises RuntimeError if an image does not converge
        in `max_iterations`.
        """
        return self._solve(b, sigma, noise_std, guess, self.tolerance)

    def _solve(
        self, b: Tensor, sigma: Tensor, noise_std: float, guess: Tensor | None, tolerance: float | Tensor
    ) -> Tensor:
        level = per_image(sigma, b).square()
        total = level + noise_std**2
        # Past rounding, the residual that CG updates goes on falling while the true one, and x, drift off.
        tolerance = torch.as_tensor(tolerance, device=b.device).clamp(min=4 * torch.finfo(b.dtype).eps)
        tolerance = tolerance.to(b.dtype).expand(len(b))
        data, prior = level / total, noise_std**2 / total  # Q times the product of the two variances / total
        x, info = conjugate_gradient(
            lambda v: data * self.normal(v) + prior * v,
            b * (level * prior),
            precondition=lambda r: self.precondition(r, sigma, noise_std),
            guess=guess,
            tolerance=tolerance,
            max_iterations=self.max_iterations,
        )
        if not info.converged.all():
            raise RuntimeError(f"{type(self).__name__}: {self._failure(info, sigma, noise_std, tolerance)}")
        return x

    def _failure(self, info: CgInfo, sigma: Tensor, noise_std: float, tolerance: Tensor) -> str:
        worst = int((info.residual.nan_to_num(nan=torch.inf) * ~info.converged).argmax())
        level, limit = float(sigma.expand(len(info.residual))[worst]), float(tolerance[worst])
        return (
            f"CG stopped at relative residual {float(info.residual[worst]):.3g} after "
            f"{int(info.iterations[worst])} iterations, tolerance {limit:g} (image {worst}, "
            f"sigma {level:g}, noise_std {noise_std:g}). Raise max_iterations or tolerance, give a "
            "preconditioner, and check that <A x, y> = <x, adjoint(y)>"
        )

    def conditional_mean(
        self, y: Tensor, prior_mean: Tensor, sigma: Tensor, noise_std: float, *, guess: Tensor | None = None
    ) -> Tensor:
        """See LinearOperator.conditional_mean; guess: [B, C, H, W] near the result, for a warm start."""
        pull = self.adjoint(y - self.forward(prior_mean)) / noise_std**2
        change = None if guess is None else guess - prior_mean
        return prior_mean + self._solve(pull, sigma, noise_std, change, self.mean_tolerance)

    def draw(
        self, normal: Normal, image_shape: tuple[int, int, int], sigma: Tensor, noise_std: float
    ) -> Tensor:
        """See LinearOperator.draw."""
        image, pull = self._perturb(normal, image_shape, sigma, noise_std)
        return image + self._solve(pull, sigma, noise_std, None, self.draw_tolerance(sigma, noise_std))


class FunctionOperator(IterativeOperator):
    """An operator from two functions on batches; also LinearOperator.from_functions.

    forward: images [B, C, H, W] to real or complex measurements [B, ...]; adjoint: back, with respect to real
    inner products, <forward(x), y> = Re sum(conj(forward(x)) y) = <x, adjoint(y)>. Both keep the precision
    (float32 or float64) and the device, treat every image alone, and are linear.
    preconditioner: (residual [B, C, H, W], sigma [B], noise_std) -> an approximation of P residual, symmetric
    positive definite; None for plain CG. Results are the same in every batch if those of the functions are.

    Example, which tests/test_non_cartesian.py runs: non-Cartesian multi-coil MRI by another library's NUFFT.

        nufft = mrinufft.get_operator("finufft")(trajectory, (H, W), n_coils=coils, smaps=coil_maps)

        def forward(x):  # [B, 2, H, W] -> [B, coils, samples]
            return torch.stack([torch.from_numpy(nufft.op(z)) for z in torch.complex(*x.unbind(1)).numpy()])

        def adjoint(y):
            images = torch.stack([torch.from_numpy(nufft.adj_op(k)) for k in y.numpy()])
            return torch.stack([images.real, images.imag], dim=1)

        operator = LinearOperator.from_functions(forward, adjoint, tolerance=1e-5)
    """

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        adjoint: Callable[[Tensor], Tensor],
        *,
        preconditioner: Preconditioner | None = None,
        tolerance: float = 1e-6,
        max_iterations: int = 200,
    ) -> None:
        super().__init__(tolerance=tolerance, max_iterations=max_iterations)
        for name, function in (("forward", forward), ("adjoint", adjoint)):
            if not callable(function):
                raise ValueError(f"got {name}={function!r}; expected a function of a batch")
        self._forward, self._adjoint, self._preconditioner = forward, adjoint, preconditioner
        self._probe = torch.zeros(())
        self._shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._is_complex: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        """A x: images [B, C, H, W] to measurements [B, ...]."""
        y = self._forward(x)
        if y.ndim < 1 or len(y) != len(x):
            raise ValueError(
                f"forward took images {tuple(x.shape)} to {tuple(y.shape)}; expected {len(x)} measurements"
            )
        self._shapes[tuple(x.shape[1:])] = tuple(y.shape[1:])
        self._is_complex = y.is_complex()
        return y

    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y: measurements [B, ...] to images [B, C, H, W]."""
        x = self._adjoint(y)
        if x.is_complex() or x.ndim != 4:
            raise ValueError(
                f"adjoint returned {x.dtype} {tuple(x.shape)}; expected real images [B, C, H, W] "
                "(complex images: real and imaginary part as 2 channels)"
            )
        return x

    def precondition(self, residual: Tensor, sigma: Tensor, noise_std: float) -> Tensor:
        """The user's preconditioner of residuals [B, C, H, W], or the residuals themselves."""
        return residual if self._preconditioner is None else self._preconditioner(residual, sigma, noise_std)

    @property
    def measurement_is_complex(self) -> bool:
        """Whether measurements are complex, as seen at the last use of `forward`.

        Raises RuntimeError before the first use of `forward` or `measurement_shape`.
        """
        if self._is_complex is None:
            raise RuntimeError("not known before forward has run; call measurement_shape(image_shape) first")
        return self._is_complex

    def measurement_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, ...]:
        """Shape of one measurement; runs `forward` once on a zero image if it has not seen this shape."""
        self.check_image(image_shape)
        if tuple(image_shape) not in self._shapes:
            self.forward(self._probe.new_zeros(1, *image_shape))
        return self._shapes[tuple(image_shape)]

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "FunctionOperator":
        """The same functions, probed for their shapes on another device and in another dtype.

        What the functions themselves hold is the caller's to move.
        """
        moved = FunctionOperator(
            self._forward,
            self._adjoint,
            preconditioner=self._preconditioner,
            tolerance=self.tolerance,
            max_iterations=self.max_iterations,
        )
        moved._probe = self._probe.to(device=device, dtype=dtype)
        return moved
