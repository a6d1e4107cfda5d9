"""The loop: fills network batches with rows of every request being served, one batch a turn.

Synchronous and deterministic: the same requests in the same order give the same batches. Which rows share a
batch changes no result (see Lane), only who waits for whom.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor

from alpenglow.priors.protocol import Prior
from alpenglow.samplers.chains import Answer
from alpenglow.scheduler.lane import Lane
from alpenglow.scheduler.ledger import Ledger
from alpenglow.scheduler.memory import device_memory
from alpenglow.scheduler.request import Request
from alpenglow.scheduler.run import Body, Run

log = logging.getLogger("alpenglow.scheduler")

MEMORY_SHARE = 0.5
"""Of the memory of a device, for chains; the rest is the network's."""


@dataclass(frozen=True, eq=False)
class Piece:
    """Rows x [B, C, H, W], sigma [B] of one run in a batch; first: number of the first in its wish."""

    run: Run
    x: Tensor
    sigma: Tensor
    first: int


@dataclass
class Work:
    """What was done: batches, their rows and slots, retries, and where the seconds went."""

    batches: int = 0
    rows: int = 0
    slots: int = 0
    retries: int = 0
    prior_seconds: float = 0.0
    chain_seconds: float = 0.0
    seconds: float = 0.0


class Core:
    """Serves runs until they are done; see the module.

    batch_size: rows that a prior sees at once, at most; "auto": found by measurement; None: what the prior
    says, all of a request's where it says nothing. max_memory: bytes for the state of all chains at once,
    None for half of the device's memory. Not thread-safe.
    Raises ValueError for another max_memory.
    """

    def __init__(
        self,
        *,
        batch_size: int | str | None = None,
        max_memory: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if max_memory is not None and not (type(max_memory) is int and max_memory > 0):
            raise ValueError(f"max_memory is {max_memory!r}; expected a positive number of bytes, or None")
        self.waiting: list[Run] = []
        self.live: list[Run] = []
        self.work = Work()
        self.turns = 0
        self._batch_size = batch_size
        self._max_memory = max_memory
        self._clock = clock
        self._limits: dict[torch.device, int] = {}
        self._lanes: dict[int, tuple[Prior, Lane]] = {}
        self._last_lane = 0

    def make(
        self,
        request: Request,
        publish: Callable[[Ledger], None] = lambda run: None,
        body: Body | None = None,
    ) -> Run:
        """A run of `request`, or of the part of it that `body` is; see Run."""
        limit = self._limit(request.problem.y.device)
        return Run(request, max_memory=limit, publish=publish, clock=self._clock, body=body)

    def queue(self, run: Run) -> None:
        """Serve `run` from the next turn on."""
        run.last_served = self.turns
        self.waiting.append(run)

    def _limit(self, device: torch.device) -> int:
        """Bytes for the state of chains on a device."""
        if device not in self._limits:
            self._limits[device] = self._max_memory or int(MEMORY_SHARE * device_memory(device))
        return self._limits[device]

    def turn(self) -> bool:
        """Answer one network batch. False where nothing is left to serve."""
        began = time.perf_counter()
        self.turns += 1
        self._expire()
        self._admit()
        lane = self._next_lane()
        if lane is not None:
            pieces = self._fill(lane)
            answers = self._answer(lane, pieces)
            self._give(lane, pieces, answers)
            self._sweep()
        self.work.seconds += time.perf_counter() - began
        return bool(self.live or self.waiting)

    def _expire(self) -> None:
        for run in (*self.live, *self.waiting):
            if (error := run.overdue()) is not None:
                run.fail(error)
        self._sweep()

    def _sweep(self) -> None:
        self.live = [run for run in self.live if not run.done]
        self.waiting = [run for run in self.waiting if not run.done]

    def _admit(self) -> None:
        """Start waiting runs while their chains fit, strictly in order, so that large ones get their turn."""
        for run in sorted(self.waiting, key=attrgetter("turn_order")):
            device = run.request.problem.y.device
            others = [other for other in self.live if other.request.problem.y.device == device]
            if others and sum(other.memory for other in others) + run.memory > self._limit(device):
                return
            self.waiting.remove(run)
            run.last_served = self.turns - 1  # before those that this turn serves
            run.start()
            if not run.done:
                self.live.append(run)

    def _next_lane(self) -> Lane | None:
        """The priors that are waited for, in turn."""
        priors = {id(run.request.problem.prior): run.request.problem.prior for run in self.live}
        if not priors:
            return None
        keys = list(priors)
        after = keys.index(self._last_lane) + 1 if self._last_lane in priors else 0
        key = self._last_lane = keys[after % len(keys)]
        if key not in self._lanes:
            # With the prior itself: once nobody holds it, its id may come to mean another one.
            self._lanes[key] = priors[key], Lane.to(priors[key], self._batch_size)
        return self._lanes[key][1]

    def _fill(self, lane: Lane) -> list[Piece]:
        """The rows of the next batch."""
        key = self._last_lane
        mine = [run for run in self.live if id(run.request.problem.prior) == key]
        runs = sorted(mine, key=attrgetter("turn_order"))
        pieces = []
        room = lane.capacity
        for run in runs if lane.slots is not None else runs[:1]:
            first = run.taken
            x, sigma = run.take(run.pending if room is None else min(room, run.pending))
            pieces.append(Piece(run, x, sigma, first))
            run.last_served = self.turns
            if room is None:
                break
            room -= len(sigma)
            if room == 0:
                break
        return pieces

    def _answer(self, lane: Lane, pieces: list[Piece]) -> list[Answer | None]:
        """The prior's answers to each piece; None where it failed, twice, and the run with it."""
        began = time.perf_counter()
        with nvtx("alpenglow.prior"):
            answers = self._evaluate(lane, pieces)
        rows = sum(len(piece.sigma) for piece in pieces)
        self.work.batches += 1
        self.work.rows += rows
        self.work.slots += max(rows, lane.slots or rows)
        self.work.prior_seconds += time.perf_counter() - began
        return answers

    def _evaluate(self, lane: Lane, pieces: list[Piece]) -> list[Answer | None]:
        diverged = [piece for piece in pieces if not _finite(piece.x)]
        for piece in diverged:
            rows = piece.first + (~piece.x.flatten(1).isfinite().all(1)).nonzero().flatten()
            piece.run.fail(piece.run.explain(RuntimeError("diverged: NaN or infinity in images"), rows))
        sound = [piece for piece in pieces if piece not in diverged]
        if not sound:
            return [None] * len(pieces)
        try:
            if len(sound) == 1:
                together = lane.evaluate(sound[0].x, sound[0].sigma)
            else:
                together = lane.evaluate(
                    torch.cat([piece.x for piece in sound]), torch.cat([piece.sigma for piece in sound])
                )
        except Exception as error:
            log.warning("%s: trying again, one request at a time", error)
            alone = iter([self._alone(lane, piece) for piece in sound])
        else:
            sizes = [len(piece.sigma) for piece in sound]
            parts = zip(together[0].split(sizes), together[1].split(sizes), strict=True)
            alone = iter([self._repaired(lane, *pair) for pair in zip(sound, parts, strict=True)])
        return [None if piece in diverged else next(alone) for piece in pieces]

    def _alone(self, lane: Lane, piece: Piece) -> Answer | None:
        """A second try, in which a request that makes the prior fail fails by itself."""
        self.work.retries += 1
        try:
            return self._repaired(lane, piece, lane.evaluate(piece.x, piece.sigma))
        except Exception as error:
            rows = piece.first + torch.arange(len(piece.sigma))
            piece.run.fail(piece.run.explain(error, rows))
            return None

    def _repaired(self, lane: Lane, piece: Piece, answer: Answer) -> Answer | None:
        """The answer, with NaN tried again once: a fault of the moment must not end in a sample.

        What is NaN again is left to the sampler, which may hold the chain. On the CPU alone: on a GPU the
        look would make the host wait at every batch.
        """
        energy, grad = answer
        if energy.device.type != "cpu" or not (energy.isnan().any() or grad.isnan().any()):
            return answer
        bad = energy.isnan() | grad.flatten(1).isnan().any(1)
        self.work.retries += 1
        try:
            again = lane.evaluate(piece.x[bad], piece.sigma[bad])
        except Exception as error:
            piece.run.fail(piece.run.explain(error, piece.first + bad.nonzero().flatten()))
            return None
        energy, grad = energy.clone(), grad.clone()
        energy[bad], grad[bad] = again
        still = int((energy.isnan() | grad.flatten(1).isnan().any(1)).sum())
        if still:
            piece.run.fault(still)
        return energy, grad

    def _give(self, lane: Lane, pieces: list[Piece], answers: list[Answer | None]) -> None:
        began = time.perf_counter()
        with nvtx("alpenglow.chains"):
            for piece, answer in zip(pieces, answers, strict=True):
                if answer is not None and not piece.run.done:
                    piece.run.give(*answer)
        self.work.chain_seconds += time.perf_counter() - began


def _finite(x: Tensor) -> bool:
    """Whether all of x is finite; not looked at on a GPU, where the host would wait."""
    return x.device.type != "cpu" or bool(x.isfinite().all())


@contextlib.contextmanager
def nvtx(name: str) -> Iterator[None]:
    """A named range for NVIDIA's profilers, where there is CUDA."""
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.nvtx.range_push(name)
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()
