"""Figures of posteriors: one row each, with truth, measurement, mean, MAP, std, error and samples."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from alpenglow.evaluation import psnr
from alpenglow.io.files import atomic_path
from alpenglow.posterior import Posterior

STD_MAP = "magma"  # perceptually uniform, and dark where the image is certain
PIXELS_PER_INCH = 160
ERROR = "|mean − truth|"
_CELL, _GAP, _LEFT, _TOP, _TITLE, _CAPTION, _BAR = 1.55, 0.05, 0.62, 0.32, 0.3, 0.24, 0.36  # inches
INK, FAINT = "#1c1c22", "#6b6b76"


@dataclass(frozen=True)
class _Panel:
    """One cell: what to show, how, and a line below it."""

    heading: str
    image: Tensor
    uncertainty: bool = False  # on the shared scale of std and error
    caption: str = ""


def plot_posteriors(
    posteriors: Sequence[Posterior],
    path: str | Path,
    *,
    measurements: Sequence[Tensor | None] | None = None,
    labels: Sequence[str] | None = None,
    title: str | None = None,
    max_samples: int = 4,
) -> None:
    """Draw one row per posterior into a PNG file, atomically.

    Columns, where known: truth, measurement, mean, MAP, std, absolute error of the mean, and the first
    `max_samples` samples. Images of one channel are grey and of three RGB, both clipped to [-1, 1]; of two
    channels (complex) the magnitude is shown, from 0 to the largest of its row. Std and error combine
    channels by root mean square (complex: root sum of squares) and share one scale, so that they compare.
    measurements: an image [C, H, W] (of any size), or complex k-space [..., H, W], shown as log magnitude.
    labels: one a row; the operator and method of its settings if not given. Raises ValueError on empty input
    or lengths that do not match.
    """
    posteriors = list(posteriors)
    measurements = [None] * len(posteriors) if measurements is None else list(measurements)
    labels = [_label(posterior) for posterior in posteriors] if labels is None else list(labels)
    if not posteriors or not len(posteriors) == len(measurements) == len(labels):
        raise ValueError(
            f"got {len(posteriors)} posteriors, {len(measurements)} measurements and {len(labels)} labels; "
            "expected the same number, at least 1"
        )
    if max_samples < 0:
        raise ValueError(f"max_samples must be 0 or more, got {max_samples}")
    rows = [_panels(p, y, max_samples) for p, y in zip(posteriors, measurements, strict=True)]
    figure = _draw(rows, labels, title)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=PIXELS_PER_INCH, facecolor="white")


def _label(posterior: Posterior) -> str:
    parts = [str(posterior.settings[key]) for key in ("operator", "method") if key in posterior.settings]
    return "\n".join([*parts, f"{posterior.num_samples} samples, {posterior.nfe:.0f} NFE"])


def _panels(posterior: Posterior, measurement: Tensor | None, max_samples: int) -> list[_Panel]:
    truth, mean = posterior.truth, posterior.mean
    panels = []
    if truth is not None:
        panels.append(_Panel("truth", truth))
    if measurement is not None:
        panels.append(_Panel("measurement", measurement))
    panels.append(_Panel("mean", mean, caption=_quality(mean, truth)))
    if posterior.map_image is not None:
        panels.append(_Panel("MAP", posterior.map_image, caption=_quality(posterior.map_image, truth)))
    known = truth is not None and posterior.effective_samples > 1
    coverage = f"90 % interval covers {100 * posterior.coverage(level=0.9):.0f} %" if known else ""
    panels.append(_Panel("std", _combine(posterior.std), uncertainty=True, caption=coverage))
    if truth is not None:
        panels.append(_Panel(ERROR, _combine(mean - truth.to(mean.device)), uncertainty=True))
    samples = posterior.reservoir if posterior.samples is None else posterior.samples
    for i, sample in enumerate([] if samples is None else samples[:max_samples]):
        panels.append(_Panel(f"sample {i + 1}", sample))
    return panels


def _quality(image: Tensor, truth: Tensor | None) -> str:
    # PSNR has a fixed peak for images in [-1, 1]; a magnitude in scanner units has none.
    if truth is None or len(image) == 2:
        return ""
    return f"{psnr(image, truth.to(image.device)):.1f} dB"


def _combine(deviation: Tensor) -> Tensor:
    """Channels [C, H, W] of a std or a difference as one map [1, H, W]."""
    squared = deviation.square()
    return (squared.sum(0, keepdim=True) if len(deviation) == 2 else squared.mean(0, keepdim=True)).sqrt()


def _magnitude(image: Tensor) -> Tensor:
    return image.square().sum(0).sqrt()


def _uncertainty_limit(rows: list[list[_Panel]]) -> float:
    values = torch.cat(
        [p.image.detach().flatten().cpu().float() for row in rows for p in row if p.uncertainty]
    )
    values = values[values.isfinite()]
    # The top half percent would darken everything else for a few stray pixels.
    limit = float(np.quantile(values.numpy(), 0.995)) if len(values) else 0.0
    return limit or 1.0


def _headings(rows: list[list[_Panel]]) -> list[str]:
    present = {panel.heading for row in rows for panel in row}
    samples = sorted((h for h in present if h.startswith("sample ")), key=lambda h: int(h.split()[1]))
    return [h for h in ("truth", "measurement", "mean", "MAP", "std", ERROR) if h in present] + samples


def _draw(rows: list[list[_Panel]], labels: Sequence[str], title: str | None) -> Figure:
    # Positions are set in inches: an automatic layout shifts the columns that share the colour bar.
    headings = _headings(rows)
    image = next(panel.image for panel in rows[0] if panel.heading == "mean")
    cell_height = _CELL * min(2.0, max(0.5, image.shape[-2] / image.shape[-1]))
    lefts, right = [], _LEFT
    for previous, heading in zip(["", *headings], headings, strict=False):
        right += _GAP * (3 if heading in ("std", "sample 1") and previous else 1)
        lefts.append(right)
        right += _CELL
    row_height = cell_height + _CAPTION
    top = _TOP + (_TITLE if title else 0)
    width, height = right + 2 * _GAP, top + len(rows) * row_height + _BAR
    figure = Figure(figsize=(width, height))

    def place(left: float, down: float, wide: float, high: float) -> Axes:
        return figure.add_axes((left / width, 1 - (down + high) / height, wide / width, high / height))

    limit = _uncertainty_limit(rows)
    for number, (row, label) in enumerate(zip(rows, labels, strict=True)):
        down = top + number * row_height
        magnitude = max((_magnitude(p.image).max().item() for p in row if _is_complex_image(p)), default=1.0)
        for panel in row:
            cell = place(lefts[headings.index(panel.heading)], down, _CELL, cell_height)
            _draw_panel(cell, panel, limit, magnitude)
        lines = "\n".join(textwrap.fill(line, int(cell_height * 16)) for line in label.splitlines())
        figure.text(
            (_LEFT - 0.02) / width, 1 - (down + cell_height / 2) / height, lines, rotation=90, fontsize=7.5,
            color=INK, ha="right", va="center", multialignment="center", linespacing=1.4,
        )  # fmt: skip
    for left, heading in zip(lefts, headings, strict=True):
        figure.text(
            (left + _CELL / 2) / width,
            1 - (top - 0.07) / height,
            heading,
            fontsize=9,
            color=INK,
            ha="center",
        )
    shared = [left for left, heading in zip(lefts, headings, strict=True) if heading in ("std", ERROR)]
    bar = place(shared[0], height - _BAR + 0.04, shared[-1] + _CELL - shared[0], 0.09)
    _draw_colour_bar(figure, bar, limit)
    if title:
        figure.text(0.5, 1 - 0.24 / height, title, fontsize=11.5, color=INK, ha="center")
    return figure


def _is_complex_image(panel: _Panel) -> bool:
    image = panel.image
    return not panel.uncertainty and not image.is_complex() and image.ndim == 3 and len(image) == 2


def _draw_panel(cell: Axes, panel: _Panel, limit: float, magnitude: float) -> None:
    image = panel.image.detach().cpu()
    if panel.uncertainty:
        cell.imshow(image[0].numpy(), cmap=STD_MAP, vmin=0, vmax=limit, interpolation="nearest")
    elif image.is_complex() and image.ndim >= 2:
        power = image.abs().square().reshape(-1, *image.shape[-2:]).sum(0)
        cell.imshow((power + 1e-12 * power.max()).log().numpy(), cmap="gray", interpolation="nearest")
    elif _is_complex_image(panel):
        cell.imshow(_magnitude(image).numpy(), cmap="gray", vmin=0, vmax=magnitude, interpolation="nearest")
    elif image.ndim == 3 and len(image) == 1:
        cell.imshow(image[0].numpy(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
    elif image.ndim == 3 and len(image) == 3:
        cell.imshow(((image + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
    else:
        raise ValueError(
            f"cannot show the {panel.heading} of shape {tuple(image.shape)}; expected 1, 2 or 3 channels "
            "[C, H, W] or complex k-space [..., H, W] (leave the measurement out)"
        )
    cell.set(xticks=[], yticks=[])
    cell.spines[:].set_visible(False)
    cell.set_xlabel(panel.caption, fontsize=7.5, color=FAINT, labelpad=3)


def _draw_colour_bar(figure: Figure, axes: Axes, limit: float) -> None:
    scale = ScalarMappable(Normalize(0, limit), STD_MAP)
    bar = figure.colorbar(scale, cax=axes, orientation="horizontal", extend="max", extendfrac=0.02)
    bar.outline.set_visible(False)
    bar.locator = MaxNLocator(5)
    bar.ax.tick_params(labelsize=7.5, color=FAINT, labelcolor=FAINT, length=2)
