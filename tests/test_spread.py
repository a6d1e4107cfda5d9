"""Requests in parts: in any order, some of them lost, to the results of one engine; the simulation."""

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import alpenglow as ag
from alpenglow.samplers.chains import Population
from alpenglow.scheduler import SamplingError
from alpenglow.scheduler.core import Core
from alpenglow.scheduler.devices import DevicePool
from alpenglow.scheduler.gathered import Gathered
from alpenglow.scheduler.ledger import block_size
from alpenglow.scheduler.parts import BlockPart, Part, PilotPart
from alpenglow.scheduler.request import make_request
from alpenglow.scheduler.spread import BLOCK, LOSSES, Spread, default_population
from benchmarks import cluster_simulation
from benchmarks.beds import several_modes
from benchmarks.cluster_simulation import simulate
from tests.scheduling import SHAPE, Independent, arguments, same, serve
from tests.spreading import REQUESTS, WHOLE, alike, asked, of_one_engine

# --- Blocks and moments ---


@given(st.integers(0, 500), st.integers(0, 500), st.integers(1, 100))
@settings(max_examples=200, deadline=None)
def test_blocks_are_equal_and_cover_everything(start: int, length: int, largest: int) -> None:
    stop, sizes = start + length, []
    while count := block_size(start, stop, largest):
        sizes.append(count)
        start += count
    assert start == stop
    assert len(sizes) == -(-length // largest)
    assert not sizes or (max(sizes) <= largest and max(sizes) - min(sizes) <= 1)


@pytest.mark.parametrize("keep_samples", [True, False])
def test_parts_that_were_made_elsewhere_join_to_what_is_added_here(keep_samples: bool) -> None:
    images = torch.randn(900, *SHAPE, generator=torch.Generator().manual_seed(1))
    ancestors = torch.arange(90).repeat_interleave(2) % 90
    populations = [
        Population(part, part.flatten(1).sum(1), ancestors[: len(part)]) for part in images.split(90)
    ]
    added = joined = Gathered.empty(SHAPE, keep_samples=keep_samples, seed=3)
    stale = joined.entry
    for i, population in enumerate(populations):
        added = added.add(population, 7)
        joined = joined.join(Gathered.of(population, 7, first=90 * i, entry=stale))
        if i % 3 == 0:
            stale = joined.entry  # what an engine is told may be old
    assert alike(added.posterior({}, {}), joined.posterior({}, {}))
    assert torch.equal(added.mcse, joined.mcse)
    if joined.reservoir is not None:
        sent = Gathered.of(populations[-1], 7, first=810, entry=joined.entry).reservoir
        assert sent is not None
        assert len(sent.keys) < 60  # of 90: only those that could get in, about 90 * 256 / 900
        assert set(joined.reservoir.keys.tolist()) >= set(sent.keys.tolist())


# --- Parts in any order ---


def spread_of(request: dict[str, Any], prior: Any = None, window: int = 10**6) -> Spread:
    given = {key: value for key, value in request.items() if key not in ("operator", "y")}
    checked = make_request(prior or Independent(), request["operator"], request["y"], **given, name="spread")
    population = default_population(checked) or 10**6
    return Spread(checked, population=population, window=window, device="cpu")


def run_part(spread: Spread, part: Part) -> Any:
    """What an engine gives."""
    core = Core()
    run = core.make(part.alone(spread.request), body=part)
    core.queue(run)
    serve(core)
    assert run.result is not None, run.error
    return run.result


@pytest.mark.parametrize("index", range(len(REQUESTS)))
def test_order_and_losses_change_nothing(index: int) -> None:
    """Every order is as good as another, and what was lost runs again: the pilot and a block."""
    spread, chance, ended, flying = spread_of(asked(index)), random.Random(5), 0, []
    one = index in WHOLE
    while not spread.done:
        while len(flying) < 5 and (part := spread.next()) is not None:
            flying.append(part)
        part = flying.pop(chance.randrange(len(flying)))
        ended += 1
        if ended in ((1, 2) if one else (1, 3)):
            spread.lose(part, "a test")
        else:
            spread.answer(part, run_part(spread, part))
    assert spread.result is not None, spread.error
    assert ended == 3 or not one
    assert alike(spread.result, of_one_engine(index))


def test_a_result_is_that_of_sample() -> None:
    """In everything where chains form one population; else but for what it says of its populations."""
    for request in ({"num_samples": 150}, {"num_samples": 150, "method": "calibrated"}):
        given = arguments(1, **request)
        with DevicePool(["cpu", "cpu"]) as pool:
            found = pool.submit(Independent(), **given).result(60)
        expected = ag.sample(Independent(), **given)
        assert same(found, expected)
        assert torch.equal(found.mean, expected.mean)
        assert torch.equal(found.std, expected.std)
        assert found.nfe == expected.nfe
        assert found.settings == expected.settings
        assert alike(found, expected) == (request.get("method") == "calibrated")


def test_a_population_that_is_weighted_stays_whole() -> None:
    bed = several_modes()
    given = {"operator": bed.operator, "y": bed.y, "noise_std": bed.noise_std, "num_samples": 200, "nfe": 30}
    expected = ag.sample(bed.prior, **given)
    assert expected.diagnostics["modes"] > 1
    with DevicePool(["cpu", "cpu"]) as pool:
        found = pool.submit(bed.prior, **given).result(120)
    assert "populations" not in found.diagnostics
    assert alike(found, expected)


def test_chains_ahead_of_one_that_is_missing_are_bounded() -> None:
    spread = spread_of(arguments(num_samples=64 * 50), window=5 * BLOCK)
    pilot = spread.next()
    assert isinstance(pilot, PilotPart)
    assert spread.next() is None  # blocks wait for the pilot
    spread.answer(pilot, run_part(spread, pilot))
    parts = list(iter(spread.next, None))
    assert [part.first for part in parts] == [0, 64, 128, 192, 256]
    for part in parts[1:]:
        spread.answer(part, run_part(spread, part))
    assert spread.finished.count == 0
    assert spread.next() is None
    spread.answer(parts[0], run_part(spread, parts[0]))
    assert spread.finished.count == 320
    assert len(list(iter(spread.next, None))) == 5


def test_memory_that_runs_out_makes_blocks_smaller_and_loses_no_chain() -> None:
    given = arguments(num_samples=200)
    spread = spread_of(given)
    largest = []
    error = SamplingError("no room")
    error.out_of_memory = True
    while not spread.done:
        part = spread.next()
        assert part is not None
        if isinstance(part, BlockPart) and part.count > 20:
            spread.refuse(part, error)
        else:
            largest.append(part.count)
            spread.answer(part, run_part(spread, part))
    assert max(largest) <= 20
    assert same(spread.result, ag.sample(Independent(), **given))


def test_a_part_that_ends_engines_is_not_tried_for_ever() -> None:
    spread = spread_of(arguments(num_samples=200))
    pilot = spread.next()
    assert pilot is not None
    assert not spread.suspects(pilot)
    spread.lose(pilot, "killed")
    pilot = spread.next()
    assert pilot is not None
    assert spread.suspects(pilot)
    spread.answer(pilot, run_part(spread, pilot))
    first, second = spread.next(), spread.next()
    assert first is not None
    assert second is not None
    spread.answer(first, run_part(spread, first))
    for _ in range(LOSSES):
        assert not spread.done
        assert second is not None
        spread.lose(second, "killed")
        second = spread.next()
    assert str(spread.error) == "spread: chains 50 to 99 ended 3 engines; the last: killed"
    assert isinstance(spread.error, SamplingError)
    assert spread.error.partial is not None
    assert spread.error.partial.num_samples == 50


# --- The simulation ---


def test_the_simulation_knows_its_limits() -> None:
    nothing = cluster_simulation.Cost(seconds=0.0, size=0.0, latency=0.0)
    assert simulate(nothing, 1000, 20_000, 6.4, pilot=0.0).efficiency == pytest.approx(1.0)
    assert simulate(nothing, 1000, 500, 6.4, pilot=0.0).efficiency == pytest.approx(0.5)  # half have no part
    assert simulate(nothing, 4, 8, 2.0, pilot=4.0).efficiency == pytest.approx(0.5)
    # A driver that takes 0.1 s for what an engine needs 6.4 s for feeds 64 of them.
    slow = cluster_simulation.Cost(seconds=0.1, size=0.0, latency=0.0)
    few, many = (simulate(slow, engines, 20 * engines, 6.4, pilot=0.0) for engines in (16, 640))
    assert few.efficiency > 0.98
    assert many.efficiency == pytest.approx(0.1, rel=0.06)
    assert many.driver > 0.98
    assert many.limit == "driver"
    # So does a link that takes as long, and a round trip of a whole part halves what one part ahead can do.
    thin = cluster_simulation.Cost(seconds=0.0, size=0.1, latency=0.0)
    found = simulate(thin, 640, 12_800, 6.4, pilot=0.0, link=1.0)
    assert found.limit == "network"
    assert found.efficiency == pytest.approx(many.efficiency, rel=0.01)
    far = cluster_simulation.Cost(seconds=0.0, size=0.0, latency=3 * 6.4)
    assert simulate(far, 2, 200, 6.4, pilot=0.0).efficiency == pytest.approx(0.5, rel=0.03)
