"""Bundles: what an export writes, what loading one refuses, and the runtimes against the torch prior."""

import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import silu

import alpenglow as ag
from alpenglow.cli import app
from alpenglow.console import DEBUG
from alpenglow.export.bundle import MODEL, export_bundle
from alpenglow.export.manifest import MANIFEST, Engine, read_manifest, sha256
from alpenglow.export.model_repository import write_model_repository
from alpenglow.export.prior import BundlePrior, load_bundle, on_torch_backend
from alpenglow.export.runtimes.base import Bundle
from alpenglow.export.tensorrt_engine import add_engine, library, profile_for, profiles_of
from alpenglow.networks.denoiser import EDMDenoiser
from alpenglow.networks.layers import Conv2d, Linear
from alpenglow.priors.loading import zoo_names
from alpenglow.priors.network import NetworkPrior, Precision
from benchmarks.backends import cpu_runtimes, in_rotation
from benchmarks.gradients import backends, flops_an_image, gradient_table, random_prior, runtimes
from tests.tiny import NETWORK, random_denoiser, randomise

for needed in ("onnxscript", "onnxruntime"):
    pytest.importorskip(needed)


def tiny_prior() -> NetworkPrior:
    return NetworkPrior(random_denoiser(), (1, 8, 8), name="tiny", batch_size=4)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export takes most of a minute: one bundle for all tests of this file, which must not change it."""
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    shares: list[float] = []
    export_bundle(tiny_prior(), folder, progress=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1
    return folder


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


def command(*arguments: str) -> None:
    """`alpenglow` in this process, with its errors as exceptions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(DEBUG, "1")
        app(arguments, standalone_mode=False)


def inputs(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(count))
    return x, torch.logspace(-2.7, 2, count)


@pytest.mark.slow
def test_the_manifest_tells_what_was_written(exported: Path) -> None:
    manifest = read_manifest(exported)
    assert (manifest.name, manifest.image_shape, manifest.precision) == ("tiny", (1, 8, 8), "float32")
    assert manifest.files == {MODEL: sha256(exported / MODEL)}
    assert max(manifest.parity.values()) <= 1e-5
    assert sorted(path.name for path in exported.iterdir()) == [MANIFEST, MODEL]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "auto"])
@pytest.mark.parametrize("count", [1, 4, 9])
def test_runtimes_agree_with_the_torch_prior(exported: Path, backend: str, count: int) -> None:
    if backend != "auto":
        pytest.importorskip(backend)
    prior = load_bundle(exported, backend=backend, batch_size=4)
    x, sigma = inputs(count)
    energy, grad = prior.energy_and_grad(x, sigma)
    expected = tiny_prior().energy_and_grad(x, sigma)
    assert grad.dtype == torch.float32
    error = (grad - expected[1]).flatten(1).norm(dim=1) / expected[1].flatten(1).norm(dim=1)
    assert error.max() < 2e-5  # 1e-5 of each against the truth
    torch.testing.assert_close(energy, expected[0], rtol=2e-5, atol=0)


@pytest.mark.slow
def test_results_outlive_the_next_call(exported: Path) -> None:
    prior = load_bundle(exported, backend="onnxruntime", batch_size=4)
    x, sigma = inputs(4)
    first = prior.energy_and_grad(x, sigma)
    copies = [part.clone() for part in first]
    prior.energy_and_grad(-x, sigma)
    assert all(torch.equal(a, b) for a, b in zip(first, copies, strict=True))


@pytest.mark.slow
def test_a_damaged_bundle_is_refused(bundle: Path) -> None:
    data = bytearray((bundle / MODEL).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / MODEL).write_bytes(data)
    with pytest.raises(ValueError, match="sha256 differs"):
        load_bundle(bundle)
    (bundle / MODEL).unlink()
    with pytest.raises(ValueError, match=f"lacks {MODEL}"):
        load_bundle(bundle)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "has schema 2, this version reads 1"),
        ({"image_shape": [1, 8]}, "image_shape"),
        ({"model": "other.onnx"}, "without checksums"),
        ({"files": {"../model.onnx": "0"}}, "outside of the bundle"),
    ],
)
def test_a_wrong_manifest_is_refused(bundle: Path, change: dict, message: str) -> None:
    fields = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps(fields | change))
    with pytest.raises(ValueError, match=message):
        load_bundle(bundle)


@pytest.mark.slow
def test_backends_that_cannot_be(exported: Path) -> None:
    with pytest.raises(ValueError, match="unknown backend 'jax'"):
        load_bundle(exported, backend="jax")


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no bundle"):
        load_bundle(tmp_path)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_bundle(tmp_path)


def test_priors_that_are_not_in_float32_are_refused(tmp_path: Path) -> None:
    prior = NetworkPrior(random_denoiser(), (1, 8, 8), precision="float64")
    with pytest.raises(ValueError, match="not in float32"):
        export_bundle(prior, tmp_path / "out")
    with pytest.raises(ValueError, match="precision is 'float64'"):
        export_bundle(tiny_prior(), tmp_path / "out", precision="float64")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_export_that_fails_its_check_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float16 held to the bound of float32."""
    monkeypatch.setattr("alpenglow.export.parity.TOLERANCE", {"float16": 1e-6})
    monkeypatch.setattr("alpenglow.export.bundle.TOLERANCE", {"float16": 1e-6})
    with pytest.raises(RuntimeError, match="fails its check against float64"):
        export_bundle(tiny_prior(), tmp_path / "out", precision="float16")
    assert list(tmp_path.iterdir()) == []


# The front door: load_prior, sample, the command line


@pytest.mark.slow
def test_load_prior_takes_a_bundle_and_refuses_what_it_has_not(exported: Path) -> None:
    prior = ag.load_prior(exported, batch_size=4)
    assert isinstance(prior, BundlePrior)
    assert prior.backend in ("onnxruntime", "openvino")
    assert ag.load_prior(exported, backend="onnxruntime", precision="float32").name == "tiny"
    with pytest.raises(ValueError, match="is in float32, got precision='float16'"):
        ag.load_prior(exported, precision="float16")
    with pytest.raises(ValueError, match="is of class None, got class_label=1"):
        ag.load_prior(exported, class_label=1)
    with pytest.raises(ValueError, match="device 'toaster' cannot be used"):
        ag.load_prior(exported, device="toaster")


def test_weights_run_on_torch_alone() -> None:
    with pytest.raises(ValueError, match="alpenglow export fashion-28"):
        ag.load_prior("fashion-28", backend="onnxruntime")
    with pytest.raises(ValueError, match="cuda-graph needs a CUDA GPU"):
        ag.load_prior("fashion-28", backend="cuda-graph")
    assert isinstance(ag.load_prior("fashion-28", backend="torch"), NetworkPrior)


class TwoConvolutions(nn.Module):
    """A network of a few compiled kernels: of the smallest UNet's thirty, each takes inductor seconds."""

    in_channels, label_dim, size_multiple = 1, 0, 1

    def __init__(self) -> None:
        super().__init__()
        self.map_layer0 = Linear(1, 8)
        self.stem, self.last = Conv2d(1, 8, 3), Conv2d(8, 1, 3)

    def forward(
        self, x: Tensor, noise_label: Tensor, class_label: None, augmentation: None, *, compute_dtype: None
    ) -> Tensor:
        shift = self.map_layer0(noise_label[:, None])[:, :, None, None]
        return self.last(silu(self.stem(x) + shift))


@pytest.mark.slow
def test_torch_compiled() -> None:
    denoiser = EDMDenoiser(TwoConvolutions(), sigma_data=0.7)
    randomise(denoiser)
    prior = NetworkPrior(denoiser, (1, 8, 8), batch_size=2)
    compiled = on_torch_backend(prior, "torch-compile")
    assert compiled.backend == "torch-compile"
    x, sigma = inputs(3)
    torch.testing.assert_close(
        compiled.energy_and_grad(x, sigma), prior.energy_and_grad(x, sigma), rtol=1e-4, atol=1e-5
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_torch_as_a_cuda_graph() -> None:
    prior = ag.load_prior("fashion-28", backend="cuda-graph", device="cuda", batch_size=4)
    x = torch.randn(6, 1, 28, 28, device="cuda")
    sigma = torch.logspace(-2, 1, 6, device="cuda")
    expected = ag.load_prior("fashion-28", device="cuda", batch_size=4).energy_and_grad(x, sigma)
    torch.testing.assert_close(prior.energy_and_grad(x, sigma), expected)


@pytest.mark.slow
def test_a_bundle_gives_the_posterior_of_the_torch_prior(exported: Path) -> None:
    """Same seed: mean and std differ by no more than the errors of the gradients."""
    torch_prior, bundled = tiny_prior(), ag.load_prior(exported, backend="onnxruntime", batch_size=4)
    operator = ag.operators.Denoising()
    y = 0.3 * torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"noise_std": 0.2, "num_samples": 8, "nfe": 20}
    a, b = (ag.sample(prior, operator, y, **options) for prior in (torch_prior, bundled))
    for name in ("mean", "std"):
        expected, result = getattr(a, name), getattr(b, name)
        assert (result - expected).norm() / expected.norm() < 2e-5


@pytest.mark.slow
def test_the_command_writes_a_bundle_that_the_others_take(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_prior().save("tiny.safetensors")
    command("export", "tiny.safetensors", "-o", "tiny-bundle")
    assert "error at sigma 0.002" in capsys.readouterr().out
    command("info", "tiny-bundle")
    assert "onnxruntime" in capsys.readouterr().out
    Image.fromarray(np.full((8, 8), 100, np.uint8)).save("grey.png")
    Path("job.yaml").write_text(
        "prior: tiny-bundle\noperator: {kind: denoising}\nnoise_std: 0.2\noutput: out\nsimulate: true\n"
    )
    monkeypatch.chdir(tmp_path.parent)  # a job's paths start from its folder
    folder = tmp_path.name
    command(
        "reconstruct",
        f"{folder}/grey.png",
        "--job",
        f"{folder}/job.yaml",
        "--num-samples",
        "4",
        "--nfe",
        "10",
    )
    assert (tmp_path / "out/result.h5").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "coreml"], "expected onnx, tensorrt or tensorrt-rtx"),
        (["--layout", "shelf"], "expected bundle or triton-server"),
        (["--layout", "triton-server", "--format", "tensorrt-rtx"], "not of tensorrt-rtx"),
        (["--batch", "1,2"], "expected three numbers"),
        (["--batch", "4,2,8"], "expected smallest <= best <= largest"),
        (["--precision", "int8"], "expected one of|bundle is in one of"),
    ],
)
def test_the_command_refuses_at_once(options: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        command("export", "fashion-28", "-o", str(tmp_path / "out"), *options)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_model_repository_is_of_the_servers_schema(exported: Path, tmp_path: Path) -> None:
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    from google.protobuf import text_format

    folder = write_model_repository(Bundle.open(exported), tmp_path / "models", largest_batch=32)
    assert sha256(folder / "1/model.onnx") == sha256(exported / MODEL)
    config = text_format.Parse((folder / "config.pbtxt").read_text(), schema.ModelConfig())
    assert (config.name, config.backend, config.max_batch_size) == ("tiny", "onnxruntime", 32)
    assert [(port.name, list(port.dims)) for port in config.input] == [("x", [1, 8, 8]), ("sigma", [1])]
    assert [(port.name, list(port.dims)) for port in config.output] == [("energy", [1]), ("grad", [1, 8, 8])]
    assert config.HasField("dynamic_batching")
    assert config.input[1].HasField("reshape")
    # An engine's profiles bound the batch. None can be built here, so one is only named.
    named = Engine(
        file=MODEL, flavour="tensorrt", version="10.9", gpu="NVIDIA H100", capabilities=(90,),
        profiles=((1, 1, 1), (1, 64, 256)),
    )  # fmt: skip
    folder = write_model_repository(Bundle.open(exported), tmp_path / "engines", engine=named)
    config = text_format.Parse((folder / "config.pbtxt").read_text(), schema.ModelConfig())
    assert (config.backend, config.max_batch_size) == ("tensorrt", 256)
    assert list(config.instance_group[0].profile) == ["0", "1"]
    assert (folder / "1/model.plan").is_file()
    with pytest.raises(ValueError, match="runs engines of tensorrt"):
        write_model_repository(
            Bundle.open(exported), tmp_path, engine=named.model_copy(update={"flavour": "tensorrt-rtx"})
        )


# What benchmarks/ times: every way gives the same gradient


@pytest.mark.slow
def test_the_table_of_gradients(exported: Path) -> None:
    """As `make gpu-check` makes it, here on the CPU."""
    prior = tiny_prior()
    found = {"torch": prior.run} | runtimes(exported, prior.device, prior.batch_size)
    assert set(found) == {"torch", *cpu_runtimes()} - {"auto"}
    x, sigma = inputs(prior.batch_size)
    for evaluate in found.values():
        torch.testing.assert_close(evaluate(x, sigma)[1], prior.run(x, sigma)[1], rtol=1e-4, atol=1e-5)
    lines = gradient_table(prior, found)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[4:]]
    assert [row[0] for row in rows] == list(found)
    flops = float(re.search(r"([\d.]+) GFLOP an image", lines[0])[1]) * 1e9  # type: ignore[index]
    assert flops == pytest.approx(flops_an_image(prior), abs=5e6)
    for _, milliseconds, rate, _ in rows:
        assert float(milliseconds) * float(rate) == pytest.approx(1e3 * prior.batch_size, rel=0.2)


def test_flops_of_a_gradient() -> None:
    """Of one convolution C -> C with k x k taps over H x W: 2 C^2 k^2 H W, and as much for its adjoint."""
    prior = NetworkPrior(EDMDenoiser(TwoConvolutions()), (1, 8, 8))
    convolutions = 2 * (8 * 9 * 64) * 2
    embedding = 2 * 8
    assert flops_an_image(prior) == 2 * (convolutions + embedding)


def test_backends_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the ONNX packages there is torch alone."""
    monkeypatch.setattr("benchmarks.gradients.importlib.util.find_spec", lambda name: None)
    prior = random_prior(NETWORK, "cpu", "float32", 2, 4)
    assert list(backends(prior)) == ["torch"]


def test_rotation() -> None:
    calls = {"a": 0, "b": 0}

    def run(name: str) -> None:
        calls[name] += 1

    times = in_rotation({name: lambda name=name: run(name) for name in calls}, seconds=0, turns=3)  # type: ignore[misc]
    assert calls == {"a": 4, "b": 4}  # and a first call that is not counted
    assert all(seconds >= 0 for seconds in times.values())


# TensorRT. For RTX it builds without a GPU; no engine can run here


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_tensorrt_rtx_builds_the_model(exported: Path, tmp_path: Path, precision: Precision) -> None:
    pytest.importorskip("tensorrt_rtx")
    folder = tmp_path / "bundle"
    if precision == "float32":
        shutil.copytree(exported, folder)
    else:
        export_bundle(tiny_prior(), folder, precision=precision)
    bundle = add_engine(Bundle.open(folder), "tensorrt-rtx", (1, 4, 8), capabilities=(89,))
    (engine,) = read_manifest(folder).engines
    assert bundle.manifest == read_manifest(folder)
    assert (engine.capabilities, engine.profiles) == ((89,), ((1, 1, 1), (1, 4, 8)))
    assert (folder / engine.file).stat().st_size > 10_000
    with pytest.raises(ValueError, match="needs a CUDA GPU"):
        load_bundle(folder, backend="tensorrt-rtx")
    with pytest.raises(ValueError, match="has no SM90"):
        add_engine(bundle, "tensorrt-rtx", (1, 4, 8), capabilities=(90,))
    # A graph it cannot build is an error in its own words, and leaves the bundle as it was.
    (folder / MODEL).write_bytes(b"no model")
    with pytest.raises(RuntimeError, match="cannot parse"):
        add_engine(bundle, "tensorrt-rtx", (1, 4, 8))
    assert len(list((folder / "engines").iterdir())) == 1


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("name", zoo_names())
def test_zoo_priors_become_engines(name: str, precision: Precision, tmp_path: Path) -> None:
    """They pass their check, do not depend on the place in the batch, and TensorRT takes the graph."""
    pytest.importorskip("tensorrt_rtx")
    prior = ag.load_prior(name)
    assert isinstance(prior, NetworkPrior)
    # The same graph, of the same weights, at sizes that a float64 reference takes seconds for.
    prior = prior.for_images(min(prior.image_shape[1], 32), min(prior.image_shape[2], 32))
    export_bundle(prior, tmp_path, precision=precision)
    exported = load_bundle(tmp_path, backend="onnxruntime", batch_size=4)
    x = torch.randn(4, *prior.image_shape, generator=torch.Generator().manual_seed(1))
    sigma = torch.tensor([0.01, 0.1, 1.0, 10.0])
    energy, grad = exported.energy_and_grad(x, sigma)
    turned = exported.energy_and_grad(x.flip(0), sigma.flip(0))
    assert torch.equal(turned[0].flip(0), energy)
    assert torch.equal(turned[1].flip(0), grad)
    assert torch.equal(exported.energy_and_grad(x[2:3], sigma[2:3])[1], grad[2:3])
    bundle = add_engine(Bundle.open(tmp_path), "tensorrt-rtx", (1, 16, 64), capabilities=(89,))
    assert bundle.manifest.engines


@pytest.mark.skipif(find_spec("tensorrt") is not None, reason="tensorrt is installed here")
def test_tensorrt_that_is_missing() -> None:
    with pytest.raises(ValueError, match=r"pip install 'alpenglow\[tensorrt\]'"):
        library("tensorrt")


def test_profiles() -> None:
    assert profiles_of((1, 16, 64)) == ((1, 1, 1), (1, 16, 64))
    assert profiles_of((4, 4, 8)) == ((4, 4, 8),)
    profiles = profiles_of((1, 16, 64))
    assert [profile_for(profiles, count) for count in (1, 2, 64, 65)] == [0, 1, 1, None]
