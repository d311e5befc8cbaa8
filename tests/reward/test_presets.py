"""The presets for GPUs, as far as they can be held without one: their settings parse, their comments add up, and small
backbones of the same kinds train by them."""

import json
import math
import shlex
from pathlib import Path

import pytest
import torch
from transformers import (
    SiglipConfig,
    SiglipModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from reward import train
from reward.arguments import parse_arguments
from reward.model import RahfModel
from reward.predict import RichFeedbackPredictor
from reward.train import RahfArguments, RahfTrainingArguments

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("preset", "heads", "computed_again"), [("rahf_vit_l", "paper", True), ("rahf_siglip2", "light", False)]
)
def test_the_commands_in_a_preset_parse_and_make_batches_of_256(preset, heads, computed_again, monkeypatch, tmp_path):
    """What its heads need decides what fits the GPU: `benchmarks/rahf_memory.py`."""
    monkeypatch.chdir(ROOT)
    head = (ROOT / "configs" / f"{preset}.yaml").read_text().splitlines()[:2]
    ranks = []
    for line in head:
        launcher, _, flags = line[1:].partition(" -m reward.train ")
        words = shlex.split(launcher)
        number = int(words[words.index("--num_processes") + 1]) if "--num_processes" in words else 1
        argv = [*shlex.split(flags), "--output_dir", str(tmp_path), "--use_cpu", "true"]
        arguments, args = parse_arguments([RahfArguments, RahfTrainingArguments], argv)
        assert arguments.model is None
        assert arguments.augmentation(0).flip_probability == 0
        assert (args.lr_scheduler_type, args.max_steps, args.bf16) == ("inverse_sqrt", 20_000, True)
        assert arguments.heatmap_head == arguments.score_head == heads
        assert args.activation_checkpointing == computed_again
        assert args.optim.startswith("adamw")
        assert args.per_device_train_batch_size * args.gradient_accumulation_steps * number == 256
        assert (args.deepspeed is not None) == (number > 1)
        ranks.append(number)
    assert ranks == [1, 8]


@pytest.mark.parametrize("stage", ["1", "2", "3", "2_offload", "3_offload"])
def test_deepspeed_settings_parse(stage, tmp_path):
    args = RahfTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, deepspeed=str(ROOT / f"configs/deepspeed/zero{stage}.json")
    )
    assert args.hf_deepspeed_config.config["zero_optimization"]["stage"] == int(stage[0])


def test_zero_3_that_could_not_save_is_refused(tmp_path):
    settings = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": "auto"}
    with pytest.raises(ValueError, match="stage3_gather_16bit_weights_on_model_save must be true"):
        RahfTrainingArguments(output_dir=str(tmp_path), use_cpu=True, deepspeed=settings)


@pytest.fixture
def backbones(tmp_path, tokenizer):
    """Folders of small random models, of the kinds that the presets name.

    Their grid has more than 8 places a side: the paper's score head halves it four times, and of a convolution that
    halves a single place, torch gives gradients in bf16 on CPU that are anything.
    """
    tower = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    seen = {**tower, "image_size": 36, "patch_size": 4}
    text = {"vocab_size": 20, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    flan = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    models = {
        "google/vit-large-patch16-384": ViTModel(ViTConfig(**seen)),
        "google/siglip2-so400m-patch16-384": SiglipModel(
            SiglipConfig(vision_config=seen, text_config={**tower, "vocab_size": 20})
        ),
        "google-t5/t5-base": T5ForConditionalGeneration(T5Config(**text)),
        "google/flan-t5-large": T5ForConditionalGeneration(T5Config(**text, **flan)),
    }
    folders = {name: tmp_path / name.rpartition("/")[2] for name in models}
    for name, model in models.items():
        model.save_pretrained(folders[name])
        if "t5" in name:
            tokenizer.save_pretrained(folders[name])
        else:
            told = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "image_processor_type": "ViTImageProcessor"}
            (folders[name] / "preprocessor_config.json").write_text(json.dumps(told))
    return folders


@pytest.mark.filterwarnings("ignore:This DataLoader will create 8 worker processes")  # on a machine of fewer cores
@pytest.mark.parametrize(
    ("preset", "kind", "computed_again"), [("rahf_vit_l", "vit", True), ("rahf_siglip2", "siglip_vision_model", False)]
)
def test_small_backbones_train_by_a_preset(preset, kind, computed_again, data, backbones, tmp_path, monkeypatch):
    """Two updates, and all of the preset but for what is large: its backbones, and so the pictures; its steps; and the
    paper's heads."""
    file = str(ROOT / "configs" / f"{preset}.yaml")
    out = tmp_path / "out"
    wanted, _ = parse_arguments([RahfArguments, RahfTrainingArguments], ["--config", file, "--use_cpu", "true"])
    see, passes = RahfModel.see, []

    def watched(self, pixel_values):
        seen = see(self, pixel_values)
        passes.append((self.training, seen.dtype, self.is_activation_checkpointing))
        return seen

    monkeypatch.setattr(RahfModel, "see", watched)
    changes = {
        "data": data,
        "output_dir": out,
        "vision_model": backbones[wanted.vision_model],
        "text_model": backbones[wanted.text_model],
        "max_steps": 2,
        "eval_steps": 2,
        "save_steps": 2,
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **({"head_width": 0.05} if wanted.heatmap_head == "paper" else {}),
    }
    metrics = train.main(["--config", file, *(part for name in changes for part in (f"--{name}", str(changes[name])))])
    assert {training for training, *_ in passes} == {True, False}
    assert {dtype for _, dtype, _ in passes} == {torch.bfloat16}  # what autocast makes of it
    assert {again for training, _, again in passes if training} == {computed_again}

    state = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())
    logged = [entry[name] for entry in state["log_history"] if "loss" in entry for name in ("loss", "grad_norm")]
    assert len(logged) == 4
    assert all(map(math.isfinite, [*logged, metrics["eval_loss"], metrics["eval_quality"]]))
    model = RahfModel.from_pretrained(out)
    assert (model.config.vision_config.model_type, model.config.image_size) == (kind, 36)
    assert (model.config.heatmap_head, model.config.score_head) == (wanted.heatmap_head, wanted.score_head)
    assert {(parameter.dtype, bool(parameter.isfinite().all())) for parameter in model.parameters()} == {
        (torch.float32, True)
    }
    feedback = RichFeedbackPredictor.from_pretrained(out)(torch.rand(1, 3, 32, 32), ["a red circle"])
    assert feedback.heatmaps["implausibility"].shape == (1, 32, 32)
    assert feedback.misaligned[0].shape == (3,)
