"""The result object: construction, intervals, files, ArviZ, figures."""

import dataclasses
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from alpenglow import evaluation, statistics
from alpenglow.io import results
from alpenglow.plotting import plot_posteriors
from alpenglow.posterior import Posterior

SHAPE = (1, 12, 16)
SETTINGS = {
    "method": "calibrated",
    "noise_std": 0.05,
    "seed": 3,
    "operator": "box",
    "versions": {"torch": "2.13"},
}


def make(count: int = 24, shape: tuple[int, int, int] = SHAPE, seed: int = 0) -> Posterior:
    generator = torch.Generator().manual_seed(seed)
    width = torch.linspace(0.05, 0.4, shape[2])
    samples = 0.5 * torch.randn(shape, generator=generator) + width * torch.randn(
        count, *shape, generator=generator
    )
    truth, samples = samples[0], samples[1:]
    return Posterior.from_samples(
        samples, energy=torch.arange(count - 1.0), nfe=100, diagnostics={"acceptance": 0.7}, settings=SETTINGS
    ).with_truth(truth)


def assert_equal(a: Posterior, b: Posterior) -> None:
    for field in dataclasses.fields(Posterior):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, torch.Tensor):
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
        elif field.name == "diagnostics":
            assert x.keys() == y.keys()
            for key, value in x.items():
                np.testing.assert_equal(value, y[key])
                assert type(value) is type(y[key])
        else:
            assert x == y


def test_from_samples() -> None:
    posterior = make()
    assert posterior.samples is not None
    torch.testing.assert_close(posterior.mean, posterior.samples.mean(0))
    torch.testing.assert_close(posterior.std, posterior.samples.std(0))
    assert posterior.num_samples == 23
    assert posterior.effective_samples == pytest.approx(23)
    assert posterior.diagnostics["acceptance"] == 0.7
    assert posterior.diagnostics["ess"].shape == posterior.diagnostics["r_hat"].shape == SHAPE
    assert posterior.diagnostics["r_hat_max"] < 2
    assert "calibrated" in repr(posterior)
    assert len(repr(posterior)) < 200


def test_lineages_widen_the_interval() -> None:
    posterior = make()
    ancestors = torch.arange(23) // 4
    resampled = Posterior.from_samples(posterior.samples, energy=posterior.energy, nfe=1, ancestors=ancestors)
    assert resampled.diagnostics["lineages"] == 6
    fewer = dataclasses.replace(posterior, diagnostics={"ess_pooled": 5.0})
    assert evaluation.interval_width(fewer) > evaluation.interval_width(posterior)


def test_stream_equals_samples() -> None:
    kept = make(60)
    assert kept.samples is not None
    moments = statistics.RunningMoments.empty(SHAPE)
    reservoir = statistics.Reservoir.empty(SHAPE, capacity=100)
    for ids in torch.arange(59).split(16):
        moments = statistics.update(moments, kept.samples[ids])
        reservoir = statistics.collect(reservoir, kept.samples[ids], ids)
    streamed = Posterior.from_stream(
        moments, energy=kept.energy, nfe=100, reservoir=reservoir, settings=SETTINGS
    )
    assert streamed.samples is None
    torch.testing.assert_close(streamed.mean, kept.mean)
    torch.testing.assert_close(streamed.std, kept.std)
    torch.testing.assert_close(streamed.quantile([0.1, 0.8]), kept.quantile([0.1, 0.8]))
    for mine, theirs in zip(streamed.interval(), kept.interval(), strict=True):
        torch.testing.assert_close(mine, theirs)
    np.testing.assert_allclose(streamed.diagnostics["mcse"], kept.diagnostics["mcse"], rtol=1e-5)
    bare = Posterior.from_stream(moments, energy=kept.energy, nfe=100)
    for call in (lambda: bare.quantile(0.5), bare.to_arviz):
        with pytest.raises(ValueError, match=r"was kept|were not kept"):
            call()


def test_intervals_and_coverage() -> None:
    posterior = make(33, (1, 64, 64))
    assert posterior.coverage() == pytest.approx(0.9, abs=0.03)
    assert posterior.coverage(kind="quantile") == pytest.approx(0.848, abs=0.03)
    assert posterior.coverage(posterior.mean, 0.5) == 1
    with pytest.raises(ValueError, match="kind"):
        posterior.interval(0.9, kind="hpd")
    with pytest.raises(ValueError, match="expected an image"):
        posterior.coverage(torch.zeros(64, 64))


def test_refuses_bad_input() -> None:
    samples, energy = torch.zeros(4, *SHAPE), torch.zeros(4)
    broken = samples.clone()
    broken[2, 0, 0, 0] = float("nan")
    cases = [
        (lambda: Posterior.from_samples(broken, energy=energy, nfe=1), r"1 of 4 samples .*\[2\]"),
        (lambda: Posterior.from_samples(samples, energy=energy[:3], nfe=1), "samples of shape"),
        (lambda: Posterior.from_samples(samples, energy=energy, nfe=-1), "nfe"),
        (
            lambda: Posterior.from_samples(samples, energy=energy, nfe=1, settings={"path": Path()}),
            "JSON-able",
        ),
        (
            lambda: Posterior.from_samples(samples, energy=energy, nfe=1, diagnostics={"a/b": 1}),
            "cannot name",
        ),
        (
            lambda: Posterior.from_samples(samples, energy=energy, nfe=1, diagnostics={"a": object()}),
            "diagnostic a",
        ),
        (lambda: make().with_map(torch.zeros(3, 12, 16)), "map_image of shape"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_file_round_trip(tmp_path: Path) -> None:
    posterior = dataclasses.replace(
        make(),
        diagnostics={
            **make().diagnostics,
            "energies": np.ones((3, 23)),
            "levels": torch.arange(3.0),
            "warning": "few lineages",
            "steps": [1, 2],
            "infinite": float("inf"),
        },
    ).with_map(torch.full(SHAPE, 0.25))
    path = tmp_path / "new folder" / "out.h5"
    posterior.save(path)
    assert_equal(Posterior.load(path), posterior)
    assert [p.name for p in path.parent.iterdir()] == ["out.h5"]
    single = Posterior.from_samples(torch.zeros(1, *SHAPE), energy=torch.zeros(1), nfe=0)
    single.save(path)
    assert_equal(Posterior.load(path), single)


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.h5"
    make().save(path)
    before = path.read_bytes()
    write_array, calls = results._write_array, []

    def fail_at_the_fourth(group: h5py.Group, name: str, array: np.ndarray) -> None:
        calls.append(name)
        if len(calls) == 4:
            raise OSError("No space left on device")
        write_array(group, name, array)

    monkeypatch.setattr(results, "_write_array", fail_at_the_fourth)
    with pytest.raises(OSError, match="No space left"):
        make(seed=1).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_load_says_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "out.h5"
    with pytest.raises(ValueError, match="no such file"):
        Posterior.load(path)
    make().save(path)
    whole = path.read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cannot load .*(truncated|not an HDF5)"):
            Posterior.load(path)
    path.write_bytes(whole)
    with h5py.File(path, "a") as file:
        offset = file["samples"].id.get_chunk_info(0).byte_offset
    damaged = bytearray(path.read_bytes())
    damaged[offset + 50] ^= 255
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="truncated or damaged"):
        Posterior.load(path)
    path.write_bytes(whole)
    with h5py.File(path, "a") as file:
        file.attrs["schema_version"] = 99
    with pytest.raises(ValueError, match="schema version 99"):
        Posterior.load(path)
    with h5py.File(path, "w") as file:
        file["x"] = 1
    with pytest.raises(ValueError, match="not one written by"):
        Posterior.load(path)


def test_arviz_round_trip(tmp_path: Path) -> None:
    arviz = pytest.importorskip("arviz")
    posterior = make()
    assert posterior.samples is not None
    assert posterior.truth is not None
    data = posterior.to_arviz()
    data.to_netcdf(str(tmp_path / "data.nc"))
    data = arviz.from_netcdf(str(tmp_path / "data.nc"))
    assert data.posterior["image"].dims == ("chain", "draw", "channel", "row", "column")
    np.testing.assert_array_equal(data.posterior["image"][0], posterior.samples)
    np.testing.assert_array_equal(data.sample_stats["energy"][0], posterior.energy)
    np.testing.assert_array_equal(data.constant_data["truth"], posterior.truth)
    assert data.attrs["nfe"] == 100


def opened(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB")).astype(int)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_plot(tmp_path: Path, channels: int) -> None:
    posterior = make(shape=(channels, 12, 16))
    posterior.plot(tmp_path / "few.png", max_samples=1)
    posterior.with_map(posterior.mean).plot(tmp_path / "more.png", max_samples=3)
    few, more = opened(tmp_path / "few.png"), opened(tmp_path / "more.png")
    assert few.shape[0] == more.shape[0] > 200
    assert more.shape[1] - few.shape[1] == pytest.approx(3 * 1.6 * 160, abs=3)  # three columns more
    assert len(np.unique(few.reshape(-1, 3), axis=0)) > 50
    assert sorted(p.name for p in tmp_path.iterdir()) == ["few.png", "more.png"]


def test_plot_rows_with_measurements(tmp_path: Path) -> None:
    image, kspace = make(), make(shape=(2, 12, 16))
    path = tmp_path / "rows.png"
    measurements = [torch.zeros(1, 6, 8), torch.randn(4, 12, 16, dtype=torch.complex64)]
    plot_posteriors([image, kspace], path, measurements=measurements, title="two rows")
    one = tmp_path / "one.png"
    plot_posteriors([image], one, measurements=measurements[:1], title="one row")
    assert opened(path).shape[0] > opened(one).shape[0]
    assert opened(path).shape[1] == opened(one).shape[1]


def test_plot_of_a_single_sample_without_truth(tmp_path: Path) -> None:
    Posterior.from_samples(torch.zeros(1, *SHAPE), energy=torch.zeros(1), nfe=1).plot(tmp_path / "one.png")
    assert opened(tmp_path / "one.png").shape[0] > 100


def test_plot_refuses_and_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    for call in (
        lambda: plot_posteriors([], path),
        lambda: plot_posteriors([make()], path, labels=["a", "b"]),
        lambda: plot_posteriors([make()], path, measurements=[torch.zeros(7)]),
        lambda: make().plot(path, max_samples=-1),
    ):
        with pytest.raises(ValueError, match=r"expected|must be"):
            call()
    assert not list(tmp_path.iterdir())


def test_evaluation() -> None:
    posterior = make(33, (3, 16, 24))
    assert posterior.truth is not None
    figures = evaluation.evaluate(posterior.with_map(posterior.truth), posterior.truth)
    mse = (posterior.mean - posterior.truth).square().mean().item()
    assert figures["psnr"] == pytest.approx(10 * np.log10(4 / mse), rel=1e-5)
    assert figures["map_psnr"] == float("inf")
    assert figures["map_ssim"] == pytest.approx(1)
    assert 0 < figures["ssim"] < 1
    assert figures["coverage"] == posterior.coverage()
    assert figures["error_correlation"] > 0.2  # the width of the posterior grows to the right
    with pytest.raises(ValueError, match=re.escape("(3, 16, 24) and (1, 16, 24)")):
        evaluation.psnr(posterior.mean, torch.zeros(1, 16, 24))
