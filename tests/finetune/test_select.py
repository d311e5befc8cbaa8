"""The real command, on a tiny pipeline and a tiny predictor."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image

from finetune import generate, select
from reward.model import RahfModel
from reward.predict import RichFeedbackPredictor
from tests.finetune.select_case import command, files_of, flags, lines_of

ROOT = Path(__file__).parents[2]


def test_from_prompts_to_an_image_folder(drawn, tmp_path, capsys):
    assert command(*flags(**drawn)) == 0
    said = capsys.readouterr().out
    for phrase in ("drawing 6 pictures", "predicting", "best of each prompt", "3 of 6 pictures kept"):
        assert phrase in said
    chosen = tmp_path / "chosen"
    report = json.loads((chosen / "selection.json").read_text())
    assert report["rules"] == [
        {"name": "best", "rule": "the best of each prompt by overall", "of": 6, "kept": 3},
    ]
    assert report["means"]["overall"]["kept"] > report["means"]["overall"]["all"]
    for name in ("histograms.png", "kept.png", "rejected.png"):
        assert (chosen / name).stat().st_size > 1000, name
    # As diffusers' train_text_to_image scripts read it.
    loaded = datasets.load_dataset(
        "imagefolder", data_files={"train": str(chosen / "data" / "**")}, cache_dir=str(tmp_path / "cache")
    )["train"]
    assert {"image", "text", "overall"} <= set(loaded.column_names)
    assert sorted(loaded["text"][:]) == ["a blue square", "a red circle", "a red square"]
    assert loaded[0]["image"].size == (16, 16)


def test_another_rule_needs_no_new_prediction(given, monkeypatch):
    assert command(*flags(**given)) == 0
    monkeypatch.setattr(RichFeedbackPredictor, "from_pretrained", lambda *arguments: pytest.fail("predicts again"))
    given |= {"rules": {"more": {"random": 5}}, "overwrite_output_dir": True}
    assert command(*flags(**given)) == 0
    report = json.loads((given["output_dir"] / "selection.json").read_text())
    assert (report["kept"], report["pictures"]) == (5, 6)


def test_no_rules_keep_everything_and_the_pools_own_columns_come_along(given, write_pictures, tmp_path, caplog):
    rows = {
        "uid": list("abcdef"), "rating": [1.0, 2.0, float("nan"), 4.0, 5.0, 6.0], "overall": [0] * 6,
        "mask_file_name": ["m.png"] * 6, "notes": [[float("nan")]] * 6,
    }  # fmt: skip
    pictures = write_pictures(tmp_path / "rated", **rows)
    assert command(*flags(**given | {"pictures": pictures, "rules": {}})) == 0
    lines = [json.loads(line) for line in lines_of(given["output_dir"] / "data")]
    assert [line["uid"] for line in lines] == list("abcdef")
    assert [line["rating"] for line in lines] == [1.0, 2.0, None, 4.0, 5.0, 6.0]
    assert all(0 < line["overall"] < 1 for line in lines)  # the predictor's
    assert not any({"mask_file_name", "notes"} & line.keys() for line in lines)
    for name, why in (
        ("overall", "the selection has a column of that name; rename yours"),
        ("mask_file_name", "`datasets` would look for these files"),
        ("notes", "JSON cannot hold it"),
    ):
        assert f"the column {name} of {pictures} is left out of the selection: {why}" in caplog.text
    report = json.loads((given["output_dir"] / "selection.json").read_text())
    assert report["rules"] == [{"name": "all", "rule": "every picture", "of": 6, "kept": 6}]
    loaded = datasets.load_dataset(
        "imagefolder", data_files={"train": str(given["output_dir"] / "data" / "**")}, cache_dir=str(tmp_path / "cache")
    )["train"]
    assert loaded["rating"][:2] == [1.0, 2.0]


def test_pictures_whose_names_would_become_one_are_kept_apart(given):
    for number in range(3, 6):
        (given["pictures"] / f"{number}.png").unlink()
    lines = [{"file_name": name, "text": "a red circle"} for name in ("a", "a.png", "b.png")]
    for line, number in zip(lines, range(3), strict=True):
        (given["pictures"] / f"{number}.png").rename(given["pictures"] / line["file_name"])
    (given["pictures"] / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert command(*flags(**given)) == 0
    data = given["output_dir"] / "data"
    names = [json.loads(line)["file_name"] for line in (data / "metadata.jsonl").read_text().splitlines()]
    assert sorted(names) == ["a-2.png", "a.png", "b.png"]
    chosen = {(data / name).read_bytes() for name in names}
    assert chosen == {(given["pictures"] / line["file_name"]).read_bytes() for line in lines}
    assert len(select.open_pool(data).entries) == 3


def test_a_folder_with_a_table_has_no_splits(given, caplog):
    assert command(*flags(**given, split="test")) == 0
    assert f"split test is ignored: {given['pictures']} is a folder of pictures with a table" in caplog.text


def test_two_processes_of_the_command_leave_what_one_leaves(drawn, tmp_path):
    assert command(*flags(**drawn)) == 0
    two = drawn | {"pictures": tmp_path / "two_pool", "output_dir": tmp_path / "two"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launcher, "-m", "finetune.select", *map(str, flags(**two))],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert files_of(two["pictures"]) == files_of(drawn["pictures"])
    one, other = (sorted((folder / "data").rglob("*.png")) for folder in (drawn["output_dir"], two["output_dir"]))
    assert [file.name for file in one] == [file.name for file in other]
    assert [file.read_bytes() for file in one] == [file.read_bytes() for file in other]
    assert len(one) > 0


def test_what_is_written_is_what_was_judged(given):
    """A transparent pixel is judged on white; a trainer that drops the alpha channel would see what is under it."""
    hidden = np.zeros((16, 16, 4), dtype=np.uint8)
    hidden[..., 0] = 200
    Image.fromarray(hidden).save(given["pictures"] / "0.png")
    plain = (given["pictures"] / "1.png").read_bytes()
    assert command(*flags(**given | {"rules": {"all": {"score": "overall", "at_least": 0.0}}})) == 0
    data = given["output_dir"] / "data"
    assert np.array_equal(np.asarray(Image.open(data / "0.png")), np.full((16, 16, 3), 255))
    assert (data / "1.png").read_bytes() == plain


def test_an_empty_selection_keeps_the_last_one(given, capsys):
    assert command(*flags(**given)) == 0
    before = (given["output_dir"] / "selection.json").read_bytes()
    given |= {"rules": {"strict": {"score": "overall", "at_least": 2}}, "overwrite_output_dir": True}
    assert command(*flags(**given)) == 2
    assert "no picture is left: the rule `strict` (overall at least 2) removed the last 6" in capsys.readouterr().err
    assert (given["output_dir"] / "selection.json").read_bytes() == before


def test_other_mistakes(given, drawn, capsys, tmp_path):
    (tmp_path / "flux").mkdir()
    (tmp_path / "flux" / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    for settings, message in (
        (given | {"rules": {"r": {"score": "overal", "at_least": 1}}}, "nearest name: `overall`"),
        (given | {"colour": 1}, "unknown setting on the command line: `--colour`"),
        (given | {"pictures": tmp_path / "none"}, "there is no folder of pictures"),
        (given | {"model": tmp_path / "none"}, "there is no model folder"),
        (given | {"output_dir": tmp_path / "full"}, "holds other files; give another --output_dir"),
        (given | {"num_examples": 0}, "num_examples is 0; it must be at least 1"),
        (drawn | {"policy": tmp_path / "flux"}, "is a FluxPipeline; what works here is StableDiffusionPipeline"),
        (drawn | {"num_generations": 0}, "num_generations is 0"),
        (drawn | {"prompts": tmp_path / "none.txt"}, "cannot read the prompt file"),
        (drawn | {"num_inference_steps": 2000}, "it must lie between 1 and 1000"),
    ):
        assert command(*flags(**settings)) == 2
        assert message in capsys.readouterr().err
    assert not drawn["pictures"].exists()
    assert command(*flags(**given)) == 0
    assert command(*flags(**given)) == 2
    assert "holds a selection; give another --output_dir, or --overwrite_output_dir true" in capsys.readouterr().err


def test_settings_of_drawing_are_ignored_where_nothing_is_drawn(given, caplog):
    assert command(*flags(**given, seed=3)) == 0
    assert "seed=3 is ignored: there is no policy" in caplog.text


@pytest.mark.parametrize("name", ["tinyworld", "sd15", "sdxl"])
def test_presets_are_valid(name):
    path = str(ROOT / f"configs/select_{name}.yaml")
    lines = Path(path).read_text().splitlines()
    assert all(line.startswith("# ") for line in lines[:3])
    assert f"--config configs/select_{name}.yaml" in lines[0]
    arguments, generation = select.parse_arguments(
        [select.SelectArguments, generate.GenerationArguments], ["--config", path]
    )
    assert generation.num_generations == 8
    assert len(select.read_rules(arguments.rules)) == len(yaml.safe_load(Path(path).read_text())["rules"])


def test_pictures_and_selection_in_one_another_are_refused_and_nothing_is_lost(given, drawn, tmp_path, capsys):
    around = tmp_path / "pictures"
    for settings in (
        drawn | {"pictures": tmp_path / "chosen" / "pool"},
        drawn | {"pictures": tmp_path / "chosen"},
        drawn | {"feedback_dir": tmp_path / "chosen" / "feedback"},
        given | {"output_dir": tmp_path / "pictures_feedback"},
        given | {"output_dir": around / "chosen"},
        given | {"output_dir": around / ".." / "pictures", "overwrite_output_dir": True},
    ):
        assert command(*flags(**settings)) == 2
        assert "lies in or around the pictures" in capsys.readouterr().err
    assert len(files_of(around)) == 7
    assert not any((tmp_path / name).exists() for name in ("chosen", "pool", "pictures_feedback"))


def test_overwriting_a_selection_leaves_what_else_is_in_its_folder(given):
    assert command(*flags(**given)) == 0
    lora = given["output_dir"] / "sft_run" / "lora.safetensors"
    lora.parent.mkdir()
    lora.write_text("hours of training")
    given |= {"rules": {"all": {"random": 6}}, "overwrite_output_dir": True}
    assert command(*flags(**given)) == 0
    assert lora.read_text() == "hours of training"
    names = {path.name for path in given["output_dir"].iterdir()}
    assert names == {"data", "selection.json", "kept.png", "sft_run"}  # none is rejected now
    assert len(list((given["output_dir"] / "data").glob("*.png"))) == 6


def test_rules_on_words_need_a_predictor_of_words(given, make_config, capsys):
    RahfModel(make_config(words="none")).save_pretrained(given["model"])
    for rule in (
        {"misaligned": 0},
        {"any": [{"random": 3}, {"misaligned": 2}]},
        {"quantile": {"overall": 1, "misaligned_words": -1}, "at_least": 0.5},
    ):
        assert command(*flags(**given | {"rules": {"all": {"random": 6}, "words": rule}})) == 2
        assert "rules: `words` asks for misaligned words, but the predictor" in capsys.readouterr().err
    assert command(*flags(**given)) == 0
