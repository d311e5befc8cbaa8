"""The command, from an independent writer's records and each kind of source to a data set that loads."""

import io
import json
from dataclasses import replace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict, Features, Value, load_from_disk
from datasets import Image as ImageFeature
from PIL import Image

from reward import evaluate, richhf
from reward.records import SPLITS, read_tfrecords, write_tfrecords
from tests.reward import by_hand


def run(raw_data, *flags, images="images", out="out"):
    places = {"--tfrecords": "tfrecords", "--images": images, "--out": out}
    richhf.main([word for flag, name in places.items() for word in (flag, str(raw_data / name))] + list(flags))
    return load_from_disk(str(raw_data / out))


def one_a_row(raw_data):
    """The pictures of `raw_data` with their uids and captions."""
    rows = []
    for path in sorted((raw_data / "images").glob("*.parquet")):
        for row in pyarrow.parquet.read_table(path).to_pylist():
            for side in "01":
                if not row[f"image_{side}_uid"].startswith("other"):
                    rows.append((row[f"image_{side}_uid"], row[f"jpg_{side}"], row["caption"]))
    return rows


def as_pairs_saved(raw_data):
    rows = pyarrow.parquet.read_table(raw_data / "images").to_pylist()
    Dataset.from_list(rows).save_to_disk(str(raw_data / "source"))
    return []


def as_rows_saved(raw_data):
    uids, images, texts = zip(*one_a_row(raw_data), strict=True)
    pictures = [{"bytes": data, "path": None} for data in images]
    features = Features({"key": Value("string"), "picture": ImageFeature(), "text": Value("string")})
    data = Dataset.from_dict({"key": uids, "picture": pictures, "text": texts}, features=features)
    DatasetDict({"all": data}).save_to_disk(str(raw_data / "source"))
    return ["--uid_column", "key", "--image_column", "picture", "--prompt_column", "text"]


def as_rows_in_parquet(raw_data):
    rows = [{"uid": uid, "image": {"bytes": data}, "prompt": text} for uid, data, text in one_a_row(raw_data)]
    (raw_data / "source").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), raw_data / "source" / "0.parquet", row_group_size=5)
    return []


def as_folder(raw_data):
    (raw_data / "source").mkdir()
    lines = []
    for uid, data, text in one_a_row(raw_data):
        (raw_data / "source" / f"{uid}.png").write_bytes(data)
        lines.append(json.dumps({"uid": uid, "prompt": text}))
    (raw_data / "prompts.jsonl").write_text("\n".join(lines))
    return ["--prompts_table", str(raw_data / "prompts.jsonl")]


def check_whole(raw_data, data):
    assert {name: len(split) for name, split in data.items()} == {"train": 12, "dev": 6, "test": 6}
    pictures = {uid: (data, text) for uid, data, text in one_a_row(raw_data)}
    for name in SPLITS:
        assert data[name].features == richhf.FEATURES
        records = {record.uid: record for record in read_tfrecords(raw_data / "tfrecords" / f"{name}.tfrecord")}
        for row in data[name]:
            record = records.pop(row["uid"])
            picture, text = pictures[row["uid"]]
            assert row["prompt"] == text
            assert row["keyword_labels"] == record.labels
            assert len(row["tokens"]) == len(record.labels)
            assert row["overall"] == record.scores["overall"]
            assert np.array_equal(np.array(row["image"]), np.array(Image.open(io.BytesIO(picture))))
            true = np.array(Image.open(io.BytesIO(record.maps["implausibility"])))
            assert np.array_equal(np.array(row["implausibility_map"]), true)
        assert not records
    assert not [path for path in raw_data.iterdir() if path.name.startswith(".")]  # nothing unfinished is left


def test_the_command_joins_records_and_pick_a_pic(raw_data, capsys):
    data = run(raw_data, "--strict")
    check_whole(raw_data, data)
    assert len({split._fingerprint for split in data.values()}) == 3
    said = capsys.readouterr()
    assert "source: Pick-a-Pic v1, two pictures a row: 2 parquet files" in said.err
    assert "dev: 6 records read, 6 joined, 0 dropped" in said.out


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (as_pairs_saved, "Pick-a-Pic v1"),
        (as_rows_saved, "one picture a row (columns key, picture, text): 1 arrow file"),
        (as_rows_in_parquet, "one picture a row (columns uid, image, prompt): 1 parquet file"),
        (as_folder, "a folder of pictures"),
    ],
)
def test_every_source_gives_the_same_data(raw_data, make, said, capsys):
    flags = make(raw_data)
    capsys.readouterr()
    check_whole(raw_data, run(raw_data, *flags, "--strict", images="source"))
    assert said in capsys.readouterr().err


def test_what_was_written_can_be_worked_with(raw_data):
    data = run(raw_data)
    assert data["train"].map(lambda row: {"words": len(row["tokens"])})["words"][:3] == [
        len(tokens) for tokens in data["train"]["tokens"][:3]
    ]
    again = data["train"].shuffle(seed=0).select(range(5))
    assert again[0]["image"].size == (48, 40)


def test_the_command_refuses_a_folder_in_use(raw_data):
    run(raw_data)
    with pytest.raises(ValueError, match="not empty"):
        run(raw_data)


def spoil(raw_data, picture_bytes):
    """Every kind of flaw, one or more of each, in 12 + 6 + 6 records; what is left is 5 + 5 + 5."""
    folder = raw_data / "tfrecords"
    train = list(read_tfrecords(folder / "train.tfrecord"))
    frames = [by_hand.frame(by_hand.example(record)) for record in train]
    frames[0] = frames[0][:-1] + bytes([frames[0][-1] ^ 1])
    frames[1] = by_hand.frame(by_hand.example(train[1], scores={"overall": 2.0}))
    frames[2] = by_hand.frame(by_hand.example(train[2], without=["overall_score"]))
    frames[3] = by_hand.frame(by_hand.example(replace(train[3], labels=[1])))
    frames[4] = by_hand.frame(by_hand.example(replace(train[4], maps={**train[4].maps, "misalignment": b"no map"})))
    frames[5] = frames[6]  # two records of one uid
    frames[11] = frames[11][:-9]
    (folder / "train.tfrecord").write_bytes(b"".join(frames))
    first, *others = read_tfrecords(folder / "dev.tfrecord")
    missing = [replace(first, filename=f"dev/nowhere-{index}.png") for index in range(7)]
    write_tfrecords(folder / "dev.tfrecord", [*missing, *others])
    rows = pyarrow.parquet.read_table(raw_data / "images").to_pylist()
    for row in rows:
        for side in "01":
            if row[f"image_{side}_uid"] == "test-0":
                row[f"jpg_{side}"] = row[f"jpg_{side}"][:500]
            if row[f"image_{side}_uid"] == "train-7":
                row["caption"] = ' "," '
    for path in (raw_data / "images").glob("*.parquet"):
        path.unlink()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), raw_data / "images" / "0.parquet")
    return rows


def test_what_is_dropped_is_reported_with_reason_and_uid(raw_data, picture_bytes, capsys):
    spoil(raw_data, picture_bytes)
    data = run(raw_data)
    assert {name: len(split) for name, split in data.items()} == {"train": 4, "dev": 5, "test": 5}
    assert sorted(data["train"]["uid"]) == ["train-10", "train-6", "train-8", "train-9"]
    said = capsys.readouterr().out
    for line in (
        "train: 12 records read, 4 joined, 8 dropped",
        "1: checksum wrong (record 0)",
        "1: labels out of range (train-1)",
        "1: field missing or malformed (train-2)",
        "1: label count unlike token count (train-3)",
        "1: map does not decode (train-4)",
        "1: uid met before (train-6)",
        "1: prompt missing or empty (train-7)",
        "1: cut off by the end of the file (record 11)",
        "dev: 12 records read, 5 joined, 7 dropped",
        "7: no picture in the source (nowhere-0, nowhere-1, nowhere-2, nowhere-3, nowhere-4, ...)",
        "test: 6 records read, 5 joined, 1 dropped",
        "1: picture does not decode (test-0)",
    ):
        assert line in said


def test_strict_drops_nothing_and_leaves_nothing(raw_data, picture_bytes):
    before = sorted(raw_data.iterdir())
    path = raw_data / "tfrecords" / "dev.tfrecord"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"(?s)--strict.*cut off by the end of the file \(record 5\)"):
        run(raw_data, "--strict")
    write_tfrecords(path, [replace(record, labels=[1] * 9) for record in list(read_tfrecords_before(path))])
    with pytest.raises(ValueError, match=r"(?s)--strict.*label count unlike token count"):
        run(raw_data, "--strict")
    assert sorted(raw_data.iterdir()) == before


def read_tfrecords_before(path):
    """The sound records before the damage."""
    reader = read_tfrecords(path)
    try:
        yield from reader
    except ValueError:
        return


def test_a_sound_copy_of_a_damaged_picture_serves(raw_data, picture_bytes):
    rows = spoil(raw_data, picture_bytes)
    spare = picture_bytes(np.zeros((4, 4, 3), np.uint8))
    copy = {"image_0_uid": "x", "image_1_uid": "test-0", "jpg_0": b"", "jpg_1": spare, "caption": "A red circle."}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([*rows, copy]), raw_data / "images" / "0.parquet")
    data = run(raw_data)
    (found,) = (row for row in data["test"] if row["uid"] == "test-0")
    assert found["image"].size == (4, 4)


def test_pictures_of_other_modes_arrive_as_rgb(raw_data):
    flags = as_folder(raw_data)
    wide = Image.fromarray(np.full((1, 1), 25700, np.uint16))
    clear = Image.new("RGBA", (9, 9), (255, 0, 0, 0))
    for uid, image in (("test-0", wide), ("test-1", clear)):
        image.save(raw_data / "source" / f"{uid}.png")
    Image.new("CMYK", (8, 8)).save(raw_data / "source" / "test-2.jpg")
    (raw_data / "source" / "test-2.png").unlink()
    data = run(raw_data, *flags, "--strict", images="source")
    rows = {row["uid"]: np.array(row["image"].convert("RGB")) for row in data["test"]}
    assert rows["test-0"].tolist() == [[[100] * 3]]
    assert (rows["test-1"] == 255).all()
    assert rows["test-2"].shape == (8, 8, 3)
    assert rows["test-2"].min() > 245


def test_sources_without_the_pictures_are_named(raw_data):
    content = {"image_0_uid": ["a"], "image_1_uid": ["b"], "jpg_0": [b""], "jpg_1": [b""], "caption": ["c"]}
    (raw_data / "others").mkdir()
    pyarrow.parquet.write_table(pyarrow.table(content), raw_data / "others" / "x.parquet")
    with pytest.raises(ValueError, match=r"(?s)no record could be joined.*12: no picture in the source"):
        run(raw_data, images="others")
    assert not (raw_data / "out").exists()


def test_a_file_of_which_nothing_is_left_is_an_error(raw_data):
    for content, message in ((b"", "no record that can be used"), (b"not TFRecords at all", "is no TFRecord file")):
        (raw_data / "tfrecords" / "dev.tfrecord").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            run(raw_data)
    assert not (raw_data / "out").exists()


def test_a_card_lies_beside_the_data(raw_data):
    data = run(raw_data, "--card")
    check_whole(raw_data, data)
    text = (raw_data / "out" / "README.md").read_text()
    assert "| examples | 12 | 6 | 6 |" in text
    assert "    train: 12 records read, 12 joined, 0 dropped" in text
    for name in ("card_statistics.png", "card_examples.png"):
        assert name in text
        with Image.open(raw_data / "out" / name) as image:
            assert min(image.size) > 300


MODELS = {"train": "SD 1.5", "dev": None, "test": "XL"}


def facts(uid):
    """What a source may say of a picture besides its prompt."""
    split, number = uid.split("-")
    return {"model": MODELS[split], "round": int(number) % 2, "tags": ["a", "b"]}


def pairs_with_facts(raw_data):
    """Each picture of a pair has its own model; the rest is common to both."""
    for path in (raw_data / "images").iterdir():
        rows = pyarrow.parquet.read_table(path).to_pylist()
        for row in rows:
            (side,) = (side for side in "01" if not row[f"image_{side}_uid"].startswith("other"))
            row |= facts(row[f"image_{side}_uid"])
            row |= {"model_0": "nobody's", "model_1": "nobody's", f"model_{side}": row.pop("model")}
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=4)
    return ["images"]


def rows_with_facts(raw_data):
    rows = [
        {"uid": uid, "image": {"bytes": data}, "prompt": text, **facts(uid)} for uid, data, text in one_a_row(raw_data)
    ]
    Dataset.from_list(rows).save_to_disk(str(raw_data / "source"))
    return ["source"]


def folder_with_facts(raw_data):
    """Where there is no model, the row has no such key; so it is with the first one."""
    flags = as_folder(raw_data)
    table = raw_data / "prompts.jsonl"
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    rows = [row | {key: value for key, value in facts(row["uid"]).items() if value is not None} for row in rows]
    table.write_text("\n".join(json.dumps(row) for row in sorted(rows, key=lambda row: row["uid"])))
    assert "model" not in json.loads(table.read_text().splitlines()[0])
    return ["source", *flags]


@pytest.fixture(params=[pairs_with_facts, rows_with_facts, folder_with_facts])
def run_with_facts(raw_data, request):
    """`run`, given further flags, on a source of each kind that has the columns of `facts`."""
    images, *flags = request.param(raw_data)
    return lambda *more: run(raw_data, *flags, *more, images=images)


def test_columns_are_kept_as_text(run_with_facts):
    data = run_with_facts("--keep_columns", "round", "model", "--strict", "--card")
    kept = {"round": Value("string"), "model": Value("string")}
    for name, split in data.items():
        assert split.features == Features({**richhf.FEATURES, **kept})
        assert len(split) == {"train": 12, "dev": 6, "test": 6}[name]
        assert set(split["model"]) == {MODELS[name] or ""}
        assert split["round"][:] == [str(facts(uid)["round"]) for uid in split["uid"]]


def test_nothing_is_kept_unasked(run_with_facts, raw_data):
    check_whole(raw_data, run_with_facts("--strict"))


def test_kept_columns_can_be_grouped_by(run_with_facts, raw_data):
    split = run_with_facts("--keep_columns", "round")["test"]
    found = evaluate.groups(split, evaluate.EvaluateArguments("model", str(raw_data / "out"), group_by="round"))
    uids = {name: {split["uid"][place] for place in places} for name, places in found.items()}
    even, odd = {"test-0", "test-2", "test-4"}, {"test-1", "test-3", "test-5"}
    assert uids == {"all": even | odd, "round = 0": even, "round = 1": odd}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model", "author"], r"lacks the columns author of --keep_columns; it has .*\bround, .*"),
        (["tags"], r"the column 'tags' holds values of type list.*; only plain ones"),
        (["model", "prompt", "overall"], r"names prompt, overall, .* columns of its own .*\(uid, image, prompt, .*"),
        (["model", "round", "model"], "keep_columns names model more than once"),
    ],
    ids=["not there", "no plain values", "the data set's own", "twice"],
)
def test_columns_that_cannot_be_kept(run_with_facts, raw_data, names, message, monkeypatch):
    """It is told before any record is read."""
    monkeypatch.setattr(richhf, "build", lambda *_, **__: pytest.fail("the records are read"))
    with pytest.raises(ValueError, match=message):
        run_with_facts("--keep_columns", *names)
    assert not (raw_data / "out").exists()
