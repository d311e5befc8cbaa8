"""Does a reward of others, with the weights that are there, say what it should of drawings whose prompts are known?

    python -m reward.others --self_check --reward pickscore --model DIR [--kwargs '{"processor": "DIR"}']

Four drawings and a picture of noise are scored, and four things looked at:

- the scale: every drawing's score for its own prompt lies between `Known.low` and `high`. These bounds are ours, and
  wide, as no source was found for what drawings get. VQAScore's is 0.5: of a drawing's own prompt, a model must be
  surer than not;
- the order, where the reward reads prompts: every drawing is liked better for its own prompt than for each of the other
  three, and for every prompt its drawing better than each of the others, and than noise. A model that is blind to
  pictures or deaf to prompts never passes, one that scores at random once in 1,600 times;
- the sight, where it reads none: the five scores differ by 0.05 at least, and noise makes the larger JPEG. Of an
  AestheticScore that sees, but not as it was trained to, only the scale can tell;
- the preprocessing: its settings are those of the published model. Only where that is one model: not for CLIPScore and
  VQAScore, which take any, and what their folders state.

A small deviation is not found. Without `--self_check`, the rewards and their scales are listed.
"""

import difflib
import math
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
from reward.others.showing import Showing
from reward.pictures import decode

PICTURES = {
    "circle": "a red circle on a white background",
    "star": "a yellow star on a dark blue background",
    "chessboard": "a black and white chessboard",
    "heart": "a purple heart on a light green background",
}
"""Name of each of the P drawings, in `pictures/` with `.png` behind it -> its prompt."""
_NAMES = (*PICTURES, "noise")
_SPREAD = 0.05


@dataclass(frozen=True)
class Known:
    """What is known of a reward.

    Attributes:
        attribute: its class in `reward.others`.
        low, high: between these its scores of the drawings, each for its own prompt, must be.
        scale: where scores of generated pictures mostly are, in words; its class says by what source.
        reads_prompt: whether it depends on the prompt.
        noise: what noise must get where no prompt is read: `less` than the drawings, `more`, or `any`.
        shown: the preprocessing of the published model; None where it may be any.
    """

    attribute: str
    low: float
    high: float
    scale: str
    reads_prompt: bool = True
    noise: str = "any"
    shown: Showing | None = None


_CROPPED, _PADDED = Showing((224, 224), "crop"), Showing((224, 224), "pad")
KNOWN: Mapping[str, Known] = {
    "pickscore": Known("PickScore", 12, 30, "18 to 26", shown=_CROPPED),
    "clipscore": Known("CLIPScore", 0.3, 1.2, "0 to 1, averages 0.76 to 0.83"),
    "hpsv2": Known("HPSv2", 0.1, 0.45, "0.2 to 0.35", shown=_PADDED),
    "imagereward": Known("ImageReward", -3.0, 3.0, "-2.5 to 2", shown=_CROPPED),
    "aesthetic": Known("AestheticScore", 1, 9, "4 to 7.5", reads_prompt=False, shown=_CROPPED),
    "vqascore": Known("VQAScore", 0.5, 1, "0 to 1"),
    "jpeg_incompressibility": Known(
        "JpegIncompressibility", 2, 20, "50 to 250 kB at 512 px", reads_prompt=False, noise="more"
    ),
    "jpeg_compressibility": Known(
        "JpegCompressibility", -20, -2, "minus 50 to 250 kB at 512 px", reads_prompt=False, noise="less"
    ),
}


@dataclass(frozen=True)
class Verdict:
    """What a reward said.

    Attributes:
        scores: (P + 1, P) of each drawing, and of noise, for each drawing's prompt; (P + 1, 1) where no prompt is read.
        wrong: what is not as it should be, in words; empty if all is.
    """

    scores: torch.Tensor
    wrong: Sequence[str]


@torch.no_grad()
def self_check(reward_fn: RewardFn, known: Known) -> Verdict:
    """Ask `reward_fn` about the drawings and noise.

    Raises:
        RewardError: what it says is no reward, or not finite.
    """
    images = torch.cat([read_pictures(), make_noise()[None]])
    prompts = list(PICTURES.values()) if known.reads_prompt else [PICTURES["circle"]]
    said = []
    for prompt in prompts:
        asked = [prompt] * len(images)
        reward = reward_fn(images, asked)
        check_reward(reward, asked)
        said.append(reward.total.float().cpu())
    scores = torch.stack(said, dim=1)
    look = _mixed_up if known.reads_prompt else _unseen
    wrong = [*_off_scale(scores, known), *look(scores, known), *_shown_otherwise(reward_fn, known)]
    return Verdict(scores, wrong)


def _off_scale(scores: torch.Tensor, known: Known) -> list[str]:
    own = scores[:-1].diagonal() if known.reads_prompt else scores[:-1, 0]
    if ((own >= known.low) & (own <= known.high)).all():
        return []
    values = ", ".join(f"{value:.4g}" for value in own.tolist())
    return [
        f"its scores, {values}, are not all between {known.low:g} and {known.high:g}: the weights, their scale, the "
        "preprocessing or the question are of another model"
    ]


def _mixed_up(scores: torch.Tensor, known: Known) -> list[str]:
    own = scores[:-1].diagonal()
    others = scores.masked_fill(torch.eye(*scores.shape, dtype=torch.bool), -math.inf)
    said = {
        "drawings that it likes no better for their own prompt than for another's": others[:-1].max(dim=1),
        "prompts for which it likes their drawing no better than another, or noise": others.max(dim=0),
    }
    wrong = []
    for what, (best, places) in said.items():
        rivals = zip(PICTURES, (own > best).tolist(), places.tolist(), strict=True)
        if named := [f"{name} ({_NAMES[place]})" for name, is_right, place in rivals if not is_right]:
            wrong.append(
                f"there are {what}: {', '.join(named)}; the weights are not whole, or text or picture not read"
            )
    return wrong


def _unseen(scores: torch.Tensor, known: Known) -> list[str]:
    drawn, noise = scores[:-1, 0], scores[-1, 0]
    wrong = []
    if scores.max() - scores.min() < _SPREAD:
        wrong.append(f"its scores of four drawings and noise differ by less than {_SPREAD:g}: it does not see them")
    if (known.noise == "more" and noise <= drawn.max()) or (known.noise == "less" and noise >= drawn.min()):
        wrong.append(f"noise gets {noise:.4g}, where it should get {known.noise} than every drawing")
    return wrong


def _shown_otherwise(reward_fn: RewardFn, known: Known) -> list[str]:
    found = getattr(reward_fn, "showing", None)
    if known.shown is None or found is None or found.in_words == known.shown.in_words:
        return []
    return [f"its preprocessing is {found.in_words}; that of the published model is {known.shown.in_words}"]


def read_pictures() -> torch.Tensor:
    """The drawings, (P, 3, 256, 256) in [0, 1]."""
    folder = Path(__file__).parent / "pictures"
    return torch.stack([to_tensor(decode((folder / f"{name}.png").read_bytes())) for name in PICTURES]).float() / 255


def make_noise() -> torch.Tensor:
    """(3, 256, 256) in [0, 1], every value by itself, the same each time."""
    return torch.rand(3, 256, 256, generator=torch.Generator().manual_seed(0))


@dataclass
class SelfCheckArguments:
    self_check: bool = field(
        default=False, metadata={"help": "Score the drawings and noise; else the rewards are listed."}
    )
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
    table = Table("picture", *([f"for {drawing}" for drawing in PICTURES] if known.reads_prompt else [name]))
    for picture, scores in zip(_NAMES, verdict.scores.tolist(), strict=True):
        table.add_row(picture, *(f"{score:.4f}" for score in scores))
    show(table)
    for drawing, prompt in PICTURES.items() if known.reads_prompt else ():
        show(f"{drawing}: {prompt}")
    show(
        f"generated pictures mostly get {known.scale}; drawings for their own prompt must get {known.low:g} to "
        f"{known.high:g}"
    )
