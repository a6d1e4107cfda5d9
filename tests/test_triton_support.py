"""The package works where triton is not installed: twins run, and nothing asks for it at import."""

import subprocess
import sys

import pytest
import torch

from alpenglow.kernels.triton_support import Variant, batch_stride, next_power_of_2, runs_on

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
import alpenglow as ag
from alpenglow.kernels import triton_support
assert not triton_support.AVAILABLE
prior = ag.priors.GaussianPrior(torch.zeros(1, 4, 4), 0.1 * torch.eye(16))
operator = ag.operators.Inpainting(torch.eye(4))
posterior = ag.sample(prior, operator, torch.zeros(1, 4, 4), noise_std=0.1, num_samples=2, nfe=5)
print(tuple(posterior.samples.shape))
"""


def test_without_triton() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(2, 1, 4, 4)"


def test_tensors_of_a_cpu_run_on_twins() -> None:
    assert not runs_on(torch.zeros(1))


@pytest.mark.parametrize(("n", "expected"), [(0, 1), (1, 1), (2, 2), (3, 4), (1024, 1024), (1025, 2048)])
def test_next_power_of_2(n: int, expected: int) -> None:
    assert next_power_of_2(n) == expected


def test_batch_stride() -> None:
    assert batch_stride(torch.zeros(1, 3, 4), 5) == 0
    assert batch_stride(torch.zeros(5, 3, 4), 5) == 12
    assert batch_stride(torch.zeros(0, 3, 4), 0) == 12
    with pytest.raises(ValueError, match="got 2 images"):
        batch_stride(torch.zeros(2, 3), 5)


def test_types_of_arguments() -> None:
    variant = Variant("k", "l", None, {"BLOCK": 4}, 4, 1.0, types={"seed_ptr": "*i64"})
    types = [variant.type_of(name) for name in ("BLOCK", "seed_ptr", "x_ptr", "size")]
    assert types == ["constexpr", "*i64", "*fp32", "i32"]
