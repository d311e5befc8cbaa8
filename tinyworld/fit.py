"""Fits the ideal shapes of tinyworld to a patch of one colour: where would it be, how large, and how well it matches.

A coarse search over all places at half the resolution by FFT, then a few Gauss-Newton steps on place and size. Lengths
are in pixels, x runs right, y runs down; S = 64, the picture's side.
"""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from scipy import fft

from tinyworld.grammar import SHAPES
from tinyworld.scenes import SIZE

_RADII = 3.5 * 1.07 ** np.arange(34)  # 3.5 .. 32.6
_HALF = SIZE // 2
_ROWS, _COLUMNS = (axis.astype(np.float32) + 0.5 for axis in np.mgrid[:SIZE, :SIZE])
_STEPS = 4
_TRUST = 0.3  # how far a pixel of a well-drawn thing is from the ideal; weighs the pixels against the usual play
_NUDGE = 0.02
_WINDOW = 5  # how far outside the patch's box a fit looks
_CONTENDERS = 3  # so many shapes are fitted exactly, and those that are wanted
_BEHIND = 0.12  # a shape that much worse than the best of the coarse search is not
_BITTEN = 0.9  # a match that is worse may be that of a bitten thing
_OUTSIDE = 0.04  # as much of a bitten thing's patch lies outside its ideal shape, at most
_COVERED_COST = 0.3  # what a fit pays to hide behind pixels that it is not judged by
_PLAY = {"diamond": (1, 0.06), "cross": (4, 0.1), "star": (5, 0.1)}
"""How many of `Fit.play` a shape has, and how much of each is usual; twice that is the most."""


@dataclass(frozen=True)
class Fit:
    """An ideal shape laid over a patch.

    Attributes:
        iou: soft intersection over union with the patch, in [0, 1], over the pixels that count.
        hidden: share of the ideal shape that something else may hide, in [0, 1].
        outside: share of the patch that lies outside the ideal shape, in [0, 1].
        play: what a person does not hold against the shape, in radii, 0 where it is ideal. A diamond's sides may be as
            1 - p to 1 + p (nobody overlooks that of a square), a cross's arms (right, left, down, up) and a star's
            points (from the top, clockwise) longer by p each; other shapes have none.
        corners: how far the outline is from that of the ideal shape in turns, at the four corners and between them, in
            pixels: a circle that is a little square, a diamond or cross that is a little round. A person sees it
            before any other wobble of that size.
    """

    shape: str
    x: float
    y: float
    radius: float
    iou: float
    hidden: float = 0.0
    outside: float = 0.0
    play: tuple[float, ...] = ()
    corners: float = 0.0

    @property
    def merit(self) -> float:
        """How far the fit is believed, in [0, 1]: one that hides most of itself explains little."""
        return self.iou / (1 + _COVERED_COST * self.hidden)


Play = tuple[float, ...] | np.ndarray
"""See `Fit.play`; none is an ideal shape's. Of K kinds of it, (K, count), each gives a result of its own."""


def distance(shape: str, u: np.ndarray, v: np.ndarray, play: Play = ()) -> np.ndarray:
    """How far points (u, v), each (h, w), in radii from the centre, lie outside the ideal shape (negative inside).

    Exact beside an edge, too small beyond a corner; its zero is the outline of `scenes.inside_shape`, but for `play`.

    Returns:
        (h, w), or (K, h, w).
    """
    match shape:
        case "circle":
            return np.hypot(u, v) - 1
        case "square":
            return np.maximum(np.abs(u), np.abs(v)) - 0.88
        case "triangle":
            slope = 1.05 / 1.8
            return np.maximum(v - 0.8, (np.abs(u) - (v + 1) * slope) / np.hypot(1, slope))
        case "diamond":
            (lean,) = _each(play, 1)
            return (np.abs(u - lean * v) + np.abs(v - lean * u) - 1.12) / np.sqrt(2)
        case "cross":
            right, left, down, up = _each(play, 4)
            beyond = np.maximum(np.maximum(u - right, -u - left), np.maximum(v - down, -v - up)) - 1
            return np.maximum(np.minimum(np.abs(u), np.abs(v)) - 0.36, beyond)
        case "star":
            sector = np.pi / 5
            turn = np.arctan2(u, -v) + sector
            folded = np.abs(turn % (2 * sector) - sector)
            point = 1.15 + (np.array(play)[..., (turn // (2 * sector)).astype(int) % 5] if len(play) else 0.0)
            radius = np.hypot(u, v)
            across, up = 0.5 * np.sin(sector), 0.5 * np.cos(sector) - point
            outside = (radius * np.cos(folded) - point) * across - radius * np.sin(folded) * up
            return outside / np.hypot(across, up)
    raise ValueError(f"shape {shape!r} is unknown; use one of {', '.join(SHAPES)}")


def _each(play: Play, count: int) -> tuple[float, ...] | np.ndarray:
    """The `count` numbers of a play, ready to be broadcast over (h, w)."""
    if not len(play):
        return (0.0,) * count
    return play.T[..., None, None] if np.ndim(play) == 2 else play


def cover(
    shape: str, x: float, y: float, radius: float, play: Play = (), window: tuple[slice, slice] = np.s_[:, :]
) -> np.ndarray:
    """(S, S) in [0, 1], or a window of it: about the share of each pixel that the ideal shape covers; (K, S, S) of K
    plays."""
    u, v = (_COLUMNS[window] - x) / radius, (_ROWS[window] - y) / radius
    return np.clip(0.5 - radius * distance(shape, u, v, play), 0, 1)


@cache
def _templates() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Spectra of every shape at every radius around the origin, and of its square; and its area per radius squared."""
    covers = np.stack([[cover(shape, _HALF, _HALF, radius) for radius in _RADII] for shape in SHAPES])
    pooled = covers.reshape(len(SHAPES), len(_RADII), _HALF, 2, _HALF, 2).mean(axis=(3, 5))
    pooled = np.roll(pooled, (-(_HALF // 2), -(_HALF // 2)), axis=(-2, -1))
    areas = covers[:, 10].sum(axis=(-2, -1)) / _RADII[10] ** 2
    return np.conj(fft.rfft2(pooled)), np.conj(fft.rfft2(pooled**2)), areas


def _pool(values: np.ndarray) -> np.ndarray:
    return values.reshape(_HALF, 2, _HALF, 2).mean(axis=(1, 3))


_Start = tuple[float, float, float]  # x, y, radius


def _search(patch: np.ndarray, weight: np.ndarray) -> dict[str, tuple[float, _Start, _Start]]:
    """For every shape: the best score over all places and sizes, its place, and the best place if a bite is missing.

    The score is the Tanimoto coefficient; for the bite, pixels of the patch outside the shape cost five times as much
    as pixels of the shape outside the patch.
    """
    spectra, squares, areas = _templates()
    patch, weight = _pool(patch), _pool(weight)
    area, free = 4 * float(patch.sum()), 4 * float((1 - weight).sum())
    patch_hat, weight_hat = fft.rfft2(patch), fft.rfft2(weight)
    picks = []
    for index in range(len(SHAPES)):
        low, high = 0.85 * np.sqrt(area / areas[index]), 1.25 * np.sqrt((area + min(free, 2 * area)) / areas[index])
        picks += [(index, k) for k, radius in enumerate(_RADII) if low < radius < high]
    if not picks:
        return {}
    shape, size = np.array(picks).T
    inner = fft.irfft2(patch_hat * spectra[shape, size], (_HALF, _HALF))
    norms = fft.irfft2(weight_hat * squares[shape, size], (_HALF, _HALF))
    covered = squares[shape, size, 0, 0].real[:, None, None] - norms
    own, lacking = (patch**2).sum(), norms + _COVERED_COST * covered + 1e-6
    scores = inner / (own + lacking - inner)
    bitten = inner / (2.5 * own + 0.5 * lacking - 2 * inner)

    def best(values: np.ndarray, mine: np.ndarray) -> tuple[float, _Start]:
        top = mine[values[mine].max(axis=1).argmax()]
        y, x = divmod(int(values[top].argmax()), _HALF)
        return float(values[top].max()), (2.0 * x, 2.0 * y, float(_RADII[size[top]]))

    flat, flat_bitten = scores.reshape(len(picks), -1), bitten.reshape(len(picks), -1)
    groups = {name: np.flatnonzero(shape == index) for index, name in enumerate(SHAPES)}
    return {name: (*best(flat, mine), best(flat_bitten, mine)[1]) for name, mine in groups.items() if len(mine)}


def _refine(shape: str, start: _Start, patch: np.ndarray, weight: np.ndarray, steps: int = _STEPS) -> Fit:
    x, y, radius = start
    rows, columns = (np.flatnonzero((patch > 0.5).any(axis=axis)) for axis in (1, 0))
    reach = 1.15 * radius
    top, bottom = min(rows[0], y - reach) - _WINDOW, max(rows[-1], y + reach) + _WINDOW
    left, right = min(columns[0], x - reach) - _WINDOW, max(columns[-1], x + reach) + _WINDOW
    window = np.s_[max(int(top), 0) : int(bottom) + 1, max(int(left), 0) : int(right) + 1]
    patch, weight = patch[window], weight[window]
    rows, columns = _ROWS[window], _COLUMNS[window]
    count, usual = _PLAY.get(shape, (0, 1.0))
    play, cost = np.zeros(count), np.diag([0.05] * 3 + [_TRUST**2 / usual**2] * count)
    for step in range(steps):
        plays = np.vstack([play, play + _NUDGE * np.eye(count)]) if count else ()
        ideal, *nudged = cover(shape, x, y, radius, plays, window).reshape(1 + count, *patch.shape)
        right, down = np.zeros_like(ideal), np.zeros_like(ideal)
        right[:, 1:-1], down[1:-1] = (ideal[:, 2:] - ideal[:, :-2]) / 2, (ideal[2:] - ideal[:-2]) / 2
        grow = -((columns - x) * right + (rows - y) * down) / radius
        playing = [(one - ideal) / _NUDGE for one in nudged]
        moves = np.stack([-right, -down, grow, *playing]).reshape(3 + count, -1)
        residual = patch - ideal
        trust = weight if step == 0 else weight / (1 + (residual / 0.4) ** 2)
        weighted = moves * trust.ravel()
        pull = np.concatenate([np.zeros(3), play])
        change = np.linalg.solve(weighted @ moves.T + cost, weighted @ residual.ravel() - cost @ pull)
        dx, dy, dr = np.clip(change[:3], -1.5, 1.5)
        x, y, radius = x + dx, y + dy, max(radius + dr, 2.5)
        play = np.clip(play + change[3:], -2 * usual, 2 * usual)
    play = tuple(float(one) for one in play)
    ideal = cover(shape, x, y, radius, play, window)
    shared, both = (np.minimum(patch, ideal) * weight).sum(), (np.maximum(patch, ideal) * weight).sum()
    hidden = (ideal * (1 - weight)).sum() / (ideal.sum() + 1e-6)
    outside = 1 - shared / (patch.sum() + 1e-6)
    figures = (x, y, radius, shared / (both + 1e-6), hidden, outside)
    corners = _fourfold((patch - ideal) * weight, columns - x, rows - y, radius)
    return Fit(shape, *(float(figure) for figure in figures), play, corners)


def _fourfold(residual: np.ndarray, across: np.ndarray, along: np.ndarray, radius: float) -> float:
    """Amplitude in pixels of an outline's fourth harmonic: its distance from the ideal one, over 16 sectors."""
    sector = ((np.arctan2(along, across) / (2 * np.pi) + 0.5) * 16).astype(int) % 16
    outward = np.bincount(sector.ravel(), residual.ravel(), 16) / (radius * np.pi / 8)
    return float(np.abs(np.fft.rfft(outward)[4]) / 8)


def fit(patch: np.ndarray, weight: np.ndarray, wanted: frozenset[str] = frozenset()) -> list[Fit]:
    """The ideal shapes that match a patch, best first; at least one, unless the patch is tiny or fills the picture.

    Args:
        patch: (S, S) float in [0, 1], how far each pixel belongs to the patch.
        weight: (S, S) float in [0, 1], 0 where something else may hide the patch, so that nothing is known.
        wanted: shapes that are fitted even if they match badly.
    """
    found = _search(patch, weight)
    ranked = sorted(found, key=lambda shape: -found[shape][0])
    fits = []
    for rank, shape in enumerate(ranked):
        score, start, bitten = found[shape]
        if shape not in wanted and (rank >= _CONTENDERS or score < found[ranked[0]][0] - _BEHIND):
            continue
        one = _refine(shape, start, patch, weight)
        if one.iou < _BITTEN and (rank == 0 or shape in wanted):
            # Where a part is missing, the best overlap shifts towards what is left. A shape that holds all of it is
            # where the thing was.
            other = _refine(shape, bitten, patch, weight, steps=_STEPS + 2)
            if other.outside < _OUTSIDE and other.iou > one.iou - 0.12:
                one = replace(other, iou=max(one.iou, other.iou))
        fits.append(one)
    return sorted(fits, key=lambda one: -one.merit)
