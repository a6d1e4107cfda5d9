"""Images of every format there and back, and one clear error for every bad file."""

import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from alpenglow.io import atomic_path, files, read_image, write_image


def integers(shape: tuple[int, ...], dtype: type, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def png16(array: np.ndarray) -> bytes:
    """A 16-bit PNG, grey [H, W] or RGB [H, W, 3]."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = array.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, 2 if array.ndim == 3 else 0, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".tiff", ".npy", ".PNG"])
def test_round_trip(tmp_path: Path, channels: int, suffix: str) -> None:
    levels = torch.from_numpy(integers((channels, 7, 9), np.uint8)).float()
    image = levels / 127.5 - 1
    path = tmp_path / f"image{suffix}"
    write_image(path, image)
    tolerance = 1e-6 if suffix.lower() == ".png" else 0
    torch.testing.assert_close(read_image(path), image, rtol=0, atol=tolerance)
    write_image(path, read_image(path))
    torch.testing.assert_close(read_image(path), image, rtol=0, atol=tolerance)
    assert list(tmp_path.iterdir()) == [path]


def test_png_clips_and_tiff_does_not(tmp_path: Path) -> None:
    image = torch.tensor([[[-3.0, -0.25, 3.0]]])
    write_image(tmp_path / "a.png", image)
    torch.testing.assert_close(read_image(tmp_path / "a.png"), image.clamp(-1, 1), rtol=0, atol=0.5 / 127.5)
    write_image(tmp_path / "a.npy", image)
    assert torch.equal(read_image(tmp_path / "a.npy"), image)
    write_image(tmp_path / "a.tif", image)
    with pytest.raises(ValueError, match=r"floats from -3 to 3; expected \[-1, 1\]"):
        read_image(tmp_path / "a.tif")


def test_16_bit(tmp_path: Path) -> None:
    grey, colour = integers((7, 9), np.uint16), integers((7, 9, 3), np.uint16)
    (tmp_path / "grey.png").write_bytes(png16(grey))
    tifffile.imwrite(tmp_path / "grey.tif", grey)
    tifffile.imwrite(tmp_path / "big-endian.tif", grey, byteorder=">")
    np.save(tmp_path / "grey.npy", grey)
    for name in ("grey.png", "grey.tif", "big-endian.tif", "grey.npy"):
        expected = torch.from_numpy(grey / 32767.5 - 1).float()[None]
        torch.testing.assert_close(read_image(tmp_path / name), expected, rtol=0, atol=1e-6)
        levels = (read_image(tmp_path / name).double() + 1) * 32767.5
        assert (levels.round().numpy()[0] == grey).all()
    tifffile.imwrite(tmp_path / "colour.tif", colour, photometric="rgb")
    tifffile.imwrite(
        tmp_path / "planar.tif", colour.transpose(2, 0, 1), photometric="rgb", planarconfig="separate"
    )
    np.save(tmp_path / "colour.npy", colour)
    for name in ("colour.tif", "planar.tif", "colour.npy"):
        expected = torch.from_numpy(colour.transpose(2, 0, 1) / 32767.5 - 1).float()
        torch.testing.assert_close(read_image(tmp_path / name), expected, rtol=0, atol=1e-6)
    (tmp_path / "colour.png").write_bytes(png16(colour))
    with pytest.raises(ValueError, match="lose 8 bits"):
        read_image(tmp_path / "colour.png")


def test_jpeg_is_close(tmp_path: Path) -> None:
    ramp = np.linspace(20, 230, 64).astype(np.uint8)[None].repeat(32, 0)
    Image.fromarray(ramp).save(tmp_path / "a.jpg", quality=95)
    image = read_image(tmp_path / "a.jpg")
    assert image.shape == (1, 32, 64)
    assert image.dtype == torch.float32
    torch.testing.assert_close(image[0].numpy(), (ramp / 127.5 - 1).astype(np.float32), rtol=0, atol=0.03)


def test_alpha_is_dropped_without_blending(tmp_path: Path) -> None:
    colour = integers((5, 6, 4), np.uint8)
    Image.fromarray(colour, "RGBA").save(tmp_path / "rgba.png")
    tifffile.imwrite(tmp_path / "rgba.tif", colour, photometric="rgb", extrasamples=["unassalpha"])
    Image.fromarray(colour[..., :2].copy(), "LA").save(tmp_path / "la.png")
    expected = torch.from_numpy(colour.transpose(2, 0, 1) / 127.5 - 1).float()
    torch.testing.assert_close(read_image(tmp_path / "rgba.png"), expected[:3])
    torch.testing.assert_close(read_image(tmp_path / "rgba.tif"), expected[:3])
    torch.testing.assert_close(read_image(tmp_path / "la.png"), expected[:1])


def test_palette_bilevel_and_orientation(tmp_path: Path) -> None:
    colour = Image.fromarray(integers((5, 6, 3), np.uint8))
    palette = colour.quantize(30)
    palette.save(tmp_path / "palette.png")
    expected = np.asarray(palette.convert("RGB")).transpose(2, 0, 1) / 127.5 - 1
    np.testing.assert_allclose(read_image(tmp_path / "palette.png"), expected, atol=1e-6)
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bilevel.png")
    assert read_image(tmp_path / "bilevel.png").tolist() == [[[1.0, -1.0]]]
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    colour.save(tmp_path / "turned.png", exif=exif)
    assert read_image(tmp_path / "turned.png").shape == (3, 6, 5)


def test_channels_are_converted(tmp_path: Path) -> None:
    colour = torch.tensor([1.0, -1.0, 0.0])[:, None, None].expand(3, 2, 2)
    np.save(tmp_path / "colour.npy", colour.numpy())
    grey = read_image(tmp_path / "colour.npy", channels=1)
    torch.testing.assert_close(grey, torch.full((1, 2, 2), 0.299 - 0.587))
    write_image(tmp_path / "grey.tif", grey)
    torch.testing.assert_close(read_image(tmp_path / "grey.tif", channels=3), grey.repeat(3, 1, 1))
    np.save(tmp_path / "complex.npy", np.zeros((2, 4, 4), np.float32))
    assert read_image(tmp_path / "complex.npy").shape == (2, 4, 4)
    for name, channels, message in (("complex.npy", 1, "2 channels"), ("colour.npy", 4, "channels=4")):
        with pytest.raises(ValueError, match=message):
            read_image(tmp_path / name, channels=channels)


def test_npy_floats_are_taken_as_they_are(tmp_path: Path) -> None:
    for array in (np.full((4, 5), 7.5), np.full((4, 5, 3), -2, np.float16), np.full((3, 4, 5), 9, ">f4")):
        np.save(tmp_path / "a.npy", array)
        image = read_image(tmp_path / "a.npy")
        assert image.dtype == torch.float32
        assert image.shape[-2:] == (4, 5)
        assert (image == float(array.flat[0])).all()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".npy"])
def test_missing_truncated_and_foreign_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    with pytest.raises(ValueError, match="no such file"):
        read_image(path)
    noise = integers((40, 50), np.uint8)
    if suffix == ".npy":
        np.save(path, noise)
    elif suffix == ".tif":
        tifffile.imwrite(path, noise, compression="zlib")
    else:
        Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    for content in (b"", whole[:20], whole[: len(whole) // 2], b"Not an image at all, only text. " * 20):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="cannot read"):
            read_image(path)


def test_unsupported_content(tmp_path: Path) -> None:
    class Unwelcome:
        def __reduce__(self) -> tuple[object, ...]:
            raise_on_load = (tmp_path / "pickle was run").touch
            return raise_on_load, ()

    np.save(tmp_path / "pickle.npy", np.array([Unwelcome()], dtype=object), allow_pickle=True)
    np.save(tmp_path / "complex.npy", np.zeros((4, 4), np.complex64))
    np.save(tmp_path / "signed.npy", np.zeros((4, 4), np.int16))
    np.save(tmp_path / "nan.npy", np.full((4, 4), np.nan))
    np.save(tmp_path / "batch.npy", np.zeros((8, 1, 4, 4)))
    np.save(tmp_path / "empty.npy", np.zeros((1, 0, 4)))
    tifffile.imwrite(tmp_path / "pages.tif", np.zeros((5, 8, 8), np.uint8), photometric="minisblack")
    tifffile.imwrite(tmp_path / "inverted.tif", np.zeros((8, 8), np.uint8), photometric="miniswhite")
    tifffile.imwrite(tmp_path / "nan.tif", np.full((8, 8), np.nan, np.float32))
    (tmp_path / "a.gif").write_bytes(b"GIF89a")
    for name, message in {
        "pickle.npy": "cannot read", "complex.npy": "stack real", "signed.npy": "int16", "nan.npy": "NaN",
        "batch.npy": "shape", "empty.npy": "empty", "pages.tif": "one grey or RGB page",
        "inverted.tif": "photometric", "nan.tif": "NaN", "a.gif": "ends in",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            read_image(tmp_path / name)
    assert not (tmp_path / "pickle was run").exists()


def test_write_refuses_and_writes_nothing(tmp_path: Path) -> None:
    for name, image, message in (
        ("a.png", torch.zeros(2, 4, 4), "1 or 3 channels"),
        ("a.png", torch.zeros(4, 4), r"expected a real image \[C, H, W\]"),
        ("a.npy", torch.full((1, 4, 4), float("inf")), "NaN or infinity"),
        ("a.jpg", torch.zeros(1, 4, 4), "ends in"),
    ):
        with pytest.raises(ValueError, match=message):
            write_image(tmp_path / name, image)
    assert not list(tmp_path.iterdir())


def test_atomic_path(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    with atomic_path(path) as temporary:
        assert temporary.parent == path.parent
        assert temporary.suffix == ".txt"
        temporary.write_text("old")
        assert not path.exists()

    def interrupted() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode
    with pytest.raises(ValueError, match="is a folder"), atomic_path(tmp_path):
        pass


def test_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    script = f"""
import os, runpy, signal
atomic_path = runpy.run_path({files.__file__!r})["atomic_path"]
with atomic_path({str(path)!r}) as temporary:
    temporary.write_text("half of the n")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    assert path.read_text() == "old"


def test_an_archive_under_the_name_of_an_array_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "image.npy"
    with path.open("wb") as stream:
        np.savez(stream, image=np.zeros((4, 4), np.uint8))
    with pytest.raises(ValueError, match=r"archive of arrays \(\.npz\)"):
        read_image(path)
