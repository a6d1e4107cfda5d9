"""Error against NFE of every sampler on posteriors known in closed form: makes docs/calibration.md's figures.

python -m benchmarks.calibration -o docs
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from rich.progress import track

import alpenglow as ag
from alpenglow.io.files import atomic_path
from benchmarks.beds import BEDS, Bed, score

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BUDGETS = (50, 100, 200)
# How each method spends a budget of gradients a sample.
SAMPLERS: dict[str, Callable[[int], dict[str, Any]]] = {
    "calibrated": lambda nfe: {"method": "calibrated", "nfe": nfe},
    "calibrated, unweighted": lambda nfe: {"method": "calibrated", "nfe": nfe, "weigh": False},
    "alps (published)": lambda nfe: {"method": "alps", "levels": max(2, nfe // 5)},
    "MALA": lambda nfe: {"method": "mala", "nfe": nfe, "sigma_max": 4.0},
    "Metropolised kinetic": lambda nfe: {"method": "kinetic-metropolis", "nfe": nfe, "sigma_max": 4.0},
}


def measure(bed: Bed, options: dict[str, Any], num_samples: int) -> dict[str, Any]:
    """One run against the truth."""
    posterior = ag.sample(
        bed.prior, bed.operator, bed.y, noise_std=bed.noise_std, num_samples=num_samples, **options
    )
    assert posterior.samples is not None
    figures = score(bed, posterior.samples)
    return {"nfe": posterior.nfe, "seconds": posterior.diagnostics["seconds"], **vars(figures)}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| bed | sampler | NFE | std ratio: median (5 to 95 %) | coverage | mean error | mode error (TV) |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        low, middle, high = row["ratio"]
        lines.append(
            f"| {row['bed']} | {row['sampler']} | {row['nfe']:.0f} | {middle:.3f} ({low:.2f} to {high:.2f}) "
            f"| {row['coverage']:.3f} | {row['mean_error']:.3f} | {row['mode_error']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Error in std, and mode error where there are modes, against NFE; one panel a bed."""
    figure, axes = plt.subplots(1, len(BEDS), figsize=(3.4 * len(BEDS), 3.3), constrained_layout=True)
    for axis, bed in zip(axes, BEDS, strict=True):
        for sampler in SAMPLERS:
            chosen = [row for row in rows if row["bed"] == bed and row["sampler"] == sampler]
            axis.plot(
                [r["nfe"] for r in chosen],
                [r["std_error"] for r in chosen],
                "o-",
                ms=3,
                lw=1.2,
                label=sampler,
            )
        axis.set(xscale="log", yscale="log", title=bed, xlabel="NFE a sample")
    axes[0].set_ylabel("mean |std ratio - 1|")
    axes[-1].legend(fontsize=7, frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def main() -> None:
    """Run everything; write calibration.json, calibration.png and calibration-table.md (for the page)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("docs"))
    parser.add_argument("-n", "--num-samples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="seed of the beds")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    jobs = [(bed, sampler, nfe) for bed in BEDS for sampler in SAMPLERS for nfe in BUDGETS]
    rows = []
    for bed, sampler, nfe in track(jobs, description="calibration"):
        found = measure(BEDS[bed](arguments.seed), SAMPLERS[sampler](nfe), arguments.num_samples)
        rows.append({"bed": bed, "sampler": sampler, **found})
    (arguments.output / "calibration.json").write_text(json.dumps(rows, indent=1) + "\n")
    (arguments.output / "calibration-table.md").write_text(table(rows))
    plot(rows, arguments.output / "calibration.png")


if __name__ == "__main__":
    main()
