"""What a training step of the predictor needs is counted storage by storage, with tensors that have no content."""

from pathlib import Path

import pytest
import rahf_memory
import torch
from counted_memory import GIB
from transformers import T5Config, ViTConfig

from reward.model import RahfModel
from reward.rahf_config import RahfConfig

SMALL = {
    "google/siglip2-so400m-patch16-384": ViTConfig(
        hidden_size=64, num_hidden_layers=6, num_attention_heads=2, intermediate_size=256, image_size=32, patch_size=4
    ),
    "google/flan-t5-large": T5Config(vocab_size=50, d_model=64, d_kv=32, d_ff=256, num_layers=6, num_heads=2),
}
PRESET = Path("configs/rahf_siglip2.yaml")


@pytest.fixture(scope="module")
def rows():
    """Of a preset, whose parts are small: what is said of it -> value."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(rahf_memory, "PARTS", SMALL)
        return {row.name.removeprefix("rahf_siglip2: "): row.value for row in rahf_memory.memory_of(PRESET)}


@pytest.mark.parametrize(
    ("way", "again", "more"), [("everything kept", False, 1.02), ("blocks computed again", True, 1.15)]
)
def test_tensors_without_content_need_what_real_ones_do(rows, way, again, more):
    torch.manual_seed(0)
    vision, text = SMALL.values()
    model = RahfModel(RahfConfig(vision_config=vision.to_dict(), text_config=text.to_dict())).train()
    with rahf_memory.norms_in_float32():
        real = rahf_memory.activations(model, 8, again)
    counted = rows[f"GiB on top of a micro-batch, {way}"]
    assert real <= counted <= more * real, "what fake tensors are decomposed into may need more for a moment"
    weights = sum(one.numel() for one in model.parameters())
    buffers = sum(one.numel() * one.element_size() for one in model.buffers())
    assert rows["GiB of weights, gradients, optimizer"] * GIB == pytest.approx(16 * weights + buffers)


def test_blocks_that_are_computed_again_need_less(rows):
    kept, again = (rows[f"GiB on top of a micro-batch, {way}"] for way in ("everything kept", "blocks computed again"))
    assert again < kept / 2
    assert rows["GiB at the peak, as the preset asks"] == rows["GiB of weights, gradients, optimizer"] + kept


@pytest.mark.parametrize("preset", rahf_memory.PRESETS)
def test_every_part_that_a_preset_names_has_its_size(preset):
    assert rahf_memory.sized_config(rahf_memory.ROOT / "configs" / f"{preset}.yaml")[0].grid == (24, 24)
