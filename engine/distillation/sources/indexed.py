"""Training images from anything with a length and items, a torch Dataset say."""

import math
import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Crops are scaled down by at most this factor: reading larger ones costs more than training on them.
LARGEST_SCALE = 8
# So many images in a row that cannot be read are no accident.
TRIES = 100


class SkipError(ValueError):
    """An item that is to be passed over: unreadable, or blank."""


class Items(Protocol):
    """A map-style torch Dataset: items are images [C, H, W] or [H, W], or tuples that begin with one."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...


class IndexedSource:
    """Random items of `items`, whole or as random square crops, read when they are drawn.

    items: a map-style torch Dataset of images [C, H, W] or [H, W] (tensors, arrays or PIL images), or of tuples that
    begin with one. Integers are scaled to [-1, 1] by the range of their type, floats taken as they are,
    complex images become two channels. `held_out`: the indices that training never sees; by default the last
    5 %, at least one. `image_size`: side of crops that are taken from a random place at a random scale, from
    one image pixel to a pixel up to eight, half of them mirrored. An item that raises SkipError, or that does not have
    `image_shape`, is passed over, with one warning.

    Raises ValueError for fewer than two items, and when a hundred items in a row are unusable.
    """

    def __init__(
        self,
        items: Items,
        *,
        held_out: Sequence[int] | None = None,
        image_size: int | None = None,
        description: str = "",
    ) -> None:
        count = len(items)
        if count < 2:
            raise ValueError(f"the data holds {count} images; expected two or more, the last 5 % are held out")
        if held_out is None:
            held_out = range(count - max(1, count // 20), count)
        kept = sorted(set(range(count)) - set(held_out))
        if not kept or not held_out:
            raise ValueError(f"{len(held_out)} of {count} images are held out; expected some, not all")
        self.items, self.image_size, self.description = items, image_size, description
        self.training, self.held = kept, list(held_out)
        self._skipped: set[int] = set()
        channels, height, width = self._first().shape
        side = image_size
        self.image_shape = (channels, height, width) if side is None else (channels, side, side)

    def draw(self, generator: torch.Generator) -> Tensor:
        for _ in range(TRIES):
            index = self.training[int(torch.randint(len(self.training), (), generator=generator))]
            image = self._usable(index)
            if image is None:
                continue
            # Looked at after cropping: the whole photograph may be a hundred times larger.
            if (image := self._crop(image, generator)).isfinite().all():
                return image
            self._skip(index, "it holds NaN or infinity")
        raise ValueError(f"{TRIES} images in a row could not be used; {self._why}")

    def held_out(self, count: int) -> Tensor:
        if self.image_size is None:
            images = (self._usable(index) for index in self.held)
            found = [image for image, _ in zip(filter(_is_image, images), range(count), strict=False)]
        else:
            # Crops: as many as asked for, from all the images in turn.
            generator = torch.Generator().manual_seed(0)
            usable = [index for index in self.held if self._usable(index) is not None]
            found = [
                self._crop(self._usable(usable[k % len(usable)]), generator) for k in range(count if usable else 0)
            ]
        if not found:
            raise ValueError(f"none of the {len(self.held)} held-out images can be used; {self._why}")
        return torch.stack(found)

    def _first(self) -> Tensor:
        for index in self.training[:TRIES]:
            try:
                return to_units(self.items[index])
            except SkipError as error:
                self._skip(index, str(error))
        raise ValueError(f"none of the first images can be used; {self._why}")

    def _usable(self, index: int) -> Tensor | None:
        try:
            image = to_units(self.items[index])
        except SkipError as error:
            return self._skip(index, str(error))
        if self.image_size is None:
            fits = tuple(image.shape) == self.image_shape
        else:
            fits = image.shape[0] == self.image_shape[0] and min(image.shape[1:]) >= self.image_size
        if fits:
            return image
        expected = "x".join(map(str, self.image_shape)) + (" or larger" if self.image_size else "")
        return self._skip(index, f"it is {'x'.join(map(str, image.shape))}, expected {expected}")

    _why = ""

    def _skip(self, index: int, why: str) -> None:
        if not self._skipped:
            warnings.warn(f"image {index} is skipped, as others of its kind will be: {why}", stacklevel=3)
        self._why = f"image {index}, for one: {why}"
        self._skipped.add(index)

    def _crop(self, image: Tensor | None, generator: torch.Generator) -> Tensor:
        assert image is not None
        if self.image_size is None:
            return image
        largest = min(*image.shape[1:], LARGEST_SCALE * self.image_size)
        scale = torch.rand((), generator=generator).item()
        side = round(self.image_size * math.exp(scale * math.log(largest / self.image_size)))
        top, left = (
            int(torch.randint(extent - side + 1, (), generator=generator)) for extent in image.shape[1:]
        )
        crop = image[None, :, top : top + side, left : left + side]
        if torch.rand((), generator=generator) < 0.5:
            crop = crop.flip(3)
        # A whole factor by block means first: it costs a tenth of the filter that does the rest.
        crop = F.avg_pool2d(crop, side // self.image_size)
        size = (self.image_size, self.image_size)
        return F.interpolate(crop, size, mode="bilinear", antialias=True)[0]


def _is_image(image: Tensor | None) -> bool:
    return image is not None


def to_units(item: Any) -> Tensor:
    """An item of a data set as float32 [C, H, W]; SkipError where it is no image.

    Integers to [-1, 1] by the range of their type, floats as they are, complex numbers as two channels.
    """
    image = item[0] if isinstance(item, tuple | list) else item
    if not isinstance(image, Tensor):
        array = np.asarray(image)
        # PIL images and arrays of photographs carry their channels last.
        image = torch.from_numpy(array.transpose(2, 0, 1).copy() if _channels_last(array) else array.copy())
    if image.is_complex():
        image = torch.stack([image.real, image.imag])
    elif not image.is_floating_point():
        image = image.float() * (2 / torch.iinfo(image.dtype).max) - 1
    image = image[None] if image.ndim == 2 else image
    if image.ndim != 3:
        raise SkipError(f"it has the shape {tuple(image.shape)}, expected [C, H, W] or [H, W]")
    return image.float()


def _channels_last(array: np.ndarray) -> bool:
    return array.ndim == 3 and array.shape[2] == 3 and array.shape[0] != 3
