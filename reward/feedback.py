"""The words every room shares: what rich feedback is, what a reward is, and what a reward function looks like.

Shapes: B images, H x W their height and width in pixels, T the tokens of one prompt.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NoReturn, Protocol

import torch

SCORES = ("plausibility", "alignment", "aesthetics", "overall")
"""The four scores of RichHF-18K, in [0, 1], higher is better for all of them."""

HEATMAPS = ("implausibility", "misalignment")
"""The two heatmaps of RichHF-18K, in [0, 1], higher is worse."""

LABEL_RANGE = (0.0, 1.0)
"""What scores and heatmaps lie in, as labels and as predictions."""

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
        wrong_words: for each image (T,) bool, which of these words the reward holds to be misrepresented, or None: it
            does not say. For people to look at; training goes by the costs.
        heatmaps: name -> (B, H, W) float32 in [0, 1], where the reward sees something wrong, any resolution. For people
            to look at, whether or not it is penalised; training goes by the penalties.
        terms: name -> (B,) float32, the parts of the reward, for logs.
    """

    total: torch.Tensor
    penalties: Mapping[str, torch.Tensor] = field(default_factory=dict)
    word_penalties: Sequence[torch.Tensor] | None = None
    terms: Mapping[str, torch.Tensor] = field(default_factory=dict)
    wrong_words: Sequence[torch.Tensor] | None = None
    heatmaps: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def objective(self) -> torch.Tensor:
        """(B,) `total` minus the mean of every penalty map: the scalar that training maximises."""
        value = self.total
        for penalty in self.penalties.values():
            value = value - penalty.mean(dim=(-2, -1))
        return value

    def detach(self) -> "Reward":
        """The same without its gradients."""
        return self._each(torch.Tensor.detach)

    def first(self, count: int) -> "Reward":
        """Of the first `count` images."""
        words = {name: None if whole is None else list(whole[:count]) for name, whole in self._of_words().items()}
        return replace(self._each(lambda tensor: tensor[:count]), **words)

    def cpu(self) -> "Reward":
        return self._each(torch.Tensor.cpu)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Reward":
        """The same with every tensor changed, those of words too."""
        words = {
            name: None if whole is None else [change(value) for value in whole]
            for name, whole in self._of_words().items()
        }
        return Reward(
            total=change(self.total),
            penalties={name: change(maps) for name, maps in self.penalties.items()},
            terms={name: change(value) for name, value in self.terms.items()},
            heatmaps={name: change(maps) for name, maps in self.heatmaps.items()},
            **words,
        )

    def _of_words(self) -> dict[str, Sequence[torch.Tensor] | None]:
        return {"word_penalties": self.word_penalties, "wrong_words": self.wrong_words}


class RewardFn(Protocol):
    """Anything that turns images and prompts into a `Reward`.

    Attributes:
        differentiable: whether gradients flow from the reward back into the images.

    Two more are optional, and let a run see that its reward is being gamed (`rl/watch.py`):

        ranges: name of a term -> (lowest, highest) value that it can have.
        features(images (B, 3, H, W) in [0, 1]) -> (B, D): what the reward sees in images; diversity is measured there.

    And two of a class, for what can be known of its arguments before any model is loaded:

        lazy: true where the constructor looks at its arguments and loads nothing, so that a command may try it first.
        gives(**arguments) -> which of `penalties` and `word_penalties` such a reward has, a class method.
    """

    differentiable: bool

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> Reward:
        """Reward `images` (B, 3, H, W) float in [0, 1] for their B `prompts`."""
        ...


class RewardError(ValueError):
    """A reward function returned something that cannot be trained on, or could not be asked."""


def check_question(images: torch.Tensor, prompts: Sequence[str]) -> None:
    """Look whether a reward function is asked about B images (B, 3, H, W) float and their B prompts, B at least 1.

    Raises:
        ValueError: they are not of that form.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts must be a list with a prompt for each image, not the one text {prompts!r}")
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"images must be a float tensor (B, 3, H, W) with values in [0, 1], not {images.dtype} "
            f"{tuple(images.shape)}"
        )
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images were given with {len(prompts)} prompts; give one prompt an image")
    if not len(prompts):
        raise ValueError("there are no images to judge")


def check_reward(reward: Reward, prompts: Sequence[str]) -> None:
    """Look whether what a reward function returned for B prompts is a reward of B images.

    Raises:
        RewardError: it is no `Reward`; the total, a term or a penalty is no tensor, not finite (the prompt is named) or
            of a wrong shape; a penalty is negative; a heatmap leaves [0, 1].
    """
    if not isinstance(reward, Reward):
        raise RewardError(f"the reward function returned {_kind(reward)}, not a reward.feedback.Reward")
    for name, value in reward.terms.items():
        _check_values(f"term `{name}`", value, prompts)
    for name, value in reward.penalties.items():
        _check_values(f"penalty map `{name}`", value, prompts, dimensions=3)
        if value.min() < 0:
            _refuse_negative(f"penalty map `{name}`", value)
    _check_values("total", reward.total, prompts)
    if reward.word_penalties is not None:
        _check_words(reward.word_penalties, prompts)
    if reward.wrong_words is not None:
        _check_words(reward.wrong_words, prompts, "wrong words")
    for name, value in reward.heatmaps.items():
        _check_values(f"heatmap `{name}`", value, prompts, dimensions=3)
        lowest, highest = float(value.detach().min()), float(value.detach().max())
        if lowest < LABEL_RANGE[0] or highest > LABEL_RANGE[1]:
            raise RewardError(f"the reward's heatmap `{name}` has values from {lowest} to {highest}, not in [0, 1]")


def _check_values(name: str, value: torch.Tensor, prompts: Sequence[str], dimensions: int = 1) -> None:
    """(B,), or maps (B, H, W) of at least one place; every number finite."""
    count = len(prompts)
    wanted = f"({count}, H, W)" if dimensions == 3 else f"({count},)"
    if not isinstance(value, torch.Tensor):
        raise RewardError(f"the reward's {name} is {_kind(value)}, not a tensor {wanted}")
    value = value.detach()
    if value.ndim != dimensions or len(value) != count:
        raise RewardError(f"the reward's {name} has shape {tuple(value.shape)} for {count} pictures, not {wanted}")
    if 0 in value.shape:
        raise RewardError(f"the reward's {name} has shape {tuple(value.shape)}: a map must have places")
    broken = ~value.isfinite().reshape(count, -1).all(dim=1)
    if broken.any():
        index = int(broken.nonzero()[0])
        example = value[index].flatten()
        example = float(example[~example.isfinite()][0])
        raise RewardError(
            f"the reward's {name} is {example} for the prompt {prompts[index]!r} "
            f"({int(broken.sum())} of {count} pictures); it is not replaced by a number: mend the reward"
        )


def _check_words(words: Sequence[torch.Tensor], prompts: Sequence[str], what: str = "word penalties") -> None:
    if len(words) != len(prompts):
        raise RewardError(f"the reward has {what} for {len(words)} pictures, not {len(prompts)}")
    for value in words:
        if not isinstance(value, torch.Tensor) or value.ndim != 1:
            shape = tuple(value.shape) if isinstance(value, torch.Tensor) else _kind(value)
            raise RewardError(f"the reward's {what} must be a tensor (T,) for each picture, not {shape}")
    together = torch.cat(list(words)).detach()
    if not together.isfinite().all():
        index = next(index for index, value in enumerate(words) if not value.isfinite().all())
        raise RewardError(f"the reward's {what} are not finite for the prompt {prompts[index]!r}")
    if len(together) and together.min() < 0:
        _refuse_negative(what, together)


def _refuse_negative(name: str, value: torch.Tensor) -> NoReturn:
    raise RewardError(f"the reward's {name} is negative ({float(value.detach().min())}); penalties are costs, >= 0")


def _kind(value: object) -> str:
    return f"a {type(value).__name__}"
