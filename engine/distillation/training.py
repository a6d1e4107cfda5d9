"""A resumable training loop: same steps, same batches, same weights; killed or not, one process or many."""

import copy
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
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
    """What the moving average keeps at step 0, 1, ..: then step t weighs t^power (EDM2, equation 127)."""
    return (step / (step + 1)) ** (power + 1)


def _save(path: Path, state: dict[str, Any]) -> None:
    try:
        with atomic_path(path) as temporary:
            torch.save(state, temporary)
    # torch.save turns a full disk into a RuntimeError of its zip writer.
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"could not write the checkpoint {path} ({error}); the one before it is whole. Make room and "
            "start the same command again: it goes on from there"
        ) from error


def _cut_log(log: Path, last: int) -> None:
    """Drop the lines after step `last`, which will be written again, and a line that a kill tore."""
    kept = []
    for line in log.read_text().splitlines() if log.is_file() else []:
        try:
            if json.loads(line)["step"] <= last:
                kept.append(line + "\n")
        except ValueError:
            continue
    with atomic_path(log) as temporary:
        temporary.write_text("".join(kept))


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
    checkpoint was made with lengthen the run.

    Raises ValueError for a checkpoint of another recipe, RuntimeError when the loss stops being finite and
    OSError when the disk is full, leaving the last good checkpoint.
    """
    processes = processes or Processes.alone()
    device = processes.device
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, log = folder / f"{name}.ckpt", folder / f"{name}.jsonl"
    model.to(device)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.99))
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")  # type: ignore[attr-defined]
    start, seconds_before, running, count = 0, 0.0, 0.0, 0
    # Options added later, at their defaults, and the length of the run do not make it another run.
    stage = config.model_dump(mode="json", exclude={"steps"}, exclude_defaults=True)
    identity = json.dumps({"seed": seed, "stage": stage, "origin": dict(origin or {})}, sort_keys=True)
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        if state["origin"] != identity:
            raise ValueError(
                f"{checkpoint} is of another recipe, {state['origin']}; this one is {identity}. "
                "Give another folder, or delete the checkpoint to train afresh"
            )
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        start, seconds_before = state["step"], state["seconds"]
        running, count = state["running"], state["count"]
        if processes.first:
            _cut_log(log, start)

    began = last_saved = time.monotonic()

    def seconds() -> float:
        return seconds_before + time.monotonic() - began

    def save(step: int) -> None:
        state = {
            "model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(), "step": step, "seconds": seconds(), "running": running,
            "count": count, "origin": identity,
        }  # fmt: skip
        _save(checkpoint, state)

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    shown = processes.first and sys.stderr.isatty()
    steps = range(start, config.steps)
    with Progress(*columns, disable=not shown, console=Console(stderr=True)) as progress:
        task = progress.add_task(name, total=config.steps, completed=start, loss="-")
        for step, batch in zip(steps, batches(steps), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            value = _step(model, loss, batch.to(device), config, optimizer, scaler, processes, seed + step)
            if not math.isfinite(value):
                raise RuntimeError(
                    f"{name}: the loss is {value} at step {step}; lower learning_rate. "
                    f"{checkpoint} holds the last good state"
                )
            with torch.no_grad():
                for average, parameter in zip(ema.parameters(), model.parameters(), strict=True):
                    average.lerp_(parameter, 1 - ema_decay(step, config.ema_power))
            running, count = running + value, count + 1
            if not processes.first:
                continue
            if (step + 1) % LOG_STEPS == 0 or step + 1 == config.steps:
                record = {
                    "step": step + 1, "loss": running / count, "lr": learning_rate(step, config),
                    "seconds": round(seconds(), 1),
                }  # fmt: skip
                with log.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                progress.update(task, loss=f"{running / count:.5f}")
                running, count = 0.0, 0
            progress.update(task, completed=step + 1)
            if time.monotonic() - last_saved > checkpoint_seconds:
                save(step + 1)
                last_saved = time.monotonic()
    if start < config.steps and processes.first:
        save(config.steps)
    processes.wait()
    return ema


def _step(
    model: nn.Module,
    loss: Loss,
    batch: Batch,
    config: StageConfig,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,  # type: ignore[name-defined]
    processes: Processes,
    seed: int,
) -> float:
    """One step of Adam; returns the loss over all processes, NaN (and no step) where a gradient is not finite."""
    torch.manual_seed(seed)  # dropout
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for part in batch.split(config.parts):
        value = loss(model, part) / config.parts
        scaler.scale(value).backward()
        total += value.item()
    scaler.unscale_(optimizer)
    processes.average_gradients(model)
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    # In float16 a gradient that overflows is the scaler's to mend: it skips the step and halves its scale.
    if not torch.isfinite(norm) and not scaler.is_enabled():
        return math.nan
    scaler.step(optimizer)
    scaler.update()
    return processes.mean(total)
