"""NetworkPrior, the prior protocol, and priors in files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from alpenglow.networks.denoiser import EDMDenoiser, energy_and_grad
from alpenglow.networks.song_unet import SongUNet
from alpenglow.priors.loading import load_denoiser, load_prior, save_denoiser, zoo_names
from alpenglow.priors.mixture import GaussianPrior
from alpenglow.priors.network import UNMEASURED_ERROR, NetworkPrior
from alpenglow.priors.protocol import check_prior, denoise

SHAPE = (1, 16, 16)


def config(**network: Any) -> dict[str, Any]:
    defaults = {
        "img_resolution": 8,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 16,
        "channel_mult": [1, 2],
        "num_blocks": 1,
        "attn_resolutions": [4],
    }
    return {"backbone": "SongUNet", "network": defaults | network, "sigma_data": 0.7, "patch": 2}


def trained(recipe: dict[str, Any] | None = None) -> EDMDenoiser:
    """A network whose every weight matters (the initial one nearly ignores its input)."""
    generator = torch.Generator().manual_seed(0)
    denoiser = EDMDenoiser.from_config(recipe or config())
    with torch.no_grad():
        for parameter in denoiser.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return denoiser


@pytest.fixture
def prior() -> NetworkPrior:
    return NetworkPrior(trained(), SHAPE, name="small", sigma_range=(0.01, 50.0))


def images(count: int, shape: tuple[int, int, int] = SHAPE) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    sigma = torch.logspace(-2, 1.5, count)
    return torch.randn(count, *shape, generator=generator) * (0.5 + sigma[:, None, None, None]), sigma


def test_is_the_energy_of_its_network(prior: NetworkPrior) -> None:
    assert check_prior(prior, probe=torch.zeros(2, *SHAPE)) == SHAPE
    x, sigma = images(11)
    energy, grad = prior.energy_and_grad(x, sigma)
    expected = energy_and_grad(prior.denoiser, x, sigma)
    torch.testing.assert_close(energy, expected[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(grad, expected[1], rtol=1e-4, atol=1e-6)
    assert torch.equal(prior.denoise(x, sigma), x - grad)
    assert torch.equal(denoise(prior, x, sigma), x - grad)
    assert not any(p.requires_grad for p in prior.denoiser.parameters())
    assert not prior.denoiser.training


@pytest.mark.parametrize(
    "recipe",
    [
        config(),
        config(embedding_type="fourier", encoder_type="residual", resample_filter=[1, 3, 3, 1]),
    ],
    ids=["ddpm++", "ncsn++"],
)
def test_an_image_has_the_same_bits_in_any_batch(recipe: dict[str, Any]) -> None:
    prior = NetworkPrior(trained(recipe), SHAPE)
    x, sigma = images(64)
    energy, grad = prior.energy_and_grad(x, sigma)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(2))
    for count in (1, 3, 16, 64):
        chosen = order[:count]
        other = prior.energy_and_grad(x[chosen], sigma[chosen])
        assert torch.equal(other[0], energy[chosen])
        assert torch.equal(other[1], grad[chosen])


def test_bits_do_not_depend_on_neighbours_or_memory_format(prior: NetworkPrior) -> None:
    x, sigma = images(8)
    _, grad = prior.energy_and_grad(x, sigma)
    wild = x.clone()
    wild[1:] *= 1e4
    assert torch.equal(prior.energy_and_grad(wild, sigma)[1][0], grad[0])
    strided = x.repeat_interleave(2, dim=3)[..., ::2]
    assert torch.equal(prior.energy_and_grad(strided, sigma)[1], grad)


def test_channels_last_images_have_the_same_bits() -> None:
    prior = NetworkPrior(trained(config(in_channels=12, out_channels=12)), (3, 16, 16))
    x, sigma = images(5, (3, 16, 16))
    expected = prior.energy_and_grad(x, sigma)[1]
    assert torch.equal(prior.energy_and_grad(x.to(memory_format=torch.channels_last), sigma)[1], expected)


def test_empty_batch(prior: NetworkPrior) -> None:
    energy, grad = prior.energy_and_grad(torch.zeros(0, *SHAPE), torch.zeros(0))
    assert energy.shape == (0,)
    assert grad.shape == (0, *SHAPE)


def test_float64() -> None:
    prior = NetworkPrior(trained().double(), SHAPE)
    x, sigma = images(3)
    energy, grad = prior.energy_and_grad(x.double(), sigma.double())
    assert energy.dtype == grad.dtype == torch.float64
    single = NetworkPrior(trained(), SHAPE).energy_and_grad(x, sigma)[1]
    torch.testing.assert_close(single.double(), grad, rtol=1e-4, atol=1e-5)


def test_float64_images_into_a_float32_prior(prior: NetworkPrior) -> None:
    x, sigma = images(3)
    energy, grad = prior.energy_and_grad(x.double(), sigma.double())
    assert energy.dtype == grad.dtype == torch.float64
    assert torch.equal(grad.float(), prior.energy_and_grad(x, sigma)[1])


def test_to_the_same_device_is_itself(prior: NetworkPrior) -> None:
    assert prior.to("cpu") is prior


@pytest.mark.parametrize(
    ("x", "sigma", "message"),
    [
        (torch.zeros(2, 1, 16, 17), torch.ones(2), r"got x \(2, 1, 16, 17\); small expects images"),
        (torch.zeros(1, 16, 16), torch.ones(1), "expects images"),
        (torch.zeros(2, *SHAPE), torch.ones(1), r"expected \[2\]"),
        (torch.zeros(2, *SHAPE), torch.tensor(1.0), r"expected \[2\]"),
        (torch.zeros(2, *SHAPE), torch.tensor([1.0, 0.0]), "sigma must be positive"),
        (torch.zeros(2, *SHAPE), torch.tensor([1.0, float("nan")]), "sigma must be positive"),
        (torch.full((2, *SHAPE), float("nan")), torch.ones(2), "NaN or infinity"),
        (torch.zeros(2, *SHAPE, dtype=torch.long), torch.ones(2), "floating-point"),
        (torch.zeros(2, *SHAPE, dtype=torch.complex64), torch.ones(2), "floating-point"),
        (torch.zeros(2, *SHAPE, device="meta"), torch.ones(2), "move them to one device"),
    ],
)
def test_wrong_input(prior: NetworkPrior, x: Tensor, sigma: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prior.energy_and_grad(x, sigma)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_shape": (3, 16, 16)}, "it takes 4 channels at patch 2, that is 1 image channels"),
        ({"image_shape": (1, 16, 18)}, "multiples of 4"),
        ({"image_shape": (1, 16)}, "three positive integers"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"sigma_range": (1.0, 0.1)}, "0 < low < high"),
        ({"precision": "int8"}, "unknown precision 'int8'"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NetworkPrior(trained(), **{"image_shape": SHAPE, **options})


class _Plain:
    """A user's own prior: nothing but the protocol."""

    image_shape = (1, 4, 4)

    def energy_and_grad(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return 0.5 * x.square().flatten(1).sum(1), x


def changed(**members: Any) -> object:
    return type("Mine", (_Plain,), members)()


def test_check_prior_takes_any_object_that_fits() -> None:
    probe = torch.zeros(2, 1, 4, 4)
    assert check_prior(_Plain(), probe=probe) == (1, 4, 4)
    assert check_prior(changed(image_shape=torch.Size([1, 4, 4])), probe=probe) == (1, 4, 4)
    assert check_prior(GaussianPrior(torch.zeros(1, 4, 4), torch.eye(16)), probe=probe) == (1, 4, 4)


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        (None, "NoneType is not a prior, it has no image_shape"),
        (_Plain, "got the class _Plain, expected an instance"),
        (SongUNet(8, 1, 1, model_channels=16, channel_mult=(1,)), "no image_shape"),
        (changed(energy_and_grad=3), "not callable"),
        (changed(image_shape=28), "three positive integers"),
        (changed(image_shape=(28, 28)), "three positive integers"),
        (changed(image_shape=(1, 4.0, 4)), "three positive integers"),
        (changed(energy_and_grad=lambda self, x: x), "cannot be called"),
        (changed(energy_and_grad=lambda self, x, sigma: x), "cannot be called|too many values|expected"),
        (changed(energy_and_grad=lambda self, x, sigma: (x.sum(), x)), r"gives energy \(\); expected \(2,\)"),
        (changed(energy_and_grad=lambda self, x, sigma: (sigma, None)), "gives grad NoneType"),
        (changed(energy_and_grad=lambda self, x, sigma: (sigma / 0, x)), "NaN or infinity in energy"),
    ],
)
def test_check_prior_refuses(candidate: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_prior(candidate, probe=torch.zeros(2, 1, 4, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_save_and_load(prior: NetworkPrior, tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "small.safetensors"
    assert prior.gradient_error == UNMEASURED_ERROR
    prior.noise_floor = 0.03
    prior.trusted((0.01, 50.0), 0.125).save(path, dtype=dtype)
    loaded = load_prior(path)
    assert (loaded.gradient_error, loaded.noise_floor) == (0.125, 0.03)
    assert (loaded.name, loaded.image_shape, loaded.sigma_range) == ("small", SHAPE, (0.01, 50.0))
    assert loaded.dtype == torch.float32
    x, sigma = images(3)
    tolerance = 0 if dtype == torch.float32 else 5e-3
    torch.testing.assert_close(
        loaded.denoise(x, sigma), prior.denoise(x, sigma), rtol=tolerance, atol=10 * tolerance
    )
    loaded.save(tmp_path / "again.safetensors", dtype=dtype)
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_half_precision_keeps_fourier_frequencies(tmp_path: Path) -> None:
    denoiser = trained(config(embedding_type="fourier"))
    path = tmp_path / "fourier.safetensors"
    save_denoiser(path, denoiser, name="fourier", image_shape=SHAPE)
    with safe_open(path, framework="pt") as file:
        assert file.get_tensor("model.map_layer0.weight").dtype == torch.float16
    assert torch.equal(
        load_denoiser(path).state_dict()["model.map_noise.freqs"],
        denoiser.state_dict()["model.map_noise.freqs"],
    )


@pytest.mark.parametrize(("precision", "bound"), [("float64", 1e-5), ("float16", 0.02), ("bfloat16", 0.1)])
def test_precisions(prior: NetworkPrior, tmp_path: Path, precision: Any, bound: float) -> None:
    prior.save(tmp_path / "p.safetensors", dtype=torch.float32)
    loaded = load_prior(tmp_path / "p.safetensors", precision=precision)
    x, sigma = images(4)
    expected, got = prior.energy_and_grad(x, sigma)[1], loaded.energy_and_grad(x, sigma)[1]
    assert got.dtype == torch.float32
    error = (got - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert error.max() < bound


def test_zoo() -> None:
    for name in zoo_names():
        loaded = load_prior(name)
        assert loaded.name == name
        check_prior(loaded, probe=torch.zeros(1, *loaded.image_shape))
    with pytest.raises(ValueError, match="no prior 'fashion-29': the zoo has"):
        load_prior("fashion-29")


def test_a_teacher_is_no_prior(tmp_path: Path) -> None:
    path = tmp_path / "teacher.safetensors"
    denoiser = trained()
    save_denoiser(path, denoiser, name="t", image_shape=SHAPE, kind="teacher", dtype=torch.float32)
    with pytest.raises(ValueError, match=r"holds a teacher.*alpenglow distill"):
        load_prior(path)
    x, sigma = images(2)
    assert torch.equal(load_denoiser(path)(x, sigma), denoiser.eval()(x, sigma))


def rewritten(path: Path, **changes: Any) -> Path:
    """A copy of a saved prior with another header."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["alpenglow"]) | changes
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    target = path.with_name("rewritten.safetensors")
    save_file(tensors, target, metadata={"alpenglow": json.dumps(header)})
    return target


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, "has schema 2, this version reads 1; update"),
        ({"schema": None}, "has schema None"),
        ({"kind": "flow"}, "header of .* is wrong"),
        ({"image_shape": [1, 0, 16]}, "header of .* is wrong"),
        ({"image_shape": [3, 16, 16]}, "does not fit the network"),
        ({"surprise": 1}, "header of .* is wrong"),
        ({"denoiser": config(num_blocks=2)}, "do not fit its header"),
        ({"denoiser": config(model_channels=1 << 40)}, "do not fit its header"),
        ({"denoiser": config() | {"backbone": "os.system"}}, "unknown backbone"),
    ],
)
def test_wrong_headers(prior: NetworkPrior, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    prior.save(tmp_path / "p.safetensors")
    with pytest.raises(ValueError, match=message):
        load_prior(rewritten(tmp_path / "p.safetensors", **changes))


def test_damaged_files(prior: NetworkPrior, tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    prior.save(path)
    whole = path.read_bytes()
    for size in (0, 5, 300, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="not a readable safetensors file"):
            load_prior(path)
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="without alpenglow's header"):
        load_prior(path)
    save_file({"a": torch.tensor([float("nan")])}, path, metadata={"alpenglow": "{"})
    with pytest.raises(ValueError, match="not JSON"):
        load_prior(path)


def test_weights_that_are_not_finite(prior: NetworkPrior, tmp_path: Path) -> None:
    weight = next(prior.denoiser.parameters())
    weight.flatten()[0] = 1e6
    with pytest.raises(ValueError, match=r"store it with dtype=torch\.float32"):
        prior.save(tmp_path / "p.safetensors", dtype=torch.float16)
    weight.flatten()[0] = float("nan")
    with pytest.raises(ValueError, match="has diverged"):
        prior.save(tmp_path / "p.safetensors", dtype=torch.float32)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("no/such.safetensors", {}, "no weight file"),
        ("no/such", {}, "no weight file"),
        ("net.pkl", {}, "alpenglow convert net.pkl net.safetensors"),
        (".", {}, "is a folder and no bundle"),
        ("any", {"precision": "float8"}, "unknown precision"),
        ("any", {"device": "toaster"}, "device 'toaster' cannot be used"),
    ],
)
def test_wrong_sources(source: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_prior(source, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "p.pt"}, "ends in .safetensors"),
        ({"kind": "flow"}, "header would be wrong"),
        ({"image_shape": (1, 2)}, "header would be wrong"),
        ({"extra": {"a": object()}}, "header would be wrong"),
        ({"dtype": torch.int8}, "cannot store weights as"),
        ({"denoiser": EDMDenoiser(SongUNet(8, 4, 4, model_channels=16))}, "built by hand"),
    ],
)
def test_wrong_save(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    arguments = {"name": "p", "image_shape": SHAPE, "denoiser": trained(), "path": "p.safetensors"} | options
    arguments["path"] = tmp_path / str(arguments["path"])
    with pytest.raises(ValueError, match=message):
        save_denoiser(**arguments)
    assert not list(tmp_path.iterdir())
