"""What there is to say of a machine, a prior, an image file and a result, as names and values."""

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alpenglow._version import __version__
from alpenglow.evaluation import evaluate
from alpenglow.export.manifest import is_bundle, read_manifest
from alpenglow.io import read_image
from alpenglow.io.files import atomic_path
from alpenglow.networks.storage import read_denoiser
from alpenglow.posterior import Posterior
from alpenglow.priors import hub
from alpenglow.priors.loading import ZOO, load_denoiser, load_prior, zoo_names

if TYPE_CHECKING:
    from alpenglow.distillation.sources import ImageSource

LEVEL = 0.9


def machine() -> dict[str, Any]:
    """Versions, device and threads."""
    facts: dict[str, Any] = {"alpenglow": __version__, "python": platform.python_version()}
    for package in ("torch", "triton", "numpy", "onnxruntime", "tensorrt"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    cuda = torch.cuda.is_available()
    return facts | {
        "device": torch.cuda.get_device_name() if cuda else f"cpu, {platform.machine()}",
        "threads": torch.get_num_threads(),
    }


def zoo() -> dict[str, str]:
    """Each prior of the package with its image shape."""
    found = {name: prior(name) for name in zoo_names()}
    return {name: f"images {facts['image shape']}" for name, facts in found.items()} or {"(empty)": ""}


def prior(source: str) -> dict[str, Any]:
    """What a bundle, a zoo prior, a .safetensors file or a prior of the hub says of itself."""
    if is_bundle(source):
        return _bundle(source)
    if source.startswith(hub.PREFIX):
        return _header(hub.fetch(source))
    if source in zoo_names():
        with as_file(files(ZOO) / f"{source}.safetensors") as path:
            return _header(path)
    if Path(source).suffix != ".safetensors":
        load_prior(source)  # knows what to say of other names and files
    return _header(Path(source))


def _bundle(folder: str) -> dict[str, Any]:
    manifest = read_manifest(folder)
    engines = ", ".join(f"{e.flavour} {e.version} for {e.gpu or e.capabilities}" for e in manifest.engines)
    return {
        "name": manifest.name,
        "image shape": "x".join(map(str, manifest.image_shape)),
        "units": manifest.units,
        "sigma range": f"{manifest.sigma_range[0]:g} to {manifest.sigma_range[1]:g}",
        "precision": manifest.precision,
        "class": manifest.class_label,
        "engines": engines or None,
        "largest error": max(manifest.parity.values()),
        "error measured by": manifest.parity_runtime,
    }


def _header(path: Path) -> dict[str, Any]:
    denoiser, metadata = read_denoiser(path)
    network = metadata.denoiser
    return {
        "name": metadata.name,
        "kind": metadata.kind,
        "image shape": "x".join(map(str, metadata.image_shape)),
        "units": metadata.units,
        "sigma range": f"{metadata.sigma_range[0]:g} to {metadata.sigma_range[1]:g}",
        "sigma_data": network.sigma_data,
        "patch": network.patch,
        "network": f"{network.backbone}, {sum(p.numel() for p in denoiser.parameters()):,} parameters",
        "size": f"{path.stat().st_size / 1e6:.2f} MB",
    } | {key: value for key, value in metadata.extra.items() if isinstance(value, str | int | float)}


def image(path: Path) -> dict[str, Any]:
    """Shape and range of an image file, as `reconstruct` reads it. Raises ValueError where it cannot."""
    pixels = read_image(path)
    return {
        "shape": "x".join(map(str, pixels.shape)),
        "range": f"{pixels.min():.4g} to {pixels.max():.4g} (black is -1, white 1)",
        "mean": pixels.mean().item(),
        "std": pixels.std().item(),
    }


def result(posterior: Posterior, truth: Tensor | None) -> dict[str, Any]:
    """Figures of a posterior: cost, diagnostics, and quality where the truth [C, H, W] is known."""
    known = posterior.diagnostics
    facts: dict[str, Any] = {}
    if truth is not None:
        figures = evaluate(posterior, truth, level=LEVEL)
        facts = {
            "PSNR": f"{figures['psnr']:.2f} dB",
            "SSIM": f"{figures['ssim']:.3f}",
            "coverage": f"{figures['coverage']:.3f} of pixels in the {100 * LEVEL:.0f} % interval",
            "interval width": figures["interval_width"],
            "error correlation": figures["error_correlation"],
        }
        if "map_psnr" in figures:
            facts |= {"MAP PSNR": f"{figures['map_psnr']:.2f} dB", "MAP SSIM": f"{figures['map_ssim']:.3f}"}
    std = posterior.std
    facts |= {
        "image": "x".join(map(str, std.shape)),
        "std": f"{std.median():.4g} median, {std.max():.4g} max",
        "samples": posterior.num_samples,
        "ess": f"{posterior.effective_samples:.0f}",
        "NFE": f"{posterior.nfe:g} a sample",
        "seconds": known.get("seconds"),
    }
    if "r_hat_max" in known:
        facts["r_hat"] = f"{known['r_hat_median']:.3f} median, {known['r_hat_max']:.3f} max"
    if "target_met" in known:
        missed = f"missed: {known['chains_needed']:.0f} samples needed"
        facts["target error"] = "met" if known["target_met"] else missed
    return facts | {name: known[name] for name in ("acceptance", "modes", "resamplings") if name in known}


def compare(
    source: str,
    teacher: Path,
    data: str | None,
    sigmas: Sequence[float] | None,
    output: Path | None = None,
) -> list[dict[str, Any]]:
    """Rows of a prior against its teacher, one a level, on held-out images.

    data: a recipe (.yaml), or what a recipe's `source` may be; None: the package's own images. With `output`
    everything is measured (minutes), and <name>-evaluation.md and its pictures are written to that folder.
    Raises ValueError for images that do not fit the prior.
    """
    from alpenglow.distillation.card import quality, write_pictures
    from alpenglow.distillation.evaluation import DEFAULT_SIGMAS, evaluate_prior, report_prior

    loaded, denoiser = load_prior(source), load_denoiser(teacher)
    images, floor = _held_out(data)
    if images.image_shape != loaded.image_shape:
        raise ValueError(
            f"got images {images.image_shape}; {source} takes {loaded.image_shape}: give held-out "
            "images of that shape with --data"
        )
    if output is None:
        return evaluate_prior(loaded, denoiser, images.held_out(256), sigmas or DEFAULT_SIGMAS)
    report = report_prior(loaded, denoiser, images, noise_floor=floor, sigmas=sigmas or DEFAULT_SIGMAS)
    output.mkdir(parents=True, exist_ok=True)
    write_pictures(output, loaded.name, report)
    with atomic_path(output / f"{loaded.name}-evaluation.md") as temporary:
        temporary.write_text(quality(report, loaded.name), encoding="utf-8")
    return report.levels


def _held_out(data: str | None) -> "tuple[ImageSource, float]":
    """The images, and the noise floor of the recipe that names them; of a plain file or folder, all."""
    from torch.utils.data import ConcatDataset

    from alpenglow.demo import held_out_images
    from alpenglow.distillation.config import DataConfig, load_recipe
    from alpenglow.distillation.sources import IndexedSource, open_source
    from alpenglow.distillation.sources.indexed import Items

    def all_of(items: Items) -> IndexedSource:
        # A source trains on some of its images, so it gets them twice; nobody trains here.
        twice: ConcatDataset[Any] = ConcatDataset([items, items])  # type: ignore[list-item]
        return IndexedSource(twice, held_out=range(len(items)))

    if data is None:
        return all_of(held_out_images()), 0.0
    if Path(data).suffix in (".yaml", ".yml"):
        config = load_recipe(data).data
        return open_source(config), config.noise_floor
    source = open_source(DataConfig.model_validate({"source": data}))
    if Path(data).exists() and isinstance(source, IndexedSource):
        source = all_of(source.items)
    return source, 0.0
