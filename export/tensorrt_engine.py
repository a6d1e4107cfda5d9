"""TensorRT engines of a bundle's model, by the plain `tensorrt` or by `tensorrt-rtx`, which share one API.

The plain one tunes an engine on the GPU that is in the machine, and for it alone. TensorRT for RTX needs no
GPU: its engine is finished on the user's, if that is of a compute capability that it was built for.
"""

import importlib
import importlib.util
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from alpenglow.export.manifest import Engine, sha256, write_manifest
from alpenglow.export.runtimes.base import Bundle
from alpenglow.io.files import atomic_path

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
# What `tensorrt-rtx` builds for unless it is told: Ampere (80, 86), Ada, Blackwell. It has no Hopper.
CAPABILITIES = (80, 86, 89, 120)
TIMINGS = "engines/timings.cache"

Batches = tuple[int, int, int]


def library(flavour: str) -> ModuleType:
    """The Python module of a flavour; ValueError, with the line that installs it, where it is missing."""
    if importlib.util.find_spec(MODULES[flavour]) is None:
        raise ValueError(f"{flavour} is not installed: pip install 'alpenglow[{flavour}]'")
    return importlib.import_module(MODULES[flavour])


def profiles_of(batches: Batches) -> tuple[Batches, ...]:
    """Optimisation profiles (smallest, best, largest batch): one for `batches`, one for the smallest alone.

    An engine picks its kernels for the best batch of a profile: those for 256 images would be slow for one.
    Raises ValueError unless 1 <= smallest <= best <= largest.
    """
    low, best, high = batches
    if not 1 <= low <= best <= high:
        raise ValueError(f"batches are {batches}; expected smallest <= best <= largest, from 1 up")
    return ((low, low, low), batches) if low < best else (batches,)


def profile_for(profiles: tuple[Batches, ...], batch_size: int) -> int | None:
    """Which profile serves a batch best: the first of those that hold it."""
    fitting = [i for i, (low, _, high) in enumerate(profiles) if low <= batch_size <= high]
    return fitting[0] if fitting else None


def add_engine(
    bundle: Bundle, flavour: str, batches: Batches, *, capabilities: tuple[int, ...] = ()
) -> Bundle:
    """Build an engine of the bundle's model, write it into the bundle, and return the bundle with it.

    flavour: tensorrt or tensorrt-rtx.
    batches: smallest, best and largest. capabilities: for tensorrt-rtx, those to build for (89: 8.9; default
    CAPABILITIES). An engine of the same flavour, version and GPU is replaced. Takes seconds for
    tensorrt-rtx, minutes for tensorrt. Raises ValueError where the library or, for tensorrt, a GPU is
    missing, RuntimeError, with TensorRT's own words, for a model that it cannot build.
    """
    trt, profiles = library(flavour), profiles_of(batches)
    gpu, targets = _targets(flavour, capabilities)
    timings = bundle.folder / TIMINGS if flavour == "tensorrt" else None
    plan = _build(trt, bundle, profiles, targets if flavour == "tensorrt-rtx" else (), timings)
    where = "-".join(re.findall(r"[\w]+", gpu.lower())) if gpu else "-".join(f"sm{c}" for c in targets)
    file = f"engines/{flavour}-{trt.__version__}-{where}.engine"
    with atomic_path(bundle.folder / file) as temporary:
        temporary.write_bytes(plan)
    engine = Engine.model_validate(
        {
            "file": file,
            "flavour": flavour,
            "version": trt.__version__,
            "gpu": gpu,
            "capabilities": targets,
            "profiles": profiles,
        }
    )
    manifest = bundle.manifest
    others = tuple(old for old in manifest.engines if old.file != file)
    files = manifest.files | {file: sha256(bundle.folder / file)}
    manifest = manifest.model_copy(update={"engines": (*others, engine), "files": files})
    write_manifest(bundle.folder, manifest)
    return replace(bundle, manifest=manifest)


def _targets(flavour: str, capabilities: tuple[int, ...]) -> tuple[str | None, tuple[int, ...]]:
    if flavour == "tensorrt-rtx":
        return None, capabilities or CAPABILITIES
    if capabilities:
        raise ValueError("tensorrt builds for the GPU in this machine alone; leave the capabilities out")
    if not torch.cuda.is_available():
        raise ValueError(
            "tensorrt builds engines on the GPU they are for, and there is none here; run this there, or "
            "take tensorrt-rtx, which needs none"
        )
    major, minor = torch.cuda.get_device_capability()
    return torch.cuda.get_device_name(), (10 * major + minor,)


def _build(
    trt: ModuleType,
    bundle: Bundle,
    profiles: tuple[Batches, ...],
    capabilities: tuple[int, ...],
    timings: Path | None,
) -> bytes:
    log = logger(trt)
    builder = trt.Builder(log)
    # Strongly typed: half precision where the graph says so and nowhere else. TensorRT for RTX always is.
    strong = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strong is None else 1 << int(strong))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(bundle.model.read_bytes()):
        reasons = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise RuntimeError(f"{trt.__name__} cannot parse {bundle.model}: {'; '.join(reasons)}")
    config = builder.create_builder_config()
    for batches in profiles:
        profile = builder.create_optimization_profile()
        profile.set_shape("x", *[(count, *bundle.manifest.image_shape) for count in batches])
        profile.set_shape("sigma", *[(count,) for count in batches])
        config.add_optimization_profile(profile)
    if capabilities:
        _aim(trt, config, capabilities)
    cache = None
    if timings is not None:
        cache = config.create_timing_cache(timings.read_bytes() if timings.is_file() else b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError(f"{trt.__name__} cannot build {bundle.model}: {log.told()}")
    if timings is not None and cache is not None:
        with atomic_path(timings) as temporary:
            temporary.write_bytes(bytes(cache.serialize()))
    return bytes(plan)


def _aim(trt: ModuleType, config: Any, capabilities: tuple[int, ...]) -> None:
    config.num_compute_capabilities = len(capabilities)
    for i, capability in enumerate(capabilities):
        target = getattr(trt.ComputeCapability, f"SM{capability}", None)
        if target is None:
            known = re.findall(r"SM\d+", " ".join(dir(trt.ComputeCapability)))
            raise ValueError(
                f"{trt.__name__} {trt.__version__} has no SM{capability}; it has {', '.join(known)}"
            )
        config.set_compute_capability(target, i)


def logger(trt: ModuleType) -> Any:
    """A logger of the module's own class that keeps errors for an exception, `told()`, and drops the rest."""

    class Log(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            """Called by TensorRT."""
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message.strip())

        def told(self) -> str:
            """The errors in one line."""
            return "; ".join(self.errors) or "it does not say why"

    return Log()
