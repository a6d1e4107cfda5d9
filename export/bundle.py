"""Export: a network prior as a bundle folder that every runtime takes."""

import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from alpenglow._version import __version__
from alpenglow.export.gradient_graph import gradient_graph
from alpenglow.export.manifest import Manifest, sha256, write_manifest
from alpenglow.export.onnx_model import OPSET, in_precision, onnx_model
from alpenglow.export.parity import TOLERANCE, check_parity, measure_parity
from alpenglow.io.folders import atomic_folder
from alpenglow.priors.network import NetworkPrior, Precision

MODEL = "model.onnx"
# Shares of the time at which a stage ends, as measured with fashion-28 on two cores.
TRACED, CONVERTED, CHECKED = 0.12, 0.92, 1.0


def export_bundle(
    prior: NetworkPrior,
    folder: str | Path,
    *,
    precision: Precision = "float32",
    progress: Callable[[float], None] | None = None,
) -> Manifest:
    """Write `prior` as a bundle: model.onnx and manifest.json in `folder`, all of it or nothing.

    prior: float32, on the CPU. precision: of the network inside the model, float32, float16 or bfloat16; its
    inputs and outputs are float32. Before anything is written the model is compared with float64
    (alpenglow.export.parity): in float32 and float16 as ONNX Runtime runs it, in bfloat16, for which that
    has no operators on a CPU, the traced graph as torch runs it. `progress` gets the share that is done.

    Raises ValueError for another prior or precision and where the extra `onnx` is not installed,
    RuntimeError for a model that fails its comparison.
    """
    if precision not in TOLERANCE:
        raise ValueError(f"precision is {precision!r}; a bundle is in one of {', '.join(TOLERANCE)}")
    if prior.dtype != torch.float32 or prior.compute_dtype is not None:
        raise ValueError(f"{prior.name} is not in float32; load it with precision='float32' to export it")
    report = progress or (lambda share: None)
    onnxruntime = _onnxruntime()
    with atomic_folder(folder) as temporary:
        graph = gradient_graph(in_precision(prior, precision))
        report(TRACED)
        model = onnx_model(graph, prior.image_shape)
        report(CONVERTED)
        file = temporary / MODEL
        file.write_bytes(model.SerializeToString())
        if precision == "bfloat16":
            errors, judge = measure_parity(prior, graph), f"torch {torch.__version__} (traced graph, CPU)"
        else:
            session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
            errors = measure_parity(prior, evaluator(session))
            judge = f"onnxruntime {onnxruntime.__version__} (CPU)"
        check_parity(errors, precision, f"{prior.name} as {precision} ONNX", prior.sigma_range)
        manifest = Manifest(
            schema=1,
            name=prior.name,
            image_shape=prior.image_shape,
            units=prior.metadata.get("units", "[-1, 1]"),
            sigma_range=prior.sigma_range,
            gradient_error=prior.gradient_error,
            noise_floor=prior.noise_floor,
            precision=precision,
            class_label=prior.class_label,
            model=MODEL,
            opset=OPSET,
            parity=errors,
            parity_runtime=judge,
            versions=_versions(),
            files={MODEL: sha256(file)},
        )
        write_manifest(temporary, manifest)
    report(CHECKED)
    return manifest


def _onnxruntime():  # type: ignore[no-untyped-def]
    try:
        import onnxruntime
    except ImportError:
        raise ValueError("export needs onnxruntime: pip install 'alpenglow[onnx]'") from None
    return onnxruntime


def evaluator(session) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:  # type: ignore[no-untyped-def]
    """An ONNX Runtime session of the model on the CPU, as `measure_parity` asks it."""

    def evaluate(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        energy, grad = session.run(["energy", "grad"], {"x": x.numpy(), "sigma": sigma.numpy()})
        return torch.from_numpy(energy), torch.from_numpy(grad)

    return evaluate


def _versions() -> dict[str, str]:
    packages = ("torch", "onnx", "onnxscript", "onnxruntime")
    return {
        "alpenglow": __version__,
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in packages},
    }
