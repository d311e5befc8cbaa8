"""RichHF-18K's records written from the formats' specifications alone: what our reader is checked against."""

import struct


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
    """A TFRecord frame."""
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


def example(record, label=None, scores=None, without=()):
    """`tf.train.Example` of a record in wire format; `label` and `scores` replace the record's, as text and values."""
    scores = {**record.scores, **(scores or {})}
    label = " ".join("0" if wrong else "1" for wrong in record.labels) if label is None else label
    values = {
        "artifact_map": delimited(1, delimited(1, record.maps["implausibility"])),
        "misalignment_map": delimited(1, delimited(1, record.maps["misalignment"])),
        "prompt_misalignment_label": delimited(1, delimited(1, label.encode())),
        "filename": delimited(1, delimited(1, record.filename.encode())),
    }
    for name, score in {
        "artifact_score": "plausibility",
        "misalignment_score": "alignment",
        "aesthetics_score": "aesthetics",
        "overall_score": "overall",
    }.items():
        values[name] = delimited(2, delimited(1, struct.pack("<f", scores[score])))
    entries = [
        delimited(1, delimited(1, name.encode()) + delimited(2, value))
        for name, value in values.items()
        if name not in without
    ]
    return delimited(1, b"".join(entries))
