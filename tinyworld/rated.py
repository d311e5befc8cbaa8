"""Generated pictures with rich feedback: what RichHF-18K is to Stable Diffusion, in its own format.

Variants of the generator (checkpoints, guidance, steps, fine-tuned policies) draw two pictures a caption, as in
Pick-a-Pic; three noisy raters judge each; records and pictures are written as RichHF-18K's TFRecords and Pick-a-Pic's
parquet.
"""

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from PIL import Image

from reward.records import Record, encode_map, write_tfrecords
from tinyworld.grammar import draw_request, is_held_out, parse
from tinyworld.judge import Verdict, judge
from tinyworld.raters import consolidate, rate
from tinyworld.scenes import SIZE
from tinyworld.verdicts import read_verdicts, write_verdicts

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

RATERS = 3
ALONE = 64
"""So few pictures are judged and rated sooner than other processes would start."""


@dataclass(frozen=True)
class Variant:
    """One way to draw, and how many captions of each hundred are drawn by it.

    Attributes:
        checkpoint: name of a state of the generator's training.
        policy: name of a LoRA on it that was fine-tuned by a first predictor, if any.
    """

    checkpoint: str
    share: float
    steps: int = 10
    guidance: float = 1.0
    eta: float = 1.0
    policy: str | None = None


VARIANTS = (
    Variant("final", 0.30),
    Variant("final", 0.20, guidance=2.0),
    Variant("final", 0.10, guidance=4.0),
    Variant("final", 0.10, steps=20),
    Variant("final", 0.10, steps=20, eta=0.0),
    Variant("middle", 0.10),
    Variant("early", 0.10, guidance=2.0),
)

POLICIES = (
    Variant("final", 0.4, policy="many_small"),
    Variant("final", 0.3, policy="few_large_0"),
    Variant("final", 0.3, policy="few_large_1"),
)
"""What fine-tuning by a predictor that knew only `VARIANTS` makes of the generator: pictures that this predictor
likes too well. Without ratings of them the next policy finds the same blind spots."""


@dataclass(frozen=True)
class Split:
    """A part of the data: how many captions (two pictures each), whether of held-out compositions, drawn by whom."""

    name: str
    captions: int
    held_out: bool = False
    variants: tuple[Variant, ...] = VARIANTS


SPLITS = (
    *(Split("train", 5000), Split("dev", 250), Split("test", 250), Split("test", 150, held_out=True)),
    Split("train", 2000, variants=POLICIES),
)

MORE = (Split("train", 2000, variants=tuple(one for one in VARIANTS if one.checkpoint == "final")),) * 7
"""Captions beside `SPLITS`, for a predictor that learns from three times as many pictures; drawn part by part. The
repository keeps the final generator's weights only, so the others and the policies draw none of them.
"""


def draw_captions(split: Split, seed: int) -> list[str]:
    """The captions of a split, drawn from the grammar; may repeat, as prompts of users do."""
    rng, captions = np.random.default_rng(seed), []
    while len(captions) < split.captions:
        if is_held_out(request := draw_request(rng)) == split.held_out:
            captions.append(str(request))
    return captions


def draw_pictures(
    captions: list[str],
    variants: Sequence[Variant],
    load: Callable[[Variant], "StableDiffusionPipeline"],
    seed: int,
) -> np.ndarray:
    """Two pictures of each caption: (2 * N, 64, 64, 3) uint8, those of one caption side by side."""
    from tinyworld.generator import sample  # takes seconds, and each process that judges or rates would wait for it

    pictures = np.empty((2 * len(captions), SIZE, SIZE, 3), np.uint8)
    shares = np.array([variant.share for variant in variants])
    chosen = np.random.default_rng((seed, 1)).choice(len(variants), len(captions), p=shares / shares.sum())
    for number, variant in enumerate(variants):
        rows = np.flatnonzero(chosen == number).repeat(2) * 2
        rows[1::2] += 1
        pictures[rows] = sample(
            load(variant),
            [captions[row // 2] for row in rows],
            seed=seed * 100 + number,
            steps=variant.steps,
            guidance=variant.guidance,
            eta=variant.eta,
        )
    return pictures


def write_pictures(split: str, captions: list[str], pictures: np.ndarray, folder: Path) -> None:
    """Write `<split>.parquet` in Pick-a-Pic's columns: pictures 2 * i and 2 * i + 1 are of caption i.

    `jpg_0` and `jpg_1` hold lossless WebP here, colours rounded to steps of 8 so that the files are small: at 64 pixels
    JPEG would blur what is to be judged.
    """
    uids = [hashlib.sha256(f"{split} {row}".encode()).hexdigest()[:16] for row in range(len(pictures))]
    encoded = [_webp(picture // 8 * 8 + 4) for picture in pictures]
    columns = {"image_0_uid": uids[0::2], "image_1_uid": uids[1::2], "jpg_0": encoded[0::2], "jpg_1": encoded[1::2]}
    folder.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.table(columns | {"caption": captions}), folder / f"{split}.parquet")


def read_pictures(file: Path) -> Iterator[tuple[str, np.ndarray, str]]:
    """uid, (64, 64, 3) uint8 picture and caption of every picture that `write_pictures` wrote."""
    for row in pyarrow.parquet.read_table(file).to_pylist():
        for side in "01":
            picture = np.array(Image.open(io.BytesIO(row[f"jpg_{side}"])).convert("RGB"))
            yield row[f"image_{side}_uid"], picture, row["caption"]


def judge_all(pickapic: Path, folder: Path) -> None:
    """Keep the judge's verdicts on the pictures of every split: `folder`/<split>.parquet, for `rate_all`."""
    with mapping(_count(pickapic), chunk=64) as each:
        for name in split_names():
            _, pictures, captions = zip(*read_pictures(pickapic / f"{name}.parquet"), strict=True)
            write_verdicts(folder / f"{name}.parquet", pictures, captions, list(each(judge, pictures, captions)))


def rate_all(pickapic: Path, folder: Path, verdicts: Path | None = None) -> None:
    """Rate the pictures of every split: `<split>.tfrecord` in RichHF-18K's form, and the held-out captions.

    Args:
        verdicts: what `judge_all` wrote of the same pictures, or of the first of each split; the others are judged now.

    Raises:
        ValueError: `verdicts` are of other pictures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held_out: dict[str, None] = {}
    with mapping(_count(pickapic), chunk=64) as each:
        for name in split_names():
            uids, pictures, captions = zip(*read_pictures(pickapic / f"{name}.parquet"), strict=True)
            known = [] if verdicts is None else list(read_verdicts(verdicts / f"{name}.parquet", pictures, captions))
            judged = each(judge, pictures[len(known) :], captions[len(known) :])
            columns = [name] * len(uids), uids, captions, chain(known, judged)
            write_tfrecords(folder / f"{name}.tfrecord", each(rated_record, *columns))
            held_out |= dict.fromkeys(caption for caption in captions if is_held_out(parse(caption)))
    (folder / "held_out.txt").write_text("\n".join(held_out) + "\n")


def split_names() -> list[str]:
    """In the order of `SPLITS`, each once."""
    return list(dict.fromkeys(split.name for split in SPLITS))


@contextmanager
def mapping(count: int, chunk: int) -> Iterator[Callable[..., Iterator]]:
    """A `map` for `count` pictures in all: in this process, or, of more than `ALONE`, in others, `chunk` at a time."""
    if count <= ALONE:
        yield map
        return
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:  # torch's threads do not survive a fork
        yield partial(pool.map, chunksize=chunk)


def _count(pickapic: Path) -> int:
    """Pictures in all splits, two a row."""
    return 2 * sum(pyarrow.parquet.read_metadata(pickapic / f"{name}.parquet").num_rows for name in split_names())


def rated_record(split: str, uid: str, caption: str, verdict: Verdict) -> Record:
    """What three raters say of one picture, together, as RichHF-18K would hold it."""
    words = len(caption.split())
    said = consolidate([rate(verdict, words, uid, rater) for rater in range(RATERS)], SIZE)
    maps = {name: encode_map(heatmap) for name, heatmap in said.maps.items()}
    return Record(f"{split}/{uid}.png", said.scores, maps, said.labels)


def _webp(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "WEBP", lossless=True, quality=100, method=6)
    return file.getvalue()
