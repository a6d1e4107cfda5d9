"""Checks at the boundary of the operators: arrays, masks, numbers. Each raises one clear ValueError."""

import math
import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_tensor(value: Any, name: str) -> Tensor:
    """A tensor that shares memory with `value` where it can.

    value: a torch tensor, a numpy array, or anything with DLPack (CuPy, JAX). Raises ValueError otherwise.
    """
    if isinstance(value, Tensor):
        return value.detach()
    try:
        if isinstance(value, np.ndarray):
            # torch takes neither foreign byte orders nor negative strides, and warns of read-only memory.
            native = value.astype(value.dtype.newbyteorder("="), copy=not value.flags.writeable)
            return torch.from_numpy(np.ascontiguousarray(native).reshape(value.shape))
        if hasattr(value, "__dlpack__"):
            return torch.from_dlpack(value)
    except (TypeError, RuntimeError, BufferError) as error:
        raise ValueError(f"cannot read {name} as a tensor: {error}; pass a plain numeric array") from error
    raise ValueError(
        f"got {type(value).__name__} for {name}; expected a torch tensor, a numpy array or a DLPack array"
    )


def check_mask(mask: Any, ndims: tuple[int, ...], expected: str) -> Tensor:
    """A bool copy of `mask`; ValueError unless it has one of `ndims` dimensions, only 0 and 1, and some 1.

    expected: the shapes to name in the error, such as "[H, W]".
    """
    tensor = as_tensor(mask, "mask")
    if tensor.ndim not in ndims or tensor.numel() == 0:
        raise ValueError(f"got a mask of shape {tuple(tensor.shape)}; expected {expected}")
    if not ((tensor == 0) | (tensor == 1)).all():
        raise ValueError("mask holds numbers other than 0 and 1; threshold it, or pass a bool mask")
    if not tensor.any():
        raise ValueError("mask is all zero: nothing is measured; set the entries that are measured to 1")
    return tensor.to(torch.bool, copy=True)


def positive_number(value: Any, name: str, unit: str, *, largest: float = math.inf) -> float:
    """`value` as a float; ValueError unless it is finite, positive and at most `largest`."""
    number = finite_number(value, name, unit)
    if not 0 < number <= largest:
        bound = "" if math.isinf(largest) else f" of at most {largest:g}"
        raise ValueError(f"got {name}={value!r}; expected a positive number of {unit}{bound}")
    return number


def finite_number(value: Any, name: str, unit: str) -> float:
    """`value` as a float; ValueError unless it is a finite number."""
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"got {name}={value!r}; expected a number of {unit}") from error
    if not math.isfinite(number):
        raise ValueError(f"got {name}={value!r}; expected a finite number of {unit}")
    return number


def positive_integer(value: Any, name: str) -> int:
    """`value` as an int; ValueError unless it is an integer of at least 1."""
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if isinstance(value, bool) or number < 1:
        raise ValueError(f"got {name}={value!r}; expected an integer of at least 1")
    return number
