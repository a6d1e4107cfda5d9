"""The two training objectives against their definitions and finite differences; the law of noise levels."""

import math

import pytest
import torch
from torch import Tensor

from alpenglow.distillation.batches import image_generator
from alpenglow.distillation.config import LossWeight, SigmaLaw
from alpenglow.distillation.losses import draw_sigma, energy_loss, teacher_loss
from alpenglow.networks.denoiser import EnergyForm
from tests.tiny import random_denoiser

SIGMA = torch.tensor([0.02, 0.3, 2.0, 20.0], dtype=torch.float64)


def images(*, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Clean and noisy [4, 1, 8, 8] at the levels SIGMA, float64."""
    generator = torch.Generator().manual_seed(seed)
    clean, noise = torch.randn(2, 4, 1, 8, 8, generator=generator, dtype=torch.float64)
    return clean, clean + SIGMA[:, None, None, None] * noise


@pytest.mark.parametrize("weight", ["excess", "edm"])
@pytest.mark.parametrize("form", ["alps", "product"])
@pytest.mark.parametrize(
    "classes", [None, torch.eye(3, dtype=torch.float64)[[0, 1, 2, 1]]], ids=["", "classes"]
)
def test_losses_are_what_they_say(classes: Tensor | None, form: EnergyForm, weight: LossWeight) -> None:
    """Both losses written out again from their definitions, by other means."""
    label_dim = 0 if classes is None else 3
    model = random_denoiser(label_dim=label_dim).double().with_form(form)
    teacher = random_denoiser(1, label_dim=label_dim).double()
    clean, noisy = images()
    x = noisy.clone().requires_grad_()
    eps = factor = x - model(x, SIGMA, classes)
    if form == "product":
        scaled = x / (SIGMA**2 + 0.7**2).sqrt()[:, None, None, None]
        factor = x - 0.7 * model.raw(scaled, SIGMA, classes)[:, 1:]
    energy = 0.5 * (factor * eps).sum()
    (grad,) = torch.autograd.grad(energy, x)
    edm = 1 / SIGMA**2 + 1 / 0.7**2
    denoised = teacher(x, SIGMA, classes)
    mismatch = (grad - x + denoised).square().mean((1, 2, 3))
    weights = edm if weight == "edm" else 1 / (denoised - clean).square().mean((1, 2, 3))
    got = energy_loss(model, teacher, clean, noisy, SIGMA, weight=weight, classes=classes).item()
    assert got == pytest.approx((weights * mismatch).mean().item(), rel=1e-9)
    error = (model(noisy, SIGMA, classes) - clean).square().mean((1, 2, 3))
    got = teacher_loss(model, clean, noisy, SIGMA, classes=classes).item()
    assert got == pytest.approx((edm * error).mean().item(), rel=1e-9)


def test_an_image_that_the_teacher_knows_exactly_has_a_bounded_weight() -> None:
    """A hundred times the teacher's own weight, and the loss stays finite."""
    model, (clean, noisy) = random_denoiser().double(), images()
    known = energy_loss(model, lambda *_: clean, clean, noisy, SIGMA)
    usual = energy_loss(model, lambda *_: clean, clean, noisy, SIGMA, weight="edm")
    assert known.item() == pytest.approx(100 * usual.item(), rel=1e-9)


def test_the_loss_of_the_best_denoiser_is_known() -> None:
    """White Gaussian images: D = x s^2 / (s^2 + sigma^2) errs by s^2 sigma^2 / (s^2 + sigma^2) a pixel.

    With s = sigma_data that is 1 / weight: EDM's loss is 1 at every level.
    """
    model = random_denoiser().double()
    model.forward = lambda x, sigma, *_, **__: x * model.coefficients(sigma).c_skip  # type: ignore[method-assign]
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 1000, 1, 8, 8, generator=generator, dtype=torch.float64)
    sigma = torch.tensor([0.1, 10.0], dtype=torch.float64).repeat(500)
    noisy = 0.7 * clean + sigma[:, None, None, None] * noise
    # A mean of N squares of normal numbers has a standard error of sqrt(2 / N).
    error = math.sqrt(2 / clean.numel())
    assert abs(teacher_loss(model, 0.7 * clean, noisy, sigma).item() - 1) < 4 * error


def test_energy_loss_gradient_is_that_of_finite_differences() -> None:
    """In float64, along random directions of every parameter; needs the second derivative of the network."""
    model, teacher = random_denoiser().double(), random_denoiser(1).double().requires_grad_(False)
    clean, noisy = images()

    def loss() -> Tensor:
        return energy_loss(model, teacher, clean, noisy, SIGMA)

    loss().backward()
    generator = torch.Generator().manual_seed(6)
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        step = 1e-5 / direction.norm().item()
        assert parameter.grad is not None, name
        slope = (parameter.grad * direction).sum().item()
        start, values = parameter.detach().clone(), []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.copy_(start + sign * step * direction)
            values.append(loss().item())
        with torch.no_grad():
            parameter.copy_(start)
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=1e-5, abs=1e-7), name


def test_a_teacher_is_asked_without_a_graph() -> None:
    """Any callable is one; its weights get no gradient, though they ask for it."""
    model, teacher = random_denoiser().double(), random_denoiser(1).double()
    clean, noisy = images()
    asked = []

    def denoiser(x: Tensor, sigma: Tensor, classes: Tensor | None) -> Tensor:
        asked.append(torch.is_grad_enabled())
        return teacher(x, sigma, classes)

    energy_loss(model, denoiser, clean, noisy, SIGMA).backward()
    assert asked == [False]
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_noise_levels_follow_their_law() -> None:
    """Even images log-normal, odd ones log-uniform, all within the bounds."""
    law, count = SigmaLaw(log_mean=-1.0, log_std=1.0, low=0.005, high=40.0), 5000
    log_sigma = torch.stack([draw_sigma(law, i, image_generator(0, 0, i)) for i in range(2 * count)]).log()
    low, high = math.log(0.005), math.log(40.0)
    assert log_sigma.min() >= low - 1e-6
    assert log_sigma.max() <= high + 1e-6
    normal, uniform = log_sigma[::2], (log_sigma[1::2] - low) / (high - low)
    assert abs(normal.mean() + 1.0) < 4 / math.sqrt(count)
    # Standard errors of standard deviations; that of a uniform law is sqrt(1 / 180 / N) / (2 std).
    assert abs(normal.std() - 1.0) < 4 / math.sqrt(2 * count)
    assert abs(uniform.mean() - 0.5) < 4 / math.sqrt(12 * count)
    assert abs(uniform.var() - 1 / 12) < 4 / math.sqrt(180 * count)


def test_levels_beyond_the_bounds_are_set_to_them() -> None:
    law = SigmaLaw(log_mean=0.0, log_std=1e4, low=0.5, high=2.0)
    sigma = torch.stack([draw_sigma(law, 0, image_generator(0, step, 0)) for step in range(200)])
    assert sorted(set(sigma.tolist())) == pytest.approx([0.5, 2.0], rel=1e-6)
