"""A whole scan: slices are prepared, sampled and saved one by one, and a run that was killed goes on."""

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alpenglow._version import __version__
from alpenglow.api import find_map
from alpenglow.io.coil_maps import open_coil_maps
from alpenglow.io.files import atomic_path
from alpenglow.io.kspace import KSpace
from alpenglow.io.lazy import Slices
from alpenglow.io.mri import open_kspace
from alpenglow.jobs import ESPIRIT
from alpenglow.loading import load_prior
from alpenglow.mri.figure import plot_slice
from alpenglow.mri.grid import Grid, grid_of
from alpenglow.mri.job import ScanJob
from alpenglow.mri.slices import CoilNoise, SliceProblem, find_noise, prepare_slice
from alpenglow.mri.volumes import window_of, write_volumes
from alpenglow.posterior import Posterior
from alpenglow.priors.batched import BatchedPrior
from alpenglow.scheduler.handle import Handle
from alpenglow.scheduler.request import Request, make_request
from alpenglow.scheduler.scheduler import Scheduler

RECORD = "scan.json"
_FREE = ("input", "output", "slices", "device")
"""Fields of a job that may change while a run goes on: none of them makes another slice."""

TOGETHER = 4
"""Slices whose chains run at once: enough to fill batches, few enough to hold their coil maps in memory."""
_LOOK = 0.2  # seconds between looks at the progress

Progress = Callable[[float], None]


@dataclass(frozen=True, eq=False)
class Scan:
    """What all slices of a job share."""

    job: ScanJob
    kspace: KSpace
    maps: Slices | None
    noise: CoilNoise
    grid: Grid
    prior: BatchedPrior

    def problem(self, index: int) -> SliceProblem:
        """Slice `index`; ValueError where it does not fit the others."""
        multiple = getattr(self.prior, "size_multiple", 1)
        problem = prepare_slice(self.kspace, index, self.noise, self.maps, size_multiple=multiple)
        if problem.grid != self.grid:
            raise ValueError(
                f"slice {index} of {self.kspace.source} was sampled on another grid than the first one "
                f"({problem.grid.size}, {self.grid.size}); reconstruct it alone (--slices {index})"
            )
        return problem


@dataclass(frozen=True)
class ScanResult:
    """Paths of the volumes by name, slices done now and found done, and the noise that was used."""

    volumes: dict[str, Path]
    done: int
    found: int
    noise: CoilNoise


def reconstruct_scan(job: ScanJob, *, progress: Progress = lambda share: None) -> ScanResult:
    """Posterior samples of every slice that a job names, into its folder.

    Writes slices/slice-<i>.h5 (a Posterior of images [2, H, W] in the units of the file) and slice-<i>.png as
    each is done, at the end the volumes of `write_volumes`; scan.json says how they were made. Slices that
    are in the folder from a run of the same job are not done again. progress: called with the share of slices
    done.

    Raises ValueError, before anything is written, for files that are damaged or do not fit together, a prior
    that is not for complex images, and a folder that holds another reconstruction.
    """
    scan = open_scan(job)
    chosen = job.chosen(len(scan.kspace))
    missing = [index for index in chosen if not _path(job, index).is_file()]
    record = _record(scan)
    _check_record(job, record)
    if missing:
        first = _ask(scan, missing[0])  # what is wrong with the input shows here
        _write_record(job, record)
        found = len(chosen) - len(missing)
        report = _share_of(progress, found, len(chosen))
        for index, posterior in _posteriors(scan, missing, first, report):
            _save(scan, index, posterior)
    window = window_of(scan.kspace, scan.grid, chosen[0])
    posteriors = (Posterior.load(_path(job, index)) for index in chosen)
    volumes = write_volumes(job.output, posteriors, window)
    return ScanResult(volumes, len(missing), len(chosen) - len(missing), scan.noise)


def open_scan(job: ScanJob) -> Scan:
    """Everything that the slices share, checked; only the noise is computed. Raises ValueError."""
    kspace = open_kspace(job.input)
    chosen = job.chosen(len(kspace))
    maps = None if job.maps == ESPIRIT else open_coil_maps(job.maps, kspace)
    prior = load_prior(job.prior, device=job.device)
    if prior.image_shape[0] != 2:
        raise ValueError(
            f"{job.prior} is a prior of images of {prior.image_shape[0]} channels; k-space needs one of "
            "complex images (2 channels), such as brain-128"
        )
    noise = find_noise(kspace, job.noise_std)
    grid = grid_of(kspace, kspace.sampling_mask(chosen[0]), getattr(prior, "size_multiple", 1))
    return Scan(job, kspace, maps, noise, grid, _fitted(prior, grid))


def _fitted(prior: Any, grid: Grid) -> BatchedPrior:
    """The prior for images of the grid."""
    if tuple(prior.image_shape[1:]) == grid.size:
        return prior
    if not hasattr(prior, "for_images"):
        raise ValueError(
            f"the bundle {prior.name} is of {prior.image_shape[1]}x{prior.image_shape[2]} images, the scan "
            f"needs {grid.size[0]}x{grid.size[1]}; give the prior's weights, which take every size"
        )
    return prior.for_images(*grid.size)


def _ask(scan: Scan, index: int) -> tuple[SliceProblem, Request]:
    """Slice `index` as a problem, and the request for its samples."""
    job, problem = scan.job, scan.problem(index)
    asked = job.sampling(unit=1 / problem.scale) | {"seed": job.seed + index}
    request = make_request(
        scan.prior, problem.operator, problem.y, noise_std=problem.noise_std, name=f"slice {index}", **asked
    )
    return problem, request


def _posteriors(
    scan: Scan, indices: list[int], first: tuple[SliceProblem, Request], progress: Progress
) -> Iterator[tuple[int, Posterior]]:
    """Slices in order, with their posteriors in the units of the file; chains of several share batches.

    first: of the first slice, as `_ask` returns it. progress: called with the slices that are done, counting
    shares of those on the way.
    """
    ahead = deque(indices)
    running: deque[tuple[int, SliceProblem, Handle]] = deque()
    done = 0
    with Scheduler() as scheduler:
        while ahead or running:
            while ahead and len(running) < TOGETHER:
                index = ahead.popleft()
                problem, request = first if index == indices[0] else _ask(scan, index)
                running.append((index, problem, scheduler.submit_request(request)))
            index, problem, handle = running.popleft()
            while not handle.done():
                time.sleep(_LOOK)
                progress(done + handle.share + sum(other.share for _, _, other in running))
            yield index, _finish(scan, problem, index, handle.result())
            done += 1


def _finish(scan: Scan, problem: SliceProblem, index: int, posterior: Posterior) -> Posterior:
    """The posterior of a slice with its MAP image and its record, in the units of the file."""
    if scan.job.map:
        single = scan.prior.with_batch_size(1)  # the search has one image at a time
        estimate = find_map(single, problem.operator, problem.y, noise_std=problem.noise_std)
        posterior = posterior.with_map(estimate.image)
    posterior.settings["scan"] = {
        "source": scan.kspace.source, "slice": index, "scale": problem.scale,
        "noise_std": scan.noise.noise_std, "noise": scan.noise.source, "maps": scan.job.maps,
    }  # fmt: skip
    return posterior.scaled(problem.scale)


def _share_of(progress: Progress, found: int, count: int) -> Progress:
    """Takes slices done now to a share of all `count`, of which `found` were there."""
    return lambda done: progress((found + done) / count)


def _path(job: ScanJob, index: int) -> Path:
    return job.output / "slices" / f"slice-{index:03}.h5"


def _save(scan: Scan, index: int, posterior: Posterior) -> None:
    path = _path(scan.job, index)
    plot_slice(posterior, path.with_suffix(".png"), title=f"{scan.job.input.name}, slice {index}")
    posterior.save(path)  # last: with it the slice counts as done


def _record(scan: Scan) -> dict[str, Any]:
    """How slices are made, JSON-able: equal records, equal slices."""
    digest = hashlib.sha256(scan.kspace[0].numpy(force=True).tobytes()).hexdigest()
    return {
        "alpenglow": __version__,
        "job": scan.job.model_dump(mode="json", exclude=set(_FREE)),
        "kspace": {"shape": list(scan.kspace.shape), "first_slice_sha256": digest},
        "noise": {"noise_std": scan.noise.noise_std, "source": scan.noise.source},
        "grid": {"size": list(scan.grid.size), "shown": list(scan.grid.shown)},
    }


def _check_record(job: ScanJob, record: dict[str, Any]) -> None:
    """ValueError where the folder holds a reconstruction that was made in another way."""
    path = job.output / RECORD
    if job.output.exists() and not job.output.is_dir():
        raise ValueError(f"cannot write to the folder {job.output}: it is a file; give another folder")
    if not path.is_file():
        if (job.output / "slices").exists():
            raise ValueError(f"{job.output} has slices and no {RECORD}; give another folder")
        return
    try:
        known = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); give another folder") from None
    changed = [
        f"{group}.{key}: {known.get(group, {}).get(key)!r}, now {value!r}"
        for group in ("job", "kspace", "noise", "grid")
        for key, value in record[group].items()
        if known.get(group, {}).get(key) != value
    ]
    if changed:
        raise ValueError(
            f"{job.output} holds a reconstruction made in another way ({'; '.join(changed)}); give another "
            "folder, or the same options"
        )


def _write_record(job: ScanJob, record: dict[str, Any]) -> None:
    (job.output / "slices").mkdir(parents=True, exist_ok=True)
    with atomic_path(job.output / RECORD) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")
