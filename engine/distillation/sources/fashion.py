"""Fashion-MNIST (Xiao, Rasul and Vollgraf, arXiv 1708.07747)."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch

from alpenglow.distillation.sources.indexed import IndexedSource

FOLDERS = (Path("/usr/share/datasets/fashion-mnist"), Path("data/fashion-mnist"))
FILES = ("train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz")

DESCRIPTION = """\
[Fashion-MNIST](https://github.com/zalandoresearch/fashion-mnist) (Xiao, Rasul and Vollgraf,
arXiv 1708.07747), MIT licence, from the Debian package `dataset-fashion-mnist`: the 60 000 images of its
training set, and no others. Held out: the whole test set, 10 000 images, which training never sees; the
figures below come from its first images."""


def fashion_mnist() -> IndexedSource:
    """Grey images [1, 28, 28]. Raises ValueError where the files are missing or damaged."""
    for folder in FOLDERS:
        if all((folder / name).is_file() for name in FILES):
            training, test = (read_idx(folder / name) for name in FILES)
            images = torch.from_numpy(np.concatenate([training, test]))
            return IndexedSource(images, held_out=range(len(training), len(images)), description=DESCRIPTION)
    raise ValueError(
        "Fashion-MNIST was not found in " + " or ".join(map(str, FOLDERS)) + "; run `make data`, "
        "or install the Debian package dataset-fashion-mnist"
    )


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
    if pixels.size != math.prod(shape):
        raise ValueError(f"{path} holds {pixels.size} bytes, its header promises {shape}; it is truncated")
    return pixels.reshape(shape)
