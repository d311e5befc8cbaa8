"""The predictor's trainer alone: rates, decay, what its best checkpoint is chosen by."""

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from reward import train
from reward.feedback import HEATMAPS
from reward.model import RahfModel
from reward.train_config import DEV_METRICS, RahfTrainingArguments
from reward.trainer import RahfTrainer, best_word_threshold, dev_metrics


def test_backbone_and_heads_have_their_own_rates(model, tmp_path):
    args = train.RahfTrainingArguments(
        output_dir=str(tmp_path), learning_rate=1e-2, backbone_learning_rate=1e-4, use_cpu=True, report_to="none"
    )
    trainer = RahfTrainer(model, args, train_dataset=[0], eval_dataset=[0], data_collator=list)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in trainer.create_optimizer().param_groups for p in group["params"]}
    assert set(rates) == set(names.values())
    assert rates["vision.layernorm.weight"] == rates["encoder.embed_tokens.weight"] == 1e-4
    assert rates["project.weight"] == rates["score_heads.overall.place.weight"] == 1e-2


def test_the_best_is_the_lowest_of_what_is_an_error(tmp_path):
    better = {
        name: RahfTrainingArguments(str(tmp_path), metric_for_best_model=f"eval_{name}", use_cpu=True).greater_is_better
        for name in DEV_METRICS
    }
    lower = {f"{metric}_{name}" for name in HEATMAPS for metric in ("mse", "mse_empty", "kld")}
    assert {name for name in better if not better[name]} == {"loss", *lower}
    told = RahfTrainingArguments(str(tmp_path), metric_for_best_model="cc_misalignment", greater_is_better=False)
    assert not told.greater_is_better


def test_metrics_of_dev_are_those_to_choose_the_best_by():
    rng = np.random.default_rng(0)
    said = rng.random((3, 4)), rng.random((3, 2, 8, 8)), rng.normal(size=(3, 5))
    true = rng.random((3, 4)), rng.random((3, 2, 8, 8)), rng.integers(0, 2, (3, 5))
    assert {"loss", *dev_metrics(EvalPrediction(said, true))} == set(DEV_METRICS)


def test_best_word_threshold():
    logits = np.log(np.array([[0.1, 0.3], [0.35, 0.9]]) / (1 - np.array([[0.1, 0.3], [0.35, 0.9]])))
    labels = np.array([[0, -100], [1, 1]])
    assert best_word_threshold(logits, labels) == pytest.approx(0.3)
    assert best_word_threshold(logits, np.array([[0, 0], [0, 1]])) == pytest.approx(0.5)


def test_a_new_decoder_learns_at_the_heads_rate(model_folder, tmp_path):
    model, _, new = train.build_model(train.RahfArguments(data="", model=str(model_folder), words="sequence"))
    args = train.RahfTrainingArguments(
        output_dir=str(tmp_path), learning_rate=1e-2, backbone_learning_rate=1e-4, use_cpu=True, report_to="none"
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for told, expected in ((new, 1e-2), ((), 1e-4)):
        trainer = RahfTrainer(model, args, told, train_dataset=[0], eval_dataset=[0], data_collator=list)
        rates = {
            names[id(p)]: group["lr"] for group in trainer.create_optimizer().param_groups for p in group["params"]
        }
        assert {rate for name, rate in rates.items() if name.startswith("word_head.")} == {expected}
        assert rates["encoder.final_layer_norm.weight"] == 1e-4


def test_rates_and_decay_go_to_the_right_weights(make_config, tmp_path):
    model = RahfModel(make_config(words="sequence", heatmap_head="paper", head_width=0.05))
    args = RahfTrainingArguments(
        str(tmp_path), backbone_learning_rate=1e-5, weight_decay=0.1, use_cpu=True, report_to=[], eval_strategy="no",
        load_best_model_at_end=False,
    )  # fmt: skip
    groups = RahfTrainer(model, args).create_optimizer().param_groups
    found = {id(one): (group["lr"], group["weight_decay"]) for group in groups for one in group["params"]}
    by_name = {name: found[id(one)] for name, one in model.named_parameters()}
    backbone = (
        "word_head.write",
        "word_head.decoder.block.0.layer.0.SelfAttention.q",
        "encoder.block.0.layer.1.DenseReluDense.wi",
    )
    assert {by_name[f"{name}.weight"] for name in backbone} == {(1e-5, 0.1)}
    norms = [name for name, module in model.named_modules() if isinstance(module, torch.nn.GroupNorm)]
    assert norms
    assert {by_name[f"{name}.weight"] for name in norms} == {(1e-3, 0.0)}
