"""pytest-benchmark: every kernel (its twin on a CPU) and the composition it replaces, one group a case."""

import pytest
import torch

from benchmarks.kernel_cases import FAMILIES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH, SIZE = (256, 64) if DEVICE == "cuda" else (16, 32)
CASES = [case for family in FAMILIES.values() for case in family(DEVICE, BATCH, SIZE)]


@pytest.mark.parametrize("way", ["kernel", "eager"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernel(benchmark, case, way) -> None:  # type: ignore[no-untyped-def]
    benchmark.group = case.name

    def run() -> None:
        getattr(case, way)()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(run)
