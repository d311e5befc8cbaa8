"""The real command line, on a tiny pipeline with a toy reward."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import run_ddpo
from finetune.run import judge
from reward.folder_lock import taken
from rl.adapter import LORA_WEIGHTS
from rl.checkpoints import claim_output_dir
from rl.monitors import paired_fall
from tests.reward.test_http import serving
from tests.rl.command import command
from tests.rl.conftest import PROMPTS
from tests.rl.toy_rewards import Plain

ROOT = Path(__file__).parents[2]


def test_from_yaml_to_lora_figures_and_pictures(config, tmp_path, capsys, pipeline_folder):
    assert command("--config", config, "--num_train_epochs", "1") == 0
    folder = tmp_path / "run"
    summary = json.loads((folder / "summary.json").read_text())
    for phase in ("before", "after"):
        assert {"reward", "judge.satisfied", "diversity", "n"} <= summary[phase].keys()
    assert {"rollout", "decode", "reward", "update", "rest", "total"} <= summary["seconds"].keys()
    for name in ("before_after.png", "evaluation.json", "run_config.json", "runs", "checkpoint-1"):
        assert (folder / name).exists(), name
    events = EventAccumulator(str(folder / "runs"), size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Images("before_after")] == [2], "one step behind the last update"
    curves = set(events.Tags()["scalars"])
    for name in ("reward", "diversity", "drawn", "file_size", "kl", "map_entropy", "dead_groups"):
        assert f"train/watch/{name}" in curves
    assert {"train/reward", "train/kl", "train/ratio", "train/clip_fraction", "train/grad_norm"} <= curves
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
        if len(calls) > 3:  # grey pictures, and the micro-batches of a rollout
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
