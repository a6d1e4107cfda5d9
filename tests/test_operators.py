"""Measurement operators: adjoints, agreement with other libraries, batch invariance, errors."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

import alpenglow.operators
from alpenglow.operators import (
    Convolution,
    Denoising,
    FourierSampling,
    GaussianBlur,
    Inpainting,
    LinearOperator,
    MotionBlur,
    SenseMRI,
    SuperResolution,
    from_deepinv,
    from_sigpy,
)

Shape = tuple[int, int, int]


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def some_mask(*shape: int, seed: int = 1) -> Tensor:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4
    mask[..., 0, 0] = True
    return mask


def functions(H: int, W: int, *, tolerance: float = 1e-6) -> LinearOperator:
    """A blur of which half the pixels are seen: no fast basis."""
    blur, mask = GaussianBlur(0.8), some_mask(H, W)
    return LinearOperator.from_functions(
        lambda x: blur.forward(x) * mask,
        lambda y: blur.adjoint(y * mask),
        tolerance=tolerance,
        max_iterations=2000,
    )


def two_coils(H: int, W: int, *, tolerance: float = 1e-6) -> LinearOperator:
    """A small parallel MRI: complex measurements [2, H, W] of complex images."""
    coils = torch.complex(rand(2, H, W, seed=5), rand(2, H, W, seed=6))
    sampling = FourierSampling(some_mask(H, W))

    def forward(x: Tensor) -> Tensor:
        image = torch.complex(x[:, 0], x[:, 1])
        weighted = [coil.to(image.dtype) * image for coil in coils]
        return torch.cat([sampling.forward(torch.stack([w.real, w.imag], 1)) for w in weighted], 1)

    def adjoint(y: Tensor) -> Tensor:
        parts = [sampling.adjoint(y[:, c : c + 1]) for c in range(2)]
        images = [
            torch.complex(p[:, 0], p[:, 1]) * c.conj().to(y.dtype) for p, c in zip(parts, coils, strict=True)
        ]
        total = images[0] + images[1]
        return torch.stack([total.real, total.imag], 1)

    return LinearOperator.from_functions(forward, adjoint, tolerance=tolerance, max_iterations=2000)


def sense(H: int, W: int, *, lines: bool = False) -> SenseMRI:
    """Three coils; with lines, a mask of whole columns."""
    mask = some_mask(1, W).expand(H, W) if lines else some_mask(H, W)
    return SenseMRI(torch.complex(rand(3, H, W, seed=5), rand(3, H, W, seed=6)) / 6**0.5, mask)


# name -> (how to build the operator for images [C, H, W], the C it takes, what must divide H and W)
OPERATORS: dict[str, tuple[Callable[[int, int, int], LinearOperator], tuple[int, ...], int]] = {
    "denoising": (lambda C, H, W: Denoising(), (1, 2, 3), 1),
    "inpainting": (lambda C, H, W: Inpainting(some_mask(H, W)), (1, 2, 3), 1),
    "inpainting-channels": (lambda C, H, W: Inpainting(some_mask(C, H, W)), (1, 2, 3), 1),
    "convolution": (lambda C, H, W: Convolution(rand(3, 4)), (1, 2, 3), 1),
    "gaussian": (lambda C, H, W: GaussianBlur(1.2), (1, 2, 3), 1),
    "motion": (lambda C, H, W: MotionBlur(5.5, 30), (1, 2, 3), 1),
    "box-2": (lambda C, H, W: SuperResolution(2), (1, 2, 3), 2),
    "gaussian-2": (lambda C, H, W: SuperResolution(2, "gaussian"), (1, 2, 3), 2),
    "bicubic-4": (lambda C, H, W: SuperResolution(4, "bicubic"), (1, 2, 3), 4),
    "fourier-complex": (lambda C, H, W: FourierSampling(some_mask(H, W)), (2,), 1),
    "fourier-real": (lambda C, H, W: FourierSampling(some_mask(H, W), channels=1), (1,), 1),
    "sense": (lambda C, H, W: sense(H, W), (2,), 1),
    "sense-columns": (lambda C, H, W: sense(H, W, lines=True), (2,), 1),
    "functions": (lambda C, H, W: functions(H, W), (1, 2, 3), 1),
    "functions-complex": (lambda C, H, W: two_coils(H, W), (2,), 1),
}

BATCH_CASES = [
    (name, size)
    for name in OPERATORS
    for size in ((8, 8), (12, 20), (64, 64))
    # Of slow CG: the transforms are those of the others.
    if size != (64, 64) or name not in ("functions", "functions-complex", "sense")
]


def measurement(operator: LinearOperator, batch: int, shape: Shape, dtype: torch.dtype, seed: int) -> Tensor:
    operator.measurement_shape(shape)
    size = (batch, *operator.measurement_shape(shape))
    real = rand(*size, seed=seed, dtype=dtype)
    if not operator.measurement_is_complex:
        return real
    return torch.complex(real, rand(*size, seed=seed + 1, dtype=dtype))


def inner(a: Tensor, b: Tensor) -> float:
    return float((a.conj() * b).real.sum())


@pytest.mark.parametrize("name", OPERATORS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_adjoint(name: str, data: st.DataObject) -> None:
    build, channels, divisor = OPERATORS[name]
    C = data.draw(st.sampled_from(channels))
    H, W = (divisor * data.draw(st.integers(1, 18 // divisor)) for _ in range(2))
    operator = build(C, H, W).to("cpu", torch.float64)
    x, y = rand(2, C, H, W, seed=3), measurement(operator, 2, (C, H, W), torch.float64, seed=4)
    image = operator.forward(x)
    assert image.shape == y.shape
    assert image.dtype == y.dtype
    back = operator.adjoint(y)
    assert back.shape == x.shape
    assert back.dtype == x.dtype
    scale = float(image.abs().square().sum().sqrt() * y.abs().square().sum().sqrt()) + 1e-30
    assert abs(inner(image, y) - inner(x, back)) <= 1e-10 * scale
    torch.testing.assert_close(operator.normal(x), operator.adjoint(image), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "size"), BATCH_CASES)
def test_a_result_does_not_depend_on_the_batch(name: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    build, channels, divisor = OPERATORS[name]
    H, W = size if divisor > 1 or size == (64, 64) else (size[0] - 1, size[1] + 1)
    shape = (channels[0], H, W)
    operator = build(*shape).to("cpu", dtype)
    x, y = rand(7, *shape, seed=3, dtype=dtype), measurement(operator, 7, shape, dtype, seed=4)
    sigma = torch.linspace(0.05, 2, 7)
    n = [
        rand(7, *shape, seed=8, dtype=dtype),
        rand(7, *y.shape[1:], *[2] * y.is_complex(), seed=9, dtype=dtype),
    ]

    def run(chosen: Tensor) -> list[Tensor]:
        numbers = iter([part[chosen] for part in n])
        return [
            operator.forward(x[chosen]),
            operator.adjoint(y[chosen]),
            operator.normal(x[chosen]),
            operator.solve(x[chosen], sigma[chosen], 0.3),
            operator.conditional_mean(y[chosen], x[chosen], sigma[chosen], 0.3),
            operator.draw(lambda _: next(numbers), shape, sigma[chosen], 0.3),
        ]

    together = run(torch.arange(7))
    order = torch.tensor([4, 0, 6, 2])
    for result, whole in zip(run(order), together, strict=True):
        assert torch.equal(result, whole[order])
    for index in range(7):
        for result, whole in zip(run(torch.tensor([index])), together, strict=True):
            assert torch.equal(result[0], whole[index])


def test_convolution_is_the_sum_it_says() -> None:
    x, kernel = rand(1, 1, 6, 5), rand(4, 3, seed=2)
    expected = torch.zeros_like(x)
    for i in range(4):
        for j in range(3):
            expected += kernel[i, j] * x.roll((i - 2, j - 1), (-2, -1))
    torch.testing.assert_close(Convolution(kernel.numpy()).forward(x), expected)


@pytest.mark.parametrize("shape", [(16, 16), (15, 21), (9, 4)], ids=str)
def test_gaussian_blur_is_scipys(shape: tuple[int, int]) -> None:
    x = rand(1, 1, *shape)
    for sigma in (0.1, 0.7, 3.0):
        expected = scipy.ndimage.gaussian_filter(x[0, 0].numpy(), sigma, mode="wrap", truncate=4.0)
        np.testing.assert_allclose(GaussianBlur(sigma).forward(x)[0, 0].numpy(), expected, atol=1e-12)


def test_motion_blur_runs_along_its_angle() -> None:
    for length, angle in ((1e-3, 0), (7, 0), (7.3, 25), (12, 90), (4, -400)):
        kernel = MotionBlur(length, angle).kernel
        assert float(kernel.sum()) == pytest.approx(1)
        torch.testing.assert_close(kernel, kernel.flip((0, 1)))
    flat = MotionBlur(7, 0).kernel
    radius = flat.shape[0] // 2
    # Bilinear weights integrate to 1 / 7 a pixel inside, and to 7/8 and 1/8 of it at an end at 3.5 pixels.
    torch.testing.assert_close(
        7 * flat[radius, radius : radius + 5],
        torch.tensor([1, 1, 1, 0.875, 0.125], dtype=torch.float64),
        atol=1e-4,
        rtol=0,
    )
    assert float(flat[radius].sum()) == pytest.approx(1)
    torch.testing.assert_close(MotionBlur(7, 90).kernel, flat.T)
    rising = MotionBlur(9, 45).kernel  # to the right means up, towards smaller row indices
    centre = rising.shape[0] // 2
    assert rising[centre - 2, centre + 2] > 10 * rising[centre + 2, centre + 2]


def test_motion_kernel_has_the_second_moments_of_its_path() -> None:
    length, angle = 20.0, 30.0
    kernel = MotionBlur(length, angle).kernel
    offset = torch.arange(len(kernel), dtype=torch.float64) - len(kernel) // 2
    along = length**2 / 12
    rows = float((kernel.sum(1) * offset.square()).sum())
    columns = float((kernel.sum(0) * offset.square()).sum())
    # Bilinear sharing adds the mean of t (1 - t), 1/6, to each variance.
    assert rows == pytest.approx(along * math.sin(math.radians(angle)) ** 2 + 1 / 6, abs=0.02)
    assert columns == pytest.approx(along * math.cos(math.radians(angle)) ** 2 + 1 / 6, abs=0.02)


def test_super_resolution_box_is_the_block_mean() -> None:
    x = rand(2, 3, 12, 18)
    expected = x.reshape(2, 3, 4, 3, 6, 3).mean((3, 5))
    torch.testing.assert_close(SuperResolution(3).forward(x), expected)


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_super_resolution_bicubic_is_pillows(factor: int) -> None:
    x = rand(12 * factor, 10 * factor, dtype=torch.float32)
    expected = np.asarray(Image.fromarray(x.numpy()).resize((10, 12), Image.Resampling.BICUBIC))
    small = SuperResolution(factor, "bicubic").forward(x[None, None])[0, 0].numpy()
    np.testing.assert_allclose(small[2:-2, 2:-2], expected[2:-2, 2:-2], atol=1e-5)


@pytest.mark.parametrize("filter", ["box", "gaussian", "bicubic"])
def test_super_resolution_filters_keep_constants_and_their_place(filter: str) -> None:
    ramp = torch.arange(48, dtype=torch.float64).expand(1, 1, 48, 48)
    small = SuperResolution(4, filter).forward(ramp)[0, 0]  # type: ignore[arg-type]
    centres = 4 * torch.arange(12, dtype=torch.float64) + 1.5
    torch.testing.assert_close(small[3, 3:9], centres[3:9])
    torch.testing.assert_close(
        SuperResolution(4, filter).forward(0 * ramp + 1), torch.ones(1, 1, 12, 12).double()
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(8, 8), (9, 6), (7, 11)], ids=str)
def test_fourier_sampling_is_the_centred_fft(shape: tuple[int, int]) -> None:
    mask = some_mask(*shape)
    x = rand(2, 2, *shape)
    image = x[:, 0].numpy() + 1j * x[:, 1].numpy()
    axes = (-2, -1)

    def k_space(z: np.ndarray) -> np.ndarray:
        return np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(z, axes), norm="ortho"), axes) * mask.numpy()

    complex_sampling = FourierSampling(mask)
    np.testing.assert_allclose(complex_sampling.forward(x)[:, 0].numpy(), k_space(image), atol=1e-12)
    real = FourierSampling(mask.int().numpy(), channels=1).forward(x[:, :1])
    np.testing.assert_allclose(real[:, 0].numpy(), k_space(image.real), atol=1e-12)
    whole = FourierSampling(torch.ones(shape))
    torch.testing.assert_close(whole.adjoint(whole.forward(x)), x)


def test_hidden_entries_are_ignored() -> None:
    mask = some_mask(6, 7)
    y = rand(1, 2, 6, 7)
    assert torch.equal(Inpainting(mask).adjoint(y), Inpainting(mask).adjoint(y * mask))
    sampling, k_space = FourierSampling(mask), torch.complex(y[:, :1], y[:, 1:])
    assert torch.equal(sampling.adjoint(k_space), sampling.adjoint(k_space * mask))


@pytest.mark.parametrize("name", OPERATORS)
def test_gradients_after_use_in_inference_mode(name: str) -> None:
    build, channels, divisor = OPERATORS[name]
    shape = (channels[0], 4 * divisor, 4 * divisor)
    operator = build(*shape).to("cpu", torch.float64)
    x = rand(2, *shape)
    with torch.inference_mode():
        y = operator.forward(rand(1, *shape, seed=2))
        operator.solve(x, torch.ones(1), 0.5)
    x.requires_grad_(True)
    (operator.forward(x) - y.clone()).abs().square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * operator.adjoint(operator.forward(x.detach()) - y))


def test_everything_public_is_exported() -> None:
    for name in alpenglow.operators.__all__:
        assert hasattr(alpenglow.operators, name)
    for operator in (Denoising(), GaussianBlur(1.0), SuperResolution(2)):
        assert operator.to("cpu", torch.float64) is operator
    assert torch.equal(Inpainting(some_mask(3, 4)).to("cpu").mask[0], some_mask(3, 4))
    moved = FourierSampling(some_mask(3, 4), channels=1).to("cpu", torch.float64)
    assert moved.channels == 1
    assert torch.equal(moved.mask, some_mask(3, 4))


class DlpackOnly:
    """What a CuPy array looks like to us."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **options: object) -> object:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


def test_check_measurement_takes_any_array() -> None:
    operator, shape = Denoising(), (2, 4, 6)
    y = rand(2, 4, 6).numpy()
    read_only = y.copy()
    read_only.flags.writeable = False
    for given_y in (torch.from_numpy(y), y, DlpackOnly(y), y.astype(">f8"), read_only, y[:, ::-1][:, ::-1]):
        checked = operator.check_measurement(given_y, shape)
        assert torch.equal(checked, torch.from_numpy(y)[None])
    batch = operator.check_measurement(rand(3, 2, 4, 6), shape)
    assert batch.shape == (3, 2, 4, 6)
    assert functions(4, 6).check_measurement(y.astype(np.float32), shape).shape == (1, 2, 4, 6)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (np.zeros((4, 5), np.float32), "shape"),
        (np.zeros((1, 5, 4), np.float32), "shape"),
        (np.zeros((0, 1, 4, 5), np.float32), "shape"),
        (np.zeros((1, 1, 1, 4, 5), np.float32), "shape"),
        (np.zeros((1, 4, 5), np.uint8), "uint8.*float"),
        (np.zeros((1, 4, 5), np.float16), "float16"),
        (np.zeros((1, 4, 5), np.complex64), "complex64"),
        (np.full((1, 4, 5), np.nan, np.float32), "NaN"),
        (torch.full((1, 4, 5), math.inf), "infinity"),
        (np.full((1, 4, 5), "a"), "numeric"),
        ([[0.0]], "list"),
    ],
)
def test_check_measurement_refuses(y: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Denoising().check_measurement(y, (1, 4, 5))


def test_check_measurement_wants_complex_k_space() -> None:
    operator = FourierSampling(some_mask(4, 5))
    with pytest.raises(ValueError, match=r"torch\.complex"):
        operator.check_measurement(torch.zeros(1, 4, 5), (2, 4, 5))
    with pytest.raises(ValueError, match="NaN"):
        operator.check_measurement(torch.full((1, 4, 5), complex(0, math.nan)), (2, 4, 5))
    assert operator.check_measurement(torch.zeros(1, 4, 5, dtype=torch.complex64), (2, 4, 5)).ndim == 4


@pytest.mark.parametrize(
    ("operator", "shape"),
    [
        (Denoising(), (4, 4)),
        (Denoising(), (0, 4, 4)),
        (Inpainting(some_mask(4, 5)), (1, 5, 4)),
        (Inpainting(some_mask(2, 4, 5)), (3, 4, 5)),
        (SuperResolution(2), (1, 4, 5)),
        (FourierSampling(some_mask(4, 5)), (1, 4, 5)),
        (FourierSampling(some_mask(4, 5)), (3, 4, 5)),
        (FourierSampling(some_mask(4, 5), channels=1), (2, 4, 5)),
        (FourierSampling(some_mask(4, 5)), (2, 5, 4)),
    ],
)
def test_images_that_do_not_fit(operator: LinearOperator, shape: Shape) -> None:
    with pytest.raises(ValueError, match="expect"):
        operator.check_image(shape)
    with pytest.raises(ValueError, match="expect"):
        operator.measurement_shape(shape)
    with pytest.raises(ValueError, match="expect"):
        operator.check_measurement(torch.zeros(1, 4, 4), shape)


@pytest.mark.parametrize(("channels", "given"), [(2, 1), (2, 3), (1, 2)])
def test_fourier_sampling_measures_only_its_own_images(channels: int, given: int) -> None:
    """Three channels would be taken for one real and two imaginary parts."""
    operator = FourierSampling(some_mask(4, 5), channels=channels)
    with pytest.raises(ValueError, match=f"expects \\({channels}, 4, 5\\)"):
        operator.forward(torch.zeros(2, given, 4, 5))


@pytest.mark.parametrize(
    "build",
    [
        lambda: Inpainting(torch.zeros(4, 4)),
        lambda: Inpainting(torch.full((4, 4), 0.5)),
        lambda: Inpainting(torch.full((4, 4), math.nan)),
        lambda: Inpainting(torch.ones(1, 1, 4, 4)),
        lambda: Inpainting(torch.ones(0, 4)),
        lambda: Inpainting("mask"),
        lambda: FourierSampling(np.zeros((4, 4))),
        lambda: FourierSampling(np.ones((1, 4, 4))),
        lambda: FourierSampling(np.ones((4, 4)), channels=3),
        lambda: GaussianBlur(0),
        lambda: GaussianBlur(-1.0),
        lambda: GaussianBlur(math.nan),
        lambda: GaussianBlur(1e4),
        lambda: GaussianBlur("wide"),  # type: ignore[arg-type]
        lambda: MotionBlur(0, 0),
        lambda: MotionBlur(math.inf, 0),
        lambda: MotionBlur(5, math.nan),
        lambda: SuperResolution(0),
        lambda: SuperResolution(-2),
        lambda: SuperResolution(2.0),  # type: ignore[arg-type]
        lambda: SuperResolution(True),
        lambda: SuperResolution(2, "lanczos"),  # type: ignore[arg-type]
        lambda: Convolution(np.ones(3)),
        lambda: Convolution(np.zeros((3, 3))),
        lambda: Convolution(np.full((3, 3), np.inf)),
        lambda: Convolution(np.ones((3, 3), np.complex64)),
        lambda: LinearOperator.from_functions(3, lambda y: y),  # type: ignore[arg-type]
        lambda: LinearOperator.from_functions(lambda x: x, lambda y: y, tolerance=0),
        lambda: LinearOperator.from_functions(lambda x: x, lambda y: y, max_iterations=0),
        lambda: from_deepinv(object()),
        lambda: from_sigpy(object()),
    ],
)
def test_constructors_refuse(build: Callable[[], LinearOperator]) -> None:
    with pytest.raises(ValueError, match=r"expected|mask (is all zero|holds)"):
        build()


def test_function_operators_that_break_their_contract() -> None:
    operator = LinearOperator.from_functions(lambda x: x.sum(0), lambda y: y[None])
    with pytest.raises(ValueError, match="expected 1 measurements"):
        operator.forward(torch.zeros(1, 2, 4, 4))
    with pytest.raises(ValueError, match="real images"):
        operator.adjoint(torch.zeros(2, 4, 4, dtype=torch.complex64))
    with pytest.raises(RuntimeError, match="measurement_shape"):
        _ = operator.measurement_is_complex


def test_from_deepinv() -> None:
    deepinv = pytest.importorskip("deepinv")
    mask = some_mask(1, 8, 8).float()
    operator = from_deepinv(deepinv.physics.Inpainting(img_size=(1, 8, 8), mask=mask))
    x, sigma = rand(2, 1, 8, 8, dtype=torch.float32), torch.tensor([0.5, 2.0])
    torch.testing.assert_close(operator.solve(x, sigma, 0.3), Inpainting(mask).solve(x, sigma, 0.3))


def test_from_sigpy() -> None:
    sigpy = pytest.importorskip("sigpy")
    mask = some_mask(8, 9)
    linop = sigpy.linop.Multiply((8, 9), mask.numpy()) * sigpy.linop.FFT((8, 9))
    operator, own = from_sigpy(linop), FourierSampling(mask)
    x = rand(3, 2, 8, 9, dtype=torch.float32)
    torch.testing.assert_close(operator.forward(x), own.forward(x)[:, 0])
    sigma = torch.tensor([0.5, 1.0, 2.0])
    torch.testing.assert_close(operator.solve(x, sigma, 0.3), own.solve(x, sigma, 0.3))
    assert operator.measurement_shape((2, 8, 9)) == (8, 9)
    with pytest.raises(ValueError, match="expects"):
        operator.measurement_shape((1, 8, 9))
