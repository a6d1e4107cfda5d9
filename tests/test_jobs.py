"""Job files and options: the operator and measurement they ask for, and one clear error for each mistake."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from alpenglow import operators
from alpenglow.io import write_image
from alpenglow.io.folders import atomic_folder
from alpenglow.io.measurements import read_kspace, read_mask
from alpenglow.jobs import Job, load_job, prepare, simulate, with_floor
from alpenglow.networks.denoiser import EDMDenoiser
from alpenglow.operator_specs import OPERATORS, random_mask
from alpenglow.priors.loading import save_denoiser

SHAPE = (1, 16, 16)


def save_prior(path: Path, channels: int = 1) -> Path:
    """An untrained network, which is nearly the Gaussian prior of std sigma_data."""
    network = {
        "img_resolution": 8, "in_channels": 4 * channels, "out_channels": 4 * channels,
        "model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [],
    }  # fmt: skip
    torch.manual_seed(0)
    denoiser = EDMDenoiser.from_config(
        {"backbone": "SongUNet", "network": network, "sigma_data": 0.5, "patch": 2}
    )
    save_denoiser(path, denoiser, name="small", image_shape=(channels, 16, 16), sigma_range=(0.01, 50.0))
    return path


def smooth_image(channels: int = 1) -> Tensor:
    row = torch.linspace(0, 3, 16)
    return torch.stack([0.7 * torch.sin(row[:, None] + (c + 1) * row) for c in range(channels)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """prior.safetensors, clean.png, y.npy and mask.npy."""
    save_prior(tmp_path / "prior.safetensors")
    write_image(tmp_path / "clean.png", smooth_image())
    write_image(tmp_path / "y.npy", smooth_image())
    np.save(tmp_path / "mask.npy", random_mask(SHAPE, 0.5, 0).numpy())
    return tmp_path


def fields(folder: Path, **changes: Any) -> dict[str, Any]:
    job = {
        "input": "y.npy",
        "prior": "prior.safetensors",
        "operator": {"kind": "denoising"},
        "noise_std": 0.05,
        "output": "out",
    }
    return {key: value for key, value in (job | changes).items() if value is not None}


def write_job(folder: Path, **changes: Any) -> Path:
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(fields(folder, **changes)))
    return path


def test_paths_start_from_the_folder_of_the_file(folder: Path) -> None:
    job = load_job(
        {}, write_job(folder, operator={"kind": "inpainting", "mask": "mask.npy"}, truth="clean.png")
    )
    assert job.input == folder / "y.npy"
    assert job.output == folder / "out"
    assert job.prior == str(folder / "prior.safetensors")
    assert load_job({}, write_job(folder, prior="fashion-28")).prior == "fashion-28"
    task = prepare(job)
    assert isinstance(task.operator, operators.Inpainting)
    assert task.y.shape == SHAPE
    assert task.truth is not None
    assert task.truth.shape == SHAPE


def test_options_go_before_the_file(folder: Path) -> None:
    path = write_job(folder, operator={"kind": "gaussian-blur", "sigma": 2}, num_samples=8)
    job = load_job({"noise_std": 0.2, "seed": None, "operator": {"kind": None, "sigma": 1.0}}, path)
    assert (job.noise_std, job.num_samples, job.seed) == (0.2, 8, 0)
    assert job.operator.model_dump() == {"kind": "gaussian-blur", "sigma": 1.0}
    job = load_job({"operator": {"kind": "denoising", "sigma": None}}, path)
    assert job.operator.model_dump() == {"kind": "denoising"}


def test_a_target_error_bounds_the_samples_instead(folder: Path) -> None:
    job = load_job({"target_error": 0.02}, write_job(folder))
    assert (job.target_error, job.num_samples) == (0.02, 16384)
    assert job.sampling(unit=0.5)["target_error"] == 0.01
    assert load_job({"target_error": 0.02, "num_samples": 70}, write_job(folder)).num_samples == 70
    assert "target_error" not in load_job({}, write_job(folder)).sampling()


KINDS = {
    "denoising": ({}, operators.Denoising),
    "inpainting": ({"mask": "mask.npy"}, operators.Inpainting),
    "box-inpainting": ({"box": [2, 3, 4, 5]}, operators.Inpainting),
    "random-inpainting": ({"keep": 0.3}, operators.Inpainting),
    "gaussian-blur": ({"sigma": 2}, operators.GaussianBlur),
    "motion-blur": ({"length": 9, "angle": 30}, operators.MotionBlur),
    "super-resolution": ({"factor": 4, "filter": "bicubic"}, operators.SuperResolution),
    "fourier-sampling": ({"mask": "mask.npy"}, operators.FourierSampling),
}


@pytest.mark.parametrize("kind", OPERATORS)
def test_every_operator_is_simulated(folder: Path, kind: str) -> None:
    options, expected = KINDS[kind]
    job = load_job({}, write_job(folder, input="clean.png", operator={"kind": kind} | options, simulate=True))
    task = prepare(job)
    assert type(task.operator) is expected
    assert task.truth is not None
    exact = task.operator.forward(task.truth[None])[0]
    noise = (task.y - exact)[exact != 0]
    parts = torch.view_as_real(noise) if noise.is_complex() else noise
    assert parts.std().item() == pytest.approx(0.05, rel=0.35)
    assert torch.equal(task.y, prepare(job).y)
    if kind == "box-inpainting":
        hidden = (task.operator.mask == 0).nonzero()  # type: ignore[attr-defined]
        assert len(hidden) == 20
        assert hidden.min(0).values.tolist() == [0, 2, 3]


def test_a_mask_hides_noise_too() -> None:
    mask = random_mask(SHAPE, 0.5, 0)
    y = simulate(operators.Inpainting(mask), smooth_image(), 0.1, 0)
    assert not y[0, ~mask].any()
    assert 0.35 < mask.float().mean() < 0.65


def test_noise_is_independent_of_what_else_has_the_seed() -> None:
    """Of torch's own numbers of a seed, where random_mask is below 0.2: mean 0.35 and std 0.6."""
    shape, eta, floor = (1, 128, 128), 0.1, 0.2
    mask = random_mask(shape, 0.2, 3)
    image = torch.zeros(shape)
    noise = simulate(operators.Inpainting(mask), image, eta, 3)[0, mask] / eta
    own = ((with_floor(image[None], floor, 3)[0] - image) / floor)[0, mask]
    for values in (noise, own, (noise + own) / 2**0.5):
        error = len(values) ** -0.5
        assert abs(values.mean()) < 4 * error
        assert abs(values.std() - 1) < 4 * error / 2**0.5


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"prior": None}, r"prior is missing; expected a zoo prior.*\(--prior\)"),
    ({"operator": None}, r"operator is missing; expected a kind out of denoising.*\(--operator\)"),
    ({"operator": {"kind": "blur"}}, "unknown operator 'blur'; expected a kind out of denoising"),
    ({"operator": {"sigma": 2}}, "operator is given without a kind"),
    ({"operator": "denoising"}, "operator is 'denoising'; expected a kind"),
    ({"operator": {"kind": "gaussian-blur"}}, r"operator.sigma is missing.*\(--sigma\)"),
    ({"operator": {"kind": "gaussian-blur", "sigma": 1, "factor": 2}}, "unknown field operator.factor"),
    ({"operator": {"kind": "denoising", "x": 1}}, "operator denoising has no options"),
    ({"operator": {"kind": "box-inpainting", "box": [1, 2, 3]}}, r"box is \[1, 2, 3\]; expected four"),
    ({"operator": {"kind": "super-resolution", "factor": 2.5}}, "factor is 2.5; expected a positive"),
    ({"operator": {"kind": "random-inpainting"}}, "needs simulate"),
    ({"nois_std": 0.1}, "unknown field nois_std; a job has input, prior"),
    ({"noise_std": -0.1}, r"noise_std is -0.1; expected a positive finite number.*\(--noise-std\)"),
    ({"noise_std": float("nan")}, "noise_std is nan"),
    ({"noise_std": "much"}, "noise_std is 'much'"),
    ({"num_samples": 1}, "num_samples is 1; expected an integer of at least 2"),
    ({"num_samples": 8.5}, "num_samples is 8.5"),
    ({"target_error": 0}, r"target_error is 0; expected a positive.*\(--target-error\)"),
    ({"seed": True}, "seed is True"),
    ({"nfe": 0}, "nfe is 0; expected a positive integer"),
    ({"simulate": True, "truth": "clean.png"}, "leave truth out"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), MISTAKES)
def test_mistakes_in_a_job(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_job({}, write_job(folder, **changes))


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "is not YAML"), ("- 1", "holds a list"), ("", "holds a NoneType")]
)
def test_files_that_are_no_jobs(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_job({}, path)
    path.write_text("7: 8")
    with pytest.raises(ValueError, match="unknown field 7"):
        load_job({}, path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not YAML"):
        load_job({}, path)
    with pytest.raises(ValueError, match="no job file"):
        load_job({}, tmp_path / "none.yaml")


MISFITS: list[tuple[dict[str, Any], str]] = [
    ({"prior": "none.safetensors"}, "no weight file"),
    ({"prior": "none"}, "no prior 'none'"),
    ({"device": "abacus"}, "device 'abacus' cannot be used"),
    ({"input": "none.png"}, "no such file"),
    ({"input": "nan.npy"}, "nan.npy holds NaN"),
    ({"input": "cut.png"}, "cannot read .*cut.png"),
    ({"input": "large.png"}, r"large.png.*\(1, 20, 20\).*expects \(1, 16, 16\)"),
    ({"input": "colour.npy"}, r"colour.npy.*\(3, 16, 16\).*expects \(1, 16, 16\)"),
    ({"truth": "large.png"}, r"large.png is an image of shape \(1, 20, 20\); the prior takes \(1, 16, 16\)"),
    ({"operator": {"kind": "inpainting", "mask": "none.npy"}}, "none.npy: no such file"),
    ({"operator": {"kind": "inpainting", "mask": "zero.npy"}}, "zero.npy: mask is all zero"),
    ({"operator": {"kind": "inpainting", "mask": "black.png"}}, "black.png: mask is all zero"),
    ({"operator": {"kind": "inpainting", "mask": "clean.png"}}, "clean.png: mask holds numbers other than 0"),
    ({"operator": {"kind": "inpainting", "mask": "small.npy"}}, r"small.npy: got a mask .*\(1, 8, 8\)"),
    ({"operator": {"kind": "inpainting", "mask": "line.npy"}}, r"line.npy holds bool of shape \(16,\)"),
    ({"operator": {"kind": "fourier-sampling", "mask": "small.npy"}}, "small.npy: got images"),
    ({"operator": {"kind": "fourier-sampling", "mask": "mask.npy"}}, "y.npy holds float32.*expected complex"),
    ({"operator": {"kind": "box-inpainting", "box": [8, 8, 9, 4]}}, "expected a box of at least"),
    ({"operator": {"kind": "gaussian-blur", "sigma": -2}}, "got sigma=-2"),
    ({"operator": {"kind": "super-resolution", "factor": 3}}, "divisible by 3"),
    ({"operator": {"kind": "super-resolution", "factor": 2}}, r"y.npy.*expects \(1, 8, 8\)"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), MISFITS)
def test_files_that_do_not_fit(folder: Path, changes: dict[str, Any], message: str) -> None:
    np.save(folder / "nan.npy", np.full((1, 16, 16), np.nan, np.float32))
    np.save(folder / "colour.npy", smooth_image(3).numpy())
    np.save(folder / "zero.npy", np.zeros((16, 16)))
    np.save(folder / "small.npy", np.ones((8, 8), bool))
    np.save(folder / "line.npy", np.ones(16, bool))
    write_image(folder / "black.png", torch.full((1, 16, 16), -1.0))
    write_image(folder / "large.png", torch.zeros(1, 20, 20))
    (folder / "cut.png").write_bytes((folder / "clean.png").read_bytes()[:60])
    job = load_job({}, write_job(folder, **changes))
    with pytest.raises(ValueError, match=message):
        prepare(job)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".npy"])
def test_masks(tmp_path: Path, suffix: str) -> None:
    mask = random_mask(SHAPE, 0.5, 3)
    path = tmp_path / f"mask{suffix}"
    write_image(path, (mask[None] if suffix == ".npy" else 2.0 * mask[None] - 1).float())
    assert torch.equal(read_mask(path)[0] == 1, mask)
    colour = tmp_path / f"colour{suffix}"
    write_image(
        colour, (2.0 * mask - 1).expand(3, -1, -1) if suffix != ".npy" else mask.expand(3, -1, -1).float()
    )
    assert read_mask(colour).shape == SHAPE


def test_kspace(tmp_path: Path) -> None:
    save_prior(tmp_path / "prior.safetensors", channels=2)
    np.save(tmp_path / "mask.npy", random_mask(SHAPE, 0.5, 0).numpy())
    np.save(tmp_path / "clean.npy", smooth_image(2).numpy())
    operator = {"kind": "fourier-sampling", "mask": "mask.npy"}
    simulated = prepare(
        load_job({}, write_job(tmp_path, input="clean.npy", operator=operator, simulate=True))
    ).y
    assert simulated.shape == SHAPE
    for name, array in {
        "slice": simulated[0].numpy(),
        "coil": simulated.numpy().astype(np.complex128),
        "parts": torch.view_as_real(simulated[0]).permute(2, 0, 1).numpy(),
    }.items():
        np.save(tmp_path / f"{name}.npy", array)
        task = prepare(load_job({}, write_job(tmp_path, input=f"{name}.npy", operator=operator)))
        assert torch.equal(task.y, simulated)
    with pytest.raises(ValueError, match=r"comes in a \.npy file"):
        read_kspace(tmp_path / "kspace.png")
    (tmp_path / "cut.npy").write_bytes((tmp_path / "slice.npy").read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"cut\.npy.*truncated"):
        read_kspace(tmp_path / "cut.npy")
    np.savez(tmp_path / "archive.npz", a=np.ones(3))
    (tmp_path / "archive.npz").rename(tmp_path / "archive.npy")
    with pytest.raises(ValueError, match="archive of arrays"):
        read_kspace(tmp_path / "archive.npy")


def test_grey_in_three_channels_is_a_grey_measurement(folder: Path) -> None:
    np.save(folder / "grey.npy", smooth_image().expand(3, -1, -1).numpy())
    assert torch.equal(prepare(load_job({}, write_job(folder, input="grey.npy"))).y, smooth_image())


def test_every_field_says_what_it_expects() -> None:
    for model in (Job, *OPERATORS.values()):
        for name, field in model.model_fields.items():
            assert name == "kind" or field.description, name


def test_atomic_folder(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"

    def fail() -> None:
        with atomic_folder(target) as place:
            (place / "x").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(target) as place:
        (place / "x").write_text("1")
    (target / "kept").write_text("2")
    with atomic_folder(target) as place:
        (place / "x").write_text("3")
    assert {path.name: path.read_text() for path in target.iterdir()} == {"x": "3", "kept": "2"}
    with pytest.raises(ValueError, match="is a file"), atomic_folder(target / "x" / "y"):
        pass
