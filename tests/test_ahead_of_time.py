"""Every kernel compiled for GPUs that are not here, in a process of its own, without interpreter."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from alpenglow.kernels import ahead_of_time, triton_support

STEPS = ("pixel_step", "spectral_step")
SUMS = ("<d, q>",)  # these store nothing but the sum over a block

pytestmark = pytest.mark.skipif(not triton_support.AVAILABLE, reason="needs triton")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "alpenglow.kernels.ahead_of_time", "--json"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_every_variant_compiles_for_every_target(rows: list[dict[str, Any]]) -> None:
    assert len(rows) == len(ahead_of_time.VARIANTS) * len(ahead_of_time.TARGETS)
    assert {row["target"] for row in rows} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert all(0 < row["registers"] <= 255 for row in rows)


@pytest.mark.slow
def test_nothing_spills(rows: list[dict[str, Any]]) -> None:
    assert [row for row in rows if row["spills"] or row["stack"]] == []


@pytest.mark.slow
def test_memory_is_read_and_written_in_16_bytes(rows: list[dict[str, Any]]) -> None:
    assert [row for row in rows if row["widest_load"] < 128] == []
    assert [row for row in rows if row["widest_store"] < 128 and row["variant"] not in SUMS] == []


@pytest.mark.slow
def test_step_kernels_move_no_more_than_they_must(rows: list[dict[str, Any]]) -> None:
    """Within 6 %: spectral_step reads an eigenvalue twice, from the cache."""
    for row in rows:
        if row["kernel"] in STEPS and row["bytes_per_element"] is not None:
            assert row["minimum"] <= row["bytes_per_element"] <= 1.06 * row["minimum"], row


def test_the_interpreter_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="unset it"):
        ahead_of_time.compile_variant(ahead_of_time.VARIANTS[0], "sm_90")
