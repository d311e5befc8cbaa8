"""The real command line, on a tiny pipeline with a toy reward."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from rich.console import Console

import run_ddpo
from finetune.run import judge
from reward.arguments import main_guard
from reward.feedback import HEATMAPS, SCORES, check_reward
from reward.folder_lock import taken
from reward.predict import RichFeedbackPredictor
from rl.adapter import LORA_WEIGHTS
from rl.checkpoints import claim_output_dir
from rl.monitors import paired_fall
from tests.reward.test_http import serving
from tests.rl.conftest import PROMPTS, put_in_hub_cache
from tests.rl.toy_rewards import Plain

ROOT = Path(__file__).parents[2]


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


@pytest.fixture
def config(pipeline_folder, tmp_path):
    return write_config(pipeline_folder, tmp_path)


def command(*argv):
    """Exit code of `python run_ddpo.py argv`, in this process."""
    with pytest.raises(SystemExit) as caught:
        main_guard(run_ddpo.main, argv)
    return caught.value.code


def test_from_yaml_to_lora_figures_and_pictures(config, tmp_path, capsys, pipeline_folder):
    assert command("--config", config, "--num_train_epochs", "1") == 0
    folder = tmp_path / "run"
    summary = json.loads((folder / "summary.json").read_text())
    for phase in ("before", "after"):
        assert {"reward", "judge.satisfied", "diversity", "n"} <= summary[phase].keys()
    assert {"rollout", "decode", "reward", "update", "rest", "total"} <= summary["seconds"].keys()
    for name in ("before_after.png", "evaluation.json", "run_config.json", "runs", "checkpoint-1"):
        assert (folder / name).exists(), name
    said = capsys.readouterr().out
    for phrase in ("evaluating before", "training for 1 rollouts of 8 pictures", "judge.satisfied", "tensorboard"):
        assert phrase in said
    pipe = StableDiffusionPipeline.from_pretrained(pipeline_folder, safety_checker=None, requires_safety_checker=False)
    pipe.load_lora_weights(str(folder))
    assert pipe.get_active_adapters()

    assert command("--config", config, "--num_train_epochs", "2") == 2  # another run's folder
    assert "num_train_epochs: 1.0 -> 2.0" in capsys.readouterr().err
    assert command("--config", config, "--num_train_epochs", "2", "--resume_from_checkpoint", "latest") == 0
    assert (folder / "checkpoint-2").exists()
    assert command("--config", config, "--num_train_epochs", "1", "--overwrite_output_dir") == 0
    assert not (folder / "checkpoint-2").exists()


def test_a_folder_that_another_run_writes_to_is_refused(config, tmp_path, capsys):
    with taken(tmp_path / "run"):
        assert command("--config", config) == 2
        assert "run is in use by another run" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_xl_from_yaml_to_lora(config, tmp_path, xl_folder):
    flags = ["--policy", xl_folder, "--guidance_scale", "3", "--num_train_epochs", "1", "--target_size", "32", "32"]
    assert command("--config", config, "--eval_prompts", "", *flags, "--eval_rewards", "{}") == 0
    pipe = DiffusionPipeline.from_pretrained(xl_folder)
    pipe.load_lora_weights(str(tmp_path / "run"))
    assert pipe.get_active_adapters()


def test_whole_unet_from_yaml_to_folder(config, tmp_path, capsys):
    flags = ["--config", config, "--tune", "full", "--eval_prompts", "", "--eval_rewards", "{}"]
    flags += ["--num_train_epochs", "1", "--learning_rate", "1e-4", "--save_strategy", "no"]
    assert command(*flags) == 0
    assert 'UNet2DConditionModel.from_pretrained("' in capsys.readouterr().out
    unet = tmp_path / "run/unet"
    assert UNet2DConditionModel.from_pretrained(unet)
    assert command(*flags) == 2
    assert "finished run of the same settings" in capsys.readouterr().err
    (unet / "of_the_run_before").touch()
    assert command(*flags, "--overwrite_output_dir") == 0
    assert not (unet / "of_the_run_before").exists()


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--learning_rte", "1"], ["learning_rte", "learning_rate"]),
        (["--prompts", "nowhere.txt"], ["nowhere.txt"]),
        (["--eval_prompts", "nowhere.txt"], ["nowhere.txt"]),
        (["--policy", "./nowhere"], ["no pipeline folder ./nowhere"]),
        (["--generation_batch_size", "10"], ["generation_batch_size (10)", "num_generations (4)", "8 or 12"]),
        (["--gradient_accumulation_steps", "3"], ["(3)", "4 micro-batches", "1, 2, 4"]),
        (["--train_steps", "2"], ["step 2", "deterministic"]),
        (["--reward", "tests.rl.toy_rewards:Nothing"], ["no attribute Nothing"]),
        (["--reward_kwargs", '{"wait": 1}'], ["wait"]),
        (["--resume_from_checkpoint", "latest"], ["holds no whole checkpoint"]),
        (["--resume_from_checkpoint", "auto", "--overwrite_output_dir"], ["give one of them"]),
        (["--output_dir", "/proc/run"], ["cannot write to output_dir /proc/run"]),
        (["--eval_rewards", '{"reward": "tests.rl.toy_rewards:Plain"}'], ["eval_rewards"]),
        (["--eval_rewards", '{"judge": 3}'], ["3 does not name a reward"]),
        (["--init_adapter", "nowhere"], ["there is no LoRA folder nowhere"]),
        (["--init_adapter", ""], ["init_adapter is empty"]),
        (["--num_train_epochs", "inf"], ["num_train_epochs is inf"]),
        (["--base_adapters", "nowhere"], ["there is no LoRA folder nowhere"]),
        (["--init_lora_weights", "eva"], ["eva", "pissa"]),
        (["--train_text_encoder", "true", "--tune", "full"], ["train_text_encoder", "set tune to lora"]),
        (
            ["--eval_rewards", '{"judge": {"reward": "tests.rl.toy_rewards:Redness", "kwargs": {"wait": 1}}}'],
            ["'wait'"],
        ),
        (["--rewards", '{"red": "tests.rl.toy_rewards:Redness"}'], ["both are given; give one of them", "--reward ''"]),
        (["--reward", ""], ["neither is given"]),
        (["--reward", "", "--rewards", "{}"], ["neither is given"]),
        (["--reward", "", "--rewards", "[]"], ["a JSON mapping is wanted"]),
        (["--reward", "", "--rewards", '{"red": {"reward": "a:b", "weight": "much"}}'], ["its weight is 'much'"]),
        (["--reward", "", "--rewards", '{"red": "a:b", "red": "a:c"}'], ["`red` is given twice"]),
        (["--watch_reward", "jugde"], ["'jugde'", "nearest name: 'judge'"]),
        (["--stop_on", "diversty"], ["'diversty'", "'diversity'"]),
        (["--stop_on", "held_out"], ["watch_reward"]),
        (["--watch_limits", '{"kl": "far"}'], ["limit of kl is 'far'"]),
        (["--eval_strategy", "epoch", "--eval_prompts", ""], ["eval_strategy is epoch", "no eval_prompts"]),
        (["--eval_strategy", "steps", "--eval_steps", "0.5"], ["eval_steps (0.5)", "1 updates"]),
        (["--num_before_after", "0"], ["num_before_after is 0"]),
        (["--save_strategy", "best"], ["save_strategy is 'best'", "epoch, steps, no"]),
        (["--reward_kwargs", '{"nan_after": 3}'], ["term `red` is nan for the prompt"]),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(config, capsys, flags, names):
    assert command("--config", config, *flags) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert all(name in lines[0] for name in names), lines[0]


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    """Rewards and policies that are asked for too early."""
    loaded = []
    monkeypatch.setattr(run_ddpo.RunArguments, "make_rewards", lambda run: loaded.append("rewards") or {})
    monkeypatch.setattr(run_ddpo, "load_policy", lambda path, args: loaded.append(path))
    yield
    assert loaded == []


@pytest.mark.parametrize(
    ("flags", "scheduler", "message"),
    [
        (["--gradient_accumulation_steps", "3"], {}, "does not divide the 4 micro-batches"),
        (["--train_steps", "99"], {}, "names step 99; the 3 steps are 0 to 2"),
        ([], {"thresholding": True}, "dynamic thresholding"),
        ([], {"use_flow_sigmas": True}, "has use_flow_sigmas"),
        ([], {"timestep_type": "continuous"}, "has timestep_type: continuous"),
        (["--policy", "some/other"], {}, "cannot read model_index.json of the pipeline some/other"),
    ],
)
def test_schedule_on_the_hub_is_looked_at_before_anything_is_loaded(
    config, pipeline_folder, tmp_path, monkeypatch, capsys, nothing_is_loaded, flags, scheduler, message
):
    files = ("model_index.json", "scheduler/scheduler_config.json")
    for file in files:
        (tmp_path / "pipeline" / file).parent.mkdir(parents=True, exist_ok=True)
        said = json.loads((Path(pipeline_folder) / file).read_text()) | (scheduler if "config" in file else {})
        (tmp_path / "pipeline" / file).write_text(json.dumps(said))
    put_in_hub_cache(monkeypatch, tmp_path / "hub", "some/pipeline", tmp_path / "pipeline", files)
    assert command("--config", config, "--policy", "some/pipeline", *flags) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("credit", "rewards", "message"),
    [
        ("focus", {"scores": {}}, "credit focus on maps needs a reward with penalty maps"),
        ("words", {"scores": {}, "maps": {"penalty_weights": {"implausibility": 1.0}}}, "give it a word_weight"),
        ("image", {"scores": {"penalty_weights": {"beauty": 1.0}}}, "penalty_weights has no beauty"),
    ],
)
def test_rewards_that_cannot_give_what_credit_goes_by_are_not_loaded(
    config, capsys, nothing_is_loaded, credit, rewards, message
):
    rewards = {
        name: {"reward": "reward.rich:RichReward", "kwargs": {"model": "nowhere", **kwargs}}
        for name, kwargs in rewards.items()
    }
    flags = ["--credit", credit, "--reward", "", "--reward_kwargs", "{}", "--rewards", json.dumps(rewards)]
    assert command("--config", config, *flags) == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def one_rollout(pipeline_folder, tmp_path_factory):
    """The folder of a run of one rollout; to be copied."""
    folder = tmp_path_factory.mktemp("one_rollout")
    flags = ["--num_train_epochs", "1", "--eval_prompts", "", "--eval_rewards", "{}"]
    assert command("--config", write_config(pipeline_folder, folder), *flags) == 0
    return folder / "run"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora_rank", "5"], "lora_rank is 5, but the LoRA in"),
        (["--optim", "sgd"], "holds the state of the optimizer adamw_torch"),
        (["--gradient_accumulation_steps", "2"], "with these settings a rollout has 2 updates"),
        (["--ema_decay", "0.5"], "holds no average to go on with"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_what_cannot_go_on_is_not_loaded(config, one_rollout, tmp_path, capsys, monkeypatch, flags, message):
    shutil.copytree(one_rollout, tmp_path / "run")
    monkeypatch.setattr(run_ddpo, "load_policy", lambda *_: pytest.fail("the policy was loaded"))
    monkeypatch.setattr(run_ddpo.RunArguments, "make_rewards", lambda _: pytest.fail("the reward was loaded"))
    assert command("--config", config, "--resume_from_checkpoint", "latest", *flags) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("reward", ["JpegCompressibility", "PickScore"])
def test_a_reward_of_one_number_gives_no_credit_by_place(config, tmp_path, capsys, nothing_is_loaded, reward):
    kwargs = {}
    if reward == "PickScore":
        (tmp_path / "config.json").write_text('{"model_type": "clip"}')
        for name in ("model.safetensors", "tokenizer.json"):
            (tmp_path / name).touch()
        kwargs = {"model": str(tmp_path)}
    flags = ["--credit", "focus", "--reward", f"reward.others:{reward}", "--reward_kwargs", json.dumps(kwargs)]
    assert command("--config", config, *flags) == 2
    assert "credit focus on maps needs a reward with penalty maps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--reward", "reward.http:HttpReward", "--reward_kwargs", '{"url": "localhost:8000"}'],
            "url is 'localhost:8000'",
        ),
        (
            ["--eval_rewards", '{"size": {"reward": "reward.others:JpegCompressibility", "kwargs": {"quality": 0}}}'],
            "quality is 0",
        ),
    ],
    ids=["trained on", "only asked"],
)
def test_what_a_reward_says_of_its_arguments_is_said_first(config, capsys, nothing_is_loaded, flags, message):
    assert command("--config", config, *flags) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("how", "credit", "message"),
    [
        ("column", "image", "(1, 1)"),
        ("nan", "image", "is nan for the prompt"),
        ("negative", "focus", "negative"),
        ("one map", "focus", "blame"),
    ],
)
@pytest.mark.parametrize("asked", ["trained on", "only asked"])
def test_a_reward_that_cannot_be_trained_on_is_found_out_before_the_policy_is_loaded(
    config, tmp_path, capsys, monkeypatch, how, credit, message, asked
):
    monkeypatch.setattr(run_ddpo, "load_policy", lambda path, args: pytest.fail("loaded too early"))
    broken = {"reward": "tests.rl.toy_rewards:Broken", "kwargs": {"how": how}}
    flags = ["--eval_rewards", json.dumps({"it": broken})]
    if asked == "trained on":
        flags = ["--credit", credit, "--reward", broken["reward"], "--reward_kwargs", json.dumps(broken["kwargs"])]
    assert command("--config", config, *flags) == 2
    said = capsys.readouterr().err
    name = "reward" if asked == "trained on" else "it"
    assert f"asked about one grey picture, the reward '{name}' fails: " in said
    assert message in said
    assert not (tmp_path / "run/run_config.json").exists()


def test_credit_by_maps_of_a_users_own_reward_is_refused_before_the_policy_is_loaded(config, capsys, monkeypatch):
    monkeypatch.setattr(run_ddpo, "load_policy", lambda path, args: pytest.fail("loaded too early"))
    flags = ["--credit", "focus", "--reward", "tests.rl.toy_rewards:Plain", "--reward_kwargs", "{}"]
    assert command("--config", config, *flags) == 2
    assert "credit focus on maps needs a reward with penalty maps" in capsys.readouterr().err


def test_one_command_starts_goes_on_and_finds_that_nothing_is_left(config, tmp_path, capsys):
    folder, line = tmp_path / "run", ("--config", config, "--num_train_epochs", "1", "--resume_from_checkpoint", "auto")
    assert command(*line) == 0
    results = {path: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "summary.json"}
    assert command(*line) == 0
    assert "nothing to do" in capsys.readouterr().out
    (folder / "finished.json").unlink()  # as if killed just before the end: only the evaluation is made again
    (folder / "evaluation.json").unlink()
    assert command(*line) == 0
    assert {path: path.read_bytes() for path in results} == results

    capsys.readouterr()
    (folder / "finished.json").unlink()
    file = folder / "checkpoint-1/optimizer.pt"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert command(*line) == 2
    said = capsys.readouterr()
    assert "checkpoint-1 is damaged: optimizer.pt" in said.err
    assert "loading" not in said.out
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[1:]))
    assert command(*line) == 2
    assert "prompts (SHA-256): '" in capsys.readouterr().err


def test_a_dry_run_says_what_it_would_cost_and_writes_nothing(config, tmp_path, capsys, monkeypatch):
    assert command("--config", config, "--dry_run", "true") == 0
    said = capsys.readouterr().out
    assert "nothing was written" in said
    assert "the whole run: about 0 h" in said
    assert not (tmp_path / "run").exists()
    assert command("--config", config, "--num_train_epochs", "1") == 0
    kept = sorted((tmp_path / "run").rglob("*"))
    monkeypatch.setattr("transformers.trainer.hf_api", None)  # nor does it make a repository on the hub
    pushed = ["--push_to_hub", "true"]
    assert command("--config", config, "--dry_run", "true", *pushed) == 0  # beside a run that is there, too
    assert sorted((tmp_path / "run").rglob("*")) == kept


def test_stop_on_ends_the_run_in_order_and_names_the_best_checkpoint(config, tmp_path, capsys):
    """The policy has moved from the base when the second rollout is drawn."""
    watch = ["--watch_reward", "judge", "--stop_on", "kl", "--watch_limits", '{"kl": 1e-12}']
    assert command("--config", config, "--num_train_epochs", "4", *watch) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["updates"] == 2
    assert "kl" in summary["watch"]["over"]
    assert summary["watch"]["stopped_by"] == ["kl"]
    best = summary["watch"]["best_checkpoint"]
    assert best["path"] == str(tmp_path / "run/checkpoint-1")
    assert (tmp_path / "run/checkpoint-1/complete.json").exists()
    assert (tmp_path / "run/pytorch_lora_weights.safetensors").exists()
    assert f"best checkpoint by judge, {best['held_out']:.4f} in its rollout: {best['path']}" in capsys.readouterr().out


def test_evaluations_are_held_against_the_one_before_training(config, tmp_path, capsys):
    """Not against the first in the midst of it, which would be no different from itself."""
    flags = ["--eval_strategy", "epoch", "--watch_reward", "judge", "--learning_rate", "0.1", "--warmup_steps", "0"]
    assert command("--config", config, *flags, "--num_train_epochs", "1") == 0
    log = json.loads((tmp_path / "run/checkpoint-1/trainer_state.json").read_text())["log_history"]
    (found,) = [entry["watch/evaluated"] for entry in log if "watch/evaluated" in entry]
    told = json.loads((tmp_path / "run/evaluation.json").read_text())  # behind training: the same weights
    means = {name: [np.mean(told[when][name], axis=1) for when in ("before", "after")] for name in told["before"]}
    assert found == pytest.approx(min(paired_fall(*means[name]) for name in ("reward", "judge.total")))
    assert found != 0
    assert command("--config", config, *flags, "--resume_from_checkpoint", "latest") == 0  # two rollouts
    best = json.loads((tmp_path / "run/summary.json").read_text())["watch"]["best_checkpoint"]
    assert (best["global_step"], best["evaluated"]) == (1, True)
    assert best["held_out"] == pytest.approx(means["judge.total"][1].mean())
    assert f"best checkpoint by judge, {best['held_out']:.4f} in its evaluation" in capsys.readouterr().out


def test_what_a_run_leaves_is_pushed_once_and_whole(config, tmp_path, monkeypatch):
    pushed = []

    class Hub:
        def create_repo(self, name, **settings):
            return SimpleNamespace(repo_id=name)

        def upload_folder(self, repo_id, folder_path, **settings):
            files = {path.name for path in Path(folder_path).iterdir() if path.is_file()}
            pushed.append((repo_id, files, (Path(folder_path) / "README.md").read_text()))

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    flags = ["--num_train_epochs", "1", "--push_to_hub", "true", "--hub_model_id", "me/mine"]
    assert command("--config", config, *flags) == 0
    ((place, files, card),) = pushed
    assert place == "me/mine"
    results = {"pytorch_lora_weights.safetensors", "before_after.png", "curves.png", "summary.json", "evaluation.json"}
    assert results <= files
    assert 'pipe.load_lora_weights("me/mine")' in card
    assert "base_model" not in card  # a folder here is nothing that the hub knows
    assert (tmp_path / "run/finished.json").exists()


def test_a_hub_that_takes_nothing_loses_nothing(config, tmp_path, monkeypatch, capsys):
    class Hub:
        def create_repo(self, name, **settings):
            return SimpleNamespace(repo_id=f"me/{name}")

        def upload_folder(self, **settings):
            raise ConnectionError("no route")

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    flags = ["--config", config, "--num_train_epochs", "1", "--push_to_hub", "true"]
    assert command(*flags) == 2
    assert f"but the hub did not take it (no route); upload it with `hf upload me/run {tmp_path / 'run'}`" in (
        capsys.readouterr().err
    )
    assert 'pipe.load_lora_weights("me/run")' in (tmp_path / "run/README.md").read_text()
    assert (tmp_path / "run/finished.json").exists()
    monkeypatch.setattr(Hub, "create_repo", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("no route")))
    assert command(*flags, "--overwrite_output_dir") == 2
    assert "push_to_hub: cannot make the repository" in capsys.readouterr().err


def weighted(url):
    """Flags of a weighted sum in place of the config's reward, one member of it at `url`."""
    red = {"reward": "tests.rl.toy_rewards:Redness", "weight": 2.0}
    far = {"reward": "reward.http:HttpReward", "weight": 0.5, "kwargs": {"url": url, "tries": 2, "backoff": 0.0}}
    return ["--reward", "", "--rewards", json.dumps({"red": red, "far": far})]


def test_rewards_are_weighed_and_may_be_elsewhere(config, tmp_path):
    with serving(Plain()) as url:
        assert command("--config", config, "--num_train_epochs", "1", *weighted(url)) == 0
    figures = json.loads((tmp_path / "run/evaluation.json").read_text())["before"]
    picture = {name: values[0][0] for name, values in figures.items()}
    assert picture["reward"] == pytest.approx(2.0 * picture["reward.red"] + 0.5 * picture["reward.far"], abs=1e-5)
    assert {"reward.red.red", "reward.far.satisfied"} <= picture.keys()


def test_a_reward_that_falls_silent_ends_the_run_and_leaves_its_checkpoint(config, tmp_path, capsys):
    calls = []

    def dies_in_the_second_rollout(images, prompts):
        calls.append(1)
        if len(calls) > 3:  # a grey picture, and the micro-batches of a rollout
            raise RuntimeError("out of memory")
        return Plain()(images, prompts)

    with serving(dies_in_the_second_rollout) as url:
        assert command("--config", config, "--eval_prompts", "", *weighted(url)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert f"the reward at {url} gave no answer in 2 tries: HTTP 500: RuntimeError: out of memory" in line
    assert (tmp_path / "run/checkpoint-1/complete.json").exists()


@pytest.mark.parametrize(
    "changes", [{"eval_rewards": {"judge": "a:b"}}, {"eval_generations": 3}, {"eval_seed": 1}, {"num_before_after": 3}]
)
def test_settings_of_an_evaluation_without_prompts_are_warned_about(changes, caplog):
    required = {"policy": "p", "reward": "a:b", "prompts": "p.txt"}
    run_ddpo.RunArguments(**required)
    run_ddpo.RunArguments(**required, eval_prompts="p.txt", **changes)
    assert not caplog.text
    run_ddpo.RunArguments(**required, **changes)
    assert f"{next(iter(changes))}={next(iter(changes.values()))!r} is ignored" in caplog.text


@pytest.mark.parametrize(
    "flags",
    [
        ["--reward", "tests.rl.toy_rewards:Nothing"],
        ["--reward_kwargs", '{"nan_after": 0}'],
        ["--resolution", "3"],
        ["--lora_target_modules", "no_such_layer"],
        ["--credit", "focus", "--reward", "tests.rl.toy_rewards:Plain", "--reward_kwargs", "{}"],
        ["--learning_rate", "-1"],
        ["--learning_rate", "nan"],
        ["--adam_beta1", "2"],
        ["--warmup_steps", "-3"],
        ["--report_to", "no_such_logger"],
        ["--deepspeed", "nowhere.json"],
        ["--neftune_noise_alpha", "5"],
        ["--resolution", "0"],
        ["--reward_kwargs", '{"nan_after": 1}'],
        ["--max_grad_norm", "nan"],
    ],
)
def test_a_run_that_cannot_start_deletes_nothing_of_the_one_before(config, tmp_path, flags):
    whole = tmp_path / "run/checkpoint-1/complete.json"
    whole.parent.mkdir(parents=True)
    for file in (whole, tmp_path / "run/run_config.json", tmp_path / "run/summary.json"):
        file.write_text("{}")
    assert command("--config", config, "--overwrite_output_dir", *flags) == 2
    assert whole.exists()
    assert (tmp_path / "run/summary.json").exists()
    assert (tmp_path / "run/run_config.json").read_text() == "{}"


def test_what_is_replaced_comes_back_where_the_run_ends_before_its_first_update(config, tmp_path, capsys):
    """Stopped by Ctrl-C, at once; killed, with the next start, which then sees what it was to replace."""
    folder, flags = tmp_path / "run", ["--config", config, "--num_train_epochs", "1", "--eval_prompts", ""]
    flags += ["--eval_rewards", "{}"]
    assert command(*flags) == 0
    before = {path.name for path in folder.iterdir()}
    weights = (folder / LORA_WEIGHTS).read_bytes()
    stopped = ["--reward", "tests.rl.toy_rewards:CtrlC", "--reward_kwargs", "{}", "--overwrite_output_dir"]
    assert command(*flags, *stopped) == 130
    assert "stopped before the first update; nothing is kept of it" in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == before
    claim_output_dir(folder, {"another": "run"}, resume=False)  # and then it is killed
    assert not (folder / LORA_WEIGHTS).exists()
    assert command(*flags) == 2
    assert "holds a finished run of the same settings" in capsys.readouterr().err
    assert (folder / LORA_WEIGHTS).read_bytes() == weights
    assert {path.name for path in folder.iterdir()} == before


def test_a_reward_may_view_its_pictures(config, tmp_path):
    flags = ["--reward", "tests.rl.toy_rewards:Viewing", "--reward_kwargs", "{}", "--num_train_epochs", "1"]
    assert command("--config", config, *flags) == 0


@pytest.mark.parametrize("phase", ["before", "after"])
def test_ctrl_c_in_an_evaluation_says_whether_something_was_trained(phase, capsys):
    def interrupted(held_out, on_batch):
        raise KeyboardInterrupt

    args = SimpleNamespace(output_dir="outputs/mine", disable_tqdm=True, should_save=True, world_size=1)
    trainer = SimpleNamespace(args=args, judge=interrupted)
    how = SimpleNamespace(held_out=lambda prompts, rewards: None, eval_generations=1)
    with pytest.raises(KeyboardInterrupt):
        judge(phase, trainer, ["a"], {}, how, Console())
    said = capsys.readouterr().out
    assert ("what was trained lies in outputs/mine; the same command with --resume_from_checkpoint auto" in said) == (
        phase == "after"
    )


def test_ctrl_c_ends_with_a_checkpoint_and_how_to_go_on(config, tmp_path):
    folder = tmp_path / "run [b]"  # rich would read it as markup, and break the line that names it
    run = subprocess.Popen(
        [sys.executable, "run_ddpo.py", "--config", config, "--num_train_epochs", "100000", "--save_strategy", "no",
         "--output_dir", str(folder)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "TQDM_DISABLE": "1"},
    )  # fmt: skip
    for line in run.stdout:
        if line.startswith("training"):
            break
    time.sleep(3)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=120)
    assert run.returncode == 130, err
    assert f"go on with --resume_from_checkpoint {folder}/checkpoint-" in out
    assert "Traceback" not in err
    assert list(folder.glob("checkpoint-*/complete.json"))


def settings_of(path, *flags):
    return run_ddpo.parse_arguments(
        [run_ddpo.RunArguments, run_ddpo.DDPOConfig], ["--config", str(path), "--use_cpu", "--bf16", "false", *flags]
    )


def readmes_runs():
    """The README's commands for several GPUs that start `run_ddpo.py`: launcher's YAML, its flags, the run's flags."""
    text = (ROOT / "README.md").read_text()
    for command in re.findall(r"accelerate launch (.*?)\n\n", text, flags=re.DOTALL):
        launcher, found, run = command.replace("\\\n", " ").partition("run_ddpo.py")
        if found:
            yield launcher.split(), run.split()


def test_readmes_commands_for_several_gpus_divide(monkeypatch):
    """Two updates a rollout, as on one GPU, and as in the run of ddpo-pytorch that one of them stands for."""
    commands = list(readmes_runs())
    assert len(commands) == 3
    for launcher, flags in commands:
        file = yaml.safe_load((ROOT / launcher[launcher.index("--config_file") + 1]).read_text())
        named = "--num_processes" in launcher
        processes = int(launcher[launcher.index("--num_processes") + 1]) if named else file["num_processes"]
        assert processes == (8 if named else 4)
        monkeypatch.setattr(run_ddpo.DDPOConfig, "world_size", processes)
        config = flags.index("--config")
        rest = [flag.strip("'") for flag in flags[:config] + flags[config + 2 :]]
        if "--deepspeed" in rest:
            rest = rest[: rest.index("--deepspeed")]
        _, args = settings_of(ROOT / flags[config + 1], *rest)
        steps = args.num_inference_steps if args.train_steps == ["all"] else len(args.train_steps)
        assert args.plan(steps).updates == 2
    accumulation = re.search(r"--gradient_accumulation_steps \d+", " ".join(commands[0][1]))[0]
    assert accumulation in (ROOT / "configs/accelerate/multi_gpu.yaml").read_text()


def test_readmes_table_of_several_gpus_divides(monkeypatch):
    """Two updates a rollout, or no way to have them."""
    text = (ROOT / "README.md").read_text()
    heading, *rows = re.search(r"\| preset \| 1 GPU .*?\n\n", text, flags=re.DOTALL)[0].strip().splitlines()
    worlds = [int(cell.split()[0]) for cell in heading.strip("|").split("|")[1:]]
    assert (worlds, len(rows)) == ([1, 2, 4, 8], 4)
    for row in rows[1:]:
        preset, *cells = (cell.strip(" `") for cell in row.strip("|").split("|"))
        for world, cell in zip(worlds, cells, strict=True):
            monkeypatch.setattr(run_ddpo.DDPOConfig, "world_size", world)
            told = [cell] if cell.isdigit() else map(str, range(1, 65))
            updates = {updates_of(ROOT / f"configs/{preset}.yaml", accumulated) for accumulated in told}
            assert (updates == {2}) if cell.isdigit() else (2 not in updates), (preset, world)


def updates_of(config, accumulated):
    """Of a rollout; None where the numbers do not divide."""
    try:
        _, args = settings_of(config, "--prompts", "prompts.txt", "--gradient_accumulation_steps", accumulated)
        return args.plan(len(args.train_steps)).updates
    except ValueError:
        return None


def test_readmes_run_of_ddpo_pytorch_is_theirs(monkeypatch):
    """Whatever the preset says: their defaults, of `config/base.py` and of TRL's `DDPOConfig` and pipeline."""
    monkeypatch.setattr(run_ddpo.DDPOConfig, "world_size", 8)
    (flags,) = (flags for launcher, flags in readmes_runs() if "--num_processes" in launcher)
    _, args = settings_of(ROOT / flags[flags.index("--config") + 1], *(flag.strip("'") for flag in flags[2:]))
    theirs = {
        "weight_decay": 1e-4, "warmup_steps": 0, "lora_rank": 4, "lora_alpha": 4, "init_lora_weights": "gaussian",
        "lora_target_modules": ["to_q", "to_k", "to_v", "to_out.0"], "fp16": True, "bf16": False,
        "model_dtype": "float16", "learning_rate": 3e-4, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8,
        "max_grad_norm": 1, "advantage_clip": 5, "advantage_std_floor": 1e-6, "epsilon": 1e-4, "eta": 1,
        "guidance_scale": 5, "train_guidance": True, "num_iterations": 1, "advantage_baseline": "prompt",
        "prompt_buffer_size": 32, "prompt_min_count": 16, "importance_sampling_level": "image", "beta": 0,
        "timestep_fraction": 1, "train_steps": ["all"], "per_device_rollout_batch_size": 8,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in theirs} == theirs


def test_readmes_reward_of_theirs_is_one_of_ours(monkeypatch):
    theirs = SimpleNamespace(aesthetic_score=lambda: lambda images, prompts, metadata: ([5.0] * len(prompts), {}))
    monkeypatch.setitem(sys.modules, "ddpo_pytorch", SimpleNamespace(rewards=theirs))
    monkeypatch.setitem(sys.modules, "ddpo_pytorch.rewards", theirs)
    code = re.search(r"( +# my_rewards\.py.*?\n)\n\S", (ROOT / "README.md").read_text(), flags=re.DOTALL)[1]
    exec(textwrap.dedent(code), scope := {})
    images = torch.zeros(2, 3, 4, 4)
    check_reward(reward := scope["adapted"](images, PROMPTS[:2]), PROMPTS[:2])
    assert reward.total.tolist() == [5.0, 5.0]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("ddpo_*.yaml")), ids=lambda path: path.name)
def test_presets_rewards_can_be_built(path, monkeypatch):
    """All of a preset but the predictor's weights, which may be the user's own."""
    monkeypatch.setattr(RichFeedbackPredictor, "from_pretrained", lambda folder: folder)
    run, _ = settings_of(path)
    reward = run.make_reward()
    assert reward.predictor == run.reward_kwargs["model"]
    assert len(reward.score_weights) >= 2
    assert reward.penalty_weights
    assert reward.word_weight > 0
    if "sd15" in path.name or "sdxl" in path.name:
        assert set(reward.score_weights) == set(SCORES)
        assert set(reward.penalty_weights) == set(HEATMAPS)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("ddpo_*.yaml")), ids=lambda path: path.name)
def test_presets_are_valid_and_open_with_three_comment_lines(path, monkeypatch):
    """Their arithmetic is that of as many processes as the first line starts."""
    lines = path.read_text().splitlines()
    assert all(line.startswith("# ") for line in lines[:3])
    assert f"--config configs/{path.name}" in lines[0]
    processes = int((re.search(r"--num_processes (\d+)", lines[0]) or [0, 1])[1])
    monkeypatch.setattr(run_ddpo.DDPOConfig, "world_size", processes)
    _, args = settings_of(path)
    plan = args.plan(len(args.train_steps))
    if told := re.search(r"then (\d+) updates? of (\d+) rows", lines[2]):
        assert (plan.updates, plan.pictures * plan.train_steps // plan.updates) == tuple(map(int, told.groups()))
    assert processes == 1 or told
