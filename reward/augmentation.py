"""Random changes of training pictures and, where they move things, of their heatmaps alike.

Order: flip and cut (picture and maps), then brightness, contrast, hue, saturation, grayscale, and JPEG noise last, as a
picture on its way through the web gets it. Torch all through but for JPEG, which Pillow's encoder does in memory: its
blocks are real, and it gives the same bytes for the same pixels.

Shapes: H x W pixels of a picture, h' x w' of its maps.
"""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

SIDED_WORDS = ("left", "right")
_GREY = (0.299, 0.587, 0.114)
_BEST_QUALITY = 95  # Pillow's advice: above it, files grow and nothing is gained


@dataclass(frozen=True)
class Augmentation:
    """What is changed, and how strongly; by default nothing.

    Args:
        seed: with an example's uid and the epoch, all that the draws depend on; not the batch, nor the worker.
        flip_probability: how often left and right are swapped, where the prompt has none of `sided_words`.
        sided_words: a flip would belie a prompt with one of them, in any case of letters ("left of" becomes "right
            of", and the rated words and misalignment with it).
        crop_probability: how often a picture and its maps are cut, alike.
        crop_min_side: the smallest side kept, as a share of the whole, in (0, 1]; the largest is 1.
        brightness, contrast, saturation: strength x in [0, 1]; the factor is uniform in [1 - x, 1 + x].
        hue: strength x in [0, 0.5]; the turn is uniform in [-x, x], 1 being the full circle.
        grayscale_probability: how often all colour is taken.
        jpeg_probability: how often the picture goes through JPEG.
        jpeg_min_quality: the lowest quality, in [1, 95]; it is uniform between this and 95.

    Raises:
        ValueError: a setting outside its range.
    """

    seed: int = 0
    flip_probability: float = 0.0
    sided_words: tuple[str, ...] = SIDED_WORDS
    crop_probability: float = 0.0
    crop_min_side: float = 0.8
    brightness: float = 0.0
    contrast: float = 0.0
    hue: float = 0.0
    saturation: float = 0.0
    grayscale_probability: float = 0.0
    jpeg_probability: float = 0.0
    jpeg_min_quality: int = 70

    def __post_init__(self):
        highest = dict.fromkeys(("brightness", "contrast", "saturation"), 1) | {"hue": 0.5}
        highest |= dict.fromkeys((name for name in vars(self) if name.endswith("_probability")), 1)
        for name, top in highest.items():
            if not 0 <= getattr(self, name) <= top:
                raise ValueError(f"{name} must be in [0, {top}], not {getattr(self, name)}")
        if not 0 < self.crop_min_side <= 1:
            raise ValueError(f"crop_min_side must be in (0, 1], not {self.crop_min_side}")
        if not 1 <= self.jpeg_min_quality <= _BEST_QUALITY:
            raise ValueError(f"jpeg_min_quality must be in [1, {_BEST_QUALITY}], not {self.jpeg_min_quality}")

    def __call__(
        self, image: torch.Tensor, maps: torch.Tensor, key: str, size: tuple[int, int], tokens: Sequence[str] = ()
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Picture (3, H, W) and maps (2, h', w'), both in [0, 1], changed; their sizes may differ and may shrink.

        `tokens` are the prompt's words.

        The cut's edges lie on a lattice of `size` = (rows, columns), so that picture and maps lose exactly the same
        where their sides are multiples of it, and to a rounding of half a pixel elsewhere.
        """
        digest = hashlib.blake2b(f"{self.seed} {key}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        flip, crop, *box, brightness, contrast, hue, saturation, grayscale, jpeg, quality = torch.rand(
            12, generator=generator
        ).tolist()  # all of them, whatever is switched on: a setting more moves no other's draws
        sided = {word.lower() for word in self.sided_words}
        if flip < self.flip_probability and sided.isdisjoint(token.lower() for token in tokens):
            image, maps = image.flip(-1), maps.flip(-1)
        if crop < self.crop_probability:
            image, maps = self._crop(image, maps, box, size)
        image = adjust_colour(
            image,
            brightness=_about(1, self.brightness, brightness),
            contrast=_about(1, self.contrast, contrast),
            hue=_about(0, self.hue, hue),
            saturation=0.0 if grayscale < self.grayscale_probability else _about(1, self.saturation, saturation),
        )
        if jpeg < self.jpeg_probability:
            image = through_jpeg(
                image, self.jpeg_min_quality + int(quality * (_BEST_QUALITY + 1 - self.jpeg_min_quality))
            )
        return image, maps

    def _crop(
        self, image: torch.Tensor, maps: torch.Tensor, draws: list[float], size: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`draws`: three numbers in [0, 1), for the side, the top and the left."""
        share = self.crop_min_side + (1 - self.crop_min_side) * draws[0]
        begins, ends = [], []
        for count, draw in zip(size, draws[1:], strict=True):
            side = max(round(count * share), 1)
            first = min(int(draw * (count - side + 1)), count - side)
            begins.append(first / count)
            ends.append((first + side) / count)
        return _cut(image, (*begins, *ends)), _cut(maps, (*begins, *ends))


def adjust_colour(
    image: torch.Tensor, brightness: float = 1.0, contrast: float = 1.0, hue: float = 0.0, saturation: float = 1.0
) -> torch.Tensor:
    """Picture (3, H, W) in [0, 1], changed in this order and kept in [0, 1].

    Args:
        brightness: factor of every value.
        contrast: factor of the distance from the picture's mean grey.
        hue: turn on the circle of HSV, see `turn_hue`.
        saturation: factor of the distance from each pixel's grey; 0 gives a grayscale picture.
    """
    weights = image.new_tensor(_GREY)[:, None, None]
    if brightness != 1:
        image = (image * brightness).clamp(0, 1)
    if contrast != 1:
        mean = (image * weights).sum(0).mean()
        image = (mean + contrast * (image - mean)).clamp(0, 1)
    if hue != 0:
        image = turn_hue(image, hue)
    if saturation != 1:
        grey = (image * weights).sum(0, keepdim=True)
        image = (grey + saturation * (image - grey)).clamp(0, 1)
    return image


def turn_hue(image: torch.Tensor, turn: float) -> torch.Tensor:
    """Picture (3, H, W) in [0, 1] with every hue of HSV turned; 1 is the full circle, 1/3 makes red green.

    HSV's value (the largest of R, G, B) and chroma (largest less smallest) stay, so nothing leaves [0, 1] and grey
    stays grey; the same as `tf.image.adjust_hue` and torchvision's.
    """
    red, green, blue = image
    value, low = image.amax(0), image.amin(0)
    chroma = value - low
    width = chroma.clamp(min=torch.finfo(image.dtype).tiny)  # grey has no hue: any will do
    sector = torch.where(
        value == red,
        (green - blue) / width,
        torch.where(value == green, 2 + (blue - red) / width, 4 + (red - green) / width),
    )  # in [-1, 5], of a circle of 6
    place = torch.stack([sector + 6 * turn + shift for shift in (5, 3, 1)]).remainder(6)
    return value - chroma * torch.minimum(place, 4 - place).clamp(0, 1)


def through_jpeg(image: torch.Tensor, quality: int) -> torch.Tensor:
    """Picture (3, H, W) in [0, 1], rounded to 8 bits, written as JPEG (4:2:0) and read again; the same on every run."""
    pixels = (image * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="JPEG", quality=quality, subsampling="4:2:0")
    back = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
    return (back.to(image.dtype) / 255).contiguous()


def _about(middle: float, strength: float, draw: float) -> float:
    """A draw from [0, 1) -> [middle - strength, middle + strength)."""
    return middle + strength * (2 * draw - 1)


def _cut(image: torch.Tensor, box: tuple[float, float, float, float]) -> torch.Tensor:
    """(C, H, W) -> the part inside `box` (top, left, bottom, right as shares of the whole), at least one pixel."""
    height, width = image.shape[-2:]
    top, left, bottom, right = (round(edge * side) for edge, side in zip(box, (height, width) * 2, strict=True))
    return image[:, top : max(bottom, top + 1), left : max(right, left + 1)]
