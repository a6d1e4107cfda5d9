"""What is measured of a prior: against closed forms, and on paper (the model card)."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from torch import Tensor

from alpenglow.distillation.card import write_card
from alpenglow.distillation.config import Recipe
from alpenglow.distillation.energy_checks import energy_consistency, rank_energies
from alpenglow.distillation.evaluation import (
    AVERAGED,
    DEFAULT_SIGMAS,
    LARGEST_ERROR,
    PriorReport,
    _log_mean,
    evaluate_coverage,
    evaluate_prior,
    trusted_levels,
)
from alpenglow.distillation.generation import draw_unconditional
from alpenglow.distillation.losses import Denoiser
from alpenglow.distillation.non_local_means import tune_non_local_means
from alpenglow.networks.denoiser import EDMDenoiser
from alpenglow.priors import GaussianPrior, smooth_covariance
from tests.tiny import random_denoiser


def analytic(std: float, batch_size: int) -> tuple[Any, Denoiser]:
    """A white Gaussian prior in the clothes of a NetworkPrior, and its exact denoiser."""
    prior = GaussianPrior(torch.zeros(1, 4, 4), std**2 * torch.eye(16))
    clothes = SimpleNamespace(
        image_shape=prior.image_shape,
        energy_and_grad=prior.energy_and_grad,
        device=torch.device("cpu"),
        batch_size=batch_size,
        name="white",
        one_hot=lambda count: None,
    )
    return clothes, lambda x, sigma, classes=None: x - prior.energy_and_grad(x, sigma)[1]


@pytest.mark.parametrize("batch_size", [7, 16])
def test_evaluation_of_gaussians(batch_size: int) -> None:
    """White Gaussians have G = a x with a = sigma^2 / (sigma^2 + s^2): every figure is known.

    The error of a denoiser (1 - a) x is s^2 a^2 + (1 - a)^2 sigma^2 on average, and its mean over N pixels
    has a relative standard error of sqrt(2 / N), which is 4.3 sqrt(2 / N) in dB.
    """
    std, count = 0.5, 500
    prior, _ = analytic(0.3, batch_size)
    _, teacher = analytic(std, batch_size)
    images = std * torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    sigmas = [0.01, 0.3, 1.0, 10.0]
    rows = evaluate_prior(prior, teacher, images, sigmas)  # type: ignore[arg-type]
    assert [row["sigma"] for row in rows] == sigmas
    for row, sigma in zip(rows, sigmas, strict=True):
        ours, theirs = (sigma**2 / (sigma**2 + s**2) for s in (0.3, std))
        assert row["gradient_error"] == pytest.approx(abs(ours - theirs) / theirs, rel=1e-4)
        for key, a in (("psnr", ours), ("teacher_psnr", theirs)):
            expected = 10 * math.log10(4 / (std**2 * a**2 + (1 - a) ** 2 * sigma**2))
            assert abs(row[key] - expected) < 4 * 4.35 * math.sqrt(2 / (16 * count))


def test_evaluation_follows_the_seed() -> None:
    prior, teacher = analytic(0.5, 4)
    images = torch.zeros(3, 1, 4, 4)
    rows = [evaluate_prior(prior, teacher, images, [0.5], seed=seed) for seed in (0, 0, 1)]  # type: ignore[arg-type]
    assert rows[0] == rows[1]
    assert rows[0] != rows[2]
    assert rows[0][0]["gradient_error"] < 1e-6


def test_evaluation_refuses() -> None:
    prior, teacher = analytic(0.5, 4)
    for shape in ((3, 1, 4, 5), (1, 4, 4), (0, 1, 4, 4)):
        with pytest.raises(ValueError, match=r"white expects \[N, 1, 4, 4\], N > 0"):
            evaluate_prior(prior, teacher, torch.zeros(shape))  # type: ignore[arg-type]
    for sigmas in ([], [0.1, 0.0], [math.nan], [math.inf]):
        with pytest.raises(ValueError, match="expected positive finite noise levels"):
            evaluate_prior(prior, teacher, torch.zeros(1, 1, 4, 4), sigmas)  # type: ignore[arg-type]
    assert DEFAULT_SIGMAS[0] == 0.01
    assert DEFAULT_SIGMAS[-1] == 10.0


def test_coverage_of_an_exact_prior_is_nominal() -> None:
    """Images drawn from the prior itself: a right sampler covers 90 %; too narrow a prior does not."""
    shape, count = (1, 8, 8), 8
    rows = {}
    for claimed in (0.4, 0.15):
        prior = GaussianPrior(torch.zeros(shape), smooth_covariance(shape, std=claimed, length=2.0))
        truth = GaussianPrior(torch.zeros(shape), smooth_covariance(shape, std=0.4, length=2.0))
        images = truth.sample(count, seed=4)
        rows[claimed] = evaluate_coverage(prior, images, num_samples=24, noise_std=0.05)  # type: ignore[arg-type]
    shares = torch.tensor([row["coverage"] for row in rows[0.4]])
    assert abs(shares.mean() - 0.9) < 4 * shares.std() / math.sqrt(count)
    narrow = torch.tensor([row["coverage"] for row in rows[0.15]])
    assert narrow.mean() < 0.8
    assert all(row["coverage"] == row["coverage_clean"] for row in rows[0.4])


@pytest.mark.parametrize(
    ("errors", "low", "largest"),
    [
        ((0.19, 0.1, 0.02), 0.01, 0.19),  # all are good
        ((0.9, 0.3, 0.1), 10**-0.5, LARGEST_ERROR),  # half way, in log sigma, between 0.1 and 1
        ((0.3, 0.1, 0.02), 10**-1.5, LARGEST_ERROR),
        ((0.1, 0.3, 0.1), 10**-0.5, LARGEST_ERROR),  # nothing below a level that is not good
        ((0.1, 0.5, 0.9), 0.01, 0.9),  # nothing is
        ((), 0.01, 0.0),
    ],
)
def test_a_prior_is_trusted_above_the_level_where_its_error_grows_too_large(
    errors: tuple[float, ...], low: float, largest: float
) -> None:
    rows = [{"sigma": s, "gradient_error": e} for s, e in zip((0.01, 0.1, 1.0), errors, strict=False)]
    trusted, error = trusted_levels(rows, (0.01, 40.0))
    assert trusted == pytest.approx((low, 40.0))
    assert error == largest


def test_the_mean_gradient_error_is_even_in_log_sigma() -> None:
    """A line in log sigma has the mean of its ends, however the levels lie; others do not count."""
    inside = [(s, 0.1 + 0.05 * math.log(s)) for s in (0.02, 0.021, 0.5, 9.0, 10.0)]
    ends = (inside[0][1] + inside[-1][1]) / 2
    assert _log_mean([(0.01, 7.0), *inside, (20.0, 7.0)]) == pytest.approx(ends)
    assert AVERAGED == (0.02, 10.0)
    assert math.isnan(_log_mean([(0.5, 1.0)]))


# As an energy


def test_the_gradient_is_that_of_the_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 - 1
    denoiser = random_denoiser().requires_grad_(False).eval()
    assert energy_consistency(denoiser, images) < 1e-6
    # Were it x - psi, as of a plain denoiser, it would show.
    from alpenglow.distillation import energy_checks

    def plain(model: EDMDenoiser, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        residual = x - model(x, sigma)
        return 0.5 * residual.square().flatten(1).sum(1), residual

    monkeypatch.setattr(energy_checks, "energy_and_grad", plain)
    assert energy_consistency(denoiser, images) > 0.05


def test_an_exact_energy_ranks_its_own_images_first() -> None:
    """Smooth Gaussian images of a stated std: noise raises the energy, blurring lowers it."""
    shape = (1, 16, 16)
    prior = GaussianPrior(torch.zeros(shape), smooth_covariance(shape, std=0.4, length=2.0))
    images = prior.sample(64, seed=3)
    clothes: Any = SimpleNamespace(device=torch.device("cpu"), energy_and_grad=prior.energy_and_grad)
    (row,) = rank_energies(clothes, images, [0.1])
    assert row["sigma"] == 0.1
    assert row["noisy"] > 0.9
    # A blurred Gaussian image is likelier than a sharp one: the density is that of the smooth.
    assert row["blurred"] < 0.05
    # A Gaussian is told by second moments alone, and these are the image's own, but for periodic edges.
    assert 0.3 < row["scrambled"] <= 1


def test_ranks_of_a_flat_energy_are_chance() -> None:
    flat: Any = SimpleNamespace(
        device=torch.device("cpu"), energy_and_grad=lambda x, sigma: (torch.ones(len(x)), torch.zeros_like(x))
    )
    (row,) = rank_energies(flat, torch.rand(5, 1, 8, 8), [0.5])
    assert [row[key] for key in ("blurred", "noisy", "scrambled")] == [0.5] * 3


def test_unconditional_samples_of_a_gaussian_have_its_covariance() -> None:
    """Heun's steps on a Gaussian: the std to 4 standard errors and the discretisation's own 2 %."""
    shape = (1, 4, 4)
    exact = GaussianPrior(torch.full(shape, 0.3), smooth_covariance(shape, std=0.5, length=1.5))
    prior: Any = SimpleNamespace(
        image_shape=shape, sigma_range=(0.01, 40.0), device=torch.device("cpu"),
        energy_and_grad=exact.energy_and_grad,
    )  # fmt: skip
    samples = draw_unconditional(prior, 4000, seed=5)
    assert samples.shape == (4000, *shape)
    assert abs(samples.mean() - 0.3) < 4 * 0.5 / math.sqrt(4000)
    assert (samples.std(0) / 0.5 - 1).abs().max() < 4 / math.sqrt(2 * 4000) + 0.02
    assert torch.equal(samples[:4], draw_unconditional(prior, 4000, seed=5)[:4])


def test_non_local_means_is_tuned() -> None:
    """On a picture of two flat halves it removes most of the noise power, also where the picture is small."""
    generator = torch.Generator().manual_seed(0)
    for side in (32, 8):
        clean = torch.ones(2, 1, side, side)
        clean[..., : side // 2] = -1
        noisy = clean + 0.1 * torch.randn(clean.shape, generator=generator)
        error = tune_non_local_means(noisy, clean, 0.1)
        assert error < (0.1 if side == 32 else 0.6) * 0.01


# On paper


def a_report(shape: tuple[int, int, int] = (1, 8, 8), count: int = 6) -> PriorReport:
    return PriorReport(
        sigma_range=(0.05, 40.0),
        largest_gradient_error=0.12345,
        levels=[
            {"sigma": 0.1, "gradient_error": 0.12345, "psnr": 30.0, "teacher_psnr": 29.5},
            {"sigma": 0.5, "gradient_error": 0.05, "psnr": 25.0, "teacher_psnr": 25.25},
        ],
        mean_gradient_error=0.0876,
        gradient_consistency=3.2e-9,
        ranking=[{"sigma": 0.1, "blurred": 0.25, "noisy": 1.0, "scrambled": 0.875}],
        figures={"coverage": 0.9041, "images": 8},
        samples=torch.zeros(count, *shape),
        images=torch.ones(count, *shape),
    )


def a_recipe(**changes: Any) -> Recipe:
    stage = {"steps": 5, "batch_size": 4, "learning_rate": 1e-3}
    return Recipe.model_validate(
        {"name": "tiny", "data": {"source": "brain"}, "teacher": stage, "energy": stage} | changes
    )


def test_a_card(tmp_path: Path) -> None:
    write_card(
        tmp_path / "tiny.md", a_recipe(), a_report(), "Faces, MIT licence.", command="alpenglow distill x",
        seconds={"teacher": 300.4, "energy": 60.0}, parameters=12345,
    )  # fmt: skip
    card = (tmp_path / "tiny.md").read_text()
    for text in (
        "# tiny\n",
        "12,345 parameters",
        "trained on the same images",
        "Faces, MIT licence.",
        "alpenglow distill x\n",
        "| teacher | 300 |",
        "| energy | 60 |",
        "cost 20% of the teacher's training",
        "| 0.1 | 0.123 | 30.00 | 29.50 | +0.50 |",
        "| 0.5 | 0.050 | 25.00 | 25.25 | -0.25 |",
        "in [0.02, 10], even in log sigma: **8.8%**",
        "3.2e-09",
        "| 0.1 | 0.250 | 1.000 | 0.875 |",
        "- coverage: 0.904\n",
        "- images: 8\n",
    ):
        assert text in card, text
    assert "{" not in card.replace("network: {}", "")
    assert Recipe.model_validate(yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])) == a_recipe()


def test_a_card_of_a_given_teacher(tmp_path: Path) -> None:
    recipe = a_recipe(teacher={"checkpoint": "edm.safetensors"})
    write_card(
        tmp_path / "tiny.md", recipe, a_report((2, 8, 8)), "Brains.", command="x", seconds={"energy": 6.0}
    )
    card = (tmp_path / "tiny.md").read_text()
    assert "distilled from a given teacher" in " ".join(card.split())
    assert "complex images of 8x8 pixels" in card
    assert "the magnitude is shown" in card
    assert "cost" not in card


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 8, 8), (3, 8, 8)])
def test_the_pictures_of_a_card(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    """Six images of ones beside six samples of zeros, four a row: white beside grey, or black (complex)."""
    write_card(tmp_path / "t.md", a_recipe(), a_report(shape), "", command="", seconds={})
    with PIL.Image.open(tmp_path / "tiny-samples.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape == (8, 64, 3)
    assert (pixels[:, :32] == 255).all()
    expected = 0 if shape[0] == 2 else 128
    assert (abs(pixels[:, 32:].astype(int) - expected) <= 1).all()
    with PIL.Image.open(tmp_path / "tiny-levels.png") as picture:
        assert picture.size[0] > 500


def test_a_card_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "tiny.md"
    path.write_text("the card before")
    broken = PriorReport(**{**vars(a_report()), "levels": [{"sigma": 0.5}]})
    with pytest.raises(KeyError):
        write_card(path, a_recipe(), broken, "", command="", seconds={})
    assert path.read_text() == "the card before"
    assert not list(tmp_path.glob(".*"))
