"""The judge beside three viewers: 100 generated pictures, looked at and labelled by each of them, alone.

    python -m tinyworld.eye [--sheet disagreements.png]

A picture was labelled satisfied if everything asked for is there, nothing else, and every shape, enlarged, is what a
drawing program would have drawn but for a little wobble; the majority decides. The viewers are multimodal language
models, shown the pictures and examples near the border, and not people. Nothing in the judge was chosen by these
pictures: its allowances were, by five other hundreds that one viewer labelled.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from PIL import Image, ImageDraw

from reward.arguments import main_guard, parse_arguments
from tinyworld.grammar import ASSETS
from tinyworld.judge import judge
from tinyworld.scenes import SIZE

FOLDER = ASSETS / "eye"
_ZOOM = 4
_COLUMNS = 5
_LINES = 44  # pixels below a picture, for what is said of it


@dataclass(frozen=True)
class Labelled:
    """A picture (64, 64, 3) uint8, its caption, and which viewers found it satisfied."""

    picture: np.ndarray
    caption: str
    viewers: tuple[bool, ...]

    @property
    def satisfied(self) -> bool:
        """What most of them said."""
        return sum(self.viewers) > len(self.viewers) / 2


def labelled_pictures() -> list[Labelled]:
    """All of them, in the order in which they were labelled."""
    rows = json.loads((FOLDER / "labels.json").read_text())
    strip = np.array(Image.open(FOLDER / "pictures.webp").convert("RGB"))
    pictures = strip.reshape(len(rows), SIZE, SIZE, 3)
    return [
        Labelled(picture, row["caption"], tuple(row["viewers"])) for picture, row in zip(pictures, rows, strict=True)
    ]


def agreement_of_viewers(labelled: Sequence[Labelled]) -> list[float]:
    """For each two of the viewers, the share of pictures of which they say the same."""
    said = np.array([one.viewers for one in labelled])  # (N, viewers)
    return [float((said[:, one] == said[:, other]).mean()) for one, other in combinations(range(said.shape[1]), 2)]


def disagreements(labelled: Sequence[Labelled]) -> list[tuple[int, Labelled, str]]:
    """Where the judge says otherwise: the picture's number, the picture, and what the judge says."""
    found = []
    for number, one in enumerate(labelled):
        verdict = judge(one.picture, one.caption)
        if verdict.satisfied != one.satisfied:
            found.append((number, one, ", ".join(sorted(verdict.flaws)) or "satisfied"))
    return found


def contact_sheet(found: Sequence[tuple[int, Labelled, str]]) -> Image.Image:
    """The disagreements, enlarged, with the caption and what was said by eye and by the judge."""
    side = SIZE * _ZOOM
    rows = max(-(-len(found) // _COLUMNS), 1)
    sheet = Image.new("RGB", (_COLUMNS * side, rows * (side + _LINES)), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (number, one, said) in enumerate(found):
        x, y = place % _COLUMNS * side, place // _COLUMNS * (side + _LINES)
        sheet.paste(Image.fromarray(one.picture).resize((side - 4, side - 4), Image.Resampling.NEAREST), (x, y))
        eyes = f"satisfied by {sum(one.viewers)} of {len(one.viewers)} viewers"
        for line, text in enumerate((f"{number}: {one.caption}", eyes, f"judge: {said}")):
            draw.text((x + 2, y + side - 2 + 14 * line), text, fill="black")
    return sheet


@dataclass
class EyeArguments:
    """Where to draw the disagreements."""

    sheet: str = field(default="disagreements.png", metadata={"help": "contact sheet to write"})


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    (arguments,) = parse_arguments([EyeArguments], argv)
    labelled = labelled_pictures()
    found = disagreements(labelled)
    contact_sheet(found).save(arguments.sheet)
    share = sum(one.satisfied for one in labelled) / len(labelled)
    agreement = 1 - len(found) / len(labelled)
    viewers = ", ".join(f"{one:.0%}" for one in agreement_of_viewers(labelled))
    print(f"{len(labelled)} pictures, {share:.0%} satisfied by most viewers; the judge agrees on {agreement:.0%}")
    print(f"two viewers agree on {viewers}")
    print(f"disagreements: {arguments.sheet}")


if __name__ == "__main__":
    main_guard(main)
