"""Every kind of source gives the same pictures, tells what it is, and says what it lacks."""

import csv
import datetime
import io
import json
import os
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from reward.sources import (
    MORE_PICTURES,
    MORE_PROMPTS,
    Columns,
    Picture,
    PictureFolder,
    PicturePairs,
    PictureRows,
    open_source,
)

UIDS = [f"u{index}" for index in range(40)]
WANTED = dict.fromkeys(UIDS[::3])


def png(index):
    buffer = io.BytesIO()
    Image.fromarray(np.full((2, 3, 3), index, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def prompt(index):
    return f'a "{index}", red'


EXPECTED = {Picture(uid, png(int(uid[1:])), prompt(int(uid[1:]))) for uid in WANTED}


def rows(uid="uid", image="image", text="prompt"):
    return [
        {uid: name, image: {"bytes": png(index), "path": f"{name}.png"}, text: prompt(index)}
        for index, name in enumerate(UIDS)
    ]


def pairs():
    """Pick-a-Pic's columns: a uid a row, on the left and on the right in turn, beside one that nobody wants."""
    return [
        {
            f"image_{index % 2}_uid": name,
            f"jpg_{index % 2}": png(index),
            f"image_{1 - index % 2}_uid": f"other-{name}",
            f"jpg_{1 - index % 2}": b"not looked at",
            "caption": prompt(index),
        }
        for index, name in enumerate(UIDS)
    ]


def write_parquet(folder, content, group=7):
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(2):
        table = pa.Table.from_pylist(content[shard::2])
        pyarrow.parquet.write_table(table, folder / f"{shard}.parquet", row_group_size=group)


def write_arrow(path, content, batch=6):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(content)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=batch)


def write_saved(folder, content):
    """As `save_to_disk` lays it out: the state names the data; a cache beside them is none of them."""
    write_arrow(folder / "train" / "data-00000-of-00001.arrow", content)
    write_arrow(folder / "train" / "cache-1.arrow", [{"x": 1}])
    (folder / "train" / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]})
    )


def write_pictures(folder):
    for index, name in enumerate(UIDS):
        (folder / str(index % 3)).mkdir(parents=True, exist_ok=True)
        (folder / str(index % 3) / f"{name}.png").write_bytes(png(index))


def write_csv(path, uid="uid", text="prompt", value=str):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([uid, text])
        writer.writerows([value(name), prompt(index)] for index, name in enumerate(UIDS))


@pytest.mark.parametrize("write", [write_parquet, write_saved, lambda f, c: write_arrow(f / "x-train.arrow", c)])
def test_pairs_in_parquet_saved_or_cached(tmp_path, write):
    write(tmp_path / "x", pairs())
    source = open_source(tmp_path / "x")
    assert isinstance(source, PicturePairs)
    assert "Pick-a-Pic v1" in str(source)
    assert set(source.pictures(WANTED)) == EXPECTED


@pytest.mark.parametrize("write", [write_parquet, write_saved])
def test_one_picture_a_row_with_columns_by_name(tmp_path, write):
    write(tmp_path / "x", rows("key", "picture", "text"))
    source = open_source(tmp_path / "x", Columns("key", "picture", "text"))
    assert isinstance(source, PictureRows)
    assert "key, picture, text" in str(source)
    assert set(source.pictures(WANTED)) == EXPECTED


def test_bytes_file_names_and_one_file_serve_too(tmp_path):
    content = [{"uid": f"train/{row['uid']}.png", "image": row["image"]["bytes"], "prompt": row["prompt"]}
               for row in rows()]  # fmt: skip
    write_parquet(tmp_path, content[:1] * 2 + content)
    (tmp_path / "0.parquet").rename(tmp_path / "y.parquet")
    found = list(open_source(tmp_path / "y.parquet").pictures(WANTED))
    assert set(found) == {picture for picture in EXPECTED if int(picture.uid[1:]) % 2 == 0}
    assert len(found) == len(set(found)) + 1  # what stands there twice comes twice


def test_a_path_counts_inside_the_source_only(tmp_path):
    (tmp_path / "in").mkdir()
    for folder in (tmp_path, tmp_path / "in"):
        (folder / "x.png").write_bytes(png(5))
    paths = {"u0": "x.png", "u1": "../x.png", "u2": str(tmp_path / "x.png"), "u3": "gone.png"}
    content = [{"uid": uid, "image": {"bytes": None, "path": path}, "prompt": "a"} for uid, path in paths.items()]
    pyarrow.parquet.write_table(pa.Table.from_pylist(content), tmp_path / "in" / "a.parquet")
    found = {picture.uid: picture.data for picture in open_source(tmp_path / "in").pictures(paths)}
    assert found == {"u0": png(5), "u1": None, "u2": None, "u3": None}


def test_a_folder_of_pictures_with_a_csv_in_it(tmp_path):
    write_pictures(tmp_path)
    write_csv(tmp_path / "prompts.csv")
    source = open_source(tmp_path)
    assert isinstance(source, PictureFolder)
    assert "a folder of pictures" in str(source)
    assert set(source.pictures(WANTED)) == EXPECTED


def test_an_image_folder_with_its_metadata(tmp_path):
    write_pictures(tmp_path)
    write_csv(tmp_path / "metadata.csv", "file_name", "text", lambda uid: f"0/{uid}.png")
    assert set(open_source(tmp_path, Columns(prompt="text")).pictures(WANTED)) == EXPECTED


def test_a_folder_of_pictures_with_jsonl_elsewhere(tmp_path):
    write_pictures(tmp_path / "pictures")
    lines = [json.dumps({"uid": name, "prompt": prompt(index)}) for index, name in enumerate(UIDS)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines[3:]) + "\n\n")
    found = set(open_source(tmp_path / "pictures", table=tmp_path / "x.jsonl").pictures(WANTED))
    assert found == {Picture("u0", png(0), None)} | {picture for picture in EXPECTED if picture.uid != "u0"}


def test_a_folders_pictures_come_in_the_same_order_on_every_file_system(tmp_path, monkeypatch):
    """Here one that lists everything backwards."""
    walk = os.walk

    def backwards(folder):
        for place, folders, names in walk(folder):
            folders.sort(reverse=True)
            yield place, folders, sorted(names, reverse=True)

    monkeypatch.setattr(os, "walk", backwards)
    for index, place in enumerate(["u1.png", "c/u1.png", "a/u1.webp", "a/u1.jpg", "b/z/u1.png", "b/u1.gif"]):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_bytes(png(index))
    write_csv(tmp_path / "x.csv")
    found = [picture.data for picture in open_source(tmp_path).pictures(WANTED | {"u1": None})]
    assert found == [png(index) for index in (0, 3, 2, 5, 4, 1)]


def test_uids_that_stand_for_different_things_in_a_folder(tmp_path):
    """Equal copies are no contradiction, nor are a column that nobody asked for and a uid that nobody wants."""
    write_pictures(tmp_path)
    for place, index in {"u0.png": 9, "u3.png": 3, "2/u6.png": 8, "u1.png": 9}.items():
        (tmp_path / place).write_bytes(png(index))
    lines = [{"uid": name, "prompt": prompt(index), "model": "x", "seed": 1} for index, name in enumerate(UIDS)]
    lines += [lines[3], {**lines[6], "prompt": "b"}, {**lines[9], "model": "y"}, {**lines[12], "seed": 2}]
    lines += [{**lines[1], "prompt": "b"}, {**lines[6], "prompt": "c"}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = open_source(tmp_path, Columns(kept=("model",))).ambiguous(WANTED)
    assert found == {MORE_PICTURES: ["u0", "u6"], MORE_PROMPTS: ["u6", "u9"]}
    assert open_source(tmp_path).ambiguous(WANTED)[MORE_PROMPTS] == ["u6"]


def test_reading_ends_with_what_is_wanted(tmp_path):
    """A uid that is no longer wanted is not read again; row groups without a wanted one are not read at all."""
    write_parquet(tmp_path, rows(), group=1)
    wanted = dict.fromkeys(["u4", "u5"])
    found = []
    for picture in open_source(tmp_path).pictures(wanted):
        wanted.clear()
        found.append(picture.uid)
    assert found == ["u4"]


def test_missing_columns_are_named_and_the_found_ones_listed(tmp_path):
    write_parquet(tmp_path / "rows", rows())
    message = r"lacks the columns id, text; it has uid, image, prompt\. .*--uid_column"
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path / "rows", Columns("id", "image", "text"))
    write_pictures(tmp_path / "pictures")
    write_csv(tmp_path / "pictures" / "x.csv", text="words")
    with pytest.raises(ValueError, match=r"x\.csv lacks the columns prompt; it has uid, words\."):
        open_source(tmp_path / "pictures")
    (tmp_path / "pictures" / "x.csv").write_text("")
    with pytest.raises(ValueError, match=r"it has none\."):
        open_source(tmp_path / "pictures")


@pytest.mark.parametrize("write", [write_parquet, write_saved])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": "x.png"}, r"'image' holds pictures and must be bytes, or a struct of bytes and path, not string;.*"),
        ({"image": 1}, r"'image' holds pictures .* not int64; name the column that does by --image_column"),
        ({"image": {"bytes": "x", "path": "x"}}, r"'image' holds pictures .* not struct<bytes: string, path: string>"),
        ({"image": {"path": 1}}, r"'image' holds pictures .* not struct<path: int64>"),
        ({"image": {"file": "x"}}, r"'image' holds pictures .* not struct<file: string>"),
        ({"uid": b"u0"}, r"'uid' holds uids and must be text or whole numbers, not binary; name .* by --uid_column"),
        ({"uid": ["u0"]}, r"'uid' holds uids and must be text or whole numbers, not list"),
        ({"uid": 0.5}, r"'uid' holds uids and must be text or whole numbers, not double"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_columns_that_cannot_be_pictures_or_uids(tmp_path, write, change, message):
    """It is told before any row is read."""
    write(tmp_path / "x", [{**row, **change} for row in rows()])
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path / "x")


@pytest.mark.parametrize(("column", "what"), [("jpg_1", "pictures"), ("image_1_uid", "uids")])
def test_columns_of_pairs_that_cannot_be_meant(tmp_path, column, what):
    write_parquet(tmp_path, [{**row, column: [1]} for row in pairs()])
    with pytest.raises(ValueError, match=rf"'{column}' holds {what} and must be .*, not list"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int32(), pa.binary())], ids=str
)
def test_every_type_that_holds_bytes_serves(tmp_path, kind):
    pictures = pa.array([png(0), png(1)]).cast(kind)
    table = pa.table({"uid": ["u0", "u1"], "image": pictures, "prompt": [prompt(0), prompt(1)]})
    with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    assert set(open_source(tmp_path).pictures(["u0"])) == {Picture("u0", png(0), prompt(0))}


@pytest.mark.parametrize("write", [write_parquet, write_saved])
@pytest.mark.parametrize("uid", [7, uuid.UUID(int=7), "7.png"], ids=["number", "UUID", "file"])
def test_uids_of_pairs_may_be_too(tmp_path, write, uid):
    write(tmp_path / "x", [{**row, "image_0_uid": uid} for row in pairs()[:2]])
    name = str(uid).removesuffix(".png")
    found = list(open_source(tmp_path / "x").pictures([name]))
    assert [picture.uid for picture in found] == [name] * 2


@pytest.mark.parametrize("write", [write_parquet, write_saved])
@pytest.mark.parametrize("uid", [7, uuid.UUID(int=7)], ids=["number", "UUID"])
def test_uids_may_be_numbers_or_of_arrows_own_type(tmp_path, write, uid):
    write(tmp_path / "x", [{**row, "uid": uid} for row in rows()[:2]])
    found = list(open_source(tmp_path / "x").pictures([str(uid)]))
    assert [picture.uid for picture in found] == [str(uid)] * 2


def resident(kind):
    """Bytes of this process that are resident: `RssAnon`, its own, or `RssFile`, mapped."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is counted by Linux's /proc")
@pytest.mark.parametrize("write", ["pairs", "rows"])
def test_of_a_large_batch_only_the_wanted_rows_are_in_memory(tmp_path, write):
    """64 MiB in one batch, of which first two pictures are wanted, then all: neither read at once nor left mapped."""
    size, count = 2**20, 64
    large = np.random.default_rng(0).bytes(size)
    if write == "pairs":
        columns = {f"image_{side}_uid": [f"{side}-{row}" for row in range(count // 2)] for side in (0, 1)}
        columns |= {f"jpg_{side}": [large] * (count // 2) for side in (0, 1)} | {"caption": ["a"] * (count // 2)}
    else:
        columns = {"uid": [f"0-{row}" for row in range(count)], "prompt": ["a"] * count, "unused": [large] * count}
        columns["image"] = [{"bytes": large, "path": None}] * count
    table = pa.table(columns)
    with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    del table, columns
    source = open_source(tmp_path)
    for wanted, found in ((["0-1", "0-30"], 2), ([f"{side}-{row}" for side in (0, 1) for row in range(count)], count)):
        own, mapped, arrows = resident("RssAnon"), resident("RssFile"), pa.total_allocated_bytes()
        pictures = 0
        for picture in source.pictures(wanted):
            pictures += picture.data == large
            assert pa.total_allocated_bytes() - arrows < 4 * size
            assert resident("RssAnon") - own < 16 * size
            assert resident("RssFile") - mapped < 40 * size  # sixteen rows, both sides, and what lies around them
        assert pictures == found


PLAIN = {"text": "x", "number": 3, "share": 0.5, "flag": True, "day": datetime.date(2023, 1, 2), "nothing": None}
AS_TEXT = {"text": "x", "number": "3", "share": "0.5", "flag": "True", "day": "2023-01-02", "nothing": ""}


@pytest.mark.parametrize("write", [write_parquet, write_saved])
@pytest.mark.parametrize("content", [rows, pairs])
def test_plain_values_are_kept_as_text(tmp_path, write, content):
    write(tmp_path / "x", [{**row, **PLAIN} for row in content()])
    found = list(open_source(tmp_path / "x", Columns(kept=tuple(PLAIN))).pictures(WANTED))
    assert len(found) == len(WANTED)
    assert all(picture.kept == AS_TEXT for picture in found)


def test_a_column_in_dictionary_form_is_kept(tmp_path):
    table = pa.Table.from_pylist(rows())
    table = table.append_column("model", pa.array(["x", None] * 20).dictionary_encode())
    pyarrow.parquet.write_table(table, tmp_path / "0.parquet")
    found = open_source(tmp_path, Columns(kept=("model",))).pictures({"u2": None, "u3": None})
    assert {picture.uid: picture.kept["model"] for picture in found} == {"u2": "x", "u3": ""}


def test_of_a_pair_the_common_column_comes_before_each_pictures_own(tmp_path):
    content = [{**row, "model_0": "left", "model_1": "right", "label_0": 0.5} for row in pairs()]
    write_parquet(tmp_path / "own", content)
    found = open_source(tmp_path / "own", Columns(kept=("model", "label_0"))).pictures(["u0", "u1"])
    assert {picture.uid: picture.kept for picture in found} == {
        "u0": {"model": "left", "label_0": "0.5"},
        "u1": {"model": "right", "label_0": "0.5"},
    }
    write_parquet(tmp_path / "common", [{**row, "model": "both"} for row in content])
    found = open_source(tmp_path / "common", Columns(kept=("model",))).pictures(["u0", "u1"])
    assert [picture.kept["model"] for picture in found] == ["both", "both"]
    with pytest.raises(ValueError, match=r"lacks the columns label of --keep_columns; it has .*label_0"):
        open_source(tmp_path / "own", Columns(kept=("label",)))


def test_columns_of_a_csv_are_kept(tmp_path):
    """A row that ends early has no value; a picture that has no row has none either."""
    write_pictures(tmp_path)
    (tmp_path / "x.csv").write_text("uid,prompt,model\nu0,a,x\nu1,b\nu2,c,y,beyond\n")
    found = open_source(tmp_path, Columns(kept=("model",))).pictures(["u0", "u1", "u2", "u3"])
    assert {picture.uid: picture.kept["model"] for picture in found} == {"u0": "x", "u1": "", "u2": "y", "u3": ""}
    with pytest.raises(ValueError, match=r"lacks the columns author of --keep_columns; it has uid, prompt, model$"):
        open_source(tmp_path, Columns(kept=("author",)))


@pytest.mark.parametrize("content", [rows, pairs])
@pytest.mark.parametrize(
    ("value", "kind"), [(b"x", "binary"), (["x"], "list"), ({"bytes": b"x"}, "struct")], ids=["bytes", "list", "dict"]
)
def test_what_is_no_plain_value_is_not_kept(tmp_path, content, value, kind):
    """Of whichever file."""
    write_parquet(tmp_path, [{**row, "odd": value if index % 2 else "x"} for index, row in enumerate(content())])
    with pytest.raises(ValueError, match=rf"1\.parquet: the column 'odd' holds values of type {kind}"):
        open_source(tmp_path, Columns(kept=("odd",)))


@pytest.mark.parametrize(("value", "kind"), [(["x"], "list"), ({"x": 1}, "dict")])
def test_what_is_no_plain_value_in_a_row_of_a_table_is_not_kept(tmp_path, value, kind):
    lines = [{"uid": name, "prompt": "a", "odd": value if name == "u2" else 1} for name in UIDS]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match=rf"x\.jsonl, row 3: the column 'odd' holds values of type {kind}"):
        open_source(tmp_path, Columns(kept=("odd",)))


def test_what_is_no_source_is_named(tmp_path):
    with pytest.raises(ValueError, match="there is no source"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no CSV or JSONL table"):
        open_source(tmp_path)
    for name in ("a.csv", "b.csv"):
        write_csv(tmp_path / name)
    with pytest.raises(ValueError, match=r"more than one .* a\.csv b\.csv; .*--prompts_table"):
        open_source(tmp_path)
    (tmp_path / "x.txt").touch()
    with pytest.raises(ValueError, match="no table of prompts"):
        open_source(tmp_path, table=tmp_path / "x.txt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.parquet", b"PAR1 but no more", r"x\.parquet cannot be read"),
        ("x.arrow", b"\xff\xff\xff\xff no more", r"x\.arrow cannot be read"),
        ("x.jsonl", b'{"uid": "a", "prompt": "b"}\n{"uid"', r"x\.jsonl, line 2: not valid JSON"),
        ("x.jsonl", b"[1, 2]\n", r"line 1: each line must be a JSON object"),
        ("x.csv", "uid,prompt\na,caf\u00e9\n".encode("latin-1"), r"not UTF-8 text \(byte 16\)"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(open_source(tmp_path).pictures({"a": None}))
