"""Priors for the tests of a cluster, in a module that its workers can import."""

import os
import time
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from tests.scheduling import Independent


class Logged(Independent):
    """Writes a byte for every batch to a file that is named after its process."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def run(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        with (self.folder / str(os.getpid())).open("ab") as file:
            file.write(b".")
        return super().run(x, sigma)

    @property
    def batches(self) -> dict[int, int]:
        """Batches by process."""
        return {int(path.name): path.stat().st_size for path in self.folder.iterdir()}


class Slow(Logged):
    """Takes a hundredth of a second a batch."""

    def run(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        time.sleep(0.01)
        return super().run(x, sigma)


class Poisoned(Logged):
    """Ends its process at bright images, raises, or gives NaN; or the GPU of the first process is broken."""

    def __init__(self, folder: Path, fault: str) -> None:
        super().__init__(folder)
        self.fault = fault

    def run(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        energy, grad = super().run(x, sigma)
        if (x.abs() > 1e5).any():
            if self.fault == "exit":
                os._exit(3)
            if self.fault == "raise":
                raise RuntimeError("the backend cannot do this image")
            grad[(x.abs() > 1e5).flatten(1).any(1)] = torch.nan
        if self.fault == "device" and self._broken():
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return energy, grad

    def _broken(self) -> bool:
        # Written once: this process may be ended while another batch of it is here.
        path = self.folder.parent / "broken"
        with suppress(FileExistsError), path.open("x") as file:
            file.write(str(os.getpid()))
        return path.read_text() == str(os.getpid())
