"""Generated pictures with rich feedback: what RichHF-18K is to Stable Diffusion, in its own format.

Variants of the generator (checkpoints, guidance, steps) draw two pictures a caption, as in Pick-a-Pic; three noisy
raters judge each; records and pictures are written as RichHF-18K's TFRecords and Pick-a-Pic's parquet.
"""

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from diffusers import StableDiffusionPipeline
from PIL import Image

from reward.richhf import Record, encode_map, write_tfrecords
from tinyworld.generator import sample
from tinyworld.grammar import draw_request, is_held_out, parse
from tinyworld.judge import judge
from tinyworld.raters import consolidate, rate
from tinyworld.scenes import SIZE

RATERS = 3


@dataclass(frozen=True)
class Variant:
    """One way to draw, and how many captions of each hundred are drawn by it.

    Attributes:
        checkpoint: name of a state of the generator's training.
    """

    checkpoint: str
    share: float
    steps: int = 10
    guidance: float = 1.0
    eta: float = 1.0


VARIANTS = (
    Variant("final", 0.30),
    Variant("final", 0.20, guidance=2.0),
    Variant("final", 0.10, guidance=4.0),
    Variant("final", 0.10, steps=20),
    Variant("final", 0.10, steps=20, eta=0.0),
    Variant("middle", 0.10),
    Variant("early", 0.10, guidance=2.0),
)


@dataclass(frozen=True)
class Split:
    """A part of the data: how many captions (two pictures each), and whether they are held-out compositions."""

    name: str
    captions: int
    held_out: bool = False

    @property
    def file(self) -> str:
        """Stem for a file of this part."""
        return f"{self.name}_held_out" if self.held_out else self.name


SPLITS = (Split("train", 2400), Split("dev", 250), Split("test", 250), Split("test", 150, held_out=True))


def draw_captions(split: Split, seed: int) -> list[str]:
    """The captions of a split, drawn from the grammar; may repeat, as prompts of users do."""
    rng, captions = np.random.default_rng(seed), []
    while len(captions) < split.captions:
        if is_held_out(request := draw_request(rng)) == split.held_out:
            captions.append(str(request))
    return captions


def draw_pictures(captions: list[str], load: Callable[[str], StableDiffusionPipeline], seed: int) -> np.ndarray:
    """Two pictures of each caption: (2 * N, 64, 64, 3) uint8, those of one caption side by side."""
    pictures = np.empty((2 * len(captions), SIZE, SIZE, 3), np.uint8)
    shares = np.array([variant.share for variant in VARIANTS])
    chosen = np.random.default_rng((seed, 1)).choice(len(VARIANTS), len(captions), p=shares / shares.sum())
    for number, variant in enumerate(VARIANTS):
        rows = np.flatnonzero(chosen == number).repeat(2) * 2
        rows[1::2] += 1
        pictures[rows] = sample(
            load(variant.checkpoint),
            [captions[row // 2] for row in rows],
            seed=seed * 100 + number,
            steps=variant.steps,
            guidance=variant.guidance,
            eta=variant.eta,
        )
    return pictures


def write_all(folder: Path) -> None:
    """Rate the pictures in `folder`'s `pictures_*.npz` and write each split's `<split>.tfrecord`, its pictures in
    `pickapic/<split>.parquet`, and the test split's held-out captions in `held_out.txt`.

    Pick-a-Pic's columns `jpg_0` and `jpg_1` hold PNG here: at 64 pixels JPEG would blur what is to be judged.
    """
    (folder / "pickapic").mkdir(parents=True, exist_ok=True)
    for name in dict.fromkeys(split.name for split in SPLITS):
        parts = [np.load(folder / f"pictures_{split.file}.npz") for split in SPLITS if split.name == name]
        captions = [str(caption) for part in parts for caption in part["captions"]]
        pictures = np.concatenate([part["pictures"] for part in parts])
        uids = [hashlib.sha256(f"{name} {row}".encode()).hexdigest()[:16] for row in range(len(pictures))]
        encoded = [_png(picture) for picture in pictures]
        columns = {"image_0_uid": uids[0::2], "image_1_uid": uids[1::2], "jpg_0": encoded[0::2], "jpg_1": encoded[1::2]}
        pyarrow.parquet.write_table(pa.table(columns | {"caption": captions}), folder / "pickapic" / f"{name}.parquet")
        rows = zip(uids, pictures, np.repeat(captions, 2), strict=True)
        write_tfrecords(folder / f"{name}.tfrecord", (rated_record(name, *row) for row in rows))
    held_out = [str(parse(caption)) for caption in captions if is_held_out(parse(caption))]
    (folder / "held_out.txt").write_text("\n".join(dict.fromkeys(held_out)))


def rated_record(split: str, uid: str, picture: np.ndarray, caption: str) -> Record:
    """What three raters say of one picture, together, as RichHF-18K would hold it."""
    verdict, words = judge(picture, str(caption)), len(str(caption).split())
    said = consolidate([rate(verdict, words, uid, rater) for rater in range(RATERS)], SIZE)
    maps = {name: encode_map(heatmap) for name, heatmap in said.maps.items()}
    return Record(f"{split}/{uid}.png", said.scores, maps, said.labels)


def _png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", optimize=True)
    return file.getvalue()
