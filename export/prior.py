"""A bundle as a prior."""

import time
from pathlib import Path

import torch
from torch import Tensor

from alpenglow.export.manifest import Manifest
from alpenglow.export.runtimes.base import Bundle, Runtime, open_runtime, require, runtime_names
from alpenglow.priors.batched import BatchedPrior, check_batch_size
from alpenglow.priors.loading import as_device

AUTO = "auto"


class BundlePrior(BatchedPrior):
    """The energy prior of an exported bundle, run by one of alpenglow.export.runtimes.

    float32 in and out, in batches of `batch_size` (see BatchedPrior). backend: the runtime's name.
    """

    dtype = torch.float32

    def __init__(self, bundle: Bundle, runtime: Runtime, batch_size: int | None = None) -> None:
        manifest = bundle.manifest
        self.bundle = bundle
        self.name = manifest.name
        self.image_shape = manifest.image_shape
        self.sigma_range = manifest.sigma_range
        self.metadata = {"units": manifest.units}
        self.class_label = manifest.class_label
        self.device = runtime.device
        self.backend = runtime.name
        self._runtime = runtime
        self._batch_size = batch_size

    def __repr__(self) -> str:
        return f"BundlePrior({self.name!r}, backend={self.backend!r}, device={str(self.device)!r})"

    @property
    def manifest(self) -> Manifest:
        """What the bundle says of itself."""
        return self.bundle.manifest

    def run(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """E and G of `batch_size` images; overwritten by the next call."""
        return self._runtime.run(x, sigma)

    def to(self, device: torch.device | str) -> "BundlePrior":
        """This prior on another device, by the fastest runtime there."""
        if torch.empty(0, device=device).device == self.device:
            return self
        return load_bundle(self.bundle.folder, device=device, batch_size=self._batch_size)


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
