import json
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.models.t5.modeling_t5 import T5LayerFF
from transformers.models.vit.modeling_vit import ViTAttention

from reward import train
from reward.data import FeedbackDataset
from reward.evaluate import predict_examples
from reward.feedback import SCORES
from reward.folder_lock import FolderInUseError, check_free, taken
from reward.metrics import score_metrics, word_metrics
from reward.model import RahfModel
from reward.predict import RichFeedbackPredictor
from reward.trainer import RahfTrainer


def weights(folder):
    return RahfModel.from_pretrained(folder).state_dict()


def files_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def stopping(monkeypatch, at, killed=False):
    """Trainings stop in the update of that number; where they are killed, they no longer tidy up."""
    step = RahfTrainer.training_step

    def stops(self, *args, **kwargs):
        if self.state.global_step == at - 1:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(RahfTrainer, "training_step", stops)
        if killed:
            patch.setattr(train, "_nothing_lost", nullcontext)
        yield


def test_a_map_that_came_to_nothing_is_named(command, monkeypatch, caplog):
    train.warn_of_empty_maps({"eval_cc_implausibility": 0.3, "eval_cc_misalignment": -0.02})
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == [
        "the misalignment heatmap has learned nothing yet (CC -0.02 on dev)"
    ]
    told = []
    monkeypatch.setattr(train, "warn_of_empty_maps", told.append)
    metrics = train.main(command("out", max_steps=1, save_strategy="no", eval_strategy="no"))
    assert told == [metrics]
    caplog.clear()
    monkeypatch.undo()
    train.warn_of_empty_maps({"eval_loss": 1.0})  # no raters marked anything there
    assert not caplog.records


def test_a_short_training_leaves_a_model_that_predicts_and_its_figures(command, raw_data):
    metrics = train.main(command("out", crop_probability=0.5, brightness=0.1, backbone_learning_rate=1e-5))
    assert 0 <= metrics["eval_mse_implausibility"] < 0.2
    out = raw_data / "out"
    assert json.loads((out / "dev_metrics.json").read_text())["eval_quality"] == pytest.approx(metrics["eval_quality"])
    feedback = RichFeedbackPredictor.from_pretrained(out)(torch.rand(2, 3, 20, 30), ["a red circle", "blue"])
    assert feedback.heatmaps["misalignment"].shape == (2, 20, 30)
    tags = EventAccumulator(str(out / "tensorboard")).Reload().Tags()
    assert {"train/score_loss", "train/heatmap_loss", "train/word_loss", "eval/srcc_overall"} <= set(tags["scalars"])
    assert tags["images"] == ["examples/raters_above_model"]
    assert (out / "examples.png").is_file()


def test_the_weights_of_the_terms_are_those_of_the_loss(command, raw_data):
    given = {"score_loss_weight": 2, "heatmap_loss_weight": 3, "word_loss_weight": 5, "heatmap_positive_weight": 7}
    train.main(command("out", **given, max_steps=2))
    out = raw_data / "out"
    logs = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    logs = [entry for entry in logs if "loss" in entry]
    assert len(logs) == 2
    for entry in logs:
        weighted = 2 * entry["score_loss"] + 3 * entry["heatmap_loss"] + 5 * entry["word_loss"]
        assert entry["loss"] == pytest.approx(weighted, rel=1e-5)
    for folder in (out, out / "checkpoint-2"):
        config = RahfModel.from_pretrained(folder).config
        assert {name: getattr(config, name) for name in given} == given


def test_the_seed_decides_everything(command, raw_data):
    settings = {"crop_probability": 0.5, "brightness": 0.2}
    for output, seed in (("one", 3), ("same", 3), ("other", 4)):
        train.main(command(output, **settings, seed=seed))
    one, same, other = (weights(raw_data / output) for output in ("one", "same", "other"))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("stop", "higher", "best"), [(2, True, 4), (3, False, 3)], ids=["between epochs", "amid an epoch"]
)
def test_resuming_ends_where_an_uninterrupted_training_ends(
    command, raw_data, model, model_folder, monkeypatch, stop, higher, best
):
    """Rate, optimizer, augmentation and dropout go on as if nothing had been; and so does the choice of the best
    checkpoint, be it from after the stop (to whoever takes the highest loss for the best) or from before it."""
    model.config.text_config.dropout_rate = 0.1
    model.config.save_pretrained(model_folder)
    settings = {"lr_scheduler_type": "cosine", "warmup_steps": 1, "learning_rate": 3e-3, "hue": 0.2, "contrast": 0.2}
    settings |= {"crop_probability": 0.5, "jpeg_probability": 0.5, "eval_steps": stop, "save_steps": stop}
    settings |= {"metric_for_best_model": "eval_loss", "greater_is_better": higher}
    train.main(command("whole", **settings))
    save = RahfTrainer._save_checkpoint

    def interrupted(self, model, trial):
        save(self, model, trial)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RahfTrainer, "_save_checkpoint", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.main(command("halves", **settings))
    assert [path.name for path in (raw_data / "halves").glob("checkpoint-*")] == [f"checkpoint-{stop}"]
    train.main(command("halves", **settings, resume_from_checkpoint="last"))
    for part in ("checkpoint-4", "."):
        whole, halves = (weights(raw_data / name / part) for name in ("whole", "halves"))
        assert all(torch.equal(whole[name], halves[name]) for name in whole), part
    for name in ("whole", "halves"):
        state = json.loads((raw_data / name / "checkpoint-4" / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(raw_data / name / f"checkpoint-{best}")
        chosen, saved = weights(state["best_model_checkpoint"]), weights(raw_data / name)
        assert all(torch.equal(chosen[key], saved[key]) for key in chosen)


def test_one_command_begins_and_goes_on(command, raw_data, monkeypatch):
    """Also where it was stopped before the first checkpoint; but what it cannot go on with it does not replace."""
    auto, out = {"resume_from_checkpoint": "auto"}, raw_data / "out"
    with stopping(monkeypatch, at=2), pytest.raises(KeyboardInterrupt):
        train.main(command("out", **auto))
    stopped = set((out / "tensorboard").iterdir())
    assert stopped
    with stopping(monkeypatch, at=4), pytest.raises(KeyboardInterrupt):
        train.main(command("out", **auto))
    assert not stopped & set((out / "tensorboard").iterdir())
    made = (out / "checkpoint-2" / "complete").stat().st_mtime_ns
    train.main(command("out", **auto))
    assert (out / "checkpoint-2" / "complete").stat().st_mtime_ns == made
    log = json.loads((out / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4]
    for step in (2, 4):
        (out / f"checkpoint-{step}" / "complete").unlink()
    with pytest.raises(ValueError, match=r"holds config\.json, but no checkpoint to go on from"):
        train.main(command("out", **auto))


def test_each_update_is_in_the_curves_once(command, raw_data, monkeypatch):
    """Killed behind the checkpoint of the second update, a training makes the third one twice."""
    train.main(command("whole"))
    with stopping(monkeypatch, at=4), pytest.raises(KeyboardInterrupt):
        train.main(command("out"))
    train.main(command("out", resume_from_checkpoint="latest"))
    whole, resumed = (EventAccumulator(str(raw_data / name / "tensorboard")).Reload() for name in ("whole", "out"))
    tags = resumed.Tags()["scalars"]
    assert (
        {"train/loss", "train/word_loss", "train/grad_norm", "eval/quality"}
        <= set(tags)
        == set(whole.Tags()["scalars"])
    )
    for tag in (tag for tag in tags if not tag.endswith(("runtime", "per_second", "epoch"))):  # epoch: of either log
        both = [[(event.step, event.value) for event in events.Scalars(tag)] for events in (whole, resumed)]
        assert [step for step, _ in both[0]] == ([2, 4] if tag.startswith("eval/") else [1, 2, 3, 4])
        assert both[0] == both[1], tag
    assert [image.step for image in resumed.Images("examples/raters_above_model")] == [2, 4]


def test_figures_are_never_half_written(command, raw_data):
    """A file that is written in place would change under its other name too."""
    out = raw_data / "out"
    train.main(command("out", max_steps=2))
    before = {name: (out / name).read_bytes() for name in ("dev_metrics.json", "examples.png")}
    for name in before:
        (raw_data / name).hardlink_to(out / name)
    train.main(command("out", resume_from_checkpoint="last"))
    for name, old in before.items():
        assert (raw_data / name).read_bytes() == old
        assert (out / name).read_bytes() != old


def test_the_best_checkpoint_is_what_is_saved(command, raw_data):
    """Half of the way is better than the whole at a rate that ruins everything; every layer must go back to it."""
    train.main(command("out", metric_for_best_model="eval_loss", learning_rate=0.3, lr_scheduler_type="constant"))
    best, last, saved = (weights(raw_data / "out" / part) for part in ("checkpoint-2", "checkpoint-4", "."))
    assert all(torch.equal(best[name], saved[name]) for name in best)
    assert not [name for name in best if torch.equal(best[name], last[name])]


def test_accumulating_micro_batches_is_one_large_batch(command, raw_data):
    settings = {"load_best_model_at_end": False, "max_steps": 2, "optim": "sgd", "learning_rate": 0.1}
    train.main(command("large", **settings, per_device_train_batch_size=12))
    train.main(command("small", **settings, per_device_train_batch_size=3, gradient_accumulation_steps=4))
    large, small = weights(raw_data / "large"), weights(raw_data / "small")
    for name in large:
        torch.testing.assert_close(large[name], small[name], atol=1e-5, rtol=1e-4)


def test_checkpointing_computes_both_encoders_again_and_changes_no_gradient(command, raw_data, monkeypatch):
    calls = Counter()
    for layer in (T5LayerFF, ViTAttention):
        forward = layer.forward

        def counted(self, *args, forward=forward, **kwargs):
            calls[type(self)] += 1
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(layer, "forward", counted)
    settings = {"max_steps": 2, "load_best_model_at_end": False, "panels": 0, "eval_strategy": "no"}
    settings |= {"optim": "sgd", "learning_rate": 0.1}
    train.main(command("plain", **settings))
    once = calls.copy()
    train.main(command("checkpointed", **settings, activation_checkpointing=True))
    assert {layer: calls[layer] - once[layer] for layer in once} == {
        T5LayerFF: once[T5LayerFF] + 4,
        ViTAttention: once[ViTAttention] + 2,
    }
    plain, checkpointed = weights(raw_data / "plain"), weights(raw_data / "checkpointed")
    for name in plain:
        torch.testing.assert_close(plain[name], checkpointed[name])


def test_training_fits_what_it_is_shown(command, raw_data):
    train.main(
        command("out", learning_rate=3e-3, max_steps=60, eval_steps=60, save_steps=60, in_memory=True, logging_steps=5)
    )
    state = json.loads((raw_data / "out" / "checkpoint-60" / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rat": 1}, "learning_rate"),
        ({"data": "nowhere"}, "no data folder nowhere"),
        ({"model": "nowhere"}, "no model folder nowhere"),
        ({"vision_model": "a", "text_model": "b"}, "either --model"),
        ({"crop_min_side": 0}, "crop_min_side"),
        ({"hue": 0.7}, "hue must be in"),
        ({"heatmap_positive_weight": -1}, "heatmap_positive_weight must be a number from 0 on, not -1"),
        ({"remove_unused_columns": True}, "remove_unused_columns"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1; leave it out"),
        ({"prediction_loss_only": True}, "prediction_loss_only is True; leave it out"),
        ({"label_names": ["a"]}, "label_names is .*; leave it out"),
        ({"resume_from_checkpoint": "last"}, "no whole checkpoint"),
    ],
)
def test_wrong_settings_are_named(command, settings, message):
    with pytest.raises(ValueError, match=message):
        train.main(command("out", **settings))


def test_several_gpus_are_not_shared_among_by_dataparallel(command, monkeypatch):
    monkeypatch.setattr(train.RahfTrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match=r"sees 2 GPUs.*accelerate launch .* -m reward\.train"):
        train.main(command("out"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone_learning_rate": -1}, "backbone_learning_rate must be a number from 0 on, not -1"),
        ({"learning_rate": "nan"}, "learning_rate must be a number from 0 on, not nan"),
        ({"max_grad_norm": -1}, "max_grad_norm must be"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be a number from 1 on, not 0"),
        ({"num_train_epochs": 0, "max_steps": -1}, "num_train_epochs must be above 0, not 0"),
        ({"metric_for_best_model": "eval_ssrc_overall"}, "is no metric of dev; the nearest is eval_srcc_overall"),
        ({"panels": -1}, "panels must be a number from 0 on, not -1"),
        ({"words": "seqence"}, "words must be one of tagging, sequence, none, not 'seqence'"),
        ({"head_width": 0}, "head_width must be a number above 0, not 0"),
        ({"heatmap_size": 0}, "heatmap_size must be a side of at least 1, .*, not 0"),
        ({"image_std": 0.5}, "image_std takes a number for each of R, G, B"),
        ({"save_only_model": True}, "save_only_model must be false: checkpoints are there to be resumed"),
        ({"eval_do_concat_batches": False}, "eval_do_concat_batches must be true: the metrics of dev"),
        ({"batch_eval_metrics": True}, "batch_eval_metrics must be false: the metrics of dev"),
        ({"train_sampling_strategy": "group_by_length"}, "must be one of random, sequential, not 'group_by_length'"),
        ({"train_sampling_strategy": "batch_rebalance"}, "must be one of random, sequential, not 'batch_rebalance'"),
        ({"do_train": False}, "do_train must be true: training is what the command does"),
        ({"do_eval": False}, "do_eval must be true: .*eval_strategy says when"),
        ({"do_eval": False, "eval_strategy": "no"}, "do_eval must be true"),
        ({"resume_from_checkpoint": "auto", "overwrite_output_dir": True}, "give one of them"),
        ({"bf16_full_eval": True}, "bf16_full_eval must be false: it would leave the model that is saved in half"),
        ({"fp16_full_eval": True}, "fp16_full_eval must be false"),
        ({"fsdp": True}, "fsdp is not supported: .*zero2.json"),
        ({"do_predict": True}, "do_predict must be false: the test split is for `python -m reward.evaluate`"),
    ],
    ids=str,
)
def test_mistakes_in_the_settings_alone_are_told_before_anything_is_read(command, settings, message):
    with pytest.raises(ValueError, match=message):
        train.main(command("out", data="nowhere", **settings))


def test_settings_that_say_what_is_done_anyway_are_taken(command):
    anyway = {"do_train": True, "do_eval": True, "do_predict": False, "save_only_model": False}
    with pytest.raises(ValueError, match="no data folder nowhere"):
        train.main(command("out", data="nowhere", train_sampling_strategy="sequential", **anyway))


def test_an_output_folder_in_use_is_refused(command, raw_data):
    (raw_data / "out").mkdir()
    (raw_data / "out" / "something").touch()
    with pytest.raises(ValueError, match="is not empty"):
        train.main(command("out"))
    train.main(command("out", overwrite_output_dir=True, max_steps=2))


def test_a_folder_that_another_training_writes_to_is_left_alone(command, raw_data, monkeypatch):
    """It is looked at before what that one set aside could be brought back, and held from before the first update."""
    out = raw_data / "out"
    with taken(out):
        (out / ".before").mkdir()
        (out / ".before" / "config.json").touch()
        for more in ({}, {"overwrite_output_dir": True}, {"resume_from_checkpoint": "auto"}):
            with pytest.raises(FolderInUseError, match="in use by another run"):
                train.main(command("out", **more))
        assert files_in(out / ".before") == {"config.json": b""}
    seen = []

    def looks(self, *args, **kwargs):
        with pytest.raises(FolderInUseError) as refused:
            check_free(out)
        seen.append(str(refused.value))
        raise KeyboardInterrupt

    monkeypatch.setattr(RahfTrainer, "training_step", looks)
    with pytest.raises(KeyboardInterrupt):
        train.main(command("out", overwrite_output_dir=True))
    assert len(seen) == 1
    check_free(out)


def test_a_training_anew_leaves_nothing_that_passes_for_its_own(command, raw_data):
    """What is resumed is then never the run before; but until it begins, and a mistake is found before, all is kept."""
    train.main(command("out"))
    out = raw_data / "out"
    (out / "checkpoint-4" / "notes.txt").touch()
    (out / "checkpoint-notes").mkdir()
    anew = {"overwrite_output_dir": True, "max_steps": 2, "seed": 1}
    for more, message in (
        ({"metric_for_best_model": "f1_words", "words": "none"}, "the model judges no words"),
        ({"resume_from_checkpoint": "last"}, "would delete .*checkpoint-4"),
        ({"model": out / "checkpoint-2"}, "would delete .*checkpoint-2"),
        ({"model": out}, "would delete .*out, which the training is to start from"),
    ):
        with pytest.raises(ValueError, match=message):
            train.main(command("out", **anew, **more))
    assert (out / "checkpoint-4" / "notes.txt").is_file()
    logs = set((out / "tensorboard").iterdir())
    train.main(command("out", **anew))
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-notes"]
    assert not logs & set((out / "tensorboard").iterdir())
    assert list((out / "tensorboard").iterdir())


def test_a_training_anew_that_fails_before_its_first_update_leaves_what_was_there(command, raw_data, monkeypatch):
    """If it is killed, that is set aside, and comes back with the next start; with the update all of it is gone."""
    out, anew = raw_data / "out", {"overwrite_output_dir": True, "seed": 1}
    train.main(command("out", save_total_limit=5))
    (out / "notes.txt").touch()
    before = files_in(out)
    with stopping(monkeypatch, at=1), pytest.raises(KeyboardInterrupt):
        train.main(command("out", **anew))
    assert files_in(out) == before
    with stopping(monkeypatch, at=1, killed=True), pytest.raises(KeyboardInterrupt):
        train.main(command("out", **anew))
    assert {path.name for path in out.iterdir()} == {".before", ".lock", "notes.txt", "tensorboard"}
    with pytest.raises(ValueError, match="not a RAHF checkpoint"):
        RichFeedbackPredictor.from_pretrained(out)
    with pytest.raises(ValueError, match="no data folder nowhere"):
        train.main(command("out", **anew, data="nowhere"))
    assert files_in(out) == before
    with stopping(monkeypatch, at=2, killed=True), pytest.raises(KeyboardInterrupt):
        train.main(command("out", **anew))
    assert {path.name for path in out.iterdir()} == {".lock", "notes.txt", "tensorboard"}


def test_the_real_command_says_what_is_wrong_in_one_line(command):
    arguments = command("out", data="nowhere")
    done = subprocess.run(
        [sys.executable, "-m", "reward.train", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: there is no data folder nowhere")
    assert "Traceback" not in done.stderr


def test_another_head_is_new_and_the_encoders_are_kept(model, model_folder):
    arguments = train.RahfArguments(data="", model=str(model_folder), heatmap_head="paper")
    other, _, new = train.build_model(arguments)
    assert torch.equal(other.encoder.embed_tokens.weight, model.encoder.embed_tokens.weight)
    assert other.heatmap_heads["implausibility"].read.bias.item() == -3.0
    assert all(parameter.isfinite().all() for parameter in other.parameters())
    assert 0 < other.heatmap_heads["implausibility"].body[0].weight.std() < 0.2
    assert "heatmap_heads.implausibility.body.0.weight" in new
    assert not any(name.startswith(("vision.", "encoder.", "score_heads.")) for name in new)


def test_encoders_that_are_not_there_are_an_error(model_folder):
    state = load_file(model_folder / "model.safetensors")
    del state["encoder.final_layer_norm.weight"]
    save_file(state, model_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks weights of the encoders"):
        train.build_model(train.RahfArguments(data="", model=str(model_folder)))
    with pytest.raises(ValueError, match="lacks weights of the model"):
        RichFeedbackPredictor.from_pretrained(model_folder)


@pytest.mark.parametrize(
    "options", [{"variant": "augmented_prompt"}, {"words": "sequence"}, {"image_pooling": 2}], ids=str
)
def test_other_variants_start_from_a_checkpoint_with_new_heads(command, raw_data, options):
    """And what is told of the model that is left is what the predictor, which loads it, says."""
    metrics = train.main(command("out", **options))
    predictor = RichFeedbackPredictor.from_pretrained(raw_data / "out")
    assert {name: getattr(predictor.model.config, name) for name in options} == options
    dev = FeedbackDataset(train.load_data(raw_data / "data")["dev"], predictor.model.config)
    said = predict_examples(predictor, dev)
    assert [len(words) for words in said.misaligned] == [len(example["labels"]) for example in dev]
    wrong = (torch.cat(said.misaligned) > 0.5).tolist()
    of_words = word_metrics([wrong], [[label for example in dev for label in example["labels"]]])
    assert metrics["eval_f1_words"] == pytest.approx(of_words["f1"])
    for index, name in enumerate(SCORES):
        true = np.array([example["scores"][index].item() for example in dev])
        plcc = score_metrics(said.scores[name].numpy(), true)["plcc"]
        assert metrics[f"eval_plcc_{name}"] == pytest.approx(plcc, abs=1e-3)


def test_words_that_the_model_cannot_see_are_named_before_training(command, raw_data, caplog):
    train.main(command("out", max_text_length=3, max_steps=1))
    assert "split train: " in caplog.text
    assert "lie behind the 3 pieces of a prompt" in caplog.text


def test_sizes_are_one_side_or_two(command, raw_data):
    with pytest.raises(ValueError, match="heatmap_size is one side, or height and width"):
        train.main([*command("out"), "--heatmap_size", "8", "8", "8"])
    train.main([*command("out", max_steps=1), "--heatmap_size", "16", "24"])
    assert RahfModel.from_pretrained(raw_data / "out").config.map_size == (16, 24)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "multihead"}, "variant must be one of multi_head, augmented_prompt, not 'multihead'"),
        ({"words": "seqence"}, "words must be one of tagging, sequence, none, not 'seqence'"),
        ({"heatmap_head": "lite"}, "heatmap_head must be one of paper, light, not 'lite'"),
        ({"image_size": 33}, "image_size 33 is no multiple of 8"),
        ({"heatmap_size": 0}, "heatmap_size must be a side of at least 1"),
        ({"max_text_length": 1}, "max_text_length must be at least 2"),
        ({"dataloader_persistent_workers": True}, "dataloader_persistent_workers must be false"),
    ],
    ids=str,
)
def test_settings_that_the_model_does_not_take_are_named_before_training(command, options, message):
    with pytest.raises(ValueError, match=message):
        train.main(command("out", **options))
