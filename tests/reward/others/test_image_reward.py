import pytest
import torch
from safetensors.torch import save_file
from transformers import BertTokenizer

from reward.draw import to_image
from reward.feedback import check_reward
from reward.others import ImageReward
from reward.others.self_check import KNOWN, self_check
from tests.reward.others.blip_by_hand import ImageRewardByHand
from tests.reward.others.conftest import PROMPTS, WORDS, make_image_processor, spread


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    BertTokenizer({token: place for place, token in enumerate(tokens)}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def by_hand():
    torch.manual_seed(0)
    model = spread(ImageRewardByHand(len(WORDS) + 5), 0.15).eval()
    torch.nn.init.zeros_(model.blip.text_encoder.embeddings.token_type_embeddings.weight)
    return model


@pytest.fixture
def file(by_hand, tmp_path):
    torch.save(by_hand.weights(), tmp_path / "ImageReward.pt")
    return tmp_path / "ImageReward.pt"


def test_it_is_blips_first_token_through_the_head(by_hand, bert_folder, file, square):
    reward = ImageReward(file, bert_folder, batch_size=2)
    tokenizer = BertTokenizer.from_pretrained(bert_folder)
    with torch.no_grad():
        expected = [
            by_hand(
                make_image_processor()(to_image(image), return_tensors="pt").pixel_values,
                tokenizer(prompt, return_tensors="pt").input_ids,
            )
            for image, prompt in zip(square, PROMPTS, strict=True)
        ]
    said = reward(square, PROMPTS)
    check_reward(said, PROMPTS)
    assert torch.tensor(expected).std() > 0.05
    torch.testing.assert_close(said.total, torch.tensor(expected), atol=1e-4, rtol=0)
    assert reward.features(square).shape == (3, 64)


def test_safetensors_and_batches_give_the_same(by_hand, bert_folder, file, images, tmp_path):
    save_file({name: value.clone() for name, value in by_hand.weights().items()}, tmp_path / "reward.safetensors")
    one = ImageReward(file, bert_folder)(images, PROMPTS).total
    other = ImageReward(tmp_path / "reward.safetensors", bert_folder, batch_size=1)(images, PROMPTS).total
    torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def test_gradients_reach_the_images(bert_folder, file, images):
    images.requires_grad_()
    ImageReward(file, bert_folder)(images, PROMPTS).total.sum().backward()
    assert (images.grad.abs().sum((1, 2, 3)) > 0).all()


def test_the_self_check_finds_untrained_weights_and_their_other_size(bert_folder, file):
    *order, size = self_check(ImageReward(file, bert_folder), KNOWN["imagereward"]).wrong
    assert any("the weights are not whole" in said for said in order)
    assert "its preprocessing is 32 x 32 by crop of 32" in size
    assert "that of the published model is 224 x 224 by crop of 224" in size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("blip.visual_encoder.norm.bias"), "lacks the weights post_layernorm.bias"),
        (lambda w: w.pop("mlp.layers.7.bias"), "lacks the weights layers.7.bias"),
        (lambda w: w.update({"blip.visual_encoder.blocks.0.gamma": torch.ones(1)}), "blocks.0.gamma in its picture"),
        (lambda w: w.update({"blip.text_encoder.pooler.dense.bias": torch.ones(1)}), "the weights pooler.dense.bias"),
        (lambda w: w.update({"clip.logit_scale": torch.ones(1)}), "clip.logit_scale, which ImageReward has not"),
        (lambda w: [w.pop(name) for name in list(w) if name.startswith("mlp.")], "begin with mlp."),
        (lambda w: w.pop("blip.visual_encoder.pos_embed"), "holds no BLIP: embeddings.position_embedding"),
        (lambda w: w.update({"mlp.layers.7.bias": 1.0}), "holds no mapping of names to tensors"),
    ],
)
def test_weights_of_another_model_are_refused(by_hand, bert_folder, file, change, message):
    weights = by_hand.weights()
    change(weights)
    torch.save(weights, file)
    with pytest.raises(ValueError, match=message):
        ImageReward(file, bert_folder).to("cpu")


def test_a_tokenizer_that_does_not_fit_is_refused(file, clip_folder, tmp_path):
    with pytest.raises(ValueError, match="tokens, the model reads 19; give that of bert-base-uncased"):
        ImageReward(file, clip_folder).to("cpu")
    with pytest.raises(ValueError, match="has no tokenizer; give `tokenizer`"):
        ImageReward(file, tmp_path)
    with pytest.raises(ValueError, match="there is no file"):
        ImageReward(tmp_path / "other.pt", clip_folder)
