"""How pictures are shown to the models of others: Pillow's filters in torch, so that gradients flow.

Pillow rounds to 8 bits after each direction of a resize, and clips; here only clipping is repeated, so a shown picture
is within about 1/255 of Pillow's. Shapes: B pictures of H x W pixels, h x w as they are shown.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from reward.others.files import BROKEN, first_line

_FILTERS = {int(PILImageResampling.BILINEAR): "bilinear", int(PILImageResampling.BICUBIC): "bicubic"}


@dataclass(frozen=True)
class Showing:
    """Settings of a preprocessing.

    Attributes:
        size: (h, w) of what is shown.
        fit: `crop`: the shorter side is brought to `edge` (None: that of `size`), then the centre is cut out; `pad`:
            the longer side is brought to that of `size`, and black fills the rest.
        filter: `bicubic` or `bilinear`, antialiased.
        mean, std: of the three channels, for normalisation.
    """

    size: tuple[int, int]
    fit: str = "crop"
    edge: int | None = None
    filter: str = "bicubic"
    mean: Sequence[float] = tuple(OPENAI_CLIP_MEAN)
    std: Sequence[float] = tuple(OPENAI_CLIP_STD)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) float in [0, 1] -> (B, 3, h, w), normalised; differentiable."""
        fitted = {"crop": self._crop, "pad": self._pad}[self.fit](images)
        mean, std = (fitted.new_tensor(list(values))[:, None, None] for values in (self.mean, self.std))
        return (fitted - mean) / std

    @property
    def in_words(self) -> str:
        """All of it, numbers to three digits: two that read alike show a picture alike."""
        height, width = self.size
        edge = f" of {self.edge or min(self.size)}" if self.fit == "crop" else ""
        mean, std = (" ".join(f"{value:.3f}" for value in values) for values in (self.mean, self.std))
        return f"{height} x {width} by {self.fit}{edge}, {self.filter}, mean {mean}, std {std}"

    def _crop(self, images: torch.Tensor) -> torch.Tensor:
        """Where the margin is odd, the pixel more is cut from the bottom and right, as transformers does it;
        torchvision, with which some models were trained, cuts it from the top and left in every other case."""
        height, width = images.shape[-2:]
        edge, short = self.edge or min(self.size), min(height, width)
        longer = edge * max(height, width) // short
        resized = self._resize(images, (edge, longer) if height <= width else (longer, edge))
        top, left = ((have - want) // 2 for have, want in zip(resized.shape[-2:], self.size, strict=True))
        assert min(top, left) >= 0, f"{self.size} cannot be cut out of {tuple(resized.shape)}"
        return resized[..., top : top + self.size[0], left : left + self.size[1]]

    def _pad(self, images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[-2:]
        scale = min(self.size) / max(height, width)
        resized = self._resize(images, (max(round(height * scale), 1), max(round(width * scale), 1)))
        down, right = (want - have for have, want in zip(resized.shape[-2:], self.size, strict=True))
        return F.pad(resized, (right // 2, right - right // 2, down // 2, down - down // 2))

    def _resize(self, images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        if tuple(images.shape[-2:]) == tuple(size):
            return images
        resized = F.interpolate(images, size=size, mode=self.filter, align_corners=False, antialias=True)
        return resized.clamp(0, 1)  # bicubic overshoots


def read_showing(source: str | Path) -> Showing:
    """The preprocessing that a folder of transformers, or a name on the hub, states for a CLIP.

    Raises:
        ValueError: there is none, or it asks for something that is not here.
    """
    try:
        settings = CLIPImageProcessorPil.from_pretrained(source).to_dict()
    except BROKEN as error:
        raise ValueError(f"{source} states no preprocessing of pictures: {first_line(error)}") from error
    for name in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
        if not settings[name]:
            raise ValueError(f"{source}: its preprocessing says {name}: false, which is not known here")
    edge, crop = settings["size"].get("shortest_edge"), settings["crop_size"]
    size = crop["height"], crop["width"]
    if edge is None or edge < max(size):
        raise ValueError(f"{source}: its preprocessing resizes to {settings['size']} and crops to {size}, unknown here")
    if settings["resample"] not in _FILTERS:
        raise ValueError(f"{source}: its filter (resample: {settings['resample']}) is neither bilinear nor bicubic")
    mean, std = tuple(settings["image_mean"]), tuple(settings["image_std"])
    return Showing(size, "crop", edge, _FILTERS[settings["resample"]], mean, std)
