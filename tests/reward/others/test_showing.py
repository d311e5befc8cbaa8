"""Against Pillow's own resize, by transformers' image processor."""

import json

import pytest
import torch
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from reward.draw import to_image
from reward.others.showing import Showing, read_showing

STEP = 1 / 255 / 0.26  # one of 8 bits, after normalisation


@pytest.mark.parametrize("size", [(40, 56), (57, 33), (20, 20), (32, 32), (100, 41)], ids=str)
def test_it_is_what_transformers_shows(tmp_path, size):
    image = torch.rand(3, 5, 5, generator=torch.Generator().manual_seed(0))
    image = torch.nn.functional.interpolate(image[None], size=size, mode="bilinear")
    processor = CLIPImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 30})
    processor.save_pretrained(tmp_path)
    shown = read_showing(tmp_path)(image)
    expected = processor(to_image(image[0]), return_tensors="pt").pixel_values
    assert shown.shape == expected.shape == (1, 3, 32, 30)
    assert (shown - expected).abs().max() < 1.6 * STEP
    assert (shown - expected).abs().mean() < 0.5 * STEP


def test_contrasts_overshoot_no_more_than_pillows():
    stripes = torch.zeros(1, 3, 64, 64)
    stripes[..., ::7] = 1
    processor = CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    expected = processor(to_image(stripes[0]), return_tensors="pt").pixel_values
    assert (Showing((48, 48))(stripes) - expected).abs().max() < 1.6 * STEP


def test_padding_keeps_the_whole_picture_in_the_middle():
    image = torch.ones(1, 3, 20, 41)
    shown = Showing((16, 16), "pad", mean=(0, 0, 0), std=(1, 1, 1))(image)
    assert shown.shape == (1, 3, 16, 16)
    rows = shown[0, 0].mean(dim=1)  # 20 / 41 of 16 is 8 rows of picture; 4 of black above and below
    assert rows.tolist() == pytest.approx([0] * 4 + [1] * 8 + [0] * 4, abs=1e-6)
    assert torch.equal(Showing((16, 16), "pad")(image[..., :20]), Showing((16, 16))(image[..., :20]))


def test_gradients_pass():
    image = torch.rand(1, 3, 20, 41, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    assert torch.autograd.gradcheck(Showing((8, 8)), (image,), fast_mode=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_center_crop": False}, "do_center_crop: false"),
        ({"resample": 0}, "neither bilinear nor bicubic"),
        ({"size": {"shortest_edge": 16}}, "unknown here"),
        ({"size": {"height": 40, "width": 40}}, "unknown here"),
    ],
)
def test_preprocessings_that_are_not_known_are_refused(tmp_path, settings, message):
    CLIPImageProcessorPil(**{"crop_size": {"height": 32, "width": 32}, **settings}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        read_showing(tmp_path)


def test_a_folder_without_preprocessing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="states no preprocessing"):
        read_showing(tmp_path)


def test_the_old_form_of_the_settings_is_read(tmp_path):
    """As the hub's CLIPs of 2021 and 2022 have it."""
    old = {
        "crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": 224,
        "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.3],
    }  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old))
    assert read_showing(tmp_path) == Showing((224, 224), "crop", 224, "bicubic", (0.5, 0.4, 0.3), (0.2, 0.2, 0.3))
