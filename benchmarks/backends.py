"""Energy gradients a second of every backend beside the published way, in one run: for docs/export.md.

python -m benchmarks.backends --prior fashion-28 --compile
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor

from alpenglow.export.bundle import export_bundle
from alpenglow.export.gradient_graph import gradient_graph
from alpenglow.export.prior import load_bundle
from alpenglow.export.runtimes import runtime_names
from alpenglow.priors.loading import load_prior
from alpenglow.priors.network import NetworkPrior

BATCHES = (1, 8, 32)
PUBLISHED, EAGER, COMPILED, AUTO = "published", "torch", "torch.compile", "auto"
Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def published(prior: NetworkPrior) -> Evaluate:
    """As the code of ALPS does: autograd of E, weights trainable, with a graph for a second derivative."""
    denoiser = copy.deepcopy(prior.denoiser).requires_grad_(True)

    def evaluate(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        energy = 0.5 * (x - denoiser(x, sigma)).square().flatten(1).sum(1)
        (grad,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return energy.detach(), grad.detach()

    return evaluate


def ways(prior: NetworkPrior, bundle: Path, batch: int, *, compiled: bool) -> dict[str, Evaluate]:
    """Every way to evaluate batches of `batch` images on this CPU."""
    found: dict[str, Evaluate] = {PUBLISHED: published(prior), EAGER: prior.run}
    if compiled:
        found[COMPILED] = torch.compile(gradient_graph(prior))
    for name in runtime_names(installed=True):
        if not name.startswith("tensorrt"):
            found[name] = load_bundle(bundle, backend=name, batch_size=batch).run
    found[AUTO] = load_bundle(bundle, batch_size=batch).run
    return found


def measure(found: dict[str, Evaluate], x: Tensor, sigma: Tensor, seconds: float = 8.0) -> dict[str, float]:
    """Seconds a batch of each way: the median over turns, taken in rotation so that all share the noise."""
    for evaluate in found.values():
        evaluate(x, sigma)
    times: dict[str, list[float]] = {name: [] for name in found}
    end = time.perf_counter() + seconds * len(found)
    while time.perf_counter() < end or len(times[PUBLISHED]) < 5:
        for name, evaluate in found.items():
            began = time.perf_counter()
            evaluate(x, sigma)
            times[name].append(time.perf_counter() - began)
    return {name: torch.tensor(values).median().item() for name, values in times.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prior", default="fashion-28")
    parser.add_argument("--compile", action="store_true", help="torch.compile too, a minute a batch size")
    options = parser.parse_args()
    prior = load_prior(options.prior)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        export_bundle(prior, folder)
        for batch in track(BATCHES, "batches"):
            x = torch.randn(batch, *prior.image_shape, generator=torch.Generator().manual_seed(batch))
            sigma = torch.full((batch,), 0.5)
            rows[batch] = measure(ways(prior, Path(folder), batch, compiled=options.compile), x, sigma)
    print(f"{prior.name}, {torch.get_num_threads()} threads, torch {torch.__version__}: gradients a second")
    names = list(rows[BATCHES[0]])
    print("| batch |", " | ".join(names), "|")
    print("| --- |", " | ".join("---" for _ in names), "|")
    for batch, times in rows.items():
        cells = [f"{batch / times[n]:.0f} ({times[PUBLISHED] / times[n]:.2f}x)" for n in names]
        print(f"| {batch} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
