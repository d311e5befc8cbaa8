"""Rewards that are the cosine of a picture and its prompt in a CLIP: PickScore, CLIPScore, HPSv2.

Shapes: b pictures and prompts at once, D the width of the shared space.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoConfig, CLIPModel, CLIPVisionModelWithProjection, PreTrainedTokenizerBase

from reward.others.files import BROKEN, check_file, check_folder, first_line, load_model, read_weights
from reward.others.frozen import SeeingReward
from reward.others.open_clip_names import in_names_of_transformers
from reward.others.showing import Showing, read_showing
from reward.others.texts import encode, load_tokenizer


class CosineReward(SeeingReward):
    """Cosines in a CLIP of transformers; `_load` also sets the `tokenizer` and the `showing`."""

    tokenizer: PreTrainedTokenizerBase
    showing: Showing

    def cosines(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """(b, 3, H, W) in [0, 1] on the model's device, b prompts -> (b,)."""
        different = list(dict.fromkeys(prompts))  # the pictures of a group share their prompt
        length = self.model.config.text_config.max_position_embeddings
        text = encode(self.tokenizer, different, length, self.device)
        texts = self.model.get_text_features(**text).pooler_output.float()
        texts = texts[[different.index(prompt) for prompt in prompts]]
        return F.cosine_similarity(self._see(images).float(), texts, dim=-1)

    def _see(self, images: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_features(self.showing(images).to(self.dtype)).pooler_output


class ClipReward(CosineReward):
    """Cosines in a CLIP with its own tokenizer and preprocessing.

    Args:
        model: folder of a `CLIPModel` of transformers, or the hub's name.
        processor: folder or name of its tokenizer and preprocessing; None takes `model`'s.
        batch_size, dtype: see `FrozenReward`.
    """

    def __init__(
        self,
        model: str | Path,
        processor: str | Path | None = None,
        batch_size: int = 32,
        dtype: str = "float32",
    ):
        super().__init__(batch_size, dtype)
        check_folder("model", model, "clip")
        self.source, self.processor = model, check_processor(model, processor)

    def _load(self) -> CLIPModel:
        self.tokenizer, self.showing = load_tokenizer(self.processor), read_showing(self.processor)
        return load_model(CLIPModel, self.source, dtype=self.dtype)


class PickScore(ClipReward):
    """PickScore (Kirstain et al. 2023, "Pick-a-Pic", arXiv 2305.01569, section 4): exp(logit scale) times the cosine.

    A CLIP ViT-H/14 tuned on the choices of Pick-a-Pic's users. On the hub: `yuvalkirstain/PickScore_v1`, with the
    tokenizer and preprocessing of `laion/CLIP-ViT-H-14-laion2B-s32B-b79K`, which is `processor`. The logit scale is
    about 100, so a score is about 100 times a cosine; the difference of two scores is the logit of the one being
    preferred, so 1 is much.

    Generated pictures mostly get 18 to 26: two deviations below and above the averages that are published with theirs,
    21.06 - 2 * 1.46 (SDXL-DMD2) to 23.14 + 2 * 1.37 (a tuned SDXL-Turbo), each over 500 prompts (Lee et al. 2026,
    arXiv 2609.34673, tables 12 and 14). Stable Diffusion 1.5 gets 20.53 and SDXL 21.95 on average over 500 prompts of
    Pick-a-Pic (Liang et al. 2024, arXiv 2406.04314, tables 2 and 1).
    """

    name = "pickscore"

    def _score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return self.model.logit_scale.float().exp() * self.cosines(images, prompts)


class CLIPScore(ClipReward):
    """CLIPScore (Hessel et al. 2021, arXiv 2104.08718, equation 1): weight * max(cosine, 0).

    The paper's weight is 2.5, its model CLIP ViT-B/32 (on the hub `openai/clip-vit-base-patch32`), and "A photo
    depicts" stands before the caption: these are the defaults. The paper generally saw cosines from roughly 0 to
    roughly 0.4 (footnote 6), so values are mostly 0 to 1, averages 0.76 to 0.83: those of eight generators on captions
    of COCO and on DrawBench (Chen 2023, arXiv 2305.10843, as its repository gives them). How single generated pictures
    spread, no source was found for.

    Text-to-image papers mostly give the plain cosine times 100, without the prefix (`weight: 100, prefix: ""`): on
    average 34.9 and 36.2 for Stable Diffusion 1.4 and 1.5, over six prompts by CLIP ViT-B/16 (documentation of
    diffusers, "Evaluating Diffusion Models"). No gradient comes from a cosine below 0.

    Args:
        weight: above 0.
        prefix: what stands before every prompt, its last space included.
    """

    name = "clipscore"

    def __init__(
        self,
        model: str | Path,
        processor: str | Path | None = None,
        weight: float = 2.5,
        prefix: str = "A photo depicts ",
        batch_size: int = 32,
        dtype: str = "float32",
    ):
        if weight <= 0:
            raise ValueError(f"CLIPScore's weight is {weight}; it must be above 0")
        super().__init__(model, processor, batch_size, dtype)
        self.weight, self.prefix = weight, prefix

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        return {self.name: (0.0, self.weight)}

    def _score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return self.weight * self.cosines(images, [self.prefix + prompt for prompt in prompts]).clamp(min=0)


class HPSv2(CosineReward):
    """Human Preference Score v2 and v2.1 (Wu et al. 2023, arXiv 2306.09341): the cosine itself.

    A CLIP ViT-H/14 tuned on ranked pictures; comparable between pictures of one prompt only. Its authors' benchmark
    gives the averages of 22 models, times 100, from 23.55 (GLIDE) by 26.95 (Stable Diffusion 1.4) to 27.86 for v2;
    v2.1 spreads wider. That single pictures mostly get 0.2 to 0.35 is our estimate. The longer side of a picture is
    brought to 224 and the rest filled with black, as its authors do it; they compute in half precision, which changes
    the third digit or so.

    Args:
        model: its authors' file, whose names are open_clip's (on the hub `xswu/HPSv2/HPS_v2.1_compressed.pt` or
            `xswu/HPSv2/HPS_v2_compressed.pt`), or the same weights as a folder of transformers' `CLIPModel`.
        clip: folder or name of a CLIP of that architecture, for its config.json and tokenizer, such as
            `laion/CLIP-ViT-H-14-laion2B-s32B-b79K`; its weights are not read. None takes `model`, if that is a folder.
        batch_size, dtype: see `FrozenReward`.

    The file's names were read off its authors' code, not off the file: those of open_clip's ViT-H-14, inside the entry
    `state_dict`. A name that is not among these is an error, not a guess.
    """

    name = "hpsv2"

    def __init__(
        self,
        model: str | Path,
        clip: str | Path | None = None,
        batch_size: int = 32,
        dtype: str = "float32",
    ):
        super().__init__(batch_size, dtype)
        self.source, self.is_folder = model, Path(model).is_dir() or not is_weights_file(model)
        if self.is_folder:
            check_folder("model", model, "clip")
        else:
            check_file("model", model)
            if clip is None:
                raise ValueError(
                    f"{model} is a file of weights alone: give `clip`, a CLIP of the same architecture, for its "
                    "config.json and tokenizer, e.g. laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
                )
        self.processor = check_processor(model, clip, "clip")
        if clip is not None:
            check_folder("clip", clip, "clip", weights=False)

    def _load(self) -> CLIPModel:
        self.tokenizer = load_tokenizer(self.processor)
        if self.is_folder:
            model = load_model(CLIPModel, self.source, dtype=self.dtype)
        else:
            try:
                config = AutoConfig.from_pretrained(self.processor)
            except BROKEN as error:
                raise ValueError(f"clip: {self.processor} has no config.json: {first_line(error)}") from error
            weights = in_names_of_transformers(read_weights(self.source, inside="state_dict"), str(self.source))
            model = load_model(CLIPModel, self.source, config, weights, dtype=self.dtype)
        side = model.config.vision_config.image_size
        self.showing = Showing((side, side), "pad")
        return model

    def _score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return self.cosines(images, prompts)


class ClipEye(torch.nn.Module):
    """The picture half of a CLIP: (b, 3, H, W) in [0, 1] -> (b, D), of length 1."""

    def __init__(self, source: str | Path, processor: str | Path):
        super().__init__()
        self.showing = read_showing(processor)
        self.encoder = load_model(CLIPVisionModelWithProjection, source, partial=True)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.encoder(self.showing(images).to(self.encoder.dtype)).image_embeds.float(), dim=-1)


def check_processor(model: str | Path, processor: str | Path | None, setting: str = "processor") -> str | Path:
    """Where tokenizer and preprocessing are: `processor`, or else the model's own folder, if it has them.

    Raises:
        ValueError: there is no such folder, or it has no tokenizer.
    """
    source = model if processor is None else processor
    path = Path(source)
    if path.is_dir() and not any((path / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise ValueError(
            f"{path} has no tokenizer; give `{setting}`, the folder or the hub's name of the CLIP that the model was "
            "trained from"
        )
    if processor is not None and not path.is_dir():
        check_folder(setting, source, weights=False)
    return source


def is_weights_file(name: str | Path) -> bool:
    return Path(name).suffix in (".pt", ".pth", ".bin", ".safetensors")
