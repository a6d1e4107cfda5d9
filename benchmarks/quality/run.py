"""Runs the comparison for one prior, and goes on where a run of the same settings stopped."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alpenglow.distillation.config import load_recipe
from alpenglow.distillation.sources import ImageSource, open_source
from alpenglow.jobs import simulate, with_floor
from alpenglow.priors.loading import ZOO, load_denoiser, load_prior
from alpenglow.priors.network import check_fits
from benchmarks.baselines.denoisers import denoiser_of
from benchmarks.quality import page
from benchmarks.quality.estimates import average, score
from benchmarks.quality.methods import BASELINES, METHODS, Networks, Task, Tuning
from benchmarks.quality.results import digest, is_measured, prior_digest, record, resume, write
from benchmarks.quality.rows import Row, rows_for
from benchmarks.quality.tuning import IMAGES, SAMPLES, Tuned, tune

SEED = 0
TUNING_SEED = 1000
MOST_BATCH = 64
TEACHERS = Path(__file__).parents[1] / "teachers"
"""The teachers of the zoo, float16."""
Progress = Callable[[float], None]


@dataclass(frozen=True)
class Settings:
    """What a file of results was made with; results of other settings are not mixed with it.

    images: held out, each measured once a row; samples of each; baseline_nfe: network evaluations a sample
    of DPS and DAPS (published: 1000). denoiser: what the baselines run on.
    """

    images: int
    samples: int
    baseline_nfe: int
    denoiser: str
    noise_floor: float
    seed: int = SEED


def run(
    prior: str,
    output: Path,
    *,
    images: int = 8,
    samples: int = 32,
    baseline_nfe: int = 1000,
    rows: Sequence[str] = (),
    methods: Sequence[str] = (),
    teacher: Path | None = None,
    data: Path | None = None,
    device: str | None = None,
    progress: Progress = lambda share: None,
    log: Callable[[str], None] = print,
) -> Path:
    """Measure what is missing of a prior's table, then write the page of all priors' tables; its path.

    prior: as for load_prior, weights only. rows, methods: names out of rows_for and METHODS (none: all).
    teacher: the denoiser of the baselines (None: <prior>-teacher.safetensors in runs/<prior> or in TEACHERS,
    else the prior's own). data: the prior's recipe (None: that of the zoo). Writes
    output/quality/<prior>.json and output/quality.md after every method of every row; what another network
    made is measured again. Raises ValueError for options that cannot be, and for a file of results that was
    made with other settings.
    """
    for name, value, least in (
        ("images", images, 1),
        ("samples", samples, 2),
        ("baseline_nfe", baseline_nfe, 5),
    ):
        if value < least:
            raise ValueError(f"{name} is {value}; expected at least {least}")
    networks, denoiser, digests = load_networks(prior, teacher, samples, device)
    source, floor = _source(networks.prior.name, data)
    shape = networks.prior.image_shape
    if source.image_shape != shape:
        raise ValueError(
            f"the recipe's images are {source.image_shape}, the prior takes {shape}: give --data"
        )
    known = rows_for(shape)
    if unknown := sorted(set(rows) - set(known)):
        raise ValueError(f"unknown row {', '.join(unknown)}; images {shape} have {', '.join(known)}")
    if unknown := sorted(set(methods) - set(METHODS)):
        raise ValueError(f"unknown method {', '.join(unknown)}; there are {', '.join(METHODS)}")
    truths = with_floor(source.held_out(images), floor, SEED)
    if len(truths) < images:
        raise ValueError(f"got images={images}; {len(truths)} are held out")
    path = output / "quality" / f"{networks.prior.name}.json"
    settings = Settings(images, samples, baseline_nfe, denoiser, floor)
    tuning = {"images": IMAGES, "samples": SAMPLES}
    results = resume(path, asdict(settings), prior=networks.prior.name, tuning=tuning)
    generator = torch.Generator().manual_seed(TUNING_SEED)
    training = with_floor(torch.stack([source.draw(generator) for _ in range(IMAGES)]), floor, TUNING_SEED)

    wanted = [
        (known[row], method)
        for row in known if row in (rows or known)
        for method in METHODS if method in (methods or METHODS)
    ]  # fmt: skip
    for done, (row, method) in enumerate(wanted):
        progress(done / len(wanted))
        if is_measured(results, row.name, method, digests[method]):
            continue
        tuned = None
        if method in BASELINES:
            task = _task(row, training, SAMPLES, networks.prior.device, TUNING_SEED)
            tuned = tune(networks, task, method, baseline_nfe, row.dps_scale)
        task = _task(row, truths, samples, networks.prior.device, SEED)
        entry = _measure(
            networks, task, method, tuned, lambda share, done=done: progress((done + share) / len(wanted))
        )
        which = {"row": row.name, "title": row.title, "method": method, "network": digests[method]}
        record(results, which | entry)
        write(path, results)
        page.write(output)
        log(f"{row.name} {method}: PSNR {entry['mean']['psnr']:.2f} dB, NFE {entry['mean']['nfe']:.0f}")
    progress(1.0)
    return page.write(output)


def _task(row: Row, truths: Tensor, samples: int, device: torch.device, seed: int) -> Task:
    operator = row.build((truths.shape[1], truths.shape[2], truths.shape[3]))
    y = [simulate(operator, truth, row.noise_std, seed + index) for index, truth in enumerate(truths)]
    return Task(operator.to(device), row.noise_std, truths, torch.stack(y).to(device), samples, seed)


def _measure(
    networks: Networks, task: Task, method: str, tuned: Tuned | None, progress: Progress
) -> dict[str, Any]:
    options: Tuning = None if tuned is None else tuned.options
    estimates = METHODS[method](networks, task, options, progress)
    each = [score(estimate, truth) for estimate, truth in zip(estimates, task.truths, strict=True)]
    found: dict[str, Any] = {"mean": average(each), "images": each}
    return found if tuned is None else found | {"tuning": tuned.record(), "options": asdict(tuned.options)}


def load_networks(
    source: str, teacher: Path | None, samples: int, device: str | None
) -> tuple[Networks, str, dict[str, str]]:
    """The networks, what the baselines' denoiser is in words, and each method's digest; see `run`."""
    prior = load_prior(source, device=device, batch_size=min(samples, MOST_BATCH))
    single = prior.with_batch_size(1)
    if teacher is None:
        file = f"{prior.name}-teacher.safetensors"
        places = (Path("runs") / prior.name / file, TEACHERS / file)
        teacher = next((path for path in places if path.is_file()), None)
    if teacher is None:
        own = dict.fromkeys(METHODS, prior_digest(prior))
        return Networks(prior, single, denoiser_of(prior)), "the prior's own, x - G", own
    network = load_denoiser(teacher, device=device)
    check_fits(network, prior.image_shape)
    label = prior.one_hot(1)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return network(x, sigma, None if label is None else label.expand(len(x), -1))

    taught, ours = digest(network), prior_digest(prior)
    digests = {method: taught if method in BASELINES else ours for method in METHODS}
    return Networks(prior, single, denoise), f"the teacher, {teacher.name}", digests


def _source(prior: str, data: Path | None) -> tuple[ImageSource, float]:
    """The images of a prior's recipe, and their noise floor."""
    recipe = files(ZOO) / f"{prior}.yaml" if data is None else data
    if not recipe.is_file():
        raise ValueError(f"the zoo has no recipe for {prior!r}; give the one it was trained by with --data")
    config = load_recipe(str(recipe)).data
    return open_source(config), config.noise_floor
