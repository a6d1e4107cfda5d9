"""The configuration of a SongUNet, read from the names and shapes in its state dict."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

_LEVEL = re.compile(r"enc\.(\d+)x\1_block0\.conv1\.weight")


def network_prefix(state: Mapping[str, Tensor]) -> str:
    """What stands before the SongUNet's own names ("model." in EDM's checkpoints).

    Raises ValueError when there is no SongUNet or more than one, or when other tensors lie beside it.
    """
    prefixes = [key.removesuffix("map_layer0.weight") for key in state if key.endswith("map_layer0.weight")]
    if len(prefixes) != 1:
        found = f"{len(prefixes)} networks {prefixes}" if prefixes else "no SongUNet"
        raise ValueError(
            f"found {found} among {len(state)} tensors such as {', '.join(sorted(state)[:3])}; "
            "only DDPM++ and NCSN++ networks with EDM's names can be converted"
        )
    if beside := sorted(key for key in state if not key.startswith(prefixes[0])):
        raise ValueError(
            f"tensors lie beside the network {prefixes[0]!r}: {', '.join(beside[:5])}; they may change what "
            "it computes, so save the state dict of the network alone"
        )
    return prefixes[0]


def infer_network(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of SongUNet from its state dict (names without prefix).

    Dropout, which leaves no trace in the weights, is 0. Raises ValueError when the names or shapes are not
    those of a SongUNet.
    """
    try:
        return _infer(state)
    except (KeyError, IndexError, StopIteration, ZeroDivisionError) as error:
        raise ValueError(
            f"the weights are not those of a SongUNet of EDM ({type(error).__name__}: {error}); "
            "give its arguments as config={'network': {...}}"
        ) from error


def _infer(state: Mapping[str, Tensor]) -> dict[str, Any]:
    resolutions = sorted((int(m[1]) for key in state if (m := _LEVEL.fullmatch(key))), reverse=True)
    resolution = resolutions[0]
    stem = state[f"enc.{resolution}x{resolution}_conv.weight"]
    model_channels = stem.shape[0]
    emb_channels, noise_channels = state["map_layer0.weight"].shape
    blocks = re.compile(rf"enc\.{resolution}x{resolution}_block\d+\.conv1\.weight")
    kinds = {
        kind
        for kind in ("residual", "skip")
        if any(k.startswith("enc.") and f"_aux_{kind}" in k for k in state)
    }
    decoder_norms = [k for k in state if k.startswith("dec.") and k.endswith("_aux_norm.weight")]
    network: dict[str, Any] = {
        "img_resolution": resolution,
        "in_channels": stem.shape[1],
        "out_channels": state[f"dec.{resolution}x{resolution}_aux_conv.weight"].shape[0],
        "label_dim": state["map_label.weight"].shape[1] if "map_label.weight" in state else 0,
        "augment_dim": state["map_augment.weight"].shape[1] if "map_augment.weight" in state else 0,
        "model_channels": model_channels,
        "channel_mult": [
            state[f"enc.{r}x{r}_block0.conv1.weight"].shape[0] // model_channels for r in resolutions
        ],
        "channel_mult_emb": emb_channels // model_channels,
        "num_blocks": sum(bool(blocks.fullmatch(key)) for key in state),
        "attn_resolutions": [r for r in resolutions if f"enc.{r}x{r}_block0.qkv.weight" in state],
        "dropout": 0.0,
        "embedding_type": "fourier" if "map_noise.freqs" in state else "positional",
        "channel_mult_noise": noise_channels // model_channels,
        "encoder_type": kinds.pop() if kinds else "standard",
        "decoder_type": "skip" if len(decoder_norms) > 1 else "standard",
    }
    if len(resolutions) > 1:
        half = resolutions[1]
        rows = state[f"enc.{half}x{half}_down.conv0.resample_filter"].double().sum((0, 1, 2))
        network["resample_filter"] = [round(tap, 6) for tap in (rows / rows[0]).tolist()]
    return network
