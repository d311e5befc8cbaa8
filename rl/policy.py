"""The policy: a frozen Stable Diffusion pipeline with a trainable LoRA on its U-Net. The one file that knows diffusers.

Shapes: B prompts or pictures, T tokens, D text width, C latent channels, h x w the latent grid, H x W pixels.
"""

import json
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import diffusers
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

logger = logging.getLogger(__name__)

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
"""The file that diffusers' `load_lora_weights(folder)` looks for."""

DEFAULT_LORA_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0"),  # attention
    *("conv1", "conv2", "conv_shortcut", "proj_in", "proj_out"),  # convolutions
)

_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_CONFIGS = {"tokenizer": "tokenizer_config.json", "scheduler": "scheduler_config.json"}
_PEFT_PREFIX = "base_model.model."


class StableDiffusionPolicy:
    """A text-to-image pipeline of the Stable Diffusion 1.x type, as reinforcement learning sees it.

    Attributes:
        network: the U-Net with its LoRA, a `PeftModel`; the only part with trainable parameters. Engines (DDP,
            DeepSpeed) wrap it, so methods that run it take the wrapped one as an argument.
        scheduler: the pipeline's own scheduler; see `rl.sde.ddim_scheduler`.
        latent_shape: (C, h, w) of one picture.
    """

    def __init__(
        self,
        pipeline: StableDiffusionPipeline,
        lora_rank: int,
        lora_alpha: float,
        lora_target_modules: Sequence[str],
        seed: int,
        resolution: int | None = None,
    ):
        """Take over `pipeline`, freeze it, and add a LoRA whose initial weights depend on `seed` only.

        Args:
            lora_rank, lora_alpha, lora_target_modules: as peft's LoraConfig calls them (r, lora_alpha, target_modules).
            resolution: height and width of the pictures in pixels; None: what the pipeline was trained at.

        Raises:
            ValueError: no layer of the U-Net matches the targets, or the resolution does not fit the network.
        """
        self.pipeline = pipeline
        self.scheduler = pipeline.scheduler
        for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            part.requires_grad_(False).eval()
        for module in pipeline.unet.modules():
            if isinstance(module, nn.Dropout):  # a dropped unit in the update would make the ratio differ from 1
                module.p = 0.0
        self.latent_shape = self._latent_shape(resolution)
        self.network = _with_lora(pipeline.unet, lora_rank, lora_alpha, lora_target_modules, seed)
        self._prompt_embeds: dict[str, torch.Tensor] = {}

    @classmethod
    def load(
        cls,
        path: str,
        *,
        lora_rank: int = 8,
        lora_alpha: float = 8,
        lora_target_modules: Sequence[str] = DEFAULT_LORA_TARGETS,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        resolution: int | None = None,
    ) -> "StableDiffusionPolicy":
        """Load a pipeline folder (or the hub's name of one, if the hub may be used).

        Args:
            dtype: of the frozen weights; the LoRA is float32 in any case.

        Raises:
            ValueError: the folder or a part of it is missing or unreadable; the message names the part.
        """
        check_pipeline_folder(path)
        try:
            pipeline = StableDiffusionPipeline.from_pretrained(
                path,
                dtype=dtype,
                safety_checker=None,
                feature_extractor=None,
                image_encoder=None,
                requires_safety_checker=False,
            )
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"cannot load the Stable Diffusion pipeline {path}: {error}") from error
        return cls(pipeline, lora_rank, lora_alpha, lora_target_modules, seed, resolution)

    def _latent_shape(self, resolution: int | None) -> tuple[int, int, int]:
        unet, factor = self.pipeline.unet, self.pipeline.vae_scale_factor
        size = unet.config.sample_size
        if resolution is None:
            height, width = (size, size) if isinstance(size, int) else size
        else:
            halvings = 2 ** (len(unet.config.block_out_channels) - 1)
            if resolution % (factor * halvings):
                raise ValueError(
                    f"resolution is {resolution}; this pipeline needs a multiple of {factor * halvings} "
                    f"(its VAE shrinks {factor} times, its U-Net {halvings} times)"
                )
            height = width = resolution // factor
        return unet.config.in_channels, height, width

    @property
    def device(self) -> torch.device:
        return self.pipeline.unet.device

    def to(self, device: torch.device) -> "StableDiffusionPolicy":
        for part in (self.network, self.pipeline.vae, self.pipeline.text_encoder):
            part.to(device)
        self._prompt_embeds.clear()
        return self

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> torch.Tensor:
        """Text embeddings (B, T, D) of B prompts. Each prompt is encoded once, then remembered (on the CPU)."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._prompt_embeds]
        tokenizer, encoder = self.pipeline.tokenizer, self.pipeline.text_encoder
        for first in range(0, len(new), 64):
            chunk = new[first : first + 64]
            tokens = tokenizer(
                chunk,
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
            uses_mask = getattr(encoder.config, "use_attention_mask", None)
            mask = tokens.attention_mask.to(encoder.device) if uses_mask else None
            embeds = encoder(tokens.input_ids.to(encoder.device), attention_mask=mask)[0].cpu()
            self._prompt_embeds.update(zip(chunk, embeds, strict=True))
        return torch.stack([self._prompt_embeds[prompt] for prompt in prompts]).to(self.device)

    def predict(
        self,
        network: nn.Module,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        prompt_embeds: torch.Tensor,
        guidance_scale: float = 1.0,
    ) -> torch.Tensor:
        """The network's output, noise or v as its scheduler says, with classifier-free guidance.

        Args:
            network: `self.network` or the engine's wrapping of it.
            latents: (B, C, h, w).
            timesteps: (B,) int64.
            prompt_embeds: (B, T, D) of `encode`.
            guidance_scale: 1 costs one pass, anything else a second one for the empty prompt
                ("Classifier-free diffusion guidance", Ho & Salimans 2022).

        Returns:
            (B, C, h, w) float32.
        """
        dtype = self.pipeline.unet.dtype
        guided = guidance_scale != 1.0
        if guided:
            nothing = self.encode([""]).expand_as(prompt_embeds)
            latents, timesteps = latents.repeat(2, 1, 1, 1), timesteps.repeat(2)
            prompt_embeds = torch.cat([nothing, prompt_embeds])
        output = network(latents.to(dtype), timesteps, encoder_hidden_states=prompt_embeds.to(dtype)).sample.float()
        if guided:
            unconditional, conditional = output.chunk(2)
            output = unconditional + guidance_scale * (conditional - unconditional)
        return output

    def reference(self) -> AbstractContextManager:
        """Within it the LoRA is switched off and the network is the base model again."""
        return self.network.disable_adapter()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w) -> pictures (B, 3, H, W) float32 in [0, 1]."""
        vae = self.pipeline.vae
        images = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype)).sample
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def save_adapter(self, folder: str | Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Write the LoRA so that plain diffusers makes the same pictures:
        `StableDiffusionPipeline.from_pretrained(base).load_lora_weights(folder)`.

        Rank, alpha and targets are saved with the weights: without them diffusers assumes alpha = rank, and pictures
        are silently wrong where it is not.

        Args:
            state_dict: the network's, where an engine has gathered it; None: taken from the network.
        """
        weights = get_peft_model_state_dict(self.network, state_dict=state_dict)
        weights = {
            name.removeprefix(_PEFT_PREFIX): weight.detach().cpu().contiguous() for name, weight in weights.items()
        }
        metadata = self.network.peft_config["default"].to_dict()
        metadata = {key: sorted(value) if isinstance(value, set) else value for key, value in metadata.items()}
        StableDiffusionPipeline.save_lora_weights(
            folder, unet_lora_layers=weights, unet_lora_adapter_metadata=json.loads(json.dumps(metadata, default=str))
        )

    def load_adapter(self, folder: str | Path) -> None:
        """Read back what `save_adapter` wrote.

        Raises:
            ValueError: no such file, or the LoRA has other layers or another rank.
        """
        file = Path(folder) / LORA_WEIGHTS
        if not file.is_file():
            raise ValueError(f"{folder} holds no {LORA_WEIGHTS}")
        weights = {_PEFT_PREFIX + name.removeprefix("unet."): weight for name, weight in load_file(file).items()}
        expected = {name: weight.shape for name, weight in get_peft_model_state_dict(self.network).items()}
        if expected != {name: weight.shape for name, weight in weights.items()}:
            raise ValueError(
                f"the LoRA in {file} has other layers or another rank than this run's; "
                "give lora_rank and lora_target_modules the values it was trained with"
            )
        set_peft_model_state_dict(self.network, weights)


def check_pipeline_folder(path: str) -> None:
    """Complain about a pipeline folder before anything is loaded from it.

    Raises:
        ValueError: the folder, its `model_index.json`, or a part of it is missing; the message names the part.
    """
    folder = Path(path)
    if not folder.exists():
        if path.count("/") == 1 and not path.startswith((".", "/", "~")):
            return  # may be a name on the hub
        raise ValueError(f"no pipeline folder {path}; `policy` is a diffusers folder or the hub's name of one")
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{path} is not a diffusers pipeline: it holds no model_index.json")
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}/model_index.json is not JSON: {error}") from error
    if index.get("_class_name") != "StableDiffusionPipeline":
        raise ValueError(
            f"{path} is a {index.get('_class_name')}; this policy is a StableDiffusionPipeline (Stable Diffusion 1.x)"
        )
    for part in _PARTS:
        if not (folder / part).is_dir():
            raise ValueError(f"the pipeline {path} lacks its part `{part}`: no folder {folder / part}")
        config = folder / part / _CONFIGS.get(part, "config.json")
        if not config.is_file():
            raise ValueError(f"the pipeline {path} lacks its part `{part}`: no file {config}")


def load_scheduler(path: str):
    """The scheduler of a pipeline folder, without loading the models; None if `path` is a name on the hub.

    Raises:
        ValueError: see `check_pipeline_folder`; or the scheduler is none of diffusers'.
    """
    check_pipeline_folder(path)
    if not Path(path).exists():
        return None
    name = json.loads((Path(path) / "model_index.json").read_text(encoding="utf-8"))["scheduler"][1]
    if not hasattr(diffusers, name):
        raise ValueError(f"the pipeline {path} has the scheduler {name}, which diffusers does not know")
    return getattr(diffusers, name).from_pretrained(path, subfolder="scheduler")


def _with_lora(unet: nn.Module, rank: int, alpha: float, targets: Sequence[str], seed: int) -> PeftModel:
    known = [name for name, _ in unet.named_modules()]
    idle = [target for target in targets if not any(name == target or name.endswith(f".{target}") for name in known)]
    if len(idle) == len(targets):
        raise ValueError(f"no layer of the U-Net is named like any of lora_target_modules: {', '.join(targets)}")
    if idle:
        logger.warning("no layer of the U-Net is named like these lora_target_modules: %s", ", ".join(idle))
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=sorted(targets), lora_dropout=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = get_peft_model(unet, config)
    # Trainer's callbacks take a model's config for one of transformers and call methods that diffusers' lacks.
    network.config = None
    # What Trainer calls for `activation_checkpointing: true`; a PEFT model of diffusers' has no such method.
    network.activation_checkpointing_enable = lambda **settings: unet.enable_gradient_checkpointing()
    return network
