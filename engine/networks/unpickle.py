"""Reading pickles of EDM networks without running anything that they name.

A pickle is a program. This reader knows a short list of globals, each replaced by a stand-in that
rebuilds tensors or keeps what it is given as an inert `Record`; any other global is refused before it
is imported. The source code that EDM stores in its pickles is kept as text and dropped.
"""

import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor


class Record:
    """An object of the pickle, never constructed: its class name, arguments and state."""

    class_name = ""

    args: tuple[Any, ...]
    state: dict[str, Any]

    def __new__(cls, *args: Any) -> "Record":
        # Not in __init__, which the pickle's NEWOBJ leaves out.
        record = super().__new__(cls)
        record.args, record.state = args, {}
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = dict(state) if isinstance(state, dict) else {"state": state}


class _Mapping(dict[Any, Any]):
    """Stand-in for OrderedDict and EasyDict."""

    def __setstate__(self, state: Any) -> None:
        """Attributes of a dictionary (a state dict's _metadata) carry nothing that is needed."""


class _Call:
    """A stand-in for a function. An object, so that a pickle cannot set attributes of the function."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> NoReturn:
        raise pickle.UnpicklingError("it sets the state of a function")


def _reconstruct_persistent(meta: Any) -> Record:
    """EDM's torch_utils.persistence: {type, version, module_src, class_name, state}."""
    if not isinstance(meta, dict) or meta.get("type") != "class" or not isinstance(meta.get("state"), dict):
        raise pickle.UnpicklingError("a persistence record is not what EDM writes")
    record = Record()
    record.class_name = str(meta.get("class_name"))
    record.state = dict(meta["state"])
    return record


def _load_storage(data: Any) -> Any:
    """The bytes that a tensor's storage pickles to: a torch.save of the storage."""
    if not isinstance(data, bytes):
        raise pickle.UnpicklingError("a tensor's storage is not bytes")
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    if not isinstance(storage, torch.storage.TypedStorage):
        raise pickle.UnpicklingError(f"a tensor's storage is a {type(storage).__name__}")
    size, stride = tuple(size), tuple(stride)
    if len(size) != len(stride) or not all(type(n) is int and n >= 0 for n in (offset, *size, *stride)):
        raise pickle.UnpicklingError("a tensor's size, stride or offset is no list of natural numbers")
    untyped = storage._untyped_storage  # the public untyped() warns that typed storages will go
    available, count = untyped.nbytes() // storage.dtype.itemsize, math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    # The second test refuses a terabyte made of one number with stride 0.
    if count and (last >= available or count > available):
        raise pickle.UnpicklingError("a tensor reaches beyond its storage")
    return torch.empty(0, dtype=storage.dtype).set_(untyped, offset, size, stride)


def _rebuild_parameter(data: Any, *_: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise pickle.UnpicklingError(f"a parameter holds a {type(data).__name__}")
    return data


def _numpy_scalar(dtype: Any, data: Any = b"") -> Any:
    """A number of EDM's options, such as np.sqrt(0.5)."""
    code = dtype.args[0] if isinstance(dtype, Record) and dtype.args else None
    if code not in ("f4", "f8", "i4", "i8", "b1") or not isinstance(data, bytes):
        raise pickle.UnpicklingError(f"a numpy scalar of kind {code!r}")
    return np.frombuffer(data, np.dtype(code).newbyteorder("<"), count=1)[0].item()


def _reconstruct_object(cls: Any, _base: Any = None, state: Any = None) -> Record | _Mapping:
    """copyreg._reconstructor(cls, base, state), the way of protocols 0 and 1."""
    if not (isinstance(cls, type) and issubclass(cls, Record | _Mapping)):
        raise pickle.UnpicklingError("an object of an unknown class")
    return cls(state) if isinstance(state, dict) else cls()


def _encode(text: Any, encoding: Any = None) -> bytes:
    """How protocols 0 to 2 write bytes; no other codec, for some of them run."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError(f"it calls codecs.encode for {encoding!r}")
    return text.encode("latin1")


_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _reconstruct_persistent,
    ("torch.storage", "_load_from_bytes"): _load_storage,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("numpy.core.multiarray", "scalar"): _numpy_scalar,
    ("numpy._core.multiarray", "scalar"): _numpy_scalar,
    ("numpy.core.multiarray", "_reconstruct"): Record,
    ("numpy._core.multiarray", "_reconstruct"): Record,
    ("numpy.core.numeric", "_frombuffer"): Record,
    ("numpy._core.numeric", "_frombuffer"): Record,
    ("_codecs", "encode"): _encode,
    ("copyreg", "_reconstructor"): _reconstruct_object,
    ("copy_reg", "_reconstructor"): _reconstruct_object,
}
_MAPPINGS = {
    ("collections", "OrderedDict"), ("dnnlib.util", "EasyDict"),
    ("builtins", "dict"), ("__builtin__", "dict"),
}  # fmt: skip
_INERT = {
    ("builtins", "object"), ("__builtin__", "object"), ("builtins", "set"), ("__builtin__", "set"),
    ("numpy", "dtype"), ("numpy", "ndarray"),
    ("torch", "Size"), ("torch", "device"), ("torch", "float32"),
}  # fmt: skip
_INERT_MODULES = ("torch.nn.modules.", "training.networks", "training.loss", "training.augment")


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # A dotted name walks through attributes ("persistence.os.system"); exact names alone are known.
        if (module, name) in _FUNCTIONS:
            return _Call(_FUNCTIONS[module, name])
        if (module, name) in _MAPPINGS:
            return type(name, (_Mapping,), {})
        if (module, name) in _INERT or (module.startswith(_INERT_MODULES) and name.isidentifier()):
            return type(name, (Record,), {"class_name": name})
        raise pickle.UnpicklingError(
            f"it names {module}.{name}, which is no part of an EDM network, and was refused unrun. If you "
            "trust the file, load it in its own project and convert its state dict instead: "
            "torch.save(net.state_dict(), 'net.pt')"
        )

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError("it refers to data outside the file")


def read_pickle(path: Path) -> Any:
    """The content of a pickle, with objects as `Record` and tensors on the CPU.

    Raises ValueError, having run nothing of it, for a file that is missing, truncated, no pickle, or that
    names anything but the parts of an EDM network.
    """
    try:
        with path.open("rb") as file:
            return _Reader(file).load()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    except MemoryError:
        raise ValueError(f"{path} asks for more memory than there is; it is damaged or hostile") from None
    except Exception as error:
        # Damaged bytes reach any of the unpickler's errors: IndexError, KeyError, UnicodeDecodeError, ...
        raise ValueError(f"{path} cannot be read as the pickle of an EDM network: {error}") from error
