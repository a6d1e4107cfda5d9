"""EDM preconditioning around a network, as a denoiser and as an energy (DESIGN 1)."""

import copy
import inspect
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alpenglow.networks.song_unet import SongUNet

BACKBONES: dict[str, type[nn.Module]] = {"SongUNet": SongUNet}

EnergyForm = Literal["alps", "product"]
"""How a network makes an energy, with eps = x - psi(x, sigma).

alps: E = 0.5 ||eps||^2 (arXiv 2601.02594). Its MMSE denoiser is psi + J_psi^T eps, so that the psi of a
teacher has much to unlearn. product: E = 0.5 <x - a, eps>, with a(x, sigma) a second head of the network.
Where a = psi that is alps; where a = 0, the energy of Regularization by Denoising (Romano, Elad and Milanfar
2017, arXiv 1611.02862), whose MMSE denoiser is psi itself if psi is its own Jacobian, a symmetric one, times
x, as the exact denoiser of a Gaussian of mean zero is.
"""
HEADS: dict[str, int] = {"alps": 1, "product": 2}


class Coefficients(NamedTuple):
    """EDM preconditioning at levels sigma, each [B, 1, 1, 1] (arXiv 2206.00364, table 1)."""

    c_in: Tensor
    c_skip: Tensor
    c_out: Tensor
    residual: Tensor
    """1 - c_skip, written without cancellation: sigma^2 / (sigma^2 + sigma_data^2)."""


class EDMDenoiser(nn.Module):
    """psi(x, sigma) = c_skip x + c_out F(c_in x, ln(sigma) / 4), with F the network `model`.

    State dict keys begin with `model.`, as in EDM's EDMPrecond. `patch` > 1 lets the network work on
    patch x patch blocks of pixels as channels: four times the speed at patch 2 for small networks.
    """

    def __init__(
        self, model: nn.Module, *, sigma_data: float = 0.5, patch: int = 1, form: EnergyForm = "alps"
    ) -> None:
        super().__init__()
        if form not in HEADS:
            raise ValueError(f"unknown form {form!r} of an energy; expected {' or '.join(HEADS)}")
        self.model = model
        self.sigma_data = sigma_data
        self.patch = patch
        self.form: EnergyForm = form
        """Of the energy that `energy` and `energy_and_grad` take from it; a plain denoiser is none."""
        self.config: dict[str, Any] | None = None
        """What `from_config` was given; None for a network built by hand, which cannot be saved."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "EDMDenoiser":
        """Build from {"backbone": name, "network": constructor arguments, "sigma_data": .., "patch": ..,
        "form": ..}.

        Raises ValueError for an unknown backbone, argument or form.
        """
        backbone = BACKBONES.get(config.get("backbone", ""))
        if backbone is None:
            raise ValueError(
                f"unknown backbone {config.get('backbone')!r}; this version has {', '.join(BACKBONES)}"
            )
        arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in config["network"].items()}
        known = inspect.signature(backbone).parameters
        if unknown := sorted(set(arguments) - set(known)):
            raise ValueError(
                f"{config['backbone']} has no argument {', '.join(unknown)}; it has {', '.join(known)}"
            )
        try:
            model = backbone(**arguments)
        except (TypeError, ArithmeticError, LookupError, RuntimeError) as error:
            raise ValueError(f"network arguments do not fit {config['backbone']}: {error}") from error
        sigma_data, patch = float(config.get("sigma_data", 0.5)), int(config.get("patch", 1))
        form: EnergyForm = config.get("form", "alps")
        denoiser = cls(model, sigma_data=sigma_data, patch=patch, form=form)
        takes, gives = arguments["in_channels"], arguments["out_channels"]
        if gives != takes * HEADS[form]:
            raise ValueError(
                f"network arguments do not fit: in_channels is {takes} and out_channels {gives}; an energy "
                f"of form {form!r} expects {takes * HEADS[form]}"
            )
        denoiser.config = {
            "backbone": config["backbone"],
            "network": dict(config["network"]),
            "sigma_data": sigma_data,
            "patch": patch,
            "form": form,
        }
        return denoiser

    def with_form(self, form: EnergyForm) -> "EDMDenoiser":
        """A copy for energies of that form. A second head that it gains is zero: a(x, sigma) = 0.

        Raises ValueError for a network built by hand, which cannot be built anew.
        """
        if form == self.form:
            return copy.deepcopy(self)
        if self.config is None:
            raise ValueError(f"this denoiser was built by hand; build it with from_config for form {form!r}")
        network = self.config["network"]
        network = network | {"out_channels": network["in_channels"] * HEADS[form]}
        other = EDMDenoiser.from_config(self.config | {"network": network, "form": form})
        other.to(next(self.parameters())).train(self.training)
        weights = other.state_dict()
        for key, mine in self.state_dict().items():
            weights[key].zero_()[: len(mine)] = mine[: len(weights[key])]
        return other

    def coefficients(self, sigma: Tensor) -> Coefficients:
        sigma = sigma.reshape(-1, 1, 1, 1)
        total = sigma**2 + self.sigma_data**2
        return Coefficients(
            c_in=total.rsqrt(),
            c_skip=self.sigma_data**2 / total,
            c_out=sigma * self.sigma_data * total.rsqrt(),
            residual=sigma**2 / total,
        )

    def raw(
        self,
        scaled: Tensor,
        sigma: Tensor,
        class_label: Tensor | None = None,
        augmentation: Tensor | None = None,
        *,
        compute_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """F at an already scaled input c_in x [B, C, H, W], in `compute_dtype` (None: that of the input).

        [B, heads C, H, W]: of form "product", H with a = sigma_data H stands behind F.
        """
        label = sigma.reshape(-1).log() / 4
        options = {"compute_dtype": compute_dtype}
        if self.patch == 1:
            return self.model(scaled, label, class_label, augmentation, **options)
        blocks = F.pixel_unshuffle(scaled, self.patch)
        blocks = self.model(blocks, label, class_label, augmentation, **options)
        return F.pixel_shuffle(blocks, self.patch)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        class_label: Tensor | None = None,
        *,
        augmentation: Tensor | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """psi(x, sigma): x [B, C, H, W], sigma [B] -> [B, C, H, W].

        class_label [B, K] is one-hot, augmentation [B, 9] that of training; `compute_dtype` float16 or
        bfloat16 runs F alone in half precision.
        """
        c = self.coefficients(sigma)
        output = self.raw(c.c_in * x, sigma, class_label, augmentation, compute_dtype=compute_dtype)
        return c.c_skip * x + c.c_out * output[:, : x.shape[1]].to(x.dtype)

    def factors(self, x: Tensor, output: Tensor, c: Coefficients) -> tuple[Tensor, Tensor]:
        """x - a and eps = x - psi of E = 0.5 <x - a, eps>, from what `raw` gave; of form "alps" eps twice."""
        heads = output.to(x.dtype)
        eps = c.residual * x - c.c_out * heads[:, : x.shape[1]]
        return (eps if self.form == "alps" else x - self.sigma_data * heads[:, x.shape[1] :]), eps


def energy(denoiser: EDMDenoiser, x: Tensor, sigma: Tensor, class_label: Tensor | None = None) -> Tensor:
    """E [B] alone, a function of x that can be differentiated as often as wanted; see energy_and_grad."""
    c = denoiser.coefficients(sigma)
    factor, eps = denoiser.factors(x, denoiser.raw(c.c_in * x, sigma, class_label), c)
    return 0.5 * (factor * eps).flatten(1).sum(1)


def energy_and_grad(
    denoiser: EDMDenoiser,
    x: Tensor,
    sigma: Tensor,
    *,
    class_label: Tensor | None = None,
    create_graph: bool = False,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """E [B] and its gradient G [B, C, H, W], of the denoiser's form (EnergyForm; DESIGN 1).

    alps: G = J_eps^T eps; product: G = 0.5 (J_{x - a}^T eps + J_eps^T (x - a)). x [B, C, H, W] and sigma [B]
    share the dtype of the results. Written with eps = r x - c_out F(c_in x), r = 1 - c_skip, and
    a = sigma_data H(c_in x): one vector-Jacobian product of the network, without cancellation at small sigma.
    `create_graph` keeps the graph for a loss on G (distillation). `compute_dtype` float16 or bfloat16 runs
    the network alone in half precision.
    """
    # Autograd is off in a caller's inference_mode, and enable_grad does not bring it back.
    with torch.inference_mode(False), torch.enable_grad():
        c = denoiser.coefficients(sigma)
        scaled = (c.c_in * x).detach().requires_grad_()
        output = denoiser.raw(scaled, sigma, class_label, compute_dtype=compute_dtype)
        factor, eps = denoiser.factors(x, output, c)
        value = 0.5 * (factor * eps).flatten(1).sum(1)
        # dE/dx where the network's output is held, and -dE/doutput; a loss on G differentiates both.
        if denoiser.form == "alps":
            direct, cotangent = c.residual * eps, c.c_out * eps
        else:
            direct = 0.5 * (eps + c.residual * factor)
            cotangent = 0.5 * torch.cat([c.c_out * factor, denoiser.sigma_data * eps], dim=1)
        if not create_graph:
            cotangent = cotangent.detach()
        half = output.dtype != x.dtype
        if half:
            # It falls with sigma to where half precision has no digits left; J_F^T is linear in it.
            size = cotangent.abs().amax((1, 2, 3), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
            cotangent = cotangent / size
        (pulled,) = torch.autograd.grad(output, scaled, cotangent.to(output.dtype), create_graph=create_graph)
        if half:
            pulled = pulled * size
        grad = direct - c.c_in * pulled
    if not create_graph:
        value, grad = value.detach(), grad.detach()
    return value, grad
