"""Faults, each injected for real: who fails, with what error, and what everybody else gets."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import alpenglow as ag
from alpenglow.operators import Inpainting
from alpenglow.scheduler import SamplingError
from alpenglow.scheduler.core import Core
from tests.disk import full_disk
from tests.scheduling import NFE, OPERATOR, SHAPE, Independent, arguments, queue, same, serve


class Faulty(Independent):
    """Has `fault` change or refuse the answers of a call of the network, by its number and input."""

    def __init__(self, fault: Callable[[int, Tensor, Tensor], None], batch_size: int = 8) -> None:
        super().__init__(batch_size, "faulty")
        self.fault = fault
        self.calls = 0

    def run(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        energy, grad = super().run(x, sigma)
        self.calls += 1
        self.fault(self.calls, x, grad)
        return energy, grad


def expected(index: int, **changes: Any) -> ag.Posterior:
    return ag.sample(Independent(), **arguments(index, **changes))


# --- A backend that raises ---


def test_a_call_that_fails_once_is_made_again() -> None:
    def once(call: int, x: Tensor, grad: Tensor) -> None:
        if call == 5:
            raise RuntimeError("the backend lost its connection")

    prior, core = Faulty(once), Core()
    runs = [queue(core, prior, i, num_samples=3) for i in range(2)]
    serve(core)
    assert all(same(run.result, expected(i, num_samples=3)) for i, run in enumerate(runs))
    assert core.work.retries == 2  # rows of both requests were in that batch


BRIGHT = 1e6


def poisoned(call: int, x: Tensor, grad: Tensor) -> None:
    if (x.abs() > BRIGHT / 10).any():
        raise RuntimeError("the backend cannot do this image")


def test_a_request_that_breaks_the_backend_fails_alone_and_says_where() -> None:
    prior, core = Faulty(poisoned), Core()
    bad = queue(core, prior, 0, y=torch.full(SHAPE, BRIGHT) * OPERATOR.mask, num_samples=3, name="bright")
    good = queue(core, prior, 1, num_samples=4)
    serve(core)
    assert same(good.result, expected(1, num_samples=4))
    assert isinstance(bad.error, SamplingError)
    assert isinstance(bad.error.__cause__, RuntimeError)
    text = str(bad.error)
    assert text.startswith("bright: chains 0 to 2, level 100, chains [0, 1, 2]: the backend cannot")


# --- NaN ---


def test_nan_that_does_not_come_again_does_no_harm() -> None:
    def once(call: int, x: Tensor, grad: Tensor) -> None:
        if call == 4:
            grad[2, 0, 1, 1] = torch.nan

    prior, core = Faulty(once), Core()
    runs = [queue(core, prior, i, num_samples=3) for i in range(2)]
    serve(core)
    assert all(same(run.result, expected(i, num_samples=3)) for i, run in enumerate(runs))
    assert core.work.retries == 1


@pytest.mark.parametrize("method", ["alps", "calibrated"])
def test_nan_that_comes_again_fails_the_request_and_no_other(method: str) -> None:
    def always(call: int, x: Tensor, grad: Tensor) -> None:
        grad[(x.abs() > BRIGHT / 10).flatten(1).any(1)] = torch.nan

    prior, core = Faulty(always), Core()
    bright = torch.full(SHAPE, BRIGHT) * OPERATOR.mask
    bad = queue(core, prior, 0, method=method, y=bright, num_samples=3, name="bright")
    good = queue(core, prior, 1, num_samples=4)
    serve(core)
    assert same(good.result, expected(1, num_samples=4))
    assert isinstance(bad.error, SamplingError)
    for part in ("bright: ", "level ", "chains ", "diverged", "NaN for "):
        assert part in str(bad.error)


def test_chains_held_through_nan_are_repeated_and_counted() -> None:
    """The kinetic sampler marks such chains as diverged, and runs them again at a calmer pace."""
    broken = []

    def one_level(call: int, x: Tensor, grad: Tensor) -> None:
        if 50 < call <= 52:  # twice the same row: a batch of the first levels, and its second try
            grad[0] = torch.nan
            broken.append(call)

    prior, core = Faulty(one_level), Core()
    run = queue(core, prior, 0, method="calibrated", num_samples=6, nfe=20)
    serve(core)
    assert broken == [51, 52]
    assert run.result is not None
    assert run.result.diagnostics["nan_evaluations"] == 1
    assert run.result.diagnostics["diverged"] == 1
    whole = expected(0, method="calibrated", nfe=20)
    assert whole.samples is not None
    assert run.result.samples is not None
    assert torch.equal(run.result.samples[1:], whole.samples[1:])


# --- Memory ---


class Small:
    """A prior of no batch of its own that has memory for `rows` images."""

    image_shape = SHAPE

    def __init__(self, rows: int) -> None:
        self.rows, self.asked = rows, []

    def energy_and_grad(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        self.asked.append(len(x))
        if len(x) > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return Independent().run(x, sigma)


def test_out_of_memory_halves_the_batch_and_loses_no_chain() -> None:
    given = arguments(num_samples=50)
    whole, prior = ag.sample(Small(100), **given), Small(7)
    assert same(ag.sample(prior, **given), whole)
    assert prior.asked[:3] == [50, 25, 12]
    assert max(prior.asked[4:]) == 6  # it is not tried again


def test_out_of_memory_of_a_network_makes_its_batch_smaller() -> None:
    class Network(Independent):
        def run(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
            if len(x) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().run(x, sigma)

    prior, core = Network(batch_size=16), Core()
    runs = [queue(core, prior, i, num_samples=n) for i, n in enumerate((5, 9))]
    serve(core)
    assert all(
        same(r.result, expected(i, num_samples=n)) for (i, n), r in zip(enumerate((5, 9)), runs, strict=True)
    )
    assert prior.batch_size == 16  # the caller's own is left alone


def test_not_even_one_image_fits() -> None:
    with pytest.raises(SamplingError, match="out of memory"):
        ag.sample(Small(0), **arguments())


class Wide(Inpainting):
    """Steps that have memory for `rows` chains."""

    rows = 10

    def to(self, *place: Any, **named: Any) -> "Wide":
        return self

    def step(self, data: Tensor, z: Tensor, *rest: Any, **named: Any) -> Any:
        if len(z) > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().step(data, z, *rest, **named)


def test_populations_that_do_not_fit_run_as_smaller_ones() -> None:
    posterior = ag.sample(Independent(), **arguments(operator=Wide(OPERATOR.mask), num_samples=30))
    assert same(posterior, expected(0, num_samples=30))
    assert posterior.diagnostics["populations"] == 4  # of 15 twice, each of which did not fit: 8, 8, 7, 7


# --- The worker ---


def test_a_worker_that_dies_fails_its_requests_and_takes_no_more() -> None:
    def end(call: int, x: Tensor, grad: Tensor) -> None:
        if call > 50:
            raise SystemExit(3)

    with ag.Scheduler() as scheduler:
        handles = [
            scheduler.submit(Faulty(end), **arguments(i, num_samples=10**5, population=8)) for i in range(2)
        ]
        errors = [handle.exception(60) for handle in handles]
        for error in errors:
            assert isinstance(error, SamplingError)
            assert "the scheduler's worker died: SystemExit(3)" in str(error)
        kept = handles[0].partial()
        assert kept is not None
        assert kept.num_samples >= 8
        with pytest.raises(RuntimeError, match="worker died"):
            scheduler.submit(Independent(), **arguments())


# --- The disk ---


def test_a_full_disk_fails_the_request_and_space_lets_it_go_on(tmp_path: Path) -> None:
    core, prior, output = Core(), Independent(), tmp_path / "out.h5"
    request = {"num_samples": 200, "population": 100}
    bad = queue(core, prior, 0, output=output, **request)
    good = queue(core, prior, 1)
    with full_disk(4096):
        serve(core)
    assert same(good.result, expected(1))
    assert isinstance(bad.error, SamplingError)
    assert "chains 0 to 99" in str(bad.error)
    assert isinstance(bad.error.__cause__, OSError)
    assert not output.exists()
    again = queue(core, prior, 0, output=output, **request)
    serve(core)
    assert again.result is not None
    assert same(ag.Posterior.load(output), expected(0, num_samples=200))
    assert list(tmp_path.iterdir()) == [output]


RESUME = """
import os, signal, sys, torch
import alpenglow as ag
from tests.scheduling import Independent, arguments
torch.set_num_threads(1)
class Killed(Independent):
    def run(self, x, sigma):
        if len(self.asked) > 95:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().run(x, sigma)
with ag.Scheduler() as scheduler:
    given = arguments(method="calibrated", weigh=False, num_samples=60, population=12)
    scheduler.submit(Killed(), **given, output=sys.argv[1]).result()
"""


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_same_samples(tmp_path: Path, one_thread: None) -> None:
    output = tmp_path / "out.h5"
    killed = subprocess.run([sys.executable, "-c", RESUME, str(output)], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    parts = sorted(path.name for path in (tmp_path / "out.h5.parts").glob("*.h5"))
    assert 1 <= len(parts) < 5
    (tmp_path / "out.h5.parts" / parts[0]).write_bytes(b"damaged")  # its chains are run again
    prior, given = Independent(), arguments(method="calibrated", weigh=False, num_samples=60)
    with ag.Scheduler() as scheduler:
        posterior = scheduler.submit(prior, **given, output=output, population=30).result(60)
    whole = ag.sample(Independent(), **given)
    loaded = ag.Posterior.load(output)
    assert same(loaded, whole)
    assert torch.equal(loaded.energy, whole.energy)
    assert posterior.nfe == whole.nfe
    assert posterior.diagnostics["populations"] == 5  # the size that it began with
    assert sum(prior.asked) < NFE * 60 + 16 * 20  # of what was finished nothing was run again
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 4},
        {"y": torch.ones(SHAPE) * OPERATOR.mask},
        {"levels": 4},
        {"operator": ag.operators.Denoising()},
    ],
)
def test_parts_of_another_request_are_refused(other: dict[str, Any], tmp_path: Path) -> None:
    output, prior = tmp_path / "out.h5", Independent()
    with pytest.raises(SamplingError), full_disk(20000):
        ag.sample(prior, **arguments(num_samples=2000), output=output)
    with pytest.raises(ValueError, match="finished chains of another request"):
        ag.sample(prior, **arguments(num_samples=2000) | other, output=output)


def test_output_must_be_a_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="output is the folder"):
        ag.sample(Independent(), **arguments(), output=tmp_path)
