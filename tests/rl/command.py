"""`run_ddpo.py` on a tiny pipeline with a toy reward, in this process."""

import json

import pytest

import run_ddpo
from reward.arguments import main_guard
from tests.rl.conftest import PROMPTS


def write_config(pipeline, folder):
    """The YAML, in `folder`, of a run in its subfolder `run`."""
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    settings = {
        "policy": pipeline, "reward": "tests.rl.toy_rewards:Redness", "reward_kwargs": {"weight": 1.0},
        "prompts": str(folder / "prompts.txt"), "eval_prompts": str(folder / "prompts.txt"),
        "eval_rewards": {"judge": "tests.rl.toy_rewards:Plain"}, "num_before_after": 2,
        "output_dir": str(folder / "run"), "use_cpu": True, "num_train_epochs": 2, "num_inference_steps": 3,
        "train_steps": [0, 1], "generation_batch_size": 8, "num_generations": 4, "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4, "lora_rank": 2, "num_log_images": 2,
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(json.dumps(settings))  # JSON is YAML
    return str(path)


def command(*argv):
    """Exit code of `python run_ddpo.py argv`, in this process."""
    with pytest.raises(SystemExit) as caught:
        main_guard(run_ddpo.main, argv)
    return caught.value.code
