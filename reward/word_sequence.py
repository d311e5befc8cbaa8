"""Misaligned words as RAHF's decoder writes them: the prompt again, with a mark behind every misaligned word.

The paper's decoder (arXiv 2312.10240, section 4.1) writes text freely, and may write something else than the prompt.
Here the prompt's own words are given, and all that is left to write is, behind each word, the mark or what follows
without it. So a word has a probability, the output always fits the prompt, and reading is exact and parallel
(`SequenceHead.read`).

Shapes: B prompts, L positions of the longest (pieces of words, and an end), T words, D the decoder's width, V its
vocabulary, L' = L + T.
"""

from dataclasses import dataclass
from itertools import count

import torch
import torch.nn.functional as F
from torch import nn

from reward.t5_family import new_stack


@dataclass(frozen=True)
class MarkedPrompts:
    """Prompts written again, with a mark behind some of their words.

    Attributes:
        ids: (B, L') int64, the pieces and marks; padding behind the end.
        mask: (B, L') bool, False at padding.
        deciding: (B, T) int64, where in L' each word has its mark, or else what follows; 0 for words without pieces.
        following: (B, T) int64, the id of what follows each word if it has no mark.
        seen: (B, T) bool, False for words without pieces, which cannot be marked.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    deciding: torch.Tensor
    following: torch.Tensor
    seen: torch.Tensor


def write_marks(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    word_positions: torch.Tensor,
    marked: torch.Tensor,
    mark: int,
    padding: int = 0,
) -> MarkedPrompts:
    """Prompts (B, L) with id `mark` behind every word that `marked` (B, T) names; pure.

    Args:
        input_ids, attention_mask, word_positions: as `reward.data.encode_prompts` makes them, each prompt with an end.
        marked: (B, T) bool; what it says of words without pieces does not count.
    """
    length = input_ids.shape[1]
    places = torch.arange(length, device=input_ids.device)
    seen = word_positions >= 0
    marked = marked & seen
    # A word ends where the next one begins, or else where the prompt does.
    last = attention_mask.sum(1, keepdim=True) - 1  # (B, 1)
    later = word_positions[:, None, :] > word_positions[:, :, None]  # (B, T, T): word k begins behind word j
    ends = torch.where(later, word_positions[:, None, :], last[:, :, None]).amin(2)  # (B, T)
    # What stands at or behind a marked word's end moves on by one for it.
    moved = places + (marked[:, :, None] & (ends[:, :, None] <= places)).sum(1)  # (B, L)
    deciding = ends + (marked[:, None, :] & (ends[:, None, :] < ends[:, :, None])).sum(2)  # (B, T)

    size = (len(input_ids), length + word_positions.shape[1] + 1)  # a last column takes what is not written
    present = attention_mask.bool()
    away = size[1] - 1
    ids = input_ids.new_full(size, padding).scatter(1, torch.where(present, moved, away), input_ids)
    ids = ids.scatter(1, torch.where(marked, deciding, away), mark)[:, :-1]
    written = last + 1 + marked.sum(1, keepdim=True)  # (B, 1)
    mask = torch.arange(away, device=ids.device) < written
    return MarkedPrompts(
        ids=ids.masked_fill(~mask, padding),
        mask=mask,
        deciding=deciding.masked_fill(~seen, 0),
        following=input_ids.gather(1, ends.masked_fill(~seen, 0)),
        seen=seen,
    )


class SequenceHead(nn.Module):
    """A decoder that writes the marked prompt, reading the fused text tokens."""

    def __init__(self, config):
        """`config` is that of the text model."""
        super().__init__()
        self.decoder = new_stack(config, decoder=True)
        self.decoder.embed_tokens = None  # the words' embeddings are the encoder's
        self.write = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.start = getattr(config, "decoder_start_token_id", None) or config.pad_token_id or 0

    def loss(self, embed: nn.Embedding, text, attention_mask, prompts: MarkedPrompts) -> torch.Tensor:
        """Cross-entropy of the marked prompt under teacher forcing: the mean over a prompt's positions, then prompts.

        Args:
            embed: the words' embeddings.
            text, attention_mask: fused text tokens (B, L, D) and their mask (B, L).
        """
        logits = self.write(self._states(embed, text, attention_mask, prompts)).float()  # (B, L', V)
        loss = F.cross_entropy(logits.transpose(1, 2), prompts.ids, reduction="none")
        return ((loss * prompts.mask).sum(1) / prompts.mask.sum(1)).mean()

    def logits(self, embed: nn.Embedding, text, attention_mask, prompts: MarkedPrompts, mark: int) -> torch.Tensor:
        """(B, T): log of p(mark) / p(what follows) behind each word, given the marks of the words before it."""
        states = self._states(embed, text, attention_mask, prompts)
        states = states.gather(1, prompts.deciding[:, :, None].expand(-1, -1, states.shape[-1]))  # (B, T, D)
        chances = self.write(states).float()  # (B, T, V)
        return chances[..., mark] - chances.gather(2, prompts.following[..., None])[..., 0]

    def read(
        self,
        embed: nn.Embedding,
        text: torch.Tensor,
        attention_mask: torch.Tensor,
        input_ids: torch.Tensor,
        word_positions: torch.Tensor,
        mark: int,
    ) -> torch.Tensor:
        """(B, T) logits of the marks that greedy decoding writes; differentiable.

        All words are decided at once, given marks for the words before them, until these are the marks decided. Since
        a mark depends on those before it only, the n-th round has at least the first n right, and the fixed point is
        what deciding one word after another gives: at most T + 1 rounds, in practice as many as marks lean on others.
        There it ends, too, where kernels' rounding would flip a mark for ever.
        """
        prompts = (input_ids, attention_mask, word_positions)
        marked = torch.zeros_like(word_positions, dtype=torch.bool)
        with torch.no_grad():
            for turn in count(1):
                logits = self.logits(embed, text, attention_mask, write_marks(*prompts, marked, mark), mark)
                decided = (logits > 0) & (word_positions >= 0)
                mine = torch.equal(decided, marked) or turn > word_positions.shape[1]
                if self._settled(mine, text.device):
                    break
                marked = decided
        if torch.is_grad_enabled() and text.requires_grad:
            return self.logits(embed, text, attention_mask, write_marks(*prompts, marked, mark), mark)
        return logits

    def _settled(self, mine: bool, device: torch.device) -> bool:
        """Whether no rank needs another round: with sharded weights (ZeRO-3) all ranks must make the same calls."""
        if not hasattr(self.write.weight, "ds_id"):
            return mine
        unsettled = torch.tensor(float(not mine), device=device)
        torch.distributed.all_reduce(unsettled, torch.distributed.ReduceOp.MAX)
        return not unsettled.item()

    def _states(self, embed: nn.Embedding, text, attention_mask, prompts: MarkedPrompts) -> torch.Tensor:
        """(B, L', D): what the decoder knows before it writes each position."""
        before = F.pad(prompts.ids[:, :-1], (1, 0), value=self.start)
        return self.decoder(
            inputs_embeds=embed(before),
            attention_mask=F.pad(prompts.mask[:, :-1], (1, 0), value=True).long(),
            encoder_hidden_states=text,
            encoder_attention_mask=attention_mask,
        ).last_hidden_state
