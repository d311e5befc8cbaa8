import json
import shutil

import datasets
import pytest
from PIL import Image

from finetune.pool import fingerprint, open_pool


def test_a_folder_and_the_same_as_a_data_set_hold_the_same_pictures(write_pictures, tmp_path):
    folder = write_pictures(tmp_path / "pictures", uid=list("abcdef"))
    pool = open_pool(folder)
    rows = [
        {"picture": {"bytes": pool.read(place), "path": None}, "prompt": entry.prompt, "uid": entry.columns["uid"]}
        for place, entry in enumerate(pool.entries)
    ]
    features = datasets.Features(
        {"picture": datasets.Image(), "prompt": datasets.Value("string"), "uid": datasets.Value("string")}
    )
    saved = datasets.Dataset.from_list(rows, features=features)
    saved.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"dev": saved}).save_to_disk(str(tmp_path / "dict"))
    (tmp_path / "parquet").mkdir()
    saved.to_parquet(str(tmp_path / "parquet" / "0.parquet"))
    for name, split in (("saved", "train"), ("dict", "dev"), ("parquet", "train")):
        other = open_pool(tmp_path / name, split=split)
        assert [(entry.prompt, entry.columns) for entry in other.entries] == [
            (entry.prompt, entry.columns) for entry in pool.entries
        ]
        assert [other.read(place) for place in range(6)] == [pool.read(place) for place in range(6)]
    with pytest.raises(ValueError, match="no split 'train'; it has dev"):
        open_pool(tmp_path / "dict")


def test_a_fingerprint_stays_with_a_copy_and_tells_an_exchanged_picture(write_pictures, tmp_path):
    folder = write_pictures(tmp_path / "pictures")
    copied = shutil.copytree(folder, tmp_path / "copied", copy_function=shutil.copy)
    first = fingerprint(open_pool(folder))
    assert fingerprint(open_pool(copied)) == first
    pool = open_pool(copied)
    Image.new("RGB", (31, 7)).save(pool.place / pool.entries[0].name)
    assert fingerprint(open_pool(copied)) != first


def parquet(file, prompt, count=2):
    file.parent.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = [{"image": Image.new("RGB", (8, 8)), "text": prompt}] * count
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(file))


def test_splits_of_parquet_files_are_told_by_their_names(tmp_path):
    data = tmp_path / "hub" / "data"
    for split in ("train", "validation_unique"):
        for shard in range(2):
            parquet(data / f"{split}-{shard:05d}-of-00002-0a1b.parquet", f"{split} {shard}")
    parquet(tmp_path / "hub" / "default" / "test" / "0000.parquet", "by its folder")
    parquet(tmp_path / "hub" / "dev.parquet", "by its stem")
    for split, expected in (
        ("train", ["train 0"] * 2 + ["train 1"] * 2),
        ("validation_unique", ["validation_unique 0"] * 2 + ["validation_unique 1"] * 2),
        ("test", ["by its folder"] * 2),
        ("dev", ["by its stem"] * 2),
    ):
        assert [entry.prompt for entry in open_pool(tmp_path / "hub", split=split).entries] == expected
    with pytest.raises(ValueError, match="hub has no split 'validation'; it has train, validation_unique, test, dev"):
        open_pool(tmp_path / "hub", split="validation")

    parquet(tmp_path / "plain" / "0.parquet", "one")
    parquet(tmp_path / "plain" / "1.parquet", "two")
    assert [entry.prompt for entry in open_pool(tmp_path / "plain").entries] == ["one", "one", "two", "two"]
    with pytest.raises(ValueError, match="plain has no split 'test'; it has train"):
        open_pool(tmp_path / "plain", split="test")


def test_stamps_of_one_split_are_not_anothers(tmp_path):
    """Rows are named by their numbers, so with one prompt only the stamps tell their pictures apart."""
    parquet(tmp_path / "train.parquet", "a red circle")
    parquet(tmp_path / "test.parquet", "a red circle")
    train, test = (open_pool(tmp_path, split=split).entries[0] for split in ("train", "test"))
    assert (train.name, train.prompt) == (test.name, test.prompt)
    assert train.stamp != test.stamp


def test_a_stamp_changes_with_its_picture(write_pictures, tmp_path):
    folder = write_pictures(tmp_path / "pictures")
    before = [entry.stamp for entry in open_pool(folder).entries]
    Image.new("RGB", (8, 8)).save(folder / "2.png")
    after = [entry.stamp for entry in open_pool(folder).entries]
    assert [place for place in range(6) if before[place] != after[place]] == [2]


def test_pictures_without_prompts(write_pictures, tmp_path):
    folder = write_pictures(tmp_path / "pictures")
    table = folder / "metadata.jsonl"
    lines = table.read_text().splitlines()
    table.write_text("\n".join(lines[:4]))
    with pytest.raises(ValueError, match=r"pictures of .* have no prompts; .*: 2 of them, 4\.png, 5\.png"):
        open_pool(folder)
    table.write_text("\n".join([*lines[:5], json.dumps({"file_name": "5.png", "text": "  "})]))
    with pytest.raises(ValueError, match=r"says no prompts \(column text\) of some pictures: 1 of them, 5\.png"):
        open_pool(folder)
    table.write_text("\n".join([*lines[:5], json.dumps({"file_name": "5.png", "text": "a cat \ud83d"})]))
    with pytest.raises(ValueError, match=r"has prompts \(column text\) with half a character.*: 1 of them, 5\.png"):
        open_pool(folder)
    table.unlink()
    with pytest.raises(ValueError, match=r'6 pictures of .* have no prompts: write a metadata\.jsonl .*"0\.png"'):
        open_pool(folder)


def test_tables_that_do_not_fit_their_folder(write_pictures, tmp_path):
    folder = write_pictures(tmp_path / "pictures")
    table = folder / "metadata.jsonl"
    lines = table.read_text().splitlines()
    for more, message in (
        (lines[0], "names pictures twice: 1 of them, 0.png"),
        (json.dumps({"file_name": "gone.png", "text": "a"}), "that are not there: 1 of them, gone.png"),
        (json.dumps({"file_name": "../prompts.txt", "text": "a"}), "outside its folder"),
    ):
        table.write_text("\n".join([*lines, more]))
        with pytest.raises(ValueError, match=message):
            open_pool(folder)
    table.write_text("\n".join(lines))
    with pytest.raises(ValueError, match="no column description, only file_name, text; name the column"):
        open_pool(folder, prompt_column="description")


def test_no_pool_at_all(tmp_path):
    with pytest.raises(ValueError, match="there is no folder of pictures"):
        open_pool(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no pictures"):
        open_pool(tmp_path)
