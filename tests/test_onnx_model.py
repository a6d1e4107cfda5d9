"""Energy and gradient as an ONNX model: agreement with float64, its operators, and a check that can fail."""

import math

import pytest
import torch
from torch import Tensor

from alpenglow.export.gradient_graph import gradient_graph
from alpenglow.export.onnx_model import OPSET, in_precision, onnx_model
from alpenglow.export.parity import SIGMAS, TOLERANCE, check_parity, measure_parity
from alpenglow.networks.denoiser import EnergyForm
from alpenglow.priors.network import NetworkPrior, Precision
from tests.tiny import random_denoiser, randomise

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


def tiny_prior() -> NetworkPrior:
    return NetworkPrior(random_denoiser(), (1, 8, 8), batch_size=1)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["alps", "product"])
@pytest.mark.parametrize(("precision", "classes"), [("float32", 0), ("float16", 0), ("float32", 3)])
def test_agrees_with_float64_at_every_level_and_batch(
    precision: Precision, classes: int, form: EnergyForm
) -> None:
    label = {"class_label": 1} if classes else {}
    denoiser = random_denoiser(label_dim=classes).with_form(form)
    randomise(denoiser)
    prior = NetworkPrior(denoiser, (1, 8, 8), batch_size=1, **label)
    model = onnx_model(gradient_graph(in_precision(prior, precision)), prior.image_shape)
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [OPSET]
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    def evaluate(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        energy, grad = session.run(["energy", "grad"], {"x": x.numpy(), "sigma": sigma.numpy()})
        assert energy.dtype == grad.dtype == "float32"
        return torch.from_numpy(energy), torch.from_numpy(grad)

    errors = measure_parity(prior, evaluate)
    assert list(errors) == [f"{sigma:g}" for sigma in SIGMAS]
    check_parity(errors, precision, "the model")
    if precision == "float16":
        assert max(errors.values()) > TOLERANCE["float32"]


def test_parity_sees_errors_of_one_image_and_nan() -> None:
    prior = tiny_prior()

    def wrong_in_the_last(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        energy, grad = prior.run(x, sigma)
        grad[-1] *= 1 + 1e-3
        return energy, grad

    errors = measure_parity(prior, wrong_in_the_last, batches=(1, 3))
    assert all(error == pytest.approx(1e-3, rel=0.05) for error in errors.values())
    with pytest.raises(RuntimeError, match=r"1\.0e-03 at sigma 0\.002"):
        check_parity(errors, "float32", "it")

    check_parity(errors | {"0.1": 9e-6}, "float16", "it")
    few = {"0.01": 9e-5, "0.1": 9e-6}
    check_parity(few, "float32", "it", sigma_range=(0.05, 40.0))
    for errors in (few | {"0.1": 1.1e-5}, few | {"0.01": 1.1e-4}):
        with pytest.raises(RuntimeError, match=r"1\.1e-0. at sigma 0\.[01]+ \(at most"):
            check_parity(errors, "float32", "it", sigma_range=(0.05, 40.0))

    def nan(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return prior.run(x, sigma)[0], torch.full_like(x, torch.nan)

    errors = measure_parity(prior, nan, batches=(1,))
    assert set(errors.values()) == {math.inf}
    with pytest.raises(RuntimeError, match="inf at sigma"):
        check_parity(errors, "bfloat16", "it")
