"""ONNX Runtime: on a CPU, and on CUDA with tensors bound by pointer."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from alpenglow.export.runtimes.base import Bundle

PROVIDERS = {
    "cpu": ["CPUExecutionProvider"],
    # TensorRT first where onnxruntime has it; what a provider cannot run falls to the next.
    "cuda": ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"],
}


def open_runtime(name: str, bundle: Bundle, device: torch.device, batch_size: int) -> "OnnxRuntime":
    """Raises ValueError for a device that the installed onnxruntime has no provider for."""
    import onnxruntime

    available = onnxruntime.get_available_providers()
    if device.type == "cuda" and "CUDAExecutionProvider" not in available:
        raise ValueError(
            f"this onnxruntime has no CUDA provider (it has {', '.join(available)}): "
            "pip install onnxruntime-gpu in place of onnxruntime"
        )
    if device.type not in PROVIDERS:
        raise ValueError(f"onnxruntime cannot run on {device}; expected cpu or cuda")
    return OnnxRuntime(bundle, device, batch_size, [p for p in PROVIDERS[device.type] if p in available])


class OnnxRuntime:
    """A session whose inputs and outputs are torch's memory: nothing is copied, on either device."""

    name = "onnxruntime"

    def __init__(self, bundle: Bundle, device: torch.device, batch_size: int, providers: list[str]) -> None:
        import onnxruntime

        self.device = device
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Idle threads that spin would take the cores from torch, which has the next step.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        where = [{} if name.startswith("CPU") else {"device_id": device.index or 0} for name in providers]
        self._session = onnxruntime.InferenceSession(
            bundle.model, options, providers=providers, provider_options=where
        )
        self._energy = torch.empty(batch_size, device=device)
        self._grad = torch.empty(batch_size, *bundle.manifest.image_shape, device=device)

    def run(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """See Runtime."""
        binding = self._session.io_binding()
        for name, tensor in (("x", x), ("sigma", sigma)):
            binding.bind_input(name, *self._place(tensor))
        for name, tensor in (("energy", self._energy), ("grad", self._grad)):
            binding.bind_output(name, *self._place(tensor))
        if self.device.type == "cuda":
            # The session has its own stream.
            torch.cuda.current_stream(self.device).synchronize()
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return self._energy, self._grad

    def _place(self, tensor: Tensor) -> tuple[Any, ...]:
        index = self.device.index or 0
        return self.device.type, index, np.float32, tuple(tensor.shape), tensor.data_ptr()
