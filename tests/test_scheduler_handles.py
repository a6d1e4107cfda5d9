"""Handles of submitted requests: partial results, cancelling, awaiting, an orderly end; metrics and logs."""

import asyncio
import json
import logging
import threading
import time
from concurrent.futures import CancelledError
from typing import Any

import pytest
import torch

import alpenglow as ag
from alpenglow.scheduler import RequestTimeoutError, SamplingError
from alpenglow.scheduler.core import Core
from tests.scheduling import NFE, Independent, arguments, interrupted, queue, same, serve

# --- Handles ---


def test_partial_results_are_those_of_finished_populations() -> None:
    prior = Independent()
    whole = ag.sample(prior, **arguments(num_samples=40))
    assert whole.samples is not None
    with ag.Scheduler() as scheduler:
        handle = scheduler.submit(prior, **arguments(num_samples=40, population=10))
        seen = list(handle.updates())
        posterior = handle.result(60)
    assert seen[-1].num_samples == 40
    assert [partial.num_samples % 10 for partial in seen] == [0] * len(seen)
    for partial in seen:
        assert partial.samples is not None
        assert torch.equal(partial.samples, whole.samples[: partial.num_samples])
        assert partial.diagnostics["mcse"].shape == (1, 4, 4)
    assert same(posterior, whole)


def test_cancelling_keeps_what_was_finished_and_frees_the_others() -> None:
    prior = Independent()
    with ag.Scheduler() as scheduler:
        endless = scheduler.submit(prior, **arguments(num_samples=10**6, population=8))
        next(endless.updates())
        assert endless.cancel()
        with pytest.raises(CancelledError):
            endless.result(10)
        other = scheduler.submit(prior, **arguments(1)).result(60)
        kept = endless.partial()
        assert scheduler.metrics().failed == 1
    assert kept is not None
    assert kept.num_samples >= 8
    assert same(other, ag.sample(prior, **arguments(1)))
    assert "failed" in repr(endless)


def test_a_timeout_ends_a_request_and_keeps_what_was_finished() -> None:
    now = [0.0]
    core, prior = Core(clock=lambda: now[0]), Independent()
    run = queue(core, prior, num_samples=10**5, population=8, timeout=5.0)
    waiting = queue(core, prior, 1, timeout=4.0, priority=-(10**6))
    while run.finished.count < 16:
        core.turn()
    now[0] = 6.0
    serve(core)
    assert isinstance(run.error, RequestTimeoutError)
    assert isinstance(run.error, TimeoutError)
    assert "the timeout of 5 s is over; 16 chains are finished" in str(run.error)
    assert run.error.partial is not None
    assert run.error.partial.num_samples == 16
    assert isinstance(waiting.error, RequestTimeoutError)
    assert waiting.error.partial is None


def test_requests_come_from_many_threads() -> None:
    prior, results = Independent(), {}
    with ag.Scheduler() as scheduler:

        def work(first: int) -> None:
            handles = {i: scheduler.submit(prior, **arguments(i)) for i in range(first, first + 4)}
            results.update({i: handle.result(60) for i, handle in handles.items()})

        threads = [threading.Thread(target=work, args=(4 * k,)) for k in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(results) == list(range(20))
    for i in (0, 7, 19):
        assert same(results[i], ag.sample(prior, **arguments(i)))


def test_handles_can_be_awaited() -> None:
    prior = Independent()

    async def main() -> tuple[list[ag.Posterior], int]:
        with ag.Scheduler() as scheduler:
            handles = [scheduler.submit(prior, **arguments(i, population=3)) for i in range(3)]
            seen = [partial.num_samples async for partial in handles[0].updates_async()]
            posteriors = list(await asyncio.gather(*handles))
            endless = scheduler.submit(prior, **arguments(num_samples=10**6))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(endless, 0.05)
            assert endless.done()  # asyncio cancelled it
            return posteriors, seen[-1]

    posteriors, last = asyncio.run(main())
    assert last == 6
    assert all(same(p, ag.sample(prior, **arguments(i))) for i, p in enumerate(posteriors))


def test_leaving_by_an_error_stops_and_keeps_finished_populations() -> None:
    prior = Independent()
    with pytest.raises(KeyError), ag.Scheduler() as scheduler:  # noqa: PT012
        handle = scheduler.submit(prior, **arguments(num_samples=10**6, population=8))
        next(handle.updates())
        raise KeyError
    error = handle.exception(10)
    assert isinstance(error, SamplingError)
    assert "stopped" in str(error)
    assert error.partial is not None
    assert error.partial.num_samples >= 8
    with pytest.raises(RuntimeError, match="the scheduler is closed"):
        scheduler.submit(prior, **arguments())


def test_ctrl_c_ends_cleanly_with_partial_results() -> None:
    """A real process and a real SIGINT."""
    code = """
import alpenglow as ag
from tests.scheduling import Independent, arguments
try:
    with ag.Scheduler() as scheduler:
        handle = scheduler.submit(Independent(), **arguments(num_samples=10**6, population=8))
        next(handle.updates())
        print("ready", flush=True)
        handle.result()
except KeyboardInterrupt:
    print("kept", handle.partial().num_samples)
"""
    first, (kept, count) = interrupted(code)
    assert first == "ready"
    assert kept == "kept"
    assert int(count) >= 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"priority": 1.5}, "priority is 1.5; expected an integer"),
        ({"timeout": 0}, "timeout is 0; expected a positive number of seconds"),
        ({"population": 0}, "population is 0"),
        ({"target_error": -1.0}, "target_error is -1.0; expected a positive number"),
        ({"target_error": 0.1, "target_quantile": 1.5}, "target_quantile is 1.5"),
        ({"noise_std": 0}, "noise_std is 0"),
    ],
)
def test_bad_requests_are_refused_where_they_are_made(changes: dict[str, Any], message: str) -> None:
    with ag.Scheduler() as scheduler, pytest.raises(ValueError, match=message):
        scheduler.submit(Independent(), **arguments(**changes))
    for wrong in ({"batch_size": 0}, {"batch_size": "large"}, {"max_memory": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ag.Scheduler(**wrong)  # type: ignore[arg-type]


# --- What can be seen ---


def test_metrics_add_up() -> None:
    prior = Independent()
    with ag.Scheduler() as scheduler:
        endless = scheduler.submit(prior, **arguments(num_samples=10**6, population=8, name="endless"))
        next(endless.updates())
        (served,) = scheduler.metrics().requests
        assert served.name == "endless"
        assert served.chains_done >= 8
        assert served.chains_expected == 10**6
        assert served.eta_seconds is not None
        assert served.eta_seconds > 0
        endless.cancel()
        scheduler.submit(prior, **arguments(1)).result(60)
        found = scheduler.metrics()
    assert json.loads(json.dumps(found.as_dict()))["finished"] == 1
    assert found.failed == 1
    assert found.requests == ()
    assert found.nfe == sum(prior.asked)
    assert found.batches == len(prior.asked)
    assert 0 < found.occupancy <= 1
    assert found.nfe_per_second > 0


def test_prometheus_reads_the_metrics() -> None:
    client = pytest.importorskip("prometheus_client")
    from alpenglow.scheduler.prometheus import register

    registry = client.CollectorRegistry()
    with ag.Scheduler() as scheduler:
        register(scheduler, registry)
        scheduler.submit(Independent(), **arguments()).result(60)
        while registry.get_sample_value("alpenglow_requests_finished_total") != 1:
            time.sleep(0.01)  # the count comes just after the result
        assert registry.get_sample_value("alpenglow_nfe_total") == 6 * NFE
        assert registry.get_sample_value("alpenglow_occupancy") == 6 / 8


def test_logs_are_structured(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="alpenglow.scheduler"), ag.Scheduler() as scheduler:
        scheduler.submit(Independent(), **arguments(name="patient 7", population=3)).result(60)
    events = [record.alpenglow for record in caplog.records if hasattr(record, "alpenglow")]
    assert [event["event"] for event in events] == ["submitted", "population", "population"]
    assert all(event["request"] == "patient 7" for event in events)
    assert json.loads(json.dumps(events))[-1]["chains"] == 6
