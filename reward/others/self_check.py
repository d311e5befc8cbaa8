"""Does a reward of others, with the weights that are there, say what it should of two pictures whose prompts are known?

    python -m reward.others --self_check --reward pickscore --model DIR [--kwargs '{"processor": "DIR"}']

Two things are looked at: whether the scores are on the scale on which that reward's scores are known to be (wide, since
these two pictures are drawings), and, where the reward reads prompts, whether each picture is liked better for its own
prompt than for the other's. A preprocessing of another kind, a wrong scale or a half-loaded model fails one of the two;
a small deviation does not. Without `--self_check`, the rewards and their scales are listed.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from reward.arguments import parse_arguments
from reward.by_name import check_reward_name, make_reward
from reward.data import to_tensor
from reward.feedback import RewardFn, check_reward
from reward.pictures import decode

PICTURES = {"circle.png": "a red circle on a white background", "star.png": "a yellow star on a dark blue background"}
"""File in `pictures/` -> its prompt."""


@dataclass(frozen=True)
class Known:
    """What is known of a reward.

    Attributes:
        attribute: its class in `reward.others`.
        low, high: between these its scores of the two pictures must be.
        scale: where scores of generated pictures mostly are, in words.
        reads_prompt: whether it depends on the prompt.
    """

    attribute: str
    low: float
    high: float
    scale: str
    reads_prompt: bool = True


KNOWN: Mapping[str, Known] = {
    "pickscore": Known("PickScore", 12, 30, "17 to 25"),
    "clipscore": Known("CLIPScore", 0.3, 1.2, "0.5 to 0.9 (weight 2.5)"),
    "hpsv2": Known("HPSv2", 0.1, 0.45, "0.2 to 0.35"),
    "imagereward": Known("ImageReward", -3.0, 3.0, "-2.5 to 2"),
    "aesthetic": Known("AestheticScore", 1, 9, "4.5 to 7", reads_prompt=False),
    "vqascore": Known("VQAScore", 0, 1, "0 to 1"),
    "jpeg_incompressibility": Known("JpegIncompressibility", 2, 20, "50 to 250 kB at 512 px", reads_prompt=False),
    "jpeg_compressibility": Known("JpegCompressibility", -20, -2, "-250 to -50 kB at 512 px", reads_prompt=False),
}


@dataclass(frozen=True)
class Verdict:
    """What a reward said.

    Attributes:
        own, other: (2,) of each picture for its own prompt, and for the other's.
        wrong: what is not as it should be, in words; empty if all is.
    """

    own: torch.Tensor
    other: torch.Tensor
    wrong: Sequence[str]


@torch.no_grad()
def self_check(reward_fn: RewardFn, known: Known) -> Verdict:
    """Ask `reward_fn` about the two pictures.

    Raises:
        RewardError: what it says is no reward, or not finite.
    """
    images, prompts = read_pictures(), list(PICTURES.values())
    said = []
    for asked in (prompts, prompts[::-1]):
        reward = reward_fn(images, asked)
        check_reward(reward, asked)
        said.append(reward.total.float().cpu())
    own, other = said
    wrong = []
    if not ((own >= known.low) & (own <= known.high)).all():
        values = " and ".join(f"{value:.4g}" for value in own.tolist())
        wrong.append(
            f"its scores, {values}, are not between {known.low:g} and {known.high:g}: the weights, their scale or the "
            "preprocessing are of another model"
        )
    if known.reads_prompt and not (own > other).all():
        wrong.append("it likes a picture no less for the other's prompt: the text or the picture is not read as it was")
    return Verdict(own, other, wrong)


def read_pictures() -> torch.Tensor:
    """The two pictures, (2, 3, 256, 256) in [0, 1]."""
    folder = Path(__file__).parent / "pictures"
    return torch.stack([to_tensor(decode((folder / name).read_bytes())) for name in PICTURES]).float() / 255


@dataclass
class SelfCheckArguments:
    self_check: bool = field(default=False, metadata={"help": "Score the two pictures; else the rewards are listed."})
    reward: str | None = field(default=None, metadata={"help": f"Which one: {', '.join(KNOWN)}."})
    model: str | None = field(default=None, metadata={"help": "Its `model`: a folder or file, or a name on the hub."})
    kwargs: dict = field(default_factory=dict, metadata={"help": "More arguments of its class, as JSON."})
    device: str = field(default="cpu", metadata={"help": "Where it computes, such as cuda."})

    def __post_init__(self):
        if not self.self_check:
            if self.reward or self.model or self.kwargs:
                raise ValueError("reward, model and kwargs are for --self_check; add it, or leave them out")
            return
        if self.reward not in KNOWN:
            near = difflib.get_close_matches(str(self.reward), KNOWN, n=1, cutoff=0.0)[0]
            raise ValueError(f"reward is {self.reward!r}; it must be one of {', '.join(KNOWN)} (nearest: {near!r})")
        try:
            torch.device(self.device)
        except RuntimeError as error:
            raise ValueError(f"device is {self.device!r}; write cpu, cuda or cuda:1") from error


def main(argv: Sequence[str] | None = None) -> None:
    (args,) = parse_arguments([SelfCheckArguments], argv)
    console = Console(highlight=False)
    if not args.self_check:
        _print_known(console.print)
        return
    known = KNOWN[args.reward]
    name, kwargs = f"reward.others:{known.attribute}", args.kwargs | ({"model": args.model} if args.model else {})
    check_reward_name(name, kwargs)
    reward = make_reward(name, kwargs)
    if hasattr(reward, "to"):
        reward.to(args.device)
    verdict = self_check(reward, known)
    _print_verdict(console.print, args.reward, known, verdict)
    if verdict.wrong:
        raise ValueError(f"{args.reward} is not as it should be: {'; '.join(verdict.wrong)}")
    console.print("as it should be")


def _print_known(show: Callable) -> None:
    table = Table()
    for heading in ("--reward", "class", "scores mostly", "prompt"):
        table.add_column(heading, no_wrap=heading in ("--reward", "class"))
    for name, known in KNOWN.items():
        table.add_row(name, known.attribute, known.scale, "read" if known.reads_prompt else "")
    show(table)


def _print_verdict(show: Callable, name: str, known: Known, verdict: Verdict) -> None:
    table = Table("picture's prompt", name, *(["for the other's prompt"] if known.reads_prompt else []))
    for prompt, own, other in zip(PICTURES.values(), verdict.own.tolist(), verdict.other.tolist(), strict=True):
        table.add_row(prompt, f"{own:.4f}", *([f"{other:.4f}"] if known.reads_prompt else []))
    show(table)
    show(f"generated pictures mostly get {known.scale}; these two must get {known.low:g} to {known.high:g}")
