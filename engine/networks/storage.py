"""Denoisers in safetensors files: the weights and, in one JSON header, all it takes to rebuild them."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from alpenglow.io.files import atomic_path
from alpenglow.networks.denoiser import EDMDenoiser, EnergyForm

HEADER = "alpenglow"
SCHEMA: Literal[1] = 1
Kind = Literal["energy", "teacher"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DenoiserConfig(_Strict):
    """Arguments of EDMDenoiser.from_config."""

    backbone: str
    network: dict[str, Any]
    sigma_data: PositiveFloat = 0.5
    patch: PositiveInt = 1
    form: EnergyForm = "alps"


class Metadata(_Strict):
    """The header of a weight file, under the safetensors metadata key "alpenglow"."""

    schema_version: Literal[1] = Field(alias="schema")
    kind: Kind
    name: str
    image_shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    denoiser: DenoiserConfig
    sigma_range: tuple[PositiveFloat, PositiveFloat]
    gradient_error: NonNegativeFloat | None = None
    """Largest relative error of an energy's gradient in sigma_range, beside its teacher's; None: unknown."""
    noise_floor: NonNegativeFloat = 0.0
    """Standard deviation of the white noise that the training images were given, in `units`."""
    units: str = "[-1, 1]"
    """What the values of an image mean."""
    extra: dict[str, Any] = {}


def save_denoiser(
    path: str | Path,
    denoiser: EDMDenoiser,
    *,
    name: str,
    image_shape: tuple[int, int, int],
    kind: Kind = "energy",
    sigma_range: tuple[float, float] = (0.01, 80.0),
    gradient_error: float | None = None,
    noise_floor: float = 0.0,
    units: str = "[-1, 1]",
    extra: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write a denoiser built by EDMDenoiser.from_config to `path` (.safetensors), atomically.

    `kind` says what x - psi means: "energy" for a distilled energy prior, "teacher" for a plain denoiser.
    `dtype` stores the parameters (buffers stay float32: half precision would shift the Fourier
    frequencies of the noise level by a tenth of a radian). Raises ValueError for a denoiser without a
    configuration, weights that are not finite in `dtype`, another suffix or a wrong header.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"cannot write {path}: expected a name that ends in .safetensors")
    if denoiser.config is None:
        raise ValueError("this denoiser was built by hand; build it with EDMDenoiser.from_config to save it")
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"cannot store weights as {dtype}; use torch.float16, bfloat16 or float32")
    try:
        metadata = Metadata.model_validate(
            {
                "schema": SCHEMA,
                "kind": kind,
                "name": name,
                "image_shape": image_shape,
                "denoiser": denoiser.config,
                "sigma_range": sigma_range,
                "gradient_error": gradient_error,
                "noise_floor": noise_floor,
                "units": units,
                "extra": extra or {},
            }
        )
        header = metadata.model_dump_json(by_alias=True)
    except ValueError as error:
        raise ValueError(f"{path} was not written, its header would be wrong: {error}") from None
    parameters = dict(denoiser.named_parameters())
    stored: dict[str, Tensor] = {}
    for key, value in denoiser.state_dict().items():
        stored[key] = value.detach().cpu().to(dtype if key in parameters else torch.float32).contiguous()
        if not torch.isfinite(stored[key]).all():
            raise ValueError(
                f"{path} was not written: {key} is not finite as {dtype}; "
                + (
                    "the network has diverged"
                    if dtype == torch.float32
                    else "store it with dtype=torch.float32"
                )
            )
    with atomic_path(path) as temporary:
        temporary.write_bytes(save(stored, metadata={HEADER: header}))  # save_file makes it private


def read_denoiser(path: str | Path) -> tuple[EDMDenoiser, Metadata]:
    """The float32 denoiser (evaluation mode, frozen) and the header in a file of `save_denoiser`.

    Raises ValueError for a file that is missing, truncated, not safetensors, without alpenglow's header, of
    an unknown schema, or whose weights do not fit its header.
    """
    path = Path(path)
    metadata, state = _read(path)
    try:
        # On the meta device a wrong header costs no memory, and the initial weights no time.
        with torch.device("meta"):
            denoiser = EDMDenoiser.from_config(metadata.denoiser.model_dump())
        denoiser.load_state_dict(state, strict=True, assign=True)
    except (ValueError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"the weights in {path} do not fit its header: {error}; fetch the file again"
        ) from error
    return denoiser.requires_grad_(False).eval(), metadata


def _read(path: Path) -> tuple[Metadata, dict[str, Tensor]]:
    if path.is_dir():
        raise ValueError(f"{path} is a folder; expected a .safetensors file")
    if not path.is_file():
        raise ValueError(f"no weight file {path}; give a .safetensors file of alpenglow")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(HEADER)
            if header is None:
                raise ValueError(
                    f"{path} is a safetensors file without alpenglow's header; "
                    "make one with `alpenglow convert`"
                )
            metadata = _parse(header, path)
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a readable safetensors file ({error}); fetch it again, or turn a foreign "
            "checkpoint (.pkl, .pt, .pth) into one with `alpenglow convert`"
        ) from None
    for key, value in state.items():
        if not value.is_floating_point() or not torch.isfinite(value).all():
            raise ValueError(f"{key} in {path} holds NaN, infinity or integers; fetch the file again")
    return metadata, {key: value.float() for key, value in state.items()}


def _parse(header: str, path: Path) -> Metadata:
    try:
        fields = json.loads(header)
    except json.JSONDecodeError as error:
        raise ValueError(f"the header of {path} is not JSON: {error}; fetch the file again") from None
    schema = fields.get("schema") if isinstance(fields, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path} has schema {schema!r}, this version reads {SCHEMA}; update alpenglow")
    try:
        return Metadata.model_validate(fields)
    except ValidationError as error:
        raise ValueError(f"the header of {path} is wrong: {error}") from None
