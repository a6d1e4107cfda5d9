"""Philox4x32-10: counter-based random numbers (Salmon et al., SC 2011, doi 10.1145/2063384.2063405).

A number depends on (seed, pixel, iteration, stream, chain) alone, so a chain's noise is the same in any
slot, batch, backend or device. This file is the plain-torch twin of the Triton kernel.
"""

import math

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF

# Counters that a CPU works on at once: thousands of chains take a third less time when the int64
# temporaries stay in its cache.
_CACHED_COUNTERS = 1 << 15


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four 32-bit words for each counter.

    counter: four int64 tensors that broadcast together, values in [0, 2^32). key: two such integers.
    Returns four int64 tensors with values in [0, 2^32).
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


def _high_word(product: Tensor, word: Tensor, key: int) -> Tensor:
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


def standard_normals(
    seed: int, chain_ids: Tensor, shape: tuple[int, ...], *, iteration: int, stream: int = 0
) -> Tensor:
    """Standard normals [B, *shape], float32, for chains chain_ids [B] (int64, values in [0, 2^32)).

    `stream` separates several draws within one iteration; four normals share a call of the generator.
    """
    size = math.prod(shape)
    pixel = torch.arange((size + 3) // 4, device=chain_ids.device)
    step, part = (torch.full_like(pixel, value) for value in (iteration, stream))
    normals = torch.empty(len(chain_ids), 4 * len(pixel), device=chain_ids.device)
    rows = max(1, len(chain_ids) if chain_ids.is_cuda else _CACHED_COUNTERS // max(1, len(pixel)))
    for chains, block in zip(chain_ids.split(rows), normals.split(rows), strict=True):
        words = philox4x32((pixel, step, chains[:, None], part), _words(seed))
        pairs = torch.stack(words, dim=-1).unflatten(-1, (2, 2))
        _box_muller(pairs[..., 0], pairs[..., 1], block.view(pairs.shape))
    return normals[:, :size].reshape(len(chain_ids), *shape)


def uniforms(seed: int, chain_ids: Tensor, *, iteration: int, stream: int = 0) -> Tensor:
    """One uniform number in [0, 1) a chain, float64 [B]."""
    zero = torch.zeros_like(chain_ids)
    words = philox4x32((zero, zero + iteration, chain_ids, zero + stream), _words(seed))
    return words[0].double() * 2.0**-32
