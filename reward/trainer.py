"""The predictor's training as a `transformers.Trainer`, and by what its best checkpoint is chosen."""

import math
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction, Trainer

from reward.checkpoints import mark_whole, rotate, unmark
from reward.engines import engine_of
from reward.feedback import HEATMAPS, SCORES
from reward.losses import IGNORE
from reward.metrics import heatmap_metrics, score_metrics, word_metrics
from reward.model import RahfModel, RahfOutput
from reward.rahf_config import LOSS_SETTINGS
from reward.train_config import RahfTrainingArguments

_BACKBONE = ("vision.", "encoder.", "word_head.decoder.", "word_head.write.")


class DivergedError(ValueError):
    """The loss is no number any more."""


class RahfTrainer(Trainer):
    """`transformers.Trainer` with a learning rate for the backbone, and every loss term in the log.

    Args:
        new: names of weights that nothing was pretrained for: they learn at the heads' rate, a decoder's too.
        made_with: the settings that its checkpoints must be gone on with; see `learning_settings`.
    """

    def __init__(
        self,
        model: RahfModel,
        args: RahfTrainingArguments,
        new: Collection[str] = (),
        made_with: Mapping[str, Any] | None = None,
        **kwargs,
    ):
        for name in LOSS_SETTINGS:
            setattr(model.config, name, getattr(args, name))
        super().__init__(model=model, args=args, compute_metrics=dev_metrics, **kwargs)
        self.made_with = dict(made_with or {})
        self._terms = defaultdict(list)
        self._new = frozenset(new)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """AdamW (or `optim`) with four groups: backbone or not, decayed or not."""
        if self.optimizer is None:
            model = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(model))
            head_rate = self.args.learning_rate
            backbone_rate = head_rate if self.args.backbone_learning_rate is None else self.args.backbone_learning_rate
            groups = defaultdict(list)
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    own = name.removeprefix("module.")
                    rate = backbone_rate if own.startswith(_BACKBONE) and own not in self._new else head_rate
                    matrix = len(getattr(parameter, "ds_shape", parameter.shape)) > 1  # Trainer decays group norms too
                    groups[rate, self.args.weight_decay if name in decayed and matrix else 0.0].append(parameter)
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = kind(
                [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()],
                **options,
            )
        return self.optimizer

    def _prepare_inputs(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Trainer gives DeepSpeed every float in the model's precision; targets stay as they are."""
        targets = {name: inputs[name].to(self.args.device) for name in self.label_names if name in inputs}
        return {**super()._prepare_inputs(inputs), **targets}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs: RahfOutput = model(**inputs)
        if model.training and self.args.logging_strategy != "no":
            for name in ("score_loss", "heatmap_loss", "word_loss"):
                if getattr(outputs, name) is not None:
                    self._terms[name].append(getattr(outputs, name).detach())
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Every rank is here; the terms are means over all of them, as Trainer's own `loss` is."""
        if "loss" in logs:
            own = {name: torch.stack(values).mean() for name, values in self._terms.items()}
            own = {name: float(self.accelerator.gather(mean).mean()) for name, mean in own.items()}
            self._terms.clear()
            if not all(map(math.isfinite, own.values())):  # on all ranks alike; Trainer's own `loss` leaves it out
                raise DivergedError(
                    f"the training has diverged: at update {self.state.global_step} the loss is NaN or infinite "
                    f"({', '.join(f'{name} {value}' for name, value in own.items())}); no model is saved. "
                    f"Checkpoints of before are in {self.args.output_dir}; give a lower learning_rate or "
                    "max_grad_norm, a longer warm-up, or bf16 instead of fp16"
                )
            logs |= own
        super().log(logs, *args, **kwargs)

    def _issue_warnings_after_load(self, load_result) -> None:
        """A checkpoint that fills only a part of the model is an error here, not a warning."""
        if load_result.missing_keys or load_result.unexpected_keys:
            raise ValueError(
                f"the checkpoint does not fit the model: missing {load_result.missing_keys[:3]}, unexpected "
                f"{load_result.unexpected_keys[:3]}; resume with the settings that it was written with"
            )

    def _save_checkpoint(self, model, trial) -> None:
        """Trainer's checkpoint, marked when it is whole; only then may older ones go."""
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            unmark(folder)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()  # each rank writes a part
        if self.args.should_save:
            mark_whole(folder, self.made_with | {"engine": engine_of(self)})
            rotate(folder.parent, limit, self.state.best_model_checkpoint)


def dev_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Metrics of the dev split, by names such as `srcc_alignment`, `cc_implausibility`, `f1_words`; and `quality`.

    `quality`, by which the best checkpoint is chosen, is the mean of the four SRCC, the two heatmaps' CC, and the F1 of
    the words (at probability 0.5).

    Raises:
        DivergedError: predictions are NaN.
    """
    if any(np.isnan(part).any() for part in prediction.predictions):
        raise DivergedError(
            "the training has diverged: what the model says of the dev split is NaN; an earlier checkpoint may be good"
        )
    scores, heatmaps, *words = prediction.predictions
    true_scores, true_heatmaps, true_words = prediction.label_ids
    found = {}
    for index, name in enumerate(SCORES):
        metrics = score_metrics(scores[:, index], true_scores[:, index])
        found |= {f"{metric}_{name}": value for metric, value in metrics.items()}
    for index, name in enumerate(HEATMAPS):
        metrics = heatmap_metrics(heatmaps[:, index], true_heatmaps[:, index])
        found |= {f"{metric}_{name}": value for metric, value in metrics.items()}
    if words:
        found |= {f"{metric}_words": value for metric, value in _words_at(0.0, words[0], true_words).items()}
    chosen = [f"srcc_{name}" for name in SCORES] + [f"cc_{name}" for name in HEATMAPS] + ["f1_words"] * bool(words)
    return {**found, "quality": float(np.mean([found[name] for name in chosen]))}


def best_word_threshold(logits: np.ndarray, labels: np.ndarray) -> float:
    """The probability, of 0.05, 0.1, ... 0.95, above which calling a word misaligned gives the best F1; the nearest to
    0.5 where several do.

    Args:
        logits, labels: (N, T), labels 1 = misaligned, -100 = not counted.
    """
    thresholds = np.arange(1, 20) / 20
    f1 = [_words_at(float(np.log(p / (1 - p))), logits, labels)["f1"] for p in thresholds]
    best = thresholds[np.array(f1) == max(f1)]
    return float(best[np.argmin(np.abs(best - 0.5))])


def _words_at(threshold: float, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    counted = labels != IGNORE
    logits = logits[:, : labels.shape[1]]
    return word_metrics([list(logits[counted] > threshold)], [list(labels[counted])])
