"""The presets for GPUs, as far as they can be held without one: their settings parse, and their comments add up."""

import shlex
from pathlib import Path

import pytest

from reward.arguments import parse_arguments
from reward.train import RahfArguments, RahfTrainingArguments

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("preset", "heads", "computed_again"), [("rahf_vit_l", "paper", True), ("rahf_siglip2", "light", False)]
)
def test_the_commands_in_a_preset_parse_and_make_batches_of_256(preset, heads, computed_again, monkeypatch, tmp_path):
    """What its heads need decides what fits the GPU: `benchmarks/rahf_memory.py`."""
    monkeypatch.chdir(ROOT)
    head = (ROOT / "configs" / f"{preset}.yaml").read_text().splitlines()[:2]
    ranks = []
    for line in head:
        launcher, _, flags = line[1:].partition(" -m reward.train ")
        words = shlex.split(launcher)
        number = int(words[words.index("--num_processes") + 1]) if "--num_processes" in words else 1
        argv = [*shlex.split(flags), "--output_dir", str(tmp_path), "--use_cpu", "true"]
        arguments, args = parse_arguments([RahfArguments, RahfTrainingArguments], argv)
        assert arguments.model is None
        assert arguments.augmentation(0).flip_probability == 0
        assert (args.lr_scheduler_type, args.max_steps, args.bf16) == ("inverse_sqrt", 20_000, True)
        assert arguments.heatmap_head == arguments.score_head == heads
        assert args.activation_checkpointing == computed_again
        assert args.optim.startswith("adamw")
        assert args.per_device_train_batch_size * args.gradient_accumulation_steps * number == 256
        assert (args.deepspeed is not None) == (number > 1)
        ranks.append(number)
    assert ranks == [1, 8]


@pytest.mark.parametrize("stage", ["1", "2", "3", "2_offload", "3_offload"])
def test_deepspeed_settings_parse(stage, tmp_path):
    args = RahfTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, deepspeed=str(ROOT / f"configs/deepspeed/zero{stage}.json")
    )
    assert args.hf_deepspeed_config.config["zero_optimization"]["stage"] == int(stage[0])


def test_zero_3_that_could_not_save_is_refused(tmp_path):
    settings = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": "auto"}
    with pytest.raises(ValueError, match="stage3_gather_16bit_weights_on_model_save must be true"):
        RahfTrainingArguments(output_dir=str(tmp_path), use_cpu=True, deepspeed=settings)
