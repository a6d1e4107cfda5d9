"""Torch beyond eager mode, from a prior's weights: compiled by inductor, or replayed as a CUDA graph."""

from collections.abc import Callable

import torch
from torch import Tensor

from alpenglow.export.gradient_graph import gradient_graph
from alpenglow.priors.network import NetworkPrior

Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class TorchCompiled:
    """The traced graph of energy and gradient, compiled at the first batch (a minute or two)."""

    name = "torch-compile"

    def __init__(self, prior: NetworkPrior) -> None:
        self.device = prior.device
        # Autograd cannot be compiled, its trace can. It is made on the CPU, where no kernel of ours is in it.
        graph = gradient_graph(prior.to("cpu")).to(prior.device)
        self._run: Evaluate = torch.compile(graph, dynamic=False)

    def run(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """See Runtime."""
        return self._run(x, sigma)


class TorchCudaGraph:
    """Eager torch with our kernels, recorded once for `batch_size` images: no launch waits for Python."""

    name = "cuda-graph"

    def __init__(self, prior: NetworkPrior) -> None:
        if prior.device.type != "cuda":
            raise ValueError(f"cuda-graph needs a CUDA GPU, got device {str(prior.device)!r}")
        self.device = prior.device
        self._x = torch.zeros(prior.batch_size, *prior.image_shape, device=self.device, dtype=prior.dtype)
        self._sigma = torch.ones(prior.batch_size, device=self.device, dtype=prior.dtype)
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(3):  # libraries choose their algorithms, kernels are compiled
                prior.run(self._x, self._sigma)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._results = prior.run(self._x, self._sigma)

    def run(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """See Runtime."""
        self._x.copy_(x)
        self._sigma.copy_(sigma)
        self._graph.replay()
        return self._results


FROM_WEIGHTS: dict[str, Callable[[NetworkPrior], TorchCompiled | TorchCudaGraph]] = {
    TorchCompiled.name: TorchCompiled,
    TorchCudaGraph.name: TorchCudaGraph,
}
