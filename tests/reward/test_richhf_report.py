"""What the command says of flaws, in its report and in its errors, and that a failed run leaves nothing."""

import json
from dataclasses import replace

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from reward import richhf
from reward.arguments import main_guard
from reward.records import read_tfrecords, write_tfrecords
from reward.richhf import NO_DATA, Flaw, SplitReport
from reward.sources import MORE_PICTURES, MORE_PROMPTS
from tests.reward import by_hand
from tests.reward.test_richhf import as_folder, as_rows_in_parquet, run


@pytest.fixture
def refused(raw_data, capsys):
    """Run the command on input that it must refuse, and that it leaves as it is; returns what it says, one line."""

    def refused(*flags, images="images", out="out"):
        before = sorted(raw_data.rglob("*"))
        capsys.readouterr()
        places = {"--tfrecords": "tfrecords", "--images": images, "--out": out}
        words = [word for flag, name in places.items() for word in (flag, str(raw_data / name))]
        with pytest.raises(SystemExit) as caught:
            main_guard(richhf.main, [*words, *flags])
        assert caught.value.code == 2
        assert sorted(raw_data.rglob("*")) == before
        return capsys.readouterr().err.splitlines()[-1]

    return refused


# Where the data set is to be ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [False, True])
def test_a_file_where_the_data_set_is_to_be(refused, raw_data, monkeypatch, inside):
    """Told before the source, which may be large, is opened."""
    monkeypatch.setattr(richhf, "open_source", lambda *_: pytest.fail("the source is opened"))
    (raw_data / "file").write_text("mine")
    said = refused(out="file/out" if inside else "file")
    named = f"--out {raw_data}/file"
    assert said == (
        f"error: {named}/out cannot be made: {raw_data}/file is a file"
        if inside
        else f"error: {named} is a file; name a folder"
    )


@pytest.mark.parametrize("damage", ["source", "records", "card"])
def test_a_failed_run_leaves_no_folder(refused, raw_data, monkeypatch, damage):
    """Those that were there stay, also empty."""
    (raw_data / "there").mkdir()
    flags = ["--strict", "--card"]
    if damage == "source":
        (raw_data / "images" / "0.parquet").write_bytes(b"PAR1")
    elif damage == "records":
        (raw_data / "tfrecords" / "dev.tfrecord").write_bytes(b"")
    else:

        def no_card(*_):
            raise ValueError("the disk is full")

        monkeypatch.setattr(richhf, "write_card", no_card)
    refused(*flags, out="there/new/deeper/out")
    assert not list((raw_data / "there").iterdir())


def test_new_folders_in_which_another_writes_meanwhile_stay(raw_data, monkeypatch):
    def another(*_):
        (raw_data / "new" / "others").mkdir()
        raise ValueError("the disk is full")

    monkeypatch.setattr(richhf, "write_card", another)
    with pytest.raises(ValueError, match="the disk is full"):
        run(raw_data, "--card", out="new/deeper/out")
    assert [path.name for path in (raw_data / "new").iterdir()] == ["others"]


def test_folders_that_are_needed_are_made(raw_data):
    assert len(run(raw_data, out="new/deeper/out")["train"]) == 12
    assert [path.name for path in (raw_data / "new" / "deeper").iterdir()] == ["out"]


# Records ------------------------------------------------------------------------------------------------------------


def spoil_records(raw_data, name="train", count=1, **changes):
    """Change a file's first records, as `by_hand.example` does."""
    path = raw_data / "tfrecords" / f"{name}.tfrecord"
    records = list(read_tfrecords(path))
    examples = [by_hand.example(record, **changes if place < count else {}) for place, record in enumerate(records)]
    path.write_bytes(b"".join(map(by_hand.frame, examples)))


@pytest.mark.parametrize(
    ("changes", "why", "detail"),
    [
        ({"scores": {"overall": 1.5}}, "labels out of range", "overall is 1.5, not in [0, 1]"),
        ({"scores": {"alignment": float("nan")}}, "labels out of range", "alignment is nan, not in [0, 1]"),
        ({"label": "1 0 2"}, "labels out of range", "keyword labels must be 0 or 1, not ['2']"),
        ({"without": ["artifact_map"]}, "field missing or malformed", "it has no field artifact_map"),
    ],
)
def test_the_report_says_which_field_and_which_value(refused, raw_data, capsys, changes, why, detail):
    spoil_records(raw_data, **changes)
    said = refused("--strict")
    assert f"1: {why} (train-0); {detail} dev: 6 records" in said
    assert "fetch" not in said
    run(raw_data)
    assert f"  1: {why} (train-0); {detail}\n" in capsys.readouterr().out


def test_of_several_records_the_first_ones_detail_is_said(raw_data, capsys):
    spoil_records(raw_data, count=2, without=["overall_score"])
    run(raw_data)
    said = "  2: field missing or malformed (train-0, train-1); the first: it has no field overall_score\n"
    assert said in capsys.readouterr().out


def test_details_are_short_and_of_one_line():
    report = SplitReport(read=1)
    report.drop(Flaw("odd", "a\n" + "b" * 1000), "u0")
    assert str(report).splitlines()[1:] == [f"  1: odd (u0); a {'b' * 198} ..."]


def test_damage_is_told_with_its_remedy(raw_data, capsys):
    path = raw_data / "tfrecords" / "train.tfrecord"
    whole = path.read_bytes()
    path.write_bytes(whole[:12] + bytes([whole[12] ^ 1]) + whole[13:-1])
    run(raw_data)
    said = capsys.readouterr().out
    assert "  1: checksum wrong (record 0); fetch the file again\n" in said
    assert "  1: cut off by the end of the file (record 11); fetch the file again\n" in said


def test_a_file_of_labels_out_of_range_need_not_be_fetched_again(refused, raw_data):
    spoil_records(raw_data, "dev", count=6, scores={"overall": 2.0})
    said = refused()
    assert "holds no record that can be used" in said
    assert "6: labels out of range" in said
    assert "the first: overall is 2.0" in said
    assert said.endswith("have it written anew, without these flaws")
    assert "fetch" not in said


def test_a_file_of_damage_alone_is_to_be_fetched_again(refused, raw_data):
    path = raw_data / "tfrecords" / "dev.tfrecord"
    path.write_bytes(path.read_bytes()[:20])
    said = refused()
    assert "1: cut off by the end of the file (record 0)" in said
    assert said.endswith("fetch it again")


def test_what_is_wrong_with_a_picture_or_its_words_is_said(raw_data, capsys):
    flags = as_folder(raw_data)
    (raw_data / "source" / "test-0.png").write_bytes(b"no picture")
    path = raw_data / "tfrecords" / "train.tfrecord"
    first, second, *others = read_tfrecords(path)
    no_map = replace(second, maps={**second.maps, "misalignment": b"no map"})
    write_tfrecords(path, [replace(first, labels=[1]), no_map, *others])
    run(raw_data, *flags, images="source")
    said = capsys.readouterr().out
    assert "  1: label count unlike token count (train-0); 1 labels, 3 tokens in 'A red circle.'\n" in said
    none_of = "it is no picture that can be read (none of PNG, JPEG, WEBP, BMP, GIF, TIFF)"
    assert f"  1: map does not decode (train-1); misalignment: {none_of}\n" in said
    assert f"  1: picture does not decode (test-0); {none_of}\n" in said


# Sources ------------------------------------------------------------------------------------------------------------


def change_rows(raw_data, change):
    """A source of one picture a row whose rows are changed; returns its folder's name."""
    as_rows_in_parquet(raw_data)
    path = raw_data / "source" / "0.parquet"
    table = pyarrow.Table.from_pylist([change(row) for row in pyarrow.parquet.read_table(path).to_pylist()])
    pyarrow.parquet.write_table(table, path)
    return "source"


@pytest.mark.parametrize("image", ["pictures/of/nothing.png", 5])
def test_a_column_that_holds_no_pictures(refused, raw_data, monkeypatch, image):
    """Told before any record is read."""
    monkeypatch.setattr(richhf, "build", lambda *_, **__: pytest.fail("the records are read"))
    images = change_rows(raw_data, lambda row: {**row, "image": image})
    said = refused(images=images)
    assert "the column 'image' holds pictures and must be bytes, or a struct of bytes and path, not" in said


def test_a_picture_that_is_not_in_its_cell_is_told_from_one_that_is_not_there(raw_data, capsys):
    def change(row):
        row["image"]["path"] = None
        if row["uid"] in ("test-0", "test-1"):
            row["image"] = {"bytes": None, "path": "/nowhere/x.png" if row["uid"] == "test-0" else None}
        return {**row, "uid": "renamed"} if row["uid"] == "test-2" else row

    data = run(raw_data, images=change_rows(raw_data, change))
    assert sorted(data["test"]["uid"]) == ["test-3", "test-4", "test-5"]
    said = capsys.readouterr().out
    assert f"  2: {NO_DATA} (test-0, test-1)\n" in said
    assert "  1: no picture in the source (test-2)\n" in said


def two_of_a_uid(raw_data):
    """A folder with a second picture of test-0, a copy of test-1, and a second prompt of dev-1; the flags for it."""
    flags = as_folder(raw_data)
    (raw_data / "source" / "z").mkdir()
    Image.new("RGB", (9, 9)).save(raw_data / "source" / "z" / "test-0.png")
    (raw_data / "source" / "z" / "test-1.png").write_bytes((raw_data / "source" / "test-1.png").read_bytes())
    with (raw_data / "prompts.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"uid": "dev-1", "prompt": "a red square, right of a circle"}))
    return flags


def test_a_uid_with_two_pictures_or_prompts_is_reported_and_the_first_taken(raw_data, capsys):
    data = run(raw_data, *two_of_a_uid(raw_data), images="source")
    said = capsys.readouterr().out
    for line in (
        "train: 12 records read, 12 joined, 0 dropped\ndev: 6 records read, 6 joined, 0 dropped\n",
        f"  1: {MORE_PROMPTS} (dev-1)\ntest: 6 records read, 6 joined, 0 dropped\n",
        f"  1: {MORE_PICTURES} (test-0)\n",
    ):
        assert line in said
    rows = {row["uid"]: row for split in data.values() for row in split}
    assert rows["test-0"]["image"].size == (48, 40)
    assert rows["dev-1"]["prompt"] == "a blue square, left of a circle"


def test_strict_refuses_two_pictures_or_prompts_of_a_uid(refused, raw_data, monkeypatch):
    """Before any picture is decoded."""
    flags = two_of_a_uid(raw_data)
    monkeypatch.setattr(richhf, "make_row", lambda *_: pytest.fail("a picture is decoded"))
    said = refused(*flags, "--strict", images="source")
    assert "--strict, and uids stand for more than one picture or prompt: train: 12" in said
    assert f"1: {MORE_PICTURES} (test-0)" in said
    assert f"1: {MORE_PROMPTS} (dev-1)" in said


def test_a_picture_in_several_pairs_is_the_rule(raw_data):
    """Of Pick-a-Pic, also under `--strict`, and with another file."""
    rows = pyarrow.parquet.read_table(raw_data / "images" / "0.parquet").to_pylist()
    again = [{**row, "jpg_0": b"another", "jpg_1": b"another"} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(again), raw_data / "images" / "9.parquet")
    assert len(run(raw_data, "--strict")["train"]) == 12
