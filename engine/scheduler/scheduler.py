"""`Scheduler`: the loop of core.py in a thread, for requests from any thread and from asyncio."""

import itertools
import logging
import threading
from abc import ABC, abstractmethod
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from alpenglow.scheduler.core import Core
from alpenglow.scheduler.handle import Handle, join, settle
from alpenglow.scheduler.metrics import Metrics, measure
from alpenglow.scheduler.request import Request, make_request
from alpenglow.scheduler.run import Body, Run

log = logging.getLogger("alpenglow.scheduler")


class Frontend(ABC):
    """How requests are submitted, to one device or to many; for `with` blocks."""

    def __init__(self) -> None:
        self._names = itertools.count(1)
        self._counting = threading.Lock()
        self._finished = self._failed = 0

    def submit(
        self,
        prior: Any,
        operator: Any,
        y: Any,
        *,
        noise_std: float,
        num_samples: int | None = None,
        target_error: float | None = None,
        target_quantile: float = 0.95,
        method: str = "calibrated",
        seed: int = 0,
        population: int | None = None,
        output: str | Path | None = None,
        keep_samples: bool = True,
        priority: int = 0,
        timeout: float | None = None,
        name: str | None = None,
        **options: Any,
    ) -> Handle:
        """Ask for posterior samples; everything that `alpenglow.sample` does not know is here.

        population: chains that run together at most; a partial result appears as each population ends, and a
        posterior of several modes wants large ones. keep_samples: False keeps moments, errors and a random
        subset of 256 samples alone. priority: requests of a higher one go first, but waiting counts too, so
        that all are served. timeout: seconds from now, after which the request fails with
        RequestTimeoutError, its finished populations kept. name: in errors, logs and metrics.

        Raises ValueError on bad input, RuntimeError after `close`.
        """
        request = make_request(
            self.usable(prior), operator, y, noise_std=noise_std, num_samples=num_samples,
            target_error=target_error, target_quantile=target_quantile, method=method, seed=seed,
            population=population, output=output, keep_samples=keep_samples, priority=priority,
            timeout=timeout, name=name or f"request {next(self._names)}", **options,
        )  # fmt: skip
        handle = self.submit_request(request)
        facts = {"event": "submitted", "request": request.name}
        log.info("%s: submitted", request.name, extra={"alpenglow": facts})
        return handle

    def usable(self, prior: Any) -> Any:
        """The prior of requests here for what users pass as one."""
        return prior

    @abstractmethod
    def submit_request(self, request: Request) -> Handle:
        """As `submit`, of a request that is checked already."""

    @abstractmethod
    def metrics(self) -> Metrics:
        """Counters as they are now."""

    @abstractmethod
    def close(self, *, stop: bool = False) -> None:
        """Take no more requests, serve those that are there, and end.

        stop: fail them instead, with their finished populations in `Handle.partial`.
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(stop=kind is not None)

    def _count(self, handle: Handle) -> None:
        with self._counting:
            if handle.succeeded:
                self._finished += 1
            else:
                self._failed += 1


class Scheduler(Frontend):
    """Serves many requests at once, with every network batch filled from all of them.

        with ag.Scheduler() as scheduler:
            handles = [scheduler.submit(prior, operator, y, noise_std=0.05) for y in measurements]
            posteriors = [handle.result() for handle in handles]

    Results are those of `alpenglow.sample`, to the last bit, whatever else runs. Leaving the block waits for
    what was submitted; leaving it by an error or Ctrl-C stops, and keeps finished populations in the handles.

    batch_size: images that a prior sees at once, at most. None: what the prior was loaded with; "auto": found
    by measurement at a prior's first request, and the last bits are then those of that size. max_memory:
    bytes for the state of all chains, None for half of the device's; requests beyond it wait, and chains of
    one request that do not fit run as several populations.
    """

    def __init__(self, *, batch_size: int | str | None = None, max_memory: int | None = None) -> None:
        super().__init__()
        if batch_size not in (None, "auto") and not (type(batch_size) is int and batch_size > 0):
            raise ValueError(f'batch_size is {batch_size!r}; expected a positive integer, "auto" or None')
        self._core = Core(batch_size=batch_size, max_memory=max_memory)
        self._wake = threading.Condition()  # its lock is an RLock: callbacks may come back
        self._inbox: list[Run] = []
        self._closing = self._stopping = False
        self._death: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, name="alpenglow-scheduler", daemon=True)

    def submit_request(self, request: Request) -> Handle:
        """As `submit`, of a request that is checked already."""
        handle = Handle()
        run = self._core.make(request, publish=handle.publish)
        handle.attach(run)
        handle.add_done_callback(self._count)
        self._enter(run)
        return handle

    def submit_part(self, request: Request, body: Body) -> tuple[Run, Future[Any]]:
        """Ask for a part of a request, `body`: its run, and the future of what it returns.

        Raises RuntimeError after `close`.
        """
        future: Future[Any] = Future()
        run = self._core.make(request, publish=lambda run: settle(future, run), body=body)
        self._enter(run)
        return run, future

    def _enter(self, run: Run) -> None:
        with self._wake:
            if self._death is not None:
                raise RuntimeError(f"the scheduler's worker died: {self._death!r}; make another one")
            if self._closing:
                raise RuntimeError("the scheduler is closed; make another one")
            if not self._thread.is_alive():
                self._thread.start()
            self._inbox.append(run)
            self._wake.notify_all()

    def metrics(self) -> Metrics:
        """Counters as they are now."""
        return measure(self._core, finished=self._finished, failed=self._failed)

    def close(self, *, stop: bool = False) -> None:
        """Take no more requests, serve those that are there, and end.

        stop: fail them instead, with their finished populations in `Handle.partial`.
        """
        with self._wake:
            self._closing = True
            self._stopping = self._stopping or stop
            self._wake.notify_all()
        if not self._thread.is_alive():
            return
        try:
            join(self._thread)
        except BaseException:  # Ctrl-C while waiting
            self._stopping = True
            join(self._thread)
            raise

    def _serve(self) -> None:
        """The worker: turns of the core as long as there is something to serve."""
        busy = False
        try:
            while True:
                with self._wake:
                    while not (busy or self._inbox or self._closing):
                        self._wake.wait()
                    arrived, self._inbox = self._inbox, []
                for run in arrived:
                    self._core.queue(run)
                if self._stopping:
                    self._abandon("the scheduler was stopped")
                    return
                busy = self._core.turn()
                if self._closing and not busy and not self._inbox:
                    return
        except BaseException as error:
            # Whatever it is, nobody must wait for it for ever.
            with self._wake:
                self._death = error
                arrived, self._inbox = self._inbox, []
            for run in arrived:
                self._core.queue(run)
            log.exception("the scheduler's worker died")
            self._abandon(f"the scheduler's worker died: {error!r}")

    def _abandon(self, why: str) -> None:
        for run in (*self._core.live, *self._core.waiting):
            run.fail(run.stopped(why))
