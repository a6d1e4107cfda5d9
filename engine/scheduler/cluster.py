"""Many machines: `Cluster`, a pool whose engines are Ray actors, one a GPU.

Ray starts actors, sends bytes and says who has died; which chains run where, and that a result is the same
whatever dies, is the pool's (pool.py, spread.py). docs/cluster.md says what is guaranteed.
"""

import itertools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from alpenglow.priors.protocol import check_prior
from alpenglow.scheduler.errors import SamplingError, caused
from alpenglow.scheduler.metrics import Metrics
from alpenglow.scheduler.parts import Part
from alpenglow.scheduler.pool import EngineLostError, Pool
from alpenglow.scheduler.request import Request
from alpenglow.scheduler.scheduler import Scheduler

try:
    import ray
    from ray import exceptions as ray_errors

    from alpenglow.scheduler.actor import Actor, Sent
    from alpenglow.scheduler.wire import Packed, pack, unpack
except ImportError as error:
    raise ImportError(f"a cluster needs Ray ({error}): pip install 'alpenglow[cluster]'") from error

log = logging.getLogger("alpenglow.scheduler")

_LOST = (
    ray_errors.RayActorError,
    ray_errors.WorkerCrashedError,
    ray_errors.NodeDiedError,
    ray_errors.ObjectLostError,
)
_PINGS = 5
"""Times in a row that an actor may be found dead before it is given up; Ray restarts it meanwhile."""
_PATIENCE = 120.0
"""Seconds for actors to start, and for a prior to be loaded."""
_PAUSE = 0.5
"""Seconds between two questions to actors that are gone for the moment."""


@dataclass(frozen=True, eq=False)
class RemotePrior:
    """What the driver knows of a prior that the actors have."""

    key: int
    packed: Any
    name: str
    image_shape: tuple[int, int, int]
    sigma_range: tuple[float, float]
    gradient_error: float
    noise_floor: float
    device: str = "cpu"

    def energy_and_grad(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Not here."""
        raise RuntimeError(f"{self.name} is with the actors of a cluster, and is evaluated there alone")


class RayEngine:
    """An actor as an engine of the pool; see Engine. send: a request's `Sent`."""

    def __init__(self, name: str, actor: Any, send: Callable[[Request], Sent]) -> None:
        self.name = name
        self.actor = actor
        self.memory_limit = 0
        self._send = send

    def begin(self, ticket: int, request: Request, part: Part) -> "Future[Any]":
        """See Engine."""
        result: Future[Any] = Future()
        answer = self.actor.run.remote(ticket, request.name, self._send(request), part).future()
        answer.add_done_callback(lambda done: _deliver(done, result, request.name))
        return result

    def cancel(self, ticket: int) -> None:
        """See Engine."""
        self.actor.cancel.remote(ticket)

    def revive(self) -> "Future[None]":
        """See Engine; Ray restarts the actor, this waits until it answers."""
        result: Future[None] = Future()
        threading.Thread(target=self._await, args=(result,), name="alpenglow-revive", daemon=True).start()
        return result

    def _await(self, result: "Future[None]") -> None:
        dead = 0
        while True:
            try:
                ray.get(self.actor.ping.remote())
            except ray_errors.ActorUnavailableError:
                dead = 0
            except Exception as error:
                dead += 1
                if dead == _PINGS:
                    result.set_exception(EngineLostError(_first_line(error)))
                    return
            else:
                result.set_result(None)
                return
            time.sleep(0.5)

    def metrics(self) -> Metrics | None:
        """See Engine."""
        try:
            return ray.get(self.actor.metrics.remote(), timeout=5.0)
        except ray_errors.RayError:
            return None

    def close(self) -> None:
        """See Engine."""
        ray.kill(self.actor)


def _deliver(answer: "Future[Any]", result: "Future[Any]", name: str) -> None:
    """An actor's answer to whoever waits, with Ray's errors as ours."""
    try:
        value = answer.result()
        if isinstance(value, SamplingError):
            result.set_exception(value)
        else:
            result.set_result(unpack(value))
    except _LOST as error:
        result.set_exception(EngineLostError(_first_line(error)))
    except Exception as error:
        result.set_exception(caused(name, error))


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]


class Cluster(Pool):
    """Serves many requests on the GPUs of a Ray cluster, one engine each.

        with Cluster(address="auto") as cluster:
            handles = [cluster.submit("brain-128", operator, y, noise_std=0.02) for operator, y in slices]
            posteriors = [handle.result() for handle in handles]

    The interface is that of `Scheduler`, and so are the results (docs/cluster.md). A prior is a name or path
    for `load_prior`, which every machine must see, or an object that can be pickled; it is sent once to an
    actor. Posteriors are on the CPU. An actor that dies is restarted, and its chains are run again.

    workers: engines; None: one for each GPU that Ray has, or for each `cpus` CPUs where it has none. address:
    of a Ray cluster; None: the one that this process is connected to, or else a local one of its own, which
    ends with the block. gpus, cpus: of a worker; gpus None: 1 where there are any. batch_size, max_memory: of
    each worker, as for `Scheduler`.

    Raises ValueError where Ray has not so much, ImportError without Ray, and EngineLostError or TimeoutError
    where workers do not start.
    """

    def __init__(
        self,
        workers: int | None = None,
        *,
        address: str | None = None,
        gpus: float | None = None,
        cpus: int = 1,
        batch_size: int | str | None = None,
        max_memory: int | None = None,
    ) -> None:
        Scheduler(batch_size=batch_size, max_memory=max_memory)  # refuses wrong ones, here and not far away
        self._own = not ray.is_initialized()
        if self._own:
            ray.init(address=address, include_dashboard=None if address else False, log_to_driver=False)
        self._keys = itertools.count()
        self._priors: dict[Any, tuple[Any, RemotePrior]] = {}
        self._sent: WeakKeyDictionary[Request, Sent] = WeakKeyDictionary()
        self._ray_engines: list[RayEngine] = []
        try:
            workers, gpus = _fitting(workers, gpus, cpus)
            kind = ray.remote(Actor).options(
                num_gpus=gpus, num_cpus=cpus, max_restarts=-1, max_task_retries=0
            )
            for index in range(workers):
                actor = kind.remote(
                    "cuda" if gpus else "cpu", threads=cpus, batch_size=batch_size, max_memory=max_memory,
                    # Without GPUs all may be on one machine, for all that is known.
                    sharers=max(1, int(1 / gpus)) if gpus else workers,
                )  # fmt: skip
                self._ray_engines.append(RayEngine(f"worker {index}", actor, self._send))
            device = _start(self._ray_engines)
        except BaseException:
            self._release()
            raise
        super().__init__(self._ray_engines, device=device)

    def usable(self, prior: Any) -> RemotePrior:
        """A prior that the actors have. Raises ValueError for one that cannot be sent or used."""
        key: Any = id(prior)
        if isinstance(prior, str | Path):
            path = Path(prior)
            key = prior = str(path.resolve()) if path.exists() else str(prior)
        else:
            check_prior(prior)
        if key not in self._priors:
            packed = ray.put(_packed(prior, "the prior"))
            number = next(self._keys)
            facts = self._describe(number, packed)
            self._priors[key] = prior, RemotePrior(number, packed, **facts)
        return self._priors[key][1]

    def _describe(self, key: int, packed: Any) -> dict[str, Any]:
        """A prior's facts, from the first actor that answers; one that restarts has time to."""
        end = time.monotonic() + _PATIENCE
        engines = itertools.cycle(self._ray_engines)
        while True:
            left = max(0.0, end - time.monotonic())
            try:
                found = ray.get(next(engines).actor.describe.remote(key, [packed]), timeout=left)
            except (*_LOST, ray_errors.GetTimeoutError) as error:
                if left == 0:
                    raise EngineLostError(f"no worker answers; the last: {error}") from error
                time.sleep(_PAUSE)
                continue
            if isinstance(found, ValueError):
                raise found
            return found

    def ship(self, request: Request) -> None:
        """Put a request where actors find it. Raises ValueError where it cannot be pickled."""
        prior = request.problem.prior
        assert isinstance(prior, RemotePrior)
        light = replace(request, problem=replace(request.problem, prior=None))  # type: ignore[arg-type]
        packed = ray.put(_packed(light, "the request (its operator, most likely)"))
        self._sent[request] = Sent(next(self._keys), packed, prior.key, prior.packed)

    def _send(self, request: Request) -> Sent:
        return self._sent[request]

    def close(self, *, stop: bool = False) -> None:
        """See Pool; Ray is shut down where it was started here."""
        try:
            super().close(stop=stop)
        finally:
            self._release()

    def _release(self) -> None:
        if self._own:
            ray.shutdown()
            return
        for engine in self._ray_engines:
            engine.close()


def _packed(value: Any, what: str) -> Packed:
    try:
        return pack(value)
    except Exception as error:
        raise ValueError(
            f"{what} cannot be sent to the workers: {error}; give a prior by its name or path, and an "
            "operator that can be pickled"
        ) from error


def _fitting(workers: int | None, gpus: float | None, cpus: int) -> tuple[int, float]:
    """How many workers with how many GPUs each. Raises ValueError where Ray has not so many."""
    if type(cpus) is not int or cpus < 1:
        raise ValueError(f"cpus is {cpus!r}; expected a positive integer")
    has = {kind: ray.cluster_resources().get(kind, 0) for kind in ("CPU", "GPU")}
    if gpus is None:
        gpus = 1 if has["GPU"] else 0
    if not (isinstance(gpus, int | float) and gpus >= 0):
        raise ValueError(f"gpus is {gpus!r}; expected a number of GPUs for each worker, or None")
    if workers is None:
        workers = max(1, int(has["GPU"] // gpus if gpus else has["CPU"] // cpus))
    if type(workers) is not int or workers < 1:
        raise ValueError(f"workers is {workers!r}; expected a positive integer, or None")
    if workers * cpus > has["CPU"] or workers * gpus > has["GPU"]:
        raise ValueError(
            f"{workers} workers want {workers * cpus} CPUs and {workers * gpus:g} GPUs; Ray has "
            f"{has['CPU']:g} and {has['GPU']:g}"
        )
    return workers, gpus


def _start(engines: list[RayEngine]) -> str:
    """Wait until all actors answer; the name of their device. Raises TimeoutError where some do not."""
    pings = [engine.actor.ping.remote() for engine in engines]
    ready, missing = ray.wait(pings, num_returns=len(pings), timeout=_PATIENCE)
    if missing:
        raise TimeoutError(
            f"{len(ready)} of {len(pings)} workers started within {_PATIENCE:g} s: others may use the CPUs "
            "or GPUs that they want (see `ray status`)"
        )
    try:
        found = ray.get(pings)
    except ray_errors.RayError as error:
        raise EngineLostError(f"a worker did not start: {error}") from error
    for engine, (memory, _) in zip(engines, found, strict=True):
        engine.memory_limit = memory
    return ", ".join(dict.fromkeys(device for _, device in found))
