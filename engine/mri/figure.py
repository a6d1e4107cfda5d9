"""One slice as a page: image, uncertainty, samples, and a zoom on where it is the most uncertain."""

from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.nn import functional

from alpenglow.io.files import atomic_path
from alpenglow.plotting import FAINT, INK, PIXELS_PER_INCH, STD_MAP
from alpenglow.posterior import Posterior

_PANEL, _GAP, _TOP, _HEADING, _BAR, _FOOT = 2.3, 0.12, 0.42, 0.26, 0.42, 0.3  # inches
_FRAME = "#35c9b8"
_ZOOM = 4
"""The zoom shows one over so much of both sides."""
_OBJECT = 0.1
"""Share of the brightest magnitude above which a pixel counts as object."""


@dataclass(frozen=True)
class _Panel:
    """heading; image [h, w]; colour map; its limit; whether the box of the zoom is drawn."""

    heading: str
    image: Tensor
    colours: str
    limit: float
    boxed: bool = False


def plot_slice(posterior: Posterior, path: str | Path, *, title: str = "", level: float = 0.9) -> None:
    """Draw a posterior of complex images [2, H, W] into a PNG file, atomically, as magnitudes.

    Upper row: MMSE image, MAP image (if there is one) and samples, grey, on one scale. Lower row: standard
    deviation, error of the mean (with a truth; on the same scale) or relative standard deviation, width of
    the interval of probability `level`. On the right both zoom in on the square of the object that is the
    most uncertain. Every colour bar is in the units of the image. Raises ValueError for other images and
    without samples.
    """
    moduli = posterior.magnitude()
    mean, std = moduli.mean[0].cpu(), moduli.std[0].cpu()
    assert moduli.samples is not None
    samples = [image[0].cpu() for image in moduli.samples[:3]]
    found = None if moduli.map_image is None else moduli.map_image[0].cpu()
    bright, wide = _limit(mean), _limit(std)
    box = _most_uncertain(mean, std)
    shown = [("MMSE: mean of the samples", mean, True)]
    shown += [] if found is None else [("MAP", found, False)]
    shown += [(f"sample {i + 1}", image, False) for i, image in enumerate(samples)]
    upper = [_Panel(heading, image, "gray", bright, boxed) for heading, image, boxed in shown[:4]]
    upper.append(_Panel("MMSE, zoom", _cut(mean, box), "gray", bright))
    lower_bound, upper_bound = (bound[0].cpu() for bound in moduli.interval(level))
    width = upper_bound - lower_bound.clamp(min=0)
    lower = [_Panel("standard deviation", std, STD_MAP, wide, True)]
    if moduli.truth is None:
        relative = torch.where(mean > _OBJECT * bright, std / mean.clamp(min=1e-12), 0.0)
        lower.append(_Panel("std / mean, within the object", relative, STD_MAP, _limit(relative)))
    else:
        error = (mean - moduli.truth[0].cpu()).abs()
        lower.append(_Panel("error of the mean", error, STD_MAP, wide))
    lower.append(_Panel(f"width of the {100 * level:.0f} % interval", width, STD_MAP, _limit(width)))
    lower.append(_Panel("sample 1, zoom", _cut(samples[0], box), "gray", bright))
    lower.append(_Panel("std, zoom", _cut(std, box), STD_MAP, wide))
    figure = _draw([upper, lower], box, title, _footer(posterior))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=PIXELS_PER_INCH, facecolor="white")


def _limit(image: Tensor) -> float:
    """Where a scale ends: a few stray pixels would darken all others."""
    return image.flatten().quantile(0.998).item() or 1.0


def _most_uncertain(mean: Tensor, std: Tensor) -> tuple[int, int, int]:
    """(row, column, side) of the square of the object with the largest mean variance."""
    side = max(1, min(mean.shape) // _ZOOM)
    inside = (mean > _OBJECT * _limit(mean)).float()
    variance = functional.avg_pool2d((std.square() * inside)[None], side, stride=1)[0]
    row, column = divmod(int(variance.argmax()), variance.shape[1])
    return row, column, side


def _cut(image: Tensor, box: tuple[int, int, int]) -> Tensor:
    row, column, side = box
    return image[row : row + side, column : column + side]


def _footer(posterior: Posterior) -> str:
    settings = posterior.settings
    scan = settings.get("scan", {})
    parts = [
        f"{posterior.num_samples} samples", f"{posterior.nfe:.0f} NFE each",
        *(str(settings[key]) for key in ("method", "prior") if key in settings),
    ]  # fmt: skip
    if "noise_std" in scan:
        parts.append(f"noise std {scan['noise_std']:.4g} ({scan['noise']})")
    return "   ".join(parts)


def _draw(rows: list[list[_Panel]], box: tuple[int, int, int], title: str, footer: str) -> Figure:
    # Positions in inches, so that panels of both rows stand below each other whatever their bars say.
    height, width = rows[0][0].image.shape
    tall = _PANEL * min(2.0, max(0.5, height / width))
    across, pitch = _GAP + _PANEL, _HEADING + tall + _BAR
    columns = max(map(len, rows))
    wide, high = _GAP + columns * across, _TOP + len(rows) * pitch + _FOOT
    figure = Figure(figsize=(wide, high))

    def place(left: float, down: float, w: float, h: float) -> Axes:
        return figure.add_axes((left / wide, 1 - (down + h) / high, w / wide, h / high))

    for number, row in enumerate(rows):
        down = _TOP + number * pitch + _HEADING
        for column, panel in enumerate(row):
            # The zooms stand last also where there are fewer panels.
            left = _GAP + (column if column < len(row) - 1 else columns - 1) * across
            axes = place(left, down, _PANEL, tall)
            axes.imshow(
                panel.image.numpy(), cmap=panel.colours, vmin=0, vmax=panel.limit, interpolation="nearest"
            )
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            axes.set_title(panel.heading, fontsize=9, color=INK, pad=4)
            if panel.boxed:
                axes.add_patch(
                    Rectangle((box[1] - 0.5, box[0] - 0.5), box[2], box[2], fill=False, color=_FRAME, lw=1.1)
                )
            bar = figure.colorbar(
                ScalarMappable(Normalize(0, panel.limit), panel.colours),
                cax=place(left + 0.1, down + tall + 0.07, _PANEL - 0.2, 0.07),
                orientation="horizontal",
            )
            bar.outline.set_visible(False)
            bar.locator = MaxNLocator(4)
            bar.ax.tick_params(labelsize=7, color=FAINT, labelcolor=FAINT, length=2)
    figure.text(_GAP / wide, 1 - 0.26 / high, title, fontsize=11.5, color=INK)
    figure.text(_GAP / wide, 0.1 / high, footer, fontsize=8, color=FAINT)
    return figure
