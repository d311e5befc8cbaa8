"""What a caption claims, and how far a picture bears it out.

Masks are (S, S) bool, S = 64; words are indices into the caption's.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from tinyworld.fit import Fit, cover
from tinyworld.grammar import COLOURS, Noun, Request
from tinyworld.match import fit_of, holds, seen_as
from tinyworld.scenes import SIZE
from tinyworld.segment import PALETTE, Patch


@dataclass(frozen=True)
class Found:
    """One thing in the picture.

    Attributes:
        noun: index of the noun it answers, or None for an extra thing.
        colour, shape: what it shows; the shape asked for wherever that is nearly as good as the best.
        x, y, radius: the ideal shape's place and size, as in `scenes.Thing`.
        iou: how well that shape matches, in [0, 1]; above 0.95 when drawn well.
        mask: (S, S) bool, the pixels that show it.
        play, corners: as in `fit.Fit`.
    """

    noun: int | None
    colour: str
    shape: str
    x: float
    y: float
    radius: float
    iou: float
    mask: np.ndarray
    play: tuple[float, ...] = ()
    corners: float = 0.0

    def ideal(self) -> np.ndarray:
        """(S, S) float32 in [0, 1]: about the share of each pixel that the thing, drawn ideally, covers."""
        return cover(self.shape, self.x, self.y, self.radius, self.play)


def things_of(
    request: Request, slots: list[int], answers: list[Patch | None], spare: list[Patch]
) -> tuple[list[Found | None], list[Found]]:
    """The thing that answers each slot, or None, and the extra things; `slots` holds the noun of each thing wanted."""

    def found(noun: int | None, patch: Patch, one: Fit) -> Found:
        return Found(
            noun, patch.colour, one.shape, one.x, one.y, one.radius, one.iou, patch.mask, one.play, one.corners
        )

    things = [
        found(noun, patch, seen_as(patch, request.nouns[noun].shape)) if patch else None
        for noun, patch in zip(slots, answers, strict=True)
    ]
    return things, [found(None, patch, patch.fits[0]) for patch in spare]


class Claims:
    """What a caption says, and how far the picture bears it out; every degree in [0, 1], below 0.5 it is belied."""

    def __init__(
        self,
        request: Request,
        slots: list[int],
        things: list[Found | None],
        answers: list[Patch | None],
        extra: list[Found],
        clarity: list[float],
    ):
        self.request, self.slots, self.things, self.extra = request, slots, things, extra
        self.degrees = [
            self._of_thing(request.nouns[noun], patch, clear) if patch else (0.0, 0.0, 0.0)
            for noun, patch, clear in zip(slots, answers, clarity, strict=True)
        ]
        self.relation = None
        if request.relation:
            one, other = things[:2]
            fits = [Fit(t.shape, t.x, t.y, t.radius, t.iou, play=t.play) for t in (one, other) if t]
            self.relation = holds(request.relation, *fits, one.mask) if one and other else 0.0

    @staticmethod
    def _of_thing(noun: Noun, patch: Patch, clear: float) -> tuple[float, float, float]:
        """How far a thing is there, of the colour, and of the shape."""
        there = clear * min(1.0, patch.area / 60)
        gaps = np.linalg.norm(PALETTE[1:] - patch.mean, axis=-1)
        gap = gaps[list(COLOURS).index(noun.colour)] - gaps[list(COLOURS).index(patch.colour)]
        colour = clear if patch.colour == noun.colour else float(np.clip(0.49 - gap / 200, 0, 0.49))
        asked, seen = fit_of(patch, noun.shape), seen_as(patch, noun.shape)
        iou, hidden = (asked.iou, asked.hidden) if asked else (0.0, 0.0)
        recognised = clear * float(np.clip((iou - 0.3) / 0.25, 0, 1))
        if sum(one.iou > iou - 0.04 for one in patch.fits) > 2:
            # What little is seen of a thing may be of any shape.
            recognised *= float(np.clip((0.7 - hidden) / 0.2, 0, 1))
        if seen.shape == noun.shape:
            return there, colour, recognised
        return there, colour, min(0.49, recognised * float(np.exp(-(seen.iou - iou) / 0.08)))

    def score(self) -> float:
        """The share of the claims that hold."""
        total = sum(0.3 * there + 0.35 * colour + 0.35 * shape for there, colour, shape in self.degrees)
        claims = len(self.degrees)
        if self.relation is not None:
            total, claims = total + 0.8 * self.relation, claims + 0.8
        return total / claims / (1 + 0.4 * len(self.extra))

    @property
    def flaws(self) -> set[str]:
        flaws = {"extra"} if self.extra else set()
        for thing, (_, colour, shape) in zip(self.things, self.degrees, strict=True):
            if thing is None:
                flaws.add("missing")
                continue
            flaws |= {"wrong colour"} if colour < 0.5 else set()
            flaws |= {"wrong shape"} if shape < 0.5 else set()
        if self.relation is not None and self.relation < 0.5 and all(self.things[:2]):
            flaws.add("relation")
        return flaws

    def words(self) -> tuple[int, ...]:
        """The words that are belied."""
        words: set[int] = set()
        for index, noun in enumerate(self.request.nouns):
            mine = [k for k, slot in enumerate(self.slots) if slot == index]
            there = [k for k in mine if self.things[k] is not None]
            first = noun.first_word
            if not there:
                words |= {first, first + 1, first + 2}
                continue
            more = any((thing.colour, thing.shape) == (noun.colour, noun.shape) for thing in self.extra)
            words |= {first} if len(there) < len(mine) or more else set()
            words |= {first + 1} if any(self.degrees[k][1] < 0.5 for k in there) else set()
            words |= {first + 2} if any(self.degrees[k][2] < 0.5 for k in there) else set()
        if "relation" in self.flaws:
            words |= set(self.request.relation_words)
        return tuple(sorted(words))

    def mask(self) -> np.ndarray:
        """(S, S) bool: things that belie the caption, whole."""
        wrong = list(self.extra)
        for thing, (_, colour, shape) in zip(self.things, self.degrees, strict=True):
            if thing is not None and min(colour, shape) < 0.5:
                wrong.append(thing)
        if "relation" in self.flaws:
            wrong += self.things[:2]
        mask = np.zeros((SIZE, SIZE), bool)
        for thing in wrong:
            mask |= thing.mask
        return ndimage.binary_closing(mask) | mask
