"""Every kernel (its twin on a CPU) beside the composition of torch operators that it replaces."""

from typing import Any

import pytest
import torch

from benchmarks.kernel_cases import FAMILIES, Case
from benchmarks.pairs import time_pair

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH, SIZE = (256, 64) if DEVICE == "cuda" else (16, 32)
CASES = [case for family in FAMILIES.values() for case in family(DEVICE, BATCH, SIZE)]


def waited(run: Any) -> Any:
    """`run`, and on a GPU until it is done."""
    if DEVICE == "cpu":
        return run

    def both() -> None:
        run()
        torch.cuda.synchronize()

    return both


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernel(benchmark: Any, case: Case) -> None:
    time_pair(benchmark, waited(case.kernel), waited(case.eager))
