"""Where training images come from: one file a kind of source."""

from collections.abc import Callable

from alpenglow.distillation.config import DataConfig
from alpenglow.distillation.sources.base import ImageSource
from alpenglow.distillation.sources.brain import BrainSlices
from alpenglow.distillation.sources.fashion import fashion_mnist
from alpenglow.distillation.sources.files import read_files
from alpenglow.distillation.sources.indexed import IndexedSource

__all__ = ["BrainSlices", "ImageSource", "IndexedSource", "open_source"]

NAMED: dict[str, Callable[[], ImageSource]] = {"fashion-mnist": fashion_mnist, "brain": BrainSlices}


def open_source(config: DataConfig) -> ImageSource:
    """The images that a recipe asks for. Raises ValueError where there are none that fit."""
    if config.source in NAMED:
        given = config.model_dump(exclude_defaults=True).keys() - {"source", "noise_floor"}
        if given:
            raise ValueError(
                f"the data source {config.source!r} takes no {', '.join(sorted(given))}: its images are what "
                "they are; leave it out"
            )
        return NAMED[config.source]()
    return read_files(config)
