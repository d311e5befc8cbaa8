import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor

from rl.attention import WordAttention, middle_layers, word_positions
from rl.policy import StableDiffusionPolicy


def network(levels=3):
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16, 16)[:levels], layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * levels, up_block_types=("CrossAttnUpBlock2D",) * levels,
        cross_attention_dim=16, attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip


def test_layers_at_the_middle_resolutions():
    assert set(middle_layers(network()).values()) == {2}
    assert set(middle_layers(network(levels=2)).values()) == {1, 2}  # neither is in the middle
    names = middle_layers(network())
    assert all("down_blocks.1" in name or "up_blocks.1" in name for name in names)


class Recording(AttnProcessor):
    """Attention written out by diffusers' own plain processor, which keeps the probabilities that it computes."""

    def __init__(self, kept):
        self.kept = kept

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **keywords):
        original = attn.get_attention_scores
        attn.get_attention_scores = lambda *args: self.kept.append(original(*args)) or self.kept[-1]
        try:
            return super().__call__(attn, hidden_states, encoder_hidden_states, **keywords)
        finally:
            del attn.get_attention_scores


def test_maps_are_the_mean_of_what_the_layers_attend_to():
    unet = network().eval()
    latents, text = torch.randn(4, 4, 8, 12), torch.randn(4, 5, 16)
    with torch.no_grad(), WordAttention(unet, (8, 12), batch_size=2) as attention:
        unet(latents, 7, encoder_hidden_states=text)
        unet(latents, 3, encoder_hidden_states=text)
    kept = []
    for name in middle_layers(unet):
        unet.get_submodule(name).set_processor(Recording(kept))
    with torch.no_grad():
        unet(latents, 7, encoder_hidden_states=text)
        unet(latents, 3, encoder_hidden_states=text)
    looked = torch.stack([one.unflatten(0, (4, -1)).mean(1)[2:] for one in kept]).mean(
        0
    )  # (2, n, L), the last two rows
    expected = looked.transpose(1, 2).unflatten(-1, (4, 6))
    torch.testing.assert_close(attention.maps, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(attention.maps.sum(dim=1), torch.ones(2, 4, 6))


def test_hooks_are_gone_afterwards():
    unet = network()
    with WordAttention(unet, (8, 8), batch_size=1):
        pass
    assert not any(module._forward_pre_hooks for module in unet.modules())


def test_words_are_where_the_tokenizer_put_their_pieces(pipeline_folder):
    tokenizer = StableDiffusionPolicy.load(pipeline_folder).pipeline.tokenizer
    prompts = ["red zq, square", "", "red " * 20]
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(prompts[0]).input_ids)
    found = word_positions(tokenizer, prompts)
    assert [len(words) for words in found] == [3, 0, 20]
    pieces = ["".join(tokens[place] for place in word).replace("</w>", "") for word in found[0]]
    assert pieces == ["red", "zq", "square"]
    assert len(found[0][1]) == 2  # a piece a letter
    assert [bool(word) for word in found[2]] == [True] * 5 + [False] * 15  # 14 positions, three for each word
