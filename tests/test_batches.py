"""Batches depend on the seed, the step and the image alone: not on processes, workers or what came before."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alpenglow.distillation.augment import AUGMENT_DIM
from alpenglow.distillation.batches import Batch, Batches, image_generator, stream
from alpenglow.distillation.config import Recipe, StageConfig
from alpenglow.distillation.sources import IndexedSource, open_source
from tests.tiny import NETWORK, discs, recipe_fields

STAGE = {"steps": 5, "batch_size": 8, "learning_rate": 1e-3}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    np.save(tmp_path / "images.npy", discs())
    return tmp_path


def batches(
    folder: Path, *, seed: int = 7, floor: float = 0.02, stage: dict[str, Any] | None = None, **options: Any
) -> Batches:
    data = {"source": str(folder / "images.npy"), "noise_floor": floor}
    network = NETWORK | {"augment_dim": AUGMENT_DIM}
    fields = recipe_fields(folder, data=data, network=network, teacher=STAGE | (stage or {}))
    recipe = Recipe.model_validate(fields)
    assert isinstance(recipe.teacher, StageConfig)
    return Batches(open_source(recipe.data), recipe, recipe.teacher, seed=seed, **options)


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def joined(shares: list[Batch]) -> Batch:
    return Batch(*(torch.cat(parts) for parts in zip(*shares, strict=True)))


def test_shapes(folder: Path) -> None:
    batch = batches(folder, label_dim=3)[0]
    shapes = [tuple(tensor.shape) for tensor in batch]
    assert shapes == [(8, 1, 8, 8), (8,), (8, 1, 8, 8), (8, AUGMENT_DIM), (8, 3)]
    assert all(tensor.dtype == torch.float32 for tensor in batch)
    assert torch.equal(batch.noisy[3], batch.clean[3] + batch.sigma[3] * batch.noise[3])
    assert not batch.augmentation.any()
    assert torch.equal(batch.classes.sum(1), torch.ones(8))
    assert batches(folder)[0].classes.shape == (8, 0)


def test_a_batch_depends_on_seed_and_step_alone(folder: Path) -> None:
    """Whatever was drawn before; and each image of each step is another draw."""
    first = batches(folder)
    for step in range(3):
        first[step]
    assert same(first[3], batches(folder)[3])
    draws = torch.cat([batches(folder, seed=seed)[step].noise for seed in (7, 8) for step in (3, 4)])
    assert len({tuple(noise.flatten().tolist()) for noise in draws}) == 32


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("probability", [0.0, 0.7])
def test_processes_share_the_batch_of_one(folder: Path, count: int, probability: float) -> None:
    options: dict[str, Any] = {"stage": {"augment": probability}, "label_dim": 3}
    whole = batches(folder, **options)[2]
    shares = [batches(folder, rank=rank, count=count, **options)[2] for rank in range(count)]
    assert all(len(share.clean) == 8 // count for share in shares)
    assert same(joined(shares), whole)


def test_parts_share_the_batch(folder: Path) -> None:
    whole = batches(folder, stage={"parts": 4}, label_dim=3)[2]
    parts = list(whole.split(4))
    assert [len(part.sigma) for part in parts] == [2, 2, 2, 2]
    assert same(joined(parts), whole)


def test_workers_give_the_same_batches(folder: Path) -> None:
    """In the same order, from any step on."""
    steps = range(3, 9)
    expected = [batches(folder)[step] for step in steps]
    for workers in (0, 2):
        found = list(stream(batches(folder), steps, workers))
        assert all(isinstance(batch, Batch) for batch in found)
        assert all(same(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("count", "parts"), [(3, 1), (1, 3), (4, 4)])
def test_a_batch_that_does_not_divide_is_refused(folder: Path, count: int, parts: int) -> None:
    message = (
        f"batch_size is 8; expected a multiple of {count * parts} .{count} processes times {parts} parts"
    )
    with pytest.raises(ValueError, match=message):
        batches(folder, stage={"parts": parts}, count=count)


def test_noise_has_its_size() -> None:
    """The floor on the clean images, and standard normal noise on those; classes even."""
    flat = IndexedSource([torch.full((1, 40, 40), 0.5)] * 2)
    fields = recipe_fields(Path(), data={"source": "", "noise_floor": 0.1})
    recipe = Recipe.model_validate(fields | {"energy": STAGE | {"batch_size": 50}})
    batch = Batches(flat, recipe, recipe.energy, seed=0, label_dim=2)[0]
    for noise, std in ((batch.clean - 0.5, 0.1), (batch.noise, 1.0)):
        # Standard errors of a mean and of a standard deviation.
        assert abs(noise.mean() / std) < 4 / math.sqrt(noise.numel())
        assert abs(noise.std() / std - 1) < 4 / math.sqrt(2 * noise.numel())
    # Were they one draw, their correlation would be 1.
    assert abs((batch.noise * (batch.clean - 0.5)).mean()) < 4 * 0.1 / math.sqrt(batch.noise.numel())
    assert abs(batch.classes[:, 0].mean() - 0.5) < 4 * 0.5 / math.sqrt(50)


def test_held_out_images_are_not_trained_on(folder: Path) -> None:
    given = batches(folder, floor=0.0)
    drawn = torch.cat([given[step].clean for step in range(100)])
    known = torch.from_numpy(discs()[:, None] / 127.5 - 1).float()
    found = (drawn[:, None] - known).abs().amax((2, 3, 4)).argmin(1)
    assert (drawn - known[found]).abs().max() < 1e-6
    # 800 draws of 95 images: one is missing with a probability of 95 exp(-800 / 95) = 0.02.
    assert sorted(set(found.tolist())) == list(range(95))


def test_augmentation_is_labelled(folder: Path) -> None:
    """Images whose label is zero are as they were; the others are not."""
    plain = batches(folder, floor=0.0)
    changed = batches(folder, floor=0.0, stage={"augment": 0.1})
    labelled, differs = [], []
    for step in range(50):
        before, after = plain[step], changed[step]
        assert not before.augmentation.any()
        labelled.append(after.augmentation.any(1))
        differs.append((before.clean != after.clean).any(-1).any(-1).any(-1))
    # Unless a disc is its own mirror image, it differs.
    assert not (torch.cat(differs) & ~torch.cat(labelled)).any()
    assert (torch.cat(differs) == torch.cat(labelled)).float().mean() > 0.97
    share = 1 - 0.95**2 * 0.9**4
    error = math.sqrt(share * (1 - share) / 400)
    assert abs(torch.cat(labelled).float().mean() - share) < 4 * error


def test_image_generators_differ() -> None:
    """Neighbours in seed, step and index, also where two of the three change places."""
    places = [(a, b, c) for a in range(3) for b in range(3) for c in range(3)]
    assert len({torch.rand((), generator=image_generator(*place)).item() for place in places}) == 27
