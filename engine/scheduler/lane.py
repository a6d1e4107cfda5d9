"""The way to one prior: rows in, energies and gradients out, in batches that fit its memory."""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from alpenglow.priors.batched import BatchedPrior
from alpenglow.priors.protocol import Prior
from alpenglow.samplers.chains import Answer
from alpenglow.scheduler.memory import current_device, find_batch_size, is_out_of_memory

log = logging.getLogger("alpenglow.scheduler")


@dataclass
class Lane:
    """One prior, and how it is called.

    slots: rows of a batch, for priors that promise (BatchedPrior) that a row's result does not depend on the
    others; None for priors that do not promise it, whose batches then hold the rows of one request alone.
    limit: rows a call at most, None for all.
    """

    prior: Prior
    slots: int | None
    limit: int | None

    @classmethod
    def to(cls, prior: Prior, batch_size: int | str | None) -> "Lane":
        """A lane to `prior`; batch_size: rows a call at most, "auto" for what a measurement finds best."""
        if not isinstance(prior, BatchedPrior):
            return cls(prior, None, batch_size if isinstance(batch_size, int) else None)
        if batch_size == "auto":
            prior = _at_best_batch(prior)
        slots = prior.batch_size
        return cls(prior, min(slots, batch_size) if isinstance(batch_size, int) else slots, None)

    @property
    def capacity(self) -> int | None:
        """Rows of the next batch at most."""
        return self.slots if self.slots is not None else self.limit

    def evaluate(self, x: Tensor, sigma: Tensor) -> Answer:
        """E [B] and G [B, C, H, W] at x [B, C, H, W], sigma [B]. Where memory runs out, by halves.

        Raises what the prior raises.
        """
        answers: list[Answer] = []
        done = 0
        while done < len(x):
            rows = slice(done, done + (self.capacity or len(x)))
            try:
                with current_device(x.device):
                    answers.append(self.prior.energy_and_grad(x[rows], sigma[rows]))
                done += len(x[rows])
                continue
            except Exception as error:
                if not (is_out_of_memory(error) and self._can_halve(len(x[rows]))):
                    raise
            # Not in the handler: the error holds on to the memory of what failed.
            self._halve(len(x[rows]))
        if len(answers) == 1:
            return answers[0]
        energies, grads = zip(*answers, strict=True)
        return torch.cat(energies), torch.cat(grads)

    def _can_halve(self, rows: int) -> bool:
        return (self.prior.batch_size if isinstance(self.prior, BatchedPrior) else rows) > 1

    def _halve(self, rows: int) -> None:
        """From now on at most half of the `rows` that did not fit."""
        if isinstance(self.prior, BatchedPrior):
            half = self.prior.batch_size // 2
            self.prior = self.prior.with_batch_size(half)
            self.slots = min(self.slots or half, half)
        else:
            self.limit = half = max(1, rows // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        facts = {"event": "out of memory", "batch": half}
        log.warning("out of memory: batches of %d images from now on", half, extra={"alpenglow": facts})


def _at_best_batch(prior: BatchedPrior) -> BatchedPrior:
    """The prior at the batch that a measurement finds; as it is where it runs at its own alone."""
    try:
        found = find_batch_size(prior)
    except RuntimeError as error:
        log.warning("%s: batches stay at %d: %s", prior.name, prior.batch_size, error)
        return prior
    log.info("%s: batches of %d, %.0f images a second", prior.name, found.best, found.rates[found.best])
    return prior.with_batch_size(found.best)
