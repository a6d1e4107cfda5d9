"""The pixel step: kernel (in the interpreter) and twin against formulas in float64."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from alpenglow.kernels import pixel_step as module
from alpenglow.kernels import triton_support
from alpenglow.kernels.philox import chain_counters, chain_normals
from alpenglow.kernels.pixel_step import Inputs, launch, pixel_step, twin
from alpenglow.kernels.step_weights import StepWeights, coefficients

WEIGHTS = StepWeights(0.9, 0.2, 0.3, 0.4, 0.5, 0.6)
NOISE_STD = 0.05
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytestmark = pytest.mark.skipif(not triton_support.AVAILABLE, reason="needs triton")


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def problem(batch: int, shape: tuple[int, ...], mask: Tensor | None = None) -> dict[str, Any]:
    """Everything a step needs, chains at levels from 0.02 to 5."""
    if mask is None:
        mask = numbers(*shape[1:], seed=9) > 0
    levels = torch.logspace(math.log10(0.02), math.log10(5), max(1, batch))[:batch]
    return {
        "x": numbers(batch, *shape),
        "u": numbers(batch, *shape, seed=1),
        "grad": numbers(batch, *shape, seed=2),
        "data": numbers(1, *shape, seed=3) * mask,
        "diagonal": mask,
        "table": coefficients(levels, NOISE_STD, WEIGHTS),
        "limit": torch.full((batch,), 1e6),
        "counters": chain_counters(2**40 + 7, torch.arange(batch) + 5, iteration=3, stream=16),
    }


def inputs(case: dict[str, Any], **more: Any) -> Inputs:
    fields = dict.fromkeys(Inputs._fields) | {"network_dtype": torch.float32, "statistics": True}
    return Inputs(**(fields | case | more))


def in_float64(given_inputs: Inputs) -> Inputs:
    wide = [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in given_inputs]
    return Inputs(*wide)


def copied(given_inputs: Inputs) -> Inputs:
    return Inputs(*(v.clone().to(DEVICE) if isinstance(v, Tensor) else v for v in given_inputs))


def by_dense_matrices(case: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The step from its definition: P as a matrix, pull = P grad log p(x | y), w = P^(1/2) n."""
    size = case["x"][0].numel()
    m = case["diagonal"].expand(case["x"].shape[1:]).reshape(-1).double()
    new, momentum = [], []
    normals = chain_normals(case["counters"], tuple(case["x"].shape[1:])).double()
    for i in range(len(case["x"])):
        sigma2, eta2 = case["table"][i, :2].double()
        x, u, g, n = (part[i].double().reshape(-1) for part in (case["x"], case["u"], case["grad"], normals))
        P = torch.linalg.inv(torch.diag(m) / eta2 + torch.eye(size, dtype=torch.float64) / sigma2)
        pull = P @ ((case["data"].double().reshape(-1) - m * x) / eta2 - g / sigma2)
        w = torch.linalg.cholesky(P) @ n
        a = WEIGHTS
        new.append(x + a.z_pull * pull + a.z_u * u + a.z_w * w)
        momentum.append(a.u_pull * pull + a.u_u * u + a.u_w * w)
    shape = case["x"].shape
    return torch.stack(new).view(shape), torch.stack(momentum).view(shape)


def test_twin_is_the_step_of_its_definition() -> None:
    case = problem(3, (2, 4, 5))
    expected = by_dense_matrices(case)
    got = twin(in_float64(inputs(case)))
    # x was drawn in float32, the normals are float32: all else is float64.
    torch.testing.assert_close(got[0], expected[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-6, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(0, 3),
    channels=st.integers(1, 3),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    mask=st.sampled_from(["plane", "image", "chains", "one", "row"]),
    noise=st.booleans(),
    momentum=st.booleans(),
)
def test_kernel_against_float64(
    batch: int, channels: int, height: int, width: int, mask: str, noise: bool, momentum: bool
) -> None:
    shape = (channels, height, width)
    masks = {
        "plane": numbers(height, width) > 0,
        "image": (numbers(*shape) > 0).float(),
        "chains": torch.rand(batch, *shape),
        "one": torch.ones(()),
        "row": torch.rand(1, 1, width),
    }
    case = problem(batch, shape, masks[mask])
    if mask == "chains":
        case["data"] = numbers(batch, *shape, seed=3) * masks[mask]
    more = {} if noise else {"counters": None}
    more |= {} if momentum else {"u": None}
    given_inputs = inputs(case, **more)
    expected = twin(in_float64(given_inputs))
    got = launch(copied(given_inputs))
    for name, a, b in zip(("x", "u", "statistics"), got, expected, strict=False):
        # float32 rounding of a sum of five terms, the largest of which is of the size of the result.
        torch.testing.assert_close(
            a.cpu().double(), b, rtol=2e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_arguments_that_are_not_contiguous() -> None:
    case = problem(2, (2, 6, 10))
    apart = {k: case[k].mT.contiguous().mT for k in ("x", "u", "grad", "data")}
    for a, b in zip(launch(inputs(case)), launch(inputs(case | apart)), strict=True):
        assert torch.equal(a, b)


def options(case: dict[str, Any]) -> dict[str, dict[str, Any]]:
    shape = tuple(case["x"].shape)
    return {
        "eps": {
            "pulled": numbers(*shape, seed=4), "grad_weights": torch.tensor([[0.3, 0.7], [1, 1], [0.5, 0.1]]),
        },
        "metropolis": {
            "accept": torch.tensor([True, False, True]),
            "x_before": numbers(*shape, seed=5),
            "grad_before": numbers(*shape, seed=6),
            "u_before": numbers(*shape, seed=7),
        },
        "moments": {
            "mean": numbers(*shape, seed=5), "m2": numbers(*shape, seed=6).square(),
            "visits": torch.tensor([5.0, 2.0, 9.0]),
        },
        "network": {"network_scale": torch.tensor([0.5, 2.0, 1.0]), "network_dtype": torch.float16},
        "network bf16": {"network_scale": torch.tensor([0.5]), "network_dtype": torch.bfloat16},
    }  # fmt: skip


@pytest.mark.parametrize("option", ["eps", "metropolis", "moments", "network", "network bf16"])
def test_kernel_and_twin_agree_with_every_option(option: str) -> None:
    case = problem(3, (3, 7, 5))
    chosen = inputs(case, **options(case)[option])
    a, b = copied(chosen), copied(chosen)
    for got, expected in zip(launch(a), twin(b), strict=True):
        assert got.dtype == expected.dtype
        loose = got.dtype in (torch.float16, torch.bfloat16)
        eps = torch.finfo(got.dtype).eps if loose else 1e-5
        torch.testing.assert_close(got, expected, rtol=eps, atol=eps)
    for name in ("x_before", "grad_before", "u_before", "mean", "m2"):
        if getattr(a, name) is not None:
            torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-5, atol=1e-5)
            assert not torch.equal(getattr(a, name), getattr(chosen, name).to(DEVICE))


def test_gradient_from_its_two_parts_and_its_statistics() -> None:
    case = problem(3, (1, 4, 4))
    parts = options(case)["eps"]
    weights = parts["grad_weights"][:, :, None, None, None]
    grad = weights[:, 0] * case["grad"] - weights[:, 1] * parts["pulled"]
    whole = pixel_step(**case | {"grad": grad})
    got = pixel_step(**case, **parts, statistics=True)
    torch.testing.assert_close(got.z, whole.z)
    assert got.energy is not None
    assert got.grad_square is not None
    torch.testing.assert_close(got.energy, 0.5 * case["grad"].square().flatten(1).sum(1))
    torch.testing.assert_close(got.grad_square, grad.square().flatten(1).sum(1))


def test_metropolis_goes_on_from_the_accepted_state() -> None:
    case = problem(3, (1, 4, 4))
    shape = case["x"].shape
    accept = torch.tensor([True, False, True])
    before = tuple(numbers(*shape, seed=seed) for seed in (5, 6, 7))
    kept = tuple(part.clone() for part in before)
    chosen = accept[:, None, None, None]
    x, grad = (torch.where(chosen, case[k], old) for k, old in zip(("x", "grad"), kept[:2], strict=True))
    u = torch.where(chosen, case["u"], -kept[2])
    expected = pixel_step(**case | {"x": x, "grad": grad, "u": u})
    got = pixel_step(**case, accept=accept, previous=before)
    assert torch.equal(got.z, expected.z)
    for old, current in zip(before, (x, grad, u), strict=True):
        assert torch.equal(old, current)


def test_running_moments_are_those_of_the_chain() -> None:
    case = problem(2, (1, 3, 5))
    mean, m2 = torch.zeros(2, 1, 3, 5), torch.zeros(2, 1, 3, 5)
    visited, x = [], case["x"]
    for iteration in range(6):
        counters = chain_counters(1, torch.arange(2), iteration=iteration)
        count = torch.tensor([iteration + 1.0])
        x = pixel_step(**case | {"x": x, "counters": counters}, moments=(mean, m2, count)).z
        visited.append(x)
    chain = torch.stack(visited)
    torch.testing.assert_close(mean, chain.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(m2, chain.var(0) * 5, rtol=1e-4, atol=1e-4)


def test_network_input_is_channels_last() -> None:
    case = problem(2, (3, 6, 4))
    got = pixel_step(**case, network_scale=torch.tensor([0.5]), network_dtype=torch.float16)
    assert got.network_input is not None
    assert got.network_input.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(got.network_input, (0.5 * got.z).half())


@pytest.mark.parametrize("step", [launch, twin], ids=["kernel", "twin"])
def test_what_leaves_the_range_is_held(step: Any) -> None:
    """NaN and infinity never reach the state, other chains go on, and the chain can tell."""
    case = problem(3, (1, 4, 4))
    case["grad"][0, 0, 1, 2] = math.nan
    case["grad"][2, 0, 3, 3] = math.inf
    got = step(copied(inputs(case)))
    free = step(copied(inputs(problem(3, (1, 4, 4)))))
    assert got[0].isfinite().all()
    assert got[0][0, 0, 1, 2] == case["x"][0, 0, 1, 2]
    assert got[1][0, 0, 1, 2] == 0
    assert torch.equal(got[0][1], free[0][1])
    assert got[2][:, 0].isinf().tolist() == [True, False, True]
    held = step(copied(inputs(case, limit=torch.tensor([-1.0]))))
    assert torch.equal(held[0].cpu(), case["x"])


@pytest.mark.parametrize("step", [launch, twin], ids=["kernel", "twin"])
def test_a_chain_does_not_depend_on_its_batch(step: Any) -> None:
    case = problem(5, (2, 5, 7))
    whole = step(copied(inputs(case)))[0]
    for i in (0, 3):
        alone = {k: v[i : i + 1] for k, v in case.items() if k not in ("data", "diagonal")}
        assert torch.equal(step(copied(inputs(case | alone)))[0][0], whole[i])


@pytest.mark.parametrize("option", [None, "eps", "metropolis", "moments", "network"])
def test_opcheck(option: str | None) -> None:
    case = problem(3, (1, 4, 4))
    torch.library.opcheck(
        module._operator, tuple(inputs(case, **(options(case)[option] if option else {}))),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )  # fmt: skip


def test_under_torch_compile() -> None:
    case = problem(2, (1, 4, 4))
    step = torch.compile(lambda x: pixel_step(**case | {"x": 2 * x}).z, backend="aot_eager", fullgraph=True)
    assert torch.equal(step(case["x"]), pixel_step(**case | {"x": 2 * case["x"]}).z)


def test_bad_input() -> None:
    case = problem(2, (1, 4, 4))
    with pytest.raises(ValueError, match=r"got grad \(2, 1, 4, 3\)"):
        pixel_step(**case | {"grad": torch.zeros(2, 1, 4, 3)})
    with pytest.raises(ValueError, match=r"got data \(1, 1, 4, 1\)"):
        pixel_step(**case | {"data": torch.zeros(1, 1, 4, 1)})
    with pytest.raises(ValueError, match="state is float32"):
        launch(inputs(case | {"x": case["x"].double()}))
    with pytest.raises(ValueError, match=r"got 3 images in .*expected 1 or 2"):
        launch(inputs(case | {"data": case["data"].expand(3, 1, 4, 4)}))
    gaps = torch.zeros(2, 1, 4, 8)[..., ::2]
    with pytest.raises(ValueError, match="contiguous"):
        pixel_step(**case, moments=(gaps, torch.zeros(2, 1, 4, 4), torch.ones(1)))


def test_tracing_sees_the_operator_and_nothing_else() -> None:
    case = problem(2, (1, 4, 4))
    step = make_fx(lambda x: pixel_step(**case | {"x": x}).z)(case["x"])
    called = [str(node.target) for node in step.graph.nodes if node.op == "call_function"]
    assert "alpenglow.pixel_step.default" in called
    assert not any("mul" in name for name in called)
    assert torch.equal(step(2 * case["x"]), pixel_step(**case | {"x": 2 * case["x"]}).z)
