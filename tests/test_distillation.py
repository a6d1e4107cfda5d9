"""The pipeline from a recipe to a prior's files, end to end on tiny networks; recipes and their errors."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from alpenglow.distillation import evaluation, pipeline
from alpenglow.distillation.batches import Batch, Batches
from alpenglow.distillation.config import Recipe, load_recipe
from alpenglow.distillation.evaluation import DEFAULT_SIGMAS
from alpenglow.distillation.losses import energy_loss, teacher_loss
from alpenglow.distillation.sources import open_source
from alpenglow.networks.denoiser import EDMDenoiser, energy_and_grad
from alpenglow.networks.storage import save_denoiser
from alpenglow.priors.loading import load_denoiser, load_prior
from tests.tiny import NETWORK, discs, randomise, recipe_fields, same_weights

ZOO = Path(__file__).parents[1] / "engine/priors/zoo"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With images.npy, the discs, and recipe.yaml."""
    np.save(tmp_path / "images.npy", discs())
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_fields(tmp_path)))
    return tmp_path


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Runs that are compared bit by bit use one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One image and eight samples for the coverage: an untrained prior's is worth no more."""
    monkeypatch.setattr(evaluation, "MOST_COVERAGE_IMAGES", 1)
    monkeypatch.setattr(evaluation, "COVERAGE_SAMPLES", 8)


def recipe_of(folder: Path, **changes: Any) -> Recipe:
    return Recipe.model_validate(recipe_fields(folder, **changes))


# Learning


def test_both_losses_fall(folder: Path) -> None:
    """On noisy images of other seeds, before and after: the paired gain exceeds five standard errors."""
    stage = {"batch_size": 8, "learning_rate": 3e-3, "warmup_steps": 10}
    recipe = recipe_of(folder, teacher={"steps": 120, **stage}, energy={"steps": 50, **stage})
    torch.manual_seed(recipe.seed)
    untrained = EDMDenoiser.from_config(recipe.denoiser_config())
    teacher, energy = pipeline.distill(recipe, folder / "run")
    assert isinstance(teacher, EDMDenoiser)
    other = Batches(open_source(recipe.data), recipe, recipe.energy, seed=99)

    def gain(loss: Callable[[EDMDenoiser, Batch], Tensor], pair: Any) -> float:
        gains = []
        for step in range(20):
            before, after = (loss(model, other[step]).item() for model in pair)
            gains.append(before - after)
        difference = torch.tensor(gains)
        return (difference.mean() / difference.std() * math.sqrt(len(gains))).item()

    assert gain(lambda m, b: teacher_loss(m, b.clean, b.noisy, b.sigma), (untrained, teacher)) > 5
    assert gain(lambda m, b: energy_loss(m, teacher, b.clean, b.noisy, b.sigma), (teacher, energy)) > 5
    records = [json.loads(line) for line in (folder / "run/teacher.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [100, 120]
    assert records[1]["loss"] < records[0]["loss"]
    assert not any(p.requires_grad for net in (teacher, energy) for p in net.parameters())


def test_the_energy_starts_from_the_teacher(folder: Path) -> None:
    """A learning rate too small to move a float32 leaves the teacher's weights where they are."""
    still = recipe_fields(folder)["energy"] | {"steps": 3, "learning_rate": 1e-60}
    teacher, energy = pipeline.distill(recipe_of(folder, energy=still), folder / "run")
    assert same_weights(teacher.with_form("product"), energy)


# Teachers


def conditional_teacher(path: Path) -> EDMDenoiser:
    """A class-conditional denoiser whose classes matter, in a file."""
    denoiser = EDMDenoiser.from_config(
        {"backbone": "SongUNet", "network": NETWORK | {"label_dim": 3}, "sigma_data": 0.7, "patch": 2}
    )
    randomise(denoiser)
    save_denoiser(
        path, denoiser, name="given", image_shape=(1, 8, 8), kind="teacher", sigma_range=(0.01, 40.0),
        dtype=torch.float32,
    )  # fmt: skip
    return denoiser


def test_a_class_conditional_checkpoint_is_distilled(folder: Path, quick: None) -> None:
    teacher = conditional_teacher(folder / "teacher.safetensors")
    fields = recipe_fields(folder, teacher={"checkpoint": str(folder / "teacher.safetensors")})
    fields["energy"] |= {"steps": 200}
    del fields["network"]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(fields))
    pipeline.run(folder / "recipe.yaml", folder / "out")

    assert not (folder / "out/tiny-teacher.safetensors").exists()
    with pytest.raises(ValueError, match="has 3 classes; say which"):
        load_prior(folder / "out/tiny.safetensors")
    with pytest.raises(ValueError, match="class_label is 3"):
        load_prior(folder / "out/tiny.safetensors", class_label=3)
    x = torch.from_numpy(discs()[:4, None]) / 127.5 - 1
    x = x + 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    sigma = torch.full((4,), 0.5)
    one_hot = torch.eye(3)[[1, 1, 1, 1]]
    grads = [
        load_prior(folder / "out/tiny.safetensors", class_label=k).energy_and_grad(x, sigma)[1]
        for k in (0, 1)
    ]
    assert not torch.equal(*grads)
    # Distilled for a moment only; but nearer its own class's denoiser than where it started.
    target = x - teacher.requires_grad_(False).eval()(x, sigma, one_hot)
    start = EDMDenoiser.from_config(teacher.config or {})
    start.load_state_dict(teacher.state_dict())
    before = energy_and_grad(start, x, sigma, class_label=one_hot)[1]
    assert (grads[1] - target).norm() < 0.8 * (before - target).norm()
    assert "distilled from a given teacher" in " ".join((folder / "out/tiny.md").read_text().split())


def test_another_teacher_is_another_run(folder: Path) -> None:
    """The checkpoint knows the teacher by its bytes, not by the name of its file."""
    path = folder / "teacher.safetensors"
    recipe = recipe_of(folder, teacher={"checkpoint": str(path)})
    denoiser = conditional_teacher(path)
    pipeline.distill(recipe, folder / "run")
    with torch.no_grad():
        next(denoiser.parameters()).mul_(1.5)
    save_denoiser(
        path, denoiser, name="given", image_shape=(1, 8, 8), kind="teacher", sigma_range=(0.01, 40.0),
    )  # fmt: skip
    with pytest.raises(ValueError, match="of another recipe"):
        pipeline.distill(recipe, folder / "run")


def test_teachers_that_are_refused(folder: Path) -> None:
    path = folder / "energy.safetensors"
    denoiser = EDMDenoiser.from_config(
        {"backbone": "SongUNet", "network": NETWORK, "sigma_data": 0.7, "patch": 2}
    )
    save_denoiser(path, denoiser, name="e", image_shape=(1, 8, 8), kind="energy", sigma_range=(0.01, 40.0))
    with pytest.raises(ValueError, match="holds an energy prior"):
        pipeline.distill(recipe_of(folder, teacher={"checkpoint": str(path)}), folder / "run")
    with pytest.raises(ValueError, match="class-conditional teachers are given"):
        pipeline.distill(recipe_of(folder, network=NETWORK | {"label_dim": 3}), folder / "run")
    with pytest.raises(ValueError, match="has no network"):
        pipeline.distill(recipe_of(folder, network={}), folder / "run")


# Files


def test_run_writes_prior_teacher_and_card(folder: Path, quick: None) -> None:
    output = folder / "out put"
    pipeline.run(folder / "recipe.yaml", output)
    prior = load_prior(output / "tiny.safetensors")
    assert prior.image_shape == (1, 8, 8)
    # A prior of a moment's training is to be trusted at high levels alone.
    low, high = prior.sigma_range
    assert 0.01 < low < high == 40.0
    assert prior.gradient_error > 0
    assert prior.name == "tiny"
    assert prior.metadata["units"] == "[-1, 1]"
    teacher, energy = pipeline.distill(recipe_of(folder), output)
    for key, value in energy.named_parameters():
        assert torch.equal(prior.denoiser.state_dict()[key], value.half().float())
    assert isinstance(teacher, EDMDenoiser)
    assert same_weights(load_denoiser(output / "tiny-teacher.safetensors"), teacher)
    with pytest.raises(ValueError, match="holds a teacher"):
        load_prior(output / "tiny-teacher.safetensors")

    card = (output / "tiny.md").read_text()
    assert card.startswith("# tiny\n")
    assert f"alpenglow distill {folder}/recipe.yaml -o '{output}'\n" in card
    table = [
        line.split("|")[1:-1]
        for line in card.splitlines()
        if line.startswith("| ") and line.count("|") == 6 and line[2].isdigit()
    ]
    assert [float(row[0]) for row in table] == [
        sigma for sigma in DEFAULT_SIGMAS if sigma >= recipe_of(folder).data.noise_floor
    ]
    for row in table:
        error, psnr, teacher_psnr, difference = (float(cell) for cell in row[1:])
        assert 0 < error < 2
        assert difference == pytest.approx(psnr - teacher_psnr, abs=0.011)
    assert "last 5 %" in card
    assert "coverage of the 90 % interval (held-out images: 1;" in card
    assert "An energy prior for grey images of 8x8 pixels, for" in card
    assert "deviation 0.02 (the noise floor" in card
    recipe = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert Recipe.model_validate(recipe) == recipe_of(folder)
    assert not list(output.glob(".*"))
    assert (output / "tiny-samples.png").is_file()
    assert (output / "tiny-levels.png").is_file()


def test_run_refuses_before_training(folder: Path) -> None:
    def attempt(message: str, **changes: Any) -> None:
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_fields(folder, **changes)))
        with pytest.raises(ValueError, match=message):
            pipeline.run(folder / "recipe.yaml", folder / "out")
        assert not (folder / "out").exists()

    attempt("file name without folders", name="../tiny")
    attempt("file name without folders", name="")
    attempt("does not fit the network", network=NETWORK | {"in_channels": 12, "out_channels": 12})
    attempt(
        "batch_size is 8; expected a multiple of 3", energy=recipe_fields(folder)["energy"] | {"parts": 3}
    )
    attempt("has no argument depth", network=NETWORK | {"depth": 3})
    attempt("neither 'fashion-mnist' nor", data={"source": "absent.npy"})


# Recipes


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"teacher": {"steps": 0, "batch_size": 4, "learning_rate": 1e-3}}, r"teacher\.StageConfig\.steps"),
        ({"energy": {"steps": 5, "batch_size": 4}}, r"energy\.learning_rate"),
        ({"energy": {"steps": 5, "batch_size": 4, "learning_rate": -1}}, r"energy\.learning_rate"),
        ({"data": {"source": "fashion-mnist", "noise_floor": -0.1}}, r"data\.noise_floor"),
        ({"sigma": {"low": "small"}}, r"sigma\.low"),
        ({"data": {}}, r"data\.source"),
        ({"patch": 0}, "patch"),
        ({"units": 3}, "units"),
        ({"teacher": {"checkpoint": 3}}, r"teacher\.Teacher\.checkpoint"),
        ({"network": 3}, "network"),
        ({"colour": True}, "colour"),
        ({"seed": -1}, "seed"),
        ({"name": None}, "name"),
    ],
)
def test_a_bad_recipe_names_the_field(folder: Path, changes: dict[str, Any], field: str) -> None:
    path = folder / "bad.yaml"
    path.write_text(yaml.safe_dump(recipe_fields(folder, **changes)))
    with pytest.raises(ValueError, match=rf"(?s)bad\.yaml is not a valid recipe.*\n{field}\n"):
        load_recipe(path)


def test_augmentation_without_its_labels_is_refused(folder: Path) -> None:
    """It would leak into what the teacher generates; the energy learns the images as they are."""
    fields = recipe_fields(folder)
    augmented = fields["teacher"] | {"augment": 0.1}
    with pytest.raises(ValueError, match="needs augment_dim: 9"):
        recipe_of(folder, teacher=augmented)
    recipe_of(folder, teacher=augmented, network=NETWORK | {"augment_dim": 9})
    with pytest.raises(ValueError, match=r"energy\.augment is not 0"):
        recipe_of(folder, energy=fields["energy"] | {"augment": 0.1})


def test_a_recipe_that_is_no_recipe(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"no recipe file .*absent.yaml"):
        load_recipe(folder / "absent.yaml")
    path = folder / "bad.yaml"
    for text in ("a: [1, 2", "- 1\n- 2\n", ""):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"bad.yaml is not a valid recipe"):
            load_recipe(path)


@pytest.mark.parametrize("path", sorted(ZOO.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_of_the_zoo_are_valid(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    EDMDenoiser.from_config(recipe.denoiser_config())


def test_the_zoo_has_its_priors() -> None:
    assert {path.stem for path in ZOO.glob("*.yaml")} >= {"fashion-28", "brain-128", "photo-64"}
