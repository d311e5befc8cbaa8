"""Pictures of any kind that Pillow reads -> the three 8-bit channels that raters saw and models see.

The files are other people's: only formats that Pillow decodes by itself are opened (no PostScript), and a picture so
large that Pillow takes it for an attack is refused.
"""

import io
import struct
import zlib
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
_PLAIN = ("RGB", "L")  # Pillow turns these into RGB without loss
_BROKEN = (
    OSError,  # with UnidentifiedImageError
    SyntaxError,  # what Pillow raises for a broken PNG
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,  # where warnings are errors
)


def to_rgb(image: Image.Image, ground: str = "white") -> Image.Image:
    """Any image as 8-bit RGB: what is transparent lies on `ground`, 16 bit are scaled (Pillow would clip them), CMYK
    and palettes are converted.

    Raises:
        ValueError: the pixels are floats, whose range is unknown.
    """
    if image.mode.startswith("I"):  # 16 bit; Pillow has no other grey image of more than 8 bit but floats
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(np.round(values / 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("its pixels are floats, whose range is unknown")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, ground), image).convert("RGB")
    return image.convert("RGB")


def decode(data: bytes) -> Image.Image:
    """An encoded picture, every pixel decoded, the way up that its EXIF tag says (as `datasets` does).

    Raises:
        ValueError: it is no picture, is cut off or damaged, or is larger than Pillow deems safe.
    """
    try:
        image = _open(io.BytesIO(data))
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
    except _BROKEN as error:
        raise ValueError(f"it is no picture that can be read ({error})") from error
    return image


def size_of(file: BinaryIO) -> tuple[int, int]:
    """Height and width of an encoded picture, from its head; the rest of it is not read.

    Raises:
        ValueError: it is no picture, or is larger than Pillow deems safe.
    """
    try:
        image = _open(file)
        lies = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)  # on its side
    except _BROKEN as error:
        raise ValueError(f"it is no picture that can be read ({error})") from error
    width, height = image.size
    return (width, height) if lies else (height, width)


def as_rgb_file(data: bytes) -> bytes:
    """An encoded picture as one that is 8-bit RGB or grey: the same bytes if it is that already, else a PNG.

    Raises:
        ValueError: as `decode` and `to_rgb`.
    """
    image = decode(data)
    return data if image.mode in _PLAIN and not image.has_transparency_data else encode_png(to_rgb(image))


def as_map_file(data: bytes) -> bytes:
    """An encoded map as one-channel 8-bit PNG: the same bytes if it is that already. What is transparent is not marked.

    Raises:
        ValueError: as `decode` and `to_rgb`.
    """
    image = decode(data)
    if image.format == "PNG" and image.mode == "L":
        return data
    return encode_png(to_rgb(image, ground="black").convert("L"))


def _open(file: BinaryIO) -> Image.Image:
    """An encoded picture of which no pixel is decoded yet.

    Raises:
        one of `_BROKEN`: it is no picture, or larger than Pillow deems safe, `Image.MAX_IMAGE_PIXELS`; Pillow itself
            only warns up to twice that.
    """
    try:
        image = Image.open(file, formats=_FORMATS)
    except UnidentifiedImageError as error:  # whose text has the place of `file` in memory
        raise UnidentifiedImageError(f"none of {', '.join(_FORMATS)}") from error
    limit = Image.MAX_IMAGE_PIXELS  # None: whoever set it trusts any size
    if limit is not None and image.width * image.height > limit:
        raise Image.DecompressionBombError(f"it has {image.width}x{image.height} pixels, more than {limit}")
    return image


def encode_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
