"""The front door: what sample and find_map accept, refuse, and record."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import alpenglow as ag
from alpenglow.priors.mixture import GaussianPrior, smooth_covariance

SHAPE = (1, 6, 6)
PRIOR = GaussianPrior(torch.zeros(SHAPE), smooth_covariance(SHAPE, std=0.3, length=1.5))
OPERATOR = ag.operators.Denoising()
Y = torch.zeros(SHAPE)


def sample(**changes: Any) -> ag.Posterior:
    arguments: dict[str, Any] = dict(prior=PRIOR, operator=OPERATOR, y=Y, noise_std=0.1, num_samples=3, nfe=6)
    arguments |= changes
    return ag.sample(arguments.pop("prior"), arguments.pop("operator"), arguments.pop("y"), **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise_std": -0.1}, "noise_std is -0.1; expected a positive finite number"),
        ({"noise_std": 0}, "noise_std is 0; expected a positive"),
        ({"noise_std": float("nan")}, "noise_std is nan"),
        ({"noise_std": "loud"}, "noise_std is 'loud'"),
        ({"num_samples": 0}, "num_samples is 0; expected a positive integer"),
        ({"num_samples": 2.5}, "num_samples is 2.5"),
        ({"seed": "x"}, "seed is 'x'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"method": "magic"}, "unknown method 'magic'; expected one of calibrated, alps"),
        ({"levels": 4}, 'method "calibrated" has no option levels; it has nfe'),
        ({"nfe": 0}, "nfe is 0"),
        ({"nfe": 2.5}, "nfe is 2.5"),
        ({"step_size": -1.0}, "step_size is -1.0"),
        ({"weigh": 1}, "weigh is 1"),
        ({"y": torch.zeros(1, 5, 6)}, "got a measurement of shape"),
        ({"y": torch.full(SHAPE, float("nan"))}, "NaN"),
        ({"y": torch.zeros(2, *SHAPE)}, "got 2 measurements; expected one"),
        ({"y": "image.png"}, "got str for the measurement"),
        ({"prior": "fashion-28"}, "str is not a prior"),
        ({"prior": GaussianPrior}, "got the class GaussianPrior"),
        ({"operator": 3}, "got 3 for the operator"),
        ({"operator": ag.operators.Denoising}, "for the operator; expected an instance"),
        ({"operator": ag.operators.Inpainting(torch.ones(5, 6))}, "got a mask of shape"),
    ],
)
def test_bad_input_is_one_clear_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="(?s)" + message.replace("(", r"\(")):
        sample(**changes)


def test_find_map_refuses_bad_input() -> None:
    for changes, message in (({"max_iterations": 0}, "max_iterations"), ({"speed": 2}, "no option speed")):
        with pytest.raises(ValueError, match=message):
            ag.find_map(PRIOR, OPERATOR, Y, noise_std=0.1, **changes)


def test_measurements_come_as_tensors_arrays_and_batches_of_one() -> None:
    expected = sample().samples
    assert torch.equal(sample(y=Y[None]).samples, expected)
    assert torch.equal(sample(y=np.zeros(SHAPE, dtype=np.float32)).samples, expected)
    assert torch.equal(sample(y=Y.double()).samples, expected)


class Halves:
    """Any object with forward and adjoint is an operator."""

    def forward(self, x: Tensor) -> Tensor:
        return x[..., :3]

    def adjoint(self, y: Tensor) -> Tensor:
        return torch.cat([y, torch.zeros_like(y)], dim=-1)


def test_any_object_with_forward_and_adjoint_is_an_operator() -> None:
    mask = (torch.arange(6) < 3).expand(6, 6)
    y = 0.2 * torch.ones(1, 6, 3)
    posterior = sample(operator=Halves(), y=y, num_samples=300, nfe=50)
    exact = PRIOR.posterior(ag.operators.Inpainting(mask), torch.cat([y, 0 * y], dim=-1), 0.1)
    error = (posterior.mean - exact.mean) / exact.std
    assert error.square().mean().sqrt() < 0.2  # 300 samples: 0.058, and the sampler's own 0.1 at most
    assert posterior.settings["operator"] == "Halves"


def test_the_result_says_how_it_was_made() -> None:
    shares: list[float] = []
    posterior = sample(progress=shares.append)
    assert posterior.settings["method"] == "calibrated"
    assert posterior.settings["options"]["nfe"] == 6
    assert posterior.settings["seed"] == 0
    assert posterior.nfe == pytest.approx(6 + 16 * 20 / 3)  # the pilot's 16 chains of 20 gradients
    assert posterior.diagnostics["modes"] == 1
    assert posterior.diagnostics["sigma_max"] == 1.0
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_complex_measurements_of_two_channel_images() -> None:
    shape = (2, 6, 6)
    prior = GaussianPrior(torch.zeros(shape), smooth_covariance(shape, std=0.3, length=1.5))
    operator = ag.operators.FourierSampling(
        torch.rand(6, 6, generator=torch.Generator().manual_seed(0)) < 0.6
    )
    truth = prior.sample(1, seed=1).float()
    y = operator.forward(truth)
    posterior = ag.sample(prior, operator, y, noise_std=0.05, num_samples=300, nfe=98)
    exact = prior.posterior(operator, y, 0.05)
    assert ((posterior.mean - exact.mean) / exact.std).square().mean().sqrt() < 0.2
    # 300 samples: 0.041 a pixel, less in the mean over correlated pixels.
    assert (posterior.std / exact.std).mean().item() == pytest.approx(1, abs=0.04)
