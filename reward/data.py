"""From pictures, prompts and ratings to the tensors that `RahfModel` takes.

One preprocessing, `preprocess` and `encode_prompts`, serves training, prediction and reward. It is torch all through:
gradients flow from the prediction back into the pictures, and no image library of another version changes a bit.

Shapes: B examples, H x W pixels of a picture, S the side the model sees, h the side of a heatmap, L positions of the
longest prompt in the batch, T its words.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict, load_from_disk
from PIL import Image
from transformers import PreTrainedTokenizerBase

from reward.augmentation import Augmentation
from reward.checks import read_row, read_rows
from reward.feedback import HEATMAPS, SCORES
from reward.losses import IGNORE
from reward.pictures import to_rgb
from reward.rahf_config import RahfConfig

_AS_WORDS = {"is_split_into_words": True, "add_special_tokens": False, "split_special_tokens": True}
"""How words are tokenised: a prompt that holds the text of a special token does not get that token."""


def preprocess(images: torch.Tensor, config: RahfConfig) -> torch.Tensor:
    """Pictures (B, 3, H, W) in [0, 1] -> what the vision encoder sees, (B, 3, *config.input_size); differentiable.

    The picture is stretched to that size, as RichHF-18K's maps are to a square, by an antialiased bilinear filter
    (Pillow's BILINEAR), then normalised.
    """
    images = resize(images, config.input_size)
    mean, std = (images.new_tensor(list(values))[:, None, None] for values in (config.image_mean, config.image_std))
    return (images - mean) / std


def resize(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(B, C, H, W) -> (B, C, *size), antialiased; the same tensor if it has that size already."""
    if images.shape[-2:] == size:
        return images
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)


def resize_maps(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Heatmaps (B, M, h', w') -> (B, M, *size): by area when shrinking, so that means are kept, else bilinearly."""
    if maps.shape[-2] >= size[0] and maps.shape[-1] >= size[1]:
        return F.interpolate(maps, size=size, mode="area")
    return resize(maps, size)


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[Sequence[str]], max_length: int
) -> dict[str, torch.Tensor]:
    """Prompts, each given as its tokens (words), -> the model's text inputs.

    Every word is tokenised as if a space stood before it, an end mark follows the last one, and words that do not fit
    into `max_length` positions as a whole are cut: a piece of a word would be judged as a word.

    Returns:
        input_ids, attention_mask: (B, L) int64; padding is masked, whatever id it has.
        word_positions: (B, T) int64, where in L each word begins; -1 for padding, and for words that were cut off or
            that the tokenizer drops entirely.
    """
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows, positions = [], []
    for words in tokens:
        encoded = tokenizer(list(words), **_AS_WORDS) if words else None
        of_words = encoded.word_ids() if words else []  # rising: the word that each piece is of
        most = max_length - len(ends)
        if len(of_words) > most:
            of_words = of_words[: of_words.index(of_words[most])]
        ids = encoded.input_ids[: len(of_words)] if words else []
        begins = [-1] * len(words)
        for place, word in reversed(list(enumerate(of_words))):
            begins[word] = place
        rows.append(ids + ends)
        positions.append(begins)
    length = max(max(map(len, rows), default=0), 1)
    pad = tokenizer.pad_token_id or 0
    return {
        "input_ids": torch.tensor([row + [pad] * (length - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),
        "word_positions": pad_rows(positions, -1),
    }


def unread_words(tokens: Sequence[Sequence[str]], word_positions: torch.Tensor) -> list[list[str]]:
    """For each of B prompts, the words that the model does not see; `word_positions` (B, T) of `encode_prompts`."""
    return [
        [word for word, place in zip(words, row, strict=False) if place < 0]
        for words, row in zip(tokens, word_positions.tolist(), strict=True)
    ]


def describe_unread(unread: Sequence[Sequence[str]], max_length: int, most: int = 100) -> str | None:
    """What to tell the user about `unread_words` of some prompts, the first `most` of them by name; None if none is."""
    lost = [word for words in unread for word in words]
    if not lost:
        return None
    named = ", ".join(map(repr, lost[:most])) + (f" and {len(lost) - most} more" if len(lost) > most else "")
    prompts = sum(bool(words) for words in unread)
    return (
        f"{len(lost)} words of {prompts} prompts are not read: {named}. They lie behind the {max_length} pieces of a "
        "prompt that the model takes (max_text_length), or its tokenizer drops them"
    )


def pad_rows(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """Rows of differing lengths -> (B, T) int64 with T >= 1, filled up with `value`."""
    length = max(max(map(len, rows), default=0), 1)
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows], dtype=torch.int64)


def to_tensor(image: Image.Image, mode: str = "RGB") -> torch.Tensor:
    """A PIL image -> uint8 (C, H, W); `mode` "RGB" gives three channels, "L" one."""
    array = np.array(to_rgb(image) if mode == "RGB" else image.convert(mode))  # a copy: torch wants a writable array
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())


class FeedbackDataset(torch.utils.data.Dataset):
    """A split that `reward.richhf` wrote, as examples of tensors.

    Args:
        split: columns image, tokens, keyword_labels, the four scores, implausibility_map, misalignment_map, uid.
        config: of the model; only `map_size` is used.
        augmentation: what is changed at random, for training; None gives the pictures as they are.
        in_memory: decode everything once, with maps already at the heatmaps' size. For small pictures: decoding 512x512
            maps takes longer than a step of a small model.

    An example is a dict: image (3, H, W) and maps (2, h', w'), float32 in [0, 1]; scores (4,) float32 in [0, 1]; tokens
    and labels, lists of T; uid.
    """

    def __init__(
        self,
        split: Dataset,
        config: RahfConfig,
        augmentation: Augmentation | None = None,
        in_memory: bool = False,
    ):
        wanted = {"image", "uid", "tokens", "keyword_labels", *SCORES, *(f"{name}_map" for name in HEATMAPS)}
        if missing := sorted(wanted - set(split.column_names)):
            raise ValueError(f"the data lack the columns {missing}; `python -m reward.richhf` writes them all")
        self.split, self.size, self.augmentation, self.epoch = split, config.map_size, augmentation, 0
        self.examples = self._decode_all() if in_memory else None

    def __len__(self) -> int:
        return len(self.split)

    def set_epoch(self, epoch: int) -> None:
        """Called at the start of each epoch: its augmentations are others than the last one's."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict:
        example = self.examples[index] if self.examples is not None else self._decode(read_row(self.split, index))
        image, maps = example["image"].float() / 255, example["maps"]
        if self.augmentation is not None:
            key = f"{example['uid']} {self.epoch}"
            image, maps = self.augmentation(image, maps, key, self.size, example["tokens"])
        return {**example, "image": image, "maps": maps}

    def _decode_all(self) -> list[dict]:
        """Every example with maps of the heatmaps' size.

        The maps come in a pass of their own, into one block: among their large temporaries the small tensors that stay
        would tear the heap (3 MB an example instead of 50 KB).
        """
        columns = [f"{name}_map" for name in HEATMAPS]
        examples = [_decode_rest(row) for row in read_rows(self.split.remove_columns(columns))]
        maps = torch.empty(len(examples), len(columns), *self.size)
        for index, row in enumerate(read_rows(self.split.select_columns(["uid", *columns]))):
            maps[index] = resize_maps(_decode_maps(row)[None], self.size)[0]
        return [{**example, "maps": maps[index]} for index, example in enumerate(examples)]

    def _decode(self, row: Mapping) -> dict:
        return {**_decode_rest(row), "maps": _decode_maps(row)}


def _decode_maps(row: Mapping) -> torch.Tensor:
    return torch.cat([to_tensor(row[f"{name}_map"], "L") for name in HEATMAPS]).float() / 255


def _decode_rest(row: Mapping) -> dict:
    return {
        "uid": row["uid"],
        "image": to_tensor(row["image"]),
        "scores": torch.tensor([row[name] for name in SCORES], dtype=torch.float32),
        "tokens": list(row["tokens"]),
        "labels": list(row["keyword_labels"]),
    }


class FeedbackCollator:
    """Examples of `FeedbackDataset` -> the keyword arguments of `RahfModel.forward`, targets included."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: RahfConfig):
        self.tokenizer, self.config = tokenizer, config

    def __call__(self, examples: Sequence[Mapping]) -> dict[str, torch.Tensor]:
        config = self.config
        text = encode_prompts(self.tokenizer, [example["tokens"] for example in examples], config.max_text_length)
        labels = pad_rows([example["labels"] for example in examples], IGNORE)
        return {
            "pixel_values": torch.cat([preprocess(example["image"][None], config) for example in examples]),
            **text,
            "scores": torch.stack([example["scores"] for example in examples]),
            "heatmaps": torch.cat([resize_maps(example["maps"][None], config.map_size) for example in examples]),
            "word_labels": labels.masked_fill(text["word_positions"] < 0, IGNORE),
        }


def load_data(folder: str | Path) -> DatasetDict:
    """The splits that `reward.richhf` wrote.

    Raises:
        ValueError: the folder is not there, or holds something else, or a split that was saved without a row.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"there is no data folder {folder}; `python -m reward.richhf --out {folder} ...` makes it")
    try:
        data = load_from_disk(str(folder))
    except IndexError as error:  # `datasets` saves a split without a row, and does not load it
        raise ValueError(f"{folder} has a split without a picture; build the data anew") from error
    except FileNotFoundError as error:
        raise ValueError(f"{folder} holds no data set; `python -m reward.richhf --out FOLDER ...` makes one") from error
    if not isinstance(data, DatasetDict):
        raise ValueError(f"{folder} holds a single data set; splits train, dev and test are needed")
    return data
