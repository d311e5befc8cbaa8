"""The presets of guidance and inpainting: the command at the head of each parses, and says what it is to."""

import shlex
from pathlib import Path

import pytest

from finetune.guide import GuideArguments
from finetune.inpaint_arguments import InpaintArguments
from finetune.reward_choice import RewardArguments
from reward.arguments import parse_arguments

ROOT = Path(__file__).parents[2]
COMMANDS = {"guide": GuideArguments, "inpaint": InpaintArguments}


@pytest.mark.parametrize("job", COMMANDS)
@pytest.mark.parametrize("model", ["tinyworld", "sd15", "sdxl"])
def test_the_command_in_a_preset_parses(job, model, monkeypatch):
    monkeypatch.chdir(ROOT)
    first, second, third = (ROOT / f"configs/{job}_{model}.yaml").read_text().splitlines()[:3]
    launcher, _, flags = first.partition(f"python -m finetune.{job} ")
    assert launcher == "# "
    assert (second[:12], third[:10]) == ("# Hardware: ", "# Expect: ")
    run, choice = parse_arguments([COMMANDS[job], RewardArguments], shlex.split(flags))
    choice.check(differentiable=job == "guide")
    assert run.output_dir == f"outputs/{job}_{model}"
    assert (run.device == "cpu") == (model == "tinyworld")
    if job == "guide" and model != "tinyworld":  # the whole graph of two rows of the U-Net is more than such GPUs have
        assert (run.batch_size, run.activation_checkpointing) == (1, True)
    if job == "inpaint":
        assert set(run.thresholds) <= set(choice.reward_kwargs["penalty_weights"])


def test_a_candidate_must_gain_as_much_by_the_same_reward_everywhere():
    """0.1 was needed where it was measured; the rewards' weights, so its unit, are the same."""
    arguments = {}
    for model in ("tinyworld", "sd15", "sdxl"):
        config = ["--config", str(ROOT / f"configs/inpaint_{model}.yaml")]
        arguments[model] = parse_arguments([InpaintArguments, RewardArguments], config)
    measured, unit = arguments.pop("tinyworld")
    for run, choice in arguments.values():
        weights = {**choice.reward_kwargs, "model": unit.reward_kwargs["model"]}
        assert (run.min_gain, weights) == (measured.min_gain, unit.reward_kwargs)
