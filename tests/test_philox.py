"""Counter-based noise: the published generator, its normals, and that a chain's stream is its own."""

import itertools
import math

import pytest
import torch
from scipy.stats import kstest, norm
from torch import Tensor

from alpenglow.kernels import triton_support
from alpenglow.kernels.philox import (
    _cosine_sine,
    _radius,
    chain_counters,
    chain_normals,
    philox4x32,
    philox_words,
    uniforms,
)
from alpenglow.kernels.triton_support import tl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not triton_support.AVAILABLE, reason="needs triton")

WORD = 0xFFFFFFFF


def standard_normals(
    seed: int, chain_ids: Tensor, shape: tuple[int, ...], *, iteration: int, stream: int = 0
) -> Tensor:
    """As samplers draw them: counters, then normals [B, *shape]."""
    return chain_normals(chain_counters(seed, chain_ids, iteration=iteration, stream=stream), shape)


# kat_vectors of Random123 1.14, lines "philox4x32 10": counter, key, output.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def philox_in_integers(counter: list[int], key: list[int]) -> list[int]:
    """The paper's figure 4 in Python's integers, which never wrap."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & WORD, (p0 >> 32) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return [c0, c1, c2, c3]


def run(counter: list[int], key: list[int]) -> list[int]:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    return [word.item() for word in philox4x32((c0, c1, c2, c3), (key[0], key[1]))]  # type: ignore[misc]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_known_answers(counter: str, key: str, expected: str) -> None:
    assert run(words(counter), words(key)) == words(expected)
    assert philox_in_integers(words(counter), words(key)) == words(expected)


def test_random_counters_against_python_integers() -> None:
    draws = torch.randint(0, 2**32, (200, 6), generator=torch.Generator().manual_seed(0))
    for row in draws.tolist():
        assert run(row[:4], row[4:]) == philox_in_integers(row[:4], row[4:])


def test_counters_broadcast_and_stay_untouched() -> None:
    pixel, chain = torch.arange(5), torch.tensor([7, WORD, 0])[:, None]
    step, part = torch.tensor([3]), torch.tensor([WORD])
    given = (pixel, step, chain, part)
    copies = [c.clone() for c in given]
    full = tuple(c.expand(3, 5).contiguous() for c in given)
    broadcast = philox4x32(given, (WORD, 1))
    for word, expected in zip(broadcast, philox4x32(full, (WORD, 1)), strict=True):  # type: ignore[arg-type]
        assert word.shape == (3, 5)
        assert torch.equal(word, expected)
        assert word.min() >= 0
        assert word.max() <= WORD
    assert all(torch.equal(c, copy) for c, copy in zip(given, copies, strict=True))


def box_muller(first: int, second: int) -> list[float]:
    radius = math.sqrt(-2 * math.log((first + 1) / 2**32))
    angle = 2 * math.pi * second / 2**32
    return [radius * math.cos(angle), radius * math.sin(angle)]


@pytest.mark.parametrize("seed", [0, 5, 2**32 + 5, 2**63 + 12345, -1])
def test_the_stream_is_the_one_that_is_documented(seed: int) -> None:
    """Counter (pixel, iteration, chain, stream), key the two words of the seed: kernels must agree."""
    chain, iteration, stream = 2**32 - 3, 17, 2**20 + 1
    got = standard_normals(seed, torch.tensor([4, chain]), (2, 5), iteration=iteration, stream=stream)
    key = [seed & WORD, seed >> 32 & WORD]
    expected: list[float] = []
    for pixel in range(3):
        w = philox_in_integers([pixel, iteration, chain, stream], key)
        expected += box_muller(w[0], w[1]) + box_muller(w[2], w[3])
    assert got.dtype == torch.float32
    assert torch.equal(got[1].flatten(), torch.tensor(expected[:10], dtype=torch.float64).float())
    uniform = uniforms(seed, torch.tensor([chain]), iteration=iteration, stream=stream)
    assert uniform.item() == philox_in_integers([0, iteration, chain, stream], key)[0] / 2**32


@pytest.mark.parametrize("shape", [(1, 28, 28), (2, 7, 9), (3,), (1, 1, 1), (1, 60, 61)], ids=str)
def test_a_chain_has_the_same_bits_in_any_batch(shape: tuple[int, ...]) -> None:
    """Any number of chains, order and threads: vectorised code must round its last elements like all."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randperm(2000, generator=generator)[:150]
    reference = standard_normals(3, ids, shape, iteration=5, stream=1)
    assert reference.shape == (150, *shape)
    threads = torch.get_num_threads()
    try:
        for count, workers in itertools.product((1, 2, 3, 7, 64, 150), (1, 2)):
            torch.set_num_threads(workers)
            pick = torch.randperm(150, generator=generator)[:count]
            assert torch.equal(standard_normals(3, ids[pick], shape, iteration=5, stream=1), reference[pick])
    finally:
        torch.set_num_threads(threads)
    repeated = standard_normals(3, ids[[0, 0]], shape, iteration=5, stream=1)
    assert torch.equal(repeated, reference[[0, 0]])


def test_a_pixel_has_the_same_bits_in_any_image() -> None:
    ids = torch.arange(40)
    large = standard_normals(3, ids, (1, 50, 41), iteration=5).flatten(1)
    for size in range(1, 40):
        assert torch.equal(standard_normals(3, ids, (size,), iteration=5), large[:, :size])


def test_no_chains_and_no_pixels() -> None:
    assert standard_normals(0, torch.arange(0), (1, 4, 4), iteration=0).shape == (0, 1, 4, 4)
    assert standard_normals(0, torch.arange(3), (0,), iteration=0).shape == (3, 0)
    assert uniforms(0, torch.arange(0), iteration=0).shape == (0,)


@pytest.fixture(scope="module")
def sample() -> Tensor:
    """4 million normals, float64 [1000, 4000]."""
    return standard_normals(11, torch.arange(1000), (1, 40, 100), iteration=2).double().flatten(1)


def test_moments(sample: Tensor) -> None:
    """Var x^k = E x^2k - (E x^k)^2 gives the standard errors: 1, 2, 15, 96 over N. Four of them."""
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        error = abs(sample.pow(power).mean().item() - moment)
        assert error < 4 * math.sqrt(variance / sample.numel()), f"moment {power} is off by {error}"


def test_distribution(sample: Tensor) -> None:
    assert kstest(sample[:50].flatten().numpy(), "norm").pvalue > 1e-3
    # Each of the four normals of a call comes from other words: test them apart.
    for lane in range(4):
        assert kstest(sample[50:150, lane::4].flatten().numpy(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("threshold", [3.0, 4.0, 5.0])
def test_tails(sample: Tensor, threshold: float) -> None:
    """Counts beyond a threshold are Poisson: within four times the root of the expectation."""
    expected = sample.numel() * norm.sf(threshold)
    for count in ((sample > threshold).sum().item(), (sample < -threshold).sum().item()):
        assert abs(count - expected) < 4 * math.sqrt(expected)
    # 32-bit radii end at sqrt(64 ln 2): beyond it lie 3e-11 of all normals.
    assert sample.abs().max() <= math.sqrt(64 * math.log(2))


def normals(seed: int = 11, chain: int = 3, iteration: int = 2, stream: int = 0) -> Tensor:
    ids = torch.tensor([chain])
    return standard_normals(seed, ids, (100_000,), iteration=iteration, stream=stream)[0].double()


OTHERS = {
    "seed": {"seed": 12},
    "high word of the seed": {"seed": 11 + 2**32},
    "chain": {"chain": 4},
    "iteration": {"iteration": 3},
    "stream": {"stream": 1},
    "chain and iteration swapped": {"chain": 2, "iteration": 3},
    "iteration and stream swapped": {"iteration": 0, "stream": 2},
    "chain in steps of a power of two": {"chain": 3 + 2**16},
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())
def test_streams_are_independent(other: dict[str, int]) -> None:
    """Correlation of the normals and of their squares: standard error 1 / sqrt(N). Four of them."""
    first, second = normals(), normals(**other)
    for f in (lambda x: x, torch.square, torch.abs):
        correlation = torch.corrcoef(torch.stack([f(first), f(second)]))[0, 1].item()
        assert abs(correlation) < 4 / math.sqrt(len(first))


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 8, 28])
def test_pixels_are_independent(sample: Tensor, lag: int) -> None:
    a, b = sample[:100, :-lag].flatten(), sample[:100, lag:].flatten()
    for f in (lambda x: x, torch.square):
        correlation = torch.corrcoef(torch.stack([f(a), f(b)]))[0, 1].item()
        assert abs(correlation) < 4 / math.sqrt(len(a))


def test_uniforms() -> None:
    ids = torch.arange(50_000)
    drawn = uniforms(5, ids, iteration=1, stream=2**20)
    assert drawn.dtype == torch.float64
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert kstest(drawn.numpy(), "uniform").pvalue > 1e-3
    pick = torch.tensor([40_000, 3, 3])
    assert torch.equal(uniforms(5, pick, iteration=1, stream=2**20), drawn[pick])
    for other in ({"iteration": 2, "stream": 2**20}, {"iteration": 1, "stream": 0}):
        correlation = torch.corrcoef(torch.stack([drawn, uniforms(5, ids, **other)]))[0, 1].item()
        assert abs(correlation) < 4 / math.sqrt(len(ids))


def test_counters_of_many_requests_in_one_call() -> None:
    """Each row has a seed, an iteration and a stream of its own; seeds beyond 2^63 wrap."""
    seeds = [3, 2**63 + 5, -1]
    rows = [
        chain_counters(seed, torch.tensor([chain]), iteration=chain + 2, stream=chain)
        for chain, seed in enumerate(seeds)
    ]
    together = chain_normals(torch.cat(rows), (3, 5))
    for chain, seed in enumerate(seeds):
        alone = standard_normals(seed, torch.tensor([chain]), (3, 5), iteration=chain + 2, stream=chain)
        assert torch.equal(together[chain], alone[0])


@triton_support.jit
def _words_kernel(out_ptr, quads_ptr, counters_ptr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, SIZE)
    seed = tl.load(counters_ptr)
    chain, iteration = tl.load(counters_ptr + 1), tl.load(counters_ptr + 2)
    w0, w1, w2, w3 = philox_words(tl.load(quads_ptr + at), seed, chain, iteration, tl.load(counters_ptr + 3))
    tl.store(out_ptr + at, w0.to(tl.int64))
    tl.store(out_ptr + SIZE + at, w1.to(tl.int64))
    tl.store(out_ptr + 2 * SIZE + at, w2.to(tl.int64))
    tl.store(out_ptr + 3 * SIZE + at, w3.to(tl.int64))


@triton_support.jit
def _normals_kernel(out_ptr, words_ptr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, SIZE)
    radius = _radius(tl.load(words_ptr + at).to(tl.uint32))
    cosine, sine = _cosine_sine(tl.load(words_ptr + SIZE + at).to(tl.uint32))
    tl.store(out_ptr + at, radius)
    tl.store(out_ptr + SIZE + at, cosine)
    tl.store(out_ptr + 2 * SIZE + at, sine)


def triton_words(quads: list[int], rest: list[int], key: list[int]) -> list[list[int]]:
    """The words of the Triton function for counters (quad, *rest), all numbers 32-bit words."""
    seed = (key[0] | key[1] << 32) - (2**64 if key[1] >> 31 else 0)
    counters = torch.tensor([seed, rest[1], rest[0], rest[2]]).to(DEVICE)
    out = torch.zeros(4, len(quads), dtype=torch.int64, device=DEVICE)
    _words_kernel[(1,)](out, torch.tensor(quads).to(DEVICE), counters, SIZE=len(quads))
    return out.T.tolist()


@needs_triton
@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_triton_known_answers(counter: str, key: str, expected: str) -> None:
    quad, *rest = words(counter)
    assert triton_words([quad, quad], rest, words(key)) == [words(expected)] * 2


@needs_triton
def test_triton_words_are_those_of_the_twin() -> None:
    draws = torch.randint(0, 2**32, (20, 21), generator=torch.Generator().manual_seed(0)).tolist()
    for row in draws:
        quads, rest, key = row[:16], row[16:19], row[19:]
        assert triton_words(quads, rest, key) == [run([quad, *rest], key) for quad in quads]


@needs_triton
def test_triton_normals_to_float32_rounding() -> None:
    """Also at both ends of the words, where a hardware logarithm has no digits left."""
    ends = torch.cat([torch.arange(128), 2**31 - 64 + torch.arange(128), 2**32 - 128 + torch.arange(128)])
    random = torch.randint(0, 2**32, (2, 2048 - len(ends)), generator=torch.Generator().manual_seed(1))
    drawn = torch.cat([ends.expand(2, -1), random], dim=1)
    out = torch.zeros(3, 2048, device=DEVICE)
    _normals_kernel[(1,)](out, drawn.to(DEVICE), SIZE=2048)
    exact = drawn.double() / 2**32
    radius = (-2 * torch.log1p(-(1 - (drawn[0].double() + 1) / 2**32))).sqrt()
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(out[0].cpu().double(), radius, rtol=4 * eps, atol=0)
    torch.testing.assert_close(out[1].cpu().double(), (2 * math.pi * exact[1]).cos(), rtol=0, atol=2 * eps)
    torch.testing.assert_close(out[2].cpu().double(), (2 * math.pi * exact[1]).sin(), rtol=0, atol=2 * eps)
