"""The exported graph of (E, G): its operators against autograd, whole networks against the prior."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alpenglow.export.decompositions import TABLE
from alpenglow.export.gradient_graph import gradient_graph
from alpenglow.networks.denoiser import EDMDenoiser
from alpenglow.priors.network import NetworkPrior
from tests.tiny import randomise

aten = torch.ops.aten
DDPM = {
    "img_resolution": 8, "in_channels": 4, "out_channels": 4, "model_channels": 8, "channel_mult": [1, 2],
    "num_blocks": 1, "attn_resolutions": [4], "dropout": 0.0,
}  # fmt: skip
NCSN = DDPM | {
    "in_channels": 1, "out_channels": 1, "embedding_type": "fourier", "encoder_type": "residual",
    "decoder_type": "standard", "channel_mult_noise": 2, "resample_filter": [1, 3, 3, 1],
}  # fmt: skip
NETWORKS: dict[str, tuple[int, dict[str, Any]]] = {
    "ddpm++": (2, DDPM),
    "classes": (2, DDPM | {"label_dim": 3}),
    "ncsn++": (1, NCSN),
    "product": (2, DDPM | {"out_channels": 8}),
    "skip": (1, NCSN | {"encoder_type": "skip", "decoder_type": "skip"}),
}


def a_prior(kind: str, **options: Any) -> NetworkPrior:
    """A network whose every weight matters."""
    patch, network = NETWORKS[kind]
    form = "product" if kind == "product" else "alps"
    denoiser = EDMDenoiser.from_config(
        {"backbone": "SongUNet", "network": network, "sigma_data": 0.5, "patch": patch, "form": form}
    )
    randomise(denoiser)
    size = 8 * patch
    label = {"class_label": 1} if "label_dim" in network else {}
    return NetworkPrior(denoiser, (1, size, size), batch_size=1, **label, **options)


def inputs(prior: NetworkPrior, count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    sigma = torch.logspace(-2.7, 2, count, dtype=prior.dtype)
    noise = torch.randn(count, *prior.image_shape, generator=generator).to(prior.dtype)
    return 0.5 * noise + sigma[:, None, None, None] * noise.flip(2), sigma


@pytest.mark.slow
@pytest.mark.parametrize("kind", NETWORKS)
def test_the_graph_is_the_prior(kind: str) -> None:
    """In float64, at every level from 0.002 to 100 and for batches that were not traced."""
    prior = a_prior(kind, precision="float64")
    graph = gradient_graph(prior)
    for count in (1, 3, 7):
        x, sigma = inputs(prior, count)
        energy, grad = graph(x, sigma)
        expected_energy, expected_grad = prior.energy_and_grad(x, sigma)
        torch.testing.assert_close(energy, expected_energy, rtol=1e-10, atol=0)
        error = (grad - expected_grad).flatten(1).norm(dim=1) / expected_grad.flatten(1).norm(dim=1)
        assert error.max() < 1e-10


def test_the_graph_has_no_backward_operator_and_each_weight_once() -> None:
    prior = a_prior("ddpm++")
    graph = gradient_graph(prior)
    targets = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert not [target for target in targets if "backward" in target or "detach" in target]
    stored = sum(tensor.numel() for tensor in {id(t): t for t in graph.state_dict().values()}.values())
    weights = sum(parameter.numel() for parameter in prior.denoiser.parameters())
    # Beside the weights there are the filters of the resampling and the frequencies of the noise level.
    assert stored < 1.1 * weights


@pytest.mark.slow
def test_half_precision_stays_inside() -> None:
    """Inputs and results are float32; levels that would leave float16's range do not."""
    prior = a_prior("ddpm++", precision="float16")
    graph = gradient_graph(prior)
    x, sigma = inputs(prior, 7)
    energy, grad = graph(x, sigma)
    assert energy.dtype == grad.dtype == torch.float32
    expected = prior.energy_and_grad(x, sigma)
    assert torch.isfinite(grad).all()
    error = (grad - expected[1]).flatten(1).norm(dim=1) / expected[1].flatten(1).norm(dim=1)
    # Both round to float16, each in its own order.
    assert error.max() < 2e-3
    torch.testing.assert_close(energy, expected[0], rtol=2e-3, atol=0)


# Operators


@given(
    channels=st.integers(1, 4),
    out=st.integers(1, 3),
    size=st.tuples(st.integers(4, 9), st.integers(4, 9)),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    grouped=st.booleans(),
    transposed=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_convolution(
    channels: int, out: int, size: tuple[int, int], kernel: int, stride: int, padding: int, dilation: int,
    grouped: bool, transposed: bool,
) -> None:  # fmt: skip
    groups = channels if grouped else 1
    if padding >= dilation * (kernel - 1) + 1 or dilation * (kernel - 1) + 1 > min(size):
        return
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, channels, *size, dtype=torch.float64, generator=generator).requires_grad_()
    shape = (channels, out) if transposed else (out * groups, channels // groups)
    weight = torch.randn(*shape, kernel, kernel, dtype=torch.float64, generator=generator)
    options = ([stride] * 2, [padding] * 2, [dilation] * 2, transposed, [0, 0], groups)
    y = aten.convolution(x, weight, None, *options)
    grad = torch.randn(y.shape, dtype=torch.float64, generator=generator)
    (expected,) = torch.autograd.grad(y, x, grad)
    backward = TABLE[aten.convolution_backward.default]
    result = backward(grad, x.detach(), weight, None, *options, [True, False, False])
    torch.testing.assert_close(result[0], expected)


def test_gradients_of_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="freeze them"):
        TABLE[aten.convolution_backward.default](
            torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 1, 1), None,
            [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, True, False],
        )  # fmt: skip


@given(
    batch=st.integers(1, 3), groups=st.integers(1, 3), per_group=st.integers(1, 3), size=st.integers(2, 5),
    affine=st.booleans(),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_group_norm(batch: int, groups: int, per_group: int, size: int, affine: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    channels = groups * per_group
    x = torch.randn(batch, channels, size, size, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(channels, dtype=torch.float64, generator=generator) if affine else None
    bias = torch.randn(channels, dtype=torch.float64, generator=generator) if affine else None
    shape = (batch, channels, size * size, groups)
    expected = aten.native_group_norm(x, weight, bias, *shape, 1e-5)
    result = TABLE[aten.native_group_norm.default](x, weight, bias, *shape, 1e-5)
    for got, wanted in zip(result, expected, strict=True):
        torch.testing.assert_close(got, wanted)
    grad = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    (dx,) = torch.autograd.grad(expected[0], x, grad)
    backward = TABLE[aten.native_group_norm_backward.default]
    got = backward(grad, x.detach(), expected[1], expected[2], weight, *shape, [True, False, False])
    torch.testing.assert_close(got[0], dx)


def test_pointwise() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 7, dtype=torch.float64, generator=generator).requires_grad_()
    grad = torch.randn(4, 7, dtype=torch.float64, generator=generator)
    silu, softmax = torch.nn.functional.silu(x), x.softmax(1)
    torch.testing.assert_close(TABLE[aten.silu.default](x), silu)
    torch.testing.assert_close(
        TABLE[aten.silu_backward.default](grad, x.detach()), torch.autograd.grad(silu, x, grad)[0]
    )
    torch.testing.assert_close(
        TABLE[aten._softmax_backward_data.default](grad, softmax.detach(), 1, torch.float64),
        torch.autograd.grad(softmax, x, grad)[0],
    )
