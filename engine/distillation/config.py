"""The recipe of a prior: data, network and the two training stages, as one YAML file."""

from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from alpenglow.networks.denoiser import EnergyForm

LossWeight = Literal["excess", "edm"]
"""How distillation weighs an error of G at level sigma.

edm: 1 / sigma^2 + 1 / sigma_data^2, the teacher's own weight, 1 / c_out^2: that of ALPS, 1 / sigma^2, below
sigma_data; above, where 1 / sigma^2 all but forgets the levels, an error counts alike at every level. excess:
1 / ||D_teacher - x||^2 of each image (a mean over pixels), so that the loss is the part by which the energy's
denoising error exceeds the teacher's at whatever level: 0.047 of it are 0.2 dB of PSNR.
"""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(_Strict):
    """Training images and the noise floor that gives them a density at every scale."""

    source: str = Field(
        description="'fashion-mnist', 'brain', a folder of images, or a .npy, .h5 or NIfTI file"
    )
    noise_floor: float = Field(
        0.02, ge=0, description="std of the noise added to training images, in the prior's units"
    )
    image_size: PositiveInt | None = Field(
        None, description="side of a random square crop; without it images are taken whole"
    )
    held_out: tuple[str, ...] = Field(
        (),
        description="files of a folder that are held out; without, the last 5 % (of several files: files)",
    )
    dataset: str | None = Field(None, description="name of the dataset in a .h5 file")
    axis: Literal[0, 1, 2] = Field(
        2, description="NIfTI: slices along right (0), anterior (1) or superior (2)"
    )
    attribution: str = Field("", description="origin and licence, for the model card")


class SigmaLaw(_Strict):
    """Noise levels seen in training: an even mixture of log-normal and log-uniform."""

    log_mean: float = -1.0
    log_std: PositiveFloat = 1.4
    low: PositiveFloat = 0.005
    high: PositiveFloat = 40.0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low is {self.low:g} and high is {self.high:g}; expected low < high")
        return self


class StageConfig(_Strict):
    """One training run of Adam, with the rate and the moving average of EDM2 (arXiv 2312.02696).

    Neither depends on the number of steps: a finished run goes on where it stopped when `steps` is raised.
    """

    steps: PositiveInt
    batch_size: PositiveInt
    learning_rate: PositiveFloat
    warmup_steps: int = Field(200, ge=0)
    decay_steps: PositiveInt = Field(1000, description="from here on the rate falls as 1 / sqrt(step)")
    ema_power: float = Field(
        7.0, ge=0, description="the average weighs step t by t^power; 7: over the last tenth of the run"
    )
    max_grad_norm: PositiveFloat = 1.0
    augment: float = Field(
        0.0, ge=0, le=1, description="teacher: probability of each of EDM's augmentations (augment_dim 9)"
    )
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the network's activations; weights and loss stay float32"
    )
    parts: PositiveInt = Field(1, description="the batch is taken in so many parts, one after the other")
    checkpointing: bool = Field(
        False, description="recompute the activations of each block instead of keeping them"
    )


class Teacher(_Strict):
    """A denoiser that exists already, in place of one trained here."""

    checkpoint: str = Field(description="a .safetensors file of `alpenglow convert` or `alpenglow distill`")


class Recipe(_Strict):
    """Everything `alpenglow distill` needs; the model card records it."""

    name: str
    seed: int = Field(default=0, ge=0)
    units: str = "[-1, 1]"
    data: DataConfig
    backbone: str = "SongUNet"
    network: dict[str, Any] = Field({}, description="arguments of the backbone; a teacher brings its own")
    sigma_data: PositiveFloat = 0.5
    patch: PositiveInt = 1
    form: EnergyForm = Field(
        "product", description="of the energy, see alpenglow.networks.denoiser.EnergyForm"
    )
    weight: LossWeight = Field("excess", description="of the distillation's errors, see LossWeight")
    sigma: SigmaLaw = SigmaLaw()
    teacher: StageConfig | Teacher
    energy: StageConfig

    @model_validator(mode="after")
    def _augmentation_is_told(self) -> Self:
        if self.energy.augment:
            raise ValueError("energy.augment is not 0; only teachers are trained on augmented images")
        if (
            isinstance(self.teacher, StageConfig)
            and self.teacher.augment
            and self.network.get("augment_dim") != 9
        ):
            raise ValueError(
                "teacher.augment needs augment_dim: 9 in network: untold of it, the teacher would generate "
                "augmented images"
            )
        return self

    def denoiser_config(self) -> dict[str, Any]:
        """The part that rebuilds the network (EDMDenoiser.from_config)."""
        return {
            "backbone": self.backbone,
            "network": dict(self.network),
            "sigma_data": self.sigma_data,
            "patch": self.patch,
        }


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe from a YAML file; ValueError names the field that is wrong."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no recipe file {path}; write one like engine/priors/zoo/fashion-28.yaml")
    try:
        return Recipe.model_validate(yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, ValidationError) as error:
        raise ValueError(f"{path} is not a valid recipe: {error}") from None
