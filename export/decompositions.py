"""Backward operators that ONNX lacks, in terms of forward ones; for `make_fx`, with weights held fixed.

Every formula is that of the derivative with respect to the image alone. Statistics of normalisation are
float32, as on every backend (DESIGN, numerics).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: list[int] | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    output_mask: list[bool],
) -> tuple[Tensor | None, None, None]:
    """The adjoint of a convolution, itself one: at stride 1 with the kernel turned about, else transposed."""
    if output_mask[1] or output_mask[2]:
        raise ValueError("the graph asks for gradients of weights; freeze them before it is traced")
    if not output_mask[0]:
        return None, None, None
    if transposed:
        return (
            aten.convolution(grad, weight, None, stride, padding, dilation, False, [0, 0], groups),
            None,
            None,
        )
    kernel = weight.shape[2:]
    if all(step == 1 for step in stride):
        # Convolutions are fast on every backend, transposed ones are not.
        full = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True)]
        return (
            aten.convolution(
                grad, _turned(weight, groups), None, stride, full, dilation, False, [0, 0], groups
            ),
            None,
            None,
        )
    missing = [
        size - ((out - 1) * s - 2 * p + d * (k - 1) + 1)
        for size, out, s, p, d, k in zip(
            x.shape[2:], grad.shape[2:], stride, padding, dilation, kernel, strict=True
        )
    ]
    return aten.convolution(grad, weight, None, stride, padding, dilation, True, missing, groups), None, None


def _turned(weight: Tensor, groups: int) -> Tensor:
    """[out, in / groups, h, w] -> [in, out / groups, h, w], the kernels turned by half a turn."""
    flipped = weight.flip(2, 3)
    if groups == 1:
        return flipped.transpose(0, 1)
    out, share = weight.shape[:2]
    if share == 1 and out == groups:
        return flipped
    return flipped.unflatten(0, (groups, out // groups)).transpose(1, 2).flatten(0, 1)


def _native_group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, N: int, C: int, HxW: int, group: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide = x.float() if x.dtype.itemsize < 4 else x
    grouped = wide.reshape(N, group, -1)
    mean = grouped.mean(2, keepdim=True)
    centred = grouped - mean
    rstd = (centred.square().mean(2, keepdim=True) + eps).rsqrt()
    z = (centred * rstd).view(x.shape)
    if weight is not None:
        z = z * weight.to(z.dtype)[:, None, None]
    if bias is not None:
        z = z + bias.to(z.dtype)[:, None, None]
    return z.to(x.dtype), mean.reshape(N, group), rstd.reshape(N, group)


def _native_group_norm_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    N: int,
    C: int,
    HxW: int,
    group: int,
    output_mask: list[bool],
) -> tuple[Tensor, None, None]:
    """dx = rstd (g - mean(g) - xhat mean(g xhat)) with g = weight dy, means over the group."""
    wide = mean.dtype
    g = grad.to(wide)
    if weight is not None:
        g = g * weight.to(wide)[:, None, None]
    g = g.reshape(N, group, -1)
    scale = rstd.reshape(N, group, 1).to(wide)
    xhat = (x.to(wide).reshape(N, group, -1) - mean.reshape(N, group, 1)) * scale
    dx = scale * (g - g.mean(2, keepdim=True) - xhat * (g * xhat).mean(2, keepdim=True))
    return dx.view(x.shape).to(x.dtype), None, None


def _silu(x: Tensor) -> Tensor:
    return x * x.sigmoid()


def _silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    s = x.sigmoid()
    return grad * (s * (1 + x * (1 - s)))


def _softmax_backward(grad: Tensor, output: Tensor, dim: int, input_dtype: torch.dtype) -> Tensor:
    product = grad * output
    # The sum as a product with ones: ONNX Runtime's sums of odd lengths depend, in the last bits, on where in
    # memory they start, and so on an image's place in the batch.
    ones = torch.ones(output.shape[dim], 1, dtype=product.dtype, device=product.device)
    total = (product.movedim(dim, -1) @ ones).movedim(-1, dim)
    return (product - output * total).to(input_dtype)


def _identity(x: Tensor) -> Tensor:
    return x


TABLE: dict[Any, Callable[..., Any]] = {
    aten.convolution_backward.default: _convolution_backward,
    aten.native_group_norm.default: _native_group_norm,
    aten.native_group_norm_backward.default: _native_group_norm_backward,
    aten.silu.default: _silu,
    aten.silu_backward.default: _silu_backward,
    aten._softmax_backward_data.default: _softmax_backward,
    aten.detach.default: _identity,
}
