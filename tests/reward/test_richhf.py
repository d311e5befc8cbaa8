import io
import struct
from dataclasses import replace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets import load_from_disk
from PIL import Image

from reward import richhf
from reward.data import resize_maps
from reward.richhf import encode_map, join_pictures, read_tfrecords, write_tfrecords


@pytest.fixture
def records(make_record):
    rng = np.random.default_rng(1)
    return [make_record(f"uid-{index}", 3, rng) for index in range(3)]


def crc32c(data):
    """Bit by bit, from the polynomial: independent of any table."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data):
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def frame(data):
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked(length)) + data + struct.pack("<I", masked(data))


def varint(value):
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def delimited(number, data):
    """A length-delimited field of the protobuf wire format."""
    return varint(number << 3 | 2) + varint(len(data)) + data


def example_by_hand(record):
    """`tf.train.Example` in wire format, written from its specification."""
    label = " ".join("0" if wrong else "1" for wrong in record.labels).encode()
    values = {
        "artifact_map": delimited(1, delimited(1, record.maps["implausibility"])),
        "misalignment_map": delimited(1, delimited(1, record.maps["misalignment"])),
        "prompt_misalignment_label": delimited(1, delimited(1, label)),
        "filename": delimited(1, delimited(1, record.filename.encode())),
    }
    for name, score in {
        "artifact_score": "plausibility",
        "misalignment_score": "alignment",
        "aesthetics_score": "aesthetics",
        "overall_score": "overall",
    }.items():
        values[name] = delimited(2, delimited(1, struct.pack("<f", record.scores[score])))
    entries = [delimited(1, delimited(1, name.encode()) + delimited(2, value)) for name, value in values.items()]
    return delimited(1, b"".join(entries))


def test_crc32c_check_value():
    assert crc32c(b"123456789") == 0xE3069283


def test_records_come_back_as_written(records, tmp_path):
    path = tmp_path / "new" / "train.tfrecord"
    assert write_tfrecords(path, iter(records)) == 3
    assert list(read_tfrecords(path)) == records
    assert [entry.name for entry in path.parent.iterdir()] == ["train.tfrecord"]


def test_records_made_by_hand_are_read(records, tmp_path):
    path = tmp_path / "x.tfrecord"
    path.write_bytes(b"".join(frame(example_by_hand(record)) for record in records))
    assert list(read_tfrecords(path)) == records


def test_written_framing_holds_by_hand(records, tmp_path):
    path = tmp_path / "x.tfrecord"
    write_tfrecords(path, records[:1])
    data = path.read_bytes()
    assert data == frame(data[12:-4])


@pytest.mark.parametrize("place", [3, 9, 100, -2], ids=["length", "its checksum", "data", "its checksum too"])
def test_a_flipped_bit_is_found(records, tmp_path, place):
    path = tmp_path / "x.tfrecord"
    write_tfrecords(path, records[:1])
    first = len(path.read_bytes())
    write_tfrecords(path, records[:2])
    data = bytearray(path.read_bytes())
    data[first + place if place >= 0 else place] ^= 1
    path.write_bytes(data)
    reader = read_tfrecords(path)
    assert next(reader) == records[0]
    with pytest.raises(ValueError, match=r"record 1 of .*x\.tfrecord is damaged"):
        next(reader)


@pytest.mark.parametrize("keep", [5, 11, 200, -1])
def test_a_file_that_is_cut_off_is_found(records, tmp_path, keep):
    path = tmp_path / "x.tfrecord"
    write_tfrecords(path, records[:1])
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"record 0 of .* cut off"):
        list(read_tfrecords(path))


def test_records_of_another_kind_are_named(records, tmp_path):
    path = tmp_path / "x.tfrecord"
    path.write_bytes(frame(delimited(1, delimited(1, delimited(1, b"image") + delimited(2, b"")))))
    with pytest.raises(ValueError, match="no field filename"):
        list(read_tfrecords(path))
    path.write_bytes(frame(b"\xff\xff"))
    with pytest.raises(ValueError, match=r"record 0 of .* not one of RichHF"):
        list(read_tfrecords(path))


def test_a_failed_write_leaves_the_old_file(records, tmp_path):
    path = tmp_path / "x.tfrecord"
    write_tfrecords(path, records[:1])

    def broken():
        yield records[1]
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        write_tfrecords(path, broken())
    assert list(read_tfrecords(path)) == records[:1]
    assert len(list(tmp_path.iterdir())) == 1


def test_maps_are_blocks_that_area_undoes():
    heatmap = np.random.default_rng(0).integers(0, 4, (64, 64)) / 3
    image = Image.open(io.BytesIO(encode_map(heatmap)))
    assert (image.size, image.mode) == ((512, 512), "L")
    back = resize_maps(torch.from_numpy(np.array(image)).float()[None, None] / 255, 64)[0, 0]
    torch.testing.assert_close(back, torch.from_numpy(heatmap).float(), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        encode_map(heatmap * 2)


def run(raw_data, out="out"):
    richhf.main(
        ["--tfrecords", str(raw_data / "tfrecords"), "--images", str(raw_data / "images"), "--out", str(raw_data / out)]
    )
    return load_from_disk(str(raw_data / out))


def test_the_command_joins_records_and_pictures(raw_data):
    data = run(raw_data)
    assert {name: len(split) for name, split in data.items()} == {"train": 12, "dev": 6, "test": 6}
    assert data["dev"].features == richhf.FEATURES
    records = {record.uid: record for record in read_tfrecords(raw_data / "tfrecords" / "dev.tfrecord")}
    for row in data["dev"]:
        record = records.pop(row["uid"])
        assert row["keyword_labels"] == record.labels
        assert len(row["tokens"]) == len(record.labels)
        assert row["overall"] == record.scores["overall"]
        assert row["image"].size == (48, 40)
        true = np.array(Image.open(io.BytesIO(record.maps["implausibility"])))
        assert np.array_equal(np.array(row["implausibility_map"]), true)
    assert not records
    assert not [path for path in raw_data.iterdir() if path.name.startswith(".")]  # nothing unfinished is left


def test_the_command_refuses_a_folder_in_use(raw_data):
    run(raw_data)
    with pytest.raises(ValueError, match="not empty"):
        run(raw_data)


def test_mismatched_labels_and_missing_pictures_are_counted(raw_data, caplog):
    path = raw_data / "tfrecords" / "dev.tfrecord"
    first, *others = read_tfrecords(path)
    write_tfrecords(path, [replace(first, labels=[1]), *others, replace(first, filename="dev/nowhere.png")])
    data = run(raw_data)
    assert len(data["dev"]) == 5
    assert "1 of 25 records dropped, as their labels" in caplog.text
    assert "1 of 25 records dropped, as their picture is not in" in caplog.text


def test_a_picture_that_cannot_be_read_is_counted(tmp_path, records, picture_bytes, caplog):
    row = {"image_0_uid": "uid-0", "image_1_uid": "uid-1", "jpg_0": b"no picture", "jpg_1": None, "caption": "a b c"}
    good = {**row, "image_0_uid": "uid-2", "jpg_0": picture_bytes(np.zeros((4, 4, 3), np.uint8))}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row, good]), tmp_path / "x.parquet")
    data = join_pictures({"test": {record.uid: record for record in records}}, tmp_path / "x.parquet", tmp_path)
    assert data["test"]["uid"] == ["uid-2"]
    assert "2 of 3 records dropped, as their picture cannot be read" in caplog.text


def test_wrong_sources_are_named(raw_data, tmp_path, records):
    by_uid = {"test": {record.uid: record for record in records}}
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no parquet file"):
        join_pictures(by_uid, tmp_path / "empty", tmp_path)
    with pytest.raises(ValueError, match="none of 3 records"):
        join_pictures(by_uid, raw_data / "images", tmp_path)
    pyarrow.parquet.write_table(pyarrow.table({"image": [1]}), tmp_path / "empty" / "x.parquet")
    with pytest.raises(ValueError, match="image_0_uid"):
        join_pictures(by_uid, tmp_path / "empty", tmp_path)
    with pytest.raises(ValueError, match="one TFRecord file for train"):
        richhf.find_tfrecords(tmp_path / "empty")
    with pytest.raises(ValueError, match="no TFRecord file"):
        list(read_tfrecords(tmp_path / "nowhere"))
