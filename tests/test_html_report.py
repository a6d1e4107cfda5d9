"""The HTML report without a browser: what it holds, that it loads nothing, that nothing breaks out of it."""

import base64
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from alpenglow import Posterior
from alpenglow.cli import app
from alpenglow.html_report import write_report

HEIGHT, WIDTH, COUNT = 20, 26, 40
SHAPES = {1: "real", 2: "complex", 3: "RGB"}
EVIL = (
    '</script><script>window.broken = 1</script><img src="https://example.org/x" onerror="window.broken = 1">'
)


def make_posterior(channels: int, count: int = COUNT, **settings: Any) -> Posterior:
    """Samples of a smooth image whose spread grows from the left to the right, exactly none in column 0."""
    generator = torch.Generator().manual_seed(channels)
    rows = torch.linspace(-1.5, 1.5, HEIGHT)[:, None]
    columns = torch.linspace(-1, 2, WIDTH)
    mean = torch.stack([0.8 * torch.sin(rows + (c + 1) * columns + c) for c in range(channels)])
    std = torch.linspace(0, 0.3, WIDTH)

    def draw(*shape: int) -> Tensor:
        return mean + std * torch.randn(*shape, *mean.shape, generator=generator)

    known = {"method": "calibrated", "prior": "none", "operator": "Denoising", "noise_std": 0.05}
    posterior = Posterior.from_samples(
        draw(count),
        energy=100 * torch.rand(count, generator=generator),
        nfe=50,
        ancestors=torch.arange(count) // 2,
        settings=known | settings,
    )
    return posterior.with_map(mean).with_truth(draw())


class Page(HTMLParser):
    """Elements with their attributes, and the text of the scripts, as a browser's parser finds them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = path.read_text(encoding="utf-8")
        self.words = ""
        self.feed(self.text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script" and data.strip():
            self.scripts.append(data)
        elif self.lasttag != "style":
            self.words += data

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])

    def array(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        return np.frombuffer(base64.b64decode(self.data["maps"][name]), "<f4").reshape(shape)

    def samples(self) -> np.ndarray:
        """As the page's script decodes them."""
        shape, found = self.data["shape"], self.data["samples"]
        codes = np.frombuffer(base64.b64decode(found["codes"]), np.int8).reshape(found["count"], *shape)
        mean, std = (self.array(name, tuple(shape)).astype(float) for name in ("mean", "std"))
        return mean + std * found["step"] * codes


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "report.html"


@pytest.mark.parametrize("channels", SHAPES)
def test_values_decode_back(path: Path, channels: int) -> None:
    posterior = make_posterior(channels)
    write_report(posterior, path)
    page = Page(path)
    shape = (channels, HEIGHT, WIDTH)
    assert page.data["shape"] == list(shape)
    images = {
        "mean": posterior.mean,
        "std": posterior.std,
        "map": posterior.map_image,
        "truth": posterior.truth,
    }
    for name, image in images.items():
        assert np.array_equal(page.array(name, shape), image.numpy())  # type: ignore[union-attr]
    for name in ("r_hat", "ess", "mcse"):
        assert np.array_equal(page.array(f"diagnostic:{name}", shape), posterior.diagnostics[name])
    energy = np.frombuffer(base64.b64decode(page.data["energy"]), "<f4")
    assert np.array_equal(energy, posterior.energy.numpy())
    half = page.data["halfWidthInStd"] * posterior.std
    for bound, sign in zip(posterior.interval(0.9), (-1, 1), strict=True):
        torch.testing.assert_close(posterior.mean + sign * half, bound)
    assert page.data["samples"]["places"] == list(range(COUNT))
    error = np.abs(page.samples() - posterior.samples.numpy())  # type: ignore[union-attr]
    step = page.data["samples"]["step"]
    assert step < 2 * COUNT**0.5 / 127  # no score exceeds the root of the count
    assert (error <= 0.5 * step * posterior.std.numpy() + 1e-6).all()
    assert f"{HEIGHT}×{WIDTH} {SHAPES[channels]} image" in page.words


def test_colour_maps_are_whole(path: Path) -> None:
    write_report(make_posterior(1), path)
    maps = {
        name: np.frombuffer(base64.b64decode(text), np.uint8).reshape(256, 3).astype(int)
        for name, text in Page(path).data["colours"].items()
    }
    assert maps["spread"][0].sum() < 30 < 600 < maps["spread"][-1].sum()  # dark where the image is certain
    steps = [np.abs(np.diff(colours, axis=0)).max() for colours in maps.values()]
    assert max(steps) < 12
    assert np.abs(maps["phase"][0] - maps["phase"][-1]).max() < 12  # the circle closes
    assert np.abs(maps["phase"][0] - maps["phase"][128]).max() > 150


def test_the_page_loads_nothing(path: Path) -> None:
    write_report(make_posterior(1), path)
    page = Page(path)
    links = [v for _, attrs in page.elements for k, v in attrs.items() if k in ("src", "href", "srcset")]
    assert links == ["data:,"]
    assert page.text.replace("http://www.w3.org/2000/svg", "").count("://") == 0  # a namespace is no address
    assert not any(word in page.text for word in ("@import", "url(", "fetch(", "XMLHttpRequest", "import("))
    (policy,) = [a["content"] for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")  # type: ignore[union-attr]
    assert "unsafe" not in policy  # type: ignore[operator]


def test_text_cannot_break_out(path: Path) -> None:
    posterior = make_posterior(1, **{EVIL: EVIL, "list": [EVIL]}, job={"input": EVIL})
    posterior.diagnostics[EVIL] = posterior.std.numpy()
    write_report(posterior, path, name=EVIL)
    page = Page(path)
    assert len(page.scripts) == sum(tag == "script" for tag, _ in page.elements) == 2
    assert not any(tag == "img" for tag, _ in page.elements)
    assert f"diagnostic:{EVIL}" in page.data["maps"]
    assert page.words.count(EVIL) >= 5


def test_a_bound_on_the_size(path: Path) -> None:
    posterior = make_posterior(3)
    write_report(posterior, path)
    whole = path.stat().st_size / 1e6
    bound = whole - 0.03  # about 15 samples of 1560 bytes in base64
    write_report(posterior, path, max_megabytes=bound)
    page = Page(path)
    places = page.data["samples"]["places"]
    assert 1.0 * COUNT > len(places) > 0.4 * COUNT
    assert path.stat().st_size <= 1e6 * bound < path.stat().st_size + 10_000
    assert (places[0], places[-1]) == (0, COUNT - 1)
    assert set(np.diff(places)) <= {1, 2, 3}
    kept = posterior.samples[places].numpy()  # type: ignore[index]
    step = page.data["samples"]["step"]
    assert (np.abs(page.samples() - kept) <= 0.5 * step * posterior.std.numpy() + 1e-6).all()
    assert f"This page holds {len(places)} of {COUNT} samples" in page.words
    assert "--max-size" in page.words
    path.unlink()
    with pytest.raises(ValueError, match=r"3x20x26 need 0\.\d MB; got a bound of 0.01 MB: raise it"):
        write_report(posterior, path, max_megabytes=0.01)
    assert not path.exists()


def test_results_without_samples_or_spread(path: Path) -> None:
    full = make_posterior(1)
    bare = Posterior(mean=full.mean, std=full.std, energy=full.energy, nfe=1)
    write_report(bare, path)
    page = Page(path)
    assert page.data["samples"] is None
    assert "Samples were not kept" in page.words
    assert "None were recorded." in page.words
    reservoir = Posterior(full.mean, full.std, full.energy, 1, reservoir=full.samples[:9])  # type: ignore[index]
    write_report(reservoir, path)
    page = Page(path)
    assert (page.data["samples"]["count"], page.data["samples"]["places"]) == (9, None)
    assert f"9 of {COUNT} samples, a uniform subset" in page.words
    write_report(make_posterior(1, count=1), path)
    page = Page(path)
    assert "std" not in page.data["maps"]
    assert page.data["halfWidthInStd"] is None
    assert "there are no intervals" in page.words
    unsure = make_posterior(1)
    unsure.diagnostics.update(modes_measured=False, mode_log_weight_error=2.0)
    write_report(unsure, path)
    assert "could not be measured" in Page(path).words
    assert "a factor of e^2.0" in Page(path).words


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_posterior(1, operator="Größe <b>").save("out.h5")
    Path("text.h5").write_text("no HDF5")

    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["report", *arguments])
        return result.exit_code, result.output

    assert run("out.h5", "-o", "report.html") == (0, "Report: report.html\n")
    assert "out.h5 · alpenglow report" in Page(Path("report.html")).words
    assert "Größe <b>" in Page(Path("report.html")).words
    assert "alpenglow report out/result.h5 -o report.html" in run("--help")[1]
    before = sorted(tmp_path.iterdir())
    for arguments, message in {
        ("none.h5", "-o", "a.html"): "error: cannot load none.h5: no such file",
        ("text.h5", "-o", "a.html"): "error: cannot load text.h5: not an HDF5 file",
        ("out.h5", "-o", "a.pdf"): "error: cannot write the report a.pdf: expected a name that ends in .html",
        (
            "out.h5",
            "-o",
            "none/a.html",
        ): "error: cannot write the report none/a.html: there is no folder none",
        ("out.h5", "-o", "a.html", "--max-size", "0.001"): "error: the statistics of an image 1x20x26 need",
        ("out.h5",): "Missing option",
    }.items():
        code, output = run(*arguments)
        assert code == 2
        assert message in output
    assert sorted(tmp_path.iterdir()) == before


def test_other_channels_are_refused(path: Path) -> None:
    with pytest.raises(ValueError, match=r"shape \(4, 20, 26\); expected 1 channel \(grey\), 2 \(complex"):
        write_report(make_posterior(4), path)
    assert not path.exists()


def test_the_wheel_holds_the_assets(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    built = {path.name for path in (tmp_path / "alpenglow" / "assets").iterdir()}
    assert built == {path.name for path in (root / "engine" / "assets").iterdir()}
