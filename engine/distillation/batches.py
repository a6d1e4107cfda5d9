"""Training batches whose image i of step t depends on (seed, t, i) alone.

So a resumed run sees what an unbroken one would have seen, and a run on many processes what one would.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from alpenglow.distillation.augment import AUGMENT_DIM, augment
from alpenglow.distillation.config import Recipe, StageConfig
from alpenglow.distillation.losses import draw_sigma
from alpenglow.distillation.sources import ImageSource
from alpenglow.random_streams import random_stream


class Batch(NamedTuple):
    """Clean images [B, C, H, W], levels sigma [B], standard normal noise [B, C, H, W]."""

    clean: Tensor
    sigma: Tensor
    noise: Tensor
    augmentation: Tensor
    """What was done to each image, [B, 9]; zero where nothing was."""
    classes: Tensor
    """One-hot class labels [B, K]; K = 0 for a network without classes."""

    @property
    def noisy(self) -> Tensor:
        return self.clean + self.sigma[:, None, None, None] * self.noise

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))

    def split(self, parts: int) -> Iterator["Batch"]:
        """`parts` batches of equal size, one after the other."""
        for tensors in zip(*(tensor.chunk(parts) for tensor in self), strict=True):
            yield Batch(*tensors)


def image_generator(seed: int, step: int, index: int) -> torch.Generator:
    """The random numbers of image `index` of a training step."""
    return random_stream(seed, step, index)


class Batches(Dataset[Batch]):
    """Item t is the share of step t's batch that process `rank` of `count` works on.

    Raises ValueError for a batch that does not divide into processes and parts.
    """

    def __init__(
        self,
        source: ImageSource,
        recipe: Recipe,
        stage: StageConfig,
        *,
        seed: int,
        label_dim: int = 0,
        rank: int = 0,
        count: int = 1,
    ) -> None:
        if stage.batch_size % (count * stage.parts):
            raise ValueError(
                f"batch_size is {stage.batch_size}; expected a multiple of {count * stage.parts} "
                f"({count} processes times {stage.parts} parts)"
            )
        self.source, self.seed, self.label_dim = source, seed, label_dim
        self.floor, self.law, self.augment = recipe.data.noise_floor, recipe.sigma, stage.augment
        share = stage.batch_size // count
        self.indices = range(rank * share, (rank + 1) * share)

    def __getitem__(self, step: int) -> Batch:
        images = [self._image(image_generator(self.seed, step, index), index) for index in self.indices]
        return Batch(*(torch.stack(parts) for parts in zip(*images, strict=True)))

    def _image(self, generator: torch.Generator, index: int) -> tuple[Tensor, ...]:
        clean = self.source.draw(generator)
        augmentation = torch.zeros(AUGMENT_DIM)
        if self.augment:
            clean, augmentation = augment(clean, self.augment, generator)
        # Without a floor quantised images have no density: their energy would be minus infinity on a lattice.
        clean = clean + self.floor * torch.randn(clean.shape, generator=generator)
        sigma = draw_sigma(self.law, index, generator)
        noise = torch.randn(clean.shape, generator=generator)
        classes = torch.zeros(self.label_dim)
        if self.label_dim:
            classes[int(torch.randint(self.label_dim, (), generator=generator))] = 1
        return clean, sigma, noise, augmentation, classes


def stream(batches: Batches, steps: range, workers: int) -> Iterator[Batch]:
    """The batches of `steps`, in order, prepared by `workers` processes (0: in this one)."""
    return iter(
        DataLoader(
            batches,
            batch_size=None,
            sampler=steps,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
        )
    )
