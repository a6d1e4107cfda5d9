"""A request on its way: populations of chains one after another, until there are enough."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from alpenglow.operators.cg import CgCount, count_iterations
from alpenglow.posterior import Posterior
from alpenglow.samplers.chains import Answer, Chains, Evaluate, Population
from alpenglow.samplers.problem import Noise
from alpenglow.scheduler.checkpoint import Checkpoint, fingerprint, probe
from alpenglow.scheduler.errors import CheckpointError, SamplingError, caused
from alpenglow.scheduler.ledger import Ledger, block_size
from alpenglow.scheduler.memory import current_device, is_out_of_memory
from alpenglow.scheduler.request import Request

log = logging.getLogger("alpenglow.scheduler")


class Run(Ledger):
    """One request being served by a loop (core.py), or a part of one.

    It wants the rows of one wish at a time; `take` gives them out, `give` brings their answers, and with the
    last of them the chains go on to their next wish. body: what is to be done, `whole` or a part.
    """

    def __init__(
        self,
        request: Request,
        *,
        max_memory: int,
        publish: Callable[[Ledger], None] = lambda run: None,
        clock: Callable[[], float] = time.monotonic,
        body: "Body | None" = None,
    ) -> None:
        super().__init__(
            request, population=request.population_limit(max_memory), publish=publish, clock=clock
        )
        self._chains: Chains[Any] = (body or whole)(self)
        self._first_chain = 0
        self._solved, self._solving = CgCount(), CgCount()
        self._wish: Evaluate | None = None
        self._taken = self._answered = 0
        self._energy = self._grad = torch.empty(0)

    @property
    def memory(self) -> int:
        """Estimate of the bytes that its chains take at once."""
        return self.request.chain_bytes * min(self.population, self.request.num_samples)

    @property
    def taken(self) -> int:
        """Rows of the present wish that were taken."""
        return self._taken

    @property
    def pending(self) -> int:
        """Rows that wait for the prior."""
        return 0 if self._wish is None else len(self._wish.sigma) - self._taken

    def start(self) -> None:
        """Come to the first wish."""
        self._resume(None)

    def take(self, count: int) -> tuple[Tensor, Tensor]:
        """x [B, C, H, W] and sigma [B] of the next rows, B <= count, for the prior."""
        assert self._wish is not None
        rows = slice(self._taken, self._taken + count)
        x, sigma = self._wish.x[rows], self._wish.sigma[rows]
        self._taken += len(sigma)
        return x, sigma

    def give(self, energy: Tensor, grad: Tensor) -> None:
        """The answers to the oldest rows that were taken and not answered, [B] and [B, C, H, W]."""
        assert self._wish is not None
        total, count = len(self._wish.sigma), len(energy)
        self.evaluations += count
        if count == total:
            answer: Answer = energy, grad
        else:
            if self._answered == 0:
                self._energy = energy.new_empty(total)
                self._grad = torch.empty_like(self._wish.x, dtype=grad.dtype)
            rows = slice(self._answered, self._answered + count)
            self._energy[rows], self._grad[rows] = energy, grad
            answer = self._energy, self._grad
        self._answered += count
        if self._answered == total:
            self._resume(answer)

    def fault(self, count: int) -> None:
        """Note `count` rows of the present wish to which the prior answered NaN, twice."""
        if self.faults == 0:
            log.warning("%s: NaN from the prior", self.where())
        self.faults += count

    def where(self, rows: Tensor | None = None) -> str:
        """The request, its stage, the chains of `rows` of the present wish and its levels, for an error."""
        text = super().where()
        if self._wish is not None:
            sigma = self._wish.sigma if rows is None else self._wish.sigma[rows]
            low, high = sigma.min().item(), sigma.max().item()
            text += f", level {high:.4g}" + ("" if low == high else f" to {low:.4g}")
            if rows is not None:
                text += f", chains {[self._first_chain + row for row in rows.tolist()[:5]]}"
        return text

    def fail(self, error: BaseException) -> None:
        """End the run with an error, keeping what was finished."""
        if self.done:
            return
        self._chains.close()
        self._wish = None
        super().fail(error)

    def _resume(self, answer: Answer | None) -> None:
        """Let the chains go on to their next wish, or to their end."""
        try:
            with count_iterations() as self._solving, current_device(self.request.problem.y.device):
                self._wish = next(self._chains) if answer is None else self._chains.send(answer)
            self._taken = self._answered = 0
            self._energy = self._grad = torch.empty(0)
        except StopIteration as end:
            self._wish = None
            self.succeed(end.value)
        except Exception as error:
            self.fail(error if isinstance(error, CheckpointError) else self.explain(error))
        self._solved, self._solving = _together(self._solved, self._solving), CgCount()

    def explain(self, error: Exception, rows: Tensor | None = None) -> SamplingError:
        """The error that names this request, what it did, and `rows` of its present wish."""
        nan = f" (the prior gave NaN for {self.faults} images)" if self.faults else ""
        failure = caused(self.where(rows), error, nan)
        failure.out_of_memory = is_out_of_memory(error)
        return failure

    def probe(self) -> Chains[Answer]:
        """The prior at the probe of a checkpoint's fingerprint, which is no part of the samples."""
        self.stage = "checkpoint"
        x = probe(self.request)
        evaluated = yield Evaluate(x, torch.ones(1, dtype=x.dtype, device=x.device))
        self._accounted = self.evaluations
        return evaluated

    def pilot(self) -> Chains[Any]:
        """What all populations share."""
        self.stage = "pilot"
        request = self.request
        return (yield from request.sampler.prepare(request.problem, request.seed, request.options))

    def chains(self, start: int, count: int, plan: Any) -> Chains[tuple[Population, int]]:
        """The population of `count` chains from `start` on, and its NFE, the pilot's in the first one's."""
        self.stage, self._first_chain = f"chains {start} to {start + count - 1}", start
        problem = self.request.problem
        ids = start + torch.arange(count, device=problem.y.device)
        noise = Noise(self.request.seed, ids)
        population = yield from self.request.sampler.chains(problem, noise, plan)
        spent = self.spent()
        if spent.solved.solves:
            counts = {
                "cg_solves": spent.solved.solves,
                "cg_iterations": spent.solved.total,
                "cg_iterations_max": spent.solved.largest,
            }
            population = replace(population, diagnostics=population.diagnostics | counts)
        return population, spent.evaluations

    def spent(self) -> "Spent":
        """What is not accounted for yet, and from now on is."""
        solved = _together(self._solved, self._solving)
        # The rest of the present turn is the next population's.
        self._solved, self._solving.solves, self._solving.total = CgCount(), 0, 0
        evaluations, self._accounted = self.evaluations - self._accounted, self.evaluations
        return Spent(evaluations, CgCount(solved.solves, int(solved.total), int(solved.largest)))

    def charge(self, spent: "Spent") -> None:
        """Account for what was spent elsewhere with the next population."""
        self._accounted -= spent.evaluations
        self._solved = _together(self._solved, spent.solved)


@dataclass(frozen=True)
class Spent:
    """Network evaluations (NFE) and CG solves."""

    evaluations: int
    solved: CgCount


Body: TypeAlias = Callable[[Run], Chains[Any]]
"""What a run does, as one sampler; what it returns is the run's result."""


def whole(run: Run) -> Chains[Posterior]:
    """A request from its pilot to its posterior."""
    request = run.request
    checkpoint = None
    if request.output is not None:
        evaluated = yield from run.probe()
        checkpoint = Checkpoint.open(request.output, fingerprint(request, evaluated), run.population)
        run.population = checkpoint.population
    plan = yield from run.pilot()
    starts = []
    while count := block_size(start := run.finished.count, run.round_end(), run.population):
        done = None if checkpoint is None else checkpoint.load(start, count)
        if done is None:
            try:
                done = yield from run.chains(start, count, plan)
            except Exception as error:
                if not (is_out_of_memory(error) and count > 1):
                    raise
                run.population = (count + 1) // 2
                log.warning("%s: out of memory, populations of %d now", run.where(), run.population)
                continue
            if checkpoint is not None:
                done = on_cpu(done[0]), done[1]
                checkpoint.save(start, *done)
        starts.append(start)
        run.add(*done)
    posterior = run.posterior()
    if checkpoint is not None:
        run.stage = "output"
        checkpoint.assemble(posterior, starts)
    return posterior


def _together(a: CgCount, b: CgCount) -> CgCount:
    if not (a.solves and b.solves):
        return a if a.solves else b
    return CgCount(a.solves + b.solves, a.total + b.total, torch.as_tensor(a.largest).clamp(min=b.largest))


def on_cpu(population: Population) -> Population:
    """The same, on the CPU."""
    ancestors = None if population.ancestors is None else population.ancestors.cpu()
    return replace(
        population, samples=population.samples.cpu(), energy=population.energy.cpu(), ancestors=ancestors
    )
