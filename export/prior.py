"""Priors that a runtime evaluates: exported bundles, and weights on torch's faster modes."""

import time
from pathlib import Path

import torch
from torch import Tensor

from alpenglow.export.manifest import Manifest
from alpenglow.export.runtimes.base import Bundle, Runtime, open_runtime, require, runtime_names
from alpenglow.export.runtimes.torch_graph import FROM_WEIGHTS
from alpenglow.priors.batched import BatchedPrior, check_batch_size
from alpenglow.priors.loading import as_device
from alpenglow.priors.network import NetworkPrior

AUTO = "auto"


class RuntimePrior(BatchedPrior):
    """An energy prior that one of alpenglow.export.runtimes evaluates, `batch_size` images at a time.

    like: the prior (or the manifest) whose name, image shape, levels and class it has. backend: the name of
    the runtime. See BatchedPrior.
    """

    def __init__(
        self, like: NetworkPrior | Manifest, runtime: Runtime, batch_size: int, dtype: torch.dtype
    ) -> None:
        self.name = like.name
        self.image_shape = like.image_shape
        self.sigma_range = like.sigma_range
        self.gradient_error = like.gradient_error
        self.noise_floor = like.noise_floor
        self.class_label = like.class_label
        self.dtype = dtype
        self.device = runtime.device
        self.backend = runtime.name
        self._runtime = runtime
        self._batch_size = batch_size

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, backend={self.backend!r}, device={str(self.device)!r})"

    def run(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """E and G of `batch_size` images; overwritten by the next call."""
        return self._runtime.run(x, sigma)


class BundlePrior(RuntimePrior):
    """The energy prior of an exported bundle, float32 in and out."""

    def __init__(self, bundle: Bundle, runtime: Runtime, batch_size: int) -> None:
        super().__init__(bundle.manifest, runtime, batch_size, torch.float32)
        self.bundle = bundle

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of itself."""
        return self.bundle.manifest

    def to(self, device: torch.device | str) -> "BundlePrior":
        """This prior on another device, by the fastest runtime there."""
        if torch.empty(0, device=device).device == self.device:
            return self
        return load_bundle(self.bundle.folder, device=device, batch_size=self._batch_size)


def on_torch_backend(prior: NetworkPrior, backend: str) -> RuntimePrior:
    """The same prior on torch-compile or cuda-graph. Raises ValueError for another backend or device."""
    if backend not in FROM_WEIGHTS:
        raise ValueError(
            f"weights run on torch, {' or '.join(FROM_WEIGHTS)}, got backend {backend!r}; for others make a "
            f"bundle and load that: alpenglow export {prior.name} -o FOLDER"
        )
    return RuntimePrior(prior, FROM_WEIGHTS[backend](prior), prior.batch_size, prior.dtype)


def load_bundle(
    folder: str | Path,
    *,
    backend: str = AUTO,
    device: torch.device | str | None = None,
    batch_size: int | None = None,
) -> BundlePrior:
    """The prior of a bundle folder on one of its runtimes; auto: the installed one that is fastest here.

    Raises ValueError for a folder that is no bundle or was altered, and for a backend or device that
    cannot run it, RuntimeError when auto finds none that can.
    """
    check_batch_size(batch_size)
    bundle, place = Bundle.open(folder), as_device(device)
    # The default of BatchedPrior, which needs the device that only a runtime has.
    count = batch_size or (16 if place.type == "cpu" else 64)
    if backend != AUTO:
        require(backend)
        return BundlePrior(bundle, open_runtime(backend, bundle, place, count), count)
    opened = []
    reasons = []
    for name in runtime_names(installed=True):
        try:
            opened.append(open_runtime(name, bundle, place, count))
        except ValueError as error:
            reasons.append(f"{name}: {error}")
    if not opened:
        raise RuntimeError(
            f"nothing here can run {folder} on {place}: {'; '.join(reasons) or 'no runtime is installed'}. "
            "pip install 'alpenglow[onnx]' brings onnxruntime"
        )
    fastest = fastest_of(opened, bundle.manifest.image_shape, count)
    return BundlePrior(bundle, fastest, count)


def fastest_of(
    runtimes: list[Runtime], image_shape: tuple[int, int, int], batch_size: int, *, rounds: int = 3
) -> Runtime:
    """The one that is fastest for a batch: the best of `rounds`, turn by turn, after a first call."""
    if len(runtimes) == 1:
        return runtimes[0]
    x = torch.zeros(batch_size, *image_shape, device=runtimes[0].device)
    sigma = torch.ones(batch_size, device=runtimes[0].device)
    seconds = dict.fromkeys(range(len(runtimes)), float("inf"))
    for turn in range(rounds + 1):
        for i, runtime in enumerate(runtimes):
            began = time.perf_counter()
            runtime.run(x, sigma)
            if x.device.type == "cuda":
                torch.cuda.synchronize(x.device)
            if turn:
                seconds[i] = min(seconds[i], time.perf_counter() - began)
    return runtimes[min(seconds, key=seconds.__getitem__)]
