import numpy as np
import pytest
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import crc32c as tensorboard_crc32c

from reward.tfrecords import CHECKSUM_WRONG, CUT_OFF, crc32c, masked_crc32c, read_frames, write_frames
from tests.reward import by_hand

CONTENTS = [b"first", b"", b"third, longer" * 9]


@pytest.mark.parametrize(
    ("data", "value"),
    [(b"", 0), (b"123456789", 0xE3069283), (b"\0" * 32, 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43)],
)
def test_check_values_of_the_standard(data, value):
    """RFC 3720, appendix B.4."""
    assert crc32c(data) == by_hand.crc32c(data) == value


@pytest.mark.parametrize("length", [1, 3, 4, 5, 4095, 4096, 4097, 4099, 8200])
def test_any_length_is_as_tensorboard_has_it(length):
    data = np.random.default_rng(length).bytes(length)
    assert crc32c(data) == tensorboard_crc32c(data)
    assert masked_crc32c(data[:9]) == by_hand.masked(data[:9])


def test_frames_come_back_and_are_framed_by_the_book(tmp_path):
    path = tmp_path / "new" / "x.tfrecord"
    assert write_frames(path, iter(CONTENTS)) == 3
    assert path.read_bytes() == b"".join(map(by_hand.frame, CONTENTS))
    frames = list(read_frames(path))
    assert [(frame.index, frame.data, frame.problem) for frame in frames] == [
        (index, data, None) for index, data in enumerate(CONTENTS)
    ]
    for frame in frames:
        assert path.read_bytes()[frame.offset :].startswith(frame.data)
    assert [entry.name for entry in path.parent.iterdir()] == ["x.tfrecord"]


def test_a_file_whose_records_fail_is_as_it_was(tmp_path):
    def fails():
        yield b"first"
        raise ValueError("no second")

    path = tmp_path / "x.tfrecord"
    path.write_bytes(b"before")
    with pytest.raises(ValueError, match="no second"):
        write_frames(path, fails())
    assert path.read_bytes() == b"before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.tfrecord"]


def damaged(path, place):
    data = bytearray(b"".join(map(by_hand.frame, CONTENTS)))
    data[place] ^= 1
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("place", [12, 17], ids=["data", "their checksum"])
def test_behind_damaged_data_reading_goes_on(tmp_path, place):
    frames = list(read_frames(damaged(tmp_path / "x", place)))
    assert [frame.problem for frame in frames] == [CHECKSUM_WRONG, None, None]
    assert [frame.data for frame in frames[1:]] == CONTENTS[1:]


@pytest.mark.parametrize("place", [3, 9], ids=["length", "its checksum"])
def test_a_damaged_length_ends_the_reading(tmp_path, place):
    reader = read_frames(damaged(tmp_path / "x", 21 + place))
    assert next(reader).data == CONTENTS[0]
    with pytest.raises(ValueError, match=r"damaged at byte 21 \(record 1\)"):
        next(reader)


@pytest.mark.parametrize("kept", [-1, -5, -100, 40], ids=["checksum", "data", "most data", "head"])
def test_a_last_frame_that_is_cut_off_is_said(tmp_path, kept):
    path = tmp_path / "x"
    path.write_bytes(b"".join(map(by_hand.frame, CONTENTS))[:kept])
    assert [frame.problem for frame in read_frames(path)] == [None, None, CUT_OFF]


@pytest.mark.parametrize("place", [3, 9], ids=["length", "its checksum"])
def test_a_damaged_first_length_may_be_that_or_another_kind_of_file(tmp_path, place):
    with pytest.raises(ValueError, match=r"is no TFRecord file, or is damaged at byte 0 \(record 0\).*fetch it again"):
        next(read_frames(damaged(tmp_path / "x", place)))


def test_other_files_are_refused(tmp_path):
    (tmp_path / "x").write_text("This is a text, not a TFRecord file.")
    with pytest.raises(ValueError, match="is no TFRecord file"):
        list(read_frames(tmp_path / "x"))
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (tmp_path / "pointer").write_text(pointer)
    with pytest.raises(ValueError, match=r"is a pointer of Git LFS.*`git lfs pull` in its folder"):
        list(read_frames(tmp_path / "pointer"))
    with pytest.raises(ValueError, match="there is no TFRecord file"):
        list(read_frames(tmp_path / "nowhere"))


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    write_frames(path, CONTENTS)

    def broken():
        yield b"new"
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        write_frames(path, broken())
    assert [frame.data for frame in read_frames(path)] == CONTENTS
    assert len(list(tmp_path.iterdir())) == 1
