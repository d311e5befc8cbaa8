"""Supervised fine-tuning on `transformers.Trainer`: pictures -> latents -> noise -> the network's error.

Shapes: B pictures of a micro-batch, C latent channels, h x w the latent grid.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import nn
from transformers import TrainerCallback

from finetune.sft_config import SftConfig
from finetune.sft_data import BucketBatches, BucketLoader, TrainingPictures, Visit, collate
from finetune.sft_loss import min_snr_weights, noised, offset_noise, sft_loss, target
from reward.feedback import RewardFn
from rl.evaluate import TRAINING_REWARD, Evaluation, HeldOut
from rl.keyed import keyed_generator
from rl.pipelines import Conditioning
from rl.policy import StableDiffusionPolicy
from rl.policy_trainer import PolicyTrainer
from rl.watch import Watch
from rl.watch_limits import MONITORS

logger = logging.getLogger(__name__)

_NAMED = 3  # sizes in a warning


@dataclass(frozen=True)
class EveryUpdate:
    """A run can stop and go on behind every update."""

    updates: int = 1


class SftTrainer(PolicyTrainer):
    """Teaches a diffusion policy to draw what it is shown.

    All noise, timesteps, dropped prompts and what a LoRA's dropout drops are keyed by the seed and the picture's visit,
    so a resumed run goes on to the same bits.

    Args:
        policy: what is trained.
        pictures: what it is shown.
        args: the settings.
        callbacks: as the Trainer's.
        eval_on: what it is judged on in the midst of training, where `args.eval_strategy` says so.

    Attributes:
        alphas: (T,) float32, cumulative alphas of all timesteps that the network knows, whichever sampling starts at.
    """

    def __init__(
        self,
        policy: StableDiffusionPolicy,
        pictures: TrainingPictures,
        args: SftConfig,
        callbacks: list[TrainerCallback] | None = None,
        eval_on: HeldOut | None = None,
    ):
        self.pictures = pictures
        self.alphas = DDIMScheduler.from_config(policy.scheduler.config).alphas_cumprod
        watch = Watch(dict.fromkeys(MONITORS), speaks=False)  # no reward is trained on, so none is gamed
        super().__init__(policy, args, args.make_schedule(policy.scheduler), EveryUpdate(), watch, callbacks, eval_on)

    def get_train_dataloader(self) -> BucketLoader:
        args = self.args
        sampler = BucketBatches(
            self.pictures.by_bucket(), args.per_device_train_batch_size, args.seed, args.process_index, args.world_size
        )
        if args.should_save:
            warn_of_rare(sampler)
        return BucketLoader(
            self.pictures, batch_sampler=sampler, collate_fn=collate, num_workers=args.dataloader_num_workers
        )

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """On the device, in their own precision; with DeepSpeed, the Trainer's own would round them to the engine's."""
        device = self.args.device
        return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch=None) -> torch.Tensor:
        self._stop_if_asked()  # the weights are those behind the last update
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch=None
    ) -> torch.Tensor:
        """Loss of one micro-batch, each picture at a timestep of its own."""
        args, policy, kind = self.args, self.policy, self.schedule.prediction_type
        clean = inputs["latents"] if "latents" in inputs else policy.encode_images(inputs["pixels"])
        drawn = self._draws(inputs["visit"], clean.shape)
        noise = offset_noise(drawn["noise"], drawn["shift"], args.noise_offset)
        alphas = self.alphas.to(clean.device)[drawn["timestep"]].float()
        conditioning = self._conditioning(inputs, drawn["drop"] < args.prompt_dropout)
        output = policy.predict(model, noised(clean, noise, alphas), drawn["timestep"], conditioning)
        weights = inputs["weight"]
        if args.snr_gamma is not None:
            weights = weights * min_snr_weights(alphas, args.snr_gamma, kind)
        loss, error = sft_loss(output, target(clean, noise, alphas, kind), weights)
        self._metrics["error"].append(error)
        return loss

    def _draws(self, visits: Sequence[Visit], shape: torch.Size) -> dict[str, torch.Tensor]:
        """What is random about these pictures: `noise` (B, C, h, w), `shift` (B, C), `timestep` and `drop`
        (B,)."""
        timesteps, rows = len(self.alphas), []
        for visit in visits:
            source = keyed_generator(self.args.seed, "sft", *visit)  # on the CPU, the same on every machine
            rows.append(
                {
                    "timestep": torch.randint(timesteps, (), generator=source),
                    "drop": torch.rand((), generator=source),
                    "shift": torch.randn(shape[1], generator=source),
                    "noise": torch.randn(shape[1:], generator=source),
                }
            )
        return {name: torch.stack([row[name] for row in rows]).to(self.args.device) for name in rows[0]}

    def watch_evaluation(self, figures: Evaluation, rewards: Mapping[str, RewardFn]) -> dict[str, float]:
        return super().watch_evaluation(figures, rewards) if TRAINING_REWARD in rewards else {}

    def _conditioning(self, inputs: dict[str, Any], dropped: torch.Tensor) -> Conditioning:
        keys = [(self.args.seed, "dropout", *visit) for visit in inputs["visit"]]
        conditioning = self.policy.drop_prompts(self.policy.encode(inputs["prompt"]), dropped)
        conditioning = self.policy.drop_inputs(conditioning, keys)
        if conditioning.time_ids is None:
            return conditioning
        return dataclasses.replace(conditioning, time_ids=inputs["time_ids"])


def warn_of_rare(sampler: BucketBatches) -> None:
    """Say which sizes have so few pictures that an epoch shows some of them three times or more."""
    rare = {bucket: times for bucket, times in sampler.most_shown.items() if times > 2}
    if not rare:
        return
    told = ", ".join(
        f"{height}x{width} ({len(sampler.buckets[height, width])}) up to {times} times"
        for (height, width), times in sorted(rare.items(), key=lambda one: -one[1])[:_NAMED]
    )
    more = f" and {len(rare) - _NAMED} sizes more" if len(rare) > _NAMED else ""
    logger.warning(
        "a batch has pictures of one size, and of these there are few, so an epoch shows them often to fill it: "
        "%s%s; train in smaller batches, or leave these pictures out",
        told,
        more,
    )
