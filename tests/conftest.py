"""Without a GPU the Triton kernels run in the interpreter, chosen before they are imported."""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Of the pytests that tests start: they are no workers of this one.
os.environ.pop("PYTEST_XDIST_WORKER", None)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For runs that are compared bit by bit, in this process and in others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
