"""What a training set is to the pipeline: random images on request, and others that training never sees."""

from typing import Protocol

import torch
from torch import Tensor


class ImageSource(Protocol):
    """Images [C, H, W] in the prior's units; random numbers come from the caller's generator alone."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        ...

    @property
    def description(self) -> str:
        """For the model card: what the images are, whence, under which licence, and what is held out."""
        ...

    def draw(self, generator: torch.Generator) -> Tensor:
        """A random training image, float32 [C, H, W]."""
        ...

    def held_out(self, count: int) -> Tensor:
        """At most `count` images that `draw` never gives, float32 [count, C, H, W]; always the same ones."""
        ...
