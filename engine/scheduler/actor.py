"""An engine in a process of its own, somewhere: what a Ray actor of a cluster does."""

import asyncio
import logging
import os
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch

from alpenglow.loading import load_prior
from alpenglow.priors.loading import as_device
from alpenglow.priors.protocol import check_prior, gradient_error, noise_floor, place_prior, sigma_range
from alpenglow.scheduler.devices import Worker, place
from alpenglow.scheduler.errors import SamplingError, caused
from alpenglow.scheduler.metrics import Metrics
from alpenglow.scheduler.parts import Part
from alpenglow.scheduler.request import Request
from alpenglow.scheduler.wire import Packed, pack, unpack

log = logging.getLogger("alpenglow.scheduler")

_CACHED = 256
"""Requests that an actor keeps unpacked."""


@dataclass(frozen=True)
class Sent:
    """A request on its way. key: by which actors know it; packed, prior: references into Ray's store."""

    key: int
    packed: Any
    prior_key: int
    prior: Any


class Actor:
    """An engine in a process of its own, somewhere. Everything runs on the event loop of this one actor.

    What was sent once stays; an actor that was restarted asks for it again.
    """

    def __init__(self, device: str, *, threads: int, **options: Any) -> None:
        torch.set_num_threads(threads)
        self._device = as_device(device)
        self._worker = Worker(self._device, **options)
        self._priors: dict[int, Any] = {}
        self._requests: OrderedDict[int, Request] = OrderedDict()

    async def ping(self) -> tuple[int, str]:
        """Memory for chains, in bytes, and the device."""
        return self._worker.memory_limit, str(self._device)

    async def describe(self, key: int, prior: list[Any]) -> dict[str, Any] | ValueError:
        """Load a prior; its facts, or what is wrong with it."""
        try:
            found = await self._prior(key, prior)
            shape = check_prior(found)
        except Exception as error:
            return ValueError(f"an engine cannot use this prior: {error}")
        return {
            "image_shape": shape,
            "name": getattr(found, "name", type(found).__name__),
            "sigma_range": sigma_range(found),
            "gradient_error": gradient_error(found),
            "noise_floor": noise_floor(found),
        }

    async def run(self, ticket: int, name: str, sent: Sent, part: Part) -> Packed | SamplingError:
        """Run a part of a request. Errors are returned: Ray would wrap what is raised."""
        try:
            request = await self._request(sent)
        except Exception as error:
            return caused(name, error)
        try:
            return pack(await asyncio.wrap_future(self._worker.begin(ticket, request, part)))
        except SamplingError as error:
            if not isinstance(error.__cause__, torch.AcceleratorError):
                return error
            _end(f"its device is of no more use: {error.__cause__}")
        except RuntimeError as error:
            _end(str(error))
        raise AssertionError  # ended

    async def cancel(self, ticket: int) -> None:
        """Stop that part, if it still runs."""
        self._worker.cancel(ticket)

    async def metrics(self) -> Metrics:
        """Counters since the last restart."""
        return self._worker.metrics()

    async def _prior(self, key: int, packed: list[Any]) -> Any:
        if key not in self._priors:
            prior = unpack(await packed[0])
            if isinstance(prior, str):
                self._priors[key] = load_prior(prior, device=self._device)
            else:
                self._priors[key] = place_prior(prior, self._device)
        return self._priors[key]

    async def _request(self, sent: Sent) -> Request:
        if sent.key not in self._requests:
            prior = await self._prior(sent.prior_key, [sent.prior])
            self._requests[sent.key] = place(unpack(await sent.packed), prior, self._device)
            while len(self._requests) > _CACHED:
                self._requests.popitem(last=False)
        self._requests.move_to_end(sent.key)
        return self._requests[sent.key]


def _end(why: str) -> None:
    """End this process: Ray starts a sound one, where this would fail every request that it gets."""
    log.critical("%s", why)
    os._exit(1)
