"""manifest.json: what a bundle holds, how exact it is, and the checksums by which a damaged one is known."""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)

from alpenglow.io.files import atomic_path
from alpenglow.priors.network import UNMEASURED_ERROR, Precision

MANIFEST = "manifest.json"
SCHEMA: Literal[1] = 1
Flavour = Literal["tensorrt", "tensorrt-rtx"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Engine(_Strict):
    """A TensorRT engine of the bundle's model, which runs on one kind of GPU alone."""

    file: str
    flavour: Flavour
    version: str
    """Of TensorRT: another one cannot read it."""
    gpu: str | None
    """Name of the GPU it was tuned on; None where it was built without one, for `capabilities`."""
    capabilities: tuple[PositiveInt, ...]
    """Compute capabilities it runs on, 89 for 8.9."""
    profiles: tuple[tuple[PositiveInt, PositiveInt, PositiveInt], ...]
    """Batches of each optimisation profile: smallest, best, largest."""


class Manifest(_Strict):
    """The facts of a bundle, in its manifest.json."""

    schema_version: Literal[1] = Field(default=SCHEMA, alias="schema")
    name: str
    image_shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    units: str
    sigma_range: tuple[PositiveFloat, PositiveFloat]
    gradient_error: NonNegativeFloat = UNMEASURED_ERROR
    noise_floor: NonNegativeFloat = 0.0
    precision: Precision
    class_label: int | None
    model: str
    """The ONNX file."""
    opset: PositiveInt
    parity: dict[str, float]
    """Largest relative error against float64 by sigma, as measured at export."""
    parity_runtime: str
    versions: dict[str, str]
    files: dict[str, str]
    """Path within the bundle -> sha256, for every file but the manifest."""
    engines: tuple[Engine, ...] = ()


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_bundle(path: str | Path) -> bool:
    """Whether it is a folder with a manifest."""
    return (Path(path) / MANIFEST).is_file()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write it to folder/manifest.json, atomically."""
    with atomic_path(folder / MANIFEST) as temporary:
        temporary.write_text(manifest.model_dump_json(by_alias=True, indent=1) + "\n")


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a bundle whose every file is as it was written.

    Raises ValueError for a folder that is no bundle, another schema, and missing or altered files.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} is no bundle: it has no {MANIFEST}; make one with `alpenglow export`")
    manifest = _parse(path)
    for name, expected in manifest.files.items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"the bundle {folder} lacks {name}; copy it again, or export it again")
        if sha256(file) != expected:
            raise ValueError(
                f"{file} is not what was exported (its sha256 differs); copy the bundle again, or export "
                "it again"
            )
    return manifest


def _parse(path: Path) -> Manifest:
    try:
        fields: Any = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}; copy the bundle again") from None
    schema = fields.get("schema") if isinstance(fields, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path} has schema {schema!r}, this version reads {SCHEMA}; update alpenglow")
    try:
        manifest = Manifest.model_validate(fields)
    except ValidationError as error:
        raise ValueError(f"{path} is wrong: {error}") from None
    named = {manifest.model, *(engine.file for engine in manifest.engines)}
    outside = [name for name in manifest.files if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside or not named <= manifest.files.keys():
        raise ValueError(f"{path} names files without checksums or outside of the bundle; export it again")
    return manifest
