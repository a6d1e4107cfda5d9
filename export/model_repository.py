"""A model repository of the NVIDIA Triton Inference Server from a bundle."""

import shutil
from pathlib import Path

from alpenglow.export.manifest import Engine
from alpenglow.export.runtimes.base import Bundle
from alpenglow.io.folders import atomic_folder

# How long a request waits for company: short beside a batch's own time.
QUEUE_MICROSECONDS = 500


def write_model_repository(
    bundle: Bundle, repository: str | Path, *, engine: Engine | None = None, largest_batch: int = 64
) -> Path:
    """Write <name>/config.pbtxt and <name>/1/model.onnx (or model.plan) to `repository`; returns that folder.

    The server batches requests by itself, up to `largest_batch` images. engine: one of the bundle's, of
    flavour tensorrt, to be served in place of the ONNX file; its profiles then bound the batch.
    Other models in the repository are left alone. Raises ValueError for an engine that the server cannot
    run and for a batch that is not positive.
    """
    if engine is not None and engine.flavour != "tensorrt":
        raise ValueError(f"the server runs engines of tensorrt, and this one is of {engine.flavour}")
    if largest_batch < 1:
        raise ValueError(f"the largest batch is {largest_batch}; expected a positive number")
    source = bundle.model if engine is None else bundle.folder / engine.file
    folder = Path(repository) / bundle.manifest.name
    with atomic_folder(folder) as temporary:
        (temporary / "1").mkdir()
        shutil.copyfile(source, temporary / "1" / ("model.onnx" if engine is None else "model.plan"))
        (temporary / "config.pbtxt").write_text(_config(bundle, engine, largest_batch))
    return folder


def _config(bundle: Bundle, engine: Engine | None, largest_batch: int) -> str:
    """Schema: model_config.proto of triton-inference-server/common."""
    manifest = bundle.manifest
    image = ", ".join(map(str, manifest.image_shape))
    if engine is None:
        backend, group = "onnxruntime", "kind: KIND_AUTO"
    else:
        largest_batch = max(high for _, _, high in engine.profiles)
        profiles = ", ".join(f'"{i}"' for i in range(len(engine.profiles)))
        backend, group = "tensorrt", f"kind: KIND_GPU, profile: [ {profiles} ]"
    # The server knows no input without dimensions: sigma [B] goes over the wire as [B, 1].
    scalar = "dims: [ 1 ], reshape: { shape: [ ] }"
    return f"""\
name: "{manifest.name}"
backend: "{backend}"
max_batch_size: {largest_batch}
input [
  {{ name: "x", data_type: TYPE_FP32, dims: [ {image} ] }},
  {{ name: "sigma", data_type: TYPE_FP32, {scalar} }}
]
output [
  {{ name: "energy", data_type: TYPE_FP32, {scalar} }},
  {{ name: "grad", data_type: TYPE_FP32, dims: [ {image} ] }}
]
dynamic_batching {{ max_queue_delay_microseconds: {QUEUE_MICROSECONDS} }}
instance_group [ {{ count: 1, {group} }} ]
"""
