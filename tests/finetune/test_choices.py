import io

import datasets
import pytest
from PIL import Image

from finetune.choices import open_choices


def png(value):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value,) * 3).save(buffer, format="PNG")
    return buffer.getvalue()


def write(file, caption, labels, **columns):
    file.parent.mkdir(parents=True, exist_ok=True)
    count = len(labels)
    rows = {"jpg_0": [png(9)] * count, "jpg_1": [png(5)] * count, "caption": [caption] * count, "label_0": labels}
    datasets.Dataset.from_dict(rows | columns).to_parquet(str(file))


def test_a_split_is_that_of_the_files_names(tmp_path):
    write(tmp_path / "data" / "train-00000-of-00001.parquet", "train", [1.0, 0.0])
    write(tmp_path / "data" / "test_unique-00000-of-00001.parquet", "test", [0.0])
    assert open_choices(tmp_path).captions == ["train", "train"]
    found = open_choices(tmp_path, split="test_unique")
    assert (found.captions, found.first) == (["test"], [False])
    with pytest.raises(ValueError, match="has no split 'test'; it has test_unique, train"):
        open_choices(tmp_path, split="test")


def test_pairs_that_nobody_judged_are_no_choices(tmp_path, caplog):
    write(tmp_path / "0.parquet", "a", [0.0, 1.0, None, 0.5, 0.0], has_label=[False, True, False, True, True])
    found = open_choices(tmp_path)
    assert (found.places, found.first) == ([1, 4], [True, False])
    assert "2 of 5 pairs of" in caplog.text
    assert "are left out: nobody judged them" in caplog.text
    write(tmp_path / "0.parquet", "a", [0.0], has_label=[False])
    with pytest.raises(ValueError, match="holds no pair of which one picture was chosen"):
        open_choices(tmp_path)
