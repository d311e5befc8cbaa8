"""README's commands in a row, on records that were written from the formats' specifications alone."""

import json

import numpy as np
import pytest

from reward import evaluate, predict, richhf, train
from reward.feedback import HEATMAPS, SCORES
from reward.records import read_tfrecords
from tests.reward import by_hand


@pytest.fixture
def downloaded(raw_data):
    """The raw data with every TFRecord file written again, by hand."""
    for path in sorted((raw_data / "tfrecords").iterdir()):
        records = list(read_tfrecords(path))
        path.write_bytes(b"".join(by_hand.frame(by_hand.example(record)) for record in records))
    return raw_data


def words(**flags):
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


def test_from_records_to_tables_and_predictions(downloaded, model_folder, picture_bytes, capsys):
    data, trained, report, said = (downloaded / name for name in ("data", "rahf", "report", "feedback"))
    richhf.main(words(tfrecords=downloaded / "tfrecords", images=downloaded / "images", out=data))
    assert "12 train, 6 dev, 6 test" in capsys.readouterr().out
    train.main(
        words(data=data, model=model_folder, output_dir=trained, max_steps=2, per_device_train_batch_size=6,
              use_cpu=True, dataloader_pin_memory=False, disable_tqdm=True, report_to="none", panels=0)
    )  # fmt: skip
    evaluate.main(words(model=trained, data=data, split="test", out=report, draws=10, map_size=32))
    rows = {row["kind"]: row for row in json.loads((report / "report.json").read_text())["rows"]}
    assert set(rows["predictor"]["scores"]) == set(SCORES)
    assert set(rows["predictor"]["heatmaps"]) == set(HEATMAPS)
    assert "| " in (report / "tables.md").read_text()
    picture = downloaded / "a.png"
    picture.write_bytes(picture_bytes(np.zeros((8, 8, 3), np.uint8)))
    predict.main(words(model=trained, images=picture, prompts="a red circle", out=said))
    (line,) = (said / "feedback.jsonl").read_text().splitlines()
    assert set(json.loads(line)["scores"]) == set(SCORES)
