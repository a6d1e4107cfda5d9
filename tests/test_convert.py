"""Conversion of foreign checkpoints, and pickles that must not run."""

import builtins
import codecs
import collections
import io
import os
import pickle
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from alpenglow.networks.convert import convert_checkpoint
from alpenglow.networks.denoiser import EDMDenoiser
from alpenglow.networks.song_unet import SongUNet
from alpenglow.networks.unpickle import read_pickle
from alpenglow.priors.loading import load_denoiser, load_prior

DDPMPP: dict[str, Any] = {
    "model_channels": 16,
    "channel_mult": [1, 2, 2],
    "num_blocks": 2,
    "attn_resolutions": [8],
    "embedding_type": "positional",
    "encoder_type": "standard",
    "decoder_type": "standard",
    "channel_mult_noise": 1,
    "resample_filter": [1, 1],
    "augment_dim": 9,
}
NCSNPP: dict[str, Any] = DDPMPP | {
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}
SKIP: dict[str, Any] = NCSNPP | {
    "encoder_type": "skip",
    "decoder_type": "skip",
    "augment_dim": 0,
    "num_blocks": 1,
}
NETWORKS = {"ddpm++": DDPMPP, "ncsn++": NCSNPP, "skip": SKIP}


def denoiser(options: dict[str, Any]) -> EDMDenoiser:
    torch.manual_seed(0)
    network = {"img_resolution": 16, "in_channels": 3, "out_channels": 3, "dropout": 0.1, **options}
    result = EDMDenoiser.from_config({"backbone": "SongUNet", "network": network})
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return result.requires_grad_(False).eval()


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([0.1, 2.0])


# EDM's own way of writing, with modules that exist while the pickle is written and not after.


@contextmanager
def edm_modules() -> Iterator[types.SimpleNamespace]:
    persistence, util = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib.util")
    modules = {
        "torch_utils": types.ModuleType("torch_utils"),
        "torch_utils.persistence": persistence,
        "dnnlib": types.ModuleType("dnnlib"),
        "dnnlib.util": util,
    }

    def reconstruct(meta: Any) -> None:
        raise AssertionError("a reader ran it")

    reconstruct.__module__, reconstruct.__qualname__ = (
        "torch_utils.persistence",
        "_reconstruct_persistent_obj",
    )
    easy = type("EasyDict", (dict,), {"__module__": "dnnlib.util", "__qualname__": "EasyDict"})
    persistence._reconstruct_persistent_obj = reconstruct  # type: ignore[attr-defined]
    util.EasyDict = easy  # type: ignore[attr-defined]
    sys.modules.update(modules)
    try:
        yield types.SimpleNamespace(reconstruct=reconstruct, easy=easy)
    finally:
        for name in modules:
            del sys.modules[name]


def persistent(edm: Any, class_name: str, state: dict[str, Any]) -> Any:
    """An object that pickles as EDM's persistent classes do."""
    meta = {
        "type": "class",
        "version": 6,
        "module_src": "raise SystemExit('the source in the pickle was run')",
        "class_name": class_name,
        "state": state,
    }
    return type(class_name, (nn.Module,), {"__reduce__": lambda self: (edm.reconstruct, (meta,), None)})()


def as_edm(edm: Any, module: nn.Module, options: dict[str, Any]) -> Any:
    """`module` as EDM's classes: containers as torch's own, everything else persistent."""
    if isinstance(module, nn.ModuleDict):
        return nn.ModuleDict({name: as_edm(edm, child, options) for name, child in module.items()})
    state = {
        key: module.__dict__[key]
        for key in ("training", "_parameters", "_buffers", "_non_persistent_buffers_set")
    }
    state["_modules"] = {
        name: child if child is None else as_edm(edm, child, options)
        for name, child in module._modules.items()
    }
    # numpy numbers, as in EDM's blocks.
    state |= {
        "_init_args": (),
        "_init_kwargs": {"skip_scale": np.sqrt(0.5), "init": {"init_weight": np.sqrt(0.2)}},
    }
    if isinstance(module, SongUNet):
        state["_init_kwargs"] = edm.easy(
            {"img_resolution": 16, "in_channels": 3, "out_channels": 3, "label_dim": 0, "label_dropout": 0},
            **options,
        )
    if isinstance(module, EDMDenoiser):
        state["_init_kwargs"] = edm.easy(img_resolution=16, img_channels=3, model_type="SongUNet", **options)
        state |= {"img_resolution": 16, "use_fp16": False, "sigma_min": 0, "sigma_max": float("inf")}
        state["sigma_data"] = 0.5
    name = {"EDMDenoiser": "EDMPrecond"}.get(type(module).__name__, type(module).__name__)
    return persistent(edm, name, state)


def edm_pickle(path: Path, options: dict[str, Any], protocol: int = 4, **renamed: str) -> EDMDenoiser:
    network = denoiser(options)
    with edm_modules() as edm:
        snapshot = edm.easy(
            ema=as_edm(edm, network, options),
            loss_fn=persistent(edm, "EDMLoss", {"P_mean": -1.2, "_init_args": (), "filter": np.arange(3.0)}),
            augment_pipe=None,
            dataset_kwargs=edm.easy(path="cifar10-32x32.zip", use_labels=False),
        )
        data = pickle.dumps(snapshot, protocol=protocol)
    for old, new in renamed.items():
        assert len(old) == len(new)
        data = data.replace(old.encode(), new.encode())
    path.write_bytes(data)
    assert "torch_utils" not in sys.modules
    return network


@pytest.mark.parametrize("name", NETWORKS)
def test_edm_pickle(tmp_path: Path, name: str) -> None:
    network = edm_pickle(tmp_path / "edm.pkl", NETWORKS[name])
    header = convert_checkpoint(tmp_path / "edm.pkl", tmp_path / "edm.safetensors", name="edm")
    assert (header.kind, header.name, header.image_shape) == ("teacher", "edm", (3, 16, 16))
    assert header.denoiser.sigma_data == 0.5
    assert torch.equal(load_denoiser(tmp_path / "edm.safetensors")(*batch()), network(*batch()))
    with pytest.raises(ValueError, match="holds a teacher"):
        load_prior(tmp_path / "edm.safetensors")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_protocols(tmp_path: Path, protocol: int) -> None:
    network = edm_pickle(tmp_path / "edm.pkl", DDPMPP, protocol)
    convert_checkpoint(tmp_path / "edm.pkl", tmp_path / "edm.safetensors", kind="energy")
    prior = load_prior(tmp_path / "edm.safetensors")
    assert torch.equal(prior.denoiser(*batch()), network(*batch()))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("EDMPrecond", "VPPrecond_", "holds a VPPrecond_; only EDMPrecond"),
        ("SongUNet", "DhariUNe", "holds a DhariUNe; only SongUNet"),
    ],
)
def test_other_networks_are_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    edm_pickle(tmp_path / "edm.pkl", DDPMPP, **{old: new})
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "edm.pkl", tmp_path / "edm.safetensors")


def wrapped(state: dict[str, Any], wrapper: str) -> Any:
    if wrapper == "DataParallel":
        return {"epoch": 3, "model": {f"module.{key}": value for key, value in state.items()}}
    if wrapper == "bare network":
        return {key.removeprefix("model."): value for key, value in state.items()}
    return {"ema": state, "optimizer": {"lr": 1e-3}} if wrapper == "ema" else state


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("wrapper", ["none", "ema", "DataParallel", "bare network"])
@pytest.mark.parametrize("zipped", [True, False])
def test_state_dicts(tmp_path: Path, name: str, wrapper: str, zipped: bool) -> None:
    network = denoiser(NETWORKS[name])
    content = wrapped(network.state_dict(), wrapper)
    torch.save(content, tmp_path / "net.pth", _use_new_zipfile_serialization=zipped)
    header = convert_checkpoint(tmp_path / "net.pth", tmp_path / "net.safetensors", kind="energy")
    assert header.name == "net"
    inferred = {key: header.denoiser.network.get(key) for key in NETWORKS[name]}
    assert inferred == NETWORKS[name]
    prior = load_prior(tmp_path / "net.safetensors")
    assert torch.equal(prior.denoiser(*batch()), network(*batch()))


def test_state_dict_pickled_plainly(tmp_path: Path) -> None:
    network = denoiser(DDPMPP)
    (tmp_path / "net.pkl").write_bytes(pickle.dumps(network.state_dict()))
    convert_checkpoint(tmp_path / "net.pkl", tmp_path / "net.safetensors", kind="energy")
    assert torch.equal(load_denoiser(tmp_path / "net.safetensors")(*batch()), network(*batch()))


def test_configuration_file(tmp_path: Path) -> None:
    network = denoiser(DDPMPP)
    torch.save(network.state_dict(), tmp_path / "net.pt")
    config = {"kind": "energy", "sigma_data": 0.7, "image_shape": [3, 32, 16], "sigma_range": [0.01, 10.0]}
    (tmp_path / "net.yaml").write_text(yaml.safe_dump(config))
    convert_checkpoint(tmp_path / "net.pt", tmp_path / "net.safetensors", config=tmp_path / "net.yaml")
    prior = load_prior(tmp_path / "net.safetensors")
    assert (prior.image_shape, prior.sigma_range) == ((3, 32, 16), (0.01, 10.0))
    assert prior.denoiser.sigma_data == 0.7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "pass kind='energy'.*or kind='teacher'"),
        ({"config": {"kinds": "energy"}}, "the configuration has kinds; it knows"),
        ({"config": [1]}, "the configuration is a list"),
        ({"config": "nowhere.yaml"}, "no configuration file nowhere.yaml"),
        ({"config": {"kind": "energy", "network": {"img_resolution": 16}}}, "do not fit"),
        (
            {"config": {"kind": "energy", "network": DDPMPP | {"num_blocks": 1, "img_resolution": 16,
                                                               "in_channels": 3, "out_channels": 3}}},
            "do not fit the network",
        ),
        ({"kind": "flow"}, "header would be wrong"),
    ],
)  # fmt: skip
def test_wrong_configurations(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    torch.save(denoiser(DDPMPP).state_dict(), tmp_path / "net.pt")
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "net.pt", tmp_path / "net.safetensors", **options)
    assert not (tmp_path / "net.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {"a": torch.zeros(2)}, "found no SongUNet among 1 tensors such as a"),
        (lambda s: {**s, "scale": torch.ones(1)}, "tensors lie beside the network 'model.': scale"),
        (lambda s: {**s, **{"teacher." + k: v for k, v in s.items()}}, "found 2 networks"),
        (lambda s: {k: v for k, v in s.items() if "block1.conv0" not in k}, "do not fit the network"),
        (lambda s: {k: v for k, v in s.items() if "_conv." not in k}, "not those of a SongUNet of EDM"),
        (lambda s: {**s, "step": 3}, "no state dict: step"),
        (lambda s: {"ema": {}}, "no state dict: nothing"),
        (lambda s: [1, 2], "holds a list; expected a state dict"),
        (lambda s: {k: v * float("nan") for k, v in s.items()}, "is not finite"),
    ],
)
def test_wrong_state_dicts(tmp_path: Path, change: Any, message: str) -> None:
    torch.save(change(denoiser(DDPMPP).state_dict()), tmp_path / "net.pt")
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "net.pt", tmp_path / "net.safetensors", kind="energy")
    assert [path.name for path in tmp_path.iterdir()] == ["net.pt"]


def test_damaged_files(tmp_path: Path) -> None:
    edm_pickle(tmp_path / "whole.pkl", DDPMPP)
    torch.save(denoiser(DDPMPP).state_dict(), tmp_path / "whole.pt")
    for suffix in (".pkl", ".pt"):
        whole = (tmp_path / f"whole{suffix}").read_bytes()
        cut = tmp_path / f"cut{suffix}"
        for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
            cut.write_bytes(whole[:size])
            with pytest.raises(ValueError, match="cut"):
                convert_checkpoint(cut, tmp_path / "out.safetensors", kind="energy")
        cut.write_bytes(b"\x93NUMPY not a checkpoint")
        with pytest.raises(ValueError, match="cut"):
            convert_checkpoint(cut, tmp_path / "out.safetensors", kind="energy")
    with pytest.raises(ValueError, match="no checkpoint"):
        convert_checkpoint(tmp_path / "none.pkl", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


class Reduced:
    """Pickles to a call of `function`."""

    def __init__(self, function: Any, *args: Any, state: Any = None) -> None:
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> Any:
        return self.reduced


def hostile(canary: Path) -> dict[str, bytes]:
    """Pickles that would make `canary`, or change this process, if they ran."""
    shell, code = f"touch {canary}", f"open({str(canary)!r}, 'w')"
    storage = io.BytesIO()
    torch.save({"x": Reduced(os.system, shell)}, storage)
    legacy = io.BytesIO()
    torch.save([Reduced(os.system, shell)], legacy, _use_new_zipfile_serialization=False)
    load_bytes = torch.storage._load_from_bytes
    objects = {
        "os.system": Reduced(os.system, shell),
        "subprocess": Reduced(subprocess.Popen, ["touch", str(canary)]),
        "eval": Reduced(builtins.eval, code),
        "exec": Reduced(builtins.exec, code),
        "getattr": Reduced(builtins.getattr, collections.OrderedDict, "__subclasses__"),
        "import": Reduced(builtins.__import__, "os"),
        "nested": {"ema": collections.OrderedDict(a=[Reduced(os.system, shell)])},
        "argument": Reduced(collections.OrderedDict, [("a", Reduced(os.system, shell))]),
        "codecs": Reduced(codecs.encode, code, "utf-8"),
        "codecs open": Reduced(codecs.open, str(canary), "w"),
        "torch.load": Reduced(torch.load, str(canary)),
        "storage": Reduced(load_bytes, storage.getvalue()),
        "legacy storage": Reduced(load_bytes, legacy.getvalue()),
        "pickled storage": Reduced(load_bytes, pickle.dumps(Reduced(os.system, shell))),
        "numpy runstring": Reduced(np.load, str(canary)),
    }
    pickles = {name: pickle.dumps(value, protocol=2) for name, value in objects.items()}
    dotted = "torch_utils.persistence", "_reconstruct_persistent_obj.__globals__"
    persistence = b"\x80\x04\x8c\x17torch_utils.persistence\x8c\x1b_reconstruct_persistent_obj\x93"
    return pickles | {
        "posix": f"cposix\nsystem\n(S'{shell}'\ntR.".encode(),
        "nt": f"cnt\nsystem\n(S'{shell}'\ntR.".encode(),
        "inst": f"(S'{shell}'\nios\nsystem\n.".encode(),
        "obj": f"(cos\nsystem\nS'{shell}'\no.".encode(),
        "dotted name": b"\x80\x04"
        + b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in dotted) + b"\x93.",
        "dotted torch": b"\x80\x04\x8c\x0ctorch._utils\x8c\x12torch.serialization\x93.",
        "container": b"ctorch.nn.modules.container\nModuleDict.__init__.__globals__\n.",
        "extension": b"\x80\x02\x82\x01.",
        "persistent id": b"Pos.system\n.",
        "state of a function": persistence + b"}\x8c\x08__code__NsN\x86b.",
        "state of a class": b"ccollections\nOrderedDict\n}S'fromkeys'\nNsb.",
        "slots of a class": b"\x80\x02ctorch.nn.modules.container\nModuleDict\nN}U\x0c__setstate__Ns\x86b.",
        "memory": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
    }  # fmt: skip


NAMES = sorted(hostile(Path("canary")))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", NAMES)
def test_hostile_pickles_are_refused_unrun(tmp_path: Path, name: str) -> None:
    canary, path = tmp_path / "canary", tmp_path / "evil.pkl"
    path.write_bytes(hostile(canary)[name])
    with pytest.raises(ValueError, match=r"evil\.pkl"):
        convert_checkpoint(path, tmp_path / "out.safetensors", kind="energy")
    assert not canary.exists()
    assert not (tmp_path / "out.safetensors").exists()
    edm_pickle(tmp_path / "good.pkl", DDPMPP)
    convert_checkpoint(tmp_path / "good.pkl", tmp_path / "good.safetensors")


def test_the_canary_works(tmp_path: Path) -> None:
    """The payloads do run in a plain unpickler, so their refusal means something."""
    canary = tmp_path / "canary"
    for name in ("os.system", "eval", "exec", "nested", "posix", "inst"):
        pickle.loads(hostile(canary)[name])
        assert canary.exists(), name
        canary.unlink()


def test_refusal_names_the_global_and_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "evil.pkl").write_bytes(hostile(tmp_path / "canary")["posix"])
    with pytest.raises(ValueError, match=r"it names posix\.system.*refused.*state_dict\(\)"):
        read_pickle(tmp_path / "evil.pkl")


@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_torch_files_are_refused_unrun(tmp_path: Path, zipped: bool) -> None:
    canary, path = tmp_path / "canary", tmp_path / "evil.pt"
    torch.save({"model": Reduced(os.system, f"touch {canary}")}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"evil\.pt was refused, nothing of it was run"):
        convert_checkpoint(path, tmp_path / "out.safetensors", kind="energy")
    assert not canary.exists()


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (5,), (1,)),
        (3, (2,), (1,)),
        (-1, (2,), (1,)),
        (0, (2, 2), (3, 1)),
        (0, (1 << 40,), (0,)),
        (0, (2,), (-1,)),
    ],
)
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_tensors_stay_within_their_storage(tmp_path: Path, offset: int, size: Any, stride: Any) -> None:
    storage = torch.zeros(4).storage()
    tensor = Reduced(
        torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, collections.OrderedDict()
    )
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(tensor))
    with pytest.raises(ValueError, match=r"storage|natural numbers"):
        read_pickle(tmp_path / "evil.pkl")


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04}q\x00\x8c\x03emah\x00s.",  # a dictionary that holds itself
        b"\x80\x04" + b"]" * 5000 + b"a" * 4999 + b".",  # a list five thousand deep
        b"\x80\x04K\x01.",
    ],
    ids=["cycle", "depth", "number"],
)
def test_strange_pickles(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "odd.pkl").write_bytes(data)
    with pytest.raises(ValueError, match=r"odd\.pkl"):
        convert_checkpoint(tmp_path / "odd.pkl", tmp_path / "out.safetensors", kind="energy")


def test_a_module_that_holds_itself(tmp_path: Path) -> None:
    with edm_modules() as edm:
        state: dict[str, Any] = {"_modules": {}, "_parameters": {}, "_buffers": {}, "_init_kwargs": {}}
        inner = persistent(edm, "SongUNet", state)
        inner_modules: Any = nn.ModuleDict()
        inner_modules._modules["loop"] = inner_modules
        state["_modules"]["enc"] = inner_modules
        outer = persistent(edm, "EDMPrecond", {"_modules": {"model": inner}})
        (tmp_path / "loop.pkl").write_bytes(pickle.dumps({"ema": outer}))
    with pytest.raises(ValueError, match="loop"):
        convert_checkpoint(tmp_path / "loop.pkl", tmp_path / "out.safetensors")
