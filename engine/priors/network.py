"""The energy of a trained network as a prior."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from alpenglow.networks.denoiser import EDMDenoiser, energy_and_grad
from alpenglow.networks.layers import Conv2d
from alpenglow.networks.storage import save_denoiser
from alpenglow.priors.batched import BatchedPrior, check_batch_size
from alpenglow.priors.protocol import check_image_shape

Precision = Literal["float32", "float64", "float16", "bfloat16"]
PRECISIONS: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

UNMEASURED_ERROR = 0.2
"""Gradient error of a network whose file does not state one: what the zoo has at its lowest level."""


class NetworkPrior(BatchedPrior):
    """Energy prior of an EDMDenoiser: 0.5 ||x - psi||^2 or 0.5 <x - a, x - psi>, by its `form` (DESIGN 1).

    Takes over `denoiser`: freezes it, and puts it in evaluation mode. Images [B, C, H, W] of `image_shape`
    are in the prior's units; `sigma_range` is the span of levels it was trained for. `gradient_error`: the
    largest relative error of G there, which tells samplers how far to trust it; None, unknown, counts as 0.2.
    `noise_floor`: std of the white noise that its training images were given, which samples have again.
    `precision` float16 and bfloat16 run the network F alone in half precision.

    `batch_size` images go through the network at once, see BatchedPrior. Another one, another machine or
    number of CPU threads does change the last bits. Default: 16 on CPU, 64 on a GPU; where single
    images are all that comes, 1 is three to four times faster.

    `class_label`: which of its classes a class-conditional network is to be the prior of.

    Raises ValueError for an image shape that the network cannot take and for wrong options.
    """

    def __init__(
        self,
        denoiser: EDMDenoiser,
        image_shape: tuple[int, int, int],
        *,
        name: str = "network",
        sigma_range: tuple[float, float] = (0.01, 80.0),
        gradient_error: float | None = None,
        noise_floor: float = 0.0,
        metadata: Mapping[str, Any] | None = None,
        batch_size: int | None = None,
        precision: Precision | None = None,
        class_label: int | None = None,
    ) -> None:
        self.image_shape = check_image_shape(image_shape)
        check_fits(denoiser, self.image_shape)
        check_batch_size(batch_size)
        if not 0 < sigma_range[0] < sigma_range[1] < float("inf"):
            raise ValueError(f"sigma_range is {sigma_range}; expected 0 < low < high")
        if precision is not None and precision not in PRECISIONS:
            raise ValueError(f"unknown precision {precision!r}; expected one of {', '.join(PRECISIONS)}")
        classes = denoiser.model.label_dim
        if class_label is not None and not 0 <= class_label < classes:  # type: ignore[operator]
            raise ValueError(f"class_label is {class_label}; {name} has {classes or 'no'} classes, from 0 up")
        if classes and class_label is None:
            raise ValueError(f"{name} has {classes} classes; say which with class_label=0, 1, ..")
        self.class_label = class_label
        self.name = name
        self.sigma_range = (float(sigma_range[0]), float(sigma_range[1]))
        self.gradient_error = UNMEASURED_ERROR if gradient_error is None else float(gradient_error)
        self.noise_floor = float(noise_floor)
        self.metadata = dict(metadata or {})
        self._batch_size = batch_size
        self.denoiser = denoiser.requires_grad_(False).eval()
        self.compute_dtype: torch.dtype | None = None
        if precision in ("float32", "float64"):
            denoiser.to(PRECISIONS[precision])
        elif precision is not None:
            self.compute_dtype = PRECISIONS[precision]
            _narrow_convolutions(denoiser.float(), self.compute_dtype)
        embedding = next(p for key, p in denoiser.named_parameters() if key.startswith("model.map_layer0"))
        self.dtype = embedding.dtype
        self.device = embedding.device

    def __repr__(self) -> str:
        return f"NetworkPrior({self.name!r}, image_shape={self.image_shape}, device={str(self.device)!r})"

    def run(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """E [B] and G [B, C, H, W] of the network, for any B."""
        return energy_and_grad(
            self.denoiser, x, sigma, class_label=self.one_hot(len(x)), compute_dtype=self.compute_dtype
        )

    def one_hot(self, count: int) -> Tensor | None:
        """The class label for `count` images, [count, K]; None without classes."""
        if self.class_label is None:
            return None
        classes = int(self.denoiser.model.label_dim)  # type: ignore[arg-type]
        label = torch.zeros(count, classes, dtype=self.dtype, device=self.device)
        label[:, self.class_label] = 1
        return label

    def to(self, device: torch.device | str) -> "NetworkPrior":
        """This prior on another device: a copy, or itself when it is there already."""
        # Only a tensor knows that "cuda" means "cuda:0".
        if torch.empty(0, device=device).device == self.device:
            return self
        moved = copy.copy(self)
        moved.denoiser = copy.deepcopy(self.denoiser).to(device)
        moved.device = next(moved.denoiser.parameters()).device
        return moved

    def trusted(self, sigma_range: tuple[float, float], gradient_error: float) -> "NetworkPrior":
        """This prior for other levels, where its gradient has that relative error at most."""
        other = copy.copy(self)
        other.sigma_range, other.gradient_error = sigma_range, gradient_error
        return other

    @property
    def size_multiple(self) -> int:
        """Heights and widths that the network takes are multiples of it."""
        return int(self.denoiser.patch * self.denoiser.model.size_multiple)  # type: ignore[operator]

    def for_images(self, height: int, width: int) -> "NetworkPrior":
        """This prior for images [C, height, width]: the same convolutions over the whole of a larger image.

        Nothing is resized: the network sees structures as large in pixels as they are. The batch shrinks as
        images grow, so that a batch takes the memory that it took (but one image is the least). Measured on
        brain-128 in docs/mri.md: better at every level than tiles of the trained size. Raises ValueError
        unless both are multiples of `size_multiple`.
        """
        shape = (self.image_shape[0], height, width)
        check_fits(self.denoiser, check_image_shape(shape))
        pixels = self.image_shape[1] * self.image_shape[2]
        fitted = self.with_batch_size(max(1, self.batch_size * pixels // (height * width)))
        fitted.image_shape = shape
        return fitted

    def save(self, path: str | Path, *, dtype: torch.dtype = torch.float16) -> None:
        """Write weights and header to `path` (.safetensors) for `load_prior`, parameters as `dtype`."""
        save_denoiser(
            path,
            self.denoiser,
            name=self.name,
            image_shape=self.image_shape,
            sigma_range=self.sigma_range,
            gradient_error=self.gradient_error,
            noise_floor=self.noise_floor,
            units=self.metadata.get("units", "[-1, 1]"),
            extra=self.metadata.get("extra", {}),
            dtype=dtype,
        )


def check_fits(denoiser: EDMDenoiser, image_shape: tuple[int, int, int]) -> None:
    """ValueError where the network cannot take images of this shape."""
    channels = denoiser.model.in_channels
    multiple = denoiser.patch * denoiser.model.size_multiple  # type: ignore[operator]
    if image_shape[0] * denoiser.patch**2 != channels:
        raise ValueError(
            f"image_shape {image_shape} does not fit the network: it takes {channels} channels at patch "
            f"{denoiser.patch}, that is {channels // denoiser.patch**2} image channels"  # type: ignore[operator]
        )
    if image_shape[1] % multiple or image_shape[2] % multiple:
        raise ValueError(
            f"image_shape {image_shape} does not fit the network: height and width must be multiples of "
            f"{multiple}"
        )


def _narrow_convolutions(denoiser: EDMDenoiser, dtype: torch.dtype) -> None:
    """Store the convolutions in half precision: casting them at every call would cost a pass over them.

    But the stem, which takes a float32 image (see SongUNet.forward).
    """
    for module in denoiser.modules():
        if isinstance(module, Conv2d) and module.weight is not None and module is not denoiser.model.stem:
            module.to(dtype)
