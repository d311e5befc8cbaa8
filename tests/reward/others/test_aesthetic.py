"""Against transformers' embedding and the same layers in numpy."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from reward.draw import to_image
from reward.feedback import check_reward
from reward.others import AestheticScore
from tests.reward.others.conftest import PROMPTS, make_image_processor

WIDTHS = {0: (1024, 8), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}


@pytest.fixture(scope="module")
def weights():
    generator = torch.Generator().manual_seed(0)
    found = {}
    for place, (out, width) in WIDTHS.items():
        found[f"layers.{place}.weight"] = torch.randn(out, width, generator=generator) / width**0.5
        found[f"layers.{place}.bias"] = torch.randn(out, generator=generator)
    return found


@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_it_is_five_layers_on_the_normalised_embedding(clip, clip_folder, weights, square, tmp_path, form):
    file = tmp_path / f"head.{form}"
    torch.save(weights, file) if form == "pth" else save_file(weights, file)
    score = AestheticScore(file, clip=clip_folder, batch_size=2)
    shown = make_image_processor()([to_image(image) for image in square], return_tensors="pt")
    with torch.no_grad():
        x = clip.get_image_features(**shown).pooler_output.double().numpy()
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    seen = x
    for place in WIDTHS:
        x = x @ weights[f"layers.{place}.weight"].double().numpy().T + weights[f"layers.{place}.bias"].double().numpy()
    reward = score(square, PROMPTS)
    check_reward(reward, PROMPTS)
    assert x.std() > 0.1
    np.testing.assert_allclose(reward.total.numpy(), x[:, 0], atol=1e-4)
    np.testing.assert_allclose(score.features(square).numpy(), seen, atol=1e-5)


def test_gradients_reach_the_images(clip_folder, weights, images, tmp_path):
    torch.save(weights, tmp_path / "head.pth")
    score = AestheticScore(tmp_path / "head.pth", clip=clip_folder)
    images.requires_grad_()
    score(images, PROMPTS).total.sum().backward()
    assert (images.grad.abs().sum((1, 2, 3)) > 0).all()


def test_what_cannot_be_it_is_refused(clip_folder, weights, tmp_path):
    file = tmp_path / "head.pth"
    with pytest.raises(ValueError, match="there is no file"):
        AestheticScore(file, clip=clip_folder)
    torch.save(weights | {"layers.0.weight": torch.zeros(1024, 768)}, file)
    with pytest.raises(ValueError, match=r"there is no folder \./nowhere"):
        AestheticScore(file, clip="./nowhere")
    with pytest.raises(ValueError, match=r"has in other sizes the weights layers\.0\.weight"):
        AestheticScore(file, clip=clip_folder).to("cpu")
    torch.save({f"model.{name}": value for name, value in weights.items()}, file)
    with pytest.raises(ValueError, match=r"lacks the weights layers\.0\.bias.*the weights model\.layers\.0\.bias"):
        AestheticScore(file, clip=clip_folder).to("cpu")
