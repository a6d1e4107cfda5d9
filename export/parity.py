"""How far a copy of the energy gradient is from autograd in float64, level by level."""

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from alpenglow.networks.denoiser import energy_and_grad
from alpenglow.priors.network import NetworkPrior

Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
# Largest relative error of energy and gradient, by the precision of the network.
TOLERANCE: dict[str, float] = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 1e-1}
OUTSIDE = 10.0  # times as much, at levels that the prior is not for
# One level a decade, and both ends of what a network may be asked.
SIGMAS = (0.002, 0.01, 0.1, 1.0, 10.0, 100.0)
# A graph is traced for three images: it has seen one of these.
BATCHES = (1, 3, 64)


def measure_parity(
    prior: NetworkPrior, evaluate: Evaluate, *, batches: tuple[int, ...] = BATCHES, seed: int = 0
) -> dict[str, float]:
    """Largest relative error of `evaluate`'s energies and gradients at each of SIGMAS, as {"0.002": .., ..}.

    evaluate: x [B, C, H, W], sigma [B], float32 on the CPU -> energy [B], grad [B, C, H, W]. It is asked for
    each number of images in `batches`, smooth random images plus sigma n, and compared with
    autograd in float64 on the weights of `prior` (float32, on the CPU). NaN counts as infinity.
    """
    exact = copy.deepcopy(prior.denoiser).double()
    label = prior.one_hot(1)
    generator = torch.Generator().manual_seed(seed)
    errors = {}
    for sigma in SIGMAS:
        worst = 0.0
        for count in batches:
            x = _smooth_images(count, prior.image_shape, generator)
            x = x + sigma * torch.randn(x.shape, generator=generator)
            level = torch.full((count,), sigma)
            energy, grad = evaluate(x, level)
            # Float64 is slow, so of many images the first, the middle and the last.
            some = sorted({0, count // 2, count - 1})
            true_energy, true_grad = energy_and_grad(
                exact,
                x[some].double(),
                level[some].double(),
                class_label=None if label is None else label.double(),
            )
            worst = max(
                worst,
                _relative_error(energy[some, None], true_energy[:, None]),
                _relative_error(grad[some], true_grad),
            )
        errors[f"{sigma:g}"] = worst
    return errors


def check_parity(
    errors: dict[str, float],
    precision: str,
    what: str,
    sigma_range: tuple[float, float] = (0.0, math.inf),
) -> None:
    """RuntimeError, which says where and by how much, unless every error is within TOLERANCE.

    sigma_range: the levels that the prior is for. Samplers ask no others: there the network was not trained
    well enough for the last digits to mean anything, and OUTSIDE times as much is allowed.
    """
    low, high = sigma_range
    limits = {
        sigma: TOLERANCE[precision] * (1 if low <= float(sigma) <= high else OUTSIDE) for sigma in errors
    }
    wrong = {sigma: error for sigma, error in errors.items() if not error <= limits[sigma]}
    if wrong:
        listed = ", ".join(
            f"{error:.1e} at sigma {sigma} (at most {limits[sigma]:g})" for sigma, error in wrong.items()
        )
        raise RuntimeError(f"{what} fails its check against float64: relative error {listed} in {precision}")


def _relative_error(result: Tensor, expected: Tensor) -> float:
    difference = (result.double() - expected).flatten(1).norm(dim=1)
    error = (difference / expected.flatten(1).norm(dim=1)).max().item()
    return error if math.isfinite(error) else math.inf


def _smooth_images(count: int, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Within [-1, 1]: coarse normals, interpolated and squashed."""
    coarse = torch.randn(count, shape[0], 4, 4, generator=generator)
    return F.interpolate(coarse, shape[1:], mode="bicubic").tanh()
