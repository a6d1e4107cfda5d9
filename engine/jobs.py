"""Job files: one reconstruction as YAML, checked, and turned into prior, operator and measurement."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError, model_validator
from torch import Tensor

from alpenglow.export.manifest import is_bundle
from alpenglow.io import read_image
from alpenglow.io.measurements import as_grey, read_kspace
from alpenglow.loading import load_prior
from alpenglow.operator_specs import OPERATORS, OperatorSpec, Shape, naming
from alpenglow.operators.base import LinearOperator
from alpenglow.priors.hub import PREFIX
from alpenglow.priors.protocol import Prior
from alpenglow.random_streams import random_stream
from alpenglow.scheduler.request import DEFAULT_LIMIT, DEFAULT_SAMPLES

ESPIRIT = "espirit"
Count = Annotated[StrictInt, Field(ge=1)]
Fields = TypeVar("Fields", bound=BaseModel)


class SamplingJob(BaseModel):
    """What jobs of every kind ask for. A description says what is expected, for error messages."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: Path
    prior: str = Field(
        description="a zoo prior (`alpenglow info` lists them), a .safetensors file or hub:owner/name"
    )
    output: Path = Field(description="a folder for the results")
    num_samples: StrictInt = Field(
        DEFAULT_SAMPLES, ge=2, description="an integer of at least 2; one has no spread"
    )
    target_error: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="a positive finite number: the Monte Carlo standard error of mean and std to reach, in "
        "the units of the images that are written",
    )
    method: str = Field("calibrated", description="the name of a sampling method")
    nfe: Count | None = Field(None, description="a positive integer: gradient evaluations a sample")
    seed: StrictInt = Field(0, ge=0, description="an integer of at least 0")
    device: str | None = Field(None, description="a torch device such as cpu or cuda")

    @model_validator(mode="before")
    @classmethod
    def _bound_of_target(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """With a target error num_samples is the most that it may cost, as for `alpenglow.sample`."""
        bound = {} if fields.get("target_error") is None else {"num_samples": DEFAULT_LIMIT}
        return bound | fields

    def sampling(self, *, unit: float = 1.0) -> dict[str, Any]:
        """Arguments of `alpenglow.sample`; unit: of the images that are written, in those of the prior."""
        given: dict[str, Any] = {"num_samples": self.num_samples, "method": self.method, "seed": self.seed}
        if self.target_error is not None:
            given["target_error"] = self.target_error * unit
        return given if self.nfe is None else given | {"nfe": self.nfe}


class Job(SamplingJob):
    """One reconstruction. `map` leaves what is of sampling aside, `reconstruct` max_iterations."""

    input: Path = Field(
        description="the measurement, a PNG, TIFF or NPY file (with simulate: the clean image)"
    )
    operator: OperatorSpec = Field(discriminator="kind", description="a kind, and what that kind needs")
    noise_std: float = Field(
        gt=0,
        allow_inf_nan=False,
        description="a positive finite number: the standard deviation of the noise, where images "
        "span [-1, 1]",
    )
    simulate: bool = Field(False, description="true or false: to measure a clean image")
    truth: Path | None = Field(None, description="the true image, a PNG, TIFF or NPY file")
    max_iterations: Count = Field(300, description="a positive integer: steps of the MAP search")


@dataclass(frozen=True, eq=False)
class Task:
    """What a job asks to solve: prior, operator, y [*measurement_shape], and the truth [C, H, W] if known."""

    prior: Prior
    operator: LinearOperator
    y: Tensor
    truth: Tensor | None


def load_job(options: dict[str, Any], path: str | Path | None = None) -> Job:
    """A job from options, which go before the fields of the YAML file `path`.

    options: fields of Job; None, also within "operator", is not given. Another operator.kind than the file's
    replaces all of its operator. Paths in the file start from its folder. Raises ValueError that names every
    field that is wrong.
    """
    job = validate(Job, merge_fields(options, path), path)
    if job.operator.kind == "random-inpainting" and not job.simulate:
        raise ValueError(
            "random-inpainting hides pixels of its own choice, so it needs simulate (--simulate); for a "
            "measurement give the mask that it was made with: operator inpainting"
        )
    if job.simulate and job.truth is not None:
        raise ValueError("with simulate the input is the truth; leave truth out")
    return job


def merge_fields(options: dict[str, Any], path: str | Path | None = None) -> dict[str, Any]:
    """The fields of the YAML file `path`, under options that are not None; see load_job."""
    fields: dict[str, Any] = {} if path is None else _read_yaml(Path(path))
    given = {key: value for key, value in options.items() if value is not None}
    operator = {key: value for key, value in given.pop("operator", {}).items() if value is not None}
    filed = fields.get("operator")
    if operator:
        kept = filed if isinstance(filed, dict) and operator.get("kind") in (None, filed.get("kind")) else {}
        given["operator"] = kept | operator
    return fields | given


def validate(model: type[Fields], fields: dict[str, Any], path: str | Path | None = None) -> Fields:
    """The model of these fields; ValueError that explains every field that is wrong."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        where = "" if path is None else f" (options and {path})"
        problems = "".join(f"\n  {_explain(model, item)}" for item in error.errors())
        raise ValueError(f"the job{where} cannot run:{problems}") from None


def prepare(job: Job, *, batch_size: int | None = None) -> Task:
    """Read all that a job names, and simulate its measurement if asked to.

    batch_size: of the prior's network (see BatchedPrior). Raises ValueError for files that are missing,
    damaged or do not fit together.
    """
    prior = load_prior(job.prior, device=job.device, batch_size=batch_size)
    operator = job.operator.build(prior.image_shape)
    operator.check_image(prior.image_shape)
    clean = job.input if job.simulate else job.truth
    truth = None if clean is None else read_truth(clean, prior.image_shape)
    if job.simulate:
        assert truth is not None
        y = simulate(operator, truth, job.noise_std, job.seed)
    else:
        y = _read_measurement(job.input, operator, prior.image_shape)
    return Task(prior, operator, y, truth)


def simulate(operator: LinearOperator, truth: Tensor, noise_std: float, seed: int) -> Tensor:
    """A measurement y = A x + n [*measurement_shape] of an image [C, H, W]; 0 where the mask is."""
    exact, generator = operator.forward(truth[None])[0], random_stream(seed, "measurement")
    if exact.is_complex():
        noise = torch.view_as_complex(torch.randn(*exact.shape, 2, generator=generator))
    else:
        noise = torch.randn(exact.shape, generator=generator)
    y = exact + noise_std * noise
    mask = getattr(operator, "mask", None)
    return y if mask is None else y * mask


def with_floor(images: Tensor, floor: float, seed: int) -> Tensor:
    """Images [N, C, H, W] as a prior knows them, with the noise floor of its training data."""
    return images + floor * torch.randn(images.shape, generator=random_stream(seed, "noise floor"))


def read_truth(path: Path, image_shape: Shape) -> Tensor:
    """A clean image [C, H, W] of the prior's shape; colour and grey are converted. Raises ValueError."""
    image = read_image(path, channels=image_shape[0] if image_shape[0] in (1, 3) else None)
    if tuple(image.shape) != tuple(image_shape):
        raise ValueError(
            f"{path} is an image of shape {tuple(image.shape)}; the prior takes {tuple(image_shape)}: crop "
            "or resize it, or use a prior of its size"
        )
    return image


def _read_measurement(path: Path, operator: LinearOperator, image_shape: Shape) -> Tensor:
    """y [*measurement_shape]; ValueError unless the file fits the operator."""
    y = read_kspace(path) if operator.measurement_is_complex else read_image(path)
    # A measurement in true colour is not turned to grey: its noise would no longer be noise_std.
    y = as_grey(y) if image_shape[0] == 1 else y
    with naming(path):
        return operator.check_measurement(y, image_shape)[0]


def _read_yaml(path: Path) -> dict[str, Any]:
    """The fields of a job file, with its paths made absolute."""
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"no job file {path}; `alpenglow reconstruct --help` shows one") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(
            f"{path} holds a {type(fields).__name__}; expected fields such as input, prior, operator"
        )
    folder = path.resolve().parent

    def place(parent: dict[str, Any], *keys: str) -> None:
        for key in keys:
            if isinstance(parent.get(key), str):
                parent[key] = str(folder / parent[key])

    place(fields, "input", "truth", "output")
    if fields.get("maps") != ESPIRIT:
        place(fields, "maps")
    if isinstance(fields.get("operator"), dict):
        place(fields["operator"], "mask")
    if _is_path(fields.get("prior"), folder):
        place(fields, "prior")
    return fields


def _is_path(prior: Any, folder: Path) -> bool:
    """Whether a job's prior is a file, or a bundle in `folder`, and no name of the zoo or the hub."""
    if not isinstance(prior, str) or prior.startswith(PREFIX):
        return False
    return len(Path(prior).parts) > 1 or bool(Path(prior).suffix) or is_bundle(folder / prior)


def _explain(job: type[BaseModel], item: Any) -> str:
    """One error of pydantic: what was got, what was expected, and the option that gives it."""
    where = [str(part) for part in item["loc"]]
    if where[:1] == ["operator"] and "operator" in job.model_fields:
        if len(where) == 1:
            got = {"missing": "missing", "union_tag_not_found": "given without a kind"}.get(item["type"])
            tag = item.get("ctx", {}).get("tag")
            what = None if tag is None else f"unknown operator {tag!r}"
            what = what or f"operator is {got or repr(item['input'])}"
            return f"{what}; expected a kind out of {', '.join(OPERATORS)} (--operator)"
        model: type[BaseModel] = OPERATORS[where[1]]
        name, shown = where[2], f"operator.{where[2]}"
        known = f"operator {where[1]} has " + (
            ", ".join([field for field in model.model_fields if field != "kind"]) or "no options"
        )
    else:
        model, name, shown = job, where[0], where[0]
        known = f"a job has {', '.join(job.model_fields)}"
    if name not in model.model_fields:
        return f"unknown field {shown}; {known}"
    option = {"input": "IMAGE"}.get(name, f"--{name.replace('_', '-')}")
    got = "missing" if item["type"] == "missing" and where[-1] == name else repr(item["input"])
    return f"{shown} is {got}; expected {model.model_fields[name].description} ({option})"
