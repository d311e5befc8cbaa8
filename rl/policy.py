"""The policy: a frozen Stable Diffusion pipeline of which LoRAs, or the U-Net, are trained.

This file and those it is made of (`rl.pipelines`, `rl.lora`, `rl.part_lora`, `rl.full_unet`) are the ones that know
diffusers.
Shapes: B prompts or pictures, T tokens, D text width, C latent channels, h x w the latent grid, H x W pixels.
"""

import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from rl.adapter import AdapterSettings, check_adapter_files
from rl.full_unet import FullUnet
from rl.lora import Lora, fuse_base_adapters
from rl.lora_dropout import DropoutKeys
from rl.memory import MemorySettings, borrowed, compile_blocks
from rl.pipelines import Conditioning, check_pipeline_folder, encode_prompts, family_of, load_pipeline, time_ids
from rl.sde import at_least_float32
from rl.trunks import Trunks

logger = logging.getLogger(__name__)

REMEMBERED_PROMPTS = 4096
"""So many prompts' embeddings are kept: in float32, 1 GB of memory for Stable Diffusion 1.5, 2.6 GB for XL."""
CPU_DECODED_PIXELS = 2**16
"""So many pixels of pictures are decoded at a time on a CPU, or one picture: more would leave its cache."""


@dataclass(frozen=True)
class PictureSize:
    """How large pictures are, and what Stable Diffusion XL is told about it; all in pixels, height before width.

    Attributes:
        resolution: height and width of the pictures; None: what the pipeline was trained at.
        original_size, target_size: as diffusers' pipeline calls them; None: the pictures' own size.
        crops_coords_top_left: likewise.
    """

    resolution: int | None = None
    original_size: Sequence[int] | None = None
    crops_coords_top_left: Sequence[int] = (0, 0)
    target_size: Sequence[int] | None = None

    def __post_init__(self):
        if self.resolution is not None and self.resolution < 1:
            raise ValueError(f"resolution is {self.resolution}; it must be at least 1 pixel, e.g. 512")
        for name in ("original_size", "crops_coords_top_left", "target_size"):
            value = getattr(self, name)
            if value is not None and (len(value) != 2 or min(value) < 0):
                raise ValueError(f"{name} is {list(value)}; it is two numbers of pixels, e.g. 1024 1024")


class StableDiffusionPolicy:
    """A text-to-image pipeline of the Stable Diffusion families, as reinforcement learning sees it.

    Attributes:
        network: what the Trainer trains: the U-Net with its LoRA, or the U-Net; where text encoders are trained, these
            with theirs beside it. Engines (DDP, DeepSpeed) wrap it, so methods that run it take the wrapped one as an
            argument. Text encoders are asked by themselves: engines see their gradients wherever they come from.
        trained: the `Lora` or `FullUnet` that made it, and saves it.
        scheduler: the pipeline's own scheduler; see `rl.sde.ddim_scheduler`.
        latent_shape: (C, h, w) of one picture.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        adapter: AdapterSettings,
        seed: int,
        size: PictureSize,
        memory: MemorySettings,
        keep_reference: bool = True,
    ):
        """Take over `pipeline` and freeze it but for what is trained, whose initial weights depend on `seed` only.

        Args:
            keep_reference: whether `reference` will be asked for. A LoRA can always be switched off; for full
                fine-tuning a copy of the U-Net is kept.

        Raises:
            ValueError: no layer of the U-Net matches the targets, or the resolution does not fit the network.
        """
        self.pipeline, self._memory = pipeline, memory
        self.scheduler = pipeline.scheduler
        self._text_encoders = [getattr(pipeline, part) for part in family_of(pipeline).text_encoders]
        for part in (pipeline.unet, pipeline.vae, *self._text_encoders):
            part.requires_grad_(False).eval()
        for module in pipeline.unet.modules():
            if isinstance(module, nn.Dropout):  # a dropped unit in the update would make the ratio differ from 1
                module.p = 0.0
        self.latent_shape = self._latent_shape(size.resolution)
        self._time_ids = self._sizes(size)
        pipeline.vae.to(memory_format=torch.channels_last)  # its convolutions are the faster for it
        if memory.vae_slicing:
            pipeline.vae.enable_slicing()
        if memory.vae_tiling:
            pipeline.vae.enable_tiling()
        fuse_base_adapters(pipeline, adapter.base_adapters)
        self.trained = Lora(pipeline, adapter, seed) if adapter.tune == "lora" else FullUnet(pipeline, keep_reference)
        self.network = self.trained.network
        if memory.torch_compile_unet:
            compile_blocks(pipeline.unet)
        self._asks_reference, self._stand_in = False, None
        self.rounded = False  # whether an engine computes in half precision, whatever the weights are
        self._embeddings: OrderedDict[str, tuple[torch.Tensor, torch.Tensor | None]] = OrderedDict()

    @classmethod
    def load(
        cls,
        path: str,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        resolution: int | None = None,
        size: PictureSize | None = None,
        memory: MemorySettings | None = None,
        keep_reference: bool = True,
        **adapter: Any,
    ) -> "StableDiffusionPolicy":
        """Load a pipeline folder (or the hub's name of one, if the hub may be used).

        Args:
            dtype: of the frozen weights; what is trained is float32 in any case.
            resolution: height and width of the pictures in pixels, if nothing else of `size` is to be said.
            adapter: what is trained, as `AdapterSettings` names it.

        Raises:
            ValueError: the folder or a part of it is missing or unreadable, and the message names the part; or it is
                of another family than those that can be trained; or settings do not fit it.
        """
        settings = AdapterSettings(**adapter)
        check_pipeline_folder(path)
        check_adapter_files(settings)
        pipeline = load_pipeline(path, dtype, torch.float32 if settings.tune == "full" else None)
        size, memory = size or PictureSize(resolution), memory or MemorySettings()
        return cls(pipeline, settings, seed, size, memory, keep_reference)

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

    def _sizes(self, size: PictureSize) -> torch.Tensor | None:
        if family_of(self.pipeline).is_xl:
            pixels = [side * self.pipeline.vae_scale_factor for side in self.latent_shape[1:]]
            return time_ids(pixels, size.original_size, size.crops_coords_top_left, size.target_size)
        told = [size.original_size, size.target_size, any(size.crops_coords_top_left) or None]
        if any(value is not None for value in told):
            logger.warning(
                "original_size, crops_coords_top_left, target_size are ignored: only Stable Diffusion XL is told them"
            )
        return None

    @property
    def device(self) -> torch.device:
        return next(self.pipeline.unet.parameters()).device  # diffusers' own `device` walks through all modules

    def to(self, device: torch.device) -> "StableDiffusionPolicy":
        """Move what is trained there, and, unless they are offloaded, all other parts."""
        self.trained.to(device)
        if not self._memory.offload:
            for part in (self.pipeline.vae, *self._text_encoders):
                part.to(device)
        self._embeddings.clear()
        return self

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """What the network is told of B prompts.

        Each prompt is encoded once, then remembered (on the CPU, the last `REMEMBERED_PROMPTS`); and by itself, so that
        its embedding depends on nothing but the prompt. Where text encoders are trained, prompts are encoded anew every
        time, those of one call together, with gradients if they are enabled; but for `reference`, which remembers.
        """
        if self.trained.trains_text and not self._asks_reference:
            return self._encode_anew(prompts)
        return self._encode_once(prompts)

    def _encode_anew(self, prompts: Sequence[str]) -> Conditioning:
        different = list(dict.fromkeys(prompts))
        with _exact(self.device):
            embeds, pooled = encode_prompts(self.pipeline, different)
        rows = torch.tensor([different.index(prompt) for prompt in prompts], device=embeds.device)
        return self._conditioning(embeds[rows], None if pooled is None else pooled[rows], list(prompts))

    @torch.no_grad()
    def _encode_once(self, prompts: Sequence[str]) -> Conditioning:
        found = {prompt: self._embeddings.get(prompt) for prompt in prompts}
        new = [prompt for prompt, embedding in found.items() if embedding is None]
        if new:
            with borrowed(self._text_encoders, self.device), _exact(self.device):
                for prompt in new:
                    embeds, pooled = encode_prompts(self.pipeline, [prompt])
                    found[prompt] = embeds[0].cpu(), None if pooled is None else pooled[0].cpu()
        for prompt, embedding in found.items():
            self._embeddings[prompt] = embedding
            self._embeddings.move_to_end(prompt)
        while len(self._embeddings) > REMEMBERED_PROMPTS:
            self._embeddings.popitem(last=False)
        embeds, pooled = zip(*[found[prompt] for prompt in prompts], strict=True)
        return self._conditioning(torch.stack(embeds), None if pooled[0] is None else torch.stack(pooled))

    def _conditioning(
        self, embeds: torch.Tensor, pooled: torch.Tensor | None, prompts: Sequence[str] | None = None
    ) -> Conditioning:
        sizes = None if self._time_ids is None else self._time_ids.to(self.device).expand(len(embeds), -1)
        return Conditioning(embeds.to(self.device), None if pooled is None else pooled.to(self.device), sizes, prompts)

    def _without_prompt(self, like: Conditioning) -> Conditioning:
        """What guidance leads away from: the empty prompt, or zeros if the pipeline says so."""
        if self.pipeline.config.get("force_zeros_for_empty_prompt"):
            embeds, pooled = torch.zeros_like(like.embeds), torch.zeros_like(like.pooled)
            return replace(like, embeds=embeds, pooled=pooled, prompts=None)
        return replace(self.encode([""] * len(like.embeds)), kept_inputs=like.kept_inputs)

    def drop_prompts(self, conditioning: Conditioning, dropped: torch.Tensor) -> Conditioning:
        """The same with the prompts of rows for which `dropped` (B,) is true taken away, as guidance does."""
        if not dropped.any():
            return conditioning
        without, dropped = self._without_prompt(conditioning), dropped.to(self.device)
        pooled = conditioning.pooled
        return replace(
            conditioning,
            embeds=torch.where(dropped[:, None, None], without.embeds, conditioning.embeds),
            pooled=None if pooled is None else torch.where(dropped[:, None], without.pooled, pooled),
            prompts=None,
        )

    def drop_inputs(self, conditioning: Conditioning, keys: DropoutKeys | None) -> Conditioning:
        """The same with inputs of the LoRA's layers dropped for each of the B pictures, where the LoRA has dropout.

        Args:
            keys: B, what the draw for each picture depends on; None: nothing is dropped.
        """
        if keys is None or self.trained.dropout is None:
            return conditioning
        assert len(keys) == len(conditioning.embeds), "a key for each picture"
        return replace(conditioning, kept_inputs=self.trained.dropout.draw(keys).to(self.device))

    def predict(
        self,
        network: nn.Module,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
        guidance_scale: float = 1.0,
        trunks: Trunks | None = None,
    ) -> torch.Tensor:
        """The network's output, noise or v as its scheduler says, with classifier-free guidance.

        Args:
            network: `self.network` or the engine's wrapping of it.
            latents: (B, C, h, w).
            timesteps: (B,) int64.
            conditioning: of B prompts, by `encode`.
            guidance_scale: 1 costs one pass, anything else a second one for the empty prompt
                ("Classifier-free diffusion guidance", Ho & Salimans 2022).
            trunks: which pictures have the same latents, prompt and dropped inputs; the network is asked about one of
                them. None: all may differ.

        Returns:
            (B, C, h, w) float32 (float64 of a float64 network).
        """
        if trunks is None:
            return self._predict_each(network, latents, timesteps, conditioning, guidance_scale)
        rows = trunks.first
        told = latents[rows], timesteps[rows], conditioning.at(rows)
        return self._predict_each(network, *told, guidance_scale)[trunks.of]

    def _predict_each(
        self,
        network: nn.Module,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
        guidance_scale: float,
    ) -> torch.Tensor:
        dtype = self.pipeline.unet.dtype
        guided = guidance_scale != 1.0
        if self._asks_reference and conditioning.prompts is not None:
            conditioning = replace(self.encode(conditioning.prompts), time_ids=conditioning.time_ids)
        if guided:
            conditioning = conditioning.after(self._without_prompt(conditioning))
            latents, timesteps = latents.repeat(2, 1, 1, 1), timesteps.repeat(2)
        network = network if self._stand_in is None else self._stand_in
        dropout = self.trained.dropout
        with nullcontext() if dropout is None else dropout.applied(conditioning.kept_inputs):
            output = network(latents.to(dtype), timesteps, **conditioning.arguments(dtype)).sample
        output = at_least_float32(output)
        if guided:
            unconditional, conditional = output.chunk(2)
            output = unconditional + guidance_scale * (conditional - unconditional)
        return output

    @property
    def has_reference(self) -> bool:
        """Whether `reference` can be asked for."""
        return self.trained.has_reference

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within it `predict` asks the base model (`base_adapters` included), whatever network it is given, and however
        the prompts were encoded."""
        with self.trained.reference() as self._stand_in:
            self._asks_reference = True
            try:
                yield
            finally:
                self._asks_reference, self._stand_in = False, None

    def folded(self) -> AbstractContextManager[None]:
        """Within it, and without gradients, `predict` may be faster: the same function, but not to the last bit.

        Not where `rounded` is set: what the LoRA has learned so far may be less than the last bit there.
        """
        return nullcontext() if self._asks_reference or self.rounded else self.trained.folded()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, h, w) -> pictures (B, 3, H, W) float32 in [0, 1].

        Gradients flow from the pictures into `latents` if they require them. The VAE is then on the device for good: it
        must be there in the backward pass too.
        """
        if torch.is_grad_enabled() and latents.requires_grad:
            self.pipeline.vae.to(self.device)
            return self._decoded(latents)
        with torch.no_grad():
            return self._decoded(latents)

    def _decoded(self, latents: torch.Tensor) -> torch.Tensor:
        vae = self.pipeline.vae
        latents = latents / vae.config.scaling_factor
        mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
        if mean is not None and std is not None:
            latents = latents * latents.new_tensor(std).view(1, -1, 1, 1) + latents.new_tensor(mean).view(1, -1, 1, 1)
        with borrowed([vae], self.device), _exact(self.device):
            parts = latents.split(self._decoded_together(len(latents)))
            images = torch.cat([vae.decode(part.to(vae.dtype)).sample for part in parts])
        return (at_least_float32(images) / 2 + 0.5).clamp(0, 1)

    def _decoded_together(self, count: int) -> int:
        """How many of `count` pictures the VAE decodes at a time: on a CPU as many as its cache holds, about."""
        if self.device.type != "cpu":
            return count
        height, width = (side * self.pipeline.vae_scale_factor for side in self.latent_shape[1:])
        return max(1, CPU_DECODED_PIXELS // (height * width))

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Pictures (B, 3, H, W) in [0, 1] -> clean latents (B, C, h, w) float32, of which `decode` makes them again.

        The mean of the encoder's distribution: about it Stable Diffusion's has a std of next to nothing, and an
        autoencoder that was trained on means alone has one that says nothing.
        """
        vae = self.pipeline.vae
        with borrowed([vae], self.device), _exact(self.device):
            latents = vae.encode((2 * images.to(self.device) - 1).to(vae.dtype)).latent_dist.mean.float()
        mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
        if mean is not None and std is not None:
            latents = (latents - latents.new_tensor(mean).view(1, -1, 1, 1)) / latents.new_tensor(std).view(1, -1, 1, 1)
        return latents * vae.config.scaling_factor

    def save_adapter(self, folder: str | Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Write what is trained, so that plain diffusers makes the same pictures; see `Lora.save`, `FullUnet.save`.

        Args:
            state_dict: the network's, where an engine has gathered it; None: taken from the network.
        """
        self.trained.save(folder, state_dict)

    def load_adapter(self, folder: str | Path) -> None:
        """Read back what `save_adapter` wrote.

        Raises:
            ValueError: there is no such file, or one of other shapes.
        """
        self.trained.load(folder)


def _exact(device: torch.device) -> torch.autocast:
    """Frozen parts run in their own dtype, whether or not the caller runs under autocast."""
    return torch.autocast(device.type, enabled=False)
