"""Models of others in a few kilobytes, with random weights: every part that the real ones have."""

import json
import re

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

WORDS = ["a", "red", "blue", "green", "circle", "square", "star", "left", "of", "two", "photo", "depicts"]
PROMPTS = ["a red circle", "two blue square left of a star", "a red circle"]


def make_clip_tokenizer(folder):
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *(f"{word}</w>" for word in WORDS), *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary += [f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz" if f"{letter}</w>" not in vocabulary]
    merges = ["#version: 0.2"]
    for word in WORDS:  # each is put together letter by letter, from the left
        for end in range(1, len(word)):
            left, right = word[:end], word[end] + ("</w>" if end == len(word) - 1 else "")
            merges.append(f"{left} {right}")
            vocabulary.append(left + right)
    merges, vocabulary = list(dict.fromkeys(merges)), list(dict.fromkeys(vocabulary))
    files = folder / "vocabulary"
    files.mkdir(parents=True)
    (files / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
    (files / "merges.txt").write_text("\n".join(merges) + "\n")
    return CLIPTokenizer(str(files / "vocab.json"), str(files / "merges.txt"), model_max_length=16)


def make_clip(tokenizer, length=16, **vision):
    """A CLIP whose cosines spread: larger weights than those it is initialised with. It reads `length` tokens."""
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": length, "eos_token_id": 1, "bos_token_id": 0,
        "pad_token_id": 1, "projection_dim": 8, "hidden_act": "gelu",
    }  # fmt: skip
    vision = {
        "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 3,
        "image_size": 32, "patch_size": 8, "projection_dim": 8, "hidden_act": "gelu", **vision,
    }  # fmt: skip
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    return spread(model)


def spread(model, size=0.4):
    """Weights at random, so that no part of a model is next to nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim:
                noise = torch.randn(weight.shape, generator=generator)
                is_gain = re.search(r"(norm|ln_).*weight$", name.lower())
                weight.copy_(1 + 0.1 * noise if is_gain else size * noise)
    return model


def make_image_processor(side=32):
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


@pytest.fixture(scope="session")
def clip_tokenizer(tmp_path_factory):
    return make_clip_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def clip(clip_tokenizer):
    return make_clip(clip_tokenizer)


@pytest.fixture(scope="session")
def clip_folder(clip, clip_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    clip.save_pretrained(folder)
    clip_tokenizer.save_pretrained(folder)
    make_image_processor().save_pretrained(folder)
    return folder


def make_images(*size):
    """Three pictures (3, 3, *size) in [0, 1] of broad patches, in steps of 8 bits, so that Pillow sees the same."""
    generator = torch.Generator().manual_seed(0)
    coarse = (torch.rand(3, 3, 5, 5, generator=generator) > torch.tensor([0.2, 0.5, 0.8])[:, None, None, None]).float()
    pictures = torch.nn.functional.interpolate(0.1 + 0.8 * coarse, size=size, mode="bilinear")
    return (pictures * 255).round() / 255


@pytest.fixture
def images():
    return make_images(40, 56)


@pytest.fixture
def square():
    """Of the size that the models see: nothing is resized, so nothing is rounded."""
    return make_images(32, 32)
