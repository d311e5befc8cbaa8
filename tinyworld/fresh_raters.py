"""What fresh raters say of the rated pictures: the ceiling of every metric that the predictor is judged by.

    python -m tinyworld.fresh_raters --out DIR [--splits dev test] [--raters 64] [--pictures tinyworld/assets/pickapic]
    python -m reward.evaluate --model tinyworld/assets/rahf --data build/tinyworld/feedback --raters DIR

Each row is the mean of so many raters, none of whom made a label; `reward.fresh_raters` reads the folder. The dev split
is for the share of raters above which a word counts as misaligned. Takes about two minutes on 2 busy cores.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from rich.console import Console
from rich.progress import Progress

from reward.arguments import main_guard, parse_arguments
from reward.feedback import HEATMAPS, SCORES
from reward.fresh_raters import SHARES
from reward.records import encode_map
from tinyworld.grammar import ASSETS
from tinyworld.judge import judge
from tinyworld.rated import mapping, read_pictures, split_names
from tinyworld.raters import FEWEST, ceiling
from tinyworld.scenes import SIZE

CHUNK = 16  # pictures that a process rates at a time
FEATURES = Features(
    {
        "uid": Value("string"),
        **{name: Value("float32") for name in SCORES},  # in [0, 1], higher is better
        "keyword_labels": List(Value("int8")),  # 1 = more than half of the raters marked the word
        SHARES: List(Value("float32")),
        **{f"{name}_map": ImageFeature() for name in HEATMAPS},  # one channel, 0..255, higher is worse
    }
)


@dataclass
class FreshRatersArguments:
    out: str = field(metadata={"help": "folder to make; it must not exist, or be empty"})
    splits: list[str] = field(default_factory=lambda: ["dev", "test"], metadata={"help": "whose pictures are rated"})
    raters: int = field(default=FEWEST, metadata={"help": f"fresh raters a picture, at least {FEWEST}"})
    pictures: str = field(
        default=str(ASSETS / "pickapic"), metadata={"help": "folder with <split>.parquet, as the build draws them"}
    )

    def __post_init__(self):
        if self.raters < FEWEST:
            raise ValueError(f"raters must be at least {FEWEST}, not {self.raters}: fewer are no ceiling")
        known = split_names()
        if wrong := [name for name in self.splits if name not in known]:
            raise ValueError(f"no such splits: {', '.join(wrong)}; there are {', '.join(known)}")
        if missing := [name for name in self.splits if not (Path(self.pictures) / f"{name}.parquet").is_file()]:
            raise ValueError(f"there are no pictures {self.pictures}/{missing[0]}.parquet; give --pictures")


def rated_row(uid: str, picture: np.ndarray, caption: str, raters: int) -> dict:
    """What the mean of `raters` fresh raters says of one picture (64, 64, 3) uint8, as a row of `FEATURES`."""
    said = ceiling(judge(picture, caption), len(caption.split()), uid, SIZE, raters)
    maps = {f"{name}_map": {"bytes": encode_map(heatmap), "path": None} for name, heatmap in said.maps.items()}
    labels = {"keyword_labels": list(said.labels), SHARES: said.words.tolist()}
    return {"uid": uid, **said.scores, **labels, **maps}


def rate_splits(splits: Mapping[str, Sequence[tuple[str, np.ndarray, str]]], raters: int) -> DatasetDict:
    """Split -> rows of `FEATURES` for its pictures (uid, picture, caption), in order; the same whenever it is run."""
    rated, rate = {}, partial(rated_row, raters=raters)
    bar = Progress(console=Console(stderr=True), transient=True)
    with bar, mapping(sum(map(len, splits.values())), CHUNK) as each:
        for name, pictures in splits.items():
            rows = each(rate, *zip(*pictures, strict=True))
            rows = bar.track(rows, total=len(pictures), description=name)
            rated[name] = Dataset.from_list(list(rows), features=FEATURES)
    return DatasetDict(rated)


def main(argv: Sequence[str] | None = None) -> None:
    """The command; the folder appears when it is whole."""
    (arguments,) = parse_arguments([FreshRatersArguments], argv)
    out, folder = Path(arguments.out), Path(arguments.pictures)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} is not empty; give a folder that does not exist yet")
    pictures = {name: list(read_pictures(folder / f"{name}.parquet")) for name in arguments.splits}
    rated = rate_splits(pictures, arguments.raters)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as unfinished:
        whole = Path(unfinished) / out.name
        rated.save_to_disk(str(whole))
        if out.is_dir():
            out.rmdir()
        whole.rename(out)
    counts = ", ".join(f"{len(rows)} {name}" for name, rows in rated.items())
    print(f"{out}: {counts} pictures, each by {arguments.raters} fresh raters")


if __name__ == "__main__":
    main_guard(main)
