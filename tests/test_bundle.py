"""Bundles: what an export writes, what loading one refuses, and the runtimes against the torch prior."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from alpenglow.export.bundle import MODEL, export_bundle
from alpenglow.export.manifest import MANIFEST, read_manifest, sha256
from alpenglow.export.prior import load_bundle
from alpenglow.priors.network import NetworkPrior
from tests.tiny import random_denoiser

for library in ("onnxscript", "onnxruntime"):
    pytest.importorskip(library)


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
