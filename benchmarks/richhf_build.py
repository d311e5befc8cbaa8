"""What building the data set of RichHF-18K costs: peak memory and seconds, for each kind of source of pictures.

    python benchmarks/richhf_build.py [--kinds "saved pairs, large batches"] [--quick] [--records N] [--json FILE]

Records and pictures are generated: 512x512 JPEGs of smoothed noise, about 90 KB each as Stable Diffusion's are, and
maps with disks as raters make them. The command runs in a process of its own, with the card; its peak resident memory
is the kernel's count, libraries included. One source lies on disk at a time: the full run needs 12 GB in the temporary
folder.
"""

import csv
import io
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
from PIL import Image, ImageDraw
from report import Row, flags, publish

from reward.feedback import HEATMAPS, SCORES
from reward.records import MAP_SIZE, SPLITS, Record, write_tfrecords

RECORDS = 17_760
QUICK = 400
DISTINCT = 24  # pictures and maps; more would change nothing but the time to make them
PROMPT = "a red fox in the snow, oil painting, detailed fur, soft light"
WORDS = 12
LAUNCHER = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
print(code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
"""A small process to start the command from: a child's peak begins at what its parent holds."""
KINDS = ("pairs", "saved pairs", "rows", "rows, large groups", "folder", "saved pairs, large batches")
"""`saved pairs` are arrow files, as `datasets` saves them; the other pairs and `rows` are parquet."""
ROW_GROUP = 100  # as `datasets` writes pictures
LARGE_GROUP = 5_000  # some 450 MB (pairs: 900), a shard of the hub in one piece, as other writers leave it


def make_picture(rng: np.random.Generator) -> bytes:
    coarse = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).resize((512, 512))
    noise = rng.normal(0, 14, (512, 512, 3))
    buffer = io.BytesIO()
    Image.fromarray(np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def make_map(rng: np.random.Generator) -> bytes:
    """The mean of three raters' disks, of a twentieth of the height; empty for one picture in three."""
    total = np.zeros((MAP_SIZE, MAP_SIZE))
    for _ in range(3 * int(rng.random() > 1 / 3)):
        sheet = Image.new("L", (MAP_SIZE, MAP_SIZE))
        for x, y in rng.integers(0, MAP_SIZE, (rng.integers(0, 5), 2)):
            radius = MAP_SIZE // 20
            ImageDraw.Draw(sheet).ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        total += np.asarray(sheet) / 3
    buffer = io.BytesIO()
    Image.fromarray(np.round(total).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def uid_of(split: str, index: int) -> str:
    return f"{split}-{index:08d}-0000-4000-8000"


def write_records(folder: Path, sizes: dict[str, int], rng: np.random.Generator) -> None:
    maps = [make_map(rng) for _ in range(DISTINCT)]

    def records(split: str) -> Iterator[Record]:
        for index in range(sizes[split]):
            scores = dict(zip(SCORES, rng.random(4, np.float32).tolist(), strict=True))
            drawn = {name: maps[rng.integers(DISTINCT)] for name in HEATMAPS}
            labels = rng.integers(0, 2, WORDS).tolist()
            yield Record(f"{split}/{uid_of(split, index)}.png", scores, drawn, labels)

    for split in SPLITS:
        write_tfrecords(folder / f"{split}.tfrecord", records(split))


def write_source(kind: str, folder: Path, sizes: dict[str, int], rng: np.random.Generator) -> None:
    """One source of all pictures; of Pick-a-Pic's pairs, the second picture is one that nobody rated."""
    pictures = [make_picture(rng) for _ in range(DISTINCT)]
    uids = [uid_of(split, index) for split in SPLITS for index in range(sizes[split])]
    folder.mkdir()
    if kind == "folder":
        for index, uid in enumerate(uids):
            (folder / f"{uid}.jpg").write_bytes(pictures[index % DISTINCT])
        with (folder / "prompts.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("uid", "prompt"), *((uid, PROMPT) for uid in uids)])
        return
    if kind == "saved pairs":
        parquet = folder.with_name("parquet")
        write_source("pairs", parquet, sizes, rng)
        whole = datasets.Dataset.from_parquet(str(parquet / "0.parquet"), cache_dir=str(parquet / "cache"))
        whole.save_to_disk(folder)
        shutil.rmtree(parquet)
        return
    writer, size = None, LARGE_GROUP if "large" in kind else ROW_GROUP
    for begin in range(0, len(uids), size):
        part = uids[begin : begin + size]
        images = [pictures[(begin + index) % DISTINCT] for index in range(len(part))]
        if "pairs" in kind:
            columns = {"image_0_uid": part, "image_1_uid": [f"unrated-{uid}" for uid in part]}
            columns |= {"jpg_0": images, "jpg_1": images[::-1], "caption": [PROMPT] * len(part)}
        else:
            structs = [{"bytes": data, "path": None} for data in images]
            columns = {"uid": part, "image": structs, "prompt": [PROMPT] * len(part)}
        table = pa.table(columns)
        if kind == "saved pairs, large batches":
            writer = writer or pa.ipc.new_stream(folder / "0.arrow", table.schema)
        else:
            writer = writer or pyarrow.parquet.ParquetWriter(folder / "0.parquet", table.schema)
        writer.write_table(table)
    writer.close()


def cost(argv: list[str]) -> tuple[float, float]:
    """Seconds and peak resident GiB of a command."""
    began = time.perf_counter()
    launched = subprocess.run([sys.executable, "-c", LAUNCHER, *argv], stdout=subprocess.PIPE, text=True, check=True)
    code, peak = map(int, launched.stdout.split())
    if code:
        raise RuntimeError(f"{' '.join(argv)} ended with exit code {code}")
    return time.perf_counter() - began, peak / 2**20  # Linux counts in KiB


def main() -> None:
    parser = flags(__doc__.splitlines()[0], seeds=None)
    parser.add_argument("--records", type=int, help=f"default {RECORDS}, {QUICK} with --quick")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, metavar="KIND", help="; ".join(KINDS))
    options = parser.parse_args()
    began = time.perf_counter()
    count = options.records or (QUICK if options.quick else RECORDS)
    small = max(count // 18, 1)
    sizes = {"train": count - 2 * small, "dev": small, "test": small}
    rng, rows = np.random.default_rng(0), []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_records(folder / "tfrecords", sizes, rng)
        for kind in options.kinds:
            write_source(kind, folder / kind, sizes, rng)
            argv = [sys.executable, "-m", "reward.richhf", "--tfrecords", str(folder / "tfrecords"), "--strict"]
            argv += ["--card", "--images", str(folder / kind), "--out", str(folder / "out")]
            seconds, memory = cost(argv)
            rows.append(Row(f"{kind}: peak memory, GiB", memory, n=count, goal="<= 2"))
            rows.append(Row(f"{kind}: minutes", seconds / 60, n=count, goal="<= 10"))
            shutil.rmtree(folder / kind)
            shutil.rmtree(folder / "out")
    publish(rows, began, options.json, options.quick)


if __name__ == "__main__":
    main()
