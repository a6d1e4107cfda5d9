"""Libraries that only some formats need."""

import importlib
from typing import Any


def require(module: str, purpose: str) -> Any:
    """The library `module`; ValueError with the line that installs it where it cannot be imported."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"{purpose} needs the library {module} ({error}): pip install 'alpenglow[mri]'"
        ) from None
