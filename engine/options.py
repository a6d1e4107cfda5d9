"""Options that commands of the command line share."""

from pathlib import Path
from typing import Annotated

import typer

PROBLEM, OPERATOR, METHOD = "Problem", "Operator", "Method"

Image = Annotated[
    Path | None,
    typer.Argument(metavar="IMAGE", help="Measurement (PNG, TIFF, NPY); with --simulate, a clean image."),
]
PriorName = Annotated[
    str | None,
    typer.Option("--prior", "-p", help="Zoo, file, bundle or hub:owner/name.", rich_help_panel=PROBLEM),
]
NoiseStd = Annotated[
    float | None,
    typer.Option(help="Noise std of the measurement; images span -1 to 1.", rich_help_panel=PROBLEM),
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Folder for the results.", rich_help_panel=PROBLEM)
]
Simulate = Annotated[
    bool | None,
    typer.Option("--simulate", help="Measure IMAGE with operator and noise first.", rich_help_panel=PROBLEM),
]
Truth = Annotated[
    Path | None,
    typer.Option(help="True image: adds PSNR, SSIM and coverage.", rich_help_panel=PROBLEM),
]
JobFile = Annotated[
    Path | None,
    typer.Option("--job", "-j", help="YAML file of these fields; options go first.", rich_help_panel=PROBLEM),
]
SCAN = "Scan (multi-coil k-space)"
Maps = Annotated[
    str | None,
    typer.Option(help="espirit (default), or a file of coil maps: NPY, CFL, H5.", rich_help_panel=SCAN),
]
Slices = Annotated[
    str | None, typer.Option(metavar="FIRST:END", help="Slices to do (all).", rich_help_panel=SCAN)
]
WithMap = Annotated[
    bool | None, typer.Option("--map", help="Search the MAP image of each slice too.", rich_help_panel=SCAN)
]
Kind = Annotated[
    str | None,
    typer.Option(
        "--operator",
        help="denoising, inpainting, box-inpainting, random-inpainting, gaussian-blur, motion-blur, "
        "super-resolution or fourier-sampling.",
        rich_help_panel=OPERATOR,
    ),
]
Mask = Annotated[
    Path | None,
    typer.Option(
        help="inpainting, fourier-sampling: PNG, TIFF (white: measured) or NPY (1: measured).",
        rich_help_panel=OPERATOR,
    ),
]
Box = Annotated[
    tuple[int, int, int, int] | None,
    typer.Option(
        metavar="TOP LEFT HEIGHT WIDTH", help="box-inpainting: hidden box.", rich_help_panel=OPERATOR
    ),
]
Keep = Annotated[
    float | None, typer.Option(help="random-inpainting: share of pixels kept.", rich_help_panel=OPERATOR)
]
Sigma = Annotated[float | None, typer.Option(help="gaussian-blur: std, pixels.", rich_help_panel=OPERATOR)]
Length = Annotated[float | None, typer.Option(help="motion-blur: pixels.", rich_help_panel=OPERATOR)]
Angle = Annotated[float | None, typer.Option(help="motion-blur: degrees.", rich_help_panel=OPERATOR)]
Factor = Annotated[int | None, typer.Option(help="super-resolution: integer.", rich_help_panel=OPERATOR)]
Filter = Annotated[
    str | None,
    typer.Option(help="super-resolution: box, gaussian or bicubic.", rich_help_panel=OPERATOR),
]
Seed = Annotated[int | None, typer.Option(help="Seed of noise and chains (0).", rich_help_panel=METHOD)]
Device = Annotated[str | None, typer.Option(help="cpu (default) or cuda.", rich_help_panel=METHOD)]
NumSamples = Annotated[int | None, typer.Option(help="Posterior samples (64).", rich_help_panel=METHOD)]
TargetError = Annotated[
    float | None,
    typer.Option(
        help="Instead: go on until mean and std are known to so much, at most num_samples (16384).",
        rich_help_panel=METHOD,
    ),
]
Method = Annotated[
    str | None,
    typer.Option(help="calibrated (default), alps, mala, kinetic-metropolis.", rich_help_panel=METHOD),
]
Nfe = Annotated[
    int | None,
    typer.Option(help="Gradient evaluations a sample (calibrated: 100).", rich_help_panel=METHOD),
]
MaxIterations = Annotated[int | None, typer.Option(help="Steps at most (300).", rich_help_panel=METHOD)]
