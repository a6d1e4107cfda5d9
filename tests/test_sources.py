"""Training images: every kind of file and data set, crops, what is held out, what is skipped, and memory."""

import gzip
import pickle
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import PIL.Image
import pytest
import tifffile
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from alpenglow.distillation.config import DataConfig
from alpenglow.distillation.sources import BrainSlices, IndexedSource, brain, fashion, nifti, open_source
from alpenglow.distillation.sources.fashion import read_idx
from alpenglow.distillation.sources.recent import Recent
from alpenglow.distillation.sources.units import SkipError, to_units
from alpenglow.io import read_image


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def opened(path: Path, **options: Any) -> IndexedSource:
    source = open_source(DataConfig(source=str(path), **options))
    assert isinstance(source, IndexedSource)
    return source


def draws(source: Any, count: int) -> Tensor:
    return torch.stack([source.draw(seeded(seed)) for seed in range(count)])


def levels(images: Tensor) -> set[float]:
    """The values of images that are each constant, to four decimals."""
    assert (images == images[:, :1, :1, :1]).all()
    return {round(value, 4) for value in images[:, 0, 0, 0].tolist()}


def units(*pixels: float) -> set[float]:
    """The same of 8-bit values."""
    return {round(value / 127.5 - 1, 4) for value in pixels}


def random_pixels(shape: tuple[int, ...], dtype: type = np.uint8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def write_png(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True, parents=True)
    PIL.Image.fromarray(pixels).save(path)


def skips(match: str = "is skipped") -> Any:
    """Expects the warning, wherever in the block an image is found to be bad."""
    return pytest.warns(UserWarning, match=match)


def truncate(path: Path, share: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])


# Units


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (np.array([[0, 255]], np.uint8), [-1, 1]),
        (np.array([[0, 65535]], np.uint16), [-1, 1]),
        (np.array([[0, 65535]], ">u2"), [-1, 1]),
        (np.array([[False, True]]), [-1, 1]),
        (np.array([[0.25, -3]], ">f4"), [0.25, -3]),
        (np.array([[0.25, -3]], np.float16), [0.25, -3]),
        (np.array([[0.25, -3]], np.longdouble), [0.25, -3]),
        (torch.tensor([[0, 255]], dtype=torch.uint8), [-1, 1]),
        (torch.tensor([[0, 65535]], dtype=torch.uint16), [-1, 1]),
        (torch.tensor([[False, True]]), [-1, 1]),
        (torch.tensor([[0.25, -3]], dtype=torch.bfloat16), [0.25, -3]),
        ((np.array([[0.25, -3]]), 7), [0.25, -3]),
        ([torch.tensor([[[0.25, -3]]]), "a label"], [0.25, -3]),
        (np.array([[1 + 2j, 3 - 4j]]), [1, 3, 2, -4]),
        (np.array([[[1 + 2j, 3 - 4j]]], ">c8"), [1, 3, 2, -4]),
        (torch.tensor([[1 + 2j, 3 - 4j]]).conj(), [1, 3, -2, 4]),
    ],
)
def test_values(image: Any, expected: list[float]) -> None:
    got = to_units(image)
    assert got.dtype == torch.float32
    assert got.shape == (len(expected) // 2, 1, 2)
    assert got.flatten().tolist() == expected


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_channels_come_first(channels: int) -> None:
    pixels = np.random.default_rng(0).random((channels, 6, 7), np.float32)
    expected = torch.from_numpy(pixels)
    assert torch.equal(to_units(pixels), expected)
    assert torch.equal(to_units(pixels.transpose(1, 2, 0)), expected)
    # Tensors have them first, whatever their sizes.
    assert torch.equal(to_units(expected.permute(1, 2, 0)), expected.permute(1, 2, 0))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_pil_images_are_what_their_files_are(tmp_path: Path, mode: str) -> None:
    if mode == "I;16":
        picture = PIL.Image.fromarray(random_pixels((5, 6), np.uint16))
    else:
        picture = PIL.Image.fromarray(random_pixels((5, 6, 4))).convert(mode)
    picture.save(tmp_path / "x.png")
    got = to_units(picture)
    assert got.shape == ((1 if mode in ("1", "L", "LA", "I;16") else 3), 5, 6)
    torch.testing.assert_close(got, read_image(tmp_path / "x.png"), rtol=0, atol=1e-6)


def test_the_transparency_of_a_palette_is_ignored() -> None:
    picture = PIL.Image.fromarray(random_pixels((5, 6, 3))).convert("P")
    expected = to_units(picture)
    picture.info["transparency"] = bytes(range(256))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(to_units(picture), expected)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (np.zeros((4, 4), np.int16), "ndarray of int16, expected an image of uint8"),
        (torch.zeros(4, 4, dtype=torch.int64), "torch.int64, expected uint8"),
        (PIL.Image.new("I", (4, 4)), "int32"),
        ({"image": np.zeros((4, 4))}, "it is a dict"),
        ((), "expected"),
        (None, "NoneType"),
        (np.zeros(4), r"shape \(4,\)"),
        (np.zeros((2, 3, 4, 4)), r"shape \(2, 3, 4, 4\)"),
        (torch.zeros(3, 0, 4), r"shape \(3, 0, 4\)"),
        (np.zeros((8, 5, 5), np.complex64), "8 channels, expected one: combine the coils"),
    ],
)
def test_what_is_no_image(item: Any, message: str) -> None:
    with pytest.raises(SkipError, match=message):
        to_units(item)


# Files

COLOUR = np.stack([np.tile(np.linspace(20, 200, 9), (8, 1)), np.full((8, 9), 90), np.full((8, 9), 160)], -1)


def write_jpeg(path: Path, shift: int) -> Tensor:
    PIL.Image.fromarray(np.uint8(COLOUR + shift)).save(path, quality=100, subsampling=0)
    return torch.from_numpy((COLOUR + shift) / 127.5 - 1).permute(2, 0, 1)


def write_tiff(path: Path, shift: int) -> Tensor:
    pixels = np.uint16(COLOUR * 200 + shift)
    tifffile.imwrite(path, pixels, photometric="rgb")
    return torch.from_numpy(pixels / 32767.5 - 1).permute(2, 0, 1)


def write_transparent(path: Path, shift: int) -> Tensor:
    pixels = np.dstack([np.uint8(COLOUR + shift), random_pixels((8, 9))])
    PIL.Image.fromarray(pixels).save(path)
    return torch.from_numpy(pixels[:, :, :3] / 127.5 - 1).permute(2, 0, 1)


def write_complex(path: Path, shift: int) -> Tensor:
    pixels = COLOUR[:, :, 0] + 1j * (COLOUR[:, :, 1] + shift)
    np.save(path, pixels)
    return torch.stack([torch.from_numpy(pixels.real), torch.from_numpy(pixels.imag)])


def write_npy(path: Path, shift: int) -> Tensor:
    np.save(path, np.uint8(COLOUR + shift))
    return torch.from_numpy((COLOUR + shift).astype(np.uint8) / 127.5 - 1).permute(2, 0, 1)


@pytest.mark.parametrize(
    ("suffix", "write", "tolerance"),
    [
        (".png", write_transparent, 1e-6),
        (".JPG", write_jpeg, 0.03),
        (".tif", write_tiff, 1e-6),
        (".npy", write_npy, 1e-6),
        (".npy", write_complex, 1e-5),
    ],
    ids=["PNG", "JPEG", "TIFF", "NPY", "complex NPY"],
)
def test_a_folder_of_images(
    tmp_path: Path, suffix: str, write: Callable[[Path, int], Tensor], tolerance: float
) -> None:
    (tmp_path / "deeper").mkdir()
    training = write(tmp_path / f"a{suffix}", 0)
    held_out = write(tmp_path / f"deeper/b{suffix}", 30)
    source = opened(tmp_path)
    assert source.image_shape == training.shape
    drawn = source.draw(seeded(0))
    assert drawn.dtype == torch.float32
    torch.testing.assert_close(drawn, training.float(), rtol=0, atol=tolerance)
    torch.testing.assert_close(source.held_out(5), held_out[None].float(), rtol=0, atol=tolerance)


def test_other_files_of_a_folder_are_ignored(tmp_path: Path) -> None:
    """Also hidden ones, which may be copies of held-out images."""
    for k in range(3):
        write_png(tmp_path / f"{k}.png", np.full((8, 8), 50 * k, np.uint8))
    for name in (".hidden.png", ".thumbnails/2.png"):
        write_png(tmp_path / name, np.full((8, 8), 200, np.uint8))
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = opened(tmp_path)
    assert levels(draws(source, 40)) == units(0, 50)


GREY, FIRST, LAST = (40, 6, 7), (40, 3, 6, 7), (40, 6, 7, 3)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        (GREY, np.uint8), (FIRST, np.uint8), (LAST, np.uint8), (GREY, np.uint16), (LAST, np.uint16),
        (GREY, np.float32), (FIRST, np.float32), (GREY, np.complex64),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".npy", ".h5"])
def test_a_stack(tmp_path: Path, shape: tuple[int, ...], dtype: type, suffix: str) -> None:
    pixels = random_pixels(shape, np.uint16)
    stack = (pixels + 1j * pixels[::-1] if dtype == np.complex64 else pixels.astype(dtype)).astype(dtype)
    path = tmp_path / f"stack{suffix}"
    if suffix == ".npy":
        np.save(path, stack)
    else:
        with h5py.File(path, "w") as file:
            file.create_dataset("group/images", data=stack, chunks=True, compression="gzip")
            file["mask"] = np.ones((6, 7))
    images = stack.transpose(0, 3, 1, 2) if shape == LAST else stack
    expected = torch.from_numpy(images.copy()).reshape(40, -1, 6, 7)
    if dtype == np.complex64:
        expected = torch.cat([expected.real, expected.imag], 1)
    elif dtype != np.float32:
        expected = expected.double() * 2 / np.iinfo(dtype).max - 1
    source = opened(path)
    assert source.image_shape == tuple(expected.shape[1:])
    torch.testing.assert_close(source.held_out(99), expected[38:].float())
    for image in draws(source, 5):
        assert (expected[:38] - image).abs().amax((1, 2, 3)).min() < 1e-6


def test_a_dataset_of_an_hdf5_file(tmp_path: Path) -> None:
    path = tmp_path / "scan.h5"
    with h5py.File(path, "w") as file:
        file["kspace"] = np.zeros((4, 8, 6, 6), np.complex64)
        file["images"] = np.ones((4, 6, 6), np.float32)
    with pytest.raises(ValueError, match=r"2 stacks \(images, kspace\); name one in `dataset`"):
        opened(path)
    with pytest.raises(ValueError, match=r"scan\.h5 has no dataset 'image'"):
        opened(path, dataset="image")
    with skips(), pytest.raises(ValueError, match="8 channels, expected one: combine the coils"):
        opened(path, dataset="kspace")
    assert levels(draws(opened(path, dataset="images"), 3)) == {1.0}


# NIfTI

# Right to left, anterior to posterior, inferior to superior: two axes are to be flipped.
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def write_nifti(path: Path, canonical: np.ndarray) -> None:
    """Values [X, Y, Z], right, anterior, superior, stored as scanners do: other axes, int16, scaled."""
    stored = np.round(canonical[::-1, ::-1].transpose(2, 0, 1) * 1000).astype(np.int16)
    affine = LPS[:, [2, 0, 1, 3]]
    image = nibabel.Nifti1Image(stored, affine)
    image.header.set_slope_inter(0.5, 0)
    nibabel.save(image, path)


def head(seed: int, air: int = 0) -> np.ndarray:
    """Random values [8, 9, 10] in multiples of 1 / 1000; `air` slices at the top are 0."""
    values = np.random.default_rng(seed).integers(100, 1000, (8, 9, 10)) / 1000
    values[:, :, 10 - air :] = 0
    return values


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_slices_of_volumes(tmp_path: Path, axis: int, suffix: str) -> None:
    """As radiologists hold them: rows from superior (in axial slices anterior) down, columns to the right."""
    volumes = [head(seed) for seed in range(3)]
    for k, volume in enumerate(volumes):
        write_nifti(tmp_path / f"{k}{suffix}", volume)
    source = opened(tmp_path, axis=axis)

    def slices(volume: np.ndarray) -> Tensor:
        scaled = 2 * volume / np.percentile(volume, 99.5) - 1
        rows = {0: scaled[:, :, ::-1].transpose(0, 2, 1), 1: scaled[:, :, ::-1].transpose(1, 2, 0)}
        rows[2] = scaled[:, ::-1].transpose(2, 1, 0)
        return torch.from_numpy(rows[axis].copy()).float()[:, None]

    # Of several files the last one is held out as a whole.
    torch.testing.assert_close(source.held_out(99), slices(volumes[2]))
    known = torch.cat([slices(volume) for volume in volumes[:2]])
    nearest = [(known - image).abs().amax((1, 2, 3)) for image in draws(source, 60)]
    assert all(distance.min() < 1e-5 for distance in nearest)
    assert len({int(distance.argmin()) for distance in nearest}) > len(known) / 2


def test_a_single_volume_with_air_above_the_head(tmp_path: Path) -> None:
    """Its last slices, all blank, are not the ones that are held out."""
    write_nifti(tmp_path / "head.nii.gz", head(0, air=4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = opened(tmp_path / "head.nii.gz")
        assert len(source.held) == 1
        assert len(source.training) == 5
        assert source.held_out(9).min() > -0.9
        assert draws(source, 20).amin((1, 2, 3)).min() > -0.9


def test_blank_slices_of_several_volumes_are_skipped(tmp_path: Path) -> None:
    for k in range(3):
        write_nifti(tmp_path / f"{k}.nii", head(k, air=6))
    with skips("the slice [4-9] is blank"):
        source = opened(tmp_path)
        assert draws(source, 20).amin((1, 2, 3)).min() > -0.9
        assert len(source.held_out(99)) == 4


def test_volumes_of_one_time_and_of_many(tmp_path: Path) -> None:
    affine, values = np.eye(4), np.float32(head(0))
    nibabel.save(nibabel.Nifti1Image(values[..., None], affine), tmp_path / "one.nii")
    assert opened(tmp_path / "one.nii").image_shape == (1, 9, 8)
    refused = {
        "many": np.stack([values, values], -1),
        "plane": values[0],
        "complex": np.complex64(values),
        "zero": 0 * values,
    }
    for name, array in refused.items():
        nibabel.save(nibabel.Nifti1Image(array, affine), tmp_path / f"{name}.nii")
        with pytest.raises(ValueError, match=f"{name}.nii"):
            opened(tmp_path / f"{name}.nii")


def test_a_truncated_volume_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And read once only: its header promises slices."""
    for k in range(4):
        write_nifti(tmp_path / f"{k}.nii.gz", head(k))
    truncate(tmp_path / "1.nii.gz", 0.9)
    reads: list[str] = []
    original = nifti.read_volume
    monkeypatch.setattr(nifti, "read_volume", lambda path: (reads.append(path.name), original(path))[1])
    with skips(r"skipped \(\d+ so far\): cannot read .*1\.nii\.gz"):
        source = opened(tmp_path)
        images = draws(source, 60)
    assert len(images.unique(dim=0)) > 10
    assert sorted(reads) == ["0.nii.gz", "1.nii.gz", "2.nii.gz", "3.nii.gz"]
    with pytest.raises(ValueError, match=r"cannot read .*1\.nii\.gz"):
        opened(tmp_path / "1.nii.gz")


def test_nibabel_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one more file that is skipped."""
    write_nifti(tmp_path / "head.nii", head(0))
    write_png(tmp_path / "a.png", random_pixels((8, 8)))
    monkeypatch.setitem(__import__("sys").modules, "nibabel", None)
    with pytest.raises(ValueError, match=r"pip install 'alpenglow\[train\]'"):
        opened(tmp_path)
    with pytest.raises(ValueError, match=r"pip install 'alpenglow\[train\]'"):
        BrainSlices(tmp_path)


# What cannot be read


def test_unreadable_files_are_counted(tmp_path: Path) -> None:
    for k in range(4):
        write_png(tmp_path / f"{k}.png", random_pixels((8, 8), seed=k))
    write_png(tmp_path / "cut.png", random_pixels((8, 8), seed=9))
    truncate(tmp_path / "cut.png", 0.1)
    (tmp_path / "text.tif").write_text("no image")
    (tmp_path / "empty.h5").touch()
    (tmp_path / "empty.nii.gz").touch()
    np.save(tmp_path / "stack.npy", np.zeros((30, 8, 8)))
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    np.save(tmp_path / "cut.npy", np.zeros((8, 8)))
    truncate(tmp_path / "cut.npy")
    with skips(r"7 of 11 files in .* cannot be read; .*cut\.npy.*They are skipped"):
        source = opened(tmp_path)
    assert len(draws(source, 40).unique(dim=0)) == 3
    assert len(source.held_out(9)) == 1


def test_a_picture_that_ends_early_is_skipped(tmp_path: Path) -> None:
    """Its header is good, so that it is found when it is drawn."""
    for k in range(4):
        write_png(tmp_path / f"{k}.png", random_pixels((30, 30), seed=k))
        truncate(tmp_path / f"{k}.png", 0.5 if k == 2 else 1)
    with skips(r"image 2 is skipped \(1 so far\): cannot read .*2\.png"):
        source = opened(tmp_path)
        images = draws(source, 30)
    assert len(images.unique(dim=0)) == 2
    for k in (0, 1, 3):
        truncate(tmp_path / f"{k}.png")
    with skips(), pytest.raises(ValueError, match=r"none of the training images can be used; .*\.png"):
        opened(tmp_path)


def test_held_out_images_that_cannot_be_read_are_an_error_at_once(tmp_path: Path) -> None:
    for k in range(4):
        write_png(tmp_path / f"{k}.png", random_pixels((30, 30), seed=k))
    truncate(tmp_path / "3.png")
    with (
        skips("image 3 is skipped"),
        pytest.raises(ValueError, match=r"none of the 1 held-out images can be used; .*3\.png"),
    ):
        opened(tmp_path)


@pytest.mark.parametrize("image_size", [None, 8])
def test_odd_images_are_skipped_also_the_first(tmp_path: Path, image_size: int | None) -> None:
    for k in range(20):
        shape = (8, 8, 3) if k not in (0, 7, 19) else (5, 8, 3) if k == 7 else (8, 8)
        write_png(tmp_path / f"{k:02d}.png", np.full(shape, 10 * k, np.uint8))
    with skips(r"is skipped \(1 so far\): it is [15]x8x8|it is 3x5x8, expected"):
        source = opened(tmp_path, held_out=("18.png", "19.png"), image_size=image_size)
        drawn = levels(draws(source, 150))
        held_out = source.held_out(9)
    assert source.image_shape == (3, 8, 8)
    assert drawn == units(*(10 * k for k in range(18) if k not in (0, 7)))
    assert len(held_out) == (9 if image_size else 1)
    assert levels(held_out) == units(180)


@pytest.mark.parametrize("odd", range(5))
def test_the_shape_is_that_of_most_images(odd: int) -> None:
    images = [np.zeros((4, 6 if k == odd else 4)) for k in range(6)]
    with skips("it is 1x4x6, expected 1x4x4"):
        source = IndexedSource(images)
        assert draws(source, 50).shape == (50, 1, 4, 4)


def test_few_usable_images_among_many_are_found_again_and_again() -> None:
    """And warnings are few: for the 1st and the 10th that is skipped."""
    images = [np.zeros((4, 4)) for _ in range(3)] + [np.zeros(4)] * 60
    with skips("so far") as caught:
        source = IndexedSource(images, held_out=[0])
        draws(source, 100)
    counts = [str(warning.message).split("(")[1].split(" so far")[0] for warning in caught]
    assert counts == ["1", "10"]
    with (
        skips(),
        pytest.raises(ValueError, match="none of the training images can be used"),
    ):
        IndexedSource(images[3:])
    with (
        skips(),
        pytest.raises(ValueError, match=r"none of the 2 training .*it is 1x4x4, expected 1x8x8 or larger"),
    ):
        IndexedSource(images[:3], image_size=8)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
@pytest.mark.parametrize("image_size", [None, 4])
def test_images_that_are_not_finite(tmp_path: Path, bad: float, image_size: int | None) -> None:
    images = np.zeros((60, 4, 4))
    images[[3, 57], 2, 1] = bad
    np.save(tmp_path / "x.npy", images)
    with skips("NaN or infinity"):
        source = opened(tmp_path / "x.npy", image_size=image_size)
        assert draws(source, 200).isfinite().all()
        held_out = source.held_out(9)
    assert held_out.isfinite().all()
    assert len(held_out) == (9 if image_size else 2)
    np.save(tmp_path / "x.npy", np.full((60, 4, 4), bad))
    with skips(), pytest.raises(ValueError, match=r"100 images in a row .*NaN or infinity"):
        opened(tmp_path / "x.npy", image_size=image_size)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("x.npy", np.zeros((8, 8), np.uint8), r"uint8 \(8, 8\); expected \[N, H, W\]"),
        ("x.npy", np.zeros((4, 8, 8), np.int32), r"int32 \(4, 8, 8\)"),
        ("x.npy", np.zeros((0, 8, 8), np.uint8), r"x\.npy"),
        ("x.npy", np.zeros((1, 8, 8), np.uint8), "holds 1 images; expected two or more"),
        ("x.npy", np.array([{"a": 1}], dtype=object), r"x\.npy is not a readable \.npy array"),
        ("x.h5", np.zeros((4, 8, 8), np.int32), r"int32 \(4, 8, 8\)"),
        ("x.h5", np.zeros((8, 8), np.uint8), "holds 0 stacks"),
    ],
)
def test_refused_stacks(tmp_path: Path, name: str, array: np.ndarray, message: str) -> None:
    if name.endswith(".npy"):
        np.save(tmp_path / name, array)
    else:
        with h5py.File(tmp_path / name, "w") as file:
            file["images"] = array
    with pytest.raises(ValueError, match=message):
        opened(tmp_path / name)


def test_refused_places(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither 'fashion-mnist' nor .*existing \.npy"):
        opened(tmp_path / "absent.npy")
    with pytest.raises(ValueError, match="'mnist' is neither"):
        open_source(DataConfig(source="mnist"))
    with pytest.raises(ValueError, match="holds no image file"):
        opened(tmp_path)
    write_png(tmp_path / "a.png", random_pixels((8, 8)))
    with pytest.raises(ValueError, match="is neither"):
        opened(tmp_path / "a.png")
    np.save(tmp_path / "stack.npy", random_pixels((9, 8, 8)))
    truncate(tmp_path / "stack.npy")
    with pytest.raises(ValueError, match=r"stack\.npy is not a readable \.npy array"):
        opened(tmp_path / "stack.npy")
    (tmp_path / "x.h5").write_bytes(b"\x89HDF\r\n\x1a\n and no more")
    with pytest.raises(ValueError, match=r"cannot read .*x\.h5"):
        opened(tmp_path / "x.h5")


def test_data_sets_with_a_name_take_no_options() -> None:
    with pytest.raises(ValueError, match="'brain' takes no axis, image_size"):
        open_source(DataConfig(source="brain", image_size=64, axis=0, noise_floor=0.1))


# Held out


def numbered(path: Path, count: int = 60) -> Path:
    """A stack whose image k has the value k."""
    np.save(path, np.broadcast_to(np.arange(count, dtype=np.float32)[:, None, None], (count, 12, 12)))
    return path


@pytest.mark.parametrize("image_size", [None, 5])
def test_held_out_images_are_never_drawn(tmp_path: Path, image_size: int | None) -> None:
    source = opened(numbered(tmp_path / "x.npy"), image_size=image_size)
    # Means of blocks and weights of filters round.
    held_out, drawn = (
        {round(value) for value in images.mean((1, 2, 3)).tolist()}
        for images in (source.held_out(50), draws(source, 500))
    )
    assert held_out == {57, 58, 59}
    assert drawn == set(range(57))
    assert len(source.held_out(50)) == (50 if image_size else 3)
    assert torch.equal(source.held_out(50), source.held_out(50))
    assert torch.equal(source.held_out(2), source.held_out(50)[:2])


def test_named_files_are_held_out(tmp_path: Path) -> None:
    for name, level in (("a", 0), ("sub/a", 50), ("b", 100), ("c", 150)):
        write_png(tmp_path / f"{name}.png", np.full((6, 6), level, np.uint8))
    source = opened(tmp_path, held_out=("a.png",))
    assert levels(source.held_out(9)) == units(0, 50)
    assert levels(draws(source, 40)) == units(100, 150)
    assert "a.png" in source.description
    with pytest.raises(ValueError, match=r"held_out names d\.png, e\.png"):
        opened(tmp_path, held_out=("a.png", "e.png", "d.png"))
    with pytest.raises(ValueError, match="4 of 4 images are held out; expected some, not all"):
        opened(tmp_path, held_out=("a.png", "b.png", "c.png"))


def test_held_out_indices() -> None:
    images = [torch.full((1, 2, 2), float(k)) for k in range(10)]
    source = IndexedSource(images, held_out=[7, 3, 7])
    assert source.held_out(9)[:, 0, 0, 0].tolist() == [7, 3]
    assert levels(draws(source, 200)) == {0, 1, 2, 4, 5, 6, 8, 9}
    # -1 would be an image of the training set.
    for wrong, message in (
        ([-1], "image -1; expected 0 to 9"),
        ([10], "image 10"),
        ([], "0 of 10"),
        (range(10), "10 of"),
    ):
        with pytest.raises(ValueError, match=message):
            IndexedSource(images, held_out=wrong)


# Randomness, crops


@pytest.mark.parametrize("image_size", [None, 6])
def test_draws_depend_on_the_generator_alone(tmp_path: Path, image_size: int | None) -> None:
    """Not on what was drawn, or found to be bad, before: a resumed run sees what an unbroken one saw."""
    images = np.random.default_rng(0).random((60, 12, 12), np.float32)
    images[::3, 5, 5] = np.nan
    np.save(tmp_path / "x.npy", images)
    items = [np.zeros(3) if k % 4 == 0 else image for k, image in enumerate(images)]
    for make in (
        lambda: opened(tmp_path / "x.npy", image_size=image_size),
        lambda: IndexedSource(items, image_size=image_size),
    ):
        with skips():
            fresh, used = make(), make()
            backwards = [used.draw(seeded(seed)) for seed in reversed(range(80))]
            first = draws(fresh, 80)
        assert torch.equal(first, torch.stack(backwards[::-1]))
        assert len(first.unique(dim=0)) > 20
        # The generator is left in one state too.
        generators = seeded(3), seeded(3)
        fresh.draw(generators[0])
        used.draw(generators[1])
        assert torch.equal(generators[0].get_state(), generators[1].get_state())


def test_what_is_drawn_may_be_written_to() -> None:
    images = [torch.zeros(1, 2, 2) for _ in range(4)]
    source = IndexedSource(images)
    source.draw(seeded(0)).fill_(7)
    source.held_out(1).fill_(7)
    assert not any(image.any() for image in images)


def test_crops_of_a_constant_image_are_constant() -> None:
    crops = draws(IndexedSource([np.full((90, 70), 0.7)] * 2, image_size=7), 100)
    assert crops.shape == (100, 1, 7, 7)
    torch.testing.assert_close(crops, torch.full_like(crops, 0.7), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("extent", "largest"), [(8, 1.0), (20, 2.5), (200, 8.0)])
def test_crops_have_a_random_scale_place_and_mirroring(extent: int, largest: float) -> None:
    """Read from a crop of an image whose channels are the column and the row of each pixel."""
    rows, columns = np.mgrid[:extent, : extent + 100].astype(np.float32)
    crops = draws(IndexedSource([np.stack([columns, rows])] * 2, image_size=8), 400)
    # Pixels a crop's pixel is wide: its inner ones, since the filter ends at the edges.
    across = (crops[:, 0, :, 6] - crops[:, 0, :, 1]).mean(1) / 5
    down = (crops[:, 1, 6] - crops[:, 1, 1]).mean(1) / 5
    torch.testing.assert_close(across.abs(), down, rtol=1e-3, atol=1e-3)
    # Rows never run upwards; columns run to the left in half of the crops: 5 standard deviations.
    assert abs((across < 0).float().mean() - 0.5) < 5 * 0.5 / 20
    assert down.min() > 0.99
    assert down.max() < 1.02 * largest
    assert down.max() > 0.9 * largest
    assert down.min() < 1.1
    # Log-uniform: the median is the geometric mean.
    assert down.median() == pytest.approx(largest**0.5, rel=0.2)
    corner = crops[:, 0].amin((1, 2))
    assert corner.min() < 5
    assert crops[:, 0].max() > extent + 95


# Memory and processes


@pytest.mark.parametrize("name", ["x.npy", "x.h5"])
def test_a_stack_is_not_read_into_memory(tmp_path: Path, name: str) -> None:
    """200 MB that take none of the disk: an image takes a quarter of a MB, and a few copies of it."""
    shape = (800, 256, 256)
    if name == "x.npy":
        np.lib.format.open_memmap(tmp_path / name, "w+", np.float32, shape)
    else:
        with h5py.File(tmp_path / name, "w") as file:
            file.create_dataset("images", shape, np.float32, chunks=(1, 256, 256))
    tracemalloc.start()
    try:
        source = opened(tmp_path / name)
        images = [source.draw(seeded(seed)) for seed in range(40)]
        held_out = source.held_out(10)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # What is drawn is torch's, which is not traced.
    assert peak < 3e6
    assert (len(images), len(held_out)) == (40, 10)
    assert len(pickle.dumps(source)) < 2000


def test_decoded_files_are_kept_within_a_bound() -> None:
    recent, made = Recent(limit=100), []

    def get(key: str, count: int) -> np.ndarray:
        return recent.get(key, lambda: (made.append(key), np.zeros(count, np.uint8))[1])

    for key, count in (("a", 40), ("b", 40), ("a", 40), ("c", 40), ("a", 40), ("b", 40)):
        assert len(get(key, count)) == count
    # c takes the place of b, which was not asked for as lately as a.
    assert made == ["a", "b", "c", "b"]
    get("large", 500)
    get("large", 500)
    get("a", 40)
    assert made == ["a", "b", "c", "b", "large", "a"]
    assert recent.nbytes == 40
    copy = pickle.loads(pickle.dumps(recent))
    assert (copy.limit, copy.nbytes) == (100, 0)


class Draws(Dataset[Tensor]):
    def __init__(self, source: IndexedSource) -> None:
        self.source = source

    def __getitem__(self, index: int) -> Tensor:
        return self.source.draw(seeded(index))


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder of each kind of file: images of 8x8."""
    folder = tmp_path / "mixed"
    write_png(folder / "a.png", random_pixels((8, 8)))
    tifffile.imwrite(folder / "b.tif", random_pixels((8, 8), np.uint16), photometric="minisblack")
    np.save(folder / "c.npy", np.random.default_rng(0).random((8, 8)))
    for name in ("d.h5", "e.h5"):
        with h5py.File(folder / name, "w") as file:
            images = np.random.default_rng(1).random((20, 8, 8))
            file.create_dataset("images", data=images, compression="gzip")
    nibabel.save(nibabel.Nifti1Image(np.random.default_rng(2).random((8, 8, 8)), LPS), folder / "f.nii.gz")
    write_png(folder / "g.png", random_pixels((8, 8), seed=1))
    return folder


def test_worker_processes_see_the_same_images(mixed: Path) -> None:
    """Also after this process has read from the files."""
    source = opened(mixed)
    expected = draws(source, 40)
    loader = DataLoader(Draws(source), batch_size=None, sampler=range(40), num_workers=2)
    assert torch.equal(torch.stack(list(loader)), expected)
    assert torch.equal(draws(pickle.loads(pickle.dumps(source)), 40), expected)
    assert torch.equal(draws(source, 40), expected)


# Data sets


class Photos(Dataset[Any]):
    """As torchvision's: PIL images with labels, of which one is broken."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        if index == 5:
            raise OSError("image file is truncated")
        return PIL.Image.new("RGB", (9, 6), (20 * index, 0, 255)), index


def test_a_torch_dataset() -> None:
    with skips(r"image 5 is skipped \(1 so far\): image file is truncated"):
        source = IndexedSource(Photos(), description="mine")
        images = draws(source, 100)
    assert source.image_shape == (3, 6, 9)
    assert source.description == "mine"
    expected = [20 * k / 127.5 - 1 for k in range(11) if k != 5]
    assert images[:, 0, 0, 0].unique().tolist() == pytest.approx(expected, abs=1e-6)
    assert (images[:, 1] == -1).all()
    assert (images[:, 2] == 1).all()
    assert source.held_out(9)[:, 0, 0, 0].tolist() == pytest.approx([220 / 127.5 - 1], abs=1e-6)
    for count in (0, 1):
        with pytest.raises(ValueError, match=f"holds {count} images; expected two or more"):
            IndexedSource([np.zeros((4, 4))] * count)


# Brain

# Slices 0 to 3 and 40 to 43 of a volume of 1 mm are held out.
EXTENT = 48


@pytest.fixture
def heads(tmp_path: Path) -> Path:
    """Small heads in place of the packages' volumes; one of 0.5 mm, one stored from left to right."""
    random = np.random.default_rng(0)
    for scan in brain.SCANS:
        for name in (scan.file, *scan.tissues):
            values = random.integers(60, 250, (EXTENT,) * 3).astype(np.uint8)
            if scan.tissues and name != scan.file:
                values //= 2
            edge = 0.5 if "better" in name else 1.0
            affine = np.diag([-1.0 if "inia" in name else edge, edge, edge, 1.0])
            nibabel.save(nibabel.Nifti1Image(values, affine), tmp_path / name)
    return tmp_path


def test_brain_slices(heads: Path) -> None:
    source = BrainSlices(heads)
    assert source.image_shape == (2, 128, 128)
    images = draws(source, 40)
    assert images.shape == (40, 2, 128, 128)
    assert images.dtype == torch.float32
    assert images.isfinite().all()
    assert torch.equal(images, draws(BrainSlices(heads), 40))
    assert len(images.unique(dim=0)) == 40
    magnitude = torch.complex(images[:, 0], images[:, 1]).abs().flatten(1)
    peak = magnitude.kthvalue(int(0.99 * magnitude.shape[1]), dim=1).values
    assert peak.min() > 0.699
    assert peak.max() < 1.101
    assert peak.max() - peak.min() > 0.3
    # The phase is no ornament: real and imaginary part share the energy, over many images, about evenly.
    share = (images[:, 0].square().mean() / magnitude.square().mean()).item()
    assert 0.3 < share < 0.7


def test_held_out_slices_are_apart_in_mm(heads: Path) -> None:
    for scan, volume in zip(brain.SCANS, BrainSlices(heads).volumes, strict=True):
        edge = 0.5 if "better" in scan.file else 1.0
        assert volume.voxel_mm == edge
        by_split = {
            split: {index * edge for axis, index in places if axis == 1}
            for split, places in volume.places.items()
        }
        held_out, training = by_split["held out"], by_split["training"]
        assert held_out == {mm for mm in np.arange(EXTENT) * edge if mm % 40 < 4}
        assert min(abs(a - b) for a in held_out for b in training) > 2
        assert len(training) > len(held_out)
        assert set().union(*by_split.values()) == set(np.arange(EXTENT) * edge)


def test_training_is_blind_to_what_is_held_out(heads: Path) -> None:
    """To the voxels that lie in held-out slices along all three axes; held-out images show them."""
    before = BrainSlices(heads, size=32)
    images, held_out = draws(before, 60), before.held_out(60)
    assert len(held_out) == 60
    assert torch.equal(held_out, BrainSlices(heads, size=32).held_out(60))
    hidden = np.ix_(*[[0, 1, 2, 3, 40, 41, 42, 43]] * 3)
    for scan in brain.SCANS:
        path = heads / scan.file
        image = nibabel.load(path)
        values = np.asarray(image.dataobj).copy()
        # The same values in another order: the percentile that scales the volume stays. Where the voxels
        # are of 0.5 mm, the slices 40 to 43 are not held out; where they run to the left, others are.
        if image.affine[0, 0] == 1:
            values[hidden] = values[hidden][::-1, ::-1, ::-1]
        nibabel.save(nibabel.Nifti1Image(values, image.affine), path)
    after = BrainSlices(heads, size=32)
    assert torch.equal(draws(after, 60), images)
    changed = (after.held_out(60) != held_out).flatten(1).any(1)
    assert changed.sum() > 10


def test_volumes_of_the_brain_that_are_missing_or_damaged(heads: Path) -> None:
    truncate(heads / "ch2better.nii.gz")
    with pytest.raises(ValueError, match=r"cannot read .*ch2better\.nii\.gz"):
        BrainSlices(heads).draw(seeded(0))
    for name in ("ch2.nii.gz", "ch2better.nii.gz"):
        (heads / name).unlink()
    with pytest.raises(ValueError, match=r"lacks the MR volumes ch2\.nii\.gz, ch2better\.nii\.gz; run `make"):
        BrainSlices(heads)


# Fashion-MNIST


def idx(images: np.ndarray, magic: bytes = b"\0\0\x08") -> bytes:
    header = magic + bytes([images.ndim]) + b"".join(n.to_bytes(4, "big") for n in images.shape)
    return header + images.tobytes()


PIXELS = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)


def test_read_idx(tmp_path: Path) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(idx(PIXELS)))
    assert np.array_equal(read_idx(path), PIXELS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(idx(PIXELS))[:-12], "not a readable gzip file.*fetch the data set again"),
        (idx(PIXELS), "not a readable gzip file"),
        (b"", "not"),
        (gzip.compress(idx(PIXELS, b"\0\0\x0d")), "not an IDX file of unsigned bytes"),
        (gzip.compress(b"\0\0"), "not an IDX file"),
        (
            gzip.compress(idx(PIXELS)[:-5]),
            r"holds 19 bytes, its header promises \(2, 3, 4\); it is truncated",
        ),
        (gzip.compress(idx(PIXELS) + b"\0"), "holds 25 bytes"),
        (gzip.compress(idx(PIXELS)[:9]), "truncated"),
        (gzip.compress(idx(PIXELS))[:10] + b"\xff" * 30, "not a readable gzip file"),
    ],
    ids=["truncated", "plain", "empty", "magic", "short", "pixels", "extra", "header", "deflate"],
)
def test_read_idx_refuses(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_idx(path)


def test_fashion_mnist_is_found_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion, "FOLDERS", (tmp_path / "none", tmp_path))
    with pytest.raises(ValueError, match=r"Fashion-MNIST was not found in .*none.*make data"):
        open_source(DataConfig(source="fashion-mnist"))
    for name, shift in zip(fashion.FILES, (0, 100), strict=True):
        (tmp_path / name).write_bytes(gzip.compress(idx(PIXELS + np.uint8(shift))))
    source = open_source(DataConfig(source="fashion-mnist", noise_floor=0.02))
    assert source.image_shape == (1, 3, 4)
    training, test = (torch.from_numpy((PIXELS + shift) / 127.5 - 1).float()[:, None] for shift in (0, 100))
    torch.testing.assert_close(source.held_out(9), test)
    torch.testing.assert_close(draws(source, 40).unique(dim=0), training)
