"""Memory: chains that fit, batches found by measurement, samples that go to the disk."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import alpenglow as ag
from alpenglow.scheduler import memory
from alpenglow.scheduler.core import Core
from alpenglow.scheduler.memory import find_batch_size, is_out_of_memory
from alpenglow.scheduler.request import make_request
from tests.scheduling import SHAPE, Independent, arguments, queue


def chain_bytes() -> int:
    given = arguments()
    return make_request(Independent(), given.pop("operator"), given.pop("y"), **given).chain_bytes


def test_chains_that_do_not_fit_run_one_population_after_the_other() -> None:
    whole = ag.sample(Independent(), **arguments(num_samples=50))
    parts = ag.sample(Independent(), **arguments(num_samples=50), max_memory=12 * chain_bytes())
    assert parts.diagnostics["populations"] == 5  # of at most 12
    assert parts.samples is not None
    assert whole.samples is not None
    assert torch.equal(parts.samples, whole.samples)


def test_requests_wait_for_memory_and_all_are_served() -> None:
    prior, core = Independent(), Core(max_memory=20 * chain_bytes())
    runs = [queue(core, prior, i, num_samples=n) for i, n in enumerate((15, 4, 100, 3, 2))]
    most = 0
    while core.turn():
        most = max(most, sum(min(run.population, run.request.num_samples) for run in core.live))
    assert most <= 20
    assert all(run.result is not None for run in runs)


class Bounded(Independent):
    """A network that has memory for `rows` images."""

    rows = 40

    def run(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        if len(x) > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().run(x, sigma)


class Clock:
    """Time that passes in the network alone: `fixed` seconds a call, and one an image."""

    def __init__(self, fixed: float) -> None:
        self.fixed, self.now = fixed, 0.0

    def perf_counter(self) -> float:
        return self.now

    def prior(self, rows: int) -> Bounded:
        clock = self

        class Timed(Bounded):
            def run(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
                clock.now += clock.fixed + len(x)
                return super().run(x, sigma)

        prior = Timed()
        prior.rows = rows
        return prior


def test_batches_are_doubled_until_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(fixed=1000.0)
    monkeypatch.setattr(memory, "time", clock)
    found = find_batch_size(clock.prior(40))
    assert list(found.rates) == [1, 2, 4, 8, 16, 32]
    assert (found.best, found.limit) == (32, 64)
    assert "out of memory" in found.reason


def test_batches_are_doubled_until_they_gain_little(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(fixed=2.0)
    monkeypatch.setattr(memory, "time", clock)
    found = find_batch_size(clock.prior(10**6))
    assert found.limit is None
    # B / (B + 2) is 0.889 at 16, 0.941 at 32 and 0.970 at 64, only 3 % more.
    assert list(found.rates) == [1, 2, 4, 8, 16, 32, 64]
    assert found.best == 32


def test_a_prior_that_runs_nothing_says_why() -> None:
    prior = Bounded()
    prior.rows = 0
    with pytest.raises(RuntimeError, match="independent does not run one image: CUDA out of memory"):
        find_batch_size(prior)


def test_a_scheduler_can_find_the_batch_itself() -> None:
    prior = Bounded(batch_size=2)
    with ag.Scheduler(batch_size="auto") as scheduler:
        posterior = scheduler.submit(prior, **arguments(num_samples=30)).result(60)
    expected = ag.sample(Independent(), **arguments(num_samples=30))
    assert posterior.samples is not None
    assert expected.samples is not None
    assert torch.equal(posterior.samples, expected.samples)
    assert min(prior.asked) > 2  # a copy with another batch ran in its place
    assert prior.batch_size == 2


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("Failed to allocate memory for requested buffer of size 512"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_that_mean_out_of_memory(error: Exception, is_one: bool) -> None:
    assert is_out_of_memory(error) == is_one


def test_samples_stream_to_a_file_that_posterior_opens(tmp_path: Path) -> None:
    path, given = tmp_path / "samples.h5", arguments(num_samples=300)
    whole = ag.sample(Independent(), **given)
    returned = ag.sample(Independent(), **given, output=path, max_memory=70 * chain_bytes())
    loaded = ag.Posterior.load(path)
    assert whole.samples is not None
    assert loaded.samples is not None
    assert torch.equal(loaded.samples, whole.samples)
    assert torch.equal(loaded.energy, whole.energy)
    assert returned.samples is None
    assert returned.reservoir is not None
    assert returned.reservoir.shape == (256, *SHAPE)
    torch.testing.assert_close(loaded.mean, whole.mean)
    torch.testing.assert_close(loaded.std, whole.std)
    for name in ("mcse", "ess"):
        torch.testing.assert_close(
            torch.as_tensor(loaded.diagnostics[name]),
            torch.as_tensor(whole.diagnostics[name]),
            rtol=0.05,
            atol=0,
        )
    assert loaded.diagnostics["r_hat_max"] < 1.2
    assert loaded.settings == whole.settings
    quantiles = returned.quantile(0.5) - whole.quantile(0.5)
    assert (quantiles / whole.std).abs().max() < 0.3  # 256 of 300
    assert list(tmp_path.iterdir()) == [path]


STREAM = """
import resource, sys, torch
import alpenglow as ag
from tests.scheduling import Independent, arguments, NOISE_STD
class Large(Independent):
    def run(self, x, sigma):
        square = sigma.square()[:, None, None, None]
        grad = x * square / (square + 0.1)
        return (0.5 * x * grad).flatten(1).sum(1), grad
prior = Large(64)
prior.image_shape = (1, 64, 64)
operator, y = ag.operators.Denoising(), torch.zeros(1, 64, 64)
given = {"noise_std": NOISE_STD, "method": "alps", "levels": 1, "steps": 2, "max_memory": 16 * 2**20}
count = int(sys.argv[1])
ag.sample(prior, operator, y, num_samples=64, output=sys.argv[2] + ".warm", **given)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ag.sample(prior, operator, y, num_samples=count, output=sys.argv[2], **given)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
def test_host_memory_stays_bounded_while_samples_stream(tmp_path: Path) -> None:
    """Samples of 16 KB: the peak of a real process does not grow with their number."""
    command = [sys.executable, "-c", STREAM, "4500", str(tmp_path / "out.h5")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 37  # MB, half of what was sampled
