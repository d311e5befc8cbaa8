"""A Trainer whose runs stop at rollout boundaries, are saved there, and go on from there to the same bits."""

import shutil
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import Trainer

from reward.checkpoint_folders import abandon_later
from reward.engines import engine_of
from rl.checkpoints import (
    BESIDE,
    MARKER,
    check_intact,
    discard_later_samples,
    explained,
    forget_before,
    publish,
    read_marker,
    resolve_checkpoint,
    rotate,
)
from rl.going_on import check_goes_on
from rl.interrupt import RunInterrupted, StopSignal
from rl.manifest import sealed
from rl.run_state import RunState
from rl.timing import PhaseClock
from rl.watch import Watch


class StopAtBoundaryError(Exception):
    """Raised where the weights are those of the last rollout boundary, to leave the Trainer's loop."""


class Boundaries(Protocol):
    """How many optimizer updates lie between two places where a run can stop and go on."""

    @property
    def updates(self) -> int: ...


class ResumableTrainer(Trainer):
    """What of a run is not the algorithm: stopping, checkpoints, resuming.

    A subclass says what besides weights and optimizer a run remembers (`_boundary_state`, `_load_state`, `_unlogged`),
    what makes its weights unfit to be kept (`_check_weights`), and what happens at the end (`_conclude`).

    Args:
        plan: how many updates lie between two boundaries.
        watch: knows which checkpoint is the best.
        trainer: as the Trainer's.

    Attributes:
        clock, train_seconds: seconds of each phase so far, and of `train`; of the whole run, also where it goes on.
        processor_seconds: of `train`, of this process; what runs beside it does not count.
    """

    def __init__(self, plan: Boundaries, watch: Watch, **trainer):
        self.plan, self.watch = plan, watch
        self.clock = PhaseClock()
        self.train_seconds = self.processor_seconds = 0.0
        self._resumed: dict[str, Any] = {}
        self._start = self._processor_start = 0.0
        self._stop = StopSignal()
        self._run_dir: str | None = None
        self._saved_step: int | None = None
        super().__init__(**trainer)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As the Trainer's, from a checkpoint that is whole (a folder, `latest`, or `auto`: `latest` if there is one).

        Raises:
            RunInterrupted: Ctrl-C or SIGTERM; a checkpoint was written, the message says where and how to go on. Before
                the first update there is nothing to write.
            RewardError: the reward is not finite; the last checkpoint is kept.
            DivergedError: the policy is not finite any more; the last checkpoint is kept.
            ValueError: no such checkpoint, a damaged one, or one of another LoRA, engine or with other rollouts.
        """
        checkpoint = resolve_checkpoint(resume_from_checkpoint, self.args.output_dir)
        if checkpoint is not None:
            check_goes_on(checkpoint, self.args, self.plan.updates)
            self._check_engine(checkpoint)
            if self.args.should_save:
                check_intact(checkpoint)
        self._resumed = read_marker(checkpoint) if checkpoint is not None else {}
        own = checkpoint is not None and checkpoint.resolve().parent == Path(self.args.output_dir).resolve()
        self._saved_step = self._resumed["global_step"] if own else None
        self._start = time.perf_counter() - self._resumed.get("train_seconds", 0.0)
        self._processor_start = time.process_time() - self._resumed.get("processor_seconds", 0.0)
        with StopSignal() as self._stop:
            try:
                result = super().train(resume_from_checkpoint=checkpoint and str(checkpoint), **kwargs)
                if self._stop_asked():  # in the last update, behind which no place to stop at comes
                    raise StopAtBoundaryError
                self._conclude()
                return result
            except StopAtBoundaryError:
                if self.state.global_step == 0:  # else it would take the place of a run that it was to replace
                    raise RunInterrupted("stopped before the first update; nothing is kept of it") from None
                if self._saved_step != self.state.global_step:
                    self._save_checkpoint(self.model, None)
                raise RunInterrupted(
                    f"stopped after {self.state.global_step} of {self.state.max_steps} updates; "
                    f"go on with --resume_from_checkpoint {self._checkpoint_place()}"
                ) from None
            finally:
                self.train_seconds, self.processor_seconds = self._elapsed()
                if self.is_in_train:  # an exception: the Trainer closes bar and writer at a normal end only
                    self.callback_handler.on_train_end(self.args, self.state, self.control)

    def _elapsed(self) -> tuple[float, float]:
        """Seconds of training so far, by the clock on the wall and of the processor."""
        return time.perf_counter() - self._start, time.process_time() - self._processor_start

    def out_of_time(self) -> bool:
        """Whether any rank has trained for `args.max_train_seconds`. All must be here, and get the same answer."""
        limit = self.args.max_train_seconds
        over = limit is not None and self._elapsed()[self.args.device.type == "cpu"] >= limit
        if limit is not None and self.args.world_size > 1:
            over = bool(self.accelerator.gather(torch.tensor([over], device=self.args.device)).any())
        return over

    def _boundary_state(self) -> RunState:
        raise NotImplementedError

    def _load_state(self, state: RunState) -> None:
        raise NotImplementedError

    def _unlogged(self) -> dict[str, Any]:
        """What this rank has summed up for the next line of the log, as JSON can hold it."""
        raise NotImplementedError

    def _check_weights(self) -> None:
        """Raises an error if they are not fit to be kept."""

    def _conclude(self) -> None:
        """Behind the last update of a run that was not stopped."""

    def _stop_asked(self) -> bool:
        """Whether any rank was asked to stop. All ranks must be here, and all get the same answer."""
        requested = self._stop.requested
        if self.args.world_size > 1:
            requested = bool(self.accelerator.gather(torch.tensor([requested], device=self.args.device)).any())
        return requested

    def _stop_if_asked(self) -> None:
        """Leave the Trainer's loop if a stop is asked for and the weights are those of a rollout boundary."""
        if self._stop_asked() and self.state.global_step % self.plan.updates == 0:
            raise StopAtBoundaryError

    def _check_engine(self, checkpoint: Path) -> None:
        """Complain if another engine holds the optimizer's state."""
        if (engine := read_marker(checkpoint).get("engine", engine_of(self))) != engine_of(self):
            raise ValueError(
                f"{checkpoint} holds the optimizer's state as {engine} leaves it, but this run has {engine_of(self)}; "
                "give deepspeed and the number of processes the values they had"
            )

    def _checkpoint_place(self) -> Path:
        return Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"

    @property
    def is_saved(self) -> bool:
        """Whether there is a checkpoint of the weights as they are."""
        return self._saved_step == self.state.global_step

    @property
    def best_checkpoint(self) -> Path | None:
        """The one to keep, as far as rollouts were drawn from checkpoints (see `Watch.best`); never rotated away."""
        if self.watch.best is None:
            return None
        return Path(self.args.output_dir) / f"checkpoint-{self.watch.best['global_step']}"

    def _get_output_dir(self, trial) -> str:
        return self._run_dir or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        """The Trainer's checkpoint, written beside its place and moved there when it is whole.

        Raises:
            OSError: it could not be written, e.g. disk full; nothing is left of it, and the previous one is whole.
        """
        self._check_weights()
        place = self._checkpoint_place()
        self._run_dir = str(Path(self.args.output_dir) / BESIDE)
        marker = {
            "global_step": self.state.global_step,
            "rollouts": self.state.global_step // self.plan.updates,
            "engine": engine_of(self),
            "optim": self.args.optim,
            "unlogged": gather_object([self._unlogged()]),
            "seconds": dict(self.clock.seconds),
            **dict(zip(("train_seconds", "processor_seconds"), self._elapsed(), strict=True)),
        }
        try:
            with explained(f"the checkpoint {place}", self.args.output_dir):
                if self.args.should_save:
                    shutil.rmtree(self._run_dir, ignore_errors=True)  # of a run that was killed while writing
                self.accelerator.wait_for_everyone()
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    beside = Path(self._run_dir) / place.name
                    self._boundary_state().write(beside)
                    publish(beside, place, sealed(marker, beside))
                    forget_before(self.args.output_dir)
                    rotate(self.args.output_dir, self.args.save_total_limit, self.best_checkpoint)
            self._saved_step = self.state.global_step
        finally:
            if self.args.should_save:
                shutil.rmtree(self._run_dir, ignore_errors=True)
            self._run_dir = None
        self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As the Trainer's, which has DeepSpeed leave frozen weights out for a `PeftModel` only: a policy of several
        parts would have the base's in each checkpoint."""
        if self.is_deepspeed_enabled and not isinstance(self.model_wrapped.save_checkpoint, partial):
            engine = self.model_wrapped
            engine.save_checkpoint = partial(engine.save_checkpoint, exclude_frozen_parameters=True)
        super()._save_optimizer_and_scheduler(output_dir)

    def _init_training_state(self, max_steps: int, *args):
        checkpoint = args[2]
        if checkpoint is not None:
            marker = read_marker(Path(checkpoint))
            self._load_state(RunState.read(Path(checkpoint)))
            own = Path(checkpoint).resolve().parent == Path(self.args.output_dir).resolve()
            if own:
                self._saved_step = marker["global_step"]
            else:
                self.watch.best = None  # it lies in another folder, which is not this run's to keep
            if self.args.should_save:
                abandon_later(marker["global_step"], self.args.output_dir, MARKER)
                discard_later_samples(marker["rollouts"], self.args.output_dir)
            if self.args.should_save and own:  # a run that was killed behind its checkpoint may not have come to this
                rotate(self.args.output_dir, self.args.save_total_limit, self.best_checkpoint)
        place = super()._init_training_state(max_steps, *args)
        self.state.compute_steps(self.args, max_steps)  # how often to log and save: as this run says, not the last
        if self.is_saved and self.watch.stopping:  # killed behind the rollout that ended it: nothing is left to train
            return sys.maxsize, 0
        return place
