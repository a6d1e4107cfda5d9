"""Conditional mean, draw and step of every operator family beside the published composition, or plain CG."""

from typing import Any

import pytest

from benchmarks.operator_cases import Family, families
from benchmarks.pairs import time_pair

FAMILIES = families(batch=16, size=64)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_mean(benchmark: Any, family: Family) -> None:
    time_pair(benchmark, family.our_mean, family.their_mean)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_draw(benchmark: Any, family: Family) -> None:
    time_pair(benchmark, family.our_draw, family.their_draw)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_step(benchmark: Any, family: Family) -> None:
    time_pair(benchmark, *family.step_runs())
