"""The real command line, on a tiny pipeline with a toy reward; and the presets."""

import json
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline

from finetune import draft
from finetune.draft_config import DraftConfig
from finetune.sft_config import SftConfig
from reward.arguments import main_guard, parse_arguments
from reward.feedback import HEATMAPS, SCORES
from reward.others import PickScore
from reward.predict import RichFeedbackPredictor
from tests.rl.conftest import PROMPTS, pipeline_folder, xl_folder  # noqa: F401

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(pipeline_folder, tmp_path):  # noqa: F811
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    settings = {
        "policy": pipeline_folder, "reward": "tests.rl.toy_rewards:Redness", "reward_kwargs": {"weight": 1.0},
        "prompts": str(tmp_path / "prompts.txt"), "eval_prompts": str(tmp_path / "prompts.txt"),
        "eval_rewards": {"judge": "tests.rl.toy_rewards:Plain"}, "num_before_after": 2,
        "output_dir": str(tmp_path / "run"), "use_cpu": True, "num_train_epochs": 2, "num_inference_steps": 3,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "lora_rank": 2, "num_log_images": 2,
        "save_steps": 1, "region_weight": 0.1, "region_threshold": 0.2,
    }  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(settings))  # JSON is YAML
    return str(path)


def command(*argv):
    """Exit code of `python -m finetune.draft argv`, in this process."""
    with pytest.raises(SystemExit) as caught:
        main_guard(draft.main, argv)
    return caught.value.code


def test_from_yaml_to_lora_figures_and_pictures(config, tmp_path, capsys, pipeline_folder):  # noqa: F811
    line = ("--config", config, "--watch_reward", "judge", "--resume_from_checkpoint", "auto")
    assert command(*line) == 0
    folder = tmp_path / "run"
    summary = json.loads((folder / "summary.json").read_text())
    assert {"reward", "judge.satisfied", "diversity", "n"} <= summary["after"].keys()
    assert (summary["updates"], summary["pictures_per_update"], summary["pictures"]) == (2, 4, 8)
    for name in ("before_after.png", "evaluation.json", "README.md", "runs", "checkpoint-2", "finished.json"):
        assert (folder / name).exists(), name
    assert "DRaFT-K" in (folder / "README.md").read_text()
    said = capsys.readouterr().out
    for phrase in ("training for 2 updates of 4 pictures", "judge.satisfied", "best checkpoint by judge"):
        assert phrase in said
    pipe = DiffusionPipeline.from_pretrained(pipeline_folder, safety_checker=None, requires_safety_checker=False)
    pipe.load_lora_weights(str(folder))
    assert pipe.get_active_adapters()
    assert command(*line) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_xl_with_guidance_through_all_steps(config, tmp_path, xl_folder):  # noqa: F811
    flags = ["--policy", xl_folder, "--guidance_scale", "3", "--num_train_epochs", "1", "--variant", "draft"]
    assert command("--config", config, "--eval_prompts", "", "--eval_rewards", "{}", *flags) == 0
    pipe = DiffusionPipeline.from_pretrained(xl_folder)
    pipe.load_lora_weights(str(tmp_path / "run"))
    assert pipe.get_active_adapters()


def unsupported(folder):
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    return str(folder)


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--backprop_step", "1"], ["backprop_step", "backprop_steps"]),
        (["--reward", "tests.rl.toy_rewards:Plain"], ["Plain is not differentiable", "reward.rich:RichReward"]),
        (["--reward", "tests.rl.toy_rewards:brightness", "--reward_kwargs", "{}"], ["brightness is not different"]),
        (
            ["--reward", "", "--rewards", '{"red": "tests.rl.toy_rewards:Redness", "far": "reward.http:HttpReward"}'],
            ["reward.http:HttpReward is not differentiable"],
        ),
        (["--reward", "tests.rl.toy_rewards:Nothing"], ["no attribute Nothing"]),
        (["--backprop_steps", "4"], ["backprop_steps is 4", "sampled in 3 steps", "use 1 to 3"]),
        (["--backprop_steps", "0"], ["backprop_steps is 0"]),
        (["--variant", "refl", "--refl_steps", "4"], ["refl_steps is 4", "use 1 to 3"]),
        (["--variant", "draft_lv", "--lv_draws", "0"], ["lv_draws is 0"]),
        (["--variant", "alignprop", "--backprop_range", "2", "4"], ["backprop_range is [2, 4]", "3 sampling steps"]),
        (["--variant", "drft"], ["variant", "drft"]),
        (["--distance", "l1"], ["distance", "l1"]),
        (["--distance", "kl", "--beta", "1"], ["distance kl", "(2 to 2, variant draft_k)", "more steps"]),
        (["--distance", "kl", "--beta", "1", "--eta", "0", "--variant", "draft"], ["or eta above 0"]),
        (["--beta", "-1"], ["beta is -1"]),
        (["--region_weight", "-1"], ["region_weight is -1"]),
        (["--region_dilation", "2"], ["region_dilation is 2"]),
        (["--num_generations", "3"], ["4 pictures (4 x 1 micro-batches x 1 processes)", "(3)", "use 3 or 6"]),
        (["--num_train_epochs", "1.5"], ["num_train_epochs is 1.5"]),
        (["--policy", "./nowhere"], ["no pipeline folder ./nowhere"]),
        (["--policy", "FLUX"], ["is a FluxPipeline; what works here is"]),
        (["--prompts", "nowhere.txt"], ["nowhere.txt"]),
        (["--stop_on", "held_out"], ["watch_reward"]),
        (["--init_adapter", "nowhere"], ["there is no LoRA folder nowhere"]),
        (["--resume_from_checkpoint", "latest"], ["holds no whole checkpoint"]),
    ],
)
def test_mistakes_end_in_one_line_before_anything_is_loaded(config, tmp_path, capsys, flags, names):
    flags = [unsupported(tmp_path / "flux") if flag == "FLUX" else flag for flag in flags]
    assert command("--config", config, *flags) == 2
    said = capsys.readouterr()
    (line,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert all(name in line for name in names), line
    assert "loading" not in said.out


def test_constraint_with_a_reward_without_maps_is_refused_before_anything_is_drawn(config, capsys):
    flags = ["--reward", "tests.finetune.test_draft_trainer:Mapless", "--reward_kwargs", "{}"]
    assert command("--config", config, *flags) == 2
    said = capsys.readouterr()
    assert "region_weight is 0.1, but the reward Mapless has no penalty maps" in said.err
    assert "evaluating" not in said.out


@pytest.mark.parametrize(
    ("ignored", "obeyed"),
    [
        ({"backprop_steps": 2}, {"variant": "draft_k"}),
        ({"lv_draws": 3}, {"variant": "draft_lv"}),
        ({"backprop_range": [1, 2]}, {"variant": "alignprop"}),
        ({"refl_steps": 2}, {"variant": "refl"}),
        ({"region_threshold": 0.1}, {"region_weight": 1.0}),
        ({"region_gradient": "region"}, {"region_weight": 1.0}),
        ({"distance": "kl"}, {"beta": 1.0}),
    ],
)
def test_settings_that_are_ignored_are_warned_about(tmp_path, caplog, ignored, obeyed):
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": [], "num_log_images": 0}
    DraftConfig(**settings, **ignored, **obeyed)
    assert "is ignored" not in caplog.text
    DraftConfig(**settings, **{"variant": "draft", **ignored})
    name, value = next(iter(ignored.items()))
    assert caplog.text.count(f"{name}={value!r} is ignored") == 1


def test_every_field_has_help():
    from dataclasses import fields

    for kind in (DraftConfig, draft.RunArguments):
        assert all(field.metadata.get("help") for field in fields(kind))


PRESETS = sorted((ROOT / "configs").glob("draft_*.yaml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.name)
def test_presets_are_valid_and_their_rewards_can_be_built(path, monkeypatch):
    """All but the predictor's weights, which may be the user's own."""
    lines = path.read_text().splitlines()
    assert all(line.startswith("# ") for line in lines[:3])
    assert f"python -m finetune.draft --config configs/{path.name}" in lines[0]
    flags = ["--config", str(path), "--use_cpu", "--bf16", "false"]
    run, args = parse_arguments([draft.RunArguments, DraftConfig], flags)
    args.plan()
    draft.check_differentiable(run.named_rewards())
    monkeypatch.setattr(RichFeedbackPredictor, "from_pretrained", lambda folder: folder)
    monkeypatch.setattr("reward.others.clip.check_folder", lambda *_, **__: None)
    reward = run.make_reward()
    assert reward.penalty_weights
    if "tinyworld" not in path.name:
        assert isinstance(run.make_eval_rewards()[run.watch_reward], PickScore)
        assert set(reward.score_weights) == set(SCORES)
        assert set(reward.penalty_weights) == set(HEATMAPS)


def test_zero3_is_refused(tmp_path):
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "deepspeed": str(ROOT / "configs/deepspeed/zero3.json")}
    for config in (DraftConfig, SftConfig):
        with pytest.raises(ValueError, match=r"ZeRO-3 is not supported.*zero2\.json"):
            config(**settings)
