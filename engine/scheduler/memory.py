"""How much fits: chains by an estimate of their state, network batches by measurement."""

import contextlib
import math
import os
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from alpenglow.priors.batched import BatchedPrior

STATE_IMAGES = 24
"""Float32 images that a chain takes at the peak of a step: state (x, z, u), gradient, rows on their way to
the network and back, and what the data-consistency step makes on the way; multi-coil operators add their
coils. Measured: see docs/scheduler.md."""
LARGEST_POPULATION = 4096
_BYTES = 4
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_GAIN = 1.05
"""What twice the batch must bring in speed to be worth its memory."""

P = TypeVar("P", bound=BatchedPrior)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of torch (any device), numpy or an inference runtime."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    signs = ("out of memory", "can't allocate memory", "failed to allocate memory", "out_of_memory")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


def device_memory(device: torch.device) -> int:
    """Bytes of a device's memory, used or not: which chains run together must not depend on the day."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.exists() else "max"
    return min(total, int(limit)) if limit.isdigit() else total


def current_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a CUDA device the current one: Triton launches there, wherever its tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def chain_bytes(image_shape: tuple[int, int, int], measurement_size: int) -> int:
    """Estimate of the memory of one chain; measurement_size: real numbers in a measurement."""
    return _BYTES * (STATE_IMAGES * math.prod(image_shape) + 2 * measurement_size)


@dataclass(frozen=True)
class BatchSearch:
    """best: batch size of the highest throughput per byte; rates: images a second by batch size tried; limit:
    the first size that did not run, None where all did, and `reason`."""

    best: int
    rates: dict[int, float]
    limit: int | None = None
    reason: str = ""


def find_batch_size(prior: BatchedPrior, *, largest: int = 1024, rounds: int = 3) -> BatchSearch:
    """The network batch to run a prior at, by measurement: doubled from 1 until it fails or gains little.

    Smaller batches lose less where few chains are left: of two sizes nearly as fast the smaller is taken.
    Raises RuntimeError where not even one image runs.
    """
    rates: dict[int, float] = {}
    size = 1
    while size <= largest:
        try:
            rates[size] = size / _seconds(prior, size, rounds)
        except Exception as error:
            if not rates:
                raise RuntimeError(f"{prior.name} does not run one image: {error}") from error
            return BatchSearch(max(rates, key=rates.__getitem__), rates, size, str(error))
        if size > 4 and rates[size] < _GAIN * max(rates[size // 2], rates[size // 4]):
            break
        size *= 2
    fast = max(rates.values()) / _GAIN
    return BatchSearch(min(size for size, rate in rates.items() if rate >= fast), rates)


def _seconds(prior: BatchedPrior, size: int, rounds: int) -> float:
    """Shortest of `rounds` evaluations of `size` images, after one to warm up."""
    x = torch.zeros(size, *prior.image_shape, dtype=prior.dtype, device=prior.device)
    sigma = torch.ones(size, dtype=prior.dtype, device=prior.device)
    times = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        with current_device(prior.device):
            prior.run(x, sigma)
        if prior.device.type == "cuda":
            torch.cuda.synchronize(prior.device)
        times.append(time.perf_counter() - began)
    return min(times[1:])
