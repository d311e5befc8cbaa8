"""The words every room shares: what rich feedback is, what a reward is, and what a reward function looks like.

Shapes: B images, H x W their height and width in pixels, T the tokens of one prompt.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

SCORES = ("plausibility", "alignment", "aesthetics", "overall")
"""The four scores of RichHF-18K, in [0, 1], higher is better for all of them."""

HEATMAPS = ("implausibility", "misalignment")
"""The two heatmaps of RichHF-18K, in [0, 1], higher is worse."""


SEPARATORS = ',.?!":; '
"""Characters at which a prompt is split into words; RichHF-18K's own rule."""


def tokenize(prompt: str) -> list[str]:
    """Split `prompt` at any of `, . ? ! " : ;` and the space; empty pieces are dropped (RichHF-18K's own rule).

    >>> tokenize('A cat, "sitting" on a mat.')
    ['A', 'cat', 'sitting', 'on', 'a', 'mat']
    """
    return [piece for piece in re.split(f"[{SEPARATORS}]", prompt) if piece]


@dataclass(frozen=True)
class RichFeedback:
    """What three raters said of a batch of images, or what a predictor thinks they would say.

    Attributes:
        scores: name of `SCORES` -> (B,) float32 in [0, 1], higher is better.
        heatmaps: name of `HEATMAPS` -> (B, H, W) float32 in [0, 1], higher is worse.
        tokens: for each image the T tokens of its prompt, as `tokenize` splits them.
        misaligned: for each image (T,) float32 in [0, 1], the probability that the token is misrepresented or missing.
    """

    scores: Mapping[str, torch.Tensor]
    heatmaps: Mapping[str, torch.Tensor]
    tokens: Sequence[Sequence[str]]
    misaligned: Sequence[torch.Tensor]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Reward:
    """A batch of rewards, with everything that is known about where and why they were lost.

    Attributes:
        total: (B,) float32, higher is better. Does *not* contain the penalties below.
        penalties: name -> (B, H, W) float32 >= 0 in the units of `total`: what each place costs. The image's objective
            is `total` minus, for each map, its mean over places (see `objective`). Any resolution.
        word_penalties: for each image (T,) float32 >= 0, what each word of `tokenize(prompt)` costs, or None. They are
            already counted in `total`; the per-word form says which words they came from.
        terms: name -> (B,) float32, the parts of the reward, for logs.
    """

    total: torch.Tensor
    penalties: Mapping[str, torch.Tensor] = field(default_factory=dict)
    word_penalties: Sequence[torch.Tensor] | None = None
    terms: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def objective(self) -> torch.Tensor:
        """(B,) `total` minus the mean of every penalty map: the scalar that training maximises."""
        value = self.total
        for penalty in self.penalties.values():
            value = value - penalty.mean(dim=(-2, -1))
        return value


class RewardFn(Protocol):
    """Anything that turns images and prompts into a `Reward`.

    Attributes:
        differentiable: whether gradients flow from the reward back into the images.
    """

    differentiable: bool

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> Reward:
        """Reward `images` (B, 3, H, W) float in [0, 1] for their B `prompts`."""
        ...
