import itertools

import pytest
import torch
from transformers import ByT5Tokenizer

from reward.data import encode_prompts
from reward.keywords import SUFFIX, unmark
from reward.model import RahfModel
from reward.vocabulary import MARK, adopt_tokenizer
from reward.word_sequence import write_marks

SIGN, PAD, END = 99, 0, 1


def prompts(*words_of_pieces):
    """Prompts given as lists of words, each the list of its pieces; [] is a word without pieces."""
    length = max(sum(map(len, words)) for words in words_of_pieces) + 1
    count = max(map(len, words_of_pieces))
    ids, mask, positions = [], [], []
    for words in words_of_pieces:
        begins, pieces = [], []
        for word in words:
            begins.append(len(pieces) if word else -1)
            pieces += word
        ids.append([*pieces, END] + [PAD] * (length - len(pieces) - 1))
        mask.append([1] * (len(pieces) + 1) + [0] * (length - len(pieces) - 1))
        positions.append(begins + [-1] * (count - len(begins)))
    return torch.tensor(ids), torch.tensor(mask), torch.tensor(positions)


def by_hand(words, marks):
    written = [piece for word, mark in zip(words, marks, strict=True) for piece in word + [SIGN] * bool(mark and word)]
    return [*written, END]


def test_marks_stand_behind_their_words():
    rows = [[[5], [6, 7], [], [8]], [[5, 5, 5]], [[9], [], [4]]]
    given = prompts(*rows)
    for bits in itertools.product([False, True], repeat=8):
        marks = [bits[:4], bits[4:5], bits[5:]]
        marked = torch.zeros(3, 4, dtype=torch.bool)
        for row, bools in enumerate(marks):
            marked[row, : len(bools)] = torch.tensor(bools)
        written = write_marks(*given, marked, SIGN)
        assert written.ids.shape == (3, given[0].shape[1] + 4)
        for row, (words, bools) in enumerate(zip(rows, marks, strict=True)):
            expected = by_hand(words, bools)
            assert written.ids[row][written.mask[row]].tolist() == expected
            assert not written.ids[row][len(expected) :].any()
            for word, pieces in enumerate(words):
                assert written.seen[row, word] == bool(pieces)
                if pieces:  # what stands where a word's mark is decided: the mark, or what follows without it
                    stands = written.ids[row, written.deciding[row, word]]
                    assert stands == (SIGN if bools[word] else written.following[row, word])


@pytest.fixture
def writer(make_config, tokenizer):
    torch.manual_seed(3)
    model = RahfModel(make_config(words="sequence")).eval()
    adopt_tokenizer(model, tokenizer := copy_of(tokenizer))
    return model, tokenizer


def copy_of(tokenizer):
    import copy

    return copy.deepcopy(tokenizer)


def test_reading_is_greedy_decoding_word_by_word(writer):
    """Against the decoder asked after every word alone, with all it wrote before, and its full distribution."""
    model, tokenizer = writer
    words = [["a", "red", "circle", "left", "of", "a", "blue", "square"], ["blue", "square"], ["a"]]
    text = encode_prompts(tokenizer, words, 16)
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.word_head.write.weight.mul_(3)  # decisions that lean on those before
        ours = model(pixels, **text).word_logits
        _, fused = model.fuse(pixels, text["input_ids"], text["attention_mask"])
        mark, decisions = tokenizer.convert_tokens_to_ids(MARK), set()
        for row, prompt in enumerate(words):
            written, ids = [], tokenizer.convert_tokens_to_ids(prompt)
            for word in range(len(prompt)):
                written.append(ids[word])
                states = model.word_head.decoder(
                    inputs_embeds=model.encoder.embed_tokens(torch.tensor([[0, *written]])),
                    encoder_hidden_states=fused[row : row + 1],
                    encoder_attention_mask=text["attention_mask"][row : row + 1],
                ).last_hidden_state[0, -1]
                logits = model.word_head.write(states)
                following = ids[word + 1] if word + 1 < len(ids) else tokenizer.eos_token_id
                assert (logits[mark] - logits[following]).item() == pytest.approx(ours[row, word].item(), abs=1e-4)
                decisions.add(marked := bool(logits[mark] > logits[following]))
                written += [mark] * marked
            tokens, labels = unmark(tokenizer.decode(written).replace(f" {MARK}", SUFFIX))
            assert tokens == prompt  # always the prompt's own words
            assert labels == (ours[row, : len(prompt)] > 0).int().tolist()
    assert decisions == {True, False}


def test_reading_ends_even_where_a_mark_flips_for_ever(writer, monkeypatch):
    model, tokenizer = writer
    text, calls = encode_prompts(tokenizer, [["red", "circle"]], 16), []

    def flips(*_):
        calls.append(len(calls))
        return torch.full((1, 2), (-1.0) ** len(calls[:-1]))

    monkeypatch.setattr(model.word_head, "logits", flips)
    with torch.no_grad():
        model(torch.zeros(1, 3, 32, 32), **text)
    assert len(calls) == 3


def test_training_is_cross_entropy_under_teacher_forcing(writer):
    model, tokenizer = writer
    text = encode_prompts(tokenizer, [["red", "circle"], ["a"]], 16)
    pixels, labels = torch.zeros(2, 3, 32, 32), torch.tensor([[1, 0], [0, -100]])
    mark = tokenizer.convert_tokens_to_ids(MARK)
    red, circle, a = tokenizer.convert_tokens_to_ids(["red", "circle", "a"])
    _, fused = model.fuse(pixels, text["input_ids"], text["attention_mask"])
    expected = []
    for row, target in enumerate(([red, mark, circle, END], [a, END])):
        states = model.word_head.decoder(
            inputs_embeds=model.encoder.embed_tokens(torch.tensor([[0, *target[:-1]]])),
            encoder_hidden_states=fused[row : row + 1],
            encoder_attention_mask=text["attention_mask"][row : row + 1],
        ).last_hidden_state
        chances = model.word_head.write(states)[0].log_softmax(-1)
        expected.append(-chances[range(len(target)), target].mean())
    out = model(pixels, **text, word_labels=labels)
    assert out.word_loss.item() == pytest.approx((sum(expected) / 2).item(), rel=1e-5)
    model.train()
    assert model(pixels, **text, word_labels=labels).word_logits is None  # told, not chosen
    model(pixels, **text, word_labels=labels).word_loss.backward()
    idle = [name for name, one in model.word_head.named_parameters() if one.grad is None]
    assert not idle


def test_gradients_flow_from_the_words_into_the_picture(writer):
    model, tokenizer = writer
    text = encode_prompts(tokenizer, [["red", "circle"]], 16)
    pixels = torch.zeros(1, 3, 32, 32, requires_grad=True)
    model(pixels, **text).word_logits.sum().backward()
    assert pixels.grad.abs().sum() > 0


def test_a_decoder_without_vocabulary_says_what_to_do(make_config, tokenizer):
    model = RahfModel(make_config(words="sequence")).eval()
    with pytest.raises(ValueError, match="give it a tokenizer: adopt_tokenizer"):
        model(torch.zeros(1, 3, 32, 32), **encode_prompts(tokenizer, [["red"]], 16))
    endless = copy_of(tokenizer)
    endless.eos_token = None
    with pytest.raises(ValueError, match="needs a tokenizer with an end mark"):
        adopt_tokenizer(model, endless)


def test_the_mark_is_a_token_that_the_model_can_write(writer, tokenizer, tmp_path):
    model, marking = writer
    assert marking.convert_tokens_to_ids(MARK) == model.config.mark_id
    assert model.config.mark_id < model.encoder.embed_tokens.num_embeddings == model.word_head.write.out_features
    model.save_pretrained(tmp_path)
    marking.save_pretrained(tmp_path)
    loaded = RahfModel.from_pretrained(tmp_path)
    text = encode_prompts(marking, [["red", "circle"]], 16)
    pixels = torch.ones(1, 3, 32, 32)
    assert torch.equal(loaded(pixels, **text).word_logits, model(pixels, **text).word_logits)


@pytest.fixture
def pieces():
    """A tokenizer of T5's kind: pieces of words, a space before each word."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789_<>▁"]
    backend = Tokenizer(models.Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁red", -2.0), *letters], 2))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def test_no_prompt_holds_the_mark(pieces, make_config):
    """Nor does adding it change how words are cut, not even those that spell it."""
    words = [["red", "_0", "cat"], ["img_0123"], [MARK]]
    before = encode_prompts(pieces, words, 40)
    config = make_config(words="sequence")
    config.text_config.vocab_size = len(pieces)
    adopt_tokenizer(RahfModel(config), pieces)
    after = encode_prompts(pieces, words, 40)
    assert torch.equal(after["input_ids"], before["input_ids"])
    assert not (after["input_ids"] == pieces.convert_tokens_to_ids(MARK)).any()


def test_a_tokenizer_that_does_not_place_its_pieces_is_refused(make_config):
    with pytest.raises(ValueError, match="ByT5Tokenizer does not tell which piece belongs to which word"):
        adopt_tokenizer(RahfModel(make_config()), ByT5Tokenizer())
