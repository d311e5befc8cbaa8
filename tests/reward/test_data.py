import numpy as np
import pytest
import torch
from datasets import load_from_disk
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from reward.augmentation import Augmentation
from reward.data import (
    FeedbackCollator,
    FeedbackDataset,
    describe_unread,
    encode_prompts,
    pad_rows,
    preprocess,
    resize,
    to_tensor,
    unread_words,
)


@pytest.fixture
def dev(data):
    return load_from_disk(str(data))["dev"]


@pytest.mark.parametrize("size", [(100, 70), (17, 200), (32, 40)])
def test_resizing_is_pillows_antialiased_bilinear(size):
    array = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    ours = resize(to_tensor(Image.fromarray(array)).float()[None], (32, 32))[0]
    theirs = to_tensor(Image.fromarray(array).resize((32, 32), Image.Resampling.BILINEAR)).float()
    assert (ours - theirs).abs().max() <= 1  # Pillow rounds after each direction


def test_preprocessing_normalises_and_is_differentiable(make_config):
    config = make_config(image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.25, 1.0])
    images = torch.full((2, 3, 50, 60), 0.6, requires_grad=True)
    out = preprocess(images, config)
    assert out.shape == (2, 3, 32, 32)
    expected = torch.tensor([1.0, 1.6, 0.3])[:, None, None].expand(2, 3, 32, 32)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert (images.grad > 0).all()


def test_prompts_are_padded_masked_and_cut(tokenizer):
    prompts = [["a", "red", "circle"], ["blue"], [], ["a"] * 9]
    out = encode_prompts(tokenizer, prompts, max_length=6)
    assert out["input_ids"].shape == (4, 6)
    assert out["attention_mask"].sum(1).tolist() == [4, 2, 1, 6]
    assert out["word_positions"][0].tolist() == [0, 1, 2, *[-1] * 6]
    assert out["word_positions"][3].tolist() == [0, 1, 2, 3, 4, *[-1] * 4]
    assert (out["input_ids"][torch.arange(4), out["attention_mask"].sum(1) - 1] == tokenizer.eos_token_id).all()


@pytest.fixture
def pieces():
    """A tokenizer that cuts "cats" and "dogs" in two, and drops line breaks."""
    vocabulary = {"<pad>": 0, "</s>": 1, "[UNK]": 2, "cat": 3, "##s": 4, "dog": 5}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")


def test_words_of_several_pieces_are_read_at_their_first(pieces):
    out = encode_prompts(pieces, [["cats", "\n", "dog"]], max_length=8)
    assert out["input_ids"].tolist() == [[3, 4, 5, 1]]
    assert out["word_positions"].tolist() == [[0, -1, 2]]


@pytest.mark.parametrize(("most", "ids", "begins", "unread"), [
    (5, [3, 4, 5, 4, 1], [0, 2], []),
    (4, [3, 4, 1], [0, -1], ["dogs"]),
    (3, [3, 4, 1], [0, -1], ["dogs"]),
    (2, [1], [-1, -1], ["cats", "dogs"]),
])  # fmt: skip
def test_a_word_that_fits_in_part_is_cut_as_a_whole(pieces, most, ids, begins, unread):
    """Its first pieces would be judged, and trained, as if they were the word."""
    out = encode_prompts(pieces, [["cats", "dogs"]], max_length=most)
    assert out["input_ids"].tolist() == [ids]
    assert out["word_positions"].tolist() == [begins]
    assert unread_words([["cats", "dogs"]], out["word_positions"]) == [unread]


def test_pad_rows():
    assert pad_rows([[1, 2], [], [3]], -1).tolist() == [[1, 2], [-1, -1], [3, -1]]
    assert pad_rows([[]], -1).shape == (1, 1)


def test_collator_gives_what_the_model_takes(dev, tokenizer, model):
    dataset = FeedbackDataset(dev, model.config)
    batch = FeedbackCollator(tokenizer, model.config)([dataset[index] for index in range(6)])
    assert batch["pixel_values"].shape == (6, 3, 32, 32)
    assert batch["heatmaps"].shape == (6, 2, 32, 32)
    assert batch["word_labels"].shape == batch["word_positions"].shape == (6, 7)
    assert ((batch["word_labels"] == -100) == (batch["word_positions"] == -1)).all()
    row = dev[2]
    assert batch["scores"][2].tolist() == pytest.approx(
        [row["plausibility"], row["alignment"], row["aesthetics"], row["overall"]]
    )
    means = [np.asarray(row[f"{name}_map"]).mean() / 255 for name in ("implausibility", "misalignment")]
    assert batch["heatmaps"][2].mean((1, 2)).tolist() == pytest.approx(means, abs=1e-6)
    assert model(**batch).loss.isfinite()


def test_labels_of_words_that_are_cut_do_not_count(dev, tokenizer, make_config):
    config = make_config(max_text_length=4)  # three words and the end
    dataset = FeedbackDataset(dev, config)
    batch = FeedbackCollator(tokenizer, config)([dataset[index] for index in range(6)])
    assert (batch["word_labels"] != -100).sum(1).max() == 3


def test_in_memory_is_the_same(dev, tokenizer, make_config):
    config = make_config()
    collate = FeedbackCollator(tokenizer, config)
    one = collate([FeedbackDataset(dev, config)[3]])
    other = collate([FeedbackDataset(dev, config, in_memory=True)[3]])
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-6, rtol=0)


def test_missing_columns_are_named(dev, make_config):
    with pytest.raises(ValueError, match="keyword_labels"):
        FeedbackDataset(dev.remove_columns("keyword_labels"), make_config())


def test_epochs_change_the_augmentation(dev, make_config):
    dataset = FeedbackDataset(dev, make_config(), Augmentation(brightness=0.5))
    first = dataset[0]["image"]
    assert torch.equal(first, dataset[0]["image"])
    dataset.set_epoch(1)
    assert not torch.equal(first, dataset[0]["image"])


def test_what_is_not_read_is_named():
    unread = unread_words([["a", "b", "c"], ["d"]], torch.tensor([[0, -1, -1], [0, -1, -1]]))
    assert unread == [["b", "c"], []]
    told = "2 words of 1 prompts are not read: 'b' and 1 more. They lie behind the 4 pieces"
    assert describe_unread(unread, 4, most=1).startswith(told)
    assert describe_unread([[], []], 4) is None
