"""A resumable training loop: same steps, same batches, same weights, killed or not."""

import copy
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
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

from alpenglow.distillation.config import StageConfig
from alpenglow.distillation.data import step_generator
from alpenglow.io.files import atomic_path

Loss = Callable[[nn.Module, torch.Generator], Tensor]


def learning_rate(step: int, config: StageConfig) -> float:
    """Linear warm-up, then cosine decay to zero."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def _save(path: Path, state: dict[str, Any]) -> None:
    with atomic_path(path) as temporary:
        torch.save(state, temporary)


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
    config: StageConfig,
    folder: Path,
    *,
    seed: int,
    recipe: Mapping[str, Any] | None = None,
    checkpoint_seconds: float = 60.0,
) -> nn.Module:
    """Train `model` in place by `loss(model, generator)`; returns its moving average.

    Writes folder/<name>.ckpt (atomically, every `checkpoint_seconds`) and folder/<name>.jsonl with one line a
    hundred steps; when the checkpoint exists, goes on from it, and at once returns a finished stage.
    `recipe`: all that the outcome depends on, as JSON takes it; a checkpoint keeps it. Raises ValueError for
    a checkpoint of another recipe or seed, RuntimeError when the loss stops being finite, leaving the last
    good checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, log = folder / f"{name}.ckpt", folder / f"{name}.jsonl"
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.99))
    start, seconds_before = 0, 0.0
    running, count = 0.0, 0
    origin = json.dumps(
        {"seed": seed, "stage": config.model_dump(mode="json"), "recipe": dict(recipe or {})}, sort_keys=True
    )
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        if state["origin"] != origin:
            raise ValueError(
                f"{checkpoint} is of another recipe, {state['origin']}; this one is {origin}. "
                "Give another folder, or delete the checkpoint to train afresh"
            )
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        start, seconds_before = state["step"], state["seconds"]
        running, count = state["running"], state["count"]
        _cut_log(log, start)

    began = last_saved = time.monotonic()

    def state_at(step: int) -> dict[str, Any]:
        return {
            "model": model.state_dict(),
            "ema": ema.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "seconds": seconds_before + time.monotonic() - began,
            "running": running,
            "count": count,
            "origin": origin,
        }

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, disable=not sys.stderr.isatty(), console=Console(stderr=True)) as progress:
        task = progress.add_task(name, total=config.steps, completed=start, loss="-")
        for step in range(start, config.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            optimizer.zero_grad(set_to_none=True)
            value = loss(model, step_generator(seed, step))
            value.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            if not torch.isfinite(norm):
                raise RuntimeError(
                    f"{name}: the loss is {value.item()} at step {step}; lower learning_rate. "
                    f"{checkpoint} holds the last good state"
                )
            optimizer.step()
            # A short average at first: the initial weights should not linger.
            decay = min(0.5 ** (1 / config.ema_halflife_steps), (step + 1) / (step + 10))
            with torch.no_grad():
                for average, parameter in zip(ema.parameters(), model.parameters(), strict=True):
                    average.lerp_(parameter, 1 - decay)
            running, count = running + value.item(), count + 1
            if (step + 1) % 100 == 0 or step + 1 == config.steps:
                with log.open("a") as file:
                    record = {
                        "step": step + 1,
                        "loss": running / count,
                        "lr": learning_rate(step, config),
                        "seconds": round(seconds_before + time.monotonic() - began, 1),
                    }
                    file.write(json.dumps(record) + "\n")
                progress.update(task, loss=f"{running / count:.5f}")
                running, count = 0.0, 0
            progress.update(task, completed=step + 1)
            if time.monotonic() - last_saved > checkpoint_seconds:
                _save(checkpoint, state_at(step + 1))
                last_saved = time.monotonic()
    if start < config.steps:
        _save(checkpoint, state_at(config.steps))
    return ema
