"""Multi-coil MRI of held-out brain slices: what each method makes of one measurement.

    python -m benchmarks.mri_quality -o docs

writes docs/mri-quality.json after every method of every row, and docs/mri-quality.md from it; a run that was
stopped goes on. Truths are held-out slices of the prior's recipe with its noise floor; coil maps are known.
"""

import argparse
import functools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import alpenglow as ag
from alpenglow.distillation.sources.brain import BrainSlices
from alpenglow.io.files import atomic_path
from alpenglow.jobs import simulate, with_floor
from alpenglow.mri.figure import plot_slice
from alpenglow.mri_simulation import simulate_coil_maps
from alpenglow.operators import SenseMRI, kspace_masks
from alpenglow.priors.network import NetworkPrior
from benchmarks.quality.estimates import Estimate, average, of_posterior, score
from benchmarks.quality.methods import Stopwatch
from benchmarks.quality.page import number
from benchmarks.quality.results import age, is_measured, prior_digest, record, resume, write

PRIOR, NOISE_FLOOR, SIZE = "brain-128", 0.01, 128
CALIBRATION = {"2x 1D": 0.08, "8x 1D": 0.05, "6x 2D": 0.1}  # shares of an axis
MASKS: dict[str, Callable[..., Tensor]] = {
    "2x 1D": kspace_masks.random_1d, "8x 1D": kspace_masks.random_1d, "6x 2D": kspace_masks.poisson_disc,
}  # fmt: skip
ACCELERATION = {"2x 1D": 2, "8x 1D": 8, "6x 2D": 6}
WEIGHTS = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Of the wavelets' L1 norm, in units of noise_std; the best on a training slice is taken."""


@dataclass(frozen=True)
class Row:
    """One way to measure."""

    mask: str
    coils: int
    noise_std: float

    @property
    def title(self) -> str:
        """In words."""
        return f"{self.mask}, {self.coils} coils, noise {self.noise_std:g}"

    def operator(self) -> SenseMRI:
        """The same one each time."""
        size = (SIZE, SIZE)
        mask = MASKS[self.mask](size, ACCELERATION[self.mask], calibration=CALIBRATION[self.mask], seed=0)
        return SenseMRI(simulate_coil_maps(self.coils, size, seed=0)[0], mask)


ROWS = [Row(mask, coils, std) for mask in MASKS for coils in (4, 8) for std in (0.01, 0.05)]


@dataclass(frozen=True, eq=False)
class Problem:
    """A row's measurement y [coils, H, W] of one slice, and what solves it."""

    row: Row
    operator: SenseMRI
    y: Tensor
    prior: NetworkPrior
    single: NetworkPrior
    samples: int
    seed: int


def zero_filled(problem: Problem) -> Estimate:
    """A^H y."""
    watch = Stopwatch(problem.y.device)
    return Estimate(problem.operator.adjoint(problem.y[None])[0], 0.0, watch.seconds())


def wavelets(problem: Problem) -> Estimate:
    """L1-wavelet compressed sensing by sigpy (Lustig et al., Magn Reson Med 2007), its weight tuned."""
    weight = _tuned_weight(problem.row)
    watch = Stopwatch(problem.y.device)
    return Estimate(_wavelets(problem.operator, problem.y, weight), 0.0, watch.seconds())


@functools.cache
def _tuned_weight(row: Row) -> float:
    """Out of WEIGHTS, in units of y."""
    operator, generator = row.operator(), torch.Generator().manual_seed(1000)
    truth = with_floor(brain().draw(generator)[None], NOISE_FLOOR, 1000)[0]
    y = simulate(operator, truth, row.noise_std, 1000)

    def found(weight: float) -> float:
        return figures(Estimate(_wavelets(operator, y, weight), 0, 0), truth)["psnr"]

    return max((weight * row.noise_std for weight in WEIGHTS), key=found)


@functools.cache
def brain() -> BrainSlices:
    """The slices; reading their volumes takes seconds."""
    return BrainSlices()


def _wavelets(operator: SenseMRI, y: Tensor, weight: float) -> Tensor:
    from sigpy.mri.app import L1WaveletRecon

    app = L1WaveletRecon(
        y.numpy(), operator.coil_maps.numpy(), weight, weights=operator.mask.float().numpy(), show_pbar=False
    )
    image = torch.from_numpy(app.run())
    return torch.stack([image.real, image.imag]).float()


def map_image(problem: Problem) -> Estimate:
    """The MAP image."""
    watch = Stopwatch(problem.y.device)
    found = ag.find_map(problem.single, problem.operator, problem.y, noise_std=problem.row.noise_std)
    return Estimate(found.image, float(found.nfe), watch.seconds())


def _sampler(method: str, *, tolerance: float | None = None) -> Callable[[Problem], Estimate]:
    def run(problem: Problem) -> Estimate:
        operator = problem.operator
        if tolerance is not None:
            operator = SenseMRI(operator.coil_maps, operator.mask, tolerance=tolerance)
        watch = Stopwatch(problem.y.device)
        posterior = ag.sample(
            problem.prior, operator, problem.y, noise_std=problem.row.noise_std,
            num_samples=problem.samples, method=method, seed=problem.seed,
        )  # fmt: skip
        return of_posterior(posterior, watch.seconds())

    return run


METHODS: dict[str, Callable[[Problem], Estimate]] = {
    "zero-filled SENSE": zero_filled,
    "L1-wavelet": wavelets,
    "MAP": map_image,
    "calibrated": _sampler("calibrated"),
    # The published solver stops at residuals of 1e-3; at 1e-4 the levels up to 100 take three hours a 2D row.
    "alps, as published": _sampler("alps", tolerance=1e-3),
}
CLASSICAL = ("zero-filled SENSE", "L1-wavelet")
"""The methods without a network."""


def figures(estimate: Estimate, truth: Tensor) -> dict[str, float]:
    """Of the magnitude: PSNR (peak: that of the truth), SSIM, NRMSE. Of both components: the rest.

    truth [2, H, W]. coverage: of the 90 % Student-t interval; correlation: Pearson's, of std and absolute
    error over pixels.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure as similarity

    image, true = (x.double().norm(dim=0) for x in (estimate.image, truth))
    peak, error = true.max().item(), image - true
    ssim = similarity(image[None, None], true[None, None], data_range=peak)
    assert isinstance(ssim, Tensor)
    found = {
        "psnr": 20 * math.log10(peak / error.square().mean().sqrt().item()),
        "ssim": ssim.item(),
        "nrmse": (error.norm() / true.norm()).item(),
        "nfe": estimate.nfe,
        "seconds": estimate.seconds,
    }
    if estimate.std is not None:
        found["coverage"] = score(estimate, truth)["coverage_90"]
        absolute = (estimate.image - truth).abs()
        pair = torch.stack([estimate.std.flatten(), absolute.flatten()]).double()
        found["correlation"] = torch.corrcoef(pair)[0, 1].item()
    return found


def run(output: Path, *, images: int, samples: int, rows: list[Row], log: Callable[[str], None]) -> Path:
    """Measure what is missing or was of another network, and write the page; returns its path."""
    path = output / "mri-quality.json"
    settings = {"images": images, "samples": samples, "prior": PRIOR, "noise_floor": NOISE_FLOOR}
    results = resume(path, settings)
    truths = with_floor(brain().held_out(images), NOISE_FLOOR, 0)
    prior = ag.load_prior(PRIOR)
    assert isinstance(prior, NetworkPrior)
    single, ours = prior.with_batch_size(1), prior_digest(prior)
    for row in rows:
        operator = row.operator()
        for method, solve in METHODS.items():
            network = None if method in CLASSICAL else ours
            if is_measured(results, asdict(row), method, network):
                continue
            each = []
            for index, truth in enumerate(truths):
                y = simulate(operator, truth, row.noise_std, index)
                estimate = solve(Problem(row, operator, y, prior, single, samples, index))
                each.append(figures(estimate, truth))
            mean = average(each)
            which = {"row": asdict(row), "method": method, "network": network}
            record(results, which | {"mean": mean, "images": each})
            write(path, results)
            _write_page(output, results)
            log(f"{row.title}, {method}: {mean['psnr']:.2f} dB")
    return _write_page(output, results)


def picture(row: Row, output: Path, *, samples: int) -> Path:
    """Draw `calibrated` and MAP of a row, for the slice with most brain of eight: output/mri-slice.png."""
    output.mkdir(parents=True, exist_ok=True)
    slices = brain().held_out(8)
    largest = slices.flatten(1).norm(dim=1).argmax()
    truth = with_floor(slices[largest, None], NOISE_FLOOR, 0)[0]
    operator, prior = row.operator(), ag.load_prior(PRIOR)
    y = simulate(operator, truth, row.noise_std, 0)
    posterior = ag.sample(prior, operator, y, noise_std=row.noise_std, num_samples=samples)
    found = ag.find_map(prior, operator, y, noise_std=row.noise_std)
    path = output / "mri-slice.png"
    plot_slice(posterior.with_map(found.image).with_truth(truth), path, title=f"{PRIOR}: {row.title}")
    return path


HEAD = """\
# Multi-coil MRI on held-out brain slices

Written by `python -m benchmarks.mri_quality -o docs`. Held-out slices of brain-128's data, with its
noise floor (0.01): {images}; samples of each: {samples}. Coil maps are known. PSNR (peak: that of the
truth), SSIM and NRMSE are of the magnitude of the mean; coverage of the 90 % interval and the correlation
of std with absolute error are of real and imaginary parts. L1-wavelet: sigpy, its weight tuned on a training
slice for each row. Seconds are of one processor, and left out where a method was measured again on
another.{age}

| | method | PSNR, dB | SSIM | NRMSE | coverage | correlation | NFE | seconds |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


def _write_page(output: Path, results: dict[str, Any]) -> Path:
    lines, last, methods = [], None, list(METHODS)
    settings = results["settings"]
    found = [(Row(**entry["row"]), entry) for entry in results["entries"]]
    for row, entry in sorted(found, key=lambda each: (ROWS.index(each[0]), methods.index(each[1]["method"]))):
        mean = entry["mean"]
        lines.append(
            f"| {'' if row == last else row.title} | {entry['method']} | {mean['psnr']:.2f} | "
            f"{mean['ssim']:.3f} | {mean['nrmse']:.3f} | {number(mean.get('coverage'), 3)} | "
            f"{number(mean.get('correlation'), 3)} | {mean['nfe']:.0f} | {number(mean.get('seconds'), 0)} |"
        )
        last = row
    path = output / "mri-quality.md"
    with atomic_path(path) as temporary:
        temporary.write_text(HEAD.format(**settings, age=age(settings)) + "\n".join(lines) + "\n")
    return path


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs"))
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--rows", type=int, nargs="*", help=f"numbers from 0 to {len(ROWS) - 1}")
    parser.add_argument("--picture", type=int, metavar="ROW", help="draw a slice measured so, and no table")
    options = parser.parse_args()
    if options.picture is not None:
        print(f"Picture: {picture(ROWS[options.picture], options.output, samples=options.samples)}")
        return
    rows = ROWS if options.rows is None else [ROWS[i] for i in options.rows]
    path = run(options.output, images=options.images, samples=options.samples, rows=rows, log=print)
    print(f"Results: {path}")


if __name__ == "__main__":
    main()
