"""`load_prior`: a prior from weights or from an exported bundle, on the backend that is to run it."""

from pathlib import Path

import torch

from alpenglow.export.manifest import is_bundle
from alpenglow.export.prior import AUTO, RuntimePrior, load_bundle, on_torch_backend
from alpenglow.priors import loading
from alpenglow.priors.network import NetworkPrior, Precision

TORCH = "torch"


def load_prior(
    source: str | Path,
    *,
    backend: str | None = None,
    device: torch.device | str | None = None,
    precision: Precision | None = None,
    batch_size: int | None = None,
    class_label: int | None = None,
) -> NetworkPrior | RuntimePrior:
    """An energy prior on `device` (None: CPU).

    source: a zoo name, a .safetensors file, `hub:owner/name` (see alpenglow.priors.hub.fetch), or the folder
    of a bundle (`alpenglow export`). backend: weights run on `torch`, their default, torch-compile or
    cuda-graph; a bundle on onnxruntime, openvino, tensorrt, tensorrt-rtx, or `auto`, its default: the
    fastest of those that are installed.
    precision: of weights, float32 (None) or float64, or float16 or bfloat16 for the network alone (for GPUs);
    a bundle has its own, and so has it its class. batch_size: images that go through the network at once
    (None: see BatchedPrior). class_label: the class, for a class-conditional network.

    Raises ValueError when the source is missing, damaged, foreign or no energy prior, and for a backend,
    device or option that it does not have.
    """
    if is_bundle(source):
        prior = load_bundle(source, backend=backend or AUTO, device=device, batch_size=batch_size)
        manifest = prior.manifest
        if precision not in (None, manifest.precision):
            raise ValueError(f"the bundle {source} is in {manifest.precision}, got precision={precision!r}")
        if class_label not in (None, manifest.class_label):
            raise ValueError(
                f"the bundle {source} is of class {manifest.class_label}, got class_label={class_label}"
            )
        return prior
    weights = loading.load_prior(
        source,
        device=device,
        precision=precision or "float32",
        batch_size=batch_size,
        class_label=class_label,
    )
    return weights if backend in (None, TORCH) else on_torch_backend(weights, backend)
