"""A finer predictor, pretrained on lessons: pictures whose flaws are known, since they were planted.

It sees pictures at twice their size, so that its encoder's first stage has a feature for every second pixel where the
smaller one's has one for every fourth; and all heads but those of aesthetics and overall, which nothing planted tells
of, learn beforehand what they are to say, from rendered pictures alone: no rater and no judge is asked. Scores that no
rater gave are made of what was planted (`planted_scores`).
"""

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from reward import losses
from reward.data import encode_prompts, preprocess
from reward.feedback import SCORES
from reward.model import RahfModel
from tinyworld.corruption import corrupt
from tinyworld.grammar import GROUND
from tinyworld.lessons import Lessons
from tinyworld.loop import fit, half_precision, keyed
from tinyworld.pretrain import Seer, make_predictor_tokenizer, new_predictor, noisy, place_loss, text_words
from tinyworld.scenes import SIZE

VISION = {"embedding_size": 24, "hidden_sizes": [24, 64, 128], "depths": [1, 1, 2], "layer_type": "basic"}
VISION_STEPS = 800
STEPS = 1200
_BATCH = 64
_CORRUPTED = 20  # of a batch, spoiled further by `tinyworld.corruption`
_MASKED = 16  # of a batch, whose captions' words are to be said from the picture
_HIDDEN = 0.7
_SOFTNESS = 0.5  # the most that a picture is mixed with its blurred self, as an autoencoder softens it


def pretrain_on_lessons(
    lessons: Lessons, work: Path, steps: int = STEPS, vision_steps: int = VISION_STEPS
) -> RahfModel:
    """Train a new, finer predictor, its encoders and all heads but those of aesthetics and overall.

    Args:
        work: where states are kept.
    """
    tokenizer = make_predictor_tokenizer()
    model = new_predictor(tokenizer, VISION, 2 * SIZE)
    model.vision.to(memory_format=torch.channels_last)  # faster on CPUs
    _pretrain_vision(model, lessons, work, vision_steps)
    told = np.array(lessons.words)
    true = np.flatnonzero((told != 1).all(1) & ~np.array(lessons.misaligned).any(1))  # captions that nothing belies

    def loss(step: int) -> torch.Tensor:
        source = keyed(5, step)
        masked = true[torch.randint(len(true), (_MASKED,), generator=source).numpy()]
        others = torch.randint(len(told), (_BATCH - _MASKED,), generator=source).numpy()
        rows = np.concatenate([masked, others])
        images, implausible = _show(lessons, rows, source)
        text = encode_prompts(tokenizer, [lessons.captions[row].split() for row in rows], model.config.max_text_length)
        ids, mask, positions = text["input_ids"], text["attention_mask"], text["word_positions"]
        hidden = (torch.rand(ids[:_MASKED].shape, generator=source) < _HIDDEN) & text_words(text)[:_MASKED]
        shown = torch.cat([ids[:_MASKED].masked_fill(hidden, tokenizer.mask_token_id), ids[_MASKED:]])
        with half_precision():
            seen, fused = model.fuse(preprocess(images, model.config), shown, mask)
            said = fused[:_MASKED][hidden] * fused.shape[-1] ** -0.5 @ model.encoder.embed_tokens.weight.T
            places = seen.transpose(1, 2).unflatten(2, model.config.grid)
            malformed = model.heatmap_heads["implausibility"](places)
            places, fused, mask = places[_MASKED:], fused[_MASKED:], mask[_MASKED:]
            astray = model.heatmap_heads["misalignment"](places)
            wrong = model.word_head(fused, positions[_MASKED:])
            scores = {name: model.score_heads[name](places, fused, mask) for name in SCORES[:2]}
        words = torch.from_numpy(told[others]).long()[:, : wrong.shape[1]]
        misaligned = torch.from_numpy(lessons.mask("misaligned", others))
        planted = planted_scores(images[_MASKED:], implausible[_MASKED:], misaligned, words)
        return (
            losses.caption_loss(said.float(), ids[:_MASKED][hidden])
            + losses.word_loss(wrong.float(), words)
            + place_loss(malformed.float(), implausible)
            + place_loss(astray.float(), misaligned)
            + 5 * sum(F.mse_loss(scores[name].float().sigmoid(), planted[name]) for name in scores)
        )

    return fit(model, loss, work / "lesson_pretraining.pt", steps=steps, rate=1e-3, averaging=0.998)


def planted_scores(
    images: torch.Tensor, implausible: torch.Tensor, misaligned: torch.Tensor, words: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Scores (B,) in (0, 1] of plausibility and alignment that fall with what was planted.

    exp(-3 x the spoiled share of what is drawn); exp(-belied words / 3 - the misplaced share of what is drawn).

    Args:
        images: (B, 3, 64, 64) in [0, 1].
        implausible, misaligned: (B, 64, 64) bool.
        words: (B, T), 1 where the word is belied.
    """
    ground = images.new_tensor(GROUND)[:, None, None] / 255
    drawn = ((images - ground).abs().amax(1) > 0.15).sum((1, 2)).clamp(min=30)
    share = {"implausible": implausible, "misaligned": misaligned}
    share = {name: (mask.sum((1, 2)) / drawn).clamp(max=1) for name, mask in share.items()}
    return {
        "plausibility": torch.exp(-3 * share["implausible"]),
        "alignment": torch.exp(-(words == 1).sum(1) / 3 - share["misaligned"]),
    }


def _pretrain_vision(model: RahfModel, lessons: Lessons, work: Path, steps: int) -> None:
    """Teach the vision encoder, in place, which kinds of things are drawn, and where they are spoiled."""
    seer, whole = Seer(model), _BATCH - _CORRUPTED

    def loss(step: int) -> torch.Tensor:
        source = keyed(6, step)
        rows = torch.randint(len(lessons.captions), (_BATCH,), generator=source).numpy()
        images, implausible = _show(lessons, rows, source)
        kinds = torch.from_numpy(np.array(lessons.kinds[rows[:whole]])).float()
        with half_precision():
            seen, where = seer(preprocess(images, model.config))
        kinds_loss = F.binary_cross_entropy_with_logits(seen[:whole], kinds, reduction="sum") / whole
        return kinds_loss + place_loss(where, implausible)

    trained = fit(seer, loss, work / "lesson_vision.pt", steps=steps, rate=1e-3, averaging=0.995)
    model.vision.load_state_dict(trained.vision.state_dict())


def _show(lessons: Lessons, rows: np.ndarray, source: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (B, 3, 64, 64) in [0, 1], softened and noisy, the last `_CORRUPTED` spoiled once more; and where each is
    malformed, (B, 64, 64) bool."""
    images = torch.from_numpy(np.array(lessons.pictures[rows])).permute(0, 3, 1, 2).float() / 255
    implausible = torch.from_numpy(lessons.mask("implausible", rows))
    spoiled, where = corrupt(images[-_CORRUPTED:], source)
    images = torch.cat([images[:-_CORRUPTED], spoiled])
    implausible = torch.cat([implausible[:-_CORRUPTED], implausible[-_CORRUPTED:] | where])
    softness = _SOFTNESS * torch.rand(len(images), 1, 1, 1, generator=source)
    soft = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return noisy(images + softness * (soft - images), source), implausible
