"""The model card of a distilled prior: what it is, what it was made of, how good it is; text and pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from alpenglow._version import __version__
from alpenglow.distillation.config import Recipe, StageConfig
from alpenglow.distillation.evaluation import AVERAGED, PriorReport
from alpenglow.io.files import atomic_path

_ENERGIES = {
    "alps": ("E(x, sigma) = 0.5 ||x - psi(x, sigma)||^2", "psi is"),
    "product": ("E(x, sigma) = 0.5 <x - a(x, sigma), x - psi(x, sigma)>", "psi and a are two heads of"),
}
_WEIGHTS = {"excess": "1 / ||D_teacher - x||^2", "edm": "1 / sigma^2 + 1 / sigma_data^2"}
_CARD = """\
# {name}

An energy prior for {shape}, for posterior sampling with `alpenglow`:
{energy}, whose gradient G makes x - G the MMSE denoiser, so that the score
of p_sigma is -G / sigma^2. {network} a {backbone} with EDM preconditioning{parameters}, distilled from
{teacher}. Units: {units}.

```python
import alpenglow as ag

prior = ag.load_prior("{name}.safetensors")
```

![Samples](./{name}-samples.png)

Left: held-out images. Right: unconditional samples of the prior.{magnitude}

## Data

{data}

## Training

```sh
{command}
```

{training} The recipe, defaults written out:

```yaml
{recipe}```

{seconds}

Measured with alpenglow {version} and torch {torch} on {threads}.

{quality}
## Limits

- It knows {shape} of this kind and nothing else: given others it still
  answers, with intervals that say nothing about how wrong the prior is.
- Training images carry noise of standard deviation {floor} (the noise floor: quantised images have no
  density). Details below it are noise to this prior, its samples show that noise, and intervals are never
  narrower.
- Levels from {low} to {high} were trained. Gradient errors add to those of the sampler.
"""

_QUALITY = """\
## Quality on held-out images

x = image + sigma n. The images carry the noise floor of the training data. Gradient error is
||G - (x - D_teacher)|| / ||x - D_teacher||; PSNR is that of x - G and of D_teacher against the image, for a
data range of 2.

{levels}

Mean gradient error over sigma in [{low:g}, {high:g}], even in log sigma: **{error:.1%}**.

![Gradient error and PSNR](./{name}-levels.png)

### As an energy

Largest relative difference between a central difference of E and G, in float64: {consistency:.1e}.

Probability that an image has less energy than an altered one (area under the ROC curve): blurred by a
Gaussian of 1.5 pixels; with white noise of a tenth of the images' standard deviation; scrambled, that is
with its own power spectrum and random phases.

{ranking}

### Other figures

{figures}"""


def write_card(
    path: str | Path,
    recipe: Recipe,
    report: PriorReport,
    data: str,
    *,
    command: str,
    seconds: Mapping[str, float],
    parameters: int | None = None,
) -> None:
    """Write the card to `path` (.md), and its pictures <name>-samples.png and <name>-levels.png beside it.

    data: the description of the images. command: what repeats the training. seconds: of each stage, "teacher"
    and "energy". Each file is written whole or not at all, the card last.
    """
    path = Path(path)
    trained = isinstance(recipe.teacher, StageConfig)
    shape = tuple(report.images.shape[1:])
    energy, network = _ENERGIES[recipe.form]
    write_pictures(path.parent, recipe.name, report)
    given = f"matches G to x - D_teacher(x, sigma) with the weight {_WEIGHTS[recipe.weight]}."
    card = _CARD.format(
        name=recipe.name,
        shape=_kind(shape),
        energy=energy,
        network=network,
        backbone=recipe.backbone,
        parameters=f" and {parameters:,} parameters" if parameters else "",
        teacher="a diffusion teacher that was trained on the same images" if trained else "a given teacher",
        units=recipe.units,
        magnitude=" Of complex images the magnitude is shown." if shape[0] == 2 else "",
        data=data,
        command=command,
        training=(
            "trains the teacher with EDM's loss, then psi, which starts from the teacher's weights; it "
            if trained
            else "trains psi; it "
        )
        + given,
        recipe=yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False),
        seconds=_cost(seconds),
        version=__version__,
        torch=torch.__version__,
        threads=_device(),
        quality=quality(report, recipe.name),
        floor=f"{recipe.data.noise_floor:g}",
        low=f"{recipe.sigma.low:g}",
        high=f"{recipe.sigma.high:g}",
    )
    with atomic_path(path) as temporary:
        temporary.write_text(card, encoding="utf-8")


def quality(report: PriorReport, name: str) -> str:
    """The section on quality, in Markdown; refers to the pictures of `write_pictures`."""
    rows = [
        [
            f"{row['sigma']:g}", f"{row['gradient_error']:.3f}", f"{row['psnr']:.2f}",
            f"{row['teacher_psnr']:.2f}", f"{row['psnr'] - row['teacher_psnr']:+.2f}",
        ]
        for row in report.levels
    ]  # fmt: skip
    return _QUALITY.format(
        name=name,
        levels=_table(["sigma", "gradient error", "PSNR, dB", "teacher PSNR, dB", "difference, dB"], rows),
        low=AVERAGED[0],
        high=AVERAGED[1],
        error=report.mean_gradient_error,
        consistency=report.gradient_consistency,
        ranking=_table(
            ["sigma", "blurred", "noisy", "scrambled"],
            [
                [f"{row.pop('sigma'):g}", *(f"{v:.3f}" for v in row.values())]
                for row in map(dict, report.ranking)
            ],
        ),
        figures="".join(f"- {text}: {_number(value)}\n" for text, value in report.figures.items()),
    )


def write_pictures(folder: Path, name: str, report: PriorReport) -> None:
    """<name>-samples.png: held-out images beside samples. <name>-levels.png: errors and PSNR by level."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    mosaic = torch.cat([_mosaic(report.images), _mosaic(report.samples)], dim=2)
    grey = mosaic.shape[0] == 1
    pixels = mosaic[0] if grey else mosaic.permute(1, 2, 0)
    with atomic_path(folder / f"{name}-samples.png") as temporary:
        pyplot.imsave(temporary, pixels.numpy(), **({"cmap": "gray", "vmin": 0, "vmax": 1} if grey else {}))

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    sigma = [row["sigma"] for row in report.levels]
    left.semilogx(sigma, [100 * row["gradient_error"] for row in report.levels], "o-", color="C3")
    left.set(xlabel="sigma", ylabel="gradient error, %", ylim=(0, None))
    right.semilogx(sigma, [row["teacher_psnr"] for row in report.levels], "s-", color="0.6", label="teacher")
    right.semilogx(sigma, [row["psnr"] for row in report.levels], "o-", color="C0", label="energy")
    right.set(xlabel="sigma", ylabel="denoised PSNR, dB")
    right.legend()
    with atomic_path(folder / f"{name}-levels.png") as temporary:
        figure.savefig(temporary, dpi=110)
    pyplot.close(figure)


def _mosaic(images: Tensor) -> Tensor:
    """Images [N, C, H, W] side by side, [1 or 3, .., ..] in [0, 1]; of complex images the magnitude."""
    shown = images.square().sum(1, keepdim=True).sqrt() if images.shape[1] == 2 else (images + 1) / 2
    columns = min(4, len(shown))
    shown = shown[: len(shown) // columns * columns].clamp(0, 1)
    rows = shown.unflatten(0, (-1, columns))
    return torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)


def _cost(seconds: Mapping[str, float]) -> str:
    table = _table(["stage", "seconds"], [[stage, f"{value:.0f}"] for stage, value in seconds.items()])
    if seconds.get("teacher"):
        share = seconds.get("energy", 0) / seconds["teacher"]
        table += f"\n\nThe distillation cost {share:.0%} of the teacher's training."
    return table


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def _kind(shape: tuple[int, ...]) -> str:
    kind = {1: "grey", 2: "complex", 3: "colour"}.get(shape[0], f"{shape[0]}-channel")
    return f"{kind} images of {shape[1]}x{shape[2]} pixels"


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU threads"


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
