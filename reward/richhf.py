"""RichHF-18K's records and the pictures they speak of -> one data set for training.

    python -m reward.richhf --tfrecords DIR --images SOURCE --out DIR [--card] [--strict]

`--tfrecords` holds `train.tfrecord`, `dev.tfrecord`, `test.tfrecord` (any name that contains the split's name and
`tfrecord`); `--images` is any source that `reward.sources` knows: a copy of Pick-a-Pic v1, a data set of one picture
and prompt a row (`--uid_column`, `--image_column`, `--prompt_column`), or a folder of pictures beside a table of
prompts (`--prompts_table`). The two are joined by the uid, the stem of a record's `filename`. The result is a
`datasets.DatasetDict` folder; see `FEATURES`. `--keep_columns NAME ...` adds columns of the source, as text, for
`reward.evaluate --group_by` and others.

What cannot be joined is left out and reported, split by split, with the reason. A uid that has two different pictures
or prompts, in a folder of pictures, is reported too, and the first one taken. `--strict` makes either an error. The
data set appears when it is whole. Neither records nor pictures are ever all in memory: the records' places in their
files are, and each is read again when its picture turns up.
"""

import json
import logging
import os
import sys
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import datasets
from datasets import Dataset, DatasetDict, Features, List, Value, load_from_disk
from datasets import Image as ImageFeature
from datasets.arrow_writer import ArrowWriter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from reward import keywords
from reward.arguments import main_guard, parse_arguments
from reward.card import write_card
from reward.checks import check_new_folder
from reward.feedback import HEATMAPS, SCORES
from reward.pictures import as_map_file, as_rgb_file
from reward.records import SPLITS, Record, RecordError, find_tfrecords, parse_record
from reward.sources import Columns, Picture, PictureFolder, Source, open_source
from reward.tfrecords import CHECKSUM_WRONG, CUT_OFF, read_frames

logger = logging.getLogger(__name__)

FEATURES = Features(
    {
        "uid": Value("string"),
        "image": ImageFeature(),  # 8-bit RGB or grey
        "prompt": Value("string"),
        "tokens": List(Value("string")),
        "keyword_labels": List(Value("int8")),  # 1 = misaligned
        **{name: Value("float32") for name in SCORES},  # in [0, 1], higher is better
        **{f"{name}_map": ImageFeature() for name in HEATMAPS},  # one channel, 0..255, higher is worse
    }
)

NO_PICTURE = "no picture in the source"
NO_DATA = "uid in the source, but its picture cannot be read as bytes, nor as the path of a file inside the source"
NO_PROMPT = "prompt missing or empty"
LABEL_COUNT = "label count unlike token count"
PICTURE_BROKEN = "picture does not decode"
MAP_BROKEN = "map does not decode"
REPEATED = "uid met before"
DAMAGE = (CHECKSUM_WRONG, CUT_OFF)
"""Reasons that another copy of the file may not have; the others are in the records themselves."""

_LONGEST = 200  # characters of a detail: a field may hold anything
_NAMED = 5  # uids that a report names for each reason
_BATCH = 32  # pictures that are decoded side by side


@dataclass(frozen=True)
class Flaw:
    """Why a record gives no row; `detail` says which field and which value, where there is more to say."""

    why: str
    detail: str = ""


@dataclass
class SplitReport:
    """What became of a split's records.

    Attributes:
        read: records in its file, damaged ones included.
        joined: those in the data set.
        dropped: why -> how many.
        ambiguous: why a uid is -> how many; they are not dropped for it.
        examples: why -> up to five uids (or `record <number>`, where the uid could not be read).
        details: why -> the detail of the first one.
    """

    read: int = 0
    joined: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    ambiguous: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    details: dict[str, str] = field(default_factory=dict)

    def drop(self, flaw: Flaw, uid: str) -> None:
        self._count(self.dropped, flaw.why, uid)
        if detail := " ".join(flaw.detail.split()):
            self.details.setdefault(flaw.why, detail if len(detail) <= _LONGEST else f"{detail[:_LONGEST]} ...")

    def note(self, why: str, uid: str) -> None:
        """Count a uid as ambiguous."""
        self._count(self.ambiguous, why, uid)

    def _count(self, counter: Counter[str], why: str, uid: str) -> None:
        counter[why] += 1
        if len(named := self.examples.setdefault(why, [])) < _NAMED:
            named.append(uid)

    def __str__(self) -> str:
        lines = [f"{self.read} records read, {self.joined} joined, {self.dropped.total()} dropped"]
        for why, count in [*self.dropped.most_common(), *self.ambiguous.most_common()]:
            more = ", ..." if count > len(self.examples[why]) else ""
            line = f"  {count}: {why} ({', '.join(self.examples[why])}{more})"
            if why in DAMAGE:
                line += "; fetch the file again"
            elif why in self.details:
                line += f"; {'the first: ' if count > 1 else ''}{self.details[why]}"
            lines.append(line)
        return "\n".join(lines)


@dataclass(frozen=True)
class Place:
    """Where a record's message is: so many bytes of the split's file."""

    split: str
    file: Path
    offset: int
    length: int

    def read(self) -> Record:
        with self.file.open("rb") as file:
            file.seek(self.offset)
            return parse_record(file.read(self.length))


def index_records(files: Mapping[str, Path], reports: Mapping[str, SplitReport], bar: Progress) -> dict[str, Place]:
    """uid -> place of every sound record; the others are dropped in their split's report.

    Raises:
        ValueError: a file is damaged where its records' lengths stand, or holds no sound record at all.
    """
    places: dict[str, Place] = {}
    for split, path in files.items():
        report, task = reports[split], bar.add_task(f"records, {split}", total=None)
        before = len(places)
        for frame in read_frames(path):
            report.read += 1
            bar.advance(task)
            if frame.problem is not None:
                report.drop(Flaw(frame.problem), f"record {frame.index}")
                continue
            try:
                uid = parse_record(frame.data).uid
            except RecordError as error:
                report.drop(Flaw(error.problem, error.detail), error.uid or f"record {frame.index}")
                continue
            if uid in places:
                report.drop(Flaw(REPEATED), uid)
            else:
                places[uid] = Place(split, path, frame.offset, len(frame.data))
        if len(places) == before:
            damaged = not report.read or any(why in DAMAGE for why in report.dropped)
            remedy = "fetch it again" if damaged else "have it written anew, without these flaws"
            raise ValueError(f"{path} holds no record that can be used ({report}); {remedy}")
    return places


def make_row(picture: Picture, record: Record) -> dict | Flaw:
    """A picture, its prompt and its rating -> a row of `FEATURES` and of what is kept, or why there is none."""
    tokens = keywords.tokenize(picture.prompt or "")
    if not tokens:
        return Flaw(NO_PROMPT)
    if len(tokens) != len(record.labels):
        return Flaw(LABEL_COUNT, f"{len(record.labels)} labels, {len(tokens)} tokens in {picture.prompt!r}")
    if picture.data is None:
        return Flaw(NO_DATA)
    try:
        image = as_rgb_file(picture.data)
    except ValueError as error:
        return Flaw(PICTURE_BROKEN, str(error))
    maps = {}
    for name in HEATMAPS:
        try:
            maps[f"{name}_map"] = as_map_file(record.maps[name])
        except ValueError as error:
            return Flaw(MAP_BROKEN, f"{name}: {error}")
    return {
        "uid": picture.uid,
        "image": {"bytes": image, "path": None},
        "prompt": picture.prompt,
        "tokens": tokens,
        "keyword_labels": list(record.labels),
        **record.scores,
        **{name: {"bytes": data, "path": None} for name, data in maps.items()},
        **picture.kept,
    }


def join(
    places: dict[str, Place], source: Source, reports: Mapping[str, SplitReport], bar: Progress
) -> Iterator[tuple[str, dict]]:
    """The split and row of every record whose picture the source has, in the source's order.

    `places` is emptied on the way; at the end, what is left in it is dropped in the reports. A picture that stands in
    the source more than once gets as many tries: one damaged copy loses no record.
    """
    task = bar.add_task("pictures", total=len(places))
    failed: dict[str, Flaw] = {}

    def attempt(picture: Picture) -> dict | Flaw:
        place = places.get(picture.uid)
        return Flaw(REPEATED) if place is None else make_row(picture, place.read())

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes outside the interpreter's lock
        pictures = source.pictures(places)
        while places and (batch := list(islice(pictures, _BATCH))):
            for picture, row in zip(batch, pool.map(attempt, batch), strict=True):
                if picture.uid not in places:
                    continue
                if isinstance(row, Flaw):
                    failed[picture.uid] = row
                    continue
                split = places.pop(picture.uid).split
                reports[split].joined += 1
                bar.advance(task)
                yield split, row
    for uid, place in places.items():
        reports[place.split].drop(failed.get(uid, Flaw(NO_PICTURE)), uid)


def note_ambiguous(places: Mapping[str, Place], source: Source, reports: Mapping[str, SplitReport]) -> None:
    """Note the uids that stand for different pictures, or prompts, in a folder of pictures.

    Other sources are not searched: that one of Pick-a-Pic's pictures stands in several pairs is the rule.
    """
    if isinstance(source, PictureFolder):
        for why, uids in source.ambiguous(places).items():
            for uid in uids:
                reports[places[uid].split].note(why, uid)


class SplitWriters:
    """Writes rows of `features`, as they come, split by split into a folder in the form of `DatasetDict.save_to_disk`.

    `save_to_disk` itself would copy a data set that is already on disk, and while it does, the whole of it counts as
    the process's memory. So the library saves data sets without a row here, and their files are replaced by streams.
    """

    def __init__(self, folder: Path, features: Features):
        empty = Dataset.from_dict({name: [] for name in features}, features=features)
        shown = not datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        try:
            DatasetDict(dict.fromkeys(SPLITS, empty)).save_to_disk(str(folder), num_shards=dict.fromkeys(SPLITS, 1))
        finally:
            if shown:
                datasets.enable_progress_bars()
        self.writers = {}
        for split in SPLITS:
            state_file = folder / split / "state.json"
            state = json.loads(state_file.read_text())
            # Each split has its own rows, and must have its own fingerprint: it is the key of `datasets`' caches.
            state_file.write_text(json.dumps(state | {"_fingerprint": uuid.uuid4().hex[:16]}, indent=2))
            (data,) = (folder / split / entry["filename"] for entry in state["_data_files"])
            data.unlink()
            self.writers[split] = ArrowWriter(features=features, path=str(data), writer_batch_size=_BATCH)

    def __enter__(self) -> "SplitWriters":
        return self

    def __exit__(self, *_) -> None:
        for writer in self.writers.values():
            writer.finalize()

    def write(self, split: str, row: dict) -> None:
        self.writers[split].write(row)


def build(
    tfrecords: str | Path,
    source: Source,
    folder: Path,
    strict: bool = False,
    console: Console | None = None,
    kept: Sequence[str] = (),
) -> dict[str, SplitReport]:
    """Join records with their pictures and write the data set into `folder`, which must not exist.

    Args:
        tfrecords: folder of the three TFRecord files.
        strict: a record that cannot be joined is an error, and so is an ambiguous uid.
        console: where the progress bar goes, if it is a terminal; stderr if None.
        kept: columns that the source's pictures bring along (`Picture.kept`); they follow those of `FEATURES`.

    Returns:
        split -> what became of its records.

    Raises:
        ValueError: there are no TFRecords, a file is damaged, or no record at all could be joined; or `strict`.
    """
    reports = {split: SplitReport() for split in SPLITS}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = console or Console(stderr=True)
    with ExitStack() as stack:
        bar = stack.enter_context(Progress(*columns, console=console, transient=True, disable=not console.is_terminal))
        places = index_records(find_tfrecords(tfrecords), reports, bar)
        note_ambiguous(places, source, reports)
        if strict:  # a source may take hours to read
            _refuse_flaws(reports)
        features = Features({**FEATURES, **dict.fromkeys(kept, Value("string"))})
        writers = stack.enter_context(SplitWriters(folder, features))
        for split, row in join(places, source, reports, bar):
            writers.write(split, row)
    if not any(report.joined for report in reports.values()):
        raise ValueError(f"no record could be joined with a picture of {source}: {report_text(reports)}")
    if strict:
        _refuse_flaws(reports)
    return reports


def report_text(reports: Mapping[str, SplitReport]) -> str:
    return "\n".join(f"{split}: {report}" for split, report in reports.items())


def _refuse_flaws(reports: Mapping[str, SplitReport]) -> None:
    if any(report.dropped for report in reports.values()):
        raise ValueError(f"--strict, and records had to be dropped: {report_text(reports)}")
    if any(report.ambiguous for report in reports.values()):
        raise ValueError(f"--strict, and uids stand for more than one picture or prompt: {report_text(reports)}")


@contextmanager
def _parents_of(place: Path) -> Iterator[None]:
    """Make the folders that `place` is to lie in; those that were not there are gone again if the work in it fails."""
    new = [folder for folder in place.absolute().parents if not folder.exists()]  # the innermost first
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in new:
            with suppress(OSError):  # something else lies in it by now
                folder.rmdir()
        raise


@dataclass
class RichHFArguments:
    tfrecords: str = field(metadata={"help": "folder of RichHF-18K's three TFRecord files"})
    images: str = field(
        metadata={
            "help": "pictures and prompts: a copy of Pick-a-Pic v1, a data set of one picture a row (parquet, or saved"
            " by datasets), or a folder of pictures named by uid"
        }
    )
    out: str = field(metadata={"help": "folder to make; it must not exist, or be empty"})
    uid_column: str = field(default="uid", metadata={"help": "of a one-picture-a-row source, or of the prompts' table"})
    image_column: str = field(default="image", metadata={"help": "of a one-picture-a-row source"})
    prompt_column: str = field(
        default="prompt", metadata={"help": "of a one-picture-a-row source, or of the prompts' table"}
    )
    prompts_table: str | None = field(
        default=None,
        metadata={"help": "CSV or JSONL of a picture folder's prompts; default: the only such file in it"},
    )
    keep_columns: list[str] = field(
        default_factory=list,
        metadata={
            "help": "columns of the source, or of the prompts' table, that go into the data set as text, such as the"
            " model that made a picture; of Pick-a-Pic's pairs, `model` takes model_0 or model_1"
        },
    )
    strict: bool = field(
        default=False, metadata={"help": "a record that cannot be joined, or an ambiguous one, is an error"}
    )
    card: bool = field(default=False, metadata={"help": "write a data card, README.md with two pictures, into --out"})
    seed: int = field(default=0, metadata={"help": "of the card's twelve random examples"})

    def __post_init__(self):
        if own := [name for name in self.keep_columns if name in FEATURES]:
            raise ValueError(
                f"keep_columns names {', '.join(own)}, but the data set has columns of its own of that name"
                f" ({', '.join(FEATURES)}); leave it out, or rename it in the source"
            )
        if twice := [name for name, count in Counter(self.keep_columns).items() if count > 1]:
            raise ValueError(f"keep_columns names {', '.join(twice)} more than once; name each column once")


def main(argv: Sequence[str] | None = None) -> None:
    """The command; writes the data set and prints what became of the records."""
    (arguments,) = parse_arguments([RichHFArguments], argv)
    out = check_new_folder(arguments.out, "--out")
    kept = tuple(arguments.keep_columns)
    columns = Columns(arguments.uid_column, arguments.image_column, arguments.prompt_column, kept)
    source = open_source(arguments.images, columns, arguments.prompts_table)
    print(f"source: {source}", file=sys.stderr)
    with _parents_of(out), tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as unfinished:
        folder = Path(unfinished) / out.name
        reports = build(arguments.tfrecords, source, folder, arguments.strict, kept=kept)
        if arguments.card:
            write_card(load_from_disk(str(folder)), folder, report_text(reports), arguments.seed)
        if out.is_dir():
            out.rmdir()
        folder.rename(out)
    print(report_text(reports))
    for split in (split for split, report in reports.items() if not report.joined):
        logger.warning("split %s is empty: none of its records could be joined; see the report for why", split)
    print(f"{arguments.out}: " + ", ".join(f"{report.joined} {split}" for split, report in reports.items()))


if __name__ == "__main__":
    main_guard(main, tidy=True)
