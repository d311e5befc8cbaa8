"""RichHF-18K's records: `tf.train.Example` messages in TFRecord files, read and written without TensorFlow.

The message is declared here for protobuf; the framing is `reward.tfrecords`'s.
"""

import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from PIL import Image

from reward import keywords
from reward.feedback import SCORES
from reward.tfrecords import read_frames, write_frames

SPLITS = ("train", "dev", "test")
MAP_SIZE = 512
"""Side of a map in a record, whatever the picture's shape: it is stretched to it."""

MALFORMED = "field missing or malformed"
OUT_OF_RANGE = "labels out of range"

_SCORE_FIELDS = {
    "plausibility": "artifact_score",
    "alignment": "misalignment_score",
    "aesthetics": "aesthetics_score",
    "overall": "overall_score",
}
_MAP_FIELDS = {"implausibility": "artifact_map", "misalignment": "misalignment_map"}


class RecordError(ValueError):
    """A message is not a sound record of RichHF-18K's.

    Attributes:
        problem: `MALFORMED` or `OUT_OF_RANGE`.
        detail: which field, and which value.
        uid: the record's; None where that could not be read either.
    """

    def __init__(self, problem: str, detail: str, uid: str | None = None):
        super().__init__(f"{problem}: {detail}")
        self.problem, self.detail, self.uid = problem, detail, uid


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
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def write_tfrecords(path: str | Path, records: Iterable[Record]) -> int:
    """Write records to one file in RichHF-18K's exact form; the file appears when it is whole. Returns their number."""
    return write_frames(path, map(_to_example, records))


def read_tfrecords(path: str | Path) -> Iterator[Record]:
    """The records of one file, in its order; every one of them must be sound.

    Raises:
        ValueError: the file is missing, cut off or damaged (a checksum does not hold), or a record lacks a field or has
            a label out of range; the message has the file and the record's number, from 0.
    """
    for frame in read_frames(path):
        if frame.problem is not None:
            raise ValueError(f"record {frame.index} of {path} is damaged ({frame.problem}); fetch the file again")
        try:
            yield parse_record(frame.data)
        except RecordError as error:
            raise ValueError(f"record {frame.index} of {path} is not one of RichHF-18K's: {error}") from error


def find_tfrecords(folder: str | Path) -> dict[str, Path]:
    """The TFRecord file of each split in a folder: the one whose name has the split's name and `tfrecord`.

    Raises:
        ValueError: there is no such folder, it has no TFRecords, or not one for each split.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"there is no folder {folder} of TFRecords")
    names = sorted(path.name for path in Path(folder).iterdir())
    if not (candidates := [name for name in names if "tfrecord" in name]):
        raise ValueError(
            f"{folder} holds no TFRecords; RichHF-18K's are called train.tfrecord, dev.tfrecord and test.tfrecord"
            f" (found: {', '.join(names[:8]) or 'nothing'})"
        )
    found = {}
    for split in SPLITS:
        fitting = [name for name in candidates if split in name]
        if len(fitting) != 1:
            raise ValueError(f"{folder} must hold one TFRecord file for {split}, it has {fitting or 'none'}")
        found[split] = Path(folder) / fitting[0]
    return found


def parse_record(data: bytes) -> Record:
    """A serialised `tf.train.Example` -> the record in it.

    Raises:
        RecordError: a field is missing or malformed, or a label is not 0 or 1, or a score is not in [0, 1].
    """
    try:
        feature = _Example.FromString(data).features.feature
    except DecodeError as error:
        raise RecordError(MALFORMED, "it is no tf.train.Example") from error
    uid = None

    def first(name: str, kind: str):
        values = getattr(feature[name], kind).value if name in feature else ()  # a protobuf map would make an empty one
        if not values:
            what = f"its field {name} has no {kind}" if name in feature else f"it has no field {name}"
            raise RecordError(MALFORMED, what, uid)
        return values[0]

    try:
        filename = first("filename", "bytes_list").decode()
        uid = Path(filename).stem or None
        label_text = first("prompt_misalignment_label", "bytes_list").decode()
    except UnicodeDecodeError as error:
        raise RecordError(MALFORMED, "its text is not UTF-8", uid) from error
    if uid is None:
        raise RecordError(MALFORMED, f"its filename {filename!r} has no uid")
    record_scores = {name: first(field_name, "float_list") for name, field_name in _SCORE_FIELDS.items()}
    maps = {name: first(field_name, "bytes_list") for name, field_name in _MAP_FIELDS.items()}
    try:
        labels = keywords.parse_labels(label_text)
    except ValueError as error:
        raise RecordError(OUT_OF_RANGE, str(error), uid) from error
    for name in SCORES:
        if not (math.isfinite(record_scores[name]) and 0 <= record_scores[name] <= 1):
            raise RecordError(OUT_OF_RANGE, f"{name} is {record_scores[name]}, not in [0, 1]", uid)
    return Record(filename=filename, scores=record_scores, maps=maps, labels=labels)


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
