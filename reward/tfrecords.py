"""TFRecord files without TensorFlow: the framing, and the checksum that guards it.

A file is a row of frames: length (8 bytes, little-endian), the masked CRC32C of these 8 bytes (4), the data, the masked
CRC32C of the data (4); see tensorflow/core/lib/io/record_writer.h. TensorBoard has a reader too, but its checksum takes
minutes for RichHF-18K, and it cannot go on behind a damaged record.
"""

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from reward.whole_files import whole_file

CHECKSUM_WRONG = "checksum wrong"
CUT_OFF = "cut off by the end of the file"

_POLYNOMIAL = 0x82F63B78  # CRC-32C (Castagnoli), bits reversed
_BLOCK = 4096
_HEAD, _TAIL = 12, 4
_LFS = b"version http"


@dataclass(frozen=True)
class Frame:
    """One record of a file.

    Attributes:
        index: its number in the file, from 0.
        offset: where its data begin, in bytes from the start of the file.
        data: its content; empty if it was cut off.
        problem: None, `CHECKSUM_WRONG` or `CUT_OFF` (the last frame only).
    """

    index: int
    offset: int
    data: bytes
    problem: str | None = None


def read_frames(path: str | Path) -> Iterator[Frame]:
    """The frames of a file, in its order, one in memory at a time.

    A frame whose data are damaged, and a last one that is cut off, come with their `problem`.

    Raises:
        ValueError: there is no such file, or Git LFS's pointer in its place; or a frame's length is damaged: where the
            next frame begins is then unknown.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no TFRecord file {path}")
    size, index, offset = path.stat().st_size, 0, 0
    with path.open("rb") as file:
        while offset < size:
            head = file.read(_HEAD)
            if len(head) < _HEAD:
                yield Frame(index, offset, b"", CUT_OFF)
                return
            length, checksum = struct.unpack("<QI", head)
            if checksum != masked_crc32c(head[:8]):
                if index == 0 and head == _LFS:
                    raise ValueError(
                        f"{path} is a pointer of Git LFS, not the file itself; get that by `git lfs install` and then "
                        "`git lfs pull` in its folder"
                    )
                what = f"is damaged at byte {offset} (record {index})"
                if index == 0:  # one flipped bit, and a file of another kind, look the same here
                    what = f"is no TFRecord file, or {what}"
                raise ValueError(f"{path} {what}: the checksum of a record's length does not hold; fetch it again")
            if offset + _HEAD + length + _TAIL > size:  # asked before reading: a length may be anything
                yield Frame(index, offset + _HEAD, b"", CUT_OFF)
                return
            data, tail = file.read(length), file.read(_TAIL)
            sound = struct.unpack("<I", tail)[0] == masked_crc32c(data)
            yield Frame(index, offset + _HEAD, data, None if sound else CHECKSUM_WRONG)
            offset, index = offset + _HEAD + length + _TAIL, index + 1


def write_frames(path: str | Path, contents: Iterable[bytes]) -> int:
    """Write a file of records; it appears when it is whole. Returns the number of records."""
    count = 0
    with whole_file(path) as file:
        for data in contents:
            length = struct.pack("<Q", len(data))
            checksums = (struct.pack("<I", masked_crc32c(part)) for part in (length, data))
            file.write(length + next(checksums) + data + next(checksums))
            count += 1
    return count


def masked_crc32c(data: bytes) -> int:
    """The checksum as TFRecord files hold it: rotated and shifted, so that checksums of checksums stay useful."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c(data: bytes) -> int:
    """CRC-32C (RFC 3720, appendix B.4) of any number of bytes.

    The register is linear (over XOR) in the bytes, so that a block's is the XOR of what each byte adds at its distance
    from the block's end. One look-up in a table by distance and byte takes the place of a loop over bytes. What the
    register held before acts as if XORed into the block's first four bytes.

    >>> hex(crc32c(b"123456789"))
    '0xe3069283'
    """
    table, crc = _table(), 0xFFFFFFFF
    for begin in range(0, len(data), _BLOCK):
        block = np.frombuffer(data[begin : begin + _BLOCK], dtype=np.uint8).copy()
        head = min(4, len(block))
        block[:head] ^= np.frombuffer(crc.to_bytes(4, "little"), dtype=np.uint8)[:head]
        added = table[np.arange(len(block) - 1, -1, -1), block]
        crc = crc >> 8 * head ^ int(np.bitwise_xor.reduce(added))
    return crc ^ 0xFFFFFFFF


@cache
def _table() -> np.ndarray:
    """(_BLOCK, 256) uint32: what a byte leaves in the register when so many zero bytes follow it."""
    first = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        first = first >> 1 ^ np.where(first & 1, np.uint32(_POLYNOMIAL), np.uint32(0))
    table = np.empty((_BLOCK, 256), dtype=np.uint32)
    table[0] = first
    for distance in range(1, _BLOCK):
        before = table[distance - 1]
        table[distance] = before >> 8 ^ first[before & 255]
    return table
