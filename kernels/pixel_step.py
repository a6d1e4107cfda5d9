"""One Langevin step where A^T A is diagonal in the pixels: a single pass over memory.

Inpainting and denoising; also the k-space of complex images, as pixels of real and imaginary parts. See
step_weights.py for the step; here P_i = sigma^2 eta^2 / (m_i sigma^2 + eta^2) and
pull_i = P_i ((A^T y)_i / eta^2 - m_i x_i / eta^2 - G_i / sigma^2), m the diagonal of A^T A.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from alpenglow.kernels.philox import chain_normals, interleave4, philox_normals
from alpenglow.kernels.step_weights import Step, hold, per_image_columns
from alpenglow.kernels.triton_support import (
    Variant,
    batch_stride,
    jit,
    next_power_of_2,
    runs_on,
    tl,
    unused,
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
    pulled = J^T (x - psi), a = b = 1 is the plain form, NetworkPrior's is the one without cancellation.
    accept [B] bool and previous (x, grad, u): where a chain's proposal x was not accepted, it goes on from
    `previous`, its momentum flipped; `previous` is overwritten with what each chain went on from.
    moments (mean, m2, count [1 or B]): running moments of the new x, updated in place; count includes it.
    network_scale [1 or B] with network_dtype: also return x times scale, channels last, in that dtype.
    statistics: also return energy and squared gradient norm of each chain.

    A kernel on CUDA (float32), plain torch elsewhere; chains do not depend on each other, bit for bit.
    Source: DESIGN 2; running moments: Welford (1962).
    """
    mean, m2, count = moments or (None, None, None)
    x_before, grad_before, u_before = previous or (None, None, None)
    low = torch.empty(0, dtype=network_dtype or x.dtype)  # carries the dtype through the operator's schema
    new, momentum, sums, scaled = _pixel_step(
        x, u, grad, data, diagonal, table, limit, counters, pulled, grad_weights, accept, x_before, grad_before,
        u_before, mean, m2, count, network_scale, low.dtype,
    )  # fmt: skip
    return Step(
        new,
        None if u is None else momentum,
        sums[:, 0],
        sums[:, 1] if statistics else None,
        sums[:, 2] if statistics else None,
        None if network_scale is None else scaled,
    )


@torch.library.custom_op(
    "alpenglow::pixel_step", mutates_args=("x_before", "grad_before", "u_before", "mean", "m2")
)
def _pixel_step(
    x: Tensor,
    u: Tensor | None,
    grad: Tensor,
    data: Tensor,
    diagonal: Tensor,
    table: Tensor,
    limit: Tensor,
    counters: Tensor | None,
    pulled: Tensor | None,
    grad_weights: Tensor | None,
    accept: Tensor | None,
    x_before: Tensor | None,
    grad_before: Tensor | None,
    u_before: Tensor | None,
    mean: Tensor | None,
    m2: Tensor | None,
    count: Tensor | None,
    network_scale: Tensor | None,
    network_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    step = launch if runs_on(x) else twin
    return step(
        x, u, grad, data, diagonal, table, limit, counters, pulled, grad_weights, accept, x_before, grad_before,
        u_before, mean, m2, count, network_scale, network_dtype,
    )  # fmt: skip


@_pixel_step.register_fake
def _(x, u, grad, data, diagonal, table, limit, counters, pulled, grad_weights, accept, x_before, grad_before,
      u_before, mean, m2, count, network_scale, network_dtype):  # type: ignore[no-untyped-def]  # fmt: skip
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(x.shape if u is not None else 0),
        x.new_empty(len(x), STATISTICS),
        _network_input(x, network_scale, network_dtype),
    )


def _network_input(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Room for the network's input, channels last."""
    if scale is None:
        return torch.empty(0, dtype=dtype, device=x.device)
    layout = torch.channels_last if x.ndim == 4 else torch.contiguous_format
    return torch.empty(x.shape, dtype=dtype, device=x.device, memory_format=layout)


def twin(
    x: Tensor,
    u: Tensor | None,
    grad: Tensor,
    data: Tensor,
    diagonal: Tensor,
    table: Tensor,
    limit: Tensor,
    counters: Tensor | None,
    pulled: Tensor | None,
    grad_weights: Tensor | None,
    accept: Tensor | None,
    x_before: Tensor | None,
    grad_before: Tensor | None,
    u_before: Tensor | None,
    mean: Tensor | None,
    m2: Tensor | None,
    count: Tensor | None,
    network_scale: Tensor | None,
    network_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The step in plain torch, in the dtype of x; few temporaries, each of them reused."""
    ones = [1] * (x.ndim - 1)
    energy = x.new_zeros(len(x))
    if pulled is not None:
        assert grad_weights is not None
        energy = 0.5 * _sum_square(grad)
        a, b = grad_weights.to(x.dtype).reshape(-1, 2, *ones).unbind(1)
        grad = (grad * a).sub_(pulled * b)
    if accept is not None:
        assert x_before is not None and grad_before is not None
        chosen = accept.reshape(-1, *ones)
        x, grad = torch.where(chosen, x, x_before), torch.where(chosen, grad, grad_before)
        x_before.copy_(x)
        grad_before.copy_(grad)
        if u is not None:
            assert u_before is not None
            u = torch.where(chosen, u, -u_before)
            u_before.copy_(u)
    level, noise, z_pull, z_u, z_w, u_pull, u_u, u_w = per_image_columns(table, x)
    # At most a table of the size of one image where all chains are at one level.
    data_gain = level / (diagonal * level + noise)
    pull = (x * diagonal).neg_().add_(data).mul_(data_gain)
    prior_gain = data_gain.mul_(noise / level)
    pull.sub_(grad * prior_gain)
    new = (pull * z_pull).add_(x)
    momentum = x.new_empty(0)
    if u is not None:
        new.add_(u * z_u)
        momentum = (u * u_u).add_(pull.mul_(u_pull))
    if counters is not None:
        w = chain_normals(counters, tuple(x.shape[1:])).to(x.dtype).mul_(prior_gain.mul_(level).sqrt_())
        new.add_(w * z_w)
        if u is not None:
            momentum.add_(w.mul_(u_w))
    new, beyond, largest = hold(new, x, limit)
    if u is not None:
        momentum.masked_fill_(beyond, 0)
    if mean is not None:
        assert m2 is not None and count is not None
        change = new - mean
        mean.add_(change / count.to(x.dtype).reshape(-1, *ones))
        m2.add_(change.mul_(new - mean))
    scaled = _network_input(x, network_scale, network_dtype)
    if network_scale is not None:
        scaled.copy_(new * network_scale.to(x.dtype).reshape(-1, *ones))
    return new, momentum, torch.stack([largest, energy, _sum_square(grad)], dim=1), scaled


def _sum_square(x: Tensor) -> Tensor:
    return x.square().flatten(1).sum(1)


# --- Triton ---------------------------------------------------------------------------------------------------


def launch(
    x: Tensor,
    u: Tensor | None,
    grad: Tensor,
    data: Tensor,
    diagonal: Tensor,
    table: Tensor,
    limit: Tensor,
    counters: Tensor | None,
    pulled: Tensor | None,
    grad_weights: Tensor | None,
    accept: Tensor | None,
    x_before: Tensor | None,
    grad_before: Tensor | None,
    u_before: Tensor | None,
    mean: Tensor | None,
    m2: Tensor | None,
    count: Tensor | None,
    network_scale: Tensor | None,
    network_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The step by the Triton kernel; float32 only. Raises ValueError for another dtype of x."""
    if x.dtype != torch.float32:
        raise ValueError(f"got x of {x.dtype}; the kernel's state is float32")
    batch, size = len(x), x[:1].numel()
    x, grad, data = x.contiguous(), grad.contiguous(), data.contiguous()
    diagonal, per_chain = _repeated(diagonal, x, batch)
    new = torch.empty_like(x)
    momentum = torch.empty_like(x) if u is not None else unused(x)
    scaled = _network_input(x, network_scale, network_dtype)
    block = min(BLOCK, max(32, next_power_of_2(size)))
    blocks = -(-size // block)
    partial = x.new_zeros(batch, blocks, STATISTICS)
    if new.numel():
        none = unused(x)
        kernel[(batch * blocks,)](
            x, none if u is None else u.contiguous(), grad, none if pulled is None else pulled.contiguous(),
            data, diagonal, table.contiguous(), limit.contiguous(), none if counters is None else counters,
            none if grad_weights is None else grad_weights.contiguous(),
            none if accept is None else accept, *_or(none, x_before, grad_before, u_before, mean, m2, count),
            *_or(none, network_scale), new, momentum, scaled, partial,
            size, blocks, batch_stride(data, batch), per_chain, diagonal.numel() // len(diagonal),
            x.shape[1], table.stride(0) if len(table) > 1 else 0, int(len(limit) > 1),
            int(grad_weights is not None and len(grad_weights) > 1), int(count is not None and len(count) > 1),
            int(network_scale is not None and len(network_scale) > 1),
            MOMENTUM=u is not None, NOISE=counters is not None, PULLED=pulled is not None,
            METROPOLIS=accept is not None, MOMENTS=mean is not None, NETWORK=network_scale is not None,
            REPEATED=diagonal.numel() // len(diagonal) != size, BLOCK=block, num_warps=WARPS,
        )  # fmt: skip
    largest = partial[..., 0].amax(1) if blocks else partial.new_zeros(batch)
    return new, momentum, torch.cat([largest[:, None], partial[..., 1:].sum(1)], dim=1), scaled


def _or(none: Tensor, *given: Tensor | None) -> Sequence[Tensor]:
    """The tensors, `none` for each that is missing. Raises ValueError for one updated in place that has gaps."""
    for tensor in given:
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError("previous, moments and scales must be contiguous: they are updated in place")
    return [none if tensor is None else tensor for tensor in given]


def _repeated(diagonal: Tensor, x: Tensor, batch: int) -> tuple[Tensor, int]:
    """The diagonal as [1 or B, period], and the stride of its batch; period divides the size of an image."""
    if diagonal.ndim < x.ndim:
        diagonal = diagonal.reshape(1, *[1] * (x.ndim - 1 - diagonal.ndim), *diagonal.shape)
    trailing = diagonal.shape[1:]
    while trailing and trailing[0] == 1:
        trailing = trailing[1:]
    if trailing != x.shape[x.ndim - len(trailing) :]:  # not a plain repetition, such as one row for all rows
        diagonal = diagonal.expand(len(diagonal), *x.shape[1:])
    return diagonal.contiguous().view(len(diagonal), -1), batch_stride(diagonal, batch)


@jit
def kernel(
    x_ptr, u_ptr, grad_ptr, pulled_ptr, data_ptr, diagonal_ptr, table_ptr, limit_ptr, counters_ptr,
    grad_weights_ptr, accept_ptr, x_before_ptr, grad_before_ptr, u_before_ptr, mean_ptr, m2_ptr, count_ptr,
    network_scale_ptr, new_ptr, momentum_ptr, scaled_ptr, partial_ptr,
    size, blocks, data_stride, diagonal_stride, period, channels, table_stride, limit_stride,
    grad_weights_stride, count_stride, network_scale_stride,
    MOMENTUM: tl.constexpr, NOISE: tl.constexpr, PULLED: tl.constexpr, METROPOLIS: tl.constexpr,
    MOMENTS: tl.constexpr, NETWORK: tl.constexpr, REPEATED: tl.constexpr, BLOCK: tl.constexpr,
):  # type: ignore[no-untyped-def]  # fmt: skip
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
        a = tl.load(grad_weights_ptr + chain * 2 * grad_weights_stride)
        b = tl.load(grad_weights_ptr + chain * 2 * grad_weights_stride + 1)
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
    if REPEATED:
        place = at % period
    else:
        place = at
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
    "MOMENTUM": False, "NOISE": False, "PULLED": False, "METROPOLIS": False, "MOMENTS": False, "NETWORK": False,
    "REPEATED": False,
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


# Bytes: 4 for each float32 read or written; the mask is 1, A^T y is shared by all chains and counted all the same.
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
