"""The boundary: whatever users pass as prior, operator and measurement, checked and made a Problem."""

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from alpenglow.operators.base import LinearOperator
from alpenglow.priors.protocol import check_prior
from alpenglow.samplers.problem import Problem


def as_problem(prior: Any, operator: Any, y: Any, noise_std: Any) -> Problem:
    """Everything checked, on the prior's device, in float32; see `alpenglow.sample` for the arguments.

    Raises ValueError.
    """
    shape = check_prior(prior)
    linear = _as_operator(operator)
    noise = _as_noise_std(noise_std)
    measurement = linear.check_measurement(y, shape)
    if len(measurement) != 1:
        raise ValueError(
            f"got {len(measurement)} measurements; expected one: call sample once for each measurement"
        )
    device = _device(prior, measurement)
    dtype = torch.complex64 if measurement.is_complex() else torch.float32
    moved = linear.to(device=device, dtype=torch.float32)
    return Problem(prior, moved, measurement.to(device, dtype), noise)


def _as_operator(operator: Any) -> LinearOperator:
    if isinstance(operator, LinearOperator):
        return operator
    missing = [n for n in ("forward", "adjoint") if not callable(getattr(operator, n, None))]
    if missing or inspect.isclass(operator):
        raise ValueError(
            f"got {operator!r} for the operator; expected an instance of alpenglow.operators, or an "
            "object with forward and adjoint"
        )
    return LinearOperator.from_functions(operator.forward, operator.adjoint)


def _as_noise_std(noise_std: Any) -> float:
    try:
        noise = float(noise_std)
    except (TypeError, ValueError):
        noise = math.nan
    if not (math.isfinite(noise) and noise > 0):
        raise ValueError(
            f"noise_std is {noise_std!r}; expected a positive finite number, the standard deviation of the "
            "noise in the units of y (per real and per imaginary part)"
        )
    return noise


def _device(prior: Any, measurement: Tensor) -> torch.device:
    """The prior's device where it names one, else that of the measurement."""
    device = getattr(prior, "device", None)
    return torch.device(device) if device is not None else measurement.device
