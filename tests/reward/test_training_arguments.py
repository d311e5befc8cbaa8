"""Settings that Trainer would stumble over as it begins to train, refused before."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainingArguments

from reward.arguments import ArgumentsError, parse_arguments
from reward.training_arguments import check_deepspeed_settings, check_training_arguments

ROOT = Path(__file__).parents[2]


def arguments(tmp_path, **changes) -> TrainingArguments:
    return TrainingArguments(str(tmp_path), use_cpu=True, **{"report_to": "none"} | changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"learning_rate": -1.0}, "learning_rate must be a number from 0 on, not -1.0"),
        ({"learning_rate": float("inf")}, "learning_rate must be a number from 0 on, not inf"),
        ({"weight_decay": float("nan")}, "weight_decay must be a number from 0 on, not nan"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be a number from 0 on, not -1.0"),
        ({"adam_beta2": 2.0}, r"Invalid beta parameter at index 1: 2.0 .*adam_beta2 2.0"),
        ({"optim_args": "x"}, r"no optimizer can be made of these settings: .*optim_args x"),
        ({"lr_scheduler_kwargs": {"x": 1}}, r"unexpected keyword argument 'x' .*lr_scheduler_kwargs {'x': 1}"),
        ({"optim": "apollo_adamw", "optim_target_modules": "attn"}, "no optimizer can be made .*apollo"),
        ({"report_to": "no_such"}, "report_to names 'no_such', which is not installed; what is: tensorboard; or none"),
    ],
)
def test_what_trainer_would_stumble_over_is_refused(tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        check_training_arguments(arguments(tmp_path, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_grad_norm": None, "weight_decay": 0.0, "report_to": "all"},
        {"optim": "adafactor", "lr_scheduler_type": "cosine", "warmup_steps": 0.1},
        {"optim": "sgd", "optim_args": "momentum=0.5", "learning_rate": 0.0},
    ],
)
def test_what_trainer_takes_is_taken(tmp_path, changes):
    args = arguments(tmp_path, **changes)
    check_training_arguments(args)
    trainer = Trainer(torch.nn.Linear(2, 2), args)
    trainer.create_optimizer_and_scheduler(num_training_steps=10)  # as the check says, it can be made


def test_a_launchers_precision_is_not_taken_in_silence(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match=r"accelerate was told to compute in bf16 .* neither bf16 nor fp16 is set"):
        check_training_arguments(arguments(tmp_path))
    check_training_arguments(arguments(tmp_path, bf16=True))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    check_training_arguments(arguments(tmp_path))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot read DeepSpeed's settings .*zero.json: No such file"),
        (b'{"zero_optimization": ', "zero.json are not JSON: Expecting value"),
        (b"\xff\xfe", "zero.json are not JSON"),
        (b"[1]", "zero.json are JSON, but not a mapping"),
        (b'{"zero_optimization": 5}', "zero.json: zero_optimization is 5; it must be a mapping"),
        (b'{"zero_optimization": {"stage": 7}}', "zero.json: .*stage"),
        (b'{"zero_optimization": {"stage": 2, "no_such": 1}}', "zero.json: .*no_such"),
    ],
)
def test_a_file_of_deepspeeds_settings_is_looked_into_first(tmp_path, content, said):
    file = tmp_path / "zero.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=said):
        check_deepspeed_settings(str(file))


def test_settings_of_deepspeed_in_every_form_pass():
    whole = {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}, "train_batch_size": "auto"}
    ours = sorted(map(str, (ROOT / "configs/deepspeed").glob("*.json")))
    assert len(ours) == 5
    for setting in (None, "", {}, whole, json.dumps(whole), *ours):
        check_deepspeed_settings(setting)


@pytest.mark.parametrize("told", ["true", "1", "false"])
def test_deepspeed_that_accelerate_alone_knows_of_is_refused(monkeypatch, told):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", told)
    check_deepspeed_settings(str(ROOT / "configs/deepspeed/zero2.json"))
    with nullcontext() if told == "false" else pytest.raises(ValueError, match="give them as --deepspeed FILE"):
        check_deepspeed_settings(None)


@pytest.mark.parametrize(
    ("setting", "said"),
    [(5, "deepspeed is 5"), ([1], r"deepspeed is \[1\]"), ("{bad", "deepspeed is '{bad', which is no JSON")],
)
def test_settings_of_deepspeed_that_are_none(setting, said):
    with pytest.raises(ValueError, match=said):
        check_deepspeed_settings(setting)


def test_a_contradiction_with_deepspeeds_settings_is_named(tmp_path):
    args = arguments(tmp_path)
    found = "- ds train_micro_batch_size_per_gpu=3 vs hf per_device_train_batch_size=8"
    args.hf_deepspeed_config = SimpleNamespace(mismatches=[found])  # as transformers writes them down
    with pytest.raises(ValueError, match=r'contradict .*ds train_micro_batch_size_per_gpu=3 vs hf .*"auto"'):
        check_training_arguments(args)


def test_what_transformers_says_of_settings_is_the_users_mistake(tmp_path):
    with pytest.raises(ArgumentsError, match="warmup_steps = -3"):
        parse_arguments([TrainingArguments], ["--output_dir", str(tmp_path), "--warmup_steps", "-3"])
