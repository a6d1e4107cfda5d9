"""Jobs for scans: the reconstruction of a file of k-space, checked before anything runs."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, StrictInt

from alpenglow.jobs import ESPIRIT, Count, merge_fields, validate

SCANS = (".h5", ".hdf5", ".mrd", ".cfl", ".hdr")
"""Suffixes that only k-space has; a .npy is a scan where a job names coil maps."""


class ScanJob(BaseModel):
    """One scan. A description says what is expected, for error messages."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: Path = Field(description="k-space: fastMRI or ISMRMRD (.h5, .mrd), BART (.cfl), NumPy (.npy)")
    prior: str = Field(
        description="a zoo prior (`alpenglow info` lists them), a .safetensors file or hub:owner/name"
    )
    output: Path = Field(description="a folder for the results")
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
    num_samples: StrictInt = Field(64, ge=2, description="an integer of at least 2; one has no spread")
    method: str = Field("calibrated", description="the name of a sampling method")
    nfe: Count | None = Field(None, description="a positive integer: gradient evaluations a sample")
    map: bool = Field(False, description="true or false: to search the MAP image too")
    seed: StrictInt = Field(0, ge=0, description="an integer of at least 0")
    device: str | None = Field(None, description="a torch device such as cpu or cuda")

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
