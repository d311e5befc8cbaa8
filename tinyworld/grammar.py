"""The captions of tinyworld: what can be asked for, said in words and parsed back.

    caption  = noun | noun relation noun | noun "and" noun | noun relation noun "and" noun
    noun     = "a" colour shape | ("two" | "three") colour shapes
    relation = "left of" | "above" | "inside"

A picture holds one to three things, a relation stands between single things, and no caption names the same
colour and shape twice. Compositions listed in `assets/held_out.txt` are in no training data of anything.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np

COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 150, 70),
    "blue": (45, 85, 210),
    "yellow": (244, 200, 40),
    "pink": (236, 110, 185),
    "black": (40, 40, 46),
}
"""Name -> sRGB, 0..255."""

GROUND = (236, 233, 224)
"""The plain ground every scene is drawn on, sRGB."""

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star")
KINDS = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
"""The names of all kinds of things, as `Noun.kind` says them."""
PLURALS = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}
COUNTS = {"a": 1, "two": 2, "three": 3}
RELATIONS = ("left of", "above", "inside")
ROOMY = ("circle", "square", "diamond")
"""The shapes that another thing can be inside of."""

WORDS = (*COUNTS, "and", "left", "of", "above", "inside", *COLOURS, *SHAPES, *PLURALS.values())
"""Every word of the grammar, in the tokenizer's order."""

ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class Noun:
    """`count` things of one colour and shape, and where the caption says so.

    Attributes:
        first_word: index of the count word among the caption's words; colour and shape follow it.
    """

    count: int
    colour: str
    shape: str
    first_word: int = 0

    @property
    def kind(self) -> str:
        """The composition's name for one such thing, e.g. "red circle"."""
        return f"{self.colour} {self.shape}"

    def __str__(self) -> str:
        count = next(word for word, number in COUNTS.items() if number == self.count)
        return f"{count} {self.colour} {self.shape if self.count == 1 else PLURALS[self.shape]}"


@dataclass(frozen=True)
class Request:
    """A caption's meaning.

    Attributes:
        nouns: what is asked for, in the caption's order; one to three things in all.
        relation: one of `RELATIONS`, between the first noun and the second, or None.
        relation_words: indices of the relation's words among the caption's words.
    """

    nouns: tuple[Noun, ...]
    relation: str | None = None
    relation_words: tuple[int, ...] = ()

    @property
    def things(self) -> int:
        """How many things are asked for."""
        return sum(noun.count for noun in self.nouns)

    @property
    def compositions(self) -> frozenset[str]:
        """The names of everything combined here: "red circle + blue square" (sorted), "two red circles"."""
        kinds = sorted(noun.kind for noun in self.nouns)
        pairs = (f"{one} + {other}" for one, other in combinations(kinds, 2))
        counts = (str(noun) for noun in self.nouns if noun.count > 1)
        return frozenset([*pairs, *counts])

    def __str__(self) -> str:
        caption = str(self.nouns[0])
        joint = self.relation or "and"
        for noun in self.nouns[1:]:
            caption += f" {joint} {noun}"
            joint = "and"
        return caption


def parse(caption: str) -> Request:
    """The meaning of a caption.

    Raises:
        ValueError: the caption is not of the grammar; the message names the word it stumbles over.
    """
    words = caption.split()
    singular = {plural: shape for shape, plural in PLURALS.items()}
    position = 0

    def noun() -> Noun:
        nonlocal position
        first, position = position, position + 3
        if len(words) < position:
            raise ValueError(f"caption {caption!r} ends where a count, a colour and a shape are wanted")
        count, colour, shape = words[first:position]
        if count not in COUNTS:
            raise ValueError(f"caption {caption!r}: {count!r} is no count; use one of {', '.join(COUNTS)}")
        if colour not in COLOURS:
            raise ValueError(f"caption {caption!r}: {colour!r} is no colour; use one of {', '.join(COLOURS)}")
        plural = COUNTS[count] > 1
        known = singular if plural else SHAPES
        if shape not in known:
            raise ValueError(f"caption {caption!r}: {shape!r} is no shape here; use one of {', '.join(known)}")
        return Noun(COUNTS[count], colour, singular[shape] if plural else shape, first)

    nouns, relation, relation_words = [noun()], None, ()
    while position < len(words):
        for joint in (*RELATIONS, "and"):
            length = len(joint.split())
            if " ".join(words[position : position + length]) == joint:
                break
        else:
            raise ValueError(f"caption {caption!r}: {words[position]!r} joins nothing; use 'and' or a relation")
        if joint != "and":
            if len(nouns) > 1:
                raise ValueError(f"caption {caption!r}: a relation may only stand between the first two nouns")
            relation, relation_words = joint, tuple(range(position, position + length))
        position += length
        nouns.append(noun())
    return _checked(Request(tuple(nouns), relation, relation_words), caption)


def _checked(request: Request, caption: str) -> Request:
    kinds = [noun.kind for noun in request.nouns]
    if len(set(kinds)) < len(kinds):
        raise ValueError(f"caption {caption!r} names the same colour and shape twice")
    if request.things > 3:
        raise ValueError(f"caption {caption!r} asks for {request.things} things; a picture holds at most 3")
    if request.relation and any(noun.count > 1 for noun in request.nouns):
        raise ValueError(f"caption {caption!r}: a relation stands between single things")
    if request.relation == "inside" and request.nouns[1].shape not in ROOMY:
        raise ValueError(f"caption {caption!r}: nothing fits inside a {request.nouns[1].shape}")
    return request


FORMS = {
    "one": (0.30, (1,), None),
    "left of": (0.15, (1, 1), "left of"),
    "above": (0.15, (1, 1), "above"),
    "inside": (0.07, (1, 1), "inside"),
    "pair": (0.15, (1, 1), None),
    "two": (0.10, (2,), None),
    "three": (0.03, (3,), None),
    "two and one": (0.03, (2, 1), None),
    "relation and one": (0.02, (1, 1, 1), "any"),
}
"""Form of caption -> (share, count of each noun, relation)."""


def draw_request(rng: np.random.Generator) -> Request:
    """One caption's meaning, drawn from the grammar with the shares of `FORMS`; held-out compositions included.

    Nothing is asked for inside a thing of its own colour: it could not be seen.
    """
    shares = np.array([share for share, _, _ in FORMS.values()])
    _, counts, relation = list(FORMS.values())[rng.choice(len(FORMS), p=shares / shares.sum())]
    if relation == "any":
        relation = str(rng.choice(("left of", "above")))
    kinds = rng.choice(len(COLOURS) * len(SHAPES), size=len(counts), replace=False)
    pairs = [(list(COLOURS)[kind % len(COLOURS)], SHAPES[kind // len(COLOURS)]) for kind in kinds]
    if relation == "inside" and (pairs[1][1] not in ROOMY or pairs[0][0] == pairs[1][0]):
        return draw_request(rng)
    caption = Request(tuple(Noun(count, *pair) for count, pair in zip(counts, pairs, strict=True)), relation)
    return parse(str(caption))  # parsing fills in the word indices


@cache
def held_out_compositions() -> frozenset[str]:
    """The compositions that no training of anything sees, from `assets/held_out.txt`."""
    lines = (ASSETS / "held_out.txt").read_text().splitlines()
    return frozenset(line for line in lines if line and not line.startswith("#"))


def is_held_out(request: Request) -> bool:
    """Whether a request combines what `assets/held_out.txt` holds out."""
    return not request.compositions.isdisjoint(held_out_compositions())


def all_compositions() -> Iterator[str]:
    """Every composition of the grammar by name: 630 pairs of kinds, 36 twos, 36 threes."""
    kinds = sorted(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
    yield from (f"{one} + {other}" for one, other in combinations(kinds, 2))
    yield from (str(Noun(count, *kind.split())) for count in (2, 3) for kind in kinds)


def draw_held_out(share: float, seed: int) -> list[str]:
    """`share` of the pairs, of the twos and of the threes, drawn by `seed`; how `assets/held_out.txt` was made."""
    rng = np.random.default_rng(seed)
    chosen = []
    for prefix in ("", "two ", "three "):
        group = [name for name in all_compositions() if (name.startswith(prefix) if prefix else "+" in name)]
        picks = rng.choice(len(group), size=round(share * len(group)), replace=False)
        chosen += [group[pick] for pick in sorted(picks)]
    return chosen
