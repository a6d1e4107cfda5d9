"""Energy gradients a second of every CPU backend beside the published way, in one run: for docs/export.md.

python -m benchmarks.backends --prior fashion-28 --compile
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from alpenglow.export.bundle import export_bundle
from alpenglow.export.prior import AUTO, load_bundle, on_torch_backend
from alpenglow.export.runtimes import runtime_names
from alpenglow.priors.loading import load_prior
from alpenglow.priors.network import NetworkPrior
from benchmarks.gradients import flops_an_image
from benchmarks.published import Evaluate, energy_gradient

BATCHES = (1, 8, 32)
PUBLISHED, EAGER, COMPILED = "published", "torch", "torch.compile"
MATRIX = 1024
"""Size of the matrix product that tells what these cores can do at the time."""


def cpu_runtimes() -> list[str]:
    """The installed runtimes for bundles that run on a CPU, and auto."""
    return [*(name for name in runtime_names(installed=True) if not name.startswith("tensorrt")), AUTO]


def ways(prior: NetworkPrior, bundle: Path, batch: int) -> dict[str, Evaluate]:
    """Every way to evaluate batches of `batch` images on this CPU, the published one first."""
    found: dict[str, Evaluate] = {PUBLISHED: energy_gradient(prior), EAGER: prior.run}
    for name in cpu_runtimes():
        found[name] = load_bundle(bundle, backend=name, batch_size=batch).run
    return found


def inputs(prior: NetworkPrior, batch: int) -> tuple[Tensor, Tensor]:
    """Images [B, C, H, W] and levels [B]."""
    x = torch.randn(batch, *prior.image_shape, generator=torch.Generator().manual_seed(batch))
    return x, torch.full((batch,), 0.5)


def in_rotation(
    runs: dict[str, Callable[[], object]], *, seconds: float = 8.0, turns: int = 5
) -> dict[str, float]:
    """Seconds a call of each: the median over turns, taken in rotation so that all share the noise.

    For `seconds` a run, and at least so many turns.
    """
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds * len(runs)
    done = 0
    while done < turns or time.perf_counter() < end:
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - began)
        done += 1
    return {name: torch.tensor(values).median().item() for name, values in times.items()}


def table(prior: NetworkPrior, bundle: Path, *, compiled: Evaluate | None = None) -> Iterator[str]:
    """Markdown: gradients a second by batch and way, and the FLOP/s that a matrix product had meanwhile."""
    a, b = torch.randn(2, MATRIX, MATRIX)
    reached = []
    for batch in BATCHES:
        x, sigma = inputs(prior, batch)
        found = ways(prior, bundle, batch) | ({COMPILED: compiled} if compiled else {})
        runs: dict[str, Callable[[], object]] = {
            name: partial(evaluate, x, sigma) for name, evaluate in found.items()
        }
        times = in_rotation(runs | {"product": lambda: a @ b})
        reached.append(2 * MATRIX**3 / times.pop("product"))
        if len(reached) == 1:
            yield f"| batch | {' | '.join(times)} |"
            yield "| --- |" + " --- |" * len(times)
        cells = (f"{batch / t:.0f} ({times[PUBLISHED] / t:.2f}x)" for t in times.values())
        yield f"| {batch} | {' | '.join(cells)} |"
    speeds = ", ".join(f"{flops / 1e9:.0f}" for flops in reached)
    yield (
        f"\n{prior.name}, {torch.get_num_threads()} threads, torch {torch.__version__}: "
        f"{flops_an_image(prior) / 1e6:.0f} MFLOP a gradient; a matrix product of {MATRIX} reached {speeds} "
        "GFLOP/s in the rotation of each batch."
    )


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prior", default="fashion-28")
    parser.add_argument("--compile", action="store_true", help="torch.compile too, a minute a batch size")
    options = parser.parse_args()
    prior = load_prior(options.prior)
    compiled = on_torch_backend(prior, "torch-compile").run if options.compile else None
    with tempfile.TemporaryDirectory() as folder:
        export_bundle(prior, folder)
        for line in table(prior, Path(folder), compiled=compiled):
            print(line, flush=True)  # a batch size takes minutes to compile


if __name__ == "__main__":
    main()
