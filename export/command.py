"""What `alpenglow export` does: a bundle, with an engine, or a repository of the Triton Inference Server."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from alpenglow.export.bundle import export_bundle
from alpenglow.export.manifest import Manifest
from alpenglow.export.model_repository import write_model_repository
from alpenglow.export.runtimes.base import Bundle
from alpenglow.export.tensorrt_engine import MODULES, add_engine, library, profiles_of
from alpenglow.priors.loading import load_prior

ONNX, BUNDLE, SERVER = "onnx", "bundle", "triton-server"


class Written(NamedTuple):
    """The manifest, and what there is to look at."""

    manifest: Manifest
    paths: list[Path]


def run(
    source: str,
    output: Path,
    *,
    format: str = ONNX,
    precision: str = "float32",
    batch: str = "1,16,64",
    layout: str = BUNDLE,
    class_label: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> Written:
    """Export the prior `source` (zoo, .safetensors or hub) to `output`.

    format: onnx, or tensorrt or tensorrt-rtx for an engine besides, for the smallest, best and largest
    batch that `batch` names. layout: bundle, or triton-server: `output` is then the model repository.
    Raises ValueError for options that are wrong or do not go together, before any work.
    """
    if format != ONNX and format not in MODULES:
        raise ValueError(f"format is {format!r}; expected {ONNX}, {' or '.join(MODULES)}")
    if layout not in (BUNDLE, SERVER):
        raise ValueError(f"layout is {layout!r}; expected {BUNDLE} or {SERVER}")
    if layout == SERVER and format == "tensorrt-rtx":
        raise ValueError("the Triton Inference Server runs engines of tensorrt, not of tensorrt-rtx")
    batches = _batches(batch)
    profiles_of(batches)
    if format in MODULES:
        library(format)
    prior = load_prior(source, class_label=class_label)
    with tempfile.TemporaryDirectory() as scratch:
        folder = output if layout == BUNDLE else Path(scratch)
        manifest = export_bundle(prior, folder, precision=precision, progress=progress)  # type: ignore[arg-type]
        bundle, paths = Bundle(folder, manifest), [output]
        if format in MODULES:
            bundle = add_engine(bundle, format, batches)
            paths.append(folder / bundle.manifest.engines[-1].file)
        if layout == SERVER:
            engine = bundle.manifest.engines[-1] if format in MODULES else None
            paths = [write_model_repository(bundle, output, engine=engine, largest_batch=batches[2])]
    return Written(bundle.manifest, paths)


def _batches(text: str) -> tuple[int, int, int]:
    try:
        low, best, high = (int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"batch is {text!r}; expected three numbers such as 1,16,64") from None
    return low, best, high
