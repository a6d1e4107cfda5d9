"""Multi-coil k-space of complex images: A x = mask F(S_c x) for each coil c, F the centred orthonormal FFT.

Images are real [B, 2, H, W] (real, imaginary), coil maps S complex [coils, H, W]. With n // 2 the centre of
an axis of n samples and Z the FFT without shifts,

    fftshift(Z(ifftshift(z)))[u] = e(u - n // 2) Z(e z)[u],    e(h) = exp(2 pi i (n // 2) h / n)

on every axis, +-1 where n is even. So `prepare` multiplies the maps by e, and the mask by the phase of
k-space and the FFT's factor, once; the calls then run FFTs without shifts and without factors. In A^T A the
phases cancel, and a real mask remains. All chains read the same maps.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alpenglow.kernels.triton_support import Variant, block_of, jit, runs_on, start, tl

BLOCK = 512
WARPS = 2


@dataclass(frozen=True)
class Sense:
    """Maps and mask with the centring and the FFT's factor in them; see `prepare`.

    maps: complex [coils, H, W]; weight: complex [H, W], of k-space, for A and (conjugate) A^T; normal_weight:
    real [H, W], for A^T A.
    """

    maps: Tensor
    weight: Tensor
    normal_weight: Tensor


def prepare(maps: Tensor, mask: Tensor) -> Sense:
    """The operator of coil maps, complex [coils, H, W], and a mask [H, W], bool or real, centred.

    Computes in float64, returns the dtype of the maps.
    """
    height, width = maps.shape[-2:]
    phases = _phases(height, maps.device)[:, None] * _phases(width, maps.device)
    centred = mask.to(torch.float64)
    # e(u - n // 2) is e(u) moved by n // 2, and that is what a shift of the array does.
    shifted = torch.fft.fftshift(phases) * centred / math.sqrt(height * width)
    return Sense(
        (maps * phases).to(maps.dtype).contiguous(),
        shifted.to(maps.dtype),
        (centred.square() / (height * width)).to(maps.real.dtype),
    )


def _phases(n: int, device: torch.device) -> Tensor:
    """e(0), ..., e(n - 1), complex128."""
    turns = torch.arange(n, device=device) * (n // 2) % n  # in integers: an even n then has exactly +-1
    angle = turns.double() * (2 * math.pi / n)
    exact = torch.where(2 * turns == n, -1.0, torch.where(turns == 0, 1.0, angle.cos()))
    return torch.complex(exact, torch.where((turns == 0) | (2 * turns == n), 0.0, angle.sin()))


def sense_forward(x: Tensor, sense: Sense) -> Tensor:
    """A x: centred k-space [B, coils, H, W], complex, of images [B, 2, H, W]; 0 where the mask is."""
    return mask_kspace(_fft2(coil_expand(x, sense.maps)), sense.weight)


def sense_adjoint(y: Tensor, sense: Sense) -> Tensor:
    """A^T y: images [B, 2, H, W] of centred k-space [B, coils, H, W], complex."""
    return coil_combine(_ifft2(mask_kspace(y, sense.weight.conj())), sense.maps)


def sense_normal(x: Tensor, sense: Sense) -> Tensor:
    """A^T A x for images [B, 2, H, W]."""
    k_space = mask_kspace(_fft2(coil_expand(x, sense.maps)), sense.normal_weight)
    return coil_combine(_ifft2(k_space), sense.maps)


def coil_expand(x: Tensor, maps: Tensor) -> Tensor:
    """S_c x: coil images, complex [B, coils, H, W], of images [B, 2, H, W]; maps: complex [coils, H, W].

    Raises ValueError for shapes or precisions that do not fit, as the other functions here do.
    """
    if x.shape[1:] != (2, *maps.shape[1:]) or x.dtype != maps.dtype.to_real():
        raise ValueError(
            f"got images {tuple(x.shape)} of {x.dtype} for maps {tuple(maps.shape)} of {maps.dtype}; "
            "expected [B, 2, H, W] for [coils, H, W], of one precision"
        )
    return _expand(x, maps)


def coil_combine(images: Tensor, maps: Tensor) -> Tensor:
    """sum_c conj(S_c) z_c: [B, 2, H, W] of coil images, complex [B, coils, H, W]; maps: [coils, H, W]."""
    if images.shape[1:] != maps.shape or images.dtype != maps.dtype:
        raise ValueError(
            f"got coil images {tuple(images.shape)} of {images.dtype} for maps {tuple(maps.shape)} of "
            f"{maps.dtype}; expected [B, coils, H, W] for [coils, H, W], of one precision"
        )
    return _combine(images, maps)


def mask_kspace(k: Tensor, weight: Tensor) -> Tensor:
    """k-space [B, coils, H, W], complex, times a weight [H, W]: bool, real or complex."""
    if k.ndim != 4 or k.shape[2:] != weight.shape or not k.is_complex():
        raise ValueError(
            f"got k-space {tuple(k.shape)} of {k.dtype} for a weight {tuple(weight.shape)}; expected complex "
            "[B, coils, H, W] for [H, W]"
        )
    weight = weight.to(k.dtype if weight.is_complex() else k.dtype.to_real())
    return _mask(k.contiguous() if k.is_cuda else k, weight.resolve_conj())


# On a CPU torch.fft.fft2 of a single plane is not bitwise that of a plane in a batch; rows are. k-space then
# has its last two dimensions transposed in memory, which arithmetic keeps and the way back wants.


def _fft2(z: Tensor) -> Tensor:
    """The FFT of [B, coils, H, W] without factor, without shifts."""
    if z.device.type != "cpu":
        return torch.fft.fft2(z)
    return torch.fft.fft(torch.fft.fft(z.contiguous()).mT.contiguous()).mT


def _ifft2(k: Tensor) -> Tensor:
    """Its adjoint: the inverse without factor."""
    if k.device.type != "cpu":
        return torch.fft.ifft2(k, norm="forward")
    return torch.fft.ifft(torch.fft.ifft(k.mT.contiguous(), norm="forward").mT.contiguous(), norm="forward")


# --- Operators ---


@torch.library.custom_op("alpenglow::coil_expand", mutates_args=())
def _expand(x: Tensor, maps: Tensor) -> Tensor:
    return (launch_expand if _fused(maps) else twin_expand)(x, maps)


@_expand.register_fake
def _(x: Tensor, maps: Tensor) -> Tensor:
    return maps.new_empty(len(x), *maps.shape)


@torch.library.custom_op("alpenglow::coil_combine", mutates_args=())
def _combine(images: Tensor, maps: Tensor) -> Tensor:
    return (launch_combine if _fused(images) else twin_combine)(images, maps)


@_combine.register_fake
def _(images: Tensor, maps: Tensor) -> Tensor:
    return images.new_empty(len(images), 2, *images.shape[2:], dtype=images.dtype.to_real())


@torch.library.custom_op("alpenglow::mask_kspace", mutates_args=())
def _mask(k: Tensor, weight: Tensor) -> Tensor:
    return (launch_mask if _fused(k) else twin_mask)(k, weight)


@_mask.register_fake
def _(k: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(k)


def _expand_grad(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _combine(grad, ctx.other), None


def _combine_grad(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _expand(grad, ctx.other), None


def _mask_grad(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _mask(grad, ctx.other.conj().resolve_conj()), None


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.other = inputs[1]


_expand.register_autograd(_expand_grad, setup_context=_keep)
_combine.register_autograd(_combine_grad, setup_context=_keep)
_mask.register_autograd(_mask_grad, setup_context=_keep)


def _fused(x: Tensor) -> bool:
    return runs_on(x) and x.dtype == torch.complex64


# --- Plain torch ---
# torch's complex product may round differently in its vector loop and its scalar tail: so images are
# multiplied one by one, and an element lies in the same place whatever the batch.


def twin_expand(x: Tensor, maps: Tensor) -> Tensor:
    """See `coil_expand`."""
    images = maps.new_empty(len(x), *maps.shape)
    for (re, im), result in zip(x.contiguous(), images, strict=True):
        torch.mul(torch.complex(re, im), maps, out=result)
    return images


def twin_combine(images: Tensor, maps: Tensor) -> Tensor:
    """See `coil_combine`."""
    result = maps.real.new_empty(len(images), 2, *images.shape[2:])
    conjugate = maps.conj().resolve_conj().contiguous()
    terms = torch.empty_like(conjugate)
    for z, image in zip(images.resolve_conj().contiguous(), result, strict=True):
        image.copy_(torch.view_as_real(torch.mul(z, conjugate, out=terms).sum(0)).movedim(-1, 0))
    return result


def twin_mask(k: Tensor, weight: Tensor) -> Tensor:
    """See `mask_kspace`; in the memory order of k."""
    if not k.is_contiguous() and k.mT.is_contiguous():
        return twin_mask(k.mT, weight.mT).mT
    k, weight = k.resolve_conj(), weight.contiguous()
    if not weight.is_complex():
        pairs = weight[..., None].expand(*weight.shape, 2).contiguous()
        return torch.view_as_complex(torch.view_as_real(k) * pairs)
    result = torch.empty_like(k)
    for plane, masked in zip(k, result, strict=True):
        torch.mul(plane, weight, out=masked)
    return result


# --- Triton ---


def launch_expand(x: Tensor, maps: Tensor) -> Tensor:
    """Coil images [B, coils, H, W] by the Triton kernel, complex64."""
    images = maps.new_empty(len(x), *maps.shape)
    _run(expand_kernel, images, x.contiguous(), _parts(maps), torch.view_as_real(images))
    return images


def launch_combine(images: Tensor, maps: Tensor) -> Tensor:
    """Images [B, 2, H, W] by the Triton kernel, complex64."""
    result = images.new_zeros(len(images), 2, *images.shape[2:], dtype=torch.float32)
    _run(combine_kernel, images, _parts(images), _parts(maps), result)
    return result


def launch_mask(k: Tensor, weight: Tensor) -> Tensor:
    """Masked k-space by the Triton kernel, complex64."""
    result = torch.empty_like(k, memory_format=torch.contiguous_format)
    weight = _parts(weight) if weight.is_complex() else weight.contiguous()
    _run(
        mask_kernel, k, _parts(k), weight, torch.view_as_real(result), planes=True,
        COMPLEX=weight.ndim == 3,
    )  # fmt: skip
    return result


def _parts(z: Tensor) -> Tensor:
    return torch.view_as_real(z.resolve_conj().contiguous())


def _run(kernel: Any, like: Tensor, *arguments: Tensor, planes: bool = False, **constants: bool) -> None:
    """One program for a block of pixels of each image, or of each plane, of `like` [B, coils, H, W]."""
    batch, coils, height, width = like.shape
    size = height * width
    block = block_of(size, BLOCK)
    many = batch * coils if planes else batch
    if like.numel():
        start(
            kernel,
            many * -(-size // block),
            like,
            *arguments,
            many,
            coils,
            size,
            BLOCK=block,
            num_warps=WARPS,
            **constants,
        )


@jit
def _place(many, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """(image, offsets of pixels [BLOCK], of their parts [2 BLOCK]); neighbours share a block of the maps."""
    first = tl.program_id(0) // many * BLOCK
    image = (tl.program_id(0) % many).to(tl.int64)
    return image, first + tl.arange(0, BLOCK), 2 * first + tl.arange(0, 2 * BLOCK)


@jit
def _read(ptr, at, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """(real, imaginary) parts [BLOCK] of complex numbers."""
    return tl.split(tl.load(ptr + at, mask=at < 2 * size, other=0.0).reshape(BLOCK, 2))


@jit
def expand_kernel(  # type: ignore[no-untyped-def]
    x_ptr, maps_ptr, images_ptr, many, coils, size, BLOCK: tl.constexpr
):  # fmt: skip
    image, pixel, at = _place(many, size, BLOCK)
    x_ptr += image * 2 * size
    images_ptr += image * coils * 2 * size
    re = tl.load(x_ptr + pixel, mask=pixel < size, other=0.0)
    im = tl.load(x_ptr + size + pixel, mask=pixel < size, other=0.0)
    for _ in range(coils):
        s_re, s_im = _read(maps_ptr, at, size, BLOCK)
        z = tl.join(re * s_re - im * s_im, re * s_im + im * s_re).reshape(2 * BLOCK)
        tl.store(images_ptr + at, z, mask=at < 2 * size)
        maps_ptr += 2 * size
        images_ptr += 2 * size


@jit
def combine_kernel(  # type: ignore[no-untyped-def]
    images_ptr, maps_ptr, result_ptr, many, coils, size, BLOCK: tl.constexpr
):  # fmt: skip
    image, pixel, at = _place(many, size, BLOCK)
    images_ptr += image * coils * 2 * size
    re = tl.zeros([BLOCK], tl.float32)
    im = tl.zeros([BLOCK], tl.float32)
    for _ in range(coils):
        s_re, s_im = _read(maps_ptr, at, size, BLOCK)
        z_re, z_im = _read(images_ptr, at, size, BLOCK)
        re += z_re * s_re + z_im * s_im
        im += z_im * s_re - z_re * s_im
        maps_ptr += 2 * size
        images_ptr += 2 * size
    result_ptr += image * 2 * size
    tl.store(result_ptr + pixel, re, mask=pixel < size)
    tl.store(result_ptr + size + pixel, im, mask=pixel < size)


@jit
def mask_kernel(k_ptr, weight_ptr, result_ptr, many, coils, size, COMPLEX: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    plane, pixel, at = _place(many, size, BLOCK)
    re, im = _read(k_ptr + plane * 2 * size, at, size, BLOCK)
    if COMPLEX:
        w_re, w_im = _read(weight_ptr, at, size, BLOCK)
        z = tl.join(re * w_re - im * w_im, re * w_im + im * w_re)
    else:
        w = tl.load(weight_ptr + pixel, mask=pixel < size, other=0.0)
        z = tl.join(re * w, im * w)
    tl.store(result_ptr + plane * 2 * size + at, z.reshape(2 * BLOCK), mask=at < 2 * size)


def _variant(label: str, kernel: Any, minimum_bytes: float, loops: bool, **options: bool) -> Variant:
    return Variant(
        name="sense",
        label=label,
        kernel=kernel,
        constants={"BLOCK": BLOCK, **options},
        elements=BLOCK,
        minimum_bytes=minimum_bytes,
        aligned=frozenset({"size"}),
        warps=WARPS,
        loops=loops,
    )


# Bytes a pixel of a plane; where a kernel loops over the coils, those of an image come on top, once.
VARIANTS = [
    _variant("expand", expand_kernel, 16, loops=True),
    _variant("combine", combine_kernel, 16, loops=True),
    _variant("mask", mask_kernel, 20, loops=False, COMPLEX=False),
    _variant("complex mask", mask_kernel, 24, loops=False, COMPLEX=True),
]
