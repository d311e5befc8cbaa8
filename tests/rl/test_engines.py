"""Several CPU ranks against one process, under every engine; and what DeepSpeed needs to start on a CPU."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

import run_ddpo
from reward.engines import prepare_deepspeed_on_cpu
from rl.adapter import LORA_WEIGHTS
from rl.ddpo import DDPOConfig
from tests.rl import ranks
from tests.rl.conftest import PROMPTS

ROOT = Path(__file__).parents[2]
ZERO = str(ROOT / "configs/deepspeed/zero{}.json")
# DeepSpeed compiles a small op on first use; it stays beside the packages.
ENVIRONMENT = {"TORCH_EXTENSIONS_DIR": str(Path(sys.prefix) / "torch_extensions"), **os.environ}
TRAINED = 7776
"""Weights of the LoRA."""
TRAINED_TEXT = 4 * 2 * (16 + 16)
"""Of the text encoder's: four layers of 16 x 16, rank 2."""


def launch(launcher: list[str], pipeline: str, folder: Path, arguments: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--rdzv_backend=c10d", f"--log_dir={folder / 'logs'}"]
    command += [*launcher, "tests/rl/ranks.py", pipeline, str(folder), *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT, cwd=ROOT
    )


def finish(*launched: subprocess.Popen) -> None:
    try:
        for process in launched:
            said, _ = process.communicate(timeout=1100)
            assert process.returncode == 0, said[-3000:]
    finally:
        for process in launched:
            process.terminate()  # torchrun ends its workers


def noted(folder: Path, engine: str, processes: int) -> dict:
    """What the first rank noted, where all noted the same."""
    each = [torch.load(folder / engine / f"noted-{rank}.pt") for rank in range(processes)]
    for other in each[1:]:
        assert other["watch"] == each[0]["watch"]
        assert torch.equal(other["latents"], each[0]["latents"])
    return each[0]


def assert_same_run(one: dict, several: dict, rollouts: int = 2) -> None:
    """Losses within 1e-4, and what the rollouts drew."""
    assert [entry["step"] for entry in one["log"]] == list(range(1, 2 * rollouts + 1))
    assert max(abs(entry["loss"]) for entry in one["log"]) > 1e-3, "there is nothing to compare"
    for alone, together in zip(one["log"], several["log"], strict=True):
        assert together["loss"] == pytest.approx(alone["loss"], abs=1e-4)
        for name in {"reward", "ratio", "clip_fraction", "grad_norm"} & alone.keys():
            assert together[name] == pytest.approx(alone[name], rel=1e-3, abs=1e-5), name
    torch.testing.assert_close(several["latents"], one["latents"], rtol=1e-4, atol=1e-4)
    assert several["watch"]["start"] == pytest.approx(one["watch"]["start"], rel=1e-3, abs=1e-6)
    assert best_step(several) == best_step(one)


def assert_same_choice(one: dict, several: dict) -> None:
    """Of steps, from the same measurements; the third rollout is the first that goes by any."""
    assert_same_run(one, several, 3)
    assert several["steps"] == one["steps"]
    assert one["probe"]["measured"].shape == (2, 4)
    for name, tensor in one["probe"].items():
        torch.testing.assert_close(several["probe"][name], tensor, rtol=1e-2, atol=1e-4, msg=name)


def assert_nearly_same_run(one: dict, several: dict) -> None:
    """In bfloat16, of whose rounding second updates make much: the first of each rollout, whose ratio is 1 exactly."""
    torch.testing.assert_close(several["latents"], one["latents"], rtol=0.05, atol=0.05)
    for alone, together in zip(one["log"][::2], several["log"][::2], strict=True):
        assert together["ratio_deviation"] == alone["ratio_deviation"] == 0
        for name in ("reward", "grad_norm"):
            assert together[name] == pytest.approx(alone[name], rel=0.02), name


def best_step(noted: dict) -> int | None:
    """Of the checkpoint to keep; None where no rollout was drawn from one."""
    best = noted["watch"]["best"]
    return None if best is None else best["global_step"]


def lora(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / LORA_WEIGHTS)


def assert_close(one: dict[str, torch.Tensor], several: dict[str, torch.Tensor]) -> None:
    assert one.keys() == several.keys() != set()
    for name in one:
        torch.testing.assert_close(several[name], one[name], rtol=1e-3, atol=1e-5, msg=name)


def flags_of(folder: Path, pipeline: Path, **changes) -> list[str]:
    """Of `run_ddpo.py`: one rollout and one update on two ranks."""
    prompts = folder.with_name("prompts.txt")
    prompts.write_text("\n".join(PROMPTS))
    settings = {
        "policy": pipeline, "reward": "tests.rl.toy_rewards:Redness", "prompts": prompts, "eval_prompts": prompts,
        "eval_generations": 1, "output_dir": folder, "use_cpu": True, "num_train_epochs": 1, "num_inference_steps": 3,
        "train_steps": 1, "generation_batch_size": 8, "num_generations": 4, "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1, "lora_rank": 2, "disable_tqdm": True, **changes,
    }  # fmt: skip
    return [str(part) for name, value in settings.items() for part in (f"--{name}", value)]


@pytest.fixture(scope="module")
def alone(pipeline_folder, tmp_path_factory):
    """The run in one process: its folder, and what was noted of it."""
    folder = tmp_path_factory.mktemp("alone")
    return folder / "ddp", ranks.run(pipeline_folder, folder, "ddp", 1)


@pytest.mark.timeout(1200)
def test_two_ranks_of_every_engine_are_one_process(pipeline_folder, alone, tmp_path):
    """They draw its pictures, compare them over both, and leave its weights, up to rounding. Last, the command."""
    folder, one = alone
    engines = ["ddp", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]
    texts, ways = ["ddp:text", "zero2:text"], [f"ddp:{way}" for way in ranks.WAYS if way != "preset"]
    flags = flags_of(tmp_path / "command", pipeline_folder, eval_strategy="epoch", deepspeed=ZERO.format(3))
    launcher = ["--nproc_per_node=2", "--rdzv_endpoint=localhost:0"]
    every = [*engines, "zero3:full", *texts, *ways, "zero2:auto", "zero2:preset"]
    finish(launch(launcher, pipeline_folder, tmp_path, [*every, "--", *flags]))
    assert one["trained"] == TRAINED
    assert best_step(one) in (2, 4)
    for engine in engines:
        two = noted(tmp_path, engine, 2)
        assert two["type"] == ("DistributedDataParallel" if engine == "ddp" else "DeepSpeedEngine")
        assert two["trained"] == (0 if engine.startswith("zero3") else TRAINED), "sharded, or not"
        assert_same_run(one, two, 3)
        for place in ("", "checkpoint-4", "checkpoint-6"):
            assert_close(lora(folder / place), lora(tmp_path / engine / place))

    one = ranks.run(pipeline_folder, tmp_path / "alone", "ddp:full", 1)
    assert_same_run(one, noted(tmp_path, "zero3:full", 2))
    left = (tmp_path / "alone/ddp:full", tmp_path / "zero3:full")
    assert_close(*(UNet2DConditionModel.from_pretrained(place, subfolder="unet").state_dict() for place in left))

    one = ranks.run(pipeline_folder, tmp_path / "alone", "ddp:text", 1)
    assert one["trained"] == TRAINED + TRAINED_TEXT
    for engine in texts:
        two = noted(tmp_path, engine, 2)
        assert_same_run(one, two)
        assert two["type"] == ("DeepSpeedEngine" if "zero" in engine else "DistributedDataParallel")
        assert_close(lora(tmp_path / "alone/ddp:text"), lora(tmp_path / engine))
    (states,) = (tmp_path / "zero2:text/checkpoint-4").glob("global_step*/*model_states.pt")
    kept = torch.load(states, weights_only=False)
    assert sum(weight.numel() for weight in kept["module"].values()) == TRAINED + TRAINED_TEXT
    assert not kept["frozen_param_fragments"]

    for way in ways:
        one, two = ranks.run(pipeline_folder, tmp_path / "alone", way, 1), noted(tmp_path, way, 2)
        assert two["type"] == "DistributedDataParallel"
        if way == "ddp:auto":
            assert_same_choice(one, two)
            two = noted(tmp_path, "zero2:auto", 2)
            assert two["type"] == "DeepSpeedEngine"
            assert_same_choice(one, two)
        else:
            assert_same_run(one, two)
        assert_close(lora(tmp_path / "alone" / way), lora(tmp_path / way))

    one = ranks.run(pipeline_folder, tmp_path / "alone", "ddp:preset", 1)
    assert_nearly_same_run(one, noted(tmp_path, "zero2:preset", 2))

    summary = json.loads((tmp_path / "command/summary.json").read_text())
    assert summary["before"]["reward"] != summary["after"]["reward"]
    assert (tmp_path / "command/samples/rollout-000001.png").is_file()
    pipe = StableDiffusionPipeline.from_pretrained(pipeline_folder, safety_checker=None, requires_safety_checker=False)
    pipe.load_lora_weights(str(tmp_path / "command"))
    assert pipe.get_active_adapters()


@pytest.mark.timeout(600)
def test_accelerate_launches_the_command_under_zero_2(pipeline_folder, tmp_path):
    """By the line that `configs/accelerate/cpu_2_ranks.yaml` gives; the weights are those of one process."""
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        "configs/accelerate/cpu_2_ranks.yaml",
        f"--log_dir={tmp_path / 'logs'}",
    ]
    flags = flags_of(tmp_path / "two", pipeline_folder, deepspeed=ZERO.format(2))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = ["--main_process_port", str(free.getsockname()[1])]
    finish(subprocess.Popen([*launcher, *port, "run_ddpo.py", *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, env=ENVIRONMENT, cwd=ROOT))  # fmt: skip
    run_ddpo.main(flags_of(tmp_path / "one", pipeline_folder, gradient_accumulation_steps=2))
    assert_close(lora(tmp_path / "one"), lora(tmp_path / "two"))
    one, two = (json.loads((tmp_path / run / "summary.json").read_text()) for run in ("one", "two"))
    assert one["after"]["reward"] != one["before"]["reward"]
    assert two["after"]["reward"] == pytest.approx(one["after"]["reward"], rel=1e-4)


@pytest.mark.timeout(1200)
def test_two_nodes_of_two_ranks_are_one_process(pipeline_folder, alone, tmp_path):
    """The same command on each, as the README says; here both are this machine. No other test has four ranks."""
    folder, one = alone
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launcher = ["--nnodes=2", "--nproc_per_node=2", f"--rdzv_endpoint=localhost:{port}", "--rdzv_id=two_nodes"]
    finish(*(launch(launcher, pipeline_folder, tmp_path, ["ddp"]) for _ in range(2)))
    assert_same_run(one, noted(tmp_path, "ddp", 4), rollouts=3)
    assert_close(lora(folder), lora(tmp_path / "ddp"))


def test_zero_3_that_could_not_save_is_refused(tmp_path):
    settings = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": "auto"}
    with pytest.raises(ValueError, match="stage3_gather_16bit_weights_on_model_save must be true"):
        DDPOConfig(output_dir=str(tmp_path), use_cpu=True, deepspeed=settings)


def test_zero_3_cannot_train_text_encoders(tmp_path):
    """CLIP looks at its table of positions by itself, of which a rank has a part."""
    zero3 = str(ROOT / "configs/deepspeed/zero3.json")
    with pytest.raises(ValueError, match=r"train_text_encoder needs whole weights, .*; use ZeRO-2"):
        DDPOConfig(output_dir=str(tmp_path), use_cpu=True, deepspeed=zero3, train_text_encoder=True)


@pytest.mark.parametrize(("left", "age", "stays"), [("loading", 0, False), ("", 0, True), ("", 3600, False)])
def test_lock_of_a_killed_process_is_removed_and_that_of_a_living_one_is_not(left, age, stays, monkeypatch, tmp_path):
    """What a process that was killed while it loaded DeepSpeed's op leaves: torch's lock, and a word in our own; not
    that word if it did so without us."""
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    folder, found = tmp_path / ShareMemCommBuilder.NAME, []
    folder.mkdir()
    (folder / "lock").write_text("")
    os.utime(folder / "lock", (time.time() - age,) * 2)
    (folder / "loading").write_text(left)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")

    def load(builder, verbose):
        found.append(((folder / "lock").exists(), (folder / "loading").read_text()))

    monkeypatch.setattr(ShareMemCommBuilder, "load", load)
    prepare_deepspeed_on_cpu()
    assert found == [(stays, "loading")]
    assert (folder / "loading").read_text() == ""
