import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from reward import richhf, train
from reward.model import RahfModel
from reward.predict import RichFeedbackPredictor


@pytest.fixture
def command(raw_data, model_folder):
    """The command line of a training of four steps on twelve pictures."""
    data = raw_data / "data"
    richhf.main(["--tfrecords", str(raw_data / "tfrecords"), "--images", str(raw_data / "images"), "--out", str(data)])

    def make(output, **settings):
        settings = {
            "data": data,
            "model": model_folder,
            "output_dir": raw_data / output,
            "max_steps": 4,
            "per_device_train_batch_size": 6,
            "logging_steps": 1,
            "use_cpu": True,
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "eval_strategy": "steps",
            "save_strategy": "steps",
            "eval_steps": 2,
            "save_steps": 2,
            **settings,
        }
        return [part for name, value in settings.items() for part in (f"--{name}", str(value))]

    return make


def weights(folder):
    return RahfModel.from_pretrained(folder).state_dict()


def test_a_short_training_leaves_a_model_that_predicts_and_its_figures(command, raw_data):
    metrics = train.main(command("out", crop_probability=0.5, brightness=0.1, backbone_learning_rate=1e-5))
    assert 0 <= metrics["eval_mse_implausibility"] < 0.2
    out = raw_data / "out"
    assert json.loads((out / "dev_metrics.json").read_text())["eval_quality"] == pytest.approx(metrics["eval_quality"])
    feedback = RichFeedbackPredictor.from_pretrained(out)(torch.rand(2, 3, 20, 30), ["a red circle", "blue"])
    assert feedback.heatmaps["misalignment"].shape == (2, 20, 30)
    log = EventAccumulator(str(out / "tensorboard")).Reload().Tags()["scalars"]
    assert {"train/score_loss", "train/heatmap_loss", "train/word_loss", "eval/srcc_overall"} <= set(log)


def test_the_seed_decides_everything_and_resuming_changes_nothing(command, raw_data):
    settings = {"crop_probability": 0.5, "load_best_model_at_end": False}
    train.main(command("whole", **settings))
    train.main(command("again", **settings))
    train.main(command("halves", **settings, max_steps=2, lr_scheduler_type="constant"))
    whole, again = weights(raw_data / "whole"), weights(raw_data / "again")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_resuming_ends_where_an_uninterrupted_training_ends(command, raw_data):
    settings = {"load_best_model_at_end": False, "lr_scheduler_type": "constant", "contrast": 0.2}
    train.main(command("whole", **settings))
    train.main(command("halves", **settings, max_steps=2))
    train.main(command("halves", **settings, resume_from_checkpoint="last"))
    whole, halves = weights(raw_data / "whole"), weights(raw_data / "halves")
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


def test_training_on_twelve_pictures_learns_them_by_heart(command):
    before = train.main(command("start", learning_rate=0.0, max_steps=1))
    after = train.main(command("end", learning_rate=3e-3, max_steps=40, eval_steps=40, save_steps=40))
    assert after["eval_loss"] != before["eval_loss"]
