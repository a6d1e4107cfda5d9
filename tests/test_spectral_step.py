"""The spectral step: kernel (in the interpreter) and twin against float64, and the law of its noise."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alpenglow.kernels import spectral_step as module
from alpenglow.kernels import triton_support
from alpenglow.kernels.philox import chain_counters
from alpenglow.kernels.spectral_step import Inputs, launch, spectral_normals, spectral_step, twin
from alpenglow.kernels.step_weights import StepWeights, coefficients

WEIGHTS = StepWeights(0.9, 0.2, 0.3, 0.4, 0.5, 0.6)
NOISE_STD = 0.05
SIZES = [(8, 10), (7, 9), (8, 9), (7, 10), (1, 1), (2, 2), (1, 6), (6, 1), (3, 4)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.skipif(not triton_support.AVAILABLE, reason="needs triton")


def spectra(*shape: int, seed: int) -> Tensor:
    """Half spectra of real images."""
    images = torch.randn(max(1, shape[0]), *shape[1:], generator=torch.Generator().manual_seed(seed))
    return torch.fft.rfft2(images)[: shape[0]]


def problem(batch: int, channels: int, height: int, width: int) -> dict[str, Any]:
    """Everything a step needs, chains at levels from 0.02 to 5; eigenvalues of a random convolution."""
    shape = (channels, height, width)
    m = spectra(1, height, width, seed=0)[0].abs().square() / (height * width)
    levels = torch.logspace(math.log10(0.02), math.log10(5), max(1, batch))[:batch]
    return {
        "z": spectra(batch, *shape, seed=1),
        "u": spectra(batch, *shape, seed=2),
        "grad": spectra(batch, *shape, seed=3),
        "data": spectra(1, *shape, seed=4) * m.sqrt(),
        "diagonal": m,
        "table": coefficients(levels, NOISE_STD, WEIGHTS),
        "limit": torch.full((batch,), 1e9),
        "counters": chain_counters(2**40 + 7, torch.arange(batch) + 5, iteration=3, stream=16),
        "width": width,
    }


def in_float64(given_inputs: Inputs) -> Inputs:
    wide = {torch.float32: torch.float64, torch.complex64: torch.complex128}
    return Inputs(*(v.to(wide.get(v.dtype, v.dtype)) if isinstance(v, Tensor) else v for v in given_inputs))


def on_device(given_inputs: Inputs) -> Inputs:
    return Inputs(*(v.clone().to(DEVICE) if isinstance(v, Tensor) else v for v in given_inputs))


@pytest.mark.parametrize("size", SIZES)
def test_noise_is_the_spectrum_of_white_noise(size: tuple[int, int]) -> None:
    """Exactly the spectrum of a real image, whose pixels are independent standard normals."""
    height, width = size
    count = 20_000
    noise = spectral_normals(chain_counters(3, torch.arange(count)), (1, height, width // 2 + 1), width)
    images = torch.fft.irfft2(noise, s=size)
    # irfft2 ignores what is not Hermitian: the way back shows it. Largest of 4e5 numbers of size (HW)^(1/2).
    torch.testing.assert_close(
        torch.fft.rfft2(images), noise, rtol=1e-5, atol=1e-5 * math.sqrt(height * width)
    )
    flat = images.flatten(1).double()
    covariance = flat.T @ flat / count
    # Standard errors 1 / sqrt(count) off, sqrt(2 / count) on the diagonal; at most 100^2 of them: 5 of each.
    assert (covariance - torch.eye(height * width)).abs().max() < 5 * math.sqrt(2 / count)
    assert flat.mean(0).abs().max() < 5 / math.sqrt(count)


def test_noise_of_channels_and_chains_is_independent() -> None:
    noise = spectral_normals(chain_counters(3, torch.arange(2000)), (2, 4, 3), 4)
    flat = torch.fft.irfft2(noise, s=(4, 4)).flatten(1).double()
    correlation = torch.corrcoef(flat.T)
    assert (correlation - torch.eye(32)).abs().max() < 5 / math.sqrt(2000)
    assert torch.corrcoef(flat)[0, 1].abs() < 0.9


def test_twin_is_the_step_of_its_definition() -> None:
    """In the image domain, with P and P^(1/2) as dense circulant matrices, on the twin's own noise."""
    height, width = 4, 6
    case = problem(2, 1, height, width)
    got = twin(in_float64(Inputs(**case)))
    size = height * width
    full = torch.fft.rfft2(torch.eye(size, dtype=torch.float64).view(size, height, width))
    back = lambda half: torch.fft.irfft2(half, s=(height, width)).reshape(size, -1).T  # noqa: E731
    noise = spectral_normals(case["counters"], (1, height, width // 2 + 1), width).to(torch.complex128)
    for i in range(2):
        sigma2, eta2 = case["table"][i, :2].double()
        m = case["diagonal"].double()
        P = back(full / (m / eta2 + 1 / sigma2))
        root = back(full / (m / eta2 + 1 / sigma2).sqrt())
        AtA = back(full * m)
        x, u, g, d, n = (
            torch.fft.irfft2(part.to(torch.complex128), s=(height, width)).reshape(-1)
            for part in (case["z"][i], case["u"][i], case["grad"][i], case["data"][0], noise[i])
        )
        pull = P @ ((d - AtA @ x) / eta2 - g / sigma2)
        w = root @ n
        a = WEIGHTS
        new = torch.fft.irfft2(got[0][i], s=(height, width)).reshape(-1)
        momentum = torch.fft.irfft2(got[1][i], s=(height, width)).reshape(-1)
        torch.testing.assert_close(new, x + a.z_pull * pull + a.z_u * u + a.z_w * w, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(momentum, a.u_pull * pull + a.u_u * u + a.u_w * w, rtol=1e-6, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(0, 3),
    channels=st.integers(1, 2),
    height=st.integers(1, 24),
    width=st.integers(1, 40),
    noise=st.booleans(),
    momentum=st.booleans(),
)
def test_kernel_against_float64(
    batch: int, channels: int, height: int, width: int, noise: bool, momentum: bool
) -> None:
    case = problem(batch, channels, height, width)
    case |= {} if noise else {"counters": None}
    case |= {} if momentum else {"u": None}
    expected = twin(in_float64(Inputs(**case)))
    got = launch(on_device(Inputs(**case)))
    scale = math.sqrt(height * width)  # of a coefficient
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b.to(a.dtype), rtol=2e-5, atol=1e-5 * scale)


def test_blocks_that_are_whole_and_blocks_that_are_not() -> None:
    """More coefficients than one program takes, and a row of its own for each channel's eigenvalues."""
    case = problem(2, 2, 64, 66)
    case["diagonal"] = torch.stack([case["diagonal"], case["diagonal"].flip(0)])
    expected = twin(in_float64(Inputs(**case)))
    for a, b in zip(launch(on_device(Inputs(**case))), expected, strict=True):
        torch.testing.assert_close(a.cpu(), b.to(a.dtype), rtol=2e-5, atol=1e-3)


@pytest.mark.parametrize("step", [launch, twin], ids=["kernel", "twin"])
def test_state_stays_the_spectrum_of_a_real_image(step: Any) -> None:
    for height, width in SIZES:
        z = step(on_device(Inputs(**problem(2, 1, height, width))))[0].cpu()
        again = torch.fft.rfft2(torch.fft.irfft2(z, s=(height, width)))
        torch.testing.assert_close(again, z, rtol=1e-4, atol=1e-4 * math.sqrt(height * width))


@pytest.mark.parametrize("step", [launch, twin], ids=["kernel", "twin"])
def test_what_leaves_the_range_is_held(step: Any) -> None:
    case = problem(2, 1, 6, 6)
    case["grad"][0, 0, 1, 2] = complex(math.nan, 0)
    got = step(on_device(Inputs(**case)))
    assert torch.view_as_real(got[0]).isfinite().all()
    assert got[2].isinf().tolist() == [True, False]
    held = step(on_device(Inputs(**case | {"limit": torch.tensor([-1.0])})))
    assert torch.equal(held[0].cpu(), case["z"])


@pytest.mark.parametrize("step", [launch, twin], ids=["kernel", "twin"])
def test_a_chain_does_not_depend_on_its_batch(step: Any) -> None:
    case = problem(4, 1, 6, 7)
    whole = step(on_device(Inputs(**case)))[0]
    for i in (0, 2):
        alone = {k: v[i : i + 1] for k, v in case.items() if k not in ("data", "diagonal", "width")}
        assert torch.equal(step(on_device(Inputs(**case | alone)))[0][0], whole[i])


def test_layouts_give_the_same() -> None:
    case = problem(2, 2, 6, 7)
    apart = {k: case[k].mT.contiguous().mT for k in ("z", "u", "grad", "data", "diagonal")}
    for step in (launch, twin):
        for a, b in zip(step(Inputs(**case)), step(Inputs(**case | apart)), strict=True):
            torch.testing.assert_close(a, b)


def test_opcheck() -> None:
    for case in (problem(2, 1, 4, 5), problem(2, 1, 4, 5) | {"u": None, "counters": None}):
        torch.library.opcheck(
            module._operator, tuple(Inputs(**case)),
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )  # fmt: skip


def test_bad_input() -> None:
    case = problem(2, 1, 4, 5)
    with pytest.raises(ValueError, match=r"got grad \(2, 1, 4, 2\)"):
        spectral_step(**case | {"grad": torch.zeros(2, 1, 4, 2, dtype=torch.complex64)})
    with pytest.raises(ValueError, match="half spectrum of 3 columns for images of width 8"):
        spectral_step(**case | {"width": 8})
    with pytest.raises(ValueError, match="state is complex64"):
        launch(Inputs(**case | {"z": case["z"].to(torch.complex128)}))
