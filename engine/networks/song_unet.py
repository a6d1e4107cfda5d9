"""SongUNet: the DDPM++ and NCSN++ backbones of EDM (arXiv 2206.00364, table 7).

Written from the paper and the names in the published state dicts, which load strictly.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from alpenglow.networks.layers import (
    Conv2d,
    FourierEmbedding,
    GroupNorm,
    Linear,
    PositionalEmbedding,
    UNetBlock,
)


class SongUNet(nn.Module):
    """UNet F(x, noise_label) of EDM; arguments carry the names of EDM's own configuration.

    DDPM++: the defaults. NCSN++: embedding_type="fourier", encoder_type="residual",
    channel_mult_noise=2, resample_filter=(1, 3, 3, 1).
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        *,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: tuple[int, ...] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: tuple[int, ...] = (16,),
        dropout: float = 0.10,
        embedding_type: Literal["positional", "fourier"] = "positional",
        channel_mult_noise: int = 1,
        encoder_type: Literal["standard", "skip", "residual"] = "standard",
        decoder_type: Literal["standard", "skip"] = "standard",
        resample_filter: tuple[float, ...] = (1, 1),
    ) -> None:
        super().__init__()
        if img_resolution % 2 ** (len(channel_mult) - 1):
            raise ValueError(
                f"img_resolution {img_resolution} cannot be halved {len(channel_mult) - 1} times; "
                "use fewer entries in channel_mult or pad the images"
            )
        self.img_resolution, self.in_channels, self.out_channels = img_resolution, in_channels, out_channels
        self.label_dim, self.augment_dim = label_dim, augment_dim
        self.size_multiple = 2 ** (len(channel_mult) - 1)
        """Heights and widths must be multiples of it; they need not be img_resolution."""
        self.checkpointing = False
        """Recompute the activations of each block in the backward pass: less memory, a third more time."""
        emb_channels, noise_channels = model_channels * channel_mult_emb, model_channels * channel_mult_noise
        block: dict[str, Any] = dict(
            emb_channels=emb_channels, resample_filter=tuple(resample_filter), dropout=dropout
        )
        sampled: dict[str, Any] = dict(resample_filter=tuple(resample_filter))

        self.map_noise: nn.Module = (
            PositionalEmbedding(noise_channels)
            if embedding_type == "positional"
            else FourierEmbedding(noise_channels)
        )
        self.map_label = Linear(label_dim, noise_channels) if label_dim else None
        self.map_augment = Linear(augment_dim, noise_channels, bias=False) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, emb_channels)
        self.map_layer1 = Linear(emb_channels, emb_channels)

        last = len(channel_mult) - 1
        self.enc = nn.ModuleDict()
        skips: list[int] = []
        channels, aux_channels = model_channels, in_channels
        for level, mult in enumerate(channel_mult):
            name = f"{img_resolution >> level}x{img_resolution >> level}"
            if level == 0:
                self.enc[f"{name}_conv"] = Conv2d(in_channels, channels, 3)
            else:
                self.enc[f"{name}_down"] = UNetBlock(channels, channels, resampling="down", **block)
                if encoder_type == "skip":
                    self.enc[f"{name}_aux_down"] = Conv2d(
                        aux_channels, aux_channels, 0, resampling="down", **sampled
                    )
                    self.enc[f"{name}_aux_skip"] = Conv2d(aux_channels, channels, 1)
                if encoder_type == "residual":
                    self.enc[f"{name}_aux_residual"] = Conv2d(
                        aux_channels, channels, 3, resampling="down", fused=True, **sampled
                    )
                    aux_channels = channels
            skips.append(channels)
            for index in range(num_blocks):
                attention = (img_resolution >> level) in attn_resolutions
                self.enc[f"{name}_block{index}"] = UNetBlock(
                    channels, model_channels * mult, attention=attention, **block
                )
                channels = model_channels * mult
                skips.append(channels)

        self.dec = nn.ModuleDict()
        for level, mult in reversed(list(enumerate(channel_mult))):
            name = f"{img_resolution >> level}x{img_resolution >> level}"
            if level == last:
                self.dec[f"{name}_in0"] = UNetBlock(channels, channels, attention=True, **block)
                self.dec[f"{name}_in1"] = UNetBlock(channels, channels, **block)
            else:
                self.dec[f"{name}_up"] = UNetBlock(channels, channels, resampling="up", **block)
            for index in range(num_blocks + 1):
                attention = index == num_blocks and (img_resolution >> level) in attn_resolutions
                self.dec[f"{name}_block{index}"] = UNetBlock(
                    channels + skips.pop(), model_channels * mult, attention=attention, **block
                )
                channels = model_channels * mult
            if decoder_type == "skip" or level == 0:
                if decoder_type == "skip" and level < last:
                    self.dec[f"{name}_aux_up"] = Conv2d(
                        out_channels, out_channels, 0, resampling="up", **sampled
                    )
                self.dec[f"{name}_aux_norm"] = GroupNorm(channels, eps=1e-6)
                self.dec[f"{name}_aux_conv"] = Conv2d(channels, out_channels, 3, init_scale=1e-5)

    @property
    def stem(self) -> nn.Module:
        """The convolution that takes the image."""
        return next(iter(self.enc.values()))

    def embed(
        self, noise_label: Tensor, class_label: Tensor | None = None, augmentation: Tensor | None = None
    ) -> Tensor:
        """Conditioning vector [B, emb_channels] of noise_label [B], one-hot class_label [B, label_dim] and
        augmentation [B, augment_dim]; without class and augmentation: unconditional, and not augmented."""
        emb = self.map_noise(noise_label)
        # The released weights were trained with sine and cosine halves swapped.
        emb = emb.unflatten(1, (2, -1)).flip(1).flatten(1)
        if self.map_label is not None:
            if class_label is None:
                class_label = emb.new_zeros(len(emb), self.label_dim)
            emb = emb + self.map_label(class_label * self.label_dim**0.5)
        if self.map_augment is not None and augmentation is not None:
            emb = emb + self.map_augment(augmentation)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def forward(
        self,
        x: Tensor,
        noise_label: Tensor,
        class_label: Tensor | None = None,
        augmentation: Tensor | None = None,
        *,
        compute_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """F(x): x [B, in_channels, H, W] and noise_label [B] -> [B, out_channels, H, W]; see `embed`.

        `compute_dtype` float16 or bfloat16: of everything behind the stem, and of the result.
        """
        emb = self.embed(noise_label, class_label, augmentation)
        aux = x.to(compute_dtype or x.dtype)
        skips: list[Tensor] = []
        for name, layer in self.enc.items():
            if layer is self.stem:
                # Not from `aux`: half precision rounds an image by a tenth of the noise of the lowest levels.
                x = layer(x).to(aux.dtype)
                skips.append(x)
            elif name.endswith("_aux_down"):
                aux = layer(aux)
            elif name.endswith("_aux_skip"):
                x = skips[-1] = x + layer(aux)
            elif name.endswith("_aux_residual"):
                x = skips[-1] = aux = (x + layer(aux)) * 0.5**0.5
            else:
                x = self._block(layer, x, emb) if isinstance(layer, UNetBlock) else layer(x)
                skips.append(x)

        output: Tensor | None = None
        normed = x
        for name, layer in self.dec.items():
            if name.endswith("_aux_up"):
                output = layer(output)
            elif name.endswith("_aux_norm"):
                normed = layer(x, silu=True)
            elif name.endswith("_aux_conv"):
                image = layer(normed)
                output = image if output is None else output + image
            else:
                if x.shape[1] != layer.in_channels:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = self._block(layer, x, emb)
        assert output is not None
        return output

    def _block(self, block: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, emb, use_reentrant=False)
        return block(x, emb)
