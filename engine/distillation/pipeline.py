"""`alpenglow distill`: images -> teacher -> energy prior -> files and model card, each stage resumable."""

import hashlib
import json
import shlex
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from alpenglow.distillation.batches import Batch, Batches, stream
from alpenglow.distillation.card import write_card
from alpenglow.distillation.config import LossWeight, Recipe, StageConfig, Teacher, load_recipe
from alpenglow.distillation.evaluation import report_prior
from alpenglow.distillation.losses import Denoiser, energy_loss, teacher_loss
from alpenglow.distillation.processes import Processes
from alpenglow.distillation.sources import ImageSource, open_source
from alpenglow.distillation.training import train
from alpenglow.networks.denoiser import EDMDenoiser
from alpenglow.networks.storage import read_denoiser, save_denoiser
from alpenglow.priors.loading import load_prior
from alpenglow.priors.network import PRECISIONS, check_fits

# Below, sampling gains nothing (DESIGN 2), and the noise floor is all there is.
LOWEST_LEVEL = 0.01
# Fields of a recipe, beside `energy`, that the teacher's training does not depend on.
ENERGY_FIELDS = {"form", "weight"}


def distill(
    recipe: Recipe,
    folder: str | Path,
    *,
    source: ImageSource | None = None,
    teacher: Denoiser | None = None,
    workers: int = 0,
    processes: Processes | None = None,
) -> tuple[Denoiser, EDMDenoiser]:
    """The teacher and the energy model psi that is distilled from it, both in evaluation mode.

    source: the images; default those of `recipe.data`. teacher: any denoiser D(x, sigma, classes) that
    exists already; psi then starts from random weights, or, where it is an EDMDenoiser, from the teacher's.
    Without it the recipe's teacher is read, or trained. Checkpoints and logs go to `folder`; a rerun goes on
    where the last one stopped. `workers` processes prepare the batches.

    Raises ValueError for a recipe that does not fit the images or the teacher, before anything is trained.
    """
    folder, processes = Path(folder), processes or Processes.launched()
    source = source or open_source(recipe.data)
    shared = recipe.model_dump(
        mode="json", exclude={"name", "teacher", "energy"} | ENERGY_FIELDS, exclude_defaults=True
    )
    torch.manual_seed(recipe.seed)
    # Refuses now the batch size that would otherwise be refused after the teacher's training.
    Batches(source, recipe, recipe.energy, seed=0, count=processes.count)
    origin: dict[str, Any]
    if teacher is not None:
        student = teacher if isinstance(teacher, EDMDenoiser) else _new_network(recipe)
        origin = {"teacher": "given"}
    elif isinstance(recipe.teacher, Teacher):
        teacher = student = read_teacher(recipe.teacher.checkpoint)
        origin = {"teacher": hashlib.sha256(Path(recipe.teacher.checkpoint).read_bytes()).hexdigest()}
    else:
        untrained = _new_network(recipe)
        check_fits(untrained, source.image_shape)
        if _label_dim(untrained):
            raise ValueError(
                f"the network of {recipe.name} has classes (label_dim), and the images here have none: "
                "class-conditional teachers are given, not trained"
            )
        teacher = student = _train(
            "teacher", untrained, recipe, recipe.teacher, source, folder,
            objective=_teacher_objective, seed=recipe.seed, origin=shared,
            workers=workers, processes=processes,
        )  # fmt: skip
        origin = {"teacher": recipe.teacher.model_dump(mode="json", exclude_defaults=True)}
    check_fits(student, source.image_shape)
    if isinstance(teacher, nn.Module):
        teacher = teacher.to(processes.device).requires_grad_(False).eval()
    energy = _train(
        "energy", student.with_form(recipe.form), recipe, recipe.energy, source, folder,
        objective=_energy_objective(teacher, recipe.weight), seed=recipe.seed + 1,
        origin=shared | origin | recipe.model_dump(mode="json", include=ENERGY_FIELDS),
        workers=workers, processes=processes,
    )  # fmt: skip
    return teacher, energy


def read_teacher(path: str | Path) -> EDMDenoiser:
    """The denoiser in a file of `alpenglow convert` or `distill`. ValueError for what is none."""
    denoiser, metadata = read_denoiser(path)
    if metadata.kind != "teacher":
        raise ValueError(f"{path} holds an energy prior; a teacher is a plain denoiser (kind 'teacher')")
    return denoiser


def _new_network(recipe: Recipe) -> EDMDenoiser:
    if not recipe.network:
        raise ValueError(f"the recipe {recipe.name} has no network, and its teacher brings none to copy")
    return EDMDenoiser.from_config(recipe.denoiser_config())


def _train(
    name: str,
    model: EDMDenoiser,
    recipe: Recipe,
    stage: StageConfig,
    source: ImageSource,
    folder: Path,
    *,
    objective: Callable[[EDMDenoiser, Batch, torch.dtype | None], Tensor],
    seed: int,
    origin: dict[str, Any],
    workers: int,
    processes: Processes,
) -> EDMDenoiser:
    batches = Batches(
        source, recipe, stage, seed=seed, label_dim=_label_dim(model),
        rank=processes.rank, count=processes.count,
    )  # fmt: skip
    compute_dtype = None if stage.precision == "float32" else PRECISIONS[stage.precision]

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(network, EDMDenoiser)
        return objective(network, batch, compute_dtype)

    def steps(wanted: range) -> Iterator[Batch]:
        return stream(batches, wanted, workers)

    # Dropout is for the teacher: what psi is to match is a fixed field.
    model = model.requires_grad_(True).train(mode=name == "teacher")
    model.model.checkpointing = stage.checkpointing  # type: ignore[assignment]
    trained = train(name, model, loss, steps, stage, folder, seed=seed, origin=origin, processes=processes)
    assert isinstance(trained, EDMDenoiser)
    trained.model.checkpointing = False  # type: ignore[assignment]
    return trained


def _label_dim(model: EDMDenoiser) -> int:
    return int(getattr(model.model, "label_dim", 0))


def _classes(batch: Batch) -> Tensor | None:
    return batch.classes if batch.classes.shape[1] else None


def _teacher_objective(model: EDMDenoiser, batch: Batch, compute_dtype: torch.dtype | None) -> Tensor:
    return teacher_loss(
        model, batch.clean, batch.noisy, batch.sigma, classes=_classes(batch),
        augmentation=batch.augmentation, compute_dtype=compute_dtype,
    )  # fmt: skip


def _energy_objective(
    teacher: Denoiser, weight: LossWeight
) -> Callable[[EDMDenoiser, Batch, torch.dtype | None], Tensor]:
    def objective(model: EDMDenoiser, batch: Batch, compute_dtype: torch.dtype | None) -> Tensor:
        return energy_loss(
            model, teacher, batch.clean, batch.noisy, batch.sigma, weight=weight, classes=_classes(batch),
            compute_dtype=compute_dtype,
        )  # fmt: skip

    return objective


def run(recipe_path: str | Path, folder: str | Path, *, workers: int = 0) -> None:
    """Distil the recipe, and write <name>.safetensors, <name>-teacher.safetensors and <name>.md to `folder`.

    <name>.safetensors is the energy prior for `load_prior` (float16), the teacher is in float32, the .md file
    is the model card with figures on held-out images, those of the weights as written. A rerun resumes the
    training, and repeats the rest. Raises ValueError for a wrong recipe before anything is trained.
    """
    recipe, folder = load_recipe(recipe_path), Path(folder)
    if Path(recipe.name).name != recipe.name or recipe.name in ("", ".."):
        raise ValueError(f"{recipe_path}: name is {recipe.name!r}; expected a file name without folders")
    processes = Processes.launched()
    source = open_source(recipe.data)
    teacher, energy = distill(recipe, folder, source=source, workers=workers, processes=processes)
    if not processes.first:
        return
    floor = recipe.data.noise_floor
    # Below the noise floor of its images a prior knows nothing but the floor.
    trained = (max(LOWEST_LEVEL, recipe.sigma.low, floor), recipe.sigma.high)

    save = partial(
        save_denoiser, name=recipe.name, image_shape=source.image_shape, units=recipe.units, noise_floor=floor
    )
    weights = folder / f"{recipe.name}.safetensors"
    save(weights, energy, sigma_range=trained)
    if isinstance(recipe.teacher, StageConfig):
        assert isinstance(teacher, EDMDenoiser)
        path = folder / f"{recipe.name}-teacher.safetensors"
        save(path, teacher, kind="teacher", sigma_range=trained, dtype=torch.float32)
    classes = _label_dim(energy)
    # What is measured is the file; of a class-conditional prior, class 0.
    prior = load_prior(weights, class_label=0 if classes else None)
    report = report_prior(prior, teacher, source, noise_floor=floor)
    save(weights, energy, sigma_range=report.sigma_range, gradient_error=report.largest_gradient_error)
    logs = (folder / "teacher.jsonl", folder / "energy.jsonl")
    write_card(
        folder / f"{recipe.name}.md",
        recipe,
        report,
        source.description,
        command=shlex.join(["alpenglow", "distill", str(recipe_path), "-o", str(folder)]),
        seconds={log.stem: _seconds(log) for log in logs if log.is_file()},
        parameters=sum(parameter.numel() for parameter in energy.parameters()),
    )


def _seconds(log: Path) -> float:
    """What a stage took, pauses between resumed runs left out: the last line of its log."""
    return float(json.loads(log.read_text().splitlines()[-1])["seconds"])
