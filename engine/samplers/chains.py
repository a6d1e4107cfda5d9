"""Samplers as generators: they yield what the prior is to evaluate, and are sent the answers.

Who answers is not a sampler's business. `drive` answers one sampler from its problem's prior; the scheduler
answers many, rows of all of them in one batch of the network, which makes a result no different.
"""

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

from torch import Tensor

from alpenglow.samplers.problem import Problem

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Evaluate:
    """A wish for the prior's E and G at images x [B, C, H, W] and levels sigma [B]; B NFE."""

    x: Tensor
    sigma: Tensor


Answer: TypeAlias = tuple[Tensor, Tensor]
"""E [B] and G [B, C, H, W]."""
Chains: TypeAlias = Generator[Evaluate, Answer, T]
"""A computation on chains that yields wishes, is sent their answers, and returns a T."""


@dataclass(frozen=True, eq=False)
class Population:
    """What chains that ran together end with.

    samples [N, C, H, W]; energy [N] at each sample's last level; ancestors [N]: founding chain of each
    sample, counted from 0 within the population, None where all are their own; diagnostics: see
    `Posterior.diagnostics`.
    """

    samples: Tensor
    energy: Tensor
    ancestors: Tensor | None = None
    diagnostics: dict[str, Any] = field(default_factory=dict)


def drive(chains: Chains[T], problem: Problem) -> T:
    """Run chains to their end, and return their result; every wish is evaluated by itself."""
    try:
        wish = next(chains)
        while True:
            wish = chains.send(problem.prior.energy_and_grad(wish.x, wish.sigma))
    except StopIteration as end:
        return end.value
