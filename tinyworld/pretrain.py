"""The predictor's backbones, pretrained on rendered scenes and their captions; no rater and no judge is asked.

As the paper's ViT and T5 come pretrained from the web, these learn from flawless pictures to read a scene:
masked captioning (most words hidden, say them from the picture), replaced-word detection (some words changed so that
the caption is false, say which; ELECTRA's task, arXiv 2003.10555, with the picture as the witness), and the same for
the picture: some places spoiled, say where. What is well formed is learned there, from pictures alone.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, ResNetConfig, T5Config

from reward import losses
from reward.data import encode_prompts, pad_rows, preprocess
from reward.model import RahfModel
from reward.rahf_config import RahfConfig
from reward.vision import tokens_of, width_of
from tinyworld.corruption import corrupt
from tinyworld.grammar import COLOURS, KINDS, RELATIONS, ROOMY, SHAPES, WORDS, Request, is_held_out, parse
from tinyworld.loop import fit, half_precision, keyed
from tinyworld.scenes import SIZE

VISION_STEPS = 2000
STEPS = 4000
_BATCH = 64
_SPOILED = 24  # of a batch
_HIDDEN = 0.7
_NOISE = 0.04  # on pictures in [0, 1]: generated pictures are never as clean as rendered ones


def make_predictor_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, in T5's manner: an end mark, no start mark."""
    specials = ["<pad>", "</s>", "<unk>", "<mask>"]
    vocabulary = {word: number for number, word in enumerate([*specials, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", mask_token="<mask>"
    )


VISION = {"embedding_size": 32, "hidden_sizes": [48, 128], "depths": [2, 2], "layer_type": "basic"}
"""A ResNet of 8x8 features on 64x64: on pictures this few and small, convolutions learn outlines much sooner than a ViT
of patch 8 does."""


def new_predictor(
    tokenizer: PreTrainedTokenizerFast, vision: dict = VISION, image_size: int = SIZE, seed: int = 0
) -> RahfModel:
    """An untrained RAHF of about 1.7 M parameters: a ResNet as `vision` says, a T5 encoder of 3 layers."""
    torch.manual_seed(seed)
    text = T5Config(
        vocab_size=len(tokenizer),
        d_model=128,
        d_kv=32,
        d_ff=384,
        num_layers=3,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    configs = {"vision_config": ResNetConfig(**vision).to_dict(), "text_config": text.to_dict()}
    return RahfModel(RahfConfig(**configs, image_size=image_size, heatmap_size=SIZE, max_text_length=16))


def falsify(request: Request, rng: np.random.Generator) -> tuple[Request, list[int]]:
    """A caption that is false of the request's picture, and for each of its words whether it was changed. It asks for
    no held-out composition: no training sees the words of one.

    One to two changes of colour, shape, count or relation; words whose form only follows (plurals) are not marked.
    """
    while True:
        nouns, relation, changed = list(request.nouns), request.relation, []
        for _ in range(int(rng.integers(1, 3))):
            index = int(rng.integers(len(nouns)))
            match rng.choice(["colour", "shape", "count", "relation"], p=[0.35, 0.35, 0.1, 0.2]):
                case "colour":
                    others = [colour for colour in COLOURS if colour != request.nouns[index].colour]
                    nouns[index] = replace(nouns[index], colour=str(rng.choice(others)))
                    changed.append((index, 1))
                case "shape":
                    others = [shape for shape in SHAPES if shape != request.nouns[index].shape]
                    nouns[index] = replace(nouns[index], shape=str(rng.choice(others)))
                    changed.append((index, 2))
                case "count" if relation is None:
                    others = [count for count in (1, 2, 3) if count != request.nouns[index].count]
                    nouns[index] = replace(nouns[index], count=int(rng.choice(others)))
                    changed.append((index, 0))
                case "relation" if relation is not None:
                    relation = str(rng.choice([other for other in RELATIONS if other != request.relation]))
        if not changed and relation == request.relation:
            continue
        if relation == "inside" and nouns[1].shape not in ROOMY:
            continue
        try:
            false = parse(str(Request(tuple(nouns), relation)))
        except ValueError:
            continue  # the changes made it no caption
        if is_held_out(false):
            continue
        if {noun.kind for noun in false.nouns} != {noun.kind for noun in request.nouns} or not _same(false, request):
            labels = [0] * len(str(false).split())
            for index, offset in changed:
                labels[false.nouns[index].first_word + offset] = 1
            if relation != request.relation:
                for word in false.relation_words:
                    labels[word] = 1
            return false, labels


def _same(one: Request, other: Request) -> bool:
    """Whether two requests describe the same pictures: the same counted kinds, in the same relation."""
    kinds = [sorted((noun.kind, noun.count) for noun in request.nouns) for request in (one, other)]
    return kinds[0] == kinds[1] and one.relation == other.relation


class Seer(nn.Module):
    """A predictor's vision encoder that says which kinds of things ("red circle") it sees, and where the picture is
    spoiled."""

    def __init__(self, model: RahfModel):
        super().__init__()
        self.vision, self.side = model.vision, model.config.grid[0]
        width, self.pixels = width_of(model.config.vision_config), SIZE // self.side
        self.kinds = nn.Linear(width, len(KINDS))
        self.spoiled = nn.Linear(width, self.pixels**2)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 3, S, S) -> logits (B, K): the largest over places, softly, so that a place may know its own thing; and
        logits (B, 64, 64)."""
        places = tokens_of(self.vision(pixel_values=pixels).last_hidden_state, self.side**2)
        spoiled = self.spoiled(places).transpose(1, 2).unflatten(2, (self.side, self.side))  # (B, pixels ** 2, ., .)
        return self.kinds(places).float().logsumexp(dim=1), F.pixel_shuffle(spoiled, self.pixels)[:, 0].float()


def pretrain_vision(model: RahfModel, pictures: np.ndarray, captions: list[str], work: Path, steps: int) -> None:
    """Teach a predictor's vision encoder, in place, which kinds of things are in a picture, and what spoils it."""
    kinds = torch.zeros(len(captions), len(KINDS))
    for row, caption in enumerate(captions):
        kinds[row, [KINDS.index(noun.kind) for noun in parse(caption).nouns]] = 1
    seer, whole = Seer(model), _BATCH - _SPOILED

    def loss(step: int) -> torch.Tensor:
        source = keyed(6, step)
        rows = torch.randint(len(pictures), (_BATCH,), generator=source)
        images, spoiled = _partly_spoiled(pictures[rows.numpy()], source)
        with half_precision():
            seen, where = seer(preprocess(images, model.config))
        kinds_loss = F.binary_cross_entropy_with_logits(seen[:whole], kinds[rows[:whole]], reduction="sum") / whole
        return kinds_loss + place_loss(where[whole:], spoiled)

    trained = fit(seer, loss, work / "vision_pretraining.pt", steps=steps, rate=1e-3, averaging=0.995)
    model.vision.load_state_dict(trained.vision.state_dict())


def _partly_spoiled(pictures: np.ndarray, source: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, 64, 64, 3) uint8 -> noisy (B, 3, 64, 64) in [0, 1], the last `_SPOILED` of them spoiled, and where."""
    images = torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 255
    spoiled, where = corrupt(images[-_SPOILED:], source)
    return noisy(torch.cat([images[:-_SPOILED], spoiled]), source), where


def place_loss(logits: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    return 3 * F.binary_cross_entropy_with_logits(logits, where.float())  # a few pixels in a hundred are spoiled


def noisy(images: torch.Tensor, source: torch.Generator) -> torch.Tensor:
    """(B, 3, 64, 64) in [0, 1], each with its own amount of noise."""
    amount = _NOISE * torch.rand(len(images), 1, 1, 1, generator=source)
    return (images + amount * torch.randn(images.shape, generator=source)).clamp(0, 1)


def pretrain_predictor(
    pictures: np.ndarray, captions: list[str], work: Path, steps: int = STEPS, vision_steps: int = VISION_STEPS
) -> RahfModel:
    """Train a new predictor's backbones, and the heads of words and of implausible places.

    Args:
        pictures: (N, 64, 64, 3) uint8, flawless, with their captions.
        work: where states are kept.
    """
    tokenizer = make_predictor_tokenizer()
    model = new_predictor(tokenizer)
    pretrain_vision(model, pictures, captions, work, vision_steps)
    whole = _BATCH - _SPOILED
    half = whole // 2
    heatmap_head = model.heatmap_heads["implausibility"]

    def loss(step: int) -> torch.Tensor:
        source, rng = keyed(5, step), np.random.default_rng((5, step))
        rows = np.sort(rng.choice(len(pictures), _BATCH, replace=False))
        rng.shuffle(rows)
        images, spoiled = _partly_spoiled(pictures[rows], source)
        words = [captions[row].split() for row in rows[:half]]
        labels: list[list[int]] = []
        for row in rows[half:whole]:
            request = parse(captions[row])
            false, wrong = falsify(request, rng) if rng.random() < 0.8 else (request, [0] * len(captions[row].split()))
            words.append(str(false).split())
            labels.append(wrong)
        words += [captions[row].split() for row in rows[whole:]]
        text = encode_prompts(tokenizer, words, model.config.max_text_length)
        ids, mask = text["input_ids"], text["attention_mask"]
        hidden = (torch.rand(ids[:half].shape, generator=source) < _HIDDEN) & (text_words(text)[:half])
        masked = torch.cat([ids[:half].masked_fill(hidden, tokenizer.mask_token_id), ids[half:]])
        with half_precision():
            seen, fused = model.fuse(preprocess(images, model.config), masked, mask)
            said = fused[:half][hidden] * fused.shape[-1] ** -0.5 @ model.encoder.embed_tokens.weight.T
            wrong = model.word_head(fused[half:whole], text["word_positions"][half:whole])
            where = heatmap_head(seen[whole:].transpose(1, 2).unflatten(2, model.config.grid))
        targets = pad_rows([row + [losses.IGNORE] * (wrong.shape[1] - len(row)) for row in labels], 0)
        return (
            losses.caption_loss(said.float(), ids[:half][hidden])
            + losses.word_loss(wrong.float(), targets)
            + place_loss(where.float(), spoiled)
        )

    return fit(model, loss, work / "predictor_pretraining.pt", steps=steps, rate=1e-3, averaging=0.998)


def text_words(text: dict[str, torch.Tensor]) -> torch.Tensor:
    """(B, L) bool: the positions that hold a word, not an end mark or padding."""
    lengths = text["attention_mask"].sum(1, keepdim=True) - 1
    return torch.arange(text["input_ids"].shape[1]) < lengths
