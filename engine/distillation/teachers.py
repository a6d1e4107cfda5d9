"""Teachers of other libraries: their denoisers as D(x, sigma, classes), which `pipeline.distill` takes.

Each is a module around the foreign network, so that the pipeline can move, freeze and evaluate it. Give the
recipe `noise_floor: 0`, unless the teacher was trained with one: at low levels images with more noise than
sigma says are none that it knows.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

PREDICTIONS = ("epsilon", "v_prediction", "sample")
# A level that went through a logarithm and back may lie so far above the one that was meant.
ROUNDING = 1e-5


def from_callable(
    function: Callable[[Tensor, Tensor], Tensor], *, value_range: tuple[float, float] = (-1.0, 1.0)
) -> nn.Module:
    """A teacher from any MMSE denoiser D(x, sigma), x [B, C, H, W], sigma [B] -> [B, C, H, W].

    value_range: black and white in the denoiser's own units, to which images and levels are mapped and its
    result is mapped back. Raises ValueError for what cannot be called and for an empty range; when it is
    called, for class labels, and for a result of another shape.
    """
    if not callable(function):
        raise ValueError(f"got {type(function).__name__}; expected a denoiser, called as D(x, sigma)")
    low, high = value_range
    if not low < high:
        raise ValueError(f"value_range is {value_range}; expected (black, white), black < white")
    return _RescaledTeacher(function, scale=(high - low) / 2, offset=(high + low) / 2)


def from_deepinv(denoiser: nn.Module, *, value_range: tuple[float, float] = (0.0, 1.0)) -> nn.Module:
    """A teacher from a deepinv.models.Denoiser, which is called denoiser(x, sigma).

    value_range: black and white in its units, [0, 1] for nearly all of deepinv's. The denoiser should know
    every level of the recipe's `sigma`: DRUNet, say, was trained up to 50 / 255 of the range (arXiv
    2008.13751), and those that ignore sigma, such as DnCNN, for a single level. Raises ValueError as
    `from_callable`.
    """
    return from_callable(denoiser, value_range=value_range)


class _RescaledTeacher(nn.Module):
    """D(x, sigma) = (d(a x + b, a sigma) - b) / a: the mean of a x + b given its noisy value, mapped back."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *, scale: float, offset: float) -> None:
        super().__init__()
        self.function, self.scale, self.offset = function, scale, offset

    def forward(self, x: Tensor, sigma: Tensor, classes: Tensor | None = None) -> Tensor:
        if classes is not None:
            raise ValueError("got class labels; this teacher has no classes: drop label_dim from the network")
        denoised = self.function(self.scale * x + self.offset, self.scale * sigma)
        return _as_image((denoised - self.offset) / self.scale, x)


def from_diffusers(unet: Any, scheduler: Any) -> "DiffusersTeacher":
    """A teacher from a diffusion model of diffusers: a UNet2DModel, say, and its DDPMScheduler.

    unet: called unet(x, t), result.sample [B, C, H, W], for images in [-1, 1] (as diffusers' own are); t is a
    float, for a level between two steps. Class labels go to it as class_labels [B]; other conditions are
    bound before: `functools.partial(unet, encoder_hidden_states=..)`. scheduler: of the schedule the network
    was trained with, with `alphas_cumprod` and `config.prediction_type` epsilon, v_prediction or sample; it
    does not clip here what it would clip when it generates. Raises ValueError for other schedulers.
    """
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None:
        raise ValueError(
            f"got a {type(scheduler).__name__} without alphas_cumprod; expected one of a discrete "
            "variance-preserving schedule, such as DDPMScheduler"
        )
    prediction = scheduler.config.prediction_type
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction_type is {prediction!r}; expected one of {', '.join(PREDICTIONS)}")
    return DiffusersTeacher(unet, torch.as_tensor(alphas), prediction)


class DiffusersTeacher(nn.Module):
    """The MMSE denoiser D(x, sigma) of x = x_0 + sigma n, from a variance-preserving network at steps t.

    Its step t has x_t = sqrt(a) x_0 + sqrt(1 - a) n with a = alphas_cumprod[t] (Ho et al., arXiv 2006.11239,
    equation 4): that is x / sqrt(1 + sigma^2) of level sigma = sqrt((1 - a) / a), as a = 1 / (1 + sigma^2).
    Hence D, the mean of x_0, by what the network predicts:

        epsilon, the mean of n (ibid., equation 15):                            D = x - sigma epsilon
        v, that of sqrt(a) n - sqrt(1 - a) x_0 (Salimans & Ho, 2202.00512):     D = a x - sigma sqrt(a) v
        sample, that of x_0 itself.

    Between two steps t is a fraction, linear in ln sigma (the change of variables is EDM's, arXiv 2206.00364,
    table 1, column VP).

    Levels outside the schedule, whose ends are `sigma_range`:

    - Below its lowest level s the network knows no finer density than that of s, whose score is
      (D(x, s) - x) / s^2; with it Tweedie's formula gives D(x, sigma) = x + (sigma / s)^2 (D(x, s) - x). That
      is continuous at s, and x at 0. Along a direction in which images vary by a std w, x - D comes out too
      small, by (w^2 + sigma^2) / (w^2 + s^2): nothing where w >> s. There, keeping epsilon or D(x, s) as they
      are would make x - D too large, by s / sigma or its square. A recipe's sigma.low at s has none of it.
    - Above its highest level a ValueError: of noisier images the network has seen nothing. A recipe's
      sigma.high must not exceed it.
    """

    log_levels: Tensor

    def __init__(self, unet: Any, alphas: Tensor, prediction: str) -> None:
        super().__init__()
        self.unet, self.prediction = unet, prediction
        alphas = alphas.double()
        levels = ((1 - alphas) / alphas).sqrt()
        # A schedule that ends in pure noise (zero terminal SNR) has no finite level there.
        levels = levels[levels.isfinite()]
        self.register_buffer("log_levels", levels.log().float(), persistent=False)
        self.sigma_range = (levels[0].item(), levels[-1].item())

    def forward(self, x: Tensor, sigma: Tensor, classes: Tensor | None = None) -> Tensor:
        """D [B, C, H, W]; x [B, C, H, W] in [-1, 1] units, sigma [B], classes one-hot [B, K] or None."""
        low, high = self.sigma_range
        if sigma.max() > high * (1 + ROUNDING):
            raise ValueError(
                f"sigma is {sigma.max().item():g}, above the schedule's highest level {high:g}; lower the "
                "recipe's sigma.high to it"
            )
        level = sigma.clamp(low, high)
        wide = level[:, None, None, None].to(x.dtype)
        alpha = 1 / (1 + wide**2)
        labels = {} if classes is None else {"class_labels": classes.argmax(1)}
        output = self.unet(alpha.sqrt() * x, self._steps(level), **labels).sample
        # A network that predicts its variance has it in further channels (arXiv 2102.09672).
        output = output[:, : x.shape[1]].to(x.dtype)
        if self.prediction == "epsilon":
            denoised = x - wide * output
        elif self.prediction == "v_prediction":
            denoised = alpha * x - wide * alpha.sqrt() * output
        else:
            denoised = output
        share = (sigma / level).square().clamp(max=1)[:, None, None, None].to(x.dtype)
        return torch.lerp(x, _as_image(denoised, x), share)

    def _steps(self, level: Tensor) -> Tensor:
        """The fractional step [B] at which the schedule has `level` [B]."""
        wanted, known = level.log().to(self.log_levels), self.log_levels
        above = torch.searchsorted(known, wanted).clamp(1, len(known) - 1)
        return above - 1 + (wanted - known[above - 1]) / (known[above] - known[above - 1])


def _as_image(denoised: Tensor, x: Tensor) -> Tensor:
    if denoised.shape != x.shape:
        raise ValueError(
            f"the teacher made {tuple(denoised.shape)} of {tuple(x.shape)}; expected the same shape"
        )
    return denoised.to(x.dtype)
