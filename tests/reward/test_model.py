import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSeq2SeqLM,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextV2Config,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    MT5Config,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
    Siglip2VisionConfig,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SwinConfig,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    UMT5Config,
    ViTConfig,
    ViTModel,
)

from reward.model import RahfModel
from reward.rahf_config import OUTPUT_NAMES, RahfConfig
from reward.vocabulary import adopt_tokenizer


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return {
        "pixel_values": torch.randn(3, 3, 32, 32, generator=generator),
        "input_ids": torch.tensor([[4, 5, 7, 1], [6, 1, 0, 0], [4, 8, 1, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]),
        "word_positions": torch.tensor([[0, 1, 2], [0, -1, -1], [0, 1, -1]]),
    }


@pytest.fixture
def targets():
    return {
        "scores": torch.rand(3, 4),
        "heatmaps": torch.rand(3, 2, 32, 32),
        "word_labels": torch.tensor([[0, 1, 0], [1, -100, -100], [0, 0, -100]]),
    }


def test_outputs_have_their_shapes_and_ranges(model, batch):
    out = model(**batch)
    assert (out.scores.shape, out.heatmaps.shape, out.word_logits.shape) == ((3, 4), (3, 2, 32, 32), (3, 3))
    for values in (out.scores, out.heatmaps):
        assert ((values > 0) & (values < 1)).all()
    assert out.loss is None
    assert 0.02 < out.heatmaps.mean() < 0.12  # maps start near empty, as most targets are


@pytest.mark.parametrize("heatmap_size", [16, 32, 48, 64])
@pytest.mark.parametrize("kind", ["paper", "light"])
def test_heads_of_both_kinds_at_any_size(make_config, batch, kind, heatmap_size):
    config = make_config(heatmap_head=kind, score_head=kind, heatmap_size=heatmap_size, head_width=0.05)
    out = RahfModel(config).eval()(**batch)
    assert out.heatmaps.shape == (3, 2, heatmap_size, heatmap_size)
    assert out.scores.shape == (3, 4)


def test_padding_changes_nothing(model, batch):
    """Prompts padded to longer, with any id, give the same: the mask holds in the encoder and in the heads."""
    short = model(**batch)
    longer = dict(batch)
    longer["input_ids"] = torch.nn.functional.pad(batch["input_ids"], (0, 9), value=7)
    longer["attention_mask"] = torch.nn.functional.pad(batch["attention_mask"], (0, 9))
    long = model(**longer)
    torch.testing.assert_close(short.scores, long.scores, atol=1e-6, rtol=0)
    torch.testing.assert_close(short.heatmaps, long.heatmaps, atol=1e-6, rtol=0)
    seen = batch["word_positions"] >= 0
    torch.testing.assert_close(short.word_logits[seen], long.word_logits[seen], atol=1e-5, rtol=0)


def test_company_changes_nothing(model, batch):
    alone = model(**{name: value[1:2] for name, value in batch.items()})
    torch.testing.assert_close(alone.scores[0], model(**batch).scores[1], atol=1e-6, rtol=0)


def test_image_and_prompt_see_each_other(model, batch):
    out = model(**batch)
    other = {**batch, "input_ids": batch["input_ids"].flip(0)}
    assert not torch.allclose(model(**other).heatmaps, out.heatmaps, atol=1e-6)
    other = {**batch, "pixel_values": -batch["pixel_values"]}
    assert not torch.allclose(model(**other).word_logits, out.word_logits, atol=1e-6)


def test_where_a_thing_is_and_in_which_order_words_stand_matter(model, batch):
    out = model(**batch)
    flipped = model(**{**batch, "pixel_values": batch["pixel_values"].flip(-1)})
    assert not torch.allclose(flipped.heatmaps.flip(-1), out.heatmaps, atol=1e-6)
    swapped = batch["input_ids"].clone()
    swapped[0, :2] = swapped[0, [1, 0]]
    assert not torch.allclose(model(**{**batch, "input_ids": swapped}).scores[0], out.scores[0], atol=1e-7)


def test_loss_is_the_weighted_sum_of_its_terms(make_config, batch, targets):
    config = make_config(score_loss_weight=2.0, heatmap_loss_weight=3.0, word_loss_weight=5.0)
    out = RahfModel(config).eval()(**batch, **targets)
    assert out.loss.item() == pytest.approx(
        2 * out.score_loss.item() + 3 * out.heatmap_loss.item() + 5 * out.word_loss.item(), rel=1e-5
    )


def test_every_weight_gets_a_gradient(model, batch, targets):
    model.train()(**batch, **targets).loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without


def test_saved_and_loaded_gives_the_same_bits(make_config, batch, tmp_path):
    model = RahfModel(make_config(image_mean=[0.4, 0.5, 0.6], word_threshold=0.35)).eval()
    model.save_pretrained(tmp_path)
    loaded = RahfModel.from_pretrained(tmp_path)
    for name in ("scores", "heatmaps", "word_logits"):
        assert torch.equal(model(**batch)[name], loaded(**batch)[name])
    assert loaded.config.to_dict().keys() == model.config.to_dict().keys()
    assert (list(loaded.config.image_mean), loaded.config.word_threshold) == ([0.4, 0.5, 0.6], 0.35)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), RahfConfig)
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())  # under the modules' own names


def test_from_backbones_takes_their_weights(tmp_path, batch):
    torch.manual_seed(1)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    vision = ViTModel(ViTConfig(**size, image_size=32, patch_size=8)).eval()
    text = T5ForConditionalGeneration(
        T5Config(vocab_size=20, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=1, num_heads=2)
    ).eval()
    vision.save_pretrained(tmp_path / "vit")
    text.save_pretrained(tmp_path / "t5")
    model = RahfModel.from_backbones(tmp_path / "vit", tmp_path / "t5", words="sequence", head_width=0.1).eval()
    seen = model.vision(pixel_values=batch["pixel_values"]).last_hidden_state
    assert torch.equal(seen, vision(pixel_values=batch["pixel_values"]).last_hidden_state)
    ids = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    assert torch.equal(model.encoder(**ids).last_hidden_state, text.encoder(**ids).last_hidden_state)
    model.save_pretrained(tmp_path / "rahf")
    again = RahfModel.from_pretrained(tmp_path / "rahf")
    states = seen @ torch.ones(16, 24)  # a stand-in for fused text tokens
    theirs = text(encoder_outputs=(states,), decoder_input_ids=batch["input_ids"]).logits
    for loaded in (model, again):
        said = loaded.word_head.decoder(
            inputs_embeds=loaded.encoder.embed_tokens(batch["input_ids"]), encoder_hidden_states=states
        )
        torch.testing.assert_close(loaded.word_head.write(said.last_hidden_state), theirs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heatmap_head": "heavy"}, "heatmap_head must be one of paper, light, not 'heavy'"),
        ({"words": "colours"}, "words must be one of tagging, sequence, none, not 'colours'"),
        ({"variant": "one_head"}, "variant must be one of multi_head, augmented_prompt, not 'one_head'"),
        ({"image_pooling": 3}, "image_pooling must divide both sides of the grid of 4 x 4 patches, not be 3"),
        ({"image_pooling": 0}, "image_pooling must be at least 1, not 0"),
    ],
)
def test_unknown_settings_are_named(make_config, options, message):
    with pytest.raises(ValueError, match=message):
        make_config(**options)


def test_pooled_patches_are_blocks_means_and_come_back_where_they_were(make_config, batch):
    """T5 reads the mean of 2 x 2 patches; each patch gets its block's answer, and its own token by a linear map."""
    torch.manual_seed(0)
    model = RahfModel(make_config(image_size=(32, 64), image_pooling=2)).eval()
    pictures = torch.randn(3, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    told = {}
    model.encoder.register_forward_hook(lambda _, __, given, out: told.update(given, out=out), with_kwargs=True)
    with torch.no_grad():
        own = model.see(pictures)  # (3, 4 * 8, D)
        seen, text = model.fuse(pictures, batch["input_ids"], batch["attention_mask"])
    said = told["out"].last_hidden_state
    assert told["inputs_embeds"].shape[1] == told["attention_mask"].shape[1] == 2 * 4 + 4
    assert torch.equal(text, said[:, 8:])
    for row, column in ((0, 0), (1, 5), (3, 7)):
        block = [place for place in range(32) if (place // 8 // 2, place % 8 // 2) == (row // 2, column // 2)]
        number = row // 2 * 4 + column // 2
        torch.testing.assert_close(told["inputs_embeds"][:, number], own[:, block].mean(1))
        patch = row * 8 + column
        torch.testing.assert_close(seen[:, patch], said[:, number] + model.detail(own[:, patch]))


@pytest.mark.parametrize("variant", ["multi_head", "augmented_prompt"])
def test_pooled_patches_train_and_load_as_others_do(make_config, tokenizer, batch, targets, tmp_path, variant):
    model = RahfModel(make_config(image_pooling=2, variant=variant))
    adopt_tokenizer(model, tokenizer)
    model.train()(**batch, **targets).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    model.eval().save_pretrained(tmp_path)
    loaded = RahfModel.from_pretrained(tmp_path).eval()
    assert loaded.config.image_pooling == 2
    for name in ("scores", "heatmaps", "word_logits"):
        assert torch.equal(model(**batch)[name], loaded(**batch)[name])


@pytest.fixture
def convolutional():
    vision = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    text = T5Config(vocab_size=20, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=1, num_heads=2)
    configs = {"vision_config": vision.to_dict(), "text_config": text.to_dict()}
    torch.manual_seed(0)
    return RahfModel(RahfConfig(**configs, image_size=32, head_width=0.25, max_text_length=16)).eval()


def test_a_convolutional_encoder_does_as_well(convolutional, batch, targets, tmp_path):
    assert (convolutional.config.grid, convolutional.config.heatmap_size) == ((4, 4), 32)
    out = convolutional.train()(**batch, **targets)
    assert (out.scores.shape, out.heatmaps.shape, out.word_logits.shape) == ((3, 4), (3, 2, 32, 32), (3, 3))
    out.loss.backward()
    assert [name for name, parameter in convolutional.named_parameters() if parameter.grad is None] == []
    convolutional.eval().save_pretrained(tmp_path)
    loaded = RahfModel.from_pretrained(tmp_path).eval()
    for name in ("scores", "heatmaps", "word_logits"):  # batch statistics are kept too
        assert torch.equal(convolutional(**batch)[name], loaded(**batch)[name])


def test_a_convolutional_encoder_knows_places_by_a_table(convolutional, batch):
    """Of a picture that is the same everywhere, features away from its rim differ by the table alone."""
    flat = torch.zeros(1, 3, 32, 32)
    seen = convolutional.vision(pixel_values=flat).last_hidden_state
    projected = convolutional.project(seen.flatten(2).transpose(1, 2))[0] + convolutional.places.weight
    taken = {}
    convolutional.encoder.register_forward_pre_hook(lambda _, __, given: taken.update(given), with_kwargs=True)
    convolutional(flat, batch["input_ids"][:1], batch["attention_mask"][:1])
    torch.testing.assert_close(taken["inputs_embeds"][0, :16], projected)


def test_the_size_that_a_convolutional_encoder_sees_must_be_given_and_fit():
    configs = {"vision_config": ResNetConfig().to_dict(), "text_config": T5Config().to_dict()}
    with pytest.raises(ValueError, match="give image_size: the vision encoder, a 'resnet', has none of its own"):
        RahfConfig(**configs)
    with pytest.raises(ValueError, match="image_size 100 is no multiple of 32"):
        RahfConfig(**configs, image_size=100)
    assert RahfConfig(**configs, image_size=224).grid == (7, 7)
    unknown = {**configs, "vision_config": {"model_type": "efficientnet"}}
    with pytest.raises(ValueError, match="the vision encoder is a 'efficientnet', which says neither"):
        RahfConfig(**unknown, image_size=64)


ENCODERS = [
    (SwinConfig(image_size=64, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4), 8),
    (ConvNextV2Config(num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], image_size=64), 8),
    (ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], downsample_in_first_stage=True), 4),
    (Dinov2Config(image_size=64, patch_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2), 4),
    (Dinov2WithRegistersConfig(image_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2), 4),
    (DINOv3ViTConfig(image_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2), 4),
    (SiglipVisionConfig(image_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2), 4),
    (Siglip2VisionConfig(num_patches=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2), 4),
    (CLIPVisionConfig(image_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2), 2),
]
"""Vision encoders for pictures of 64 pixels, and the grid that each sees."""


def kind_of(value):
    return getattr(value, "model_type", value)


@pytest.mark.parametrize(("vision", "grid"), ENCODERS, ids=kind_of)
def test_the_grid_is_that_of_the_encoder(vision, grid):
    text = T5Config(vocab_size=20, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    config = RahfConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), image_size=64, head_width=0.1)
    assert config.grid == (grid, grid)
    ids = torch.tensor([[4, 1]])
    model = RahfModel(config).train()
    image, _ = model.fuse(torch.randn(1, 3, 64, 64), ids, torch.ones_like(ids))
    assert image.shape == (1, grid**2, 24)
    image.sum().backward()
    trained = [(name, one.grad) for name, one in model.vision.named_parameters() if one.requires_grad]
    assert [name for name, gradient in trained if gradient is None] == []  # DDP waits for every gradient


@pytest.mark.parametrize("vision", [vision for vision, _ in ENCODERS], ids=kind_of)
def test_every_encoder_sees_pictures_of_another_shape_in_one_graph(vision):
    text = T5Config(vocab_size=20, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    settings = {"image_size": [64, 96], "heatmap_size": 32, "head_width": 0.1}
    model = RahfModel(RahfConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), **settings)).eval()
    images = torch.randn(2, 3, 64, 96)
    torch.compiler.reset()  # or it counts the other encoders
    with torch.no_grad():
        features = model.patch_features(images)
        compiled = torch.compile(model.patch_features, fullgraph=True, backend="aot_eager")(images)
    assert features.shape[:2] == (2, model.config.grid[0] * model.config.grid[1])
    assert 2 * model.config.grid[1] == 3 * model.config.grid[0]
    torch.testing.assert_close(compiled, features)


def test_from_backbones_takes_a_resnet(tmp_path, batch):
    torch.manual_seed(1)
    vision = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"))
    vision(torch.randn(4, 3, 32, 32))  # moves the batch statistics
    vision.eval().save_pretrained(tmp_path / "resnet")
    text = T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    model = RahfModel.from_backbones(tmp_path / "resnet", text, image_size=32, head_width=0.1).eval()
    seen = model.vision(pixel_values=batch["pixel_values"]).last_hidden_state
    assert torch.equal(seen, vision(pixel_values=batch["pixel_values"]).last_hidden_state)


@pytest.fixture
def augmented(make_config, tokenizer):
    torch.manual_seed(0)
    model = RahfModel(make_config(variant="augmented_prompt")).eval()
    adopt_tokenizer(model, copy.deepcopy(tokenizer))
    return model


@pytest.mark.parametrize("cut", [(2,), (1, 2)])
def test_augmented_prompt_names_what_it_is_to_say(augmented, batch, cut):
    """Each output is what the one head of its kind reads after the encoder saw its name before the prompt, a short name
    behind places that nothing looks at."""
    names = augmented.config.output_ids = [
        name[: cut[place % len(cut)]] for place, name in enumerate(augmented.config.output_ids)
    ]
    out, patches = augmented(**batch), 16
    assert (len(augmented.score_heads), len(augmented.heatmap_heads)) == (1, 1)
    assert len({tuple(name) for name in names}) == len(OUTPUT_NAMES) == 7
    seen = augmented.see(batch["pixel_values"])
    for row in range(3):
        length = int(batch["attention_mask"][row].sum())
        prompt = batch["input_ids"][row, :length].tolist()
        fused = []
        for name in names:
            away = 2 - len(name)
            text = augmented.encoder.embed_tokens(torch.tensor([[9] * away + [*name, *prompt]]))
            read = {
                "inputs_embeds": torch.cat([seen[row : row + 1], text], 1),
                "attention_mask": torch.tensor([[1] * patches + [0] * away + [1] * (len(name) + length)]),
            }
            states = augmented.encoder(**read).last_hidden_state
            fused.append((states[:, :patches], states[:, patches + 2 :]))
        maps = [image.transpose(1, 2).unflatten(2, (4, 4)) for image, _ in fused]
        for index in range(4):
            score = augmented.score_heads["any"](maps[index], fused[index][1], torch.ones(1, length)).sigmoid()
            torch.testing.assert_close(out.scores[row, index], score[0], atol=1e-5, rtol=0)
        for index in range(2):
            heatmap = augmented.heatmap_heads["any"](maps[4 + index]).sigmoid()
            torch.testing.assert_close(out.heatmaps[row, index], heatmap[0], atol=1e-5, rtol=0)
        words = int((batch["word_positions"][row] >= 0).sum())
        logits = augmented.word_head(fused[-1][1], batch["word_positions"][row : row + 1, :words])
        torch.testing.assert_close(out.word_logits[row, :words], logits[0], atol=1e-4, rtol=0)


def test_augmented_prompt_is_trained_and_saved_whole(augmented, batch, targets, tmp_path):
    augmented.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    for name in ("scores", "heatmaps", "word_logits"):
        assert torch.equal(augmented(**batch)[name], loaded(**batch)[name])
    augmented.train()(**batch, **targets).loss.backward()
    assert not [name for name, parameter in augmented.named_parameters() if parameter.grad is None]


def test_augmented_prompt_without_names_says_what_to_do(make_config, batch):
    with pytest.raises(ValueError, match="give it a tokenizer: adopt_tokenizer"):
        RahfModel(make_config(variant="augmented_prompt"))(**batch)


@pytest.mark.parametrize("size", [[48, 32], [32, 64], 64])
@pytest.mark.parametrize("heads", ["paper", "light"])
def test_pictures_of_another_shape_and_size(make_config, batch, targets, size, heads):
    height, width = (size, size) if isinstance(size, int) else size
    config = make_config(image_size=size, heatmap_size=[24, 40], heatmap_head=heads, score_head=heads)
    assert (config.grid, config.map_size) == ((height // 8, width // 8), (24, 40))
    model = RahfModel(config).eval()
    batch["pixel_values"] = torch.randn(3, 3, height, width)
    out = model(**batch, **(targets | {"heatmaps": torch.rand(3, 2, 24, 40)}))
    assert out.heatmaps.shape == (3, 2, 24, 40)
    assert out.loss.isfinite()


def test_positions_are_interpolated_for_a_larger_picture(make_config):
    """With patches that say nothing, features are the position embeddings: twice as many a side, bicubically."""
    small = RahfModel(make_config()).eval()
    large = RahfModel(make_config(image_size=[64, 32])).eval()
    large.load_state_dict(small.state_dict())
    taken = {}
    large.vision.embeddings.register_forward_hook(lambda _, __, out: taken.update(out=out))
    flat = torch.zeros(1, 3, 64, 32)
    large.see(flat)
    table = small.vision.embeddings.position_embeddings[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    wanted = torch.nn.functional.interpolate(table, size=(8, 4), mode="bicubic", align_corners=False).flatten(2)
    bias = small.vision.embeddings.patch_embeddings.projection.bias
    torch.testing.assert_close(taken["out"][:, 1:], wanted.transpose(1, 2) + bias)


def test_a_size_that_the_encoder_cannot_see_is_refused(make_config):
    with pytest.raises(ValueError, match="image_size 36 x 32 is no multiple of 8"):
        make_config(image_size=[36, 32])


@pytest.mark.parametrize("kind", [MT5Config, UMT5Config])
@pytest.mark.parametrize("words", ["tagging", "sequence"])
def test_other_text_models_of_the_family(kind, words, batch, targets, tokenizer):
    torch.manual_seed(0)
    size = {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 1, "num_heads": 2}
    text = AutoModelForSeq2SeqLM.from_config(kind(vocab_size=20, **size)).eval()
    vision = ViTModel(
        ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8)
    )
    model = RahfModel.from_backbones(vision, text, words=words, head_width=0.1).eval()
    adopt_tokenizer(model, copy.deepcopy(tokenizer))
    ids = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    theirs = text.get_encoder()(**ids).last_hidden_state
    assert torch.equal(model.encoder(**ids).last_hidden_state, theirs)
    if words == "sequence":
        decoded = text(encoder_outputs=(theirs,), decoder_input_ids=batch["input_ids"]).logits
        embedded = model.encoder.embed_tokens(batch["input_ids"])
        said = model.word_head.decoder(inputs_embeds=embedded, encoder_hidden_states=theirs).last_hidden_state
        torch.testing.assert_close(model.word_head.write(said)[..., :20], decoded)
    model.train()(**batch, **targets).loss.backward()


def test_text_models_of_another_family_are_named():
    with pytest.raises(ValueError, match="the text model is a 'bert'; RAHF is built on one of t5, mt5, umt5"):
        RahfConfig(vision_config=ViTConfig().to_dict(), text_config={"model_type": "bert"})


@pytest.mark.parametrize(
    "options",
    [{}, {"variant": "augmented_prompt"}, {"heatmap_head": "paper"}, {"image_size": [32, 48]}, {"words": "sequence"}],
    ids=str,
)
def test_forward_compiles_without_a_graph_break(make_config, tokenizer, batch, targets, options):
    """With words in sequence, in training: where marks are chosen, how often depends on them."""
    model = RahfModel(make_config(**({"heatmap_size": 32, "head_width": 0.05} | options)))
    model.train("words" in options)
    batch["pixel_values"] = torch.randn(3, 3, *model.config.input_size)
    adopt_tokenizer(model, copy.deepcopy(tokenizer))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        ours, theirs = model(**batch, **targets), compiled(**batch, **targets)
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name])


def test_from_backbones_takes_the_picture_tower_of_siglip(tmp_path, batch):
    tower = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    sizes = {"image_size": 32, "patch_size": 8}
    config = SiglipConfig(vision_config={**tower, **sizes}, text_config={**tower, "vocab_size": 20})
    both = SiglipModel(config).eval()
    both.save_pretrained(tmp_path)
    text = T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    model = RahfModel.from_backbones(tmp_path, text, head_width=0.1).eval()
    seen = model.vision(pixel_values=batch["pixel_values"]).last_hidden_state
    assert torch.equal(seen, both.vision_model(pixel_values=batch["pixel_values"]).last_hidden_state)


def test_pixels_are_normalised_as_the_vision_encoder_was_pretrained(tmp_path, caplog):
    """By the image processor beside its weights; by what is said instead; and where nothing is known, that is said."""
    vision = CLIPVisionModel(
        CLIPVisionConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                         image_size=32, patch_size=8)
    )  # fmt: skip
    text = T5EncoderModel(T5Config(vocab_size=20, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    vision.save_pretrained(tmp_path)
    assert RahfModel.from_backbones(tmp_path, text, head_width=0.1).config.image_mean == (0.5, 0.5, 0.5)
    assert "does not say how the vision encoder's pixels were normalised" in caplog.text
    CLIPImageProcessorPil(size={"shortest_edge": 32}).save_pretrained(tmp_path)
    caplog.clear()
    config = RahfModel.from_backbones(tmp_path, text, head_width=0.1).config
    assert config.image_mean == pytest.approx([0.48145466, 0.4578275, 0.40821073])  # CLIP's, by its paper's code
    assert config.image_std == pytest.approx([0.26862954, 0.26130258, 0.27577711])
    assert not caplog.text
    told = RahfModel.from_backbones(tmp_path, text, head_width=0.1, image_mean=[0.1, 0.2, 0.3]).config
    assert (told.image_mean, told.image_std) == ([0.1, 0.2, 0.3], config.image_std)
    CLIPImageProcessorPil(do_normalize=False).save_pretrained(tmp_path)
    bare = RahfModel.from_backbones(tmp_path, text, head_width=0.1).config
    assert (bare.image_mean, bare.image_std) == ([0.0] * 3, [1.0] * 3)
    with pytest.raises(ValueError, match="image_std takes a number for each of R, G, B, of image_std above 0"):
        RahfModel.from_backbones(tmp_path, text, image_std=[1.0, 0.0, 1.0])


@pytest.mark.parametrize("part", ["vision", "text"])
def test_backbones_stored_in_half_precision_are_computed_in_full(tmp_path, batch, part):
    vision = ViTModel(
        ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8)
    )
    text = T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    (vision if part == "vision" else text).half()
    vision.save_pretrained(tmp_path / "vision")
    text.save_pretrained(tmp_path / "text")
    model = RahfModel.from_backbones(tmp_path / "vision", tmp_path / "text", head_width=0.1).eval()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model(**batch).scores.isfinite().all()


def test_a_decoder_is_not_made_up(tmp_path):
    size = {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
    T5EncoderModel(T5Config(**size)).save_pretrained(tmp_path)
    vision = ViTModel(
        ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8)
    )
    RahfModel.from_backbones(vision, tmp_path, head_width=0.1)
    with pytest.raises(ValueError, match="the text model given lacks weights: decoder"):
        RahfModel.from_backbones(vision, tmp_path, words="sequence", head_width=0.1)


def test_bfloat16_predicts_with_maps_of_any_size(make_config, batch):
    model = RahfModel(make_config(heatmap_size=[24, 40])).eval().to(torch.bfloat16)
    out = model(**(batch | {"pixel_values": batch["pixel_values"].bfloat16()}))
    assert (out.scores.dtype, out.heatmaps.dtype) == (torch.float32, torch.float32)
    assert out.heatmaps.shape == (3, 2, 24, 40)
    assert out.heatmaps.isfinite().all()


def test_words_split_otherwise_are_refused(make_config):
    with pytest.raises(ValueError, match="the model's prompts were split at ' '"):
        make_config(word_separators=" ")


def test_labels_of_another_range_are_refused(make_config, tmp_path):
    make_config().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["label_range"] == [0.0, 1.0]
    assert RahfConfig.from_pretrained(tmp_path).label_range == [0.0, 1.0]
    with pytest.raises(ValueError, match=r"labels lay in \[1, 5\]; here it is \[0.0, 1.0\]"):
        make_config(label_range=[1, 5])


def test_a_part_can_have_its_own_attention(make_config, tmp_path, monkeypatch):
    RahfModel(make_config()).save_pretrained(tmp_path)
    model = RahfModel.from_pretrained(tmp_path, attn_implementation={"vision_config": "eager", "text_config": "sdpa"})
    assert (model.vision.config._attn_implementation, model.encoder.config._attn_implementation) == ("eager", "sdpa")

    asked = []
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **settings: asked.append(settings) or (model, {
        "missing_keys": [], "mismatched_keys": []}))  # fmt: skip
    RahfModel.from_pretrained(tmp_path, attn_implementation="flash_attention_2")
    RahfModel.from_pretrained(tmp_path, attn_implementation="eager")
    assert [settings["attn_implementation"] for settings in asked] == [
        {"vision_config": "flash_attention_2", "text_config": "sdpa"}, "eager",
    ]  # fmt: skip
