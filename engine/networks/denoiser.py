"""EDM preconditioning around a network, as a denoiser and as an energy (DESIGN 1)."""

import inspect
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alpenglow.networks.song_unet import SongUNet

BACKBONES: dict[str, type[nn.Module]] = {"SongUNet": SongUNet}


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

    def __init__(self, model: nn.Module, *, sigma_data: float = 0.5, patch: int = 1) -> None:
        super().__init__()
        self.model = model
        self.sigma_data = sigma_data
        self.patch = patch
        self.config: dict[str, Any] | None = None
        """What `from_config` was given; None for a network built by hand, which cannot be saved."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "EDMDenoiser":
        """Build from {"backbone": name, "network": constructor arguments, "sigma_data": .., "patch": ..}.

        Raises ValueError for an unknown backbone or argument.
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
        denoiser = cls(model, sigma_data=sigma_data, patch=patch)
        denoiser.config = {
            "backbone": config["backbone"],
            "network": dict(config["network"]),
            "sigma_data": sigma_data,
            "patch": patch,
        }
        return denoiser

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
        """F at an already scaled input c_in x [B, C, H, W], in `compute_dtype` (None: that of the input)."""
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
        return c.c_skip * x + c.c_out * output.to(x.dtype)


def energy_and_grad(
    denoiser: EDMDenoiser,
    x: Tensor,
    sigma: Tensor,
    *,
    class_label: Tensor | None = None,
    create_graph: bool = False,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """E = 0.5 ||x - psi||^2 [B] and G = (x - psi) - J_psi^T (x - psi) [B, C, H, W] (DESIGN 1).

    x [B, C, H, W] and sigma [B] share the dtype of the results. Written as eps = a x - c_out F(c_in x),
    G = a eps - c_in c_out J_F^T eps, which does not cancel at small sigma. `create_graph` keeps the graph
    for a loss on G (distillation). `compute_dtype` float16 or bfloat16 runs F alone in half precision.
    """
    # Autograd is off in a caller's inference_mode, and enable_grad does not bring it back.
    with torch.inference_mode(False), torch.enable_grad():
        c = denoiser.coefficients(sigma)
        scaled = (c.c_in * x).detach().requires_grad_()
        output = denoiser.raw(scaled, sigma, class_label, compute_dtype=compute_dtype)
        eps = c.residual * x - c.c_out * output.to(x.dtype)
        # eps enters the vector-Jacobian product as a cotangent; a loss on G differentiates it too.
        cotangent = eps if create_graph else eps.detach()
        half = output.dtype != x.dtype
        if half:
            # eps falls with sigma to where half precision has no digits left; J_F^T is linear in it.
            size = cotangent.abs().amax((1, 2, 3), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
            cotangent = cotangent / size
        (pulled,) = torch.autograd.grad(output, scaled, cotangent.to(output.dtype), create_graph=create_graph)
        if half:
            pulled = pulled * size
        grad = c.residual * eps - c.c_in * c.c_out * pulled
        energy = 0.5 * eps.square().flatten(1).sum(1)
    if not create_graph:
        energy, grad = energy.detach(), grad.detach()
    return energy, grad
