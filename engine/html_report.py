"""One result as one HTML page that opens without a network: images, marginals of pixels, convergence.

The page is assets/report.html with its styles, its scripts and the numbers put in. Statistics are those of
all samples, as float32; samples are codes of 8 bits, x = mean + std step code, so that their error is the
same small share of every pixel's standard deviation.
"""

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps

from alpenglow import report
from alpenglow._version import __version__
from alpenglow.console import number
from alpenglow.io.files import atomic_path
from alpenglow.plotting import STD_MAP
from alpenglow.posterior import Posterior
from alpenglow.statistics import student_t_interval

LEVEL = report.LEVEL
MAX_MEGABYTES = 32.0
_SCRIPTS = (
    "report-data.js", "report-plots.js", "report-view.js", "report-images.js", "report-convergence.js",
    "report-readout.js", "report.js",
)  # fmt: skip
_CHANNELS = {1: "real", 2: "complex", 3: "RGB"}
_LARGEST_CODE = 127
_ROOM_FOR_WORDS = 400  # bytes: the note on the samples, and the names of their fields
_LONGEST_TEXT = 300  # of one setting: a list of a thousand entries would bury the others
_PHASE_MAP = "twilight"  # cyclic, as the phase is


@dataclass(frozen=True)
class _Samples:
    """Samples as codes [n, C, H, W] int8, x = mean + std step code, and their places [n] among all samples.

    places: None where the samples are a reservoir's, whose places are not known.
    """

    codes: np.ndarray
    step: float
    places: list[int] | None


def write_report(
    posterior: Posterior,
    path: str | Path,
    *,
    name: str = "posterior",
    max_megabytes: float = MAX_MEGABYTES,
) -> None:
    """Write a posterior as one HTML page, whole or not at all.

    name: what the page is called, such as the file that the posterior came from. max_megabytes (10^6
    bytes): bound of the page's size; where not all samples fit, evenly spaced ones are shown, and the page
    says how many. Raises ValueError for images of other than 1 (grey), 2 (complex) or 3 channels (RGB), for a
    path that does not end in .html or lies in no folder, and where the statistics alone exceed the bound.
    """
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"cannot write the report {path}: expected a name that ends in .html")
    if not path.parent.is_dir():
        raise ValueError(f"cannot write the report {path}: there is no folder {path.parent}; make it first")
    page = render(posterior, name=name, max_megabytes=max_megabytes)
    with atomic_path(path) as temporary:
        temporary.write_bytes(page.encode(errors="replace"))  # a file's name need not be valid UTF-8


def render(posterior: Posterior, *, name: str, max_megabytes: float) -> str:
    """The page as text; arguments and errors as for `write_report`."""
    if posterior.mean.shape[0] not in _CHANNELS:
        raise ValueError(
            f"cannot show images of shape {tuple(posterior.mean.shape)}; expected 1 channel (grey), "
            "2 (complex: real and imaginary part) or 3 (RGB)"
        )
    script, css = "\n".join(map(_asset, _SCRIPTS)), _asset("report.css")
    fixed = _tables(posterior) | {
        "policy": _policy(script, css),
        "css": css,
        "js": script,
        "name": html.escape(name),
        "level": f"{100 * LEVEL:.0f}",
    }
    maps = _maps(posterior)

    def page(samples: _Samples | None) -> str:
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in _notes(posterior, samples))
        parts = fixed | {"notes": notes, "data": _data(posterior, maps, samples)}
        # One pass: what is put in is never searched for places again.
        return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _asset("report.html"))

    needed = len(page(None).encode(errors="replace"))
    if needed > max_megabytes * 1e6:
        raise ValueError(
            f"the statistics of an image {'x'.join(map(str, posterior.mean.shape))} need "
            f"{needed / 1e6:.1f} MB; got a bound of {max_megabytes:g} MB: raise it"
        )
    return page(_samples(posterior, int(max_megabytes * 1e6) - needed))


def _asset(name: str) -> str:
    return (files("alpenglow") / "assets" / name).read_text(encoding="utf-8")


def _policy(script: str, css: str) -> str:
    """A content security policy under which only this script and these styles run, and nothing is loaded."""

    def source(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return f"default-src 'none'; script-src {source(script)}; style-src {source(css)}; img-src data:"


def _has_interval(posterior: Posterior) -> bool:
    return posterior.effective_samples > 1 and bool(posterior.std.isfinite().all())


def _floats(values: torch.Tensor | np.ndarray) -> str:
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else values
    return _base64(np.ascontiguousarray(array, "<f4").tobytes())


def _maps(posterior: Posterior) -> dict[str, str]:
    """Every image [C, H, W] as float32, little-endian, base64; diagnostics under "diagnostic:<name>"."""
    images = {"mean": posterior.mean, "map": posterior.map_image, "truth": posterior.truth}
    if posterior.std.isfinite().all():
        images["std"] = posterior.std
    found = {name: _floats(image) for name, image in images.items() if image is not None}
    shape = tuple(posterior.mean.shape)
    return found | {
        f"diagnostic:{name}": _floats(value)
        for name, value in posterior.diagnostics.items()
        if isinstance(value, np.ndarray) and value.shape == shape and value.dtype.kind != "c"
    }


def _samples(posterior: Posterior, room: int) -> _Samples | None:
    """As many samples as fit into `room` bytes, or None where none fits or none was kept."""
    kept = posterior.reservoir if posterior.samples is None else posterior.samples
    if kept is None:
        return None
    place = len(str(len(kept))) + 2
    count = min(len(kept), int((room - _ROOM_FOR_WORDS) / (place + 4 * posterior.mean.numel() / 3)))
    if count < 1:
        return None
    # Evenly spaced, as neighbours in a resampled population descend from one chain.
    places = np.linspace(0, len(kept) - 1, count).round().astype(int)
    mean, std = posterior.mean.double().cpu(), posterior.std.double().nan_to_num().cpu()
    deviations = kept[torch.as_tensor(places, device=kept.device)].double().cpu() - mean
    scores = torch.where(std > 0, deviations / std, 0.0).numpy()
    step = float(np.abs(scores).max()) / _LARGEST_CODE or 1.0
    codes = (scores / step).round().astype(np.int8)
    return _Samples(codes, step, places.tolist() if posterior.samples is not None else None)


def _data(posterior: Posterior, maps: dict[str, str], samples: _Samples | None) -> str:
    """The numbers as JSON that cannot end the element it stands in."""
    factor = None
    if _has_interval(posterior):
        one = torch.ones(1, dtype=torch.float64)
        factor = student_t_interval(0 * one, one, posterior.effective_samples, LEVEL)[1].item()
    data = {
        "shape": list(posterior.mean.shape),
        "level": LEVEL,
        "halfWidthInStd": factor,
        "maps": maps,
        "energy": _floats(posterior.energy),
        "numSamples": posterior.num_samples,
        "samples": samples
        and {
            "count": len(samples.codes),
            "codes": _base64(samples.codes.tobytes()),
            "step": samples.step,
            "places": samples.places,
        },
        "colours": {"spread": _colours(STD_MAP), "phase": _colours(_PHASE_MAP)},
    }
    return json.dumps(data, allow_nan=False).replace("<", "\\u003c")


def _base64(values: bytes) -> str:
    return base64.b64encode(values).decode()


def _colours(name: str) -> str:
    """256 colours, RGB bytes, of a colour map of any length (integers would index its own table)."""
    return _base64(colormaps[name](np.linspace(0, 1, 256), bytes=True)[:, :3].tobytes())


def _tables(posterior: Posterior) -> dict[str, str]:
    """What stands in words on the page, as HTML, under the names of its places."""
    settings = dict(_flat(posterior.settings))
    versions = {name: settings.pop(name) for name in ("alpenglow", "torch", "device") if name in settings}
    summary = [str(settings[key]) for key in ("method", "prior", "operator") if key in settings]
    if isinstance(noise := settings.get("noise_std"), float):
        summary.append(f"noise std {number(noise)}")
    shape, kind = "×".join(map(str, posterior.mean.shape[1:])), _CHANNELS[posterior.mean.shape[0]]
    summary.append(f"{shape} {kind} image")
    return {
        "summary": html.escape(" · ".join(summary)),
        "facts": "".join(
            f"<div><dt>{html.escape(key)}</dt><dd>{html.escape(number(value))}</dd></div>"
            for key, value in _facts(posterior).items()
            if value is not None
        ),
        "settings": _table(settings),
        "diagnostics": _table(dict(_flat(posterior.diagnostics))),
        "versions": _table({"report": f"alpenglow {__version__}"} | versions),
    }


def _facts(posterior: Posterior) -> dict[str, Any]:
    # The fixed peak of PSNR and SSIM is that of images in [-1, 1]; a magnitude in scanner units has none.
    measured = posterior.truth is not None and _has_interval(posterior)
    facts = report.result(posterior, posterior.truth if measured and len(posterior.mean) != 2 else None)
    if measured and len(posterior.mean) == 2:
        facts = {"coverage": f"{posterior.coverage(level=LEVEL):.3f} of values in the interval"} | facts
    return facts


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _table(rows: Mapping[str, Any]) -> str:
    cells = "".join(
        f'<tr><th scope="row">{html.escape(str(key))}</th><td>{html.escape(_text(value))}</td></tr>'
        for key, value in rows.items()
    )
    return f"<table><tbody>{cells}</tbody></table>" if cells else "<p>None were recorded.</p>"


def _text(value: Any) -> str:
    if isinstance(value, np.ndarray):
        finite = value[np.isfinite(value)]
        shape = "×".join(map(str, value.shape))
        if finite.size == 0 or value.dtype.kind == "c":
            return f"array {shape}"
        low, middle, high = (number(float(q)) for q in np.quantile(finite, [0, 0.5, 1]))
        return f"array {shape}: {low} to {high}, median {middle}"
    if isinstance(value, list) and all(isinstance(entry, int | float) for entry in value):
        text = ", ".join(map(number, value))
    else:
        text = number(value)
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]} …"


def _notes(posterior: Posterior, samples: _Samples | None) -> list[str]:
    """What a reader has to know of these figures, in sentences."""
    total = posterior.num_samples
    kept = posterior.samples is not None or posterior.reservoir is not None
    notes = [f"Mean, standard deviation and interval come from all {total} samples."]
    if samples is not None:
        which = "" if samples.places is not None else ", a uniform subset, as the others were not kept"
        notes.append(
            f"This page holds {len(samples.codes)} of {total} samples{which}, each value to within "
            f"{samples.step / 2:.2g} of its pixel's standard deviation."
        )
        if samples.places is not None and len(samples.codes) < total:
            notes.append("A larger bound of its size (--max-size) would show more of them in the histograms.")
    elif kept:
        notes.append("No sample fits into the bound of this page: there are no histograms of pixels.")
    else:
        notes.append("Samples were not kept: there are no histograms of pixels.")
    if not _has_interval(posterior):
        notes.append("One effective sample says nothing of the spread: there are no intervals.")
    known = posterior.diagnostics
    if known.get("modes_measured") is False:
        notes.append("The posterior has several modes, and the weights between them could not be measured.")
    if isinstance(error := known.get("mode_log_weight_error"), float) and math.isfinite(error) and error > 1:
        notes.append(f"The weights of the modes are uncertain by a factor of e^{error:.1f}.")
    return notes
