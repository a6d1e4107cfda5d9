"""Triton where it is installed, and what its launchers share.

Importing a kernel's file must work without triton: kernels then stay plain functions that nobody calls.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

try:
    import triton
    import triton.language as tl

    jit: Callable[[Any], Any] = triton.jit
    AVAILABLE = True
except ImportError:  # pragma: no cover - the tests' environment has it
    tl = SimpleNamespace(constexpr=int)  # all that a kernel's signature names
    AVAILABLE = False
    Kernel = TypeVar("Kernel")

    def jit(kernel: Kernel) -> Kernel:
        """The function itself."""
        return kernel


def runs_on(x: Tensor) -> bool:
    """Whether the Triton kernels take this tensor; their twins take every other."""
    return AVAILABLE and x.is_cuda


def traced(x: Tensor) -> bool:
    """Whether torch.compile, export or make_fx is looking, which want the operator, not what it does.

    Everyone else calls the launcher or the twin itself: an operator with many optional arguments costs more
    than the kernel of a small batch.
    """
    return torch.compiler.is_compiling() or type(x) is not Tensor or _get_current_dispatch_mode() is not None


def next_power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n, and at least 1."""
    return 1 << max(0, n - 1).bit_length()


def block_of(size: int, largest: int) -> int:
    """Elements of a program's block: `largest`, less for a small image of `size`, a warp at least."""
    return min(largest, max(32, next_power_of_2(size)))


def batch_stride(x: Tensor, batch: int) -> int:
    """Elements from an image of contiguous x [1 or B, ...] to the next, 0 where one serves all.

    Raises ValueError for another number of images.
    """
    if len(x) not in (1, batch):
        raise ValueError(f"got {len(x)} images in {tuple(x.shape)}; expected 1 or {batch}")
    return 0 if len(x) == 1 else math.prod(x.shape[1:])


def start(kernel: Any, programs: int, like: Tensor, *arguments: Any, **constants: Any) -> None:
    """Run `programs` programs of a kernel on the device of `like`; triton takes the current one."""
    with torch.cuda.device_of(like):
        kernel[(programs,)](*arguments, **constants)


def unused(like: Tensor) -> Tensor:
    """What a launcher passes for an argument that its variant of the kernel never touches."""
    return torch.empty(0, dtype=like.dtype, device=like.device)


@dataclass(frozen=True)
class Variant:
    """One set of options of a kernel, for compilation without a GPU.

    types: of the pointers that are not "*fp32". constants: the kernel's tl.constexpr arguments. aligned: the
    integers that are multiples of 16 in it. elements: what one program works on; minimum_bytes: global
    memory that must move for each of them, per-chain scalars left out. scalar_stores: numbers that a program
    stores alone, sums over its block. loops: it does, so that its code does not tell what it moves.
    """

    name: str
    label: str
    kernel: Any
    constants: Mapping[str, int | bool]
    elements: int
    minimum_bytes: float
    types: Mapping[str, str] = field(default_factory=dict)
    aligned: frozenset[str] = frozenset()
    warps: int = 4
    scalar_stores: int = 0
    loops: bool = False

    def type_of(self, argument: str) -> str:
        """What triton calls the type of an argument: `_ptr` at the end of a name makes a pointer."""
        if argument in self.constants:
            return "constexpr"
        return self.types.get(argument, "*fp32" if argument.endswith("_ptr") else "i32")
