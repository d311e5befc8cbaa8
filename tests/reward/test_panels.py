"""What the panels show: the first pictures of dev, each as the raters saw it, and below as the model sees it."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from reward import draw
from reward.data import FeedbackCollator
from reward.feedback import HEATMAPS, SCORES, RichFeedback
from reward.model import RahfOutput
from reward.panels import ExamplePanels

SIDE = 32  # of pictures and maps


class Said(torch.nn.Module):
    """Says of a batch what it was told to, and is in training before and after."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, said: RahfOutput):
        super().__init__()
        self.said, self.seen = said, []

    def forward(self, pixel_values, **batch):
        assert not self.training
        self.seen.append(pixel_values)
        return self.said


@pytest.fixture
def dev():
    """Eleven examples, each of its own colours, maps, scores and words."""
    generator = torch.Generator().manual_seed(0)
    words = ["a", "red", "blue", "circle"]
    return [
        {
            "uid": f"dev-{index}",
            "image": torch.rand(3, SIDE, SIDE, generator=generator),
            "maps": torch.rand(2, SIDE, SIDE, generator=generator),
            "scores": torch.rand(4, generator=generator),
            "tokens": words[: 2 + index % 3],
            "labels": [(index + place) % 2 for place in range(2 + index % 3)],
        }
        for index in range(11)
    ]


@pytest.fixture
def say():
    """What a model may say of a batch of `count`; another thing for another seed."""

    def say(count, seed, words=True):
        generator = torch.Generator().manual_seed(seed)
        return RahfOutput(
            scores=torch.rand(count, 4, generator=generator),
            heatmaps=torch.rand(count, 2, SIDE, SIDE, generator=generator),
            word_logits=torch.randn(count, 4, generator=generator) if words else None,
        )

    return say


@pytest.fixture
def collator(make_config, tokenizer):
    return FeedbackCollator(tokenizer, make_config(max_text_length=4))  # the end mark is one: a fourth word is unread


def sheet(dev, said, count):
    """The panels as they are to be, drawn picture by picture."""
    panels = []
    for index, example in enumerate(dev[:count]):
        read = [place < 3 for place in range(len(example["tokens"]))]
        chances = [0.0] * len(read) if said.word_logits is None else said.word_logits[index].sigmoid().tolist()
        for scores, maps, words in (
            (example["scores"], example["maps"], example["labels"]),
            (said.scores[index], said.heatmaps[index], chances[: len(read)]),
        ):
            feedback = RichFeedback(
                scores=dict(zip(SCORES, scores[:, None], strict=True)),
                heatmaps=dict(zip(HEATMAPS, maps[:, None], strict=True)),
                tokens=[example["tokens"]],
                misaligned=[torch.tensor([wrong * seen for wrong, seen in zip(words, read, strict=True)])],
            )
            panels.append([draw.feedback_panel(example["image"], feedback, 0, height=96)])
    return np.array(draw.grid(panels))


def evaluate(panels, model, folder, step=1, main=True):
    state = SimpleNamespace(is_world_process_zero=main, global_step=step)
    panels.on_evaluate(SimpleNamespace(output_dir=str(folder)), state, None, model=model)


def drawn(folder):
    with Image.open(folder / "examples.png") as picture:
        return np.array(picture)


@pytest.mark.parametrize(("count", "pictures"), [(8, 8), (3, 3), (20, 11)])
def test_the_first_pictures_as_rated_and_below_as_predicted(dev, say, collator, tmp_path, count, pictures):
    said = say(pictures, seed=1)
    evaluate(ExamplePanels(dev, collator, count, None), Said(said), tmp_path)
    assert np.array_equal(drawn(tmp_path), sheet(dev, said, pictures))


def test_each_evaluation_shows_the_same_pictures_with_what_is_said_by_then(dev, say, collator, tmp_path):
    shown = []
    writer = SimpleNamespace(add_image=lambda name, image, step, dataformats: shown.append((name, step, image)))
    panels = ExamplePanels(dev, collator, 8, SimpleNamespace(tb_writer=writer))
    models = [Said(say(8, seed)).train() for seed in (1, 2)]
    for step, model in enumerate(models, start=1):
        evaluate(panels, model, tmp_path, step)
        assert model.training
    assert torch.equal(models[0].seen[0], models[1].seen[0])
    assert [(name, step) for name, step, _ in shown] == [("examples/raters_above_model", step) for step in (1, 2)]
    for model, (_, _, image) in zip(models, shown, strict=True):
        assert np.array_equal(image, sheet(dev, model.said, 8))
    assert np.array_equal(drawn(tmp_path), shown[1][2])  # the newest only


def test_the_picture_before_is_there_until_the_new_one_is_whole(dev, say, collator, tmp_path, monkeypatch):
    panels = ExamplePanels(dev, collator, 8, None)
    evaluate(panels, Said(say(8, seed=1)), tmp_path)
    before = drawn(tmp_path)

    def torn(image, file, *args, **kwargs):
        with nullcontext(file) if hasattr(file, "write") else open(file, "wb") as opened:
            opened.write(b"\x89PNG")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", torn)
        with pytest.raises(KeyboardInterrupt):
            evaluate(panels, Said(say(8, seed=2)), tmp_path)
    assert np.array_equal(drawn(tmp_path), before)
    assert [path.name for path in tmp_path.iterdir()] == ["examples.png"]


def test_a_model_that_judges_no_words_strikes_none(dev, say, collator, tmp_path):
    said = say(8, seed=1, words=False)
    evaluate(ExamplePanels(dev, collator, 8, None), Said(said), tmp_path)
    assert np.array_equal(drawn(tmp_path), sheet(dev, said, 8))


def test_only_the_main_process_draws(dev, say, collator, tmp_path):
    model = Said(say(8, seed=1))
    evaluate(ExamplePanels(dev, collator, 8, None), model, tmp_path, main=False)
    assert len(model.seen) == 1  # but all ranks of a sharded model take part
    assert not list(tmp_path.iterdir())
