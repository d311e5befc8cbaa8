"""Train the RAHF predictor on rich human feedback.

    python -m reward.train --config configs/rahf_tinyworld.yaml [--any_setting value]

The data are a folder that `python -m reward.richhf` wrote; the model starts from a RAHF checkpoint (`--model`) or from
a pretrained vision encoder and T5 (`--vision_model`, `--text_model`). The output folder loads with
`RahfModel.from_pretrained` and `RichFeedbackPredictor.from_pretrained`; it holds the best checkpoint by `eval_quality`
(see `reward.trainer.dev_metrics`), TensorBoard logs in `tensorboard/`, and resumable checkpoints in `checkpoint-*/`.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import DatasetDict
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)
from transformers.integrations import TensorBoardCallback

from reward.arguments import main_guard, parse_arguments
from reward.checkpoint_folders import abandon_later, checkpoints, step_of
from reward.checkpoints import (
    COMPLETE,
    abandoned,
    check_goes_on,
    checkpoint_to_resume,
)
from reward.checks import check_labels, check_place
from reward.curves import RunCurves
from reward.data import (
    FeedbackCollator,
    FeedbackDataset,
    describe_unread,
    encode_prompts,
    load_data,
    unread_words,
)
from reward.engines import engine_of
from reward.feedback import HEATMAPS
from reward.folder_lock import LOCK, check_free, held
from reward.model import RahfModel
from reward.panels import EXAMPLES, ExamplePanels
from reward.predict import SAVED, check_model_folder, load_tokenizer, save_whole
from reward.rahf_config import RahfConfig
from reward.t5_family import check_text_config
from reward.train_config import RahfArguments, RahfTrainingArguments, learning_settings
from reward.trainer import RahfTrainer, best_word_threshold
from reward.training_arguments import whole_models
from reward.vision import is_staged
from reward.vocabulary import adopt_tokenizer
from reward.whole_files import bring_back, forget, set_aside, write_whole

logger = logging.getLogger(__name__)

LOGS = "tensorboard"  # in the output folder
METRICS = "dev_metrics.json"  # there too
_LEARNED = 0.05  # CC of a heatmap on dev: an empty map's is about 0, that of the paper's worst one 0.21


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
    board = RunCurves(LOGS) if trainer.pop_callback(TensorBoardCallback) else None
    if board is not None:
        trainer.add_callback(board)
    trainer.add_callback(_Epochs(trainer.train_dataset))
    if args.overwrite_output_dir or (args.resumes_if_it_can and checkpoint is None):
        trainer.callback_handler.callbacks.insert(0, _StartAnew())  # before TensorBoard's, which writes new logs
    if arguments.panels:
        panels = ExamplePanels(dev, trainer.data_collator, arguments.panels, board)
        trainer.add_callback(panels)
    with held(args.output_dir, args.should_save, trainer.accelerator.wait_for_everyone):
        if checkpoint is not None and args.should_save and not args.overwrite_output_dir:
            abandon_later(step_of(checkpoint.resolve()), args.output_dir, COMPLETE)
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
