"""What a run shows while it goes: a progress bar with the reward, and pictures in TensorBoard."""

from typing import TYPE_CHECKING

from transformers import ProgressCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback

from reward.draw import to_array
from rl.pictures import sample_sheet

if TYPE_CHECKING:
    from rl.ddpo import DDPOTrainer


class RewardProgress(ProgressCallback):
    """The Trainer's bar over updates, with time left, and the newest reward behind it instead of lines between."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and "reward" in (logs or {}):
            self.training_bar.set_postfix(reward=f"{logs['reward']:.4f}", drawn=f"{logs['watch/drawn']:.2f}")

    def on_train_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)


class SampleGrids(TrainerCallback):
    """The first pictures of each rollout, with overlays of their penalties, in TensorBoard."""

    def __init__(self, trainer: "DDPOTrainer"):
        self.trainer = trainer

    def on_log(self, args, state, control, **kwargs):
        experience = self.trainer.experience
        writers = [
            callback.tb_writer
            for callback in self.trainer.callback_handler.callbacks
            if isinstance(callback, TensorBoardCallback)
        ]
        if not writers or writers[0] is None or experience is None or experience.samples is None:
            return
        sheet = to_array(sample_sheet(experience.samples))
        writers[0].add_image("samples", sheet, state.global_step, dataformats="HWC")
