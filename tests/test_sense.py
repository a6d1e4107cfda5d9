"""Multi-coil k-space: kernels (in the interpreter) and twins against formulas in complex128."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alpenglow.kernels import sense as module
from alpenglow.kernels import triton_support
from alpenglow.kernels.sense import (
    coil_combine,
    coil_expand,
    launch_combine,
    launch_expand,
    launch_mask,
    mask_kspace,
    prepare,
    sense_adjoint,
    sense_forward,
    sense_normal,
    twin_combine,
    twin_expand,
    twin_mask,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(1, 6, 8), (3, 5, 7), (2, 4, 9), (4, 7, 2), (1, 1, 1)]

needs_triton = pytest.mark.skipif(not triton_support.AVAILABLE, reason="needs triton")


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.complex128) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def problem(coils: int, height: int, width: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """(images, maps, mask)"""
    mask = torch.rand(height, width, generator=torch.Generator().manual_seed(3)) < 0.6
    images = numbers(batch, 2, height, width, dtype=torch.float64)
    return images, numbers(coils, height, width, seed=1), mask


def by_shifts(x: Tensor, maps: Tensor, mask: Tensor) -> Tensor:
    coil_images = torch.complex(x[:, :1], x[:, 1:]) * maps
    shifted = torch.fft.ifftshift(coil_images, dim=(-2, -1))
    return mask * torch.fft.fftshift(torch.fft.fft2(shifted, norm="ortho"), dim=(-2, -1))


@pytest.mark.parametrize("size", SIZES)
def test_forward_is_the_formula_with_shifts(size: tuple[int, int, int]) -> None:
    x, maps, mask = problem(*size)
    expected = by_shifts(x, maps, mask)
    torch.testing.assert_close(sense_forward(x, prepare(maps, mask)), expected, rtol=1e-12, atol=1e-13)
    single = sense_forward(x.float(), prepare(maps.to(torch.complex64), mask))
    torch.testing.assert_close(single, expected.to(torch.complex64), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_adjoint_and_normal(size: tuple[int, int, int]) -> None:
    x, maps, mask = problem(*size)
    sense = prepare(maps, mask * torch.rand(mask.shape))  # a real weight as well as a mask
    y = numbers(2, *size, seed=5)
    left = torch.vdot(sense_forward(x, sense).flatten(), y.flatten()).real
    right = torch.dot(x.flatten(), sense_adjoint(y, sense).flatten())
    assert abs(left - right) <= 1e-10 * max(1.0, abs(left))
    through_both = sense_adjoint(sense_forward(x, sense), sense)
    torch.testing.assert_close(sense_normal(x, sense), through_both, rtol=1e-12, atol=1e-13)


def test_even_sizes_are_centred_by_signs_alone() -> None:
    maps = numbers(2, 6, 8).to(torch.complex64)
    sense = prepare(maps, torch.ones(6, 8))
    assert torch.equal(sense.maps.abs(), maps.abs())
    checkerboard = 1 - 2 * ((torch.arange(6)[:, None] + torch.arange(8)) % 2)
    assert torch.equal(sense.maps, maps * checkerboard)
    assert torch.count_nonzero(sense.weight.imag) == 0


def test_bitwise_the_same_in_every_batch() -> None:
    for size in ((1, 6, 8), (3, 5, 7), (2, 16, 16)):
        x, maps, mask = problem(*size, batch=5)
        sense, x = prepare(maps.to(torch.complex64), mask), x.float()
        y, normal = sense_forward(x, sense), sense_normal(x, sense)
        back = sense_adjoint(y, sense)
        for i in range(5):
            assert torch.equal(sense_forward(x[i : i + 1], sense), y[i : i + 1])
            assert torch.equal(sense_normal(x[i : i + 1], sense), normal[i : i + 1])
            assert torch.equal(sense_adjoint(y[i : i + 1], sense), back[i : i + 1])


def test_gradient_is_the_normal_operator() -> None:
    x, maps, mask = problem(3, 5, 7)
    sense = prepare(maps, mask)
    x.requires_grad_(True)
    sense_forward(x, sense).abs().square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * sense_normal(x.detach(), sense))


def test_single_points_of_a_full_mask() -> None:
    """The centre of k-space, [H // 2, W // 2], is the mean; A^T A of a coil of modulus 1 is the identity."""
    for height, width in ((6, 8), (5, 7)):
        x = numbers(1, 2, height, width, dtype=torch.float64)
        sense = prepare(torch.ones(1, height, width, dtype=torch.complex128), torch.ones(height, width))
        centre = sense_forward(x, sense)[0, 0, height // 2, width // 2]
        expected = torch.complex(x[0, 0].sum(), x[0, 1].sum()) / (height * width) ** 0.5
        torch.testing.assert_close(centre, expected)
        torch.testing.assert_close(sense_normal(x, sense), x)


# --- Triton, in the interpreter where there is no GPU ---


@needs_triton
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 3),
    coils=st.integers(1, 4),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    strided=st.booleans(),
)
def test_kernels_against_complex128(batch: int, coils: int, height: int, width: int, strided: bool) -> None:
    x, maps, mask = problem(coils, height, width, batch)
    z = numbers(batch, coils, height, width, seed=2)
    weights = (mask.double(), numbers(height, width, seed=4))

    def given_as(tensor: Tensor) -> Tensor:
        """In single precision; with the last two dimensions transposed in memory."""
        tensor = tensor.to(torch.complex64 if tensor.is_complex() else torch.float32)
        return (tensor.mT.contiguous().mT if strided else tensor).to(DEVICE)

    def check(got: Tensor, expected: Tensor) -> None:
        assert got.is_contiguous()
        torch.testing.assert_close(got.cpu(), expected.to(got.dtype), rtol=1e-5, atol=1e-5)

    expand = torch.complex(x[:, :1], x[:, 1:]) * maps
    check(launch_expand(given_as(x), given_as(maps)), expand)
    combine = (z * maps.conj()).sum(1)
    check(launch_combine(given_as(z), given_as(maps)), torch.stack([combine.real, combine.imag], 1))
    check(launch_combine(given_as(z.conj()), given_as(maps)), twin_combine(z.conj(), maps))
    for weight in weights:
        check(launch_mask(given_as(z), given_as(weight)), z * weight)
        check(twin_mask(z, weight), z * weight)
    check(twin_expand(x, maps), expand)


@needs_triton
def test_kernels_give_an_image_the_same_bits_in_every_batch() -> None:
    x, maps, mask = problem(3, 9, 11, batch=3)
    x, maps = x.float().to(DEVICE), maps.to(torch.complex64).to(DEVICE)
    images = launch_expand(x, maps)
    combined, weight = launch_combine(images, maps), mask.float().to(DEVICE)
    masked = launch_mask(images, weight)
    for i in range(3):
        one = slice(i, i + 1)
        assert torch.equal(launch_expand(x[one], maps), images[one])
        assert torch.equal(launch_combine(images[one], maps), combined[one])
        assert torch.equal(launch_mask(images[one], weight), masked[one])


def test_operators() -> None:
    x, maps, mask = problem(2, 3, 4)
    z, weight = numbers(2, 2, 3, 4), numbers(3, 4, seed=7)
    torch.library.opcheck(module._expand, (x.requires_grad_(True), maps))
    torch.library.opcheck(module._combine, (z.clone().requires_grad_(True), maps))
    torch.library.opcheck(module._mask, (z.clone().requires_grad_(True), weight))
    torch.library.opcheck(module._mask, (z.mT.contiguous().mT, mask.double()))


def test_what_does_not_fit() -> None:
    x, maps, _ = problem(2, 3, 4)
    z = numbers(2, 2, 3, 4)
    with pytest.raises(ValueError, match="one precision"):
        coil_expand(x.float(), maps)
    with pytest.raises(ValueError, match="B, 2, H, W"):
        coil_expand(x[:, :1], maps)
    with pytest.raises(ValueError, match="B, coils, H, W"):
        coil_combine(z[:, :1], maps)
    with pytest.raises(ValueError, match="weight"):
        mask_kspace(z, torch.ones(4, 3))
    with pytest.raises(ValueError, match="complex"):
        mask_kspace(x, torch.ones(3, 4))
