"""A scheduler's metrics for Prometheus: pip install prometheus-client."""

from collections.abc import Iterator
from typing import Any

from alpenglow.scheduler.scheduler import Frontend

_COUNTERS = {
    "requests_finished": ("finished", "Requests that ended with a posterior"),
    "requests_failed": ("failed", "Requests that failed or were cancelled"),
    "batches": ("batches", "Batches that priors evaluated"),
    "retries": ("retries", "Evaluations that were tried again"),
    "nfe": ("nfe", "Images whose gradient was evaluated"),
}
_GAUGES = {
    "nfe_per_second": "Images a second while there was work",
    "occupancy": "Share of the rows of network batches that were images of chains",
    "overhead": "Share of the busy time that neither priors nor samplers took",
}


class Collector:
    """Reads the metrics of a scheduler when Prometheus asks; the loop itself counts nothing for it."""

    def __init__(self, scheduler: Frontend) -> None:
        self._scheduler = scheduler

    def collect(self) -> Iterator[Any]:
        """The protocol of prometheus_client's registries."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily  # an optional package

        found = self._scheduler.metrics()
        for name, (field, text) in _COUNTERS.items():
            yield CounterMetricFamily(f"alpenglow_{name}", text, value=getattr(found, field))
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"alpenglow_{name}", text, value=getattr(found, name))
        yield GaugeMetricFamily("alpenglow_requests", "Requests served or waiting", value=len(found.requests))


def register(scheduler: Frontend, registry: Any = None) -> Collector:
    """Show a scheduler's metrics in a registry of prometheus_client (its default one).

    Raises ImportError without prometheus_client.
    """
    from prometheus_client import REGISTRY

    collector = Collector(scheduler)
    (registry or REGISTRY).register(collector)
    return collector
