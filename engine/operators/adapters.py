"""Operators of other libraries, by their own interface: neither library is imported here."""

from typing import Any

import torch
from torch import Tensor

from alpenglow.operators.general import FunctionOperator
from alpenglow.operators.validation import as_tensor


def from_deepinv(physics: Any, *, tolerance: float = 1e-6, max_iterations: int = 200) -> FunctionOperator:
    """An operator from a deepinv.physics.LinearPhysics; its noise model is ignored.

    Raises ValueError unless the physics has `A` and `A_adjoint`.
    """
    _require(physics, ("A", "A_adjoint"), "a deepinv.physics.LinearPhysics")
    return FunctionOperator(
        lambda x: physics.A(x),
        lambda y: physics.A_adjoint(y),
        tolerance=tolerance,
        max_iterations=max_iterations,
    )


def from_sigpy(linop: Any, *, tolerance: float = 1e-6, max_iterations: int = 200) -> FunctionOperator:
    """An operator on complex images [B, 2, H, W] (real, imaginary) from a sigpy.linop.Linop.

    linop: of input shape (H, W) or (1, H, W); its measurement is complex. Images go through numpy on the CPU,
    one by one. Raises ValueError unless it is such a Linop.
    """
    _require(linop, ("ishape", "oshape", "H"), "a sigpy.linop.Linop")
    ishape, oshape = tuple(linop.ishape), tuple(linop.oshape)
    if len(ishape) not in (2, 3) or (len(ishape) == 3 and ishape[0] != 1):
        raise ValueError(f"got a Linop of input shape {ishape}; expected (H, W) or (1, H, W)")

    def forward(x: Tensor) -> Tensor:
        if x.shape[1:] != (2, *ishape[-2:]):
            raise ValueError(f"got images {tuple(x.shape[1:])}; this Linop expects {(2, *ishape[-2:])}")
        images = torch.complex(x[:, 0], x[:, 1]).reshape(-1, *ishape)
        return _each(linop, images, oshape)

    def adjoint(y: Tensor) -> Tensor:
        images = _each(linop.H, y.reshape(-1, *oshape), ishape).reshape(-1, *ishape[-2:])
        return torch.stack([images.real, images.imag], dim=1)

    return FunctionOperator(forward, adjoint, tolerance=tolerance, max_iterations=max_iterations)


def _each(linop: Any, batch: Tensor, shape: tuple[int, ...]) -> Tensor:
    """linop of every item of a complex batch, as complex [B, *shape] on the device of the batch."""
    results = [as_tensor(linop(item), "the result of the Linop") for item in batch.detach().cpu().numpy()]
    return torch.stack(results).reshape(-1, *shape).to(batch.device, batch.dtype)


def _require(thing: Any, attributes: tuple[str, ...], expected: str) -> None:
    missing = [name for name in attributes if not hasattr(thing, name)]
    if missing:
        raise ValueError(f"got {type(thing).__name__}, without {', '.join(missing)}; expected {expected}")
