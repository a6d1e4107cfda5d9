"""Cartesian masks: acceleration, calibration, density, distances, errors."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alpenglow.operators.kspace_masks import equispaced_1d, poisson_disc, random_1d, random_2d

LINES = [random_1d, equispaced_1d]
POINTS = [random_2d, poisson_disc]
Mask = Callable[..., Tensor]


def centre(n: int, share: float) -> slice:
    width = round(share * n)
    return slice(n // 2 - width // 2, n // 2 - width // 2 + width)


@pytest.mark.parametrize("build", LINES + POINTS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    acceleration=st.floats(1, 12),
    calibration=st.floats(0, 0.3),
)
def test_acceleration_and_calibration(
    build: Mask, height: int, width: int, acceleration: float, calibration: float
) -> None:
    lines = build in LINES
    number = width if lines else height * width
    fixed = round(calibration * width) * (1 if lines else round(calibration * height))
    expected = round(number / acceleration)
    if fixed > expected or expected == 0:
        with pytest.raises(ValueError, match="smaller acceleration or calibration"):
            build((height, width), acceleration, calibration=calibration)
        return
    mask = build((height, width), acceleration, calibration=calibration)
    assert mask.shape == (height, width)
    assert mask.dtype == torch.bool
    samples = mask[0] if lines else mask
    assert int(samples.sum()) == expected  # half a sample (a column) from number / acceleration
    assert not lines or torch.equal(mask, mask[:1].expand(height, width))
    assert mask[slice(None) if lines else centre(height, calibration), centre(width, calibration)].all()


@pytest.mark.parametrize("build", [random_1d, random_2d, poisson_disc])
def test_a_seed_is_a_mask(build: Mask) -> None:
    one, same, other = (build((32, 48), 4, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("build", [random_1d, random_2d, poisson_disc])
def test_the_density_is_uniform_outside_the_centre(build: Mask) -> None:
    count = 200
    share = torch.stack([build((16, 32), 4, calibration=0.1, seed=seed) for seed in range(count)]).double()
    outside = share.mean(0)
    outside[centre(16, 0.1) if build is not random_1d else slice(None), centre(32, 0.1)] = torch.nan
    measured = outside[:, ~outside.isnan().all(0)].nanmean()
    left, right = outside[:, :16].nanmean(), outside[:, 16:].nanmean()
    # Of masks drawn without replacement, a half holds less variation than independent columns would give.
    bound = 5 * math.sqrt(0.25 * 0.75 / (16 * count))
    assert abs(left - right) < 2 * bound
    assert abs(left - measured) < bound


def test_equispaced_columns() -> None:
    line = equispaced_1d((4, 64), 4, calibration=0)[0]
    assert line.nonzero()[:, 0].tolist() == list(range(0, 64, 4))
    shifted = equispaced_1d((4, 64), 4, calibration=0, offset=3)[0]
    assert shifted.nonzero()[:, 0].tolist() == list(range(3, 64, 4))
    outside = equispaced_1d((4, 100), 5, calibration=0.08)[0]
    outside = torch.cat([outside[:46], outside[54:]]).nonzero()[:, 0]
    gaps = outside.diff()
    assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("acceleration", [3.0, 6.0, 10.0])
def test_poisson_disc_keeps_a_distance(acceleration: float) -> None:
    """Denser packing than chance: at 6x, uniform points have neighbours side by side."""
    shape, share = (48, 40), 0.1
    points = poisson_disc(shape, acceleration, calibration=share)
    points[centre(48, share), centre(40, share)] = False
    at = points.nonzero().double()
    distance = torch.cdist(at, at) + 1e9 * torch.eye(len(at))
    # Jammed random discs of diameter r cover 0.547 of the plane: r^2 = 0.70 R, on a grid somewhat more.
    assert distance.min().square() >= 0.6 * acceleration
    random = random_2d(shape, acceleration, calibration=share)
    random[centre(48, share), centre(40, share)] = False
    at = random.nonzero().double()
    assert (torch.cdist(at, at) + 1e9 * torch.eye(len(at))).min() == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: random_1d((8, 8), 0.5), "at least 1"),
        (lambda: random_1d((8, 8), math.nan), "acceleration"),
        (lambda: random_2d((8, 8), 4, calibration=1.5), "share"),
        (lambda: random_2d((8,), 4), r"\(H, W\)"),  # type: ignore[arg-type]
        (lambda: poisson_disc((0, 8), 4), "H"),
        (lambda: poisson_disc((8, 8), 4, seed=1.5), "seed"),  # type: ignore[arg-type]
        (lambda: equispaced_1d((8, 8), 4, offset=math.inf), "offset"),  # type: ignore[arg-type]
        (lambda: random_1d((8, 8), 8, calibration=0.5), "smaller acceleration or calibration"),
        (lambda: random_1d((8, 8), 100, calibration=0), "leaves 0"),
    ],
)
def test_refuses(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
