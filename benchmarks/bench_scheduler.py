"""pytest-benchmark: what the scheduler's loop and the chains cost where the network costs nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor

from alpenglow.priors.batched import BatchedPrior
from benchmarks.scheduler_load import request, serve


class Instant(BatchedPrior):
    """Answers at once with what it was asked: what remains is the loop and the chains."""

    name, image_shape, sigma_range = "instant", (1, 28, 28), (0.01, 20.0)
    dtype, device = torch.float32, torch.device("cpu")

    def run(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return sigma, x


@pytest.mark.parametrize("sharing", [1, 4])
def test_loop(benchmark: Any, sharing: int) -> None:
    """Ten iterations of 64 chains, of one request or of several, without a network."""
    prior = Instant().with_batch_size(64)
    benchmark.group = "scheduler, 10 batches of 64"
    requests = [request(prior, 3 * i, 64 // sharing, 2) for i in range(sharing)]
    work = benchmark(lambda: serve(requests))
    if work is not None:
        assert work.rows == work.slots == 640
