"""The exact judge of tinyworld: what is wrong with a picture, where, and which words of its caption it belies.

Training never sees it (but in an experiment that says so): it is there to show whether a learned reward was obeyed or
gamed. Pictures are (S, S, 3), masks (S, S) bool, S = 64; lengths are in pixels; words are indices into the caption's.
How it judges:

1. `segment` takes the picture apart into patches of one colour, and fits each with the ideal shapes.
2. Patches are matched with what the caption asks for; what is left over is an extra thing, if it is well formed, or
   else a blotch or debris.
3. The things found are drawn again, ideally. What the picture shows elsewise is implausible: outlines, blotches, debris
   and blended colours alike. Half a pixel and the softness of an autoencoder are forgiven.
"""

from dataclasses import dataclass
from functools import cache
from itertools import pairwise, permutations

import numpy as np
from scipy import ndimage

from tinyworld.fit import Fit, cover
from tinyworld.grammar import COLOURS, Noun, Request, parse
from tinyworld.scenes import SIZE
from tinyworld.segment import NAMES, PALETTE, Patch, Segmenter

KINDS = ("wrong colour", "wrong shape", "malformed", "missing", "extra", "relation")
"""The kinds of flaw that a verdict names."""

WEIGHTS = {"plausibility": 0.25, "alignment": 0.35, "aesthetics": 0.15}
"""Overall = these, and for the rest (0.25) the geometric mean of plausibility and alignment: both are needed."""

_FORMED = 0.7  # what is not asked for and matches its best shape less is debris, not an extra thing
_INSET = 0.95  # what lies on another thing unasked and matches its best shape less is a blotch
_EXTRA_AREA = 45
_CANDIDATES = 7
_CHARITY = 0.06  # the shape asked for is believed if it matches nearly as well as the best
_TOLERANCE, _FULL = 28.0, 80.0  # difference of colour that is forgiven, and the further one that counts fully
_NOISE = 0.3  # of a full difference: less is not marked
_SPECK = 2.6  # flaws that weigh less, in fully wrong pixels, are not seen
_SOFT = {"circle": 0.3, "square": 0.33, "triangle": 0.47, "diamond": 0.34, "cross": 0.5, "star": 0.68}
"""(1 - IoU) x radius, about how far an outline is off, in pixels, when a flawless shape is a little blurred."""
_WAVE = 0.5  # pixels by which an outline may be further off


@dataclass(frozen=True)
class Found:
    """One thing in the picture.

    Attributes:
        noun: index of the noun it answers, or None for an extra thing.
        colour, shape: what it shows; the shape asked for wherever that is nearly as good as the best.
        x, y, radius: the ideal shape's place and size, as in `scenes.Thing`.
        iou: how well that shape matches, in [0, 1]; above 0.95 when drawn well.
        mask: (S, S) bool, the pixels that show it.
    """

    noun: int | None
    colour: str
    shape: str
    x: float
    y: float
    radius: float
    iou: float
    mask: np.ndarray


@dataclass(frozen=True)
class Verdict:
    """The truth about one picture and its caption.

    Attributes:
        implausible: (S, S) bool, where things are malformed, or nothing that can be named is drawn.
        misaligned: (S, S) bool, things of a wrong colour, shape or place, and things not asked for.
        words: indices of the caption's words that the picture belies, ascending.
        plausibility: in [0, 1], falls with the malformed area relative to the things'; 0.5 where nothing is drawn.
        alignment: in [0, 1], the share of the caption's claims that hold, by degrees; 0 where nothing is drawn.
        aesthetics: in [0, 1], sizes, balance and margins of what is drawn, and its cleanliness.
        overall: in [0, 1], see `WEIGHTS`.
        satisfied: whether all that is asked for is there, nothing else, and well formed.
        flaws: the kinds of flaw found, of `KINDS`.
        things: what was found, malformed things included, blotches and debris not.
    """

    implausible: np.ndarray
    misaligned: np.ndarray
    words: tuple[int, ...]
    plausibility: float
    alignment: float
    aesthetics: float
    overall: float
    satisfied: bool
    flaws: frozenset[str]
    things: tuple[Found, ...]

    @property
    def scores(self) -> dict[str, float]:
        """The four scores by name."""
        return {name: getattr(self, name) for name in ("plausibility", "alignment", "aesthetics", "overall")}


_parse = cache(parse)


def judge(picture: np.ndarray, caption: str) -> Verdict:
    """The verdict on one picture; about 5 ms on one core.

    Args:
        picture: (64, 64, 3), uint8 or float in [0, 1], sRGB.
        caption: of tinyworld's grammar.

    Raises:
        ValueError: the picture has another size, is not finite, or the caption is not of the grammar.
    """
    if picture.shape != (SIZE, SIZE, 3):
        raise ValueError(f"picture is {picture.shape}; the judge of tinyworld sees ({SIZE}, {SIZE}, 3) only")
    scale = 1.0 if picture.dtype == np.uint8 else 255.0
    picture = picture.astype(np.float32) * scale
    if not np.isfinite(picture).all():
        raise ValueError(f"picture for {caption!r} holds values that are not finite")
    request = _parse(caption)
    slots = [index for index, noun in enumerate(request.nouns) for _ in range(noun.count)]
    patches = Segmenter(picture, frozenset(noun.shape for noun in request.nouns)).patches()
    answers, spare = _match(request, slots, patches)
    things, extra = _things(request, slots, answers, spare)
    drawn = [thing for thing in (*things, *extra) if thing]
    wrongness = _difference(picture, drawn)
    implausible, badness, debris = _malformed(wrongness, drawn)

    claims = _Claims(request, slots, things, answers, extra)
    flaws = set(claims.flaws)
    if implausible.any():
        flaws.add("malformed")
    plausibility = _plausibility(badness, debris, drawn)
    alignment = claims.score()
    aesthetics = _aesthetics(drawn, wrongness)
    overall = WEIGHTS["plausibility"] * plausibility + WEIGHTS["alignment"] * alignment
    overall += WEIGHTS["aesthetics"] * aesthetics + (1 - sum(WEIGHTS.values())) * (plausibility * alignment) ** 0.5
    return Verdict(
        implausible,
        claims.mask(),
        claims.words(),
        *(float(np.clip(score, 0, 1)) for score in (plausibility, alignment, aesthetics, overall)),
        satisfied=not flaws,
        flaws=frozenset(flaws),
        things=tuple(drawn),
    )


# What answers what ------------------------------------------------------------------------------------------------


def _shape_fit(patch: Patch, shape: str) -> Fit | None:
    return next((one for one in patch.fits if one.shape == shape), None)


def _seen_as(patch: Patch, wanted: str) -> Fit:
    """The ideal shape that a patch shows to somebody who asked for `wanted`."""
    best, asked = patch.fits[0], _shape_fit(patch, wanted)
    # A spoiled outline may come to resemble another shape; a clean one is what it is.
    charity = _CHARITY + 1.2 * max(0.0, 0.93 - best.iou)
    return asked if asked and asked.iou >= best.iou - charity else best


def _holds(relation: str, first: Fit, second: Fit, first_mask: np.ndarray) -> float:
    """How far two things stand in a relation, in [0, 1]; 0.5 where it begins to hold."""
    if relation == "inside":
        if first.radius > second.radius:
            return 0.0
        within = cover(second.shape, second.x, second.y, second.radius)[first_mask].mean()
        return float(np.clip((within - 0.4) / 0.4, 0, 1))
    right, down = second.x - first.x, second.y - first.y
    along, across = (right, down) if relation == "left of" else (down, right)
    return float(np.clip((along - abs(across) + 3) / 4, 0, 1))


def _hosts(patches: list[Patch]) -> list[set[int]]:
    """For each patch, which larger things of another colour it lies on; two may lie on each other, to go by fits."""
    ideals = [one.ideal() if one.fits else one.mask for one in patches]
    return [
        {
            k
            for k, other in enumerate(patches)
            if other.colour != one.colour
            and ideals[k].sum() > one.area
            and (ideals[k] & one.mask).sum() > 0.6 * one.area
        }
        for one in patches
    ]


def _match(request: Request, slots: list[int], patches: list[Patch]) -> tuple[list[Patch | None], list[Patch]]:
    """For each thing asked for the patch that answers it, or None; and well-formed patches that answer nothing.

    All assignments are tried: there are at most three things to find, and few patches.
    """
    patches = [one for one in patches if one.fits and one.iou >= 0.4][:_CANDIDATES]
    hosts = _hosts(patches)
    lying = [any(k not in hosts[host] for host in hosts[k]) for k in range(len(patches))]
    inset = [one.iou >= _INSET and one.behind is not None for one in patches]
    padded = [*patches, *([None] * len(slots))]
    largest = max((one.area for one in patches), default=1)

    def cost(slot: int, index: int) -> float:
        one = padded[index]
        if one is None:
            return 3.0
        noun = request.nouns[slots[slot]]
        fitting = _seen_as(one, noun.shape)
        total = (one.colour != noun.colour) + (fitting.shape != noun.shape) + 0.3 * (1 - fitting.merit)
        inner = request.relation == "inside" and slot == 0
        total += 1.2 if lying[index] and not inner and not inset[index] else 0.0  # a blotch, rather
        return total + 0.1 * (1 - one.area / largest)  # of two alike, the smaller is the extra one

    costs = [[cost(slot, index) for index in range(len(padded))] for slot in range(len(slots))]
    best, chosen = np.inf, tuple(range(len(patches), len(padded)))
    for order in permutations(range(len(padded)), len(slots)):
        if any(padded[a] is None and padded[b] is None and a > b for a, b in pairwise(order)):
            continue  # the empty answers are alike
        total = sum(costs[slot][index] for slot, index in enumerate(order))
        if total >= best:
            continue
        if request.relation:
            one, other = (padded[index] for index in order[:2])
            if one and other:
                fits = [_seen_as(p, request.nouns[k].shape) for k, p in enumerate((one, other))]
                total += 0.5 * (1 - _holds(request.relation, *fits, one.mask))
        if total < best:
            best, chosen = total, order
    answers = [padded[index] for index in chosen]
    spare = [
        one
        for k, one in enumerate(patches)
        if k not in chosen
        and one.area >= _EXTRA_AREA
        and one.iou >= _FORMED
        and (inset[k] or (not hosts[k].intersection(chosen) and not lying[k]))
    ]
    return answers, spare


def _things(request, slots, answers, spare) -> tuple[list[Found | None], list[Found]]:
    def found(noun: int | None, patch: Patch, one: Fit) -> Found:
        return Found(noun, patch.colour, one.shape, one.x, one.y, one.radius, one.iou, patch.mask)

    things = [
        found(noun, patch, _seen_as(patch, request.nouns[noun].shape)) if patch else None
        for noun, patch in zip(slots, answers, strict=True)
    ]
    return things, [found(None, patch, patch.fits[0]) for patch in spare]


# What is implausible ----------------------------------------------------------------------------------------------


def _shifted(picture: np.ndarray) -> list[np.ndarray]:
    """The picture moved by half a pixel four ways, and softened."""
    padded = np.pad(picture, ((1, 1), (1, 1), (0, 0)), mode="edge")
    four = [padded[1:-1, :-2], padded[1:-1, 2:], padded[:-2, 1:-1], padded[2:, 1:-1]]
    soft = (4 * picture + 2 * sum(four)) / 12
    return [*((picture + one) / 2 for one in four), soft]


def _difference(picture: np.ndarray, things: list[Found]) -> np.ndarray:
    """(S, S) float in [0, 1]: how far each pixel is from what the things, drawn ideally, would show."""
    ideal = np.empty_like(picture)
    ideal[:] = PALETTE[0]
    for thing in sorted(things, key=lambda one: -one.radius):
        share = cover(thing.shape, thing.x, thing.y, thing.radius)[..., None]
        ideal += share * (PALETTE[NAMES.index(thing.colour)] - ideal)
    moved = np.stack([ideal, *_shifted(ideal)])
    outside = np.maximum(np.maximum(moved.min(0) - picture, picture - moved.max(0)), 0)
    return np.clip((np.sqrt((outside**2).sum(-1)) - _TOLERANCE) / _FULL, 0, 1)


def _malformed(wrongness: np.ndarray, things: list[Found]) -> tuple[np.ndarray, list[float], float]:
    """The implausible pixels; the weight of what is wrong with each thing, and of debris, in fully wrong pixels."""
    mask = np.zeros((SIZE, SIZE), bool)
    badness, debris = [0.0] * len(things), 0.0
    spots, count = ndimage.label(wrongness > _NOISE, np.ones((3, 3)))
    weights = ndimage.sum_labels(wrongness, spots, np.arange(1, count + 1))
    extents = [
        ndimage.binary_dilation(one.mask | (cover(one.shape, one.x, one.y, one.radius) > 0.5), np.ones((3, 3)))
        for one in things
    ]
    mine: list[list[int]] = [[] for _ in things]
    for spot in range(1, count + 1):
        weight = weights[spot - 1]
        if weight < _SPECK:
            continue
        here = spots == spot
        overlaps = [int((here & extent).sum()) for extent in extents]
        mask |= here
        if overlaps and max(overlaps) > 0:
            # On a thing that lies on another, the smaller one is meant.
            owner = max(range(len(things)), key=lambda k: (overlaps[k], -things[k].radius))
            badness[owner] += weight
            mine[owner].append(spot)
        else:
            debris += weight
    mask = ndimage.binary_dilation(mask)
    for index, (thing, extent) in enumerate(zip(things, extents, strict=True)):
        # A wavy outline is off by little at any place, but all around.
        area = float(thing.mask.sum())
        off = (1 - thing.iou) * thing.radius - _SOFT[thing.shape] - _WAVE
        waves = max(0.0, off) / thing.radius * area
        unseen = off > 0 and badness[index] < 0.3 * (1 - thing.iou) * area
        if unseen or _all_over(thing, np.isin(spots, mine[index])):
            mask |= extent
        badness[index] = max(badness[index], waves)
    return mask, badness, debris


def _all_over(thing: Found, spots: np.ndarray) -> bool:
    """Whether a thing is wrong on several sides, so that a rater would mark all of it rather than a place on it."""
    rows, columns = np.nonzero(spots)
    if len(rows) < 0.06 * thing.mask.sum():
        return False
    spread = np.hypot(rows.std(), columns.std())  # 0.7 radii of the flaw for a disk, 1 radius of the thing for a wave
    return bool(spread > 0.65 * thing.radius)


def _plausibility(badness: list[float], debris: float, things: list[Found]) -> float:
    if not things:
        return 0.5 * float(np.exp(-debris / 60))  # nothing drawn: nothing to believe or not to believe in
    areas = [max(float(thing.mask.sum()), 60.0) for thing in things]
    each = [float(np.exp(-5 * bad / area)) for bad, area in zip(badness, areas, strict=True)]
    return (0.5 * float(np.mean(each)) + 0.5 * min(each)) * float(np.exp(-debris / 100))


# What is misaligned -----------------------------------------------------------------------------------------------


class _Claims:
    """What a caption says, and how far the picture bears it out; every degree in [0, 1], below 0.5 it is belied."""

    def __init__(self, request: Request, slots, things, answers, extra):
        self.request, self.slots, self.things, self.extra = request, slots, things, extra
        self.degrees = [
            self._of_thing(request.nouns[noun], patch) if patch else (0.0, 0.0, 0.0)
            for noun, patch in zip(slots, answers, strict=True)
        ]
        self.relation = None
        if request.relation:
            one, other = things[:2]
            fits = [Fit(t.shape, t.x, t.y, t.radius, t.iou) for t in (one, other) if t]
            self.relation = _holds(request.relation, *fits, one.mask) if one and other else 0.0

    @staticmethod
    def _of_thing(noun: Noun, patch: Patch) -> tuple[float, float, float]:
        """How far a thing is there, of the colour, and of the shape."""
        there = min(1.0, patch.area / 60)
        gaps = np.linalg.norm(PALETTE[1:] - patch.mean, axis=-1)
        gap = gaps[list(COLOURS).index(noun.colour)] - gaps[list(COLOURS).index(patch.colour)]
        colour = 1.0 if patch.colour == noun.colour else float(np.clip(0.49 - gap / 200, 0, 0.49))
        asked, seen = _shape_fit(patch, noun.shape), _seen_as(patch, noun.shape)
        iou = asked.iou if asked else 0.0
        recognised = float(np.clip((iou - 0.3) / 0.25, 0, 1))
        if seen.shape == noun.shape:
            return there, colour, max(recognised, 0.0)
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


# What is pleasing -------------------------------------------------------------------------------------------------


def _aesthetics(things: list[Found], wrongness: np.ndarray) -> float:
    """0.4 cleanliness + 0.25 balance + 0.2 size + 0.15 margins, scaled down where little is drawn."""
    if not things:
        return 0.1
    areas = np.array([thing.mask.sum() for thing in things], float)
    filled = areas.sum() / SIZE**2
    clean = np.exp(-3 * (wrongness**2).sum() / (areas.sum() + 30))
    centres = np.array([(thing.x, thing.y) for thing in things]) - SIZE / 2
    off = np.hypot(*(areas @ centres / areas.sum())) / (SIZE / 2)
    balance = np.exp(-((off / 0.45) ** 2))
    size = np.exp(-(np.log(filled / 0.16) ** 2) / 0.8)
    nearest = min(
        SIZE / 2 - np.abs(centre).max() - 0.95 * thing.radius for centre, thing in zip(centres, things, strict=True)
    )
    margin = np.clip((nearest + 2) / 8, 0, 1)
    return float(0.4 * clean + 0.25 * balance + 0.2 * size + 0.15 * margin)
