"""One Langevin step where A^T A is diagonal in the Fourier basis: a single pass over the half spectrum.

Blurs, and k-space sampling of real images. State and gradient are unnormalised half spectra (rfft2) of real
images [B, C, H, W], so that an iteration needs two FFTs: of the gradient, and back to the image. See
step_weights.py for the step, and pixel_step.py for the formulas, which hold for each coefficient.

Noise is drawn in place with the law of the spectrum of white noise: E |w|^2 = H W P, w(-k) = conj(w(k)), real
where k = -k. One Philox call serves a coefficient of a row and one of the row's mirror image, rows r and
H - r: in the columns 0 and W / 2 these two are conjugate, in all others independent.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alpenglow.kernels.philox import normal_quads, philox_normals
from alpenglow.kernels.step_weights import Step, advance, hold
from alpenglow.kernels.triton_support import (
    Variant,
    batch_stride,
    block_of,
    jit,
    runs_on,
    start,
    tl,
    traced,
)

BLOCK = 512
WARPS = 4


def spectral_step(
    z: Tensor,
    u: Tensor | None,
    grad: Tensor,
    data: Tensor,
    diagonal: Tensor,
    table: Tensor,
    limit: Tensor,
    counters: Tensor | None,
    *,
    width: int,
) -> Step:
    """One step of B chains.

    z, u (or None), grad: half spectra of position, momentum and G, complex [B, C, H, width // 2 + 1]; data:
    that of A^T y, [1 or B, C, H, width // 2 + 1]; diagonal: m, real or bool, [H, width // 2 + 1] or with C
    before. width: W of the images. table, limit, counters: as for `pixel_step`, the limit being one of the
    real and imaginary parts of z. Step.z and Step.u are half spectra.

    A kernel on CUDA (complex64), plain torch elsewhere; chains do not depend on each other, bit for bit.
    """
    if z.shape[-1] != width // 2 + 1:
        raise ValueError(f"got a half spectrum of {z.shape[-1]} columns for images of width {width}")
    for name, part in (("u", u), ("grad", grad), ("data", data)):
        if part is not None and part.shape[1:] != z.shape[1:]:
            raise ValueError(
                f"got {name} {tuple(part.shape)} for z {tuple(z.shape)}; expected spectra of one shape"
            )
    given = Inputs(z, u, grad, data, diagonal, table, limit, counters, width)
    new, momentum, largest = _operator(*given) if traced(z) else _run(given)
    return Step(new, None if u is None else momentum, largest)


class Inputs(NamedTuple):
    """The arguments of the operator; see `spectral_step`."""

    z: Tensor
    u: Tensor | None
    grad: Tensor
    data: Tensor
    diagonal: Tensor
    table: Tensor
    limit: Tensor
    counters: Tensor | None
    width: int


Outputs = tuple[Tensor, Tensor, Tensor]
"""New z; new u (empty without momentum); largest modulus of a real or imaginary part [B]."""


@torch.library.custom_op(
    "alpenglow::spectral_step",
    mutates_args=(),
    schema="(Tensor z, Tensor? u, Tensor grad, Tensor data, Tensor diagonal, Tensor table, Tensor limit, "
    "Tensor? counters, int width) -> (Tensor, Tensor, Tensor)",
)
def _operator(*arguments: Any) -> Outputs:
    return _run(Inputs(*arguments))


def _run(given: Inputs) -> Outputs:
    return launch(given) if runs_on(given.z) else twin(given)


@_operator.register_fake
def _(*arguments: Any) -> Outputs:
    given = Inputs(*arguments)
    z = given.z
    momentum = z.new_empty(0) if given.u is None else torch.empty_like(z)
    return torch.empty_like(z), momentum, given.limit.new_empty(z.shape[0])


def twin(given: Inputs) -> Outputs:
    """The step in plain torch, in the dtype of z."""
    z = torch.view_as_real(given.z)
    normals = None
    if given.counters is not None:
        normals = torch.view_as_real(spectral_normals(given.counters, given.z.shape[1:], given.width))
        normals = normals.to(z.dtype)
    new, momentum = advance(
        z,
        None if given.u is None else torch.view_as_real(given.u),
        torch.view_as_real(given.grad),
        torch.view_as_real(given.data.resolve_conj()),
        given.diagonal[..., None],
        given.table,
        normals,
    )
    new, momentum, largest = hold(new, momentum, z, given.limit)
    if momentum is None:
        return torch.view_as_complex(new), given.z.new_empty(0), largest
    return torch.view_as_complex(new), torch.view_as_complex(momentum), largest


def spectral_normals(counters: Tensor, shape: Sequence[int], width: int) -> Tensor:
    """The half spectrum of white noise N(0, 1) in each pixel, complex64 [B, *shape]; unnormalised, as rfft2.

    shape: (C, H, width // 2 + 1); counters: int64 [B, 4], see `philox.chain_counters`.
    """
    channels, height, columns = shape
    pairs = height // 2 + 1
    quads = normal_quads(counters, channels * pairs * columns)
    quads = quads.view(len(counters), channels, pairs, columns, 2, 2).mul_(math.sqrt(height * width / 2))
    rows, mirrored = torch.view_as_complex(quads).unbind(-1)
    edges = [0, width // 2] if width % 2 == 0 else [0]
    mirrored[..., edges] = rows[..., edges].conj()
    alone = [0, height // 2] if height % 2 == 0 else [0]
    for row in alone:
        rows[..., row, edges] = (rows[..., row, edges].real * math.sqrt(2)).to(rows.dtype)
    return torch.cat([rows, mirrored[..., 1 : (height + 1) // 2, :].flip(-2)], dim=-2)


# --- Triton ---


def launch(given: Inputs) -> Outputs:
    """The step by the Triton kernel; complex64 only. Raises ValueError for another dtype of z."""
    z = given.z.contiguous()
    if z.dtype != torch.complex64:
        raise ValueError(f"got z of {z.dtype}; the kernel's state is complex64")
    batch, channels, height, columns = z.shape
    diagonal = given.diagonal.contiguous()
    new = torch.empty_like(z)
    momentum = torch.empty_like(z) if given.u is not None else z.new_empty(0)
    lanes = (height // 2 + 1) * columns
    block = block_of(lanes, BLOCK)
    blocks = -(-lanes // block)
    partial = given.limit.new_zeros(batch, channels * blocks)
    if z.numel():
        views = [
            torch.view_as_real(part.resolve_conj().contiguous())
            for part in (z, z if given.u is None else given.u, given.grad, given.data, new, momentum)
        ]
        start(
            kernel, batch * channels * blocks, z,
            *views[:4], diagonal, given.table.contiguous(), given.limit.contiguous(),
            views[0] if given.counters is None else given.counters.contiguous(), *views[4:], partial,
            blocks, channels, height, columns, lanes, batch_stride(given.data, batch) * 2,
            0 if diagonal.ndim == 2 or len(diagonal) == 1 else height * columns,
            batch_stride(given.table, batch), batch_stride(given.limit, batch),
            math.sqrt(height * given.width / 2),
            MOMENTUM=given.u is not None, NOISE=given.counters is not None, EVEN=given.width % 2 == 0,
            BLOCK=block, num_warps=WARPS,
        )  # fmt: skip
    return new, momentum, partial.amax(1) if partial.numel() else partial.new_zeros(batch)


@jit
def _advance(  # type: ignore[no-untyped-def]
    z_ptr, u_ptr, grad_ptr, data_ptr, new_ptr, momentum_ptr, row, limit, start, data_start, at, inside, m, w,
    MOMENTUM: tl.constexpr, NOISE: tl.constexpr,
):  # fmt: skip
    """Advance the numbers `at` (real and imaginary parts); m, w of their shape. The largest modulus."""
    z = tl.load(z_ptr + start + at, mask=inside, other=0.0)
    grad = tl.load(grad_ptr + start + at, mask=inside, other=0.0)
    data = tl.load(data_ptr + data_start + at, mask=inside, other=0.0)
    level = tl.load(row)
    noise = tl.load(row + 1)
    data_gain = level / (m * level + noise)
    prior_gain = data_gain * (noise / level)
    pull = (data - m * z) * data_gain - grad * prior_gain
    new = z + tl.load(row + 2) * pull
    if MOMENTUM:
        u = tl.load(u_ptr + start + at, mask=inside, other=0.0)
        new += tl.load(row + 3) * u
        momentum = tl.load(row + 5) * pull + tl.load(row + 6) * u
    if NOISE:
        w = w * tl.sqrt(level * prior_gain)
        new += tl.load(row + 4) * w
        if MOMENTUM:
            momentum += tl.load(row + 7) * w
    modulus = tl.abs(new)
    within = modulus <= limit
    modulus = tl.where(modulus == modulus, modulus, float("inf"))
    tl.store(new_ptr + start + at, tl.where(within, new, z), mask=inside)
    if MOMENTUM:
        tl.store(momentum_ptr + start + at, tl.where(within, momentum, 0.0), mask=inside)
    return tl.max(tl.where(inside, modulus, 0.0))


@jit
def kernel(  # type: ignore[no-untyped-def]
    z_ptr, u_ptr, grad_ptr, data_ptr, diagonal_ptr, table_ptr, limit_ptr, counters_ptr, new_ptr, momentum_ptr,
    partial_ptr,
    blocks, channels, height, columns, lanes, data_stride, diagonal_stride, table_stride, limit_stride,
    deviation,
    MOMENTUM: tl.constexpr, NOISE: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    plane = tl.program_id(0) // blocks
    chain = plane // channels
    channel = plane % channels
    # A lane is a coefficient of the rows 0 .. H // 2 and, where it has one, its mirror row's.
    first = (tl.program_id(0) % blocks) * BLOCK
    lane = first + tl.arange(0, BLOCK)
    r = lane // columns
    c = lane - r * columns
    paired = (lane < lanes) & (r > 0) & (2 * r != height)
    # The rows of the lanes lie in one piece, 16 bytes a thread; of the mirror rows each coefficient does.
    flat = 2 * first + tl.arange(0, 2 * BLOCK)
    mirror = (height - r) * columns + c
    parts = 2 * mirror[:, None] + tl.arange(0, 2)[None, :]
    both = paired[:, None] & (tl.arange(0, 2)[None, :] >= 0)
    diagonal_ptr += channel * diagonal_stride
    m = tl.load(diagonal_ptr + flat // 2, mask=flat < 2 * lanes, other=0.0).to(tl.float32)
    m_mirror = tl.load(diagonal_ptr + mirror, mask=paired, other=0.0).to(tl.float32)[:, None]
    w = tl.zeros([2 * BLOCK], tl.float32)
    w_mirror = tl.zeros([BLOCK, 2], tl.float32)
    if NOISE:
        words = counters_ptr + chain * 4
        n0, n1, n2, n3 = philox_normals(
            channel * lanes + lane,
            tl.load(words), tl.load(words + 1), tl.load(words + 2), tl.load(words + 3),
        )  # fmt: skip
        edge = (c == 0) | (c == columns - 1) if EVEN else c == 0
        alone = edge & (paired == 0)
        w = deviation * tl.join(tl.where(alone, 1.4142135623730951 * n0, n0), tl.where(alone, 0.0, n1))
        w = w.reshape(2 * BLOCK)
        w_mirror = deviation * tl.join(tl.where(edge, n0, n2), tl.where(edge, -n1, n3))
    size = height * columns
    start = plane.to(tl.int64) * 2 * size
    data_start = chain.to(tl.int64) * data_stride + channel * 2 * size
    row = table_ptr + chain * table_stride
    limit = tl.load(limit_ptr + chain * limit_stride)
    if first + BLOCK <= lanes:  # a mask that ends within 16 bytes would halve every access
        largest = _advance(
            z_ptr, u_ptr, grad_ptr, data_ptr, new_ptr, momentum_ptr, row, limit, start, data_start, flat,
            tl.full([2 * BLOCK], True, tl.int1), m, w, MOMENTUM, NOISE,
        )  # fmt: skip
    else:
        largest = _advance(
            z_ptr, u_ptr, grad_ptr, data_ptr, new_ptr, momentum_ptr, row, limit, start, data_start, flat,
            flat < 2 * lanes, m, w, MOMENTUM, NOISE,
        )  # fmt: skip
    largest_mirror = _advance(
        z_ptr, u_ptr, grad_ptr, data_ptr, new_ptr, momentum_ptr, row, limit, start, data_start, parts, both,
        m_mirror, w_mirror, MOMENTUM, NOISE,
    )  # fmt: skip
    tl.store(partial_ptr + tl.program_id(0), tl.maximum(largest, largest_mirror))


def _variant(label: str, numbers: int, **options: bool) -> Variant:
    return Variant(
        name="spectral_step",
        label=label,
        kernel=kernel,
        constants={"MOMENTUM": False, "NOISE": False, "EVEN": True, "BLOCK": BLOCK} | options,
        elements=2 * BLOCK,
        minimum_bytes=8 * numbers + 4,
        types={"counters_ptr": "*i64", "deviation": "fp32"},
        aligned=frozenset({"height", "data_stride"}),
        warps=WARPS,
        scalar_stores=1,
    )


# Bytes: 8 for each coefficient read or written, 4 for the eigenvalue.
VARIANTS = [
    _variant("MAP: no noise, no momentum", 4),
    _variant("ALPS: noise", 4, NOISE=True),
    _variant("kinetic", 6, NOISE=True, MOMENTUM=True),
    _variant("kinetic, odd width", 6, NOISE=True, MOMENTUM=True, EVEN=False),
]
