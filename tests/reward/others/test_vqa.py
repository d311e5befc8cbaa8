"""Against a plain forward pass of a tiny LLaVA, one picture at a time, so that nothing is padded."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from reward.draw import to_image
from reward.feedback import check_reward
from reward.others import VQAScore
from reward.others.self_check import KNOWN, self_check
from tests.reward.others.conftest import PROMPTS, WORDS, make_image_processor, spread

QUESTION = "Does this show {prompt} ? yes or no"
CHAT = (
    "{{ bos_token }} {% for m in messages %}USER: "
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image> {% else %}"
    "{{ c['text'] }}{% endif %}{% endfor %}{% endfor %} ASSISTANT:"
)


def make_processor(chat=CHAT):
    """Template and tokenizer both begin a text with <bos>, as Llama's do."""
    words = ["<pad>", "<unk>", "<image>", "Yes", "No", "USER:", "ASSISTANT:", "<bos>", *QUESTION.split(), *WORDS]
    vocabulary = {word: place for place, word in enumerate(dict.fromkeys(words))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    begun = [("<bos>", vocabulary["<bos>"])]
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=begun)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    return LlavaProcessor(
        make_image_processor(), tokenizer, patch_size=8, vision_feature_select_strategy="default", chat_template=chat,
        num_additional_image_tokens=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture(scope="module")
def llava(processor):
    text = LlamaConfig(
        vocab_size=len(processor.tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=2, image_seq_length=16)
    return spread(LlavaForConditionalGeneration(config), 0.3).eval()


@pytest.fixture(scope="module")
def folder(llava, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    llava.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def expected(llava, processor, square):
    """(3, tokens), the probability of each token as the first of the answer."""
    found = []
    for image, prompt in zip(square, PROMPTS, strict=True):
        text = f"USER: <image> {QUESTION.replace('{prompt}', prompt)} ASSISTANT:"
        inputs = processor(images=to_image(image), text=text, return_tensors="pt")
        with torch.no_grad():
            found.append(llava(**inputs).logits[0, -1].softmax(dim=-1))
    return torch.stack(found)


def test_it_is_the_probability_of_yes(folder, square, expected):
    score = VQAScore(folder, question=QUESTION, batch_size=2)
    reward = score(square, PROMPTS)
    check_reward(reward, PROMPTS)
    assert expected[:, 3].std() > 1e-3
    torch.testing.assert_close(reward.total, expected[:, 3], atol=1e-5, rtol=0)
    assert not score.differentiable
    assert score.ranges == {"vqascore": (0.0, 1.0)}


def test_it_may_be_yes_against_no_and_the_template_given(folder, square, expected):
    template = "USER: <image> {question} ASSISTANT:"
    score = VQAScore(folder, question=QUESTION, among="answers", answers=("No", "Yes"), template=template)
    no = expected[:, 4] / (expected[:, 3] + expected[:, 4])
    torch.testing.assert_close(score(square, PROMPTS).total, no, atol=1e-5, rtol=0)


def test_the_self_check_finds_untrained_weights(folder):
    scale, *order = self_check(VQAScore(folder, question=QUESTION), KNOWN["vqascore"]).wrong
    assert "are not all between 0.5 and 1" in scale
    assert order


def test_a_nan_is_not_hidden(folder, square):
    square[1, 0, 0, 0] = float("nan")
    assert VQAScore(folder, question=QUESTION)(square, PROMPTS).total.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"question": "Is it?"}, "question must have {prompt} in it"),
        ({"template": "USER:"}, "template must have {question} in it"),
        ({"among": "words"}, "among is 'words'"),
        ({"answers": "Yes"}, "answers must be two words"),
        ({"model": "./nowhere"}, "there is no folder"),
    ],
)
def test_settings_that_make_no_sense_are_refused(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        VQAScore(**{"model": folder, **settings})


def test_answers_that_are_no_tokens_are_refused(folder):
    with pytest.raises(ValueError, match="the answer 'Maybe' is not one token"):
        VQAScore(folder, answers=("Maybe", "No")).to("cpu")


def test_a_model_without_a_chat_template_asks_for_one(llava, tmp_path):
    llava.save_pretrained(tmp_path)
    make_processor(chat=None).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no chat template; give `template`"):
        VQAScore(tmp_path).to("cpu")


def test_models_of_another_kind_are_refused(clip_folder, llava, tmp_path):
    with pytest.raises(ValueError, match="holds a model of type clip, which answers no question"):
        VQAScore(clip_folder)
    llava.save_pretrained(tmp_path)
    make_processor().tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has (no processor that can be loaded|a .*, not one of pictures and text)"):
        VQAScore(tmp_path).to("cpu")
