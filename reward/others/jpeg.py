"""How well a picture compresses: the rewards whose optimum everybody can see."""

import io
from collections.abc import Sequence

import torch

from reward.draw import to_image
from reward.feedback import Reward, check_question


class JpegIncompressibility:
    """The size of a picture as a JPEG of quality 95, in kB of 1000 bytes (DDPO, arXiv 2305.13301, section 5.1).

    One colour takes 5 kB of 512 x 512 pixels, noise of every pixel 308. Between them, generated pictures mostly take 50
    to 250 kB at 512 px, by our estimate; no source was found. Not differentiable, and blind to the prompt.

    Args:
        quality: of the JPEG, 1 to 100.
    """

    differentiable = False
    lazy = True
    name = "jpeg_incompressibility"
    sign = 1.0

    @classmethod
    def gives(cls, **kwargs: object) -> set[str]:
        """Neither `penalties` nor `word_penalties`: it is one number a picture."""
        return set()

    def __init__(self, quality: int = 95):
        if not 1 <= quality <= 100:
            raise ValueError(f"quality is {quality}; a JPEG's lies in 1..100")
        self.quality = quality

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> Reward:
        """Reward `images` (B, 3, H, W) float in [0, 1]; NaN in an image gives NaN."""
        check_question(images, prompts)
        sizes = images.new_tensor([self._kilobytes(image) for image in images], dtype=torch.float32)
        broken = ~images.flatten(1).isfinite().all(dim=1)
        total = (self.sign * sizes).masked_fill(broken, float("nan"))
        return Reward(total=total, terms={self.name: total})

    def _kilobytes(self, image: torch.Tensor) -> float:
        buffer = io.BytesIO()
        to_image(image.nan_to_num()).save(buffer, format="JPEG", quality=self.quality)
        return buffer.tell() / 1000


class JpegCompressibility(JpegIncompressibility):
    """Minus `JpegIncompressibility`, so mostly minus 50 to 250 kB at 512 px: the emptier, the better."""

    name = "jpeg_compressibility"
    sign = -1.0
