"""The distillation pipeline on real, tiny runs: learning, resuming after a kill, figures, files, errors."""

import gzip
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from alpenglow.distillation import pipeline
from alpenglow.distillation.card import write_card
from alpenglow.distillation.config import Recipe, SigmaLaw, StageConfig, load_recipe
from alpenglow.distillation.data import load_images, read_idx, step_generator, to_units, training_batch
from alpenglow.distillation.evaluation import DEFAULT_SIGMAS, evaluate_coverage, evaluate_prior
from alpenglow.distillation.losses import draw_sigma, energy_loss, teacher_loss
from alpenglow.distillation.training import learning_rate, train
from alpenglow.networks.denoiser import EDMDenoiser
from alpenglow.priors import GaussianPrior, smooth_covariance
from alpenglow.priors.loading import load_denoiser, load_prior

NETWORK: dict[str, Any] = {
    "img_resolution": 4,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 8,
    "channel_mult": [1],
    "num_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}


def recipe_fields(folder: Path, **changes: Any) -> dict[str, Any]:
    stage = {"batch_size": 8, "learning_rate": 3e-3, "warmup_steps": 5, "ema_halflife_steps": 10}
    fields: dict[str, Any] = {
        "name": "tiny",
        "data": {"source": str(folder / "images.npy"), "noise_floor": 0.02},
        "network": NETWORK,
        "sigma_data": 0.7,
        "patch": 2,
        "sigma": {"log_mean": -1.0, "log_std": 1.4, "low": 0.005, "high": 40.0},
        "teacher": {"steps": 12, **stage},
        "energy": {"steps": 8, **stage},
    }
    return fields | changes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With images.npy: 100 images of 8x8, bright discs at random places, and recipe.yaml."""
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:8, :8]
    centres = random.uniform(1, 6, (100, 2, 1, 1))
    distance = np.hypot(rows - centres[:, 0], columns - centres[:, 1])
    np.save(tmp_path / "images.npy", np.uint8(255 * np.clip(3 - distance, 0, 1)))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_fields(tmp_path)))
    return tmp_path


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Runs that are compared bit by bit, in this process and in others, use one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def recipe_of(folder: Path, **changes: Any) -> Recipe:
    return Recipe.model_validate(recipe_fields(folder, **changes))


def same_weights(a: EDMDenoiser, b: EDMDenoiser) -> bool:
    states = a.state_dict(), b.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][k], states[1][k]) for k in states[0]
    )


def losses(log: Path) -> list[tuple[int, float, float]]:
    records = [json.loads(line) for line in log.read_text().splitlines()]
    return [(record["step"], record["loss"], record["lr"]) for record in records]


def random_denoiser(seed: int = 0) -> EDMDenoiser:
    """A network whose every weight matters (the initial one nearly ignores its input)."""
    denoiser = EDMDenoiser.from_config(
        {"backbone": "SongUNet", "network": NETWORK, "sigma_data": 0.7, "patch": 2}
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return denoiser


# Learning


def test_both_losses_fall(folder: Path) -> None:
    """On one set of noisy held-out images, before and after: the paired gain exceeds five standard errors."""
    stage = {"batch_size": 8, "learning_rate": 3e-3, "warmup_steps": 10, "ema_halflife_steps": 10}
    recipe = recipe_of(folder, teacher={"steps": 120, **stage}, energy={"steps": 50, **stage})
    torch.manual_seed(recipe.seed)
    untrained = EDMDenoiser.from_config(recipe.denoiser_config())
    teacher, energy = pipeline.distill(recipe, folder / "run")
    held_out = pipeline.split_images(recipe.data.source)[1]

    def gain(loss: Callable[[EDMDenoiser, Tensor, Tensor, torch.Generator], Tensor], pair: Any) -> float:
        gains = []
        for step in range(20):
            values = []
            for model in pair:
                generator = step_generator(99, step)
                clean = training_batch(held_out, 8, 0.02, generator)
                sigma = draw_sigma(SigmaLaw(), 8, generator)
                values.append(loss(model, clean, sigma, generator).item())
            gains.append(values[0] - values[1])
        difference = torch.tensor(gains)
        return (difference.mean() / difference.std() * math.sqrt(len(gains))).item()

    assert gain(teacher_loss, (untrained, teacher)) > 5
    assert gain(lambda m, *rest: energy_loss(m, teacher, *rest), (teacher, energy)) > 5
    logged = losses(folder / "run" / "teacher.jsonl")
    assert [step for step, _, _ in logged] == [100, 120]
    assert logged[1][1] < logged[0][1]
    assert not any(p.requires_grad for net in (teacher, energy) for p in net.parameters())


def test_the_energy_starts_from_the_teacher(folder: Path) -> None:
    """A learning rate too small to move a float32 leaves the teacher's weights where they are."""
    still = recipe_fields(folder)["energy"] | {"steps": 3, "learning_rate": 1e-30}
    teacher, energy = pipeline.distill(recipe_of(folder, energy=still), folder / "run")
    assert same_weights(teacher, energy)


def test_a_run_follows_its_seed(folder: Path) -> None:
    first, again, other = (
        pipeline.distill(recipe_of(folder, seed=seed), folder / name)
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert same_weights(first[0], again[0])
    assert same_weights(first[1], again[1])
    assert not same_weights(first[1], other[1])


def test_energy_loss_gradient_is_that_of_finite_differences() -> None:
    """In float64, along random directions of every parameter; needs the second derivative of the network."""
    model, teacher = random_denoiser().double(), random_denoiser(1).double().requires_grad_(False)
    clean = torch.randn(4, 1, 8, 8, generator=step_generator(5, 0), dtype=torch.float64)
    sigma = torch.tensor([0.02, 0.3, 2.0, 20.0], dtype=torch.float64)

    def loss() -> Tensor:
        return energy_loss(model, teacher, clean, sigma, step_generator(5, 1))

    loss().backward()
    for index, (name, parameter) in enumerate(model.named_parameters()):
        direction = torch.randn(parameter.shape, generator=step_generator(6, index), dtype=torch.float64)
        step = 1e-5 / direction.norm().item()
        assert parameter.grad is not None, name
        slope = (parameter.grad * direction).sum().item()
        start, values = parameter.detach().clone(), []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.copy_(start + sign * step * direction)
            values.append(loss().item())
        with torch.no_grad():
            parameter.copy_(start)
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=1e-5, abs=1e-7), name


def test_losses_are_what_they_say() -> None:
    """Both losses written out again from their definitions, by other means."""
    model, teacher = random_denoiser().double(), random_denoiser(1).double()
    clean = torch.randn(3, 1, 8, 8, generator=step_generator(5, 0), dtype=torch.float64)
    sigma = torch.tensor([0.05, 0.5, 5.0], dtype=torch.float64)
    noise = torch.randn(clean.shape, generator=step_generator(5, 1))
    x = (clean + sigma[:, None, None, None] * noise).requires_grad_()
    energy = 0.5 * (x - model(x, sigma)).square().sum()
    (grad,) = torch.autograd.grad(energy, x)
    weight = 1 / sigma**2 + 1 / 0.7**2
    mismatch = (grad - x + teacher(x, sigma)).square().mean((1, 2, 3))
    got = energy_loss(model, teacher, clean, sigma, step_generator(5, 1)).item()
    assert got == pytest.approx((weight * mismatch).mean().item(), rel=1e-9)
    error = (model(x, sigma) - clean).square().mean((1, 2, 3))
    got = teacher_loss(model, clean, sigma, step_generator(5, 1)).item()
    assert got == pytest.approx((weight * error).mean().item(), rel=1e-9)


def test_noise_levels_follow_their_law() -> None:
    law, count = SigmaLaw(log_mean=-1.0, log_std=1.0, low=0.005, high=40.0), 20_000
    sigma = draw_sigma(law, count, step_generator(0, 0))
    assert sigma.min() >= 0.005
    assert sigma.max() <= 40.0
    assert ((sigma.log()[::2] + 1.0).mean().abs() * math.sqrt(count / 2)).item() < 4
    share = (sigma[1::2] < math.sqrt(0.005 * 40)).double().mean().item()
    assert abs(share - 0.5) < 4 * 0.5 / math.sqrt(count / 2)


def test_learning_rate_warms_up_and_decays() -> None:
    stage = StageConfig(steps=100, batch_size=1, learning_rate=2.0, warmup_steps=10)
    rates = [learning_rate(step, stage) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.001


# Resuming

# Runs the pipeline in a process of its own that checkpoints at every step, and kills it (SIGKILL, as the
# kernel does when memory runs out) at one step of one stage: in its loss, or while it writes a checkpoint.
KILLED = """
import os, signal, sys
from functools import partial
from pathlib import Path
import torch
from alpenglow.distillation import pipeline, training
from alpenglow.distillation.config import load_recipe

folder, stage, step, place = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
torch.set_num_threads(1)
name, kill = f"{stage}_loss", lambda: os.kill(os.getpid(), signal.SIGKILL)
original, save, seen = getattr(pipeline, name), torch.save, {"steps": 0, "saves": 0}

def loss(*arguments):
    if place == "loss" and seen["steps"] == step:
        kill()
    seen["steps"] += 1
    return original(*arguments)

def torn_save(state, path):
    if place == "checkpoint" and state["step"] == step:
        save(state, path)
        os.truncate(path, os.path.getsize(path) // 2)
        kill()
    save(state, path)

setattr(pipeline, name, loss)
training.torch.save = torn_save
pipeline.train = partial(training.train, checkpoint_seconds=-1.0)
pipeline.distill(load_recipe(folder / "recipe.yaml"), folder / "killed")
"""


def killed_at(folder: Path, stage: str, steps: int, place: str = "loss") -> None:
    """Run until `stage` has done `steps` more steps, or is about to checkpoint after its step `steps`."""
    arguments = [sys.executable, "-c", KILLED, str(folder), stage, str(steps), place]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == -signal.SIGKILL, result.stderr


def checkpoint_step(path: Path) -> int:
    return torch.load(path, weights_only=True)["step"]


def test_a_killed_run_ends_as_an_unbroken_one(folder: Path) -> None:
    """Killed in the teacher's stage, then while it writes a checkpoint, then in the energy's stage."""
    unbroken = pipeline.distill(recipe_of(folder), folder / "unbroken")
    killed = folder / "killed"
    killed_at(folder, "teacher", 4)
    assert checkpoint_step(killed / "teacher.ckpt") == 4
    assert not (killed / "energy.ckpt").exists()
    killed_at(folder, "teacher", 9, "checkpoint")
    assert checkpoint_step(killed / "teacher.ckpt") == 8
    killed_at(folder, "energy", 3)
    assert checkpoint_step(killed / "teacher.ckpt") == 12
    assert checkpoint_step(killed / "energy.ckpt") == 3
    resumed = pipeline.distill(recipe_of(folder), killed)
    assert same_weights(resumed[0], unbroken[0])
    assert same_weights(resumed[1], unbroken[1])
    for name in ("teacher", "energy"):
        logged, expected = (losses(folder / run / f"{name}.jsonl") for run in ("killed", "unbroken"))
        assert [step for step, _, _ in logged] == [step for step, _, _ in expected]


def regression(calls: list[int]) -> Callable[[torch.nn.Module, torch.Generator], Tensor]:
    def loss(model: torch.nn.Module, generator: torch.Generator) -> Tensor:
        calls.append(1)
        x = torch.randn(8, 3, generator=generator)
        return (model(x) - x.sum(1, keepdim=True)).square().mean()

    return loss


class StopError(Exception):
    pass


def train_until(folder: Path, stop: int | None, **options: Any) -> torch.nn.Module:
    """250 steps of a linear regression; with `stop`, an error in the step after as many."""
    torch.manual_seed(0)
    calls: list[int] = []
    inner = regression(calls)

    def loss(model: torch.nn.Module, generator: torch.Generator) -> Tensor:
        if len(calls) == stop:
            raise StopError
        return inner(model, generator)

    stage = StageConfig(steps=250, batch_size=8, learning_rate=0.01, warmup_steps=5)
    return train("line", torch.nn.Linear(3, 1), loss, stage, folder, seed=3, **options)


@pytest.mark.parametrize("stop", [100, 130])
def test_a_resumed_log_is_that_of_an_unbroken_run(tmp_path: Path, stop: int) -> None:
    """Also when it stopped between two lines of the log."""
    expected = train_until(tmp_path / "unbroken", None)
    with pytest.raises(StopError):
        train_until(tmp_path / "stopped", stop, checkpoint_seconds=-1.0)
    resumed = train_until(tmp_path / "stopped", None)
    assert torch.equal(resumed.weight, expected.weight)  # type: ignore[arg-type]
    assert losses(tmp_path / "stopped" / "line.jsonl") == losses(tmp_path / "unbroken" / "line.jsonl")


def test_a_torn_line_of_the_log_is_written_anew(tmp_path: Path) -> None:
    with pytest.raises(StopError):
        train_until(tmp_path, 130, checkpoint_seconds=-1.0)
    log = tmp_path / "line.jsonl"
    log.write_text(log.read_text() + '{"step": 2')
    train_until(tmp_path, None)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [100, 200, 250]


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StopError):
        train_until(tmp_path, 130, checkpoint_seconds=-1.0)
    kept = (tmp_path / "line.ckpt").read_bytes()
    with pytest.raises(ValueError, match=r"line\.ckpt is of another recipe.*delete the checkpoint"):
        train_until(tmp_path, None, recipe={"noise_floor": 0.1})
    assert (tmp_path / "line.ckpt").read_bytes() == kept


def test_lines_after_the_checkpoint_are_written_anew(tmp_path: Path) -> None:
    """A run that logged on after its last checkpoint repeats those steps: their lines stand once."""
    with pytest.raises(StopError):
        train_until(tmp_path, 90, checkpoint_seconds=-1.0)
    with pytest.raises(StopError):
        train_until(tmp_path, 130, checkpoint_seconds=3600.0)
    assert [step for step, _, _ in losses(tmp_path / "line.jsonl")] == [100, 200]
    train_until(tmp_path, None)
    assert [step for step, _, _ in losses(tmp_path / "line.jsonl")] == [100, 200, 250]


def test_a_finished_stage_is_not_trained_again(tmp_path: Path) -> None:
    first = train_until(tmp_path, None)
    again = train_until(tmp_path, 0)
    assert torch.equal(first.weight, again.weight)  # type: ignore[arg-type]


def test_a_diverging_run_stops_and_keeps_the_last_good_state(tmp_path: Path) -> None:
    stage = StageConfig(steps=50, batch_size=8, learning_rate=0.01, warmup_steps=0)
    calls: list[int] = []

    def loss(model: torch.nn.Module, generator: torch.Generator) -> Tensor:
        value = regression(calls)(model, generator)
        return value * (math.nan if len(calls) > 20 else 1.0)

    with pytest.raises(RuntimeError, match="loss is nan at step 20; lower learning_rate"):
        train("line", torch.nn.Linear(3, 1), loss, stage, tmp_path, seed=3, checkpoint_seconds=-1.0)
    state = torch.load(tmp_path / "line.ckpt", weights_only=True)
    assert state["step"] == 20
    assert all(torch.isfinite(value).all() for value in state["model"].values())


# Data


def idx(images: np.ndarray, magic: bytes = b"\0\0\x08") -> bytes:
    header = magic + bytes([images.ndim]) + b"".join(n.to_bytes(4, "big") for n in images.shape)
    return header + images.tobytes()


PIXELS = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)


def test_read_idx(tmp_path: Path) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(idx(PIXELS)))
    assert np.array_equal(read_idx(path), PIXELS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(idx(PIXELS))[:-12], "not a readable gzip file.*fetch the data set again"),
        (idx(PIXELS), "not a readable gzip file"),
        (b"", "not"),
        (gzip.compress(idx(PIXELS, b"\0\0\x0d")), "not an IDX file of unsigned bytes"),
        (gzip.compress(b"\0\0"), "not an IDX file"),
        (
            gzip.compress(idx(PIXELS)[:-5]),
            r"holds 19 bytes, its header promises \(2, 3, 4\); it is truncated",
        ),
        (gzip.compress(idx(PIXELS) + b"\0"), "holds 25 bytes"),
        (gzip.compress(idx(PIXELS)[:9]), "truncated"),
        (gzip.compress(idx(PIXELS))[:10] + b"\xff" * 30, "not a readable gzip file"),
    ],
    ids=["truncated", "plain", "empty", "magic", "short", "pixels", "extra", "header", "deflate"],
)
def test_read_idx_refuses(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_idx(path)


def test_load_images(folder: Path) -> None:
    images = load_images(str(folder / "images.npy"))
    assert images.shape == (100, 1, 8, 8)
    assert images.dtype == torch.uint8
    np.save(folder / "colour.npy", np.zeros((5, 3, 8, 8), np.uint8))
    assert load_images(str(folder / "colour.npy")).shape == (5, 3, 8, 8)
    units = to_units(torch.tensor([0, 255], dtype=torch.uint8))
    assert units.tolist() == [-1, 1]


def test_fashion_mnist_is_found_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alpenglow.distillation.data.FASHION_FOLDERS", (tmp_path / "none", tmp_path))
    with pytest.raises(ValueError, match=r"Fashion-MNIST was not found in .*none.*make data"):
        load_images("fashion-mnist")
    for split, name in (("train", "train-images-idx3-ubyte.gz"), ("test", "t10k-images-idx3-ubyte.gz")):
        (tmp_path / name).write_bytes(gzip.compress(idx(PIXELS + (100 if split == "test" else 0))))
    assert torch.equal(load_images("fashion-mnist")[:, 0], torch.from_numpy(PIXELS))
    training, held_out = pipeline.split_images("fashion-mnist")
    assert torch.equal(held_out, training + 100)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 8, 8), np.float32), r"float32 \(4, 1, 8, 8\); expected uint8 \[N, H, W\]"),
        (np.zeros((8, 8), np.uint8), r"uint8 \(8, 8\)"),
        (np.zeros((0, 8, 8), np.uint8), "N > 0"),
        (np.array([{"a": 1}], dtype=object), "not a readable .npy array"),
    ],
    ids=["float", "one image", "none", "pickle"],
)
def test_load_images_refuses_arrays(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "images.npy", array)
    with pytest.raises(ValueError, match=message):
        load_images(str(tmp_path / "images.npy"))


def test_load_images_refuses_files(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"neither 'fashion-mnist' nor an existing .npy file"):
        load_images(str(folder / "absent.npy"))
    with pytest.raises(ValueError, match="'mnist' is neither"):
        load_images("mnist")
    torn = folder / "torn.npy"
    torn.write_bytes((folder / "images.npy").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"torn.npy is not a readable .npy array"):
        load_images(str(torn))


def test_the_last_images_are_held_out(folder: Path) -> None:
    images = load_images(str(folder / "images.npy"))
    training, held_out = pipeline.split_images(str(folder / "images.npy"))
    assert torch.equal(training, images[:95])
    assert torch.equal(held_out, images[95:])
    np.save(folder / "images.npy", images[:2].numpy())
    assert [len(part) for part in pipeline.split_images(str(folder / "images.npy"))] == [1, 1]
    np.save(folder / "images.npy", images[:1].numpy())
    with pytest.raises(ValueError, match="holds one image"):
        pipeline.split_images(str(folder / "images.npy"))


def test_held_out_images_are_not_trained_on(folder: Path) -> None:
    """Training is blind to them: with others in their place it ends with the same weights."""
    first = pipeline.distill(recipe_of(folder), folder / "first")
    images = np.load(folder / "images.npy")
    images[95:] = 255 - images[95:]
    np.save(folder / "images.npy", images)
    assert same_weights(pipeline.distill(recipe_of(folder), folder / "second")[1], first[1])
    images[60:95] = 255 - images[60:95]
    np.save(folder / "images.npy", images)
    assert not same_weights(pipeline.distill(recipe_of(folder), folder / "third")[1], first[1])


def test_batches_depend_on_the_step_alone() -> None:
    images = torch.randint(0, 256, (50, 1, 4, 4), dtype=torch.uint8)
    batches = [training_batch(images, 6, 0.02, step_generator(7, step)) for step in (3, 3, 4)]
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])
    flat = torch.full((1, 1, 40, 40), 255, dtype=torch.uint8)
    floor = training_batch(flat, 20, 0.02, step_generator(7, 0)) - 1
    # Standard error of a standard deviation: s / sqrt(2 N).
    assert abs(floor.std().item() / 0.02 - 1) < 4 / math.sqrt(2 * floor.numel())


# Recipes


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"teacher": {"steps": 0, "batch_size": 4, "learning_rate": 1e-3}}, r"teacher\.steps"),
        ({"energy": {"steps": 5, "batch_size": 4}}, r"energy\.learning_rate"),
        ({"energy": {"steps": 5, "batch_size": 4, "learning_rate": -1}}, r"energy\.learning_rate"),
        ({"data": {"source": "fashion-mnist", "noise_floor": -0.1}}, r"data\.noise_floor"),
        ({"sigma": {"low": "small"}}, r"sigma\.low"),
        ({"data": {}}, r"data\.source"),
        ({"patch": 0}, "patch"),
        ({"units": "[0, 1]"}, "units"),
        ({"network": 3}, "network"),
        ({"colour": True}, "colour"),
        ({"name": None}, "name"),
    ],
)
def test_a_bad_recipe_names_the_field(folder: Path, changes: dict[str, Any], field: str) -> None:
    path = folder / "bad.yaml"
    path.write_text(yaml.safe_dump(recipe_fields(folder, **changes)))
    with pytest.raises(ValueError, match=rf"(?s)bad\.yaml is not a valid recipe.*\n{field}\n"):
        load_recipe(path)


def test_a_recipe_that_is_no_recipe(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"no recipe file .*absent.yaml"):
        load_recipe(folder / "absent.yaml")
    path = folder / "bad.yaml"
    for text in ("a: [1, 2", "- 1\n- 2\n", ""):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"bad.yaml is not a valid recipe"):
            load_recipe(path)


def test_the_recipe_of_the_zoo_is_valid() -> None:
    recipe = load_recipe(Path(__file__).parents[1] / "engine/priors/zoo/fashion-28.yaml")
    assert recipe.name == "fashion-28"
    EDMDenoiser.from_config(recipe.denoiser_config())


# Figures


def analytic(std: float, batch_size: int) -> tuple[Any, Callable[[Tensor, Tensor], Tensor]]:
    """A white Gaussian prior in the clothes of a NetworkPrior, and its exact denoiser."""
    prior = GaussianPrior(torch.zeros(1, 4, 4), std**2 * torch.eye(16))
    clothes = SimpleNamespace(
        image_shape=prior.image_shape,
        energy_and_grad=prior.energy_and_grad,
        device=torch.device("cpu"),
        batch_size=batch_size,
        name="white",
    )
    return clothes, lambda x, sigma: x - prior.energy_and_grad(x, sigma)[1]


@pytest.mark.parametrize("batch_size", [7, 16])
def test_evaluation_of_gaussians(batch_size: int) -> None:
    """White Gaussians have G = a x with a = sigma^2 / (sigma^2 + s^2): every figure is known.

    The error of a denoiser (1 - a) x is s^2 a^2 + (1 - a)^2 sigma^2 on average, and its mean over N pixels
    has a relative standard error of sqrt(2 / N), which is 4.3 sqrt(2 / N) in dB.
    """
    std, count = 0.5, 500
    prior, _ = analytic(0.3, batch_size)
    _, teacher = analytic(std, batch_size)
    images = std * torch.randn(count, 1, 4, 4, generator=step_generator(1, 1))
    sigmas = [0.01, 0.3, 1.0, 10.0]
    rows = evaluate_prior(prior, teacher, images, sigmas)  # type: ignore[arg-type]
    assert [row["sigma"] for row in rows] == sigmas
    for row, sigma in zip(rows, sigmas, strict=True):
        ours, theirs = (sigma**2 / (sigma**2 + s**2) for s in (0.3, std))
        assert row["gradient_error"] == pytest.approx(abs(ours - theirs) / theirs, rel=1e-4)
        for key, a in (("psnr", ours), ("teacher_psnr", theirs)):
            expected = 10 * math.log10(4 / (std**2 * a**2 + (1 - a) ** 2 * sigma**2))
            assert abs(row[key] - expected) < 4 * 4.35 * math.sqrt(2 / (16 * count))


def test_evaluation_follows_the_seed() -> None:
    prior, teacher = analytic(0.5, 4)
    images = torch.zeros(3, 1, 4, 4)
    rows = [evaluate_prior(prior, teacher, images, [0.5], seed=seed) for seed in (0, 0, 1)]  # type: ignore[arg-type]
    assert rows[0] == rows[1]
    assert rows[0] != rows[2]
    assert rows[0][0]["gradient_error"] < 1e-6


def test_evaluation_refuses() -> None:
    prior, teacher = analytic(0.5, 4)
    for shape in ((3, 1, 4, 5), (1, 4, 4), (0, 1, 4, 4)):
        with pytest.raises(ValueError, match=r"white expects \[N, 1, 4, 4\], N > 0"):
            evaluate_prior(prior, teacher, torch.zeros(shape))  # type: ignore[arg-type]
    for sigmas in ([], [0.1, 0.0], [math.nan], [math.inf]):
        with pytest.raises(ValueError, match="expected positive finite noise levels"):
            evaluate_prior(prior, teacher, torch.zeros(1, 1, 4, 4), sigmas)  # type: ignore[arg-type]
    assert DEFAULT_SIGMAS[0] == 0.01
    assert DEFAULT_SIGMAS[-1] == 10.0


def test_coverage_of_an_exact_prior_is_nominal() -> None:
    """Images drawn from the prior itself: a right sampler covers 90 %; too narrow a prior does not."""
    shape, count = (1, 8, 8), 8
    rows = {}
    for claimed in (0.4, 0.15):
        prior = GaussianPrior(torch.zeros(shape), smooth_covariance(shape, std=claimed, length=2.0))
        truth = GaussianPrior(torch.zeros(shape), smooth_covariance(shape, std=0.4, length=2.0))
        images = truth.sample(count, seed=4)
        rows[claimed] = evaluate_coverage(prior, images, num_samples=24, noise_std=0.05)  # type: ignore[arg-type]
    shares = torch.tensor([row["coverage"] for row in rows[0.4]])
    assert abs(shares.mean() - 0.9) < 4 * shares.std() / math.sqrt(count)
    narrow = torch.tensor([row["coverage"] for row in rows[0.15]])
    assert narrow.mean() < 0.8
    assert all(row["coverage"] == row["coverage_clean"] for row in rows[0.4])


# Files


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One image and eight samples for the coverage: an untrained prior's is worth no more."""
    monkeypatch.setattr(pipeline, "COVERAGE_IMAGES", 1)
    monkeypatch.setattr(pipeline, "COVERAGE_SAMPLES", 8)


def test_run_writes_prior_teacher_and_card(folder: Path, quick: None) -> None:
    output = folder / "out put"
    pipeline.run(folder / "recipe.yaml", output)
    prior = load_prior(output / "tiny.safetensors")
    assert prior.image_shape == (1, 8, 8)
    assert prior.sigma_range == (0.01, 40.0)
    assert prior.name == "tiny"
    assert prior.metadata["units"] == "[-1, 1]"
    teacher, energy = pipeline.distill(recipe_of(folder), output)
    for key, value in energy.named_parameters():
        assert torch.equal(prior.denoiser.state_dict()[key], value.half().float())
    assert same_weights(load_denoiser(output / "tiny-teacher.safetensors"), teacher)
    with pytest.raises(ValueError, match="holds a teacher"):
        load_prior(output / "tiny-teacher.safetensors")

    card = (output / "tiny.md").read_text()
    assert card.startswith("# tiny\n")
    assert f"alpenglow distill {folder}/recipe.yaml -o '{output}'\n" in card
    table = [
        line.split("|")[1:-1]
        for line in card.splitlines()
        if line.startswith("| 0.") or line.startswith("| 1")
    ]
    assert [float(row[0]) for row in table] == [s for s in DEFAULT_SIGMAS if s not in (2.0, 5.0)]
    for row in table:
        error, psnr, teacher_psnr, difference = (float(cell) for cell in row[1:])
        assert 0 < error < 2
        assert difference == pytest.approx(psnr - teacher_psnr, abs=0.011)
    assert "| 2 |" in card
    assert "last 5 %" in card
    assert "coverage of the 90 % interval (held-out images: 1;" in card
    assert "An energy prior for grey images of 8x8 pixels, for" in card
    assert "deviation 0.02 (the noise floor" in card
    recipe = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert Recipe.model_validate(recipe) == recipe_of(folder)
    assert not list(output.glob(".*"))


def test_run_refuses_before_training(folder: Path) -> None:
    def attempt(message: str, **changes: Any) -> None:
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_fields(folder, **changes)))
        with pytest.raises(ValueError, match=message):
            pipeline.run(folder / "recipe.yaml", folder / "out")
        assert not (folder / "out").exists()

    attempt("file name without folders", name="../tiny")
    attempt("file name without folders", name="")
    attempt("does not fit the network", network=NETWORK | {"in_channels": 12, "out_channels": 12})
    attempt("has no argument depth", network=NETWORK | {"depth": 3})
    attempt("neither 'fashion-mnist' nor", data={"source": "absent.npy"})


ROWS = [{"sigma": 0.5, "gradient_error": 0.12345, "psnr": 25.0, "teacher_psnr": 25.25}]
SECONDS = {"teacher": 300.4, "energy": 100.0}


def test_card_of_fashion_mnist(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, data={"source": "fashion-mnist"})
    write_card(
        tmp_path / "tiny.md", recipe, ROWS, {"coverage": 0.9041, "images": 8}, "alpenglow distill x", SECONDS
    )
    card = (tmp_path / "tiny.md").read_text()
    for text in (
        "MIT licence",
        "the whole test set",
        "training never sees",
        "alpenglow distill x",
        "| teacher | 300 |",
        "| energy | 100 |",
        "took 25% of the time",
        "| 0.5 | 0.123 | 25.00 | 25.25 | -0.25 |",
        "- coverage: 0.904\n",
        "- images: 8\n",
    ):
        assert text in card
    assert "{" not in card


def test_a_card_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path, recipe = tmp_path / "tiny.md", recipe_of(tmp_path)
    with pytest.raises(ValueError, match="at least one row"):
        write_card(path, recipe, [], {}, "command", SECONDS)
    path.write_text("the card before")
    with pytest.raises(KeyError):
        write_card(path, recipe, [{"sigma": 0.5}], {}, "command", SECONDS)
    assert path.read_text() == "the card before"
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.md"]
