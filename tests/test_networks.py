"""The networks against independent implementations of EDM's, and the energy against its definition."""

import importlib
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from alpenglow.networks.denoiser import HEADS, EDMDenoiser, energy_and_grad
from alpenglow.networks.song_unet import SongUNet

GOLDEN = Path(__file__).parent / "golden" / "edm_songunet.json"
NCSNPP = {
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}
SMALL = {
    "img_resolution": 16,
    "in_channels": 3,
    "out_channels": 3,
    "label_dim": 4,
    "augment_dim": 9,
    "model_channels": 16,
    "channel_mult": [1, 2, 3],
    "num_blocks": 2,
    "attn_resolutions": [8],
}
CASES: dict[str, dict[str, Any]] = {
    "ddpm++": SMALL,
    "ncsn++": SMALL | NCSNPP,
    "skip": SMALL | {"encoder_type": "skip", "decoder_type": "skip"},
    "skip, wide filter": SMALL | NCSNPP | {"encoder_type": "skip", "decoder_type": "skip"},
    "residual, skip": SMALL | NCSNPP | {"decoder_type": "skip"},
    "128 channels, ddpm++": SMALL | {"model_channels": 128, "channel_mult": [1, 2], "num_blocks": 1},
    "128 channels, ncsn++": SMALL | NCSNPP | {"model_channels": 128, "channel_mult": [1, 2], "num_blocks": 1},
}


def uniform(name: str, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Numbers in (-1, 1) that depend on `name` alone, from numpy, whose stream is fixed for all versions."""
    values = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).random(int(np.prod(shape)))
    return torch.from_numpy(2 * values - 1).reshape(shape).float()


def weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Deterministic weights of order one through the network; resample filters as they are."""
    filled = {}
    for key, value in state.items():
        scale = 16.0 if "freqs" in key else (3 / value[0].numel()) ** 0.5 if value.ndim > 1 else 0.5
        offset = 1.0 if "norm" in key and key.endswith("weight") else 0.0
        filled[key] = value if "resample_filter" in key else offset + scale * uniform(key, value.shape)
    return filled


def inputs(case: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    size = case["img_resolution"]
    labels = torch.eye(case["label_dim"])[[1, 3]]
    return uniform("x", (2, case["in_channels"], size, size)) * 2, torch.tensor([-0.7, 0.4]), labels


def ours(case: dict[str, Any]) -> Tensor:
    network = SongUNet(**case).eval()
    network.load_state_dict(weights(network.state_dict()), strict=True)
    with torch.no_grad():
        return network(*inputs(case))


def _edm_name(key: str) -> str:
    for theirs, edm in (("attn.norm", "norm2"), ("attn.qkv", "qkv"), ("attn.proj", "proj")):
        key = key.replace(theirs, edm)
    return key


def physicsnemo(case: dict[str, Any]) -> Tensor:
    """The output of nvidia-physicsnemo's SongUNet (Apache-2.0) with our weights, loaded by name, strictly."""
    module = importlib.import_module("physicsnemo.models.diffusion_unets")
    # In evaluation mode its group norm divides by the unbiased variance, which EDM's does not.
    network = module.SongUNet(**case, dropout=0.0).train()
    state = weights(SongUNet(**case).state_dict())
    # It stores the frequencies of the positional embedding too, and fills them in when they are missing.
    stored = [key for key in network.state_dict() if key in state or key != "map_noise.freqs"]
    network.load_state_dict({key: state.pop(_edm_name(key)) for key in stored}, strict=True)
    assert not state, f"names that it does not have: {sorted(state)}"
    with torch.no_grad():
        return network(*inputs(case))


def deepinv(case: dict[str, Any]) -> Tensor:
    """The same from deepinv's NCSNpp (BSD-3), which has EDM's own names."""
    module = importlib.import_module("deepinv.models.ncsnpp")
    kind = "ncsn" if case.get("encoder_type") == "residual" else "ddpm"
    options = {key: value for key, value in case.items() if key not in NCSNPP}
    network = module.NCSNpp(model_type=kind, pretrained=None, **options).eval()
    network.load_state_dict(weights(SongUNet(**case).state_dict()), strict=True)
    with torch.no_grad():
        return network.forward_unet(*inputs(case))


def record() -> None:
    """Write the golden file; needs physicsnemo: python -c 'import test_networks as t; t.record()'."""
    outputs = {name: physicsnemo(case) for name, case in CASES.items()}
    golden = {
        "note": "Outputs of SongUNet of nvidia-physicsnemo 2.2.2 (Apache-2.0, an independent implementation) "
        "for CASES, weights and inputs of tests/test_networks.py, by its record(): std, every 61st value.",
        "outputs": {
            name: {"std": y.std().item(), "values": [round(v, 7) for v in y.flatten()[::61].tolist()]}
            for name, y in outputs.items()
        },
    }
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


@pytest.mark.parametrize("name", CASES)
def test_matches_recorded_outputs_of_an_independent_implementation(name: str) -> None:
    golden = json.loads(GOLDEN.read_text())["outputs"][name]
    output = ours(CASES[name])
    torch.testing.assert_close(
        output.flatten()[::61], torch.tensor(golden["values"]), rtol=0, atol=1e-5 * golden["std"] + 1e-6
    )
    assert output.std().item() == pytest.approx(golden["std"], rel=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_matches_physicsnemo(name: str) -> None:
    pytest.importorskip("physicsnemo", reason="pip install nvidia-physicsnemo")
    torch.testing.assert_close(ours(CASES[name]), physicsnemo(CASES[name]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("128")])
def test_matches_deepinv(name: str) -> None:
    pytest.importorskip("deepinv", reason="pip install deepinv")
    torch.testing.assert_close(ours(CASES[name]), deepinv(CASES[name]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "parameters", "tensors"),
    [
        # arXiv 2206.00364, table 7: 56 M parameters at CIFAR-10, 62 M at 64 x 64, for both networks.
        ({"img_resolution": 32, "channel_mult": [2, 2, 2]}, 55_733_891, 425),
        ({"img_resolution": 32, "channel_mult": [2, 2, 2], **NCSNPP}, 56_397_827, 432),
        ({"img_resolution": 64, "channel_mult": [1, 2, 2, 2]}, 61_805_571, 553),
    ],
)
def test_published_sizes(options: dict[str, Any], parameters: int, tensors: int) -> None:
    with torch.device("meta"):
        network = SongUNet(in_channels=3, out_channels=3, augment_dim=9, **options)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert len(network.state_dict()) == tensors


def test_names_and_shapes_of_the_cifar10_network() -> None:
    with torch.device("meta"):
        network = SongUNet(32, 3, 3, channel_mult=(2, 2, 2), augment_dim=9)
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    expected = {
        "map_augment.weight": (128, 9),
        "map_layer0.weight": (512, 128),
        "map_layer1.bias": (512,),
        "enc.32x32_conv.weight": (128, 3, 3, 3),
        "enc.32x32_block0.skip.weight": (256, 128, 1, 1),
        "enc.16x16_down.conv0.resample_filter": (1, 1, 2, 2),
        "enc.16x16_down.skip.resample_filter": (1, 1, 2, 2),
        "enc.16x16_block3.qkv.weight": (768, 256, 1, 1),
        "enc.16x16_block3.affine.weight": (256, 512),
        "dec.8x8_in0.proj.bias": (256,),
        "dec.8x8_block4.conv0.weight": (256, 512, 3, 3),
        "dec.16x16_up.conv0.resample_filter": (1, 1, 2, 2),
        "dec.16x16_block4.norm2.weight": (256,),
        "dec.32x32_block4.conv0.weight": (256, 384, 3, 3),
        "dec.32x32_aux_norm.weight": (256,),
        "dec.32x32_aux_conv.weight": (3, 256, 3, 3),
    }
    assert {key: shapes.get(key) for key in expected} == expected
    assert "map_label.weight" not in shapes
    assert "dec.16x16_block3.qkv.weight" not in shapes


FORMS = ("alps", "product")


def denoiser(patch: int = 1, form: str = "alps") -> EDMDenoiser:
    config = {
        "backbone": "SongUNet",
        "network": {
            "img_resolution": 8,
            "in_channels": patch**2,
            "out_channels": patch**2 * HEADS[form],
            "model_channels": 16,
            "channel_mult": [1, 2],
            "num_blocks": 1,
            "attn_resolutions": [4],
        },
        "sigma_data": 0.7,
        "patch": patch,
        "form": form,
    }
    network = EDMDenoiser.from_config(config)
    network.load_state_dict(weights(network.state_dict()))
    return network.requires_grad_(False).eval()


def noisy(sigma: Tensor, size: int) -> Tensor:
    shape = (len(sigma), 1, size, size)
    return 0.7 * uniform("clean", shape) + sigma[:, None, None, None] * uniform("noise", shape)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("patch", [1, 2])
def test_grad_is_the_gradient_of_the_energy(patch: int, form: str) -> None:
    network = denoiser(patch, form).double()
    sigma = torch.tensor([0.002, 0.05, 1.0, 30.0], dtype=torch.float64)
    x = noisy(sigma, 8 * patch).double()
    _, grad = energy_and_grad(network, x, sigma)
    direction = uniform("direction", x.shape).double()
    step = 1e-3 * sigma
    shift = step[:, None, None, None] * direction
    above, below = (energy_and_grad(network, x + sign * shift, sigma)[0] for sign in (1, -1))
    slope = (above - below) / (2 * step)
    torch.testing.assert_close((grad * direction).flatten(1).sum(1), slope, rtol=1e-5, atol=0)


def naive(network: EDMDenoiser, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """E and G as EnergyForm defines them."""
    x = x.detach().requires_grad_()
    eps = factor = x - network(x, sigma)
    if network.form == "product":
        scaled = x / (sigma**2 + 0.7**2).sqrt()[:, None, None, None]
        factor = x - 0.7 * network.raw(scaled, sigma)[:, 1:]
    energy = 0.5 * (factor * eps).flatten(1).sum(1)
    return energy.detach(), torch.autograd.grad(energy.sum(), x)[0]


@pytest.mark.parametrize("form", FORMS)
def test_energy_matches_its_definition(form: str) -> None:
    network = denoiser(2, form).double()
    sigma = torch.tensor([0.002, 0.05, 1.0, 30.0], dtype=torch.float64)
    x = noisy(sigma, 16).double()
    for mine, definition in zip(energy_and_grad(network, x, sigma), naive(network, x, sigma), strict=True):
        torch.testing.assert_close(mine, definition, rtol=1e-9, atol=1e-15)


def relative(value: Tensor, truth: Tensor) -> float:
    return ((value.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("form", FORMS)
def test_float32_does_not_cancel_at_small_sigma(form: str) -> None:
    sigma = torch.full((4,), 0.002)
    x = noisy(sigma, 16)
    network = denoiser(2, form)
    truth = energy_and_grad(denoiser(2, form).double(), x.double(), sigma.double())
    error = [relative(a, b) for a, b in zip(energy_and_grad(network, x, sigma), truth, strict=True)]
    plain = [relative(a, b) for a, b in zip(naive(network, x, sigma), truth, strict=True)]
    assert max(error) < 5e-6
    assert error[1] < 0.2 * plain[1]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 0.01), (torch.bfloat16, 0.08)])
def test_half_precision_of_the_network_alone(dtype: torch.dtype, bound: float, form: str) -> None:
    sigma = torch.tensor([0.002, 0.05, 1.0])
    x = noisy(sigma, 16)
    _, truth = energy_and_grad(denoiser(2, form), x, sigma)
    _, grad = energy_and_grad(denoiser(2, form), x, sigma, compute_dtype=dtype)
    for one, other in zip(grad, truth, strict=True):
        assert relative(one, other.double()) < bound


@pytest.mark.parametrize("form", FORMS)
def test_loss_on_the_gradient_reaches_the_weights(form: str) -> None:
    network = denoiser(form=form).double().requires_grad_(True)
    sigma = torch.tensor([0.1, 1.0], dtype=torch.float64)
    x = noisy(sigma, 8).double()
    _, grad = energy_and_grad(network, x, sigma, create_graph=True)
    grad.square().sum().backward()
    bias = dict(network.named_parameters())["model.enc.8x8_conv.bias"]
    assert bias.grad is not None
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            bias[0] += sign * 1e-5
        losses.append(energy_and_grad(network, x, sigma)[1].square().sum())
        with torch.no_grad():
            bias[0] -= sign * 1e-5
    assert bias.grad[0].item() == pytest.approx((losses[0] - losses[1]).item() / 2e-5, rel=1e-5)


class Wiener(torch.nn.Module):
    """F of the exact denoiser of images N(0, covariance), D(x) = covariance (covariance + sigma^2)^-1 x.

    With `heads` 2, H = 0 behind it.
    """

    def __init__(self, covariance: Tensor, heads: int) -> None:
        super().__init__()
        self.covariance, self.heads = covariance, heads

    def forward(self, scaled: Tensor, label: Tensor, *_: object, **__: object) -> Tensor:
        sigma = (4 * label).exp()
        c = EDMDenoiser(torch.nn.Identity(), sigma_data=0.7).coefficients(sigma)
        unit = torch.eye(len(self.covariance), dtype=torch.float64)
        gain = torch.linalg.solve(self.covariance + sigma[0] ** 2 * unit, self.covariance)
        x = scaled / c.c_in
        output = ((x.flatten(1) @ gain).reshape(x.shape) - c.c_skip * x) / c.c_out
        return torch.cat([output] + (self.heads - 1) * [torch.zeros_like(x)], dim=1)


def test_an_exact_denoiser_is_its_own_energy_of_form_product() -> None:
    """Of a Gaussian of mean zero, a = 0: x - G is the denoiser, and E / sigma^2 minus the log density."""
    factor = uniform("factor", (16, 16)).double()
    covariance = factor @ factor.T / 16
    teacher = EDMDenoiser(Wiener(covariance, 1), sigma_data=0.7)
    product = EDMDenoiser(Wiener(covariance, 2), sigma_data=0.7, form="product")
    for level in (0.01, 0.3, 5.0):
        sigma = torch.full((3,), level, dtype=torch.float64)
        x = noisy(sigma, 4).double()
        energy, grad = energy_and_grad(product, x, sigma)
        torch.testing.assert_close(x - grad, teacher(x, sigma), rtol=1e-9, atol=1e-9)
        precision = torch.linalg.inv(covariance + level**2 * torch.eye(16).double())
        density = 0.5 * torch.einsum("bi,ij,bj->b", x.flatten(1), precision, x.flatten(1))
        torch.testing.assert_close(energy / level**2, density, rtol=1e-8, atol=1e-8)
        # As an energy of form alps its gain w becomes w + w (1 - w).
        assert relative(x - energy_and_grad(teacher, x, sigma)[1], teacher(x, sigma)) > 1e-3


@pytest.mark.parametrize("decoder", ["standard", "skip"])
def test_a_second_head_starts_at_zero(decoder: str) -> None:
    config = denoiser(2).config
    assert config is not None
    teacher = EDMDenoiser.from_config(config | {"network": config["network"] | {"decoder_type": decoder}})
    teacher.load_state_dict(weights(teacher.state_dict()))
    teacher.double().requires_grad_(False).eval()
    sigma = torch.tensor([0.05, 1.0], dtype=torch.float64)
    x = noisy(sigma, 16).double()
    product = teacher.with_form("product")
    torch.testing.assert_close(product(x, sigma), teacher(x, sigma), rtol=1e-12, atol=1e-12)
    assert product.raw(x, sigma)[:, 1:].abs().max() == 0
    expected = 0.5 * (x * (x - teacher(x, sigma))).flatten(1).sum(1)
    torch.testing.assert_close(energy_and_grad(product, x, sigma)[0], expected, rtol=1e-9, atol=0)
    again = EDMDenoiser.from_config(product.config or {})
    again.load_state_dict(product.state_dict())
    assert (teacher.form, again.form) == ("alps", "product")


def test_wrong_forms_are_refused() -> None:
    config = denoiser().config
    assert config is not None
    with pytest.raises(ValueError, match="unknown form 'blue' of an energy; expected alps or product"):
        EDMDenoiser.from_config(config | {"form": "blue"})
    with pytest.raises(ValueError, match="out_channels 1; an energy of form 'product' expects 2"):
        EDMDenoiser.from_config(config | {"form": "product"})
    with pytest.raises(ValueError, match="built by hand"):
        EDMDenoiser(torch.nn.Identity()).with_form("product")


def test_energy_under_inference_mode() -> None:
    sigma = torch.tensor([0.1, 1.0])
    network = denoiser()
    _, expected = energy_and_grad(network, noisy(sigma, 8), sigma)
    with torch.inference_mode():
        _, grad = energy_and_grad(network, noisy(sigma, 8), sigma.clone())
        assert torch.equal(grad, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": "UNet9"}, "unknown backbone 'UNet9'; this version has SongUNet"),
        ({"network": {"img_resolution": 8, "depth": 3}}, "has no argument depth"),
        ({"network": {"img_resolution": 8}}, "do not fit SongUNet"),
        ({"network": {"img_resolution": 9, "in_channels": 1, "out_channels": 1}}, "cannot be halved 3 times"),
        (
            {"network": {"img_resolution": 8, "in_channels": 1, "out_channels": 1, "model_channels": 2}},
            "do not fit SongUNet",
        ),
    ],
)
def test_wrong_configurations(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EDMDenoiser.from_config({"backbone": "SongUNet", "network": {}, **change})


def test_any_size_that_halves_evenly() -> None:
    network = denoiser()
    assert isinstance(network.model, nn.Module)
    assert network(torch.zeros(1, 1, 12, 20), torch.ones(1)).shape == (1, 1, 12, 20)
