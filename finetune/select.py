"""Choose pictures to train on by their predicted rich feedback.

    python -m finetune.select --config configs/select_tinyworld.yaml [--any_setting value]

Pictures with prompts are taken from a folder or a `datasets` data set, or drawn first; their rich feedback is predicted
once and kept beside them; rules choose (`finetune/rule_reading.py` lists them). The paper's own use of its predictor
(Liang et al. 2024, arXiv 2312.10240, section 5.1): eight pictures a prompt, the best kept if its score passes.

`output_dir` gets `data`, an image folder with `metadata.jsonl` (columns file_name, text, the predicted feedback, and
what else the pictures' own table says of them) that diffusers' `train_text_to_image` scripts read, and a report.
`datasets.load_dataset("imagefolder", data_files={"train": "DATA/**"})` reads it as they do; given `data_dir` alone, it
guesses splits from pictures' names. Another run with other rules predicts nothing again. Several processes share the
drawing and predicting: `accelerate launch -m finetune.select ...`.
"""

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import diffusers
import transformers
from accelerate import PartialState
from rich.console import Console

transformers.logging.set_verbosity_error()  # says on import what does not concern us
transformers.logging.disable_progress_bar()
diffusers.logging.disable_progress_bar()

from finetune.files import holds_files, is_within, replaced_parts  # noqa: E402
from finetune.generate import TABLE, Generation, GenerationArguments, draw_missing, shared_bar  # noqa: E402
from finetune.pool import Pool, open_pool, suffix_of  # noqa: E402
from finetune.predictions import Predictions, Store, feedback_place  # noqa: E402
from finetune.rule_reading import read_rules  # noqa: E402
from finetune.rules import Rule, Step, asks_for_words, select  # noqa: E402
from finetune.selection_report import HISTOGRAMS, KEPT, REJECTED, REPORT, print_steps, write_report  # noqa: E402
from reward.arguments import main_guard, parse_arguments, read_prompt_file  # noqa: E402
from reward.pictures import as_rgb_file  # noqa: E402
from reward.predict import RichFeedbackPredictor, check_model_folder  # noqa: E402
from reward.rahf_config import RahfConfig  # noqa: E402
from rl.policy_checks import warn_of_ignored  # noqa: E402

logger = logging.getLogger(__name__)

DATA = "data"
PARTS = (REPORT, DATA, HISTOGRAMS, KEPT, REJECTED)
"""All that a selection writes to `output_dir`; where there is a report, the others are its own."""


@dataclass
class SelectArguments:
    """What to choose from, by whose opinion, by which rules."""

    pictures: str = field(
        metadata={
            "help": "Pictures with prompts: a folder with metadata.jsonl or metadata.csv (columns file_name, text), a "
            "saved `datasets` data set, or a folder of parquet files. With `policy`: where the pictures are drawn to."
        }
    )
    model: str = field(metadata={"help": "The predictor: folder of a RAHF checkpoint."})
    rules: dict = field(
        metadata={
            "help": "Name -> rule, gone through in this order: e.g. {best: {best_of: overall}, good: {score: overall, "
            "at_least: 0.8}}. finetune/rule_reading.py lists them all. {} keeps every picture."
        }
    )
    output_dir: str = field(metadata={"help": "Folder for what is chosen, and the report."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace an earlier selection in `output_dir`; what else is there stays."}
    )
    prompt_column: str | None = field(
        default=None, metadata={"help": "Column of the prompts; default: text, prompt or caption."}
    )
    split: str = field(default="train", metadata={"help": "Which split of a saved data set or of parquet files."})
    feedback_dir: str | None = field(
        default=None,
        metadata={
            "help": "Where predictions are kept, of several pools if you like; default: beside `pictures`, in "
            "`<pictures>_feedback`."
        },
    )
    prediction_batch_size: int = field(default=64, metadata={"help": "Pictures that the predictor judges at once."})
    use_cpu: bool = field(default=False, metadata={"help": "Use no GPU."})
    num_examples: int = field(default=12, metadata={"help": "Pictures in each of kept.png and rejected.png."})

    def __post_init__(self):
        for name in ("prediction_batch_size", "num_examples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        read_rules(self.rules)


PATIENCE = timedelta(days=30)
"""How long a process waits for the slowest, which may draw or predict for hours longer; NCCL's own is ten minutes."""


def main(argv: Sequence[str] | None = None) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    arguments, generation = parse_arguments([SelectArguments, GenerationArguments], argv)

    # Whatever can be wrong with the input is found out before models are loaded.
    rules = read_rules(arguments.rules)
    check_output_dir(arguments)
    check_model_folder(arguments.model)
    check_words(rules, arguments.model)
    drawing, columns = None, {"prompt_column": arguments.prompt_column, "split": arguments.split}
    if generation.policy is not None:
        warn_of_ignored(arguments, columns, "the pictures are drawn, and their table says so")
        columns = {}
        generation.check()
        drawing = Generation(arguments.pictures, generation, read_prompt_file(generation.prompts))
    else:
        open_pool(arguments.pictures, **columns)

    state = PartialState(cpu=arguments.use_cpu, timeout=PATIENCE)
    console = Console(quiet=not state.is_main_process, highlight=False)
    if drawing is not None:
        draw_missing(drawing, state, console)
    pool = open_pool(arguments.pictures, **columns)
    store = Store(pool, arguments.model, arguments.feedback_dir)
    predict_missing(store, arguments, state, console)
    if state.is_main_process:
        predictions = store.load()
        steps = select(rules, predictions)
        write_selection(arguments, pool, predictions, steps)
        print_steps(console, steps)
        kept, folder = len(steps[-1].kept), Path(arguments.output_dir)
        console.print(f"{kept} of {len(predictions)} pictures kept: {folder / DATA}", soft_wrap=True, markup=False)
        console.print(f"report: {folder / REPORT}; predictions: {store.folder}", soft_wrap=True, markup=False)
    state.wait_for_everyone()
    state.destroy_process_group()


def predict_missing(store: Store, arguments: SelectArguments, state: PartialState, console: Console) -> None:
    """Predict what is not there yet, shared among the processes."""
    parts = store.missing(state.process_index, state.num_processes)
    if parts:
        count = sum(map(len, parts))
        everything = sum(map(len, store.missing()))
        console.print(f"[bold]predicting[/] the rich feedback of {everything} of {len(store.pool.entries)} pictures")
        predictor = RichFeedbackPredictor.from_pretrained(arguments.model, state.device)
        with shared_bar(count, state) as bar:
            store.predict(parts, predictor, arguments.prediction_batch_size, bar.update)
    state.wait_for_everyone()


def check_words(rules: Mapping[str, Rule], model: str) -> None:
    """Complain about rules on misaligned words where the predictor says nothing of words: all would be kept.

    Raises:
        ValueError: names the first such rule.
    """
    asking = [name for name, rule in rules.items() if asks_for_words(rule)]
    if asking and RahfConfig.from_pretrained(model).words == "none":
        raise ValueError(
            f"rules: `{asking[0]}` asks for misaligned words, but the predictor {model} was trained without them "
            "(`words: none`); leave the rule out, or give a `model` that was trained with words"
        )


def check_output_dir(arguments: SelectArguments) -> None:
    """Complain about an `output_dir` that the selection must not be written to.

    Raises:
        ValueError: it holds other files than an earlier selection, or one that may not be replaced; it is a file; it
            lies in the pictures' folder; or they or their predictions lie in it.
    """
    folder, pictures = Path(arguments.output_dir), Path(arguments.pictures)
    feedback = feedback_place(pictures, arguments.feedback_dir)
    if is_within(pictures, folder) or is_within(folder, pictures) or is_within(feedback, folder):
        raise ValueError(
            f"output_dir {folder} lies in or around the pictures {pictures} or their predictions {feedback}; give an "
            "--output_dir apart from them"
        )
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir {folder} is a file; name a folder")
    if folder.is_dir() and holds_files(folder):
        if not (folder / REPORT).is_file():
            raise ValueError(f"output_dir {folder} holds other files; give another --output_dir")
        if not arguments.overwrite_output_dir:
            raise ValueError(
                f"output_dir {folder} holds a selection; give another --output_dir, or --overwrite_output_dir true"
            )


def write_selection(arguments: SelectArguments, pool: Pool, predictions: Predictions, steps: Sequence[Step]) -> None:
    """Write the chosen pictures as an image folder, and the report, in place of an earlier selection."""
    with replaced_parts(Path(arguments.output_dir), PARTS) as folder:
        lines, taken = [], set()
        own = own_columns(pool, steps[-1].kept, predictions.values)
        for place, columns in zip(steps[-1].kept, own, strict=True):
            entry, read = pool.entries[place], pool.read(place)
            data = as_rgb_file(read)  # as it was judged: what trains on it may show what is transparent
            suffix = suffix_of(read, entry.name) if data is read else ".png"
            name = _free_name(Path(entry.name).with_suffix(suffix), taken)
            file = folder / DATA / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
            said = {value: round(float(numbers[place]), 6) for value, numbers in predictions.values.items()}
            lines.append(json.dumps({"file_name": name, "text": entry.prompt, **said, **columns}, ensure_ascii=False))
        (folder / DATA / TABLE).write_text("\n".join(lines) + "\n", encoding="utf-8")
        write_report(folder, pool, predictions, steps, asdict(arguments), arguments.num_examples)


def own_columns(pool: Pool, places: Sequence[int], predicted: Iterable[str]) -> list[dict[str, Any]]:
    """What the pool's own table says of the pictures at `places`, column -> cell, as the table of a selection can hold
    it. What is not a finite number there becomes null; columns that are left out are warned of.

    Args:
        predicted: names of the columns with the predicted feedback.
    """
    columns = [pool.entries[place].columns for place in places]
    left_out = {}
    for name in dict.fromkeys(name for row in columns for name in row):
        if name in ("file_name", "text", "image", *predicted):  # `image` is what `datasets` calls the picture
            left_out[name] = "the selection has a column of that name; rename yours to keep it"
        elif name.endswith(("_file_name", "_file_names")):
            left_out[name] = "`datasets` would look for these files beside the pictures"
        elif not all(_fits_json(row.get(name)) for row in columns):
            left_out[name] = "JSON cannot hold it"
    for name, why in left_out.items():
        logger.warning("the column %s of %s is left out of the selection: %s", name, pool.place, why)
    return [
        {name: None if _is_odd(cell) else cell for name, cell in row.items() if name not in left_out} for row in columns
    ]


def _is_odd(cell: Any) -> bool:
    return isinstance(cell, float) and not math.isfinite(cell)


def _fits_json(cell: Any) -> bool:
    try:
        json.dumps(cell, ensure_ascii=False, allow_nan=_is_odd(cell)).encode()
    except (TypeError, ValueError):  # of no type that it has, or NaN within a list, or half a character
        return False
    return True


def _free_name(wanted: Path, taken: set[str]) -> str:
    """A file's name that no other has: `a` and `a.png` of a pool are `a.png` and `a-2.png`; noted in `taken`."""
    name, number = str(wanted), 1
    while name in taken:
        number += 1
        name = str(wanted.with_stem(f"{wanted.stem}-{number}"))
    taken.add(name)
    return name


if __name__ == "__main__":
    main_guard(main)
