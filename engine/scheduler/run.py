"""A request on its way: populations of chains one after another, until there are enough."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from alpenglow.operators.cg import CgCount, count_iterations
from alpenglow.posterior import Posterior
from alpenglow.samplers.chains import Answer, Chains, Evaluate, Population
from alpenglow.samplers.problem import Noise
from alpenglow.scheduler.checkpoint import Checkpoint, fingerprint, probe
from alpenglow.scheduler.errors import CheckpointError, SamplingError
from alpenglow.scheduler.gathered import Gathered
from alpenglow.scheduler.memory import LARGEST_POPULATION, is_out_of_memory
from alpenglow.scheduler.request import Request
from alpenglow.scheduler.stopping import FIRST_ROUND, Need, need, next_round

log = logging.getLogger("alpenglow.scheduler")


class Run:
    """One request being served.

    It wants the rows of one wish at a time; `take` gives them out, `give` brings their answers, and with the
    last of them the chains go on to their next wish. What the outside may read at any time: `finished`
    and `need` so far, `stage`, `evaluations`, `result`, `error`. It may set `cancelled`.
    """

    def __init__(
        self,
        request: Request,
        *,
        max_memory: int,
        publish: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.request = request
        self.submitted = clock()
        self.deadline = math.inf if request.timeout is None else self.submitted + request.timeout
        nothing = Gathered.empty(
            request.problem.image_shape, keep_samples=request.output is None, seed=request.seed
        )
        # One tuple, replaced as a whole: other threads read it.
        self._progress: tuple[Gathered, Need | None] = nothing, None
        self.cancelled = False
        self.result: Posterior | None = None
        self.error: BaseException | None = None
        self.stage = "waiting"
        self.evaluations = 0
        self.last_served = 0
        fits = max(1, max_memory // request.chain_bytes)
        self.population = min(request.population or LARGEST_POPULATION, fits)
        self._publish = publish
        self._clock = clock
        self._chains: Chains[Posterior] = self._body()
        self._first_chain = 0
        self._solved, self._solving = CgCount(), CgCount()
        self._accounted = 0
        self._share = 0.0
        self._faults = 0
        self._wish: Evaluate | None = None
        self._taken = self._answered = 0
        self._energy = self._grad = torch.empty(0)

    @property
    def finished(self) -> Gathered:
        """Populations so far."""
        return self._progress[0]

    @property
    def need(self) -> Need | None:
        """Chains needed, where the request has a target and finished populations."""
        return self._progress[1]

    @property
    def done(self) -> bool:
        """Whether there is nothing left to do, for good or ill."""
        return self.result is not None or self.error is not None

    @property
    def memory(self) -> int:
        """Estimate of the bytes that its chains take at once."""
        return self.request.chain_bytes * min(self.population, self.request.num_samples)

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
        if self._faults == 0:
            log.warning("%s: NaN from the prior", self.where())
        self._faults += count

    def where(self, rows: Tensor | None = None) -> str:
        """The request, its stage, the chains of `rows` of the present wish and its levels, for an error."""
        text = f"{self.request.name}: {self.stage}"
        if self._wish is not None:
            sigma = self._wish.sigma if rows is None else self._wish.sigma[rows]
            low, high = sigma.min().item(), sigma.max().item()
            text += f", level {high:.4g}" + ("" if low == high else f" to {low:.4g}")
            if rows is not None:
                text += f", chains {[self._first_chain + row for row in rows.tolist()[:5]]}"
        return text

    def fail(self, error: BaseException) -> None:
        """End the run with an error that names it, what it did, and keeps what was finished."""
        if self.done:
            return
        self._chains.close()
        self._wish = None
        if isinstance(error, SamplingError):
            error.partial = self.partial()
        self.error = error
        self.stage = "failed"
        log.error("%s", error, extra={"alpenglow": {"event": "failed", "request": self.request.name}})
        self._publish()

    def partial(self) -> Posterior | None:
        """The posterior of the populations that are finished, None before the first."""
        return self._posterior() if self.finished.count else None

    def _posterior(self) -> Posterior:
        gathered, found = self._progress
        extra: dict[str, Any] = {"seconds": self._clock() - self.submitted}
        if self._faults:
            extra["nan_evaluations"] = self._faults
        if found is not None:
            extra |= {"target_met": gathered.count >= found.enough, "chains_needed": found.enough}
        return gathered.posterior(extra, self.request.settings | {"num_samples": gathered.count})

    def _resume(self, answer: Answer | None) -> None:
        """Let the chains go on to their next wish, or to their end."""
        try:
            with count_iterations() as self._solving:
                self._wish = next(self._chains) if answer is None else self._chains.send(answer)
            self._taken = self._answered = 0
            self._energy = self._grad = torch.empty(0)
        except StopIteration as end:
            self._wish, self.result, self.stage = None, end.value, "done"
            self._publish()
        except Exception as error:
            self.fail(error if isinstance(error, CheckpointError) else self.explain(error))
        self._solved, self._solving = _together(self._solved, self._solving), CgCount()

    def explain(self, error: Exception, rows: Tensor | None = None) -> SamplingError:
        """The error that names this request, what it did, and `rows` of its present wish."""
        nan = f" (the prior gave NaN for {self._faults} images)" if self._faults else ""
        failure = SamplingError(f"{self.where(rows)}: {str(error) or type(error).__name__}{nan}")
        failure.__cause__ = error
        return failure

    def _body(self) -> Chains[Posterior]:
        """The whole request as one sampler."""
        request = self.request
        problem, sampler = request.problem, request.sampler
        checkpoint = None
        if request.output is not None:
            self.stage = "checkpoint"
            x = probe(request)
            evaluated = yield Evaluate(x, torch.ones(1, dtype=x.dtype, device=x.device))
            self._accounted = self.evaluations  # no part of the samples
            checkpoint = Checkpoint.open(request.output, fingerprint(request, evaluated), self.population)
            self.population = checkpoint.population
        self.stage = "pilot"
        plan = yield from sampler.prepare(problem, request.seed, request.options)
        starts = []
        while count := self._next_population():
            start = self.finished.count
            self.stage, self._first_chain = f"chains {start} to {start + count - 1}", start
            done = None if checkpoint is None else checkpoint.load(start, count)
            if done is None:
                ids = start + torch.arange(count, device=problem.y.device)
                try:
                    population = yield from sampler.chains(problem, Noise(request.seed, ids), plan)
                except Exception as error:
                    if not (is_out_of_memory(error) and count > 1):
                        raise
                    self.population = (count + 1) // 2
                    log.warning("%s: out of memory, populations of %d now", self.where(), self.population)
                    continue
                done = self._account(population)
                if checkpoint is not None:
                    done = _on_cpu(done[0]), done[1]
                    checkpoint.save(start, *done)
            self._accounted = self.evaluations
            starts.append(start)
            self._add(*done)
        posterior = self._posterior()
        if checkpoint is not None:
            self.stage = "output"
            checkpoint.assemble(posterior, starts)
        return posterior

    def _next_population(self) -> int:
        """Chains of the next population, 0 for none."""
        done, limit = self.finished.count, self.request.num_samples
        if self.request.target is None:
            left = limit - done
            # Of equal size: weights of modes need many chains.
            return math.ceil(left / math.ceil(left / self.population)) if left else 0
        return min(self.population, next_round(done, self.need, limit))

    def _account(self, population: Population) -> tuple[Population, int]:
        """A finished population with its CG iterations, and its NFE (the first one's with the pilot's)."""
        solved = _together(self._solved, self._solving)
        # The rest of the present turn is the next population's.
        self._solved, self._solving.solves, self._solving.total = CgCount(), 0, 0
        if solved.solves:
            counts = {
                "cg_solves": solved.solves,
                "cg_iterations": int(solved.total),
                "cg_iterations_max": int(solved.largest),
            }
            population = replace(population, diagnostics=population.diagnostics | counts)
        return population, self.evaluations - self._accounted

    def _add(self, population: Population, evaluations: int) -> None:
        gathered, target, found = self.finished.add(population, evaluations), self.request.target, None
        if target is not None:
            found = need(gathered.groups, target, gathered.count / gathered.ess_pooled)
        self._progress = gathered, found
        facts = {
            "event": "population",
            "request": self.request.name,
            "chains": self.finished.count,
            "evaluations": self.evaluations,
            "error": None if self.need is None else self.need.error,
        }
        log.info("%s: %d chains finished", self.request.name, self.finished.count, extra={"alpenglow": facts})
        self._publish()


def _together(a: CgCount, b: CgCount) -> CgCount:
    if not (a.solves and b.solves):
        return a if a.solves else b
    return CgCount(a.solves + b.solves, a.total + b.total, torch.as_tensor(a.largest).clamp(min=b.largest))


def _on_cpu(population: Population) -> Population:
    ancestors = None if population.ancestors is None else population.ancestors.cpu()
    return replace(
        population, samples=population.samples.cpu(), energy=population.energy.cpu(), ancestors=ancestors
    )
