"""`alpenglow demo`: held-out images with half of their pixels hidden, in one picture and a few figures."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alpenglow.api import find_map, sample
from alpenglow.evaluation import evaluate
from alpenglow.io.folders import atomic_folder
from alpenglow.jobs import simulate, with_floor
from alpenglow.operator_specs import random_mask
from alpenglow.operators import Inpainting
from alpenglow.plotting import plot_posteriors
from alpenglow.posterior import Posterior
from alpenglow.priors.protocol import Prior, noise_floor

HELD_OUT = "fashion-28-test.npz"
KEEP, NOISE_STD = 0.5, 0.05
MAP_ITERATIONS = 60  # past these the picture does not change, and the demo has a minute
BATCH_SIZE = 64  # images through the network at once: the samples of a demo, a fifth faster than in sixteens
COLUMNS = ["image", "PSNR (dB)", "SSIM", "MAP PSNR", "coverage of 90 %", "NFE", "seconds"]


@dataclass(frozen=True)
class Figures:
    """One image of the demo: quality against the truth, NFE a sample, and seconds for samples and MAP."""

    psnr: float
    ssim: float
    map_psnr: float
    coverage: float
    nfe: float
    seconds: float


def held_out_images() -> Tensor:
    """The Fashion-MNIST test images of the package, [64, 1, 28, 28] in [-1, 1]; never trained on."""
    with (files("alpenglow.priors.zoo") / HELD_OUT).open("rb") as stream, np.load(stream) as archive:
        return torch.from_numpy(archive["images"]).float()[:, None] / 127.5 - 1


def run(
    prior: Prior,
    folder: str | Path,
    *,
    map_prior: Prior | None = None,
    images: Tensor | None = None,
    count: int = 2,
    num_samples: int = 64,
    nfe: int = 50,
    seed: int = 0,
    progress: Callable[[float], None] = lambda share: None,
) -> list[Figures]:
    """Inpaint the first `count` held-out images; write demo.png and demo-<i>.h5 to `folder`, all or nothing.

    They get the prior's noise floor, each pixel is hidden with probability 1/2, and the others have noise of
    std 0.05. map_prior: the same
    prior, quick with one image at a time. images: [N, C, H, W] in [-1, 1] in place of the package's own.
    progress: called with the share of work done. Raises ValueError for images that the prior cannot take.
    """
    images = held_out_images() if images is None else images
    if tuple(images.shape[1:]) != tuple(prior.image_shape):
        raise ValueError(
            f"the demo's images are {tuple(images.shape[1:])}, the prior takes {tuple(prior.image_shape)}: "
            "use the prior fashion-28, or `alpenglow reconstruct` with an image of your own"
        )
    if not 1 <= count <= len(images):
        raise ValueError(f"got {count} images; expected 1 to {len(images)}")
    if num_samples < 2:
        raise ValueError(f"num_samples is {num_samples}; expected at least 2, one sample has no spread")

    def report(done: float, part: float) -> Callable[[float], None]:
        return lambda share: progress((done + part * share) / count)

    posteriors, measurements, figures = [], [], []
    with atomic_folder(folder) as place:
        for i, truth in enumerate(with_floor(images[:count], noise_floor(prior), seed)):
            operator = Inpainting(random_mask(prior.image_shape, KEEP, seed + i))
            y = simulate(operator, truth, NOISE_STD, seed + i)
            began = time.perf_counter()
            posterior = sample(
                prior, operator, y, noise_std=NOISE_STD, num_samples=num_samples, nfe=nfe, seed=seed + i,
                progress=report(i, 0.9),
            )  # fmt: skip
            estimate = find_map(
                map_prior or prior, operator, y, noise_std=NOISE_STD, max_iterations=MAP_ITERATIONS,
                progress=report(i + 0.9, 0.1),
            )  # fmt: skip
            seconds = time.perf_counter() - began
            posterior = posterior.with_map(estimate.image).with_truth(truth)
            posterior.save(place / f"demo-{i}.h5")
            figures.append(_figures(posterior, truth, seconds))
            posteriors.append(posterior)
            measurements.append(_visible(y, operator))
        plot_posteriors(
            posteriors,
            place / "demo.png",
            measurements=measurements,
            labels=[f"test image {i}" for i in range(count)],
            title=f"Half of the pixels hidden, noise std {NOISE_STD}: {num_samples} posterior samples",
        )
    return figures


def rows(figures: list[Figures]) -> list[list[Any]]:
    """The figures under COLUMNS, one row an image."""
    return [_row(str(i), f) for i, f in enumerate(figures)]


def total(figures: list[Figures]) -> list[Any]:
    """The last row: means, and the seconds of all images together."""
    means = {
        name: float(np.mean([getattr(f, name) for f in figures])) for name in Figures.__dataclass_fields__
    }
    return _row("all", Figures(**means | {"seconds": sum(f.seconds for f in figures)}))


def _row(name: str, f: Figures) -> list[Any]:
    return [
        name, f"{f.psnr:.2f}", f"{f.ssim:.3f}", f"{f.map_psnr:.2f}", f"{100 * f.coverage:.1f} %",
        f"{f.nfe:.0f}", f"{f.seconds:.1f}",
    ]  # fmt: skip


def _figures(posterior: Posterior, truth: Tensor, seconds: float) -> Figures:
    quality = evaluate(posterior, truth, level=0.9)
    names = ("psnr", "ssim", "map_psnr", "coverage")
    return Figures(**{name: quality[name] for name in names}, nfe=posterior.nfe, seconds=seconds)


def _visible(y: Tensor, operator: Inpainting) -> Tensor:
    """The measurement with hidden pixels black, as grey, their 0, would look like data."""
    return torch.where(operator.mask, y, -1.0)
