"""DDPO on `transformers.Trainer`: sample -> score -> advantages -> loss.

"Training Diffusion Models with Reinforcement Learning", Black et al. 2023 (arXiv 2305.13301), with group-relative
advantages and credit by place. Shapes: B rows of a micro-batch, C latent channels, h x w the latent grid.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from reward.feedback import RewardFn
from rl.advantages import PromptStatistics
from rl.ddpo_config import DDPOConfig
from rl.evaluate import HeldOut
from rl.experience import (
    Experience,
    Samples,
    check_reward_fits_credit,
    gather_experience,
    rollout_noise,
    sample_and_score,
)
from rl.gradient_sketch import GradientSketch
from rl.keyed import keyed_generator
from rl.lora_dropout import DropoutKeys
from rl.losses import ppo_loss
from rl.policy import StableDiffusionPolicy
from rl.policy_trainer import PolicyTrainer
from rl.rollout import draw_prompts, shared_places
from rl.rollout_plan import RolloutPlan, passes
from rl.run_state import RunState
from rl.sde import Schedule, draw_steps, kl_map, log_prob_map, step_mean, step_weights
from rl.step_probe import StepProbe
from rl.trunks import Trunks
from rl.watch import StopWhenGamed, Watch
from rl.watch_limits import never_measured, never_told

__all__ = ["DDPOConfig", "DDPOTrainer", "RolloutPlan"]


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


class DDPOTrainer(PolicyTrainer):
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
        held_out: a reward that is not trained on, to see whether the trained one is gamed; see `rl.watch`.
        eval_on: what it is judged on in the midst of training, where `args.eval_strategy` says so.

    Attributes:
        schedule, plan, total_rollouts: what the settings come to.
        rollout_schedule: the sampling steps of the rollout in use; `schedule`, of the first, where the window slides.
        train_steps: the steps trained, or those a rollout draws its own from; with `auto`, those of the next rollout
            as soon as this one is measured; where the window slides, the first rollout's.
        clock, train_seconds: seconds of each phase so far, and of `train`; of the whole run, also where it goes on.
        experience: of the rollout in use; None before the first.
        watch: what is known of the reward being gamed.
    """

    def __init__(
        self,
        policy: StableDiffusionPolicy,
        reward_fn: RewardFn,
        args: DDPOConfig,
        prompts: Sequence[str],
        callbacks: list[TrainerCallback] | None = None,
        held_out: RewardFn | None = None,
        eval_on: HeldOut | None = None,
    ):
        self.reward_fn, self.prompts, self.held_out = reward_fn, list(prompts), held_out
        sampler = _, schedule = args.make_schedule(policy.scheduler)
        steps = self.train_steps = args.trained_steps(schedule)
        plan = args.plan(args.steps_per_rollout(schedule))
        self.statistics = PromptStatistics(args.prompt_buffer_size, args.prompt_min_count)
        self.probe: StepProbe | None = None
        self._sketch: GradientSketch | None = None
        self._sketches: dict[tuple[int, int], torch.Tensor] = {}  # of the rollout in use: (chunk, k) -> (d,)
        self._heard = 0  # micro-batches of it
        self.total_rollouts = args.max_steps // plan.updates if args.max_steps > 0 else int(args.num_train_epochs)
        self.experience: Experience | None = None
        self._kls: list[torch.Tensor] | None = None  # of a rollout's first pictures, a trained step; None: not awaited
        self._noted = True
        self._shared: list[int] = []  # draws of noise that the pictures of a group of the rollout in use share
        self._drawn_from: int | None = None  # the checkpoint that drew the rollout in use, by its updates
        self._begun: tuple[int, RunState] | None = None  # the rollout in use, and what was remembered before it
        if args.beta > 0 and not policy.has_reference:
            raise ValueError(f"beta is {args.beta}, but the policy keeps no base model; load it with keep_reference")
        evaluates = args.eval_strategy != "no"
        off = never_measured(args.num_generations, policy.has_reference, evaluates) | never_told(reward_fn, held_out)
        has_limit = args.watch_limits.get("kl", True) is not None
        self._measures_kl = policy.has_reference and (has_limit or args.beta > 0)
        if policy.has_reference and not self._measures_kl:
            off["kl"] = "it has no limit, and would cost passes of the network"
        watch = Watch(args.watch_limits, args.stop_on, speaks=args.should_save, off=off)
        self.rollout_schedule = schedule
        super().__init__(policy, args, sampler, plan, watch, callbacks, eval_on)
        self.add_callback(StopWhenGamed(self.watch))
        check_reward_fits_credit(policy, reward_fn, args, self.prompts[0])
        if args.probed_steps is not None:
            chunks = self.plan.pictures / args.chunk_size * args.num_iterations / self.plan.updates
            cost = partial(passes, args, steps=len(schedule))
            self.probe = StepProbe(steps, args.probed_steps, chunks, cost)
            self.train_steps = self.probe.window
            self._sketch = GradientSketch(self.trained_weights())

    @property
    def samples(self) -> Samples | None:
        return self.experience and self.experience.samples

    # ---- The algorithm ----

    def get_train_dataloader(self) -> RolloutLoader:
        return RolloutLoader(self.rollout, self.plan, self.args.num_iterations)

    def rollout(self, number: int) -> Iterator[dict[str, Any]]:
        """Sample and score rollout `number`, then yield its micro-batches; see `RolloutPlan` for their order."""
        self._stop_if_asked()
        self._begun = (number, self._memory())
        self.experience = None  # frees the last one's memory first
        self.experience = experience = self.collect(number)
        self._noted, self._sketches, self._heard = False, {}, 0
        trainable = self._trainable(number)
        loss_weights = step_weights(self.args.timestep_weighting, self.rollout_schedule, trainable)
        parting, steps = min(experience.trajectory.steps.tolist()), len(experience.trajectory.steps)
        for iteration in range(self.args.num_iterations):
            for position, (k, pictures) in enumerate(experience.micro_batches(self.args.per_device_train_batch_size)):
                self._stop_if_asked()
                step = int(experience.trajectory.steps[k])
                yield {
                    "latents": experience.trajectory.latents[k, pictures],
                    "next_latents": experience.trajectory.next_latents[k, pictures],
                    "old_log_probs": experience.trajectory.log_probs[k, pictures],
                    "step": step,
                    "loss_weight": float(loss_weights[trainable.index(step)]),
                    "advantages": experience.advantages[pictures],
                    "weights": experience.weights[pictures],
                    "prompts": experience.prompts[pictures],
                    "dropout_keys": self.dropout_keys(number, self._mine[pictures]),
                    "trunks": self.trunks(self._mine[pictures]) if step == parting else None,
                    "measured_as": (pictures.start // self.args.chunk_size, k) if iteration == 0 else None,
                    "measure_kl": self._measures_kl
                    and (self.args.beta > 0 or (iteration == 0 and position < steps)),  # the first pictures, all steps
                }

    def collect(self, number: int) -> Experience:
        """Rollout `number`: sample pictures, score them, and compare them within the groups of one prompt."""
        args, plan, rank, mine = self.args, self.plan, self.args.process_index, self._mine
        drawn = draw_prompts(self.prompts, plan.prompts, number, args.seed)
        prompts = [prompt for prompt in drawn for _ in range(args.num_generations)]
        size = args.per_device_rollout_batch_size or args.per_device_train_batch_size
        schedule = self.rollout_schedule = self._schedule_of(number)
        steps = self._steps_of(number)
        shared = self._shared = shared_places(args.share_noise, steps, len(schedule))
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
                    rollout_noise(self.policy, schedule, args.seed, number, pictures, args.num_generations, shared),
                    schedule,
                    steps,
                    args,
                    self.clock,
                    number,
                    num_samples=max(0, args.num_log_images - first),
                    on_step=self._stop_if_asked,
                    held_out=self.held_out,
                    trunks=self.trunks(pictures),
                    dropout_keys=self.dropout_keys(number, pictures),
                )
            )
        return gather_experience(batches, prompts, args, self.accelerator.gather, rank, self.statistics)

    @property
    def _mine(self) -> range:
        """The numbers of this rank's pictures in a rollout."""
        count = self.plan.pictures_per_rank
        return range(self.args.process_index * count, (self.args.process_index + 1) * count)

    def trunks(self, pictures: Sequence[int]) -> Trunks | None:
        """Which of these pictures of a rollout are one up to its first trained step; None: none.

        Credit by words looks at the attention of every picture, so there each is drawn by itself.
        """
        if self.args.share_noise == "none" or self.args.credit == "words":
            return None
        return Trunks.of_groups(pictures, self.args.num_generations, self.policy.device)

    def dropout_keys(self, number: int, pictures: Sequence[int]) -> DropoutKeys:
        """What the LoRA's dropout for these pictures of a rollout is drawn by.

        Pictures of a group drop the same: where they are compared with each other, what that does to the reward is no
        picture's merit; and where they share noise, they remain one.
        """
        return [(self.args.seed, "dropout", number, picture // self.args.num_generations) for picture in pictures]

    def _steps_of(self, number: int) -> tuple[int, ...]:
        """The steps of which rollout `number` keeps what training needs."""
        steps = self._trainable(number)
        if self.args.timestep_fraction < 1:
            generator = keyed_generator(self.args.seed, "timesteps", number)
            return draw_steps(steps, self.args.timestep_fraction, generator)
        return steps

    # ---- Which steps are trained ----

    def _schedule_of(self, number: int) -> Schedule:
        slides = self.args.sde_window_interval is not None
        return self.args.schedule_of(self.scheduler, number) if slides else self.schedule

    def _trainable(self, number: int) -> tuple[int, ...]:
        """The steps that rollout `number` trains, or draws its own from."""
        slides = self.args.sde_window_interval is not None
        return self.args.trained_steps(self._schedule_of(number)) if slides else self.train_steps

    def _measured(self, place: tuple[int, int], sketch: torch.Tensor) -> None:
        """Note a micro-batch's gradient (d,), of this chunk and step; behind the last one, choose the steps to train
        next."""
        self._sketches[place] = self._sketches.get(place, 0) + sketch
        self._heard += 1
        if self._heard < self.plan.micro_batches:
            return
        mine = torch.stack([self._sketches[place] for place in sorted(self._sketches)])
        sketches = self.accelerator.gather(mine.unflatten(0, (-1, self.plan.train_steps)))
        length = self._sketch.renew(partial(self.accelerator.reduce, reduction="mean"))
        ratios = self.probe.learn(sketches, self.experience.metrics["group_std"] * length)
        self._log_later({f"probe/snr_step_{step}": ratio for step, ratio in ratios.items()})
        self.train_steps = self.probe.window

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch=None
    ) -> torch.Tensor:
        """Loss of one micro-batch: the policy is asked again how likely its step was, now with gradients."""
        args, latents = self.args, inputs["latents"]
        steps = torch.full((len(latents),), inputs["step"], device=latents.device)
        timesteps = self.rollout_schedule.timesteps.to(latents.device)[steps]
        conditioning = self.policy.drop_inputs(self.policy.encode(inputs["prompts"]), inputs["dropout_keys"])
        guidance_scale = args.guidance_scale if args.train_guidance else 1.0

        def mean_and_std() -> tuple[torch.Tensor, torch.Tensor]:
            output = self.policy.predict(model, latents, timesteps, conditioning, guidance_scale, inputs["trunks"])
            return step_mean(output, latents, steps, self.rollout_schedule)

        if inputs["measure_kl"]:
            with torch.no_grad(), self.policy.reference(), self.accelerator.autocast():
                reference_mean, _ = mean_and_std()
        mean, std = mean_and_std()
        loss, metrics = ppo_loss(
            log_prob_map(inputs["next_latents"], mean, std),
            inputs["old_log_probs"],
            inputs["advantages"],
            inputs["weights"],
            args.epsilon if args.importance_sampling_level == "image" else args.epsilon_location,
            args.importance_sampling_level,
            channels=latents.shape[1],
            epsilon_high=args.epsilon_high,
        )
        loss = inputs["loss_weight"] * loss
        if inputs["measure_kl"]:
            kl = kl_map(mean, reference_mean, std).mean()
            metrics["kl"] = kl.detach()
            self._watch_kl(kl.detach())
            if args.beta > 0:
                loss = loss + args.beta * kl
        if self._sketch is not None and inputs.get("measured_as") is not None:
            self._sketch.follow(loss)
        for name, value in metrics.items():
            self._metrics[name].append(value)
        return loss

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """As they are: the buffer lies on the device already, and must stay float32. With DeepSpeed, the Trainer's own
        would round it to the engine's dtype, and the ratio of the first pass would no longer be 1."""
        return inputs

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch=None) -> torch.Tensor:
        if not self._noted:  # not before: a stop may still undo the rollout
            self._note(self.experience)
        if self._sketch is None or inputs["measured_as"] is None:
            return super().training_step(model, inputs, num_items_in_batch)
        with self._sketch.listening() as sketch:
            loss = super().training_step(model, inputs, num_items_in_batch)
        with self.clock("update"):
            self._measured(inputs["measured_as"], sketch)
        return loss

    # ---- Logs ----

    def _watch_kl(self, kl: torch.Tensor) -> None:
        """Once a rollout, what its first pictures on each rank say: one micro-batch of every trained step.

        Their mean is judged. By the chain rule it is the divergence of the whole of what is trained, a latent element
        and step, whatever the steps; the largest would be that of the last step, whose noise is so small that little
        which an eye sees is far from it. With fewer micro-batches an update than steps, later ones are of the policy as
        an update of this rollout has left it.
        """
        if self._kls is None:
            return
        self._kls.append(kl)
        if len(self._kls) == len(self.experience.trajectory.steps):
            mean, self._kls = torch.stack(self._kls).mean(), None
            self._observe({"kl": float(self.accelerator.gather(mean.reshape(1)).mean())})
            self._note_checkpoint()

    def _note(self, experience: Experience) -> None:
        metrics = dict(experience.metrics)
        metrics["reward"] = metrics.pop("objective")
        if self.args.sde_window_interval is not None:
            metrics["sde_window"] = float(self.rollout_schedule.stds.nonzero()[0])
        if self.probe is not None:
            trained = experience.trajectory.steps.tolist()
            metrics |= {f"probe/trained_step_{step}": float(step in trained) for step in self.probe.steps}
        self._log_later(metrics)
        self._noted, self._kls = True, []
        self._observe(experience.measures, self._shared)
        self._drawn_from = self.state.global_step if self.is_saved else None
        if not self._measures_kl:  # else the last monitor, KL, is still to come
            self._note_checkpoint()

    def _note_checkpoint(self) -> None:
        if self._drawn_from is not None:
            self.watch.note_checkpoint(self._drawn_from, self.experience.measures.get("held_out"))

    # ---- What is kept ----

    def _memory(self) -> RunState:
        """What rollouts, not updates, change."""
        facts = {
            "train_steps": list(self.train_steps),
            "probed": self.probe and list(self.probe.steps),
            "prompt_rewards": self.statistics.state(),
            "watch": self.watch.state(),
        }
        if self.probe is None:
            return RunState(facts)
        tensors = {f"sketch.{name}": tensor for name, tensor in self._sketch.state().items()}
        return RunState(facts | {"measured": self.probe.state(), "chunk_size": self.args.chunk_size}, tensors)

    def _boundary_state(self) -> RunState:
        """Of the boundary that the weights are at: a rollout of which no update was made is gone through again."""
        state = self._memory()
        if self._begun is not None and self.state.global_step == self._begun[0] * self.plan.updates:
            state = self._begun[1]
        return self._with_average(state)

    def _load_state(self, state: RunState) -> None:
        super()._load_state(state)
        self.statistics.load(state.facts["prompt_rewards"])
        if self.probe is not None:  # else it trains the steps that it is told to
            if state.facts.get("probed", list(self.probe.steps)) != list(self.probe.steps):
                raise ValueError(
                    f"the checkpoint has measured the steps {state.facts['probed']}, and this run is to choose from "
                    f"{list(self.probe.steps)}; give num_inference_steps, eta and sde_window the values they had"
                )
            same = state.facts.get("chunk_size") == self.args.chunk_size  # else it was measured in another unit
            self.probe.load(state.facts["measured"] if same else [], tuple(state.facts["train_steps"]))
            self.train_steps = self.probe.window
            self._sketch.load(state.part("sketch"))
