"""docs/quality.md: the tables of all priors that were measured, and how far the goals are met."""

import json
import math
from pathlib import Path
from typing import Any

from alpenglow.io.files import atomic_path
from benchmarks.quality.results import age

NAMES = {
    "calibrated": "`calibrated`", "alps": "`alps`, as published", "map": "MAP",
    "dps": "DPS", "daps": "DAPS",
}  # fmt: skip
GAIN_DB, NFE_SHARE, COVERAGE = 0.5, 0.25, (0.87, 0.93)
PUBLISHED_DAPS_NFE = 1000

INTRODUCTION = """\
# Reconstructions of held-out images: quality, calibration, cost

Written by `alpenglow bench quality --prior NAME -o docs`, in a checkout of the repository (the figures are
in `docs/quality/`, one file a prior). All methods have the same measurements, and networks of one
training: `calibrated`, `alps` and MAP run on the energy prior, and the baselines on the denoiser that is
named below.

- DPS (Chung et al., ICLR 2023) and DAPS (Zhang et al., CVPR 2025) are written from their papers in
  `benchmarks/baselines/`, and tested against their update equations. Each has its published hyperparameters
  or better ones, whichever did best on training images of the same row. They were made for single samples
  that look good; their means and intervals are of as many samples as ours.
- PSNR and SSIM are of the mean over samples (MMSE; for MAP of its image), averaged over images, for a data
  range of 2, over all channels (real and imaginary part of MR images); "sample" is the mean PSNR of one
  sample. The truth is the image with the noise floor of the prior's training data.
- Coverage: the share of true pixels in the Student-t predictive interval, the same for every sampler; width:
  the mean width of that of 90 %, in the image's units.
- NFE: network evaluations a sample, everything included. One of ours is an energy and its gradient, a
  forward and a backward pass; one of DPS is a denoised image, and its step goes back through the network as
  well; one of DAPS is a denoised image, a forward pass. Seconds are for all samples of an image (without the
  search for hyperparameters): of the processor on a CPU, so that other programs do not lengthen them; left
  out where a method was measured again on another machine.
- All images of a row have one operator (its mask has one seed). Nothing is scaled to the size of the images
  but the box, whose side is half of theirs: at 28 x 28 pixels the blurs and the factor of 4 leave little.
"""


def write(output: Path) -> Path:
    """Write output/quality.md from every output/quality/*.json; its path."""
    found = [json.loads(path.read_text()) for path in sorted((output / "quality").glob("*.json"))]
    path = output / "quality.md"
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join([INTRODUCTION, *map(section, found)]), encoding="utf-8")
    return path


def section(results: dict[str, Any]) -> str:
    """The tables of one prior, in Markdown."""
    settings, machine = results["settings"], results["machine"]
    titles = {entry["row"]: entry["title"] for entry in results["entries"]}
    found = sorted(results["entries"], key=lambda entry: list(NAMES).index(entry["method"]))
    rows = {row: {e["method"]: e for e in found if e["row"] == row} for row in titles}
    lines = [
        f"## {results['prior']}",
        "",
        f"{settings['images']} held-out image{'s' * (settings['images'] > 1)}, {settings['samples']} samples "
        f"of each; noise floor {settings['noise_floor']:g}. Denoiser of DPS and DAPS: "
        f"{settings['denoiser']}, at up to {settings['baseline_nfe']} NFE. Torch {machine['torch']} on "
        f"{machine['processor']} with {machine['threads']} thread(s).{age(settings)}",
        "",
        "| | method | PSNR (dB) | sample | SSIM | coverage 50 % | coverage 90 % | width | NFE | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row, methods in rows.items():
        for method, entry in methods.items():
            m = entry["mean"]
            title = titles[row] if method == next(iter(methods)) else ""
            lines.append(
                f"| {title} | {NAMES[method]} | {number(m['psnr'], 2)} | {number(m.get('sample_psnr'), 2)} "
                f"| {number(m['ssim'], 3)} | {number(m.get('coverage_50'), 3)} "
                f"| {number(m.get('coverage_90'), 3)} | {number(m.get('width_90'), 3)} "
                f"| {m['nfe']:.0f} | {number(m.get('seconds'), 1)} |"
            )
    return "\n".join([*lines, "", *_goals(rows, titles), "", *_tuning(rows, titles, results["tuning"]), ""])


def _goals(rows: dict[str, dict[str, Any]], titles: dict[str, str]) -> list[str]:
    """`calibrated` against the goals; only rows that are complete."""
    lines = [
        f"Goals: `calibrated` at least {GAIN_DB} dB over DPS and over DAPS, at no more than a quarter of the "
        f"{PUBLISHED_DAPS_NFE} NFE of DAPS as published, and coverage of the 90 % interval within "
        f"{COVERAGE[0]} to {COVERAGE[1]}. Misses are bold; ± is the standard error over images.",
        "",
        "| | gain over DPS (dB) | over DAPS (dB) | NFE / DAPS as published | / as run here "
        "| coverage 90 %: ours | DPS | DAPS |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row, methods in rows.items():
        if not {"calibrated", "dps", "daps"} <= methods.keys():
            continue
        ours = methods["calibrated"]
        gains = [_gain(ours, methods[name]) for name in ("dps", "daps")]
        nfe, coverage = ours["mean"]["nfe"], ours["mean"]["coverage_90"]
        share = nfe / PUBLISHED_DAPS_NFE
        others = [methods[name]["mean"] for name in ("dps", "daps")]
        cells = [
            *(_bold(_with_error(gain, error), not gain >= GAIN_DB) for gain, error in gains),
            _bold(f"{share:.2f}", share > NFE_SHARE),
            f"{nfe / others[1]['nfe']:.2f}",
            _bold(f"{coverage:.3f}", not COVERAGE[0] <= coverage <= COVERAGE[1]),
            *(f"{other['coverage_90']:.3f}" for other in others),
        ]
        lines.append(f"| {titles[row]} | {' | '.join(cells)} |")
    return lines


def _with_error(gain: float, error: float) -> str:
    return f"{gain:+.2f}" if math.isnan(error) else f"{gain:+.2f} ± {error:.2f}"


def _gain(ours: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """Mean gain in PSNR over images, and its standard error (NaN for one image)."""
    pairs = zip(ours["images"], other["images"], strict=True)
    gains = [a["psnr"] - b["psnr"] for a, b in pairs]
    mean = sum(gains) / len(gains)
    if len(gains) == 1:
        return mean, math.nan
    variance = sum((g - mean) ** 2 for g in gains) / (len(gains) - 1)
    return mean, math.sqrt(variance / len(gains))


def _tuning(rows: dict[str, dict[str, Any]], titles: dict[str, str], how: dict[str, int]) -> list[str]:
    lines = [
        f"Hyperparameters of the baselines, by the PSNR of the mean of {how['samples']} samples of "
        f"{how['images']} training images:",
        "",
        "| | method | hyperparameter | published | PSNR (dB) | chosen | PSNR (dB) |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row, methods in rows.items():
        for method in ("dps", "daps"):
            if method not in methods:
                continue
            tuning = methods[method]["tuning"]
            psnr = {trial["value"]: trial["psnr"] for trial in tuning["tried"]}
            lines.append(
                f"| {titles[row]} | {NAMES[method]} | {tuning['name']} | {tuning['published']:.3g} "
                f"| {number(psnr[tuning['published']], 2)} | {tuning['chosen']:.3g} "
                f"| {number(psnr[tuning['chosen']], 2)} |"
            )
    return lines


def number(value: float | None, digits: int) -> str:
    """With so many digits after the point; nothing of what was not measured."""
    return "" if value is None else f"{value:.{digits}f}"


def _bold(text: str, miss: bool) -> str:
    return f"**{text}**" if miss else text
