import json

import numpy as np
import pytest
import torch
from datasets import load_from_disk

from reward import evaluate, richhf
from reward.data import resize_maps, to_tensor
from reward.metrics import heatmap_metrics, score_metrics
from reward.predict import RichFeedbackPredictor


@pytest.fixture
def data(raw_data):
    out = raw_data / "data"
    richhf.main(["--tfrecords", str(raw_data / "tfrecords"), "--images", str(raw_data / "images"), "--out", str(out)])
    return out


@pytest.fixture
def run(data, model_folder):
    def run(*flags):
        return evaluate.main(["--model", str(model_folder), "--data", str(data), "--map_size", "32", *flags])

    return run


def test_report_is_what_the_metrics_say_of_the_predictor(run, data, model_folder, capsys):
    report = run("--json", str(data / "report.json"))
    split = load_from_disk(str(data))["test"]
    predictor = RichFeedbackPredictor.from_pretrained(model_folder)
    images = torch.stack([to_tensor(image).float() / 255 for image in split["image"]])
    feedback = predictor(images, split["prompt"])
    expected = score_metrics(feedback.scores["alignment"], np.array(split["alignment"]))
    assert report["groups"]["all"]["scores"]["alignment"] == pytest.approx(expected, abs=1e-4)
    true = torch.cat([to_tensor(image, "L").float()[None] / 255 for image in split["implausibility_map"]])
    found = report["groups"]["all"]["heatmaps"]["implausibility"]
    zero = heatmap_metrics(torch.zeros(6, 32, 32), resize_maps(true, 32)[:, 0])
    assert report["baselines"]["heatmaps"]["all zero"]["implausibility"] == pytest.approx(zero, abs=1e-6)
    assert found["mse"] != zero["mse"]
    assert json.loads((data / "report.json").read_text()) == report
    printed = capsys.readouterr().out
    assert "| scores, PLCC / SRCC |" in printed
    assert "| misalignment heatmap |" in printed
    assert f"{found['cc']:.3f}" in printed


def test_groups_are_reported_apart(run, tmp_path):
    (tmp_path / "listed.txt").write_text("a red circle\n\nRED\na blue square left of a circle\n")
    groups = run("--group_prompts", str(tmp_path / "listed.txt"))["groups"]
    assert {name: group["n"] for name, group in groups.items()} == {"all": 6, "listed prompts": 2, "other prompts": 4}
    groups = run("--group_by", "prompt", "--split", "dev")["groups"]
    assert groups["prompt = red"]["n"] == 2


def test_every_word_finds_them_all(run):
    words = run()["baselines"]["words"]["every word"]
    assert words["recall"] == 1.0
    assert 0 < words["precision"] < 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--split", "tests"], "no split 'tests'"),
        (["--group_by", "author"], "no column 'author'"),
        (["--group_prompts", "nowhere.txt"], r"nowhere\.txt"),
    ],
)
def test_wrong_settings_are_named(run, flags, message):
    with pytest.raises(ValueError, match=message):
        run(*flags)
