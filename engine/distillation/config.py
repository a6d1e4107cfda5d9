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


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(_Strict):
    """Training images and the noise floor that turns quantised images into a density."""

    source: str = Field(
        description="'fashion-mnist', or a .npy file of uint8 images [N, H, W] or [N, C, H, W]"
    )
    noise_floor: float = Field(
        0.02, ge=0, description="std of the noise added to training images, in [-1, 1] units"
    )


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
    """One training run of Adam with warm-up, cosine decay and an exponential moving average."""

    steps: PositiveInt
    batch_size: PositiveInt
    learning_rate: PositiveFloat
    warmup_steps: int = Field(200, ge=0)
    ema_halflife_steps: PositiveFloat = 300
    max_grad_norm: PositiveFloat = 1.0


class Recipe(_Strict):
    """Everything `alpenglow distill` needs; the model card records it."""

    name: str
    seed: int = 0
    units: Literal["[-1, 1]"] = "[-1, 1]"
    data: DataConfig
    backbone: str = "SongUNet"
    network: dict[str, Any]
    sigma_data: PositiveFloat = 0.5
    patch: PositiveInt = 1
    sigma: SigmaLaw = SigmaLaw()
    teacher: StageConfig
    energy: StageConfig

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
