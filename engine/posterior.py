"""The result of sampling: moments, samples, uncertainty and what is known about its accuracy."""

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from alpenglow import statistics
from alpenglow.io.results import read_result, write_result

if TYPE_CHECKING:
    import arviz

_TENSORS = ("mean", "std", "energy", "samples", "reservoir", "map_image", "truth")


@dataclass(frozen=True, eq=False, repr=False)
class Posterior:
    """Samples of p(x | y) and their statistics; images in the prior's units, on the device they were given
    on.

    mean, std [C, H, W]: MMSE image and unbiased posterior standard deviation (NaN for one sample). energy
    [N]: energy of each final sample. nfe: energy-gradient evaluations per sample, everything included.
    samples [N, C, H, W], or None when they were not kept; then `reservoir` [k, C, H, W] may hold a uniform
    subset for quantiles. diagnostics: numbers, text, lists, and numpy arrays. `from_samples` puts in: ess,
    mcse, r_hat [C, H, W] (see statistics.py for what each can and cannot see), r_hat_max, r_hat_median,
    ess_pooled, lineages. settings: how it was made, JSON-able. Raises ValueError on shapes that do not fit
    and values that are not finite.
    """

    mean: Tensor
    std: Tensor
    energy: Tensor
    nfe: float
    samples: Tensor | None = None
    reservoir: Tensor | None = None
    map_image: Tensor | None = None
    truth: Tensor | None = None
    diagnostics: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.mean.ndim != 3 or self.energy.ndim != 1 or len(self.energy) == 0:
            raise ValueError(
                f"got mean {tuple(self.mean.shape)} and energy {tuple(self.energy.shape)}; "
                "expected [C, H, W] and [N]"
            )
        expected: dict[str, tuple[int, ...]] = {
            name: tuple(self.mean.shape) for name in ("std", "map_image", "truth")
        }
        expected["samples"] = (len(self.energy), *self.mean.shape)
        expected["reservoir"] = (0 if self.reservoir is None else len(self.reservoir), *self.mean.shape)
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"got {name} of shape {tuple(tensor.shape)}; expected {shape}")
        for name in ("mean", "energy", "map_image", "truth"):
            tensor = getattr(self, name)
            if tensor is not None and not tensor.isfinite().all():
                raise ValueError(f"{name} holds NaN or infinity")
        if not (np.isfinite(self.nfe) and self.nfe >= 0):
            raise ValueError(f"nfe must be a finite number, 0 or more; got {self.nfe}")
        try:
            object.__setattr__(self, "settings", json.loads(json.dumps(self.settings)))
        except TypeError as error:
            raise ValueError(f"settings must be JSON-able: {error}") from error
        object.__setattr__(
            self, "diagnostics", {name: _plain(name, v) for name, v in self.diagnostics.items()}
        )

    @classmethod
    def from_samples(
        cls,
        samples: Tensor,
        *,
        energy: Tensor,
        nfe: float,
        ancestors: Tensor | None = None,
        diagnostics: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> "Posterior":
        """From samples [N, C, H, W] of equal weight with energies [N].

        ancestors [N]: founding chain of each sample where a population was resampled; error estimates then
        count lineages, not samples. Entries of `diagnostics` go before computed ones of the same name. Raises
        ValueError on wrong shapes and on samples that are not finite.
        """
        computed = statistics.sample_statistics(samples, ancestors)
        broken = (~samples.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
        if broken:
            raise ValueError(
                f"{len(broken)} of {len(samples)} samples hold NaN or infinity (the first: {broken[:5]}): "
                "these chains diverged; leave them out, or sample with a smaller step"
            )
        derived: dict[str, Any] = {
            "ess": computed.ess.float(),
            "ess_pooled": computed.ess_pooled,
            "mcse": computed.mcse.float(),
            "lineages": computed.lineages,
        }
        if len(samples) >= 8:
            r_hat = statistics.r_hat(samples, ancestors).float()
            derived |= {
                "r_hat": r_hat,
                "r_hat_max": r_hat.max().item(),
                "r_hat_median": r_hat.median().item(),
            }
        return cls(
            mean=computed.mean.float(),
            std=computed.std.float(),
            energy=energy,
            nfe=nfe,
            samples=samples,
            diagnostics=derived | dict(diagnostics or {}),
            settings=dict(settings or {}),
        )

    @classmethod
    def from_stream(
        cls,
        moments: statistics.RunningMoments,
        *,
        energy: Tensor,
        nfe: float,
        reservoir: statistics.Reservoir | None = None,
        diagnostics: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> "Posterior":
        """From streaming statistics of independent chains, when samples are not kept.

        A resampled population has to come through `from_samples`: a stream does not know lineages. energy
        [N].
        """
        count = moments.effective_count
        if count == 0:
            raise ValueError("the stream holds no samples; call statistics.update with each finished batch")
        derived = {"ess_pooled": count, "mcse": (moments.std / count**0.5).float()}
        return cls(
            mean=moments.mean.float(),
            std=moments.std.float(),
            energy=energy,
            nfe=nfe,
            reservoir=None if reservoir is None else reservoir.samples,
            diagnostics=derived | dict(diagnostics or {}),
            settings=dict(settings or {}),
        )

    @property
    def num_samples(self) -> int:
        """Number of samples drawn, kept or not."""
        return len(self.energy)

    @property
    def effective_samples(self) -> float:
        """Number of independent samples that these are worth, pooled over pixels."""
        return float(self.diagnostics.get("ess_pooled", self.num_samples))

    def with_map(self, image: Tensor) -> "Posterior":
        """This posterior with a MAP image [C, H, W]."""
        return replace(self, map_image=image)

    def with_truth(self, image: Tensor) -> "Posterior":
        """This posterior with the true image [C, H, W]."""
        return replace(self, truth=image)

    def scaled(self, factor: float) -> "Posterior":
        """This posterior with images in other units: `factor` of the new ones are one of the old."""
        images: dict[str, Any] = {
            name: None if (image := getattr(self, name)) is None else image * factor
            for name in _TENSORS
            if name != "energy"
        }
        known = self.diagnostics
        mcse = {"mcse": known["mcse"] * factor} if "mcse" in known else {}
        return replace(self, **images, diagnostics=known | mcse)

    def magnitude(self) -> "Posterior":
        """The posterior of |x| [1, H, W] for complex images x [2, H, W]; its mean is E |x|, not |E x|.

        Raises ValueError for other images, and where the samples were not kept.
        """
        if len(self.mean) != 2 or self.samples is None:
            raise ValueError(
                f"magnitudes need samples of complex images [N, 2, H, W]; got images {tuple(self.mean.shape)}"
                + ("" if self.samples is not None else ", and no samples")
            )
        kept = ("ess_pooled", "lineages")
        known: dict[str, Any] = {key: self.diagnostics[key] for key in kept if key in self.diagnostics}
        moduli = Posterior.from_samples(
            self.samples.norm(dim=1, keepdim=True), energy=self.energy, nfe=self.nfe, diagnostics=known,
            settings=self.settings,
        )  # fmt: skip
        images: dict[str, Any] = {
            name: None if (image := getattr(self, name)) is None else image.norm(dim=0, keepdim=True)
            for name in ("map_image", "truth")
        }
        return replace(moduli, **images)

    def quantile(self, q: float | Sequence[float]) -> Tensor:
        """Sample quantiles per pixel: [C, H, W] for one q, [Q, C, H, W] for several.

        Exact over the samples, or over the reservoir with its stated error. Raises ValueError where neither
        was kept.
        """
        return statistics.quantile(self._any_samples(), q)

    def interval(self, level: float = 0.9, *, kind: str = "predictive") -> tuple[Tensor, Tensor]:
        """Lower and upper bound [C, H, W] of a central interval of probability `level`.

        "predictive": Student-t for a new draw, right for any number of samples where marginals are Gaussian.
        "quantile": between sample quantiles, free of that assumption, too narrow for few samples (32 samples:
        0.85 instead of 0.90). Raises ValueError on another kind, level outside (0, 1), or too few samples.
        """
        if kind == "predictive":
            return statistics.student_t_interval(self.mean, self.std, self.effective_samples, level)
        if kind == "quantile":
            return statistics.quantile_interval(self._any_samples(), level)
        raise ValueError(f'kind must be "predictive" or "quantile", got {kind!r}')

    def coverage(self, truth: Tensor | None = None, level: float = 0.9, *, kind: str = "predictive") -> float:
        """Share of pixels whose interval holds the truth [C, H, W] (the posterior's own if not given)."""
        truth = self.truth if truth is None else truth
        if truth is None or truth.shape != self.mean.shape:
            got = None if truth is None else tuple(truth.shape)
            raise ValueError(f"got truth {got}; expected an image {tuple(self.mean.shape)}")
        lower, upper = self.interval(level, kind=kind)
        truth = truth.to(lower.device)
        return ((lower <= truth) & (truth <= upper)).float().mean().item()

    def save(self, path: str | Path, *, samples: Iterable[Tensor] | None = None) -> None:
        """Write an HDF5 file, whole or not at all. Raises OSError where the disk refuses.

        samples: blocks [n, C, H, W] of the samples of a posterior that does not keep them, written one by one
        in place of its reservoir.
        """
        tensors = {name: getattr(self, name) for name in _TENSORS} | {
            "nfe": torch.tensor(self.nfe, dtype=torch.float64)
        }
        blocks = None
        if samples is not None:
            tensors["reservoir"], blocks = None, {"samples": samples}
        write_result(path, tensors, self.diagnostics, self.settings, blocks)

    @classmethod
    def load(cls, path: str | Path) -> "Posterior":
        """Read what `save` wrote, onto the CPU.

        Raises ValueError when the file is missing, truncated, foreign or of another schema version.
        """
        tensors, diagnostics, settings = read_result(path, (*_TENSORS, "nfe"))
        missing = [name for name in ("mean", "std", "energy", "nfe") if tensors[name] is None]
        if missing:
            raise ValueError(f"cannot load {path}: it lacks {', '.join(missing)}")
        nfe = tensors.pop("nfe").item()  # type: ignore[union-attr]
        return cls(nfe=nfe, diagnostics=diagnostics, settings=settings, **tensors)  # type: ignore[arg-type]

    def to_arviz(self) -> "arviz.InferenceData":
        """ArviZ InferenceData: posterior["image"] (chain = 1, draw = N, channel, row, column).

        Every chain of ours gives one draw, and draws are independent: that is one ArviZ chain of N draws.
        After resampling draws share ancestors and ArviZ cannot know: trust `diagnostics` instead.
        sample_stats: energy; constant_data: map_image and truth; attributes: settings as JSON. Raises
        ValueError without samples.
        """
        if self.samples is None:
            raise ValueError("to_arviz needs the samples, which were not kept; sample with them kept")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # ArviZ announces its version 1 at every import
            import arviz  # takes a second and a half
        images = {"map_image": self.map_image, "truth": self.truth}
        constants = {name: image.cpu().numpy() for name, image in images.items() if image is not None}
        dims = ["channel", "row", "column"]
        return arviz.from_dict(
            posterior={"image": self.samples.cpu().numpy()[None]},
            sample_stats={"energy": self.energy.cpu().numpy()[None]},
            constant_data=constants or None,
            dims={"image": dims} | {name: dims for name in constants},
            attrs={"settings": json.dumps(self.settings), "nfe": self.nfe},
        )

    def plot(self, path: str | Path, *, max_samples: int = 4) -> None:
        """Draw truth, mean, std, MAP, error and the first samples into a PNG file."""
        from alpenglow.plotting import plot_posteriors  # matplotlib is slow to import, and few need it

        plot_posteriors([self], path, max_samples=max_samples)

    def _any_samples(self) -> Tensor:
        samples = self.reservoir if self.samples is None else self.samples
        if samples is None:
            raise ValueError(
                "quantiles need samples or a reservoir, and neither was kept; sample with samples kept"
            )
        return samples

    def __repr__(self) -> str:
        kept = "kept" if self.samples is not None else "not kept"
        text = [
            f"{self.num_samples} samples ({kept}) of {'x'.join(map(str, self.mean.shape))}",
            f"std {self.std.median().item():.3g} (median), {self.std.max().item():.3g} (max)",
            f"ESS {self.effective_samples:.0f}",
            f"{self.nfe:g} NFE a sample",
        ]
        if self.diagnostics.get("lineages", self.num_samples) < self.num_samples:
            text.append(f"{self.diagnostics['lineages']} lineages")
        if "method" in self.settings:
            text.insert(0, str(self.settings["method"]))
        return f"Posterior({'; '.join(text)})"


def _plain(name: str, value: Any) -> Any:
    """A diagnostic as plain Python or a numpy array, so that results do not hold device memory."""
    if not name or "/" in name or name == ".":
        raise ValueError(f"{name!r} cannot name a diagnostic: it must not be empty or hold '/'")
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return value if value.ndim else value.item()
    if isinstance(value, np.generic):
        return value.item()
    try:
        return json.loads(json.dumps(value))
    except TypeError as error:
        raise ValueError(
            f"diagnostic {name} must be a number, text, a list or a numeric array: {error}"
        ) from error
