"""What all rewards with a model of others share: loaded late, frozen, asked in batches, in their own precision.

Shapes: B images of H x W pixels, b of them at once, D the width of what the model sees.
"""

from collections.abc import Sequence

import torch
from torch import nn

from reward.feedback import Reward, check_question

_DTYPES = ("float32", "bfloat16", "float16")


class FrozenReward:
    """A reward function that is one number a picture, said by somebody else's model.

    The constructor looks at names and settings only. The model is loaded, frozen, by the first of `to`, `features` and
    a call. It computes in `dtype`, whatever autocast surrounds it: differences between pictures of one prompt are small
    beside a score, and a run's bfloat16 would round them away. Nothing is clipped or replaced: NaN in an image gives a
    reward of NaN.

    Args:
        batch_size: how many images the model sees at once; only memory and speed depend on it.
        dtype: float32, bfloat16 or float16; what the model is kept and computes in. Scores are float32 always.

    A kind of reward says its `name`, that of its term, and defines `_load` and `_score`.
    """

    differentiable = True
    lazy = True
    name: str

    @classmethod
    def gives(cls, **kwargs: object) -> set[str]:
        """Neither `penalties` nor `word_penalties`: it is one number a picture."""
        return set()

    def __init__(self, batch_size: int, dtype: str):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        if dtype not in _DTYPES:
            raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(_DTYPES)}")
        self.batch_size, self.dtype = batch_size, getattr(torch, dtype)
        self._model: nn.Module | None = None

    @property
    def model(self) -> nn.Module:
        if self._model is None:
            self._model = self._load().eval().requires_grad_(False).to(self.dtype)
        return self._model

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def to(self, device: str | torch.device) -> "FrozenReward":
        self.model.to(device)
        return self

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> Reward:
        """Reward `images` (B, 3, H, W) float in [0, 1] for their B `prompts`, on the model's device; see the class.

        Raises:
            ValueError: shapes or counts that do not fit; weights that cannot be loaded.
        """
        check_question(images, prompts)
        places = range(0, len(prompts), self.batch_size)
        with torch.autocast(self.device.type, enabled=False):
            scores = torch.cat(
                [
                    self._score(self._placed(images, start), list(prompts[start : start + self.batch_size])).float()
                    for start in places
                ]
            )
        return Reward(total=scores, terms={self.name: scores.detach()})

    def _placed(self, images: torch.Tensor, start: int) -> torch.Tensor:
        return images[start : start + self.batch_size].to(self.device, torch.float32)

    def _load(self) -> nn.Module:
        raise NotImplementedError

    def _score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """(b, 3, H, W) float32 in [0, 1] on the model's device, b prompts -> (b,)."""
        raise NotImplementedError


class SeeingReward(FrozenReward):
    """A `FrozenReward` that can say what its vision encoder sees; a kind defines `_see`."""

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """What the model sees in `images` (B, 3, H, W) in [0, 1]: (B, D) float32, on its device."""
        with torch.autocast(self.device.type, enabled=False):
            parts = [self._see(self._placed(images, start)) for start in range(0, len(images), self.batch_size)]
        return torch.cat(parts).float()

    def _see(self, images: torch.Tensor) -> torch.Tensor:
        """(b, 3, H, W) float32 in [0, 1] on the model's device -> (b, D)."""
        raise NotImplementedError
