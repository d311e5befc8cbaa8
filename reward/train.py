"""Train the RAHF predictor on rich human feedback.

    python -m reward.train --config configs/rahf_tinyworld.yaml [--any_setting value]

The data are a folder that `python -m reward.richhf` wrote; the model starts from a RAHF checkpoint (`--model`) or from
a pretrained vision encoder and T5 (`--vision_model`, `--text_model`). The output folder loads with
`RahfModel.from_pretrained` and `RichFeedbackPredictor.from_pretrained`; it holds the best checkpoint by `eval_quality`
(see `dev_metrics`), TensorBoard logs in `tensorboard/`, and resumable checkpoints in `checkpoint-*/`.
"""

import json
import logging
import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import DatasetDict, load_from_disk
from transformers import (
    AutoConfig,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.integrations import TensorBoardCallback

from reward.arguments import main_guard, parse_arguments
from reward.checkpoints import (
    abandon_later,
    abandoned,
    check_goes_on,
    checkpoint_to_resume,
    checkpoints,
    mark_whole,
    rotate,
    unmark,
)
from reward.checks import check_labels, check_place
from reward.data import (
    FeedbackCollator,
    FeedbackDataset,
    describe_unread,
    encode_prompts,
    unread_words,
)
from reward.engines import engine_of
from reward.feedback import HEATMAPS, SCORES
from reward.folder_lock import LOCK, check_free, joined, open_to_ranks, taken
from reward.losses import IGNORE
from reward.metrics import heatmap_metrics, score_metrics, word_metrics
from reward.model import RahfModel, RahfOutput
from reward.panels import EXAMPLES, ExamplePanels
from reward.predict import SAVED, check_model_folder, load_tokenizer, save_whole
from reward.rahf_config import LOSS_SETTINGS, RahfConfig
from reward.t5_family import check_text_config
from reward.train_config import RahfArguments, RahfTrainingArguments, learning_settings
from reward.training_arguments import whole_models
from reward.vision import is_staged
from reward.vocabulary import adopt_tokenizer
from reward.whole_files import bring_back, forget, set_aside, write_whole

logger = logging.getLogger(__name__)

_BACKBONE = ("vision.", "encoder.", "word_head.decoder.", "word_head.write.")
LOGS = "tensorboard"  # in the output folder
METRICS = "dev_metrics.json"  # there too
_LEARNED = 0.05  # CC of a heatmap on dev: an empty map's is about 0, that of the paper's worst one 0.21


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


class _Epochs(TrainerCallback):
    """Tells the training data their epoch, which the augmentation is drawn from.

    accelerate's loader would, but not where it wraps the sampler: with several processes, or resuming amid an epoch.
    """

    def __init__(self, data: FeedbackDataset):
        self.data = data

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        self.data.set_epoch(int((state.epoch or 0.0) + 1e-6))


class _StartAnew(TrainerCallback):
    """Sets aside what an earlier run left as the training begins, when its input has been looked at; deletes it when
    an update has been made.

    Left there, it would pass for this run's.
    """

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        ranks = PartialState()
        ranks.wait_for_everyone()  # none has found its input wrong
        if args.should_save:
            set_aside(args.output_dir, _left_by_training(args.output_dir))
        ranks.wait_for_everyone()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if args.should_save:
            forget(args.output_dir)


@contextmanager
def _folder_taken(trainer: Trainer) -> Iterator[None]:
    """Inside, no other run may write to the output folder; on all ranks.

    Raises:
        FolderInUseError: another run has it.
    """
    args = trainer.args
    with ExitStack() as stack:
        if args.should_save:
            open_to_ranks(stack.enter_context(taken(args.output_dir)))
        trainer.accelerator.wait_for_everyone()
        if not args.should_save:
            stack.enter_context(joined(args.output_dir))
        yield


@contextmanager
def _nothing_lost(args: RahfTrainingArguments) -> Iterator[None]:
    """What `_StartAnew` set aside comes back if the training fails before its first update."""
    try:
        yield
    except BaseException:
        if args.should_save:
            bring_back(args.output_dir)
        raise
    if args.should_save:
        forget(args.output_dir)


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


def with_options(config: RahfConfig, options: Mapping[str, object]) -> RahfConfig:
    """`config` with other values for some of its fields, checked as a new one is.

    Raises:
        ValueError: a value that the field does not take, or a size that the model's table of places does not fit.
    """
    changed = RahfConfig.from_dict({**config.to_dict(), **options})
    if is_staged(config.vision_config) and changed.grid != config.grid:
        raise ValueError(
            f"image_size cannot change from {config.image_size} to {changed.image_size}: the model's table of places, "
            "which an encoder such as ResNet or Swin needs, is of that size"
        )
    return changed


def build_model(arguments: RahfArguments) -> tuple[RahfModel, PreTrainedTokenizerBase, set[str]]:
    """The model to start from, its tokenizer, and the names of those weights that `--model` did not have."""
    new: set[str] = set()
    if arguments.model is not None:
        check_model_folder(arguments.model)
        tokenizer = load_tokenizer(arguments.model)
        model, report = RahfModel.from_pretrained(
            arguments.model,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            dtype=torch.float32,
            config=with_options(RahfConfig.from_pretrained(arguments.model), arguments.model_options),
        )
        new = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
        if astray := sorted(key for key in new if "_head" not in (part := key.split(".")[0]) and part != "detail"):
            raise ValueError(f"{arguments.model} lacks weights of the encoders: {astray[:3]} ({len(astray)} in all)")
    else:
        with _backbones_named(arguments, OSError, ValueError):
            _, text = map(AutoConfig.from_pretrained, (arguments.vision_model, arguments.text_model))
        check_text_config(text)
        with _backbones_named(arguments, OSError, ValueError):
            tokenizer = AutoTokenizer.from_pretrained(arguments.text_model)
        with _backbones_named(arguments, OSError):  # ValueErrors are our own here
            model = RahfModel.from_backbones(arguments.vision_model, arguments.text_model, **arguments.model_options)
    adopt_tokenizer(model, tokenizer)
    return model, tokenizer, new


@contextmanager
def _backbones_named(arguments: RahfArguments, *errors: type[Exception]) -> Iterator[None]:
    """What transformers says of a backbone that it cannot load, in our words."""
    try:
        yield
    except errors as error:
        raise ValueError(
            f"--vision_model {arguments.vision_model} or --text_model {arguments.text_model} cannot be loaded: give "
            f"folders of pretrained models, or their names on the hub ({error})"
        ) from error


def warn_of_unread_words(data: DatasetDict, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Log, split by split, which words of the prompts the model will not see; they get no label either."""
    for name in ("train", "dev"):
        tokens = list(data[name]["tokens"])
        positions = encode_prompts(tokenizer, tokens, max_length)["word_positions"]
        if message := describe_unread(unread_words(tokens, positions), max_length):
            logger.warning("split %s: %s", name, message)


def load_data(folder: str | Path) -> DatasetDict:
    """The splits that `reward.richhf` wrote.

    Raises:
        ValueError: the folder is not there, or holds something else, or a split that was saved without a row.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"there is no data folder {folder}; `python -m reward.richhf --out {folder} ...` makes it")
    try:
        data = load_from_disk(str(folder))
    except IndexError as error:  # `datasets` saves a split without a row, and does not load it
        raise ValueError(f"{folder} has a split without a picture; build the data anew") from error
    except FileNotFoundError as error:
        raise ValueError(f"{folder} holds no data set; `python -m reward.richhf --out FOLDER ...` makes one") from error
    if not isinstance(data, DatasetDict):
        raise ValueError(f"{folder} holds a single data set; splits train, dev and test are needed")
    return data


def _left_by_training(folder: str | Path) -> list[Path]:
    """What a training leaves in its output folder, as far as it is there."""
    folder = Path(folder)
    files = [path for name in (*SAVED, METRICS, EXAMPLES) for path in sorted(folder.glob(name))]
    return [*files, *checkpoints(folder), *abandoned(folder), *folder.glob(LOGS)]


def _check_output_dir(args: RahfTrainingArguments, checkpoint: Path | None, model: str | None) -> None:
    """Refuse an output folder that is a file, one that is in use, or one that would be cleared of what it starts from.

    Args:
        checkpoint: what to resume, if anything.
        model: what to start from, if that is a RAHF.
    """
    folder = Path(args.output_dir)
    check_place(folder, "output_dir")
    cleared = {path.resolve() for path in (folder, *checkpoints(folder))} if args.overwrite_output_dir else set()
    for start in (checkpoint, model):
        if start is not None and Path(start).resolve() in cleared:
            raise ValueError(
                f"--overwrite_output_dir would delete {start}, which the training is to start from; leave it out, or "
                "give another --output_dir"
            )
    goes_on = checkpoint is not None and checkpoint.resolve().parent == folder.resolve()
    if goes_on or args.overwrite_output_dir or not folder.is_dir():
        return
    anew = "start anew with --overwrite_output_dir true, or give another --output_dir"
    if args.resumes_if_it_can:  # where it was stopped before the first checkpoint, there are logs
        if model_files := [path.name for path in _left_by_training(folder) if path.name in ("config.json", METRICS)]:
            raise ValueError(
                f"the output folder {folder} holds {model_files[0]}, but no checkpoint to go on from; {anew}"
            )
    elif any(path.name != LOCK for path in folder.iterdir()):
        raise ValueError(f"the output folder {folder} is not empty; go on with --resume_from_checkpoint latest, {anew}")


def warn_of_empty_maps(metrics: Mapping[str, float]) -> None:
    """Say so where a heatmap came to nothing: most maps are empty, and by the loss a model that calls all of them so is
    hardly wrong.

    Args:
        metrics: of the dev split, as `trainer.predict` names them.
    """
    for name in HEATMAPS:
        if (cc := metrics.get(f"eval_cc_{name}", 1.0)) < _LEARNED:
            logger.warning(
                "the %s heatmap has learned nothing yet (CC %.2f on dev); train longer, or let marked pixels count "
                "more, --heatmap_positive_weight 3",
                name,
                cc,
            )


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """The command; returns the dev metrics of the model that it saved."""
    arguments, args = parse_arguments([RahfArguments, RahfTrainingArguments], argv)
    if args.should_save:
        check_free(args.output_dir)
    if args.overwrite_output_dir or args.resume_from_checkpoint:
        if args.should_save:
            bring_back(args.output_dir)  # what a training replaced that was killed before its first update
        PartialState().wait_for_everyone()
    checkpoint = checkpoint_to_resume(args.resume_from_checkpoint, args.output_dir)
    _check_output_dir(args, checkpoint, arguments.model)
    data = load_data(arguments.data)
    if missing := {"train", "dev"} - set(data):
        raise ValueError(f"{arguments.data} lacks the splits {sorted(missing)}; it has {sorted(data)}")
    for split in ("train", "dev"):
        if not len(data[split]):
            raise ValueError(f"split {split!r} of {arguments.data} holds no picture; a training needs some")
        check_labels(data[split], f"{arguments.data}, {split}")
    made_with = learning_settings(arguments, args, data["train"])
    if checkpoint is not None:
        check_goes_on(checkpoint, made_with)
    set_seed(args.seed)  # the new heads' weights depend on it
    with whole_models(args):
        model, tokenizer, new = build_model(arguments)
    if model.word_head is None and (args.metric_for_best_model or "").endswith("_words"):
        raise ValueError(f"metric_for_best_model is {args.metric_for_best_model}, but the model judges no words")
    trainer = RahfTrainer(
        model,
        args,
        new,
        made_with,
        train_dataset=FeedbackDataset(
            data["train"], model.config, arguments.augmentation(args.seed), in_memory=arguments.in_memory
        ),
        eval_dataset=(dev := FeedbackDataset(data["dev"], model.config, in_memory=arguments.in_memory)),
        data_collator=FeedbackCollator(tokenizer, model.config),
        processing_class=tokenizer,
    )
    if checkpoint is not None:
        check_goes_on(checkpoint, {"engine": engine_of(trainer)})  # known only now
    warn_of_unread_words(data, tokenizer, model.config.max_text_length)
    boards = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, TensorBoardCallback)]
    for board in boards:
        board.logging_dir = str(Path(args.output_dir) / LOGS)
    trainer.add_callback(_Epochs(trainer.train_dataset))
    if args.overwrite_output_dir or (args.resumes_if_it_can and checkpoint is None):
        trainer.callback_handler.callbacks.insert(0, _StartAnew())  # before TensorBoard's, which writes new logs
    if arguments.panels:
        panels = ExamplePanels(dev, trainer.data_collator, arguments.panels, next(iter(boards), None))
        trainer.add_callback(panels)
    with _folder_taken(trainer):
        if checkpoint is not None and args.should_save:
            abandon_later(checkpoint, args.output_dir)
        with _nothing_lost(args):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        final = trainer.predict(dev, metric_key_prefix="eval")
        if len(final.predictions) > 2:
            model.config.word_threshold = best_word_threshold(final.predictions[2], final.label_ids[2])
        weights = trainer.accelerator.get_state_dict(trainer.deepspeed) if trainer.is_deepspeed_enabled else None
        if trainer.is_world_process_zero():
            warn_of_empty_maps(final.metrics)
            save_whole(model, tokenizer, Path(args.output_dir), weights)
            write_whole(Path(args.output_dir) / METRICS, json.dumps(final.metrics, indent=1).encode())
    return final.metrics


if __name__ == "__main__":
    main_guard(main)
