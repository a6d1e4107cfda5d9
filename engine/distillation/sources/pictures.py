"""One picture a file: PNG, JPEG and TIFF."""

import struct
from pathlib import Path

import PIL.Image
import tifffile
from torch import Tensor

from alpenglow.distillation.sources.recent import Recent
from alpenglow.distillation.sources.units import SkipError
from alpenglow.io import read_image

TIFF = (".tif", ".tiff")


class Picture:
    """The one image of a file, decoded when it is asked for. Raises SkipError where it cannot be read."""

    def __init__(self, path: Path, recent: Recent) -> None:
        self.path, self.recent = path, recent
        # The header alone: a folder may hold a million files.
        try:
            if path.name.lower().endswith(TIFF):
                with tifffile.TiffFile(path) as file:
                    file.pages[0]
            else:
                with PIL.Image.open(path):
                    pass
        except (OSError, ValueError, LookupError, struct.error, PIL.Image.DecompressionBombError) as error:
            raise SkipError(f"cannot read {path}: {error}") from None

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Tensor:
        try:
            return self.recent.get(self.path, lambda: read_image(self.path))
        except (ValueError, OSError) as error:
            raise SkipError(str(error)) from None
