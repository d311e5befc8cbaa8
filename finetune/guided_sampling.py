"""Sampling with guidance by a reward's gradient (`finetune.guidance`), from pipelines of Stable Diffusion 1.x, 2.x, XL.

`sample` is the loop of diffusers' own pipelines with one thing more: where a step is guided, the network's estimate is
pushed before the scheduler takes the step. Without guidance it makes the pipeline's pictures. For pipelines that others
call, see `finetune.guidance_callback`.

Shapes: B pictures of H x W pixels, C latent channels, h x w the latent grid, S sampling steps.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline

from finetune.guidance import Guidance, Level, as_output, clean_and_noise, levels, noised_back
from reward.feedback import RewardError, RewardFn, check_reward
from rl.pipelines import Conditioning, family_of, time_ids

GRADIENT_SCALES = (4096.0, 64.0, 1.0)
_NO_GRADIENT = "the reward does not depend on the pictures by operations that have a gradient"
_PURE_NOISE = 1e-3  # signal to noise below which there is no signal; Stable Diffusion's own schedule ends at 0.068


class Denoiser:
    """A pipeline's network with its prompts and classifier-free guidance: latents in, the network's output out.

    Args:
        prompts, negative_prompt: B prompts, and one for all of what guidance leads away from.
        guidance_scale: 1 costs one pass, anything else a second one.
        size: height and width of the pictures in pixels.
    """

    @torch.no_grad()
    def __init__(
        self,
        pipeline: DiffusionPipeline,
        prompts: Sequence[str],
        guidance_scale: float,
        negative_prompt: str = "",
        size: tuple[int, int] | None = None,
    ):
        self.pipeline, self.guidance_scale = pipeline, guidance_scale
        self.guided = guidance_scale != 1.0
        size = size or default_size(pipeline)
        embeds, without, *pooled = pipeline.encode_prompt(
            list(prompts),
            device=pipeline.unet.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=self.guided,
            negative_prompt=[negative_prompt] * len(prompts) if negative_prompt else None,
        )
        sizes = None
        if family_of(pipeline).is_xl:
            sizes = time_ids(size).to(embeds.device).expand(len(prompts), -1)
        self.conditioning = Conditioning(embeds, pooled[0] if pooled else None, sizes)
        if self.guided:
            self.conditioning = self.conditioning.after(Conditioning(without, pooled[1] if pooled else None, sizes))

    def __call__(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """The network's output, noise or v as its scheduler says, (B, C, h, w) float32, for latents of that shape."""
        unet, scheduler = self.pipeline.unet, self.pipeline.scheduler
        both = torch.cat([latents] * 2) if self.guided else latents
        both = scheduler.scale_model_input(both, timestep).to(unet.dtype)
        output = unet(both, timestep, **self.conditioning.arguments(unet.dtype)).sample.float()
        if self.guided:
            unconditional, conditional = output.chunk(2)
            output = unconditional + self.guidance_scale * (conditional - unconditional)
        return output


def default_size(pipeline: DiffusionPipeline) -> tuple[int, int]:
    """Height and width in pixels that the pipeline was trained at."""
    side = pipeline.unet.config.sample_size
    height, width = (side, side) if isinstance(side, int) else side
    return height * pipeline.vae_scale_factor, width * pipeline.vae_scale_factor


def decode(pipeline: DiffusionPipeline, latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, h, w) -> pictures (B, 3, H, W) float32 in [0, 1]; gradients flow. See `upcast_vae`."""
    vae = pipeline.vae
    latents = latents / vae.config.scaling_factor
    mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is not None and std is not None:
        latents = latents * latents.new_tensor(std).view(1, -1, 1, 1) + latents.new_tensor(mean).view(1, -1, 1, 1)
    return (vae.decode(latents.to(vae.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)


@contextmanager
def upcast_vae(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Within it the VAE of a Stable Diffusion XL in which float16 overflows (`force_upcast`) is float32.

    As in diffusers' own decoding, which wants it back in float16. What is decoded within it must get its gradient there
    too: the backward pass needs the weights that decoded.
    """
    vae = pipeline.vae
    upcast = hasattr(pipeline, "text_encoder_2") and vae.dtype == torch.float16 and vae.config.force_upcast
    if upcast:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if upcast:
            vae.to(torch.float16)


def reward_gradient(
    predict: Callable[[torch.Tensor], torch.Tensor],
    objective: Callable[[torch.Tensor], torch.Tensor],
    latents: torch.Tensor,
    level: Level,
    prediction_type: str,
    prompts: Sequence[str],
    through_network: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient, by noisy latents, of what is said of the clean picture that the network predicts from them.

    Args:
        predict: latents (B, C, h, w) -> the network's output, of that shape.
        objective: clean latents (B, C, h, w) -> (B,).
        latents: (B, C, h, w), x.
        prompts: B, for messages.
        through_network: see `Guidance`.

    Returns:
        The network's output and the gradient, both (B, C, h, w), without a graph.

    Raises:
        RewardError: the objective does not depend on the latents, or its gradient is not finite.
    """
    with torch.enable_grad():
        point = latents.detach().requires_grad_()
        if through_network:
            output = predict(point)
            clean, _ = clean_and_noise(output, point, level, prediction_type)
        else:
            with torch.no_grad():
                output = predict(point)
                _, noise = clean_and_noise(output, point, level, prediction_type)
            clean = (point - level.sigma * noise) / level.alpha
        gradient = _scaled_gradient(objective(clean).sum(), point)
    broken = ~gradient.isfinite().flatten(1).all(dim=1)
    if broken.any():
        raise RewardError(
            f"the gradient of the reward by the picture of {prompts[int(broken.nonzero()[0])]!r} is not finite "
            f"({int(broken.sum())} of {len(latents)} pictures); in float16 try bfloat16, else mend the reward"
        )
    return output.detach(), gradient


def _scaled_gradient(value: torch.Tensor, point: torch.Tensor) -> torch.Tensor:
    """The gradient of a number by `point`, taken of a multiple of it, as mixed precision does: in float16 the gradients
    of single pixels would be rounded to zero. Powers of two change no other bit; where one is too large, a smaller."""
    if not value.requires_grad:
        raise RewardError(_NO_GRADIENT)
    for scale in GRADIENT_SCALES:
        last = scale == GRADIENT_SCALES[-1]
        (gradient,) = torch.autograd.grad(value * scale, point, retain_graph=not last, allow_unused=True)
        if gradient is None:
            raise RewardError(_NO_GRADIENT)
        if last or gradient.isfinite().all():
            return gradient / scale


@torch.no_grad()
def sample(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    generators: Sequence[torch.Generator],
    steps: int,
    reward_fn: RewardFn | None = None,
    guidance: Guidance | None = None,
    *,
    eta: float = 0.0,
    guidance_scale: float = 1.0,
    negative_prompt: str = "",
    size: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Sample one picture a prompt.

    Args:
        generators: one a picture, of which all noise comes but recurrence's: pictures with and without guidance that
            start from like generators start from the same noise, and get the same in each step.
        reward_fn: differentiable; `Reward.objective` of the picture predicted is what guidance climbs.
        guidance: None: without.
        eta: share of the noise of DDPM in each step of DDIM; other schedulers have no such setting.
        guidance_scale: of classifier-free guidance.
        size: height and width of the pictures; None: what the pipeline was trained at.

    Returns:
        Pictures (B, 3, H, W) float32 in [0, 1].

    Raises:
        ValueError: the scheduler cannot be guided, the window does not fit the steps, or a guided step starts in pure
            noise.
        RewardError: what the reward says cannot be climbed.
    """
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(steps, device=pipeline.unet.device)
    path, scales = guided_path(scheduler, guidance) if guidance else ([], [0.0] * steps)
    recurrence = guidance.recurrence if guidance else 0
    height, width = size or default_size(pipeline)
    latents = pipeline.prepare_latents(
        len(prompts), pipeline.unet.config.in_channels, height, width, torch.float32, pipeline.unet.device,
        list(generators),
    )  # fmt: skip
    # Noise that unguided pictures do not draw must not shift the draws of the others.
    again = [torch.Generator(one.device).manual_seed(one.initial_seed() ^ 0x5EED) for one in generators]
    denoiser = Denoiser(pipeline, prompts, guidance_scale, negative_prompt, (height, width))
    objective = reward_of(pipeline, reward_fn, prompts) if guidance else None

    def guided_output(latents: torch.Tensor, timestep: torch.Tensor, step: int) -> torch.Tensor:
        kind, (start, _) = scheduler.config.prediction_type, path[step]
        output, gradient = reward_gradient(
            lambda point: denoiser(point, timestep), objective, latents, start, kind, prompts,
            guidance.through_network,
        )  # fmt: skip
        _, noise = clean_and_noise(output, latents, start, kind)
        noise = noise - guidance.push(gradient, start, scales[step])
        return as_output(noise, latents, start, kind)

    with upcast_vae(pipeline):
        for step, timestep in enumerate(scheduler.timesteps):
            for left in range(recurrence if scales[step] else 0, -1, -1):
                memory = _memory(scheduler)
                output = guided_output(latents, timestep, step) if scales[step] else denoiser(latents, timestep)
                source = again if left else list(generators)
                extra = pipeline.prepare_extra_step_kwargs(source, eta)
                end = scheduler.step(output, timestep, latents, **extra, return_dict=False)[0]
                if left:
                    vars(scheduler).update(memory)
                    noise = torch.stack([torch.randn(end.shape[1:], generator=one, device=one.device) for one in again])
                    start_level, end_level = path[step]
                    end = noised_back(end, end_level, start_level, noise.to(end.device))
                latents = end
        return decode(pipeline, latents)


def reward_of(
    pipeline: DiffusionPipeline, reward_fn: RewardFn, prompts: Sequence[str]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Clean latents (B, C, h, w) -> the reward's objective (B,) for the pictures that they decode to, with a graph.

    Raises:
        RewardError: what the reward says is not finite, or does not depend on the picture.
    """

    def objective(clean: torch.Tensor) -> torch.Tensor:
        reward = reward_fn(decode(pipeline, clean), list(prompts))
        check_reward(reward, prompts)
        if not reward.objective.requires_grad:
            raise RewardError(_NO_GRADIENT)
        return reward.objective

    return objective


def guided_path(scheduler, guidance: Guidance, first: int = 0) -> tuple[list[tuple[Level, Level]], list[float]]:
    """The noise levels where each of S steps starts and ends, and their S scales, 0 before `first`.

    Raises:
        ValueError: the scheduler cannot be guided, the window does not fit the steps, or a guided step starts in pure
            noise, where x0 cannot be told from x.
    """
    path, scales = levels(scheduler), guidance.scales(len(scheduler.timesteps))
    scales[:first] = [0.0] * first
    for step, scale in enumerate(scales):
        start, _ = path[step]
        if scale and start.alpha < _PURE_NOISE * start.sigma:
            raise ValueError(
                f"step {step} starts in pure noise (zero terminal SNR), where nothing of the picture can be guided; "
                f"let the window of guided steps begin at {step + 1}"
            )
    return path, scales


def _memory(scheduler) -> dict[str, Any]:
    """What a scheduler remembers of the steps behind it, to be put back by `vars(scheduler).update`."""
    return {name: list(value) if isinstance(value, list) else value for name, value in vars(scheduler).items()}
