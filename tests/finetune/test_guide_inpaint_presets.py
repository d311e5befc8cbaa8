"""The presets of guidance and inpainting: the command at the head of each parses, and says what it is to."""

import shlex
from pathlib import Path

import pytest

from finetune.guide import GuideArguments
from finetune.inpaint import InpaintArguments
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
    if job == "inpaint":
        assert set(run.thresholds) <= set(choice.reward_kwargs["penalty_weights"])
