"""The same prompts and noise across a comparison's policies, worst cases first, with what a predictor marks."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from finetune.compare.config import Comparison
from finetune.compare.evaluate import Findings
from finetune.compare.folder import base_findings, kept_picture, run_findings
from finetune.compare.measures import rank_of_worst
from finetune.compare.rewards import BASE, Evaluator, Spec
from reward.data import to_tensor
from reward.draw import overlay, to_image
from reward.feedback import RewardFn
from rl.pictures import shown_maps
from rl.scoring import left_out, score

_SMALLEST, _LARGEST = 128, 192  # pixels of a picture's height in the report


@dataclass(frozen=True)
class Shown:
    """One picture in the report.

    Attributes:
        policy: whose it is: an entrant, or `BASE`, with those that start from it where they start differently.
        value: what the deciding evaluator says of it; `change` against the picture of what it starts from, None for
            that.
        picture: a data URI.
        marks: name of a penalty map -> the picture with the map over it, a data URI.
    """

    policy: str
    value: float
    change: float | None
    picture: str
    marks: Mapping[str, str]


@dataclass(frozen=True)
class Row:
    """One prompt, and its pictures by each policy."""

    prompt: str
    shown: Sequence[Shown]


@dataclass(frozen=True)
class Pictures:
    """What is shown.

    Attributes:
        seed: whose trainings are; None if there are none.
        absent: entrants that have no pictures of this seed.
        bare: why pictures are bare from some place on, if the overlay's reward could not be asked.
    """

    seed: int | None
    rows: Sequence[Row]
    absent: Sequence[str]
    bare: str


def check_overlay(comparison: Comparison) -> None:
    """Ask the overlay's reward about one picture of the policy before training.

    Raises:
        ValueError: it cannot be made, or not be asked; whatever it raises itself is in the message.
    """
    if comparison.overlay is None:
        return
    file = kept_picture(base_findings(comparison, comparison.entrants[0]), 0)
    mark = Marker(comparison.overlay)
    mark(_opened(file), comparison.held_out[0])
    if mark.failed:
        raise ValueError(f"overlay: {mark.failed}")


def picture_rows(
    comparison: Comparison,
    evaluator: Evaluator,
    gains: Mapping[str, Mapping[int, np.ndarray]],
    judged: Sequence[str],
) -> Pictures:
    """Prompts by what the worst of the entrants `judged` lost on them.

    Args:
        evaluator: that ranks and numbers them.
        gains: of those that are shown, in their order: entrant -> seed -> (P,), in the evaluator's eyes.
        judged: names of those whose losses count for the order; all if there are none of them.
    """
    there = {
        seed: [
            one
            for one in map(comparison.entrant, gains)
            if seed in gains[one.name] and kept_picture(run_findings(comparison, one, seed), 0).is_file()
        ]
        for seed in comparison.arguments.seeds
    }
    seed = max(there, key=lambda one: len(there[one]))  # the first of those that most have
    entrants = there[seed]
    absent = [name for name in gains if name not in [one.name for one in entrants]]
    if not entrants:
        return Pictures(None, [], absent, "")
    starting: dict[Path, list[str]] = {}
    for one in entrants:
        starting.setdefault(base_findings(comparison, one), []).append(one.name)
    files = {BASE if len(starting) == 1 else f"{BASE} of {', '.join(names)}": file for file, names in starting.items()}
    files |= {one.name: run_findings(comparison, one, seed) for one in entrants}
    values = {name: _first_pictures(Findings.read(file), evaluator) for name, file in files.items()}
    starts = {one.name: _first_pictures(Findings.read(base_findings(comparison, one)), evaluator) for one in entrants}
    changes = {name: values[name] - start for name, start in starts.items()}
    counted = [name for name in changes if name in judged] or list(changes)
    means = {name: np.mean([*of.values()], axis=0) for name, of in gains.items()}
    order = rank_of_worst(*(np.stack([of[name] for name in counted]) for of in (changes, means)))
    mark, rows = Marker(comparison.overlay), []
    for place in order[: comparison.arguments.grid_prompts]:
        prompt = comparison.held_out[place]
        shown = []
        for name, file in files.items():
            picture = _opened(kept_picture(file, place))
            change = float(changes[name][place]) if name in changes else None
            shown.append(
                Shown(name, float(values[name][place]), change, data_uri(_sized(picture)), mark(picture, prompt))
            )
        rows.append(Row(prompt, shown))
    return Pictures(seed, rows, absent, mark.failed)


class Marker:
    """What an overlay's reward marks on pictures; nothing any more once it has failed, which `failed` says.

    A report is made after all trainings: somebody's code that fails here must not cost it.
    """

    def __init__(self, overlay: Spec | None):
        self.failed, self._reward = "", None
        if overlay is not None:
            self._try(lambda: setattr(self, "_reward", overlay.make()))

    def __call__(self, picture: torch.Tensor, prompt: str) -> dict[str, str]:
        """Name of a map -> the `picture` (3, H, W) with it, a data URI."""
        return {} if self._reward is None else self._try(lambda: _marks(self._reward, picture, prompt)) or {}

    def _try(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except Exception as error:  # whatever it raises
            self.failed, self._reward = left_out("of the overlay", error), None
            return None


def data_uri(image: Image.Image, lossless: bool = False) -> str:
    """An image as a page can hold it."""
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", method=4, lossless=lossless, quality=82)  # lossless, that is the effort
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _first_pictures(found: Findings, evaluator: Evaluator) -> np.ndarray:
    """(P,), of each prompt's first picture at the end: the one that is kept."""
    return np.array(found.seen[-1].values[evaluator.spec.key][evaluator.term or ""])[:, 0]


def _opened(file: Path) -> torch.Tensor:
    """(3, H, W) in [0, 1]."""
    return to_tensor(Image.open(file)).float() / 255


@torch.no_grad()
def _marks(reward: RewardFn, picture: torch.Tensor, prompt: str) -> dict[str, str]:
    marked = shown_maps(score(reward, picture[None], [prompt]))
    height = _height(picture)
    return {name: data_uri(overlay(picture, maps[0], name, height)) for name, maps in marked.items()}


def _sized(picture: torch.Tensor) -> Image.Image:
    return to_image(picture, _height(picture))


def _height(picture: torch.Tensor) -> int:
    return min(max(picture.shape[-2], _SMALLEST), _LARGEST)
