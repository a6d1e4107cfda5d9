"""TensorRT, plain or for RTX: an engine of the bundle on torch's tensors, replayed as a CUDA graph."""

import warnings
from typing import Any

import torch
from torch import Tensor

from alpenglow.export.manifest import Engine
from alpenglow.export.runtimes.base import Bundle
from alpenglow.export.tensorrt_engine import add_engine, library, logger, profile_for


def open_runtime(name: str, bundle: Bundle, device: torch.device, batch_size: int) -> "TensorRT":
    """Runs the bundle's engine for this GPU, this TensorRT and this batch; builds it where there is none.

    That takes seconds (tensorrt-rtx) to minutes (tensorrt); it is announced by a warning, and written into
    the bundle. Raises ValueError for a device that is no GPU, OSError for a bundle that cannot be written to.
    """
    if device.type != "cuda":
        raise ValueError(
            f"{name} needs a CUDA GPU, got device {str(device)!r}; give device='cuda', or another backend"
        )
    engine = find_engine(name, bundle, device, batch_size)
    if engine is None:
        built = [e for e in bundle.manifest.engines if e.flavour == name]
        there = "; ".join(f"for {e.gpu or e.capabilities}, version {e.version}" for e in built) or "none"
        version = library(name).__version__
        warnings.warn(
            f"building the {name} {version} engine of {bundle.manifest.name} for batches of up to "
            f"{batch_size} on {torch.cuda.get_device_name(device)}, which can take minutes "
            f"(the bundle's engines: {there})",
            stacklevel=2,
        )
        capabilities = (_capability(device),) if name == "tensorrt-rtx" else ()
        with torch.cuda.device(device):
            bundle = add_engine(
                bundle,
                name,
                (1, batch_size, batch_size),
                capabilities=capabilities,
            )
        engine = bundle.manifest.engines[-1]
    return TensorRT(bundle, engine, device, batch_size)


def find_engine(name: str, bundle: Bundle, device: torch.device, batch_size: int) -> Engine | None:
    """The bundle's engine that runs on `device` with the TensorRT that is installed, or None."""
    version = library(name).__version__
    for engine in bundle.manifest.engines:
        if (
            engine.flavour == name
            and engine.version == version
            and engine.gpu in (None, torch.cuda.get_device_name(device))
            and _capability(device) in engine.capabilities
            and profile_for(engine.profiles, batch_size) is not None
        ):
            return engine
    return None


def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


class TensorRT:
    """An execution context for one batch size, with memory of its own that never moves."""

    def __init__(self, bundle: Bundle, engine: Engine, device: torch.device, batch_size: int) -> None:
        self.name, self.device = engine.flavour, device
        trt = library(engine.flavour)
        log = logger(trt)
        # Kept: an engine needs its runtime, and a context its engine.
        self._runtime = trt.Runtime(log)
        self._engine = self._runtime.deserialize_cuda_engine((bundle.folder / engine.file).read_bytes())
        if self._engine is None:
            raise RuntimeError(f"{engine.flavour} cannot load {bundle.folder / engine.file}: {log.told()}")
        self._context = self._engine.create_execution_context()
        self._stream = torch.cuda.Stream(device)
        profile = profile_for(engine.profiles, batch_size)
        self._context.set_optimization_profile_async(profile, self._stream.cuda_stream)
        shape = (batch_size, *bundle.manifest.image_shape)
        self._tensors = {
            "x": torch.zeros(shape, device=device),
            "sigma": torch.ones(batch_size, device=device),
            "energy": torch.empty(batch_size, device=device),
            "grad": torch.empty(shape, device=device),
        }
        for name in ("x", "sigma"):
            self._context.set_input_shape(name, tuple(self._tensors[name].shape))
        for name, tensor in self._tensors.items():
            self._context.set_tensor_address(name, tensor.data_ptr())
        self._graph = self._capture()

    def _capture(self) -> torch.cuda.CUDAGraph:
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            self._enqueue()  # a first run may allocate, which a graph must not
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            self._enqueue()
        return graph

    def _enqueue(self) -> Any:
        if not self._context.execute_async_v3(torch.cuda.current_stream(self.device).cuda_stream):
            raise RuntimeError(f"{self.name} failed to run its engine")

    def run(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """See Runtime; nothing waits for the GPU."""
        self._tensors["x"].copy_(x)
        self._tensors["sigma"].copy_(sigma)
        self._graph.replay()
        return self._tensors["energy"], self._tensors["grad"]
