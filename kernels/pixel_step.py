"""One Langevin step where A^T A is diagonal in the pixels: a single pass over memory.

Inpainting and denoising; also the k-space of complex images, as pixels of real and imaginary parts. See
step_weights.py for the step; here P_i = sigma^2 eta^2 / (m_i sigma^2 + eta^2) and
pull_i = P_i ((A^T y)_i / eta^2 - m_i x_i / eta^2 - G_i / sigma^2), m the diagonal of A^T A.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alpenglow.kernels.philox import chain_normals, interleave4, philox_normals
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

BLOCK = 1024
WARPS = 4
STATISTICS = 3  # largest modulus, energy, squared norm of the gradient


def pixel_step(
    x: Tensor,
    u: Tensor | None,
    grad: Tensor,
    data: Tensor,
    diagonal: Tensor,
    table: Tensor,
    limit: Tensor,
    counters: Tensor | None,
    *,
    pulled: Tensor | None = None,
    grad_weights: Tensor | None = None,
    accept: Tensor | None = None,
    previous: tuple[Tensor, Tensor, Tensor | None] | None = None,
    moments: tuple[Tensor, Tensor, Tensor] | None = None,
    network_scale: Tensor | None = None,
    network_dtype: torch.dtype | None = None,
    statistics: bool = False,
) -> Step:
    """One step of B chains.

    x: positions [B, ...]; u: momenta, or None for a step without; grad: G. data: A^T y [1 or B, ...];
    diagonal: m, real or bool, [1 or B, ...] whose last dimensions are those of x, repeated over the ones
    before (a mask for all channels, say). table [1 or B, COLUMNS]: see `step_weights.coefficients`.
    limit [1 or B]: elements of the new x beyond it are held at their old value. counters: of the noise, int64
    [B, 4] (`philox.chain_counters`), or None for a step without noise.

    pulled and grad_weights [1 or B, 2] (a, b): `grad` is then eps, and G = a eps - b pulled; eps = x - psi,
    pulled = J^T (x - psi), a = b = 1 is the plain form, without cancellation that of networks of form alps.
    accept [B] bool and previous (x, grad, u): where a chain's proposal x was not accepted, it goes on from
    `previous`, its momentum flipped; `previous` is overwritten with what each chain went on from.
    moments (mean, m2, count [1 or B]): running moments of the new x, updated in place; count includes it.
    network_scale [1 or B] with network_dtype: also return x times scale, channels last, in that dtype.
    statistics: also return energy and squared gradient norm of each chain.

    A kernel on CUDA (float32), plain torch elsewhere; chains do not depend on each other, bit for bit.
    Source: DESIGN 2; running moments: Welford (1962).
    """
    x_before, grad_before, u_before = previous or (None, None, None)
    mean, m2, visits = moments or (None, None, None)
    given = Inputs(
        x, u, grad, data, diagonal, table, limit, counters, pulled, grad_weights, accept, x_before,
        grad_before, u_before, mean, m2, visits, network_scale, network_dtype or x.dtype, statistics,
    )  # fmt: skip
    for name, tensor in (("u", u), ("grad", grad), ("pulled", pulled)):
        if tensor is not None and tensor.shape != x.shape:
            raise ValueError(
                f"got {name} {tuple(tensor.shape)} for x {tuple(x.shape)}; expected the same shape"
            )
    if data.shape[1:] != x.shape[1:]:
        raise ValueError(f"got data {tuple(data.shape)} for x {tuple(x.shape)}; expected images of one shape")
    for tensor in (*(previous or ()), *(moments or ())):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError("previous and moments must be contiguous: they are updated in place")
    new, momentum, sums, scaled = _operator(*given) if traced(x) else _run(given)
    return Step(
        new,
        None if u is None else momentum,
        sums[:, 0],
        sums[:, 1] if statistics else None,
        sums[:, 2] if statistics else None,
        None if network_scale is None else scaled,
    )


class Inputs(NamedTuple):
    """The arguments of the operator; see `pixel_step`."""

    x: Tensor
    u: Tensor | None
    grad: Tensor
    data: Tensor
    diagonal: Tensor
    table: Tensor
    limit: Tensor
    counters: Tensor | None
    pulled: Tensor | None
    grad_weights: Tensor | None
    accept: Tensor | None
    x_before: Tensor | None
    grad_before: Tensor | None
    u_before: Tensor | None
    mean: Tensor | None
    m2: Tensor | None
    visits: Tensor | None
    network_scale: Tensor | None
    network_dtype: torch.dtype
    statistics: bool


Outputs = tuple[Tensor, Tensor, Tensor, Tensor]
"""New x; new u (empty without momentum); STATISTICS numbers a chain [B, 3]; network input (empty without)."""


@torch.library.custom_op(
    "alpenglow::pixel_step",
    mutates_args=("x_before", "grad_before", "u_before", "mean", "m2"),
    schema="(Tensor x, Tensor? u, Tensor grad, Tensor data, Tensor diagonal, Tensor table, Tensor limit, "
    "Tensor? counters, Tensor? pulled, Tensor? grad_weights, Tensor? accept, Tensor(a!)? x_before, "
    "Tensor(b!)? grad_before, Tensor(c!)? u_before, Tensor(d!)? mean, Tensor(e!)? m2, Tensor? visits, "
    "Tensor? network_scale, ScalarType network_dtype, bool statistics) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _operator(*arguments: Any) -> Outputs:
    return _run(Inputs(*arguments))


def _run(given: Inputs) -> Outputs:
    return launch(given) if runs_on(given.x) else twin(given)


@_operator.register_fake
def _(*arguments: Any) -> Outputs:
    given = Inputs(*arguments)
    x = given.x
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(x.shape if given.u is not None else 0),
        x.new_empty(x.shape[0], STATISTICS),
        _network_input(given),
    )


def _network_input(given: Inputs) -> Tensor:
    """Room for the network's input, channels last."""
    x = given.x
    if given.network_scale is None:
        return x.new_empty(0, dtype=given.network_dtype)
    layout = torch.channels_last if x.ndim == 4 else torch.contiguous_format
    return torch.empty(x.shape, dtype=given.network_dtype, device=x.device, memory_format=layout)


def twin(given: Inputs) -> Outputs:
    """The step in plain torch, in the dtype of x."""
    x, u, grad = given.x, given.u, given.grad
    ones = [1] * (x.ndim - 1)
    sums = x.new_zeros(len(x), STATISTICS)
    if given.pulled is not None:
        assert given.grad_weights is not None
        if given.statistics:
            sums[:, 1] = 0.5 * _sum_square(grad)
        a, b = given.grad_weights.to(x.dtype).reshape(-1, 2, *ones).unbind(1)
        grad = (grad * a).sub_(given.pulled * b)
    if given.accept is not None:
        assert given.x_before is not None
        assert given.grad_before is not None
        chosen = given.accept.reshape(-1, *ones)
        x, grad = torch.where(chosen, x, given.x_before), torch.where(chosen, grad, given.grad_before)
        given.x_before.copy_(x)
        given.grad_before.copy_(grad)
        if u is not None:
            assert given.u_before is not None
            u = torch.where(chosen, u, -given.u_before)
            given.u_before.copy_(u)
    normals = None
    if given.counters is not None:
        normals = chain_normals(given.counters, tuple(x.shape[1:])).to(x.dtype)
    new, momentum = advance(x, u, grad, given.data, given.diagonal, given.table, normals)
    new, momentum, sums[:, 0] = hold(new, momentum, x, given.limit)
    if given.mean is not None:
        assert given.m2 is not None
        assert given.visits is not None
        change = new - given.mean
        given.mean.add_(change / given.visits.to(x.dtype).reshape(-1, *ones))
        given.m2.add_(change.mul_(new - given.mean))
    scaled = _network_input(given)
    if given.network_scale is not None:
        scaled.copy_(new * given.network_scale.to(x.dtype).reshape(-1, *ones))
    if given.statistics:
        sums[:, 2] = _sum_square(grad)
    return new, x.new_empty(0) if momentum is None else momentum, sums, scaled


def _sum_square(x: Tensor) -> Tensor:
    return x.square().flatten(1).sum(1)


# --- Triton ---


def launch(given: Inputs) -> Outputs:
    """The step by the Triton kernel; float32 only. Raises ValueError for another dtype of x."""
    x = given.x.contiguous()
    if x.dtype != torch.float32:
        raise ValueError(f"got x of {x.dtype}; the kernel's state is float32")
    batch, size = len(x), x[:1].numel()
    diagonal = _period(given.diagonal, x)
    new, scaled = torch.empty_like(x), _network_input(given)
    momentum = x.new_empty(x.shape if given.u is not None else 0)
    block = block_of(size, BLOCK)
    blocks = -(-size // block)
    partial = x.new_zeros(batch, blocks, STATISTICS)
    if new.numel():
        pointers = (
            x, given.u, given.grad, given.pulled, given.data, diagonal, given.table, given.limit,
            given.counters, given.grad_weights, given.accept, given.x_before, given.grad_before,
            given.u_before, given.mean, given.m2, given.visits, given.network_scale,
            new, momentum, scaled, partial,
        )  # fmt: skip
        start(
            kernel, batch * blocks, x,
            *(x if pointer is None else pointer.contiguous() for pointer in pointers[:-4]), *pointers[-4:],
            size, blocks, diagonal.shape[1], x.shape[1],
            *(batch_stride(each, batch) for each in (given.data, diagonal, given.table, given.limit)),
            *(0 if each is None else batch_stride(each, batch)
              for each in (given.grad_weights, given.visits, given.network_scale)),
            MOMENTUM=given.u is not None, NOISE=given.counters is not None, PULLED=given.pulled is not None,
            METROPOLIS=given.accept is not None, MOMENTS=given.mean is not None,
            NETWORK=given.network_scale is not None, REPEATED=diagonal.shape[1] != size, BLOCK=block,
            num_warps=WARPS,
        )  # fmt: skip
    largest = partial[..., 0].amax(1) if blocks else partial.new_zeros(batch)
    return new, momentum, torch.cat([largest[:, None], partial[..., 1:].sum(1)], dim=1), scaled


def _period(diagonal: Tensor, x: Tensor) -> Tensor:
    """The diagonal as [1 or B, period]: repeated, it is that of an image of x."""
    if diagonal.ndim < x.ndim:
        diagonal = diagonal[None]
    shape = diagonal.shape[1:]
    while shape and shape[0] == 1:
        shape = shape[1:]
    if shape != x.shape[x.ndim - len(shape) :]:  # another kind of broadcasting, one row for all rows say
        diagonal = diagonal.expand(len(diagonal), *x.shape[1:])
    return diagonal.reshape(len(diagonal), math.prod(diagonal.shape[1:]))


@jit
def kernel(  # type: ignore[no-untyped-def]
    x_ptr, u_ptr, grad_ptr, pulled_ptr, data_ptr, diagonal_ptr, table_ptr, limit_ptr, counters_ptr,
    grad_weights_ptr, accept_ptr, x_before_ptr, grad_before_ptr, u_before_ptr, mean_ptr, m2_ptr, count_ptr,
    network_scale_ptr, new_ptr, momentum_ptr, scaled_ptr, partial_ptr,
    size, blocks, period, channels, data_stride, diagonal_stride, table_stride, limit_stride,
    grad_weights_stride, count_stride, network_scale_stride,
    MOMENTUM: tl.constexpr, NOISE: tl.constexpr, PULLED: tl.constexpr, METROPOLIS: tl.constexpr,
    MOMENTS: tl.constexpr, NETWORK: tl.constexpr, REPEATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chain = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    start = chain.to(tl.int64) * size
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    x = tl.load(x_ptr + start + at, mask=inside, other=0.0)
    grad = tl.load(grad_ptr + start + at, mask=inside, other=0.0).to(tl.float32)
    energy = 0.0
    if PULLED:
        energy = 0.5 * tl.sum(grad * grad)
        pulled = tl.load(pulled_ptr + start + at, mask=inside, other=0.0).to(tl.float32)
        a = tl.load(grad_weights_ptr + chain * grad_weights_stride)
        b = tl.load(grad_weights_ptr + chain * grad_weights_stride + 1)
        grad = a * grad - b * pulled
    if MOMENTUM:
        u = tl.load(u_ptr + start + at, mask=inside, other=0.0)
    if METROPOLIS:
        accept = tl.load(accept_ptr + chain).to(tl.int1)
        x = tl.where(accept, x, tl.load(x_before_ptr + start + at, mask=inside, other=0.0))
        grad = tl.where(accept, grad, tl.load(grad_before_ptr + start + at, mask=inside, other=0.0))
        tl.store(x_before_ptr + start + at, x, mask=inside)
        tl.store(grad_before_ptr + start + at, grad, mask=inside)
        if MOMENTUM:
            u = tl.where(accept, u, -tl.load(u_before_ptr + start + at, mask=inside, other=0.0))
            tl.store(u_before_ptr + start + at, u, mask=inside)

    row = table_ptr + chain * table_stride
    level = tl.load(row)
    noise = tl.load(row + 1)
    data = tl.load(data_ptr + chain.to(tl.int64) * data_stride + at, mask=inside, other=0.0)
    place = at % period if REPEATED else at
    m = tl.load(diagonal_ptr + chain.to(tl.int64) * diagonal_stride + place, mask=inside, other=0.0)
    m = m.to(tl.float32)
    data_gain = level / (m * level + noise)
    prior_gain = data_gain * (noise / level)
    pull = (data - m * x) * data_gain - grad * prior_gain
    new = x + tl.load(row + 2) * pull
    if MOMENTUM:
        new += tl.load(row + 3) * u
        momentum = tl.load(row + 5) * pull + tl.load(row + 6) * u
    if NOISE:
        words = counters_ptr + chain * 4
        quad = block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
        n0, n1, n2, n3 = philox_normals(
            quad, tl.load(words), tl.load(words + 1), tl.load(words + 2), tl.load(words + 3)
        )
        w = interleave4(n0, n1, n2, n3, BLOCK) * tl.sqrt(level * prior_gain)
        new += tl.load(row + 4) * w
        if MOMENTUM:
            momentum += tl.load(row + 7) * w

    # NaN compares false: it counts as beyond every limit, and as infinite.
    modulus = tl.abs(new)
    within = modulus <= tl.load(limit_ptr + chain * limit_stride)
    modulus = tl.where(modulus == modulus, modulus, float("inf"))
    new = tl.where(within, new, x)
    tl.store(new_ptr + start + at, new, mask=inside)
    if MOMENTUM:
        tl.store(momentum_ptr + start + at, tl.where(within, momentum, 0.0), mask=inside)
    if MOMENTS:
        mean = tl.load(mean_ptr + start + at, mask=inside, other=0.0)
        m2 = tl.load(m2_ptr + start + at, mask=inside, other=0.0)
        change = new - mean
        mean += change / tl.load(count_ptr + chain * count_stride)
        tl.store(mean_ptr + start + at, mean, mask=inside)
        tl.store(m2_ptr + start + at, m2 + change * (new - mean), mask=inside)
    if NETWORK:
        plane = size // channels
        last = (at % plane) * channels + at // plane
        scaled = new * tl.load(network_scale_ptr + chain * network_scale_stride)
        tl.store(scaled_ptr + start + last, scaled.to(scaled_ptr.dtype.element_ty), mask=inside)
    out = partial_ptr + tl.program_id(0) * 3
    tl.store(out, tl.max(tl.where(inside, modulus, 0.0)))
    tl.store(out + 1, energy)
    tl.store(out + 2, tl.sum(grad * grad))


_OFF = {
    "MOMENTUM": False, "NOISE": False, "PULLED": False, "METROPOLIS": False, "MOMENTS": False,
    "NETWORK": False, "REPEATED": False,
}  # fmt: skip


def _variant(label: str, minimum_bytes: float, *on: str, network: str = "*fp16") -> Variant:
    return Variant(
        name="pixel_step",
        label=label,
        kernel=kernel,
        constants=_OFF | dict.fromkeys(on, True) | {"BLOCK": BLOCK},
        elements=BLOCK,
        minimum_bytes=minimum_bytes,
        types={
            "diagonal_ptr": "*i1", "counters_ptr": "*i64", "accept_ptr": "*i1", "scaled_ptr": network,
        },
        aligned=frozenset({"size", "data_stride", "diagonal_stride", "period"}),
        warps=WARPS,
        scalar_stores=STATISTICS,
    )  # fmt: skip


# Bytes: 4 for each float32 read or written; the mask is 1. A^T y, shared by all chains, is counted as well.
VARIANTS = [
    _variant("MAP: no noise, no momentum", 4 * 4 + 1),
    _variant("ALPS: noise", 4 * 4 + 1, "NOISE"),
    _variant("kinetic", 6 * 4 + 1, "NOISE", "MOMENTUM"),
    _variant("kinetic, one mask for all channels", 6 * 4 + 1, "NOISE", "MOMENTUM", "REPEATED"),
    _variant(
        "kinetic, eps and J^T eps, float16 input", 7 * 4 + 1 + 2, "NOISE", "MOMENTUM", "PULLED", "NETWORK"
    ),
    _variant("kinetic, running moments", 10 * 4 + 1, "NOISE", "MOMENTUM", "MOMENTS"),
    _variant("Metropolis", 12 * 4 + 1, "NOISE", "MOMENTUM", "METROPOLIS"),
]
