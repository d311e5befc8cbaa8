"""What every training of a diffusion policy shares, whatever its loss: guards, logs, files."""

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from diffusers import DDIMScheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import nn
from transformers import ProgressCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.integrations.deepspeed import deepspeed_load_checkpoint

from reward.feedback import RewardFn
from rl.callbacks import (
    AverageWeights,
    EvaluationsBeforeCheckpoints,
    ForgetTheRunBefore,
    GuardedCurves,
    ResumedLogs,
    RewardProgress,
    SampleGrids,
    StopWhenOutOfTime,
    show,
)
from rl.checkpoints import SAMPLES, explained, is_complete, newest_whole, written_beside
from rl.evaluate import TRAINING_REWARD, Evaluation, HeldOut, evaluate, look
from rl.experience import Samples
from rl.going_on import AVERAGE_UPDATES
from rl.pictures import sample_sheet
from rl.policy import StableDiffusionPolicy
from rl.policy_config import PolicyConfig
from rl.resumable import Boundaries, ResumableTrainer
from rl.rollout import DivergedError
from rl.run_state import RunState
from rl.sde import Schedule
from rl.watch import Watch

logger = logging.getLogger(__name__)

Judged = tuple[Evaluation, Samples]
"""What an evaluation gives: figures, and a few pictures to look at."""


class PolicyTrainer(ResumableTrainer):
    """Trains the network of a policy. A subclass says on what (`get_train_dataloader`) and by which loss.

    Args:
        policy: what is trained; its network is given to the Trainer.
        args: the settings.
        sampler: what `args.make_schedule` makes of the policy's scheduler.
        plan: how many updates lie between two boundaries.
        watch: what is known of the reward being gamed; one that is shown nothing where there is no reward.
        callbacks: as the Trainer's.
        eval_on: what the policy is judged on where `args.eval_strategy` says so.

    Raises:
        ValueError: `args.eval_strategy` says so, and there is no `eval_on`.

    Attributes:
        scheduler, schedule: what samples as the settings say, and its steps.
        average: the moving average of the weights, None if none is kept.
        left: the checkpoint whose weights were taken up in the end, in place of the last update's; else None.
        clock, train_seconds: see `ResumableTrainer`.
    """

    loss_is_scaled_for_ga = False
    held_out: RewardFn | None = None
    """A reward that is not trained on, of those it is evaluated by, to see whether the trained one is gamed."""

    def __init__(
        self,
        policy: StableDiffusionPolicy,
        args: PolicyConfig,
        sampler: tuple[DDIMScheduler, Schedule],
        plan: Boundaries,
        watch: Watch,
        callbacks: list[TrainerCallback] | None = None,
        eval_on: HeldOut | None = None,
    ):
        if args.eval_strategy != "no" and eval_on is None:
            raise ValueError(
                f"eval_strategy is {args.eval_strategy.value}, but there are no held-out prompts to evaluate on"
            )
        self.policy, self.eval_on = policy, eval_on
        policy.rounded = args.bf16 or args.fp16  # autocast begins within the network's own call, where none can ask
        self.scheduler, self.schedule = sampler
        self.average: EMAModel | None = None
        self.left: Path | None = None
        self._metrics: dict[str, list[torch.Tensor]] = defaultdict(list)
        prompts = None if eval_on is None else list(eval_on.prompts)
        super().__init__(plan, watch, model=policy.network, args=args, eval_dataset=prompts, callbacks=callbacks)
        policy.to(args.device)
        self.add_callback(ForgetTheRunBefore)
        self.add_callback(EvaluationsBeforeCheckpoints(self))
        self.add_callback(ResumedLogs(self))
        self.add_callback(StopWhenOutOfTime(self))
        if self.pop_callback(TensorBoardCallback):
            self.add_callback(GuardedCurves)
            self.add_callback(SampleGrids(self))
        if self.pop_callback(ProgressCallback):
            self.add_callback(RewardProgress)
        if args.ema_decay is not None:
            # diffusers would begin with a smaller decay, 0.9 after 80 updates: more than many runs have
            self.average = EMAModel(self.trained_weights(), decay=args.ema_decay, min_decay=args.ema_decay)
            self.add_callback(AverageWeights(self))

    @property
    def samples(self) -> Samples | None:
        """A few pictures of the last update to look at, if there are any."""
        return None

    def sheets(self) -> dict[str, Image.Image]:
        """What TensorBoard shows of the last update: name -> image. Here the samples, with overlays of penalties."""
        return {"samples": sample_sheet(self.samples)} if self.samples else {}

    # ---- Evaluation ----

    def judge(self, held_out: HeldOut, on_batch: Callable[[int], None] = lambda pictures: None) -> Judged:
        """What the policy, as it is, draws for held-out prompts; on all ranks.

        Args:
            on_batch: called after each batch with this rank's number of pictures.
        """
        args, accelerator = self.args, self.accelerator
        how = {
            "generations": held_out.generations,
            "seed": held_out.seed,
            "guidance_scale": args.guidance_scale,
            "batch_size": args.per_device_eval_batch_size,
            "reward_batch_size": args.reward_batch_size,
        }
        with accelerator.autocast():
            figures = evaluate(
                self.policy,
                self.schedule,
                held_out.prompts,
                held_out.rewards,
                rank=args.process_index,
                world_size=args.world_size,
                gather=accelerator.gather,
                on_batch=on_batch,
                **how,
            )
            reward_fn, count = held_out.rewards.get(TRAINING_REWARD), held_out.num_samples
            samples = look(self.policy, self.schedule, held_out.prompts, reward_fn, count=count, **how)
        return figures, samples

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """What the Trainer calls in the midst of training: curves `eval/...`, and a sheet in the folder `samples`, in
        TensorBoard `evaluation`. The weights judged are those that the run would leave behind here."""
        with self.clock("evaluation"), self._weights_to_leave():
            figures, samples = self.judge(self.eval_on)
        if self.args.should_save:
            place = f"{SAMPLES}/rollout-{self.state.global_step // self.plan.updates:06}.png"
            with explained(place, self.args.output_dir), written_beside(Path(self.args.output_dir)) as beside:
                (beside / SAMPLES).mkdir()
                (sheet := sample_sheet(samples)).save(beside / place)
            show(self, {"evaluation": sheet})
        curves = figures.curves()
        watched = self.watch_evaluation(figures, self.eval_on.rewards)
        self.log(curves | {f"watch/{name}": value for name, value in watched.items()})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, curves)
        return curves

    def watch_evaluation(self, figures: Evaluation, rewards: Mapping[str, RewardFn]) -> dict[str, float]:
        """Let the monitors see an evaluation, see `Watch.observe_evaluation`; on all ranks.

        Args:
            rewards: name -> reward function, of the evaluation.
        """
        return self.watch.observe_evaluation(self.seen_by_watch(figures, rewards), self.state.global_step)

    def seen_by_watch(self, figures: Evaluation, rewards: Mapping[str, RewardFn]) -> dict[str, list[float]]:
        """What the monitors want to know of an evaluation: `reward` and, if there is one, `held_out` -> P means."""
        seen = {"reward": figures.values[TRAINING_REWARD]}
        for name, one in rewards.items():
            if one is self.held_out and name != TRAINING_REWARD:
                seen["held_out"] = figures.values[f"{name}.total"]
        return {name: values.mean(dim=1).tolist() for name, values in seen.items()}

    @contextmanager
    def _weights_to_leave(self) -> Iterator[None]:
        """Inside, the weights are their moving average, if one is kept."""
        if self.average is None:
            yield
            return
        weights = self.trained_weights()
        self.average.store(weights)
        self.average.copy_to(weights)
        try:
            yield
        finally:
            self.average.restore(weights)

    # ---- Guards ----

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch=None) -> torch.Tensor:
        with self.clock("update"):
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._check_update("loss", float(loss))
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm=None) -> float | None:
        grad_norm = super()._get_grad_norm(model, grad_norm)
        # In float16, gradients do overflow now and then; the loss scaler sees it, skips the update and adapts.
        if grad_norm is not None and not self.args.fp16:
            self._check_update("norm of the gradient", float(grad_norm))
        return grad_norm

    def _check_update(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            self._diverged(f"in update {self.state.global_step + 1} the {what} is {value}")

    def _check_weights(self) -> None:
        # Of a weight that ZeRO-3 has sharded, a rank sees its own part only.
        parts = [getattr(weight, "ds_tensor", weight) for weight in self.trained_weights()]
        broken = torch.tensor([not all(bool(part.isfinite().all()) for part in parts)], device=self.args.device)
        if bool(self.accelerator.gather(broken).any()):
            self._diverged(f"after update {self.state.global_step} its weights are not finite")

    def _diverged(self, how: str) -> NoReturn:
        newest = newest_whole(self.args.output_dir, contents=True)
        raise DivergedError(
            f"the policy diverged: {how}; no checkpoint is made of it, {newest}; "
            "go on from there with a smaller learning_rate"
        )

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """The Trainer's, one step ahead: a rollout costs too much to be used at the learning rate 0 of the first. Nor
        at that of the last, so a decay is spread over one update more."""
        existing = self.lr_scheduler
        scheduler = super().create_scheduler(num_training_steps + 1, optimizer)
        if scheduler is not existing and isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            scheduler.lr_lambdas = [lambda step, f=factor: f(step + 1) for factor in scheduler.lr_lambdas]
            for group, base, factor in zip(
                scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
            ):
                group["lr"] = base * factor(0)
            scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]
        return scheduler

    # ---- Logs ----

    def _observe(self, measured: dict[str, float], shared: Sequence[int] = ()) -> None:
        self._log_later({f"watch/{name}": value for name, value in self.watch.observe(measured, shared).items()})

    def _log_later(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._metrics[name].append(torch.tensor(value, device=self.args.device))

    def forget_metrics(self) -> None:
        """Drop what has been noted since the last log."""
        self._metrics.clear()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            for name, values in self._metrics.items():
                largest = name.endswith("_deviation")
                stacked = torch.stack(values)
                value = self.accelerator.gather((stacked.max() if largest else stacked.mean()).reshape(1))
                logs[name] = float(value.max() if largest else value.mean())
            self.forget_metrics()
            logs |= {f"seconds/{phase}": seconds for phase, seconds in self.clock.seconds.items()}
        super().log(logs, start_time)

    def _unlogged(self) -> dict[str, Any]:
        """What this rank has summed up for the next line of the log, as JSON can hold it."""
        metrics = {name: torch.stack(values).tolist() for name, values in self._metrics.items()}
        return {"since": self._globalstep_last_logged, "loss": float(self._tr_loss), "metrics": metrics}

    def take_up_logs(self) -> None:
        """Go on with the lines of the log and the clock where the checkpoint that is resumed left them."""
        resumed, self._resumed = self._resumed, {}
        self.clock.seconds.update(resumed.get("seconds", {}))
        unlogged = resumed.get("unlogged", [])
        if len(unlogged) == self.args.world_size:  # each rank has its own
            mine = unlogged[self.args.process_index]
            self._globalstep_last_logged = mine["since"]
            self._tr_loss += mine["loss"]
            for name, values in mine["metrics"].items():
                self._metrics[name] = list(torch.tensor(values, device=self.args.device))

    # ---- What is kept ----

    def trained_weights(self) -> list[nn.Parameter]:
        return [weight for weight in self.policy.network.parameters() if weight.requires_grad]

    def _memory(self) -> RunState:
        """What a run knows besides its weights and their average."""
        return RunState({"watch": self.watch.state()})

    def _boundary_state(self) -> RunState:
        return self._with_average(self._memory())

    def _with_average(self, state: RunState) -> RunState:
        if self.average is None:
            return state
        average = {f"average.{place}": weight for place, weight in enumerate(self.average.shadow_params)}
        facts = {**state.facts, AVERAGE_UPDATES: self.average.optimization_step}
        return RunState(facts, {**state.tensors, **average})

    def _load_state(self, state: RunState) -> None:
        self.watch.load_state(state.facts["watch"])
        self._load_average(state)

    def _load_average(self, state: RunState) -> None:
        if self.average is not None:
            self.average.optimization_step = state.facts[AVERAGE_UPDATES]
            for place, weight in enumerate(self.average.shadow_params):
                weight.copy_(state.part("average")[str(place)])

    def _conclude(self) -> None:
        if self.watch.stopping:
            self._go_back()
        if self.average is not None:
            self.average.copy_to(self.trained_weights())

    def _go_back(self) -> None:
        """Take up the weights of the best checkpoint in place of those that a monitor of `stop_on` was crossed by."""
        over = ", ".join(f"watch/{name}" for name in self.watch.stopping)
        best, what = self.best_checkpoint, self.policy.trained.what
        if best is None or not is_complete(best):
            if self.args.should_save:
                logger.warning(
                    "%s across its limit, and no checkpoint from before: the %s left is that of the last update",
                    over,
                    what,
                )
            return
        if self.is_deepspeed_enabled:
            deepspeed_load_checkpoint(self.model_wrapped, str(best), load_module_strict=False)
        else:
            self._load_from_checkpoint(str(best))
        self._load_average(RunState.read(best))
        self.left = best
        if self.args.should_save:
            why = "the best by the held-out reward" if "held_out" in self.watch.best else "the last from before"
            logger.warning("%s across its limit: the %s left is that of %s, %s", over, what, best.name, why)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if _internal_call and output_dir is None:  # `push_to_hub`, called when all is saved, by one rank alone
            return
        if _internal_call:  # of a checkpoint, which explains what it cannot write
            return super().save_model(output_dir, _internal_call)
        folder = output_dir or self.args.output_dir
        with explained(f"the {self.policy.trained.what} to {folder}", self.args.output_dir):
            super().save_model(folder, _internal_call=True)  # or it would be pushed before the rest is there

    def init_hf_repo(self, *args, **kwargs) -> None:
        """As the Trainer's.

        Raises:
            ValueError: the hub is not there, or does not let this user make the repository.
        """
        try:
            super().init_hf_repo(*args, **kwargs)
        except OSError as error:
            raise ValueError(
                f"push_to_hub: cannot make the repository {self.args.hub_model_id or self.args.output_dir} on the hub "
                f"({error}); log in with `hf auth login`, or leave push_to_hub out and upload the folder later"
            ) from error

    def push_to_hub(self, *args, **kwargs) -> Any:
        """As the Trainer's.

        Raises:
            ValueError: the hub does not take it. The folder is whole.
        """
        try:
            return super().push_to_hub(*args, **kwargs)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"the run is whole in {self.args.output_dir}, but the hub did not take it ({error}); upload it with "
                f"`hf upload {self.hub_model_id} {self.args.output_dir}`"
            ) from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: checkpoints are written beside their place, where the Trainer would upload them half-made. What a
        run leaves behind is pushed when all of it is there."""

    def create_model_card(self, *args, **kwargs) -> None:
        """Not the Trainer's: `rl.model_card` writes one that knows base, reward and figures."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Only what is trained, as diffusers loads it, and the scheduler that samples as training did; the base is not
        copied. So every checkpoint is also a LoRA folder, or one with a U-Net."""
        if self.args.should_save:
            with written_beside(Path(output_dir or self.args.output_dir)) as beside:
                self.policy.save_adapter(beside, state_dict)
                self.scheduler.save_pretrained(beside / "scheduler")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.policy.load_adapter(resume_from_checkpoint)
