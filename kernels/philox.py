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


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four 32-bit words for each counter.

    counter: four int64 tensors that broadcast together, values in [0, 2^32). key: two such integers.
    Returns four int64 tensors with values in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # The 64-bit products wrap in int64; shift and mask read their unsigned halves all the same.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (p1 >> 32 & WORD) ^ c1 ^ k0,
            p1 & WORD,
            (p0 >> 32 & WORD) ^ c3 ^ k1,
            p0 & WORD,
        )
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1, c2, c3


def _normal_pair(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Box-Muller: two words to two standard normals, float32. The radius never sees log(0)."""
    radius = (-2 * ((first.double() + 1) * 2.0**-32).log()).sqrt().float()
    angle = (second.double() * (2 * math.pi * 2.0**-32)).float()
    return radius * angle.cos(), radius * angle.sin()


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
    chain = chain_ids[:, None]
    step, part = (torch.full_like(pixel, value) for value in (iteration, stream))
    words = philox4x32((pixel, step, chain, part), _words(seed))
    normals = torch.stack((*_normal_pair(words[0], words[1]), *_normal_pair(words[2], words[3])), dim=-1)
    return normals.flatten(1)[:, :size].reshape(len(chain_ids), *shape)


def uniforms(seed: int, chain_ids: Tensor, *, iteration: int, stream: int = 0) -> Tensor:
    """One uniform number in [0, 1) a chain, float64 [B]."""
    zero = torch.zeros_like(chain_ids)
    words = philox4x32((zero, zero + iteration, chain_ids, zero + stream), _words(seed))
    return words[0].double() * 2.0**-32
