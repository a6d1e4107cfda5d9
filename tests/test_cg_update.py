"""Conjugate gradients: kernels (in the interpreter) and twins against float64 and dense solves."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alpenglow.kernels import cg_update as module
from alpenglow.kernels import triton_support
from alpenglow.kernels.cg_update import (
    ACTIVE,
    ITERATIONS,
    RHO,
    SQUARED,
    cg_direction,
    cg_residual,
    cg_start,
    dot,
    launch_direction,
    launch_dot,
    launch_residual,
    twin_direction,
    twin_dot,
    twin_residual,
)
from alpenglow.operators import conjugate_gradient

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# The interpreter warns of what a tl.where does not choose.
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value):RuntimeWarning")
needs_triton = pytest.mark.skipif(not triton_support.AVAILABLE, reason="needs triton")


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def vectors(batch: int, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """x, d, r, z and q of an iteration, with <d, q> > 0 for all but a third of the images."""
    part = {name: numbers(batch, *shape, seed=seed) for seed, name in enumerate("xdrz")}
    part["q"] = 0.5 * part["d"] + 0.1 * numbers(batch, *shape, seed=7)
    part["q"][2::3] *= -1
    return part


def iteration(part: dict[str, Tensor], scalars: Tensor, preconditioned: bool) -> dict[str, Tensor]:
    """What an iteration makes of x, d, r and the scalars, image by image, from its formulas."""
    new = {name: part[name].clone() for name in "xdr"} | {"scalars": scalars.clone()}
    for i, (rho, _, limit, active, _) in enumerate(scalars.tolist()):
        x, d, r, z, q = (part[name][i] for name in "xdrzq")
        curvature = float((d * q).sum())
        if not (active and curvature > 0):
            new["scalars"][i, ACTIVE] = 0
            continue
        alpha = rho / curvature
        new["r"][i] = r - alpha * q
        z = z if preconditioned else new["r"][i]
        rho_next = float((new["r"][i] * z).sum())
        squared = float(new["r"][i].square().sum())
        new["x"][i] = x + alpha * d
        new["d"][i] = z + rho_next / rho * d
        new["scalars"][i, [RHO, SQUARED]] = torch.tensor([rho_next, squared], dtype=scalars.dtype)
        new["scalars"][i, ACTIVE] = float(squared**0.5 > limit)
        new["scalars"][i, ITERATIONS] += 1
    return new


def updated(
    part: dict[str, Tensor], scalars: Tensor, preconditioned: bool, residual: Any, direction: Any
) -> dict[str, Tensor]:
    """The same by a pair of functions."""
    new = {name: part[name].clone(memory_format=torch.contiguous_format) for name in "xdr"}
    sums = residual(new["r"], new["d"], part["q"], scalars)
    z = part["z"] if preconditioned else None
    return new | {"scalars": direction(new["x"], new["d"], new["r"], z, scalars, sums)}


def start(part: dict[str, Tensor]) -> Tensor:
    """Scalars of a solve whose image 1 is done; image 0 is far from it, the others may get there."""
    batch, size = len(part["r"]), part["r"][:1].numel()
    limit = torch.full((batch,), size**0.5, dtype=part["r"].dtype)
    limit[:1] = 0
    scalars = cg_start(part["r"], part["r"], limit)
    scalars[:, ACTIVE] = 1
    scalars[1:2, ACTIVE] = 0
    scalars[:, ITERATIONS] = 3
    return scalars


def single(tensors: dict[str, Tensor], strided: bool = False) -> dict[str, Tensor]:
    moved = {name: tensor.float().to(DEVICE) for name, tensor in tensors.items()}
    if strided:  # of what is only read
        for name in "zq":
            moved[name] = moved[name].mT.contiguous().mT
    return moved


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("batch", [0, 1, 5])
def test_twin_is_the_iteration_of_its_formulas(batch: int, preconditioned: bool) -> None:
    part = vectors(batch, (2, 5, 7))
    scalars = start(part)
    got = updated(part, scalars, preconditioned, twin_residual, twin_direction)
    torch.testing.assert_close(got, iteration(part, scalars, preconditioned), rtol=1e-12, atol=1e-12)


@needs_triton
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 4),
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    preconditioned=st.booleans(),
    strided=st.booleans(),
)
def test_kernels_against_float64(
    batch: int, height: int, width: int, preconditioned: bool, strided: bool
) -> None:
    part = vectors(batch, (2, height, width))
    scalars = start(part)
    expected = iteration(part, scalars, preconditioned)
    got = updated(
        single(part, strided), scalars.float().to(DEVICE), preconditioned, launch_residual, launch_direction
    )
    size = max(1.0, float(part["r"][0].square().sum())) if batch else 1.0
    for name, tensor in got.items():
        # A sum of products of both signs cancels: its rounding is that of its terms.
        scale = size if name == "scalars" else max(1.0, float(expected[name].abs().max()) if batch else 1.0)
        torch.testing.assert_close(tensor.cpu().double(), expected[name], rtol=1e-4, atol=3e-6 * scale)
    products = launch_dot(single(part)["x"], single(part, strided)["q"]).cpu().double()
    torch.testing.assert_close(
        products, (part["x"] * part["q"]).flatten(1).sum(1), rtol=1e-5, atol=1e-6 * size
    )


@needs_triton
@pytest.mark.parametrize("preconditioned", [False, True])
def test_kernels_give_an_image_the_same_bits_in_every_batch(preconditioned: bool) -> None:
    part = vectors(4, (2, 41, 53))
    scalars = start(part).float().to(DEVICE)
    part = single(part)
    together = updated(part, scalars, preconditioned, launch_residual, launch_direction)
    for i in range(4):
        own = {name: tensor[i : i + 1] for name, tensor in part.items()}
        alone = updated(own, scalars[i : i + 1], preconditioned, launch_residual, launch_direction)
        for name in alone:
            assert torch.equal(alone[name], together[name][i : i + 1])
        assert torch.equal(launch_dot(own["x"], own["q"]), launch_dot(part["x"], part["q"])[i : i + 1])


@pytest.mark.parametrize("launched", [False, pytest.param(True, marks=needs_triton)])
def test_frozen_images_keep_every_bit(launched: bool) -> None:
    """Images that are done, that have no positive curvature, and whose A returned NaN."""
    part = vectors(4, (2, 33, 35))
    scalars = start(part).float().to(DEVICE)
    part = single(part)
    part["q"][3] = torch.nan
    part["q"][1, 0, 0, 0] = torch.inf
    functions = (launch_residual, launch_direction) if launched else (twin_residual, twin_direction)
    for preconditioned in (False, True):
        new = updated(part, scalars, preconditioned, *functions)
        for name in "xdr":
            assert torch.equal(new[name][1:], part[name][1:])
            assert not torch.equal(new[name][0], part[name][0])
        assert new["scalars"][:, ACTIVE].tolist() == [1, 0, 0, 0]
        assert new["scalars"][:, ITERATIONS].tolist() == [4, 3, 3, 3]
        assert torch.equal(new["scalars"][1:, :ACTIVE], scalars[1:, :ACTIVE])


def systems(batch: int, size: int) -> tuple[Tensor, Tensor]:
    """(A [B, n, n], b [B, n]), of conditions 1, 4, 16: images take different numbers of steps."""
    bases = torch.linalg.qr(numbers(batch, size, size)).Q
    eigenvalues = torch.stack([torch.logspace(0, 0.6 * i, size) for i in range(batch)]).double()
    return (bases * eigenvalues[:, None]) @ bases.mT, numbers(batch, size, seed=1)


@pytest.mark.parametrize("jacobi", [False, True])
@pytest.mark.parametrize("launched", [False, pytest.param(True, marks=needs_triton)])
def test_solve_against_dense(launched: bool, jacobi: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    matrices, b = systems(3, 8)
    b[1] = 0
    device = DEVICE if launched else "cpu"
    if launched:
        monkeypatch.setattr(module, "runs_on", lambda x: True)
    dtype = torch.float32 if launched else torch.float64
    A, right = matrices.to(device, dtype), b.to(device, dtype)
    diagonal = A.diagonal(dim1=1, dim2=2)

    def apply(v: Tensor) -> Tensor:
        return (A * v[:, None]).sum(-1)

    x, info = conjugate_gradient(
        apply,
        right,
        precondition=(lambda r: r / diagonal) if jacobi else None,
        tolerance=1e-6 if launched else 1e-12,
        max_iterations=60,
    )
    assert info.converged.all()
    assert info.iterations[1] == 0
    assert 1 == info.iterations[0] < info.iterations[2]
    tolerance = 1e-4 if launched else 1e-9
    torch.testing.assert_close(
        x.cpu().double(), torch.linalg.solve(matrices, b), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("launched", [False, pytest.param(True, marks=needs_triton)])
def test_a_solve_is_bitwise_the_same_in_every_batch(launched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    device = DEVICE if launched else "cpu"
    if launched:
        monkeypatch.setattr(module, "runs_on", lambda x: True)
    weights = torch.logspace(0, 1.5, 3)[:, None].expand(1, 3, 4).to(device)  # done in 3 steps
    b, guess = (numbers(2, 1, 3, 4, seed=s).float().to(device) for s in (0, 1))
    b[1] *= 1e3

    def run(*index: int) -> tuple[Tensor, Any]:
        return conjugate_gradient(
            lambda v: weights * v, b[list(index)], guess=guess[list(index)], tolerance=1e-5
        )

    x, info = run(0, 1)
    for i in range(2):
        alone, own = run(i)
        assert torch.equal(alone[0], x[i])
        assert own.iterations[0] == info.iterations[i]
        assert torch.equal(own.residual[0], info.residual[i])


def test_a_solve_leaves_its_arguments_alone() -> None:
    b, guess = numbers(2, 5), numbers(2, 5, seed=1)
    copies = b.clone(), guess.clone()
    for start_at in (None, guess):
        x, _ = conjugate_gradient(lambda v: v, b, guess=start_at)
        torch.testing.assert_close(x, b)
        x.zero_()
    assert torch.equal(b, copies[0])
    assert torch.equal(guess, copies[1])
    x, info = conjugate_gradient(lambda v: v, b[:0])
    assert x.shape == (0, 5)
    assert info.converged.shape == (0,)


def test_dot_in_chunks() -> None:
    a, b = numbers(7, 300), numbers(7, 300, seed=1)
    expected = twin_dot(a, b)
    torch.testing.assert_close(expected, (a * b).sum(1))
    for i in range(7):
        assert torch.equal(dot(a[i : i + 1], b[i : i + 1]), expected[i : i + 1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", 700)
        assert torch.equal(twin_dot(a, b), expected)
    assert torch.equal(twin_dot(a[:, :0], b[:, :0]), torch.zeros(7, dtype=torch.float64))


def test_operators() -> None:
    part = vectors(3, (2, 3, 4))
    scalars = start(part)
    torch.library.opcheck(module._dot, (part["x"], part["q"]))
    torch.library.opcheck(module._residual, (part["r"].clone(), part["d"], part["q"], scalars))
    sums = twin_residual(part["r"].clone(), part["d"], part["q"], scalars)
    for z in (None, part["z"]):
        torch.library.opcheck(
            module._direction, (part["x"].clone(), part["d"].clone(), part["r"], z, scalars, sums)
        )


def test_what_does_not_fit() -> None:
    part = vectors(2, (2, 3, 4))
    scalars = start(part)
    with pytest.raises(ValueError, match="keep shape and dtype"):
        cg_residual(part["r"], part["d"], part["q"].float(), scalars)
    with pytest.raises(ValueError, match="keep shape and dtype"):
        cg_residual(part["r"], part["d"], part["q"][:1], scalars)
    sums = cg_residual(part["r"], part["d"], part["q"], scalars)
    with pytest.raises(ValueError, match="contiguous"):
        cg_direction(part["x"].mT.contiguous().mT, part["d"], part["r"], part["r"], scalars, sums)
