"""A trained predictor at work: pictures and prompts -> rich feedback.

    python -m reward.predict --model DIR --images a.png b.png --prompts "a cat" "a dog" --out DIR

writes `feedback.jsonl` (one line a picture: scores, tokens, probabilities, with null for a word that the model does not
judge, the words struck out, names of its files), the two heatmaps of each picture as PNG, and an overlay: picture,
heatmaps over it, prompt with its misaligned words struck out. `--prompts` takes one prompt a picture, or one text file
with a prompt a line.

Shapes: B pictures of H x W pixels, T the words of a prompt.
"""

import json
import logging
import os
import shutil
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from reward import draw, keywords
from reward.arguments import main_guard, parse_arguments, read_prompt_file
from reward.checks import check_new_folder, check_pictures, check_weights, model_type
from reward.data import describe_unread, encode_prompts, preprocess, to_tensor, unread_words
from reward.feedback import HEATMAPS, SCORES, RichFeedback, check_question
from reward.model import RahfModel
from reward.pictures import decode

logger = logging.getLogger(__name__)

_LONGEST_STEM = 150  # bytes; a file's name may have 255


class RichFeedbackPredictor:
    """A frozen `RahfModel` with its tokenizer: images and prompts in, `RichFeedback` out.

    Gradients flow from the feedback into `images` if they require them; the model's own weights never get any.
    """

    def __init__(self, model: RahfModel, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> "RichFeedbackPredictor":
        """Load what `reward.train` saved in `folder`: weights, settings of the preprocessing, tokenizer.

        `dtype` is what the model computes in, whatever the weights were stored in; feedback is float32 always.

        Raises:
            ValueError: the folder does not exist or is not a RAHF checkpoint.
        """
        check_model_folder(folder)
        tokenizer = load_tokenizer(folder)
        model = RahfModel.from_pretrained(folder, dtype=dtype, ignore_mismatched_sizes=True)
        return cls(model, tokenizer).to(device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Save model and tokenizer, as `from_pretrained` loads them; no file in `folder` is ever half written."""
        save_whole(self.model, self.tokenizer, Path(folder))

    def to(self, device: str | torch.device) -> "RichFeedbackPredictor":
        self.model.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def word_threshold(self) -> float:
        """A word counts as misaligned if its probability is above this; chosen on dev when the model was trained."""
        return self.model.config.word_threshold

    def __call__(
        self,
        images: torch.Tensor,
        prompts: Sequence[str],
        batch_size: int = 64,
        heatmap_size: int | tuple[int, int] | None = None,
    ) -> RichFeedback:
        """Rich feedback of B images, on the predictor's device.

        Args:
            images: (B, 3, H, W) float in [0, 1], any size and device.
            prompts: B prompts, as the user wrote them.
            batch_size: how many images the model sees at once; only memory and speed depend on it.
            heatmap_size: side of the heatmaps, or their (height, width); None makes them as large as the images.

        Raises:
            ValueError: shapes or counts that do not fit.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        check_question(images, prompts)
        tokens = [keywords.tokenize(prompt) for prompt in prompts]
        with torch.set_grad_enabled(torch.is_grad_enabled() and images.requires_grad):
            parts = [
                self._predict(images[start : start + batch_size], tokens[start : start + batch_size], heatmap_size)
                for start in range(0, len(prompts), batch_size)
            ]
        scores, heatmaps = (torch.cat([part[index] for part in parts]) for index in (0, 1))
        return RichFeedback(
            scores={name: scores[:, index] for index, name in enumerate(SCORES)},
            heatmaps={name: heatmaps[:, index] for index, name in enumerate(HEATMAPS)},
            tokens=tokens,
            misaligned=[words for part in parts for words in part[2]],
        )

    @torch.no_grad()
    def features(self, images: torch.Tensor, batch_size: int = 64) -> torch.Tensor:
        """What the vision encoder sees in images (B, 3, H, W) in [0, 1]: the mean over places of its features, (B, D)
        float32, on the predictor's device."""
        parts = [
            self.model.patch_features(self._pixels(images[start : start + batch_size])).float().mean(dim=1)
            for start in range(0, len(images), batch_size)
        ]
        return torch.cat(parts)

    def with_features(
        self,
        images: torch.Tensor,
        prompts: Sequence[str],
        batch_size: int = 64,
        heatmap_size: int | tuple[int, int] | None = None,
    ) -> tuple[RichFeedback, torch.Tensor]:
        """What a call says and what `features` says, (B, D), from one pass of the vision encoder."""
        seen: list[torch.Tensor] = []

        def keep(module: torch.nn.Module, patches: tuple[torch.Tensor]) -> None:
            seen.append(patches[0].detach().float().mean(dim=1))

        hook = self.model.project.register_forward_pre_hook(keep)
        try:
            feedback = self(images, prompts, batch_size, heatmap_size)
        finally:
            hook.remove()
        return feedback, torch.cat(seen)

    def judges(self, prompts: Sequence[str]) -> list[list[bool]]:
        """Which words of prompts it judges: none behind its reach, or that its tokenizer drops; in a `RichFeedback`
        these count as aligned, with a probability of 0."""
        tokens = [keywords.tokenize(prompt) for prompt in prompts]
        places = encode_prompts(self.tokenizer, tokens, self.model.config.max_text_length)["word_positions"].tolist()
        has_words = self.model.word_head is not None
        return [
            [has_words and place >= 0 for _, place in zip(words, row, strict=False)]
            for words, row in zip(tokens, places, strict=True)
        ]

    def _pixels(self, images: torch.Tensor) -> torch.Tensor:
        return preprocess(images.to(self.device, torch.float32), self.model.config).to(self.model.dtype)

    def _predict(self, images: torch.Tensor, tokens: list[list[str]], heatmap_size: int | tuple[int, int] | None):
        """Scores (B, 4), heatmaps (B, 2, H, W) or of side `heatmap_size`, words' probabilities, B tensors (T,)."""
        config, device = self.model.config, self.device
        text = encode_prompts(self.tokenizer, tokens, config.max_text_length)
        text = {name: value.to(device) for name, value in text.items()}
        out = self.model(self._pixels(images), **text)
        size = (heatmap_size,) * 2 if isinstance(heatmap_size, int) else heatmap_size or images.shape[-2:]
        heatmaps = out.heatmaps.float()
        if heatmaps.shape[-2:] != size:
            heatmaps = F.interpolate(heatmaps, size=size, mode="bilinear", align_corners=False, antialias=True)
        if message := describe_unread(unread_words(tokens, text["word_positions"]), config.max_text_length):
            warnings.warn(f"{message}; they count as aligned", stacklevel=3)
        if out.word_logits is None:
            return out.scores.float(), heatmaps, [torch.zeros(len(words), device=device) for words in tokens]
        probability = out.word_logits.float().sigmoid() * (text["word_positions"] >= 0)
        return out.scores.float(), heatmaps, [row[: len(words)] for row, words in zip(probability, tokens, strict=True)]


def check_model_folder(folder: str | Path) -> None:
    """Raise a `ValueError` that tells the user what is wrong if `folder` is not a RAHF checkpoint."""
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"there is no model folder {path}; give the output folder of `python -m reward.train`")
    if model_type(path) != "rahf":
        raise ValueError(f"{path} is not a RAHF checkpoint (its config.json must say model_type rahf)")
    if not (path / "tokenizer_config.json").is_file():
        raise ValueError(f"{path} has no tokenizer; save it there with `tokenizer.save_pretrained`")
    check_weights(path)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a RAHF checkpoint.

    Raises:
        ValueError: its files are not there or damaged, or hold no vocabulary: transformers makes an empty one of that.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises bare ones
        raise ValueError(f"the tokenizer of {folder} cannot be loaded; fetch or save it again ({error})") from error
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise ValueError(f"the tokenizer of {folder} has no vocabulary (tokenizer.json); fetch or save it again")
    return tokenizer


SAVED = (
    *("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *("tokenizer_config.json", "tokenizer.*", "special_tokens_map.json", "added_tokens.json", "spiece.model"),
    "chat_template.jinja",
)
"""Patterns of the names of all files that `save_whole` may write, with any tokenizer of the T5 family; `config.json`,
without which a folder is no model, first."""


def save_whole(
    model: RahfModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Save model and tokenizer so that no file in `folder` is ever half written; `config.json` comes last.

    `weights`, where the model's own are sharded, replace them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as unfinished:
        model.save_pretrained(unfinished, state_dict=weights)
        tokenizer.save_pretrained(unfinished)
        for path in sorted(Path(unfinished).iterdir(), key=lambda path: path.name == "config.json"):
            os.replace(path, folder / path.name)


def check_finite(feedback: RichFeedback, pictures: Sequence[str]) -> None:
    """Refuse feedback that is NaN or infinite.

    Args:
        pictures: what each is called in the message.

    Raises:
        ValueError: names the first such picture.
    """
    found = torch.stack([*feedback.scores.values(), *(maps.mean((1, 2)) for maps in feedback.heatmaps.values())])
    for index, fine in enumerate(found.isfinite().all(0).tolist()):
        if not (fine and feedback.misaligned[index].isfinite().all()):
            raise ValueError(
                f"the model's feedback of {pictures[index]} is NaN or infinite; its weights are damaged, or its "
                "training has diverged: use an earlier checkpoint"
            )


def choose_device(name: str | None) -> torch.device:
    """The device that a command's `--device` names; None: cuda where there is one, else cpu.

    Raises:
        ValueError: torch knows no such device, or this machine has none.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device is {name!r}; write cpu, cuda or cuda:1") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device is {name}, but torch sees {torch.cuda.device_count()} such devices; write cpu")
    return device


@dataclass
class PredictArguments:
    model: str = field(metadata={"help": "folder of a RAHF checkpoint"})
    images: list[str] = field(metadata={"help": "image files"})
    prompts: list[str] = field(metadata={"help": "a prompt for each image, or one .txt file with a prompt a line"})
    out: str = field(metadata={"help": "folder to make; it must not exist, or be empty"})
    batch_size: int = field(default=8, metadata={"help": "images judged at once, where they are of one size"})
    device: str | None = field(
        default=None, metadata={"help": "where the model runs, such as cpu; unset: cuda where there is one"}
    )

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")


def main(argv: Sequence[str] | None = None) -> None:
    (arguments,) = parse_arguments([PredictArguments], argv)
    device, out = choose_device(arguments.device), check_new_folder(arguments.out, "--out")
    prompts = read_prompts(arguments.prompts)
    if len(prompts) != len(arguments.images):
        raise ValueError(f"{len(arguments.images)} images were given with {len(prompts)} prompts; give one an image")
    if wordless := [place for place, prompt in enumerate(prompts, start=1) if not keywords.tokenize(prompt)]:
        logger.warning(
            "prompts without a word: %d of %d, first the one of picture %d; alignment of such pictures means nothing",
            len(wordless), len(prompts), wordless[0],
        )  # fmt: skip
    check_model_folder(arguments.model)
    check_pictures(arguments.images)
    predictor = RichFeedbackPredictor.from_pretrained(arguments.model, device)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as unfinished:
        folder = Path(unfinished) / "out"
        folder.mkdir()
        with (folder / "feedback.jsonl").open("w", encoding="utf-8") as lines:
            for start in range(0, len(prompts), arguments.batch_size):
                places = range(start, min(start + arguments.batch_size, len(prompts)))
                images = [_read_image(Path(arguments.images[place])) for place in places]
                feedback = _predict_each(predictor, images, [prompts[place] for place in places])
                for place, image, said in zip(places, images, feedback, strict=True):
                    path = Path(arguments.images[place])
                    check_finite(said, [str(path)])
                    stem = f"{place:04d}_{_shortened(path.stem)}"
                    files = _write_pictures(image, said, stem, folder, predictor.word_threshold)
                    (judged,) = predictor.judges([prompts[place]])
                    line = _as_line(said, judged, predictor.word_threshold)
                    lines.write(json.dumps({"image": str(path), "prompt": prompts[place], **line, **files}) + "\n")
        if out.is_dir():
            out.rmdir()
        shutil.move(folder, out)
    print(f"{len(prompts)} images judged; see {arguments.out}/feedback.jsonl and {arguments.out}/*_overlay.png")


def read_prompts(given: Sequence[str]) -> list[str]:
    """Prompts as given on a command line: themselves, or one `.txt` file with a prompt a line (blank lines skipped)."""
    if len(given) != 1 or not given[0].endswith(".txt"):
        return list(given)
    return read_prompt_file(given[0])


def _read_image(path: Path) -> torch.Tensor:
    """(1, 3, H, W) in [0, 1]."""
    try:
        return to_tensor(decode(path.read_bytes())).float()[None] / 255
    except FileNotFoundError as error:
        raise ValueError(f"there is no image {path}") from error
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is not an image that can be read: {error}") from error


def _predict_each(
    predictor: RichFeedbackPredictor, images: Sequence[torch.Tensor], prompts: Sequence[str]
) -> list[RichFeedback]:
    """Feedback of each image (1, 3, H, W), in order; those of one size are judged together."""
    by_size = defaultdict(list)
    for place, image in enumerate(images):
        by_size[image.shape].append(place)
    found: dict[int, RichFeedback] = {}
    for places in by_size.values():
        pictures = torch.cat([images[place] for place in places])
        said = predictor(pictures, [prompts[place] for place in places], batch_size=len(places))
        for index, place in enumerate(places):
            found[place] = RichFeedback(
                scores={name: values[index : index + 1] for name, values in said.scores.items()},
                heatmaps={name: maps[index : index + 1] for name, maps in said.heatmaps.items()},
                tokens=said.tokens[index : index + 1],
                misaligned=said.misaligned[index : index + 1],
            )
    return [found[place] for place in range(len(images))]


def _write_pictures(
    image: torch.Tensor, feedback: RichFeedback, stem: str, folder: Path, threshold: float
) -> dict[str, str]:
    """Write the heatmaps and the overlay of one image (1, 3, H, W); what they are -> the name of the file."""
    files = {f"{name}_map": f"{stem}_{name}.png" for name in feedback.heatmaps}
    for name, maps in feedback.heatmaps.items():
        draw.heatmap_image(maps[0]).save(folder / files[f"{name}_map"])
    files["overlay"] = f"{stem}_overlay.png"
    draw.feedback_panel(image[0], feedback, 0, threshold=threshold).save(folder / files["overlay"])
    return files


def _shortened(stem: str) -> str:
    """A file's name that leaves room for what is put behind it: names of pictures may be whole prompts."""
    return stem.encode()[:_LONGEST_STEM].decode(errors="ignore")


def _as_line(feedback: RichFeedback, judged: Sequence[bool], threshold: float) -> dict:
    """Feedback of one image as a line of `feedback.jsonl` holds it; `judged` says which of its T words it is of."""
    tokens, values = list(feedback.tokens[0]), [float(value) for value in feedback.misaligned[0]]
    misaligned = [value if counts else None for value, counts in zip(values, judged, strict=True)]
    return {
        "scores": {name: float(value[0]) for name, value in feedback.scores.items()},
        "tokens": tokens,
        "misaligned": misaligned,
        "struck_out": [token for token, value in zip(tokens, values, strict=True) if value > threshold],
        "heatmap_means": {name: float(value.mean()) for name, value in feedback.heatmaps.items()},
    }


if __name__ == "__main__":
    main_guard(main, tidy=True)
