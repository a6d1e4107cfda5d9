"""Serving many requests at once: the same results as alone, full batches, and fair turns."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import alpenglow as ag
from alpenglow.scheduler import SamplingError, ledger
from alpenglow.scheduler.core import Core
from alpenglow.scheduler.ledger import AGEING
from benchmarks.beds import several_modes
from tests.scheduling import NFE, Independent, arguments, exact, queue, same, serve

MIXED: list[dict[str, Any]] = [
    {"method": "calibrated", "num_samples": 11},
    {"method": "alps"},
    {"method": "mala", "nfe": 20},
    {"method": "calibrated", "operator": ag.operators.GaussianBlur(1.0), "num_samples": 3},
    {"operator": ag.operators.Denoising(), "num_samples": 20, "population": 7},
    {"method": "kinetic-metropolis", "nfe": 15, "priority": 2},
]


def alone(prior: Any, given: dict[str, Any]) -> ag.Posterior:
    own = {key: value for key, value in given.items() if key not in ("priority", "population")}
    return ag.sample(prior, **own)


# --- Results ---


def test_results_are_those_of_a_request_alone_to_the_last_bit() -> None:
    """Methods, operators, sizes and populations of all kinds in the same batches."""
    prior = Independent()
    with ag.Scheduler() as scheduler:
        handles = [scheduler.submit(prior, **arguments(i, **mixed)) for i, mixed in enumerate(MIXED)]
        posteriors = [handle.result(60) for handle in handles]
    # Counted by a callback, which may run after whoever waited for the result has gone on.
    assert scheduler.metrics().finished == len(MIXED)
    for i, posterior in enumerate(posteriors):
        expected = alone(Independent(), arguments(i, **MIXED[i]))
        assert same(posterior, expected), i
        assert posterior.nfe == expected.nfe
        assert posterior.settings == expected.settings


def test_results_do_not_depend_on_when_others_come_and_go() -> None:
    prior, given = Independent(), arguments(0, num_samples=5)
    expected = alone(prior, given)
    core = Core()
    queue(core, prior, 1, num_samples=30)
    for _ in range(17):
        core.turn()
    run = queue(core, prior, 0, num_samples=5)
    leaver = queue(core, prior, 2, num_samples=9)
    for _ in range(23):
        core.turn()
    leaver.cancelled = True
    queue(core, prior, 3, num_samples=13, priority=3)
    serve(core)
    assert run.result is not None
    assert same(run.result, expected)
    assert isinstance(leaver.error, SamplingError)


def test_a_weighted_population_in_company_is_what_it_is_alone() -> None:
    bed = several_modes()
    given = {"operator": bed.operator, "y": bed.y, "noise_std": bed.noise_std, "num_samples": 200, "nfe": 30}
    expected = ag.sample(bed.prior, **given)
    assert expected.diagnostics["modes"] > 1
    with ag.Scheduler() as scheduler:
        others = [scheduler.submit(bed.prior, **given | {"seed": k, "num_samples": 20}) for k in (1, 2)]
        posterior = scheduler.submit(bed.prior, **given).result(120)
        assert all(other.result(120) for other in others)
    assert same(posterior, expected)
    assert posterior.diagnostics["resamplings"] == expected.diagnostics["resamplings"]


def test_populations_of_independent_chains_are_the_chains_of_one() -> None:
    prior = Independent()
    whole = ag.sample(prior, **arguments(num_samples=20))
    core = Core()
    parts = queue(core, prior, num_samples=20, population=6)
    serve(core)
    assert parts.result is not None
    assert same(parts.result, whole)
    assert parts.result.nfe == whole.nfe
    assert parts.result.diagnostics["populations"] == 4
    assert torch.equal(parts.result.std, whole.std)
    assert parts.result.diagnostics["lineages"] == 20


def test_cg_iterations_are_counted_for_the_request_that_they_are_of() -> None:
    blur = ag.operators.GaussianBlur(1.0)
    iterative = ag.operators.LinearOperator.from_functions(blur.forward, blur.adjoint)
    given = arguments(operator=iterative, num_samples=3)
    expected = ag.sample(Independent(), **given).diagnostics
    prior = Independent()
    with ag.Scheduler() as scheduler:
        handles = [scheduler.submit(prior, **given | {"population": p}) for p in (3, 1)]
        handles.append(scheduler.submit(prior, **arguments(1)))
        whole, parts, other = [handle.result(60).diagnostics for handle in handles]
    for name in ("cg_solves", "cg_iterations", "cg_iterations_max"):
        assert whole[name] == expected[name]
        assert parts[name] == expected[name]
        assert name not in other


# --- Batches and turns ---


def test_batches_are_filled_from_several_requests() -> None:
    prior, core = Independent(batch_size=8), Core()
    runs = [queue(core, prior, i, num_samples=n) for i, n in enumerate((6, 5, 7, 6))]
    serve(core)
    assert all(run.result is not None for run in runs)
    assert core.work.rows == sum(prior.asked) == NFE * (6 + 5 + 7 + 6)
    # Alone each would take a batch an iteration, 4 for 24 rows: 0.75.
    assert core.work.rows / core.work.slots > 0.9


def test_priors_take_turns() -> None:
    priors, core = [Independent(name="a"), Independent(name="b")], Core()
    runs = [queue(core, prior, i) for i, prior in enumerate(priors)]
    for turn in range(1, 21):
        core.turn()
        assert abs(len(priors[0].asked) - len(priors[1].asked)) <= 1, turn
    serve(core)
    assert all(run.result is not None for run in runs)


class Unpromising:
    """A prior whose results do depend on the batch: each row's on the number of rows."""

    image_shape = (1, 4, 4)

    def energy_and_grad(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        square = sigma.square()[:, None, None, None]
        grad = x * square / (square + 0.1 + 1e-3 * len(x))
        return (0.5 * x * grad).flatten(1).sum(1), grad


def test_priors_that_promise_nothing_see_one_request_at_a_time() -> None:
    prior = Unpromising()
    expected = [ag.sample(prior, **arguments(i, num_samples=3 + i)) for i in range(3)]
    core = Core()
    runs = [queue(core, prior, i, num_samples=3 + i) for i in range(3)]
    serve(core)
    assert all(same(run.result, e) for run, e in zip(runs, expected, strict=True) if run.result)
    assert all(run.result for run in runs)


def test_equal_requests_advance_together_and_priority_goes_first() -> None:
    core, prior = Core(), Independent()
    equal = [queue(core, prior, i, num_samples=32) for i in range(3)]
    for _ in range(60):
        core.turn()
    spent = [run.evaluations for run in equal]
    assert max(spent) - min(spent) <= 8  # one batch
    urgent = queue(core, prior, 3, num_samples=32, priority=1)
    before = list(spent)
    for _ in range(20):
        core.turn()
    assert urgent.evaluations == 8 * 20
    assert AGEING > 20
    assert [run.evaluations for run in equal] == before


def test_low_priority_is_served_while_higher_ones_never_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "AGEING", 10)
    core, prior = Core(), Independent()
    low = queue(core, prior, 0, num_samples=16, priority=0)
    queue(core, prior, 1, num_samples=10**6, priority=3)
    turns = 0
    served = []
    while not low.done and turns < 1000:
        before = low.evaluations
        core.turn()
        turns += 1
        if low.evaluations > before:
            served.append(turns)
    gaps = [b - a for a, b in itertools.pairwise(served)]
    assert len(served) >= 10
    assert max(gaps) <= 3 * 10 + 1  # three of priority, each worth 10 turns


def test_of_one_priority_the_nearer_deadline_goes_first() -> None:
    core, prior = Core(), Independent()
    plain = queue(core, prior, 0, num_samples=16)
    late = queue(core, prior, 1, num_samples=16, timeout=2000.0)
    soon = queue(core, prior, 2, num_samples=16, timeout=1000.0)
    while not soon.done:
        assert late.evaluations == plain.evaluations == 0
        core.turn()
    serve(core)
    assert all(run.result for run in (plain, late, soon))


def test_sampling_is_right_through_the_scheduler() -> None:
    with ag.Scheduler() as scheduler:
        posterior = scheduler.submit(
            Independent(64), **arguments(method="calibrated", num_samples=1000, nfe=50)
        ).result(120)
    mean, std = exact()
    # 1 000 chains: the mean of a pixel is off by std / sqrt(1000) = 0.032 std, its std by 2.2 %.
    assert ((posterior.mean - mean) / std).abs().max() < 0.032 * 4.5
    assert ((posterior.std / std) - 1).abs().max() < 0.022 * 4.5
