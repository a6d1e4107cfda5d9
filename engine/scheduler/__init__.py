"""Many requests of many chains on one device: every network batch is filled from all of them.

A request (request.py) runs as populations of chains (run.py), whose wishes for gradients
(samplers/chains.py) one loop collects into batches and answers (core.py, lane.py). `Scheduler` (scheduler.py)
puts that loop into a thread; `alpenglow.sample` drives it where it is called. For several devices requests
are taken apart (parts.py, spread.py), and a driver (pool.py) gives the parts to schedulers of this process
(devices.py) or of Ray actors (actor.py, cluster.py).
"""

from alpenglow.scheduler.devices import DevicePool
from alpenglow.scheduler.errors import RequestTimeoutError, SamplingError
from alpenglow.scheduler.handle import Handle
from alpenglow.scheduler.metrics import Metrics, RequestMetrics
from alpenglow.scheduler.scheduler import Scheduler

__all__ = [
    "DevicePool",
    "Handle",
    "Metrics",
    "RequestMetrics",
    "RequestTimeoutError",
    "SamplingError",
    "Scheduler",
]
