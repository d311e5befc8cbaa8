import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from reward.data import resize_maps
from reward.records import (
    MALFORMED,
    OUT_OF_RANGE,
    RecordError,
    encode_map,
    find_tfrecords,
    parse_record,
    read_tfrecords,
    write_tfrecords,
)
from tests.reward import by_hand


@pytest.fixture
def records(make_record):
    rng = np.random.default_rng(1)
    return [make_record(f"uid-{index}", 3, rng) for index in range(3)]


def test_records_come_back_as_written(records, tmp_path):
    path = tmp_path / "new" / "train.tfrecord"
    assert write_tfrecords(path, iter(records)) == 3
    assert list(read_tfrecords(path)) == records


def test_records_made_by_hand_are_read(records, tmp_path):
    path = tmp_path / "x.tfrecord"
    path.write_bytes(b"".join(by_hand.frame(by_hand.example(record)) for record in records))
    assert list(read_tfrecords(path)) == records


def test_damage_and_strangers_are_named(records, tmp_path):
    path = tmp_path / "x.tfrecord"
    good = by_hand.frame(by_hand.example(records[0]))
    path.write_bytes(good + good[:-1])
    with pytest.raises(ValueError, match=r"record 1 of .*x\.tfrecord is damaged \(cut off"):
        list(read_tfrecords(path))
    path.write_bytes(good + by_hand.frame(b"\xff\xff"))
    with pytest.raises(ValueError, match=r"record 1 of .* not one of RichHF-18K's"):
        list(read_tfrecords(path))


@pytest.mark.parametrize(
    ("changes", "problem", "detail", "uid"),
    [
        ({"without": ["filename"]}, MALFORMED, "no field filename", None),
        ({"without": ["artifact_map"]}, MALFORMED, "no field artifact_map", "uid-0"),
        ({"label": "1 0 2"}, OUT_OF_RANGE, "0 or 1", "uid-0"),
        ({"scores": {"overall": 1.5}}, OUT_OF_RANGE, "overall is 1.5", "uid-0"),
        ({"scores": {"alignment": -0.25}}, OUT_OF_RANGE, "alignment is -0.25", "uid-0"),
        ({"scores": {"aesthetics": float("nan")}}, OUT_OF_RANGE, "aesthetics is nan", "uid-0"),
    ],
)
def test_unsound_records_are_told_apart(records, changes, problem, detail, uid):
    with pytest.raises(RecordError, match=detail) as caught:
        parse_record(by_hand.example(records[0], **changes))
    assert (caught.value.problem, caught.value.uid) == (problem, uid)


def test_a_record_without_a_name_is_malformed(records):
    with pytest.raises(RecordError, match="no uid"):
        parse_record(by_hand.example(replace(records[0], filename="")))


def test_maps_are_blocks_that_area_undoes():
    heatmap = np.random.default_rng(0).integers(0, 4, (64, 64)) / 3
    image = Image.open(io.BytesIO(encode_map(heatmap)))
    assert (image.size, image.mode) == ((512, 512), "L")
    back = resize_maps(torch.from_numpy(np.array(image)).float()[None, None] / 255, (64, 64))[0, 0]
    torch.testing.assert_close(back, torch.from_numpy(heatmap).float(), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        encode_map(heatmap * 2)


def test_folders_without_the_three_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        find_tfrecords(tmp_path / "nowhere")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"holds no TFRecords.*found: notes\.txt"):
        find_tfrecords(tmp_path)
    for name in ("train.tfrecord", "dev.tfrecord"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="one TFRecord file for test, it has none"):
        find_tfrecords(tmp_path)
