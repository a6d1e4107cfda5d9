"""A scan from file to volumes, by real commands: units, geometry, a kill, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scans import VOXEL, columns, oblique, simulation
from test_cli import fail, succeed
from tiny import random_denoiser

from alpenglow import Posterior
from alpenglow.io.kspace import KSpace
from alpenglow.io.mri import write_kspace
from alpenglow.io.reconstructions import open_reconstruction
from alpenglow.mri.figure import plot_slice
from alpenglow.mri.job import ScanJob
from alpenglow.priors.network import NetworkPrior

nibabel = pytest.importorskip("nibabel")
pytest.importorskip("sigpy")

HEIGHT, WIDTH, SLICES = 24, 17, 3
# Without the pilot of the default method: here it matters what becomes of samples, not how good they are.
QUICK = ("--prior", "prior.safetensors", "--num-samples", "4", "--method", "mala", "--nfe", "3")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a scan of three slices, its maps, and a prior of complex 8x8 images."""
    denoiser = random_denoiser(in_channels=8, out_channels=8)
    NetworkPrior(denoiser, (2, 8, 8), name="tiny", sigma_range=(0.01, 40.0)).save(
        tmp_path / "prior.safetensors"
    )
    made = simulation(SLICES, 3, HEIGHT, WIDTH, mask=columns(HEIGHT, WIDTH, 12))
    write_kspace(tmp_path / "scan.h5", made.kspace)
    np.save(tmp_path / "maps.npy", made.coil_maps.numpy())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def volume(path: str) -> np.ndarray:
    """[slices, H, W]."""
    return np.moveaxis(np.asarray(nibabel.load(path).dataobj), 2, 0)


def test_a_scan_becomes_volumes(folder: Path) -> None:
    text = succeed("reconstruct", "scan.h5", *QUICK, "--maps", "maps.npy", "--map", "-o", "out")
    assert "3 done" in text
    assert "estimated from the rim" in text  # fastMRI files hold no noise scan
    names = ["mean", "std", "lower", "upper", "map"]
    volumes = {name: volume(f"out/{name}.nii.gz") for name in names}
    # 17 columns are padded to 18, a multiple of the network's patch.
    assert all(array.shape == (SLICES, HEIGHT, 18) for array in volumes.values())
    image = nibabel.load("out/mean.nii.gz")
    np.testing.assert_allclose(image.header.get_zooms(), (VOXEL[0], VOXEL[1] * 17 / 18, VOXEL[2]), rtol=1e-5)
    middle = image.affine @ [HEIGHT // 2, 9, 1, 1]
    np.testing.assert_allclose(middle, oblique() @ [HEIGHT // 2, 8, 1, 1], atol=1e-4)
    for index in range(SLICES):
        posterior = Posterior.load(f"out/slices/slice-{index:03}.h5")
        moduli = posterior.magnitude()
        np.testing.assert_allclose(volumes["mean"][index], moduli.mean[0], rtol=1e-5)
        np.testing.assert_allclose(volumes["std"][index], moduli.std[0], rtol=1e-5)
        assert moduli.map_image is not None
        np.testing.assert_allclose(volumes["map"][index], moduli.map_image[0], rtol=1e-5)
        scan = posterior.settings["scan"]
        assert (scan["slice"], scan["noise"]) == (index, "estimated from the rim of k-space")
        assert Path(f"out/slices/slice-{index:03}.png").read_bytes().startswith(b"\x89PNG")
    assert (volumes["lower"] >= 0).all()
    assert (volumes["lower"] <= volumes["upper"]).all()
    shown = open_reconstruction("out/reconstruction.h5")
    np.testing.assert_array_equal(torch.stack([shown[i] for i in range(SLICES)]), volumes["mean"])


def test_measured_pixels_come_back_in_the_units_of_the_file(folder: Path) -> None:
    """All of k-space with little noise: whatever the prior says, the image is the scanner's."""
    made = simulation(1, 3, HEIGHT, 18, mask=torch.ones(HEIGHT, 18, dtype=torch.bool))
    data = made.kspace.data
    assert isinstance(data, torch.Tensor)
    write_kspace("full.h5", KSpace(1000 * data))
    np.save("full-maps.npy", made.coil_maps.numpy())
    succeed(
        "reconstruct", "full.h5", "--prior", "prior.safetensors", "--num-samples", "4", "--nfe", "12",
        "--maps", "full-maps.npy", "--noise-std", "10", "-o", "out",
    )  # fmt: skip
    truth = 1000 * made.images[0].abs().numpy()
    # The data weigh 1 / (10 / 900)^2 at every level above that; noise is 10 an image.
    assert np.abs(volume("out/mean.nii.gz")[0] - truth).max() < 6 * 10 * (1 + 4**-0.5)


def test_a_target_error_is_in_the_units_of_the_file(folder: Path) -> None:
    target = ("--target-error", "1e-9", "--num-samples", "64", "--slices", "0")
    succeed("reconstruct", "scan.h5", *QUICK[:2], *QUICK[4:], "--maps", "maps.npy", *target, "-o", "out")
    settings = Posterior.load("out/slices/slice-000.h5").settings
    assert settings["target_error"] == pytest.approx(1e-9 / settings["scan"]["scale"])


def test_a_killed_run_goes_on_at_its_slice(folder: Path) -> None:
    command = ("reconstruct", "scan.h5", *QUICK, "--maps", "maps.npy", "-o", "out")
    process = subprocess.Popen([sys.executable, "-m", "alpenglow", *command], cwd=folder)
    first = folder / "out/slices/slice-000.h5"
    deadline = time.monotonic() + 300
    while not first.is_file():
        assert process.poll() is None, "the run ended before its first slice"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = first.stat().st_mtime_ns
    assert not Path("out/mean.nii.gz").exists()
    assert "were there" in succeed(*command)
    assert first.stat().st_mtime_ns == kept
    succeed("reconstruct", "scan.h5", *QUICK, "--maps", "maps.npy", "-o", "unbroken")
    for name in ("mean", "std"):
        np.testing.assert_array_equal(volume(f"out/{name}.nii.gz"), volume(f"unbroken/{name}.nii.gz"))


def test_other_options_do_not_mix_with_what_is_there(folder: Path) -> None:
    command = ("reconstruct", "scan.h5", *QUICK, "--maps", "maps.npy", "-o", "out")
    succeed(*command, "--slices", "1")
    assert [path.name for path in Path("out/slices").glob("*.h5")] == ["slice-001.h5"]
    assert "job.seed: 0, now 3" in fail(*command, "--seed", "3")
    assert "2 done, 1 were there" in succeed(*command, "--slices", "0:3")
    assert volume("out/mean.nii.gz").shape[0] == SLICES


def test_espirit_makes_the_maps(folder: Path) -> None:
    succeed("reconstruct", "scan.h5", *QUICK, "--slices", "0", "-o", "out")
    record = json.loads(Path("out/scan.json").read_text())
    assert record["job"]["maps"] == "espirit"


def test_a_job_file_names_a_scan(folder: Path) -> None:
    Path("job.yaml").write_text(
        "input: scan.h5\nprior: prior.safetensors\nmaps: maps.npy\nslices: '2'\n"
        "num_samples: 4\nmethod: mala\nnfe: 3\noutput: out\n"
    )
    succeed("reconstruct", "--job", "job.yaml")
    assert Path("out/slices/slice-002.h5").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--slices", "7"), "has the slices 0 to 2"),
        (("--slices", "a:b"), "slices is 'a:b'; expected slices FIRST:END"),
        (("--noise-std", "-1"), "noise_std is -1.0; expected a positive finite number"),
        (("--maps", "absent.npy"), "absent.npy"),
        (("--prior", "grey.safetensors"), "is a prior of images of 1 channels; k-space needs"),
        (("--operator", "denoising"), "unknown field operator; a job has input, prior, output, num_samples"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    folder: Path, options: tuple[str, ...], message: str
) -> None:
    NetworkPrior(random_denoiser(), (1, 8, 8), name="grey").save("grey.safetensors")
    assert message in fail("reconstruct", "scan.h5", *QUICK, "-o", "out", *options)


def test_damaged_scans_are_refused(folder: Path) -> None:
    whole = Path("scan.h5").read_bytes()
    Path("torn.h5").write_bytes(whole[: len(whole) // 2])
    assert "truncated or damaged" in fail("reconstruct", "torn.h5", *QUICK, "-o", "out")
    made = simulation(1, 3, HEIGHT, 18, mask=columns(HEIGHT, 18, 4))
    write_kspace("few.h5", made.kspace)
    text = fail("reconstruct", "few.h5", *QUICK, "-o", "out")
    assert "ESPIRiT needs 12; give coil maps in a file" in text


def test_slices_are_counted_as_python_does() -> None:
    def chosen(text: str | None, count: int = 5) -> list[int]:
        return list(ScanJob(input="x.h5", prior="p", output="o", slices=text).chosen(count))

    assert chosen(None) == [0, 1, 2, 3, 4]
    assert chosen("2") == [2]
    assert chosen("1:3") == [1, 2]
    assert chosen("3:") == [3, 4]
    assert chosen(":9") == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="0 to 4"):
        chosen("3:3")


@pytest.mark.parametrize("known", [False, True])
def test_the_picture_of_a_slice(tmp_path: Path, known: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(6, 2, 20, 16, generator=generator)
    posterior = Posterior.from_samples(samples, energy=torch.zeros(6), nfe=10)
    plain, full = tmp_path / "plain.png", tmp_path / "full.png"
    plot_slice(posterior, plain, title="a")
    if known:
        posterior = posterior.with_truth(samples[0]).with_map(samples[1])
    plot_slice(posterior, full, title="a")
    assert (plain.read_bytes() == full.read_bytes()) is not known
