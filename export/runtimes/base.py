"""The protocol of runtimes, and the table of them."""

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from alpenglow.export.manifest import Manifest, read_manifest


@dataclass(frozen=True)
class Bundle:
    """A verified bundle folder."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: str | Path) -> "Bundle":
        """Raises ValueError as `read_manifest` does."""
        return cls(Path(folder), read_manifest(folder))

    @property
    def model(self) -> Path:
        """The ONNX file."""
        return self.folder / self.manifest.model


class Runtime(Protocol):
    """Evaluates energy and gradient for one batch size on one device."""

    name: str
    device: torch.device

    def run(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """E [B] and G [B, C, H, W], float32, at contiguous float32 x and sigma on `device`, B as opened.

        The results may be overwritten by the next call.
        """
        ...


class _Entry(NamedTuple):
    module: str
    library: str
    extra: str


_TABLE = {
    "onnxruntime": _Entry("onnx_runtime", "onnxruntime", "onnx"),
    "openvino": _Entry("openvino", "openvino", "openvino"),
    "tensorrt": _Entry("tensorrt", "tensorrt", "tensorrt"),
    "tensorrt-rtx": _Entry("tensorrt", "tensorrt_rtx", "tensorrt-rtx"),
}


def runtime_names(*, installed: bool = False) -> list[str]:
    """All runtimes for bundles, or those whose library is installed."""
    return [
        name for name, entry in _TABLE.items() if not installed or importlib.util.find_spec(entry.library)
    ]


def require(name: str) -> None:
    """ValueError, with the line that installs it, where the library of a runtime is missing or unknown."""
    entry = _TABLE.get(name)
    if entry is None:
        raise ValueError(f"unknown backend {name!r}; a bundle runs on {', '.join(_TABLE)} or auto")
    if importlib.util.find_spec(entry.library) is None:
        raise ValueError(f"backend {name} needs {entry.library}: pip install 'alpenglow[{entry.extra}]'")


def open_runtime(name: str, bundle: Bundle, device: torch.device, batch_size: int) -> Runtime:
    """A runtime for batches of `batch_size` images.

    Raises ValueError for an unknown name, a missing library, and a device it cannot use.
    """
    require(name)
    module = importlib.import_module(f"alpenglow.export.runtimes.{_TABLE[name].module}")
    runtime: Runtime = module.open_runtime(name, bundle, device, batch_size)
    return runtime
