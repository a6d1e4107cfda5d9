"""Training images: reading, the noise floor, and batches that depend on the step alone."""

import gzip
import struct
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

FASHION_FOLDERS = (Path("/usr/share/datasets/fashion-mnist"), Path("data/fashion-mnist"))
FASHION_FILES = {"train": "train-images-idx3-ubyte.gz", "test": "t10k-images-idx3-ubyte.gz"}


def read_idx(path: Path) -> np.ndarray:
    """Read a gzipped IDX file of unsigned bytes (the MNIST format); ValueError if it is not one."""
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a readable gzip file ({error}); fetch the data set again") from None
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is not an IDX file of unsigned bytes")
    if len(raw) < 4 + 4 * raw[3]:
        raise ValueError(f"{path} ends in its header; it is truncated")
    shape = struct.unpack(f">{raw[3]}I", raw[4 : 4 + 4 * raw[3]])
    pixels = np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3])
    if pixels.size != np.prod(shape):
        raise ValueError(f"{path} holds {pixels.size} bytes, its header promises {shape}; it is truncated")
    return pixels.reshape(shape)


def load_images(source: str, split: Literal["train", "test"] = "train") -> Tensor:
    """Images as uint8 [N, C, H, W] from 'fashion-mnist' or a .npy file.

    Raises ValueError when the source is missing or is not a stack of 8-bit images.
    """
    if source == "fashion-mnist":
        for folder in FASHION_FOLDERS:
            if (path := folder / FASHION_FILES[split]).is_file():
                return torch.from_numpy(read_idx(path).copy())[:, None]
        raise ValueError(
            "Fashion-MNIST was not found in " + " or ".join(map(str, FASHION_FOLDERS)) + "; run `make data`, "
            "or install the Debian package dataset-fashion-mnist"
        )
    path = Path(source)
    if path.suffix != ".npy" or not path.is_file():
        raise ValueError(f"data source {source!r} is neither 'fashion-mnist' nor an existing .npy file")
    try:
        images = np.load(path, allow_pickle=False)
        if not isinstance(images, np.ndarray):
            raise ValueError("it is an archive of arrays (.npz)")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a readable .npy array: {error}") from None
    if images.ndim == 3:
        images = images[:, None]
    if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
        raise ValueError(
            f"{path} holds {images.dtype} {images.shape}; expected uint8 [N, H, W] or [N, C, H, W] with N > 0"
        )
    return torch.from_numpy(images)


def to_units(images: Tensor) -> Tensor:
    """uint8 grey levels to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of a training step, so that a resumed run repeats an unbroken one."""
    return torch.Generator().manual_seed((seed << 32) + step)


def training_batch(images: Tensor, size: int, noise_floor: float, generator: torch.Generator) -> Tensor:
    """`size` random images [size, C, H, W] in [-1, 1] plus the noise floor.

    Quantised images have no density: their energy would be minus infinity on a lattice. A floor of a
    few grey levels gives the prior a scale below which it claims to know nothing.
    """
    index = torch.randint(len(images), (size,), generator=generator)
    batch = to_units(images[index])
    return batch + noise_floor * torch.randn(batch.shape, generator=generator)
