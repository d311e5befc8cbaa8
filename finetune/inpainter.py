"""Drawing a region of a picture again, with diffusers' inpainting pipelines of Stable Diffusion 1.x, 2.x and XL.

A pipeline made for inpainting has a U-Net of 9 channels, which is told the mask and what is around it. With a
text-to-image pipeline's U-Net, of 4, the same classes blend in each step: outside the mask the latent is the picture's
own, noised to that step ("Blended latent diffusion", Avrahami et al. 2022, arXiv 2206.02779).

Shapes: N candidates, H x W pixels of the picture.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from diffusers import DiffusionPipeline, StableDiffusionInpaintPipeline, StableDiffusionXLInpaintPipeline

from finetune.region import cells, working_size
from reward.data import resize
from rl.lora import fuse_base_adapters
from rl.pipelines import FAMILIES, load_pipeline

_SIDES = 8  # diffusers' pipelines take sides that this divides
_MASK_AND_PICTURE = 5  # channels of a mask and of the picture's latent


def _for_inpainting() -> dict:
    inpainting = {
        "StableDiffusionPipeline": StableDiffusionInpaintPipeline,
        "StableDiffusionXLPipeline": StableDiffusionXLInpaintPipeline,
    }
    families = {name: replace(FAMILIES[name], pipeline=new) for name, new in inpainting.items()}
    own = {
        new.__name__: replace(
            families[name], name=f"{families[name].name} for inpainting", more_channels=(0, _MASK_AND_PICTURE)
        )
        for name, new in inpainting.items()
    }
    return families | own


INPAINTING = _for_inpainting()
"""The families whose folders work, by the class that a folder's `model_index.json` names."""


class Inpainter:
    """A pipeline that draws regions again.

    Args:
        steps: sampling steps of a whole picture; with `strength` below 1 that share of them is taken, from the picture
            noised that far.
        resolution: see `finetune.region.working_size`.
        batch_size: candidates drawn at once.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        *,
        steps: int,
        strength: float = 1.0,
        eta: float = 0.0,
        guidance_scale: float = 1.0,
        negative_prompt: str = "",
        resolution: int | None = None,
        batch_size: int = 8,
    ):
        self.pipeline, self.resolution, self.batch_size = pipeline, resolution, batch_size
        pipeline.set_progress_bar_config(disable=True)
        self.arguments = {
            "num_inference_steps": steps, "strength": strength, "eta": eta, "guidance_scale": guidance_scale,
            "output_type": "pt",
        }  # fmt: skip
        self.negative_prompt = negative_prompt

    @classmethod
    def load(
        cls, path: str, *, dtype: torch.dtype, device: str, base_adapters: Sequence[str] = (), **settings
    ) -> "Inpainter":
        """Load a pipeline folder, or the hub's name of one.

        Args:
            base_adapters: folders of LoRAs that are added to its weights, those of a text-to-image pipeline too.

        Raises:
            ValueError: it is missing, unreadable, or of another family than `INPAINTING`; or a LoRA does not fit it.
        """
        pipeline = load_pipeline(path, dtype, families=INPAINTING)
        if base_adapters:
            fuse_base_adapters(_text_to_image(pipeline), base_adapters)
        return cls(pipeline.to(device), **settings)

    def __call__(
        self, picture: torch.Tensor, share: torch.Tensor, prompt: str, generators: Sequence[torch.Generator]
    ) -> torch.Tensor:
        """Draw a region again, N times.

        Args:
            picture: (3, H, W) float in [0, 1], any size.
            share: (H, W), above 0 in the region.
            generators: N, one a candidate, of which all its noise comes.

        Returns:
            (N, 3, H, W) float32 in [0, 1] on the CPU. Outside the region it is like the picture, not the same.

        Raises:
            ValueError: what is drawn is not finite.
        """
        pipeline, size = self.pipeline, tuple(picture.shape[-2:])
        height, width = working_size(size, self.resolution, math.lcm(_SIDES, pipeline.vae_scale_factor))
        image = resize(picture[None], (height, width)).clamp(0, 1)
        mask = cells(share, (height, width), pipeline.vae_scale_factor)
        drawn = []
        for start in range(0, len(generators), self.batch_size):
            sources = list(generators[start : start + self.batch_size])
            output = pipeline(
                [prompt] * len(sources),
                negative_prompt=[self.negative_prompt] * len(sources) if self.negative_prompt else None,
                image=image.expand(len(sources), -1, -1, -1),  # each is encoded by a draw of its own noise
                mask_image=mask[None, None],
                height=height,
                width=width,
                generator=sources,
                **self.arguments,
            )
            drawn.append(output.images.float().cpu())
            if not drawn[-1].isfinite().all():
                raise ValueError(
                    f"what the pipeline draws for {prompt!r} is not finite; with model_dtype float16, try bfloat16"
                )
        return resize(torch.cat(drawn), size).clamp(0, 1)


def _text_to_image(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """The text-to-image pipeline of the very same networks, so that what is added to its weights is in both."""
    family = next(family for name, family in FAMILIES.items() if INPAINTING[name].pipeline is type(pipeline))
    # Without the scheduler, whose config it would change where it finds it outdated.
    return family.pipeline(**pipeline.components | family.left_out | {"scheduler": None})
