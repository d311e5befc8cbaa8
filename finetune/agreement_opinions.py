"""What several rewards say of the same pictures: as they are, changed, with planted defects, and of two that people
chose from. A reward that fails is asked no more, and the others go on.

Shapes: N pictures, C pairs, B pictures of a batch, H x W pixels.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from finetune.choices import Choices
from finetune.planted_defects import DEFECTS
from finetune.pool import Pool, read_pictures
from finetune.small_changes import ASKED_AGAIN, CHANGES
from reward.feedback import Reward, RewardFn
from rl.scoring import left_out, score
from rl.timing import now

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OneTerm:
    """A reward whose objective is one of another's terms; `name` is what messages call it."""

    name: str
    reward: RewardFn
    term: str
    differentiable = False

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> Reward:
        """See `reward.feedback.RewardFn`.

        Raises:
            ValueError: there is no such term.
        """
        terms = self.reward(images, prompts).terms
        if self.term not in terms:
            raise ValueError(f"rewards: {self.name} has no term {self.term!r}; it has {', '.join(terms) or 'none'}")
        return Reward(total=terms[self.term])


class Panel:
    """Rewards that are asked the same questions.

    Attributes:
        rewards: name -> reward, of those that have not failed.
        failed: name -> what went wrong, in a line.
    """

    def __init__(self, rewards: Mapping[str, RewardFn]):
        self.rewards, self.failed = dict(rewards), {}

    def ask(self, images: torch.Tensor, prompts: Sequence[str]) -> Iterator[tuple[str, np.ndarray, float]]:
        """Of each reward that does not fail its name, its objective (B,) float64, and the seconds it took.

        Args:
            images: (B, 3, H, W) in [0, 1].
            prompts: B prompts.

        Raises:
            ValueError: no reward is left; what went wrong with each is said.
        """
        for name, reward in list(self.rewards.items()):
            try:
                began = now(images.device)
                said = score(reward, images, prompts).objective.double().cpu().numpy()
                taken = now(images.device) - began
            except Exception as error:  # code of others may raise anything, and is no reason to lose what the rest say
                self._drop(name, error)
                continue
            yield name, said, taken

    def _drop(self, name: str, error: Exception) -> None:
        del self.rewards[name]
        self.failed[name] = left_out(name, error)
        if not self.rewards:
            raise ValueError(f"every reward failed, so nothing is measured: {in_a_line(self.failed)}") from error


def in_a_line(failed: Mapping[str, str]) -> str:
    """Which rewards failed and why, for a message."""
    return "; ".join(f"{name}: {said}" for name, said in failed.items())


@dataclass(frozen=True)
class Opinions:
    """What R raters said of N pictures.

    Attributes:
        prompts: N.
        values: rater -> (N,) float64: rewards' objectives, then labels.
        changed: `ASKED_AGAIN` or name of a change (`CHANGES`) -> reward -> (N,), of the same or the changed pictures.
        defective: name of a defect (`DEFECTS`) -> reward -> (N,), of the pictures with it.
        milliseconds: reward -> of one picture, the median over batches.
        chosen: reward -> (C,), by how much it prefers, of C pairs, the picture that people chose; `captions` of them.
    """

    prompts: list[str]
    values: Mapping[str, np.ndarray]
    changed: Mapping[str, Mapping[str, np.ndarray]]
    defective: Mapping[str, Mapping[str, np.ndarray]]
    milliseconds: Mapping[str, float]
    chosen: Mapping[str, np.ndarray] = field(default_factory=dict)
    captions: list[str] = field(default_factory=list)

    def without(self, raters: Collection[str]) -> "Opinions":
        """The same but for what `raters` said."""

        def rest(said: Mapping) -> dict:
            return {name: one for name, one in said.items() if name not in raters}

        return replace(
            self,
            values=rest(self.values),
            changed={change: rest(said) for change, said in self.changed.items()},
            defective={defect: rest(said) for defect, said in self.defective.items()},
            milliseconds=rest(self.milliseconds),
            chosen=rest(self.chosen),
        )


@torch.no_grad()
def ask(
    pool: Pool,
    count: int,
    panel: Panel,
    labels: Mapping[str, np.ndarray],
    batch_size: int,
    device: torch.device,
    on_pictures: Callable[[int], object] = lambda count: None,
) -> Opinions:
    """Ask a panel about the first `count` pictures of a pool, as they are and changed. What a reward had said before it
    failed is among what comes back; see `Opinions.without`.

    Pictures of one size are judged together, at most `batch_size` at once. Calls `on_pictures` with how many are done.

    Raises:
        ValueError: a picture cannot be read, or every reward failed.
    """
    prompts, names = [entry.prompt for entry in pool.entries[:count]], list(panel.rewards)
    values = {name: np.full(count, np.nan) for name in names}
    changed = {change: {name: np.full(count, np.nan) for name in names} for change in (ASKED_AGAIN, *CHANGES)}
    defective = {defect: {name: np.full(count, np.nan) for name in names} for defect in DEFECTS}
    seconds = defaultdict(list)
    for places, images in _batches(pool, count, batch_size):
        images, asked = images.to(device), [prompts[place] for place in places]
        for name, said, taken in panel.ask(images, asked):
            values[name][places] = said
            seconds[name].append(taken / len(places))
        for name, again, _ in panel.ask(images.flip(0), asked[::-1]):
            changed[ASKED_AGAIN][name][places] = again[::-1]
        for change, apply in CHANGES.items():
            for name, said, _ in panel.ask(apply(images), asked):
                changed[change][name][places] = said
        for defect, plant in DEFECTS.items():
            for name, said, _ in panel.ask(*plant(images, asked, places, prompts)):
                defective[defect][name][places] = said
        on_pictures(len(places))
    later = {name: taken[1:] or taken for name, taken in seconds.items()}  # the first batch warms up
    milliseconds = {name: 1000 * float(np.median(taken)) for name, taken in later.items()}
    return Opinions(prompts, {**values, **labels}, changed, defective, milliseconds)


@torch.no_grad()
def ask_about(
    choices: Choices, panel: Panel, device: torch.device, on_pairs: Callable[[int], object] = lambda count: None
) -> dict[str, np.ndarray]:
    """By how much each reward prefers, of each of C pairs, the picture that people chose: name -> (C,), of those that
    had not failed before.

    A pair at a time: its pictures may differ in size from each other, and pairs from pairs.

    Raises:
        ValueError: a picture cannot be read, or every reward failed.
    """
    found = {name: np.zeros(len(choices)) for name in panel.rewards}
    for number, (caption, first) in enumerate(zip(choices.captions, choices.first, strict=True)):
        for place, picture in enumerate(choices.read(number)):
            sign = 1 if first == (place == 0) else -1
            for name, said, _ in panel.ask(picture[None].to(device).float() / 255, [caption]):
                found[name][number] += sign * said[0]
        on_pairs(1)
    return found


def _batches(pool: Pool, count: int, batch_size: int) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Places and pictures (B, 3, H, W) in [0, 1], B at most `batch_size`, of one size each."""
    for start in range(0, count, batch_size):
        by_size = defaultdict(list)
        places = range(start, min(start + batch_size, count))
        for place, picture in zip(places, read_pictures(pool, places), strict=True):
            by_size[picture.shape].append((place, picture))
        for pairs in by_size.values():
            mine, pictures = zip(*pairs, strict=True)
            yield list(mine), torch.stack(pictures).float() / 255
