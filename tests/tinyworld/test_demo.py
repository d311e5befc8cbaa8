"""What `make demo` runs, made small: the shipped pipeline, the shipped predictor as reward, the judge beside it."""

import json

import pytest

import run_ddpo
from reward.arguments import main_guard
from tinyworld.grammar import ASSETS

CONFIG = "configs/ddpo_tinyworld.yaml"
FIGURES = {"reward", "judge.plausibility", "judge.alignment", "judge.overall", "judge.satisfied", "diversity", "n"}


def test_the_demo_leaves_what_the_judge_says_before_and_after(tmp_path):
    prompts = (ASSETS / "prompts_held_out.txt").read_text().splitlines()[:4]
    (tmp_path / "held_out.txt").write_text("\n".join(prompts))
    small = ["--num_train_epochs", "1", "--generation_batch_size", "16", "--per_device_train_batch_size", "16"]
    small += ["--gradient_accumulation_steps", "2", "--warmup_steps", "0", "--learning_rate", "0.05"]
    small += ["--eval_prompts", str(tmp_path / "held_out.txt"), "--num_before_after", "2", "--save_steps", "1"]
    folder = tmp_path / "demo"
    with pytest.raises(SystemExit) as ended:
        main_guard(run_ddpo.main, ["--config", CONFIG, "--output_dir", str(folder), *small])
    assert ended.value.code == 0
    summary = json.loads((folder / "summary.json").read_text())
    for phase in ("before", "after"):
        assert summary[phase].keys() >= FIGURES
        assert (summary[phase]["n"], summary[phase]["generations"]) == (4, 2)
        assert all(0 <= summary[phase][name] <= 1 for name in FIGURES - {"reward", "n"})
    assert summary["before"]["reward"] != summary["after"]["reward"]  # it was trained
    for name in ("before_after.png", "evaluation.json", "pytorch_lora_weights.safetensors", "runs"):
        assert (folder / name).exists(), name
