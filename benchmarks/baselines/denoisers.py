"""Denoisers that the baselines run on."""

from collections.abc import Callable

import torch
from torch import Tensor

from alpenglow.networks.denoiser import energy
from alpenglow.priors.network import NetworkPrior

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""D(x, sigma), the MMSE estimate of x_0 from x = x_0 + sigma n, [B, C, H, W]; sigma [B]; differentiable."""


def denoiser_of(prior: NetworkPrior) -> Denoiser:
    """The prior's own MMSE denoiser D = x - G (DESIGN 1), differentiable once more than `prior.denoise`."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        differentiable = torch.is_grad_enabled() and x.requires_grad
        with torch.enable_grad():
            leaf = x if differentiable else x.detach().requires_grad_()
            total = energy(prior.denoiser, leaf, sigma, prior.one_hot(len(x))).sum()
            (grad,) = torch.autograd.grad(total, leaf, create_graph=differentiable)
        return leaf - grad if differentiable else x - grad

    return denoise
