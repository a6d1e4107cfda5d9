"""What `Scheduler.submit` returns: a future of a posterior, with what is known on the way."""

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import Future, InvalidStateError
from typing import Any

from alpenglow.posterior import Posterior
from alpenglow.scheduler.ledger import Ledger

PATIENCE = 0.2
"""Seconds that a thread waits at once. A Ctrl-C that comes just as Python begins to wait for a lock is seen
only when that wait ends: a wait without end would never see it."""


def join(thread: threading.Thread) -> None:
    """Wait for the end of a thread; Ctrl-C ends the wait."""
    while thread.is_alive():
        thread.join(PATIENCE)


class Handle:
    """A submitted request. Thread-safe; `await handle` gives its posterior in asyncio."""

    def __init__(self) -> None:
        self._future: Future[Posterior] = Future()
        self._run: Ledger | None = None
        self._changed = threading.Condition()

    def attach(self, run: Ledger) -> None:
        """The scheduler's: the run that this is the handle of."""
        self._run = run
        self._future.add_done_callback(self._closed)

    def publish(self, run: Ledger) -> None:
        """The scheduler's: the run has finished a population, or itself."""
        settle(self._future, run)
        with self._changed:
            self._changed.notify_all()

    def _closed(self, future: "Future[Posterior]") -> None:
        if future.cancelled() and self._run is not None:
            self._run.cancelled = True
        with self._changed:
            self._changed.notify_all()

    @property
    def name(self) -> str:
        """Name of the request."""
        return "" if self._run is None else self._run.request.name

    @property
    def share(self) -> float:
        """Share of the expected work that is done, in [0, 1]."""
        return 0.0 if self._run is None else self._run.share

    def done(self) -> bool:
        """Whether there is a result, an error, or a cancellation."""
        return self._future.done()

    @property
    def succeeded(self) -> bool:
        """Whether there is a result."""
        return self._future.done() and not self._future.cancelled() and self._future.exception() is None

    def result(self, timeout: float | None = None) -> Posterior:
        """The posterior, when it is there.

        Raises TimeoutError after `timeout` seconds of waiting (the request goes on), CancelledError after
        `cancel`, RequestTimeoutError when the request's own timeout is over, SamplingError when it failed;
        see `partial` for what was finished.
        """
        self._wait(self._future.done, timeout)
        return self._future.result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The error of a request that failed, None of one that did not; waits as `result` does."""
        self._wait(self._future.done, timeout)
        return self._future.exception(0)

    def _wait(self, until: Callable[[], bool], timeout: float | None = None) -> None:
        """Until that holds, or as many seconds."""
        end = math.inf if timeout is None else time.monotonic() + timeout
        with self._changed:
            while not until() and (left := end - time.monotonic()) > 0:
                self._changed.wait(min(PATIENCE, left))

    def cancel(self) -> bool:
        """Stop the request; its finished populations stay in `partial`. False where it is over already."""
        return self._future.cancel()

    def add_done_callback(self, function: Callable[["Handle"], Any]) -> None:
        """Call function(self) when it is over, in whatever thread that happens."""
        self._future.add_done_callback(lambda future: function(self))

    def partial(self) -> Posterior | None:
        """The posterior of the populations that are finished, None before the first.

        Chains on the way are not in it: at high levels they are no posterior samples. With a smaller
        `population` there is something to see earlier.
        """
        return None if self._run is None else self._run.partial()

    def updates(self) -> Iterator[Posterior]:
        """The partial posterior each time that populations were finished, until the request is over."""
        seen = 0
        while (found := self._next(seen)) is not None:
            seen = found.num_samples
            yield found

    async def updates_async(self) -> AsyncIterator[Posterior]:
        """As `updates`, for asyncio."""
        seen = 0
        while (found := await asyncio.to_thread(self._next, seen)) is not None:
            seen = found.num_samples
            yield found

    def _next(self, seen: int) -> Posterior | None:
        """The partial posterior once it has more than `seen` samples; None when the request is over."""
        run = self._run
        assert run is not None
        self._wait(lambda: run.count > seen or self._future.done())
        return run.partial() if run.count > seen else None

    def __await__(self) -> Generator[Any, None, Posterior]:
        return asyncio.wrap_future(self._future).__await__()

    def __repr__(self) -> str:
        state = "failed" if self.done() and not self.succeeded else f"{self.share:.0%} done"
        return f"Handle({self.name}: {state})"


def settle(future: "Future[Any]", run: Ledger) -> None:
    """Give a future what its run ended with, if it has ended."""
    with contextlib.suppress(InvalidStateError):  # cancelled, or over
        if run.result is not None:
            future.set_result(run.result)
        elif run.error is not None:
            future.set_exception(run.error)
