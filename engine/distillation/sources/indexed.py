"""Training images from anything with a length and items, a torch Dataset say."""

import math
import random
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from alpenglow.distillation.sources.units import SkipError, to_units

# Crops are scaled down by at most this factor: reading larger ones costs more than training on them.
LARGEST_SCALE = 8
# So many images in a row that cannot be used are no accident.
TRIES = 100
# So many images say which shape the others are expected to have.
VOTES = 9


class Items(Protocol):
    """A map-style torch Dataset: item i is always the same image, or a tuple that begins with it."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


class IndexedSource:
    """Random items of `items`, whole or as random square crops, read when they are drawn.

    items: a map-style torch Dataset of images, as `to_units` takes them. `held_out`: the indices that
    training never sees; by default the last 5 %, at least one. `image_size`: side of crops that are taken
    from a random place at a random scale, from one image pixel to a pixel up to eight, half of them mirrored.

    Images have the shape (of crops: the channels) that most of a few have. One of another shape, one that
    raises SkipError or OSError, and one (of crops: a crop) that holds NaN or infinity is passed over; the
    1st, 10th, 100th .. such image warns.

    Raises ValueError for fewer than two items, for held-out indices that do not exist or are all there are,
    when no held-out image can be used, and when no training image or none of a hundred in a row can be.
    """

    def __init__(
        self,
        items: Items,
        *,
        held_out: Sequence[int] | None = None,
        image_size: int | None = None,
        description: str = "",
    ) -> None:
        self.items, self.image_size, self.description = items, image_size, description
        self.training, self.held = _split(len(items), held_out)
        self._unusable: set[int] = set()
        """Of the training images, those that no crop can make usable."""
        self._noted: set[int] = set()
        self._why = ""
        self.image_shape = self._commonest_shape()
        # Now rather than after hours of training.
        self.draw(torch.Generator())
        self.held_out(1)

    def draw(self, generator: torch.Generator) -> Tensor:
        for _ in range(TRIES):
            index = self._pick(generator)
            image = self._load(index)
            if image is None:
                self._unusable.add(index)
            elif (view := self._view(index, image, generator)) is not None:
                return view
        raise ValueError(f"{TRIES} images in a row could not be used; {self._why}")

    def held_out(self, count: int) -> Tensor:
        """The first `count` held-out images, fewer where there are no more; of crops, `count`."""
        found = list(islice(self._held_views(), count))
        if not found:
            raise ValueError(f"none of the {len(self.held)} held-out images can be used; {self._why}")
        return torch.stack(found)

    def _pick(self, generator: torch.Generator) -> int:
        """A random training image. Known bad ones are not read again, but cost the random number they did."""
        while len(self._unusable) < len(self.training):
            index = self.training[int(torch.randint(len(self.training), (), generator=generator))]
            if index not in self._unusable:
                return index
        raise ValueError(f"none of the {len(self.training)} training images can be used; {self._why}")

    def _held_views(self) -> Iterator[Tensor]:
        """Held-out images in turn; crops of them without end."""
        generator = torch.Generator().manual_seed(0)
        more = True
        while more:
            more = False
            for index in self.held:
                image = self._load(index)
                view = None if image is None else self._view(index, image, generator)
                if view is not None:
                    more = self.image_size is not None
                    yield view

    def _commonest_shape(self) -> tuple[int, int, int]:
        """Of a few images from everywhere: the first may be the odd one."""
        votes: Counter[tuple[int, int, int]] = Counter()
        for index in random.Random(0).sample(self.training, min(TRIES, len(self.training))):
            if (image := self._read(index)) is not None:
                channels, height, width = image.shape
                side = self.image_size
                votes[(channels, side, side) if side else (channels, height, width)] += 1
            if votes.total() == VOTES:
                break
        if not votes:
            raise ValueError(f"none of the training images can be used; {self._why}")
        return votes.most_common(1)[0][0]

    def _read(self, index: int) -> Tensor | None:
        try:
            return to_units(self.items[index])
        except (SkipError, OSError) as error:
            self._note(index, str(error))
            return None

    def _load(self, index: int) -> Tensor | None:
        """The whole image, if it has the shape of the others."""
        image = self._read(index)
        if image is None:
            return None
        if self.image_size is None:
            fits = tuple(image.shape) == self.image_shape
        else:
            fits = len(image) == self.image_shape[0] and min(image.shape[1:]) >= self.image_size
        if fits:
            return image
        expected = "x".join(map(str, self.image_shape)) + (" or larger" if self.image_size else "")
        self._note(index, f"it is {'x'.join(map(str, image.shape))}, expected {expected}")
        return None

    def _view(self, index: int, image: Tensor, generator: torch.Generator) -> Tensor | None:
        """What is drawn of an image: a crop, or a copy that the caller may write to."""
        view = image.clone() if self.image_size is None else self._crop(image, self.image_size, generator)
        # Looked at after cropping: the whole photograph may be a hundred times larger.
        if view.isfinite().all():
            return view
        self._note(index, "it holds NaN or infinity")
        return None

    def _note(self, index: int, why: str) -> None:
        self._why = f"image {index}, for one: {why}"
        if index in self._noted:
            return
        self._noted.add(index)
        count = len(self._noted)
        if count in (10**power for power in range(10)):
            warnings.warn(f"image {index} is skipped ({count} so far): {why}", stacklevel=4)

    @staticmethod
    def _crop(image: Tensor, size: int, generator: torch.Generator) -> Tensor:
        """A random square of [C, H, W], mirrored or not, as [C, size, size]."""
        largest = min(*image.shape[1:], LARGEST_SCALE * size)
        scale = torch.rand((), generator=generator).item()
        side = round(size * math.exp(scale * math.log(largest / size)))
        top, left = (
            int(torch.randint(extent - side + 1, (), generator=generator)) for extent in image.shape[1:]
        )
        crop = image[None, :, top : top + side, left : left + side]
        if torch.rand((), generator=generator) < 0.5:
            crop = crop.flip(3)
        # A whole factor by block means first: it costs a tenth of the filter that does the rest.
        crop = F.avg_pool2d(crop, side // size)
        return F.interpolate(crop, (size, size), mode="bilinear", antialias=True)[0]


def _split(count: int, held_out: Sequence[int] | None) -> tuple[Sequence[int], Sequence[int]]:
    """The indices of training and the held-out ones."""
    if count < 2:
        raise ValueError(f"the data holds {count} images; expected two or more, some are held out")
    if held_out is None:
        first = count - max(1, count // 20)
        return range(first), range(first, count)
    held = dict.fromkeys(held_out)
    strange = [index for index in held if not 0 <= index < count]
    if strange:
        raise ValueError(f"held_out names image {strange[0]}; expected 0 to {count - 1}")
    training = [index for index in range(count) if index not in held]
    if not training or not held:
        raise ValueError(f"{len(held)} of {count} images are held out; expected some, not all")
    return training, list(held)
