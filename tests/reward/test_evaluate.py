import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets import DatasetDict, load_from_disk
from PIL import Image

from reward import evaluate, richhf
from reward.data import resize_maps, to_tensor
from reward.feedback import HEATMAPS, SCORES
from reward.metrics import heatmap_metrics, score_metrics, word_metrics
from reward.predict import RichFeedbackPredictor


@pytest.fixture
def run(data, model_folder, tmp_path):
    def run(*flags):
        paths = ["--model", str(model_folder), "--data", str(data), "--out", str(tmp_path / "report")]
        return evaluate.main([*paths, "--map_size", "32", "--draws", "20", *flags])

    return run


def row_of(report, name):
    (row,) = [row for row in report["rows"] if row["name"] == name]
    return row


def values_of(figures):
    return {metric: found["value"] for metric, found in figures.items()}


def test_report_is_what_the_metrics_say_of_the_predictor(run, data, model_folder, tmp_path, capsys):
    report = run("--batch_size", "4", "--json", str(tmp_path / "figures" / "again.json"))
    split = load_from_disk(str(data))["test"]
    predictor = RichFeedbackPredictor.from_pretrained(model_folder)
    images = torch.stack([to_tensor(image).float() / 255 for image in split["image"]])
    feedback = predictor(images, split["prompt"], heatmap_size=32)
    row = row_of(report, "predictor")
    for name in SCORES:
        expected = score_metrics(feedback.scores[name], np.array(split[name]))
        assert values_of(row["scores"][name]) == pytest.approx(expected, abs=1e-4)
        assert row["scores"][name]["plcc"]["low"] <= row["scores"][name]["plcc"]["high"]
    zero = row_of(report, "all zero")
    for name in HEATMAPS:
        true = torch.cat([to_tensor(image, "L").float()[None] / 255 for image in split[f"{name}_map"]])
        true = resize_maps(true, (32, 32))[:, 0]
        expected = heatmap_metrics(feedback.heatmaps[name], true)
        assert values_of(row["heatmaps"][name]) == pytest.approx(expected, abs=1e-4)
        assert values_of(zero["heatmaps"][name]) == pytest.approx(heatmap_metrics(torch.zeros(6, 32, 32), true))
        marked = int((true.amax((1, 2)) > 0).sum())
        counts = {metric: found["n"] for metric, found in row["heatmaps"][name].items()}
        assert (counts["mse"], counts["mse_empty"], counts["cc"]) == (6, 6 - marked, marked)
    struck = [(wrong > predictor.word_threshold).tolist() for wrong in feedback.misaligned]
    assert values_of(row["words"]) == pytest.approx(word_metrics(struck, split["keyword_labels"]))
    assert report["baselines_learned_from"] == "train"

    printed = capsys.readouterr().out
    folder = tmp_path / "report"
    assert sorted(path.name for path in folder.iterdir()) == ["report.json", "report.png", "tables.md"]
    assert json.loads((folder / "report.json").read_text()) == report
    assert (tmp_path / "figures" / "again.json").read_text() == (folder / "report.json").read_text()
    assert (folder / "tables.md").read_text() in printed
    with Image.open(folder / "report.png") as sheet:
        assert np.array(sheet.convert("L")).std() > 10


def test_words_that_the_model_does_not_see_are_named_and_not_counted(run, data, model, model_folder, caplog):
    """As in training, whoever speaks of them: of the test split's prompts, of 3, 7 and 1 words, it sees 3 words."""
    model.config.max_text_length = 4  # the end mark is one
    model.config.save_pretrained(model_folder)
    with pytest.warns(UserWarning, match="are not read"):
        report = run()
    assert "8 words of 2 prompts are not read" in caplog.text
    assert "they are not counted" in caplog.text
    labels = [words[:3] for words in load_from_disk(str(data))["test"]["keyword_labels"]]
    expected = word_metrics([[1] * len(words) for words in labels], labels)
    assert values_of(row_of(report, "constant")["words"]) == pytest.approx(expected)


def test_baselines_look_at_nothing(run):
    report = run()
    assert any("one map (the training maps' mean)" in line for line in report["notes"])
    assert not any("left out" in line for line in report["notes"])
    constant = row_of(report, "constant")
    assert values_of(constant["scores"]["overall"]) == {"plcc": 0.0, "srcc": 0.0}
    assert constant["words"]["recall"]["value"] == 1.0
    assert 0 < constant["words"]["precision"]["value"] < 1
    flat = constant["heatmaps"]["implausibility"]
    assert [flat[metric]["value"] for metric in ("cc", "nss", "auc_judd")] == [0, 0, 0.5]
    for name in ("mean map", "centre prior"):
        row = row_of(report, name)
        assert (row["scores"], row["words"]) == ({}, {})
        assert row["heatmaps"]["implausibility"]["mse"]["value"] > 0


@pytest.mark.parametrize("split", ["train", "test", "test, train empty"])
def test_no_baseline_learns_from_what_it_is_judged_on(run, data, raw_data, tmp_path, caplog, split):
    """Where the train split is what is evaluated, and where there is none, or one of which no picture was there."""
    if split == "test, train empty":
        (raw_data / "some").mkdir()
        table = pyarrow.parquet.read_table(raw_data / "images")
        tested = [uid.startswith(("test", "other-test")) for uid in table["image_0_uid"].to_pylist()]
        pyarrow.parquet.write_table(table.filter(pyarrow.array(tested)), raw_data / "some" / "0.parquet")
        places = ["--tfrecords", raw_data / "tfrecords", "--images", raw_data / "some", "--out", tmp_path / "test_only"]
        richhf.main([str(place) for place in places])
        assert len(load_from_disk(str(tmp_path / "test_only"))["train"]) == 0
    elif split == "test":
        other = DatasetDict({"test": load_from_disk(str(data))["test"]})
        other.save_to_disk(str(tmp_path / "test_only"))
    report = run("--split", "train") if split == "train" else run("--data", str(tmp_path / "test_only"))
    assert report["baselines_learned_from"] is None
    names = {row["name"] for row in report["rows"] if row["kind"] == "baseline"}
    assert names == {"all zero", "constant"}
    constant = row_of(report, "constant")
    assert constant["heatmaps"] == {}
    assert (constant["scores"]["overall"]["srcc"]["value"], constant["words"]["recall"]["value"]) == (0, 1)
    said = [line for line in report["notes"] if "'mean map' and 'centre prior' are left out" in line]
    assert len(said) == 1
    assert not any("training maps' mean" in line for line in report["notes"])
    text = (tmp_path / "report" / "tables.md").read_text()
    assert all(f"\n- {line}\n" in text for line in report["notes"])
    assert not any(f"| {name} |" in text for name in ("mean map", "centre prior"))
    assert text.count("| constant |") == 2  # scores and words
    assert text.count("| all zero |") == 2  # both heatmaps
    assert caplog.text.count("learned from the train split are left out") == 1


def test_groups_are_reported_apart(run, tmp_path):
    (tmp_path / "listed.txt").write_text("a red circle\n\nRED\na blue square left of a circle\n")
    report = run("--group_prompts", str(tmp_path / "listed.txt"))
    assert row_of(report, "predictor, listed prompts")["n"] == 2
    assert row_of(report, "predictor, other prompts")["n"] == 4
    report = run("--group-by", "prompt", "--split", "dev")
    assert row_of(report, "predictor, prompt = red")["n"] == 2
    assert sum(row["n"] for row in report["rows"] if row["group"] not in (None, "all")) == 6


def test_fresh_raters_are_the_ceiling(run, data, tmp_path):
    """Raters who agree with the labels reach the top of every metric, in whatever order their records come."""
    same = DatasetDict({name: split.shuffle(seed=1) for name, split in load_from_disk(str(data)).items()})
    same.save_to_disk(str(tmp_path / "raters"))
    report = run("--raters", str(tmp_path / "raters"), "--group_by", "prompt")
    row = row_of(report, "ceiling")
    assert values_of(row["scores"]["alignment"]) == pytest.approx({"plcc": 1, "srcc": 1})
    assert row["words"]["f1"]["value"] == 1
    best = row["heatmaps"]["misalignment"]
    assert [best[metric]["value"] for metric in ("mse", "cc", "sim", "auc_judd")] == pytest.approx([0, 1, 1, 1])
    assert row_of(report, "ceiling, prompt = red")["n"] == 2
    ours, share = row_of(report, "predictor"), row_of(report, "of ceiling")
    assert values_of(share["scores"]["overall"]) == pytest.approx(values_of(ours["scores"]["overall"]))
    assert share["words"] == ours["words"]  # above what is perfect, in every draw
    assert row_of(report, "of ceiling, prompt = red")["kind"] == "of ceiling"
    assert "| ceiling | 6 |" in (tmp_path / "report" / "tables.md").read_text()


def test_raters_of_other_pictures_are_refused(run, data, tmp_path):
    fewer = DatasetDict({name: split.select(range(4)) for name, split in load_from_disk(str(data)).items()})
    fewer.save_to_disk(str(tmp_path / "raters"))
    with pytest.raises(ValueError, match="2 of 6 pictures have no record in the raters' folder"):
        run("--raters", str(tmp_path / "raters"))


def test_a_model_that_has_diverged_is_named(run, model, model_folder, tmp_path):
    with torch.no_grad():
        model.project.bias.fill_(float("nan"))
    model.save_pretrained(model_folder)
    with pytest.raises(ValueError, match="feedback of picture test-0 is NaN"):
        run()
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--split", "tests"], "no split 'tests'"),
        (["--group_by", "author"], "'author', it is no column of the data"),
        (["--group_by", "image"], "'image', it is no column of plain values"),
        (["--group_prompts", "nowhere.txt"], r"nowhere\.txt"),
        (["--raters", "nowhere"], "no data folder nowhere"),
        (["--draws", "-1"], "draws must be at least 0, not -1"),
        (["--out", __file__], r"test_evaluate\.py is a file"),
    ],
)
def test_wrong_settings_are_named(run, flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(*flags)
    assert not (tmp_path / "report").exists()
