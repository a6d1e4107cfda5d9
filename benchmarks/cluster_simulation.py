"""How many GPUs one driver can feed: a simulation of 1 to 1 000 from costs that are measured.

    python -m benchmarks.cluster_simulation -o docs/cluster.png

prints the tables of docs/cluster.md and draws the picture. Measured is what the driver does, with the real
thing: requests through a Ray cluster of one worker whose prior costs next to nothing. Assumed is how fast a
GPU is (GPU_SPEEDS), and the network (LINK). Simulated is who waits for whom, event by event.
"""

import argparse
import heapq
import math
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alpenglow.operators import Denoising
from alpenglow.priors.batched import BatchedPrior
from alpenglow.samplers.calibrated import CalibratedOptions
from alpenglow.samplers.methods import METHODS
from alpenglow.scheduler.pool import AHEAD
from alpenglow.scheduler.spread import BLOCK

NFE = 100
"""Gradients a sample."""
PILOT = METHODS["calibrated"].pilot_nfe(CalibratedOptions())
"""Gradients of a pilot."""
GPU_SPEEDS = (1_000.0, 10_000.0)
"""Gradients a second of one GPU, for images of SHAPES[1]: assumed, for a large and for a small network."""
LINK = 10e9 / 8
"""Bytes a second into the driver: 10 Gbit/s, assumed."""
SHAPES = ((1, 28, 28), (2, 128, 128), (2, 320, 320))
ENGINES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
PARTS_AHEAD = AHEAD // BLOCK
"""Parts on the way to an engine."""


class Free(BatchedPrior):
    """N(0, 0.25) in every pixel, of any shape: a gradient that costs next to nothing."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.name = "free"
        self.image_shape = shape
        self.sigma_range = (0.01, 20.0)
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self._batch_size = 64

    def run(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """See BatchedPrior."""
        square = sigma.square()[:, None, None, None]
        grad = x * (square / (square + 0.25))
        return 0.5 * (x * grad).flatten(1).sum(1), grad


@dataclass(frozen=True)
class Load:
    """Requests, each of a pilot and `blocks` blocks of `chains`; whole: pilot and block are one part."""

    name: str
    chains: int
    keep_samples: bool
    whole: bool


LOADS = (
    Load("requests of 64, samples", BLOCK, True, True),
    Load("one request, samples", BLOCK, True, False),
    Load("one request, moments", BLOCK, False, False),
    Load("one request, moments in blocks of 1024", 16 * BLOCK, False, False),
)
SAME_COST = {LOADS[3]: LOADS[2]}
"""What moments cost the driver does not depend on how many chains they are of."""


@dataclass(frozen=True)
class Cost:
    """Of a part, to the driver. seconds: processor time; size: bytes that come back; latency: seconds to an
    engine and back."""

    seconds: float
    size: float
    latency: float


# --- Measured ---


def measure(cluster: Any, shape: tuple[int, int, int], load: Load) -> Cost:
    """The driver's cost of a part of the load, through Ray, submitting and joining included."""
    prior, blocks = Free(shape), 1 if load.whole else 6
    given: dict[str, Any] = {
        "operator": Denoising(), "y": torch.zeros(1, *shape), "noise_std": 0.1, "method": "alps", "levels": 1,
        "steps": 1, "num_samples": load.chains * blocks, "population": load.chains,
        "keep_samples": load.keep_samples,
    }  # fmt: skip
    spent = []
    for _ in range(4):  # the first sends the prior
        began = time.process_time()
        cluster.submit(prior, **given).result()
        spent.append((time.process_time() - began) / blocks)
    return Cost(min(spent), size_of(prior, given, load), latency(cluster))


def size_of(prior: Free, given: dict[str, Any], load: Load) -> float:
    """Bytes of a part on the wire."""
    from alpenglow.scheduler.core import Core
    from alpenglow.scheduler.parts import BlockPart, PilotPart, WholePart
    from alpenglow.scheduler.request import make_request
    from alpenglow.scheduler.wire import pack, size
    from alpenglow.statistics import Entry

    def result(part: Any) -> Any:
        core = Core()
        run = core.make(part.alone(request), body=part)
        core.queue(run)
        while core.turn():
            pass
        return run.result

    request = make_request(prior, given["operator"], given["y"], **{
        key: value for key, value in given.items() if key not in ("operator", "y")
    })  # fmt: skip
    if load.whole:
        return float(size(pack(result(WholePart(load.chains)))))
    # A reservoir that is as full as in the middle of a long request takes hardly any sample.
    entry = None if load.keep_samples else Entry(256, 0, 0.99)
    return float(size(pack(result(BlockPart(0, load.chains, result(PilotPart()), entry)))))


def latency(cluster: Any) -> float:
    """Seconds for nothing, to an engine and back."""
    import ray

    (engine,) = cluster._ray_engines
    times = []
    for _ in range(50):
        began = time.perf_counter()
        ray.get(engine.actor.ping.remote())
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


# --- Simulated ---


@dataclass(frozen=True)
class Outcome:
    """efficiency: share of the engines' time in which they compute; driver, link: shares of the time that
    these are busy."""

    efficiency: float
    driver: float
    link: float

    @property
    def limit(self) -> str:
        """What holds the engines up."""
        if self.efficiency > 0.9:
            return ""
        if max(self.driver, self.link) < 0.9:
            return "waiting for the pilot and the last blocks"
        return "driver" if self.driver > self.link else "network"


def simulate(
    cost: Cost, engines: int, parts: int, seconds: float, *, pilot: float, link: float = LINK
) -> Outcome:
    """Parts of `seconds` each, on engines that are alike; pilot: seconds before which there are none.

    The driver sends a part to an engine that has less than PARTS_AHEAD, and takes what comes back: one thing
    at a time, as does the link into it. What a part costs the driver is spent when it comes back.
    """
    # An event: (time, order, what): an engine has finished a part, or the driver has taken one in.
    driver = wire = 0.0
    busy_driver = busy_wire = 0.0
    free_at = [pilot + cost.latency / 2] * engines
    events: list[tuple[float, int, str, int]] = []
    number = 0

    def send(engine: int, now: float) -> None:
        nonlocal number
        start = max(free_at[engine], now + cost.latency / 2)
        free_at[engine] = start + seconds
        heapq.heappush(events, (free_at[engine], number, "computed", engine))
        number += 1

    waiting = deque(range(parts))
    for _ in range(PARTS_AHEAD):
        for engine in range(engines):
            if waiting:
                waiting.popleft()
                send(engine, pilot)
    end = pilot
    while events:
        now, _, what, engine = heapq.heappop(events)
        if what == "computed":
            wire = max(wire, now) + cost.size / link
            busy_wire += cost.size / link
            heapq.heappush(events, (wire + cost.latency / 2, number, "arrived", engine))
            number += 1
        else:
            driver = max(driver, now) + cost.seconds
            busy_driver += cost.seconds
            end = driver
            if waiting:
                waiting.popleft()
                send(engine, driver)
    return Outcome((parts * seconds) / (engines * end), busy_driver / end, busy_wire / end)


def outcome(cost: Cost, load: Load, engines: int, speed: float, total: int | None = None) -> Outcome:
    """The simulation of a load at a GPU's speed, NFE a second. total: chains of the one request; None: as
    many as take long beside the start and the end, 20 parts an engine."""
    seconds = load.chains * NFE / speed
    if load.whole:
        return simulate(cost, engines, 20 * engines, seconds + PILOT / speed, pilot=0.0)
    parts = 20 * engines if total is None else math.ceil(total / load.chains)
    # A pilot of 32 chains fills half of a batch of 64: it takes as long as 64 would.
    return simulate(cost, engines, parts, seconds, pilot=2 * PILOT / speed)


def most(cost: Cost, load: Load, speed: float) -> float:
    """Engines that the driver, or the link into it, can feed: the part's time over its cost."""
    seconds = load.chains * NFE / speed + (PILOT / speed if load.whole else 0)
    return seconds / max(cost.seconds, cost.size / LINK)


# --- Shown ---


def tables(costs: dict[tuple[tuple[int, int, int], Load], Cost]) -> Iterator[str]:
    """Markdown."""
    yield "| images | load | driver, ms a part | MB a part | GPUs at 1 000 NFE/s | GPUs at 10 000 NFE/s |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for (shape, load), cost in costs.items():
        limits = " | ".join(f"{most(cost, load, speed):.0f}" for speed in GPU_SPEEDS)
        yield (
            f"| {'x'.join(map(str, shape))} | {load.name} | {1e3 * cost.seconds:.1f} | {cost.size / 1e6:.2f} "
            f"| {limits} |"
        )
    yield ""
    yield f"| {'x'.join(map(str, SHAPES[1]))} | " + " | ".join(f"{n} GPUs" for n in ENGINES) + " |"
    yield "| --- " * (1 + len(ENGINES)) + "|"
    for load in LOADS:
        for speed in GPU_SPEEDS:
            found = [outcome(costs[SHAPES[1], load], load, n, speed) for n in ENGINES]
            cells = " | ".join(f"{one.efficiency:.0%}" + _mark(one) for one in found)
            yield f"| {load.name}, {speed:,.0f} NFE/s | {cells} |"
    for speed in GPU_SPEEDS:
        load = LOADS[1]
        found = [outcome(costs[SHAPES[1], load], load, n, speed, total=16384) for n in ENGINES]
        cells = " | ".join(f"{one.efficiency:.0%}" + _mark(one) for one in found)
        yield f"| 16 384 samples of one posterior, {speed:,.0f} NFE/s | {cells} |"


def _mark(found: Outcome) -> str:
    return {"driver": " d", "network": " n", "": ""}.get(found.limit, " w")


def draw(costs: dict[tuple[tuple[int, int, int], Load], Cost], path: Path) -> None:
    """Throughput against the number of GPUs, one panel a speed."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(GPU_SPEEDS), figsize=(11, 4.5), sharex=True)
    many = sorted({round(10 ** (i / 10)) for i in range(31)})
    for axis, speed in zip(axes, GPU_SPEEDS, strict=True):
        for load in LOADS:
            cost = costs[SHAPES[1], load]
            per_gpu = speed / (NFE + (PILOT / load.chains if load.whole else 0))
            rates = [outcome(cost, load, n, speed).efficiency * n * per_gpu for n in many]
            axis.loglog(many, rates, label=load.name)
        ideal = speed / NFE
        axis.loglog(
            many, [n * ideal for n in many], color="grey", linestyle=":", label="without a pilot, ideal"
        )
        axis.set_title(f"{speed:,.0f} NFE a second and GPU")
        axis.set_xlabel("GPUs")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"samples a second, {'x'.join(map(str, SHAPES[1]))}, {NFE} NFE")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, simulate, print, draw."""
    import ray

    from alpenglow.scheduler.cluster import Cluster

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/cluster.png"))
    options = parser.parse_args()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="error")
    with Cluster(1) as cluster:
        costs = {}
        for shape in SHAPES:
            for load in LOADS:
                known = costs.get((shape, SAME_COST.get(load, load)))
                costs[shape, load] = known or measure(cluster, shape, load)
                print(shape, load.name, costs[shape, load], file=sys.stderr, flush=True)
    ray.shutdown()
    delay = 1e3 * min(cost.latency for cost in costs.values())
    print(f"latency {delay:.1f} ms, torch {torch.__version__}, one thread\n")
    print("\n".join(tables(costs)))
    draw(costs, options.output)


if __name__ == "__main__":
    main()
