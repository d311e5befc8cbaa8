import pytest

from reward.arguments import parse_arguments
from rl.ddpo import DDPOConfig


def test_the_worked_example(make_args):
    args = make_args(
        generation_batch_size=256, num_generations=8, train_steps=[1, 2], per_device_train_batch_size=64,
        gradient_accumulation_steps=8,
    )  # fmt: skip
    plan = args.plan(2)
    assert (plan.pictures, plan.prompts, plan.micro_batches, plan.updates) == (256, 32, 8, 1)
    args.num_iterations, args.gradient_accumulation_steps = 2, 4
    assert args.plan(2).updates == 4


def test_steps_per_generation_says_the_same(make_args):
    args = make_args(generation_batch_size=None, steps_per_generation=8, per_device_train_batch_size=64)
    assert args.plan(2).pictures == 256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generation_batch_size": 10}, r"\(10\) is not a multiple of num_generations \(4\); use 8 or 12"),
        ({"per_device_train_batch_size": 3}, r"per_device_train_batch_size \(3\).*use 6 or 9"),
        ({"steps_per_generation": 4}, "both say how large"),
        ({"num_generations": 16}, r"\(8\) is not a multiple of num_generations \(16\); use 16 pictures"),
        ({"num_generations": 1}, "at least 2 pictures"),
        ({"eta": 0}, "eta is 0"),
        ({"eta": 1.5}, "eta is 1.5"),
        ({"epsilon": 0}, "epsilon is 0"),
        ({"focus_floor": 2}, "focus_floor is 2"),
        ({"beta": -1}, "beta is -1"),
        ({"lora_target_modules": []}, "lora_target_modules is empty"),
        ({"reward_batch_size": 0}, "reward_batch_size is 0"),
        ({"num_iterations": 0}, "num_iterations is 0"),
        ({"credit": "everything"}, "credit is 'everything'"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"save_strategy": "best"}, "save_strategy is 'best'; it must be one of epoch, steps, no"),
        ({"save_strategy": "sometimes"}, "save_strategy is 'sometimes'"),
        ({"lr_scheduler_type": "lineal"}, "lr_scheduler_type is 'lineal'; it must be one of linear, cosine"),
        ({"lr_scheduler_type": "greedy"}, "lr_scheduler_type is 'greedy'"),
        ({"num_train_epochs": 0}, "num_train_epochs is 0"),
        ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size is 0"),
        ({"num_log_images": -1}, "num_log_images is -1"),
        ({"save_only_model": True}, "save_only_model"),
        ({"fsdp": "full_shard"}, "fsdp is not supported"),
        ({"torch_compile": True}, "use torch_compile_unet"),
        ({"original_size": [64]}, r"original_size is \[64\]"),
        ({"fp16": True}, "fp16 is for GPUs: on the CPU nothing scales the loss"),
        (
            {"use_dora": True, "lora_dropout": 0.1, "model_dtype": "bfloat16"},
            "use_dora with lora_dropout on weights of bfloat16 needs bf16",
        ),
    ],
)
def test_wrong_settings_are_named(make_args, changes, message):
    with pytest.raises(ValueError, match=message):
        make_args(**changes)


def test_settings_of_a_lora_are_no_obstacle_where_there_is_none(make_args):
    dora = {"use_dora": True, "lora_dropout": 0.1, "model_dtype": "bfloat16"}
    assert make_args(tune="full", **dora).model_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradient_accumulation_steps": 3}, r"\(3\) does not divide the 4 micro-batches.*use one of 1, 2, 4"),
        ({"gradient_accumulation_steps": 2, "max_steps": 3}, r"max_steps \(3\).*2 updates.*use 2 or 4"),
        ({"num_train_epochs": 1.5}, "num_train_epochs is 1.5"),
        (
            {"gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 3},
            r"save_steps \(3\).*use 2 or 4",
        ),
        ({"generation_batch_size": None, "steps_per_generation": 3}, r"steps_per_generation \(3\).*use 2 or 4"),
    ],
)
def test_numbers_that_do_not_divide_come_with_the_remedy(make_args, changes, message):
    with pytest.raises(ValueError, match=message):
        make_args(**changes).plan(2)


def test_bare_no_of_yaml_saves_nothing(tmp_path):
    (tmp_path / "config.yaml").write_text("save_strategy: no\n")
    (args,) = parse_arguments([DDPOConfig], ["--config", str(tmp_path / "config.yaml"), "--use_cpu"])
    assert args.save_strategy == "no"


def test_several_gpus_in_one_process_are_refused(make_args, monkeypatch):
    monkeypatch.setattr(DDPOConfig, "n_gpu", 2)
    with pytest.raises(ValueError, match=r"sees 2 GPUs.*accelerate launch --config_file configs/accelerate/multi_gpu"):
        make_args()


def test_fsdp_of_accelerate_is_refused_too(make_args, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="fsdp is not supported"):
        make_args()


@pytest.mark.parametrize(
    ("ignored", "obeyed"),
    [
        ({"focus_on": "content"}, {"credit": "focus"}),
        ({"focus_floor": 0.5}, {"credit": "focus"}),
        ({"epsilon_location": 0.2}, {"importance_sampling_level": "location"}),
        ({"epsilon": 0.2, "importance_sampling_level": "location"}, {"importance_sampling_level": "image"}),
        ({"num_log_images": 3}, {"report_to": ["tensorboard"]}),
    ],
)
def test_settings_that_are_ignored_are_warned_about(make_args, caplog, ignored, obeyed):
    make_args()
    make_args(**{**ignored, **obeyed})
    assert "is ignored" not in caplog.text
    make_args(**ignored)
    name, value = next(iter(ignored.items()))
    assert caplog.text.count(f"{name}={value!r} is ignored") == 1


@pytest.mark.parametrize(
    "ignored",
    [
        {"dataloader_num_workers": 2},
        {"data_seed": 1},
        {"label_smoothing_factor": 0.1},
        {"use_cache": True},
        {"hub_always_push": True},
    ],
)
def test_trainers_settings_for_what_is_done_otherwise_are_ignored_and_warned_about(make_args, caplog, ignored):
    make_args()
    assert "is ignored" not in caplog.text
    make_args(**ignored)
    name, value = next(iter(ignored.items()))
    assert caplog.text.count(f"{name}={value!r} is ignored") == 1


def test_offloading_means_nothing_on_the_cpu(make_args, caplog):
    make_args()
    assert "offload" not in caplog.text
    make_args(offload=True)
    assert "offload=True is ignored: the run is on the CPU" in caplog.text


@pytest.mark.parametrize("none", ["[]", "null"])
def test_train_steps_that_name_no_step_are_refused(none, tmp_path):
    (tmp_path / "none.yaml").write_text(f"train_steps: {none}\n")
    with pytest.raises(ValueError, match="train_steps names no step; name some, such as 0 2, or say all or auto"):
        parse_arguments([DDPOConfig], ["--config", str(tmp_path / "none.yaml"), "--use_cpu"])


def test_train_steps_come_from_flags_and_yaml_alike(tmp_path):
    (tmp_path / "list.yaml").write_text("train_steps: [1, 2]\n")
    (tmp_path / "window.yaml").write_text('train_steps: "1:3"\n')
    for flags, expected in (
        (["--train_steps", "1", "2"], ["1", "2"]),
        (["--train_steps", "all"], ["all"]),
        (["--config", str(tmp_path / "list.yaml")], ["1", "2"]),
        (["--config", str(tmp_path / "window.yaml")], ["1:3"]),
    ):
        (args,) = parse_arguments([DDPOConfig], [*flags, "--use_cpu"])
        assert args.train_steps == expected


def test_every_field_of_ours_has_help():
    from dataclasses import fields

    assert all(field.metadata.get("help") for field in fields(DDPOConfig))


def test_stopping_without_checkpoints_is_warned_about(make_args, caplog):
    make_args(stop_on=["kl"], save_strategy="epoch")
    assert "stop_on" not in caplog.text
    make_args(stop_on=["kl"], save_strategy="no")
    assert "there will be no checkpoint from before" in caplog.text
