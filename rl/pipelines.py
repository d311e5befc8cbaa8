"""The Stable Diffusion families: what their pipeline folders hold, how one is loaded, and what its network is told.

Shapes: B pictures, T tokens, D text width, P width of the pooled embedding, H x W pixels.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    SchedulerMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError

from rl.pipeline_files import check_loaded, check_tokenizer, check_tokenizer_files, check_weight_files


@dataclass(frozen=True)
class Conditioning:
    """What the network is told about B pictures besides their latents and timesteps, and what it drops for them.

    Attributes:
        embeds: (B, T, D) text embeddings.
        pooled: (B, P) embeddings of whole prompts, of Stable Diffusion XL; None for 1.x and 2.x.
        time_ids: (B, 6) sizes in pixels that XL is told: original height and width, top and left of the crop, target
            height and width ("SDXL", Podell et al. 2023, section 2.2); None for 1.x and 2.x.
        prompts: what was encoded, B texts, where text encoders are trained: the base model is told them in its own
            words. None where all encode alike.
        kept_inputs: (B, F) bool, which inputs of its layers the LoRA keeps; see `rl.lora_dropout`. None: all.
    """

    embeds: torch.Tensor
    pooled: torch.Tensor | None = None
    time_ids: torch.Tensor | None = None
    prompts: Sequence[str] | None = None
    kept_inputs: torch.Tensor | None = None

    def after(self, other: "Conditioning") -> "Conditioning":
        """Both behind one another, `other` first."""
        mine, theirs = self._tensors, other._tensors
        assert mine.keys() == theirs.keys(), "of unlike kinds"
        return Conditioning(**{name: torch.cat([theirs[name], mine[name]]) for name in mine})

    def at(self, places: torch.Tensor) -> "Conditioning":
        """Of some of the B pictures, `places` (U,) int64."""
        prompts = None if self.prompts is None else [self.prompts[place] for place in places.tolist()]
        return Conditioning(**{name: tensor[places] for name, tensor in self._tensors.items()}, prompts=prompts)

    @property
    def _tensors(self) -> dict[str, torch.Tensor]:
        """All that there are, with B rows each."""
        tensors = {name: getattr(self, name) for name in ("embeds", "pooled", "time_ids", "kept_inputs")}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def arguments(self, dtype: torch.dtype) -> dict[str, Any]:
        """The keyword arguments of a diffusers U-Net, in its dtype."""
        arguments: dict[str, Any] = {"encoder_hidden_states": self.embeds.to(dtype)}
        if self.pooled is not None:
            arguments["added_cond_kwargs"] = {"text_embeds": self.pooled.to(dtype), "time_ids": self.time_ids.to(dtype)}
        return arguments


@dataclass(frozen=True)
class Family:
    """One pipeline class of diffusers.

    Attributes:
        name: for messages.
        pipeline: the class.
        text_encoders: the parts that turn a prompt into embeddings.
        parts: all that its folder must hold.
        left_out: arguments of `from_pretrained` that leave out what training does not need.
        more_channels: how many channels its U-Net may take more than it returns.
        unread_layers: how many of a text encoder's last layers nothing is read from: they cannot be trained.
    """

    name: str
    pipeline: type[DiffusionPipeline]
    text_encoders: tuple[str, ...]
    parts: tuple[str, ...]
    left_out: Mapping[str, Any]
    more_channels: tuple[int, ...] = (0,)
    unread_layers: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_xl(self) -> bool:
        return "text_encoder_2" in self.text_encoders


_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_XL_PARTS = (*_PARTS, "text_encoder_2", "tokenizer_2")
_NO_IMAGES = {"feature_extractor": None, "image_encoder": None}

FAMILIES = {
    "StableDiffusionPipeline": Family(
        "Stable Diffusion 1.x and 2.x",
        StableDiffusionPipeline,
        ("text_encoder",),
        _PARTS,
        {"safety_checker": None, "requires_safety_checker": False, **_NO_IMAGES},
    ),
    "StableDiffusionXLPipeline": Family(
        "Stable Diffusion XL",
        StableDiffusionXLPipeline,
        ("text_encoder", "text_encoder_2"),
        _XL_PARTS,
        {"add_watermarker": False, **_NO_IMAGES},
        # Both are read before their last layer, the second one behind it as well: its pooled embedding.
        unread_layers={"text_encoder": 1},
    ),
}
"""By the class that a folder's `model_index.json` names."""


def check_pipeline_folder(path: str, families: Mapping[str, Family] = FAMILIES) -> None:
    """Complain about a pipeline folder before anything is loaded from it.

    Args:
        families: those that work, by the class that a folder names.

    Raises:
        ValueError: the folder, its `model_index.json`, or a part of it is missing, or a part's vocabulary or weights
            (`rl.pipeline_files`), and the message names the part; or it is of another family, or has a network for
            another task, than those that can be trained.
    """
    folder = Path(path)
    if not folder.exists():
        if path.count("/") == 1 and not path.startswith((".", "/", "~")):
            return  # may be a name on the hub
        raise ValueError(f"no pipeline folder {path}; give a diffusers folder, or the hub's name of one")
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{path} is not a diffusers pipeline: it holds no model_index.json")
    family = _family(_read_json(folder / "model_index.json"), path, families)
    for part in family.parts:
        if not (folder / part).is_dir():
            raise ValueError(f"the pipeline {path} lacks its part `{part}`: no folder {folder / part}")
        config = folder / part / _config_name(part)
        if not config.is_file():
            raise ValueError(f"the pipeline {path} lacks its part `{part}`: no file {config}")
        _read_json(config)
        if part.startswith("tokenizer"):
            check_tokenizer_files(folder / part, path)
        elif part != "scheduler":
            check_weight_files(folder / part, path)
    check_network(_read_json(folder / "unet" / "config.json"), path, family)


def picture_size(path: str, resolution: int | None) -> tuple[int, int]:
    """Height and width of what a pipeline draws, in pixels; from its configs, so nothing of it is loaded.

    Args:
        path: folder, or name on the hub.
        resolution: of the run's settings; None: the size that the U-Net was trained at.

    Raises:
        OSError: a config is not there.
    """
    if resolution is not None:
        return resolution, resolution
    unet = UNet2DConditionModel.load_config(path, subfolder="unet")
    vae = AutoencoderKL.load_config(path, subfolder="vae")
    factor, size = 2 ** (len(vae["block_out_channels"]) - 1), unet["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return height * factor, width * factor


def check_network(config: Mapping[str, Any], path: str, family: Family) -> None:
    """Complain about a U-Net that is told what its family does not know of, from its config.

    Raises:
        ValueError: it wants more than latents (inpainting, image editing) or the guidance scale (distilled networks).
    """
    channels, out_channels = config.get("in_channels", 4), config.get("out_channels", 4)
    if not all(isinstance(count, int) for count in (channels, out_channels)):
        raise ValueError(f"the config of {path}'s U-Net has in_channels {channels!r} and out_channels {out_channels!r}")
    if channels - out_channels not in family.more_channels:
        works = " or ".join(str(out_channels + more) for more in family.more_channels)
        raise ValueError(
            f"the U-Net of {path} takes {channels} channels and returns {out_channels}, so it is one for inpainting or "
            f"editing; what works here takes {works}"
        )
    if config.get("time_cond_proj_dim") is not None:
        raise ValueError(
            f"the U-Net of {path} is told the guidance scale (time_cond_proj_dim is {config['time_cond_proj_dim']}), "
            "as those distilled to few steps are; give a pipeline that is not distilled"
        )


def load_pipeline(
    path: str,
    dtype: torch.dtype,
    unet_dtype: torch.dtype | None = None,
    families: Mapping[str, Family] = FAMILIES,
) -> DiffusionPipeline:
    """Load a pipeline folder, or the hub's name of one, without what training does not need.

    Args:
        dtype: of the weights. Where the VAE of Stable Diffusion XL says that float16 overflows in it
            (`force_upcast`), it is float32 instead.
        unet_dtype: of the U-Net's weights; None: as the others.
        families: those that work, by the class that a folder names.

    Raises:
        ValueError: the folder or a part of it is missing or unreadable, and the message names the part; or see
            `check_pipeline_folder`.
    """
    check_pipeline_folder(path, families)
    index = _read_json(pipeline_file(path, "model_index.json"))
    family = _family(index, path, families)
    try:
        folder = path
        if not Path(path).exists():
            folder = family.pipeline.download(path, use_safetensors=True, **family.left_out)
        texts = {part: _load_text_encoder(Path(folder) / part, index[part][1], dtype) for part in family.text_encoders}
        pipeline = family.pipeline.from_pretrained(
            folder,
            dtype={"default": dtype, "unet": unet_dtype or dtype},
            use_safetensors=True,  # never a pickle, which may hold code
            **texts,
            **family.left_out,
        )
    except Exception as error:  # diffusers, transformers, tokenizers and torch have no common one
        raise ValueError(f"cannot load the Stable Diffusion pipeline {path}: {error}") from error
    for part in ("unet", "vae", *family.text_encoders):
        check_loaded(getattr(pipeline, part), part, path)
    check_network(pipeline.unet.config, path, family)
    for part in family.parts:
        if part.startswith("tokenizer"):
            check_tokenizer(getattr(pipeline, part), part, path)
    if family.is_xl and pipeline.vae.dtype == torch.float16 and pipeline.vae.config.force_upcast:
        pipeline.vae.to(torch.float32)
    return pipeline


def _load_text_encoder(folder: Path, kind: str, dtype: torch.dtype) -> torch.nn.Module:
    """By itself, as diffusers would not say which weights of it are not there: transformers draws them at random."""
    encoder, told = getattr(transformers, kind).from_pretrained(
        folder, dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    if missing := sorted({*told["missing_keys"], *(key for key, *_ in told["mismatched_keys"])}):
        raise ValueError(
            f"its files lack weights of its part `{folder.name}`: {', '.join(missing[:3])} ({len(missing)} in all)"
        )
    return encoder


def load_scheduler(path: str):
    """The scheduler of a pipeline folder, or of the hub's name of one, without its models: of what is on the hub, two
    files of a few KB are fetched.

    Raises:
        ValueError: see `check_pipeline_folder`, also of a name on the hub, as far as its `model_index.json` tells; the
            scheduler is none of diffusers'; or the hub does not give its files.
    """
    check_pipeline_folder(path)
    index = _read_json(pipeline_file(path, "model_index.json"))
    _family(index, path, FAMILIES)
    named = index.get("scheduler")
    name = str(named[-1] if isinstance(named, list) and named else named)
    if not issubclass(getattr(diffusers, name, object), SchedulerMixin):
        raise ValueError(f"the pipeline {path} has the scheduler {name}, which diffusers does not know as one")
    config = _read_json(pipeline_file(path, "scheduler/scheduler_config.json"))
    try:
        return getattr(diffusers, name).from_config(config)
    except Exception as error:  # whatever its arithmetic stumbles over
        raise ValueError(f"the scheduler of the pipeline {path} cannot be made of its config: {error}") from error


def family_of(pipeline: DiffusionPipeline) -> Family:
    return FAMILIES[type(pipeline).__name__]


def encode_prompts(pipeline: DiffusionPipeline, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Embeddings of B prompts, as the pipeline itself makes them: text (B, T, D) and pooled (B, P), or None in its
    place. Gradients flow to text encoders whose weights require them.

    Only the text encoders are used, on the device they are on.
    """
    encoder = getattr(pipeline, family_of(pipeline).text_encoders[-1])
    embeds, _, *pooled = pipeline.encode_prompt(
        list(prompts), device=encoder.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return embeds, pooled[0] if pooled else None


def time_ids(
    size: Sequence[int],
    original_size: Sequence[int] | None = None,
    crop_top_left: Sequence[int] = (0, 0),
    target_size: Sequence[int] | None = None,
) -> torch.Tensor:
    """The six numbers that Stable Diffusion XL is told about a picture's size (see `Conditioning`) -> (6,) float32.

    Args:
        size: height and width of the pictures, which the original and the target size are if they are not given: as in
            diffusers.
    """
    return torch.tensor([*(original_size or size), *crop_top_left, *(target_size or size)], dtype=torch.float32)


def _family(index: Mapping[str, Any], path: str, families: Mapping[str, Family]) -> Family:
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in families:
        known = ", ".join(f"{known} ({family.name})" for known, family in families.items())
        raise ValueError(f"{path} is a {name}; what works here is {known}")
    return families[name]


def pipeline_file(path: str, file: str) -> Path:
    """A small file of a pipeline folder; of a name on the hub, from the hub's cache or, if that is stale, the hub.

    Raises:
        ValueError: the hub has to be asked, and does not give it.
    """
    if Path(path).exists():
        return Path(path) / file
    try:
        return Path(hf_hub_download(path, file))
    except (OSError, EntryNotFoundError, HFValidationError) as error:
        why = " ".join(str(error.__cause__ or error).split())
        raise ValueError(
            f"cannot read {file} of the pipeline {path}: there is no such folder here, no such file in the hub's cache "
            f"{constants.HF_HUB_CACHE}, and the hub does not give it: {why}"
        ) from error


def _config_name(part: str) -> str:
    if part.startswith("tokenizer"):
        return "tokenizer_config.json"
    return "scheduler_config.json" if part == "scheduler" else "config.json"


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is JSON, but not a mapping of settings")
    return content
