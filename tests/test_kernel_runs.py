"""Whole runs through the Triton kernels against whole runs through their twins: same seed, same samples.

On a machine with a GPU the kernels run there; elsewhere in the interpreter, on the CPU's tensors.
"""

from typing import Any

import pytest
import torch

import alpenglow as ag
from alpenglow.kernels import pixel_step, spectral_step, triton_support
from alpenglow.operators import FourierSampling, GaussianBlur, Inpainting
from alpenglow.samplers import calibrated

pytestmark = pytest.mark.skipif(not triton_support.AVAILABLE, reason="needs triton")

HEIGHT, WIDTH = 6, 5


def smooth_prior(channels: int) -> ag.priors.GaussianPrior:
    """Neighbouring pixels correlate: covariance 0.09 exp(-distance / 2)."""
    place = torch.cartesian_prod(
        torch.arange(channels) * 3, torch.arange(HEIGHT), torch.arange(WIDTH)
    ).float()
    covariance = 0.09 * torch.exp(-torch.cdist(place, place) / 2)
    return ag.priors.GaussianPrior(torch.zeros(channels, HEIGHT, WIDTH), covariance)


def case(name: str) -> tuple[Any, Any]:
    mask = torch.rand(HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0)) < 0.6
    operators = {
        "inpainting": (1, Inpainting(mask)),
        "blur": (2, GaussianBlur(0.8)),
        "k-space": (2, FourierSampling(mask)),
        "k-space of real images": (1, FourierSampling(mask, channels=1)),
    }
    channels, operator = operators[name]
    return smooth_prior(channels), operator


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Switches the kernels on, and moves a prior to where they run."""

    def switch_on(prior: Any) -> Any:
        if torch.cuda.is_available():
            return prior.to("cuda")
        for module in (pixel_step, spectral_step):
            monkeypatch.setattr(module, "runs_on", lambda x: True)
        return prior

    # The interpreter takes some 20 ms for what a chain does in a step.
    monkeypatch.setattr(calibrated, "PILOT_CHAINS", 2)
    monkeypatch.setattr(calibrated, "PILOT_STEPS", 5)
    return switch_on


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("calibrated", {"nfe": 10}),
        ("calibrated", {"nfe": 12, "gradient_error": 0.2}),  # by moment matching
        ("alps", {"levels": 4, "steps": 3}),
    ],
)
@pytest.mark.parametrize("name", ["inpainting", "blur", "k-space", "k-space of real images"])
def test_samples_of_a_whole_run(name: str, method: str, options: dict[str, Any], kernels: Any) -> None:
    prior, operator = case(name)
    y = operator.forward(0.3 * torch.randn(1, *prior.image_shape, generator=torch.Generator().manual_seed(1)))
    run = {"noise_std": 0.05, "num_samples": 2, "method": method, "seed": 5, **options}
    twins = ag.sample(prior, operator, y, **run)
    got = ag.sample(kernels(prior), operator, y, **run)
    assert got.samples is not None
    # float32 rounding of some 20 steps, in units where images are of size 0.3.
    torch.testing.assert_close(got.samples.cpu(), twins.samples, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["inpainting", "blur"])
def test_map_estimate(name: str, kernels: Any) -> None:
    prior, operator = case(name)
    y = operator.forward(0.3 * torch.randn(1, *prior.image_shape, generator=torch.Generator().manual_seed(1)))
    run = {"noise_std": 0.05, "levels": 5, "max_iterations": 15}
    twins = ag.find_map(prior, operator, y, **run)
    got = ag.find_map(kernels(prior), operator, y, **run)
    torch.testing.assert_close(got.image.cpu(), twins.image, rtol=1e-3, atol=1e-4)
