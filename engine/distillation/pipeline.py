"""`alpenglow distill`: images -> teacher -> energy prior, each stage resumable."""

import copy
from pathlib import Path

import torch

from alpenglow.distillation.config import Recipe
from alpenglow.distillation.data import load_images, training_batch
from alpenglow.distillation.losses import draw_sigma, energy_loss, teacher_loss
from alpenglow.distillation.training import train
from alpenglow.networks.denoiser import EDMDenoiser


def distill(recipe: Recipe, folder: Path) -> tuple[EDMDenoiser, EDMDenoiser]:
    """Train the teacher, then the energy model from its weights; returns (teacher, energy model).

    Both are moving averages in evaluation mode. Checkpoints and logs go to `folder`; a rerun goes on
    where the last one stopped.
    """
    images = load_images(recipe.data.source, "train")

    def batch(size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        clean = training_batch(images, size, recipe.data.noise_floor, generator)
        return clean, draw_sigma(recipe.sigma, size, generator)

    torch.manual_seed(recipe.seed)
    model = EDMDenoiser.from_config(recipe.denoiser_config())
    teacher = train(
        "teacher",
        model,
        lambda net, generator: teacher_loss(net, *batch(recipe.teacher.batch_size, generator), generator),  # type: ignore[arg-type]
        recipe.teacher,
        folder,
        seed=recipe.seed,
    )
    student = copy.deepcopy(teacher).requires_grad_(True).train()
    energy = train(
        "energy",
        student,
        lambda net, generator: energy_loss(net, teacher, *batch(recipe.energy.batch_size, generator), generator),  # type: ignore[arg-type]
        recipe.energy,
        folder,
        seed=recipe.seed + 1,
    )
    return teacher, energy  # type: ignore[return-value]
