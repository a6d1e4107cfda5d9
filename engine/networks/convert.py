"""Foreign checkpoints (EDM pickles, torch state dicts) to alpenglow's safetensors files."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from alpenglow.networks.denoiser import EDMDenoiser
from alpenglow.networks.inference import infer_network, network_prefix
from alpenglow.networks.storage import Kind, Metadata, read_denoiser, save_denoiser
from alpenglow.networks.unpickle import Record, read_pickle

SIGMA_RANGE = (0.002, 80.0)
"""Levels of EDM's sampler (arXiv 2206.00364, table 1)."""
_WRAPPERS = ("ema", "ema_state_dict", "state_dict", "model_state_dict", "model", "net")
_CONFIG_KEYS = ("backbone", "network", "sigma_data", "patch", "kind", "image_shape", "sigma_range", "units")


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    *,
    config: str | Path | Mapping[str, Any] | None = None,
    name: str | None = None,
    kind: Kind | None = None,
    dtype: torch.dtype = torch.float32,
) -> Metadata:
    """Convert an EDM pickle (.pkl) or a torch state dict (.pt, .pth) to `target` (.safetensors).

    Nothing in the source is run. The network is read from a pickle's own record; for a state dict from
    `config` (a mapping or YAML file with any of network, sigma_data, patch, kind, image_shape, sigma_range,
    units), and what that leaves out from names and shapes. `kind` says what the network is: "teacher" (the
    default for EDM pickles) or "energy" (ALPS); a bare state dict does not tell, so it must be given.
    `name` defaults to the source's. Returns the header as written.

    Raises ValueError for a source that is missing, damaged, refused for safety, of another architecture or
    preconditioning, or that does not fit its configuration; then nothing is written.
    """
    source = Path(source)
    options = _read_config(config)
    if not source.is_file():
        raise ValueError(f"no checkpoint {source}; give a .pkl of EDM or a .pt, .pth state dict")
    content = read_pickle(source) if source.suffix.lower() == ".pkl" else _read_torch(source)
    content = _unwrap(content)
    if isinstance(content, Record):
        try:
            state, recorded = _from_record(content, source)
        except (TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{source} is not what EDM writes: {error}") from error
        options = {"kind": "teacher", **recorded, **options}
    else:
        state = _tensors(content, source)
    state, options = _complete(state, options, source)
    kind = kind or options.get("kind")
    if kind is None:
        raise ValueError(
            f"{source} does not say what it holds; pass kind='energy' for a distilled energy model (ALPS) "
            "or kind='teacher' for a denoiser (EDM)"
        )
    denoiser = _build(state, options, source)
    network = options["network"]
    shape = options.get("image_shape") or (
        network["in_channels"] // denoiser.patch**2,
        network["img_resolution"] * denoiser.patch,
        network["img_resolution"] * denoiser.patch,
    )
    save_denoiser(
        target,
        denoiser,
        name=name or source.stem,
        image_shape=tuple(shape),
        kind=kind,
        sigma_range=tuple(options.get("sigma_range", SIGMA_RANGE)),
        units=options.get("units", "[-1, 1]"),
        extra={"converted_from": source.name},
        dtype=dtype,
    )
    return read_denoiser(target)[1]


def _read_config(config: str | Path | Mapping[str, Any] | None) -> dict[str, Any]:
    if config is None:
        return {}
    if isinstance(config, str | Path):
        path = Path(config)
        if not path.is_file():
            raise ValueError(f"no configuration file {path}; give a YAML file with {', '.join(_CONFIG_KEYS)}")
        try:
            config = yaml.safe_load(path.read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(config, Mapping):
        raise ValueError(
            f"the configuration is a {type(config).__name__}; expected {', '.join(_CONFIG_KEYS)}"
        )
    if unknown := sorted(set(config) - set(_CONFIG_KEYS)):
        raise ValueError(f"the configuration has {', '.join(unknown)}; it knows {', '.join(_CONFIG_KEYS)}")
    return dict(config)


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{path} was refused, nothing of it was run: {reason} A state dict (torch.save(net.state_dict(), "
            "path)) can be converted"
        ) from None
    except Exception as error:
        # torch reports damage as RuntimeError, EOFError, KeyError, zipfile and unicode errors.
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path} is not a readable torch checkpoint ({reason}); fetch it again") from error


def _unwrap(content: Any) -> Any:
    """The network in a dictionary of training state."""
    for _ in range(4):
        if not isinstance(content, Mapping):
            break
        inner = next(
            (content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping | Record)), None
        )
        if inner is None:
            return content
        content = inner
    return content


def _tensors(content: Any, source: Path) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        raise ValueError(f"{source} holds a {type(content).__name__}; expected a state dict")
    wrong = sorted(str(key) for key, value in content.items() if not isinstance(value, Tensor))
    if wrong or not content:
        raise ValueError(
            f"{source} holds no state dict: {', '.join(wrong[:5]) or 'nothing'} where tensors were expected; "
            f"known wrappers are {', '.join(_WRAPPERS)}"
        )
    return {str(key): value for key, value in content.items()}


def _from_record(record: Record, source: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict and options of a pickled EDMPrecond."""
    model = record.state.get("_modules", {}).get("model")
    if record.class_name != "EDMPrecond" or not isinstance(model, Record):
        raise ValueError(
            f"{source} holds a {record.class_name}; only EDMPrecond has the preconditioning that an energy "
            "prior of alpenglow is built on"
        )
    if model.class_name != "SongUNet":
        raise ValueError(
            f"{source} holds a {model.class_name}; only SongUNet (DDPM++ and NCSN++) can be converted"
        )
    network = dict(model.state.get("_init_kwargs", {}))
    positional = model.state.get("_init_args", ())
    network |= dict(zip(("img_resolution", "in_channels", "out_channels"), positional, strict=False))
    # Both act in training alone.
    network.pop("label_dropout", None)
    network["dropout"] = 0.0
    options = {"network": network, "sigma_data": float(record.state.get("sigma_data", 0.5))}
    return dict(_collect(record, "")), options


def _collect(record: Record, prefix: str) -> list[tuple[str, Tensor]]:
    """Parameters and persistent buffers of a pickled module tree, with the names of its state dict."""
    state = record.state
    transient = state.get("_non_persistent_buffers_set") or ()
    transient = transient.args[0] if isinstance(transient, Record) and transient.args else transient
    skipped = set() if isinstance(transient, Record) else set(transient)
    own = {**state.get("_parameters", {}), **state.get("_buffers", {})}
    tensors = [
        (prefix + key, value)
        for key, value in own.items()
        if isinstance(value, Tensor) and key not in skipped
    ]
    for key, child in state.get("_modules", {}).items():
        if isinstance(child, Record):
            tensors += _collect(child, f"{prefix}{key}.")
    return tensors


def _complete(
    state: dict[str, Tensor], options: dict[str, Any], source: Path
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict with our names, and options with the network's arguments."""
    state = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
    try:
        prefix = network_prefix(state)
        bare = {key.removeprefix(prefix): value.float() for key, value in state.items()}
        if "network" not in options:
            options = {**options, "network": infer_network(bare)}
    except ValueError as error:
        raise ValueError(f"{source} cannot be converted: {error}") from error
    return {f"model.{key}": value for key, value in bare.items()}, options


def _build(state: dict[str, Tensor], options: dict[str, Any], source: Path) -> EDMDenoiser:
    config = {
        "backbone": options.get("backbone", "SongUNet"),
        "network": options["network"],
        "sigma_data": options.get("sigma_data", 0.5),
        "patch": options.get("patch", 1),
    }
    try:
        with torch.device("meta"):
            denoiser = EDMDenoiser.from_config(config)
        denoiser.load_state_dict(state, strict=True, assign=True)
    except (ValueError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"the weights in {source} do not fit the network {config['network']}: {error}"
        ) from error
    return denoiser.requires_grad_(False).eval()
