"""Takes a picture of tinyworld apart: patches of one colour, and the ideal shape that each is nearest to.

Pictures are (S, S, 3) float32 sRGB in 0..255 here, masks (S, S) bool, S = 64; lengths are in pixels.
"""

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from tinyworld.fit import Fit, cover, fit
from tinyworld.grammar import COLOURS, GROUND

NAMES = (None, *COLOURS)
"""Label -> colour; 0 is the ground."""

PALETTE = np.array([GROUND, *COLOURS.values()], np.float32)  # (7, 3)
_PURE = 45.0  # the palette's colours are 113 apart or more; the mix of red and ground comes within 57 of pink
_CRUMB = 3  # smaller patches are noise, pixels
_PATCH = 26  # smaller patches may be part of a broken thing, but are no thing; the smallest true one has 83
_MOST = 0.5  # a patch that fills more of the picture is no thing
_PATCHES = 9  # looked at in one picture, largest first
_BROKEN = 0.8  # a patch that matches no shape better may be part of a thing, or two
_SOUND = 0.9  # a patch that matches better is one whole thing
_HIDDEN = 0.25  # a fit that hides more of itself may be part of a larger one
_EIGHT = np.ones((3, 3), bool)


@dataclass(frozen=True)
class Patch:
    """Connected pixels of one colour, or several such pieces that make one thing.

    Attributes:
        colour: name.
        mask: (S, S) bool.
        behind: the colour all around it, or None for the ground or a mixture.
        mean: (3,) mean colour, sRGB 0..255, away from the patch's rim.
        fits: ideal shapes that match, best first.
    """

    colour: str
    mask: np.ndarray
    behind: str | None
    mean: np.ndarray
    fits: tuple[Fit, ...]

    @property
    def area(self) -> int:
        return int(self.mask.sum())

    @property
    def iou(self) -> float:
        """How well the best shape matches; 0 where none does."""
        return self.fits[0].iou if self.fits else 0.0

    @property
    def merit(self) -> float:
        """How far the best shape is believed; 0 where none matches."""
        return self.fits[0].merit if self.fits else 0.0

    def ideal(self) -> np.ndarray:
        """(S, S) bool: the best shape's pixels."""
        one = self.fits[0]
        return cover(one.shape, one.x, one.y, one.radius, one.play) > 0.5


def label(picture: np.ndarray) -> np.ndarray:
    """(S, S) int: the index in `PALETTE` of each pixel's colour.

    A mixed pixel takes the nearest colour that is found pure within two pixels: the rim of a red shape holds colours
    nearer to pink than to red.
    """
    flat = picture.reshape(-1, 3)
    squared = (flat**2).sum(1)[:, None] - 2 * flat @ PALETTE.T + (PALETTE**2).sum(1)
    squared = squared.reshape(*picture.shape[:2], -1)  # (S, S, 7)
    labels = squared.argmin(axis=-1)
    pure = squared.min(axis=-1) < _PURE**2
    seen = (labels[..., None] == np.arange(len(PALETTE))) & pure[..., None]
    near = ndimage.maximum_filter(seen.astype(np.uint8), size=(5, 5, 1), mode="constant") > 0
    among = np.where(near, squared, np.inf)
    mixed = ~pure & near.any(axis=-1)
    return np.where(mixed, among.argmin(axis=-1), labels)


class Segmenter:
    """One picture's labels, and patches fitted on demand."""

    def __init__(self, picture: np.ndarray, wanted: frozenset[str]):
        self.picture, self.wanted = picture, wanted
        self.labels = label(picture)

    def patch(self, colour: int, mask: np.ndarray) -> Patch:
        """Fit the ideal shapes to a mask of one colour."""
        ring = ndimage.binary_dilation(mask, _EIGHT, iterations=2) & ~mask
        around = np.bincount(self.labels[ring], minlength=len(PALETTE))
        around[colour] = 0
        behind = int(around.argmax()) if around.max() > 0.6 * around.sum() else 0
        known = (self.labels == colour) | (self.labels == behind) | (self.labels == 0)
        # How far a rim's pixel belongs to the patch is read off its mixed colour.
        step = PALETTE[colour] - PALETTE[behind]
        share = np.clip((self.picture - PALETTE[behind]) @ step / (step @ step), 0, 1)
        core = ndimage.binary_erosion(mask)
        belongs = np.where(core, 1.0, np.where(ndimage.binary_dilation(mask), share, 0.0))
        fits = fit(belongs.astype(np.float32), known.astype(np.float32), self.wanted)
        mean = self.picture[core if core.sum() >= 8 else mask].mean(axis=0)
        enclosed = around.max() > 0.85 * around.sum()
        return Patch(NAMES[colour], mask, NAMES[behind] if enclosed else None, mean, tuple(fits))

    def patches(self) -> list[Patch]:
        """Every patch large enough to be a thing or a flaw, largest first."""
        found: list[Patch] = []
        for colour in range(1, len(PALETTE)):
            pieces, count = ndimage.label(self.labels == colour)
            if not count:
                continue
            areas = np.bincount(pieces.ravel())[1:]
            masks = [pieces == 1 + k for k in np.argsort(-areas)[:_PATCHES] if areas[k] >= _CRUMB]
            masks = [mask for mask in masks if mask.sum() <= _MOST * mask.size]
            found += self._assemble(colour, masks)
        return sorted(found, key=lambda one: -one.area)[:_PATCHES]

    def _assemble(self, colour: int, masks: list[np.ndarray]) -> list[Patch]:
        """Patches of one colour: broken ones put together, ones grown together taken apart."""
        whole = [self.patch(colour, mask) for mask in masks if mask.sum() >= _PATCH]
        crumbs = [mask for mask in masks if mask.sum() < _PATCH]
        whole = [part for one in whole for part in self._split(colour, one)]
        broken = [one for one in whole if one.iou < _SOUND or (one.fits and one.fits[0].hidden >= _HIDDEN)]
        if crumbs or (broken and len(whole) > 1):
            return self._join(colour, whole, crumbs)
        return whole

    def _split(self, colour: int, patch: Patch) -> list[Patch]:
        """Two things that touch, apart, if each then matches a shape better than both did together."""
        if patch.iou >= _BROKEN:
            return [patch]
        for depth in (1, 2, 3, 4):
            cores, count = ndimage.label(ndimage.binary_erosion(patch.mask, iterations=depth))
            keep = [k for k in range(1, count + 1) if (cores == k).sum() >= _PATCH]
            if len(keep) < 2:
                continue
            apart = np.stack([ndimage.distance_transform_edt(cores != k) for k in keep])
            owner = apart.argmin(axis=0)
            parts = [self.patch(colour, patch.mask & (owner == index)) for index in range(len(keep))]
            if min(part.iou for part in parts) > max(patch.iou + 0.05, 0.7):
                return parts
        return [patch]

    def _join(self, colour: int, whole: list[Patch], crumbs: list[np.ndarray]) -> list[Patch]:
        """Pieces that match one shape together much better than alone, put together, nearest first."""
        parts = [(one.mask, one) for one in whole] + [(mask, None) for mask in crumbs]
        joined: list[Patch] = []
        while parts:
            mask, patch = parts.pop(0)
            # Everything within reach at once first: a blotch may cut a star into five points, alike in size.
            for count in (len(parts), *range(1, len(parts))):
                distances = [float(ndimage.distance_transform_edt(~mask)[other].min()) for other, _ in parts]
                order = [k for k in np.argsort(distances) if distances[k] <= 12][:count]
                if not order:
                    break
                union = mask | np.any([parts[k][0] for k in order], axis=0)
                if union.sum() < _PATCH:
                    continue
                both = self.patch(colour, union)
                pieces = [(mask, patch), *(parts[k] for k in order)]
                alone = sum(one.merit * piece.sum() for piece, one in pieces if one) / union.sum()
                if both.merit >= 0.5 and both.merit > alone + 0.03:
                    mask, patch = union, both
                    parts = [part for k, part in enumerate(parts) if k not in order]
                    break
            if patch is not None:
                joined.append(patch)
        return joined
