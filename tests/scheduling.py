"""What the tests of the scheduler share: a fast prior in batches, and requests on it."""

import signal
import subprocess
import sys
from typing import Any

import torch
from torch import Tensor

import alpenglow as ag
from alpenglow.priors.batched import BatchedPrior
from alpenglow.scheduler.core import Core
from alpenglow.scheduler.request import make_request
from alpenglow.scheduler.run import Run

SHAPE = (1, 4, 4)
STD = torch.linspace(0.2, 0.6, 16).reshape(SHAPE)
NOISE_STD = 0.1
OPERATOR = ag.operators.Inpainting((torch.arange(16) % 2 == 0).reshape(4, 4))
NFE = 9
"""Of a request of `arguments`: three levels of three steps, and no pilot."""


class Independent(BatchedPrior):
    """N(0, STD^2) in every pixel, in batches as a network; keeps the sizes of those that it was asked for."""

    def __init__(self, batch_size: int = 8, name: str = "independent") -> None:
        self.name = name
        self.image_shape = SHAPE
        self.sigma_range = (0.01, 20.0)
        self.dtype = torch.float32
        self.device = torch.device("cpu")
        self._batch_size = batch_size
        self.asked: list[int] = []

    def energy_and_grad(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        self.asked.append(len(x))
        return super().energy_and_grad(x, sigma)

    def run(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        square = sigma.square()[:, None, None, None]
        grad = x * square / (square + STD.square())
        return (0.5 * x * grad).flatten(1).sum(1), grad


def exact() -> tuple[Tensor, Tensor]:
    """Mean and std [C, H, W] of the posterior of `measurement(0)`."""
    precision = 1 / STD.square() + OPERATOR.mask / NOISE_STD**2
    return measurement(0) * OPERATOR.mask / NOISE_STD**2 / precision, precision.rsqrt()


def measurement(index: int) -> Tensor:
    """A measurement [1, 4, 4] of its own."""
    return 0.4 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(index)) * OPERATOR.mask


def arguments(index: int = 0, *, method: str = "alps", **changes: Any) -> dict[str, Any]:
    """Of `sample` and `submit`, for a request of its own; by default of the method that takes least time."""
    short = {"levels": 3, "steps": 3} if method == "alps" else {"nfe": NFE}
    problem = {"operator": OPERATOR, "y": measurement(index), "noise_std": NOISE_STD, "seed": index}
    return problem | {"num_samples": 6, "method": method} | short | changes


def queue(core: Core, prior: Any, index: int = 0, **changes: Any) -> Run:
    """A request that a core will serve."""
    given = arguments(index, **changes)
    run = core.make(make_request(prior, given.pop("operator"), given.pop("y"), **given))
    core.queue(run)
    return run


def same(a: ag.Posterior | None, b: ag.Posterior) -> bool:
    """Whether two results are there, and have the same samples and energies, to the last bit."""
    assert a is not None
    assert a.samples is not None
    assert b.samples is not None
    return torch.equal(a.samples, b.samples) and torch.equal(a.energy, b.energy)


def serve(core: Core) -> None:
    """Until nothing is left."""
    while core.turn():
        pass


def interrupted(code: str) -> tuple[str, list[str]]:
    """A real SIGINT to a real process, once it has printed a line: that line, and the words of the rest."""
    # A process in the background inherits that it ignores SIGINT.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    with subprocess.Popen([sys.executable, "-c", heed + code], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            first = process.stdout.readline()
            assert first
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0
    return first.removesuffix("\n"), output.split()
