"""OpenVINO on a CPU."""

import torch
from torch import Tensor

from alpenglow.export.runtimes.base import Bundle


def open_runtime(name: str, bundle: Bundle, device: torch.device, batch_size: int) -> "OpenVino":
    """Raises ValueError for any device but the CPU."""
    if device.type != "cpu":
        raise ValueError(f"openvino runs on the CPU here, got device {str(device)!r}; take another backend")
    return OpenVino(bundle, batch_size)


class OpenVino:
    """The model compiled for one batch size."""

    name = "openvino"
    device = torch.device("cpu")

    def __init__(self, bundle: Bundle, batch_size: int) -> None:
        import openvino

        core = openvino.Core()
        model = core.read_model(bundle.model)
        model.reshape({"x": [batch_size, *bundle.manifest.image_shape], "sigma": [batch_size]})
        settings = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
            # Left to itself it would compute in bfloat16 where the CPU has it.
            "INFERENCE_PRECISION_HINT": "f32",
        }
        self._request = core.compile_model(model, "CPU", settings).create_infer_request()
        self._outputs = {
            name: torch.empty(shape)
            for name, shape in (
                ("energy", [batch_size]),
                ("grad", [batch_size, *bundle.manifest.image_shape]),
            )
        }
        for name, tensor in self._outputs.items():
            self._request.set_tensor(name, openvino.Tensor(tensor.numpy(), shared_memory=True))
        self._tensor = openvino.Tensor

    def run(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """See Runtime."""
        for name, tensor in (("x", x), ("sigma", sigma)):
            self._request.set_tensor(name, self._tensor(tensor.numpy(), shared_memory=True))
        self._request.infer()
        return self._outputs["energy"], self._outputs["grad"]
