"""Files of results that a run goes on from: JSON of settings and entries, written after every entry.

An entry's "network" is the digest of what its method ran on, so that a run with other weights measures it
again, and only it; None of a method without a network.
"""

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alpenglow._version import __version__
from alpenglow.io.files import atomic_path
from alpenglow.priors.network import NetworkPrior

MEASUREMENTS = 2
"""Raised when the same settings come to mean other measurements, so that a file never holds both.

1: noise, its floor and masks of one seed had the same random numbers, which spoilt real measurements; of
k-space of several coils and noise floors the correlation is within its standard error.
"""


def machine() -> dict[str, Any]:
    """What figures of cost depend on."""
    return {
        "alpenglow": __version__,
        "torch": torch.__version__,
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def resume(path: Path, settings: dict[str, Any], **more: Any) -> dict[str, Any]:
    """What the file at `path` holds; where there is none, `more` and no entries, for these settings.

    Makes its folder: a place that cannot be written is known before anything is measured, by an OSError.
    Raises ValueError for another file, and for one of other settings or measurements.
    """
    settings = settings | {"measurements": MEASUREMENTS}
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        return more | {"settings": settings, "machine": machine(), "entries": []}
    try:
        found = json.loads(path.read_text())
        other = {k: (v, found["settings"].get(k)) for k, v in settings.items()}
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


def age(settings: dict[str, Any]) -> str:
    """A sentence, after a space, for a page of measurements that are no longer made; else nothing."""
    if settings.get("measurements") == MEASUREMENTS:
        return ""
    return (
        " Measured with the random numbers of an earlier version, so a run of today makes other "
        "measurements, and begins a file of its own."
    )


def write(path: Path, results: dict[str, Any]) -> None:
    """Write the file, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n")


def digest(network: nn.Module, *header: object) -> str:
    """Of a network's weights, and what its file says besides them."""
    found = hashlib.sha256(repr(header).encode())
    for name, parameter in network.state_dict().items():
        found.update(name.encode() + parameter.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def prior_digest(prior: NetworkPrior) -> str:
    """Of all that the samples of an energy prior depend on."""
    return digest(prior.denoiser, prior.sigma_range, prior.gradient_error, prior.noise_floor)


def is_measured(results: dict[str, Any], row: Any, method: str, network: str | None) -> bool:
    """Whether there is an entry of this row and method, on this network."""
    found = _entry(results, row, method)
    return found is not None and found.get("network") == network


def record(results: dict[str, Any], entry: dict[str, Any]) -> None:
    """Add an entry, in place of the one of its row and method."""
    found = _entry(results, entry["row"], entry["method"])
    if found is None:
        results["entries"].append(entry)
    else:
        results["entries"][results["entries"].index(found)] = entry


def _entry(results: dict[str, Any], row: Any, method: str) -> dict[str, Any] | None:
    return next((e for e in results["entries"] if (e["row"], e["method"]) == (row, method)), None)
