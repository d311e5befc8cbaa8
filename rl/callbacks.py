"""What happens beside a run's updates: a progress bar with the reward, curves and pictures, averaged weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from transformers import ProgressCallback, TrainerCallback

from reward.curves import RunCurves, wait_until_newest
from reward.draw import to_array
from rl.checkpoints import LOGS, explained, forget_before

if TYPE_CHECKING:
    from rl.policy_trainer import PolicyTrainer


class RewardProgress(ProgressCallback):
    """The Trainer's bar over updates, with time left, and the newest reward behind it instead of lines between."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and "reward" in (logs or {}):
            shown = {"reward": f"{logs['reward']:.4f}"}
            if "watch/drawn" in logs:
                shown["drawn"] = f"{logs['watch/drawn']:.2f}"
            self.training_bar.set_postfix(shown)

    def on_train_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)


class GuardedCurves(RunCurves):
    """The run's curves, in `output_dir/runs`; that they cannot be written is said as of the run's other files."""

    def __init__(self):
        super().__init__(LOGS)

    def on_train_begin(self, args, state, control, **kwargs):
        with explained(f"logs to {self.logging_dir or Path(args.output_dir) / LOGS}", args.output_dir):
            super().on_train_begin(args, state, control, **kwargs)

    def on_log(self, args, state, control, **kwargs):
        with explained(f"logs to {self.logging_dir}", args.output_dir):
            super().on_log(args, state, control, **kwargs)

    def on_train_end(self, args, state, control, **kwargs):
        with explained(f"logs to {self.logging_dir}", args.output_dir):
            super().on_train_end(args, state, control, **kwargs)


class ResumedLogs(TrainerCallback):
    """Gives a run that goes on what its checkpoint had summed up for the next line of the log."""

    def __init__(self, trainer: "PolicyTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.take_up_logs()


class SampleGrids(TrainerCallback):
    """What there is to look at of the last update, in TensorBoard."""

    def __init__(self, trainer: "PolicyTrainer"):
        self.trainer = trainer

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and "loss" in logs:  # a line at the end is of no update
            show(self.trainer, self.trainer.sheets())


def show(trainer: "PolicyTrainer", sheets: Mapping[str, Image.Image]) -> None:
    """Put pictures of the update that was made last into TensorBoard, if the run keeps one: name -> picture."""
    if (curves := run_curves(trainer)) is not None and curves.tb_writer is not None:
        with explained(f"logs to {curves.logging_dir}", trainer.args.output_dir):
            for name, sheet in sheets.items():
                curves.tb_writer.add_image(name, to_array(sheet), trainer.state.global_step, dataformats="HWC")
                curves.tb_writer.flush()  # on the disk before the checkpoint that follows


def show_at_end(trainer: "PolicyTrainer", name: str, sheet: Image.Image) -> None:
    """As `show`, when training is over and what it wrote to is closed; for one rank.

    It stands one behind the last update, and disowns what stood there: a run that is killed later, or that goes on with
    more updates, has it once, as it has each update.
    """
    curves, step = run_curves(trainer), trainer.state.global_step + 1
    if curves is None or curves.logging_dir is None:
        return
    with explained(f"logs to {curves.logging_dir}", trainer.args.output_dir):
        wait_until_newest(Path(curves.logging_dir))
        with curves._SummaryWriter(curves.logging_dir, purge_step=step) as writer:
            writer.add_image(name, to_array(sheet), step, dataformats="HWC")


def run_curves(trainer: "PolicyTrainer") -> GuardedCurves | None:
    found = [one for one in trainer.callback_handler.callbacks if isinstance(one, GuardedCurves)]
    return found[0] if found else None


class EvaluationsBeforeCheckpoints(TrainerCallback):
    """Where both fall behind one update, the evaluation comes first, so that a checkpoint holds its line of the log.

    The Trainer makes the evaluations of `eval_strategy: epoch` behind an epoch's end, when the checkpoint of its last
    update may have been written: a run that is killed in between and goes on from there would lack one.
    """

    def __init__(self, trainer: "PolicyTrainer"):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        if args.eval_strategy == "epoch" and state.global_step % self.trainer.plan.updates == 0:
            control.should_evaluate = args.eval_delay <= state.epoch

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_evaluate = False


class ForgetTheRunBefore(TrainerCallback):
    """Deletes what an earlier run left in the folder when this one has made its first update."""

    def on_step_end(self, args, state, control, **kwargs):
        if args.should_save:
            forget_before(args.output_dir)


class AverageWeights(TrainerCallback):
    """Takes the weights into their moving average after each update."""

    def __init__(self, trainer: "PolicyTrainer"):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.average.step(self.trainer.trained_weights())


class StopWhenOutOfTime(TrainerCallback):
    """Ends the run, with a checkpoint, behind the rollout in which its time is up."""

    def __init__(self, trainer: "PolicyTrainer"):
        self.trainer = trainer

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.trainer.out_of_time():
            control.should_training_stop = True
            control.should_save = args.save_strategy != "no" and not self.trainer.is_saved
