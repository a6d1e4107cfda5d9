"""Priors from files of `save_denoiser`: the zoo of the package, one's own, those of the Hugging Face hub."""

from importlib.resources import as_file, files
from pathlib import Path

import torch

from alpenglow.networks.denoiser import EDMDenoiser
from alpenglow.networks.storage import Metadata, read_denoiser, save_denoiser
from alpenglow.priors import hub
from alpenglow.priors.network import PRECISIONS, NetworkPrior, Precision

__all__ = ["load_denoiser", "load_prior", "save_denoiser", "zoo_names"]

ZOO = "alpenglow.priors.zoo"
FOREIGN = (".pkl", ".pt", ".pth", ".ckpt")


def zoo_names() -> list[str]:
    """Names of the priors that come with the package."""
    return sorted(
        entry.name.removesuffix(".safetensors")
        for entry in files(ZOO).iterdir()
        if entry.name.endswith(".safetensors")
    )


def load_prior(
    source: str | Path,
    *,
    device: torch.device | str | None = None,
    precision: Precision = "float32",
    batch_size: int | None = None,
    class_label: int | None = None,
) -> NetworkPrior:
    """An energy prior in torch, from a zoo name, a .safetensors file or the Hugging Face hub.

    `alpenglow.load_prior` takes these and exported bundles. device: None for the CPU.

    The hub: `hub:owner/name`, with `@revision` after it for a branch, tag or commit, and `/file.safetensors`
    after the name where the repository holds several (see alpenglow.priors.hub.fetch).

    `precision` float32 or float64; float16 and bfloat16 run the network in half precision (for GPUs).
    `batch_size` images go through the network at once (None: see NetworkPrior). `class_label`: the class, for
    a class-conditional network. Raises ValueError when the source is missing, damaged, foreign or no energy
    prior, and for options that this version does not have.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; expected one of {', '.join(PRECISIONS)}")
    target = as_device(device)
    denoiser, metadata = _read(source)
    if metadata.kind != "energy":
        raise ValueError(
            f"{source} holds a {metadata.kind}, a plain denoiser without an energy; sampling needs an energy "
            "prior: distill one with `alpenglow distill` (load_denoiser loads the teacher itself)"
        )
    return NetworkPrior(
        denoiser.to(target),
        metadata.image_shape,
        name=metadata.name,
        sigma_range=metadata.sigma_range,
        gradient_error=metadata.gradient_error,
        noise_floor=metadata.noise_floor,
        metadata=metadata.model_dump(by_alias=True),
        batch_size=batch_size,
        precision=precision,
        class_label=class_label,
    )


def load_denoiser(source: str | Path, *, device: torch.device | str | None = None) -> EDMDenoiser:
    """The float32 network of a teacher or an energy prior, frozen, in evaluation mode.

    Raises ValueError for a source that is missing, damaged or foreign.
    """
    target = as_device(device)
    return _read(source)[0].to(target)


def _read(source: str | Path) -> tuple[EDMDenoiser, Metadata]:
    if str(source).startswith(hub.PREFIX):
        return read_denoiser(hub.fetch(str(source)))
    path = Path(source)
    if path.is_dir():
        raise ValueError(
            f"{source} is a folder and no bundle, which has a manifest.json; give one of `alpenglow "
            f"export`, a .safetensors file, or a name of the zoo ({_known()})"
        )
    if path.suffix.lower() in FOREIGN:
        raise ValueError(
            f"{source} is a foreign checkpoint; turn it into .safetensors with "
            f"`alpenglow convert {source} {path.stem}.safetensors`"
        )
    if path.is_file() or path.suffix == ".safetensors" or len(path.parts) > 1:
        return read_denoiser(path)
    if str(source) not in zoo_names():
        raise ValueError(
            f"no prior {str(source)!r}: the zoo has {_known()}, and there is no such file; "
            "give a zoo name, the path of a .safetensors file, or hub:owner/name"
        )
    with as_file(files(ZOO) / f"{source}.safetensors") as zoo_file:
        return read_denoiser(zoo_file)


def _known() -> str:
    return ", ".join(zoo_names()) or "no priors in this build"


def as_device(device: torch.device | str | None) -> torch.device:
    """The device, None for the CPU, "cuda" as "cuda:0"; ValueError for one that is not here."""
    try:
        return torch.empty(0, device=device or "cpu").device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {str(device)!r} cannot be used here: {reason}; try device='cpu'") from None
