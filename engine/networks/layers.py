"""Building blocks of the EDM UNets (Karras et al. 2022, arXiv 2206.00364, appendix F).

Parameter and buffer names follow the published EDM state dicts, so that their weights load
by name; the numerics follow the paper and its released checkpoints.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alpenglow.kernels.group_norm_silu import group_norm_silu

Resampling = Literal["up", "down"]


def xavier_(weight: Tensor, scale: float = 1.0) -> Tensor:
    """Fill `weight` in place with the Xavier uniform distribution, times `scale`; return it."""
    nn.init.xavier_uniform_(weight)
    return weight.mul_(scale)


class Linear(nn.Linear):
    """Linear layer with EDM's initialisation (Xavier weights, zero bias)."""

    def reset_parameters(self) -> None:
        with torch.no_grad():
            xavier_(self.weight)
            if self.bias is not None:
                self.bias.zero_()


class Conv2d(nn.Module):
    """Convolution with optional 2x resampling by a separable FIR filter.

    `kernel` 0 resamples only. `fused` goes down with the convolution before the filter, as the
    residual encoder branch of NCSN++ does. Image sizes must be even to go down.
    """

    weight: Tensor | None
    bias: Tensor | None
    resample_filter: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        resampling: Resampling | None = None,
        resample_filter: tuple[float, ...] = (1, 1),
        fused: bool = False,
        init_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.resampling, self.fused = resampling, fused
        weight = bias = None
        if kernel:
            weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel, kernel))
            bias = nn.Parameter(torch.zeros(out_channels))
            with torch.no_grad():
                xavier_(weight, init_scale)
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)
        total = sum(resample_filter) ** 2
        outer = [[a * b / total for b in resample_filter] for a in resample_filter]
        self.register_buffer("resample_filter", torch.tensor([[outer]]) if resampling else None)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x [B, in_channels, H, W]; returns [B, out_channels, H', W']."""
        weight = None if self.weight is None else self.weight.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        pad = 0 if weight is None else weight.shape[-1] // 2
        if self.resample_filter is None:
            assert weight is not None
            return F.conv2d(x, weight, bias, padding=pad)
        taps = self.resample_filter.to(x.dtype)
        filter_pad = (taps.shape[-1] - 1) // 2
        if weight is None:
            return self._resample(x, taps, filter_pad)
        if self.fused and self.resampling == "down":
            y = self._resample(F.conv2d(x, weight, padding=pad + filter_pad), taps, 0)
        else:
            y = F.conv2d(self._resample(x, taps, filter_pad), weight, padding=pad)
        return y if bias is None else y + bias[:, None, None]

    def _resample(self, x: Tensor, taps: Tensor, padding: int) -> Tensor:
        C = x.shape[1]
        taps = taps.expand(C, -1, -1, -1)
        if self.resampling == "up":
            return F.conv_transpose2d(x, 4 * taps, stride=2, padding=padding, groups=C)
        return F.conv2d(x, taps, stride=2, padding=padding, groups=C)


class GroupNorm(nn.GroupNorm):
    """Group normalisation with EDM's group count; statistics are kept in float32."""

    def __init__(self, channels: int, *, eps: float = 1e-5) -> None:
        super().__init__(min(32, channels // 4), channels, eps=eps)

    def forward(self, x: Tensor, *, silu: bool = False, shift: Tensor | None = None) -> Tensor:
        """x [B, C, H, W] plus shift [B, C], normalised; then SiLU on request."""
        return group_norm_silu(x, self.num_groups, self.weight, self.bias, self.eps, silu=silu, shift=shift)


class PositionalEmbedding(nn.Module):
    """Sinusoidal embedding of the noise level, DDPM++ (cosines first)."""

    def __init__(self, channels: int, *, max_positions: int = 10000) -> None:
        super().__init__()
        self.channels, self.max_positions = channels, max_positions

    def forward(self, position: Tensor) -> Tensor:
        half = self.channels // 2
        exponent = torch.arange(half, dtype=torch.float32, device=position.device) / (half - 1)
        angle = torch.outer(position, ((1 / self.max_positions) ** exponent).to(position.dtype))
        return torch.cat([angle.cos(), angle.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """Random Fourier features of the noise level, NCSN++ (frequencies are stored with the weights)."""

    freqs: Tensor

    def __init__(self, channels: int, *, scale: float = 16) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.empty(channels // 2).normal_(std=scale))

    def forward(self, position: Tensor) -> Tensor:
        angle = torch.outer(position, (2 * math.pi * self.freqs).to(position.dtype))
        return torch.cat([angle.cos(), angle.sin()], dim=1)


class UNetBlock(nn.Module):
    """Residual block with noise-level conditioning, optional 2x resampling and self-attention."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        emb_channels: int,
        resampling: Resampling | None = None,
        resample_filter: tuple[float, ...] = (1, 1),
        attention: bool = False,
        num_heads: int = 1,
        dropout: float = 0.0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.num_heads = num_heads if attention else 0
        self.dropout = dropout
        self.norm0 = GroupNorm(in_channels, eps=eps)
        self.conv0 = Conv2d(
            in_channels, out_channels, 3, resampling=resampling, resample_filter=resample_filter
        )
        self.affine = Linear(emb_channels, out_channels)
        self.norm1 = GroupNorm(out_channels, eps=eps)
        self.conv1 = Conv2d(out_channels, out_channels, 3, init_scale=1e-5)
        self.skip = None
        if out_channels != in_channels or resampling:
            self.skip = Conv2d(
                in_channels, out_channels, 1, resampling=resampling, resample_filter=resample_filter
            )
        if self.num_heads:
            self.norm2 = GroupNorm(out_channels, eps=eps)
            self.qkv = Conv2d(out_channels, 3 * out_channels, 1, init_scale=math.sqrt(0.2))
            self.proj = Conv2d(out_channels, out_channels, 1, init_scale=1e-5)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x [B, in_channels, H, W], emb [B, emb_channels] -> [B, out_channels, H', W']."""
        y = self.conv0(self.norm0(x, silu=True))
        y = self.norm1(y, silu=True, shift=self.affine(emb))
        y = self.conv1(F.dropout(y, self.dropout, self.training))
        y = (y + (x if self.skip is None else self.skip(x))) * math.sqrt(0.5)
        return self._attend(y) if self.num_heads else y

    def _attend(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        # EDM stores queries, keys and values interleaved per channel, not as three blocks.
        qkv = self.qkv(self.norm2(x)).reshape(B, self.num_heads, C // self.num_heads, 3, H * W)
        query, key, value = qkv.unbind(3)
        logits = torch.einsum("bhcq,bhck->bhqk", query, key / math.sqrt(C // self.num_heads))
        # Softmax in float32: in half precision its sum over thousands of keys is not one.
        attention = logits.float().softmax(-1).to(x.dtype) if x.dtype.itemsize < 4 else logits.softmax(-1)
        mixed = torch.einsum("bhqk,bhck->bhcq", attention, value).reshape(B, C, H, W)
        return (x + self.proj(mixed)) * math.sqrt(0.5)
