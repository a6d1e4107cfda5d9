"""Jobs for scans: the reconstruction of a file of k-space, checked before anything runs."""

from pathlib import Path
from typing import Any

from pydantic import Field

from alpenglow.jobs import ESPIRIT, SamplingJob, merge_fields, validate

SCANS = (".h5", ".hdf5", ".mrd", ".cfl", ".hdr")
"""Suffixes that only k-space has; a .npy is a scan where a job names coil maps."""


class ScanJob(SamplingJob):
    """One scan."""

    input: Path = Field(description="k-space: fastMRI or ISMRMRD (.h5, .mrd), BART (.cfl), NumPy (.npy)")
    maps: str = Field(ESPIRIT, description="espirit, or a file of coil maps (.npy, .cfl, .h5)")
    noise_std: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="a positive finite number: the standard deviation of k-space's noise, per real and "
        "imaginary part, in the units of the file",
    )
    slices: str | None = Field(
        None, pattern=r"^\d*(:\d*)?$", description="slices FIRST:END, as Python counts them, or one number"
    )
    map: bool = Field(False, description="true or false: to search the MAP image too")

    def chosen(self, count: int) -> range:
        """The slices to do, of `count`. Raises ValueError where there are none."""
        text = self.slices or ":"
        first, colon, end = text.partition(":")
        start = int(first or 0)
        stop = (int(end) if end else count) if colon else start + 1
        found = range(start, min(stop, count))
        if not found:
            raise ValueError(f"slices is {text!r}; {self.input} has the slices 0 to {count - 1} (--slices)")
        return found


def scan_job(options: dict[str, Any], path: str | Path | None = None) -> ScanJob | None:
    """The job of options and a YAML file, as `load_job` takes them, where it is one for a scan.

    Raises ValueError that names every field that is wrong.
    """
    fields = merge_fields(options, path)
    suffix = Path(str(fields.get("input", ""))).suffix.lower()
    if suffix not in SCANS and "maps" not in fields:
        return None
    return validate(ScanJob, fields, path)
