"""Back-propagation through sampling on `transformers.Trainer`: sample with gradients -> reward -> its gradient.

The methods are named in `finetune.backprop`; the region constraint is `finetune.region_constraint`'s. Shapes: B
pictures of a micro-batch on this rank, D draws of each (1 but for `draft_lv`), H x W pixels.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import TrainerCallback

from finetune.backprop import Drawn, Reach, Sampler
from finetune.draft_config import DraftConfig, not_differentiable
from finetune.region_constraint import only_within, place_cost, problem_region, region_loss, region_sheet
from reward.feedback import Reward, RewardFn, check_reward
from rl.evaluate import HeldOut
from rl.experience import Samples, rollout_noise
from rl.keyed import keyed_noise
from rl.monitors import edge_energy, thumbnails
from rl.policy import StableDiffusionPolicy
from rl.policy_trainer import PolicyTrainer
from rl.rollout import check_pictures, draw_prompts
from rl.scoring import ask, features
from rl.watch import StopWhenGamed, Watch, measure_pictures, measure_rollout
from rl.watch_limits import never_told

logger = logging.getLogger(__name__)

_FEW_UPDATES, _HARDLY = 3, 0.001
"""So many updates are looked at for problem regions, and so small a share of a picture is hardly one."""


class UpdateLoader:
    """The Trainer's data: epoch k is update k, and yields its micro-batches."""

    def __init__(self, micro_batches_of: Callable[[int], Iterator[dict[str, Any]]], length: int):
        self._micro_batches_of, self._length = micro_batches_of, length
        self._update = 0

    def __len__(self) -> int:
        return self._length

    def set_epoch(self, epoch: int) -> None:
        self._update = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self._micro_batches_of(self._update)


@dataclass(frozen=True)
class Before:
    """What the base model draws in the same way from the same noise.

    Attributes:
        images: (D * B, 3, H, W).
        region: (D * B, 1, H, W), where they have a problem; see `finetune.region_constraint`.
        largest: (D * B,), what the costliest place of each costs.
    """

    images: torch.Tensor
    region: torch.Tensor
    largest: torch.Tensor


@dataclass
class RegionsSeen:
    """Whether the threshold of problem regions tells any: where all of a picture is one, or none, only the curve
    `region/share` would say that the constraint does nothing, or holds everything.

    Attributes:
        threshold: `region_threshold`.
        shares: of the pictures that regions were, and `largest`, the mean of what the costliest place of each cost, of
            the first updates.
    """

    threshold: float
    shares: list[float] = field(default_factory=list)
    largest: list[float] = field(default_factory=list)

    def note(self, share: float, largest: float) -> str:
        """Take note of an update; what is to be said of the first few when they are there, else empty."""
        if len(self.shares) == _FEW_UPDATES:
            return ""
        self.shares.append(share)
        self.largest.append(largest)
        if len(self.shares) < _FEW_UPDATES:
            return ""
        what = (
            f"region_threshold is {self.threshold:g}, and the costliest place of a picture costs "
            f"{sum(self.largest) / _FEW_UPDATES:.3g} (mean of the first {_FEW_UPDATES} updates; the curve "
            "region/largest_cost goes on)"
        )
        if max(self.shares) < _HARDLY:
            return f"no picture has a problem region, so the constraint holds all of every picture: {what}"
        if min(self.shares) > 1 - _HARDLY:
            return f"the problem regions are whole pictures, so the constraint holds nothing: {what}"
        return ""


class DraftTrainer(PolicyTrainer):
    """Fine-tunes a diffusion policy by the gradient of a differentiable reward of its pictures.

    An epoch is an update. All noise, prompts and random reaches are keyed by (seed, update, picture), so a run that is
    stopped and resumed goes on to the same bits, and several ranks draw what one would.

    Args:
        policy: what is trained; its network is given to the Trainer.
        reward_fn: differentiable; see `reward.feedback.RewardFn`.
        args: the settings.
        prompts: training prompts.
        callbacks: as the Trainer's.
        held_out: a reward that is not trained on, to see whether the trained one is gamed; see `rl.watch`.
        eval_on: what it is judged on in the midst of training, where `args.eval_strategy` says so.

    Raises:
        ValueError: the reward is not differentiable, or has no penalty maps where the region constraint needs them; no
            step that gets gradients has a KL divergence, and the guard needs one.

    Attributes:
        watch: what is known of the reward being gamed.
    """

    def __init__(
        self,
        policy: StableDiffusionPolicy,
        reward_fn: RewardFn,
        args: DraftConfig,
        prompts: Sequence[str],
        callbacks: list[TrainerCallback] | None = None,
        held_out: RewardFn | None = None,
        eval_on: HeldOut | None = None,
    ):
        self.reward_fn, self.prompts, self.held_out = reward_fn, list(prompts), held_out
        self._samples: Samples | None = None
        self._region_sheet: Image.Image | None = None
        self._regions = RegionsSeen(args.region_threshold)
        self._values: list[dict[str, torch.Tensor]] = []  # of the update's micro-batches so far
        if args.needs_reference and not policy.has_reference:
            raise ValueError("beta and region_weight need the base model; load the policy with keep_reference")
        sampler = _, schedule = args.make_schedule(policy.scheduler)
        args.check_schedule(schedule)
        off = args.never_measured_on(schedule) | never_told(reward_fn, held_out)
        watch = Watch(args.watch_limits, args.stop_on, speaks=args.should_save, off=off)
        super().__init__(policy, args, sampler, args.plan(), watch, callbacks, eval_on)
        check_reward_fn(reward_fn, policy, self.prompts[0], maps_for=args.region_weight)
        if args.activation_checkpointing:
            policy.pipeline.vae.enable_gradient_checkpointing()
        self.add_callback(StopWhenGamed(self.watch))

    # ---- The algorithm ----

    def get_train_dataloader(self) -> UpdateLoader:
        return UpdateLoader(self.update, self.plan.micro_batches)

    def update(self, number: int) -> Iterator[dict[str, Any]]:
        """The micro-batches of update `number`: which pictures of it, and their prompts."""
        self._stop_if_asked()
        plan, size, group = self.plan, self.args.per_device_train_batch_size, self.args.num_generations
        drawn = draw_prompts(self.prompts, plan.prompts, number, self.args.seed)
        start = self.args.process_index * plan.pictures_per_rank
        for first in range(start, start + plan.pictures_per_rank, size):
            pictures = list(range(first, first + size))
            yield {
                "update": number,
                "pictures": pictures,
                "prompts": [drawn[picture // group] for picture in pictures],
                "first": first == start,
            }

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch=None
    ) -> torch.Tensor:
        """Minus the reward of a micro-batch's pictures, and what holds them back."""
        args, number = self.args, inputs["update"]
        if inputs["first"]:
            self._values = []
        reach = args.reach(number)
        prompts = inputs["prompts"] * reach.draws
        noise = rollout_noise(self.policy, self.schedule, args.seed, number, inputs["pictures"])
        shape = (reach.draws - 1, *self.policy.latent_shape)
        fresh = keyed_noise(args.seed, f"{number} again", inputs["pictures"], shape, self.policy.device)
        before = self._before(model, inputs["prompts"], noise, fresh, reach) if args.region_weight > 0 else None

        # A stop in the first micro-batch leaves nothing half done; in a later one, gradients would be lost.
        on_step = self._stop_if_asked if inputs["first"] else lambda: None
        sampler = self._sampler(model, on_step=on_step)
        guard = args.beta > 0
        measure = self.policy.has_reference and (guard or inputs["first"])
        keys = [(args.seed, "dropout", number, picture) for picture in inputs["pictures"]]
        drawn = sampler.draw(inputs["prompts"], noise, reach, fresh, measure, guard, keys)
        images = self.policy.decode(drawn.latents)
        check_pictures(drawn.latents, images, prompts, f"update {number + 1}")
        felt = images
        if before is not None and args.region_gradient == "region":
            felt = only_within(images, before.region)
        reward = self._reward(felt, prompts)

        loss = -reward.objective.mean()
        if before is not None:
            constraint = region_loss(images, before.images, before.region)
            loss = loss + args.region_weight * constraint
        if guard:
            distance = drawn.noise_distance if args.distance == "noise" else drawn.kl
            loss = loss + args.beta * distance
        self._remember(inputs, images.detach(), reward.detach(), drawn, before)
        return loss

    def _sampler(self, model: nn.Module, **how) -> Sampler:
        args = self.args
        how = {"precision": self.accelerator.autocast, **how}
        return Sampler(self.policy, model, self.schedule, args.guidance_scale, args.recompute_steps, **how)

    def _reward(self, images: torch.Tensor, prompts: Sequence[str]) -> Reward:
        """Of pictures (D * B, 3, H, W). What is asked in several batches is asked again in the backward pass, so that
        the activations of one of them are kept at a time.

        Raises:
            RewardError: it is not finite, or of wrong shapes.
        """
        size = self.args.reward_batch_size
        if size is None or size >= len(prompts) or not images.requires_grad:
            return ask(self.reward_fn, images, prompts, size)
        return ask(partial(checkpoint, self.reward_fn, use_reentrant=False), images, prompts, size)

    @torch.no_grad()
    def _before(
        self, model: nn.Module, prompts: Sequence[str], noise: torch.Tensor, fresh: torch.Tensor, reach: Reach
    ) -> Before:
        with self.policy.reference(), self.accelerator.autocast():
            latents = self._sampler(model).draw(prompts, noise, reach, fresh).latents
        images = self.policy.decode(latents)
        penalties = self._reward(images, list(prompts) * reach.draws).penalties
        cost = place_cost(penalties, images.shape[-2:]).to(images.device)
        region = problem_region(cost, self.args.region_threshold, self.args.region_dilation)
        return Before(images, region, cost.amax(dim=(1, 2, 3)))

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """As they are: numbers and prompts."""
        return inputs

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch=None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:  # the update's last
            self._note()
        return loss

    # ---- Logs ----

    @torch.no_grad()
    def _remember(
        self, inputs: dict[str, Any], images: torch.Tensor, reward: Reward, drawn: Drawn, before: Before | None
    ) -> None:
        """What is to be said of a micro-batch when its update is complete; of each picture's first draw."""
        args, prompts, count = self.args, inputs["prompts"], len(inputs["prompts"])
        images, reward = images[:count], reward.first(count)
        measured = measure_pictures(images, prompts, reward, self.reward_fn, self.held_out, args.reward_batch_size)
        seen = features(self.reward_fn, images, args.reward_batch_size)
        values = {f"term/{name}": value for name, value in reward.terms.items()}
        values |= {f"penalty/{name}": value.mean(dim=(-2, -1)) for name, value in reward.penalties.items()}
        values |= {f"watched/{name}": value for name, value in measured.items()}
        values |= {"reward": reward.objective, "total": reward.total, "watched/drawn": edge_energy(images)}
        values["seen"] = thumbnails(images) if seen is None else seen
        if before is not None:
            old, where = before.images[:count], before.region[:count]
            change = (images - old).abs().mean(dim=1, keepdim=True)
            values["region/share"] = where.mean(dim=(1, 2, 3))
            values["region/change_outside"] = ((1 - where) * change).mean(dim=(1, 2, 3))
            values["region/change"] = change.mean(dim=(1, 2, 3))
            values["region/largest_cost"] = before.largest[:count]
        if inputs["first"]:
            for name in ("noise_distance", "kl"):
                if (distance := getattr(drawn, name)) is not None:
                    values[name] = distance.detach().expand(count)
            shown = min(args.num_log_images, count)
            self._samples = Samples.of(images, prompts, reward, shown) if shown else None
            self._region_sheet = region_sheet(old[:shown], where[:shown], images[:shown]) if before and shown else None
        self._values.append({name: value.to(images.device) for name, value in values.items()})

    def _note(self) -> None:
        """Log and judge what was seen in the update, over all ranks."""
        gather, first = self.accelerator.gather, self._values[0]
        found = {
            name: gather(torch.cat([values[name] for values in self._values if name in values]).contiguous())
            for name in sorted(first)
        }
        self._values = []
        seen = found.pop("seen")
        watched = {name.partition("/")[2]: found.pop(name) for name in list(found) if name.startswith("watched/")}
        means = {name: float(value.mean()) for name, value in found.items()}
        self._log_later(means)
        if "region/share" in means:
            said = self._regions.note(means["region/share"], means["region/largest_cost"])
            if said and self.args.should_save:
                logger.warning(said)
        measured = measure_rollout(watched, found["reward"], seen, self.args.num_generations, std_floor=0.0)
        measured.pop("dead_groups", None)  # pictures that are rewarded alike have a gradient as good as any other
        if "kl" in found:
            measured["kl"] = float(found["kl"].mean())
        self._observe(measured)
        if self.is_saved:
            self.watch.note_checkpoint(self.state.global_step, measured.get("held_out"))

    @property
    def samples(self) -> Samples | None:
        return self._samples

    def sheets(self) -> dict[str, Image.Image]:
        return super().sheets() | ({"region": self._region_sheet} if self._region_sheet else {})


def check_reward_fn(reward_fn: RewardFn, policy: StableDiffusionPolicy, prompt: str, maps_for: float) -> None:
    """Ask a reward about one picture of noise whether it is what back-propagation needs.

    Where every gradient is 0, as it is behind a `round`, that is only warned of: a reward may be flat at noise.

    Args:
        maps_for: the weight of the region constraint, which needs penalty maps if it is above 0.

    Raises:
        ValueError: it is not differentiable, says that it is and no gradient arrives, or has no penalty maps.
        RewardError: what it says cannot be trained on.
    """
    name = getattr(reward_fn, "__name__", type(reward_fn).__name__)
    if not getattr(reward_fn, "differentiable", False):
        raise ValueError(not_differentiable(name))
    sides = [side * policy.pipeline.vae_scale_factor for side in policy.latent_shape[1:]]
    noise = torch.rand(1, 3, *sides, generator=torch.Generator().manual_seed(0)).to(policy.device).requires_grad_()
    with torch.enable_grad():
        reward = reward_fn(noise, [prompt])
    check_reward(reward, [prompt])
    flows = reward.objective.requires_grad  # if only into weights of its own
    gradient = torch.autograd.grad(reward.objective.sum(), noise, allow_unused=True)[0] if flows else None
    if gradient is None:
        raise ValueError(
            f"the reward {name} says that it is differentiable, but no gradient flows from it into a picture: "
            "it must not detach its pictures, round them, or compute under no_grad"
        )
    if not gradient.any():
        logger.warning(
            "the gradient of the reward %s is 0 in every place of a picture of noise: if it rounds its pictures, "
            "nothing will be learned (the curve grad_norm stays at 0)",
            name,
        )
    if maps_for > 0 and not reward.penalties:
        raise ValueError(
            f"region_weight is {maps_for}, but the reward {name} has no penalty maps to find problem regions by; give "
            "its heatmaps a weight (penalty_weights of RichReward), or set region_weight to 0"
        )
