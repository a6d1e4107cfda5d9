"""Objects as bytes between machines: tensors as what they show, not as what they are a view of.

Pickling a slice of a tensor takes the whole tensor along: a measurement that is one slice of a volume would
travel as the volume. Buffers stay apart from the pickle, so that Ray moves them without another copy.
"""

import io
import pickle
from typing import Any, TypeAlias

import numpy as np
import torch
from ray.cloudpickle import CloudPickler
from torch import Tensor

Packed: TypeAlias = list[Any]
"""The pickle as bytes, then buffers as uint8 arrays."""


def pack(value: Any) -> Packed:
    """`value` as bytes; tensors arrive on the CPU. Raises what pickle raises for what cannot be pickled."""
    buffers: list[Any] = []
    file = io.BytesIO()
    _Pickler(file, protocol=5, buffer_callback=buffers.append).dump(value)
    return [file.getvalue(), *(np.frombuffer(buffer.raw(), np.uint8) for buffer in buffers)]


def unpack(packed: Packed) -> Any:
    """What was packed. Only for what comes from one's own cluster: a pickle may run any code."""
    return pickle.loads(packed[0], buffers=packed[1:])


def size(packed: Packed) -> int:
    """Bytes."""
    return sum(len(part) for part in packed)


class _Pickler(CloudPickler):
    def reducer_override(self, value: Any) -> Any:
        if type(value) is not Tensor or value.layout is not torch.strided:
            return super().reducer_override(value)
        shown = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
        # As bytes: numpy has no bfloat16.
        data: Any = shown.reshape(-1).view(torch.uint8).numpy()
        return _tensor, (pickle.PickleBuffer(data), value.dtype, tuple(value.shape), value.requires_grad)


def _tensor(data: Any, dtype: torch.dtype, shape: tuple[int, ...], requires_grad: bool) -> Tensor:
    # Copied: what arrives is memory that Ray shares, and must not be written.
    tensor = torch.empty(shape, dtype=dtype)
    tensor.reshape(-1).view(torch.uint8).numpy()[:] = np.frombuffer(data, np.uint8)
    return tensor.requires_grad_(requires_grad)
