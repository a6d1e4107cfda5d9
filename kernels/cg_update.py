"""The vector updates and inner products of batched conjugate gradients, with scalars that stay on the device.

An iteration for directions d, images q = A d, residuals r and a preconditioner z = M r (or z = r) is

    alpha = rho / <d, q>;  r <- r - alpha q;                        `cg_residual`
    rho' = <r, z>;  x <- x + alpha d;  d <- z + (rho' / rho) d      `cg_direction`

x waits until d is read anyway, so an iteration moves 10 numbers an element (<d, q> reads 2, the residual
moves 3, x and d move 5), 12 with a preconditioner, where the usual order moves 11 and 13. Below that, one
pass for all (7 numbers), an image must fit on chip, or the norms come from recurrences, which lose their
digits to cancellation.

Every inner product is a sum over blocks and then over the blocks' sums, in an order that the size of an image
fixes: an image has the same bits in every batch. Source: Saad, Iterative Methods for Sparse Linear Systems
(2003), algorithm 9.1.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from alpenglow.kernels.triton_support import (
    Variant,
    block_of,
    jit,
    next_power_of_2,
    runs_on,
    start,
    tl,
    traced,
    unused,
)

BLOCK = 2048
WARPS = 4
CHUNK = 1 << 18  # elements whose temporaries a CPU's cache holds
RUNNING = 256

RHO, SQUARED, LIMIT, ACTIVE, ITERATIONS = range(5)
"""Columns of the scalars [B, 5] of a solve, in the dtype of its vectors: <r, z>, ||r||^2, the norm of r at
which an image is done, 1 while it is not (else 0: it is left untouched), and its iterations so far."""


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products [B] of the real images a and b [B, ...], bitwise the same in every batch."""
    return _dot(a, b) if traced(a) else _run_dot(a, b)


def cg_start(r: Tensor, z: Tensor, limit: Tensor) -> Tensor:
    """The scalars [B, 5] of a solve that starts from residuals r, z = M r [B, ...]; limit [B]: see LIMIT."""
    squared = dot(r, r)
    rho = squared if z is r else dot(r, z)
    active = ~(squared.sqrt() <= limit)  # so that NaN is not taken for convergence
    return torch.stack([rho, squared, limit, active.to(r.dtype), torch.zeros_like(rho)], dim=1)


def cg_residual(r: Tensor, d: Tensor, q: Tensor, scalars: Tensor) -> Tensor:
    """r <- r - alpha q, in place; r, d, q = A d: real [B, ...]; scalars: [B, 5].

    An image whose <d, q> is not positive is left untouched: A is not positive definite there, or holds NaN.
    Returns the sums that `cg_direction` needs. Raises ValueError for shapes that differ and for an r that is
    not contiguous.
    """
    _check(r, (r,), (d, q))
    return (_residual if traced(r) else _run_residual)(r, d, q, scalars)


def cg_direction(x: Tensor, d: Tensor, r: Tensor, z: Tensor, scalars: Tensor, sums: Tensor) -> Tensor:
    """x <- x + alpha d, then d <- z + beta d, in place; the scalars [B, 5] of the next iteration.

    x, d, r, z: real [B, ...], z the preconditioned residual or r itself; scalars: those that `cg_residual`
    took; sums: what it returned. Raises ValueError as it does.
    """
    _check(r, (x, d), (z,))
    direction = _direction if traced(r) else _run_direction
    return direction(x, d, r, None if z is r else z, scalars, sums)


def _check(r: Tensor, changed: tuple[Tensor, ...], read: tuple[Tensor, ...]) -> None:
    for tensor in (*changed, *read):
        if tensor.shape != r.shape or tensor.dtype != r.dtype:
            raise ValueError(
                f"got {tuple(tensor.shape)} of {tensor.dtype} for residuals {tuple(r.shape)} of {r.dtype}; "
                "the operator and the preconditioner must keep shape and dtype"
            )
    if not all(tensor.is_contiguous() for tensor in changed):
        raise ValueError("x, r and d must be contiguous: they are updated in place")


def _fused(x: Tensor) -> bool:
    return runs_on(x) and x.dtype == torch.float32


# --- Operators ---


@torch.library.custom_op("alpenglow::cg_dot", mutates_args=())
def _dot(a: Tensor, b: Tensor) -> Tensor:
    return _run_dot(a, b).clone()  # not a view into running sums


def _run_dot(a: Tensor, b: Tensor) -> Tensor:
    return (launch_dot if _fused(a) else twin_dot)(a, b)


@_dot.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(len(a))


@torch.library.custom_op("alpenglow::cg_residual", mutates_args=("r",))
def _residual(r: Tensor, d: Tensor, q: Tensor, scalars: Tensor) -> Tensor:
    return _run_residual(r, d, q, scalars)


def _run_residual(r: Tensor, d: Tensor, q: Tensor, scalars: Tensor) -> Tensor:
    return (launch_residual if _fused(r) else twin_residual)(r, d, q, scalars)


@_residual.register_fake
def _(r: Tensor, d: Tensor, q: Tensor, scalars: Tensor) -> Tensor:
    return r.new_empty(len(r), 2, _blocks(r)[1] if _fused(r) else 1)


@torch.library.custom_op("alpenglow::cg_direction", mutates_args=("x", "d"))
def _direction(x: Tensor, d: Tensor, r: Tensor, z: Tensor | None, scalars: Tensor, sums: Tensor) -> Tensor:
    return _run_direction(x, d, r, z, scalars, sums)


def _run_direction(
    x: Tensor, d: Tensor, r: Tensor, z: Tensor | None, scalars: Tensor, sums: Tensor
) -> Tensor:
    return (launch_direction if _fused(r) else twin_direction)(x, d, r, z, scalars, sums)


@_direction.register_fake
def _(x: Tensor, d: Tensor, r: Tensor, z: Tensor | None, scalars: Tensor, sums: Tensor) -> Tensor:
    return torch.empty_like(scalars)


# --- Plain torch ---


def twin_dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products [B]; halves are added until few numbers are left.

    torch's sums and dot products choose their order of summation by the number of images and of threads;
    elementwise addition has no order to choose.
    """
    sums = [_folded(*part) for part in _chunks(a, b)]
    return sums[0] if len(sums) == 1 else torch.cat(sums)


def twin_residual(r: Tensor, d: Tensor, q: Tensor, scalars: Tensor) -> Tensor:
    """See `cg_residual`; the sums are [B, 2, 1]: <d, q> and the new ||r||^2."""
    curvature = twin_dot(d, q)
    going, alpha = _length(scalars, curvature)
    all_go = _all(going)
    squared = []
    for r_part, q_part, alpha_part, going_part in _chunks(r, q, _spread(alpha, r), _spread(going, r)):
        change = q_part * alpha_part
        r_part.sub_(change if all_go else change.masked_fill_(~going_part, 0))
        squared.append(_folded(r_part, r_part))
    return torch.stack([curvature, squared[0] if len(squared) == 1 else torch.cat(squared)], dim=1)[..., None]


def twin_direction(
    x: Tensor, d: Tensor, r: Tensor, z: Tensor | None, scalars: Tensor, sums: Tensor
) -> Tensor:
    """See `cg_direction`."""
    rho, squared, limit, _, iterations = scalars.unbind(1)
    curvature, squared_next = sums[..., 0].unbind(1)
    going, alpha = _length(scalars, curvature)
    rho_next = squared_next if z is None else twin_dot(r, z)
    beta = rho_next / rho
    all_go = _all(going)
    if not all_go:
        squared_next = torch.where(going, squared_next, squared)
        rho_next, beta = torch.where(going, rho_next, rho), torch.where(going, beta, 1)
    scaled = (_spread(each, d) for each in (alpha, beta, going))
    for x_part, d_part, z_part, alpha_part, beta_part, going_part in _chunks(
        x, d, r if z is None else z, *scaled
    ):
        change = d_part * alpha_part
        if not all_go:
            change.masked_fill_(~going_part, 0)
            z_part = z_part.masked_fill(~going_part, 0)
        x_part.add_(change)
        d_part.mul_(beta_part).add_(z_part)
    active = going & ~(squared_next.sqrt() <= limit)
    return torch.stack([rho_next, squared_next, limit, active.to(x.dtype), iterations + going], dim=1)


def _length(scalars: Tensor, curvature: Tensor) -> tuple[Tensor, Tensor]:
    """(which images go on [B], alpha [B], which is 0 for the others)."""
    going = (scalars[:, ACTIVE] > 0) & (curvature > 0)
    return going, torch.where(going, scalars[:, RHO] / curvature, 0)


def _all(going: Tensor) -> bool:
    """Whether no image is done, so that none needs a guard against its NaN. Only a CPU may look."""
    return going.device.type == "cpu" and bool(going.all())


def _folded(a: Tensor, b: Tensor) -> Tensor:
    terms = (a * b).flatten(1)
    # A running sum has one order too, but only on a CPU.
    enough = RUNNING if terms.device.type == "cpu" else 1
    while (count := terms.shape[1]) > enough:
        half = count // 2
        folded = terms.narrow(1, 0, half).add_(terms.narrow(1, half, half))
        if count % 2:
            folded.narrow(1, 0, 1).add_(terms.narrow(1, count - 1, 1))
        terms = folded
    return terms.cumsum(1)[:, -1] if terms.shape[1] else terms.new_zeros(len(terms))


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Images few enough for a cache to hold the temporaries of each chunk; of the first tensor's size."""
    images = max(1, CHUNK // max(1, tensors[0].shape[1:].numel()))
    if images >= len(tensors[0]):
        return iter([tensors])
    return zip(*(tensor.split(images) for tensor in tensors), strict=True)


def _spread(scalars: Tensor, like: Tensor) -> Tensor:
    """Scalars [B] as [B, 1, ...], to multiply `like`."""
    return scalars.reshape(-1, *[1] * (like.ndim - 1))


# --- Triton ---


def launch_dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products [B] by the Triton kernels; float32."""
    total, partial = a.new_zeros(len(a)), _partial(a)
    if a.numel():
        _, blocks = _blocks(a)
        _run(dot_kernel, a, a.contiguous(), b.contiguous(), unused(a), partial, blocks, FROZEN=False)
        constants = {"PARTIALS": next_power_of_2(blocks), "num_warps": WARPS}
        start(sum_kernel, len(a), a, partial, total, blocks, **constants)
    return total


def launch_residual(r: Tensor, d: Tensor, q: Tensor, scalars: Tensor) -> Tensor:
    """See `cg_residual`; by the Triton kernels, float32. The sums are [B, 2, blocks]."""
    _, blocks = _blocks(r)
    sums = r.new_empty(len(r), 2, blocks)
    if r.numel():
        scalars, q = scalars.contiguous(), q.contiguous()
        _run(dot_kernel, r, d.contiguous(), q, scalars, sums, 2 * blocks, FROZEN=True)
        _run(residual_kernel, r, r, q, scalars, sums, PARTIALS=next_power_of_2(blocks))
    return sums


def launch_direction(
    x: Tensor, d: Tensor, r: Tensor, z: Tensor | None, scalars: Tensor, sums: Tensor
) -> Tensor:
    """See `cg_direction`; by the Triton kernels, float32."""
    _, blocks = _blocks(r)
    scalars, r = scalars.contiguous(), r.contiguous()
    following = scalars.clone()
    if r.numel():
        rho_sums = unused(r)
        if z is not None:
            z, rho_sums = z.contiguous(), _partial(r)
            _run(dot_kernel, r, r, z, scalars, rho_sums, blocks, FROZEN=True)
        _run(
            direction_kernel, r, x, d, r if z is None else z, scalars, sums, rho_sums, following,
            PRECONDITIONED=z is not None, PARTIALS=next_power_of_2(blocks),
        )  # fmt: skip
    return following


def _blocks(x: Tensor) -> tuple[int, int]:
    """(elements, number) of the blocks of an image of x [B, ...]."""
    size = x.shape[1:].numel()
    block = block_of(size, BLOCK)
    return block, -(-size // block)


def _partial(x: Tensor) -> Tensor:
    return x.new_empty(len(x), _blocks(x)[1])


def _run(kernel: Any, like: Tensor, *arguments: Any, **constants: Any) -> None:
    """One program for every block of every image of `like`."""
    block, blocks = _blocks(like)
    start(
        kernel,
        len(like) * blocks,
        like,
        *arguments,
        like.shape[1:].numel(),
        blocks,
        BLOCK=block,
        num_warps=WARPS,
        **constants,
    )


@jit
def _place(size, blocks, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """(chain, block, offset of the image, offsets [BLOCK] in it)"""
    chain = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    return chain, block, chain.to(tl.int64) * size, block * BLOCK + tl.arange(0, BLOCK)


@jit
def _total(partial_ptr, blocks, PARTIALS: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, PARTIALS)
    return tl.sum(tl.load(partial_ptr + at, mask=at < blocks, other=0.0))


@jit
def dot_kernel(  # type: ignore[no-untyped-def]
    a_ptr, b_ptr, scalars_ptr, partial_ptr, partial_stride, size, blocks,
    FROZEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chain, block, start, at = _place(size, blocks, BLOCK)
    if FROZEN:
        size = tl.where(tl.load(scalars_ptr + chain * 5 + 3) != 0.0, size, 0)
    inside = at < size
    at += start
    a = tl.load(a_ptr + at, mask=inside, other=0.0)
    b = tl.load(b_ptr + at, mask=inside, other=0.0)
    tl.store(partial_ptr + chain * partial_stride + block, tl.sum(a * b))


@jit
def sum_kernel(partial_ptr, total_ptr, blocks, PARTIALS: tl.constexpr):  # type: ignore[no-untyped-def]
    chain = tl.program_id(0)
    tl.store(total_ptr + chain, _total(partial_ptr + chain * blocks, blocks, PARTIALS))


@jit
def _step(scalars_ptr, sums_ptr, blocks, PARTIALS: tl.constexpr):  # type: ignore[no-untyped-def]
    """(rho, whether the image goes on, alpha), the same in every program that asks for them."""
    rho = tl.load(scalars_ptr)
    curvature = _total(sums_ptr, blocks, PARTIALS)
    going = (tl.load(scalars_ptr + 3) != 0.0) & (curvature > 0.0)
    return rho, going, tl.where(going, rho / tl.where(going, curvature, 1.0), 0.0)


@jit
def residual_kernel(  # type: ignore[no-untyped-def]
    r_ptr, q_ptr, scalars_ptr, sums_ptr, size, blocks, PARTIALS: tl.constexpr, BLOCK: tl.constexpr
):
    chain, block, start, at = _place(size, blocks, BLOCK)
    sums_ptr += chain * 2 * blocks
    _, going, alpha = _step(scalars_ptr + chain * 5, sums_ptr, blocks, PARTIALS)
    inside = at < tl.where(going, size, 0)
    at += start
    q = tl.load(q_ptr + at, mask=inside, other=0.0)
    r = tl.load(r_ptr + at, mask=inside, other=0.0) - alpha * q
    tl.store(r_ptr + at, r, mask=inside)
    tl.store(sums_ptr + blocks + block, tl.sum(r * r))


@jit
def direction_kernel(  # type: ignore[no-untyped-def]
    x_ptr, d_ptr, z_ptr, scalars_ptr, sums_ptr, rho_sums_ptr, following_ptr, size, blocks,
    PRECONDITIONED: tl.constexpr, PARTIALS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chain, block, start, at = _place(size, blocks, BLOCK)
    scalars_ptr += chain * 5
    sums_ptr += chain * 2 * blocks
    rho, going, alpha = _step(scalars_ptr, sums_ptr, blocks, PARTIALS)
    squared = _total(sums_ptr + blocks, blocks, PARTIALS)
    rho_next = squared
    if PRECONDITIONED:
        rho_next = _total(rho_sums_ptr + chain * blocks, blocks, PARTIALS)
    inside = at < tl.where(going, size, 0)
    at += start
    d = tl.load(d_ptr + at, mask=inside, other=0.0)
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    z = tl.load(z_ptr + at, mask=inside, other=0.0)
    tl.store(x_ptr + at, x + alpha * d, mask=inside)
    tl.store(d_ptr + at, z + rho_next / rho * d, mask=inside)
    # The other programs of this image read the scalars, so the next ones have a place of their own.
    if (block == 0) & going:
        following_ptr += chain * 5
        done = tl.sqrt_rn(squared) <= tl.load(scalars_ptr + 2)
        tl.store(following_ptr, rho_next)
        tl.store(following_ptr + 1, squared)
        tl.store(following_ptr + 3, tl.where(done, 0.0, 1.0))
        tl.store(following_ptr + 4, tl.load(scalars_ptr + 4) + 1.0)
    elif block == 0:
        tl.store(following_ptr + chain * 5 + 3, 0.0)


_PARTIALS = 128  # of 2 x 320 x 320: 100 blocks


def _variant(label: str, kernel: Any, numbers: int, scalar_stores: int, **constants: bool) -> Variant:
    sums = {} if kernel is dot_kernel else {"PARTIALS": _PARTIALS}
    return Variant(
        name="cg_update",
        label=label,
        kernel=kernel,
        constants={"BLOCK": BLOCK, **sums, **constants},
        elements=BLOCK,
        minimum_bytes=4 * numbers,
        aligned=frozenset({"size"}),
        warps=WARPS,
        scalar_stores=scalar_stores,
    )


# Bytes: 4 for each number an element; sums over blocks are read again, a few bytes more.
VARIANTS = [
    _variant("<d, q>", dot_kernel, 2, 1, FROZEN=True),
    _variant("r and its norm", residual_kernel, 3, 1),
    _variant("x and d", direction_kernel, 5, 5, PRECONDITIONED=False),
    _variant("x and d, preconditioned", direction_kernel, 5, 5, PRECONDITIONED=True),
]
