"""A tiny data set and recipe for the tests of distillation."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alpenglow.distillation.batches import Batch, image_generator
from alpenglow.networks.denoiser import EDMDenoiser

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


def discs() -> np.ndarray:
    """100 images of 8x8, uint8: bright discs at random places."""
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:8, :8]
    centres = random.uniform(1, 6, (100, 2, 1, 1))
    distance = np.hypot(rows - centres[:, 0], columns - centres[:, 1])
    return np.uint8(255 * np.clip(3 - distance, 0, 1))


def recipe_fields(folder: Path, **changes: Any) -> dict[str, Any]:
    """The recipe `tiny` for folder/images.npy, as YAML takes it."""
    stage = {"batch_size": 8, "learning_rate": 3e-3, "warmup_steps": 5}
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


def same_weights(a: Any, b: Any) -> bool:
    """Whether two modules have the same state, bit by bit."""
    states = a.state_dict(), b.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][k], states[1][k]) for k in states[0]
    )


def randomise(denoiser: EDMDenoiser, seed: int = 0) -> None:
    """Give every weight a say: those of the initial network nearly ignore its input."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def random_denoiser(seed: int = 0, **network: Any) -> EDMDenoiser:
    """The tiny network, randomised."""
    denoiser = EDMDenoiser.from_config(
        {"backbone": "SongUNet", "network": NETWORK | network, "sigma_data": 0.7, "patch": 2}
    )
    randomise(denoiser, seed)
    return denoiser


def logged(log: Path) -> list[tuple[int, float, float]]:
    """Step, loss and learning rate of each line of a training log."""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    return [(record["step"], record["loss"], record["lr"]) for record in records]


def line_batches(steps: range) -> Iterator[Batch]:
    """Batches for `line_loss`: `clean` [8, 3, 1, 1] is all that matters."""
    for step in steps:
        x = torch.randn(8, 3, 1, 1, generator=image_generator(3, step, 0))
        yield Batch(x, torch.ones(8), torch.zeros_like(x), torch.zeros(8, 9), torch.zeros(8, 0))


def line_loss(model: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
    """That of a linear regression, of the sum of three numbers on them."""
    x = batch.clean.flatten(1)
    return (model(x) - x.sum(1, keepdim=True)).square().mean()
