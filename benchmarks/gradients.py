"""Energy and gradient by every backend of a device, as a share of the FLOP/s of a matrix product."""

import importlib.util
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from alpenglow.export.prior import load_bundle, on_torch_backend
from alpenglow.export.runtimes import runtime_names
from alpenglow.networks.denoiser import EDMDenoiser
from alpenglow.priors.network import NetworkPrior, Precision
from benchmarks.published import Evaluate

EDM_64: dict[str, Any] = {
    "img_resolution": 64, "in_channels": 3, "out_channels": 3, "model_channels": 128,
    "channel_mult": [1, 2, 2, 2], "num_blocks": 4, "attn_resolutions": [16], "dropout": 0.0,
}  # fmt: skip


def random_prior(
    network: dict[str, Any], device: str, precision: Precision, batch: int, size: int
) -> NetworkPrior:
    """One with random weights: they do not change the time."""
    torch.manual_seed(0)
    denoiser = EDMDenoiser.from_config({"backbone": "SongUNet", "network": network, "sigma_data": 0.5})
    shape = (network["in_channels"], size, size)
    return NetworkPrior(denoiser.to(device), shape, name="random", precision=precision, batch_size=batch)


def flops_an_image(prior: NetworkPrior) -> int:
    """Of energy and gradient, a multiplication with addition as two: twice the network, forward and back."""
    x, sigma = torch.zeros(1, *prior.image_shape, device=prior.device), torch.ones(1, device=prior.device)
    # Not of the gradient itself: the counter's hooks and autograd.grad do not go together.
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        prior.denoiser(x, sigma, prior.one_hot(1), compute_dtype=prior.compute_dtype)
    return 2 * counter.get_total_flops()


def peak_flops(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product in this run, on this machine: what can be had at all."""
    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / _seconds(lambda: a @ b, device)


def backends(prior: NetworkPrior) -> dict[str, Evaluate]:
    """Every way of the device to evaluate the prior's batches, with the bundle made in a temporary folder."""
    found: dict[str, Evaluate] = {"torch": prior.run}
    if prior.device.type == "cuda":
        found["cuda-graph"] = on_torch_backend(prior, "cuda-graph").run
    if all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")):
        from alpenglow.export.bundle import export_bundle

        plain = NetworkPrior(_float32(prior), prior.image_shape, name=prior.name)
        precision: Precision = "float16" if prior.compute_dtype == torch.float16 else "float32"
        with tempfile.TemporaryDirectory() as folder:
            export_bundle(plain, folder, precision=precision)
            found |= runtimes(Path(folder), prior.device, prior.batch_size)
    return found


def runtimes(bundle: Path, device: torch.device, batch_size: int) -> dict[str, Evaluate]:
    """A bundle on every installed runtime that can run it on `device`; what the others say is printed."""
    found: dict[str, Evaluate] = {}
    for name in runtime_names(installed=True):
        try:
            found[name] = load_bundle(bundle, backend=name, device=device, batch_size=batch_size).run
        except (ValueError, RuntimeError) as error:
            print(f"{name}: {error}")
    return found


def _float32(prior: NetworkPrior) -> EDMDenoiser:
    assert prior.denoiser.config is not None
    plain = EDMDenoiser.from_config(prior.denoiser.config)
    plain.load_state_dict({key: value.float().cpu() for key, value in prior.denoiser.state_dict().items()})
    return plain


def gradient_table(prior: NetworkPrior, found: dict[str, Evaluate]) -> list[str]:
    """Markdown of `backends(prior)`: milliseconds a batch, gradients a second, model FLOP utilisation."""
    device, batch = prior.device.type, prior.batch_size
    dtype = prior.compute_dtype or prior.dtype
    peak, flops = peak_flops(device, dtype), flops_an_image(prior) * batch
    lines = [
        f"Energy and gradient, {prior.image_shape[1]}x{prior.image_shape[2]}, {dtype}, batch {batch}: "
        f"{flops / batch / 1e9:.2f} GFLOP an image; a matrix product reaches {peak / 1e12:.3g} TFLOP/s here.",
        "",
        "| backend | ms a batch | gradients a second | share of the matrix product's FLOP/s |",
        "| --- | --- | --- | --- |",
    ]
    x = torch.randn(batch, *prior.image_shape, device=prior.device)
    sigma = torch.full((batch,), 0.5, device=prior.device)
    for name, evaluate in found.items():
        seconds = _seconds(lambda: evaluate(x, sigma), device)  # noqa: B023 (called at once)
        lines.append(
            f"| {name} | {1e3 * seconds:.2f} | {batch / seconds:.0f} | {flops / seconds / peak:.0%} |"
        )
        print(lines[-1], flush=True)
    return lines


def _seconds(run: Callable[[], object], device: str) -> float:
    """Median of a call."""
    times = []
    for turn in range(13):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        if turn > 2:
            times.append(time.perf_counter() - began)
    return torch.tensor(times).median().item()
