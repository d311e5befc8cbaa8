"""Rendered pictures with planted flaws, and what is wrong with each by construction: nobody rated them.

What a predictor's backbones are pretrained on (`tinyworld.pretrain`): half of the captions are belied by their
pictures, a third of the pictures have a spoiled outline. Drawn once and kept on disk.
"""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from tinyworld.grammar import KINDS, draw_request, is_held_out
from tinyworld.scenes import SIZE, Scene, applicable, lay_out, plant, render

COUNT = 40_000
MOST_WORDS = 12  # of a caption of the grammar
NO_WORD = -100
OUTLINES = ("warped", "bitten", "blotched")
_BELIED, _SPOILED = 0.5, 0.33
_CHUNK = 1000


@dataclass(frozen=True)
class Lessons:
    """N pictures and the truth about them; arrays are mapped from disk.

    Attributes:
        captions: N.
        pictures: (N, 64, 64, 3) uint8.
        implausible, misaligned: (N, 512) uint8, bits of (64, 64) by rows, as `numpy.packbits` packs them.
        words: (N, 12) int8, 1 where the caption's word is belied, 0 where it holds, -100 behind the caption.
        kinds: (N, 36) bool, which of `KINDS` is drawn.
    """

    captions: list[str]
    pictures: np.ndarray
    implausible: np.ndarray
    misaligned: np.ndarray
    words: np.ndarray
    kinds: np.ndarray

    def mask(self, name: str, rows: np.ndarray) -> np.ndarray:
        """(len(rows), 64, 64) bool: `implausible` or `misaligned` pixels."""
        bits = np.unpackbits(getattr(self, name)[rows], axis=1)
        return bits.reshape(len(rows), SIZE, SIZE).astype(bool)


def make_lessons(folder: Path, seed: int, count: int = COUNT) -> Lessons:
    """`count` lessons, from `folder` or drawn on the first call by as many processes as there are cores."""
    names = ("pictures", "implausible", "misaligned", "words", "kinds")
    if not (folder / "captions.txt").exists():
        folder.mkdir(parents=True, exist_ok=True)
        chunks = [(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]
        if len(chunks) == 1:  # drawn sooner than another process would have started
            drawn = [_draw_chunk(seed, chunks[0])]
        else:
            with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
                drawn = list(pool.map(partial(_draw_chunk, seed), chunks))
        for name in names:
            np.save(folder / f"{name}.npy", np.concatenate([chunk[name] for chunk in drawn]))
        (folder / "captions.part").write_text("\n".join(caption for chunk in drawn for caption in chunk["captions"]))
        (folder / "captions.part").replace(folder / "captions.txt")
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}
    return Lessons((folder / "captions.txt").read_text().split("\n"), **arrays)


def _draw_chunk(seed: int, rows: tuple[int, int]) -> dict[str, list | np.ndarray]:
    rng = np.random.default_rng((seed, rows[0]))
    lessons = [draw_lesson(rng) for _ in range(*rows)]
    chunk = {name: np.stack([lesson[name] for lesson in lessons]) for name in lessons[0] if name != "captions"}
    return chunk | {"captions": [lesson["captions"] for lesson in lessons]}


def draw_lesson(rng: np.random.Generator) -> dict[str, str | np.ndarray]:
    """One row of `Lessons`, of a caption that is not held out."""
    while is_held_out(request := draw_request(rng)):
        pass
    scene = lay_out(request, rng)
    picture, things, belied = None, scene.things, ()
    masks = {name: np.zeros((SIZE, SIZE), bool) for name in ("implausible", "misaligned")}
    if rng.random() < _BELIED:
        flaw = str(rng.choice([flaw for flaw in applicable(scene) if flaw not in OUTLINES]))
        flawed = plant(scene, flaw, 1.0, rng)
        picture, things, belied, masks["misaligned"] = flawed.picture, flawed.things, flawed.words, flawed.region
    if rng.random() < _SPOILED:
        flawed = plant(Scene(request, things, scene.nouns), str(rng.choice(OUTLINES)), float(rng.uniform(0, 1)), rng)
        picture, masks["implausible"] = flawed.picture, flawed.region
    words = np.full(MOST_WORDS, NO_WORD, np.int8)
    words[: len(str(request).split())] = 0
    words[list(belied)] = 1
    kinds = np.zeros(len(KINDS), bool)
    kinds[[KINDS.index(f"{thing.colour} {thing.shape}") for thing in things]] = True
    return {
        "captions": str(request),
        "pictures": render(things) if picture is None else picture,
        **{name: np.packbits(mask) for name, mask in masks.items()},
        "words": words,
        "kinds": kinds,
    }
