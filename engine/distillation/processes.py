"""The processes of one training run: one, or as many as torchrun or `accelerate launch` started."""

import os
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Processes:
    """Which of `count` processes this is, and its device. Gradients are averaged by hand, not by DDP:

    DDP hangs its reduction on the backward pass, and the energy's loss has two of them inside each other.
    """

    rank: int
    count: int
    device: torch.device

    @classmethod
    def alone(cls) -> "Processes":
        """One process, on the GPU if there is one."""
        return cls(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    @classmethod
    def launched(cls) -> "Processes":
        """Those that a launcher started, joined through Accelerate; without a launcher, this one.

        Raises ValueError when a launcher was used and accelerate is not installed, or does not know it.
        """
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count == 1:
            return cls.alone()
        try:
            from accelerate import PartialState
        except ImportError:
            raise ValueError(
                "training on several processes needs accelerate: pip install 'alpenglow[train]'"
            ) from None
        state = PartialState(cpu=not torch.cuda.is_available())
        # Otherwise each would train by itself, and all would write the same files.
        if state.num_processes != count:
            raise ValueError(
                f"WORLD_SIZE is {count}, and Accelerate sees {state.num_processes} processes; "
                "start them with torchrun or accelerate launch, or unset WORLD_SIZE"
            )
        return cls(state.process_index, state.num_processes, state.device)

    @property
    def first(self) -> bool:
        """The one that writes."""
        return self.rank == 0

    def average_gradients(self, model: nn.Module) -> None:
        """Replace every gradient by its mean over the processes."""
        if self.count == 1:
            return
        from accelerate.utils import reduce

        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        mean = reduce(torch.cat([gradient.flatten() for gradient in gradients]), reduction="mean")
        for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def mean(self, value: float) -> float:
        """Of a number that each process has."""
        if self.count == 1:
            return value
        from accelerate.utils import reduce

        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        return float(reduce(tensor, reduction="mean"))

    def agree(self, number: int) -> bool:
        """Whether all have the same number. Told by its mean: where they differ, at least two learn of it."""
        return self.mean(number) == number

    def wait(self) -> None:
        """Until all processes are here: the first has written what the others will read."""
        if self.count > 1:
            from accelerate.utils import wait_for_everyone

            wait_for_everyone()
