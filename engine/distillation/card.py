"""The model card of a distilled prior: what it is, what it was made of, how good it is, in Markdown."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from alpenglow._version import __version__
from alpenglow.distillation.config import Recipe
from alpenglow.io.files import atomic_path

_FASHION = """\
[Fashion-MNIST](https://github.com/zalandoresearch/fashion-mnist) (Xiao, Rasul and Vollgraf,
arXiv 1708.07747), MIT licence, from the Debian package `dataset-fashion-mnist`: the 60 000 images of its
training set, and no others. Held out: the whole test set, 10 000 images, which training never sees; the
figures below come from its first images."""

_ARRAY = """\
`{source}`; its licence is that of its owner. The array has no test set of its own, so the last 5 % of its
images (at least one) are held out: training never sees them, and the figures below come from them. Where
neighbours in the array are alike, as slices of a volume are, these figures flatter the prior."""

_CARD = """\
# {name}

An energy prior for {shape}, for posterior sampling with `alpenglow`:
E(x, sigma) = 0.5 ||x - psi(x, sigma)||^2, whose gradient G makes x - G the MMSE denoiser, so that the score
of p_sigma is -G / sigma^2. psi is a {backbone} with EDM preconditioning, distilled from a diffusion teacher
that was trained on the same images. Pixel values are in {units}.

```python
import alpenglow as ag

prior = ag.load_prior("{name}.safetensors")
```

## Data

{data}

## Training

```sh
{command}
```

trains the teacher with EDM's loss, then psi, which starts from the teacher's weights, by matching G to
x - D_teacher(x, sigma) with the weight 1 / sigma^2 + 1 / sigma_data^2. The recipe, defaults written out:

```yaml
{recipe}```

| stage | seconds |
| --- | --- |
{seconds}

{share} Measured with alpenglow {version} and torch {torch} on {threads}.

## Quality on held-out images

x = image + sigma n. The images carry the noise floor of the training data. Gradient error is
||G - (x - D_teacher)|| / ||x - D_teacher||; PSNR is that of x - G and of D_teacher against the image, for a
data range of 2.

| sigma | gradient error | PSNR, dB | teacher PSNR, dB | difference, dB |
| --- | --- | --- | --- | --- |
{rows}

{figures}
## Limits

- It knows {shape} of this kind and nothing else: given others it still
  answers, with intervals that say nothing about how wrong the prior is.
- Training images carry noise of standard deviation {floor} (the noise floor: 8-bit images have no density).
  Details below it are noise to this prior, its samples show that noise, and intervals are never narrower.
- Levels from {low} to {high} were trained. Gradient errors add to those of the sampler.
"""


def write_card(
    path: str | Path,
    recipe: Recipe,
    rows: Sequence[Mapping[str, float]],
    figures: Mapping[str, Any],
    command: str,
    seconds: Mapping[str, float],
) -> None:
    """Write the card to `path`, atomically.

    rows: of `evaluate_prior`. figures: what else was measured, coverage say, as {text: value}. command: what
    repeats the training. seconds: of each stage; "energy" is the distillation. Raises ValueError for no rows.
    """
    if not rows:
        raise ValueError("a model card needs at least one row of figures, got none; see evaluate_prior")
    total = sum(seconds.values())
    card = _CARD.format(
        name=recipe.name,
        shape=_shape(recipe),
        backbone=recipe.backbone,
        units=recipe.units,
        data=(_FASHION if recipe.data.source == "fashion-mnist" else _ARRAY).format(
            source=recipe.data.source
        ),
        command=command,
        recipe=yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False),
        seconds="\n".join(f"| {stage} | {value:.0f} |" for stage, value in seconds.items()),
        share=f"The distillation took {seconds.get('energy', 0) / total:.0%} of the time." if total else "",
        version=__version__,
        torch=torch.__version__,
        threads=f"{torch.get_num_threads()} CPU threads",
        rows="\n".join(map(_row, rows)),
        figures="".join(f"- {text}: {_number(value)}\n" for text, value in figures.items()),
        floor=f"{recipe.data.noise_floor:g}",
        low=f"{recipe.sigma.low:g}",
        high=f"{recipe.sigma.high:g}",
    )
    with atomic_path(path) as temporary:
        temporary.write_text(card, encoding="utf-8")


def _shape(recipe: Recipe) -> str:
    side = recipe.network["img_resolution"] * recipe.patch
    channels = recipe.network["in_channels"] // recipe.patch**2
    kind = {1: "grey", 2: "complex", 3: "colour"}.get(channels, f"{channels}-channel")
    return f"{kind} images of {side}x{side} pixels"


def _row(row: Mapping[str, float]) -> str:
    psnr, teacher = row["psnr"], row["teacher_psnr"]
    cells = f"{row['sigma']:g}", f"{row['gradient_error']:.3f}", f"{psnr:.2f}", f"{teacher:.2f}"
    return f"| {' | '.join(cells)} | {psnr - teacher:+.2f} |"


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
