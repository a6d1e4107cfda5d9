"""Denoisers of other libraries as teachers: against closed forms, and through a distillation."""

import importlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from alpenglow.distillation import pipeline
from alpenglow.distillation.config import Recipe
from alpenglow.distillation.evaluation import evaluate_prior
from alpenglow.distillation.sources import IndexedSource
from alpenglow.distillation.teachers import DiffusersTeacher, from_callable, from_deepinv, from_diffusers
from alpenglow.networks.denoiser import EDMDenoiser
from alpenglow.priors.network import NetworkPrior
from tests.tiny import recipe_fields

PREDICTIONS = ("epsilon", "v_prediction", "sample")
STD = 0.6


def noisy_images(sigma: Tensor, shape: tuple[int, ...] = (1, 8, 8), std: float = STD) -> Tensor:
    """x_0 + sigma n with x_0 ~ N(0, std^2 I)."""
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, len(sigma), *shape, generator=generator).to(sigma.dtype)
    return std * clean + sigma[:, None, None, None] * noise


def gaussian_denoiser(x: Tensor, sigma: Tensor, std: float = STD) -> Tensor:
    """E[x_0 | x] = s^2 / (s^2 + sigma^2) x for images N(0, s^2 I)."""
    return x * (std**2 / (std**2 + sigma**2))[:, None, None, None]


# Any function


def test_a_function_is_called_as_it_is() -> None:
    sigma = torch.tensor([0.01, 0.5, 20.0])
    x = noisy_images(sigma)
    teacher = from_callable(gaussian_denoiser)
    assert torch.equal(teacher(x, sigma, None), gaussian_denoiser(x, sigma))


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.0, 255.0), (-3.0, 7.0)])
def test_units_are_mapped(low: float, high: float) -> None:
    """A denoiser of Gaussian images in other units, N((low + high) / 2, (s (high - low) / 2)^2)."""
    sigma = torch.tensor([0.01, 0.5, 20.0])
    x = noisy_images(sigma)
    mean, half = (low + high) / 2, (high - low) / 2

    def theirs(u: Tensor, level: Tensor) -> Tensor:
        return mean + gaussian_denoiser(u - mean, level, STD * half)

    ours = from_callable(theirs, value_range=(low, high))(x, sigma, None)
    torch.testing.assert_close(ours, gaussian_denoiser(x, sigma), rtol=1e-5, atol=1e-5)


def test_what_is_no_teacher() -> None:
    with pytest.raises(ValueError, match=r"got str; expected a denoiser"):
        from_callable("drunet")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="black < white"):
        from_callable(gaussian_denoiser, value_range=(1.0, 1.0))
    x, sigma = torch.zeros(2, 1, 8, 8), torch.ones(2)
    with pytest.raises(ValueError, match=r"drop label_dim"):
        from_callable(gaussian_denoiser)(x, sigma, torch.eye(2))
    with pytest.raises(ValueError, match=r"made \(2, 8, 8\) of \(2, 1, 8, 8\)"):
        from_callable(lambda x, sigma: x[:, 0])(x, sigma)


# deepinv


@pytest.fixture(scope="module")
def deepinv_models() -> Any:
    return pytest.importorskip("deepinv.models", reason="pip install deepinv")


def test_deepinv_exact_denoiser(deepinv_models: Any) -> None:
    """deepinv's closed form for a few known images, in [0, 1], against softmax(-|x - a|^2 / 2 sigma^2) a."""
    generator = torch.Generator().manual_seed(1)
    atoms = torch.rand(6, 1, 4, 4, generator=generator) * 2 - 1
    denoiser = deepinv_models.MMSE((atoms + 1) / 2, device=torch.device("cpu"))
    sigma = torch.tensor([0.3, 1.0, 1.5, 40.0])
    x = atoms[:4] + sigma[:, None, None, None] * torch.randn(4, 1, 4, 4, generator=generator)
    distances = (x[:, None] - atoms).square().sum((2, 3, 4)).double()
    weights = (-distances / (2 * sigma[:, None].double() ** 2)).softmax(1)
    assert (weights.amax(1) < 0.9).sum() > 1  # where several images matter
    expected = torch.einsum("ba,achw->bchw", weights, atoms.double()).float()
    torch.testing.assert_close(from_deepinv(denoiser)(x, sigma, None), expected, rtol=1e-4, atol=1e-4)


def test_deepinv_network_takes_a_level_an_image(deepinv_models: Any) -> None:
    torch.manual_seed(0)
    network = deepinv_models.DRUNet(1, 1, nc=[8, 8, 8, 8], nb=1, pretrained=None).eval()
    teacher = from_deepinv(network)
    sigma = torch.tensor([0.05, 0.3])
    x = noisy_images(sigma, (1, 16, 16))
    with torch.no_grad():
        both = teacher(x, sigma, None)
        for image, level, denoised in zip(x, sigma, both, strict=True):
            alone = 2 * network((image[None] + 1) / 2, level.item() / 2)[0] - 1
            torch.testing.assert_close(denoised, alone, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(both, teacher(x, sigma.flip(0), None), atol=1e-3)
    assert {id(p) for p in teacher.parameters()} == {id(p) for p in network.parameters()}


# diffusers


@pytest.fixture(scope="module")
def diffusers() -> Any:
    return importlib.import_module("diffusers")


class ExactNetwork(nn.Module):
    """What a perfect network of a schedule would predict for images N(0, s^2 I); t may be a fraction."""

    def __init__(self, scheduler: Any, prediction: str) -> None:
        super().__init__()
        alphas = scheduler.alphas_cumprod.double().numpy()
        with np.errstate(divide="ignore"):  # a = 0 where a schedule ends in pure noise
            self.log_levels = 0.5 * np.log((1 - alphas) / alphas)
        self.prediction = prediction

    def forward(self, x_t: Tensor, t: Tensor) -> Any:
        level = np.exp(np.interp(t.double().numpy(), np.arange(len(self.log_levels)), self.log_levels))
        a = torch.from_numpy(1 / (1 + level**2))[:, None, None, None]
        # Var(x_t) = a s^2 + 1 - a; the means of x_0 and of n given x_t are linear in it.
        variance = a * STD**2 + 1 - a
        sample, epsilon = a.sqrt() * STD**2 / variance * x_t, (1 - a).sqrt() / variance * x_t
        velocity = a.sqrt() * epsilon - (1 - a).sqrt() * sample
        predicted = {"epsilon": epsilon, "v_prediction": velocity, "sample": sample}[self.prediction]
        output = importlib.import_module("diffusers.models.unets.unet_2d").UNet2DOutput
        return output(sample=predicted.to(x_t.dtype))


def exact_teacher(diffusers: Any, prediction: str, **options: Any) -> DiffusersTeacher:
    scheduler = diffusers.DDPMScheduler(prediction_type=prediction, **options)
    return from_diffusers(ExactNetwork(scheduler, prediction), scheduler)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_a_perfect_network_is_the_exact_denoiser(diffusers: Any, prediction: str, schedule: str) -> None:
    """At steps and between them, to the rounding of t, which is a float32. What is distilled is x - D."""
    teacher = exact_teacher(diffusers, prediction, beta_schedule=schedule)
    levels = teacher.log_levels[[0, 1, 500, 900]].double().exp()
    sigma = torch.cat([levels, torch.tensor([0.0123, 0.1, 0.5, 3.0, 20.0, 40.0])])
    x = noisy_images(sigma)
    removed = x - teacher(x, sigma, None)
    torch.testing.assert_close(removed, x - gaussian_denoiser(x, sigma), rtol=1e-4, atol=0)
    # In float32, as it is used.
    ours = teacher(x.float(), sigma.float(), None)
    torch.testing.assert_close(ours, gaussian_denoiser(x, sigma).float(), rtol=1e-5, atol=1e-4)


def test_steps_lie_where_their_levels_do(diffusers: Any) -> None:
    teacher = exact_teacher(diffusers, "epsilon")
    steps = teacher._steps(teacher.log_levels.exp())
    assert (steps - torch.arange(1000)).abs().max() < 1e-2
    between = teacher._steps(torch.logspace(-1.9, 2, 5000))
    assert (between.diff() > 0).all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_below_the_schedule_the_lowest_score_goes_on(diffusers: Any, prediction: str) -> None:
    teacher = exact_teacher(diffusers, prediction)
    low = teacher.sigma_range[0]
    assert low == pytest.approx(0.01, rel=1e-3)
    sigma = torch.tensor([0.001, 0.005, 0.00999, low], dtype=torch.float64)
    x = noisy_images(sigma)
    removed = x - teacher(x, sigma, None)
    expected = x * (sigma**2 / (STD**2 + low**2))[:, None, None, None]
    torch.testing.assert_close(removed, expected, rtol=1e-4, atol=0)
    # All but right for images that vary by more than the lowest level: here by 0.6 against 0.01.
    torch.testing.assert_close(removed, x - gaussian_denoiser(x, sigma), rtol=4e-4, atol=0)


def test_above_the_schedule_is_refused(diffusers: Any) -> None:
    """Stable Diffusion's schedule ends at 14.6."""
    options = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    teacher = exact_teacher(diffusers, "epsilon", **options)
    high = teacher.sigma_range[1]
    assert high == pytest.approx(14.61, abs=0.01)
    with pytest.raises(ValueError, match=r"sigma is 20, above the schedule's highest level 14\.6"):
        teacher(torch.zeros(2, 1, 8, 8), torch.tensor([1.0, 20.0]), None)
    # A level as the recipe's `high` draws it, through a logarithm in float32.
    edge = torch.tensor([high]).log().exp() * (1 + 3e-7)
    x = noisy_images(edge)
    torch.testing.assert_close(teacher(x, edge, None), gaussian_denoiser(x, edge), rtol=1e-4, atol=1e-4)


def test_a_schedule_that_ends_in_pure_noise(diffusers: Any) -> None:
    teacher = exact_teacher(diffusers, "v_prediction", rescale_betas_zero_snr=True)
    assert 100 < teacher.sigma_range[1] < math.inf
    sigma = torch.tensor([0.1, 5.0, 40.0])
    x = noisy_images(sigma)
    torch.testing.assert_close(teacher(x, sigma, None), gaussian_denoiser(x, sigma), rtol=1e-5, atol=1e-5)


def small_unet(diffusers: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        **{"out_channels": 1, "add_attention": False, **options},
    )  # fmt: skip
    return unet.eval().requires_grad_(False)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_real_network_as_its_own_scheduler_reads_it(diffusers: Any, prediction: str) -> None:
    """At a step, D is the estimate of x_0 that DDPMScheduler.step itself makes of the network's output."""
    unet = small_unet(diffusers)
    scheduler = diffusers.DDPMScheduler(prediction_type=prediction, clip_sample=False)
    teacher = from_diffusers(unet, scheduler)
    for step in (0, 1, 250, 999):
        a = scheduler.alphas_cumprod[step]
        sigma = ((1 - a) / a).sqrt().expand(3)
        x = noisy_images(sigma)
        x_t = a.sqrt() * x
        theirs = scheduler.step(unet(x_t, step).sample, step, x_t).pred_original_sample
        tolerance = {"rtol": 1e-3, "atol": 1e-4 * max(1.0, sigma[0].item())}
        torch.testing.assert_close(teacher(x, sigma, None), theirs, **tolerance)


def test_a_network_with_classes_and_one_with_variances(diffusers: Any) -> None:
    scheduler = diffusers.DDPMScheduler()
    sigma = torch.tensor([0.5, 2.0])
    x = noisy_images(sigma)
    unet = small_unet(diffusers, num_class_embeds=3)
    teacher = from_diffusers(unet, scheduler)
    one_hot = torch.eye(3)[[2, 0]]
    t, scaled = teacher._steps(sigma), x / (1 + sigma**2).sqrt()[:, None, None, None]
    epsilon = unet(scaled, t, class_labels=torch.tensor([2, 0])).sample
    expected = x - sigma[:, None, None, None] * epsilon
    torch.testing.assert_close(teacher(x, sigma, one_hot), expected)
    assert not torch.allclose(teacher(x, sigma, one_hot.flip(0)), expected, atol=1e-3)
    with pytest.raises(ValueError, match="class_labels"):
        teacher(x, sigma, None)

    unet = small_unet(diffusers, out_channels=2)
    denoised = from_diffusers(unet, scheduler)(x, sigma, None)
    expected = x - sigma[:, None, None, None] * unet(scaled, t).sample[:, :1]
    torch.testing.assert_close(denoised, expected)


def test_schedulers_that_are_refused(diffusers: Any) -> None:
    with pytest.raises(ValueError, match="EDMEulerScheduler without alphas_cumprod"):
        from_diffusers(nn.Identity(), diffusers.EDMEulerScheduler())
    scheduler = diffusers.DDPMScheduler(prediction_type="flow_prediction")
    with pytest.raises(ValueError, match="prediction_type is 'flow_prediction'"):
        from_diffusers(nn.Identity(), scheduler)


# Through the pipeline


def white_source() -> IndexedSource:
    images = STD * torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    return IndexedSource(list(images))


def small_recipe(folder: Path, steps: int) -> Recipe:
    fields = recipe_fields(
        folder,
        energy={"steps": steps, "batch_size": 16, "learning_rate": 2e-2, "warmup_steps": 5},
        data={"source": "unused", "noise_floor": 0.0},
    )
    return Recipe.model_validate(fields)


def gradient_error(model: EDMDenoiser, images: Tensor) -> float:
    """Mean over levels of ||G - (x - D)|| / ||x - D||, D exact."""
    prior = NetworkPrior(model, (1, 8, 8), name="white", sigma_range=(0.005, 40.0))
    rows = evaluate_prior(
        prior, lambda x, sigma, classes: gaussian_denoiser(x, sigma), images, (0.1, 0.5, 2.0)
    )
    return sum(row["gradient_error"] for row in rows) / len(rows)


def test_an_analytic_denoiser_is_distilled(tmp_path: Path) -> None:
    recipe, source = small_recipe(tmp_path, 60), white_source()
    torch.manual_seed(recipe.seed)
    before = gradient_error(EDMDenoiser.from_config(recipe.denoiser_config()), source.held_out(10))
    _, energy = pipeline.distill(recipe, tmp_path, source=source, teacher=from_callable(gaussian_denoiser))
    after = gradient_error(energy, source.held_out(10))
    assert after < 0.7 * before


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_diffusers_network_is_distilled(tmp_path: Path, diffusers: Any, prediction: str) -> None:
    """A real, untrained network goes through: moved, frozen, and called at every level of the recipe."""
    unet = small_unet(diffusers).requires_grad_(True).train()
    teacher = from_diffusers(unet, diffusers.DDPMScheduler(prediction_type=prediction))
    given, energy = pipeline.distill(
        small_recipe(tmp_path, 3), tmp_path, source=white_source(), teacher=teacher
    )
    assert given is teacher
    assert not unet.training
    assert not any(p.requires_grad for p in unet.parameters())
    assert all(p.isfinite().all() for p in energy.parameters())
