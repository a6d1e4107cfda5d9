"""Several devices of one machine in one process: `DevicePool`."""

import copy
import logging
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch

from alpenglow.priors.protocol import place_prior
from alpenglow.samplers.inputs import as_problem
from alpenglow.scheduler.core import MEMORY_SHARE
from alpenglow.scheduler.memory import device_memory
from alpenglow.scheduler.metrics import Metrics
from alpenglow.scheduler.parts import Part
from alpenglow.scheduler.pool import EngineLostError, Pool
from alpenglow.scheduler.request import Request
from alpenglow.scheduler.run import Run
from alpenglow.scheduler.scheduler import Scheduler

log = logging.getLogger("alpenglow.scheduler")


def place(request: Request, prior: Any, device: torch.device) -> Request:
    """The request with everything on the device of an engine, where `prior` is already."""
    problem = request.problem
    moved = as_problem(prior, problem.operator, problem.y.to(device), problem.noise_std)
    return replace(request, problem=moved)


class Worker:
    """An engine's own side: a scheduler, and the parts that it runs. Used from one thread.

    device: what it runs on; sharers: engines on that device, which share its memory.
    """

    def __init__(
        self, device: torch.device, *, batch_size: int | str | None, max_memory: int | None, sharers: int = 1
    ) -> None:
        self.device = device
        if max_memory is None:
            max_memory = int(MEMORY_SHARE * device_memory(device)) // sharers
        self.memory_limit = max_memory
        self._scheduler = Scheduler(batch_size=batch_size, max_memory=max_memory)
        self._runs: dict[int, Run] = {}

    def begin(self, ticket: int, request: Request, part: Part) -> "Future[Any]":
        """Run a part of a request that is on this device."""
        run, future = self._scheduler.submit_part(part.alone(request), part)
        self._runs[ticket] = run
        future.add_done_callback(lambda done: self._runs.pop(ticket, None))
        return future

    def cancel(self, ticket: int) -> None:
        """Stop that part, if it still runs."""
        if (run := self._runs.get(ticket)) is not None:
            run.cancelled = True

    def metrics(self) -> Metrics:
        """Counters; its requests are parts."""
        return self._scheduler.metrics()

    def close(self) -> None:
        """Stop."""
        self._scheduler.close(stop=True)


class DeviceEngine(Worker):
    """An engine of a DevicePool. apart: it gets a copy of a prior that another engine uses on its device."""

    def __init__(self, device: torch.device, *, name: str, apart: bool, **options: Any) -> None:
        super().__init__(device, **options)
        self.name = name
        self._apart = apart
        # With the prior itself: once nobody holds it, its id may come to mean another one.
        self._priors: dict[int, tuple[Any, Any]] = {}
        self._requests: WeakKeyDictionary[Request, Request] = WeakKeyDictionary()

    def begin(self, ticket: int, request: Request, part: Part) -> "Future[Any]":
        """See Engine."""
        if request not in self._requests:
            self._requests[request] = place(request, self._prior(request.problem.prior), self.device)
        return super().begin(ticket, self._requests[request], part)

    def _prior(self, prior: Any) -> Any:
        if id(prior) not in self._priors:
            placed = place_prior(prior, self.device)
            self._priors[id(prior)] = prior, copy.deepcopy(placed) if self._apart else placed
        return self._priors[id(prior)][1]

    def revive(self) -> "Future[None]":
        """See Engine; a thread of this process does not come back."""
        future: Future[None] = Future()
        future.set_exception(EngineLostError(f"{self.name} ended"))
        return future


class DevicePool(Pool):
    """Serves many requests on several devices of this machine, in one process, a thread each.

        with DevicePool(["cuda:0", "cuda:1"]) as pool:      # or DevicePool(): all CUDA devices
            posterior = pool.submit(prior, operator, y, noise_std=0.05, num_samples=1024).result()

    Requests go to the device that has least to do, and those of several populations are spread over all;
    docs/cluster.md says which those are, and that the result is the same. Priors are copied to each device by
    their `to`; posteriors are on the CPU. "cpu" may be given several times.

    batch_size, max_memory: of each device, as for `Scheduler`. Raises ValueError for devices that are not
    there.
    """

    def __init__(
        self,
        devices: Sequence[torch.device | str] | None = None,
        *,
        batch_size: int | str | None = None,
        max_memory: int | None = None,
    ) -> None:
        if devices is None:
            devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        found = [_checked(device) for device in devices]
        if not found:
            raise ValueError("no CUDA device was found; name the devices: DevicePool(['cpu'])")
        if twice := sorted({str(d) for d in found if d.type != "cpu" and found.count(d) > 1}):
            raise ValueError(f"{', '.join(twice)} is given more than once; a GPU takes one engine")
        engines = [
            DeviceEngine(
                device, name=f"engine {i} ({device})", apart=device in found[:i], batch_size=batch_size,
                max_memory=max_memory, sharers=found.count(device),
            )
            for i, device in enumerate(found)
        ]  # fmt: skip
        super().__init__(engines, device=", ".join(dict.fromkeys(map(str, found))))


def _checked(device: torch.device | str) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{device!r} is no device of this machine: {reason}") from error
