"""Group normalisation and SiLU in one kernel, and their derivative with respect to the image in another.

The UNets of EDM normalise before every convolution. Sampling holds the weights fixed, so the derivative is
that of the image alone and needs no more than x, which the convolution before keeps anyway, and two numbers a
group: with xhat = (x - mean) rstd, z = weight xhat + bias, s = sigmoid(z) and
g = weight s (1 + z (1 - s)) dy,

    dx = rstd (g - mean(g) - xhat mean(g xhat)),    means over the group.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alpenglow.kernels.triton_support import (
    Variant,
    batch_stride,
    jit,
    next_power_of_2,
    runs_on,
    start,
    tl,
    unused,
)

WHOLE = 16384  # elements of the largest tile that a program keeps in registers; beyond, it reads twice
LOOP = 4096
ELEMENTS_A_THREAD = 16
SECTOR = 32  # bytes that memory moves at least


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    silu: bool = True,
    shift: Tensor | None = None,
) -> Tensor:
    """silu(weight * normalised + bias), x [B, C, H, W] normalised over each of `groups` groups of channels.

    weight, bias: [C]. shift [1 or B, C] is added to x first. Without `silu`, the normalisation alone.

    Kernels on CUDA, where the result keeps the memory format of x (contiguous or channels last) and
    statistics are float32. They have a first derivative, with respect to x: where weight, bias or shift
    require grad, in float64 and on other devices it is `composition`. Source: Wu and He 2018, arXiv
    1803.08494. Raises ValueError for shapes that do not fit.
    """
    channels = x.shape[1] if x.ndim == 4 else 0
    if not channels or channels % groups or weight.shape != (channels,) or bias.shape != (channels,):
        raise ValueError(
            f"got x {tuple(x.shape)}, {groups} groups, weight {tuple(weight.shape)}, "
            f"bias {tuple(bias.shape)}; expected [B, C, H, W], a divisor of C, [C] and [C]"
        )
    trained = any(t is not None and t.requires_grad for t in (weight, bias, shift))
    if trained or not _fused(x):
        return composition(x, groups, weight, bias, eps, silu=silu, shift=shift)
    return _forward(x, weight, bias, shift, groups, eps, silu)[0]


def composition(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    silu: bool = True,
    shift: Tensor | None = None,
) -> Tensor:
    """The same of torch's own operators, which have all derivatives; sums and weights in the dtype of x."""
    if shift is not None:
        x = x + shift[:, :, None, None].to(x.dtype)
    z = F.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    return F.silu(z) if silu else z


def _fused(x: Tensor) -> bool:
    return runs_on(x) and x.dtype != torch.float64


def _layout(x: Tensor) -> torch.memory_format:
    """What the result is stored as; an x with gaps is copied to it."""
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _wide(x: Tensor) -> torch.dtype:
    """Of the statistics."""
    return torch.promote_types(x.dtype, torch.float32)


# --- Operators ---


@torch.library.custom_op("alpenglow::group_norm_silu", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, mean [B, groups] and 1 / standard deviation [B, groups]."""
    return (launch if _fused(x) else twin)(x, weight, bias, shift, groups, eps, silu)


@_forward.register_fake
def _(x, weight, bias, shift, groups, eps, silu):  # type: ignore[no-untyped-def]
    statistic = x.new_empty(x.shape[0], groups, dtype=_wide(x))  # len() would fix the batch of a trace
    return torch.empty_like(x, memory_format=_layout(x)), statistic, torch.empty_like(statistic)


@torch.library.custom_op("alpenglow::group_norm_silu_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    silu: bool,
) -> Tensor:
    """The derivative with respect to x from `grad`, the one with respect to the result."""
    step = launch_backward if _fused(x) else twin_backward
    return step(grad, x, weight, bias, shift, mean, rstd, silu)


@_backward.register_fake
def _(grad, x, weight, bias, shift, mean, rstd, silu):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=_layout(x))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, shift, _, _, ctx.silu = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, bias, shift, mean, rstd)


def _first_derivative(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    return _backward(grad, *ctx.saved_tensors, ctx.silu), None, None, None, None, None, None


def _second_derivative(ctx: Any, *_: Tensor) -> None:
    raise RuntimeError(
        "the kernel of group_norm_silu has no second derivative; let the weights require grad, or call "
        "group_norm_silu.composition"
    )


_forward.register_autograd(_first_derivative, setup_context=_keep)
_backward.register_autograd(_second_derivative)


# --- Plain torch ---


def twin(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(result, mean, rstd) in plain torch; computes in float32, or in float64 where x is."""
    batch, channels, height, width = x.shape
    # Contiguous: with channels last torch subtracts squares, which costs digits.
    z, mean, rstd = torch.native_group_norm(
        _shifted(x, shift).contiguous(),
        weight.to(_wide(x)),
        bias.to(_wide(x)),
        batch,
        channels,
        height * width,
        groups,
        eps,
    )
    y = F.silu(z) if silu else z
    return y.to(x.dtype).contiguous(memory_format=_layout(x)), mean, rstd


def twin_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    silu: bool,
) -> Tensor:
    """dx in plain torch, by the formula at the head of this file."""
    groups = mean.shape[1]
    grouped = (len(x), groups, x.shape[1] // groups, x.shape[2] * x.shape[3])
    mean, rstd = mean[:, :, None, None], rstd[:, :, None, None]
    weight, bias = (values.to(_wide(x)).view(groups, -1, 1) for values in (weight, bias))
    xhat = (_shifted(x, shift).reshape(grouped) - mean).mul_(rstd)
    g = grad.to(_wide(x)).reshape(grouped)
    if silu:
        g = torch.ops.aten.silu_backward(g, xhat * weight + bias)
    g = g * weight
    along = (g * xhat).mean((2, 3), keepdim=True)
    dx = (g - g.mean((2, 3), keepdim=True)).sub_(xhat.mul_(along)).mul_(rstd)
    return dx.view(x.shape).to(x.dtype).contiguous(memory_format=_layout(x))


def _shifted(x: Tensor, shift: Tensor | None) -> Tensor:
    return x.to(_wide(x)) if shift is None else x.to(_wide(x)) + shift[:, :, None, None].to(_wide(x))


# --- Triton ---


def tile(
    pixels: int, per_group: int, groups: int, *, channels_last: bool, itemsize: int
) -> tuple[dict[str, int | bool], int]:
    """What one program of the kernels works on, as their constants, and its number of warps.

    A tile is PIXELS x (GROUPS * PADDED): all channels of GROUPS groups, each padded to a power of 2. A
    program has one group, or, with channels last, as many as it takes for their channels of a pixel to fill a
    sector.
    """
    together = 1
    while channels_last and together * per_group * itemsize < SECTOR and groups % (2 * together) == 0:
        together *= 2
    padded = next_power_of_2(per_group)
    rows = next_power_of_2(pixels)
    whole = rows * padded * together <= WHOLE
    if not whole:
        rows = max(1, LOOP // (padded * together))
    constants: dict[str, int | bool] = {
        "CHANNELS_LAST": channels_last, "PER_GROUP": per_group, "PADDED": padded, "GROUPS": together,
        "PIXELS": rows, "WHOLE": whole,
    }  # fmt: skip
    return constants, min(16, max(1, rows * padded * together // (32 * ELEMENTS_A_THREAD)))


def launch(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(result, mean, rstd) by the Triton kernel."""
    y = torch.empty_like(x, memory_format=_layout(x))
    mean = x.new_empty(len(x), groups, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    _run(forward_kernel, x, weight, bias, shift, (y, mean, rstd), (float(eps),), silu, groups)
    return y, mean, rstd


def launch_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    silu: bool,
) -> Tensor:
    """dx by the Triton kernel."""
    dx = torch.empty_like(x, memory_format=_layout(x))
    grad = grad.contiguous(memory_format=_layout(x))
    _run(backward_kernel, x, weight, bias, shift, (mean, rstd, grad, dx), (), silu, mean.shape[1])
    return dx


def _run(
    kernel: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    tensors: tuple[Tensor, ...],
    numbers: tuple[float, ...],
    silu: bool,
    groups: int,
) -> None:
    batch, channels, height, width = x.shape
    layout = _layout(x)
    constants, warps = tile(
        height * width,
        channels // groups,
        groups,
        channels_last=layout == torch.channels_last,
        itemsize=x.itemsize,
    )
    blocks = groups // constants["GROUPS"]
    if x.numel():
        start(
            kernel, batch * blocks, x,
            x.contiguous(memory_format=layout), weight.contiguous(), bias.contiguous(),
            unused(x) if shift is None else shift.contiguous(), *tensors, *numbers,
            height * width, channels, blocks, 0 if shift is None else batch_stride(shift, batch),
            SILU=silu, SHIFT=shift is not None, **constants, num_warps=warps,
        )  # fmt: skip


@jit
def _tile(  # type: ignore[no-untyped-def]
    pixels, channels, blocks, CHANNELS_LAST: tl.constexpr, PER_GROUP: tl.constexpr, PADDED: tl.constexpr,
    GROUPS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """(first group, channels [COLUMNS], offsets [PIXELS, COLUMNS], that of a pixel, pixels of a column).

    COLUMNS is GROUPS * PADDED; the columns that pad have no pixels.
    """
    first = tl.program_id(0) % blocks * GROUPS
    column = tl.arange(0, GROUPS * PADDED)
    channel = first * PER_GROUP + column - column // PADDED * (PADDED - PER_GROUP)
    row = tl.arange(0, PIXELS)[:, None]
    if CHANNELS_LAST:
        at = row * channels + channel[None, :]
        per_pixel = channels
    else:
        at = channel[None, :] * pixels + row
        per_pixel = 1
    # As a product, where() would hide from the compiler that blocks of 16 pixels are inside or outside whole.
    limit = ((column % PADDED < PER_GROUP).to(tl.int32) * pixels)[None, :] if PADDED > PER_GROUP else pixels
    return first, channel, at, per_pixel, limit


@jit
def _parameter(ptr, channel, PER_GROUP: tl.constexpr, PADDED: tl.constexpr, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """[1, COLUMNS] of a number for each channel."""
    if PADDED > PER_GROUP:
        real = tl.arange(0, GROUPS * PADDED) % PADDED < PER_GROUP
        values = tl.load(ptr + channel, mask=real, other=0.0)
    else:
        values = tl.load(ptr + channel)
    return values.to(tl.float32)[None, :]


@jit
def _read(ptr, inside, shift, SHIFT: tl.constexpr):  # type: ignore[no-untyped-def]
    x = tl.load(ptr, mask=inside, other=0.0).to(tl.float32)
    if SHIFT:
        x = tl.where(inside, x + shift, 0.0)
    return x


@jit
def _group_sums(tile, PADDED: tl.constexpr, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """[PIXELS, COLUMNS] -> [GROUPS]"""
    return tl.sum(tl.sum(tile, axis=0).reshape(GROUPS, PADDED), axis=1)


@jit
def _columns(values, PADDED: tl.constexpr, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """[GROUPS] -> [1, COLUMNS]"""
    return values[:, None].broadcast_to(GROUPS, PADDED).reshape(1, GROUPS * PADDED)


@jit
def forward_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, bias_ptr, shift_ptr, y_ptr, mean_ptr, rstd_ptr, eps,
    pixels, channels, blocks, shift_stride,
    SILU: tl.constexpr, SHIFT: tl.constexpr, CHANNELS_LAST: tl.constexpr, PER_GROUP: tl.constexpr,
    PADDED: tl.constexpr, GROUPS: tl.constexpr, PIXELS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0) // blocks
    first, channel, at, per_pixel, limit = _tile(
        pixels, channels, blocks, CHANNELS_LAST, PER_GROUP, PADDED, GROUPS, PIXELS
    )
    row = tl.arange(0, PIXELS)[:, None]
    x_ptr += image.to(tl.int64) * pixels * channels
    y_ptr += image.to(tl.int64) * pixels * channels
    count = pixels * PER_GROUP
    shift = 0.0
    if SHIFT:
        shift = _parameter(shift_ptr + image * shift_stride, channel, PER_GROUP, PADDED, GROUPS)

    if WHOLE:
        inside = row < limit
        x = _read(x_ptr + at, inside, shift, SHIFT)
        mean = _group_sums(x, PADDED, GROUPS) / count
        centred = tl.where(inside, x - _columns(mean, PADDED, GROUPS), 0.0)
        variance = _group_sums(centred * centred, PADDED, GROUPS) / count
    else:
        # Each element of the tile follows the pixels it meets (Welford 1962), and all are joined at the end
        # (Chan et al. 1979): sums of squares would cancel where the mean is large.
        own_mean = tl.zeros((PIXELS, GROUPS * PADDED), tl.float32)
        own_square = tl.zeros((PIXELS, GROUPS * PADDED), tl.float32)
        for start in range(0, pixels, PIXELS):
            inside = start + row < limit
            x = _read(x_ptr + start * per_pixel + at, inside, shift, SHIFT)
            change = tl.where(inside, x - own_mean, 0.0)
            own_mean += change / (start // PIXELS + 1)
            own_square += change * (x - own_mean)
        met = ((limit - row + PIXELS - 1) // PIXELS).to(tl.float32)
        mean = _group_sums(met * own_mean, PADDED, GROUPS) / count
        away = own_mean - _columns(mean, PADDED, GROUPS)
        variance = _group_sums(own_square + met * away * away, PADDED, GROUPS) / count
    rstd = 1.0 / tl.sqrt(variance + eps)
    statistic = image * blocks * GROUPS + first + tl.arange(0, GROUPS)
    tl.store(mean_ptr + statistic, mean)
    tl.store(rstd_ptr + statistic, rstd)

    scale = _columns(rstd, PADDED, GROUPS) * _parameter(weight_ptr, channel, PER_GROUP, PADDED, GROUPS)
    bias = _parameter(bias_ptr, channel, PER_GROUP, PADDED, GROUPS)
    if WHOLE:
        z = centred * scale + bias
        if SILU:
            z *= tl.sigmoid(z)
        tl.store(y_ptr + at, z, mask=inside)
    else:
        mean = _columns(mean, PADDED, GROUPS)
        for start in range(0, pixels, PIXELS):
            inside = start + row < limit
            x = _read(x_ptr + start * per_pixel + at, inside, shift, SHIFT)
            z = (x - mean) * scale + bias
            if SILU:
                z *= tl.sigmoid(z)
            tl.store(y_ptr + start * per_pixel + at, z, mask=inside)


@jit
def _cotangent(grad_ptr, inside, xhat, weight, bias, SILU: tl.constexpr):  # type: ignore[no-untyped-def]
    """g: what the derivative with respect to the result becomes at xhat."""
    g = tl.load(grad_ptr, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        z = xhat * weight + bias
        s = tl.sigmoid(z)
        g *= s * (1.0 + z * (1.0 - s))
    return g * weight


@jit
def backward_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, bias_ptr, shift_ptr, mean_ptr, rstd_ptr, grad_ptr, dx_ptr,
    pixels, channels, blocks, shift_stride,
    SILU: tl.constexpr, SHIFT: tl.constexpr, CHANNELS_LAST: tl.constexpr, PER_GROUP: tl.constexpr,
    PADDED: tl.constexpr, GROUPS: tl.constexpr, PIXELS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0) // blocks
    first, channel, at, per_pixel, limit = _tile(
        pixels, channels, blocks, CHANNELS_LAST, PER_GROUP, PADDED, GROUPS, PIXELS
    )
    row = tl.arange(0, PIXELS)[:, None]
    x_ptr += image.to(tl.int64) * pixels * channels
    grad_ptr += image.to(tl.int64) * pixels * channels
    dx_ptr += image.to(tl.int64) * pixels * channels
    count = pixels * PER_GROUP
    statistic = image * blocks * GROUPS + first + tl.arange(0, GROUPS)
    mean = _columns(tl.load(mean_ptr + statistic), PADDED, GROUPS)
    rstd = _columns(tl.load(rstd_ptr + statistic), PADDED, GROUPS)
    weight = _parameter(weight_ptr, channel, PER_GROUP, PADDED, GROUPS)
    bias = _parameter(bias_ptr, channel, PER_GROUP, PADDED, GROUPS)
    if SHIFT:
        mean -= _parameter(shift_ptr + image * shift_stride, channel, PER_GROUP, PADDED, GROUPS)

    if WHOLE:
        inside = row < limit
        xhat = (_read(x_ptr + at, inside, 0.0, False) - mean) * rstd
        g = _cotangent(grad_ptr + at, inside, xhat, weight, bias, SILU)
        level = _columns(_group_sums(g, PADDED, GROUPS) / count, PADDED, GROUPS)
        along = _columns(_group_sums(g * xhat, PADDED, GROUPS) / count, PADDED, GROUPS)
        tl.store(dx_ptr + at, (g - level - xhat * along) * rstd, mask=inside)
    else:
        own_level = tl.zeros((PIXELS, GROUPS * PADDED), tl.float32)
        own_along = tl.zeros((PIXELS, GROUPS * PADDED), tl.float32)
        for start in range(0, pixels, PIXELS):
            inside = start + row < limit
            here = start * per_pixel + at
            xhat = (_read(x_ptr + here, inside, 0.0, False) - mean) * rstd
            g = _cotangent(grad_ptr + here, inside, xhat, weight, bias, SILU)
            own_level += g
            own_along += g * xhat
        level = _columns(_group_sums(own_level, PADDED, GROUPS) / count, PADDED, GROUPS)
        along = _columns(_group_sums(own_along, PADDED, GROUPS) / count, PADDED, GROUPS)
        for start in range(0, pixels, PIXELS):
            inside = start + row < limit
            here = start * per_pixel + at
            xhat = (_read(x_ptr + here, inside, 0.0, False) - mean) * rstd
            g = _cotangent(grad_ptr + here, inside, xhat, weight, bias, SILU)
            tl.store(dx_ptr + here, (g - level - xhat * along) * rstd, mask=inside)


def _variant(label: str, dtype: str, per_group: int, size: int, *, last: bool, backward: bool) -> Variant:
    groups, pixels = 32, size * size
    constants, warps = tile(
        pixels, per_group, groups, channels_last=last, itemsize=4 if dtype == "fp32" else 2
    )
    moving = ("x_ptr", "grad_ptr", "dx_ptr") if backward else ("x_ptr", "y_ptr")
    return Variant(
        name="group_norm_silu",
        label=f"{'backward' if backward else 'forward'}, {label}",
        kernel=backward_kernel if backward else forward_kernel,
        constants={"SILU": True, "SHIFT": False, **constants},
        elements=constants["PIXELS"] * constants["GROUPS"] * constants["PADDED"],
        minimum_bytes=len(moving) * (4 if dtype == "fp32" else 2),
        types=dict.fromkeys(moving, f"*{dtype}") | {"eps": "fp32"},
        aligned=frozenset({"pixels", "channels"}),
        warps=warps,
        scalar_stores=0 if backward else 2,
        loops=not constants["WHOLE"],
    )


# 8 channels a group at 32 x 32: EDM's network for CIFAR-10; 4 at 256 x 256: the first level of a large image.
VARIANTS = [
    _variant(f"{'channels last' if last else 'NCHW'}, {dtype}{loop}", dtype, per_group, size, last=last,
             backward=backward)
    for backward in (False, True)
    for per_group, size, loop in ((8, 32, ""), (4, 256, ", two passes"))
    for last in (False, True)
    for dtype in ("fp32", "fp16", "bf16")[: 3 if last and not loop else 2]
]  # fmt: skip
