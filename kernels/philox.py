"""Philox4x32-10: counter-based random numbers (Salmon et al., SC 2011, doi 10.1145/2063384.2063405).

A number depends on (seed, pixel, iteration, stream, chain) alone, so a chain's noise is the same in any
slot, batch, backend or device: the Triton functions and their plain-torch twin give the same 32-bit words,
and normals that agree to float32 rounding.
"""

import math

import torch
from torch import Tensor

from alpenglow.kernels.triton_support import jit, tl

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF

# Counters that a CPU works on at once: thousands of chains take a third less time when the int64
# temporaries stay in its cache.
_CACHED_COUNTERS = 1 << 15


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int | Tensor, int | Tensor]
) -> tuple[Tensor, ...]:
    """Four 32-bit words for each counter.

    counter: four int64 tensors that broadcast together, values in [0, 2^32). key: two such integers, or
    tensors that broadcast with them. Returns four int64 tensors with values in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # The 64-bit products wrap in int64; shift and mask read their unsigned halves all the same. The low
        # halves c1 and c3 wait for the mask of the next round.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1 = _high_word(p1, c1, k0), p1
        c2, c3 = _high_word(p0, c3, k1), p0
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1 & WORD, c2, c3 & WORD


def _high_word(product: Tensor, word: Tensor, key: int | Tensor) -> Tensor:
    """(high half of the product) ^ word ^ key."""
    return (product >> 32 ^ word).bitwise_xor_(key).bitwise_and_(WORD)


def _box_muller(radius_words: Tensor, angle_words: Tensor, out: Tensor) -> None:
    """Two words [...] to two standard normals, out [..., 2]. The radius never sees log(0).

    In float64, rounded once to float32: libraries differ in the last bits of log, sin and cos, which
    survive that rounding once in some 10^8 numbers.
    """
    radius = radius_words.double().add_(1).mul_(2.0**-32).log_().mul_(-2).sqrt_()
    angle = angle_words.double().mul_(2 * math.pi * 2.0**-32)
    out[..., 0] = angle.cos().mul_(radius)
    out[..., 1] = angle.sin_().mul_(radius)


def _words(seed: int) -> tuple[int, int]:
    return seed & WORD, seed >> 32 & WORD


def chain_counters(seed: int, chain_ids: Tensor, *, iteration: int = 0, stream: int = 0) -> Tensor:
    """What the noise of a step depends on beside the pixel: (seed, chain, iteration, stream), int64 [B, 4].

    chain_ids: [B] int64 in [0, 2^32); iteration and stream in the same range. `stream` separates several
    draws within one iteration. The seed is taken modulo 2^64.
    """
    # Filled number by number: copying a host tensor would make a GPU wait.
    counters = torch.empty(len(chain_ids), 4, dtype=torch.int64, device=chain_ids.device)
    counters[:, 0] = (seed + 2**63) % 2**64 - 2**63  # the same 64 bits as a signed number
    counters[:, 1] = chain_ids
    counters[:, 2] = iteration
    counters[:, 3] = stream
    return counters


def normal_quads(counters: Tensor, count: int) -> Tensor:
    """Standard normals [B, count, 4], float32: four for each of `count` Philox calls a chain.

    counters: int64 [B, 4], see `chain_counters`.
    """
    quad = torch.arange(count, device=counters.device)
    normals = torch.empty(len(counters), count, 4, device=counters.device)
    rows = max(1, len(counters) if counters.is_cuda else _CACHED_COUNTERS // max(1, count))
    for chains, block in zip(counters.split(rows), normals.split(rows), strict=True):
        seed, chain, iteration, stream = chains[:, :, None].unbind(1)
        words = philox4x32((quad, iteration, chain, stream), (seed & WORD, seed >> 32 & WORD))
        pairs = torch.stack(words, dim=-1).unflatten(-1, (2, 2))
        _box_muller(pairs[..., 0], pairs[..., 1], block.view(pairs.shape))
    return normals


def chain_normals(counters: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normals [B, *shape], float32, in the order of the pixels; counters: int64 [B, 4]."""
    size = math.prod(shape)
    return normal_quads(counters, (size + 3) // 4).flatten(1)[:, :size].reshape(len(counters), *shape)


def uniforms(seed: int, chain_ids: Tensor, *, iteration: int, stream: int = 0) -> Tensor:
    """One uniform number in [0, 1) a chain, float64 [B]."""
    zero = torch.zeros_like(chain_ids)
    words = philox4x32((zero, zero + iteration, chain_ids, zero + stream), _words(seed))
    return words[0].double() * 2.0**-32


# --- Triton ---


@jit
def philox_words(quad, seed, chain, iteration, stream):  # type: ignore[no-untyped-def]
    """Four uint32 words [N] for counters (quad [N], iteration, chain, stream); scalars are int64."""
    c0 = quad.to(tl.uint32)
    c1 = tl.zeros_like(c0) + iteration.to(tl.uint32)
    c2 = tl.zeros_like(c0) + chain.to(tl.uint32)
    c3 = tl.zeros_like(c0) + stream.to(tl.uint32)
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, 0xD2511F53)
        high1 = tl.umulhi(c2, 0xCD9E8D57)
        low0 = c0 * 0xD2511F53
        low1 = c2 * 0xCD9E8D57
        c0 = high1 ^ c1 ^ k0
        c2 = high0 ^ c3 ^ k1
        c1 = low1
        c3 = low0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@jit
def _radius(word):  # type: ignore[no-untyped-def]
    """sqrt(-2 ln u), u = (word + 1) / 2^32, to float32 rounding also where u is near 1.

    -ln u = k ln 2 + 2 atanh(s), |s| <= 1/3. Above 1/2, k = 0 and s comes from 1 - u, which is exact in
    integers; below, from the mantissa of u. Hardware logarithms lose all digits near 1.
    """
    upper = word >= 0x80000000
    rest = (word ^ 0xFFFFFFFF).to(tl.float32) * 2.3283064365386963e-10  # 1 - u, exactly zero for u = 1
    bits = (word + 1).to(tl.float32).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 127
    mantissa = ((bits & 0x007FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    s = tl.where(upper, rest / (2.0 - rest), (1.0 - mantissa) / (1.0 + mantissa))
    k = tl.where(upper, 0, 32 - exponent).to(tl.float32)
    z = s * s
    series = 1.0 / 13 * z + 1.0 / 11
    series = series * z + 1.0 / 9
    series = series * z + 1.0 / 7
    series = series * z + 1.0 / 5
    series = series * z + 1.0 / 3
    series = series * z + 1.0
    return tl.sqrt(2.0 * (k * 0.6931471805599453 + 2.0 * s * series))


@jit
def _cosine_sine(word):  # type: ignore[no-untyped-def]
    """cos and sin of 2 pi word / 2^32, to float32 rounding: the quadrant is exact in integers."""
    quadrant = (word + 0x20000000) >> 30
    t = (word - (quadrant << 30)).to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09
    z = t * t
    sine = z * (1.0 / 362880) - 1.0 / 5040
    sine = sine * z + 1.0 / 120
    sine = sine * z - 1.0 / 6
    sine = t + t * z * sine
    cosine = 1.0 / 40320 - z * (1.0 / 3628800)
    cosine = cosine * z - 1.0 / 720
    cosine = cosine * z + 1.0 / 24
    cosine = cosine * z - 0.5
    cosine = 1.0 + z * cosine
    odd = (quadrant & 1) == 1
    a = tl.where(odd, sine, cosine)
    b = tl.where(odd, cosine, sine)
    a = tl.where((quadrant == 1) | (quadrant == 2), -a, a)
    b = tl.where(quadrant >= 2, -b, b)
    return a, b


@jit
def philox_normals(quad, seed, chain, iteration, stream):  # type: ignore[no-untyped-def]
    """Four standard normals [N], float32, for each of the counters of `philox_words` (Box-Muller)."""
    w0, w1, w2, w3 = philox_words(quad, seed, chain, iteration, stream)
    r0 = _radius(w0)
    r1 = _radius(w2)
    cos0, sin0 = _cosine_sine(w1)
    cos1, sin1 = _cosine_sine(w3)
    return r0 * cos0, r0 * sin0, r1 * cos1, r1 * sin1


@jit
def interleave4(a, b, c, d, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """[a0, b0, c0, d0, a1, ...] of SIZE elements: moves nothing between threads, which hold four in a row."""
    return tl.join(tl.join(a, c), tl.join(b, d)).reshape(SIZE)
