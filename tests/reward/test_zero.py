"""The real training command on two CPU ranks, by DDP and DeepSpeed's ZeRO, against the same on one rank."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import DatasetDict
from safetensors.torch import load_file

from reward import train
from reward.data import load_data
from reward.model import RahfModel
from reward.predict import RichFeedbackPredictor
from reward.train_config import DEV_METRICS

ROOT = Path(__file__).parents[2]


def logged(folder: Path) -> list[dict[str, float]]:
    """What was logged of each step's training."""
    state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


def on_two_ranks(file: Path, trainings: list[list[str]]) -> None:
    file.write_text(json.dumps(trainings))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d"]
    launch += ["--rdzv_endpoint=localhost:0", f"--log_dir={file.with_name('logs')}"]
    launch += ["tests/reward/two_ranks.py", str(file)]
    # DeepSpeed compiles a small op on first use; it stays beside the packages.
    environment = {"TORCH_EXTENSIONS_DIR": str(Path(sys.prefix) / "torch_extensions"), **os.environ}
    done = subprocess.run(launch, capture_output=True, text=True, check=False, timeout=1100, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.timeout(1200)
def test_two_ranks_are_one(command, data, raw_data):
    """The same global batches, so the same losses, weights, and figures of the best checkpoint on dev, and nearly so in
    bf16. The five pictures of dev are no multiple of the ranks': none counts twice in a
    metric. (In Trainer's `eval_loss`, a mean over batches, the one that fills up the last batch does.)

    ZeRO-3 with checkpointed encoders and words in sequence, stopped half of the way, and resumed. DDP where another run
    was before, of which nothing must stay.
    """
    settings = {"crop_probability": 0.5, "learning_rate": 1e-2, "backbone_learning_rate": 3e-3, "warmup_steps": 1}
    splits = load_data(data)
    five = DatasetDict({"train": splits["train"], "dev": splits["dev"].select(range(5))})
    five.save_to_disk(str(raw_data / "five"))
    settings |= {"per_device_eval_batch_size": 3, "data": raw_data / "five"}
    halves = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}
    one = {words: train.main(command(words, **settings, words=words)) for words in ("tagging", "sequence")}
    engines, trainings = {"ddp": "tagging", "zero1": "tagging", "zero2": "tagging", "zero3": "sequence"}, []
    for engine, words in engines.items():
        told = settings | halves | {"words": words, "overwrite_output_dir": engine == "ddp"}
        if engine != "ddp":
            told |= {"deepspeed": ROOT / f"configs/deepspeed/{engine}.json"}
        if engine == "zero3":
            told |= {"activation_checkpointing": True}
            trainings.append(command(engine, **told, max_steps=2))
            told |= {"resume_from_checkpoint": "last"}
        trainings.append(command(engine, **told))
    lower = {"bf16": True, "deepspeed": ROOT / "configs/deepspeed/zero2.json"}
    trainings.append(command("bf16", **settings, **halves, **lower))
    (raw_data / "ddp" / "checkpoint-8").mkdir(parents=True)
    (raw_data / "ddp" / "checkpoint-8" / "complete").touch()
    on_two_ranks(raw_data / "trainings.json", trainings)
    assert not (raw_data / "ddp" / "checkpoint-8").exists()
    start = load_file(raw_data / "model" / "model.safetensors")
    for engine, words in engines.items():
        for alone, together in zip(logged(raw_data / words), logged(raw_data / engine), strict=True):
            for name in ("loss", "score_loss", "heatmap_loss", "word_loss", "grad_norm"):
                rel = 1e-3 if name == "grad_norm" else 1e-4
                assert together[name] == pytest.approx(alone[name], rel=rel), f"{engine}: {name}"
        whole, sharded = (load_file(raw_data / name / "model.safetensors") for name in (words, engine))
        assert whole.keys() == sharded.keys()
        for name in whole:
            torch.testing.assert_close(sharded[name], whole[name], rtol=1e-3, atol=2e-4, msg=f"{engine}: {name}")
            assert name not in start or not torch.equal(sharded[name], start[name]), f"{engine}: {name} is untrained"
        two = json.loads((raw_data / engine / "dev_metrics.json").read_text())
        assert two.keys() == one[words].keys()
        for name in (f"eval_{metric}" for metric in set(DEV_METRICS) - {"loss"}):
            assert two[name] == pytest.approx(one[words][name], rel=1e-3, abs=1e-5), f"{engine}: {name}"
        RahfModel.from_pretrained(raw_data / engine)
    assert_trained_in_bf16(raw_data / "bf16", logged(raw_data / "tagging"))


def assert_trained_in_bf16(folder: Path, in_float32: list[dict[str, float]]) -> None:
    """As the presets for GPUs are trained with DeepSpeed: all but the targets in bf16, the weights that stay too."""
    given = json.loads((folder / "given.json").read_text())
    assert given["pixel_values"] == "torch.bfloat16"
    assert [given[name] for name in ("scores", "heatmaps")] == ["torch.float32"] * 2
    for name in ("loss", "score_loss", "heatmap_loss", "word_loss"):
        alone, together = ([entry[name] for entry in log] for log in (in_float32, logged(folder)))
        assert together == pytest.approx(alone, rel=0.03), name
        assert together != alone, name
    assert {weight.dtype for weight in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    said = RichFeedbackPredictor.from_pretrained(folder)(torch.rand(2, 3, 40, 40), ["a red circle", "a square"])
    assert said.scores["overall"].isfinite().all()
    assert 0 < float(said.heatmaps["implausibility"].min()) <= float(said.heatmaps["implausibility"].max()) < 1
