"""The folder of the ceiling: made by the command, read by the predictor's evaluation."""

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, load_from_disk
from PIL import Image

from reward.data import resize_maps, to_tensor
from reward.feedback import HEATMAPS, SCORES
from reward.fresh_raters import load_fresh_raters
from tinyworld import fresh_raters
from tinyworld.judge import judge
from tinyworld.rated import write_pictures
from tinyworld.raters import FEWEST, ceiling
from tinyworld.scenes import SIZE, Thing, render

CAPTIONS = ["a red circle", "a blue square"]


def picture_folder(folder):
    """Pictures of two splits: two of each caption, the second of them of the wrong colour."""
    pictures = np.stack(
        [
            render((Thing(colour, shape, 32, 32, 14),))
            for shape, colours in (("circle", ("red", "green")), ("square", ("blue", "red")))
            for colour in colours
        ]
    )
    for split in ("dev", "test"):
        write_pictures(split, CAPTIONS, pictures, folder / "pictures")
    return folder


@pytest.fixture
def folder(tmp_path):
    return picture_folder(tmp_path)


def run(folder, out, *flags):
    fresh_raters.main(["--out", str(folder / out), "--pictures", str(folder / "pictures"), *flags])
    return load_from_disk(str(folder / out))


@pytest.fixture(scope="module")
def rated_folder(tmp_path_factory):
    """Such a folder with what the command made of it in `raters`."""
    folder = picture_folder(tmp_path_factory.mktemp("rated"))
    run(folder, "raters")
    return folder


def test_rows_are_the_ceiling_of_each_picture_and_the_evaluation_reads_them(rated_folder):
    folder, rated = rated_folder, load_from_disk(str(rated_folder / "raters"))
    assert list(rated) == ["dev", "test"]
    assert rated["test"].features == fresh_raters.FEATURES
    pictures = list(fresh_raters.read_pictures(folder / "pictures" / "test.parquet"))
    assert rated["test"]["uid"][:] == [uid for uid, _, _ in pictures]
    for row, (uid, picture, caption) in zip(rated["test"], pictures, strict=True):
        top = ceiling(judge(picture, caption), 3, uid, SIZE)
        assert [row[name] for name in SCORES] == pytest.approx([top.scores[name] for name in SCORES])
        assert row["keyword_shares"] == pytest.approx(top.words.tolist())
        assert row["keyword_labels"] == list(top.labels)
        for name in HEATMAPS:
            heatmap = resize_maps(to_tensor(row[f"{name}_map"], "L")[None].float() / 255, (SIZE, SIZE))[0, 0]
            assert np.abs(heatmap.numpy() - top.maps[name]).max() <= 0.5 / 255 + 1e-6
    assert rated["test"]["alignment"][0] > rated["test"]["alignment"][1] + 0.2

    labels = {"uid": rated["test"]["uid"][:], "keyword_labels": [[0, 0, 0], [0, 1, 0]] * 2}
    data = DatasetDict({name: Dataset.from_dict(labels).shuffle(seed=1) for name in ("test",)})
    found = load_fresh_raters(folder / "raters", data, "test")
    assert found.records["uid"][:] == data["test"]["uid"][:]
    assert found.words() == data["test"]["keyword_labels"][:]


def test_the_same_again_in_other_processes_and_nothing_beside_it(rated_folder, capsys, monkeypatch):
    monkeypatch.setattr("tinyworld.rated.ALONE", 0)
    one, other = load_from_disk(str(rated_folder / "raters")), run(rated_folder, "other", "--splits", "test")
    assert list(other) == ["test"]
    for column in one["test"].column_names:
        for a, b in zip(one["test"][column], other["test"][column], strict=True):
            assert np.array_equal(a, b) if isinstance(a, Image.Image) else a == b
    assert sorted(path.name for path in rated_folder.iterdir()) == ["other", "pictures", "raters"]
    assert f"4 test pictures, each by {FEWEST} fresh raters" in capsys.readouterr().out


def test_nothing_appears_when_it_fails(folder, monkeypatch):
    def broken(*_):
        raise RuntimeError("a rater left")

    monkeypatch.setattr(fresh_raters, "rate_splits", broken)
    with pytest.raises(RuntimeError, match="a rater left"):
        run(folder, "raters")
    assert [path.name for path in folder.iterdir()] == ["pictures"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--raters", "3"], "raters must be at least 64, not 3"),
        (["--splits", "tests"], "no such splits: tests; there are train, dev, test"),
        (["--splits", "train"], r"no pictures .*train\.parquet; give --pictures"),
    ],
)
def test_wrong_settings_are_named(folder, flags, message):
    with pytest.raises(ValueError, match=message):
        run(folder, "raters", *flags)
    (folder / "raters").mkdir()
    (folder / "raters" / "mine").touch()
    with pytest.raises(ValueError, match="not empty"):
        run(folder, "raters")
