"""Sampling through which gradients flow: one loop for DRaFT, DRaFT-K, DRaFT-LV, AlignProp and ReFL.

The methods differ only in which part of sampling the gradient goes through (`Reach`):

    draft       all steps: "Directly fine-tuning diffusion models on differentiable rewards", Clark et al. 2023
                (arXiv 2309.17400)
    draft_k     the last K steps (the same)
    draft_lv    the last step, several times: the picture's latent is noised again with fresh noise and denoised again
                (the same, section 4.3)
    alignprop   the last K steps, K drawn anew for each update: "Aligning text-to-image diffusion models with reward
                backpropagation", Prabhudesai et al. 2023 (arXiv 2310.03739)
    refl        one late step, drawn anew for each update, whose estimate of the clean latent is the picture:
                "ImageReward", Xu et al. 2023 (arXiv 2304.05977), algorithm 1

Shapes: B pictures, D draws of each, S sampling steps, C latent channels, h x w the latent grid.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rl.keyed import keyed_generator
from rl.lora_dropout import DropoutKeys
from rl.pipelines import Conditioning
from rl.policy import StableDiffusionPolicy
from rl.sde import Schedule, kl_map, predicted_x0_and_noise, step_mean

if TYPE_CHECKING:
    from finetune.draft_config import DraftConfig

VARIANTS = ("draft", "draft_k", "draft_lv", "alignprop", "refl")


@dataclass(frozen=True)
class Reach:
    """The part of sampling that a gradient goes through.

    Attributes:
        first: the first of its steps; what comes before has no gradient.
        last: the last step that is made at all.
        estimate: the picture is what step `last` estimates the clean latent to be, not where it goes.
        draws: how often the last step is made: once as it comes, then with fresh noise.
    """

    first: int
    last: int
    estimate: bool = False
    draws: int = 1

    @property
    def steps(self) -> int:
        """Steps with gradients on the way of one picture."""
        return self.last - self.first + 1


def choose_reach(args: "DraftConfig", steps: int, update: int) -> Reach:
    """The reach of one update, the same on all ranks and for all pictures of it.

    Example, of 10 steps: `draft` 0..9; `draft_k` with `backprop_steps` 3 7..9; `alignprop` with `backprop_range` 1 10
    any of 9..9, 8..9, ..., 0..9; `refl` with `refl_steps` 3 one of 7..7, 8..8, 9..9.
    """
    end = steps - 1
    if args.variant == "draft":
        return Reach(0, end)
    if args.variant == "draft_k":
        return Reach(steps - args.backprop_steps, end)
    if args.variant == "draft_lv":
        return Reach(end, end, draws=args.lv_draws)
    generator = keyed_generator(args.seed, "reach", update)
    if args.variant == "alignprop":
        low, high = backprop_range(args, steps)
        return Reach(steps - int(torch.randint(low, high + 1, (), generator=generator)), end)
    assert args.variant == "refl", args.variant
    step = end - int(torch.randint(refl_steps(args, steps), (), generator=generator))
    return Reach(step, step, estimate=True)


def backprop_range(args: "DraftConfig", steps: int) -> tuple[int, int]:
    """Fewest and most steps that AlignProp goes back through."""
    low, high = args.backprop_range or (1, steps)
    return low, high


def refl_steps(args: "DraftConfig", steps: int) -> int:
    """From how many last steps ReFL draws its one; by default the last quarter, as in the paper."""
    return args.refl_steps or math.ceil(steps / 4)


@dataclass(frozen=True)
class Distance:
    """How far a step is from the base model's at the same latents, averaged over all latent elements.

    Attributes:
        noise: mean squared difference of the predicted noises.
        kl: KL divergence of the two steps, in nats a latent element; None for a step without noise, which has none.
    """

    noise: torch.Tensor
    kl: torch.Tensor | None


@dataclass(frozen=True)
class Drawn:
    """What sampling gives.

    Attributes:
        latents: (D * B, C, h, w), all pictures' first draws, then all their second ones, ...
        noise_distance, kl: means of `Distance` over the steps with gradients; None if they were not measured, or no
            such step has noise.
    """

    latents: torch.Tensor
    noise_distance: torch.Tensor | None = None
    kl: torch.Tensor | None = None


@dataclass(frozen=True)
class Sampler:
    """How pictures are sampled, whatever gradient goes through it.

    Attributes:
        network: `policy.network` or the engine's wrapping of it.
        guidance_scale: see `StableDiffusionPolicy.predict`.
        recompute: whether, of several steps with gradients, each is computed again in the backward pass, so that no
            more than a latent a step is kept.
        on_step: called after every step.
        precision: of the base's passes, a context: what an engine's wrapping does for the network it does not do for a
            base that is another one (`rl.full_unet`), and in other precision than the network's it is at a distance.
    """

    policy: StableDiffusionPolicy
    network: nn.Module
    schedule: Schedule
    guidance_scale: float = 1.0
    recompute: bool = True
    on_step: Callable[[], None] = lambda: None
    precision: Callable[[], AbstractContextManager] = nullcontext

    def draw(
        self,
        prompts: Sequence[str],
        noise: torch.Tensor,
        reach: Reach,
        fresh_noise: torch.Tensor | None = None,
        measure: bool = False,
        guard: bool = False,
        dropout_keys: DropoutKeys | None = None,
    ) -> Drawn:
        """Sample `reach.draws` latents for each of B prompts; the gradient goes through `reach`, if it is enabled.

        Args:
            noise: (B, S + 1, C, h, w): the initial latent, then the noise of each step.
            fresh_noise: (B, D - 1, C, h, w), for the draws after the first.
            measure: whether the distance to the base model is measured.
            guard: whether gradients flow into that distance.
            dropout_keys: see `StableDiffusionPolicy.drop_inputs`.
        """
        conditioning = self.policy.drop_inputs(self.policy.encode(prompts), dropout_keys)
        latents, distances = noise[:, 0], []
        with torch.no_grad():
            for step in range(reach.first):
                latents, _ = self._step(latents, step, conditioning, noise[:, step + 1])
                self.on_step()
        for step in range(reach.first, reach.last + 1):
            latents, distance = self._kept_small(reach)(
                latents, step, conditioning, noise[:, step + 1], reach.estimate, measure, guard
            )
            distances.append(distance)
            self.on_step()
        if reach.draws > 1:
            first, last = latents.detach(), reach.last
            rest = reach.draws - 1
            fresh = fresh_noise.transpose(0, 1).flatten(0, 1)  # ((D - 1) * B, C, h, w)
            noised = noise_again(first.repeat(rest, 1, 1, 1), fresh, last, self.schedule)
            repeated = self.policy.encode(list(prompts) * rest)
            repeated = self.policy.drop_inputs(repeated, dropout_keys and list(dropout_keys) * rest)
            ends = noise[:, last + 1].repeat(rest, 1, 1, 1)
            again, distance = self._step(noised, last, repeated, ends, measure=measure, guard=guard)
            latents = torch.cat([latents, again])
            distances += [distance] * rest
        return Drawn(latents, *_means(distances) if measure else (None, None))

    def _kept_small(self, reach: Reach) -> Callable:
        """`_step`, of which only the latents are kept for the backward pass, where that saves anything."""
        if not (self.recompute and torch.is_grad_enabled() and reach.steps > 1):
            return self._step

        def step(*inputs):
            # What an engine does around a forward it does once: the second time, the network itself is asked.
            networks = iter((self.network, self.policy.network))
            return checkpoint(
                lambda *again: replace(self, network=next(networks))._step(*again),
                *inputs,
                use_reentrant=False,
                preserve_rng_state=False,  # nothing in a step is drawn
            )

        return step

    def _step(
        self,
        latents: torch.Tensor,
        step: int,
        conditioning: Conditioning,
        noise: torch.Tensor,
        estimate: bool = False,
        measure: bool = False,
        guard: bool = False,
    ) -> tuple[torch.Tensor, Distance | None]:
        """One step from latents (B, C, h, w), or the clean latents that it estimates; its distance to the base's."""
        index = torch.full((len(latents),), step, device=latents.device)
        timesteps = self.schedule.timesteps.to(latents.device)[index]

        def predict() -> torch.Tensor:
            return self.policy.predict(self.network, latents, timesteps, conditioning, self.guidance_scale)

        base = None
        if measure:  # first: an engine prepares the backward pass for its last forward
            gradients = nullcontext() if guard and latents.requires_grad else torch.no_grad()
            with self.policy.reference(), self.precision(), gradients:
                base = predict()
        output = predict()
        mean, std = step_mean(output, latents, index, self.schedule)
        x0, predicted = self._estimates(output, latents, index)
        distance = None
        if measure:
            with nullcontext() if guard else torch.no_grad():
                base_mean, _ = step_mean(base, latents, index, self.schedule)
                _, base_predicted = self._estimates(base, latents, index)
                kl = kl_map(mean, base_mean, std).mean() if self.schedule.stds[step] > 0 else None
                distance = Distance((predicted - base_predicted).square().mean(), kl)
        return (x0 if estimate else mean + std * noise), distance

    def _estimates(self, output: torch.Tensor, latents: torch.Tensor, index: torch.Tensor):
        """The clean latent, clipped where the schedule says so, and the noise that a network's output stands for."""
        alphas = self.schedule.alphas.to(latents.device)[index].view(-1, 1, 1, 1)
        x0, noise = predicted_x0_and_noise(output, latents, alphas, self.schedule.prediction_type)
        limit = self.schedule.clip_sample_range
        return (x0 if limit is None else x0.clamp(-limit, limit)), noise


def noise_again(latents: torch.Tensor, noise: torch.Tensor, step: int, schedule: Schedule) -> torch.Tensor:
    """Where latents at the end of a step may have come from: they, (B, C, h, w), noised to the step's start.

    With alpha_s at the end (1 where it is clean) and alpha_t at the start: sqrt(a) x + sqrt(1 - a) noise, a = alpha_t /
    alpha_s, the forward process of diffusion.
    """
    share = (schedule.alphas[step] / schedule.next_alphas[step]).to(latents.device)
    return share.sqrt() * latents + (1 - share).sqrt() * noise


def _means(distances: Sequence[Distance]) -> tuple[torch.Tensor, torch.Tensor | None]:
    kls = [distance.kl for distance in distances if distance.kl is not None]
    noise = torch.stack([distance.noise for distance in distances]).mean()
    return noise, torch.stack(kls).mean() if kls else None
