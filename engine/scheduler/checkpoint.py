"""Finished populations on disk, from which a request that was killed goes on, and its result is assembled.

Beside the output file `out.h5` lies the folder `out.h5.parts` while a request runs: request.json says which
request it is, and each population is a file of its own, written whole or not at all. Chains are replayed from
seed and number, so a request that goes on ends with the samples it would have had.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alpenglow.io.files import atomic_path
from alpenglow.io.results import read_result, write_result
from alpenglow.operators.base import real_parts
from alpenglow.posterior import Posterior
from alpenglow.samplers.chains import Answer, Population
from alpenglow.scheduler.errors import CheckpointError
from alpenglow.scheduler.request import Request

_TOLERANCE = 1e-4
"""Relative: probes of the same operator and prior agree to rounding, also between machines."""
_TENSORS = ("samples", "energy", "ancestors")


def probe(request: Request) -> Tensor:
    """An image [1, C, H, W] at which operator and prior are told from others."""
    generator = torch.Generator().manual_seed(0)
    image = 0.5 * torch.randn(1, *request.problem.image_shape, generator=generator)
    return image.to(request.problem.y.device)


def fingerprint(request: Request, evaluated: Answer) -> dict[str, Any]:
    """What the samples of a request depend on, JSON-able; evaluated: the prior at `probe` and sigma 1."""
    problem = request.problem
    y = real_parts(problem.y)
    measured = problem.operator.forward(probe(request))
    energy, grad = evaluated
    settings = {key: value for key, value in request.settings.items() if key not in ("num_samples", "device")}
    return {
        "settings": settings,
        "measurement": hashlib.sha256(y.cpu().contiguous().numpy().tobytes()).hexdigest(),
        "probes": [
            problem.operator.adjoint(problem.y).norm().item(),
            measured.abs().norm().item(),
            problem.operator.adjoint(measured).norm().item(),
            energy.item(),
            grad.norm().item(),
        ],
    }


def _same(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    ours, theirs = json.loads(json.dumps(ours)), dict(theirs)
    pairs = zip(ours.pop("probes"), theirs.pop("probes"), strict=True)
    return ours == theirs and all(math.isclose(a, b, rel_tol=_TOLERANCE, abs_tol=1e-6) for a, b in pairs)


@dataclass(frozen=True)
class Checkpoint:
    """The parts of one request. folder: where; population: chains that its populations hold at most."""

    output: Path
    population: int

    @property
    def folder(self) -> Path:
        """Where the parts are."""
        return self.output.with_name(self.output.name + ".parts")

    @classmethod
    def open(cls, output: Path, mark: dict[str, Any], population: int) -> "Checkpoint":
        """The checkpoint beside `output`, begun if there is none; mark: the request's `fingerprint`.

        One that was begun keeps its population. Raises CheckpointError where it is that of another request.
        """
        fresh = cls(output, population)
        record = fresh.folder / "request.json"
        try:
            found = json.loads(record.read_text(encoding="utf-8"))
            same, population = _same(mark, found["fingerprint"]), int(found["population"])
        except FileNotFoundError:
            with atomic_path(record) as temporary:
                text = json.dumps({"fingerprint": mark, "population": population}, indent=1)
                temporary.write_text(text, encoding="utf-8")
            return fresh
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{record} is damaged ({error}); remove the folder {fresh.folder}"
            ) from error
        if not same:
            raise CheckpointError(
                f"{fresh.folder} holds finished chains of another request (method, options, seed, "
                f"measurement, operator or prior differ); give another output, or remove the folder"
            )
        return cls(output, population)

    def _part(self, start: int) -> Path:
        return self.folder / f"{start:010d}.h5"

    def load(self, start: int, count: int) -> tuple[Population, int] | None:
        """The population of `count` chains from `start` on, and its NFE; None where it is not finished."""
        path = self._part(start)
        if not path.exists():
            return None
        try:
            tensors, diagnostics, settings = read_result(path, _TENSORS)
        except ValueError:  # damaged: its chains are run again
            return None
        samples, energy = tensors["samples"], tensors["energy"]
        if samples is None or energy is None or len(samples) != count:
            return None
        return Population(samples, energy, tensors["ancestors"], diagnostics), int(settings["evaluations"])

    def save(self, start: int, population: Population, evaluations: int) -> None:
        """Keep a finished population. Raises OSError where the disk refuses."""
        tensors = {name: getattr(population, name) for name in _TENSORS}
        write_result(self._part(start), tensors, population.diagnostics, {"evaluations": evaluations})

    def assemble(self, posterior: Posterior, starts: list[int]) -> None:
        """Write `output`, with the samples of the populations that begin at `starts`; remove the parts.

        Holds one population in memory at a time. Raises OSError where the disk refuses; the parts then stay.
        """

        def blocks() -> Iterator[Tensor]:
            for start in starts:
                samples = read_result(self._part(start), ("samples",))[0]["samples"]
                assert samples is not None
                yield samples

        posterior.save(self.output, samples=blocks())
        shutil.rmtree(self.folder)
