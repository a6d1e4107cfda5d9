"""Group normalisation with SiLU: kernels (in the interpreter) and twins against torch in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from alpenglow.kernels import group_norm_silu as module
from alpenglow.kernels import triton_support
from alpenglow.kernels.group_norm_silu import composition, group_norm_silu, launch, launch_backward
from alpenglow.networks.layers import GroupNorm, UNetBlock

EPS = 1e-5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

pytestmark = pytest.mark.skipif(not triton_support.AVAILABLE, reason="needs triton")


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def layer(channels: int) -> tuple[Tensor, Tensor]:
    return 1 + 0.3 * numbers(channels, seed=1), 0.3 * numbers(channels, seed=2)


def reference(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, shift: Tensor | None, silu: bool, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Result by its formula and derivative by autograd, in float64."""
    x = x.double().requires_grad_()
    shifted = x if shift is None else x + shift.double()[:, :, None, None]
    group = shifted.reshape(len(x), groups, x.shape[1:].numel() // groups)
    centred = group - group.mean(2, keepdim=True)
    xhat = (centred * (centred.square().mean(2, keepdim=True) + EPS).rsqrt()).view(x.shape)
    z = weight.double()[:, None, None] * xhat + bias.double()[:, None, None]
    y = F.silu(z) if silu else z
    return y.detach(), torch.autograd.grad(y, x, grad.double())[0]


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "channels last":
        return x.contiguous(memory_format=torch.channels_last)
    return x.mT.contiguous().mT if layout == "transposed" else x


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(0, 2),
    groups=st.integers(1, 4),
    per_group=st.integers(1, 5),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    layout=st.sampled_from(["contiguous", "channels last", "transposed"]),
    dtype=st.sampled_from(DTYPES),
    silu=st.booleans(),
    shift=st.sampled_from([None, 1, 0]),
)
def test_kernels_against_float64(
    batch: int,
    groups: int,
    per_group: int,
    height: int,
    width: int,
    layout: str,
    dtype: torch.dtype,
    silu: bool,
    shift: int | None,
) -> None:
    channels = groups * per_group
    weight, bias = layer(channels)
    x = laid_out((3 + numbers(batch, channels, height, width)).to(dtype), layout)
    grad = numbers(batch, channels, height, width, seed=3).to(dtype)
    moved = None if shift is None else numbers(shift or batch, channels, seed=4)
    y, mean, rstd = launch(x, weight, bias, moved, groups, EPS, silu)
    dx = launch_backward(grad, x, weight, bias, moved, mean, rstd, silu)
    expected = reference(x, groups, weight, bias, moved, silu, grad)
    # One rounding of the result (the interpreter cuts bfloat16 off), and float32's of numbers of order 5,
    # which 1 / standard deviation magnifies, and the derivative once more.
    rtol, rounding = torch.finfo(dtype).eps, 2e-6
    scale = max(1.0, float(rstd.max())) if rstd.numel() else 1.0
    torch.testing.assert_close(y.double(), expected[0], rtol=rtol, atol=rounding * scale)
    torch.testing.assert_close(dx.double(), expected[1], rtol=rtol, atol=rounding * scale**2)
    assert y.dtype == dx.dtype == dtype
    kept = torch.channels_last if batch and layout == "channels last" else torch.contiguous_format
    assert y.is_contiguous(memory_format=kept)
    assert dx.is_contiguous(memory_format=kept)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # outside the image, in the interpreter
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_groups_that_take_two_passes(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles small enough for the loop; a large mean, where sums of squares would cancel."""
    monkeypatch.setattr(module, "WHOLE", 64)
    monkeypatch.setattr(module, "LOOP", 64)
    weight, bias = layer(6)
    x = laid_out(1000 + numbers(2, 6, 9, 11), layout)
    grad, shift = numbers(2, 6, 9, 11, seed=3), numbers(2, 6, seed=4)
    y, mean, rstd = launch(x, weight, bias, shift, 2, EPS, True)
    dx = launch_backward(grad, x, weight, bias, shift, mean, rstd, True)
    expected = reference(x, 2, weight, bias, shift, True, grad)
    # float32 holds numbers near 1000 to 6e-5.
    torch.testing.assert_close(y.double(), expected[0], rtol=1e-4, atol=5e-4)
    torch.testing.assert_close(dx.double(), expected[1], rtol=1e-4, atol=5e-4)


def test_twins_in_float64() -> None:
    weight, bias = (part.double() for part in layer(6))
    x, grad, shift = numbers(2, 6, 4, 3).double(), numbers(2, 6, 4, 3, seed=3).double(), numbers(2, 6, seed=4)
    for silu in (True, False):
        for moved in (None, shift.double()):
            y, mean, rstd = module.twin(x, weight, bias, moved, 3, EPS, silu)
            dx = module.twin_backward(grad, x, weight, bias, moved, mean, rstd, silu)
            expected = reference(x, 3, weight, bias, moved, silu, grad)
            torch.testing.assert_close(y, expected[0])
            torch.testing.assert_close(dx, expected[1])
    assert torch.autograd.gradcheck(
        lambda x: module._forward(x, weight, bias, None, 3, EPS, True)[0], x.clone().requires_grad_()
    )


def test_opcheck() -> None:
    weight, bias = layer(6)
    x = numbers(2, 6, 4, 3)
    for image, shift in ((x, None), (laid_out(x, "channels last"), numbers(2, 6, seed=4))):
        torch.library.opcheck(
            module._forward, (image.clone().requires_grad_(), weight, bias, shift, 3, EPS, True)
        )
        _, mean, rstd = module._forward(image, weight, bias, shift, 3, EPS, True)
        torch.library.opcheck(module._backward, (image, image, weight, bias, shift, mean, rstd, True))


def test_second_derivative_is_refused() -> None:
    weight, bias = layer(6)
    x = numbers(2, 6, 4, 3).requires_grad_()
    y = module._forward(x, weight, bias, None, 3, EPS, True)[0]
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(dx.sum(), x)


def test_training_takes_the_composition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that learn need their own derivative and, in distillation, a second one."""
    monkeypatch.setattr(module, "_fused", lambda x: True)
    norm, frozen = GroupNorm(8).to(DEVICE), GroupNorm(8).to(DEVICE).requires_grad_(False)
    frozen.load_state_dict(norm.state_dict())
    x = numbers(2, 8, 4, 3).requires_grad_()
    y, fused = norm(x, silu=True), frozen(x, silu=True)
    torch.testing.assert_close(y, fused)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    torch.autograd.grad(dx.square().sum(), norm.weight)
    torch.testing.assert_close(torch.autograd.grad(fused.sum(), x)[0], dx)
    assert "alpenglow" in type(fused.grad_fn).__name__.lower()


def test_a_block_of_the_network_runs_and_traces_through_the_operators(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    block = UNetBlock(16, 16, emb_channels=4, attention=True).requires_grad_(False).to(DEVICE).eval()
    x, emb = numbers(3, 16, 4, 6), numbers(3, 4, seed=1)

    def run(x: Tensor, emb: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        y = block(x, emb)
        return y, torch.autograd.grad(y.square().sum(), x)[0]

    expected = run(x, emb)
    monkeypatch.setattr(module, "_fused", lambda x: True)
    monkeypatch.setattr(module, "launch", module.twin)
    monkeypatch.setattr(module, "launch_backward", module.twin_backward)
    graph = make_fx(run, tracing_mode="symbolic", _allow_non_fake_inputs=True)(x[:2], emb[:2])
    names = [str(node.target) for node in graph.graph.nodes if "alpenglow" in str(node.target)]
    assert len(names) == 6  # forward and backward of three normalisations
    for results in (run(x, emb), graph(x, emb)):
        for one, other in zip(results, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_cpu_keeps_torch_operators_bit_for_bit() -> None:
    x, weight, bias = numbers(2, 8, 5, 5).cpu(), *(part.cpu() for part in layer(8))
    assert torch.equal(
        group_norm_silu(x, 2, weight, bias, EPS), F.silu(F.group_norm(x, 2, weight, bias, EPS))
    )
    assert torch.equal(
        composition(x, 2, weight, bias, EPS, silu=False), F.group_norm(x, 2, weight, bias, EPS)
    )


@pytest.mark.parametrize(
    ("shape", "groups", "size"), [((2, 6, 4), 2, 6), ((2, 6, 4, 4), 4, 6), ((2, 6, 4, 4), 2, 5)]
)
def test_bad_input(shape: tuple[int, ...], groups: int, size: int) -> None:
    with pytest.raises(ValueError, match=r"expected \[B, C, H, W\], a divisor of C, \[C\] and \[C\]"):
        group_norm_silu(torch.zeros(shape), groups, torch.ones(size), torch.zeros(size), EPS)
