"""`make data`: real wheels and real pip, offline."""

import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from alpenglow.distillation import fetch


def png(height: int, width: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> fetch.Package:
    """A wheel `pictures` where pip looks, and the entry that describes it."""
    contents = {"small.png": png(20, 30), "large.png": png(10, 3200)}
    metadata = "pictures-1.0.dist-info"
    with zipfile.ZipFile(tmp_path / "pictures-1.0-py3-none-any.whl", "w") as wheel:
        for name, data in contents.items():
            wheel.writestr(f"pictures/data/{name}", data)
        wheel.writestr(f"{metadata}/METADATA", "Metadata-Version: 2.1\nName: pictures\nVersion: 1.0\n")
        wheel.writestr(f"{metadata}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{metadata}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    digests = {name: hashlib.sha256(data).hexdigest()[:16] for name, data in contents.items()}
    return fetch.Package("pictures", "photos", "pictures/data", digests, wheel=True)


def test_files_are_fetched_once(
    tmp_path: Path, package: fetch.Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "PACKAGES", (package,))
    fetch.fetch(tmp_path / "data")
    folder = tmp_path / "data/photos"
    assert sorted(path.name for path in folder.iterdir()) == ["large.png", "small.png"]
    with PIL.Image.open(folder / "small.png") as image:
        assert image.size == (30, 20)
    with PIL.Image.open(folder / "large.png") as image:
        assert image.size == (1600, 5)
    # A second run needs no package.
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    fetch.fetch(tmp_path / "data")
    (folder / "small.png").unlink()
    with pytest.raises(RuntimeError, match=r"pip download .* failed"):
        fetch.fetch(tmp_path / "data")


def test_another_file_is_refused(
    tmp_path: Path, package: fetch.Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    package.files["large.png"] = "0" * 16
    monkeypatch.setattr(fetch, "PACKAGES", (package,))
    with pytest.raises(RuntimeError, match=r"large\.png of the package pictures is not the file"):
        fetch.fetch(tmp_path / "data")
    assert not (tmp_path / "data/photos/large.png").exists()


def test_a_missing_tool_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(fetch, "PACKAGES", (fetch.Package("p", "brain", ".", {"a": "b"}),))
    with pytest.raises(RuntimeError, match="apt-get is not here"):
        fetch.fetch(tmp_path)


def test_the_packages_of_the_zoo() -> None:
    """Every file that the recipes of the zoo name is fetched."""
    from alpenglow.distillation.config import load_recipe
    from alpenglow.distillation.sources import brain

    stored = {fetch._stored(name, package) for package in fetch.PACKAGES for name in package.files}
    recipe = load_recipe(Path(__file__).parents[1] / "engine/priors/zoo/photo-64.yaml")
    assert set(recipe.data.held_out) <= stored
    assert {name for scan in brain.SCANS for name in (scan.file, *scan.tissues)} <= stored
