"""The problem region drawn again: what the pipelines of each family do."""

import json
import shutil

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
)

from finetune.inpaint_arguments import InpaintArguments
from finetune.inpainter import Inpainter
from rl.keyed import keyed_generator
from tests.finetune.conftest import write_lora
from tests.finetune.inpaint_case import blue_spot


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
@pytest.mark.parametrize("family", ["sd", "sd9", "xl", "xl9"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_every_family_draws_by_its_noise_alone(families, family, guidance_scale):
    draw = Inpainter.load(
        families[family],
        dtype=torch.float32,
        device="cpu",
        steps=2,
        guidance_scale=guidance_scale,
        batch_size=2,
    )
    picture = blue_spot((20, 37)).float() / 255  # of no multiple of anything
    share = torch.zeros(20, 37)
    share[3:9, 5:20] = 1
    sources = [[keyed_generator(0, one) for one in order] for order in ((0, 1, 2), (0, 1), (5, 6))]
    three, two, others = (draw(picture, share, "a red circle", source) for source in sources)
    for draw.batch_size in (1, 3):
        again = draw(picture, share, "a red circle", [keyed_generator(0, one) for one in range(3)])
        assert torch.allclose(again, three, atol=1e-5)
    assert three.shape == (3, 3, 20, 37)
    assert 0 <= three.min() <= three.max() <= 1
    assert torch.allclose(three[:2], two, atol=1e-5)
    assert not torch.allclose(two, others, atol=1e-3)
    assert not torch.allclose(two[0], two[1], atol=1e-3)
    elsewhere = picture.clone()
    elsewhere[0, 12:] = 0.9
    assert not torch.allclose(draw(elsewhere, share, "a red circle", sources[1])[:, :, 3:9, 5:20], two[:, :, 3:9, 5:20],
                              atol=1e-4), "what is drawn fits the rest of the picture"  # fmt: skip


def test_latents_outside_the_mask_are_the_pictures_own(families):
    """With a text-to-image network the blended latent decodes, far from the mask, to what the picture's own does."""
    draw = Inpainter.load(families["sd"], dtype=torch.float32, device="cpu", steps=3)
    with torch.no_grad():  # encodings without spread, as those of real pipelines
        draw.pipeline.vae.quant_conv.weight[4:] = 0
        draw.pipeline.vae.quant_conv.bias[4:] = -30
    picture = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    share = torch.zeros(64, 64)
    share[:8, :8] = 1
    first, second = draw(picture, share, "a red circle", [keyed_generator(0, 0), keyed_generator(0, 1)])
    changed = (first - second).abs().amax(dim=0)
    assert changed[:8, :8].max() > 20 * changed[40:, 40:].max()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
@pytest.mark.parametrize("family", ["sd", "sd9", "xl", "xl9"])
def test_a_lora_of_the_text_to_image_pipeline_is_added(families, tmp_path, family):
    trained_on = families[family.removesuffix("9")]
    lora = write_lora(trained_on, tmp_path / "lora")
    tuned = DiffusionPipeline.from_pretrained(trained_on)
    before = {name: weight.clone() for name, weight in tuned.unet.state_dict().items()}
    tuned.load_lora_weights(lora)
    tuned.fuse_lora()
    tuned.unload_lora_weights()
    added = {name: weight - before[name] for name, weight in tuned.unet.state_dict().items()}
    assert sum(bool(change.any()) for change in added.values()) > 8

    how = {"dtype": torch.float32, "device": "cpu", "steps": 2}
    folder = shutil.copytree(families[family], tmp_path / "pipeline")
    DDIMScheduler(clip_sample=True, steps_offset=1).save_pretrained(folder / "scheduler")  # text to image unsets it
    plain, ours = (Inpainter.load(str(folder), base_adapters=ones, **how).pipeline for ones in ([], [lora]))
    for name, weight in plain.unet.state_dict().items():
        change = ours.unet.state_dict()[name] - weight
        expected = added[name] if added[name].shape == weight.shape else torch.zeros_like(weight)  # but conv_in
        assert torch.allclose(change, expected, atol=1e-6), name
    assert ours.scheduler.config == plain.scheduler.config
    assert type(ours) is type(plain)


def test_a_scheduler_without_eta_says_so(families, tmp_path, caplog):
    how = {"output_dir": str(tmp_path), "images": ["a.png"], "prompts": ["a"], "eta": 1.0}
    InpaintArguments(pipeline=families["sd"], **how).inpainter()
    assert "is ignored" not in caplog.text
    shutil.copytree(families["sd"], tmp_path / "euler")
    EulerDiscreteScheduler(steps_offset=1).save_pretrained(tmp_path / "euler" / "scheduler")
    index = tmp_path / "euler" / "model_index.json"
    named = json.loads(index.read_text()) | {"scheduler": ["diffusers", "EulerDiscreteScheduler"]}
    index.write_text(json.dumps(named))
    InpaintArguments(pipeline=str(tmp_path / "euler"), **how).inpainter()
    assert "eta=1.0 is ignored: EulerDiscreteScheduler has no such setting" in caplog.text
