"""The curves of a training that may be killed and go on: in one folder, and each update in them once."""

import time
from pathlib import Path

from transformers.integrations import TensorBoardCallback


class RunCurves(TensorBoardCallback):
    """Trainer's curves, in one folder for the whole run: `folder` in its output folder, or what TENSORBOARD_LOGGING_DIR
    says.

    A run that goes on from update k disowns whatever was logged of later updates before it was killed, so that every
    reader shows each update once. What Trainer logs at its end (`train_runtime`, ...) is of one process, not of the
    run, and no curve.
    """

    def __init__(self, folder: str):
        super().__init__()
        self.folder = folder

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not state.is_world_process_zero:
            return
        if self.logging_dir is None:
            self.logging_dir = str(Path(args.output_dir) / self.folder)
        wait_until_newest(Path(self.logging_dir))
        resumed = state.global_step > 0
        self.tb_writer = self._SummaryWriter(self.logging_dir, purge_step=state.global_step + 1 if resumed else 0)
        if not resumed:
            self.tb_writer.add_text("args", args.to_json_string())
            if (config := getattr(model, "config", None)) is not None and hasattr(config, "to_json_string"):
                self.tb_writer.add_text("model_config", config.to_json_string())

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "train_runtime" not in logs:
            super().on_log(args, state, control, logs=logs, **kwargs)


def wait_until_newest(folder: Path) -> None:
    """Readers take a folder's event files in the order of the seconds in their names: make the next one the last."""
    seconds = [int(file.name.split(".")[3]) for file in folder.glob("events.out.tfevents.[0-9]*")]
    if seconds:
        time.sleep(min(1.0, max(0.0, max(seconds) + 1 - time.time())))
