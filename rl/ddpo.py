"""DDPO on `transformers.Trainer`: sample -> score -> advantages -> loss.

"Training Diffusion Models with Reinforcement Learning", Black et al. 2023 (arXiv 2305.13301), with group-relative
advantages and credit by place. Shapes: B rows of a micro-batch, C latent channels, h x w the latent grid.
"""

import logging
import os
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import ProgressCallback, Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import rotate_checkpoints

from reward.feedback import RewardFn
from rl.callbacks import RewardProgress, SampleGrids
from rl.checkpoints import BESIDE, MARKER, publish, read_marker, resolve_checkpoint
from rl.ddpo_config import DDPOConfig, RolloutPlan
from rl.experience import Experience, gather_experience, rollout_noise, sample_and_score
from rl.interrupt import RunInterrupted, StopSignal
from rl.losses import ppo_loss
from rl.policy import StableDiffusionPolicy
from rl.rollout import draw_prompts
from rl.sde import ddim_scheduler, kl_map, log_prob_map, make_schedule, resolve_train_steps, step_mean
from rl.timing import PhaseClock

__all__ = ["DDPOConfig", "DDPOTrainer", "RolloutPlan"]

logger = logging.getLogger(__name__)

EMPTYING = 0.6
"""Below this share of the edge energy at the start, the log warns that the policy draws less."""


class _StopAtBoundaryError(Exception):
    """Raised where the weights are those of the last rollout boundary, to leave the Trainer's loop."""


class RolloutLoader:
    """The Trainer's data: epoch k samples rollout k and yields its micro-batches, `num_iterations` times over."""

    def __init__(self, collect: Callable[[int], Iterator[dict[str, Any]]], plan: RolloutPlan, iterations: int):
        self._collect, self._length = collect, plan.micro_batches * iterations
        self._rollout = 0

    def __len__(self) -> int:
        return self._length

    def set_epoch(self, epoch: int) -> None:
        self._rollout = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self._collect(self._rollout)


class DDPOTrainer(Trainer):
    """Fine-tunes a diffusion policy so that a reward function likes its pictures better.

    An epoch is a rollout: its pictures are sampled and scored when the Trainer asks for the epoch's first micro-batch,
    and used up when the epoch ends. `RolloutPlan` gives the arithmetic. A micro-batch is one plain forward and
    backward, so every engine of the Trainer works unmodified. Checkpoints fall on rollout boundaries; as all noise and
    prompts are keyed by (seed, rollout, picture), a resumed run goes on to the same bits.

    Args:
        policy: what is trained; its network is given to the Trainer.
        reward_fn: see `reward.feedback.RewardFn`.
        args: the settings.
        prompts: training prompts.
        callbacks: as the Trainer's.

    Attributes:
        schedule, train_steps, plan, total_rollouts: what the settings come to.
        clock, train_seconds: seconds of each phase so far, and of the last `train`.
        experience: of the rollout in use; None before the first.
    """

    loss_is_scaled_for_ga = False

    def __init__(
        self,
        policy: StableDiffusionPolicy,
        reward_fn: RewardFn,
        args: DDPOConfig,
        prompts: Sequence[str],
        callbacks: list[TrainerCallback] | None = None,
    ):
        self.policy, self.reward_fn, self.prompts = policy, reward_fn, list(prompts)
        self.scheduler = ddim_scheduler(policy.scheduler, args.start_timestep)
        self.schedule = make_schedule(self.scheduler, args.num_inference_steps, args.eta)
        self.train_steps = resolve_train_steps(args.train_steps, self.schedule)
        self.plan = args.plan(len(self.train_steps))
        self.total_rollouts = args.max_steps // self.plan.updates if args.max_steps > 0 else int(args.num_train_epochs)
        self.clock = PhaseClock()
        self.train_seconds = 0.0
        self.experience: Experience | None = None
        self.edge_energy_at_start: float | None = None
        self._metrics: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._stop = StopSignal()
        self._run_dir: str | None = None
        super().__init__(model=policy.network, args=args, callbacks=callbacks)
        policy.to(args.device)
        if any(isinstance(callback, TensorBoardCallback) for callback in self.callback_handler.callbacks):
            self.add_callback(SampleGrids(self))
        if self.pop_callback(ProgressCallback):
            self.add_callback(RewardProgress)

    # ---- The algorithm ----

    def get_train_dataloader(self) -> RolloutLoader:
        return RolloutLoader(self.rollout, self.plan, self.args.num_iterations)

    def rollout(self, number: int) -> Iterator[dict[str, Any]]:
        """Sample and score rollout `number`, then yield its micro-batches; see `RolloutPlan` for their order."""
        self._stop_if_asked(everywhere=True)
        self.experience = None  # frees the last one's memory first
        self.experience = experience = self.collect(number)
        self._note(experience)
        for iteration in range(self.args.num_iterations):
            for position, (k, pictures) in enumerate(experience.micro_batches(self.args.per_device_train_batch_size)):
                self._stop_if_asked()
                yield {
                    "latents": experience.trajectory.latents[k, pictures],
                    "next_latents": experience.trajectory.next_latents[k, pictures],
                    "old_log_probs": experience.trajectory.log_probs[k, pictures],
                    "step": int(experience.trajectory.steps[k]),
                    "advantages": experience.advantages[pictures],
                    "weights": experience.weights[pictures],
                    "prompts": experience.prompts[pictures],
                    "measure_kl": self.args.beta > 0 or (iteration == 0 and position == 0),
                }

    def collect(self, number: int) -> Experience:
        """Rollout `number`: sample pictures, score them, and compare them within the groups of one prompt."""
        args, plan, rank = self.args, self.plan, self.args.process_index
        drawn = draw_prompts(self.prompts, plan.prompts, number, args.seed)
        prompts = [prompt for prompt in drawn for _ in range(args.num_generations)]
        mine = list(range(plan.pictures))[rank * plan.pictures_per_rank :][: plan.pictures_per_rank]
        size = args.per_device_rollout_batch_size or args.per_device_train_batch_size
        self.model_wrapped.train()  # as in the update: engines may treat the two modes differently
        batches = []
        for first in range(0, len(mine), size):
            pictures = mine[first : first + size]
            batches.append(
                sample_and_score(
                    self.policy,
                    self.model_wrapped,
                    self.reward_fn,
                    [prompts[picture] for picture in pictures],
                    rollout_noise(self.policy, self.schedule, args.seed, number, pictures),
                    self.schedule,
                    self.train_steps,
                    args,
                    self.clock,
                    num_samples=args.num_log_images if first == 0 else 0,
                    on_step=self._stop_if_asked,
                )
            )
        return gather_experience(batches, [prompts[picture] for picture in mine], args, self.accelerator.gather, rank)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch=None
    ) -> torch.Tensor:
        """Loss of one micro-batch: the policy is asked again how likely its step was, now with gradients."""
        args, latents = self.args, inputs["latents"]
        steps = torch.full((len(latents),), inputs["step"], device=latents.device)
        timesteps = self.schedule.timesteps.to(latents.device)[steps]
        embeds = self.policy.encode(inputs["prompts"])

        def mean_and_std() -> tuple[torch.Tensor, torch.Tensor]:
            output = self.policy.predict(model, latents, timesteps, embeds, args.guidance_scale)
            return step_mean(output, latents, steps, self.schedule)

        if inputs["measure_kl"]:
            with torch.no_grad(), self.policy.reference():
                reference_mean, _ = mean_and_std()
        mean, std = mean_and_std()
        loss, metrics = ppo_loss(
            log_prob_map(inputs["next_latents"], mean, std),
            inputs["old_log_probs"],
            inputs["advantages"],
            inputs["weights"],
            args.epsilon if args.importance_sampling_level == "image" else args.epsilon_location,
            args.importance_sampling_level,
        )
        if inputs["measure_kl"]:
            kl = kl_map(mean, reference_mean, std).mean()
            metrics["kl"] = kl.detach()
            if args.beta > 0:
                loss = loss + args.beta * kl
        for name, value in metrics.items():
            self._metrics[name].append(value)
        return loss

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """As they are: the buffer lies on the device already, and must stay float32. With DeepSpeed, the Trainer's own
        would round it to the engine's dtype, and the ratio of the first pass would no longer be 1."""
        return inputs

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch=None) -> torch.Tensor:
        with self.clock("update"):
            return super().training_step(model, inputs, num_items_in_batch)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """The Trainer's, one step ahead: a rollout costs too much to be used at the learning rate 0 of the first."""
        existing = self.lr_scheduler
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if scheduler is not existing and isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            scheduler.lr_lambdas = [lambda step, f=factor: f(step + 1) for factor in scheduler.lr_lambdas]
            for group, base, factor in zip(
                scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
            ):
                group["lr"] = base * factor(0)
            scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]
        return scheduler

    # ---- Logs ----

    def _note(self, experience: Experience) -> None:
        metrics = dict(experience.metrics)
        if self.edge_energy_at_start is None:
            self.edge_energy_at_start = metrics["edge_energy"]
        metrics["drawn"] = metrics.pop("edge_energy") / max(self.edge_energy_at_start, 1e-8)
        metrics["reward"] = metrics.pop("objective")
        if metrics["drawn"] < EMPTYING:
            logger.warning(
                "the pictures hold %.0f%% of the edges they had at the start: the policy may be learning to draw less",
                100 * metrics["drawn"],
            )
        for name, value in metrics.items():
            self._metrics[name].append(torch.tensor(value, device=self.args.device))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            for name, values in self._metrics.items():
                largest = name.endswith("_deviation")
                stacked = torch.stack(values)
                value = self.accelerator.gather((stacked.max() if largest else stacked.mean()).reshape(1))
                logs[name] = float(value.max() if largest else value.mean())
            self._metrics.clear()
            logs |= {f"seconds/{phase}": seconds for phase, seconds in self.clock.seconds.items()}
        super().log(logs, start_time)

    # ---- Stopping, checkpoints, resuming ----

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As the Trainer's, from a checkpoint that is whole (a folder, or `latest`).

        Raises:
            RunInterrupted: Ctrl-C or SIGTERM; a checkpoint was written, the message says where and how to go on.
            RewardError: the reward is not finite; the last checkpoint is kept.
            ValueError: no such checkpoint, or one of another LoRA.
        """
        checkpoint = resolve_checkpoint(resume_from_checkpoint, self.args.output_dir)
        start = time.perf_counter()
        with StopSignal() as self._stop:
            try:
                return super().train(resume_from_checkpoint=checkpoint and str(checkpoint), **kwargs)
            except _StopAtBoundaryError:
                place = self._checkpoint_place()
                if not (place / MARKER).is_file():
                    self._save_checkpoint(self.model, None)
                raise RunInterrupted(
                    f"stopped after {self.state.global_step} of {self.state.max_steps} updates; "
                    f"go on with --resume_from_checkpoint {place}"
                ) from None
            finally:
                self.train_seconds = time.perf_counter() - start
                if self.is_in_train:  # an exception: the Trainer closes bar and writer at a normal end only
                    self.callback_handler.on_train_end(self.args, self.state, self.control)

    def _stop_if_asked(self, everywhere: bool = False) -> None:
        """Leave the Trainer's loop if a stop is asked for and the weights are those of a rollout boundary.

        Args:
            everywhere: all ranks are here, and can agree; with several ranks nowhere else is looked.
        """
        requested = self._stop.requested
        if self.args.world_size > 1:
            if not everywhere:
                return
            requested = bool(self.accelerator.gather(torch.tensor([requested], device=self.args.device)).any())
        if requested and self.state.global_step % self.plan.updates == 0:
            raise _StopAtBoundaryError

    def _checkpoint_place(self) -> Path:
        return Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"

    def _get_output_dir(self, trial) -> str:
        return self._run_dir or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        """The Trainer's checkpoint, written beside its place and moved there when it is whole.

        Raises:
            OSError: it could not be written, e.g. disk full; nothing is left of it, and the previous one is whole.
        """
        place = self._checkpoint_place()
        self._run_dir = str(Path(self.args.output_dir) / BESIDE)
        marker = {
            "global_step": self.state.global_step,
            "rollouts": self.state.global_step // self.plan.updates,
            "edge_energy_at_start": self.edge_energy_at_start,
        }
        try:
            if self.args.should_save:
                shutil.rmtree(self._run_dir, ignore_errors=True)  # of a run that was killed while writing
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                publish(Path(self._run_dir) / place.name, place, marker)
                rotate_checkpoints(self.args.output_dir, self.args.save_total_limit)
        except (OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not re.search("inline_container|PytorchStreamWriter", str(error)):
                raise  # torch.save's reports of a full disk name these; any other is a bug
            raise OSError(
                f"cannot write the checkpoint {place}: {error}; earlier checkpoints in {self.args.output_dir} are whole"
            ) from error
        finally:
            if self.args.should_save:
                shutil.rmtree(self._run_dir, ignore_errors=True)
            self._run_dir = None
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Only the LoRA, as diffusers loads it, and the scheduler that samples as training did; the base is not
        copied. So every checkpoint is also a LoRA folder."""
        if self.args.should_save:
            output_dir = output_dir or self.args.output_dir
            os.makedirs(output_dir, exist_ok=True)
            self.policy.save_adapter(output_dir, state_dict)
            self.scheduler.save_pretrained(os.path.join(output_dir, "scheduler"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.policy.load_adapter(resume_from_checkpoint)

    def _init_training_state(self, *args):
        checkpoint = args[3]
        if checkpoint is not None:
            self.edge_energy_at_start = read_marker(Path(checkpoint))["edge_energy_at_start"]
        return super()._init_training_state(*args)
