"""Several devices of one process, engines that are lost: the results of one engine, and an orderly end."""

import threading
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import alpenglow as ag
from alpenglow.priors.protocol import place_prior
from alpenglow.scheduler import RequestTimeoutError, SamplingError, spread
from alpenglow.scheduler.devices import DeviceEngine, DevicePool
from alpenglow.scheduler.parts import Part
from alpenglow.scheduler.pool import EngineLostError, Pool
from alpenglow.scheduler.spread import BLOCK
from tests.disk import full_disk
from tests.scheduling import OPERATOR, SHAPE, Independent, arguments, interrupted, same
from tests.spreading import REQUESTS, alike, asked, here, of_one_engine

# --- Several devices ---


def test_two_devices_serve_many_requests_to_the_same_results() -> None:
    prior = Independent()
    with DevicePool(["cpu", "cpu"]) as pool:
        handles = [pool.submit(prior, **asked(i)) for i in range(len(REQUESTS))]
        posteriors = [handle.result(60) for handle in handles]
        found = pool.metrics()
        each = [engine.metrics() for engine in pool._engines]
    for i, posterior in enumerate(posteriors):
        assert alike(posterior, of_one_engine(i)), i
    assert all(metrics is not None and metrics.nfe > 500 for metrics in each)
    assert found.nfe == sum(metrics.nfe for metrics in each if metrics is not None)
    assert found.finished == len(REQUESTS)
    assert found.requests == ()
    assert 0.5 < found.occupancy <= 1


def test_partial_results_stream_and_cancelling_frees_the_devices() -> None:
    prior = Independent()
    with DevicePool(["cpu", "cpu"]) as pool:
        endless = pool.submit(prior, **arguments(num_samples=10**6, name="endless"))
        seen = []
        for partial in endless.updates():
            seen.append(partial.num_samples)
            if len(seen) == 3:
                break
        (metrics,) = pool.metrics().requests
        assert metrics.name == "endless"
        assert metrics.chains_done >= seen[-1]
        assert 0 < endless.share < 0.1
        assert endless.cancel()
        with pytest.raises(CancelledError):
            endless.result(10)
        assert same(pool.submit(prior, **arguments(1)).result(60), ag.sample(prior, **arguments(1)))
        assert pool.metrics().failed == 1
    kept = endless.partial()
    assert kept is not None
    whole = ag.sample(prior, **arguments(num_samples=seen[-1]))
    assert whole.samples is not None
    assert kept.samples is not None
    assert torch.equal(kept.samples[: seen[-1]], whole.samples)


def test_a_timeout_ends_a_request_and_keeps_what_was_finished() -> None:
    with DevicePool(["cpu"]) as pool:
        error = pool.submit(Independent(), **arguments(num_samples=10**6), timeout=1.0).exception(30)
    assert isinstance(error, RequestTimeoutError)
    assert "the timeout of 1 s is over" in str(error)
    assert error.partial is not None
    assert error.partial.num_samples >= BLOCK


def test_a_request_that_fails_says_the_same_as_with_one_device_and_fails_alone() -> None:
    bright = {"y": torch.full(SHAPE, 1e6) * OPERATOR.mask, "num_samples": 3, "name": "bright"}
    with DevicePool(["cpu", "cpu"]) as pool, ag.Scheduler() as scheduler:
        good = pool.submit(Poisoned(), **arguments(1, num_samples=200))
        for method in ("alps", "calibrated"):
            given = arguments(0, method=method, **bright)
            ours, theirs = (s.submit(Poisoned(), **given).exception(60) for s in (pool, scheduler))
            assert isinstance(ours, SamplingError)
            assert str(ours) == str(theirs)
            assert "the backend cannot do this image" in str(ours)
        assert same(good.result(60), ag.sample(Independent(), **arguments(1, num_samples=200)))


class Poisoned(Independent):
    def run(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        if (x.abs() > 1e5).any():
            raise RuntimeError("the backend cannot do this image")
        return super().run(x, sigma)


def test_samples_go_to_a_file_and_a_request_goes_on_from_it(tmp_path: Path) -> None:
    output, given = tmp_path / "out.h5", arguments(num_samples=300)
    with DevicePool(["cpu", "cpu"]) as pool:
        with full_disk(30_000):
            error = pool.submit(Independent(), **given, output=output).exception(60)
        assert isinstance(error, SamplingError)
        assert isinstance(error.__cause__, OSError)
        assert len(list((tmp_path / "out.h5.parts").glob("*.h5"))) == 5  # they fit, all of them in one do not
        prior = Independent()
        returned = pool.submit(prior, **given, output=output).result(60)
        assert sum(prior.asked) <= 1  # the probe: nothing else was run again
    assert same(ag.Posterior.load(output), ag.sample(Independent(), **given))
    assert alike(returned, here(Independent(), given | {"output": tmp_path / "one.h5"}))
    assert returned.reservoir is not None


def test_leaving_by_an_error_stops_and_keeps_finished_populations() -> None:
    with pytest.raises(KeyError), DevicePool(["cpu", "cpu"]) as pool:  # noqa: PT012
        handle = pool.submit(Independent(), **arguments(num_samples=10**6))
        next(handle.updates())
        raise KeyError
    error = handle.exception(10)
    assert isinstance(error, SamplingError)
    assert "the pool was stopped" in str(error)
    assert error.partial is not None
    assert error.partial.num_samples >= BLOCK
    with pytest.raises(RuntimeError, match="the pool is closed"):
        pool.submit(Independent(), **arguments())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("alpenglow")]


def test_ctrl_c_ends_cleanly_with_partial_results() -> None:
    code = """
from alpenglow.scheduler.devices import DevicePool
from tests.scheduling import Independent, arguments
try:
    with DevicePool(["cpu", "cpu"]) as pool:
        handle = pool.submit(Independent(), **arguments(num_samples=10**6))
        next(handle.updates())
        print("ready", flush=True)
        handle.result()
except KeyboardInterrupt:
    print("kept", handle.partial().num_samples)
"""
    first, (kept, count) = interrupted(code)
    assert first == "ready"
    assert kept == "kept"
    assert int(count) >= BLOCK


class Elsewhere(Independent):
    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("meta")


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ([], "no CUDA device was found"),
        (["cuda:7"], "'cuda:7' is no device of this machine"),
        (["nowhere"], "'nowhere' is no device of this machine"),
        (["meta", "meta"], "meta is given more than once"),
    ],
)
def test_devices_that_are_not_there_are_refused(devices: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DevicePool(devices)


def test_bad_requests_are_refused_where_they_are_made() -> None:
    with DevicePool(["cpu"]) as pool:
        for changes, message in (
            ({"noise_std": 0}, "noise_std is 0"),
            ({"population": 0}, "population is 0"),
            ({"keep_samples": 1}, "keep_samples is 1; expected True or False"),
        ):
            with pytest.raises(ValueError, match=message):
                pool.submit(Independent(), **arguments(**changes))
    with pytest.raises(ValueError, match="Elsewhere is on meta and has no to"):
        place_prior(Elsewhere(), torch.device("cpu"))


# --- Engines that are lost, in this process ---


class Mortal(DeviceEngine):
    """Is lost at every `life`-th part that it is given, and comes back `lives` times."""

    def __init__(self, index: int, life: int, lives: int) -> None:
        super().__init__(
            torch.device("cpu"), name=f"mortal {index}", apart=index > 0, batch_size=None, max_memory=None
        )
        self.life, self.lives = life, lives
        self.begun = 0

    def begin(self, ticket: int, request: Any, part: Part) -> "Future[Any]":
        self.begun += 1
        if self.begun % self.life == 0:
            raise EngineLostError("power cut")
        return super().begin(ticket, request, part)

    def revive(self) -> "Future[None]":
        if self.lives == 0:
            return super().revive()
        self.lives -= 1
        future: Future[None] = Future()
        threading.Timer(0.02, future.set_result, [None]).start()
        return future


def pool_of(*engines: DeviceEngine) -> Pool:
    return Pool(engines, device="cpu")


def test_engines_that_come_and_go_change_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "LOSSES", 100)  # one part may be unlucky again and again
    with pool_of(Mortal(0, 5, 100), Mortal(1, 7, 1)) as pool:
        handles = [pool.submit(Independent(), **asked(i)) for i in range(len(REQUESTS))]
        posteriors = [handle.result(60) for handle in handles]
    for i, posterior in enumerate(posteriors):
        assert alike(posterior, of_one_engine(i)), i


def test_where_no_engine_is_left_every_request_fails_and_says_so() -> None:
    with pool_of(Mortal(0, 4, 0), Mortal(1, 4, 0)) as pool:
        handles = [pool.submit(Independent(), **arguments(i, num_samples=10**6)) for i in range(2)]
        for handle in handles:
            error = handle.exception(60)
            assert isinstance(error, SamplingError)
            assert "no engine is left; the last: mortal" in str(error)
        with pytest.raises(RuntimeError, match="the pool's driver died"):
            pool.submit(Independent(), **arguments())
