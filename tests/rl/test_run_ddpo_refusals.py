"""What `run_ddpo.py` refuses: one line that says why, before anything is loaded."""

import json
import shutil
from pathlib import Path

import pytest

import run_ddpo
from tests.rl.command import command, write_config
from tests.rl.conftest import put_in_hub_cache


def the_error(capsys):
    """The line that a command leaves."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    """Rewards and policies that are asked for too early."""
    loaded = []
    monkeypatch.setattr(run_ddpo.RunArguments, "make_rewards", lambda run: loaded.append("rewards") or {})
    monkeypatch.setattr(run_ddpo, "load_policy", lambda path, args: loaded.append(path))
    yield
    assert loaded == []


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
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(config, capsys, nothing_is_loaded, flags, names):
    assert command("--config", config, *flags) == 2
    line = the_error(capsys)
    assert all(name in line for name in names), line


@pytest.mark.parametrize(
    ("flag", "text", "message"),
    [
        ("--prompts", "", "holds no prompt"),
        ("--prompts", "a red circle\n...\n", "line 2 of the prompt file"),
        ("--eval_prompts", "\n \n", "holds no prompt"),
    ],
)
def test_prompt_files_are_read_before_anything_is_loaded(
    config, tmp_path, capsys, nothing_is_loaded, flag, text, message
):
    (tmp_path / "wrong.txt").write_text(text)
    assert command("--config", config, flag, str(tmp_path / "wrong.txt")) == 2
    line = the_error(capsys)
    assert "wrong.txt" in line
    assert message in line


def test_a_pipeline_that_lacks_a_part_is_found_out_before_anything_is_loaded(
    config, pipeline_folder, tmp_path, capsys, nothing_is_loaded
):
    shutil.copytree(pipeline_folder, tmp_path / "pipeline")
    shutil.rmtree(tmp_path / "pipeline/vae")
    assert command("--config", config, "--policy", str(tmp_path / "pipeline")) == 2
    assert "vae" in the_error(capsys)


def test_a_reward_that_is_nan_while_it_is_trained_on_names_the_prompt(config, capsys):
    assert command("--config", config, "--reward_kwargs", '{"nan_after": 3}') == 2
    assert "term `red` is nan for the prompt" in the_error(capsys)


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
        ("column", "image", "(2, 1)"),
        ("mean of all", "image", "(1,)"),
        ("one map for all", "focus", "blame"),
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
    assert f"asked about two grey pictures, the reward '{name}' fails: " in said
    assert message in said
    assert not (tmp_path / "run/run_config.json").exists()


def test_credit_by_maps_of_a_users_own_reward_is_refused_before_the_policy_is_loaded(config, capsys, monkeypatch):
    monkeypatch.setattr(run_ddpo, "load_policy", lambda path, args: pytest.fail("loaded too early"))
    flags = ["--credit", "focus", "--reward", "tests.rl.toy_rewards:Plain", "--reward_kwargs", "{}"]
    assert command("--config", config, *flags) == 2
    assert "credit focus on maps needs a reward with penalty maps" in capsys.readouterr().err
