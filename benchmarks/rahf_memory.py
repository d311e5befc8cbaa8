"""Does a preset of the predictor fit its GPU? The memory of a training step, computed without the GPU or the weights.

    python benchmarks/rahf_memory.py [--configs configs/rahf_vit_l.yaml ...] [--quick] [--json FILE]

A micro-batch of the preset, forward and backward under bf16's autocast, on a RAHF of the published sizes of the parts
that it names, as tensors that have sizes and no content (`counted_memory.py`); with everything kept for the backward
pass, and with blocks computed again (`activation_checkpointing`). It is the second micro-batch of an update: the
gradients of the first lie there, and what the second adds to them comes on top. Prompts are as long as the model takes,
which few are; kernels are those of a CPU, and a GPU's fused ones keep less. What a GPU needs besides is not in it:
CUDA's context, workspaces of convolutions, what the allocator loses between blocks; the goal leaves 4 GiB for these.
With ZeRO-2 on eight GPUs weights, gradients and optimizer take less of each than on one.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from counted_memory import GIB, Counted, fill, norms_in_float32
from rahf_speed import SIZES, make_batch
from report import Row, flags, publish
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig, SiglipVisionConfig, T5Config, ViTConfig

from reward.arguments import parse_arguments
from reward.model import RahfModel
from reward.rahf_config import RahfConfig
from reward.train_config import RahfArguments, RahfTrainingArguments

ROOT = Path(__file__).parents[1]
PRESETS = ("rahf_vit_l", "rahf_siglip2")
GOAL = 80 - 4
VIT_L, _, T5_BASE = SIZES["ViT-L/16-384 + T5-base"]
PARTS: dict[str, PreTrainedConfig] = {
    "google/vit-large-patch16-384": ViTConfig(image_size=384, patch_size=16, **VIT_L),
    "google/siglip2-so400m-patch16-384": SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=384,
        patch_size=16,
    ),
    "google-t5/t5-base": T5Config(vocab_size=32128, **T5_BASE),
    "google/flan-t5-large": T5Config(
        vocab_size=32128, d_model=1024, d_kv=64, d_ff=2816, num_layers=24, num_heads=16, feed_forward_proj="gated-gelu"
    ),
}  # fmt: skip
"""What presets name -> its published size."""


def sized_config(preset: Path) -> tuple[RahfConfig, RahfTrainingArguments]:
    """Of the model that a preset asks for, and how it is trained."""
    args, training = parse_arguments(
        [RahfArguments, RahfTrainingArguments], ["--config", str(preset), "--use_cpu", "true"]
    )
    parts = {"vision_config": PARTS[args.vision_model].to_dict(), "text_config": PARTS[args.text_model].to_dict()}
    return RahfConfig(**parts, **args.model_options), training


def activations(model: RahfModel, pictures: int, checkpointed: bool) -> float:
    """GiB on top of weights and gradients, at the peak of a micro-batch forward and backward."""
    phases = {}
    if checkpointed:
        model.activation_checkpointing_enable()
    else:
        model.activation_checkpointing_disable()
    batch = make_batch(model.config, pictures, pieces=model.config.max_text_length)
    counted = Counted()
    counted.ignore(model)
    with counted:
        for name in ("first", "second"):
            with counted.of(phases, name):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model(**batch).loss
                loss.backward()
                del loss
    model.zero_grad(set_to_none=True)
    return phases["second"]


def memory_of(config: Path) -> list[Row]:
    """Rows of a preset's process on one GPU."""
    sized, training = sized_config(config)
    pictures = training.per_device_train_batch_size
    with torch.device("meta"):
        model = RahfModel(sized).train()
    with FakeTensorMode(allow_non_fake_inputs=True), norms_in_float32():
        weights = fill(model, torch.float32)
        trained = sum(weight.numel() for weight in model.parameters()) * 4 / GIB
        kept, again = (activations(model, pictures, checkpointed) for checkpointed in (False, True))
    resident = weights + 3 * trained  # gradients, and AdamW's two moments
    ways = {"everything kept": kept, "blocks computed again": again}
    asked = again if training.activation_checkpointing else kept
    return [
        Row(f"{config.stem}: parameters, millions", weights * GIB / 4e6),
        Row(f"{config.stem}: GiB of weights, gradients, optimizer", resident),
        *(Row(f"{config.stem}: GiB on top of a micro-batch, {way}", size, n=pictures) for way, size in ways.items()),
        Row(f"{config.stem}: GiB at the peak, as the preset asks", resident + asked, n=pictures, goal=f"<= {GOAL}"),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = flags(__doc__.splitlines()[0], seeds=None)
    presets = [ROOT / "configs" / f"{name}.yaml" for name in PRESETS]
    parser.add_argument("--configs", type=Path, nargs="+", default=presets, metavar="YAML")
    options = parser.parse_args(argv)
    began, rows = time.perf_counter(), []
    for config in options.configs[: 1 if options.quick else None]:
        rows += memory_of(config)
    publish(rows, began, options.json, options.quick)


if __name__ == "__main__":
    main()
