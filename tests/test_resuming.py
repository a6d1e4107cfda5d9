"""What a training run survives: kills at any moment, a full disk; how it goes on, and what it refuses."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from alpenglow.distillation import pipeline, training
from alpenglow.distillation.batches import Batch
from alpenglow.distillation.config import StageConfig, load_recipe
from alpenglow.distillation.training import train
from tests.disk import full_disk
from tests.tiny import discs, line_batches, line_loss, logged, recipe_fields, same_weights

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def short_log() -> Iterator[None]:
    """A line every ten steps, not every hundred."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "LOG_STEPS", 10)
        yield


# A whole distillation, killed

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
training.LOG_STEPS = 3
name, kill = f"{stage}_loss", lambda: os.kill(os.getpid(), signal.SIGKILL)
original, save, seen = getattr(pipeline, name), torch.save, {"steps": 0}

def loss(*arguments, **options):
    if place == "loss" and seen["steps"] == step:
        kill()
    seen["steps"] += 1
    return original(*arguments, **options)

def torn_save(state, path):
    save(state, path)
    if place == "checkpoint" and state["step"] == step:
        os.truncate(path, os.path.getsize(path) // 2)
        kill()

setattr(pipeline, name, loss)
training.torch.save = torn_save
pipeline.train = partial(training.train, checkpoint_seconds=-1.0)
pipeline.distill(load_recipe(folder / "recipe.yaml"), folder / "killed")
"""


def killed_at(folder: Path, stage: str, steps: int, place: str = "loss") -> None:
    """Run until `stage` has done `steps` more steps, or is half through its checkpoint of step `steps`."""
    arguments = [sys.executable, "-c", KILLED, str(folder), stage, str(steps), place]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == -signal.SIGKILL, result.stderr


def steps_done(checkpoint: Path) -> int:
    return torch.load(checkpoint, weights_only=True)["step"]


@pytest.mark.slow
def test_a_killed_run_ends_as_an_unbroken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the teacher's stage, then while it writes a checkpoint, then in the energy's stage."""
    monkeypatch.setattr(training, "LOG_STEPS", 3)
    np.save(tmp_path / "images.npy", discs())
    # Dropout, so that the state of the generator counts too.
    fields = recipe_fields(tmp_path)
    fields["network"] = fields["network"] | {"dropout": 0.1}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(fields))
    recipe, killed = load_recipe(tmp_path / "recipe.yaml"), tmp_path / "killed"
    unbroken = pipeline.distill(recipe, tmp_path / "unbroken")
    killed_at(tmp_path, "teacher", 4)
    assert steps_done(killed / "teacher.ckpt") == 4
    # Its line of the log is written, and will be dropped.
    killed_at(tmp_path, "teacher", 9, "checkpoint")
    assert steps_done(killed / "teacher.ckpt") == 8
    assert [step for step, *_ in logged(killed / "teacher.jsonl")] == [3, 6, 9]
    assert len(list(killed.glob(".teacher-*.ckpt"))) == 1
    assert not (killed / "energy.ckpt").exists()
    killed_at(tmp_path, "energy", 3)
    assert steps_done(killed / "teacher.ckpt") == 12
    assert steps_done(killed / "energy.ckpt") == 3
    resumed = pipeline.distill(recipe, killed)
    assert not list(killed.glob(".*"))
    assert same_weights(resumed[0], unbroken[0])
    assert same_weights(resumed[1], unbroken[1])
    for name, steps in (("teacher", [3, 6, 9, 12]), ("energy", [3, 6, 8])):
        found, expected = (logged(tmp_path / run / f"{name}.jsonl") for run in ("killed", "unbroken"))
        assert found == expected
        assert [step for step, *_ in found] == steps


# One stage, stopped


class StopError(Exception):
    pass


def run(folder: Path, *, stop: int | None = None, steps: int = 25, **options: Any) -> nn.Module:
    """A regression with dropout; with `stop`, an error in the step after as many."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.2), nn.Linear(8, 1))
    changes = {key: options.pop(key) for key in list(options) if key in StageConfig.model_fields}
    fields = {"steps": steps, "batch_size": 8, "learning_rate": 0.01, "warmup_steps": 5, "decay_steps": 12}
    config, calls = StageConfig.model_validate(fields | changes), []

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        if len(calls) == stop:
            raise StopError
        calls.append(1)
        if config.precision == "float16":
            # The gradient overflows until the scale is lower.
            return 64 * line_loss(lambda x: model(x).half().float(), batch)
        return line_loss(model, batch)

    return train("line", model, loss, line_batches, config, folder, seed=3, **options)


def stopped(folder: Path, stop: int, **options: Any) -> None:
    with pytest.raises(StopError):
        run(folder, stop=stop, **{"checkpoint_seconds": -1.0} | options)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, list[tuple[int, float, float]]]:
    """Its average, and the lines of its log."""
    folder = tmp_path_factory.mktemp("unbroken")
    return run(folder), logged(folder / "line.jsonl")


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("stop", [0, 1, 10, 13])
def test_a_resumed_run_is_an_unbroken_one(tmp_path: Path, stop: int, precision: str) -> None:
    """Its weights bit by bit, also when it stopped between two lines of the log; with the scaler's state."""
    expected = run(tmp_path / "unbroken", precision=precision)
    stopped(tmp_path / "stopped", stop, precision=precision)
    assert same_weights(run(tmp_path / "stopped", precision=precision), expected)
    assert logged(tmp_path / "stopped/line.jsonl") == logged(tmp_path / "unbroken/line.jsonl")
    states = [
        torch.load(tmp_path / name / "line.ckpt", weights_only=True) for name in ("stopped", "unbroken")
    ]
    assert states[0]["scaler"] == states[1]["scaler"]
    if precision == "float16":
        assert 1 < states[0]["scaler"]["scale"] < 65536


def test_a_run_may_stop_many_times(tmp_path: Path, unbroken: Any) -> None:
    for stop in (3, 5, 4, 2):
        stopped(tmp_path, stop)
    assert steps_done(tmp_path / "line.ckpt") == 14
    assert same_weights(run(tmp_path), unbroken[0])
    assert logged(tmp_path / "line.jsonl") == unbroken[1]


@pytest.mark.parametrize("tail", ['{"step": 2', "", "\0\0\0", '{"step": 20, "loss": 0.1, "lr": 0.1, "sec'])
def test_a_torn_line_of_the_log_is_written_anew(tmp_path: Path, unbroken: Any, tail: str) -> None:
    stopped(tmp_path, 13)
    with (tmp_path / "line.jsonl").open("a") as log:
        log.write(tail)
    run(tmp_path)
    assert logged(tmp_path / "line.jsonl") == unbroken[1]


def test_lines_after_the_checkpoint_are_written_anew(tmp_path: Path, unbroken: Any) -> None:
    """A run that logged on after its last checkpoint repeats those steps: their lines stand once."""
    stopped(tmp_path, 9)
    stopped(tmp_path, 13, checkpoint_seconds=3600.0)
    assert [step for step, *_ in logged(tmp_path / "line.jsonl")] == [10, 20]
    run(tmp_path)
    assert logged(tmp_path / "line.jsonl") == unbroken[1]


def test_a_run_killed_before_its_first_checkpoint_begins_again(tmp_path: Path, unbroken: Any) -> None:
    stopped(tmp_path, 13, checkpoint_seconds=3600.0)
    assert not (tmp_path / "line.ckpt").exists()
    assert same_weights(run(tmp_path), unbroken[0])
    assert logged(tmp_path / "line.jsonl") == unbroken[1]


def test_a_finished_stage_is_not_trained_again(tmp_path: Path, unbroken: Any) -> None:
    run(tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert same_weights(run(tmp_path, stop=0), unbroken[0])
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


@pytest.mark.parametrize("first", [10, 13])
def test_more_steps_continue_a_finished_run(tmp_path: Path, unbroken: Any, first: int) -> None:
    """To the weights of a run that had them from the start. Its log may have a line more, the first end's."""
    run(tmp_path, steps=first)
    assert same_weights(run(tmp_path), unbroken[0])
    assert [step for step, *_ in logged(tmp_path / "line.jsonl")] == sorted({10, first, 20, 25})
    assert logged(tmp_path / "line.jsonl")[-1] == unbroken[1][-1]


# A full disk


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_full_disk_leaves_the_checkpoint_whole(tmp_path: Path, unbroken: Any, share: float) -> None:
    stopped(tmp_path, 13)
    kept = (tmp_path / "line.ckpt").read_bytes()
    with full_disk(int(share * len(kept))), pytest.raises(OSError, match="could not write") as caught:
        run(tmp_path, checkpoint_seconds=-1.0)
    assert "Make room and start the same command again" in str(caught.value)
    assert (tmp_path / "line.ckpt").read_bytes() == kept
    assert {path.name for path in tmp_path.iterdir()} == {"line.ckpt", "line.jsonl"}
    assert same_weights(run(tmp_path), unbroken[0])
    assert logged(tmp_path / "line.jsonl") == unbroken[1]


def test_a_full_disk_that_tears_the_log(tmp_path: Path, unbroken: Any) -> None:
    stopped(tmp_path, 13)
    log = tmp_path / "line.jsonl"
    with full_disk(log.stat().st_size + 20), pytest.raises(OSError, match=r"could not write .*line\.jsonl"):
        run(tmp_path, checkpoint_seconds=3600.0)
    assert not log.read_text().endswith("\n")
    assert same_weights(run(tmp_path), unbroken[0])
    assert logged(log) == unbroken[1]


# Checkpoints that are refused


@pytest.mark.parametrize(
    "changes", [{"origin": {"noise_floor": 0.1}}, {"learning_rate": 0.02}, {"batch_size": 16}, {"parts": 2}]
)
def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    stopped(tmp_path, 13)
    kept = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"line\.ckpt is of another recipe.*delete the checkpoint"):
        run(tmp_path, **changes)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == kept


def test_fewer_steps_than_were_done_are_refused(tmp_path: Path) -> None:
    """What is returned would not be what was asked for."""
    stopped(tmp_path, 13)
    with pytest.raises(ValueError, match=r"line\.ckpt has done 13 steps, and the recipe asks for 12"):
        run(tmp_path, steps=12)


@pytest.mark.parametrize(
    "content", [b"", b"torn", b"PK\3\4" + bytes(500), None], ids=["", "text", "zip", "old"]
)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "line.ckpt"
    if content is None:
        torch.save({"model": {}, "step": 3}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"line\.ckpt is no checkpoint of this version .*delete it to train afresh"
    ):
        run(tmp_path)
