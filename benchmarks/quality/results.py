"""Files of results that a run goes on from: JSON of settings and entries, written after every entry."""

import json
import platform
from pathlib import Path
from typing import Any

import torch

from alpenglow._version import __version__
from alpenglow.io.files import atomic_path


def machine() -> dict[str, Any]:
    """What figures of cost depend on."""
    return {
        "alpenglow": __version__,
        "torch": torch.__version__,
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def resume(path: Path, fresh: dict[str, Any]) -> dict[str, Any]:
    """What the file at `path` holds, `fresh` where there is none.

    Raises ValueError for another file, and for one whose "settings" are not those of `fresh`.
    """
    if not path.is_file():
        return fresh
    try:
        found = json.loads(path.read_text())
        other = {k: (v, found["settings"].get(k)) for k, v in fresh["settings"].items()}
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is no file of this benchmark ({error}); remove it") from None
    other = {name: pair for name, pair in other.items() if pair[0] != pair[1]}
    if other:
        differences = ", ".join(f"{name} {was!r}, now {now!r}" for name, (now, was) in other.items())
        raise ValueError(
            f"{path} was made with other settings: {differences}. Give the same ones to go on with it, or "
            "remove it, or write elsewhere with -o"
        )
    return found


def write(path: Path, results: dict[str, Any]) -> None:
    """Write the file, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n")
