"""RichHF-18K's records and the pictures they speak of -> one data set for training.

    python -m reward.richhf --tfrecords DIR --images DIR --out DIR

`--tfrecords` holds `train.tfrecord`, `dev.tfrecord`, `test.tfrecord` (any name that contains the split's name and
`tfrecord`); `--images` a local copy of Pick-a-Pic v1 as parquet files with the columns `image_0_uid`, `image_1_uid`,
`jpg_0`, `jpg_1` (bytes) and `caption`. The two are joined by the uid, the stem of a record's `filename`. The result
is a `datasets.DatasetDict` folder; see `FEATURES`.

A record is a `tf.train.Example` in TFRecord framing (length, its masked CRC32C, data, their masked CRC32C); both are
read and written here without TensorFlow: framing and checksums by TensorBoard, messages by protobuf.
"""

import io
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet
from datasets import Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from datasets.arrow_writer import ArrowWriter
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from PIL import Image, UnidentifiedImageError
from tensorboard.compat.tensorflow_stub.errors import DataLossError, OutOfRangeError
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New
from tensorboard.summary.writer.record_writer import RecordWriter

from reward import keywords
from reward.arguments import main_guard, parse_arguments
from reward.feedback import HEATMAPS, SCORES

SPLITS = ("train", "dev", "test")
MAP_SIZE = 512
"""Side of a map in a record, whatever the picture's shape: it is stretched to it."""

_SCORE_FIELDS = {
    "plausibility": "artifact_score",
    "alignment": "misalignment_score",
    "aesthetics": "aesthetics_score",
    "overall": "overall_score",
}
_MAP_FIELDS = {"implausibility": "artifact_map", "misalignment": "misalignment_map"}
_COLUMNS = ("image_0_uid", "image_1_uid", "jpg_0", "jpg_1", "caption")

FEATURES = Features(
    {
        "uid": Value("string"),
        "image": ImageFeature(),
        "prompt": Value("string"),
        "tokens": List(Value("string")),
        "keyword_labels": List(Value("int8")),  # 1 = misaligned
        **{name: Value("float32") for name in SCORES},  # in [0, 1], higher is better
        **{f"{name}_map": ImageFeature() for name in HEATMAPS},  # one channel, 0..255, higher is worse
    }
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """One rated picture, as RichHF-18K's files hold it: without the picture, and without its prompt.

    Attributes:
        filename: such as `train/<uid>.png`.
        scores: name of `SCORES` -> value in [0, 1], higher is better.
        maps: name of `HEATMAPS` -> encoded one-channel 512x512 image, 0..255, higher is worse.
        labels: one a prompt token, **1 = misaligned** (in the file it is the other way round).
    """

    filename: str
    scores: Mapping[str, float]
    maps: Mapping[str, bytes]
    labels: Sequence[int]

    @property
    def uid(self) -> str:
        return Path(self.filename).stem


def encode_map(heatmap: np.ndarray) -> bytes:
    """A heatmap (h, w) in [0, 1] -> the bytes of a record's map: one-channel 512x512 PNG, 0..255.

    Where 512 is a multiple of its sides every pixel becomes a block, so that shrinking the map by area gives the
    heatmap back; other sizes are interpolated.
    """
    heatmap = np.asarray(heatmap)
    if heatmap.ndim != 2 or heatmap.min() < 0 or heatmap.max() > 1:
        raise ValueError(f"a heatmap must be (h, w) with values in [0, 1], not {heatmap.shape} {heatmap.dtype}")
    image = Image.fromarray(np.round(heatmap * 255).astype(np.uint8))
    if image.size != (MAP_SIZE, MAP_SIZE):
        blocks = MAP_SIZE % image.width == 0 and MAP_SIZE % image.height == 0
        kind = Image.Resampling.NEAREST if blocks else Image.Resampling.BILINEAR
        image = image.resize((MAP_SIZE, MAP_SIZE), kind)
    return _png(image)


def write_tfrecords(path: str | Path, records: Iterable[Record]) -> int:
    """Write records to one file in RichHF-18K's exact form; the file appears when it is whole. Returns their number."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with unfinished.open("wb") as file:
            writer = RecordWriter(file)
            for record in records:
                writer.write(_to_example(record))
                count += 1
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return count


def read_tfrecords(path: str | Path) -> Iterator[Record]:
    """The records of one file, in its order.

    Raises:
        ValueError: the file is missing, cut off or damaged (a checksum does not hold), or a record lacks a field; the
            message has the file and the record's number, from 0.
    """
    if not Path(path).is_file():
        raise ValueError(f"there is no TFRecord file {path}")
    reader, index = PyRecordReader_New(str(path)), 0
    while True:
        try:
            reader.GetNext()
        except OutOfRangeError:
            return
        except DataLossError as error:
            raise ValueError(
                f"record {index} of {path} is damaged or cut off ({error.message}); fetch the file again"
            ) from error
        try:
            record = _from_example(reader.record())
        except (DecodeError, KeyError, IndexError, ValueError) as error:
            raise ValueError(f"record {index} of {path} is not one of RichHF-18K's: {error}") from error
        yield record
        index += 1


def join_pictures(records: Mapping[str, Mapping[str, Record]], images: str | Path, folder: Path) -> DatasetDict:
    """Join the records of each split (by uid) with a Pick-a-Pic copy; one pass over its parquet files.

    Args:
        records: split -> uid -> record.
        images: folder of parquet files (searched through), or one such file.
        folder: where the data set's files are written; must exist.

    Returns:
        The splits, with `FEATURES`, in the order in which the pictures are found. Pictures that are not found, and
        records whose number of labels is not that of their prompt's tokens, are left out; the log says how many.
    """
    writers = {split: ArrowWriter(features=FEATURES, path=str(folder / f"{split}.arrow")) for split in records}
    left = {uid: (split, record) for split, of_split in records.items() for uid, record in of_split.items()}
    wanted, mismatched, unreadable = len(left), 0, 0
    for uid, jpg, caption in _pictures(images, left):
        if uid not in left:  # a picture stands in several comparisons; the first one serves
            continue
        split, record = left.pop(uid)
        tokens = keywords.tokenize(caption)
        if len(tokens) != len(record.labels):
            mismatched += 1
        elif not _is_image(jpg):
            unreadable += 1
        else:
            writers[split].write(_row(uid, jpg, caption, tokens, record))
    for writer in writers.values():
        writer.finalize()
    dropped = {
        "records dropped, as their labels are not as many as their prompt's tokens": mismatched,
        "records dropped, as their picture cannot be read": unreadable,
        f"records dropped, as their picture is not in {images}": len(left),
    }
    for why, count in dropped.items():
        if count:
            _log.warning("%d of %d %s", count, wanted, why)
    if wanted == mismatched + unreadable + len(left):
        raise ValueError(f"none of {wanted} records could be joined with a picture in {images}: {dropped}")
    return DatasetDict({split: Dataset.from_file(str(folder / f"{split}.arrow")) for split in records})


def _pictures(images: str | Path, wanted: Mapping[str, object]) -> Iterator[tuple[str, bytes, str]]:
    """uid, encoded picture and caption of every wanted picture; row groups without one are not decoded."""
    source = Path(images)
    files = [source] if source.is_file() else sorted(source.rglob("*.parquet"))
    if not files:
        raise ValueError(f"{source} holds no parquet file; give a local copy of Pick-a-Pic v1")
    for path in files:
        table = pyarrow.parquet.ParquetFile(path)
        if missing := sorted(set(_COLUMNS) - set(table.schema_arrow.names)):
            raise ValueError(f"{path} lacks the columns {missing}; Pick-a-Pic v1 has {', '.join(_COLUMNS)}")
        for group in range(table.num_row_groups):
            uids = table.read_row_group(group, columns=["image_0_uid", "image_1_uid"]).to_pydict()
            if not any(uid in wanted for column in uids.values() for uid in column):
                continue
            for batch in table.iter_batches(batch_size=64, row_groups=[group], columns=list(_COLUMNS)):
                for row in batch.to_pylist():
                    for side in (0, 1):
                        if row[f"image_{side}_uid"] in wanted:
                            yield row[f"image_{side}_uid"], row[f"jpg_{side}"], row["caption"]


def _row(uid: str, jpg: bytes, caption: str, tokens: list[str], record: Record) -> dict:
    return {
        "uid": uid,
        "image": {"bytes": jpg, "path": None},
        "prompt": caption,
        "tokens": tokens,
        "keyword_labels": list(record.labels),
        **record.scores,
        **{f"{name}_map": {"bytes": _as_png(record.maps[name]), "path": None} for name in HEATMAPS},
    }


def _is_image(data: bytes | None) -> bool:
    try:
        Image.open(io.BytesIO(data or b"")).verify()
    except (UnidentifiedImageError, OSError, SyntaxError):  # SyntaxError is what Pillow raises for a broken PNG
        return False
    return True


def _as_png(data: bytes) -> bytes:
    """A map as one-channel PNG: unchanged if it is one already."""
    image = Image.open(io.BytesIO(data))
    return data if image.format == "PNG" and image.mode == "L" else _png(image.convert("L"))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _example_class():
    """The message `tf.train.Example`: features = map of name -> bytes_list (1), float_list (2) or int64_list (3)."""
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="reward/example.proto", package="reward.tfrecord", syntax="proto3")

    def message(name: str, fields: Sequence[tuple], parent=None):
        into = file.message_type if parent is None else parent.nested_type
        added = into.add(name=name)
        for number, (field_name, kind, label) in enumerate(fields, start=1):
            if isinstance(kind, str):
                kind = {"type": kinds.TYPE_MESSAGE, "type_name": f".reward.tfrecord.{kind}"}
            else:
                kind = {"type": kind}
            added.field.add(name=field_name, number=number, label=label, **kind)
        return added

    one, many = kinds.LABEL_OPTIONAL, kinds.LABEL_REPEATED
    message("BytesList", [("value", kinds.TYPE_BYTES, many)])
    message("FloatList", [("value", kinds.TYPE_FLOAT, many)])
    message("Int64List", [("value", kinds.TYPE_INT64, many)])
    feature = message(
        "Feature",
        [("bytes_list", "BytesList", one), ("float_list", "FloatList", one), ("int64_list", "Int64List", one)],
    )
    feature.oneof_decl.add(name="kind")
    for field_ in feature.field:
        field_.oneof_index = 0
    features = message("Features", [("feature", "Features.FeatureEntry", many)])
    entry = message("FeatureEntry", [("key", kinds.TYPE_STRING, one), ("value", "Feature", one)], parent=features)
    entry.options.map_entry = True
    message("Example", [("features", "Features", one)])
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("reward.tfrecord.Example"))


_Example = _example_class()


def _to_example(record: Record) -> bytes:
    example = _Example()
    feature = example.features.feature
    feature["filename"].bytes_list.value.append(record.filename.encode())
    for name, field_name in _SCORE_FIELDS.items():
        feature[field_name].float_list.value.append(record.scores[name])
    for name, field_name in _MAP_FIELDS.items():
        feature[field_name].bytes_list.value.append(record.maps[name])
    feature["prompt_misalignment_label"].bytes_list.value.append(keywords.format_labels(record.labels).encode())
    return example.SerializeToString(deterministic=True)


def _from_example(data: bytes) -> Record:
    feature = _Example.FromString(data).features.feature

    def first(name: str, kind: str):
        if name not in feature:  # a protobuf map would make an empty one
            raise KeyError(f"it has no field {name}")
        values = getattr(feature[name], kind).value
        if not values:
            raise KeyError(f"its field {name} has no {kind}")
        return values[0]

    return Record(
        filename=first("filename", "bytes_list").decode(),
        scores={name: first(field_name, "float_list") for name, field_name in _SCORE_FIELDS.items()},
        maps={name: first(field_name, "bytes_list") for name, field_name in _MAP_FIELDS.items()},
        labels=keywords.parse_labels(first("prompt_misalignment_label", "bytes_list").decode()),
    )


def find_tfrecords(folder: str | Path) -> dict[str, Path]:
    """The TFRecord file of each split in a folder: the one whose name has the split's name and `tfrecord`."""
    if not Path(folder).is_dir():
        raise ValueError(f"there is no folder {folder} of TFRecords")
    found = {}
    for split in SPLITS:
        paths = sorted(path for path in Path(folder).iterdir() if split in path.name and "tfrecord" in path.name)
        if len(paths) != 1:
            raise ValueError(f"{folder} must hold one TFRecord file for {split}, it has {[p.name for p in paths]}")
        found[split] = paths[0]
    return found


@dataclass
class RichHFArguments:
    tfrecords: str = field(metadata={"help": "folder of RichHF-18K's three TFRecord files"})
    images: str = field(metadata={"help": "local copy of Pick-a-Pic v1: a folder of parquet files"})
    out: str = field(metadata={"help": "folder to make; it must not exist, or be empty"})


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments([RichHFArguments], argv)
    logging.basicConfig(format="%(message)s")
    out = Path(arguments.out)
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty; give a folder that does not exist yet")
    records = {
        split: {record.uid: record for record in read_tfrecords(path)}
        for split, path in find_tfrecords(arguments.tfrecords).items()
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as unfinished:
        data = join_pictures(records, arguments.images, Path(unfinished))
        data.save_to_disk(str(Path(unfinished) / "out"))
        if out.is_dir():
            out.rmdir()
        shutil.move(Path(unfinished) / "out", out)
    print(f"{out}: " + ", ".join(f"{len(split)} {name}" for name, split in data.items()))


if __name__ == "__main__":
    main_guard(main)
