"""The training loop: rate, average, gradients, precision, the log, and what it says when it fails."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from alpenglow.distillation import pipeline, training
from alpenglow.distillation.batches import Batch, Batches
from alpenglow.distillation.config import Recipe, StageConfig
from alpenglow.distillation.losses import energy_loss, teacher_loss
from alpenglow.distillation.processes import Processes
from alpenglow.distillation.sources import open_source
from alpenglow.distillation.training import ema_decay, learning_rate, train
from alpenglow.networks.denoiser import EDMDenoiser
from tests.tiny import discs, line_batches, line_loss, logged, random_denoiser, recipe_fields, same_weights

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With images.npy, the discs."""
    np.save(tmp_path / "images.npy", discs())
    return tmp_path


def stage(steps: int = 50, **changes: Any) -> StageConfig:
    fields = {"steps": steps, "batch_size": 8, "learning_rate": 0.01, "warmup_steps": 0}
    return StageConfig.model_validate(fields | changes)


def line() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 1)


# Rate and average


def test_learning_rate_warms_up_is_constant_and_falls() -> None:
    config = stage(1, learning_rate=2.0, warmup_steps=10, decay_steps=50)
    assert [learning_rate(step, config) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert {learning_rate(step, config) for step in range(9, 51)} == {2.0}
    assert [learning_rate(50 * n, config) for n in (2, 4, 9)] == pytest.approx([2 / math.sqrt(2), 1.0, 2 / 3])
    assert learning_rate(0, stage(1, learning_rate=2.0)) == 2.0


@pytest.mark.parametrize("warmup_steps", [0, 20])
def test_adam_gets_the_rate_of_its_step(tmp_path: Path, warmup_steps: int) -> None:
    """Adam moves a weight whose gradient is constant by the rate: after n steps, by the sum of n rates."""
    config = stage(60, warmup_steps=warmup_steps, decay_steps=30, max_grad_norm=1e9)
    model = line()
    before = model.weight.detach().clone()
    train("line", model, lambda m, batch: 3 * m.weight.sum(), line_batches, config, tmp_path)
    expected = before - sum(learning_rate(step, config) for step in range(60))
    assert torch.allclose(model.weight, expected, atol=1e-5)


@pytest.mark.parametrize("power", [0.0, 2.0, 7.0])
def test_the_average_weighs_step_t_by_its_power(tmp_path: Path, power: float) -> None:
    """Against the mean of all weights that the run went through; with power 0 the plain one."""
    path: list[Tensor] = []

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        path.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
        return line_loss(model, batch)

    model = line()
    average = train("line", model, loss, line_batches, stage(50, ema_power=power), tmp_path)
    end, mean = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (model, average))
    # What the loss sees at step t is what step t - 1 left; the start has no weight.
    weights = torch.arange(1, 51) ** (power + 1) - torch.arange(50) ** (power + 1)
    expected = (weights[:, None] * torch.stack([*path[1:], end])).sum(0) / weights.sum()
    assert torch.allclose(mean, expected, rtol=1e-5, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in average.parameters())
    assert not average.training


def test_the_weights_of_the_average_are_a_power() -> None:
    steps = 1000
    kept = np.array([ema_decay(step, 7.0) for step in range(steps)])
    weights = (1 - kept) * np.append(np.cumprod(kept[:0:-1])[::-1], 1.0)
    assert weights.sum() == pytest.approx(1.0)
    powers = np.arange(1, steps + 1) ** 7.0
    assert weights[500:] == pytest.approx((powers / powers.sum())[500:], rel=0.01)


def test_a_large_gradient_is_clipped(tmp_path: Path) -> None:
    """To the same norm, so that its size is lost; Adam would not tell, so its first moment is read."""
    moments = []
    for size in (1.0, 1000.0):
        folder = tmp_path / str(size)

        def loss(model: nn.Module, batch: Batch, size: float = size) -> Tensor:
            return 1e3 * size * line_loss(model, batch)

        train("line", line(), loss, line_batches, stage(1, max_grad_norm=0.5), folder)
        state = torch.load(folder / "line.ckpt", weights_only=True)["optimizer"]["state"]
        moments.append(torch.cat([entry["exp_avg"].flatten() for entry in state.values()]) / 0.1)
    assert [moment.norm().item() for moment in moments] == pytest.approx([0.5, 0.5], rel=1e-5)
    assert torch.allclose(*moments, rtol=1e-4)


# Seeds


def test_a_run_follows_its_seed(folder: Path) -> None:
    runs = []
    stages = {key: recipe_fields(folder)[key] | {"steps": 3} for key in ("teacher", "energy")}
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        recipe = Recipe.model_validate(recipe_fields(folder, seed=seed, **stages))
        runs.append(pipeline.distill(recipe, folder / name))
    first, again, other = runs
    assert same_weights(first[0], again[0])
    assert same_weights(first[1], again[1])
    assert not same_weights(first[1], other[1])


def test_dropout_follows_the_seed_and_the_step(tmp_path: Path) -> None:
    """Whatever the state of the global generator."""

    def masks(folder: Path, seed: int) -> list[Tensor]:
        seen: list[Tensor] = []

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            seen.append(nn.functional.dropout(torch.ones(40)))
            return line_loss(model, batch)

        train("line", line(), loss, line_batches, stage(3), folder, seed=seed)
        return seen

    first = masks(tmp_path / "first", 5)
    torch.rand(7)
    assert all(torch.equal(a, b) for a, b in zip(masks(tmp_path / "again", 5), first, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(masks(tmp_path / "other", 50)[0], first[0])


# Memory: parts and checkpointing


def gradients(
    loss: Any, batch: Batch, *, parts: int = 1, checkpointing: bool = False
) -> tuple[list[Tensor], int]:
    """Of one step, in float64, and how often the blocks of the network ran."""
    model = random_denoiser().double()
    model.model.checkpointing = checkpointing  # type: ignore[assignment]
    calls = []
    for block in (*model.model.enc.children(), *model.model.dec.children()):  # type: ignore[union-attr, operator]
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    run = training._Run(model, stage(parts=parts, max_grad_norm=1e9), "")
    run.advance(loss, batch, Processes(0, 1, torch.device("cpu")), seed=0)
    return [p.grad for p in model.parameters() if p.grad is not None], len(calls)


@pytest.mark.parametrize("objective", ["teacher", "energy"])
def test_parts_and_checkpointing_keep_the_gradient(folder: Path, objective: str) -> None:
    """Also that of the energy's loss, which is of the second order."""
    recipe = Recipe.model_validate(recipe_fields(folder))
    batch = Batches(open_source(recipe.data), recipe, recipe.energy, seed=0)[0]
    batch = Batch(*(tensor.double() for tensor in batch))
    teacher = random_denoiser(1).double().requires_grad_(False)

    def loss(model: EDMDenoiser, batch: Batch) -> Tensor:
        if objective == "teacher":
            return teacher_loss(model, batch.clean, batch.noisy, batch.sigma)
        return energy_loss(model, teacher, batch.clean, batch.noisy, batch.sigma)

    expected, calls = gradients(loss, batch)
    assert len(expected) == len(list(random_denoiser().parameters()))
    for parts, checkpointing in ((2, False), (8, False), (1, True), (2, True)):
        found, more = gradients(loss, batch, parts=parts, checkpointing=checkpointing)
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(found, expected, strict=True))
        # Checkpointed blocks run again.
        assert (more > parts * calls) is checkpointing


# Precision


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_trains(folder: Path, precision: str) -> None:
    """Both losses, on noisy images of another seed and in float32, fall nearly as far as without."""
    fields = {"batch_size": 8, "learning_rate": 3e-3, "warmup_steps": 5}
    measured = {}
    for name in ("float32", precision):
        stages = {key: {"steps": 40, "precision": name, **fields} for key in ("teacher", "energy")}
        recipe = Recipe.model_validate(recipe_fields(folder, **stages))
        teacher, energy = pipeline.distill(recipe, folder / name)
        assert isinstance(teacher, EDMDenoiser)
        other = Batches(open_source(recipe.data), recipe, recipe.energy, seed=99)
        values = []
        for batch in (other[step] for step in range(5)):
            arguments = batch.clean, batch.noisy, batch.sigma
            values.append(
                [
                    teacher_loss(teacher, *arguments).item(),
                    energy_loss(teacher, teacher, *arguments).item(),
                    energy_loss(energy, teacher, *arguments).item(),
                ]
            )
        measured[name] = torch.tensor(values).mean(0)
        weights = torch.cat([p.flatten() for p in energy.parameters()])
        assert weights.dtype == torch.float32
        assert weights.isfinite().all()
    full, half = measured["float32"], measured[precision]
    assert half[0] == pytest.approx(full[0].item(), rel=0.1)
    # What distillation gains on the teacher's own energy.
    assert half[1] - half[2] > 0.7 * (full[1] - full[2]) > 0


def half_loss(model: nn.Module, batch: Batch) -> Tensor:
    """A regression in float16, whose gradients at the first scale, 65536, overflow."""
    x = batch.clean.flatten(1)
    error = nn.functional.linear(x.half(), model.weight.half()).float() - x.sum(1, keepdim=True)
    return 8 * error.square().sum()


def test_float16_survives_an_overflow(tmp_path: Path) -> None:
    """The scaler halves its scale and skips the step, as long as it takes."""
    model = line()
    before = model.weight.detach().clone()
    train("line", model, half_loss, line_batches, stage(1, precision="float16"), tmp_path / "one")
    assert torch.equal(model.weight, before)
    scale = torch.load(tmp_path / "one/line.ckpt", weights_only=True)["scaler"]["scale"]
    assert scale == 32768

    config = stage(300, precision="float16", learning_rate=0.02)
    trained = train("line", line(), half_loss, line_batches, config, tmp_path / "many")
    assert trained.weight.detach().numpy() == pytest.approx(np.ones((1, 3)), abs=0.01)
    losses = [loss for _, loss, _ in logged(tmp_path / "many/line.jsonl")]
    assert losses[-1] < 0.01 * losses[0]


@dataclass(frozen=True)
class OtherOverflowed(Processes):
    """As if one of two processes had found an infinite gradient, and this one a finite one."""

    def average_gradients(self, model: nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.fill_(math.inf)


def test_processes_skip_an_overflow_together() -> None:
    run = training._Run(line(), stage(precision="float16"), "")
    before = run.model.weight.detach().clone()  # type: ignore[operator]
    processes = OtherOverflowed(0, 1, torch.device("cpu"))
    for batch in line_batches(range(2)):
        assert math.isfinite(run.advance(line_loss, batch, processes, seed=0))
    assert torch.equal(run.model.weight, before)  # type: ignore[arg-type]
    assert run.scaler.get_scale() == 65536 / 4


# The log


def test_lines_of_the_log(tmp_path: Path) -> None:
    """Every hundred steps and at the end: the mean loss since the last, the step's rate, the time so far."""
    values: list[float] = []

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        value = line_loss(model, batch)
        values.append(value.item())
        return value

    config = stage(250, warmup_steps=150, decay_steps=200)
    train("line", line(), loss, line_batches, config, tmp_path)
    records = [json.loads(text) for text in (tmp_path / "line.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [100, 200, 250]
    for record, start in zip(records, (0, 100, 200), strict=True):
        assert record["loss"] == pytest.approx(np.mean(values[start : record["step"]]))
        assert record["lr"] == learning_rate(record["step"] - 1, config)
    seconds = [record["seconds"] for record in records]
    assert seconds == sorted(seconds)


def test_a_log_that_a_deleted_checkpoint_left_is_begun_anew(tmp_path: Path) -> None:
    train("line", line(), line_loss, line_batches, stage(20), tmp_path)
    expected = logged(tmp_path / "line.jsonl")
    (tmp_path / "line.ckpt").unlink()
    train("line", line(), line_loss, line_batches, stage(20), tmp_path)
    assert logged(tmp_path / "line.jsonl") == expected
    assert len(expected) == 1


# Failing


def test_a_diverging_run_stops_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    calls: list[int] = []

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        calls.append(1)
        return line_loss(model, batch) * (math.nan if len(calls) > 20 else 1.0)

    message = r"line: the loss or its gradient is nan at step 20; .*line\.ckpt holds an earlier state"
    with pytest.raises(RuntimeError, match=message):
        train("line", line(), loss, line_batches, stage(), tmp_path, checkpoint_seconds=-1.0)
    state = torch.load(tmp_path / "line.ckpt", weights_only=True)
    assert state["step"] == 20
    assert all(torch.isfinite(value).all() for value in state["model"].values())


@pytest.mark.parametrize(("precision", "step"), [("float32", 0), ("float16", 16)])
def test_a_gradient_that_is_never_finite_stops_the_run(tmp_path: Path, precision: str, step: int) -> None:
    """In float16 once the scale is down to one, and no longer to blame. No checkpoint is spoken of."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        # The root of zero: finite, with an infinite slope.
        return (0 * model.weight).sum().sqrt()

    with pytest.raises(RuntimeError, match=rf"gradient is nan at step {step}\. Lower learning_rate"):
        train("line", line(), loss, line_batches, stage(precision=precision), tmp_path)
    assert not (tmp_path / "line.ckpt").exists()


@dataclass(frozen=True)
class Elsewhere(Processes):
    """As if another process had found no checkpoint."""

    def mean(self, value: float) -> float:
        return value / self.count


def test_processes_that_see_different_checkpoints_are_refused(tmp_path: Path) -> None:
    train("line", line(), line_loss, line_batches, stage(50), tmp_path)
    with pytest.raises(ValueError, match=r"not all processes see the same .*line\.ckpt; give a folder"):
        train(
            "line", line(), line_loss, line_batches, stage(60), tmp_path,
            processes=Elsewhere(0, 2, torch.device("cpu")),
        )  # fmt: skip
