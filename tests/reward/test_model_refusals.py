"""What a model refuses: checkpoints that are not its own, settings that fit none, pictures that it would misread."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, T5Config, ViTConfig, ViTModel

from reward.model import RahfModel
from reward.rahf_config import RahfConfig

TEXT = {"vocab_size": 20, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_decoder_layers": 1,
        "num_heads": 2}  # fmt: skip
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def config_of(vision, **options):
    return RahfConfig(vision_config=vision.to_dict(), text_config=T5Config(**TEXT).to_dict(), head_width=0.1, **options)


def test_a_checkpoint_of_another_class(tmp_path):
    ViTModel(ViTConfig(**SMALL, image_size=32, patch_size=8)).save_pretrained(tmp_path)
    for read in (RahfModel.from_pretrained, RahfConfig.from_pretrained):
        with pytest.raises(ValueError, match="the config is of a 'vit', not of a RAHF"):
            read(tmp_path)


def test_a_checkpoint_that_lacks_a_head(model, tmp_path):
    """transformers would give it random weights."""
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    save_file({name: weight for name, weight in weights.items() if not name.startswith("score_heads.overall")}, file,
              {"format": "pt"})  # fmt: skip
    with pytest.raises(ValueError, match=r"lacks weights of the model, .*score_heads\.overall.*8 in all"):
        RahfModel.from_pretrained(tmp_path)
    _, told = RahfModel.from_pretrained(tmp_path, output_loading_info=True)  # whoever asks looks for himself
    assert len(told["missing_keys"]) == 8


@pytest.mark.parametrize(
    "vision",
    [ViTConfig(**SMALL, image_size=32, patch_size=8), Dinov2Config(**SMALL, image_size=32, patch_size=8)],
    ids=["vit", "dinov2"],
)
def test_pictures_of_another_size_than_the_models(vision):
    """An encoder that takes any size would give more features than there are places, and the last be taken."""
    model = RahfModel(config_of(vision, image_size=[32, 64]))
    assert model.patch_features(torch.zeros(1, 3, 32, 64)).shape == (1, 32, 16)
    for size in ((64, 64), (64, 32), (32, 32)):
        with pytest.raises(ValueError, match=r"pixel_values are .*`reward.data.preprocess` brings pictures to"):
            model.patch_features(torch.zeros(1, 3, *size))


def test_encoders_that_take_no_pictures_of_such_a_size():
    wide = ViTConfig(**SMALL, image_size=(32, 64), patch_size=8)
    assert config_of(wide).grid == (4, 8)
    with pytest.raises(ValueError, match=r"made for pictures of \[32, 64\] pixels; only from a square"):
        config_of(wide, image_size=64)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"word_threshold": 3.0}, r"word_threshold is a probability, in \[0, 1\], not 3.0"),
        ({"score_loss_weight": float("nan")}, "score_loss_weight must be a number from 0 on, not nan"),
        ({"heatmap_positive_weight": -1.0}, "heatmap_positive_weight must be a number from 0 on, not -1.0"),
        ({"image_size": [32, 32, 32]}, r"image_size must be a side of at least 1, or \[height, width\] of such"),
        ({"heatmap_size": "big"}, "heatmap_size must be a side of at least 1, .* not 'big'"),
    ],
)
def test_settings_that_fit_no_model(make_config, option, message):
    with pytest.raises(ValueError, match=message):
        make_config(**option)


def test_an_option_that_is_no_field():
    with pytest.raises(
        ValueError, match=r"RahfConfig has no field 'heatmap_heads'; it has vision_config, .*heatmap_head"
    ):
        RahfModel.from_backbones("nowhere", "nowhere", heatmap_heads="paper")
