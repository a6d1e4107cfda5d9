"""Reading and writing images and results."""

from alpenglow.io.files import atomic_path
from alpenglow.io.images import read_image, write_image

__all__ = ["atomic_path", "read_image", "write_image"]
