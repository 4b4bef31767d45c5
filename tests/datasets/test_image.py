"""Images of every mode are converted to the RGB pixels that a viewer shows."""

from __future__ import annotations

import builtins
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lg.datasets.image import PixelFormat, to_rgb
from lg.errors import DataError

GRAY = np.array([[0, 51, 102], [153, 204, 255]], dtype=np.uint8)


def pixels(path: Path) -> list:
    image = PixelFormat().open(path)
    assert image.mode == "RGB"
    return np.asarray(image).tolist()


def gray_levels(path: Path) -> list:
    rgb = np.asarray(PixelFormat().open(path))
    assert (rgb == rgb[..., :1]).all()
    return rgb[..., 0].tolist()


def test_rgb_pixels_are_unchanged(tmp_path: Path) -> None:
    stored = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    Image.fromarray(stored).save(tmp_path / "a.png")
    assert pixels(tmp_path / "a.png") == stored.tolist()
    assert type(PixelFormat().open(tmp_path / "a.png")) is Image.Image


def test_gray_and_one_bit(tmp_path: Path) -> None:
    Image.fromarray(GRAY).save(tmp_path / "gray.png")
    assert gray_levels(tmp_path / "gray.png") == GRAY.tolist()
    Image.fromarray(GRAY > 100).save(tmp_path / "bits.png")
    assert gray_levels(tmp_path / "bits.png") == [[0, 0, 255], [255, 255, 255]]


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_sixteen_bits_are_scaled_and_rounded(tmp_path: Path, suffix: str) -> None:
    levels = np.array([[0, 128, 129, 256, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / f"a{suffix}")
    assert gray_levels(tmp_path / f"a{suffix}") == [[0, 0, 1, 1, 128, 255]]


def test_mode_i_is_sixteen_bits_or_rejected() -> None:
    levels = Image.fromarray(np.array([[0, 257, 65535]], dtype=np.int32))
    assert levels.mode == "I"
    assert np.asarray(to_rgb(levels))[0, :, 0].tolist() == [0, 1, 255]
    for bad in (-1, 65536):
        with pytest.raises(DataError, match=f"{bad}.*save the image with 8 or 16 bits"):
            to_rgb(Image.fromarray(np.array([[5, bad]], dtype=np.int32)))
    with pytest.raises(DataError, match="floating-point"):
        to_rgb(Image.fromarray(np.array([[0.5]], dtype=np.float32)))


def test_transparency_is_blended_over_white(tmp_path: Path) -> None:
    rgba = np.array([[[200, 0, 0, 255], [9, 9, 9, 0], [0, 0, 0, 51]]], dtype=np.uint8)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    expected = [[[200, 0, 0], [255, 255, 255], [204, 204, 204]]]
    assert pixels(tmp_path / "rgba.png") == expected
    la = np.array([[[7, 255], [7, 0], [0, 51]]], dtype=np.uint8)
    Image.fromarray(la).save(tmp_path / "la.png")
    assert gray_levels(tmp_path / "la.png") == [[7, 255, 204]]
    premultiplied = Image.fromarray(rgba).convert("RGBa")
    assert np.asarray(to_rgb(premultiplied)).tolist() == expected
    assert np.asarray(to_rgb(Image.fromarray(la).convert("La")))[0, :, 0].tolist() == [7, 255, 204]


def test_transparent_colours_are_white(tmp_path: Path) -> None:
    Image.fromarray(GRAY).save(tmp_path / "gray.png", transparency=51)
    assert gray_levels(tmp_path / "gray.png") == [[0, 255, 102], [153, 204, 255]]
    Image.fromarray(GRAY.astype(np.uint16) * 257).save(tmp_path / "g16.png", transparency=51 * 257)
    assert gray_levels(tmp_path / "g16.png") == [[0, 255, 102], [153, 204, 255]]
    rgb = np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8)
    Image.fromarray(rgb).save(tmp_path / "rgb.png", transparency=(4, 5, 6))
    assert pixels(tmp_path / "rgb.png") == [[[1, 2, 3], [255, 255, 255]]]


@pytest.mark.parametrize("suffix", [".png", ".gif"])
def test_palette_with_and_without_transparency(tmp_path: Path, suffix: str) -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8))
    image = image.convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.save(tmp_path / f"a{suffix}")
    assert pixels(tmp_path / f"a{suffix}") == [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]
    image.save(tmp_path / f"b{suffix}", transparency=1)
    assert pixels(tmp_path / f"b{suffix}") == [[[10, 20, 30], [255, 255, 255], [70, 80, 90]]]


def test_cmyk(tmp_path: Path) -> None:
    inks = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 0, 0, 255]]], dtype=np.uint8)
    Image.fromarray(inks, "CMYK").save(tmp_path / "a.tif")
    assert pixels(tmp_path / "a.tif") == [[[255, 255, 255], [0, 255, 255], [0, 0, 0]]]


# Rows of an image abc / def, displayed with each orientation. Source: EXIF 2.32, 4.6.4 A.
SHOWN = {
    1: ["abc", "def"],
    2: ["cba", "fed"],
    3: ["fed", "cba"],
    4: ["def", "abc"],
    5: ["ad", "be", "cf"],
    6: ["da", "eb", "fc"],
    7: ["fc", "eb", "da"],
    8: ["cf", "be", "ad"],
}


@pytest.mark.parametrize("orientation", SHOWN)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_exif_orientation(tmp_path: Path, orientation: int, dtype: type) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored: np.ndarray = GRAY.astype(dtype) * (257 if dtype is np.uint16 else 1)
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    value = dict(zip("abcdef", GRAY.ravel().tolist(), strict=True))
    expected = [[value[letter] for letter in row] for row in SHOWN[orientation]]
    assert gray_levels(tmp_path / "a.png") == expected
    once = PixelFormat().open(tmp_path / "a.png")
    assert to_rgb(once).tobytes() == once.tobytes() and not once.getexif(), "rotated twice"


def test_rotated_images_keep_their_transparent_colour(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(GRAY).save(tmp_path / "a.png", exif=exif, transparency=51)
    assert gray_levels(tmp_path / "a.png") == [[255, 204, 153], [102, 255, 0]]


@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
def test_exif_orientation_by_format(tmp_path: Path, suffix: str) -> None:
    """Pillow applies the orientation of TIFF while loading, but not of JPEG."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.zeros((16, 32), dtype=np.uint8)
    stored[:, :16] = 255
    Image.fromarray(stored).save(tmp_path / f"a{suffix}", exif=exif)
    shown = np.asarray(PixelFormat().open(tmp_path / f"a{suffix}"))
    assert shown.shape == (32, 16, 3)
    assert shown[:14].min() > 250 and shown[18:].max() < 5


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("block", [b"MM\0*\xff\xff\xff\xff", b"not an EXIF block", b"MM"])
def test_broken_exif_is_ignored(tmp_path: Path, block: bytes) -> None:
    Image.fromarray(GRAY).save(tmp_path / "a.png", exif=b"Exif\0\0" + block)
    assert gray_levels(tmp_path / "a.png") == GRAY.tolist()


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(
        file, "JPEG"
    )
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "empty; download it again"),
        (b"<html>not found</html>", "not an image that Pillow can read"),
        (jpeg()[:600], "damaged"),
        (jpeg()[:-200], "damaged.*truncated"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "not an image that Pillow can read|damaged"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "bad.jpg"
    path.write_bytes(content)
    with pytest.raises(DataError, match=problem) as caught:
        PixelFormat().open(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_unreadable_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"no\.png: the image cannot be read .No such file"):
        PixelFormat().open(tmp_path / "no.png")
    with pytest.raises(DataError, match=r"cannot be read .Is a directory"):
        PixelFormat().open(tmp_path)

    def deny(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(builtins, "open", deny)
    with pytest.raises(DataError, match=r"a\.png.*Permission denied.*readable"):
        PixelFormat().open(tmp_path / "a.png")


def test_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(GRAY).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2)
    with pytest.raises(DataError, match=r"a\.png: the image is too large.*MAX_IMAGE_PIXELS"):
        PixelFormat().open(tmp_path / "a.png")


def test_the_error_for_a_float_image_names_its_path(tmp_path: Path) -> None:
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(DataError, match=r"f\.tif.*floating-point"):
        PixelFormat().open(tmp_path / "f.tif")
