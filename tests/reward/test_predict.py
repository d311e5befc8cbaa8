import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from reward import predict
from reward.data import encode_prompts, preprocess
from reward.feedback import HEATMAPS, SCORES
from reward.model import RahfModel
from reward.predict import RichFeedbackPredictor

PROMPTS = ["a red circle", 'A "blue" square, left of a circle.', "red"]


@pytest.fixture
def images():
    return torch.rand(3, 3, 40, 48, generator=torch.Generator().manual_seed(0))


def test_feedback_has_the_contracts_shapes(predictor, images):
    feedback = predictor(images, PROMPTS)
    assert len(feedback) == 3
    assert tuple(feedback.scores) == SCORES
    assert tuple(feedback.heatmaps) == HEATMAPS
    assert all(value.shape == (3,) and value.dtype == torch.float32 for value in feedback.scores.values())
    assert all(maps.shape == (3, 40, 48) for maps in feedback.heatmaps.values())
    assert feedback.tokens[1] == ["A", "blue", "square", "left", "of", "a", "circle"]
    assert [len(words) for words in feedback.misaligned] == [3, 7, 1]
    assert not feedback.scores["overall"].requires_grad


def test_feedback_is_the_models_own_output(predictor, images):
    feedback = predictor(images[:1], PROMPTS[:1])
    text = encode_prompts(predictor.tokenizer, [["a", "red", "circle"]], 16)
    out = predictor.model(preprocess(images[:1], predictor.model.config), **text)
    assert feedback.scores["alignment"].item() == out.scores[0, 1].item()
    assert torch.equal(feedback.misaligned[0], out.word_logits[0].sigmoid())
    assert feedback.heatmaps["misalignment"].mean().item() == pytest.approx(out.heatmaps[0, 1].mean().item(), abs=1e-3)


def test_batches_do_not_matter(predictor, images):
    whole, single = predictor(images, PROMPTS), predictor(images, PROMPTS, batch_size=1)
    torch.testing.assert_close(whole.scores["overall"], single.scores["overall"], atol=1e-6, rtol=0)
    torch.testing.assert_close(whole.heatmaps["implausibility"], single.heatmaps["implausibility"], atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.cat(whole.misaligned), torch.cat(single.misaligned), atol=1e-6, rtol=0)


def test_heatmaps_of_a_given_size_are_the_models_own(predictor, images):
    feedback = predictor(images, PROMPTS, heatmap_size=32)
    own, large = feedback.heatmaps["misalignment"], predictor(images, PROMPTS).heatmaps["misalignment"]
    assert own.shape == (3, 32, 32)
    assert own.mean().item() == pytest.approx(large.mean().item(), abs=1e-3)


def test_gradients_reach_the_images_and_not_the_model(predictor, images):
    images.requires_grad_()
    feedback = predictor(images, PROMPTS, batch_size=2)
    (feedback.scores["overall"].sum() + feedback.heatmaps["implausibility"].mean()).backward()
    assert (images.grad.abs().sum((1, 2, 3)) > 0).all()
    assert all(parameter.grad is None for parameter in predictor.model.parameters())
    with torch.no_grad():
        assert not predictor(images, PROMPTS).scores["overall"].requires_grad


def test_the_gradient_is_the_slope(model, tokenizer):
    predictor = RichFeedbackPredictor(model.double(), tokenizer)
    image = torch.rand(1, 3, 40, 48, generator=torch.Generator().manual_seed(3)).requires_grad_()
    direction = torch.randn(1, 3, 40, 48, generator=torch.Generator().manual_seed(4))
    (slope,) = torch.autograd.grad(predictor(image, ["a red circle"]).scores["plausibility"].sum(), image)
    step = 2e-3
    with torch.no_grad():
        up, down = (
            predictor(image + sign * step * direction, ["a red circle"]).scores["plausibility"] for sign in (1, -1)
        )
    assert ((up - down) / (2 * step)).item() == pytest.approx((slope * direction).sum().item(), rel=0.02)


def test_loaded_predicts_the_same_bits(predictor, model_folder, images):
    first, again = predictor(images, PROMPTS), RichFeedbackPredictor.from_pretrained(model_folder)(images, PROMPTS)
    assert all(torch.equal(first.scores[name], again.scores[name]) for name in SCORES)
    assert all(torch.equal(first.heatmaps[name], again.heatmaps[name]) for name in HEATMAPS)
    assert torch.equal(torch.cat(first.misaligned), torch.cat(again.misaligned))


def test_what_is_saved_predicts_the_same_bits(predictor, images, tmp_path):
    predictor.save_pretrained(tmp_path / "saved")
    again = RichFeedbackPredictor.from_pretrained(tmp_path / "saved")
    one, other = predictor(images, PROMPTS), again(images, PROMPTS)
    assert all(torch.equal(one.scores[name], other.scores[name]) for name in SCORES)
    assert all(torch.equal(one.heatmaps[name], other.heatmaps[name]) for name in HEATMAPS)
    assert torch.equal(torch.cat(one.misaligned), torch.cat(other.misaligned))
    assert not list((tmp_path / "saved").glob(".*"))


def test_weights_stored_in_half_are_computed_in_full(model, model_folder, tokenizer, images):
    model.half().save_pretrained(model_folder)
    loaded = RichFeedbackPredictor.from_pretrained(model_folder)
    assert loaded.model.dtype == torch.float32
    expected = RichFeedbackPredictor(model.float(), tokenizer)(images, PROMPTS)
    assert torch.equal(loaded(images, PROMPTS).scores["overall"], expected.scores["overall"])


def test_empty_prompts_are_judged(predictor, images):
    feedback = predictor(images, ["", " ,. ", "red"])
    assert [len(words) for words in feedback.misaligned] == [0, 0, 1]
    assert feedback.scores["overall"].isfinite().all()
    assert feedback.scores["overall"].shape == predictor(images, [""] * 3).scores["overall"].shape


def test_words_beyond_the_models_reach_are_told(predictor, images):
    with pytest.warns(UserWarning, match="2 words of 1 prompts are not read: 'blue', 'circle'. .* count as aligned"):
        feedback = predictor(images[:1], ["red " * 15 + "blue circle"])
    assert (feedback.misaligned[0][15:] == 0).all()
    assert (feedback.misaligned[0][:15] > 0).all()
    assert predictor.judges(["red " * 15 + "blue circle", "blue"]) == [[True] * 15 + [False] * 2, [True]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predictor(images[:1], ["red " * 15])


def test_words_beyond_its_reach_are_told_by_a_model_without_words_too(make_config, tokenizer, images):
    silent = RichFeedbackPredictor(RahfModel(make_config(words="none")).eval(), tokenizer)
    with pytest.warns(UserWarning, match="2 words of 1 prompts are not read: 'blue', 'circle'"):
        silent(images[:1], ["red " * 15 + "blue circle"])
    assert silent.judges(["red blue", ""]) == [[False, False], []]


def test_nan_stays_nan(predictor, images):
    images[1, 0, 3, 3] = float("nan")
    feedback = predictor(images, PROMPTS)
    assert feedback.scores["overall"].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        (torch.rand(2, 3, 8, 8), ["a"], "2 images were given with 1 prompts"),
        (torch.rand(3, 8, 8), ["a"], r"float tensor \(B, 3, H, W\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["a"], "uint8"),
        (torch.rand(0, 3, 8, 8), [], "no images"),
        (torch.rand(2, 3, 8, 8), "ab", "one text 'ab'"),
    ],
)
def test_wrong_inputs_are_named(predictor, images, prompts, message):
    with pytest.raises(ValueError, match=message):
        predictor(images, prompts)


def test_a_batch_holds_something(predictor, images):
    with pytest.raises(ValueError, match="at least 1, not 0"):
        predictor(images, PROMPTS, batch_size=0)


def test_wrong_folders_are_named(tmp_path, model, model_folder):
    with pytest.raises(ValueError, match="no model folder"):
        RichFeedbackPredictor.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="not a RAHF checkpoint"):
        RichFeedbackPredictor.from_pretrained(tmp_path)
    settings = (model_folder / "tokenizer_config.json").read_text()
    (model_folder / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="no tokenizer"):
        RichFeedbackPredictor.from_pretrained(model_folder)
    (model_folder / "tokenizer_config.json").write_text(settings)
    for content in (b"{", None):  # damaged, absent
        vocabulary = model_folder / "tokenizer.json"
        vocabulary.unlink() if content is None else vocabulary.write_bytes(content)
        with pytest.raises(ValueError, match=f"the tokenizer of {model_folder}"):
            RichFeedbackPredictor.from_pretrained(model_folder)


@pytest.fixture
def image_files(tmp_path):
    files = []
    for index in range(2):
        pixels = np.random.default_rng(index).integers(0, 256, (30, 20, 3), dtype=np.uint8)
        files.append(tmp_path / f"p{index}.png")
        Image.fromarray(pixels).save(files[-1])
    return [str(file) for file in files]


def test_the_command_writes_lines_maps_and_overlays(model_folder, image_files, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n\nblue\n")
    out = tmp_path / "out"
    prompts = ["--prompts", str(tmp_path / "prompts.txt")]
    predict.main(["--model", str(model_folder), "--images", *image_files, *prompts, "--out", str(out)])
    lines = [json.loads(line) for line in (out / "feedback.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["a red circle", "blue"]
    assert 0 < lines[0]["scores"]["overall"] < 1
    struck = [token for token, p in zip(lines[0]["tokens"], lines[0]["misaligned"], strict=True) if p > 0.5]
    assert lines[0]["struck_out"] == struck
    with Image.open(out / lines[0]["implausibility_map"]) as heatmap:
        assert heatmap.size == (20, 30)
        assert np.mean(heatmap) / 255 == pytest.approx(lines[0]["heatmap_means"]["implausibility"], abs=0.003)
    assert (out / lines[1]["overlay"]).is_file()
    assert len(list(out.iterdir())) == 1 + 2 * 3
    with pytest.raises(ValueError, match="not empty"):
        predict.main(["--model", str(model_folder), "--images", *image_files, *prompts, "--out", str(out)])


def test_words_that_are_not_judged_have_no_figure_in_a_line(model_folder, image_files, tmp_path):
    prompts = ["--prompts", "red " * 15 + "blue circle", "blue"]
    with pytest.warns(UserWarning, match="'blue', 'circle'"):
        predict.main(["--model", str(model_folder), "--images", *image_files, *prompts, "--out", str(tmp_path / "out")])
    long, short = map(json.loads, (tmp_path / "out" / "feedback.jsonl").read_text().splitlines())
    assert long["misaligned"][15:] == [None, None]
    assert all(0 < value < 1 for value in long["misaligned"][:15] + short["misaligned"])
    assert len(long["tokens"]) == 17


def test_images_of_several_sizes_are_judged_in_batches(model_folder, image_files, tmp_path, monkeypatch):
    """Wide, tall, tall: two calls of the model, the same lines as one by one, in the order given."""
    Image.fromarray(np.zeros((20, 50, 3), np.uint8)).save(tmp_path / "wide.png")
    prompts = ["--prompts", "red", "a blue circle", "a"]
    images = ["--images", str(tmp_path / "wide.png"), *image_files]
    lines, sizes, call = {}, [], RichFeedbackPredictor.__call__

    def counted(self, pictures, *args, **kwargs):
        sizes.append(tuple(pictures.shape))
        return call(self, pictures, *args, **kwargs)

    monkeypatch.setattr(RichFeedbackPredictor, "__call__", counted)
    for batch_size in (3, 1):
        out = tmp_path / f"out{batch_size}"
        flags = ["--out", str(out), "--batch_size", str(batch_size)]
        predict.main(["--model", str(model_folder), *images, *prompts, *flags])
        lines[batch_size] = [json.loads(line) for line in (out / "feedback.jsonl").read_text().splitlines()]
    assert sizes[:2] == [(1, 3, 20, 50), (2, 3, 30, 20)]
    assert [line["prompt"] for line in lines[3]] == ["red", "a blue circle", "a"]
    for together, alone in zip(lines[3], lines[1], strict=True):
        assert together["image"] == alone["image"]
        assert together["scores"] == pytest.approx(alone["scores"], abs=1e-5)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\n \n", "no prompt"), (b"\xff\xfe", "UTF-8"), (b"one\n", "2 images were given with 1 prompts")],
)
def test_wrong_prompt_files_are_named(model_folder, image_files, tmp_path, content, message):
    (tmp_path / "prompts.txt").write_bytes(content)
    arguments = ["--model", str(model_folder), "--images", *image_files, "--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=message):
        predict.main([*arguments, "--prompts", str(tmp_path / "prompts.txt")])
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_image_is_named_and_nothing_is_left(model_folder, image_files, tmp_path):
    (tmp_path / "p1.png").write_text("no picture")
    arguments = ["--model", str(model_folder), "--images", *image_files, "--prompts", "a", "b"]
    with pytest.raises(ValueError, match=r"p1\.png is not an image"):
        predict.main([*arguments, "--out", str(tmp_path / "out")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "p0.png", "p1.png"]
