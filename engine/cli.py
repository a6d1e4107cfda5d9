"""The command line: `alpenglow COMMAND --help` shows an example of each command."""

import importlib
import json
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alpenglow import options
from alpenglow._version import __version__
from alpenglow.console import Commands, print_facts, print_table, progress_bar

if TYPE_CHECKING:
    from torch import Tensor

    from alpenglow.jobs import Job, Task
    from alpenglow.mri.job import ScanJob
    from alpenglow.posterior import Posterior

# torch and matplotlib take seconds to import: each command imports what it needs, and --help none of it.

RESULTS, IMAGES = (".h5", ".hdf5"), (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".npy")

app = typer.Typer(
    cls=Commands,
    epilog="Bad input ends with exit code 2, a failed run with 1; ALPENGLOW_DEBUG=1 shows the traceback.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _example(lines: str) -> str:
    """An epilog whose line breaks stay: \\b is typer's sign for that."""
    return "\n\n".join(f"\b\n{paragraph.strip()}" for paragraph in f"Example:\n{lines.strip()}".split("\n\n"))


def main() -> None:
    """The entry point `alpenglow`."""
    # By default a SIGTERM ends Python at once, and what a run had half written would stay.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    app(prog_name="alpenglow")


@app.callback(invoke_without_command=True)
def alpenglow(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Calibrated posterior sampling for imaging inverse problems."""
    if version:
        typer.echo(f"alpenglow {__version__}")
        raise typer.Exit


@app.command(epilog=_example("alpenglow demo -o demo/"))
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path("demo"),
    prior: Annotated[str, typer.Option("--prior", "-p", help="Zoo, file or hub:owner/name.")] = "fashion-28",
    images: Annotated[int, typer.Option(help="Number of held-out images, 1 to 64.")] = 2,
    num_samples: Annotated[int, typer.Option(help="Posterior samples of each.")] = 64,
    nfe: Annotated[int, typer.Option(help="Gradient evaluations a sample.")] = 50,
    device: options.Device = None,
) -> None:
    """Inpaint held-out Fashion-MNIST images of which half of the pixels are hidden."""
    from alpenglow.demo import BATCH_SIZE, COLUMNS, rows, run, total
    from alpenglow.loading import load_prior

    single = load_prior(prior, batch_size=1, device=device)  # the MAP search has one image at a time
    with progress_bar("demo") as progress:
        figures = run(
            load_prior(prior, batch_size=BATCH_SIZE, device=device), output, map_prior=single,
            count=images, num_samples=num_samples, nfe=nfe, progress=progress,
        )  # fmt: skip
    print_table(COLUMNS, rows(figures), total=total(figures))
    typer.echo(f"\nPicture: {output / 'demo.png'}; posteriors: {output / 'demo-*.h5'}")


RECONSTRUCT = """
alpenglow reconstruct boot.png --simulate --prior fashion-28 \\
  --operator random-inpainting --keep 0.5 --noise-std 0.05 -o out/

alpenglow reconstruct measured.npy --job job.yaml --num-samples 256
with this in job.yaml (its paths start from its folder):
  prior: fashion-28
  operator: {kind: inpainting, mask: mask.png}
  noise_std: 0.05
  output: out

alpenglow reconstruct scan.h5 --prior brain-128 --maps espirit --num-samples 64 -o out/
"""


@app.command(epilog=_example(RECONSTRUCT))
def reconstruct(
    image: options.Image = None,
    prior: options.PriorName = None,
    noise_std: options.NoiseStd = None,
    output: options.Output = None,
    simulate: options.Simulate = None,
    truth: options.Truth = None,
    job: options.JobFile = None,
    operator: options.Kind = None,
    mask: options.Mask = None,
    box: options.Box = None,
    keep: options.Keep = None,
    sigma: options.Sigma = None,
    length: options.Length = None,
    angle: options.Angle = None,
    factor: options.Factor = None,
    filter: options.Filter = None,
    maps: options.Maps = None,
    slices: options.Slices = None,
    map_images: options.WithMap = None,
    num_samples: options.NumSamples = None,
    target_error: options.TargetError = None,
    method: options.Method = None,
    nfe: options.Nfe = None,
    seed: options.Seed = None,
    device: options.Device = None,
) -> None:
    """Draw posterior samples for a measurement, or for every slice of a scan.

    Writes result.h5 (all of it), mean.png (complex: mean.npy), std.npy and summary.png.

    With --simulate also measurement.npy, and mask.png if there is a mask.

    Of a scan (fastMRI or ISMRMRD .h5, .mrd, BART .cfl; .npy with --maps): mean, std, lower, upper (.nii.gz),
    reconstruction.h5, and slices/. A run that was stopped goes on at the slice it was at.
    """
    from alpenglow.api import sample
    from alpenglow.io import write_image
    from alpenglow.io.folders import atomic_folder
    from alpenglow.jobs import load_job, prepare
    from alpenglow.mri.job import scan_job
    from alpenglow.plotting import plot_posteriors

    fields = _fields(locals()) | {"maps": maps, "slices": slices, "map": map_images}
    if scan := scan_job(fields, job):
        return _reconstruct_scan(scan)
    chosen = load_job(fields, job)
    task = prepare(chosen)
    with atomic_folder(chosen.output) as folder:
        with progress_bar("sampling") as progress:
            posterior = sample(
                task.prior, task.operator, task.y,
                noise_std=chosen.noise_std, progress=progress, **chosen.sampling(),
            )  # fmt: skip
        posterior.settings["job"] = chosen.model_dump(mode="json")
        posterior = posterior if task.truth is None else posterior.with_truth(task.truth)
        posterior.save(folder / "result.h5")
        write_image(folder / f"mean{_suffix(posterior.mean)}", posterior.mean)
        write_image(folder / "std.npy", posterior.std)
        plot_posteriors([posterior], folder / "summary.png", measurements=[task.y])
        _write_measurement(chosen, task, folder)
    _print_posterior(posterior, task.truth)
    typer.echo(f"\nResults: {chosen.output}")


@app.command(
    "map",
    epilog=_example(
        "alpenglow map boot.png --simulate --prior fashion-28 \\\n"
        "  --operator gaussian-blur --sigma 1.5 --noise-std 0.05 -o out/"
    ),
)
def map_(
    image: options.Image = None,
    prior: options.PriorName = None,
    noise_std: options.NoiseStd = None,
    output: options.Output = None,
    simulate: options.Simulate = None,
    truth: options.Truth = None,
    job: options.JobFile = None,
    operator: options.Kind = None,
    mask: options.Mask = None,
    box: options.Box = None,
    keep: options.Keep = None,
    sigma: options.Sigma = None,
    length: options.Length = None,
    angle: options.Angle = None,
    factor: options.Factor = None,
    filter: options.Filter = None,
    max_iterations: options.MaxIterations = None,
    seed: options.Seed = None,
    device: options.Device = None,
) -> None:
    """Find the image of highest posterior density; writes map.png (complex: map.npy) and map.json."""
    from alpenglow.api import find_map
    from alpenglow.evaluation import psnr, ssim
    from alpenglow.io import write_image
    from alpenglow.io.folders import atomic_folder
    from alpenglow.jobs import load_job, prepare

    chosen = load_job(_fields(locals()), job)
    task = prepare(chosen, batch_size=1)
    with atomic_folder(chosen.output) as folder:
        began = time.perf_counter()
        with progress_bar("MAP") as progress:
            estimate = find_map(
                task.prior, task.operator, task.y,
                noise_std=chosen.noise_std, max_iterations=chosen.max_iterations, progress=progress,
            )  # fmt: skip
        facts: dict[str, Any] = {
            "converged": estimate.converged,
            "iterations": len(estimate.objective) - 1,
            "sigma": estimate.sigma,
            "nfe": estimate.nfe,
            "seconds": time.perf_counter() - began,
        }
        if task.truth is not None:
            facts |= {"psnr": psnr(estimate.image, task.truth), "ssim": ssim(estimate.image, task.truth)}
        write_image(folder / f"map{_suffix(estimate.image)}", estimate.image)
        record = facts | {"objective": estimate.objective, "job": chosen.model_dump(mode="json")}
        (folder / "map.json").write_text(json.dumps(record, indent=1) + "\n")
        _write_measurement(chosen, task, folder)
    print_facts(facts | {"objective": f"{estimate.objective[0]:.6g} -> {estimate.objective[-1]:.6g}"})
    typer.echo(f"\nResults: {chosen.output}")


@app.command(epilog=_example("alpenglow info\nalpenglow info fashion-28\nalpenglow info out/result.h5"))
def info(
    source: Annotated[
        str | None, typer.Argument(metavar="[PRIOR|FILE]", help="Prior (as --prior), .h5 or image.")
    ] = None,
) -> None:
    """Show versions, device and zoo, or what a prior, a result or an image file holds."""
    from alpenglow import report

    suffix = Path(source or "").suffix.lower()
    if source is None:
        print_facts(report.machine(), "alpenglow")
        print_facts(report.zoo(), "\nzoo")
    elif suffix in RESULTS:
        from alpenglow.posterior import Posterior

        posterior = Posterior.load(source)
        print_facts(posterior.settings, "settings")
        _print_posterior(posterior, posterior.truth)
    elif suffix in IMAGES:
        print_facts(report.image(Path(source)), source)
    else:
        print_facts(report.prior(source), source)


@app.command(
    epilog=_example(
        "alpenglow convert edm-cifar10-32x32-uncond-vp.pkl teacher.safetensors\n"
        "alpenglow convert alps.pth prior.safetensors --kind energy --config alps.yaml"
    )
)
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="EDM pickle (.pkl), or .pt, .pth.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="File to write, .safetensors.")],
    kind: Annotated[str | None, typer.Option(help="energy (ALPS) or teacher (EDM).")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML: network, sigma_data, image_shape ...")] = None,
    name: Annotated[str | None, typer.Option(help="Name in the header (that of SRC).")] = None,
) -> None:
    """Turn a foreign checkpoint into .safetensors; nothing in the checkpoint is ever run."""
    from alpenglow import report
    from alpenglow.networks.convert import convert_checkpoint

    if kind not in (None, "energy", "teacher"):
        raise ValueError(f"kind is {kind!r}; expected energy or teacher")
    convert_checkpoint(source, target, config=config, name=name, kind=kind)  # type: ignore[arg-type]
    print_facts(report.prior(str(target)), str(target))


EXPORT = """
alpenglow export fashion-28 -o fashion-28-bundle
alpenglow reconstruct boot.png --simulate --prior fashion-28-bundle \\
  --operator denoising --noise-std 0.2 -o out/
"""


@app.command(epilog=_example(EXPORT))
def export(
    prior: Annotated[str, typer.Argument(metavar="PRIOR", help="Zoo, .safetensors or hub:owner/name.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the bundle, or the repository.")],
    format: Annotated[str, typer.Option(help="onnx, tensorrt or tensorrt-rtx.")] = "onnx",
    precision: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    batch: Annotated[
        str, typer.Option(help="Smallest, best and largest, for engine and server.")
    ] = "1,16,64",
    layout: Annotated[str, typer.Option(help="bundle, or triton-server: a model repository.")] = "bundle",
    class_label: Annotated[int | None, typer.Option(help="For a class-conditional prior: the class.")] = None,
) -> None:
    """Write energy and gradient as a bundle that ONNX Runtime, OpenVINO and TensorRT run.

    What is written was compared with float64. tensorrt adds an engine for this machine's GPU, tensorrt-rtx
    one that needs no GPU to be built. triton-server: NVIDIA's Triton Inference Server.
    """
    from alpenglow.export.command import run

    with progress_bar("export") as progress:
        written = run(
            prior, output, format=format, precision=precision, batch=batch, layout=layout,
            class_label=class_label, progress=progress,
        )  # fmt: skip
    print_facts({f"error at sigma {sigma}": error for sigma, error in written.manifest.parity.items()})
    for path in written.paths:
        typer.echo(f"Results: {path}")


@app.command(epilog=_example("alpenglow distill engine/priors/zoo/fashion-28.yaml -o runs/fashion-28"))
def distill(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML recipe: data, network, stages.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for checkpoints and weights.")],
    workers: Annotated[int, typer.Option(min=0, help="Processes that prepare images (0: none).")] = 0,
) -> None:
    """Train a teacher, distil an energy prior from it, and write weights and model card.

    A run that was stopped goes on where it stopped when it is started again. On several GPUs or machines:
    torchrun --nproc_per_node 4 -m alpenglow distill RECIPE -o FOLDER, or accelerate launch in the same way.
    """
    from alpenglow.distillation import pipeline

    pipeline.run(recipe, output, workers=workers)
    typer.echo(f"Results: {output}")


@app.command(
    epilog=_example(
        "alpenglow evaluate out/result.h5 --truth boot.png\n"
        "alpenglow evaluate fashion-28 \\\n"
        "  --teacher runs/fashion-28/fashion-28-teacher.safetensors -o report/"
    )
)
def evaluate(
    source: Annotated[str, typer.Argument(metavar="RESULT|PRIOR", help="Result .h5, or a prior.")],
    truth: Annotated[Path | None, typer.Option(help="For a result: the true image.")] = None,
    teacher: Annotated[Path | None, typer.Option(help="For a prior: the denoiser it is to match.")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="For a prior: a recipe (.yaml), or a source as in a recipe (Fashion-MNIST)."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="For a prior: measure everything, and write it to this folder."),
    ] = None,
    sigma: Annotated[list[float] | None, typer.Option(help="For a prior: a level; repeat it.")] = None,
) -> None:
    """Print the figures of a result against the truth, or of a prior against its teacher."""
    if Path(source).suffix.lower() in RESULTS:
        from alpenglow.jobs import read_truth
        from alpenglow.posterior import Posterior

        posterior = Posterior.load(source)
        shape = tuple(posterior.mean.shape)
        reference = posterior.truth if truth is None else read_truth(truth, shape)  # type: ignore[arg-type]
        _print_posterior(posterior, reference)
        return
    if teacher is None:
        raise ValueError(
            f"{source} is no result (.h5); to evaluate a prior give --teacher teacher.safetensors"
        )
    from alpenglow import report

    figures = report.compare(source, teacher, data, sigma, output)
    print_table(list(figures[0]), [list(row.values()) for row in figures])


def _reconstruct_scan(job: "ScanJob") -> None:
    from alpenglow.mri.scan import reconstruct_scan

    with progress_bar("slices") as progress:
        result = reconstruct_scan(job, progress=progress)
    found = f", {result.found} were there" if result.found else ""
    print_facts(
        {
            "slices": f"{result.done} done{found}",
            "noise std": f"{result.noise.noise_std:.4g} ({result.noise.source})",
        }
    )
    for path in result.volumes.values():
        typer.echo(f"Results: {path}")


@app.command("report", epilog=_example("alpenglow report out/result.h5 -o report.html"))
def report_(
    result: Annotated[Path, typer.Argument(metavar="RESULT", help="Result .h5, as reconstruct writes it.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write, .html.")],
    max_size: Annotated[float, typer.Option(min=0, help="Largest size in MB; fewer samples fit it.")] = 32.0,
) -> None:
    """Write a result as one HTML page to look through: images, the marginal at each pixel, convergence.

    The page needs no network: send it, or open it from a file, on a phone too.
    """
    from alpenglow.html_report import write_report
    from alpenglow.posterior import Posterior

    write_report(Posterior.load(result), output, name=result.name, max_megabytes=max_size)
    typer.echo(f"Report: {output}")


bench = typer.Typer(help="Measure on this machine, in a checkout of the repository.", no_args_is_help=True)
app.add_typer(bench, name="bench")

QUALITY = """
alpenglow bench quality --prior fashion-28 -o out/

alpenglow bench quality --prior brain-128 --row mri-8x-1d \\
  --images 2 --samples 16 --baseline-nfe 200 -o out/
"""


@bench.command("quality", epilog=_example(QUALITY))
def bench_quality(
    prior: Annotated[str, typer.Option("--prior", "-p", help="Zoo, .safetensors or hub:owner/name.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of quality.md and quality/.")],
    images: Annotated[int, typer.Option(help="Held-out images.")] = 8,
    samples: Annotated[int, typer.Option(help="Samples of each, at least 2.")] = 32,
    baseline_nfe: Annotated[
        int, typer.Option(help="Network evaluations a sample of DPS and DAPS (published: 1000).")
    ] = 1000,
    row: Annotated[list[str] | None, typer.Option(help="A row of the table; repeat it (all).")] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="calibrated, alps, map, dps or daps; repeat it (all).")
    ] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(
            help="Denoiser of DPS and DAPS (NAME-teacher.safetensors in runs/NAME or benchmarks/teachers, "
            "or the prior's own)."
        ),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Recipe (.yaml) of the images (that of the zoo).")] = None,
    device: options.Device = None,
) -> None:
    """Compare calibrated, alps and MAP with DPS and DAPS, on held-out images: quality, calibration, cost.

    Takes hours on a CPU. Results are kept after each method of each row, and a run that was stopped goes on
    when it is started again with the same options. Images come from `make data`.
    """
    with progress_bar("quality") as progress:
        page = _benchmarks("quality.run").run(
            prior, output, images=images, samples=samples, baseline_nfe=baseline_nfe,
            rows=row or (), methods=method or (), teacher=teacher, data=data, device=device,
            progress=progress, log=typer.echo,
        )  # fmt: skip
    typer.echo(f"\nResults: {page}")


def _benchmarks(module: str) -> Any:
    """A module of benchmarks/, which belongs to the repository and is in no wheel."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "benchmarks" / "quality").is_dir():
        raise ValueError(
            "the benchmarks are not part of the installed package; clone the repository and call "
            ".venv/bin/alpenglow there, after `make demo` or `pip install -e .`"
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return importlib.import_module(f"benchmarks.{module}")


def _fields(given: dict[str, Any]) -> dict[str, Any]:
    """A command's arguments as fields of a job, without its imports."""
    operator = ("mask", "box", "keep", "sigma", "length", "angle", "factor", "filter")
    others = (
        "prior", "noise_std", "output", "simulate", "truth",
        "num_samples", "target_error", "method", "nfe", "max_iterations", "seed", "device",
    )  # fmt: skip
    return {
        "input": given["image"],
        "operator": {"kind": given["operator"]} | {key: given[key] for key in operator},
        **{key: given.get(key) for key in others},
    }


def _suffix(image: "Tensor") -> str:
    return ".png" if image.shape[0] in (1, 3) else ".npy"


def _write_measurement(job: "Job", task: "Task", folder: Path) -> None:
    """What a simulation made, so that other runs and other programs can start from it."""
    if not job.simulate:
        return
    import numpy as np

    from alpenglow.io import write_image

    np.save(folder / "measurement.npy", task.y.numpy())
    if (mask := getattr(task.operator, "mask", None)) is not None:
        mask = mask[None] if mask.ndim == 2 else mask
        write_image(folder / f"mask{_suffix(mask)}", 2.0 * mask - 1)


def _print_posterior(posterior: "Posterior", truth: "Tensor | None") -> None:
    from alpenglow import report

    print_facts(report.result(posterior, truth), str(posterior.settings.get("method", "posterior")))
