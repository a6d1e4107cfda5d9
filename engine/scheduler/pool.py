"""Requests spread over several engines: who runs which part, and what becomes of an engine that is lost.

`Pool` is the driver; what an engine is, it does not know. `DevicePool` (devices.py) has one for each device
of this process, `Cluster` (cluster.py) one for each GPU of a Ray cluster.
"""

import itertools
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from alpenglow.scheduler.errors import SamplingError
from alpenglow.scheduler.handle import Handle, join
from alpenglow.scheduler.line import Line
from alpenglow.scheduler.metrics import Metrics, together
from alpenglow.scheduler.parts import Part
from alpenglow.scheduler.request import Request
from alpenglow.scheduler.scheduler import Frontend
from alpenglow.scheduler.spread import Spread, default_population

log = logging.getLogger("alpenglow.scheduler")

AHEAD = 128
"""Chains on the way to an engine: two batches of a GPU, one that it runs and one that waits."""


class EngineLostError(RuntimeError):
    """An engine that ended, or cannot be reached; what it was doing is lost."""


class Engine(Protocol):
    """What runs parts of requests. Used from the pool's thread alone, but for `metrics`."""

    name: str
    memory_limit: int
    """Bytes for the state of chains."""

    def begin(self, ticket: int, request: Request, part: Part) -> "Future[Any]":
        """Run a part; ticket: a number for `cancel`. The future is not cancelled by its owner, and fails with
        SamplingError where the part does, with EngineLostError where the engine is lost."""

    def cancel(self, ticket: int) -> None:
        """Nobody waits for that part any more."""

    def revive(self) -> "Future[None]":
        """After a loss: done when the engine is there again, failed where it never will be."""

    def metrics(self) -> Metrics | None:
        """Its counters, None where it cannot be reached."""

    def close(self) -> None:
        """Stop whatever it does, and give back what it holds."""


@dataclass(eq=False)
class Seat:
    """An engine of a pool. chains: on the way to it; away: whether it is lost for the moment; closed: whether
    it runs a part that is to be alone."""

    engine: Engine
    chains: int = 0
    away: bool = False
    closed: bool = False


class Pool(Frontend):
    """Serves many requests on several engines; see DevicePool and Cluster.

    Every change of state is an event that one thread handles: what comes from users and engines waits in a
    queue. device: of the posteriors' settings.
    """

    def __init__(self, engines: Sequence[Engine], *, device: str) -> None:
        super().__init__()
        self._engines = tuple(engines)
        self._seats = [Seat(engine) for engine in engines]
        self._memory = min(engine.memory_limit for engine in engines)
        self._window = 2 * AHEAD * len(engines)
        self._device = device
        self._tickets = itertools.count()
        # The requests that are served, each with its parts on the way, by ticket.
        self._served: dict[Spread, dict[int, Seat]] = {}
        self._waiting: Line[Spread] = Line()  # those that may have a part to run
        self._deadlines: Line[Spread] = Line()
        self._free: Line[Seat] = Line()
        for seat in self._seats:
            self._open(seat)
        self._dispatched = 0
        self._events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._entering = threading.Lock()
        self._closing = self._stopping = False
        self._death: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, name="alpenglow-pool", daemon=True)
        self._thread.start()

    def submit_request(self, request: Request) -> Handle:
        """As `submit`, of a request that is checked already."""
        request = replace(request, population=default_population(request))
        self.ship(request)
        handle = Handle()
        spread = Spread(
            request, population=request.population_limit(self._memory), window=self._window,
            device=self._device, publish=handle.publish,
        )  # fmt: skip
        handle.attach(spread)
        handle.add_done_callback(partial(self._over, spread))
        with self._entering:
            if self._death is not None:
                raise RuntimeError(f"the pool's driver died: {self._death!r}; make another one")
            if self._closing:
                raise RuntimeError("the pool is closed; make another one")
            self._events.put(partial(self._enter, spread))
        return handle

    def ship(self, request: Request) -> None:
        """Make a request ready to be sent to engines. Raises ValueError where it cannot be."""

    def metrics(self) -> Metrics:
        """Counters of all engines that can be reached, and of the requests of this pool."""
        engines = [found for engine in self._engines if (found := engine.metrics()) is not None]
        return together(engines, tuple(self._served), finished=self._finished, failed=self._failed)

    def close(self, *, stop: bool = False) -> None:
        """Take no more requests, serve those that are there, and end the engines.

        stop: fail them instead, with their finished populations in `Handle.partial`.
        """
        with self._entering:
            self._closing = True
            self._stopping = self._stopping or stop
            self._events.put(_nothing)
        try:
            join(self._thread)
        except BaseException:  # Ctrl-C while waiting
            self._stopping = True
            self._events.put(_nothing)
            join(self._thread)
            raise
        finally:
            for engine in self._engines:
                engine.close()

    def _over(self, spread: Spread, handle: Handle) -> None:
        self._count(handle)
        self._events.put(partial(self._look, spread))  # it may have been cancelled

    # --- The driver's thread ---

    def _serve(self) -> None:
        try:
            while self._served or not self._closing or not self._events.empty():
                self._next_event()()
                if self._stopping:
                    self._abandon("the pool was stopped")
                    return
                self._dispatch()
        except BaseException as error:
            # Whatever it is, nobody must wait for it for ever.
            with self._entering:
                self._death = error
            log.exception("the pool's driver died")
            self._abandon(f"the pool's driver died: {error!r}")

    def _next_event(self) -> Callable[[], None]:
        soonest = self._deadlines.first()
        wait = None if soonest is None else max(0.0, soonest.deadline - time.monotonic())
        try:
            return self._events.get(timeout=wait)
        except queue.Empty:
            assert soonest is not None
            return partial(self._look, soonest)

    def _enter(self, spread: Spread) -> None:
        spread.last_served = self._dispatched
        self._served[spread] = {}
        if spread.deadline < math.inf:
            self._deadlines.put(spread, spread.deadline)
        self._look(spread)

    def _look(self, spread: Spread) -> None:
        """Something has happened to a request: it waits again, or it is over."""
        if spread not in self._served:
            return
        if (error := spread.overdue()) is not None:
            spread.fail(error)
        if not spread.done:
            self._waiting.put(spread, spread.turn_order)
            return
        self._waiting.remove(spread)
        self._deadlines.remove(spread)
        for ticket, seat in self._served.pop(spread).items():
            seat.engine.cancel(ticket)

    def _open(self, seat: Seat) -> None:
        """Let a seat stand in line, by what it has to do already, or not."""
        if seat.away or seat.closed or seat.chains >= AHEAD:
            self._free.remove(seat)
        else:
            self._free.put(seat, seat.chains)

    def _dispatch(self) -> None:
        """Parts to engines, as long as there are both; each to the engine that has least to do."""
        while (seat := self._free.first()) is not None and (spread := self._waiting.first()) is not None:
            part = spread.next()
            if part is None:
                self._waiting.remove(spread)  # until one of its parts is there
                if spread.done:
                    self._look(spread)
                continue
            alone = spread.suspects(part)
            if alone and seat.chains:
                spread.postpone(part)  # the next engine that has nothing else to do is for it
                return
            self._dispatched += 1
            spread.last_served = self._dispatched
            self._waiting.put(spread, spread.turn_order)
            seat.closed = alone
            self._begin(seat, spread, part)

    def _begin(self, seat: Seat, spread: Spread, part: Part) -> None:
        ticket = next(self._tickets)
        self._served[spread][ticket] = seat
        seat.chains += part.count
        self._open(seat)
        try:
            future = seat.engine.begin(ticket, spread.request, part)
        except Exception as error:
            future = Future()
            future.set_exception(error)
        landed = partial(self._landed, seat, spread, part, ticket)
        future.add_done_callback(lambda done: self._events.put(partial(landed, done)))

    def _landed(self, seat: Seat, spread: Spread, part: Part, ticket: int, future: "Future[Any]") -> None:
        seat.chains -= part.count
        seat.closed = False
        self._open(seat)
        if spread in self._served:
            del self._served[spread][ticket]
        error = CancelledError() if future.cancelled() else future.exception()
        if error is None:
            spread.answer(part, future.result())
        elif isinstance(error, EngineLostError):
            spread.lose(part, str(error))
            self._lost(seat, str(error))
        elif isinstance(error, SamplingError):
            spread.refuse(part, error)
        else:
            spread.fail(spread.explain(error))
        self._look(spread)

    def _lost(self, seat: Seat, why: str) -> None:
        if seat.away:
            return
        log.warning("%s is lost: %s", seat.engine.name, why, extra={"alpenglow": {"event": "engine lost"}})
        seat.away = True
        self._open(seat)
        revived = seat.engine.revive()
        revived.add_done_callback(lambda done: self._events.put(partial(self._back, seat, done)))

    def _back(self, seat: Seat, revived: "Future[None]") -> None:
        error = revived.exception()
        if error is None:
            log.info("%s is back", seat.engine.name, extra={"alpenglow": {"event": "engine back"}})
            seat.away = False
            self._open(seat)
            return
        log.error("%s does not come back: %s", seat.engine.name, error)
        self._seats.remove(seat)
        if not self._seats:
            raise EngineLostError(f"no engine is left; the last: {error}")

    def _abandon(self, why: str) -> None:
        while not self._events.empty():
            event = self._events.get()
            if isinstance(event, partial) and event.func == self._enter:
                event()
        for spread in self._served:
            spread.fail(spread.stopped(why))
        self._served = {}


def _nothing() -> None:
    """An event that is only to be looked after."""
