"""Serving many requests at once: the same results as alone, full batches, fair turns, and an orderly end."""

import asyncio
import itertools
import json
import logging
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError
from typing import Any

import pytest
import torch
from torch import Tensor

import alpenglow as ag
from alpenglow.scheduler import RequestTimeoutError, SamplingError
from alpenglow.scheduler import core as core_module
from alpenglow.scheduler.core import AGEING, Core
from benchmarks.beds import several_modes
from tests.scheduling import NFE, Independent, arguments, exact, queue, serve

MIXED: list[dict[str, Any]] = [
    {"method": "calibrated", "num_samples": 11},
    {"method": "alps"},
    {"method": "mala", "nfe": 20},
    {"method": "calibrated", "operator": ag.operators.GaussianBlur(1.0), "num_samples": 3},
    {"operator": ag.operators.Denoising(), "num_samples": 20, "population": 7},
    {"method": "kinetic-metropolis", "nfe": 15, "priority": 2},
]


def alone(prior: Any, given: dict[str, Any]) -> ag.Posterior:
    own = {key: value for key, value in given.items() if key not in ("priority", "population")}
    return ag.sample(prior, **own)


def same(a: ag.Posterior, b: ag.Posterior) -> bool:
    assert a.samples is not None
    assert b.samples is not None
    return torch.equal(a.samples, b.samples) and torch.equal(a.energy, b.energy)


# --- Results ---


def test_results_are_those_of_a_request_alone_to_the_last_bit() -> None:
    """Methods, operators, sizes and populations of all kinds in the same batches."""
    prior = Independent()
    with ag.Scheduler() as scheduler:
        handles = [scheduler.submit(prior, **arguments(i, **mixed)) for i, mixed in enumerate(MIXED)]
        posteriors = [handle.result(60) for handle in handles]
    # Counted by a callback, which may run after whoever waited for the result has gone on.
    assert scheduler.metrics().finished == len(MIXED)
    for i, posterior in enumerate(posteriors):
        expected = alone(Independent(), arguments(i, **MIXED[i]))
        assert same(posterior, expected), i
        assert posterior.nfe == expected.nfe
        assert posterior.settings == expected.settings


def test_results_do_not_depend_on_when_others_come_and_go() -> None:
    prior, given = Independent(), arguments(0, num_samples=5)
    expected = alone(prior, given)
    core = Core()
    queue(core, prior, 1, num_samples=30)
    for _ in range(17):
        core.turn()
    run = queue(core, prior, 0, num_samples=5)
    leaver = queue(core, prior, 2, num_samples=9)
    for _ in range(23):
        core.turn()
    leaver.cancelled = True
    queue(core, prior, 3, num_samples=13, priority=3)
    serve(core)
    assert run.result is not None
    assert same(run.result, expected)
    assert isinstance(leaver.error, SamplingError)


def test_a_weighted_population_in_company_is_what_it_is_alone() -> None:
    bed = several_modes()
    given = {"operator": bed.operator, "y": bed.y, "noise_std": bed.noise_std, "num_samples": 200, "nfe": 30}
    expected = ag.sample(bed.prior, **given)
    assert expected.diagnostics["modes"] > 1
    with ag.Scheduler() as scheduler:
        others = [scheduler.submit(bed.prior, **given | {"seed": k, "num_samples": 20}) for k in (1, 2)]
        posterior = scheduler.submit(bed.prior, **given).result(120)
        assert all(other.result(120) for other in others)
    assert same(posterior, expected)
    assert posterior.diagnostics["resamplings"] == expected.diagnostics["resamplings"]


def test_populations_of_independent_chains_are_the_chains_of_one() -> None:
    prior = Independent()
    whole = ag.sample(prior, **arguments(num_samples=20))
    core = Core()
    parts = queue(core, prior, num_samples=20, population=6)
    serve(core)
    assert parts.result is not None
    assert same(parts.result, whole)
    assert parts.result.nfe == whole.nfe
    assert parts.result.diagnostics["populations"] == 4
    assert torch.equal(parts.result.std, whole.std)
    assert parts.result.diagnostics["lineages"] == 20


def test_cg_iterations_are_counted_for_the_request_that_they_are_of() -> None:
    blur = ag.operators.GaussianBlur(1.0)
    iterative = ag.operators.LinearOperator.from_functions(blur.forward, blur.adjoint)
    given = arguments(operator=iterative, num_samples=3)
    expected = ag.sample(Independent(), **given).diagnostics
    prior = Independent()
    with ag.Scheduler() as scheduler:
        handles = [scheduler.submit(prior, **given | {"population": p}) for p in (3, 1)]
        handles.append(scheduler.submit(prior, **arguments(1)))
        whole, parts, other = [handle.result(60).diagnostics for handle in handles]
    for name in ("cg_solves", "cg_iterations", "cg_iterations_max"):
        assert whole[name] == expected[name]
        assert parts[name] == expected[name]
        assert name not in other


# --- Batches and turns ---


def test_batches_are_filled_from_several_requests() -> None:
    prior, core = Independent(batch_size=8), Core()
    runs = [queue(core, prior, i, num_samples=n) for i, n in enumerate((6, 5, 7, 6))]
    serve(core)
    assert all(run.result is not None for run in runs)
    assert core.work.rows == sum(prior.asked) == NFE * (6 + 5 + 7 + 6)
    # Alone each would take a batch an iteration, 4 for 24 rows: 0.75.
    assert core.work.rows / core.work.slots > 0.9


def test_priors_take_turns() -> None:
    priors, core = [Independent(name="a"), Independent(name="b")], Core()
    runs = [queue(core, prior, i) for i, prior in enumerate(priors)]
    for turn in range(1, 21):
        core.turn()
        assert abs(len(priors[0].asked) - len(priors[1].asked)) <= 1, turn
    serve(core)
    assert all(run.result is not None for run in runs)


class Unpromising:
    """A prior whose results do depend on the batch: each row's on the number of rows."""

    image_shape = (1, 4, 4)

    def energy_and_grad(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        square = sigma.square()[:, None, None, None]
        grad = x * square / (square + 0.1 + 1e-3 * len(x))
        return (0.5 * x * grad).flatten(1).sum(1), grad


def test_priors_that_promise_nothing_see_one_request_at_a_time() -> None:
    prior = Unpromising()
    expected = [ag.sample(prior, **arguments(i, num_samples=3 + i)) for i in range(3)]
    core = Core()
    runs = [queue(core, prior, i, num_samples=3 + i) for i in range(3)]
    serve(core)
    assert all(same(run.result, e) for run, e in zip(runs, expected, strict=True) if run.result)
    assert all(run.result for run in runs)


def test_equal_requests_advance_together_and_priority_goes_first() -> None:
    core, prior = Core(), Independent()
    equal = [queue(core, prior, i, num_samples=32) for i in range(3)]
    for _ in range(60):
        core.turn()
    spent = [run.evaluations for run in equal]
    assert max(spent) - min(spent) <= 8  # one batch
    urgent = queue(core, prior, 3, num_samples=32, priority=1)
    before = list(spent)
    for _ in range(20):
        core.turn()
    assert urgent.evaluations == 8 * 20
    assert AGEING > 20
    assert [run.evaluations for run in equal] == before


def test_low_priority_is_served_while_higher_ones_never_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_module, "AGEING", 10)
    core, prior = Core(), Independent()
    low = queue(core, prior, 0, num_samples=16, priority=0)
    queue(core, prior, 1, num_samples=10**6, priority=3)
    turns = 0
    served = []
    while not low.done and turns < 1000:
        before = low.evaluations
        core.turn()
        turns += 1
        if low.evaluations > before:
            served.append(turns)
    gaps = [b - a for a, b in itertools.pairwise(served)]
    assert len(served) >= 10
    assert max(gaps) <= 3 * 10 + 1  # three of priority, each worth 10 turns


def test_of_one_priority_the_nearer_deadline_goes_first() -> None:
    core, prior = Core(), Independent()
    plain = queue(core, prior, 0, num_samples=16)
    late = queue(core, prior, 1, num_samples=16, timeout=2000.0)
    soon = queue(core, prior, 2, num_samples=16, timeout=1000.0)
    while not soon.done:
        assert late.evaluations == plain.evaluations == 0
        core.turn()
    serve(core)
    assert all(run.result for run in (plain, late, soon))


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
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    kept, count = output.split()
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


def test_sampling_is_right_through_the_scheduler() -> None:
    with ag.Scheduler() as scheduler:
        posterior = scheduler.submit(
            Independent(64), **arguments(method="calibrated", num_samples=1000, nfe=50)
        ).result(120)
    mean, std = exact()
    # 1 000 chains: the mean of a pixel is off by std / sqrt(1000) = 0.032 std, its std by 2.2 %.
    assert ((posterior.mean - mean) / std).abs().max() < 0.032 * 4.5
    assert ((posterior.std / std) - 1).abs().max() < 0.022 * 4.5
