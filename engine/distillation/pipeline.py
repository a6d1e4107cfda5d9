"""`alpenglow distill`: images -> teacher -> energy prior -> files and model card, each stage resumable."""

import copy
import json
import shlex
import statistics
from pathlib import Path

import torch
from torch import Tensor, nn

from alpenglow.distillation import evaluation
from alpenglow.distillation.card import write_card
from alpenglow.distillation.config import Recipe, load_recipe
from alpenglow.distillation.data import load_images, to_units, training_batch
from alpenglow.distillation.losses import draw_sigma, energy_loss, teacher_loss
from alpenglow.distillation.training import train
from alpenglow.networks.denoiser import EDMDenoiser
from alpenglow.networks.storage import Kind, save_denoiser
from alpenglow.priors.loading import load_prior
from alpenglow.priors.network import NetworkPrior

EVALUATION_IMAGES = 256
COVERAGE_IMAGES = 16
COVERAGE_SAMPLES = 32
# Below, sampling gains nothing (DESIGN 2), and the noise floor is all there is.
LOWEST_LEVEL = 0.01


def split_images(source: str) -> tuple[Tensor, Tensor]:
    """(training images, held-out images), uint8 [N, C, H, W]: the data set's own split, or the last 5 %.

    Raises ValueError as `load_images` does, and for an array of one image.
    """
    images = load_images(source, "train")
    if source == "fashion-mnist":
        return images, load_images(source, "test")
    if len(images) < 2:
        raise ValueError(f"{source} holds one image; expected two or more, the last 5 % are held out")
    held_out = max(1, len(images) // 20)
    return images[:-held_out], images[-held_out:]


def distill(recipe: Recipe, folder: Path) -> tuple[EDMDenoiser, EDMDenoiser]:
    """Train the teacher, then the energy model from its weights; returns (teacher, energy model).

    Both are moving averages in evaluation mode. Checkpoints and logs go to `folder`; a rerun goes on
    where the last one stopped.
    """
    images, _ = split_images(recipe.data.source)

    def batch(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        clean = training_batch(images, size, recipe.data.noise_floor, generator)
        return clean, draw_sigma(recipe.sigma, size, generator)

    def teacher_objective(net: nn.Module, generator: torch.Generator) -> Tensor:
        assert isinstance(net, EDMDenoiser)
        return teacher_loss(net, *batch(recipe.teacher.batch_size, generator), generator)

    shared = recipe.model_dump(mode="json", exclude={"name", "teacher", "energy"})
    torch.manual_seed(recipe.seed)
    model = EDMDenoiser.from_config(recipe.denoiser_config())
    teacher = train(
        "teacher", model, teacher_objective, recipe.teacher, folder, seed=recipe.seed, recipe=shared
    )
    assert isinstance(teacher, EDMDenoiser)

    def energy_objective(net: nn.Module, generator: torch.Generator) -> Tensor:
        assert isinstance(net, EDMDenoiser)
        return energy_loss(net, teacher, *batch(recipe.energy.batch_size, generator), generator)

    student = copy.deepcopy(teacher).requires_grad_(True).train()
    energy = train(
        "energy",
        student,
        energy_objective,
        recipe.energy,
        folder,
        seed=recipe.seed + 1,
        recipe=shared | {"teacher": recipe.teacher.model_dump(mode="json")},
    )
    assert isinstance(energy, EDMDenoiser)
    return teacher, energy


def run(recipe_path: str | Path, folder: str | Path) -> None:
    """Distil the recipe, and write <name>.safetensors, <name>-teacher.safetensors and <name>.md to `folder`.

    <name>.safetensors is the energy prior for `load_prior` (float16), the teacher is in float32, the .md file
    is the model card with figures on held-out images, those of the weights as written. A rerun resumes the
    training, and repeats the rest. Raises ValueError for a wrong recipe before anything is trained.
    """
    recipe, folder = load_recipe(recipe_path), Path(folder)
    if Path(recipe.name).name != recipe.name or recipe.name in ("", ".."):
        raise ValueError(f"{recipe_path}: name is {recipe.name!r}; expected a file name without folders")
    held_out = split_images(recipe.data.source)[1]
    channels, height, width = held_out.shape[1:]
    shape = (channels, height, width)
    # Finds a network that does not fit the images before hours have gone into it.
    NetworkPrior(EDMDenoiser.from_config(recipe.denoiser_config()), shape)

    teacher, energy = distill(recipe, folder)
    sigma_range = (max(LOWEST_LEVEL, recipe.sigma.low), recipe.sigma.high)
    weights = folder / f"{recipe.name}.safetensors"
    kinds: list[tuple[Path, EDMDenoiser, Kind, torch.dtype]] = [
        (weights, energy, "energy", torch.float16),
        (folder / f"{recipe.name}-teacher.safetensors", teacher, "teacher", torch.float32),
    ]
    for path, denoiser, kind, dtype in kinds:
        save_denoiser(
            path,
            denoiser,
            name=recipe.name,
            image_shape=shape,
            kind=kind,
            sigma_range=sigma_range,
            units=recipe.units,
            dtype=dtype,
        )
    prior = load_prior(weights)
    clean = to_units(held_out[:EVALUATION_IMAGES])
    floor = recipe.data.noise_floor * torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    levels = [s for s in evaluation.DEFAULT_SIGMAS if sigma_range[0] <= s <= sigma_range[1]]
    rows = evaluation.evaluate_prior(prior, teacher, clean + floor, levels)
    write_card(
        folder / f"{recipe.name}.md",
        recipe,
        rows,
        {"held-out images in this table": len(clean)} | _coverage(prior, clean[:COVERAGE_IMAGES], recipe),
        shlex.join(["alpenglow", "distill", str(recipe_path), "-o", str(folder)]),
        {stage: _seconds(folder / f"{stage}.jsonl") for stage in ("teacher", "energy")},
    )


def _coverage(prior: NetworkPrior, images: Tensor, recipe: Recipe) -> dict[str, float]:
    rows = evaluation.evaluate_coverage(
        prior, images, noise_floor=recipe.data.noise_floor, num_samples=COVERAGE_SAMPLES
    )
    setting = (
        f"held-out images: {len(images)}; 50 % random pixels seen with noise_std 0.05, "
        f"{COVERAGE_SAMPLES} samples each, defaults of `alpenglow.sample`"
    )
    return {
        f"coverage of the 90 % interval ({setting})": statistics.mean(r["coverage"] for r in rows),
        "lowest coverage of one image": min(r["coverage"] for r in rows),
        "coverage of the pixels without the noise floor": statistics.mean(r["coverage_clean"] for r in rows),
    }


def _seconds(log: Path) -> float:
    """What a stage took, pauses between resumed runs left out: the last line of its log."""
    return float(json.loads(log.read_text().splitlines()[-1])["seconds"])
