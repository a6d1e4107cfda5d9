"""What samples cost: how many a second beside the published loop; time against size, batch, chains and NFE.

OMP_NUM_THREADS=1 python -m benchmarks.cost_curves -o docs

writes cost-curves.json, cost-curves.png and cost-curves.md, of which docs/performance.md has the tables.
Seconds on a CPU are of the processor, so that other programs do not lengthen them.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.progress import Progress

import alpenglow as ag
from alpenglow.export.bundle import export_bundle
from alpenglow.io.files import atomic_path
from alpenglow.priors.network import NetworkPrior
from alpenglow.priors.protocol import Prior
from benchmarks.published import PixelMask, alps, energy_gradient
from benchmarks.quality.methods import Stopwatch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NOISE_STD, SHARE_SEEN = 0.1, 0.2
COUNTS = (1, 16, 256)
PUBLISHED, TORCH, BUNDLE = "published loop", "alpenglow, weights", "alpenglow, exported bundle"


def problem(shape: tuple[int, int, int]) -> tuple[ag.operators.Inpainting, torch.Tensor]:
    """Random inpainting of noise: what is measured does not change the time."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(shape[1:], generator=generator) < SHARE_SEEN
    return ag.operators.Inpainting(mask), mask * NOISE_STD * torch.randn(shape, generator=generator)


def sampling(prior: Prior, chains: int, **options: Any) -> Callable[[], object]:
    """A whole call of `sample`, pilot included."""
    operator, y = problem(prior.image_shape)
    return lambda: ag.sample(prior, operator, y, noise_std=NOISE_STD, num_samples=chains, **options)


def seconds(run: Callable[[], object], *, least: float = 1.0) -> float:
    """Of one call: the fastest of as many as take `least` seconds together."""
    best, total = math.inf, 0.0
    while total < least:
        watch = Stopwatch(torch.device("cpu"))
        run()
        took = watch.seconds()
        best, total = min(best, took), total + took
    return best


def throughput(prior: NetworkPrior, bundle: Prior, done: Callable[[str], None]) -> list[dict[str, Any]]:
    """Samples a second of each way, N samples of one posterior at each method's defaults."""
    operator, y = problem(prior.image_shape)
    published, evaluate = PixelMask(operator.mask[None].float(), NOISE_STD), energy_gradient(prior)
    rows = []
    for count in COUNTS:
        ways = {
            PUBLISHED: lambda n=count: alps(published, evaluate, y[None], prior.image_shape, n),
            TORCH: sampling(prior, count),
            BUNDLE: sampling(bundle, count),
        }
        row: dict[str, Any] = {"samples": count}
        for name, run in ways.items():
            row[name] = count / seconds(run)
            done(f"{count} samples, {name}")
        rows.append(row)
    return rows


def curves(prior: NetworkPrior, done: Callable[[str], None]) -> list[dict[str, Any]]:
    """Seconds against one quantity at a time; slope: d log seconds / d log x between the last two points."""
    shape = prior.image_shape
    small = prior.with_batch_size(1)

    def at_batch(batch: int) -> Callable[[], object]:
        fitted = prior.with_batch_size(batch)
        x, sigma = torch.randn(batch, *shape), torch.full((batch,), 0.5)
        return lambda: fitted.energy_and_grad(x, sigma)

    cases: dict[str, tuple[tuple[int, ...], Callable[[int], Callable[[], object]]]] = {
        "pixels a side (8 samples, 20 NFE)": (
            (28, 56, 112, 224), lambda side: sampling(small.for_images(side, side), 8, nfe=20)
        ),
        "images in a batch (one gradient of each)": ((1, 2, 4, 8, 16, 32, 64), at_batch),
        "samples (50 NFE)": ((1, 4, 16, 64, 256), lambda chains: sampling(prior, chains, nfe=50)),
        "NFE a sample (16 samples)": ((25, 50, 100, 200, 400), lambda nfe: sampling(prior, 16, nfe=nfe)),
    }  # fmt: skip
    found = []
    for label, (values, make) in cases.items():
        points = []
        for value in values:
            points.append((value, seconds(make(value))))
            done(f"{label}: {value}")
        (x0, t0), (x1, t1) = points[-2:]
        found.append({"against": label, "points": points, "slope": math.log(t1 / t0) / math.log(x1 / x0)})
    return found


def tables(rows: list[dict[str, Any]], found: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [f"| samples of one posterior | {' | '.join((PUBLISHED, TORCH, BUNDLE))} |", "| --- " * 4 + "|"]
    for row in rows:
        cells = (
            f"{row[name]:.2f} ({row[name] / row[PUBLISHED]:.2f}x)" for name in (PUBLISHED, TORCH, BUNDLE)
        )
        lines.append(f"| {row['samples']} | {' | '.join(cells)} |")
    lines += ["", "| seconds against | measured | slope at the end |", "| --- | --- | --- |"]
    for curve in found:
        points = ", ".join(f"{x}: {t:.3g}" for x, t in curve["points"])
        lines.append(f"| {curve['against']} | {points} | {curve['slope']:.2f} |")
    return "\n".join(lines) + "\n"


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """One log-log panel a curve, with a line of slope 1."""
    figure, axes = plt.subplots(1, len(found), figsize=(3.2 * len(found), 3), constrained_layout=True)
    for axis, curve in zip(axes, found, strict=True):
        x, t = zip(*curve["points"], strict=True)
        axis.loglog(x, t, "o-", ms=4, lw=1.2, label=f"slope {curve['slope']:.2f} at the end")
        axis.loglog(x, [t[-1] * value / x[-1] for value in x], "--", color="grey", lw=0.8, label="slope 1")
        axis.set_xticks(x, labels=[f"{value:g}" for value in x])
        axis.minorticks_off()
        axis.set_xlabel(curve["against"], fontsize=8)
        axis.legend(fontsize=7, frameon=False)
    axes[0].set_ylabel("seconds")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("docs"))
    parser.add_argument("--prior", default="fashion-28")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    prior = ag.load_prior(options.prior)
    assert isinstance(prior, NetworkPrior)
    with tempfile.TemporaryDirectory() as folder, Progress() as progress:
        task = progress.add_task("", total=30)
        export_bundle(prior, folder)

        def done(what: str) -> None:
            progress.update(task, advance=1, description=what)

        rows, found = throughput(prior, ag.load_prior(folder), done), curves(prior, done)
    facts = {"prior": prior.name, "threads": torch.get_num_threads(), "torch": torch.__version__}
    record = json.dumps({"settings": facts, "throughput": rows, "curves": found}, indent=1)
    (options.output / "cost-curves.json").write_text(record + "\n")
    (options.output / "cost-curves.md").write_text(tables(rows, found))
    plot(found, options.output / "cost-curves.png")


if __name__ == "__main__":
    main()
