"""Counters of a scheduler, as plain numbers."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from alpenglow.scheduler.core import Core
from alpenglow.scheduler.ledger import Ledger


@dataclass(frozen=True)
class RequestMetrics:
    """One request that is served or waits.

    chains_done of chains_expected; nfe; error: present Monte Carlo error where it has a target; eta_seconds:
    at its speed so far, None before there is one.
    """

    name: str
    stage: str
    priority: int
    chains_done: int
    chains_expected: int
    nfe: int
    error: float | None
    seconds: float
    eta_seconds: float | None


@dataclass(frozen=True)
class Metrics:
    """A scheduler since its start.

    requests: live and waiting. finished, failed: requests. nfe: images that priors evaluated; nfe_per_second:
    over the time in which there was work. occupancy: share of the rows of network batches that were images of
    chains, the rest was padding. overhead: share of the busy time that neither priors nor samplers took.
    batches, retries: of priors.
    """

    requests: tuple[RequestMetrics, ...]
    finished: int
    failed: int
    batches: int
    retries: int
    nfe: int
    nfe_per_second: float
    occupancy: float
    overhead: float

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def measure(core: Core, *, finished: int = 0, failed: int = 0) -> Metrics:
    """The metrics of a core; finished, failed: requests that it no longer knows."""
    work = core.work
    busy = max(work.seconds, 1e-9)
    return Metrics(
        requests=tuple(_of_run(run) for run in (*core.live, *core.waiting)),
        finished=finished,
        failed=failed,
        batches=work.batches,
        retries=work.retries,
        nfe=work.rows,
        nfe_per_second=work.rows / busy,
        occupancy=work.rows / max(1, work.slots),
        overhead=1 - (work.prior_seconds + work.chain_seconds) / busy if work.seconds else 0.0,
    )


def together(
    engines: Sequence[Metrics], requests: Iterable[Ledger], *, finished: int, failed: int
) -> Metrics:
    """The metrics of several engines as those of one, for the requests that they share."""
    slots = sum(engine.nfe / engine.occupancy for engine in engines if engine.occupancy)
    rates = [engine.nfe_per_second for engine in engines]
    return Metrics(
        requests=tuple(map(_of_run, requests)),
        finished=finished,
        failed=failed,
        batches=sum(engine.batches for engine in engines),
        retries=sum(engine.retries for engine in engines),
        nfe=sum(engine.nfe for engine in engines),
        nfe_per_second=sum(rates),
        occupancy=sum(engine.nfe for engine in engines) / max(1, slots),
        overhead=sum(engine.overhead for engine in engines) / max(1, len(engines)),
    )


def _of_run(run: Ledger) -> RequestMetrics:
    seconds, share = time.monotonic() - run.submitted, run.share
    return RequestMetrics(
        name=run.request.name,
        stage=run.stage,
        priority=run.request.priority,
        chains_done=run.finished.count,
        chains_expected=run.expected_chains,
        nfe=run.evaluations,
        error=None if run.need is None else run.need.error,
        seconds=seconds,
        eta_seconds=seconds * (1 / share - 1) if share > 0 else None,
    )
