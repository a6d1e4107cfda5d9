"""Where training images come from: one file a kind of source."""

from alpenglow.distillation.config import DataConfig
from alpenglow.distillation.sources.base import ImageSource
from alpenglow.distillation.sources.brain import BrainSlices
from alpenglow.distillation.sources.files import read_files
from alpenglow.distillation.sources.indexed import IndexedSource
from alpenglow.distillation.sources.fashion import fashion_mnist

__all__ = ["BrainSlices", "ImageSource", "IndexedSource", "open_source"]

NAMED = {"fashion-mnist": fashion_mnist, "brain": BrainSlices}


def open_source(config: DataConfig) -> ImageSource:
    """The images that a recipe asks for. Raises ValueError where there are none that fit."""
    if config.source in NAMED:
        return NAMED[config.source]()
    return read_files(config)
