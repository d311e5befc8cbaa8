"""SigLIP 2 of the NaFlex kind, which takes patches of pictures of any shape, as a RAHF's vision encoder."""

import numpy as np
import pytest
import torch
from transformers import (
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    Siglip2VisionConfig,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

from reward.model import RahfModel
from reward.rahf_config import RahfConfig

TOWER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
PICTURES = {**TOWER, "patch_size": 8, "num_patches": 16}
TEXT = T5Config(vocab_size=20, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2)


@pytest.fixture
def towers(tmp_path):
    """A model of pictures and text in a folder, with the image processor that tells how pixels were normalised."""
    torch.manual_seed(0)
    both = Siglip2Model(Siglip2Config(vision_config=PICTURES, text_config={**TOWER, "vocab_size": 20})).eval()
    both.save_pretrained(tmp_path)
    Siglip2ImageProcessorPil(patch_size=8, image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path)
    return tmp_path, both.vision_model


def new_rahf(vision, **options):
    return RahfModel.from_backbones(vision, T5ForConditionalGeneration(TEXT), head_width=0.1, **options).eval()


@pytest.mark.parametrize("size", [(32, 32), (16, 64), (48, 40)], ids=str)
def test_features_are_those_that_transformers_calculates_from_its_own_patches(towers, size):
    folder, theirs = towers
    model = new_rahf(folder, image_size=list(size), heatmap_size=32)
    images = torch.randn(3, 3, *size)
    patches = np.stack([convert_image_to_patches(image.numpy(), 8) for image in images])
    grid = torch.tensor([[size[0] // 8, size[1] // 8]] * 3)
    mask = torch.ones(patches.shape[:2], dtype=torch.long)
    for lower in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=lower):
            expected = theirs(torch.from_numpy(patches), mask, grid).last_hidden_state
            torch.testing.assert_close(model.patch_features(images), expected, atol=1e-5, rtol=0)


def test_it_comes_from_a_folder_with_its_size_and_its_normalisation(towers, tmp_path):
    folder, _ = towers
    model = new_rahf(folder)
    assert (model.config.image_size, model.config.grid) == (32, (4, 4))  # 16 patches
    assert list(model.config.image_mean) == [0.1, 0.2, 0.3]
    batch = torch.randn(2, 3, 32, 32), torch.tensor([[4, 1], [5, 1]]), torch.ones(2, 2)
    model.save_pretrained(tmp_path / "rahf")
    assert torch.equal(RahfModel.from_pretrained(tmp_path / "rahf").eval()(*batch).scores, model(*batch).scores)
    with pytest.raises(ValueError, match="image_size 36 is no multiple of 8"):
        new_rahf(folder, image_size=36)


def test_it_compiles_without_a_graph_break():
    config = RahfConfig(
        vision_config=Siglip2VisionConfig(**PICTURES).to_dict(), text_config=TEXT.to_dict(), head_width=0.1
    )
    model = RahfModel(config).eval()
    batch = torch.randn(2, 3, 32, 32), torch.tensor([[4, 1], [5, 1]]), torch.ones(2, 2)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(*batch)
        torch.testing.assert_close(compiled.scores, model(*batch).scores)
