"""Agreement before training: what several rewards say of the same pictures, and what each is worth.

    python -m finetune.agreement --config configs/agreement_tinyworld.yaml [--any_setting value]

Pictures with prompts are taken from a folder or a `datasets` data set, or drawn first, as `finetune.select` does. Each
reward judges them as they are, once more in another order, after a JPEG of quality 95, moved by one pixel, and with
planted defects. A table and a JSON say: how the rewards' orders of the pictures agree, within prompts and across; how
often each prefers what people prefer, where the pictures come with their numbers (or as pairs of which one was chosen,
`choices`), or what another reward prefers; how much noise there is in each; how often it sees a defect; what a picture
costs.

A reward that disagrees with people on the pictures that the policy draws now will not lead it to where they agree; two
that agree fully say the same twice; one whose noise is as large as its differences teaches noise.
"""

import json
import logging
from collections import defaultdict
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
    across_prompts,
    groups_of,
    noise_share,
    pair_accuracy,
    preference,
    spread_within,
    within_prompts,
)
from finetune.choices import Choices, open_choices  # noqa: E402
from finetune.compare.rewards import split_terms  # noqa: E402
from finetune.files import write_whole  # noqa: E402
from finetune.generate import Generation, GenerationArguments  # noqa: E402
from finetune.planted_defects import DEFECTS  # noqa: E402
from finetune.pool import Pool, open_pool  # noqa: E402
from finetune.predictions import read_pictures  # noqa: E402
from finetune.select import draw_missing  # noqa: E402
from finetune.small_changes import ASKED_AGAIN, CHANGES  # noqa: E402
from reward.arguments import main_guard, parse_arguments, read_prompt_file  # noqa: E402
from reward.by_name import check_reward_name, make_reward, read_named_rewards  # noqa: E402
from reward.feedback import Reward, RewardFn  # noqa: E402
from reward.intervals import Figure  # noqa: E402
from rl.scoring import score  # noqa: E402
from rl.timing import now  # noqa: E402

logger = logging.getLogger(__name__)


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
class OneTerm:
    """A reward whose objective is one of another's terms; `name` is what messages call it."""

    name: str
    reward: RewardFn
    term: str
    differentiable = False

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> Reward:
        """See `reward.feedback.RewardFn`.

        Raises:
            ValueError: there is no such term.
        """
        terms = self.reward(images, prompts).terms
        if self.term not in terms:
            raise ValueError(f"rewards: {self.name} has no term {self.term!r}; it has {', '.join(terms) or 'none'}")
        return Reward(total=terms[self.term])


@dataclass(frozen=True)
class Opinions:
    """What R raters said of N pictures.

    Attributes:
        prompts: N.
        values: rater -> (N,) float64: rewards' objectives, then labels.
        changed: `ASKED_AGAIN` or name of a change (`CHANGES`) -> reward -> (N,), of the same or the changed pictures.
        defective: name of a defect (`DEFECTS`) -> reward -> (N,), of the pictures with it.
        milliseconds: reward -> of one picture, the median over batches.
        chosen: reward -> (C,), by how much it prefers, of C pairs, the picture that people chose; `captions` of them.
    """

    prompts: list[str]
    values: Mapping[str, np.ndarray]
    changed: Mapping[str, Mapping[str, np.ndarray]]
    defective: Mapping[str, Mapping[str, np.ndarray]]
    milliseconds: Mapping[str, float]
    chosen: Mapping[str, np.ndarray] = field(default_factory=dict)
    captions: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Agreement:
    """All figures; `within`, `across` and `accuracy` are rater -> rater -> figure (`accuracy`: against -> reward).

    Attributes:
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
    with tqdm(total=count, dynamic_ncols=True, unit="picture") as bar:
        opinions = ask(pool, count, rewards, labels, arguments.reward_batch_size, state.device, bar.update)
    if choices is not None:
        with tqdm(total=len(choices), dynamic_ncols=True, unit="pair") as bar:
            opinions = replace(
                opinions, chosen=ask_about(choices, rewards, state.device, bar.update), captions=list(choices.captions)
            )
    found = agreement(opinions, list(rewards), arguments.against)
    every = {name: [None if np.isnan(one) else one for one in said.tolist()] for name, said in opinions.values.items()}
    facts = {"settings": asdict(arguments), **asdict(found), "prompts_of_pictures": opinions.prompts, "values": every}
    write_whole(Path(arguments.report), (json.dumps(facts, indent=1, ensure_ascii=False) + "\n").encode())
    print_tables(console, found, list(rewards))
    console.print(f"all figures: {arguments.report}", soft_wrap=True, markup=False)
    state.destroy_process_group()


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


@torch.no_grad()
def ask(
    pool: Pool,
    count: int,
    rewards: Mapping[str, RewardFn],
    labels: Mapping[str, np.ndarray],
    batch_size: int,
    device: torch.device,
    on_pictures=lambda count: None,
) -> Opinions:
    """Ask every reward about the first `count` pictures of a pool, as they are and changed.

    Pictures of one size are judged together, at most `batch_size` at once. Calls `on_pictures` with how many are done.

    Raises:
        ValueError: a picture cannot be read.
        RewardError: a reward says something that is not finite; the prompt is named.
    """
    prompts = [entry.prompt for entry in pool.entries[:count]]
    values = {name: np.full(count, np.nan) for name in rewards}
    changed = {change: {name: np.full(count, np.nan) for name in rewards} for change in (ASKED_AGAIN, *CHANGES)}
    defective = {defect: {name: np.full(count, np.nan) for name in rewards} for defect in DEFECTS}
    seconds = defaultdict(list)
    for places, images in _batches(pool, count, batch_size):
        images, asked = images.to(device), [prompts[place] for place in places]
        for name, reward in rewards.items():
            began = now(device)
            values[name][places] = _objective(reward, images, asked)
            seconds[name].append((now(device) - began) / len(places))
        for name, reward in rewards.items():
            again = _objective(reward, images.flip(0), asked[::-1])
            changed[ASKED_AGAIN][name][places] = again[::-1]
        for change, apply in CHANGES.items():
            other = apply(images)
            for name, reward in rewards.items():
                changed[change][name][places] = _objective(reward, other, asked)
        for defect, plant in DEFECTS.items():
            other, said = plant(images, asked, places, prompts)
            for name, reward in rewards.items():
                defective[defect][name][places] = _objective(reward, other, said)
        on_pictures(len(places))
    later = {name: taken[1:] or taken for name, taken in seconds.items()}  # the first batch warms up
    milliseconds = {name: 1000 * float(np.median(taken)) for name, taken in later.items()}
    return Opinions(prompts, {**values, **labels}, changed, defective, milliseconds)


@torch.no_grad()
def ask_about(
    choices: Choices, rewards: Mapping[str, RewardFn], device: torch.device, on_pairs=lambda count: None
) -> dict[str, np.ndarray]:
    """By how much each reward prefers, of each of C pairs, the picture that people chose: name -> (C,).

    A pair at a time: its pictures may differ in size from each other, and pairs from pairs.

    Raises:
        ValueError: a picture cannot be read.
        RewardError: a reward says something that is not finite; the prompt is named.
    """
    found = {name: np.empty(len(choices)) for name in rewards}
    for number, (caption, first) in enumerate(zip(choices.captions, choices.first, strict=True)):
        pictures = [picture[None].to(device).float() / 255 for picture in choices.read(number)]
        for name, reward in rewards.items():
            one, other = (float(_objective(reward, picture, [caption])[0]) for picture in pictures)
            found[name][number] = one - other if first else other - one
        on_pairs(1)
    return found


def agreement(opinions: Opinions, rewards: Sequence[str], against: Sequence[str]) -> Agreement:
    """All figures of some opinions; pure.

    Args:
        rewards: names of the raters that are rewards.
        against: names of the raters that their preferences are held against.
    """
    raters, groups = list(opinions.values), groups_of(opinions.prompts)
    values = np.stack([opinions.values[name] for name in raters])
    accuracy = {
        truth: {
            name: pair_accuracy(opinions.values[name], opinions.values[truth], groups)
            for name in rewards
            if name != truth
        }
        for truth in against
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


def _batches(pool: Pool, count: int, batch_size: int):
    """Places and pictures (b, 3, H, W) in [0, 1], b at most `batch_size`, of one size each."""
    for start in range(0, count, batch_size):
        by_size = defaultdict(list)
        places = range(start, min(start + batch_size, count))
        for place, picture in zip(places, read_pictures(pool, places), strict=True):
            by_size[picture.shape].append((place, picture))
        for pairs in by_size.values():
            mine, pictures = zip(*pairs, strict=True)
            yield list(mine), torch.stack(pictures).float() / 255


def _objective(reward: RewardFn, images: torch.Tensor, prompts: list[str]) -> np.ndarray:
    return score(reward, images, prompts).objective.double().cpu().numpy()


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
