"""A real local Ray cluster of two CPU workers: the results of one engine, whoever dies on the way."""

import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import alpenglow as ag
from alpenglow.samplers.methods import METHODS, options_of
from alpenglow.scheduler import RequestTimeoutError, SamplingError, spread
from alpenglow.scheduler.spread import BLOCK
from tests.cluster_priors import Logged, Poisoned, Slow
from tests.scheduling import OPERATOR, SHAPE, Independent, arguments, interrupted, same
from tests.spreading import alike

ray = pytest.importorskip("ray")

from alpenglow.scheduler.cluster import Cluster  # noqa: E402, after the check that Ray is there
from alpenglow.scheduler.wire import pack, size, unpack  # noqa: E402

pytestmark = pytest.mark.slow
ENOUGH = 300.0
"""Seconds; a worker that restarts loads torch, which takes a minute of a busy machine."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two workers of a Ray that is small and quiet."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the workers have
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error",
        object_store_memory=80 * 2**20,
    )  # fmt: skip
    with Cluster() as found:
        yield found
    session = ray._private.worker._global_node.get_session_dir_path()
    ray.shutdown()
    assert processes_of(session) == []
    torch.set_num_threads(threads)


def processes_of(session: str) -> list[str]:
    """Command lines of the processes of a Ray session, after time to end."""
    end = time.monotonic() + 10
    while True:
        lines = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if session in line:
                lines.append(line)
        if not lines or time.monotonic() > end:
            return lines
        time.sleep(0.1)


def by_one_engine(given: dict[str, Any]) -> ag.Posterior:
    with ag.Scheduler() as scheduler:
        return scheduler.submit(Independent(), **{"population": BLOCK} | given).result(ENOUGH)


# --- Results ---


REQUESTS: list[dict[str, Any]] = [
    {"num_samples": 500},
    {"num_samples": 500, "keep_samples": False},
    {"num_samples": 200, "method": "calibrated", "weigh": False},
    {"num_samples": 200, "method": "calibrated", "population": 50},
    {"num_samples": None, "target_error": 0.015},
    {"num_samples": 5, "operator": ag.operators.GaussianBlur(1.0)},
]


def test_results_are_those_of_one_engine_to_the_last_bit(cluster: Cluster, tmp_path: Path) -> None:
    prior = Logged(tmp_path)
    handles = [cluster.submit(prior, **arguments(i, **given)) for i, given in enumerate(REQUESTS)]
    posteriors = [handle.result(ENOUGH) for handle in handles]
    for i, posterior in enumerate(posteriors):
        expected = by_one_engine(arguments(i, **REQUESTS[i]))
        expected.settings["prior"] = posterior.settings["prior"]
        assert alike(posterior, expected), i
    busy = prior.batches
    assert len(busy) == 2
    assert os.getpid() not in busy
    assert min(busy.values()) > 0.1 * sum(busy.values())


def test_a_worker_that_is_killed_changes_nothing(cluster: Cluster, tmp_path: Path) -> None:
    given = arguments(num_samples=700)
    unbroken = cluster.submit(Independent(), **given).result(ENOUGH)
    prior = Slow(tmp_path)
    handle = cluster.submit(prior, **given)
    until(lambda: len(prior.batches) == 2 and min(prior.batches.values()) > 170)  # blocks are of 72
    killed = min(prior.batches)
    os.kill(killed, signal.SIGKILL)
    partial = handle.partial()
    assert partial is not None
    assert 0 < partial.num_samples < 700
    broken = handle.result(ENOUGH)
    assert alike(broken, unbroken)
    assert same(broken, ag.sample(Independent(), **given))
    # What it had begun was run again, and Ray has started another one.
    assert sum(prior.batches.values()) > -(-700 // 8) * 9
    until(lambda: len(serving(cluster, tmp_path)) == 2)
    assert killed not in serving(cluster, tmp_path)


def serving(cluster: Cluster, folder: Path) -> set[int]:
    """The processes that serve a request."""
    here = folder / f"{time.monotonic()}"
    here.mkdir()
    prior = Slow(here)
    cluster.submit(prior, **arguments(num_samples=4 * BLOCK)).result(ENOUGH)
    return set(prior.batches)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + ENOUGH
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_partial_results_stream_in_the_order_of_chains(cluster: Cluster) -> None:
    given = arguments(num_samples=640)
    handle = cluster.submit(Independent(), **given)
    seen = list(handle.updates())
    whole = ag.sample(Independent(), **given)
    assert seen[-1].num_samples == 640
    for partial in seen:
        assert partial.samples is not None
        assert whole.samples is not None
        assert torch.equal(partial.samples, whole.samples[: partial.num_samples])
    found = cluster.metrics()
    assert found.requests == ()
    assert found.nfe > 640


def test_a_prior_by_name_is_loaded_by_the_workers(cluster: Cluster, tmp_path: Path) -> None:
    prior = ag.load_prior("fashion-28")
    given = {
        "operator": ag.operators.Denoising(), "y": torch.zeros(1, 28, 28), "noise_std": 0.1, "num_samples": 3,
        "method": "alps", "levels": 1, "steps": 1,
    }  # fmt: skip
    expected = ag.sample(prior, **given)
    for method in METHODS:
        assert options_of(method, {}, cluster.usable("fashion-28")) == options_of(method, {}, prior)
    path = tmp_path / "prior.safetensors"
    prior.save(path, dtype=torch.float32)
    for source in ("fashion-28", path, prior):
        found = cluster.submit(source, **given).result(ENOUGH)
        assert same(found, expected), source
        assert found.settings == expected.settings
    output = tmp_path / "out.h5"
    cluster.submit("fashion-28", **given, output=output).result(ENOUGH)
    assert same(ag.Posterior.load(output), expected)


# --- Faults ---


BRIGHT: dict[str, Any] = {"y": torch.full(SHAPE, 1e6) * OPERATOR.mask, "num_samples": 3, "name": "bright"}


@pytest.mark.parametrize("fault", ["raise", "nan"])
def test_errors_are_those_of_one_engine_and_are_not_tried_again(
    cluster: Cluster, tmp_path: Path, fault: str
) -> None:
    given = arguments(0, **BRIGHT)
    error = cluster.submit(Poisoned(tmp_path, fault), **given).exception(ENOUGH)
    spent = sum(Poisoned(tmp_path, fault).batches.values())
    with ag.Scheduler() as scheduler:
        expected = scheduler.submit(Poisoned(tmp_path, fault), **given).exception(ENOUGH)
    assert isinstance(error, SamplingError)
    assert str(error) == str(expected)
    assert "bright: chains 0 to 2, level " in str(error)
    assert 2 * spent == sum(Poisoned(tmp_path, fault).batches.values())


def test_a_request_that_ends_its_workers_fails_alone(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spread, "LOSSES", 2)  # each takes seconds
    good = cluster.submit(Slow(tmp_path), **arguments(1, num_samples=400))
    bad = cluster.submit(Poisoned(tmp_path, "exit"), **arguments(0, **BRIGHT))
    error = bad.exception(ENOUGH)
    assert isinstance(error, SamplingError)
    assert str(error).startswith("bright: chains 0 to 2 ended 2 engines; the last: ")
    assert same(good.result(ENOUGH), ag.sample(Independent(), **arguments(1, num_samples=400)))


def test_a_worker_whose_device_is_of_no_more_use_makes_way(cluster: Cluster, tmp_path: Path) -> None:
    given = arguments(2, num_samples=200)
    (tmp_path / "batches").mkdir()
    prior = Poisoned(tmp_path / "batches", "device")
    assert same(cluster.submit(prior, **given).result(ENOUGH), ag.sample(Independent(), **given))
    assert not Path("/proc", (tmp_path / "broken").read_text()).exists()


def test_cancelling_and_timeouts_free_the_workers(cluster: Cluster, tmp_path: Path) -> None:
    prior = Slow(tmp_path)
    endless = cluster.submit(prior, **arguments(num_samples=10**6))
    late = cluster.submit(prior, **arguments(1, num_samples=10**6), timeout=2.0)
    next(endless.updates())
    assert endless.cancel()
    with pytest.raises(CancelledError):
        endless.result(10)
    error = late.exception(ENOUGH)
    assert isinstance(error, RequestTimeoutError)
    assert "the timeout of 2 s is over" in str(error)
    kept = endless.partial()
    assert kept is not None
    assert kept.num_samples >= BLOCK
    spent = 0

    def at_rest() -> bool:
        nonlocal spent
        time.sleep(0.2)
        before, spent = spent, sum(prior.batches.values())
        return before == spent

    until(at_rest)


# --- Bad input ---


class Locked(Independent):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


def test_bad_input_is_refused_where_it_is_given(cluster: Cluster, tmp_path: Path) -> None:
    lock = threading.Lock()
    captive = ag.operators.LinearOperator.from_functions(
        lambda x: x if lock.locked() else x.clone(), lambda y: y.clone()
    )
    for prior, changes, message in (
        (Locked(), {}, "the prior cannot be sent to the workers: cannot pickle"),
        ("no-such-prior", {}, "an engine cannot use this prior: .*no-such-prior"),
        (object(), {}, "object is not a prior"),
        (Independent(), {"operator": captive}, "the request .* cannot be sent to the workers: cannot pickle"),
        (Independent(), {"noise_std": -1}, "noise_std is -1"),
        (Independent(), {"y": torch.zeros(1, 5, 5)}, "5, 5"),
        (Independent(), {"output": tmp_path}, "output is the folder"),
    ):
        with pytest.raises(ValueError, match=message):
            cluster.submit(prior, **arguments(**changes))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 3}, "3 workers want 3 CPUs and 0 GPUs; Ray has 2 and 0"),
        ({"gpus": 1}, "1 workers want 1 CPUs and 1 GPUs"),
        ({"workers": 0}, "workers is 0; expected a positive integer"),
        ({"cpus": 0}, "cpus is 0; expected a positive integer"),
        ({"gpus": -1}, "gpus is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_memory": 0}, "max_memory is 0"),
    ],
)
def test_workers_that_cannot_be_had_are_refused(
    cluster: Cluster, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Cluster(**options)
    assert ray.is_initialized()  # it is not the refused one's to shut down


def test_without_ray_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "alpenglow.scheduler.cluster")
    with pytest.raises(ImportError, match=r"pip install 'alpenglow\[cluster\]'"):
        import alpenglow.scheduler.cluster  # noqa: F401


# --- An end ---

CTRL_C = """
import ray, sys
from alpenglow.scheduler.cluster import Cluster
from tests.cluster_priors import Logged, Poisoned, Slow
from tests.scheduling import Independent, arguments
try:
    with Cluster(1) as cluster:
        handle = cluster.submit(Independent(), **arguments(num_samples=10**6))
        next(handle.updates())
        print(ray._private.worker._global_node.get_session_dir_path(), flush=True)
        handle.result()
except KeyboardInterrupt:
    print("kept", handle.partial().num_samples, ray.is_initialized())
"""


def test_ctrl_c_ends_cleanly_with_partial_results() -> None:
    """A Ray of its own, in a real process, and a real SIGINT."""
    session, (kept, count, initialized) = interrupted(CTRL_C)
    assert kept == "kept"
    assert int(count) >= BLOCK
    assert initialized == "False"
    assert processes_of(session) == []


# --- Bytes ---


def test_what_is_sent_arrives_and_views_do_not_take_their_whole_along() -> None:
    volume = torch.randn(100, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    sent = {
        "slice": volume[3],
        "strided": volume[:4, 0, ::2, ::3],
        "conjugate": torch.view_as_complex(volume[0, 0].reshape(-1, 2)).conj(),
        "half": volume[0].to(torch.bfloat16),
        "number": torch.tensor(3.5, dtype=torch.float64),
        "none": torch.empty(0, 3),
        "mask": volume[0, 0] > 0,
        "parameter": torch.nn.Parameter(volume[0, 0, 0]),
        "function": lambda x: 2 * x,
    }
    packed = pack(sent)
    assert size(packed) < 30_000 < size([pickle.dumps(volume[3])])
    found = unpack(packed)
    for name, value in sent.items():
        if isinstance(value, Tensor):
            assert torch.equal(found[name], value), name
            assert found[name].dtype == value.dtype
            assert found[name].requires_grad == value.requires_grad
    assert found["function"](4) == 8
