"""Agreement before training: what several rewards say of the same pictures, and what each is worth.

    python -m finetune.agreement --config configs/agreement_tinyworld.yaml [--any_setting value]

Pictures with prompts are taken from a folder or a `datasets` data set, or drawn first, as `finetune.select` does. Each
reward judges them as they are, once more in another order, after a JPEG of quality 95, moved by one pixel, and with
planted defects. A table and a JSON say: how the rewards' orders of the pictures agree, within prompts and across; how
often each prefers what people prefer, where the pictures come with their numbers (or as pairs of which one was chosen,
`choices`), or what another reward prefers; how much noise there is in each; how often it sees a defect; what a picture
costs. Preferences are those among a prompt's pictures; where most pictures are alone with their prompt, also those
across prompts. A reward that fails is named, the others are reported, and the exit status is 1.

A reward that disagrees with people on the pictures that the policy draws now will not lead it to where they agree; two
that agree fully say the same twice; one whose noise is as large as its differences teaches noise.
"""

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from accelerate import PartialState
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

transformers.logging.set_verbosity_error()  # says on import what does not concern us
transformers.logging.disable_progress_bar()
diffusers.logging.disable_progress_bar()

from finetune.agreement_measures import (  # noqa: E402
    FELLOWS,
    across_prompts,
    groups_of,
    noise_share,
    pair_accuracy,
    pair_accuracy_across,
    preference,
    share_with_fellows,
    spread_within,
    within_prompts,
)
from finetune.agreement_opinions import OneTerm, Opinions, Panel, ask, ask_about, in_a_line  # noqa: E402
from finetune.choices import Choices, open_choices  # noqa: E402
from finetune.generate import Generation, GenerationArguments, draw_missing  # noqa: E402
from finetune.pool import Pool, open_pool  # noqa: E402
from finetune.reward_choice import split_terms  # noqa: E402
from reward.arguments import main_guard, parse_arguments, read_prompt_file  # noqa: E402
from reward.by_name import check_reward_name, make_reward, read_named_rewards  # noqa: E402
from reward.intervals import Figure  # noqa: E402
from reward.whole_files import write_whole  # noqa: E402

logger = logging.getLogger(__name__)

ACROSS = ", across prompts"
"""Behind the name of a rater whose preferences among all pictures, whatever their prompts, others are held against."""


@dataclass
class AgreementArguments:
    """Which pictures, by whose opinions."""

    pictures: str = field(
        metadata={
            "help": "Pictures with prompts: a folder with metadata.jsonl or metadata.csv (columns file_name, text), a "
            "saved `datasets` data set, or a folder of parquet files. With `policy`: where the pictures are drawn to."
        }
    )
    rewards: dict = field(
        metadata={
            "help": "Name -> `package.module:Attribute`, or {reward:, kwargs:, term: one of its terms in place of its "
            "objective}: the rewards to compare."
        }
    )
    report: str = field(metadata={"help": "JSON file for all figures."})
    labels: list[str] = field(
        default_factory=list,
        metadata={"help": "Columns of the pictures' table that hold people's numbers, higher is better."},
    )
    against: list[str] = field(
        default_factory=list,
        metadata={"help": "Rewards or labels that the rewards' preferences are held against; default: the labels."},
    )
    choices: str | None = field(
        default=None,
        metadata={
            "help": "Pairs of pictures of which people chose one, which the rewards' preferences are held against too: "
            "a folder of Pick-a-Pic's parquet files, or a saved data set with its columns jpg_0, jpg_1, caption, "
            "label_0."
        },
    )
    choices_split: str = field(default="train", metadata={"help": "Which split of saved `choices` that have several."})
    most_choices: int | None = field(default=None, metadata={"help": "The first so many pairs only; default: all."})
    most_pictures: int | None = field(
        default=None, metadata={"help": "Look at the first so many pictures only; default: at all."}
    )
    prompt_column: str | None = field(
        default=None, metadata={"help": "Column of the prompts; default: text, prompt or caption."}
    )
    split: str = field(default="train", metadata={"help": "Which split of a saved data set that has several."})
    reward_batch_size: int = field(default=32, metadata={"help": "Pictures that a reward judges at once."})
    use_cpu: bool = field(default=False, metadata={"help": "Use no GPU."})

    def __post_init__(self):
        self.against = self.against or list(self.labels)
        named = read_named_rewards("rewards", split_terms(self.rewards)[0], weights=False)
        if not named:
            raise ValueError("there is no reward to look at; name at least one in `rewards`")
        if both := sorted(set(named) & set(self.labels)):
            raise ValueError(f"{both} are names of rewards and of labels; rename the rewards")
        if unknown := sorted(set(self.against) - set(named) - set(self.labels)):
            raise ValueError(f"against names {unknown}, which are neither among the rewards nor the labels")
        if self.most_pictures is not None and self.most_pictures < 2:
            raise ValueError(f"most_pictures is {self.most_pictures}; agreement needs at least 2")
        if self.most_choices is not None and self.most_choices < 1:
            raise ValueError(f"most_choices is {self.most_choices}; it must be at least 1")
        if self.reward_batch_size < 1:
            raise ValueError(f"reward_batch_size is {self.reward_batch_size}; it must be at least 1")


@dataclass(frozen=True)
class Agreement:
    """All figures; `within` and `across` are rater -> rater -> figure.

    Attributes:
        accuracy: rater that the others are held against -> reward -> `pair_accuracy`; where a smaller share of its
            pictures than `FELLOWS` has another of its own prompt, also `name + ACROSS` -> reward ->
            `pair_accuracy_across`.
        noise: change -> reward -> `noise_share`.
        defects: defect -> reward -> `preference` for the picture without it.
        spread: rater -> `spread_within`.
        chosen: reward -> how often it prefers what people chose of two.
    """

    raters: list[str]
    pictures: int
    prompts: int
    within: Mapping[str, Mapping[str, Figure]]
    across: Mapping[str, Mapping[str, Figure]]
    accuracy: Mapping[str, Mapping[str, Figure]]
    noise: Mapping[str, Mapping[str, float | None]]
    defects: Mapping[str, Mapping[str, Figure]]
    spread: Mapping[str, float]
    milliseconds: Mapping[str, float]
    chosen: Mapping[str, Figure]


def main(argv: Sequence[str] | None = None) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    arguments, generation = parse_arguments([AgreementArguments, GenerationArguments], argv)

    # Whatever can be wrong with the input is found out before models are loaded.
    drawing, choices = open_input(arguments, generation)
    bare, terms = split_terms(arguments.rewards)
    named = read_named_rewards("rewards", bare, weights=False)

    state = PartialState(cpu=arguments.use_cpu)
    if state.num_processes > 1:
        raise ValueError(f"agreement is measured in one process, not in {state.num_processes}; start it with python")
    console = Console(highlight=False)
    rewards = {name: make_reward(entry.reward, entry.kwargs) for name, entry in named.items()}
    for reward in rewards.values():
        if hasattr(reward, "to"):
            reward.to(state.device)
    rewards |= {name: OneTerm(name, rewards[name], term) for name, term in terms.items()}
    if drawing is not None:
        draw_missing(drawing, state, console)
    pool = open_pool(arguments.pictures, arguments.prompt_column, arguments.split)
    labels, count = read_labels(pool, arguments), pictures_of(pool, arguments)
    for label, numbers in labels.items():
        if lacking := int(np.isnan(numbers).sum()):
            logger.warning("%d of %d pictures have no %s, and do not count for it", lacking, count, label)
    panel = Panel(rewards)
    opinions = ask_all(pool, count, panel, labels, choices, arguments.reward_batch_size, state.device)
    found = agreement(opinions, list(panel.rewards), [name for name in arguments.against if name not in panel.failed])
    write_report(arguments, opinions, found, panel.failed)
    print_tables(console, found, list(panel.rewards))
    console.print(f"all figures: {arguments.report}", soft_wrap=True, markup=False)
    state.destroy_process_group()
    if panel.failed:
        print(
            f"error: {len(panel.failed)} of {len(rewards)} rewards failed: {in_a_line(panel.failed)}", file=sys.stderr
        )
        sys.exit(1)


def open_input(
    arguments: AgreementArguments, generation: GenerationArguments
) -> tuple[Generation | None, Choices | None]:
    """All that is asked about, looked at: what is to be drawn, if pictures are, and the pairs that people chose from.

    Raises:
        ValueError: a reward that cannot be made, pictures, labels or choices that cannot be read.
    """
    for entry in read_named_rewards("rewards", split_terms(arguments.rewards)[0], weights=False).values():
        check_reward_name(entry.reward, entry.kwargs)
    drawing = None
    if generation.policy is not None:
        if arguments.labels:
            raise ValueError(f"policy draws the pictures, so they have no labels {arguments.labels}; leave one out")
        drawing = Generation(arguments.pictures, generation, read_prompt_file(generation.prompts))
        generation.check()
    else:
        read_labels(open_pool(arguments.pictures, arguments.prompt_column, arguments.split), arguments)
    choices = None
    if arguments.choices is not None:
        choices = open_choices(arguments.choices, arguments.choices_split, arguments.most_choices)
    return drawing, choices


def pictures_of(pool: Pool, arguments: AgreementArguments) -> int:
    """How many of the pool's pictures are looked at.

    Raises:
        ValueError: fewer than two.
    """
    count = min(len(pool.entries), arguments.most_pictures or len(pool.entries))
    if count < 2:
        raise ValueError(f"{pool.place} holds {count} pictures; agreement needs at least 2")
    return count


def read_labels(pool: Pool, arguments: AgreementArguments) -> dict[str, np.ndarray]:
    """People's numbers for the pictures that are looked at, by column: (N,) each, NaN where they gave none.

    Raises:
        ValueError: there is no such column, it holds something that is no finite number, the picture is named, or fewer
            than two numbers.
    """
    entries, found = pool.entries[: pictures_of(pool, arguments)], {}
    for label in arguments.labels:
        if not any(label in entry.columns for entry in entries):
            columns = ", ".join(entries[0].columns) or "none"
            raise ValueError(f"labels: {pool.place} has no column {label}; it has {columns}")
        said = [entry.columns.get(label) for entry in entries]
        given = np.array([one is not None and one != "" and one == one for one in said])  # NaN is not itself
        numbers = np.array([_number(one) for one in said])
        if (wrong := np.flatnonzero(given & ~np.isfinite(numbers))).size:
            entry = entries[wrong[0]]
            raise ValueError(f"labels: {label} of {entry.name} is {entry.columns[label]!r}, no finite number")
        if given.sum() < 2:
            raise ValueError(
                f"labels: {given.sum()} of {len(entries)} pictures have {label}; agreement needs at least 2"
            )
        found[label] = numbers
    return found


def ask_all(
    pool: Pool,
    count: int,
    panel: Panel,
    labels: Mapping[str, np.ndarray],
    choices: Choices | None,
    batch_size: int,
    device: torch.device,
) -> Opinions:
    """What those of a panel that do not fail say of the first `count` pictures and of `choices`, if there are any; with
    progress bars.

    Raises:
        ValueError: a picture cannot be read, or every reward failed.
    """
    with tqdm(total=count, dynamic_ncols=True, unit="picture") as bar:
        opinions = ask(pool, count, panel, labels, batch_size, device, bar.update)
    if choices is not None:
        with tqdm(total=len(choices), dynamic_ncols=True, unit="pair") as bar:
            chosen = ask_about(choices, panel, device, bar.update)
        opinions = replace(opinions, chosen=chosen, captions=list(choices.captions))
    return opinions.without(panel.failed)


def write_report(
    arguments: AgreementArguments, opinions: Opinions, found: Agreement, failed: Mapping[str, str]
) -> None:
    """All figures, what every rater said of every picture (null where nothing), and `failed`: reward -> why."""
    every = {name: [None if np.isnan(one) else one for one in said.tolist()] for name, said in opinions.values.items()}
    facts = {"settings": asdict(arguments), **asdict(found), "failed": dict(failed)}
    facts |= {"prompts_of_pictures": opinions.prompts, "values": every}
    write_whole(Path(arguments.report), (json.dumps(facts, indent=1, ensure_ascii=False) + "\n").encode())


def agreement(opinions: Opinions, rewards: Sequence[str], against: Sequence[str]) -> Agreement:
    """All figures of some opinions; pure.

    Args:
        rewards: names of the raters that are rewards.
        against: names of the raters that their preferences are held against.
    """
    raters, groups = list(opinions.values), groups_of(opinions.prompts)
    values = np.stack([opinions.values[name] for name in raters])
    accuracy = {}
    for truth in against:
        true, held = opinions.values[truth], [name for name in rewards if name != truth]
        accuracy[truth] = {name: pair_accuracy(opinions.values[name], true, groups) for name in held}
        if share_with_fellows(groups[np.isfinite(true)]) < FELLOWS:
            accuracy[truth + ACROSS] = {
                name: pair_accuracy_across(opinions.values[name], true, groups) for name in held
            }
    noise = {
        change: {name: noise_share(opinions.values[name], said[name], groups) for name in rewards}
        for change, said in opinions.changed.items()
    }
    defects = {
        defect: {name: preference(opinions.values[name], said[name], groups) for name in rewards}
        for defect, said in opinions.defective.items()
    }
    return Agreement(
        raters,
        pictures=values.shape[1],
        prompts=int(groups.max()) + 1,
        within=_by_name(raters, within_prompts(values, groups)),
        across=_by_name(raters, across_prompts(values, groups)),
        accuracy=accuracy,
        noise=noise,
        defects=defects,
        spread={name: spread_within(opinions.values[name], groups) for name in raters},
        milliseconds=dict(opinions.milliseconds),
        chosen={
            name: preference(margins, np.zeros_like(margins), groups_of(opinions.captions))
            for name, margins in opinions.chosen.items()
        },
    )


def print_tables(console: Console, found: Agreement, rewards: Sequence[str]) -> None:
    title = f"{found.pictures} pictures of {found.prompts} prompts"
    table = Table(title=title)
    headings = ["reward", "ms a picture", "spread", *(f"noise, {change}" for change in found.noise)]
    headings += ["right about people's choices"] * bool(found.chosen)
    for heading in [*headings, *(f"right about {truth}" for truth in found.accuracy)]:
        table.add_column(heading, justify="left" if heading == "reward" else "right")
    for name in rewards:
        noise = ["-" if said[name] is None else f"{said[name]:.3f}" for said in found.noise.values()]
        asked = ([found.chosen] if found.chosen else []) + list(found.accuracy.values())
        right = [_in_words(said.get(name), line="\n") for said in asked]
        table.add_row(name, f"{found.milliseconds[name]:.1f}", f"{found.spread[name]:.4g}", *noise, *right)
    console.print(table)
    table = Table(title="how often the sound picture is preferred to the same with a planted defect; 0.5 is chance")
    for heading in ("reward", *found.defects):
        table.add_column(heading, justify="left" if heading == "reward" else "right")
    for name in rewards:
        table.add_row(name, *(_in_words(said[name], line="\n") for said in found.defects.values()))
    console.print(table)
    for where, figures in (("within prompts", found.within), ("across prompts", found.across)):
        table = Table(title=f"rank correlation {where}")
        for heading in ("", *found.raters):
            table.add_column(heading, justify="right" if heading else "left")
        for place, one in enumerate(found.raters):
            cells = [_in_words(figures[one][other], line="\n") for other in found.raters[:place]]
            table.add_row(one, *cells, "1")
        console.print(table)


def _by_name(raters: Sequence[str], figures: list[list[Figure]]) -> dict[str, dict[str, Figure]]:
    return {one: dict(zip(raters, row, strict=True)) for one, row in zip(raters, figures, strict=True)}


def _in_words(figure: Figure | None, line: str = " ") -> str:
    if figure is None or figure.value is None:
        return "-"
    interval = "" if figure.low is None else f"{line}({figure.low:.2f} .. {figure.high:.2f})"
    return f"{figure.value:.2f}{interval}"


def _number(value: object) -> float:
    try:
        return float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return float("nan")


if __name__ == "__main__":
    main_guard(main)
