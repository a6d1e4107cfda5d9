"""The command line from end to end: files and tables from files; a message and no file from bad input."""

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_jobs import save_prior, smooth_image, write_job
from typer.testing import CliRunner, Result

from alpenglow import Posterior, demo
from alpenglow.cli import app
from alpenglow.distillation import evaluation, pipeline
from alpenglow.io import read_image, write_image
from alpenglow.operator_specs import random_mask
from alpenglow.priors.loading import load_prior

COMMANDS = ["demo", "reconstruct", "map", "info", "convert", "distill", "evaluate", "export", "report"]
QUICK = ["--num-samples", "4", "--nfe", "3"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a prior, a clean image, a measurement of every format, and a mask."""
    save_prior(tmp_path / "prior.safetensors")
    for suffix in (".png", ".tif", ".npy"):
        write_image(tmp_path / f"y{suffix}", smooth_image())
    write_image(tmp_path / "clean.png", smooth_image())
    write_image(tmp_path / "mask.png", 2.0 * random_mask((1, 16, 16), 0.5, 0)[None] - 1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="alpenglow")


def succeed(*arguments: str | Path) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout


def fail(*arguments: str | Path, code: int = 2) -> str:
    """The message of a command that fails, having written nothing."""
    before = sorted(Path().rglob("*"))
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert sorted(Path().rglob("*")) == before
    return " ".join(result.stderr.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str) -> None:
    assert f"alpenglow {command} " in succeed(command, "--help").split("Example:")[1].replace("\n", " ")
    assert command in succeed("--help")


@pytest.mark.parametrize("suffix", [".png", ".tif", ".npy"])
def test_reconstruct_by_options(folder: Path, suffix: str) -> None:
    out = succeed(
        "reconstruct", f"y{suffix}", "--prior", "prior.safetensors", "-o", "out/deep",
        "--operator", "inpainting", "--mask", "mask.png", "--noise-std", "0.1", "--truth",
        "clean.png", *QUICK,
    )  # fmt: skip
    assert all(word in out for word in ("PSNR", "SSIM", "coverage", "NFE", "seconds", "ess"))
    names = ["mean.png", "result.h5", "std.npy", "summary.png"]
    assert sorted(path.name for path in (folder / "out/deep").iterdir()) == names
    posterior = Posterior.load("out/deep/result.h5")
    assert posterior.samples is not None
    assert posterior.samples.shape == (4, 1, 16, 16)
    assert posterior.truth is not None
    assert posterior.settings["job"]["operator"] == {"kind": "inpainting", "mask": "mask.png"}
    assert torch.equal(read_image("out/deep/std.npy"), posterior.std)
    torch.testing.assert_close(
        read_image("out/deep/mean.png"), posterior.mean.clamp(-1, 1), rtol=0, atol=0.5 / 127.5 + 1e-6
    )
    assert "PSNR" in succeed("evaluate", "out/deep/result.h5")
    assert "coverage" in succeed("evaluate", "out/deep/result.h5", "--truth", "clean.png")
    assert "calibrated" in succeed("info", "out/deep/result.h5")


def test_reconstruct_to_a_target_error(folder: Path) -> None:
    command = ("reconstruct", "--job", write_job(folder), "--method", "mala", "--nfe", "3")
    assert "target error  met" in succeed(*command, "--target-error", "1.0", "-o", "rough").replace(":", " ")
    rough = Posterior.load("rough/result.h5")
    assert rough.num_samples == 64
    assert rough.settings["target_error"] == 1.0
    short = ("--target-error", "1e-4", "--num-samples", "72")
    assert "missed: " in succeed(*command, *short, "-o", "short")
    assert Posterior.load("short/result.h5").num_samples == 72


def test_reconstruct_by_a_job_file(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    blur = {"kind": "gaussian-blur", "sigma": 1.0}
    job = write_job(folder, operator=blur, method="mala", nfe=3, num_samples=8, seed=5)
    assert "coverage" not in succeed("reconstruct", "--job", job)
    succeed("reconstruct", "y.npy", "--job", job, "-o", "again", "--seed", "5")
    first, again = Posterior.load("out/result.h5"), Posterior.load("again/result.h5")
    assert torch.equal(first.samples, again.samples)  # type: ignore[arg-type]
    assert first.settings["method"] == "mala"
    assert first.num_samples == 8


@pytest.mark.parametrize(
    "options",
    [
        ["denoising"],
        ["box-inpainting", "--box", "4", "4", "6", "6"],
        ["random-inpainting", "--keep", "0.6"],
        ["motion-blur", "--length", "5", "--angle", "30"],
        ["super-resolution", "--factor", "4", "--filter", "bicubic"],
        ["fourier-sampling", "--mask", "mask.png"],
    ],
    ids=lambda options: options[0],
)
def test_simulated_measurements(folder: Path, options: list[str]) -> None:
    shared = [
        "clean.png",
        "-p",
        "prior.safetensors",
        "--simulate",
        "--noise-std",
        "0.1",
        "--operator",
        *options,
    ]
    assert "coverage" in succeed("reconstruct", *shared, "-o", "out", "--method", "mala", *QUICK)
    measured = np.load(folder / "out/measurement.npy")
    out = succeed("map", *shared, "-o", "map", "--max-iterations", "5")
    assert "psnr" in out
    assert np.array_equal(np.load(folder / "map/measurement.npy"), measured)
    assert (folder / "out/mask.png").exists() == ("inpainting" in options[0] or "fourier" in options[0])
    if options[0] == "random-inpainting":
        again = [
            "out/measurement.npy",
            "-p",
            "prior.safetensors",
            "--noise-std",
            "0.1",
            "--operator",
            "inpainting",
        ]
        succeed("map", *again, "--mask", "out/mask.png", "-o", "third", "--max-iterations", "5")
        assert torch.equal(read_image("third/map.png"), read_image("map/map.png"))


def test_map(folder: Path) -> None:
    out = succeed("map", "--job", write_job(folder), "--max-iterations", "50")
    assert "converged" in out
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["map.json", "map.png"]
    record = json.loads((folder / "out/map.json").read_text())
    assert record["objective"] == sorted(record["objective"], reverse=True)
    assert record["job"]["max_iterations"] == 50


def test_complex_images(folder: Path) -> None:
    save_prior(folder / "complex.safetensors", channels=2)
    np.save(folder / "clean.npy", smooth_image(2).numpy())
    shared = ["clean.npy", "-p", "complex.safetensors", "--simulate", "--noise-std", "0.1"]
    operator = ["--operator", "fourier-sampling", "--mask", "mask.png", "-o", "out"]
    succeed("reconstruct", *shared, *operator, "--method", "mala", *QUICK)
    succeed("map", *shared, *operator, "--max-iterations", "5")
    assert read_image("out/mean.npy").shape == read_image("out/map.npy").shape == (2, 16, 16)
    assert np.iscomplexobj(np.load("out/measurement.npy"))


BLUR = ["--operator", "gaussian-blur", "--sigma", "1"]
MISTAKES: dict[str, tuple[list[str], str]] = {
    "missing file": (["none.png", *BLUR], "cannot read none.png: no such file"),
    "truncated file": (["cut.png", *BLUR], "cannot read cut.png:"),
    "NaN": (["nan.npy", *BLUR], "nan.npy holds NaN or infinity; replace them"),
    "no image": ([*BLUR], "input is missing; expected the measurement"),
    "negative noise": (["y.npy", *BLUR, "--noise-std", "-0.1"], "noise_std is -0.1; expected a positive"),
    "noise is text": (["y.npy", *BLUR, "--noise-std", "much"], "Invalid value for '--noise-std'"),
    "unknown operator": (["y.npy", "--operator", "blur"], "unknown operator 'blur'; expected a kind out of"),
    "no operator": (["y.npy", "--sigma", "1"], "operator is given without a kind"),
    "zero mask": (["y.npy", "--operator", "inpainting", "--mask", "zero.npy"], "zero.npy: mask is all zero"),
    "mask shape": (["y.npy", "--operator", "inpainting", "--mask", "small.npy"], "expected (1, 16, 16)"),
    "unknown method": (["y.npy", *BLUR, "--method", "gibbs"], "unknown method 'gibbs'; expected one of"),
    "method option": (["y.npy", *BLUR, "--method", "alps", "--nfe", "3"], 'method "alps" has no option nfe'),
    "one sample": (["y.npy", *BLUR, "--num-samples", "1"], "num_samples is 1; expected an integer"),
    "folder is a file": (["y.npy", *BLUR, "-o", "y.png/out"], "cannot write to the folder y.png/out"),
    "unknown prior": (["y.npy", *BLUR, "-p", "none"], "no prior 'none'"),
    "foreign prior": (["y.npy", *BLUR, "-p", "net.pth"], "alpenglow convert net.pth net.safetensors"),
    "unknown key": (["--job", "job.yaml"], "unknown field nois; a job has input, prior, output"),
    "no job": (["y.npy", "--job", "none.yaml"], "no job file none.yaml"),
    "unknown option": (["y.npy", "--nois", "1"], "No such option"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_bad_input_writes_nothing(folder: Path, name: str) -> None:
    np.save("nan.npy", np.full((1, 16, 16), np.nan, np.float32))
    np.save("zero.npy", np.zeros((16, 16), bool))
    np.save("small.npy", np.ones((8, 8), bool))
    Path("cut.png").write_bytes(Path("y.png").read_bytes()[:60])
    write_job(folder, nois=1.0)
    arguments, message = MISTAKES[name]
    given = ["-p", "prior.safetensors", "--noise-std", "0.1", "-o", "out", *arguments]
    # Boxes of typer's own messages and wrapped lines: only the words count.
    assert message in fail("reconstruct", *given).replace("│ ", "")
    if not {"--method", "--num-samples"} & set(arguments):
        assert message in fail("map", *given).replace("│ ", "")


def test_a_run_that_fails_leaves_no_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(*_: Any, **__: Any) -> None:
        raise RuntimeError("4 of 4 chains diverged")

    monkeypatch.setattr("alpenglow.api.sample", diverge)
    arguments = ["reconstruct", "y.npy", "-p", "prior.safetensors", "--noise-std", "1", *BLUR, "-o", "out"]
    assert fail(*arguments, code=1) == "error: 4 of 4 chains diverged"
    monkeypatch.setenv("ALPENGLOW_DEBUG", "1")
    assert isinstance(run(*arguments).exception, RuntimeError)


def test_info(folder: Path) -> None:
    assert torch.__version__ in succeed("info")
    header = succeed("info", "prior.safetensors")
    assert "1x16x16" in header
    assert "energy" in header
    assert "0.01 to 50" in header
    assert "1x16x16" in succeed("info", "y.png")
    assert "no such file" in fail("info", "none.png")
    assert "no prior 'none'" in fail("info", "none")
    assert "no such file" in fail("info", "none.h5")
    Path("bad.h5").write_bytes(b"not HDF5")
    assert "not an HDF5 file" in fail("info", "bad.h5")


class Payload:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("canary"),)


def test_convert(folder: Path) -> None:
    torch.save(load_prior("prior.safetensors").denoiser.state_dict(), "net.pth")
    Path("c.yaml").write_text("{patch: 2, sigma_data: 0.5, image_shape: [1, 16, 16]}")
    assert "kind='energy'" in fail("convert", "net.pth", "new.safetensors", "--config", "c.yaml")
    assert "kind is 'flow'" in fail("convert", "net.pth", "new.safetensors", "--kind", "flow")
    assert "no checkpoint" in fail("convert", "none.pth", "new.safetensors")
    Path("evil.pkl").write_bytes(pickle.dumps(Payload()))
    assert "evil.pkl" in fail("convert", "evil.pkl", "new.safetensors")
    assert not Path("canary").exists()
    assert "new" in succeed("convert", "net.pth", "new.safetensors", "--kind", "energy", "--config", "c.yaml")
    assert load_prior("new.safetensors").image_shape == (1, 16, 16)


def test_distill(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    assert "no recipe file none.yaml" in fail("distill", "none.yaml", "-o", "runs")
    monkeypatch.setattr(pipeline, "run", lambda *arguments, workers: calls.append((*arguments, workers)))
    succeed("distill", "recipe.yaml", "-o", "runs", "--workers", "2")
    assert calls == [(Path("recipe.yaml"), Path("runs"), 2)]


def test_evaluate_a_prior(folder: Path) -> None:
    np.save("held-out.npy", np.random.default_rng(0).integers(0, 255, (3, 16, 16), np.uint8))
    arguments = ["evaluate", "prior.safetensors", "--teacher", "prior.safetensors"]
    table = succeed(*arguments, "--data", "held-out.npy", "--sigma", "0.1", "--sigma", "1")
    assert table.split()[:4] == ["sigma", "gradient_error", "psnr", "teacher_psnr"]
    assert len(table.splitlines()) == 3
    assert "sigmas are [-1.0]" in fail(*arguments, "--data", "held-out.npy", "--sigma", "-1")
    assert "(1, 28, 28); prior.safetensors takes (1, 16, 16)" in fail(*arguments)
    assert "give --teacher" in fail("evaluate", "prior.safetensors")


def test_evaluate_a_prior_in_full(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "MOST_COVERAGE_IMAGES", 1)
    monkeypatch.setattr(evaluation, "COVERAGE_SAMPLES", 4)
    np.save("held-out.npy", np.random.default_rng(0).integers(0, 255, (5, 16, 16), np.uint8))
    arguments = ["evaluate", "prior.safetensors", "--teacher", "prior.safetensors", "--data", "held-out.npy"]
    succeed(*arguments, "--sigma", "0.5", "-o", "report")
    assert sorted(path.suffix for path in Path("report").iterdir()) == [".md", ".png", ".png"]
    (text,) = Path("report").glob("*-evaluation.md")
    assert "held-out images in these tables: 5\n" in text.read_text()
    assert "| 0.5 |" in text.read_text()


def test_demo(folder: Path) -> None:
    prior = load_prior("prior.safetensors")
    shares: list[float] = []
    figures = demo.run(
        prior, "demo", images=smooth_image()[None].repeat(2, 1, 1, 1), count=2, num_samples=4, nfe=3,
        progress=shares.append,
    )  # fmt: skip
    assert sorted(path.name for path in Path("demo").iterdir()) == ["demo-0.h5", "demo-1.h5", "demo.png"]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    posterior = Posterior.load("demo/demo-0.h5")
    assert posterior.truth is not None
    assert posterior.map_image is not None
    assert [len(row) for row in demo.rows(figures)] == [len(demo.COLUMNS)] * 2
    assert demo.total(figures)[-1] == f"{sum(f.seconds for f in figures):.1f}"
    assert "the prior takes (1, 16, 16)" in fail("demo", "-p", "prior.safetensors")
    with pytest.raises(ValueError, match="got 3 images; expected 1 to 2"):
        demo.run(prior, "demo", images=torch.zeros(2, 1, 16, 16), count=3)


def test_held_out_images() -> None:
    images = demo.held_out_images()
    assert images.shape == (64, 1, 28, 28)
    assert images.min() == -1
    assert images.max() == 1


def test_the_installed_command(folder: Path) -> None:
    command = str(Path(sys.executable).with_name("alpenglow"))
    arguments = ["-p", "prior.safetensors", *BLUR, "-o", "out", *QUICK, "--method", "mala"]
    good = subprocess.run(
        [command, "reconstruct", "y.png", "--noise-std", "0.1", *arguments], capture_output=True, text=True
    )
    assert (good.returncode, good.stderr) == (0, "")
    assert "NFE" in good.stdout
    bad = subprocess.run(
        [command, "reconstruct", "y.png", "--noise-std", "-1", *arguments, "-o", "bad"],
        capture_output=True,
        text=True,
    )
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("error: the job cannot run:\n  noise_std is -1.0; expected a positive")
    assert not (folder / "bad").exists()
