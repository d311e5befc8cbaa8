"""The captions' tokenizer and text encoder, the latter pretrained to say what a caption asks for.

As Stable Diffusion's text encoder comes pretrained from the web, so does this one, from the grammar: every state after
the caption's end must tell, by one linear map, colour, shape and role of each thing asked for.
"""

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tinyworld.grammar import COLOURS, SHAPES, WORDS, Request, draw_request, is_held_out
from tinyworld.loop import fit

LENGTH = 16
"""Tokens of a padded caption; the longest caption of the grammar has 12 words and two ends."""

WIDTH = 96
STEPS = 1000
_BATCH = 128
_ROLES = ("none", "left of", "above", "inside")


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer whose merges make every word of the grammar one token; writes it into `folder`."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe.train_from_iterator([list(WORDS)] * 100, trainers.BpeTrainer(vocab_size=1000, end_of_word_suffix="</w>"))
    model = json.loads(bpe.to_str())["model"]
    vocabulary = dict(sorted(model["vocab"].items(), key=lambda item: item[1]))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    tokenizer = CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=LENGTH
    )
    long = [word for word in WORDS if len(tokenizer(word).input_ids) != 3]
    assert not long, f"these words are more than one token: {long}"
    tokenizer.save_pretrained(folder)
    return tokenizer


def new_text_encoder(tokenizer: CLIPTokenizer, seed: int = 0) -> CLIPTextModel:
    """An untrained text encoder of 0.4 M parameters."""
    torch.manual_seed(seed)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            projection_dim=WIDTH,
        )
    )


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Captions -> (B, 16) token ids, padded as a Stable Diffusion pipeline pads them."""
    return tokenizer(captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids


def _meaning(request: Request) -> list[int]:
    """For up to three things colour, shape and role as class numbers; colour and shape 0 where there is no thing."""
    classes = []
    for index, noun in enumerate(request.nouns):
        role = _ROLES.index(request.relation) if request.relation and index == 0 else 0
        classes += [1 + list(COLOURS).index(noun.colour), 1 + SHAPES.index(noun.shape), role] * noun.count
    return classes + [0, 0, 0] * (3 - request.things)


class _Reader(nn.Module):
    """A text encoder with the linear map of its pretraining."""

    def __init__(self, encoder: CLIPTextModel):
        super().__init__()
        self.encoder = encoder
        self.sizes = [1 + len(COLOURS), 1 + len(SHAPES), len(_ROLES)] * 3
        self.read = nn.Linear(WIDTH, sum(self.sizes))


def pretrain_text_encoder(tokenizer: CLIPTokenizer, work: Path, steps: int = STEPS) -> CLIPTextModel:
    """Teach a new text encoder what captions ask for; held-out compositions are not among them."""
    reader = _Reader(new_text_encoder(tokenizer))

    def loss(step: int) -> torch.Tensor:
        rng = np.random.default_rng((2, step))
        requests: list[Request] = []
        while len(requests) < _BATCH:
            if not is_held_out(request := draw_request(rng)):
                requests.append(request)
        ids = tokenize(tokenizer, [str(request) for request in requests])
        states = reader.encoder(ids).last_hidden_state  # (B, 16, WIDTH)
        after = ids == tokenizer.eos_token_id  # the end of the text, and the padding, which has the same id
        meanings = torch.tensor([_meaning(request) for request in requests])[after.nonzero()[:, 0]]
        logits = reader.read(states[after]).split(reader.sizes, dim=-1)
        return sum(F.cross_entropy(logit, wanted) for logit, wanted in zip(logits, meanings.T, strict=True))

    return fit(reader, loss, work / "text_encoder.pt", steps=steps, rate=1e-3).encoder
