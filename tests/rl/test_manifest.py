"""Damaged checkpoints are found, named, and nothing is overwritten."""

import json
import os

import pytest

from rl.checkpoints import MARKER, check_intact, publish, read_marker, resolve_checkpoint
from rl.manifest import sealed


def write_checkpoint(folder, step):
    """One of three files, as a run publishes it."""
    beside = folder / "beside"
    (beside / "scheduler").mkdir(parents=True)
    (beside / "optimizer.pt").write_bytes(bytes(range(256)) * 8)
    (beside / "trainer_state.json").write_text('{"global_step": 4}')
    (beside / "scheduler/scheduler_config.json").write_text("{}")
    place = folder / f"checkpoint-{step}"
    publish(beside, place, sealed({"global_step": step}, beside))
    return place


def flip(file, place=None):
    """Change one bit of a file, in the middle if `place` (a byte) is not given."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2 if place is None else place] ^= 1
    file.write_bytes(data)


def everything(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_whole_checkpoint_passes_and_its_marker_says_what_it_was_given(tmp_path):
    place = write_checkpoint(tmp_path, 4)
    check_intact(place)
    assert read_marker(place)["global_step"] == 4
    assert set(read_marker(place)["files"]) == {
        "optimizer.pt", "trainer_state.json", "scheduler/scheduler_config.json",
    }  # fmt: skip
    os.rename(place, tmp_path / "checkpoint-4.abandoned")
    check_intact(tmp_path / "checkpoint-4.abandoned")


@pytest.mark.parametrize(
    ("name", "harm", "said"),
    [
        ("optimizer.pt", flip, "optimizer.pt is not what was written"),
        ("optimizer.pt", lambda file: file.write_bytes(file.read_bytes()[:-1]), "has 2047 bytes, 2048 were written"),
        ("optimizer.pt", lambda file: file.write_bytes(file.read_bytes() + b"x"), "has 2049 bytes, 2048 were written"),
        ("scheduler/scheduler_config.json", os.remove, "scheduler/scheduler_config.json is missing"),
        (MARKER, lambda file: file.write_text(""), "complete.json cannot be read"),
        (
            MARKER,
            lambda file: file.write_text(file.read_text().replace('step": 8', 'step": 9')),
            "complete.json is not",
        ),
        (MARKER, lambda file: file.write_text(file.read_text().replace('"files"', '"filed"')), "complete.json is not"),
    ],
)
def test_damage_is_named_with_the_newest_good_checkpoint(tmp_path, name, harm, said):
    for step in (2, 4, 6):
        write_checkpoint(tmp_path, step)
    newest = write_checkpoint(tmp_path, 8)
    flip(tmp_path / "checkpoint-6/optimizer.pt")
    harm(newest / name)
    before = everything(tmp_path)
    with pytest.raises(ValueError, match="checkpoint-8 is damaged: ") as caught:
        check_intact(newest)
    assert said in str(caught.value)
    assert f"the newest good checkpoint is {tmp_path}/checkpoint-4" in str(caught.value)
    assert everything(tmp_path) == before


def test_every_single_byte_of_a_marker_counts(tmp_path):
    """Only between its tokens may something differ that means the same."""
    place = write_checkpoint(tmp_path, 4)
    text = (place / MARKER).read_bytes()
    for position, byte in enumerate(text):
        if byte not in b" \n":
            flip(place / MARKER, position)
            with pytest.raises(ValueError, match="damaged"):
                check_intact(place)
            (place / MARKER).write_bytes(text)


def test_without_another_good_one_it_says_so(tmp_path):
    place = write_checkpoint(tmp_path, 4)
    flip(place / "optimizer.pt")
    with pytest.raises(ValueError, match="holds no other good checkpoint"):
        check_intact(place)


@pytest.mark.parametrize("which", ["latest", "auto", "folder"])
def test_resolving_sees_missing_and_short_files_without_reading_all(tmp_path, which):
    place = write_checkpoint(tmp_path, 4)
    flip(place / "optimizer.pt")
    assert resolve_checkpoint(str(place) if which == "folder" else which, tmp_path) == place
    os.truncate(place / "optimizer.pt", 5)
    with pytest.raises(ValueError, match="has 5 bytes, 2048 were written"):
        resolve_checkpoint(str(place) if which == "folder" else which, tmp_path)


def test_markers_without_a_manifest_say_nothing_of_the_files(tmp_path):
    (tmp_path / MARKER).write_text(json.dumps({"global_step": 3}))
    check_intact(tmp_path)
