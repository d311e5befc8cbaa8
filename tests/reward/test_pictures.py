import io
import warnings

import datasets
import numpy as np
import pytest
from PIL import ExifTags, Image, ImageFile

from reward.pictures import as_map_file, as_rgb_file, decode, size_of, to_rgb


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rgb_of(data):
    image = Image.open(io.BytesIO(as_rgb_file(data)))
    assert image.mode in ("RGB", "L")
    return np.array(image.convert("RGB"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_plain_pictures_keep_their_bytes(kind):
    data = encoded(Image.new("RGB", (5, 4), (10, 200, 30)), kind)
    assert as_rgb_file(data) == data
    grey = encoded(Image.new("L", (5, 4), 7))
    assert as_rgb_file(grey) == as_map_file(grey) == grey


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_as_their_exif_tag_says_and_as_training_sees_them(orientation):
    pixels = np.zeros((24, 40, 3), np.uint8)
    pixels[:8, :8] = 255  # a white corner
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encoded(Image.fromarray(pixels), "JPEG", exif=exif, quality=95)
    ours = np.array(decode(data))
    trained = datasets.Image().decode_example({"bytes": as_rgb_file(data), "path": None})
    assert np.array_equal(ours, np.array(trained))
    assert size_of(io.BytesIO(data)) == ours.shape[:2] == ((24, 40) if orientation < 5 else (40, 24))
    corners = ours[[4, 4, -4, -4], [4, -4, 4, -4]].mean(axis=1) > 128  # top left, top right, bottom left, bottom right
    assert corners.tolist().index(True) == {1: 0, 2: 1, 3: 3, 4: 2, 5: 0, 6: 1, 7: 3, 8: 2}[orientation]


def test_one_pixel():
    assert rgb_of(encoded(Image.new("RGB", (1, 1), (1, 2, 3)))).tolist() == [[[1, 2, 3]]]


def test_what_is_transparent_lies_on_white():
    image = Image.new("RGBA", (3, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (255, 0, 0, 0))
    image.putpixel((2, 0), (0, 0, 0, 51))  # a fifth of black
    assert rgb_of(encoded(image)).tolist() == [[[255, 0, 0], [255, 255, 255], [204, 204, 204]]]


def test_a_palette_with_a_transparent_colour():
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 255, 9, 9, 9])
    image.putpixel((1, 0), 1)
    assert rgb_of(encoded(image, transparency=1)).tolist() == [[[0, 0, 255], [255, 255, 255]]]


def test_what_is_transparent_in_a_map_is_not_marked():
    image = Image.new("LA", (3, 1), (200, 0))
    image.putpixel((1, 0), (200, 255))
    assert np.array(decode(as_map_file(encoded(image)))).tolist() == [[0, 200, 0]]


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.array([[0, 257, 25700, 65535]], dtype=np.uint16)
    data = encoded(Image.fromarray(values))
    assert rgb_of(data)[..., 0].tolist() == [[0, 1, 100, 255]]
    assert np.array(decode(as_map_file(data))).tolist() == [[0, 1, 100, 255]]


def test_cmyk_becomes_the_colours_it_prints():
    data = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)
    red, green, blue = rgb_of(data)[4, 4]
    assert red > 245
    assert max(green, blue) < 10


def test_floats_have_no_known_range():
    with pytest.raises(ValueError, match="floats"):
        to_rgb(Image.new("F", (2, 2)))


NOISE = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), "JPEG")


@pytest.mark.parametrize("data", [b"", b"no picture", NOISE[: len(NOISE) // 2], b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_what_does_not_decode_is_said(data):
    with pytest.raises(ValueError, match="no picture that can be read"):
        decode(data)


def test_what_is_no_picture_is_always_said_alike():
    """The message goes into a report, which must not have a place in memory in it."""
    with pytest.raises(ValueError, match=r"can be read \(none of PNG, JPEG, WEBP, BMP, GIF, TIFF\)$"):
        decode(b"no picture")


def test_a_png_broken_inside_is_said():
    data = bytearray(encoded(Image.open(io.BytesIO(NOISE))))
    data[len(data) // 2] ^= 255
    with pytest.raises(ValueError, match="no picture that can be read"):
        decode(bytes(data))


@pytest.mark.parametrize("read", [decode, lambda data: size_of(io.BytesIO(data))], ids=["decode", "size_of"])
@pytest.mark.parametrize("times", [40, 1.5])
def test_a_picture_too_large_to_be_meant_is_refused(monkeypatch, read, times):
    """Before it is decoded, and also where Pillow only warns, up to twice its limit."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(64 * 64 / times))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("it is decoded"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="no picture that can be read"):
            read(NOISE)


@pytest.mark.parametrize("limit", [64 * 64, None])
def test_a_picture_of_the_largest_size_is_read(monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert decode(NOISE).size == (64, 64)
