"""The problem region drawn again: whose pictures, and what may be wrong with them."""

import json
import shutil
from pathlib import Path

import datasets
import pytest

from finetune import inpaint
from finetune.inpaint_arguments import InpaintArguments
from finetune.mending import FIXED, NOTHING
from finetune.pictures_to_fix import check_source, each_once
from reward.arguments import ArgumentsError
from reward.sources import Picture
from tests.finetune.inpaint_case import arguments, command, lines, pixels


def test_a_tree_of_pictures_is_named_by_its_places(album):
    """As `finetune.select` writes it: the column is `text`, and names are those of other folders' pictures too."""
    for folder in ("x", "y"):
        (album / folder).mkdir()
        shutil.copy(album / "spot.png", album / folder / "1.png")
    for name in ("spot", "clean", "wide"):
        (album / f"{name}.png").unlink()
    rows = [json.dumps({"file_name": f"{place}/1.png", "text": "a red circle"}) for place in ("x", "./y")]
    (album / "metadata.jsonl").write_text("\n".join(rows))
    source = InpaintArguments(pipeline="unused", output_dir="unused", pictures=str(album)).source()
    assert list(check_source(source)) == ["x/1", "y/1"]


def test_pictures_without_prompts_are_named(families, album, tmp_path):
    (album / "metadata.jsonl").write_text(json.dumps({"file_name": "spot.png", "prompt": "a red circle"}))
    with pytest.raises(ValueError, match="have no prompts; give them a line in metadata"):
        inpaint.main(command(families, album, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    images = ["--images", str(album / "spot.png"), str(album / "wide.png"), "--prompts", "a red circle"]
    with pytest.raises(ValueError, match="2 images were given with 1 prompts"):
        inpaint.main(command(families, album, tmp_path / "out", source=images))


def test_a_table_whose_columns_do_not_fit_says_what_can_be_done(families, album, tmp_path):
    (album / "metadata.jsonl").unlink()
    (album / "prompts.csv").write_text("file_name,words\nspot.png,a red circle\nclean.png,a\nwide.png,a\n")
    complaint = r"has the columns file_name, words; it needs file_name .* --prompt_column"
    with pytest.raises(ValueError, match=complaint) as refused:
        inpaint.main(command(families, album, tmp_path / "out"))
    assert "--uid_column" not in str(refused.value)
    inpaint.main(command(families, album, tmp_path / "out", "--prompt_column", "words"))
    assert lines(tmp_path / "out")["spot"]["prompt"] == "a red circle"


def test_an_unreadable_picture_is_named(families, album, tmp_path):
    (album / "clean.png").write_bytes((album / "clean.png").read_bytes()[:40])
    with pytest.raises(ValueError, match="the picture clean cannot be used"):
        inpaint.main(command(families, album, tmp_path / "out"))
    nowhere = ["--images", str(album / "nowhere.png"), "--prompts", "a red circle"]
    with pytest.raises(ValueError, match="there is no picture file for nowhere"):
        inpaint.main(command(families, album, tmp_path / "out", source=nowhere))


class Rows:
    """A source of these pictures: (uid, file, prompt)."""

    def __init__(self, *rows):
        self.rows = rows

    def pictures(self, wanted):
        return (Picture(uid, Path(file).read_bytes(), prompt) for uid, file, prompt in self.rows if uid in wanted)


@pytest.mark.parametrize("uid", ["../stolen", "a/../../stolen", "/stolen", "", "nul\0"])
def test_a_name_that_leads_out_of_the_results_is_refused(album, uid):
    """A data set from elsewhere says what its pictures are called, and results are written to files of these names."""
    with pytest.raises(ValueError, match="is no file's in their folder"):
        check_source(Rows((uid, album / "spot.png", "a red circle")))
    assert list(check_source(Rows(("a/b..c", album / "spot.png", "a red circle")))) == ["a/b..c"]


def test_a_picture_of_two_pairs_is_mended_once_and_another_of_its_name_is_refused(album):
    """As Pick-a-Pic has them."""
    first, second = ("one", album / "spot.png", "a red circle"), ("two", album / "wide.png", "a red circle")
    source = Rows(first, second, first)
    assert list(check_source(source)) == ["one", "two"]
    assert [picture.uid for picture in each_once(source, {"one"})] == ["one"]
    with pytest.raises(ValueError, match="two pictures are called one"):
        check_source(Rows(first, ("one", album / "wide.png", "a red circle")))


def test_more_steps_than_the_schedule_has_delete_nothing(families, album, tmp_path):
    out = tmp_path / "out"
    inpaint.main(command(families, album, out))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    wrong = ["--num_inference_steps", "5000", "--overwrite_output_dir", "true"]
    with pytest.raises(ValueError, match="num_inference_steps is 5000; the pipeline's schedule has 1000 steps"):
        inpaint.main(command(families, album, out, *wrong))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_an_unsupported_family_is_named_with_those_that_work(families, album, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(families["sd"], other)
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    with pytest.raises(ValueError, match=r"is a FluxPipeline; what works here is StableDiffusionPipeline .*XLInpaint"):
        inpaint.main(command(families, album, tmp_path / "out", "--pipeline", str(other)))


def test_a_lora_that_is_not_there_is_refused_before_a_model_is_loaded(families, album, tmp_path, monkeypatch):
    monkeypatch.setattr(InpaintArguments, "inpainter", lambda run: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match="there is no LoRA folder nowhere"):
        inpaint.main(command(families, album, tmp_path / "out", "--base_adapters", "nowhere"))
    assert not (tmp_path / "out").exists()


def test_an_unknown_setting_and_missing_maps_are_refused(families, album, tmp_path):
    with pytest.raises(ArgumentsError, match=r"`--treshold` .nearest valid name: `thresholds`"):
        inpaint.main(command(families, album, tmp_path / "out", "--treshold", "1"))
    with pytest.raises(ValueError, match="the reward's penalty maps are none"):
        inpaint.main(command(families, album, tmp_path / "out", "--reward", "tests.finetune.inpaint_case:NoMaps"))
    assert not (tmp_path / "out").exists()


def data_set(album, **columns):
    """The album as a `datasets` data set without uids, and `columns` of three values beside."""
    names = ("spot", "clean", "wide")
    rows = {
        "picture": [{"bytes": (album / f"{name}.png").read_bytes(), "path": None} for name in names],
        "text": ["a red circle", "a blue circle", "a green circle"],
    }
    return datasets.Dataset.from_dict(rows | columns).cast_column("picture", datasets.Image())


@pytest.mark.parametrize("kind", ["parquet", "saved", "splits"])
def test_a_data_set_without_uids_is_mended_row_by_row(families, album, tmp_path, kind):
    rows, place, more = data_set(album), tmp_path / "data", []
    if kind == "parquet":
        place.mkdir()
        rows.to_parquet(str(place / "train-00000-of-00001.parquet"))
    elif kind == "saved":
        rows.save_to_disk(str(place))
    else:
        datasets.DatasetDict({"dev": rows}).save_to_disk(str(place))
        with pytest.raises(ValueError, match="no split 'train'; it has dev"):
            inpaint.main(command(families, place, tmp_path / "out"))
        more = ["--split", "dev"]
    inpaint.main(command(families, place, tmp_path / "out", *more))
    found = lines(tmp_path / "out")
    assert [(uid, row["prompt"]) for uid, row in found.items()] == [
        ("00000000", "a red circle"), ("00000001", "a blue circle"), ("00000002", "a green circle"),
    ]  # fmt: skip
    assert [row["status"] for row in found.values()] == [FIXED, NOTHING, FIXED]
    assert pixels(tmp_path / "out/pictures/00000002.png").shape == (16, 24, 3)


def test_what_a_data_set_lacks_is_named_with_options_that_there_are(families, album, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    data_set(album).rename_column("text", "words").to_parquet(str(data / "0.parquet"))
    for place, complaint in (
        (data, "no column text or prompt or caption, only picture, words; name the column by --prompt_column"),
        (data / "0.parquet", r"has no columns uid and image \(it has picture, words\).*name the folder that it is in"),
    ):
        with pytest.raises(ValueError, match=complaint) as refused:
            inpaint.main(command(families, place, tmp_path / "out"))
        assert "--uid_column" not in str(refused.value)
    inpaint.main(command(families, data, tmp_path / "out", "--prompt_column", "words"))
    assert len(lines(tmp_path / "out")) == 3


def test_a_data_set_with_uids_goes_by_them_whatever_its_prompts_are_called(families, album, tmp_path, caplog):
    data = tmp_path / "data"
    data_set(album, uid=["s", "c", "w"]).rename_column("picture", "image").save_to_disk(str(data))
    inpaint.main(command(families, data, tmp_path / "out", "--split", "test"))
    assert {uid: row["prompt"] for uid, row in lines(tmp_path / "out").items()} == {
        "s": "a red circle", "c": "a blue circle", "w": "a green circle",
    }  # fmt: skip
    assert "split='test' is ignored" in caplog.text
    with pytest.raises(ValueError, match=r"has no column of prompts words; it has .*; name it by --prompt_column"):
        inpaint.main(command(families, data, tmp_path / "other", "--prompt_column", "words"))


def test_pick_a_pics_prompts_are_in_its_own_column_and_that_is_said(album, tmp_path, caplog):
    file = tmp_path / "pairs.parquet"
    spot = (album / "spot.png").read_bytes()
    pairs = {"image_0_uid": ["a"], "image_1_uid": ["b"], "jpg_0": [spot], "jpg_1": [spot], "caption": ["a red circle"]}
    datasets.Dataset.from_dict(pairs).to_parquet(str(file))
    how = {"pictures": str(file), "images": [], "prompts": []}
    assert list(check_source(arguments(**how).source())) == ["a", "b"]
    assert "is ignored" not in caplog.text
    arguments(**how, prompt_column="words").source()
    assert "prompt_column='words' is ignored: Pick-a-Pic's prompts are in caption" in caplog.text
