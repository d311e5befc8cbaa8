"""The tokens a RAHF needs beyond a prompt's: names of outputs, and the mark behind misaligned words."""

from transformers import AddedToken, PreTrainedTokenizerBase

from reward.keywords import SUFFIX
from reward.model import RahfModel
from reward.rahf_config import OUTPUT_NAMES

MARK = f"<{SUFFIX}>"
"""The token behind a misaligned word: the paper's `_0`, in a form that no prompt turns into (see `encode_prompts`)."""


def adopt_tokenizer(model: RahfModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give `tokenizer` and `model` the words that the model's config asks for; in place, nothing if they have them.

    Words that the tokenizer does not know are added to it and get an embedding. The mark is a special token of its own,
    so that marking a word never changes how words are cut into pieces.

    Raises:
        ValueError: words are to be written in sequence, and the tokenizer has no end mark; or it is not a fast one, and
            does not tell which piece belongs to which word.
    """
    config = model.config
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} does not tell which piece belongs to which word; use a fast one")
    if config.words == "sequence":
        if tokenizer.eos_token_id is None:
            raise ValueError("words='sequence' needs a tokenizer with an end mark (eos_token): it ends the last word")
        if MARK not in tokenizer.get_vocab():
            tokenizer.add_tokens(AddedToken(MARK, special=True, normalized=False))
        config.mark_id = tokenizer.convert_tokens_to_ids(MARK)
    if config.variant == "augmented_prompt":
        words = dict.fromkeys(word for name in OUTPUT_NAMES for word in name.split())
        tokenizer.add_tokens([word for word in words if tokenizer.unk_token_id in _ids(tokenizer, word)])
        config.output_ids = [_ids(tokenizer, name) for name in OUTPUT_NAMES]
    if len(tokenizer) > config.text_config.vocab_size:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text.split(), is_split_into_words=True, add_special_tokens=False).input_ids
