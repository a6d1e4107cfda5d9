"""What samplers ask of a prior (DESIGN 3)."""

import math
from typing import Any, Protocol

import torch
from torch import Tensor


class Prior(Protocol):
    """Anything with an image shape and the energy of DESIGN 1 with its gradient."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""

    def energy_and_grad(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """E(x, sigma) [B] and G = dE/dx [B, C, H, W] at x [B, C, H, W], each image at its own sigma [B]."""


def denoise(prior: Prior, x: Tensor, sigma: Tensor) -> Tensor:
    """MMSE denoiser D(x, sigma) = x - G [B, C, H, W] of x [B, C, H, W] at levels sigma [B] (DESIGN 1)."""
    return x - prior.energy_and_grad(x, sigma)[1]


def sigma_range(prior: object) -> tuple[float, float]:
    """The levels that a prior is for; all where it names none."""
    low, high = getattr(prior, "sigma_range", (0.0, math.inf))
    return float(low), float(high)


def gradient_error(prior: object) -> float:
    """The largest relative error of its G at those levels; 0 where it names none, as closed forms do."""
    return getattr(prior, "gradient_error", 0.0)


def noise_floor(prior: object) -> float:
    """The std of the white noise that its images carry; 0 where it names none."""
    return getattr(prior, "noise_floor", 0.0)


def place_prior(prior: Any, device: torch.device) -> Any:
    """The prior on a device. Raises ValueError where it is on another one and cannot be moved."""
    if callable(getattr(prior, "to", None)):
        return prior.to(device)
    home = torch.device(getattr(prior, "device", None) or "cpu")
    if home.type == device.type == "cpu" or home == device:
        return prior
    raise ValueError(f"{type(prior).__name__} is on {home} and has no to(device); it is wanted on {device}")


_EXPECTED = (
    "a prior needs image_shape = (C, H, W) and energy_and_grad(x[B, C, H, W], sigma[B]) -> "
    "(energy[B], grad[B, C, H, W]); load one with alpenglow.load_prior, or see alpenglow.priors"
)


def check_prior(prior: object, *, probe: Tensor | None = None) -> tuple[int, int, int]:
    """The image shape of `prior`, after a check that it is one.

    `probe` x [B, C, H, W] also evaluates it there, at sigma 1, which costs B NFE. Raises ValueError for an
    object that does not satisfy `Prior`, and with `probe` for results of wrong shape or not finite.
    """
    kind = type(prior).__name__
    if isinstance(prior, type):
        raise ValueError(f"got the class {prior.__name__}, expected an instance of it; {_EXPECTED}")
    for member in ("image_shape", "energy_and_grad"):
        if not hasattr(prior, member):
            raise ValueError(f"{kind} is not a prior, it has no {member}; {_EXPECTED}")
    if not callable(prior.energy_and_grad):  # type: ignore[attr-defined]
        raise ValueError(f"{kind}.energy_and_grad is not callable; {_EXPECTED}")
    shape = check_image_shape(prior.image_shape, f"{kind}.image_shape")  # type: ignore[attr-defined]
    if probe is not None:
        _check_evaluation(prior, probe, shape)  # type: ignore[arg-type]
    return shape


def check_image_shape(value: object, name: str = "image_shape") -> tuple[int, int, int]:
    """`value` as (C, H, W); ValueError unless it is three positive integers."""
    try:
        shape = tuple(value)  # type: ignore[arg-type, var-annotated]
    except TypeError:
        shape = ()
    if len(shape) != 3 or not all(type(n) is int and n > 0 for n in shape):
        raise ValueError(f"{name} is {value!r}; expected three positive integers (C, H, W)")
    return shape


def _check_evaluation(prior: Prior, x: Tensor, shape: tuple[int, int, int]) -> None:
    kind = type(prior).__name__
    if x.ndim != 4 or tuple(x.shape[1:]) != shape:
        raise ValueError(f"got a probe {tuple(x.shape)}; {kind} expects [B, {', '.join(map(str, shape))}]")
    try:
        energy, grad = prior.energy_and_grad(x, torch.ones(len(x), dtype=x.dtype, device=x.device))
    except TypeError as error:
        raise ValueError(f"{kind}.energy_and_grad cannot be called: {error}; {_EXPECTED}") from error
    for name, value, wanted in (("energy", energy, x.shape[:1]), ("grad", grad, x.shape)):
        if not isinstance(value, Tensor) or value.shape != wanted:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{kind}.energy_and_grad gives {name} {got}; expected {tuple(wanted)}")
        if not torch.isfinite(value).all():
            raise ValueError(f"{kind}.energy_and_grad gives NaN or infinity in {name} at sigma 1")
