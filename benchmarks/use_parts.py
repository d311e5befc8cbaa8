"""What the benchmarks of uses share: a training or a drawing that several of them need is the same part in all, and so,
in the same `--work`, is done once.
"""

import json
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from demo_proof import UNSEEN
from long_runs import add_flags, work_folder
from parts import Part

from reward.arguments import read_prompt_file

TRAINING, DRAWING = "use_training.py", "use_drawing.py"
WORK = "outputs/uses"
POLICY = "tinyworld/assets/sd"
DDPO, DRAFT = "configs/ddpo_tinyworld.yaml", "configs/draft_tinyworld.yaml"
REGION = "configs/draft_tinyworld_region.yaml"
SELECT, SFT, GUIDE, INPAINT = (f"configs/{name}_tinyworld.yaml" for name in ("select", "sft", "guide", "inpaint"))
HELD_OUT, TRAINED_ON = "tinyworld/assets/prompts_held_out.txt", "tinyworld/assets/prompts_train.txt"
QUIET = ("--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "true", *UNSEEN)
"""A run's own looks would draw more pictures than it trains on, and nobody reads them here."""
JUDGED = 192
"""So many held-out prompts are judged, the last ones: guidance was tuned on 48 of the 64 before them (see `uses.py`).
"""
BASE = "base"
DRAFT_K, HELD_TO_REGIONS = "DRaFT-K, K = 1", "DRaFT-K, held to problem regions"
SFT_ON_SELECTED, BY_DDPO = "SFT on selected", "DDPO, credit image"
VARIANTS = {
    "DRaFT": ["--variant", "draft"],
    DRAFT_K: ["--variant", "draft_k"],
    "DRaFT-LV": ["--variant", "draft_lv"],
    "AlignProp": ["--variant", "alignprop"],
    "ReFL": ["--variant", "refl"],
}


def add_use_flags(parser: ArgumentParser) -> None:
    """What all of them take; and the further flags of each kind of command, which only a quick run sets."""
    add_flags(parser, WORK)
    parser.add_argument(
        "--prompts", type=at_least_two, default=JUDGED, metavar="N",
        help=f"the last so many of the held-out prompts (default {JUDGED}: guidance was tuned on some of the others)",
    )  # fmt: skip
    parser.add_argument("--generations", type=at_least_two, default=2, metavar="N", help="pictures of each (default 2)")
    parser.set_defaults(judged=HELD_OUT, ddpo_flags=[], draft_flags=[], select_flags=[], sft_flags=[])


def at_least_two(text: str) -> int:
    """A count given on the command line, of what only several have an interval or a diversity of.

    Raises:
        ArgumentTypeError: it is less than 2.
    """
    count = int(text)
    if count < 2:
        raise ArgumentTypeError(f"{text} is too few; it must be at least 2")
    return count


def make_quick(options: Namespace, pool: int = 2) -> None:
    """As little of everything as there can be.

    Args:
        pool: pictures of each prompt, of which the best one is selected.
    """
    options.seeds, options.jobs, options.prompts = 1, 2, 6
    few = work_folder(options) / "prompts.txt"
    few.parent.mkdir(parents=True, exist_ok=True)
    few.write_text("\n".join(read_prompt_file(TRAINED_ON)[:4]) + "\n")
    options.ddpo_flags = ["--num_train_epochs", "1", "--generation_batch_size", "16",
                          "--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "2"]  # fmt: skip
    options.draft_flags = ["--num_train_epochs", "1", "--per_device_train_batch_size", "4",
                           "--gradient_accumulation_steps", "1"]  # fmt: skip
    rules = {"best of its prompt": {"best_of": "overall"}}
    options.select_flags = ["--prompts", str(few.absolute()), "--num_generations", str(pool),
                            "--rules", json.dumps(rules)]  # fmt: skip
    options.sft_flags = [*options.sft_flags, "--max_steps", "2", "--per_device_train_batch_size", "4"]


def training(name: str, seed: int, command: Sequence[object], config: str, *needs: Part, draws: bool = True) -> Part:
    """A training by a command of the toolkit.

    Args:
        command: behind `python`; see `use_training.train`.
        draws: whether it draws pictures itself.
    """
    how = {"command": [*map(str, command)], "draws": draws}
    return Part(name, seed, TRAINING, how, needs, (config, TRAINED_ON))


def by_ddpo(name: str, seed: int, options: Namespace, credit: str = "image", after: Part | None = None) -> Part:
    """The demo's run.

    Args:
        after: the training whose LoRA it begins with.
    """
    more = ["--credit", credit]
    if credit == "paid":  # which has no ratio of a whole picture
        more += ["--importance_sampling_level", "location"]
    if after:
        more += ["--init_adapter", "{need}/run"]
    command = ["run_ddpo.py", *_flags(DDPO, seed, [*more, *options.ddpo_flags])]
    return training(name, seed, command, DDPO, *([after] if after else []))


def by_draft(name: str, seed: int, options: Namespace, *more: str, config: str = DRAFT) -> Part:
    """Back-propagation; `more` flags than the config's settings."""
    command = ["-m", "finetune.draft", *_flags(config, seed, [*more, *options.draft_flags])]
    return training(name, seed, command, config)


def selection(seed: int, options: Namespace, config: str = SELECT) -> Part:
    """A pool of pictures, and what the config's rules choose from it."""
    return training("selection", seed, _select(config, seed, "{folder}", options.select_flags), config)


def selection_at_random(count: int, chosen: Part, options: Namespace, config: str = SELECT) -> Part:
    """So many pictures of the same pool, whatever is in them."""
    rules = json.dumps({"at random": {"random": count, "seed": chosen.seed}})
    command = _select(config, chosen.seed, "{need}", [*options.select_flags, "--rules", rules])
    return training("selection at random", chosen.seed, command, config, chosen)


def by_sft(name: str, data: Part, options: Namespace, config: str = SFT) -> Part:
    """Supervised fine-tuning on what was selected."""
    flags = _flags(config, data.seed, ["--data", "{need}/selection/data", *options.sft_flags])
    return training(name, data.seed, ["-m", "finetune.sft", *flags, "--reward", ""], config, data, draws=False)


def drawing(
    name: str, seed: int, options: Namespace, by: str, *needs: Part, config: str | None = None, **how: Any
) -> Part:
    """Pictures, judged.

    Args:
        options: `judged`, a file of prompts, how many of them, the last ones, and how many pictures of each.
        by: see `use_drawing.draw`.
        needs: the training whose LoRA draws; or the pictures that are to be mended.
        config: of the use.
    """
    told = {"by": by, "policy": POLICY, "prompts": read_prompt_file(options.judged)[-options.prompts :],
            "generations": options.generations, "tuned": bool(needs) and needs[0].script == TRAINING, "config": config,
            **how}  # fmt: skip
    return Part(f"pictures of {name}", seed, DRAWING, told, needs, (config,) if config else ())


def states_of_code(done: Mapping[Part, Mapping[str, Any]]) -> int:
    """How many states of the code did these parts: work of days goes on while the code does."""
    return len({result.get("code") for result in done.values()})


def _flags(config: str, seed: int, more: Iterable[str]) -> list[object]:
    return ["--config", config, "--output_dir", "{folder}/run", "--seed", seed, *QUIET, *more]


def _select(config: str, seed: int, where: str, more: Iterable[str]) -> list[object]:
    """Args:
    where: the pool is, a part's folder.
    """
    place = ["--output_dir", "{folder}/selection", "--pictures", f"{where}/pool/pictures"]
    return ["-m", "finetune.select", "--config", config, *place, "--seed", seed, *more]
