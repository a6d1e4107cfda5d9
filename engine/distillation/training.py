"""A resumable training loop: same steps, same batches, same weights; killed or not, one process or many."""

import copy
import json
import math
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn

from alpenglow.distillation.batches import Batch
from alpenglow.distillation.config import StageConfig
from alpenglow.distillation.processes import Processes
from alpenglow.io.files import atomic_path

Loss = Callable[[nn.Module, Batch], Tensor]
LOG_STEPS = 100


def learning_rate(step: int, config: StageConfig) -> float:
    """Linear warm-up, then constant, then falling as the inverse square root of the step (EDM2)."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    return config.learning_rate * warmup / math.sqrt(max(1.0, step / config.decay_steps))


def ema_decay(step: int, power: float) -> float:
    """What the moving average keeps at step 0, 1, ..: the t-th step then weighs t^power (EDM2, equation 127).

    To be exact, t^(power + 1) - (t - 1)^(power + 1).
    """
    return (step / (step + 1)) ** (power + 1)


def train(
    name: str,
    model: nn.Module,
    loss: Loss,
    batches: Callable[[range], Iterator[Batch]],
    config: StageConfig,
    folder: Path,
    *,
    seed: int = 0,
    origin: Mapping[str, Any] | None = None,
    processes: Processes | None = None,
    checkpoint_seconds: float = 60.0,
) -> nn.Module:
    """Train `model` in place by `loss(model, batch)`, a mean over images; returns its moving average.

    `batches(range of steps)` gives this process its share of each step's batch. Writes folder/<name>.ckpt
    (atomically, every `checkpoint_seconds`) and folder/<name>.jsonl with one line a hundred steps; when the
    checkpoint exists, goes on from it, and at once returns a finished stage. `origin`: all that the outcome
    depends on but `config` and `seed`, as JSON takes it; a checkpoint keeps it. More `steps` than the
    checkpoint was made with lengthen the run. `seed`: of dropout; the same for every process.

    Raises ValueError for a checkpoint of another recipe or of more steps, RuntimeError when the loss stops
    being finite and OSError when the disk is full, leaving the last good checkpoint.
    """
    processes = processes or Processes.alone()
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, log = folder / f"{name}.ckpt", folder / f"{name}.jsonl"
    run = _Run(model.to(processes.device), config, _identity(config, seed, origin))
    if checkpoint.is_file():
        run.load(checkpoint)
    if not processes.agree(run.step):
        raise ValueError(f"not all processes see the same {checkpoint}; give a folder that they share")
    if run.step == config.steps:
        return run.ema
    if processes.first:
        _cut_log(log, run.step)
        # A kill inside a save leaves its temporary file behind.
        for torn in folder.glob(f".{name}-*.ckpt"):
            torn.unlink()
    clock = saved = time.monotonic()
    steps = range(run.step, config.steps)
    with _progress(name, steps, shown=processes.first and sys.stderr.isatty()) as show:
        for step, batch in zip(steps, batches(steps), strict=True):
            value = run.advance(loss, batch.to(processes.device), processes, seed + step)
            if not math.isfinite(value):
                good = f"; {checkpoint} holds an earlier state" if checkpoint.is_file() else ""
                raise RuntimeError(
                    f"{name}: the loss or its gradient is {value} at step {step}{good}. "
                    "Lower learning_rate, and train afresh in another folder"
                )
            now = time.monotonic()
            run.seconds, clock = run.seconds + now - clock, now
            if not processes.first:
                continue
            last = run.step == config.steps
            if last or run.step % LOG_STEPS == 0:
                show(loss=f"{run.write_log(log):.5f}")
            show(completed=run.step)
            if last or now - saved > checkpoint_seconds:
                run.save(checkpoint)
                saved = now
    processes.wait()
    return run.ema


def _identity(config: StageConfig, seed: int, origin: Mapping[str, Any] | None) -> str:
    # Options added later, at their defaults, and the length of the run do not make it another run.
    stage = config.model_dump(mode="json", exclude={"steps"}, exclude_defaults=True)
    return json.dumps({"seed": seed, "stage": stage, "origin": dict(origin or {})}, sort_keys=True)


class _Run:
    """What changes while a stage trains: all that its checkpoint keeps."""

    def __init__(self, model: nn.Module, config: StageConfig, identity: str) -> None:
        self.model, self.config, self.identity = model, config, identity
        self.ema = copy.deepcopy(model).requires_grad_(False).eval()
        self.optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.99))
        self.device = next(model.parameters()).device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "float16")
        self.step, self.seconds = 0, 0.0
        # Sum and number of the losses since the last line of the log.
        self.running, self.count = 0.0, 0

    @property
    def _parts(self) -> dict[str, Any]:
        return {
            "model": self.model, "ema": self.ema, "optimizer": self.optimizer, "scaler": self.scaler,
        }  # fmt: skip

    def save(self, path: Path) -> None:
        state = {name: part.state_dict() for name, part in self._parts.items()}
        state |= {
            "step": self.step, "seconds": self.seconds, "running": self.running, "count": self.count,
            "origin": self.identity,
        }  # fmt: skip
        with _explaining(path), atomic_path(path) as temporary:
            torch.save(state, temporary)

    def load(self, path: Path) -> None:
        try:
            state = torch.load(path, weights_only=True, map_location=self.device)
            origin = state["origin"]
        except (RuntimeError, pickle.UnpicklingError, EOFError, LookupError, TypeError) as error:
            raise ValueError(
                f"{path} is no checkpoint of this version ({error}); delete it to train afresh"
            ) from None
        if origin != self.identity:
            raise ValueError(
                f"{path} is of another recipe, {origin}; this one is {self.identity}. "
                "Give another folder, or delete the checkpoint to train afresh"
            )
        if state["step"] > self.config.steps:
            raise ValueError(
                f"{path} has done {state['step']} steps, and the recipe asks for {self.config.steps}. "
                "Raise steps, or give another folder"
            )
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        self.step, self.seconds = state["step"], state["seconds"]
        self.running, self.count = state["running"], state["count"]

    def advance(self, loss: Loss, batch: Batch, processes: Processes, seed: int) -> float:
        """One step of Adam; returns the loss over all processes, NaN (and no step) where it diverges."""
        torch.manual_seed(seed)  # dropout
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.config)
        self.optimizer.zero_grad(set_to_none=True)
        value = 0.0
        for part in batch.split(self.config.parts):
            share = loss(self.model, part) / self.config.parts
            self.scaler.scale(share).backward()
            value += share.item()
        # Before they are unscaled: all processes then see an overflow in one, and skip the step together.
        processes.average_gradients(self.model)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        # In float16 a gradient may overflow by its scale alone: the scaler skips the step and halves it.
        if not torch.isfinite(norm) and self.scaler.get_scale() <= 1:
            return math.nan
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            for average, parameter in zip(self.ema.parameters(), self.model.parameters(), strict=True):
                average.lerp_(parameter, 1 - ema_decay(self.step, self.config.ema_power))
        value = processes.mean(value)
        self.step, self.running, self.count = self.step + 1, self.running + value, self.count + 1
        return value

    def write_log(self, log: Path) -> float:
        """Append a line; returns the mean loss since the one before."""
        mean = self.running / self.count
        record = {
            "step": self.step, "loss": mean, "lr": learning_rate(self.step - 1, self.config),
            "seconds": round(self.seconds, 1),
        }  # fmt: skip
        with _explaining(log), log.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            # A checkpoint that outlives a power cut must not know of lines that did not.
            os.fsync(file.fileno())
        self.running, self.count = 0.0, 0
        return mean


def _cut_log(log: Path, last: int) -> None:
    """Drop the lines after step `last`, which will be written again, and a line that a kill tore."""
    if not log.is_file():
        return
    kept = []
    for line in log.read_text(errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= last:
                kept.append(line + "\n")
        except ValueError:
            continue
    with _explaining(log), atomic_path(log) as temporary:
        temporary.write_text("".join(kept))


@contextmanager
def _explaining(path: Path) -> Iterator[None]:
    """Say of a write that failed what is left, and what to do."""
    try:
        yield
    # torch.save turns a full disk into a RuntimeError of its zip writer.
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"could not write {path} ({error}). Make room and start the same command again: it goes on from "
            "the last checkpoint, which is whole"
        ) from error


@contextmanager
def _progress(name: str, steps: range, *, shown: bool) -> Iterator[Callable[..., None]]:
    """A bar on stderr; gives show(completed=step) and show(loss=text)."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, disable=not shown, console=Console(stderr=True)) as progress:
        task = progress.add_task(name, total=steps.stop, completed=steps.start, loss="-")
        yield partial(progress.update, task)
