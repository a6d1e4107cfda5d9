"""The energy and its gradient as one graph of forward operators, for every runtime that has no autograd."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from alpenglow.export.decompositions import TABLE
from alpenglow.networks.denoiser import energy_and_grad
from alpenglow.priors.network import NetworkPrior

aten = torch.ops.aten
# A weight that is only turned about stays in the graph as an operator on the weight: the file then holds it
# once, and every runtime does the turning when it loads the file.
REARRANGEMENTS = {
    aten.flip.default, aten.transpose.int, aten.t.default, aten.permute.default, aten.view.default,
    aten.unsqueeze.default, aten.reshape.default,
}  # fmt: skip


def gradient_graph(prior: NetworkPrior) -> fx.GraphModule:
    """A module (x [B, C, H, W], sigma [B]) -> (energy [B], grad [B, C, H, W]) without any backward operator.

    First order in x, weights frozen, any B, height and width those of the prior; state in and out
    as the prior has it (float32), half precision inside where the prior has that. Each weight is in it once.
    The prior has to be on the CPU: on CUDA the network runs kernels that no other runtime knows. Raises
    ValueError where it is not.
    """
    if prior.device.type != "cpu":
        raise ValueError(
            f"{prior.name} is on {prior.device}; graphs are traced on the CPU: use prior.to('cpu')"
        )

    label = prior.one_hot(1)  # a constant: made within, its writes would stay in the graph

    def both(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return energy_and_grad(prior.denoiser, x, sigma, class_label=label, compute_dtype=prior.compute_dtype)

    graph = _trace(both, prior.image_shape, prior.dtype)
    _fold(graph)
    return graph


def _trace(
    function: Callable[..., Any], image_shape: tuple[int, int, int], dtype: torch.dtype
) -> fx.GraphModule:
    """With a symbol for the batch alone: symbols for every size would take three times as long."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)

    def fake(tensor: Tensor) -> Tensor:
        sizes = [DimDynamic.DYNAMIC] + [DimDynamic.STATIC] * (tensor.ndim - 1)
        return mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))

    # Not one image: a size of 1 would be taken for a constant.
    x, sigma = torch.zeros(3, *image_shape, dtype=dtype), torch.ones(3, dtype=dtype)
    tracer = make_fx(function, decomposition_table=TABLE, tracing_mode="fake", _allow_non_fake_inputs=True)
    return tracer(fake(x), fake(sigma))


def _fold(module: fx.GraphModule) -> None:
    """Compute what does not depend on the inputs, and drop what nobody reads."""
    known: dict[fx.Node, Any] = {}
    for node in list(module.graph.nodes):
        if node.op == "get_attr":
            known[node] = getattr(module, node.target)
        elif node.op == "call_function" and all(n in known for n in node.all_input_nodes):
            args, kwargs = (fx.map_arg(given, known.__getitem__) for given in (node.args, node.kwargs))
            known[node] = value = node.target(*args, **kwargs)
            if node.target not in REARRANGEMENTS:
                known[_replace(module, node, value)] = value
    module.graph.eliminate_dead_code()
    module.recompile()


def _replace(module: fx.GraphModule, node: fx.Node, value: Any) -> fx.Node:
    """A constant in place of the node."""
    name = f"folded_{node.name}"
    module.register_buffer(name, value)
    with module.graph.inserting_before(node):
        constant = module.graph.get_attr(name)
    node.replace_all_uses_with(constant)
    return constant
