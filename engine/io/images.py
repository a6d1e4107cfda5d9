"""Images in files: PNG, JPEG, TIFF and NPY to and from tensors [C, H, W] in [-1, 1].

Integers map linearly: 0 to -1 and the type's maximum to 1. Floats keep their values.
"""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tifffile
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from alpenglow.io.files import atomic_path

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's mode "L"

_DECODING_ERRORS = (
    OSError, EOFError, SyntaxError, ValueError, KeyError, IndexError, TypeError, struct.error, zlib.error,
    Image.DecompressionBombError, tifffile.TiffFileError,
)  # fmt: skip


def read_image(path: str | Path, *, channels: int | None = None) -> Tensor:
    """Read an image as [C, H, W] float32.

    PNG, JPEG: 8 bits, and 16-bit grey PNG. TIFF: one page, uint8, uint16 or float. NPY: [H, W], [C, H, W]
    with C in 1, 2, 3, or [H, W, 3]; uint8, uint16 or float. Integers come in [-1, 1]. A float TIFF must lie
    within [-1, 1]; a float NPY is taken as it is. `channels` 1 or 3 converts (luma of ITU-R BT.601; grey
    repeated); None keeps the file's. Alpha is dropped without blending: the stored colours count, also under
    transparent pixels. EXIF orientation is applied.

    Raises ValueError when the file is missing, truncated, of an unsupported kind, or holds NaN or infinity.
    """
    path = Path(path)
    if channels not in (None, 1, 3):
        raise ValueError(f"got channels={channels}; expected 1, 3 or None (as in the file)")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"cannot read {path}: expected a name that ends in {', '.join(_READERS)}")
    if not path.is_file():
        raise ValueError(f"cannot read {path}: no such file")
    image = torch.from_numpy(_to_units(reader(path), path))
    if not image.isfinite().all():
        raise ValueError(f"{path} holds NaN or infinity; replace them before reading")
    return image if channels is None else _convert_channels(image, channels, path)


def write_image(path: str | Path, image: Tensor) -> None:
    """Write an image [C, H, W] atomically.

    PNG: C = 1 or 3, clipped to [-1, 1], 8 bits. TIFF (C = 1 or 3) and NPY (any C, [C, H, W]): float32, exact.
    Raises ValueError on another shape or suffix, and on NaN or infinity; then nothing is written.
    """
    path = Path(path)
    writer = _WRITERS.get(path.suffix.lower())
    if writer is None:
        raise ValueError(f"cannot write {path}: expected a name that ends in {', '.join(_WRITERS)}")
    if image.ndim != 3 or image.is_complex():
        raise ValueError(
            f"got a {image.dtype} tensor of shape {tuple(image.shape)}; expected a real image [C, H, W]"
        )
    if image.shape[0] not in (1, 3) and writer is not _write_npy:
        raise ValueError(
            f"{path.suffix} holds 1 or 3 channels, got {image.shape[0]}; write .npy, or the magnitude"
        )
    array = image.detach().to("cpu", torch.float32).numpy()
    if not np.isfinite(array).all():
        raise ValueError(f"the image for {path} holds NaN or infinity; nothing was written")
    with atomic_path(path) as temporary:
        writer(temporary, array)


def _unreadable(path: Path, error: Exception) -> ValueError:
    if isinstance(error, UnidentifiedImageError):
        return ValueError(f"cannot read {path}: its content is not a {path.suffix} image")
    return ValueError(f"cannot read {path}: {error} (truncated, damaged, or of an unsupported kind)")


def _read_pillow(path: Path) -> np.ndarray:
    """[1 or 3, H, W], uint8 or uint16."""
    try:
        with Image.open(path) as file:
            file.load()
            _refuse_deep_colour(path, file)
            picture = ImageOps.exif_transpose(file)
    except _DECODING_ERRORS as error:
        raise _unreadable(path, error) from error
    if picture.mode == "I;16":
        return np.array(picture, dtype=np.uint16)[None]
    if picture.mode in ("1", "L", "LA", "La"):
        return np.array(picture.convert("LA").getchannel("L"))[None]
    return np.array(picture.convert("RGBA").convert("RGB")).transpose(2, 0, 1)


def _refuse_deep_colour(path: Path, file: Image.Image) -> None:
    # Pillow reads 16-bit colour PNG as 8 bits without a word; bytes 24 and 25 of the header tell.
    if file.format == "PNG":
        with path.open("rb") as stream:
            depth, colour = stream.read(26)[24:]
        if depth == 16 and colour != 0:
            raise ValueError("a 16-bit PNG with colour or alpha would lose 8 bits here; save it as TIFF")


def _read_tiff(path: Path) -> np.ndarray:
    """[C, H, W] in the file's own type."""
    try:
        with tifffile.TiffFile(path) as file:
            series = file.series[0]
            axes, photometric = series.axes, file.pages[0].photometric  # type: ignore[union-attr]
            if len(file.series) != 1 or axes not in ("YX", "YXS", "SYX"):
                raise ValueError(f"axes {axes} in {len(file.series)} series; expected one grey or RGB page")
            if photometric not in (tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.RGB):
                raise ValueError(f"photometric {photometric!r}; expected MINISBLACK or RGB")
            array = series.asarray()
    except _DECODING_ERRORS as error:
        raise _unreadable(path, error) from error
    array = {"YX": array[None], "SYX": array, "YXS": np.moveaxis(array, -1, 0)}[axes]
    array = array[: 1 if photometric == tifffile.PHOTOMETRIC.MINISBLACK else 3]  # the rest is alpha
    if array.dtype.kind == "f" and (array.min() < -1 or array.max() > 1):
        raise ValueError(
            f"{path} holds floats from {array.min():.4g} to {array.max():.4g}; expected [-1, 1]: rescale it, "
            "or save an .npy, which is taken as it is"
        )
    return array


def _read_npy(path: Path) -> np.ndarray:
    """[C, H, W] in the file's own type."""
    try:
        array = np.load(path, allow_pickle=False)
    except _DECODING_ERRORS as error:
        raise _unreadable(path, error) from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path} is an archive of arrays (.npz); save the one image with numpy.save")
    if array.ndim == 2:
        return array[None]
    if array.ndim == 3 and array.shape[0] in (1, 2, 3):
        return array
    if array.ndim == 3 and array.shape[2] == 3:
        return np.moveaxis(array, -1, 0)
    raise ValueError(
        f"{path} has shape {array.shape}; expected [H, W], [C, H, W] with C in 1, 2, 3, or [H, W, 3]"
    )


def _to_units(array: np.ndarray, path: Path) -> np.ndarray:
    if array.size == 0:
        raise ValueError(f"{path} holds an empty image of shape {array.shape}")
    if array.dtype.kind == "u" and array.dtype.itemsize <= 2:
        return (array.astype(np.float64) * (2 / np.iinfo(array.dtype).max) - 1).astype(np.float32)
    if array.dtype.kind == "f":
        return array.astype(np.float32)  # always a copy: the tensor must own native, writable memory
    raise ValueError(
        f"{path} holds {array.dtype}; expected uint8, uint16 or float (a complex image: stack real and "
        "imaginary part as 2 channels)"
    )


def _convert_channels(image: Tensor, channels: int, path: Path) -> Tensor:
    if image.shape[0] == channels:
        return image
    if image.shape[0] == 2:
        raise ValueError(f"{path} holds 2 channels (complex); read it with channels=None")
    if channels == 3:
        return image.repeat(3, 1, 1)
    return torch.einsum("c,chw->hw", torch.tensor(LUMA), image)[None]


def _write_png(path: Path, array: np.ndarray) -> None:
    levels = np.rint((np.clip(array, -1, 1) + 1) * 127.5).astype(np.uint8)
    Image.fromarray(levels[0] if len(levels) == 1 else levels.transpose(1, 2, 0)).save(path, format="PNG")


def _write_tiff(path: Path, array: np.ndarray) -> None:
    if len(array) == 1:
        tifffile.imwrite(path, array[0], photometric="minisblack", compression="zlib")
    else:
        pixels = np.ascontiguousarray(array.transpose(1, 2, 0))
        tifffile.imwrite(path, pixels, photometric="rgb", compression="zlib")


def _write_npy(path: Path, array: np.ndarray) -> None:
    np.save(path, array, allow_pickle=False)


_READERS: dict[str, Callable[[Path], np.ndarray]] = {
    ".png": _read_pillow, ".jpg": _read_pillow, ".jpeg": _read_pillow,
    ".tif": _read_tiff, ".tiff": _read_tiff, ".npy": _read_npy,
}  # fmt: skip
_WRITERS: dict[str, Callable[[Path, np.ndarray], None]] = {
    ".png": _write_png, ".tif": _write_tiff, ".tiff": _write_tiff, ".npy": _write_npy,
}  # fmt: skip
