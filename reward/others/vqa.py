"""VQAScore: how sure a vision-language model is that a picture shows its prompt."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from reward.checks import model_type
from reward.draw import to_image
from reward.others.files import BROKEN, check_folder, first_line, load_model
from reward.others.frozen import FrozenReward

QUESTION = 'Does this figure show "{prompt}"? Please answer yes or no.'
"""Of the paper, section 3."""


class VQAScore(FrozenReward):
    """VQAScore (Lin et al. 2024, arXiv 2404.01291): the probability that the answer's first word is "Yes".

    From 0 to 1, as a probability; values of different models cannot be compared. Not differentiable: the picture goes
    through the model's own processor, in 8 bits.

    Args:
        model: folder or the hub's name of any model that transformers loads by `AutoModelForImageTextToText`, with its
            processor and tokenizer.
        question: what is asked, with `{prompt}` in it.
        answers: the word whose probability it is, and its opposite; each must be one token of the tokenizer.
        among: `vocabulary`: the probability among all tokens, as in the paper; `answers`: among the two, which makes up
            for models that begin in another way.
        template: what the model is given, with `{question}` in it, and the processor's own mark for a picture, such as
            `USER: <image>\\n{question} ASSISTANT:`. None takes the processor's chat template.
        batch_size, dtype: see `FrozenReward`.
    """

    differentiable = False
    name = "vqascore"
    ranges = {"vqascore": (0.0, 1.0)}  # noqa: RUF012 - read only

    def __init__(
        self,
        model: str | Path,
        question: str = QUESTION,
        answers: Sequence[str] = ("Yes", "No"),
        among: str = "vocabulary",
        template: str | None = None,
        batch_size: int = 8,
        dtype: str = "float32",
    ):
        super().__init__(batch_size, dtype)
        if "{prompt}" not in question:
            raise ValueError(f"question must have {{prompt}} in it, where the prompt goes; {question!r} has not")
        if template is not None and "{question}" not in template:
            raise ValueError(f"template must have {{question}} in it, where the question goes; {template!r} has not")
        if among not in ("vocabulary", "answers"):
            raise ValueError(f"among is {among!r}; it must be vocabulary or answers")
        if isinstance(answers, str) or len(answers) != 2:
            raise ValueError(f"answers must be two words, the wanted one first, not {answers!r}")
        check_folder("model", model)
        if Path(model).is_dir() and (kind := model_type(Path(model))) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            raise ValueError(f"model: {model} holds a model of type {kind}, which answers no question about a picture")
        self.source, self.question, self.answers = model, question, tuple(answers)
        self.among, self.template = among, template

    def _load(self) -> nn.Module:
        try:
            self.processor = AutoProcessor.from_pretrained(self.source)
        except BROKEN as error:
            raise ValueError(f"{self.source} has no processor that can be loaded: {first_line(error)}") from error
        tokenizer = getattr(self.processor, "tokenizer", None)
        if tokenizer is None or getattr(self.processor, "image_processor", None) is None:
            raise ValueError(f"{self.source} has a {type(self.processor).__name__}, not one of pictures and text")
        if self.template is None and not getattr(self.processor, "chat_template", None):
            raise ValueError(
                f"{self.source} has no chat template; give `template`, e.g. 'USER: <image>\\n{{question}}'"
            )
        tokenizer.padding_side = "left"  # the answer begins behind the last token
        self.ids = [self._only_token(tokenizer, answer) for answer in self.answers]
        return load_model(AutoModelForImageTextToText, self.source, dtype=self.dtype)

    def _only_token(self, tokenizer, answer: str) -> int:
        ids = tokenizer(answer, add_special_tokens=False).input_ids
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise ValueError(
                f"the answer {answer!r} is not one token of {self.source}'s tokenizer; give other `answers`"
            )
        return ids[0]

    @torch.no_grad()
    def _score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        broken = ~images.flatten(1).isfinite().all(dim=1)
        inputs = self._inputs([to_image(image) for image in images.nan_to_num()], prompts)
        answered = self.model.generate(
            **inputs,
            max_new_tokens=1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=self.processor.tokenizer.pad_token_id,
        )
        logits = answered.logits[0].float()  # (b, tokens), before any processing
        if self.among == "answers":
            probability = logits[:, self.ids].softmax(dim=-1)[:, 0]
        else:
            probability = logits.softmax(dim=-1)[:, self.ids[0]]
        return probability.masked_fill(broken, float("nan"))

    def _inputs(self, pictures: list[Image.Image], prompts: list[str]) -> dict[str, torch.Tensor]:
        texts = [self._text(self.question.replace("{prompt}", prompt)) for prompt in prompts]
        bos = self.processor.tokenizer.bos_token
        # A chat template may write the first token itself; the tokenizer must not write it once more.
        written = {"add_special_tokens": False} if bos is not None and texts[0].startswith(bos) else {}
        inputs = self.processor(
            images=[[picture] for picture in pictures], text=texts, padding=True, return_tensors="pt", **written
        ).to(self.device)
        return {
            name: value.to(self.dtype) if value.is_floating_point() else value
            for name, value in inputs.items()
            if isinstance(value, torch.Tensor)
        }

    def _text(self, question: str) -> str:
        if self.template is not None:
            return self.template.replace("{question}", question)
        content = [{"type": "image"}, {"type": "text", "text": question}]
        asked = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
