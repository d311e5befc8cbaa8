"""Guidance by a reward's gradient for pipelines that others call, through diffusers' `callback_on_step_end`.

    callback = GuidanceCallback(reward, prompts, Guidance(0.05))
    pipeline(prompts, callback_on_step_end=callback,
             callback_on_step_end_tensor_inputs=callback.tensor_inputs(pipeline))

A callback is called *between* steps and may change the latents only: the estimate that made the last step is not shown
to it, and the next one is not made yet. So it asks the network itself, where the next step starts, and moves the
latents there by as much as guidance would have moved that step's end: with the push p on the noise estimate, for a step
from noise level (alpha, sigma) to (alpha', sigma'),

    x  <-  x + p (sigma - sigma' alpha / alpha')

Were the noise estimate the same at both points, the step would end where `finetune.guided_sampling.sample` takes it; in
general the two agree as steps shrink (kicks and unguided steps in turn are a Lie-Trotter splitting of the guided
path). The other way, to wrap the network and the scheduler, would see all, and depend on how each pipeline calls them.

What the callback can see: the latents, the prompts' embeddings, classifier-free guidance and its rescaling, XL's sizes.
What follows from what it cannot:

- one more pass of the network a guided step than `sample` needs;
- the first step is never guided, and there is no recurrence: both would have to happen inside a step;
- what ControlNet adds is missing in its estimate of the clean picture (not in the picture that is drawn); a network
  with more inputs than latents, such as one for inpainting, or that looks at pictures, as an IP-Adapter makes it do, is
  refused;
- a step's own noise is unknown, so the kick is that of a deterministic step: with eta = 1 it guides about half as much.

Shapes: B pictures, C latent channels, h x w the latent grid.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate.hooks import CpuOffload
from diffusers import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import nn

from finetune.guidance import Guidance
from finetune.guided_sampling import guided_path, reward_gradient, reward_of, upcast_vae
from reward.feedback import RewardFn

_EMBEDDINGS = {"text_embeds": "add_text_embeds", "time_ids": "add_time_ids"}  # of Stable Diffusion XL


class GuidanceCallback:
    """What `callback_on_step_end` is set to; see the head of the file.

    Args:
        reward_fn: differentiable.
        prompts: one a picture of the call, in order: with `num_images_per_prompt`, each as often.
        guidance: without recurrence. Step 0 is not guided even if it lies in the window.
    """

    def __init__(self, reward_fn: RewardFn, prompts: Sequence[str], guidance: Guidance):
        if guidance.recurrence:
            raise ValueError(
                f"recurrence is {guidance.recurrence}: a step cannot be taken again from a callback; set it to 0, or "
                "sample with finetune.guided_sampling.sample"
            )
        if not getattr(reward_fn, "differentiable", False):
            raise ValueError("the reward is not differentiable, so its gradient cannot guide; give one that is")
        self.reward_fn, self.prompts, self.guidance = reward_fn, list(prompts), guidance

    @staticmethod
    def tensor_inputs(pipeline: DiffusionPipeline) -> list[str]:
        """What the pipeline is to hand to the callback: its `callback_on_step_end_tensor_inputs`.

        Raises:
            ValueError: the pipeline cannot hand over latents and embeddings, or its network wants more than those.
        """
        offered = getattr(pipeline, "_callback_tensor_inputs", ())
        unet = getattr(pipeline, "unet", None)
        if unet is None or not {"latents", "prompt_embeds"} <= set(offered):
            raise ValueError(
                f"{type(pipeline).__name__} cannot be guided by a callback: it hands over "
                f"{', '.join(offered) or 'none'}; what can be guided are pipelines with a U-Net and `prompt_embeds`, "
                "of Stable Diffusion 1.x, 2.x and XL"
            )
        if unet.config.in_channels != unet.config.out_channels:
            raise ValueError(
                f"the U-Net of this {type(pipeline).__name__} takes {unet.config.in_channels} channels, of which a "
                "callback sees the latent only; use a text-to-image network"
            )
        if unet.config.time_cond_proj_dim is not None:
            raise ValueError(
                f"the U-Net of this {type(pipeline).__name__} is told the guidance scale, as those distilled to few "
                "steps are, which a callback does not see; use one that is not distilled"
            )
        if unet.config.encoder_hid_dim_type is not None:
            raise ValueError(
                f"the U-Net of this {type(pipeline).__name__} is given more than the prompt "
                f"({unet.config.encoder_hid_dim_type}, as by an IP-Adapter), which a callback does not see; unload it"
            )
        return [name for name in ("latents", "prompt_embeds", *_EMBEDDINGS.values()) if name in offered]

    def __call__(
        self, pipeline: DiffusionPipeline, step: int, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Move the latents (B, C, h, w) behind a step, to guide the next one.

        Args:
            step: counted by the pipeline, which may begin late (image to image); the timestep says which it is.
            timestep: of the step that was taken.
            tensors: what `tensor_inputs` asked for.
        """
        scheduler, latents = pipeline.scheduler, tensors["latents"]
        if self.guidance.through_network and _is_taken_away(pipeline.unet):
            raise ValueError(
                "the pipeline takes its U-Net off the GPU while its VAE decodes (enable_model_cpu_offload), but the "
                "gradient flows through both; leave the offloading out, or guide with through_network=False"
            )
        if len(latents) != len(self.prompts):
            raise ValueError(f"{len(latents)} pictures are drawn, but the callback has {len(self.prompts)} prompts")
        path, scales = guided_path(scheduler, self.guidance, first=1)
        following = following_step(scheduler, timestep)
        if following == len(scales) or not scales[following]:
            return {}
        start, end = path[following]
        with _frozen(pipeline.unet, pipeline.vae), upcast_vae(pipeline):
            _, gradient = reward_gradient(
                lambda point: _predict(pipeline, point, scheduler.timesteps[following], tensors),
                reward_of(pipeline, self.reward_fn, self.prompts),
                latents.float(),
                start,
                scheduler.config.prediction_type,
                self.prompts,
                self.guidance.through_network,
            )
        push = self.guidance.push(gradient, start, scales[following])
        kick = push * (start.sigma - end.sigma * start.alpha / end.alpha)
        return {"latents": (latents + kick).to(latents.dtype)}


@contextmanager
def _frozen(*modules: nn.Module) -> Iterator[None]:
    """Within it no weight requires a gradient, as all do where a pipeline is just loaded: autograd would keep what goes
    into each layer for gradients that nobody asks for."""
    weights = [weight for module in modules for weight in module.parameters() if weight.requires_grad]
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)


def _is_taken_away(module: nn.Module) -> bool:
    """Whether accelerate moves it to the CPU when others work, by one of its two ways of offloading."""
    hook = getattr(module, "_hf_hook", None)
    return isinstance(hook, CpuOffload) or getattr(hook, "offload", False)


def following_step(scheduler, timestep: torch.Tensor) -> int:
    """The place of the step behind the one that a scheduler has just taken at `timestep`."""
    counted = getattr(scheduler, "step_index", None)  # one that counts may have a timestep twice, as Karras' sigmas do
    return int((scheduler.timesteps == timestep).nonzero()[0]) + 1 if counted is None else counted


def _predict(
    pipeline: DiffusionPipeline, latents: torch.Tensor, timestep: torch.Tensor, tensors: dict[str, torch.Tensor]
) -> torch.Tensor:
    """The network's output (B, C, h, w) float32, as the pipeline would ask for it next."""
    guided, unet = pipeline.do_classifier_free_guidance, pipeline.unet
    both = torch.cat([latents] * 2) if guided else latents
    both = pipeline.scheduler.scale_model_input(both, timestep).to(unet.dtype)
    arguments = {"encoder_hidden_states": tensors["prompt_embeds"]}
    if _EMBEDDINGS["text_embeds"] in tensors:
        arguments["added_cond_kwargs"] = {name: tensors[place] for name, place in _EMBEDDINGS.items()}
    arguments["cross_attention_kwargs"] = getattr(pipeline, "cross_attention_kwargs", None)
    output = unet(both, timestep, **arguments).sample.float()
    if not guided:
        return output
    without, conditional = output.chunk(2)
    output = without + pipeline.guidance_scale * (conditional - without)
    rescale = getattr(pipeline, "guidance_rescale", 0.0)
    return rescale_noise_cfg(output, conditional, rescale) if rescale > 0 else output
