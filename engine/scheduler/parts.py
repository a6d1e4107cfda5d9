"""A request in parts that can run anywhere: all of it, or its pilot, once, and then blocks of chains.

A part is data; run by an engine, it needs nothing but the request. Chains are keyed by seed and number, and
what they share is the pilot's plan: where a block runs, and when, and how often, changes nothing.
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from alpenglow.posterior import Posterior
from alpenglow.samplers.chains import Answer, Chains, Population
from alpenglow.scheduler.gathered import Gathered
from alpenglow.scheduler.request import Request
from alpenglow.scheduler.run import Run, Spent, on_cpu, whole
from alpenglow.statistics import Entry


class Part(Protocol):
    """A part of a request."""

    @property
    def first(self) -> int:
        """Its first chain, by which its request knows it; PILOT of the pilot."""

    @property
    def count(self) -> int:
        """Chains."""

    def alone(self, request: Request) -> Request:
        """The request as that of this part: what an engine makes room for."""

    def __call__(self, run: Run) -> Chains[Any]:
        """What the run of an engine does."""


PILOT = -1


@dataclass(frozen=True, eq=False)
class Prepared:
    """What the pilot found. plan: what the populations share; spent: on the way; faults: rows of NaN; probed:
    the prior at the probe of a checkpoint, where there is one."""

    plan: Any
    spent: Spent
    faults: int
    probed: Answer | None


@dataclass(frozen=True, eq=False)
class Block:
    """A finished block. chains: its population, or what it amounts to where samples are not wanted."""

    chains: Population | Gathered
    evaluations: int
    faults: int


@dataclass(frozen=True)
class WholePart:
    """All `count` chains of a request, and its posterior: where they form one population."""

    count: int
    first: int = 0

    def alone(self, request: Request) -> Request:
        """See Part."""
        return replace(request, timeout=None)

    def __call__(self, run: Run) -> Chains[Posterior]:
        """See Part."""
        posterior = yield from whole(run)
        moved: dict[str, Any] = {
            name: value.cpu() for name, value in vars(posterior).items() if isinstance(value, Tensor)
        }
        return replace(posterior, **moved)


@dataclass(frozen=True)
class PilotPart:
    """The pilot; gives what it `Prepared`."""

    first: int = PILOT
    count: int = 1

    def alone(self, request: Request) -> Request:
        """See Part."""
        return replace(request, timeout=None)

    def __call__(self, run: Run) -> Chains[Prepared]:
        """See Part."""
        probed = None
        if run.request.output is not None:
            energy, grad = yield from run.probe()
            probed = energy.cpu(), grad.cpu()
        plan = yield from run.pilot()
        return Prepared(plan, run.spent(), run.faults, probed)


@dataclass(frozen=True, eq=False)
class BlockPart:
    """The population of `count` chains from `first` on; gives a `Block`.

    entry: what a sample needs to be sent; None: all samples are sent, and no moments.
    """

    first: int
    count: int
    prepared: Prepared
    entry: Entry | None

    def alone(self, request: Request) -> Request:
        """See Part."""
        return replace(
            request, num_samples=self.count, population=self.count, target=None, output=None, timeout=None
        )

    def __call__(self, run: Run) -> Chains[Block]:
        """See Part."""
        if self.first == 0:
            run.charge(self.prepared.spent)
        population, evaluations = yield from run.chains(self.first, self.count, self.prepared.plan)
        population = on_cpu(population)
        if self.entry is None:
            return Block(population, evaluations, run.faults)
        gathered = Gathered.of(population, evaluations, first=self.first, entry=self.entry)
        return Block(gathered, evaluations, run.faults)
