"""What a suite measures: our way and the published one, turn by turn, and the quotient of each turn.

Noise of the machine that lasts longer than a turn falls on both alike and cancels in the quotient, so that
quotients of two runs, or of two commits, can be compared where times cannot.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PUBLISHED, SPEEDUP, LOW, HIGH = "published_seconds", "speedup", "speedup_low", "speedup_high"


def time_pair(
    benchmark: Any, ours: Callable[[], object], published: Callable[[], object], *, seconds: float = 2.0,
    least: int = 5,
) -> None:  # fmt: skip
    """Time `ours` with the fixture of pytest-benchmark, and `published` before every round.

    For about `seconds`, and `least` to 1 000 rounds. The fixture's extra_info gets the median of `published`
    in seconds, the median quotient published / ours, and its 95 % confidence limits.
    """
    began = time.perf_counter()
    for run in (ours, published):  # first calls allocate, and choose algorithms
        run()
    once = time.perf_counter() - began
    times: list[float] = []

    def before() -> None:
        began = time.perf_counter()
        published()
        times.append(time.perf_counter() - began)

    rounds = min(max(least, math.ceil(seconds / once)), 1000)
    benchmark.pedantic(ours, setup=before, rounds=rounds, iterations=1)
    if benchmark.disabled:
        return
    quotients = [a / b for a, b in zip(times, benchmark.stats.stats.data, strict=True)]
    low, high = median_limits(quotients)
    benchmark.extra_info |= {
        PUBLISHED: statistics.median(times),
        SPEEDUP: statistics.median(quotients),
        LOW: low,
        HIGH: high,
    }


def median_limits(values: list[float]) -> tuple[float, float]:
    """95 % confidence limits of the median of any distribution, from order statistics; all values if few.

    The number of values below the median is binomial: ranks n / 2 -+ 1.96 sqrt(n) / 2.
    """
    ordered, count = sorted(values), len(values)
    below = max(0, math.floor(count / 2 - 0.98 * math.sqrt(count)))
    return ordered[below], ordered[count - 1 - below]


@dataclass(frozen=True)
class Timing:
    """One benchmark: medians in seconds, the quotient published / ours; None where nothing is published."""

    ours: float
    published: float | None = None
    speedup: float | None = None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        """The quotient with its limits."""
        return "" if self.speedup is None else f"{self.speedup:.2f} ({self.low:.2f} to {self.high:.2f})"


def timing(ours: float, extra: dict[str, Any]) -> Timing:
    """From the median and the extra_info of a benchmark."""
    return Timing(ours, *(extra.get(key) for key in (PUBLISHED, SPEEDUP, LOW, HIGH)))
