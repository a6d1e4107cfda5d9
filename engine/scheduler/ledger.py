"""What is known of a request being served, wherever its chains run."""

import logging
import math
import time
from collections.abc import Callable
from typing import Any

from alpenglow.posterior import Posterior
from alpenglow.samplers.chains import Population
from alpenglow.scheduler.errors import RequestTimeoutError, SamplingError
from alpenglow.scheduler.gathered import Gathered
from alpenglow.scheduler.request import Request
from alpenglow.scheduler.stopping import FIRST_ROUND, Need, need, next_round

log = logging.getLogger("alpenglow.scheduler")

AGEING = 100
"""Turns of waiting that count as one of priority."""


def block_size(start: int, stop: int, largest: int) -> int:
    """Chains of the next block of [start, stop), which is cut into blocks of at most `largest`; 0 at its end.

    The blocks are of equal size: weights of modes need many chains.
    """
    left = stop - start
    return math.ceil(left / math.ceil(left / largest)) if left else 0


class Ledger:
    """The account of a request: the populations that are finished, the chains it needs, and how it ended.

    Any thread may read it at any time, and may set `cancelled`; the rest is for whoever serves the request.
    population: chains that run together at most. publish: called with this whenever something is new.
    """

    def __init__(
        self,
        request: Request,
        *,
        population: int,
        publish: Callable[["Ledger"], None] = lambda ledger: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.request = request
        self.submitted = clock()
        self.deadline = math.inf if request.timeout is None else self.submitted + request.timeout
        nothing = Gathered.empty(
            request.problem.image_shape, keep_samples=request.keep_samples, seed=request.seed
        )
        # One tuple, replaced as a whole: other threads read it.
        self._progress: tuple[Gathered, Need | None] = nothing, None
        self.population = population
        self.cancelled = False
        self.result: Any = None
        self.error: BaseException | None = None
        self.stage = "waiting"
        self.evaluations = 0
        self.last_served = 0
        self._publish = publish
        self._clock = clock
        self._accounted = 0
        self._share = 0.0
        self.faults = 0
        self._round_end = 0

    @property
    def finished(self) -> Gathered:
        """Populations so far."""
        return self._progress[0]

    @property
    def count(self) -> int:
        """Chains of the populations that are finished."""
        return self.result.num_samples if isinstance(self.result, Posterior) else self.finished.count

    @property
    def need(self) -> Need | None:
        """Chains needed, where the request has a target and finished populations."""
        return self._progress[1]

    @property
    def done(self) -> bool:
        """Whether there is nothing left to do, for good or ill."""
        return self.result is not None or self.error is not None

    @property
    def share(self) -> float:
        """Share of the expected work that is done, in [0, 1]."""
        if self.result is not None:
            return 1.0
        spent = self.finished.evaluations + self.evaluations - self._accounted
        self._share = max(self._share, min(spent / self.request.expected_nfe(self.expected_chains), 0.999))
        return self._share

    @property
    def expected_chains(self) -> int:
        """Chains that it will take, as far as is known."""
        limit = self.request.num_samples
        if self.request.target is None:
            return limit
        needed = FIRST_ROUND if self.need is None else max(self.finished.count, math.ceil(self.need.enough))
        return min(needed, limit)

    @property
    def turn_order(self) -> tuple[int, float, int]:
        """Sorts those that wait: higher priority, against which counts being served late, then the nearer
        deadline, then the longer wait."""
        return self.last_served // AGEING - self.request.priority, self.deadline, self.last_served

    def round_end(self) -> int:
        """Chains at the end of the present round; as many as are finished where no more are needed.

        What a round's populations are is known at its start: they may run at once.
        """
        done, limit = self.finished.count, self.request.num_samples
        if done >= self._round_end:
            more = limit - done if self.request.target is None else next_round(done, self.need, limit)
            self._round_end = done + more
        return self._round_end

    def where(self) -> str:
        """The request and its stage, for an error."""
        return f"{self.request.name}: {self.stage}"

    def overdue(self) -> SamplingError | None:
        """The error of a request that was cancelled, or whose timeout is over."""
        if self.cancelled:
            return SamplingError(f"{self.where()}: cancelled")
        if self._clock() > self.deadline:
            return RequestTimeoutError(
                f"{self.where()}: the timeout of {self.request.timeout:g} s is over; {self.finished.count} "
                "chains are finished (see `partial`)"
            )
        return None

    def stopped(self, why: str) -> SamplingError:
        """The error of a request that is ended for a reason of whoever serves it."""
        return SamplingError(
            f"{self.where()}: {why}; {self.finished.count} chains are finished (see `partial`)"
        )

    def fail(self, error: BaseException) -> None:
        """End with an error, keeping what was finished."""
        if self.done:
            return
        if isinstance(error, SamplingError):
            error.partial = self.partial()
        self.error = error
        self.stage = "failed"
        log.error("%s", error, extra={"alpenglow": {"event": "failed", "request": self.request.name}})
        self._publish(self)

    def succeed(self, result: Any) -> None:
        """End with a result."""
        self.result, self.stage = result, "done"
        self._publish(self)

    def partial(self) -> Posterior | None:
        """The posterior of the populations that are finished, None before the first."""
        if isinstance(self.result, Posterior):
            return self.result
        return self.posterior() if self.finished.count else None

    def posterior(self) -> Posterior:
        """The posterior of the populations that are finished, at least one."""
        gathered, found = self._progress
        extra: dict[str, Any] = {"seconds": self._clock() - self.submitted}
        if self.faults:
            extra["nan_evaluations"] = self.faults
        if found is not None:
            extra |= {"target_met": gathered.count >= found.enough, "chains_needed": found.enough}
        return gathered.posterior(extra, self.settings() | {"num_samples": gathered.count})

    def settings(self) -> dict[str, Any]:
        """How the result is made; see `Posterior`."""
        return self.request.settings

    def add(self, population: Population, evaluations: int) -> None:
        """The next population is finished, at a cost of `evaluations` NFE."""
        self._advance(self.finished.add(population, evaluations))

    def join(self, part: Gathered) -> None:
        """The next population is finished, and `part` is what it amounts to."""
        self._advance(self.finished.join(part))

    def _advance(self, gathered: Gathered) -> None:
        target, found = self.request.target, None
        if target is not None:
            found = need(gathered.groups, target, gathered.count / gathered.ess_pooled)
        self._accounted = self.evaluations
        self._progress = gathered, found
        facts = {
            "event": "population",
            "request": self.request.name,
            "chains": gathered.count,
            "evaluations": self.evaluations,
            "error": None if found is None else found.error,
        }
        log.info("%s: %d chains finished", self.request.name, gathered.count, extra={"alpenglow": facts})
        self._publish(self)
