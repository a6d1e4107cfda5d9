"""A request spread over engines: which part is next, and what its result is once the parts are there."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from alpenglow.posterior import Posterior
from alpenglow.samplers.chains import Population
from alpenglow.scheduler.checkpoint import Checkpoint, fingerprint
from alpenglow.scheduler.errors import CheckpointError, SamplingError, caused
from alpenglow.scheduler.ledger import Ledger, block_size
from alpenglow.scheduler.parts import Block, BlockPart, Part, PilotPart, Prepared, WholePart
from alpenglow.scheduler.request import Request
from alpenglow.statistics import Entry

log = logging.getLogger("alpenglow.scheduler")

BLOCK = 64
"""Chains of a block where chains are independent and the request does not say. A number, not a share of the
engines: so that the result, Monte Carlo errors included, is the same on any number of them."""
LOSSES = 3
"""Engines that a part may cost, all but the first while it runs alone: it is then taken to be the cause."""


def default_population(request: Request) -> int | None:
    """Chains of a block, where the request does not say; None: as many as fit.

    Particles that are weighted form one population, which cannot be cut without another result: such a
    request is spread only where `population` says that it may be.
    """
    return request.population or (None if request.coupled else BLOCK)


class Spread(Ledger):
    """A request whose blocks run on engines, any of them, in any order; no engine itself, and no thread.

    Blocks are joined in the order of their chains, so that the result is that of one engine, bit for bit.
    population: chains of a block at most; window: chains that may be on the way or wait for earlier ones;
    device: for the posterior's settings.
    """

    def __init__(
        self,
        request: Request,
        *,
        population: int,
        window: int,
        device: str,
        publish: Callable[[Ledger], None] = lambda spread: None,
    ) -> None:
        super().__init__(request, population=population, publish=publish)
        self._window = window
        self._device = device
        chains = request.num_samples
        one = chains <= population and request.target is None and request.output is None
        self._again: list[Part] = [WholePart(chains) if one else PilotPart()]
        self._prepared: Prepared | None = None
        self._checkpoint: Checkpoint | None = None
        self._planned = 0
        self._waiting: dict[int, Block] = {}
        self._losses: dict[int, int] = {}
        self._starts: list[int] = []

    def settings(self) -> dict[str, Any]:
        """How the result is made; see `Posterior`."""
        return self.request.settings | {"device": self._device}

    def next(self) -> Part | None:
        """The part to run next, None where there is none at present."""
        if self.done:
            return None
        if self._again:
            return self._again.pop(0)
        try:
            return None if self._prepared is None else self._next_block(self._prepared)
        except Exception as error:  # of a checkpoint
            self.fail(self.explain(error))
            return None

    def _next_block(self, prepared: Prepared) -> Part | None:
        while count := block_size(self._planned, self.round_end(), self.population):
            start = self._planned
            if start + count - self.finished.count > max(self._window, count):
                return None
            self._planned += count
            found = None if self._checkpoint is None else self._checkpoint.load(start, count)
            if found is None:
                return BlockPart(start, count, prepared, self._entry)
            self._arrive(start, Block(*found, faults=0))
        return None

    @property
    def _entry(self) -> Entry | None:
        # Samples that go to a file pass through here.
        return None if self.request.output is not None else self.finished.entry

    def answer(self, part: Part, found: Posterior | Prepared | Block) -> None:
        """What a part gave."""
        if self.done:
            return
        try:
            if isinstance(found, Posterior):
                self.evaluations += round(found.nfe * found.num_samples)
                seconds = {"seconds": self._clock() - self.submitted}
                self.succeed(replace(found, diagnostics=found.diagnostics | seconds))
            elif isinstance(found, Prepared):
                self._prepare(found)
            else:
                self._keep(part.first, found)
                self._arrive(part.first, found)
        except Exception as error:
            self.fail(error if isinstance(error, CheckpointError) else self.explain(error))

    def refuse(self, part: Part, error: SamplingError) -> None:
        """A part failed, and with it the request; where memory ran out, its chains run again in halves."""
        if self.done:
            return
        if not (error.out_of_memory and isinstance(part, BlockPart) and part.count > 1):
            self.fail(error)
            return
        self.population = half = (part.count + 1) // 2
        log.warning("%s: out of memory, populations of %d now", self.where(), half)
        assert self._prepared is not None
        for first, count in ((part.first, half), (part.first + half, part.count - half)):
            self._again.append(BlockPart(first, count, self._prepared, self._entry))

    def lose(self, part: Part, why: str) -> None:
        """A part's engine is gone: run it again from the seed, but not for ever."""
        if self.done:
            return
        losses = self._losses[part.first] = self._losses.get(part.first, 0) + 1
        what = f"chains {part.first} to {part.first + part.count - 1}" if part.first >= 0 else "the pilot"
        if losses < LOSSES:
            log.warning("%s: %s lost with their engine, running again: %s", self.request.name, what, why)
            self._again.insert(0, part)
        else:
            self.fail(SamplingError(f"{self.request.name}: {what} ended {losses} engines; the last: {why}"))

    def suspects(self, part: Part) -> bool:
        """Whether a part was lost before: it is to run alone, lest it takes others along again."""
        return part.first in self._losses

    def postpone(self, part: Part) -> None:
        """Take back what `next` gave."""
        self._again.insert(0, part)

    def explain(self, error: BaseException) -> SamplingError:
        """The error of what happened here, not on an engine."""
        return caused(self.where(), error)

    def _prepare(self, found: Prepared) -> None:
        if found.probed is not None:
            assert self.request.output is not None
            mark = fingerprint(self.request, found.probed)
            self._checkpoint = Checkpoint.open(self.request.output, mark, self.population)
            self.population = self._checkpoint.population
        self.faults += found.faults
        self._prepared = replace(found, probed=None)
        self.stage = "chains"

    def _keep(self, start: int, block: Block) -> None:
        if self._checkpoint is not None:
            assert isinstance(block.chains, Population)
            self._checkpoint.save(start, block.chains, block.evaluations)

    def _arrive(self, start: int, block: Block) -> None:
        """Join the blocks whose turn it is; end where no more are needed."""
        self._waiting[start] = block
        while (ready := self._waiting.pop(self.finished.count, None)) is not None:
            self._starts.append(self.finished.count)
            self.faults += ready.faults
            self.evaluations += ready.evaluations
            if isinstance(ready.chains, Population):
                self.add(ready.chains, ready.evaluations)
            else:
                self.join(ready.chains)
        if self.finished.count == self.round_end():
            posterior = self.posterior()
            if self._checkpoint is not None:
                self.stage = "output"
                self._checkpoint.assemble(posterior, self._starts)
            self.succeed(posterior)
