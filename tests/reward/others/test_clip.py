"""Against transformers' own processor and forward pass, and, for HPSv2, against a CLIP under open_clip's names."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPProcessor

from reward.by_name import make_reward
from reward.draw import to_image
from reward.feedback import check_reward
from reward.others import CLIPScore, HPSv2, PickScore
from tests.reward.others.conftest import PROMPTS, make_image_processor, spread
from tests.reward.others.open_clip_by_hand import OpenClip


@pytest.fixture
def expected_logits(clip, clip_tokenizer):
    """What transformers says of each picture and its prompt, one at a time: exp(logit scale) * cosine."""
    processor = CLIPProcessor(make_image_processor(), clip_tokenizer)

    def logits(images, prompts):
        found = []
        for image, prompt in zip(images, prompts, strict=True):
            inputs = processor(text=[prompt], images=[to_image(image)], return_tensors="pt")
            with torch.no_grad():
                found.append(clip(**inputs).logits_per_image[0, 0])
        return torch.stack(found)

    return logits


def test_pickscore_is_transformers_own_number(clip_folder, square, images, expected_logits):
    pickscore = PickScore(str(clip_folder), batch_size=2)
    reward = pickscore(square, PROMPTS)
    check_reward(reward, PROMPTS)
    expected = expected_logits(square, PROMPTS)
    assert expected.std() > 0.5  # else the next line would say little
    torch.testing.assert_close(reward.total, expected, atol=1e-3, rtol=0)
    assert torch.equal(reward.terms["pickscore"], reward.total)
    resized = pickscore(images, PROMPTS).total  # Pillow's 8 bits against floats
    torch.testing.assert_close(resized, expected_logits(images, PROMPTS), atol=0.3, rtol=0)


def test_clipscore_is_the_papers_formula(clip, clip_folder, square, expected_logits):
    prefixed = [f"a photo depicts {prompt}" for prompt in PROMPTS]
    cosines = expected_logits(square, prefixed) / clip.logit_scale.exp()
    score = CLIPScore(clip_folder)
    torch.testing.assert_close(score(square, PROMPTS).total, 2.5 * cosines.clamp(min=0), atol=1e-4, rtol=0)
    plain = CLIPScore(clip_folder, weight=100, prefix="")
    cosines = expected_logits(square, PROMPTS) / clip.logit_scale.exp()
    assert (cosines > 0).all()
    torch.testing.assert_close(plain(square, PROMPTS).total, 100 * cosines, atol=1e-2, rtol=0)
    plain.model.text_projection.weight.mul_(-1)
    assert plain(square, PROMPTS).total.tolist() == [0, 0, 0]
    assert plain.ranges == {"clipscore": (0.0, 100)}


@pytest.fixture(scope="module")
def open_clip(clip_tokenizer):
    torch.manual_seed(0)
    return spread(OpenClip(len(clip_tokenizer), length=16)).eval()


@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_hpsv2_reads_open_clips_names(open_clip, clip_tokenizer, clip_folder, images, tmp_path, form):
    file = tmp_path / f"HPS_v2.{form}"
    weights = open_clip.state_dict()
    if form == "pt":
        torch.save({"epoch": 3, "name": "hps", "state_dict": weights}, file)
    else:
        save_file({name: value.contiguous() for name, value in weights.items()}, file)
    reward = HPSv2(file, clip=clip_folder)
    shown = torch.zeros(3, 3, 32, 32)  # black; the pictures of 40 x 56 are 23 x 32 of it, 4 rows from above
    small = torch.nn.functional.interpolate(images, size=(23, 32), mode="bicubic", antialias=True).clamp(0, 1)
    shown[:, :, 4:27] = small
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    shown = (shown - mean[:, None, None]) / std[:, None, None]
    texts = torch.cat([open_clip.read(clip_tokenizer(prompt, return_tensors="pt").input_ids) for prompt in PROMPTS])
    expected = torch.nn.functional.cosine_similarity(open_clip.see(shown), texts).detach()
    assert expected.std() > 0.05
    torch.testing.assert_close(reward(images, PROMPTS).total, expected, atol=1e-5, rtol=0)


def test_hpsv2_as_a_folder_of_transformers(clip, clip_folder, square, expected_logits):
    expected = expected_logits(square, PROMPTS) / clip.logit_scale.exp()
    torch.testing.assert_close(HPSv2(clip_folder)(square, PROMPTS).total, expected, atol=1e-4, rtol=0)


def test_batches_and_repeated_prompts_do_not_matter(clip_folder, images):
    one, many = PickScore(clip_folder, batch_size=1), PickScore(clip_folder, batch_size=8)
    torch.testing.assert_close(one(images, PROMPTS).total, many(images, PROMPTS).total, atol=1e-4, rtol=0)
    features = many.features(images)
    assert features.shape == (3, 8)
    torch.testing.assert_close(one.features(images), features, atol=1e-4, rtol=0)


def test_gradients_reach_the_images_and_not_the_model(clip_folder, images):
    reward = PickScore(clip_folder)
    images.requires_grad_()
    assert reward.differentiable
    reward(images, PROMPTS).total.sum().backward()
    assert (images.grad.abs().sum((1, 2, 3)) > 0).all()
    assert all(parameter.grad is None for parameter in reward.model.parameters())
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        up, down = (reward(images + sign * 1e-3 * direction, PROMPTS).total.sum() for sign in (1, -1))
    assert ((up - down) / 2e-3).item() == pytest.approx((images.grad * direction).sum().item(), rel=0.05)


def test_autocast_does_not_blur_it(clip_folder, images):
    reward = PickScore(clip_folder)
    sharp = reward(images, PROMPTS).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(reward(images, PROMPTS).total, sharp)
    blurred = PickScore(clip_folder, dtype="bfloat16")(images, PROMPTS).total
    assert blurred.dtype == torch.float32
    assert 0 < (blurred - sharp).abs().max() < 5


def test_a_nan_is_not_hidden(clip_folder, images):
    images[1, 0, 20, 28] = float("nan")
    assert PickScore(clip_folder)(images, PROMPTS).total.isnan().tolist() == [False, True, False]


def test_a_prompt_that_is_cut_is_named(clip_folder, images):
    with pytest.warns(UserWarning, match=r"1 prompts are longer than the 16 tokens.*'red red"):
        PickScore(clip_folder)(images, [*PROMPTS[:2], "red " * 20])


def test_it_is_loaded_late_and_by_name(clip_folder, images, tmp_path):
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    reward = make_reward("reward.others:PickScore", {"model": str(folder)})
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot be loaded as a CLIPModel"):
        reward.to("cpu")


# ---- Folders and files that cannot be it ----


@pytest.fixture
def copied(clip_folder, tmp_path):
    return shutil.copytree(clip_folder, tmp_path / "clip")


@pytest.mark.parametrize("kind", [PickScore, CLIPScore, HPSv2])
def test_a_missing_folder_is_refused_at_once(kind):
    with pytest.raises(ValueError, match=r"there is no folder \./nowhere"):
        kind("./nowhere")


def test_a_name_that_the_hub_would_have_is_refused_while_it_is_off(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="no/where is no folder here, and the hub is switched off"):
        PickScore("no/where")


def test_a_folder_of_another_architecture_is_refused_at_once(copied):
    settings = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(settings | {"model_type": "siglip"}))
    with pytest.raises(ValueError, match="holds a model of type siglip, not clip"):
        PickScore(copied)


@pytest.mark.parametrize(
    ("file", "message"),
    [("model.safetensors", "holds no weights"), ("tokenizer.json", "has no tokenizer; give `processor`")],
)
def test_a_folder_that_lacks_a_part_is_refused_at_once(copied, file, message):
    (copied / file).unlink()
    with pytest.raises(ValueError, match=message):
        PickScore(copied)


def _change(weights, change):
    if change == "missing":
        weights.pop("visual_projection.weight")
    elif change == "left over":
        weights["vision_model.more.weight"] = torch.zeros(2)
    else:
        weights["visual_projection.weight"] = torch.zeros(3, 24)
    return weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "lacks the weights visual_projection.weight"),
        ("left over", "has, beyond those known, the weights vision_model.more.weight"),
        ("of another size", "has in other sizes the weights visual_projection.weight"),
    ],
)
def test_weights_that_do_not_fit_are_refused(copied, clip, change, message):
    save_file(_change(dict(clip.state_dict()), change), copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        PickScore(copied).to("cpu")


class Pickled:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return print, ("code was run",)


def test_a_pickle_that_would_run_code_is_refused(clip_folder, tmp_path, capsys):
    torch.save({"state_dict": {"logit_scale": torch.ones(1)}, "more": Pickled()}, tmp_path / "hps.pt")
    with pytest.raises(ValueError, match="is refused: it is a pickle of more than tensors"):
        HPSv2(tmp_path / "hps.pt", clip=clip_folder).to("cpu")
    assert "code was run" not in capsys.readouterr().out


def test_files_that_are_not_hpsv2_are_refused(clip_folder, tmp_path):
    with pytest.raises(ValueError, match=r"there is no file \./hps\.pt"):
        HPSv2("./hps.pt", clip=clip_folder)
    (file := tmp_path / "hps.pt").write_bytes(b"not a pickle")
    with pytest.raises(ValueError, match="give `clip`"):
        HPSv2(file)
    with pytest.raises(ValueError, match=r"hps.pt (is refused|cannot be read as weights)"):
        HPSv2(file, clip=clip_folder).to("cpu")
    torch.save({"state_dict": {"visual.trunk.weight": torch.ones(1)}}, file)
    with pytest.raises(ValueError, match=r"has the weight visual\.trunk\.weight, which open_clip's"):
        HPSv2(file, clip=clip_folder).to("cpu")
    torch.save([1, 2], file)
    with pytest.raises(ValueError, match="holds no mapping of names to tensors"):
        HPSv2(file, clip=clip_folder).to("cpu")


def test_questions_that_do_not_fit_are_refused(clip_folder, images):
    reward = PickScore(clip_folder)
    with pytest.raises(ValueError, match="3 images were given with 2 prompts"):
        reward(images, PROMPTS[:2])
    with pytest.raises(ValueError, match="not the one text"):
        reward(images, "a red circle")
    with pytest.raises(ValueError, match="images must be a float tensor"):
        reward((images * 255).byte(), PROMPTS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"batch_size": 0}, "batch_size must be at least 1"), ({"dtype": "int8"}, "dtype is 'int8'")],
)
def test_settings_that_make_no_sense_are_refused(clip_folder, settings, message):
    with pytest.raises(ValueError, match=message):
        PickScore(clip_folder, **settings)
    with pytest.raises(ValueError, match="weight is 0; it must be above 0"):
        CLIPScore(clip_folder, weight=0)
