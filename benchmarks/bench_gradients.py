"""Energy and gradient of fashion-28 by every CPU backend, beside the published way, at three batch sizes."""

from pathlib import Path
from typing import Any

import pytest

from alpenglow.export.prior import load_bundle
from alpenglow.priors.network import NetworkPrior
from benchmarks.backends import BATCHES, EAGER, cpu_runtimes, inputs
from benchmarks.pairs import time_pair
from benchmarks.published import energy_gradient


@pytest.mark.parametrize("batch", BATCHES)
def test_torch(benchmark: Any, prior: NetworkPrior, batch: int) -> None:
    _time(benchmark, prior, prior.run, batch, EAGER)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("backend", cpu_runtimes())
def test_bundle(benchmark: Any, prior: NetworkPrior, bundle: Path, backend: str, batch: int) -> None:
    loaded = load_bundle(bundle, backend=backend, batch_size=batch)
    _time(benchmark, prior, loaded.run, batch, loaded.backend)


def _time(benchmark: Any, prior: NetworkPrior, evaluate: Any, batch: int, backend: str) -> None:
    x, sigma = inputs(prior, batch)
    published = energy_gradient(prior)
    benchmark.group = f"energy and gradient, batch {batch}"
    benchmark.extra_info["backend"] = backend
    time_pair(benchmark, lambda: evaluate(x, sigma), lambda: published(x, sigma), seconds=4)
