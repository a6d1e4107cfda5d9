"""An item of a data set, whatever its type, as a float32 image [C, H, W] in the prior's units."""

from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

PIXELS = "uint8, uint16, bool, float or complex"


class SkipError(ValueError):
    """An item that is to be passed over: unreadable, of another size, or blank."""


def is_pixels(dtype: np.dtype) -> bool:
    """Whether numbers of this type are pixels, PIXELS: of a wider or a signed integer nobody knows white."""
    return dtype.kind in "bfc" or (dtype.kind == "u" and dtype.itemsize <= 2)


def to_units(item: Any) -> Tensor:
    """A tensor, array or PIL image, or a tuple that begins with one, as float32 [C, H, W].

    uint8 and uint16 map linearly, 0 to -1 and the type's maximum to 1, and bool likewise; floats stay as they
    are; a complex image [H, W] or [1, H, W] becomes two channels. Tensors are [C, H, W] or [H, W]; arrays may
    also carry up to four channels last. Alpha and palettes of PIL images are resolved as `read_image` does.

    Raises SkipError for anything else.
    """
    image = item[0] if isinstance(item, tuple | list) and item else item
    if isinstance(image, PIL.Image.Image):
        image = _from_pillow(image)
    if not isinstance(image, Tensor):
        image = _from_array(np.asarray(image), type(image).__name__)
    image = image[None] if image.ndim == 2 else image
    if image.ndim != 3 or image.numel() == 0:
        raise SkipError(f"it has the shape {tuple(image.shape)}, expected [C, H, W] or [H, W]")
    if image.is_complex():
        if len(image) != 1:
            raise SkipError(f"it is complex with {len(image)} channels, expected one: combine the coils")
        return torch.cat([image.real, image.imag]).float()
    if image.is_floating_point():
        return image.float()
    if image.dtype not in (torch.bool, torch.uint8, torch.uint16):
        raise SkipError(f"it holds {image.dtype}, expected {PIXELS}")
    white = 1 if image.dtype == torch.bool else torch.iinfo(image.dtype).max
    return image.float() * (2 / white) - 1


def _from_pillow(picture: PIL.Image.Image) -> np.ndarray:
    """[H, W] or [3, H, W]."""
    if picture.mode.startswith(("I", "F")):
        return np.asarray(picture)
    if picture.mode in ("1", "L", "LA", "La"):
        return np.asarray(picture.convert("LA").getchannel("L"))
    # By way of RGBA: from a palette with transparency Pillow goes no other way.
    return np.asarray(picture.convert("RGBA").convert("RGB")).transpose(2, 0, 1)


def _from_array(array: np.ndarray, name: str) -> Tensor:
    """The same numbers in memory of the tensor's own and in the machine's byte order, channels first."""
    if not is_pixels(array.dtype):
        raise SkipError(f"it is a {name} of {array.dtype}, expected an image of {PIXELS}")
    # Wider floats than torch knows are narrowed here.
    wanted = {"f": np.dtype(np.float32), "c": np.dtype(np.complex64)}.get(array.dtype.kind)
    if array.ndim == 3 and array.shape[2] <= 4 < array.shape[0]:
        array = array.transpose(2, 0, 1)
    # What overflows is infinity then, and found as such.
    with np.errstate(over="ignore"):
        return torch.from_numpy(np.array(array, wanted or array.dtype.newbyteorder("="), order="C"))
