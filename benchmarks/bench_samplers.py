"""Whole samplers: the default method beside the published loop on the same network, N samples of a posterior.

Each does all of its work: `calibrated` with its pilot, the published loop with its 250 gradients a sample.
extra_info holds the samples a second of both.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

import alpenglow as ag
from alpenglow.demo import held_out_images
from alpenglow.priors.network import NetworkPrior
from alpenglow.priors.protocol import Prior
from benchmarks.pairs import PUBLISHED, time_pair
from benchmarks.published import PixelMask, alps, energy_gradient

NOISE_STD, SHARE_SEEN = 0.1, 0.2
COUNTS = (1, 16)


@pytest.mark.parametrize("count", COUNTS)
def test_weights(benchmark: Any, prior: NetworkPrior, count: int) -> None:
    _time(benchmark, prior, prior, count)


@pytest.mark.parametrize("count", COUNTS)
def test_bundle(benchmark: Any, prior: NetworkPrior, bundle: Path, count: int) -> None:
    _time(benchmark, prior, ag.load_prior(bundle), count)


def _time(benchmark: Any, prior: NetworkPrior, ours: Prior, count: int) -> None:
    """Random inpainting of a held-out image."""
    generator = torch.Generator().manual_seed(0)
    shape = prior.image_shape
    mask = torch.rand(shape[1:], generator=generator) < SHARE_SEEN
    y = mask * (held_out_images()[0] + NOISE_STD * torch.randn(shape, generator=generator))
    operator, evaluate = ag.operators.Inpainting(mask), energy_gradient(prior)
    published = PixelMask(mask[None, None].float(), NOISE_STD)
    benchmark.group = f"samplers, {count} samples"
    time_pair(
        benchmark,
        lambda: ag.sample(ours, operator, y, noise_std=NOISE_STD, num_samples=count),
        lambda: alps(published, evaluate, y[None], shape, count),
        seconds=0,
        least=3,
    )
    if benchmark.disabled:
        return
    benchmark.extra_info |= {
        "samples_per_second": count / benchmark.stats.stats.median,
        "published_samples_per_second": count / benchmark.extra_info[PUBLISHED],
    }
