"""Pictures of how the predictor gets on: some dev examples at each evaluation, the raters' view beside the model's."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from reward import draw
from reward.data import FeedbackCollator, FeedbackDataset, resize_maps
from reward.feedback import HEATMAPS, SCORES, RichFeedback
from reward.losses import IGNORE
from reward.pictures import encode_png
from reward.whole_files import write_whole

EXAMPLES = "examples.png"  # in the output folder


class ExamplePanels(TrainerCallback):
    """Draws the first `count` dev examples: above what the raters said, below what the model predicts.

    They go to TensorBoard, if it is on, and to `examples.png` in the output folder, the newest only.
    """

    def __init__(self, dev: FeedbackDataset, collator: FeedbackCollator, count: int, board: TensorBoardCallback | None):
        self.examples = [dev[index] for index in range(min(count, len(dev)))]
        self.collator, self.board = collator, board

    @torch.no_grad()
    def on_evaluate(self, args, state, control, model, **kwargs) -> None:
        batch = {name: value.to(model.device) for name, value in self.collator(self.examples).items()}
        batch["pixel_values"] = batch["pixel_values"].to(model.dtype)  # DeepSpeed's bf16 is the model's own
        training = model.training
        out = model.eval()(**batch)  # on every rank: a sharded model needs them all
        model.train(training)
        if not state.is_world_process_zero:
            return
        size = self.collator.config.input_size
        tokens = [example["tokens"] for example in self.examples]
        words = torch.zeros(batch["word_labels"].shape) if out.word_logits is None else out.word_logits.sigmoid()
        maps = torch.stack([resize_maps(example["maps"][None], size)[0] for example in self.examples])
        rated = _feedback(batch["scores"], maps, batch["word_labels"].clamp(min=0), tokens)
        predicted = _feedback(out.scores, out.heatmaps, words * (batch["word_labels"] != IGNORE), tokens)
        threshold = self.collator.config.word_threshold
        sheet = draw.grid(
            [
                [draw.feedback_panel(example["image"], feedback, index, threshold, height=96)]
                for index, example in enumerate(self.examples)
                for feedback in (rated, predicted)
            ]
        )
        write_whole(Path(args.output_dir) / EXAMPLES, encode_png(sheet))
        if self.board is not None and self.board.tb_writer is not None:
            self.board.tb_writer.add_image(
                "examples/raters_above_model", draw.to_array(sheet), state.global_step, dataformats="HWC"
            )


def _feedback(
    scores: torch.Tensor, maps: torch.Tensor, words: torch.Tensor, tokens: Sequence[Sequence[str]]
) -> RichFeedback:
    """Scores (B, 4), maps (B, 2, h, w) and words (B, T) of a batch as `RichFeedback`."""
    return RichFeedback(
        scores={name: scores[:, index].float().cpu() for index, name in enumerate(SCORES)},
        heatmaps={name: maps[:, index].float().cpu() for index, name in enumerate(HEATMAPS)},
        tokens=tokens,
        misaligned=[row[: len(words_)].float().cpu() for row, words_ in zip(words, tokens, strict=True)],
    )
