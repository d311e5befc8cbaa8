"""What configs and README tell people to run."""

import re
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import run_ddpo
from reward.feedback import HEATMAPS, SCORES, check_reward
from reward.predict import RichFeedbackPredictor
from tests.rl.conftest import PROMPTS

ROOT = Path(__file__).parents[2]


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


@pytest.fixture
def on_a_gpu(monkeypatch):
    """As far as settings ask."""
    monkeypatch.setattr(run_ddpo.DDPOConfig, "device", torch.device("cuda"))


@pytest.mark.usefixtures("on_a_gpu")
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


@pytest.mark.usefixtures("on_a_gpu")
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
