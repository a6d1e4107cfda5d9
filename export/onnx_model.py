"""The graph of energy and gradient as an ONNX model."""

import copy
import logging
import warnings
from typing import TYPE_CHECKING

import torch
from torch import fx

from alpenglow.priors.network import NetworkPrior, Precision

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET = 20
INPUTS, OUTPUTS = ["x", "sigma"], ["energy", "grad"]


def in_precision(prior: NetworkPrior, precision: Precision) -> NetworkPrior:
    """A copy of a float32 prior whose network runs in `precision`."""
    return NetworkPrior(
        copy.deepcopy(prior.denoiser),
        prior.image_shape,
        name=prior.name,
        sigma_range=prior.sigma_range,
        gradient_error=prior.gradient_error,
        noise_floor=prior.noise_floor,
        metadata=prior.metadata,
        precision=precision,
        class_label=prior.class_label,
    )


def onnx_model(graph: fx.GraphModule, image_shape: tuple[int, int, int]) -> "ModelProto":
    """Inputs x [B, C, H, W], sigma [B] -> outputs energy [B], grad [B, C, H, W], float32, for every B >= 1.

    graph: that of `gradient_graph`. Of ONNX's own operators of opset OPSET alone; it has passed onnx.checker
    and strict shape inference. Takes half a minute. Raises ValueError without the onnx packages,
    RuntimeError for a graph that ONNX cannot hold.
    """
    try:
        import onnx
        import onnx_ir.passes.common as passes
        import onnxscript.optimizer
    except ImportError as error:
        raise ValueError(f"export needs {error.name}: pip install 'alpenglow[onnx]'") from None
    batch = torch.export.Dim("batch", min=1)
    # Not one image: a size of 1 would be taken for a constant.
    example = (torch.zeros(3, *image_shape), torch.ones(3))
    exported = torch.export.export(graph, example, dynamic_shapes=({0: batch}, {0: batch}))
    with warnings.catch_warnings():
        # Of names within torch that it will do without.
        warnings.simplefilter("ignore")
        # It says of each operator of torchvision that it does without it.
        logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
        program = torch.onnx.export(
            exported,
            dynamo=True,
            verbose=False,
            optimize=False,  # its search for patterns takes as long as all the rest, and gains nothing
            opset_version=OPSET,
            input_names=INPUTS,
            output_names=OUTPUTS,
        )
    assert program is not None
    onnxscript.optimizer.fold_constants(program.model)
    for tidy in (
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        # Where in our source each node came from is most of a small file, and nobody's concern.
        passes.ClearMetadataAndDocStringPass(),
    ):
        tidy(program.model)
    model = program.model_proto
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    if foreign := {node.domain for node in model.graph.node} - {"", "ai.onnx"}:
        raise RuntimeError(f"the graph has operators of {', '.join(foreign)}; expected ONNX's own")
    return model
