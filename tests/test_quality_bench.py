"""The quality benchmark: rows, figures, tuning, and a small run that is stopped and goes on."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from test_jobs import save_prior
from tiny import recipe_fields
from typer.testing import CliRunner

from alpenglow import cli, operators
from alpenglow.networks.storage import read_denoiser, save_denoiser
from alpenglow.priors.loading import load_prior
from benchmarks.baselines.daps import DapsOptions
from benchmarks.baselines.denoisers import denoiser_of
from benchmarks.quality import page
from benchmarks.quality.estimates import Estimate, average, of_samples, score
from benchmarks.quality.methods import Networks, Task
from benchmarks.quality.rows import MRI, PICTURES, rows_for
from benchmarks.quality.run import load_networks, run
from benchmarks.quality.tuning import climb, tune

ROW = "random-inpainting-0.1"
SMALL: dict[str, Any] = {"images": 1, "samples": 16, "baseline_nfe": 10, "rows": [ROW]}


def folder_of(place: Path, channels: int = 1) -> Path:
    """A folder with the prior `small`, smooth images, and their recipe."""
    save_prior(place / "prior.safetensors", channels)
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:16, :16] / 16
    waves = random.uniform(0, 3, (40, channels, 2, 1, 1))
    images = 0.8 * np.sin(waves[:, :, 0] + 3 * rows + waves[:, :, 1] * columns)
    np.save(place / "images.npy", (127.5 * images + 127.5).astype(np.uint8) if channels == 1 else images)
    fields = recipe_fields(place)
    (place / "recipe.yaml").write_text(yaml.safe_dump(fields))
    return place


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return folder_of(tmp_path)


def bench(folder: Path, output: str = "out", **changes: Any) -> dict[str, Any]:
    """A small run, and its results without what the clock says."""
    options = SMALL | changes
    run(
        str(folder / "prior.safetensors"), folder / output, data=folder / "recipe.yaml",
        **{"log": lambda text: None} | options,
    )  # fmt: skip
    return read(folder / output)


def read(output: Path) -> dict[str, Any]:
    results = json.loads((output / "quality" / "small.json").read_text())
    for entry in results["entries"]:
        for figures in (entry["mean"], *entry["images"]):
            assert figures.pop("seconds") > 0
    return results


def test_rows_are_those_of_the_table() -> None:
    assert list(rows_for((1, 28, 28))) == list(rows_for((3, 64, 64))) == [row.name for row in PICTURES]
    assert [row.noise_std for row in PICTURES[:3]] == [0.05, 0.1, 0.5]
    for shape in ((1, 28, 28), (3, 64, 64)):
        built = {name: row.build(shape) for name, row in rows_for(shape).items()}
        seen = built["random-inpainting-0.05"].mask.float().mean().item()  # type: ignore[attr-defined]
        assert abs(seen - 0.2) < 5 * (0.16 / (shape[1] * shape[2])) ** 0.5
        hidden = ~built["box-inpainting"].mask  # type: ignore[attr-defined]
        assert hidden.sum() == shape[1] * shape[2] / 4
        assert built["super-resolution"].measurement_shape(shape) == (shape[0], shape[1] // 4, shape[2] // 4)
    names = {row.name: row.build((2, 128, 128)) for row in MRI}
    for name, factor in (("mri-2x-1d", 2), ("mri-8x-1d", 8), ("mri-6x-2d", 6)):
        operator = names[name]
        assert isinstance(operator, operators.SenseMRI)
        assert operator.mask.float().mean().item() == pytest.approx(1 / factor, abs=1e-4)
        assert operator.coil_maps.abs().square().sum(0).sub(1).abs().max() < 1e-5


def test_figures_of_samples_that_are_right() -> None:
    """Truth and samples of one Gaussian a pixel: nominal coverage, and PSNR of known errors."""
    generator = torch.Generator().manual_seed(0)
    std, samples = 0.1, 8
    truth = std * torch.randn(3, 100, 100, generator=generator)
    drawn = std * torch.randn(samples, 3, 100, 100, generator=generator)
    figures = score(of_samples(drawn, 7.0, 1.5), truth)
    for level in (0.5, 0.9):
        error = (level * (1 - level) / truth.numel()) ** 0.5
        assert abs(figures[f"coverage_{100 * level:.0f}"] - level) < 5 * error
    # The mean of n samples errs by the variance times 1 + 1 / n, a single one by twice the variance.
    decibel = 5 * 10 / math.log(10) * (2 / truth.numel()) ** 0.5
    assert abs(figures["psnr"] - 10 * math.log10(4 / (std**2 * (1 + 1 / samples)))) < decibel
    assert abs(figures["sample_psnr"] - 10 * math.log10(4 / (2 * std**2))) < decibel
    assert (figures["nfe"], figures["seconds"]) == (7.0, 1.5)
    narrow = score(of_samples(0.5 * drawn, 7.0, 1.5), truth)
    assert narrow["coverage_90"] < 0.75
    assert narrow["width_90"] == pytest.approx(0.5 * figures["width_90"], rel=1e-4)


def test_figures_of_a_point_estimate_have_no_intervals() -> None:
    truth = torch.linspace(-1, 1, 256).reshape(1, 16, 16)
    figures = score(Estimate(truth + 0.1, 30.0, 0.5), truth)
    assert figures.keys() == {"psnr", "ssim", "nfe", "seconds"}
    assert figures["psnr"] == pytest.approx(10 * math.log10(4 / 0.01), abs=1e-4)
    assert average([figures, figures | {"psnr": 0.0}])["psnr"] == pytest.approx(figures["psnr"] / 2)


@pytest.mark.parametrize(("best", "start"), [(1.6, 0.1), (0.02, 0.16), (0.3, 0.3)])
def test_climbing_finds_the_best_power_of_two(best: float, start: float) -> None:
    asked: list[float] = []

    def evaluate(value: float) -> float:
        asked.append(value)
        return -abs(math.log(value / best))

    found = climb(evaluate, start)
    assert len(asked) == len(set(asked)) == len(found)
    assert max(found, key=lambda v: found[v]) == pytest.approx(best)


def test_climbing_ends_on_a_plateau() -> None:
    found = climb(lambda value: min(value, 2.0) - 0.001 / value, 0.5)
    assert set(found) == {0.5, 1.0, 2.0, 4.0}


def test_climbing_leaves_what_diverges() -> None:
    found = climb(lambda value: value if value <= 0.5 else math.nan, 0.25)
    assert set(found) == {0.25, 0.5, 1.0}


def test_tuning_keeps_the_published_value_where_it_is_best(folder: Path) -> None:
    """The better of the published and the found, by the PSNR that is recorded."""
    prior = load_prior(folder / "prior.safetensors")
    networks = Networks(prior, prior, denoiser_of(prior))
    truths = torch.linspace(-0.8, 0.8, 512).reshape(2, 1, 16, 16)
    task = Task(operators.Denoising(), 0.3, truths, truths.clone(), 2, 0)
    tuned = tune(networks, task, "daps", 5, 0.5)
    assert DapsOptions().noise_std in tuned.tried
    assert 0.3 in tuned.tried
    assert tuned.tried[tuned.chosen] == max(tuned.tried.values())
    assert isinstance(tuned.options, DapsOptions)
    assert tuned.options.nfe == 5
    # The published ratio of step and noise holds: h = 2 b^2.
    assert tuned.options.step_size == pytest.approx(2 * tuned.chosen**2)
    guided = tune(networks, task, "dps", 10, 0.5)
    assert (guided.published, guided.options) == (0.5, type(guided.options)(guided.chosen, 10))
    # y is the truth here: guidance must help.
    assert guided.tried[guided.chosen] > 15


def test_a_run_that_was_stopped_goes_on(folder: Path) -> None:
    quick = ["map", "dps", "daps"]
    whole = bench(folder, methods=quick)
    assert [entry["method"] for entry in whole["entries"]] == quick

    def stop(text: str) -> None:
        if f"{ROW} map" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench(folder, "stopped", methods=quick, log=stop)
    assert len(read(folder / "stopped")["entries"]) == 1
    assert "| MAP |" in (folder / "stopped" / "quality.md").read_text()
    done: list[str] = []
    assert bench(folder, "stopped", methods=quick, log=done.append) == whole
    assert [line.split()[1] for line in done] == ["dps:", "daps:"]

    kept = (folder / "out/quality/small.json").read_bytes()
    with pytest.raises(ValueError, match=r"other settings: images 1, now 2\. Give the same"):
        bench(folder, images=2)
    assert (folder / "out/quality/small.json").read_bytes() == kept
    (folder / "out/quality/small.json").write_text("{}")
    with pytest.raises(ValueError, match="no file of this benchmark"):
        bench(folder)


def test_a_place_that_cannot_be_written_is_known_before_anything_is_measured(folder: Path) -> None:
    (folder / "out").write_text("mine")
    measured: list[str] = []
    with pytest.raises(OSError, match="out"):
        bench(folder, methods=["map"], log=measured.append, progress=lambda share: measured.append("began"))
    assert not measured
    assert (folder / "out").read_text() == "mine"


def test_a_teacher_is_used_where_one_is(folder: Path) -> None:
    prior, x, sigma = "prior.safetensors", torch.randn(2, 1, 16, 16), torch.tensor([0.3, 2.0])
    networks, text, digests = load_networks(prior, None, 16, None)
    assert text == "the prior's own, x - G"
    torch.testing.assert_close(networks.denoiser(x, sigma), networks.prior.denoise(x, sigma))
    place = folder / "runs/small/small-teacher.safetensors"
    place.parent.mkdir(parents=True)
    shutil.copy(prior, place)
    taught, text, other = load_networks(prior, None, 16, None)
    assert text == "the teacher, small-teacher.safetensors"
    assert {method for method in other if other[method] != digests[method]} == {"dps", "daps"}
    torch.testing.assert_close(taught.denoiser(x, sigma), taught.prior.denoiser(x, sigma))
    _, text, _ = load_networks("photo-64", None, 16, None)
    assert text == "the teacher, photo-64-teacher.safetensors"
    save_prior(folder / "colour.safetensors", channels=3)
    with pytest.raises(ValueError, match="image_shape"):
        load_networks(prior, folder / "colour.safetensors", 16, None)


def test_what_ran_on_other_weights_is_measured_again(folder: Path) -> None:
    shutil.copy(folder / "prior.safetensors", folder / "teacher.safetensors")
    both: dict[str, Any] = {"methods": ["map", "dps"], "teacher": folder / "teacher.safetensors"}
    before = bench(folder, **both)
    network, metadata = read_denoiser(folder / "prior.safetensors")
    for parameter in network.parameters():
        parameter *= 1.1
    levels = metadata.sigma_range
    save_denoiser(
        folder / "prior.safetensors", network, name="small", image_shape=(1, 16, 16), sigma_range=levels
    )
    done: list[str] = []
    after = bench(folder, log=done.append, **both)
    assert [line.split()[1] for line in done] == ["map:"]
    assert [entry["method"] for entry in after["entries"]] == ["map", "dps"]
    assert after["entries"][1] == before["entries"][1]
    assert after["entries"][0]["network"] != before["entries"][0]["network"]
    assert after["entries"][0]["mean"]["psnr"] != before["entries"][0]["mean"]["psnr"]


@pytest.mark.slow
def test_multi_coil_mri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    methods = ["calibrated", "map", "dps", "daps"]
    results = bench(folder_of(tmp_path, channels=2), rows=["mri-2x-1d"], methods=methods)
    by_method = {entry["method"]: entry["mean"] for entry in results["entries"]}
    assert list(by_method) == methods
    assert {entry["row"] for entry in results["entries"]} == {"mri-2x-1d"}
    for method, mean in by_method.items():
        assert math.isfinite(mean["psnr"])
        assert ("coverage_90" in mean) == (method != "map")
    assert (by_method["dps"]["nfe"], by_method["daps"]["nfe"]) == (10, 10)
    assert "MRI, 4 coils, 2x 1D" in (tmp_path / "out/quality.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": 0}, "images is 0; expected at least 1"),
        ({"samples": 1}, "samples is 1; expected at least 2"),
        ({"baseline_nfe": 4}, "baseline_nfe is 4; expected at least 5"),
        ({"images": 1000}, "got images=1000; 2 are held out"),
        ({"rows": ["sepia"]}, "unknown row sepia; images .* have random-inpainting-0.05, "),
        ({"methods": ["hope"]}, "unknown method hope; there are calibrated, alps, map, dps, daps"),
        ({"data": None}, "the zoo has no recipe for 'small'; give the one .* --data"),
    ],
)
def test_wrong_options_are_refused(folder: Path, change: dict[str, Any], message: str) -> None:
    options = SMALL | {"data": folder / "recipe.yaml"} | change
    with pytest.raises(ValueError, match=message):
        run(str(folder / "prior.safetensors"), folder / "out", **options)
    assert not (folder / "out").exists()


def test_the_page_says_what_was_missed() -> None:
    def entry(method: str, psnr: float, coverage: float, nfe: float) -> dict[str, Any]:
        mean = {"psnr": psnr, "ssim": 0.9, "nfe": nfe, "seconds": 1.0, "coverage_90": coverage}
        pair = [mean, mean | {"psnr": psnr + 2 * (method == "calibrated")}]
        tuning = {"name": "scale", "published": 1.0, "chosen": 2.0, "tried": []}
        tuning["tried"] = [{"value": 1.0, "psnr": None}, {"value": 2.0, "psnr": 20.0}]
        return {"row": "r", "title": "T", "method": method, "mean": mean, "images": pair, "tuning": tuning}

    found: dict[str, Any] = {
        "prior": "p",
        "settings": {"images": 2, "samples": 8, "noise_floor": 0.0, "denoiser": "D", "baseline_nfe": 400},
        "machine": {"torch": "2", "processor": "x", "threads": 1},
        "tuning": {"images": 2, "samples": 2},
        "entries": [
            entry("calibrated", 20.0, 0.95, 300.0),
            entry("dps", 19.0, 0.5, 400.0),
            entry("daps", 20.9, 0.6, 400.0),
        ],
    }
    text = page.section(found)
    # Gains of 1 and 3 dB over DPS; of -0.9 and 1.1 over DAPS.
    assert "| T | +2.00 ± 1.00 | **+0.10 ± 1.00** | **0.30** | 0.75 | **0.950** | 0.500 | 0.600 |" in text
    assert "| T | DPS | scale | 1 |  | 2 | 20.00 |" in text
    for each in found["entries"]:
        del each["images"][1:]
    assert "| T | +1.00 | **-0.90** | **0.30** |" in page.section(found)  # one image has no standard error


def test_on_the_command_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["bench", "quality", "-p", "prior.safetensors", "-o", "out", "--data", "recipe.yaml"]
    small = [
        "--images",
        "1",
        "--samples",
        "16",
        "--baseline-nfe",
        "5",
        "--row",
        "super-resolution",
        "--method",
        "daps",
    ]
    done = CliRunner().invoke(cli.app, [*arguments, *small])
    assert done.exit_code == 0, done.output
    assert "super-resolution daps: PSNR" in done.stdout
    assert "Results: out/quality.md" in done.stdout
    assert CliRunner().invoke(cli.app, [*arguments, "--row", "sepia"]).exit_code == 2
    monkeypatch.setattr(cli, "__file__", str(folder / "site-packages/alpenglow/cli.py"))
    wheel = CliRunner().invoke(cli.app, [*arguments, *small])
    assert wheel.exit_code == 2
    assert "not part of the installed package" in wheel.stderr
