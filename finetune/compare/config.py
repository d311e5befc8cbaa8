"""What a comparison of rewards is told, and all that can be known to be wrong with it before anything is run.

An *entrant* is a training: a config of `run_ddpo.py` or `finetune.draft` with changes. An *evaluator* is a reward that
judges what comes out. Which evaluators an entrant trains on follows from the two: those of the same class that read the
same model, whatever their weights; these are one eye, and its approval proves nothing.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from finetune.compare.entrants import Entrant, read_entrant, refuse_twins
from finetune.compare.rewards import Evaluator, Spec, as_text, read_evaluators
from finetune.fingerprints import weights_of
from reward.arguments import read_prompt_file
from rl.adapter import require

_FREE = ("seeds", "jobs", "gpus", "threads", "sheet", "read_sheet", "sheet_pairs", "grid_prompts", "output_dir",
         "title", "only", "overlay", "smallest_difference", "decide_by", "report_only")  # fmt: skip
_NAMED = 5


@dataclass
class CompareArguments:
    """Who is compared, by whom, on what, for how long."""

    entrants: dict = field(
        metadata={
            "help": "Name -> {config: YAML of run_ddpo.py or finetune.draft, command: run_ddpo or finetune.draft, "
            "changes: {setting: value}, upper_bound: true for one that is only to be compared with, note: text, "
            "against: the entrant that it is to be compared with, a question of its own}."
        }
    )
    evaluators: dict = field(
        metadata={
            "help": "Who judges: name -> `package.module:Attribute`, or {reward:, kwargs:, term: one of its terms in "
            "place of its objective}. Which of them nobody trains on follows from the entrants."
        }
    )
    prompts: str = field(metadata={"help": "Training prompts of all entrants: a UTF-8 text file, one a line."})
    held_out: str = field(metadata={"help": "Held-out prompts, a file like `prompts`; none may be in both."})
    output_dir: str = field(
        metadata={"help": "Folder for the trainings and the report; the same command goes on there."}
    )
    common: dict = field(default_factory=dict, metadata={"help": "Changes of all entrants: setting -> value."})
    title: str = field(default="Which reward should I train on?", metadata={"help": "Heading of the report."})
    decide_by: str | None = field(
        default=None,
        metadata={
            "help": "The evaluator that decides, on which no entrant but an upper bound may train; default: the first "
            "such one."
        },
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2, 3, 4],
        metadata={"help": "Seeds of each entrant's trainings; more may be added to a finished comparison."},
    )
    budget_images: int | None = field(default=None, metadata={"help": "Pictures that each training draws."})
    budget_seconds: float | None = field(
        default=None,
        metadata={
            "help": "Or: seconds of training each; on a CPU they are the processor's. How many pictures they allow is "
            "not known beforehand, so a checkpoint to look at is kept every `save_steps` updates of the entrant's "
            "`changes` or config, or behind every rollout if these name none."
        },
    )
    looks: int = field(
        default=5,
        metadata={
            "help": "Evaluations of each training, evenly spread, the last one at its end; at most, and never more "
            "than it has checkpoints (see `budget_seconds`)."
        },
    )
    held_out_prompts: int | None = field(
        default=None, metadata={"help": "Judge on so many of the held-out prompts, evenly spread; default: all."}
    )
    generations: int = field(default=2, metadata={"help": "Pictures of each held-out prompt; diversity needs two."})
    eval_seed: int = field(default=0, metadata={"help": "Seed of the evaluation's noise."})
    agreement_prompts: int = field(
        default=64,
        metadata={
            "help": "Agreement before training is measured on pictures of so many training prompts; 0: it is not, and "
            "`agreement` must be empty."
        },
    )
    agreement_generations: int = field(default=4, metadata={"help": "Pictures of each of these prompts."})
    agreement: dict = field(
        default_factory=dict,
        metadata={
            "help": "More settings of finetune.agreement, such as {choices: pairs that people chose from}; with "
            "{pictures:, labels:} it asks about these pictures, which people have rated, and nothing is drawn."
        },
    )
    smallest_difference: float | None = field(
        default=None,
        metadata={
            "help": "Smallest gain, in units of the deciding evaluator, that would matter; seeds that are still needed "
            "are counted for it. Default: the difference that was seen."
        },
    )
    overlay: dict = field(
        default_factory=dict,
        metadata={
            "help": "Whose heatmaps (or penalty maps) are laid over pictures: {reward:, kwargs:}; none: bare pictures."
        },
    )
    grid_prompts: int = field(default=8, metadata={"help": "Prompts whose pictures are shown, the worst cases first."})
    only: list[str] = field(default_factory=list, metadata={"help": "Run and report these entrants only."})
    jobs: int = field(default=1, metadata={"help": "Trainings beside each other, where no gpus are named."})
    gpus: list[str] = field(
        default_factory=list,
        metadata={"help": "CUDA devices to spread them over, as CUDA_VISIBLE_DEVICES names them, one each."},
    )
    threads: int = field(default=1, metadata={"help": "Threads of each training's processor work."})
    report_only: bool = field(default=False, metadata={"help": "Run nothing; report what there is."})
    sheet: bool = field(
        default=False, metadata={"help": "Also write blinded side-by-side pages for people, with a CSV to fill in."}
    )
    sheet_pairs: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Who is shown beside whom, each `one/other`; default: the best beside the next, and the base."
        },
    )
    read_sheet: str | None = field(
        default=None, metadata={"help": "A CSV of --sheet that was filled in: count the wins."}
    )

    def __post_init__(self):
        for name in ("common", "overlay", "agreement", "only", "gpus", "sheet_pairs"):
            setattr(self, name, getattr(self, name) or type(getattr(self, name))())
        self.gpus = [str(gpu) for gpu in self.gpus]
        require(bool(self.entrants), "there is no entrant; name at least one training in `entrants`")
        require(bool(self.evaluators), "there is no evaluator; name at least one reward in `evaluators`")
        for name in ("looks", "generations", "jobs", "threads", "grid_prompts"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")
        require(bool(self.seeds), "seeds is empty; name at least one, or three for intervals")
        twice = sorted({seed for seed in self.seeds if self.seeds.count(seed) > 1})
        require(not twice, f"seeds names {twice} twice; a run repeated says nothing new")
        require(
            (self.budget_images is None) != (self.budget_seconds is None),
            f"budget_images is {self.budget_images} and budget_seconds {self.budget_seconds}; give one of the two",
        )
        for name in ("budget_images", "budget_seconds", "smallest_difference"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} is {value}; it must be above 0")
        require(
            self.held_out_prompts is None or self.held_out_prompts >= 2,
            f"held_out_prompts is {self.held_out_prompts}; intervals over prompts need at least 2",
        )
        require(
            self.agreement_prompts >= 0 and (self.agreement_generations >= 2 or not self.agreement_prompts),
            f"agreement_prompts is {self.agreement_prompts} and agreement_generations {self.agreement_generations}; "
            "agreement within prompts needs at least 2 pictures of each",
        )
        if unknown := [name for name in self.only if name not in self.entrants]:
            raise ValueError(f"only names {unknown}; the entrants are {', '.join(self.entrants)}")


@dataclass(frozen=True)
class Comparison:
    """Everything that a comparison's settings say, checked.

    Attributes:
        held_out: the P prompts that are judged.
        decide_by: name of the evaluator that decides; None where every evaluator is trained on.
        weights: of all models on this disk that are named, as `finetune.fingerprints.weights_of` tells them.
    """

    arguments: CompareArguments
    entrants: Sequence[Entrant]
    evaluators: Sequence[Evaluator]
    train_prompts: Sequence[str]
    held_out: Sequence[str]
    decide_by: str | None
    overlay: Spec | None
    weights: Mapping[str, str]

    @property
    def folder(self) -> Path:
        return Path(self.arguments.output_dir)

    def trains_on(self, entrant: Entrant, evaluator: Evaluator) -> bool:
        return bool(entrant.spec.eyes & evaluator.spec.eyes)

    def trained_on_by(self, evaluator: Evaluator) -> list[str]:
        return [entrant.name for entrant in self.entrants if self.trains_on(entrant, evaluator)]

    def impartial(self) -> list[Evaluator]:
        """The evaluators that no entrant trains on, upper bounds aside."""
        chosen = [entrant for entrant in self.entrants if not entrant.upper_bound]
        return [one for one in self.evaluators if not any(self.trains_on(entrant, one) for entrant in chosen)]

    def entrant(self, name: str) -> Entrant:
        return next(one for one in self.entrants if one.name == name)

    def specs(self, base: str | None = None) -> list[Spec]:
        """All rewards, each once: evaluators' first. With `base`, of those entrants that start from it."""
        entrants = [one for one in self.entrants if base in (None, one.base)]
        return list(dict.fromkeys([one.spec for one in (*self.evaluators, *entrants)]))

    def settings(self) -> dict[str, Any]:
        """What the results depend on, by name; of an entrant, all that its training is told."""
        matter = {
            name: value
            for name, value in asdict(self.arguments).items()
            if name not in (*_FREE, "entrants", "common", "evaluators")
        }
        matter |= {f"evaluators.{one.name}": {"reward": one.spec.named, "term": one.term} for one in self.evaluators}
        for one in self.entrants:
            told = {"command": one.command, "config": _says(one.config), **one.changes, "reward": one.spec.named}
            matter |= {f"entrants.{one.name}.{name}": value for name, value in told.items()}
        matter |= {f"{name} (SHA-256)": _digest(getattr(self.arguments, name)) for name in ("prompts", "held_out")}
        matter |= self.weights
        return json.loads(json.dumps(matter, default=str))


def read_comparison(arguments: CompareArguments) -> Comparison:
    """Look at all that settings name; loads no model, and touches nothing on disk.

    Raises:
        ValueError: an entrant, an evaluator or a prompt file is wrong; the message says which, and what to do.
    """
    train_prompts = read_prompt_file(arguments.prompts)
    held_out = _held_out(train_prompts, arguments)
    entrants = [
        read_entrant(name, entry, arguments)
        for name, entry in arguments.entrants.items()
        if not arguments.only or name in arguments.only
    ]
    refuse_twins(entrants)
    evaluators = read_evaluators(arguments.evaluators)
    names = [one.name for one in evaluators]
    if arguments.decide_by is not None and arguments.decide_by not in names:
        raise ValueError(f"decide_by is {arguments.decide_by!r}; the evaluators are {', '.join(names)}")
    overlay = None
    if arguments.overlay:
        require("term" not in arguments.overlay, "overlay has a term; it shows maps, and takes {reward:, kwargs:} only")
        (overlay,) = (one.spec for one in read_evaluators({"overlay": arguments.overlay}))
    for spec in [one.spec for one in (*entrants, *evaluators)] + ([overlay] if overlay else []):
        spec.check()
    told = [json.loads(kwargs) for one in (*entrants, *evaluators) for _, _, kwargs, _ in one.spec.named]
    weights = weights_of(told, [one.start for one in entrants])
    found = Comparison(arguments, entrants, evaluators, train_prompts, held_out, arguments.decide_by, overlay, weights)
    impartial = [one.name for one in found.impartial()]
    if arguments.decide_by is None:
        return replace(found, decide_by=impartial[0]) if impartial else found
    if arguments.decide_by not in impartial:
        decides = next(one for one in evaluators if one.name == arguments.decide_by)
        trained = [one.name for one in entrants if not one.upper_bound and found.trains_on(one, decides)]
        remedy = f"decide by one of {', '.join(impartial)}" if impartial else "leave decide_by out, for no verdict"
        raise ValueError(
            f"decide_by is {decides.name!r}, which is trained on by {', '.join(trained)}, so that a gain there proves "
            f"nothing; {remedy}"
        )
    return found


def _held_out(train_prompts: Sequence[str], arguments: CompareArguments) -> list[str]:
    prompts = read_prompt_file(arguments.held_out)
    trained = {_plain(prompt) for prompt in train_prompts}
    both = list(dict.fromkeys(prompt for prompt in prompts if _plain(prompt) in trained))
    if both:
        raise ValueError(
            f"{len(both)} prompts of {arguments.held_out} are in {arguments.prompts} too ({_listed(both)}); what is "
            "trained on cannot be held out: take them out of one of the files"
        )
    plain = [_plain(prompt) for prompt in prompts]
    if twice := list(dict.fromkeys(p for p, text in zip(prompts, plain, strict=True) if plain.count(text) > 1)):
        raise ValueError(f"{arguments.held_out} has prompts twice ({_listed(twice)}); each is to count once")
    count = min(arguments.held_out_prompts or len(prompts), len(prompts))
    require(count >= 2, f"{arguments.held_out} holds {count} prompt; intervals over prompts need at least 2")
    return [prompts[place * len(prompts) // count] for place in range(count)]


def _listed(prompts: Sequence[str]) -> str:
    more = f" and {len(prompts) - _NAMED} more" if len(prompts) > _NAMED else ""
    return "; ".join(repr(prompt) for prompt in prompts[:_NAMED]) + more


def _plain(prompt: str) -> str:
    """Prompts that differ in spaces and capitals only are the same."""
    return " ".join(prompt.casefold().split())


def _digest(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]


def _says(config: str) -> str:
    """Another one if a YAML says something else; its comments do not count."""
    content = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    return hashlib.sha256(as_text(content).encode()).hexdigest()[:16]
